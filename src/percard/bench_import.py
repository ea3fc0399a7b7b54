"""`percard bench import`: its flags, one call, its rows. bench_verbs.py hangs it into the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import bench_options, console


def bench_import(
    tool: Annotated[str, typer.Argument(metavar="TOOL", help="vllm-serve, sglang or llama-bench.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The result that the tool wrote.")],
    out: Annotated[
        Path, typer.Option("--out", help="Append the records to this JSONL file; what it holds stays once.")
    ],
    model: Annotated[str | None, typer.Option(help="Model, where the file does not name it.")] = None,
    spec: Annotated[str | None, typer.Option(help="Spec of the weights: w4a16-g128, bf16 ...")] = None,
    kv: Annotated[str | None, typer.Option(help="Spec of the cache: bf16, int8 ...")] = None,
    card: Annotated[str | None, typer.Option(help="Card it ran on, by its id in cards.json: h20-96.")] = None,
    cards: Annotated[int | None, typer.Option(min=1, help="How many of them.")] = None,
    mix: Annotated[str | None, typer.Option(help="A name for the requests that were sent.")] = None,
    tpot_includes_first: Annotated[
        bool, typer.Option("--tpot-includes-first", help="Convert a TPOT that counts the first token in.")
    ] = False,
    usd_hour: bench_options.UsdHour = None,
    as_json: bench_options.AsJson = False,
) -> None:
    from .bench import imports

    said = imports.Said(model, spec, kv, card, cards, mix, tpot_includes_first, usd_hour)
    told = console.showing_steps(as_json)
    records = imports.load(tool, file, said, say=told, command=bench_options.command())
    fresh = imports.append_new(out, records)
    told(f"{fresh} of {len(records)} records are new in {out}")
    for record in records:
        if as_json:
            print(record.to_json(), flush=True)
        else:
            console.show(f"{record.case}: {imports.in_words(record)}")
