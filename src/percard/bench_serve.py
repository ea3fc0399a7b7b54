"""`percard bench serve`: its flags, one call, two tables. bench_verbs.py hangs it into the command line."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from . import console
from .bench_options import (
    AsJson,
    DryRun,
    Force,
    Out,
    Quick,
    Retry,
    UsdHour,
    command,
    numbers,
    resume,
    telling,
    words,
)


def bench_serve(
    source: Annotated[
        str | None, typer.Argument(metavar="DIR|shape:NAME", help="A folder, or shape:qwen3-0.6b and its kin.")
    ] = None,
    specs: Annotated[str | None, typer.Option(help="Specs of weights besides 16 bits, with commas.")] = None,
    kv: Annotated[str | None, typer.Option("--kv", help="Caches, with commas; default: bf16.")] = None,
    mix: Annotated[str | None, typer.Option(help="chat (default), code, long, or a JSONL file of lengths.")] = None,
    scale: Annotated[float | None, typer.Option(help="Shortens all lengths of the mix, 0 .. 1.")] = None,
    requests: Annotated[int | None, typer.Option(min=1, help="How many; default: 32.")] = None,
    concurrency: Annotated[str | None, typer.Option(help="Requests of a wave, with commas; default: 1,4,16.")] = None,
    bound: Annotated[str | None, typer.Option(help="Promise at p99, such as ttft=2s,tpot=50ms.")] = None,
    text: Annotated[Path | None, typer.Option(help="Held-out text for the quality gate of real weights.")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Run only so many blocks; every row says so.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds of A B A B; default: 3.")] = None,
    head: Annotated[str, typer.Option(help="Head of quantised sides: int8-row, or 16bit.")] = "int8-row",
    seed: Annotated[int, typer.Option(help="Of lengths, tokens and synthetic weights.")] = 0,
    memory_gb: Annotated[
        float | None, typer.Option("--memory-gb", help="What weights and caches may take; default: all there is.")
    ] = None,
    usd_hour: UsdHour = None,
    quick: Quick = False,
    out: Out = None,
    retry: Retry = None,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    from . import compose
    from .bench import serve

    asked: dict[str, Any] = {
        "specs": specs and tuple(words(specs)),
        "kv": kv and tuple(words(kv)),
        "requests": requests,
        "concurrency": concurrency and tuple(numbers("--concurrency", concurrency)),
        "layers": layers,
        "rounds": rounds,
        "seed": seed or None,
        "memory": memory_gb and memory_gb * 1e9,
        "usd_hour": usd_hour,
        "mix": mix,
        "scale": scale,
        "bound": bound,
    }
    given = {name: value for name, value in asked.items() if value is not None}
    chosen, plan, held_out = serve.choice(quick, source, text, head=head, **given)
    where = chosen if chosen.startswith("shape:") else compose.source(chosen)
    how = resume(retry, force, dry_run)
    with telling("bench serve", as_json, dry_run) as say:
        records = serve.run(where, plan, text=held_out, out=out, progress=say, command=command(), **how)
    if not dry_run:
        raise typer.Exit(console.show_records(records, as_json, _render))


def _render(records: Any) -> Iterable[Any]:
    """Both tables and what stands under them."""
    from .bench import report_ratios, report_serve

    for lines in report_serve.tables(records):
        yield report_ratios.table(lines)
        yield from (f"- {told}" for told in lines.notes)
