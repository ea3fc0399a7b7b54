"""`percard bench report`: its flags, one call, tables. bench_verbs.py hangs it into the command line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import console

if TYPE_CHECKING:
    from rich.console import RenderableType

    from .bench.record import Record


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
    from .bench import sources

    runs = [compose.read_records(path) for path in paths]
    records = [record for run in runs for record in run]
    with sources.reading(", ".join(map(str, paths))):
        if readme is not None:
            compose.write_block(readme, records)
        if as_json:
            for record in records:
                print(record.to_json(), flush=True)
        for path, run in zip(paths, runs, strict=True):
            if len(paths) > 1 and not as_json:
                console.show(f"\n{path}")
            for part in [] if as_json else _parts(run):
                console.show(part)
        if out is not None:
            from .bench import report_folder

            told = console.showing_steps(as_json)
            names = ", ".join(dict.fromkeys(path.stem if path.is_file() else path.name for path in paths))
            for file in report_folder.write(out, records, heading=f"percard: {names}", say=told):
                told(f"wrote {file}")


def _parts(run: Sequence[Record]) -> Iterator[RenderableType]:
    """The tables that the verbs themselves print; of what other programs measured the table of the page."""
    from . import bench_layer, compose
    from .bench import report_lines, report_ratios, report_serve, report_tables

    ours = [r for r in run if r.source == "percard"]
    yield from compose.show_records(ours)
    for lines in report_serve.tables([r for r in ours if r.level == "serve"]):
        yield report_ratios.table(lines)
        yield from (f"- {told}" for told in lines.notes)
    if layers := [r for r in ours if r.level == "layer"]:
        yield from bench_layer.show(layers)
    for group in report_lines.groups(r for r in run if r.source != "percard"):
        yield from (table.markdown() for table in report_tables.verdict(group))
