"""`percard bench model`: its flags, one call, its tables. bench_verbs.py hangs it into the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import console
from .bench_options import (
    AsJson,
    DryRun,
    Force,
    Full,
    Out,
    Quick,
    Retry,
    UsdHour,
    command,
    numbers,
    one_of,
    resume,
    telling,
    words,
)


def bench_model(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="[DIR|shape:NAME]", help="A folder, or shape:qwen3-0.6b and its kin; --quick has its own."
        ),
    ] = None,
    specs: Annotated[str | None, typer.Option(help="Specs to compare with FP16, with commas.")] = None,
    against: Annotated[Path | None, typer.Option(help="The 16-bit source, when DIR is quantised already.")] = None,
    text: Annotated[Path | None, typer.Option(help="Held-out text for the quality gate of real weights.")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Run only so many blocks; every row says so.")] = None,
    prompt: Annotated[int | None, typer.Option(min=1, help="Tokens of prefill; default: 512.")] = None,
    new: Annotated[int | None, typer.Option(min=1, help="Tokens of decode, after them; default: 32.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Sequences at once; default: 1.")] = None,
    batches: Annotated[str | None, typer.Option(help="A ladder of them, with commas: 1,4,16.")] = None,
    bound: Annotated[
        str | None, typer.Option(help="Latencies at p99 that same_bound allows: tpot=50ms,ttft=2s.")
    ] = None,
    memory_gb: Annotated[
        float | None, typer.Option("--memory-gb", help="Memory for max_fit, in GB; default: all of this device.")
    ] = None,
    util: Annotated[float, typer.Option(help="Share of it that weights and cache may take.")] = 0.9,
    overhead_gb: Annotated[
        float | None, typer.Option("--overhead-gb", help="Less so many GB; default: 2 on a card, 0 on a CPU.")
    ] = None,
    kv: Annotated[str | None, typer.Option(help="Caches to decode over, with commas: bf16,int8,k8v4,int4.")] = None,
    context: Annotated[
        str | None, typer.Option(help="Depths to decode at, with commas: 1k,8k,32k; default: --prompt.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds of A B A B; default: 3.")] = None,
    head: Annotated[
        str, typer.Option(help="Head of quantised sides: int8-row (and 16bit beside it), or 16bit.")
    ] = "int8-row",
    energy: Annotated[bool, typer.Option(help="A window of 5 s a row for joules, where there is a counter.")] = True,
    quick: Quick = False,
    full: Full = False,
    out: Out = None,
    retry: Retry = None,
    force: Force = False,
    dry_run: DryRun = False,
    usd_hour: UsdHour = None,
    as_json: AsJson = False,
) -> None:
    from . import compose
    from .bench import model_choice

    if batch is not None and batches is not None:
        raise typer.BadParameter("--batch and --batches are two ways to say one thing; keep one")
    size = one_of(quick, full)
    chosen = model_choice.of(size, None if source is None else str(source))
    asked: dict[str, Any] = {
        "layers": layers, "prompt": prompt, "new": new, "batch": batch, "rounds": rounds, "contexts": context,
        "batches": tuple(numbers("--batches", batches)) if batches is not None else None,
        "kv": tuple(words(kv)) if kv is not None else None, "bound": bound,
    }  # fmt: skip
    if batch is not None:
        chosen.plan.pop("batches", None)
    plan = chosen.plan | {name: value for name, value in asked.items() if value is not None}
    plan |= {"head": head, "util": util, "memory_gb": memory_gb, "overhead_gb": overhead_gb, "usd_hour": usd_hour}
    how = resume(retry, force, dry_run)
    with telling("bench model", as_json, dry_run) as say:
        records = compose.bench_model(
            chosen.source,
            chosen.specs if specs is None else words(specs),
            against=against,
            text=chosen.text if text is None and source is None else text,
            plan=plan | {"energy": energy and plan.get("energy", True)},
            out=out,
            progress=say,
            command=command(),
            **how,
        )
    if not dry_run:
        raise typer.Exit(console.show_records(records, as_json, compose.show_records))
