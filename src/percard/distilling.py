"""`percard distill`: its flags, the held-out text measured before and after, one table."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from . import bench_options as options
from . import console


def distill(
    student: Annotated[
        str, typer.Argument(metavar="STUDENT", help="Folder of a checkpoint, or a hub id; a quantised one with --qad.")
    ],
    teacher: Annotated[
        list[str],
        typer.Option(
            help="Folder or hub id of what it learns from, or a folder of percard capture. Several: captures, and at most one model."
        ),
    ],
    data: Annotated[
        str | None, typer.Option(help="Text to train on: .jsonl, a text file, hf:NAME. A capture brings its own.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder to write; must not exist.")] = None,
    loss: Annotated[
        str | None, typer.Option(help="fkl (default), rkl, jsd, none: hard labels alone. Of a capture: topk.")
    ] = None,
    beta: Annotated[float, typer.Option(help="Of jsd: 0 is forward KL, 1 reverse KL.")] = 0.5,
    temperature: Annotated[float, typer.Option(help="Of both distributions; the loss is times its square.")] = 1.0,
    hard: Annotated[float, typer.Option(help="Weight of the text's own tokens (cross-entropy) beside it.")] = 0.0,
    hidden: Annotated[str | None, typer.Option(help="A loss on hidden states as well: mse or cosine.")] = None,
    hidden_blocks: Annotated[str, typer.Option(help="At which blocks: 3,7, or student:teacher as in 3:4,7:9.")] = "",
    hidden_weight: Annotated[float, typer.Option(help="Its weight.")] = 1.0,
    steps: Annotated[int | None, typer.Option(help="How long; default: once through the text.")] = None,
    tokens: Annotated[float | None, typer.Option(help="Instead: so many tokens, such as 2.5e9.")] = None,
    seq_len: Annotated[int, typer.Option("--seq-len", help="Tokens of a window.")] = 2048,
    batch: Annotated[int, typer.Option(help="Windows of a step, over all processes.")] = 32,
    micro: Annotated[
        int | None, typer.Option(help="Windows that run at once in a process; default: all of them.")
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(
            help="Peak learning rate; falls to a tenth. Default 5e-5; --qad 1e-2 of a step, --scales-only 1e-3."
        ),
    ] = None,
    decay: Annotated[float, typer.Option(help="Weight decay of matrices.")] = 0.01,
    every: Annotated[int, typer.Option(help="Steps between states that a killed run goes on from.")] = 200,
    seed: Annotated[int, typer.Option(help="Of the order of the windows.")] = 0,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing/--no-checkpointing", help="Compute activations again: less memory, slower.")
    ] = True,
    dtype: Annotated[str | None, typer.Option(help="Of products: bf16 (default on a card) or fp32 (on a CPU).")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: the card when there is one.")] = None,
    qad: Annotated[
        str | None, typer.Option(help="Train with the weights of this spec, such as w4a16-g64, and write it.")
    ] = None,
    scales_only: Annotated[bool, typer.Option("--scales-only", help="Codes stay, scales are trained.")] = False,
    learn_scales: Annotated[
        bool, typer.Option("--learn-scales", help="With --qad: scales as well as weights.")
    ] = False,
    train_rest: Annotated[
        bool, typer.Option("--train-rest", help="With --qad or --scales-only: embeddings, norms and head as well.")
    ] = False,
    calibration: Annotated[
        str | None, typer.Option(help="What GPTQ reads first when STUDENT is 16-bit; default: --data.")
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Windows of it; default: 256.")] = None,
    text: Annotated[
        Path | None, typer.Option(help="Held-out text: KL, top-1 and perplexity against the teacher, before and after.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Go on although the dry run asks something.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh/--resume", help="Start over, or go on from the last state of a killed run.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be trained and what it needs; stop.")
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    if out is None and not dry_run:
        raise typer.BadParameter("--out is missing; name the folder to write")
    first = int(os.environ.get("RANK", "0")) == 0
    try:
        from .hub import source
        from .quant.distill_plan import Wish

        ours, theirs = source(student), [source(folder) for folder in teacher]
        wish = Wish(
            data=data, loss=loss, beta=beta, temperature=temperature, hard=hard, hidden=hidden,
            hidden_blocks=hidden_blocks, hidden_weight=hidden_weight, steps=steps,
            tokens=None if tokens is None else _whole(tokens), seq_len=seq_len, batch=batch, micro=micro, lr=lr,
            decay=decay, every=every, seed=seed, checkpointing=checkpointing, dtype=dtype, device=device, qad=qad,
            scales_only=scales_only, learn_scales=learn_scales, train_rest=train_rest, calibration=calibration,
            samples=samples,
        )  # fmt: skip
        if dry_run:
            done = _planned(ours, theirs, wish)
        else:
            assert out is not None
            done = _trained(ours, theirs, out, wish, text, first, yes, force, fresh, as_json)
    except BaseException as error:
        if not first:  # the first process says it
            sys.exit(console.describe(error)[0])
        if isinstance(error, KeyboardInterrupt):  # the parser would forget what it says about the last state
            sys.exit(console.fail(error, "percard distill", as_json))
        raise
    if not first:
        return
    if as_json:
        console.emit_json(done)
    else:
        for line in words(done, out):
            console.show(line)
    if dry_run and done["question"] and not yes:
        raise typer.Exit(console.REFUSED)


def _whole(tokens: float) -> int:
    if not 1 <= tokens < 1e15:
        raise typer.BadParameter(f"--tokens {tokens:g}: expected a number of tokens such as 2.5e9")
    return int(tokens)


def _planned(student: Path, teacher: list[Path], wish: Any) -> dict[str, Any]:
    from .quant.distill_plan import plan

    planned = plan(student, teacher, wish)
    known = wish.steps is not None or wish.tokens is not None
    return {**planned.to_dict(), "steps": planned.steps(0) if known else None}


def _trained(
    student: Path,
    teacher: list[Path],
    out: Path,
    wish: Any,
    text: Path | None,
    first: bool,
    yes: bool,
    force: bool,
    fresh: bool,
    as_json: bool,
) -> dict[str, Any]:
    from .pruning import beside, held_out
    from .quant import distill as distilling

    def measure(model: Path, reference: Path) -> dict[str, Any]:
        assert text is not None
        return beside(model, reference, text)

    if text is not None:
        held_out(text, student)
    with console.showing_progress(as_json) as progress:
        return distilling.run(
            student,
            teacher,
            out,
            wish,
            yes=yes,
            force=force,
            fresh=fresh,
            measure=measure if text is not None else None,
            progress=progress if first else None,
        )


def words(done: Mapping[str, Any], out: Path | None) -> list[Any]:
    """What was trained, or would be, for people."""
    sizes, wish = done["parameters"], done["wish"]
    length = "once through the text" if done["steps"] is None else f"{done['steps']:,} steps"
    theirs = f"{sizes['teacher']:,}" if sizes["teacher"] else "captured"
    batch = f"{wish['batch']} x {done['window']} tokens"
    parts: list[Any] = [
        f"student {sizes['student']:,} parameters, teacher {theirs}; {done['vocab']:,} tokens in common",
        f"{done['loss']}, {length} of {batch}, learning rate {wish['lr']:g}, text {done['text']}",
    ]
    if (qad := done["qad"]) is not None:
        parts.append(
            f"{qad['spec']}: trained are {', '.join(qad['train'])}; {qad['modules']} linears ({qad['weights']:,} weights, "
            f"{qad['scales']:,} scales), from {qad['start']}"
        )
    if "curve" not in done:
        need = done["memory"]
        parts.append(
            f"memory without activations: student {need['student'] / 1e9:.3g} GB, teacher {need['teacher'] / 1e9:.3g} GB, "
            "over all processes"
        )
    else:
        begin, end = done["curve"][0], done["curve"][-1]
        parts.append(f"{out}: loss {begin['loss']:.4f} to {end['loss']:.4f} over {done['trained_tokens']:,} tokens")
    if (quality := done.get("quality")) is not None:
        from .quant.distill_report import recovered

        before, after = quality["before"], quality["after"]
        parts.append(
            f"against the teacher: KL {before['kl']:.4f} to {after['kl']:.4f}, top-1 {before['top1']:.1%} to {after['top1']:.1%}, "
            f"perplexity {before['perplexity']:.2f} to {after['perplexity']:.2f} ({after['perplexity_source']:.2f})"
        )
        if (
            share := recovered(quality)
        ) is not None and qad is None:  # rounding loses too little cross-entropy to share
            parts.append(f"of what was lost came back: KL {share['kl']:.0%}, cross-entropy {share['ce']:.0%}")
    if done["question"]:
        parts.append(f"question: {done['question']}")
    return [*parts, *(f"note: {line}" for line in done["warnings"])]
