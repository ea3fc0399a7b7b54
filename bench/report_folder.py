"""`percard bench report ... --out DIR`: report.html, report.md, table.csv, records.jsonl and plots/*.svg from any records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from . import model_ratios, report, report_csv, report_html, report_lines, report_plots, report_style, report_tables
from .folder import replace
from .record import Record
from .report_style import Drawing


def write(
    folder: str | Path,
    records: Sequence[Record],
    *,
    heading: str = "percard bench report",
    keep: Sequence[str] = (),
    plots: bool = True,
    say: Callable[[str], None] = lambda words: None,
) -> list[Path]:
    """Writes the report into `folder` and returns its files; names in `keep` are left as they are.

    Each file is replaced whole, so that a reader never sees half of one. Without matplotlib (or with plots=False) there are
    tables only, and both pages say so in one line. OSError as the system has it.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    records = model_ratios.completed(records)
    drawings, without = report_plots.figures(records)
    if why := "No plots: they were not asked for." if not plots else report_style.missing():
        say(why)
        drawings, without = [], [why]
    pictures = _draw(drawings)
    facts, tables = report_lines.header(records), report_tables.all_of(records)
    notes = _notes(records)
    html = report_html.page(heading, facts, tables, pictures, notes, without)
    files = {
        "report.html": html,
        "report.md": _markdown(heading, facts, tables, [d for d, _, _ in pictures], notes, without),
        "table.csv": report_csv.text(records),
        "records.jsonl": "".join(record.to_json() + "\n" for record in records),
    }
    files |= {f"plots/{d.name}.svg": report_style.standalone(svg) for d, svg, _ in pictures}
    written = []
    for name, text in files.items():
        if name not in keep:
            (target / name).parent.mkdir(exist_ok=True)
            replace(target / name, text.encode())
            written.append(target / name)
    for old in (target / "plots").glob("*.svg"):
        if f"plots/{old.name}" not in files:  # of a figure that these records no longer have
            old.unlink()
    return written


def _draw(drawings: Sequence[Drawing]) -> list[tuple[Drawing, str, str]]:
    """Each drawing with its svg for a page and for a phone."""
    if not drawings:
        return []
    made: dict[str, list[str]] = {}
    for drawing, _, figure in report_plots.drawn(drawings):
        made.setdefault(drawing.name, []).append(report_style.svg(figure))
    return [(drawing, *made[drawing.name]) for drawing in drawings]  # type: ignore[misc]


def _notes(records: Sequence[Record]) -> list[str]:
    """The footnotes of bench/report.py for whole models that this program measured."""
    return report.footnotes([r for r in records if r.level == "model" and r.source == "percard" and r.status == "ok"])


def _markdown(
    heading: str,
    facts: Sequence[tuple[str, Sequence[str]]],
    tables: dict[str, list[report_tables.Table]],
    drawings: Sequence[Drawing],
    notes: Sequence[str],
    without: Sequence[str],
) -> str:
    parts = [f"# {heading}", "\n".join(f"- {name}: {'; '.join(told)}" for name, told in facts)]
    for name, title in (
        ("verdict", "Verdict"),
        ("missing", ""),
        ("break_even", "Break-even batch"),
        ("rows", "All rows"),
    ):
        if tables[name]:
            parts += [f"## {title}"] if title else []
            parts += [table.markdown().rstrip() for table in tables[name]]
    if drawings or without:
        parts.append("## Plots")
        parts += [f"![{d.title}](plots/{d.name}.svg)\n\n{d.caption}" for d in drawings]
        parts += ["\n".join(f"- not drawn: {words}" for words in without)] if without else []
    if notes:
        parts += ["## What a reader must know", "\n".join(f"- {words}" for words in notes)]
    return "\n\n".join(parts) + "\n"
