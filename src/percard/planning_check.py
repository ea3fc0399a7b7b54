"""`percard plan --check RECORDS`: predictions beside measurements, medians, and the fit. planning.py hands over its flags."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from . import console

if TYPE_CHECKING:
    from rich.console import RenderableType

    from .bench.efficiency import Row
    from .bench.plan_check import Checked


def run(
    records: Sequence[Path],
    *,
    card: str = "",
    card_files: Sequence[Path] = (),
    efficiency_files: Sequence[Path] = (),
    fit: Path | None = None,
    table: Path | None = None,
    as_json: bool = False,
) -> int:
    """Prints the check of all records together; `fit` gets the shares that they say, `table` the rows as markdown.

    Exit code 3 when nothing could be predicted. FormatError for files that are not records, or a card that is not known.
    """
    from . import compose
    from .bench import card_table, efficiency, plan_check, sources

    known = card_table.cards(card_files)
    card_id = card_table.find(card, known).id if card and card != "all" else None
    rows = [record for path in records for record in compose.read_records(path)]
    with sources.reading(", ".join(map(str, records))):
        found = plan_check.check(rows, known, card_id=card_id, files=efficiency_files)
        fitted = efficiency.fit(plan_check.points(rows, known, card_id)) if fit is not None else []
    if fit is not None and fitted:
        efficiency.save(fit, fitted)
    if table is not None:
        table.write_text(plan_check.markdown(found) + "\n", encoding="utf-8")
    if as_json:
        for one in found:
            console.emit_json(asdict(one) | ({} if one.reason else {"ratio": one.ratio, "inside": one.inside}))
        for row in fitted:
            console.emit_json({"fitted": asdict(row)})
    else:
        for part in _show(found, fitted, fit):
            console.show(part)
    return console.DONE if fitted or any(not one.reason for one in found) else console.REFUSED


def _show(found: Sequence[Checked], fitted: Sequence[Row], fit: Path | None) -> Iterator[RenderableType]:
    from rich.table import Table

    from .bench import plan_check

    told = [one for one in found if not one.reason]
    if told:
        table = Table(title="Predicted against measured", title_justify="left", pad_edge=False)
        for name in ("level", "case", "spec", "cache", "measured ms", "predicted ms", "ratio", "bound", "basis"):
            table.add_column(name, justify="right" if name in ("measured ms", "predicted ms", "ratio") else "left")
        for one in told:
            mark = "*" if one.own else "" if one.inside else "!"
            table.add_row(
                one.level, one.case, one.spec, one.kv, f"{1e3 * one.measured:.4g}", f"{1e3 * one.predicted:.4g}",
                f"{one.ratio:.2f}{mark}", one.bound, one.basis,
            )  # fmt: skip
        yield table
        yield "ratio = predicted / measured time;  ! outside its band;  * the shares were fitted on this very model"
    yield from plan_check.lines(found)
    if (mean := plan_check.geometric(found)) is not None:
        yield f"geometric mean of the ratios {mean:.2f} (above 1: times are predicted too long)"
    for row in fitted:
        shares = ", ".join(f"{n} {v:.2f}" for n, v in (("e_bw", row.e_bw), ("e_fl", row.e_fl)) if v is not None)
        yield f"fitted {row.of} at M={row.bucket}: {shares}   ({row.n} rows, spread {row.spread:.0%}; {row.source})"
    if fit is not None:
        yield (
            f"{fit}: {len(fitted)} rows; percard plan MODEL --card ID --efficiency {fit}"
            if fitted
            else "nothing to fit"
        )
