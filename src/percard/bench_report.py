"""`percard bench report`: its flags, one call, tables. bench_verbs.py hangs it into the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import console


def bench_report(
    paths: Annotated[
        list[Path], typer.Argument(metavar="FILE|DIR...", help="Records as JSONL, or folders that a bench wrote.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="Write report.html, report.md, table.csv and plots/ into this folder.")
    ] = None,
    readme: Annotated[Path | None, typer.Option(help="Write the table of model runs into this file's block.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one object a line.")] = False,
) -> None:
    from . import compose

    runs = [compose.read_records(path) for path in paths]
    records = [record for run in runs for record in run]
    if readme is not None:
        compose.write_block(readme, records)
    if as_json:
        for record in records:
            print(record.to_json(), flush=True)
    for path, run in zip(paths, runs, strict=True):
        if len(paths) > 1 and not as_json:
            console.show(f"\n{path}")
        for part in [] if as_json else compose.show_records(run):
            console.show(part)
    if out is not None:
        from .bench import report_folder

        told = console.showing_steps(as_json)
        names = ", ".join(dict.fromkeys(path.stem if path.is_file() else path.name for path in paths))
        for file in report_folder.write(out, records, heading=f"percard: {names}", say=told):
            told(f"wrote {file}")
