"""`percard prune`: its flags, the planner's cost passed down to it, what the child says beside its source, one table."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from . import bench_options as options
from . import console

NAMES = ("layers", "ffn", "heads", "kv_heads", "hidden", "experts", "expert_ffn")


def _size(words: str) -> Any:
    return typer.Option(min=1, help=words)


def prune(
    src: Annotated[str, typer.Argument(metavar="SRC", help="Folder of a 16-bit checkpoint, or a hub id.")],
    out: Annotated[Path | None, typer.Option("--out", help="Folder to write; must not exist.")] = None,
    layers: Annotated[int | None, _size("Blocks that stay.")] = None,
    ffn: Annotated[int | None, _size("Channels of every dense MLP that stay.")] = None,
    heads: Annotated[int | None, _size("Query heads that stay, as many in each KV group.")] = None,
    kv_heads: Annotated[int | None, _size("KV heads that stay, with all their query heads.")] = None,
    hidden: Annotated[int | None, _size("Channels of the residual stream that stay.")] = None,
    experts: Annotated[int | None, _size("Experts of every sparse block that stay.")] = None,
    expert_ffn: Annotated[int | None, _size("Channels of every expert that stay.")] = None,
    target_params: Annotated[
        float | None, typer.Option(help="Instead: a share of the parameters such as 0.75, or their number.")
    ] = None,
    target_cost: Annotated[
        float | None, typer.Option(help="Instead: a share of the source's cost of a token on --card, such as 0.7.")
    ] = None,
    card: Annotated[
        str | None, typer.Option(help="Card for --target-cost and the dry run's table, such as h20-96.")
    ] = None,
    spec: Annotated[str, typer.Option(help="Spec that the child will be served in, for its cost.")] = "w4a16-g128",
    users: Annotated[int, typer.Option(min=1, help="Sequences at once, for its cost.")] = 16,
    ctx: Annotated[int, typer.Option(min=1, help="Tokens that each of them holds.")] = 4096,
    depth_score: Annotated[str, typer.Option(help="Which blocks go: bi, loss, or random as a control.")] = "bi",
    width_score: Annotated[
        str, typer.Option(help="Which channels, heads, experts: activation, or random.")
    ] = "activation",
    calibration: Annotated[str | None, typer.Option(help="Text to score on: .jsonl, a text file, hf:NAME.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Windows of that text.")] = 512,
    seq_len: Annotated[int, typer.Option("--seq-len", min=2, help="Tokens of a window.")] = 2048,
    seed: Annotated[int, typer.Option(min=0, help="Which windows, when there are more; of random choices too.")] = 0,
    group: Annotated[int, typer.Option(min=1, help="Group of the spec that it will be quantised to.")] = 128,
    tp: Annotated[int, typer.Option(min=1, help="Cards that it will be split over.")] = 2,
    ep: Annotated[int, typer.Option(min=1, help="Cards that experts will be split over.")] = 1,
    mask: Annotated[str | None, typer.Option(help="No smaller tensors but zeros: magnitude, wanda, sparsegpt.")] = None,
    sparsity: Annotated[str, typer.Option(help="Of --mask: a share such as 0.5, or 2:4.")] = "0.5",
    text: Annotated[
        Path | None, typer.Option(help="Held-out text: KL, top-1 and perplexity against SRC at the end.")
    ] = None,
    check: Annotated[bool, typer.Option("--check/--no-check", help="Run the child beside the masked source.")] = True,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh/--resume", help="Start over, or go on with what a killed run left.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be cut and what it saves; stop.")] = False,
    as_json: options.AsJson = False,
) -> None:
    from .hub import source
    from .quant.text import Calibration

    asked = {
        n: v
        for n, v in zip(NAMES, (layers, ffn, heads, kv_heads, hidden, experts, expert_ffn), strict=True)
        if v is not None
    }
    origin, texts = source(src), Calibration(calibration, samples, seq_len, seed)
    if mask is not None and (asked or target_params is not None or target_cost is not None or dry_run):
        raise typer.BadParameter("--mask leaves all sizes as they are; take sizes, targets and --dry-run out")
    if out is None and not dry_run:
        raise typer.BadParameter("--out is missing; name the folder to write")
    if text is not None:
        held_out(text, origin)
    try:
        if mask is not None:
            done = _masked(origin, out, mask, sparsity, texts, force, as_json)
        else:
            done = _pruned(
                origin,
                out,
                {"sizes": asked, "target_params": target_params, "target_cost": target_cost, "depth": depth_score}
                | {"width": width_score, "calibration": texts, "check": check},
                {"group": group, "tp": tp, "ep": ep},
                {"card": card, "spec": spec, "users": users, "ctx": ctx},
                force=force,
                fresh=fresh,
                dry_run=dry_run,
                as_json=as_json,
            )
    except KeyboardInterrupt as error:  # the parser would forget what it says about finished parts
        sys.exit(console.fail(error, "percard prune", as_json))
    if text is not None and not dry_run:
        assert out is not None
        done["quality"] = beside(out, origin, text)
    if as_json:
        console.emit_json(done)
    else:
        for line in words(done, out):
            console.show(line)


def _pruned(
    src: Path,
    out: Path | None,
    wish: Mapping[str, Any],
    rule: Mapping[str, int],
    serving: Mapping[str, Any],
    *,
    force: bool,
    fresh: bool,
    dry_run: bool,
    as_json: bool,
) -> dict[str, Any]:
    from .formats.spec import FormatError
    from .quant import prune as pruning
    from .quant.prune_plan import Wish, plan
    from .quant.prune_sizes import Rule

    asked = Wish(**wish, rule=Rule(**rule))
    if asked.target_cost is not None and serving["card"] is None:
        raise FormatError("--target-cost is the cost of a token on a card; name it with --card, such as h20-96")
    cost = None if serving["card"] is None else coster(serving)
    if dry_run:
        planned = plan(src, asked, cost=cost)
        return {**planned.to_dict(), "sizes": sizes_of(planned, serving)}
    assert out is not None
    with console.showing_progress(as_json) as progress:
        return pruning.run(src, out, asked, cost=cost, force=force, fresh=fresh, progress=progress)


def _masked(
    src: Path, out: Path | None, mask: str, sparsity: str, texts: Any, force: bool, as_json: bool
) -> dict[str, Any]:
    from .quant import masks
    from .quant.methods.sparse import Pattern

    assert out is not None
    wish = masks.MaskWish(mask, Pattern.parse(sparsity), texts)
    with console.showing_progress(as_json) as progress:
        return masks.run(src, out, wish, force=force, progress=progress)


def coster(serving: Mapping[str, Any]) -> Any:
    """config.json -> predicted card-seconds of a token in decode, by the planner; smaller is cheaper."""
    from .bench import card_table, plan, plan_parts
    from .formats.kvcache import KVSpec
    from .formats.spec import QuantSpec

    card = card_table.find(serving["card"], card_table.cards())
    spec = QuantSpec.parse(serving["spec"])

    def cost(config: Mapping[str, Any]) -> float:
        shape = plan_parts.shape_of(config, "child")
        step = plan.predict_decode(shape, spec, KVSpec.parse("bf16"), serving["users"], serving["ctx"], card)
        return step.seconds / serving["users"]

    return cost


def sizes_of(planned: Any, serving: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Bytes of source and child in 16 bits and quantised; with a card its tokens per second for the given users as well."""
    from .bench import card_table, plan, plan_parts
    from .formats.kvcache import KVSpec
    from .formats.spec import QuantSpec

    card = None if serving["card"] is None else card_table.find(serving["card"], card_table.cards())
    shapes = [plan_parts.shape_of(config, "model") for config in (planned.source.config, planned.child_config)]
    rows = []
    for name in dict.fromkeys(("bf16", "w8a8", serving["spec"])):
        spec = None if name == "bf16" else QuantSpec.parse(name)
        row: dict[str, Any] = {"spec": name, "bytes": [int(plan.weight_bytes(shape, spec)) for shape in shapes]}
        if card is not None:
            steps = [
                plan.predict_decode(s, spec, KVSpec.parse("bf16"), serving["users"], serving["ctx"], card)
                for s in shapes
            ]
            row |= {"card": card.id, "users": serving["users"], "ctx": serving["ctx"], "basis": steps[1].basis}
            row["tok_s"] = [serving["users"] / step.seconds for step in steps]
        rows.append(row)
    return rows


def held_out(text: Path, model: Path) -> Any:
    """Ids of a held-out text, the first 16,384; FormatError, before hours of work, when nothing can be scored on it."""
    from .bench import quality
    from .formats.spec import FormatError

    if not text.is_file():
        raise FormatError(f"{text}: the held-out text is not there; give a text file")
    ids = quality.read_ids(text, model, 16384)
    if len(ids) < 2:
        raise FormatError(f"{text}: the held-out text has {len(ids)} tokens; give one with at least 2")
    return ids


def beside(child: Path, source: Path, text: Path) -> dict[str, Any]:
    """KL, top-1 and perplexity of the child against its source on a held-out text, both in fp32 through the engine.

    Heads that one tokenizer pads to different sizes are compared over its tokens.
    """
    import torch

    from .bench import engine, quality
    from .formats.checkpoint import Checkpoint
    from .quant.distill_match import shared_vocabulary

    ids = held_out(text, source)
    reference, model = (engine.load(folder, dtype=torch.float32) for folder in (source, child))
    padded = reference.config.vocab != model.config.vocab
    vocab = shared_vocabulary(Checkpoint.open(child), Checkpoint.open(source)) if padded else None
    found = quality.compare(reference, model, ids, vocab=vocab)
    return {
        "kl": found.kl,
        "top1": found.top1,
        "perplexity": found.perplexity,
        "perplexity_source": found.perplexity_reference,
        "protocol": found.protocol,
    }


def words(done: Mapping[str, Any], out: Path | None) -> list[Any]:
    """What was done, or would be, for people."""
    from rich import box
    from rich.table import Table

    parts: list[Any] = []
    if "mask" in done:
        parts.append(
            f"{out}: {done['zeros']:,} of {done['weights']:,} weights are zero ({done['mask']}, {done['pattern']})"
        )
    else:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for name in ("size", "source", "child"):
            table.add_column(name, justify="left" if name == "size" else "right")
        for name, (before, after) in done["cuts"].items():
            table.add_row(name, str(before), str(after))
        table.add_row("parameters", f"{done['parameters']:,}", f"{done['child_parameters']:,} ({done['share']:.1%})")
        for row in done.get("sizes", ()):
            table.add_row(f"{row['spec']}, GB", *(f"{n / 1e9:.3g}" for n in row["bytes"]))
            if "tok_s" in row:
                label = f"{row['spec']}, tok/s on {row['card']}, {row['users']} x {row['ctx']} ({row['basis']})"
                table.add_row(label, *(f"{n:.2g}" if n < 10 else f"{float(f'{n:.2g}'):.0f}" for n in row["tok_s"]))
        parts.append(table)
        if done.get("dropped"):
            parts.append(f"blocks dropped, in order: {', '.join(str(d['block']) for d in done['dropped'])}")
        if "check" in done:
            parts.append(f"checked: {done['check']['words']}")
    if (found := done.get("quality")) is not None:
        parts.append(
            f"against the source: KL {found['kl']:.4f}, top-1 {found['top1']:.1%}, perplexity {found['perplexity']:.2f} "
            f"({found['perplexity_source']:.2f})"
        )
    return [*parts, *(f"note: {line}" for line in done["warnings"])]
