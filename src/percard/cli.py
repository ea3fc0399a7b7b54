"""The command line: parse, call one function, print. `percard --help` loads neither torch nor a floor of the house."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from . import (
    __version__,
    bench_options,
    bench_verbs,
    capturing,
    console,
    distilling,
    manual,
    planning,
    pruning,
    running,
)

app = typer.Typer(
    help=manual.ROOT,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
app.add_typer(bench_verbs.app, name="bench")

AsJson = bench_options.AsJson
Force = Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"percard {__version__}")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    as_json: AsJson = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    if as_json:  # `percard --json verb` means `percard verb --json`
        wanted = {"as_json": True}
        context.default_map = dict.fromkeys(_names(app), wanted) | {
            "bench": dict.fromkeys(_names(bench_verbs.app), wanted)
        }


def _names(of: typer.Typer) -> list[str]:
    """The verbs of an app."""
    return [str(c.name or getattr(c.callback, "__name__", "")) for c in of.registered_commands]


@app.command(help=manual.QUANTIZE, short_help="A checkpoint becomes INT8 or INT4.")
def quantize(
    src: Annotated[
        str, typer.Argument(metavar="SRC", help="Folder of a checkpoint, or a hub id such as Qwen/Qwen3-8B.")
    ],
    spec: Annotated[str | None, typer.Option(help="What weights become, such as w4a16-g128.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder to write; must not exist.")] = None,
    method: Annotated[
        str, typer.Option(help="How codes are found: rtn, hqq (no text); gptq, awq, smoothquant, rotate, autoround.")
    ] = "rtn",
    calibration: Annotated[
        str | None,
        typer.Option(help="Text the method calibrates on: .jsonl, a text file, hf:NAME. Else a small built-in."),
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Windows of that text.")] = None,
    seq_len: Annotated[int | None, typer.Option("--seq-len", min=2, help="Tokens of a window.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Which windows, when there are more.")] = 0,
    experts: Annotated[str, typer.Option(help="What an expert's last matrix sees: blend, routed, all.")] = "blend",
    text: Annotated[
        Path | None, typer.Option(help="Held-out text: KL and top-1 at the end; layers that fail get more bits.")
    ] = None,
    engine: Annotated[
        str | None, typer.Option(help="Who will serve it, such as vllm==0.33.0: refused if it cannot.")
    ] = None,
    tp: Annotated[int, typer.Option(min=1, help="Cards that it will be split over.")] = 1,
    recipe: Annotated[Path | None, typer.Option(help="YAML file with all of it, instead of --spec.")] = None,
    print_recipe: Annotated[
        bool, typer.Option("--print-recipe", help="Print the recipe these flags mean; stop.")
    ] = False,
    force: Force = False,
    fresh: Annotated[
        bool, typer.Option("--fresh/--resume", help="Start over, or go on with what a killed run left.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would happen and what it needs; stop.")] = False,
    as_json: AsJson = False,
) -> None:
    from . import compose

    flags: dict[str, Any] = {
        "method": method,
        "calibration": calibration,
        "samples": samples,
        "seq_len": seq_len,
        "seed": seed,
    }
    flags |= {"experts": experts, "text": text, "engine": engine, "tp": tp}
    plan = compose.recipe(spec, file=recipe, **flags)
    if print_recipe:
        console.emit_json(plan.to_dict()) if as_json else print(plan.to_yaml(), end="")
        return
    if dry_run:
        preflight = compose.preflight(src, plan, out)
        _show(preflight, as_json)
        raise typer.Exit(console.DONE if preflight.ok else console.REFUSED)
    target = out if out is not None else Path(plan.out) if plan.out else None
    if target is None:
        raise typer.BadParameter("--out is missing; name the folder to write")
    try:
        with console.showing_progress(as_json) as progress:
            report = compose.quantize(src, target, recipe=plan, force=force, fresh=fresh, progress=progress)
    except KeyboardInterrupt as error:  # the parser would forget what it says about finished units
        sys.exit(console.fail(error, "percard quantize", as_json))
    _show(report, as_json, compose.show_report)
    if report.status == "red":
        raise typer.Exit(console.GATE_RED)


@app.command(help=manual.VERIFY, short_help="Re-open what was written, compare with its source.")
def verify(
    dst: Annotated[Path, typer.Argument(metavar="DST", help="What `quantize` wrote.")],
    against: Annotated[str, typer.Option(help="The source checkpoint: a folder or a hub id.")],
    text: Annotated[
        Path | None, typer.Option(help="Held-out text, or *.jsonl; adds KL and top-1 against the source.")
    ] = None,
    level: Annotated[
        str | None, typer.Option(help="bytes, weights, blocks or model; default: model with --text, else weights.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(min=2, help="Read so many tokens of --text; default: all.")] = None,
    kv: Annotated[
        str, typer.Option(help="Caches to run DST over, with commas: int8,k8v4,int4,calibrated. Needs --text.")
    ] = "",
    as_json: AsJson = False,
) -> None:
    from . import compose

    with console.showing_progress(as_json) as progress:
        verdict = compose.verify(
            dst, against, level=level, text=text, tokens=tokens, kv=bench_options.words(kv), progress=progress
        )
    _show(verdict, as_json)
    raise typer.Exit(verdict.exit_code)


@app.command(
    "calibrate-kv", help=manual.CALIBRATE_KV, short_help="Choose a cache spec for each layer, measured on a text."
)
def calibrate_kv(
    path: Annotated[str, typer.Argument(metavar="DIR", help="Folder of a checkpoint, FP16 or quantised.")],
    text: Annotated[Path, typer.Option(help="Text to measure on: a text file or *.jsonl.")],
    budget: Annotated[float, typer.Option(help="KL in nats a token that all layers together may cost.")] = 0.002,
    specs: Annotated[
        str, typer.Option(help="What a layer may become, with commas: int8, k8v4, int4, k8v4-sym, int4-sym.")
    ] = "int8,k8v4,int4",
    tokens: Annotated[int, typer.Option(min=32, help="Read so many tokens of --text.")] = 8192,
    force: Annotated[bool, typer.Option("--force", help="Replace a calibration that is there.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say how much work it is; stop.")] = False,
    as_json: AsJson = False,
) -> None:
    from . import calibrate_kv as calibration

    try:
        with console.showing_progress(as_json) as progress:
            found = calibration.calibrate(
                path,
                text,
                budget=budget,
                specs=[name for name in specs.split(",") if name],
                tokens=tokens,
                force=force,
                dry_run=dry_run,
                progress=progress,
            )
    except KeyboardInterrupt as error:  # the parser would forget what it says about finished layers
        sys.exit(console.fail(error, "percard calibrate-kv", as_json))
    _show(found, as_json)


app.command(help=manual.PRUNE, short_help="A checkpoint becomes a smaller one of its family.")(pruning.prune)
app.command(help=manual.CAPTURE, short_help="Write down what a teacher says, for students.")(capturing.capture)
app.command(help=manual.DISTILL, short_help="A smaller model learns from a larger one.")(distilling.distill)
app.command("run", help=manual.RUN, short_help="Prune, distil, quantise, verify, bench: one recipe.")(running.run)


@app.command(help=manual.GENERATE, short_help="Complete a prompt.")
def generate(
    path: Annotated[Path, typer.Argument(metavar="DIR", help="Checkpoint folder, FP16 or quantised.")],
    prompt: Annotated[str, typer.Option(help="Text to go on from.")],
    max_new: Annotated[int, typer.Option("--max-new", min=1, help="Tokens at most.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 = the likeliest token each time.")] = 0.0,
    top_p: Annotated[
        float, typer.Option("--top-p", min=0.0, max=1.0, help="Draw from this share of probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    kv: Annotated[
        str | None, typer.Option(help="How the cache holds keys and values: bf16, int8, calibrated ...")
    ] = None,
    as_json: AsJson = False,
) -> None:
    from . import completion

    done = completion.generate(path, prompt, max_new=max_new, temperature=temperature, top_p=top_p, seed=seed, kv=kv)
    if as_json:
        console.emit_json(done)
    else:
        print(done.prompt + done.text)
        cache = "" if done.kv == "bf16" else f", {done.kv} cache"
        print(f"[{done.tokens} tokens, {done.tokens_per_s:.1f} tok/s, {done.spec}{cache}]", file=sys.stderr)


@app.command(help=manual.DOCTOR, short_help="What serves on this machine, and what does not.")
def doctor(as_json: AsJson = False) -> None:
    from . import doctor as examination

    _show(examination.examine(), as_json, examination.show)


@app.command("inspect", help=manual.INSPECT, short_help="Compile the Triton kernels for other cards, without a card.")
def inspect_kernels(
    ops: Annotated[list[str] | None, typer.Argument(metavar="[OP ...]", help="Names of ops; all by default.")] = None,
    arch: Annotated[str, typer.Option(help="Architectures, with commas.")] = "sm_80,sm_89,sm_90,sm_100",
    everything: Annotated[
        bool, typer.Option("--all", help="All kernels of real layers, not only the typical.")
    ] = False,
    other_triton: Annotated[
        Path | None,
        typer.Option("--triton", help="Folder with another Triton: pip install --target FOLDER triton==3.6.0"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    from .kernels import inspection

    at = None if other_triton is None else str(other_triton.resolve(strict=True))
    rows = inspection.inspect(ops or None, arch.split(","), everything=everything, triton_at=at)
    console.emit_json(rows) if as_json else console.show_kernels(rows)
    wrong = inspection.faults(rows)
    for line in wrong:
        print(line, file=sys.stderr)
    if wrong:
        raise typer.Exit(console.GATE_RED)


@app.command(help=manual.TUNE, short_help="Measure which Config each op takes on this card.")
def tune(
    ops: Annotated[list[str] | None, typer.Argument(metavar="[OP ...]", help="Names of ops; all by default.")] = None,
    model: Annotated[str | None, typer.Option(help="Only layers of this model, such as qwen3-8b.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Begin nothing new after so long.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder; default: ~/.cache/percard/tuned.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Measure what has an entry as well.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be measured; needs no card.")] = False,
    as_json: AsJson = False,
) -> None:
    from . import tune as tuning

    with console.showing_progress(as_json) as progress:
        done = tuning.tune(
            ops or (), model=model, minutes=minutes, out=out, dry_run=dry_run, again=again, progress=progress
        )
    _show(done, as_json)
    raise typer.Exit(done.exit_code)


app.command("plan", help=manual.PLAN, short_help="How many cards, which spec, what a token costs.")(planning.verb)


@app.command(help=manual.DEMO, short_help="The whole road on a small model, in one table.")
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for checkpoints and report.")] = Path("out/demo"),
    model: Annotated[Path | None, typer.Option(help="Small checkpoint; default: examples/tiny-qwen3.")] = None,
    text: Annotated[Path | None, typer.Option(help="Held-out text; default: heldout.txt of the model.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer layers, shorter text, one round: for CI.")] = False,
    as_json: AsJson = False,
) -> None:
    from . import compose

    report = compose.demo(
        out,
        model=model,
        text=text,
        quick=quick,
        say=(lambda part: None) if as_json else console.show,
        showing=lambda: console.showing_progress(as_json),
        steps=console.showing_steps(as_json),
    )
    if as_json:
        console.emit_json(report.data)
    raise typer.Exit(report.exit_code)


def _show(result: Any, as_json: bool, render: Any = None) -> None:
    """A result on stdout: JSON, or what `render` (or its own `show`) makes of it."""
    if as_json:
        console.emit_json(result.to_dict() if hasattr(result, "to_dict") else result)
        return
    for part in render(result) if render is not None else result.show():
        console.show(part)


def _terminated(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt  # `kill` ends a verb as tidily as Ctrl-C


def run(arguments: Sequence[str]) -> int:
    """Runs a command line and returns the exit code; errors are one line on stderr."""
    words = [a for a in arguments[:2] if not a.startswith("-")]
    verb = " ".join(["percard", *words[: 2 if words[:1] == ["bench"] else 1]])
    try:
        if not arguments:
            app(args=["--help"], standalone_mode=False, prog_name="percard")
            return console.BAD_INPUT
        code = app(args=list(arguments), standalone_mode=False, prog_name="percard")
    except (KeyboardInterrupt, typer.Abort):
        return console.fail(KeyboardInterrupt(), verb, "--json" in arguments)
    except SystemExit as ending:  # of a verb that has said why, or the parser's answer to a reader that went away
        return ending.code if isinstance(ending.code, int) else console.DONE
    except Exception as error:
        return console.fail(error, verb, "--json" in arguments)
    if code == console.INTERRUPTED:  # the parser's answer to Ctrl-C
        return console.fail(KeyboardInterrupt(), verb, "--json" in arguments)
    return code if isinstance(code, int) else console.DONE


def main() -> None:
    """Entry point of the `percard` command."""
    signal.signal(signal.SIGTERM, _terminated)
    sys.exit(run(sys.argv[1:]))
