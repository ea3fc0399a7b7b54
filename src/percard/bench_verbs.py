"""`percard bench ...`: flags, one call, tables. A verb with many flags has a file of its own, bench_<verb>.py."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from . import (
    bench_attention,
    bench_card,
    bench_compare,
    bench_distill,
    bench_import,
    bench_ladder,
    bench_layer,
    bench_model,
    bench_report,
    bench_serve,
    console,
    manual,
)
from .bench_options import (
    AsJson,
    DryRun,
    Force,
    Full,
    Out,
    Quick,
    Retry,
    command,
    numbers,
    one_of,
    resume,
    telling,
    words,
)

app = typer.Typer(
    help="Measure: tokens per second against FP16, never without quality and spread beside it.",
    short_help="Measure: tokens per second against FP16.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


app.command("model", help=manual.BENCH_MODEL, short_help="Whole models: prefill and decode.")(bench_model.bench_model)


@app.command("ops", help=manual.BENCH_OPS, short_help="Linears of real layers against torch and rivals.")
def bench_ops(
    models: Annotated[str | None, typer.Option(help="Whose layers, with commas; default: qwen3-0.6b.")] = None,
    specs: Annotated[str | None, typer.Option(help="Specs, with commas; default: w4a16-g128,w8a8,w4a8.")] = None,
    tokens: Annotated[
        str | None, typer.Option(help="Rows of activations, with commas; default: 1,16,512 of 1 4 16 ... 16384.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds of A B A B; default: 7.")] = None,
    impl: Annotated[str | None, typer.Option(help="A body by name: triton, cpu.")] = None,
    quick: Quick = False,
    full: Full = False,
    out: Out = None,
    retry: Retry = None,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    from .bench import card, ops, slot_report

    given: dict[str, Any] = {"models": models and words(models), "specs": specs and words(specs), "rounds": rounds}
    given["tokens"] = tokens and numbers("--tokens", tokens)
    chosen = ops.choice(one_of(quick, full), card.default_device().type)
    chosen = dataclasses.replace(chosen, **{name: value for name, value in given.items() if value})
    how = resume(retry, force, dry_run)
    with telling("bench ops", as_json, dry_run) as say:
        records = ops.run(chosen, impl=impl, out=out, progress=say, command=command(), **how)
    if not dry_run:
        raise typer.Exit(console.show_records(records, as_json, lambda rows: [slot_report.of_records(rows)]))


app.command("ladder", help=manual.BENCH_LADDER, short_help="The smallest model that does your task.")(
    bench_ladder.bench_ladder
)
app.command("attention", help=manual.BENCH_ATTENTION, short_help="Attention over a quantised cache.")(
    bench_attention.bench_attention
)
app.command("distill", help=manual.BENCH_DISTILL, short_help="A head, a divergence and their gradients in one.")(
    bench_distill.bench_distill
)


app.command("serve", help=manual.BENCH_SERVE, short_help="Seeded requests in waves: TTFT, TPOT, tokens per card.")(
    bench_serve.bench_serve
)
app.command("layer", help=manual.BENCH_LAYER, short_help="One decoder layer, or one rank's part of it.")(
    bench_layer.bench_layer
)
app.command("card", help=manual.BENCH_CARD, short_help="Roofs of this machine, for percard plan.")(
    bench_card.bench_card
)


app.command("import", help=manual.BENCH_IMPORT, short_help="Results of vLLM, SGLang, llama.cpp as records.")(
    bench_import.bench_import
)


app.command("compare", help=manual.BENCH_COMPARE, short_help="Two runs: slower, faster, worse, missing.")(
    bench_compare.bench_compare
)


@app.command("slot", help=manual.BENCH_SLOT, short_help="Ten minutes of a card, one folder.")
def bench_slot(
    out: Annotated[Path, typer.Option("--out", help="Folder; one of an earlier call is gone on with.")],
    minutes: Annotated[float, typer.Option(help="How long the card is free.")] = 10.0,
    device: Annotated[str, typer.Option(help="cuda, or cpu to try the run without a card.")] = "cuda",
    retry: Annotated[str | None, typer.Option(help="`failed`: measure failed cells again.")] = None,
    as_json: AsJson = False,
) -> None:
    from .bench import slot

    if retry not in (None, "failed"):
        raise typer.BadParameter(f"--retry {retry}: the one choice is failed")
    told = console.showing_steps(as_json)
    code = slot.run(out, minutes, device=device, retry_failed=retry == "failed", say=told)
    if code != console.BAD_INPUT:
        console.emit_json(slot.manifest(out)) if as_json else console.show(f"{out}/report.md")
    raise typer.Exit(code)


app.command("report", help=manual.BENCH_REPORT, short_help="Tables of records, once more, and one page of them.")(
    bench_report.bench_report
)
