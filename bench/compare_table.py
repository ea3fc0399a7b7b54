"""Tables of a comparison, at most 120 columns wide."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich import box
from rich.console import RenderableType
from rich.table import Table

from .compare import Comparison, Pair, time_of

ORDER = ("failing", "red", "slower", "unproven", "faster", "fixed", "same", "unmeasured")
_WIDTH = 120


def parts(labels: Sequence[str], found: Sequence[Comparison]) -> Iterator[RenderableType]:
    """What `percard bench compare` prints: cells, groups, what is missing, and a line of verdict for each new run."""
    table = _two(labels, found[0]) if len(found) == 1 else _columns(labels, found)
    if table.row_count:
        yield table
    yield from _group_tables(labels, found)
    for label, one in zip(labels[1:], found, strict=True):
        yield from _words(label, one)


def _two(labels: Sequence[str], one: Comparison) -> Table:
    table = _table(f"{_short(labels[1])} against {_short(labels[0])}; x = new time / base time, above 1 is slower")
    table.add_column("verdict")
    table.add_column("cell", overflow="fold", ratio=1)
    for word in ("base us", "new us", "x", "95 %", "p", "limit"):
        table.add_column(word, justify="right", no_wrap=True)
    for pair in sorted(one.pairs, key=_place):
        times = (_time(time_of(record)) for record in (pair.base, pair.new))
        p = "-" if pair.p is None else "<0.0001" if pair.p < 0.0001 else f"{pair.p:.4f}"
        table.add_row(pair.verdict, _cell(pair), *times, *_ratio(pair), p, f"{pair.threshold:.1%}")
    return table


def _columns(labels: Sequence[str], found: Sequence[Comparison]) -> Table:
    table = _table(f"against {_short(labels[0])}; x = new time / base time, above 1 is slower")
    table.add_column("cell", overflow="fold", ratio=1)
    table.add_column("base us", justify="right", no_wrap=True)
    for label in labels[1:]:
        table.add_column(f"x {_short(label, 20)}", justify="right")
    columns = [{pair.name: pair for pair in one.pairs} for one in found]
    for name in dict.fromkeys(name for column in columns for name in column):
        here = [column.get(name) for column in columns]
        first = next(pair for pair in here if pair is not None)
        cells = ["missing" if p is None else " ".join([*_ratio(p)[:1], p.verdict]) for p in here]
        table.add_row(name, _time(time_of(first.base)), *cells)
    return table


def _group_tables(labels: Sequence[str], found: Sequence[Comparison]) -> Iterator[Table]:
    for label, one in zip(labels[1:], found, strict=True):
        if not one.groups:
            continue
        table = _table(f"geometric means, {_short(label)}")
        table.add_column("group", overflow="fold")
        for word in ("cells", "x", "95 %"):
            table.add_column(word, justify="right", no_wrap=True)
        for group in one.groups:
            table.add_row(group.name, str(group.cells), f"{group.ratio:.3f}", _interval(group.ci95))
        yield table


def _words(label: str, one: Comparison) -> Iterator[str]:
    for pair in one.pairs:
        if pair.worse:
            bought = " (and faster: speed bought with quality)" if pair.verdict == "faster" else ""
            yield f"- worse: {pair.name}: {', '.join(pair.worse)}{bought}"
        elif pair.verdict == "failing":
            why = (pair.new.error or {}).get("message") or "no reason given"
            yield f"- failing: {pair.name}: {pair.new.status}, {why}"
    yield from (f"- not comparable: {reason}" for reason in one.apart)
    few = [p for p in one.pairs if p.verdict == "unproven"]
    if few:
        yield f"- unproven: {len(few)} cells moved beyond the limit, which their samples do not prove; measure more --rounds"
    for word, names in (("missing", one.missing), ("new", one.added)):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            yield f"- {word}: {', '.join(names[:5])}{more}"
    yield f"{label}: {verdict(one)}"


def verdict(one: Comparison) -> str:
    """The line at the end: how many cells of which verdict, and whether that is a regression."""
    counts = [f"{one.count(word)} {word}" for word in ORDER if one.count(word)]
    counts += [f"{len(one.missing)} missing"] * bool(one.missing) + [f"{len(one.added)} new"] * bool(one.added)
    if one.apart:
        said = "not comparable"
    elif not one.pairs:
        said = "no cell in common"
    else:
        said = "regression" if one.regressions else "no regression"
    return f"{said}; {', '.join(counts) or 'nothing'}"


def _place(pair: Pair) -> tuple[int, float]:
    return ORDER.index(pair.verdict), -(pair.ratio or 0)


def _cell(pair: Pair) -> str:
    return f"{pair.name} (not comparable)" if pair.apart else pair.name


def _ratio(pair: Pair) -> tuple[str, str]:
    if pair.ratio is None:
        return "-", "-"
    return f"{pair.ratio:.3f}", _interval(pair.ci95) if pair.ci95 else "-"


def _interval(ci95: tuple[float, float]) -> str:
    return f"{ci95[0]:.3f}-{ci95[1]:.3f}"


def _time(us: float | None) -> str:
    return "-" if us is None else f"{us:.1f}" if us < 1e5 else f"{us:.0f}"


def _short(label: str, width: int = 40) -> str:
    return label if len(label) <= width else f"...{label[-(width - 3) :]}"


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=box.SIMPLE, width=_WIDTH, pad_edge=False)
