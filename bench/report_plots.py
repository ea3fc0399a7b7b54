"""The figures of a report, drawn with matplotlib from report_series.py; each for a page and, narrow, for a phone.

    rates       prefill and decode of every side, a dot with its spread
    pareto      tokens per second and card against those of a user, over batch or concurrency
    depths      decode over the depth of the cache;  attention: the op alone, with its fastest rival
    roofline    what each kernel reached under the roofs measured on this machine
    heat        speed-up over rows of activations and layers;  break_even: where it meets 1
    sizes       bytes against KL;  prices: dollars against KL or a task's score

`figures` says which can be drawn from some records, and why others cannot.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from . import quality
from . import report_lines as lines
from . import report_plots_ops as ops
from . import report_series as series
from . import report_style as style
from .record import Record
from .report_lines import Side
from .report_series import Chart, Curve
from .report_style import INK, MUTED, NARROW, RED, SIZE, Drawing, Palette

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST = 6  # figures of one kind; more are left to table.csv, and the report says so


def figures(records: Sequence[Record]) -> tuple[list[Drawing], list[str]]:
    """(what can be drawn from these records, a line for each kind that cannot and why)."""
    groups = lines.groups(records)
    sides = [s for g in groups for s in g.sides()]
    sides += [Side(spec, None) for grid in series.grids(records) for spec in grid.specs]
    sides += [c.side for chart in series.roofline(records) for c in chart.curves]
    palette = Palette(sides)
    # There a cache gives the colour, in every chart of them the same.
    caches = Palette([c.side for chart in series.attention(records) for c in chart.curves])
    found: list[Drawing] = []
    without: list[str] = []

    def kind(name: str, made: list[Drawing], why: str) -> None:
        for number, drawing in enumerate(made[:MOST]):
            known = drawing if len(made) == 1 else Drawing(f"{name}-{number + 1}", *_rest(drawing))
            found.append(known)
        if len(made) > MOST:
            without.append(f"{name}: {len(made) - MOST} more are not drawn; their figures are in table.csv")
        if not made:
            without.append(f"{name}: {why}")

    def over(make: Callable[[Any], list[Chart]], draw: Callable[..., Drawing]) -> list[Drawing]:
        made: list[tuple[Chart, str]] = []
        for group in groups:
            # Two levels of one model may say the same of size and quality.
            made += [(c, group.machine) for c in make(group) if (c, group.machine) not in made]
        return [draw(chart, palette, where) for chart, where in made]

    per_group = [charts for g in groups if (charts := series.rates(g))]
    machines = [g.machine for g in groups if series.rates(g)]
    kind("rates", [rates(c, palette, m) for c, m in zip(per_group, machines, strict=True)], "no two sides have a rate")
    kind("pareto", over(series.pareto, pareto), "only one batch was measured (bench serve, bench model --batch)")
    kind("sizes", over(series.sizes, sizes), "no two quantised sides have both bytes and KL")
    kind("prices", over(series.prices, prices), "no price was given (--usd-hour)")
    kind("depths", over(series.depths, depths), "only one depth of the cache was measured (bench model --context)")
    kind("attention", [attention(c, caches) for c in series.attention(records)], "no op over a cache (bench attention)")
    grids = series.grids(records)
    kind("heat", [ops.heat(g) for g in grids], "no linears were timed alone (bench ops)")
    curved = [g for g in grids if len(g.tokens) > 1]
    kind("break-even", [ops.break_even(g, palette) for g in curved], "no linears at several M (bench ops)")
    kind("roofline", [ops.roofline(c, palette) for c in series.roofline(records)], "no rows with both bytes and FLOP")
    return found, without


def _rest(drawing: Drawing) -> tuple[Any, ...]:
    return drawing.title, drawing.caption, drawing.draw, drawing.whole


def _sides(charts: Sequence[Chart]) -> list[Side]:
    return list(dict.fromkeys(c.side for chart in charts for c in chart.curves))


def pareto(chart: Chart, palette: Palette, where: str) -> Drawing:
    served = chart.about.get("level") == "serve"

    def draw(width: float) -> Figure:
        figure, (axes,) = style.panels(width, 4.1 if width > 5 else 5.2)
        points = [p for c in chart.curves for p in c.points]
        style.axis(axes, "x", [p.x for p in points])
        style.axis(axes, "y", [v for p in points for v in (p.lo, p.hi)])
        for curve in chart.curves:
            style.line(axes, curve, palette)
        axes.set_xlabel("tokens per second and user")
        axes.set_ylabel("output tokens per second and card")
        style.title(figure, "Tokens per card against tokens per user", chart.title)
        style.legend(figure, palette, _sides([chart]))
        found = [(p.x, p.y, p.label, palette.color(c.side.spec)) for c in chart.curves for p in c.points]
        # The ends of a curve say most, so they are written first; every point is a place that no label may cover.
        ends = {(p.x, p.y) for c in chart.curves for p in (c.points[0], c.points[-1])}
        style.label_points(figure, axes, sorted(found, key=lambda item: (item[0], item[1]) not in ends))
        return figure

    caption = f"Up and right is better. Numbers: {'requests in flight' if served else 'sequences at once'}, where they fit; bars: slowest and fastest round. Red gates are left out. {where}."
    return Drawing("pareto", "Tokens per card against tokens per user", caption, draw)


def rates(charts: Sequence[Chart], palette: Palette, where: str) -> Drawing:
    names = {"prefill": "prefill", "decode": "decode", "mixed": "prompt and answer", "serve": "output"}

    def draw(width: float) -> Figure:
        sides = _sides(charts)
        wide = width > 5
        each = 0.62 + 0.21 * len(sides)
        shape = (1, len(charts)) if wide else (len(charts), 1)
        figure, found = style.panels(width, (each if wide else each * len(charts) + 0.3) + 0.75, *shape, sharey=wide)
        for axes, chart in zip(found, charts, strict=True):
            spans = [v for c in chart.curves for v in (c.points[0].lo, c.points[0].hi)]
            style.linear_axis(axes, "x", 0, max(spans), most=4)
            for curve in chart.curves:
                point, look = curve.points[0], palette.look(curve.side)
                at = len(sides) - 1 - sides.index(curve.side)
                ends = [[point.x - point.lo], [point.hi - point.x]]
                axes.errorbar(point.x, at, xerr=ends, fmt="none", ecolor=look["color"], elinewidth=1.2, capsize=3)
                axes.plot(point.x, at, **look | {"linestyle": "none"}, markersize=6)
            axes.set_yticks(range(len(sides)), [s.words() for s in reversed(sides)])
            axes.set_ylim(-0.6, len(sides) - 0.4)
            axes.grid(axis="y", visible=False)
            axes.set_xlabel(f"{names[chart.about['phase']]}, tok/s")
            axes.set_title(
                style.wrapped(chart.title, width / shape[1] - 0.6, SIZE - 0.5),
                loc="left",
                fontsize=SIZE - 0.5,
                color=MUTED,
            )
        style.title(figure, "Tokens per second by weights and cache")
        return figure

    return Drawing(
        "rates",
        "Tokens per second by weights and cache",
        f"Right is better. Bars: slowest and fastest round. A side that is missing here has no figure: see the tables. {where}.",
        draw,
        whole=len(charts) > 2,
    )


def depths(chart: Chart, palette: Palette, where: str) -> Drawing:
    words = "Decode over the depth of the cache"
    draw = functools.partial(_over_tokens, chart, palette, words, "decode, tokens per second")
    return Drawing("depths", words, f"Up is better. Bars: slowest and fastest round. {where}.", draw)


def attention(chart: Chart, palette: Palette) -> Drawing:
    words = "Attention over a cache, the op alone"

    def draw(width: float) -> Figure:
        figure = _over_tokens(chart, palette, words, "time of a call, µs", width)
        for text in figure.legends[0].get_texts():
            text.set_text({"weights": "cache"}.get(text.get_text(), text.get_text()))
        return figure

    note = "Down is better. The fastest rival holds keys and values unquantised. Bars: slowest and fastest round."
    return Drawing("attention", words, f"{note} {chart.about['machine']}.", draw)


def _over_tokens(chart: Chart, palette: Palette, words: str, what: str, width: float) -> Figure:
    """Curves with their bars over the tokens in the cache."""
    figure, (axes,) = style.panels(width, 3.9 if width > 5 else 4.9)
    points = [p for c in chart.curves for p in c.points]
    xs = sorted({p.x for p in points})
    style.log_axis(axes, "x", xs[0], xs[-1], at=xs, words=style.tokens)
    style.axis(axes, "y", [v for p in points for v in (p.lo, p.hi)])
    for curve in chart.curves:
        style.line(axes, curve, palette)
    axes.set_xlabel("tokens in the cache")
    axes.set_ylabel(what)
    style.title(figure, words, chart.title)
    style.legend(figure, palette, _sides([chart]))
    return figure


def sizes(chart: Chart, palette: Palette, where: str) -> Drawing:
    def draw(width: float) -> Figure:
        from matplotlib.lines import Line2D

        figure, (axes,) = style.panels(width, 3.9 if width > 5 else 5.0)
        shown = [c for c in chart.curves if c.points[0].y > 0]
        base = [c.points[0] for c in chart.curves if c.points[0].y <= 0 and c.side.plain]
        limits = sorted({t["kl"] for t in quality.THRESHOLDS.values()})
        ys = [c.points[0].y for c in shown]
        xs = [c.points[0].x / 1e6 for c in shown] + [p.x / 1e6 for p in base]
        style.linear_axis(axes, "x", 0, max(xs))
        style.log_axis(axes, "y", min(ys), max(*ys, *limits))
        more = []
        for bits, limit in sorted((b, t["kl"]) for b, t in quality.THRESHOLDS.items()):
            dash = style.DASHES[2 if bits == 4 else 3]
            axes.axhline(limit, color=MUTED, linewidth=1, linestyle=dash)
            more.append(Line2D([], [], color=MUTED, linewidth=1, linestyle=dash, label=f"limit, {bits}-bit"))
        if base:
            axes.axvline(base[0].x / 1e6, color=INK, linewidth=1.2)
            more.append(Line2D([], [], color=INK, linewidth=1.2, label=f"{base[0].label}: KL 0"))
        for curve in shown:
            point, look = curve.points[0], palette.look(curve.side)
            axes.plot(
                point.x / 1e6, point.y, color=look["color"], marker=look["marker"], linestyle="none", markersize=6.5
            )
            if point.red:
                axes.plot(
                    point.x / 1e6, point.y, color=RED, marker="x", markersize=11, markeredgewidth=1.8, linestyle="none"
                )
        if any(c.points[0].red for c in shown):
            more.append(
                Line2D(
                    [], [], color=RED, marker="x", markersize=8, markeredgewidth=1.8, linestyle="none", label="gate red"
                )
            )
        axes.set_xlabel("weights in memory, MB")
        gated = chart.about.get("gated")
        axes.set_ylabel("KL of the next token, nats" + (f" (on {gated})" if gated else ""))
        style.title(figure, "Size against quality", chart.title)
        style.legend(figure, palette, [c.side for c in shown], more=more)
        return figure

    gated = chart.about.get("gated")
    about = f" Bytes are of the model that was timed, KL is of {gated}." if gated else ""
    return Drawing(
        "sizes",
        "Size against quality",
        f"Down and left is better. Dashed: the gate's limits for weights of 8 and of 4 bits.{about} {where}.",
        draw,
    )


def prices(chart: Chart, palette: Palette, where: str) -> Drawing:
    scored = chart.about["scored"]

    def draw(width: float) -> Figure:
        figure, (axes,) = style.panels(width, 3.9 if width > 5 else 5.0)
        shown = [Curve(c.side, tuple(p for p in c.points if scored or p.y > 0)) for c in chart.curves]
        shown = [c for c in shown if c.points]
        free = [c for c in chart.curves if not scored and all(p.y <= 0 for p in c.points)]
        points = [p for c in shown + free for p in c.points]
        style.axis(axes, "x", [p.x for p in points])
        if scored:
            style.linear_axis(axes, "y", min(p.y for p in points), max(p.y for p in points), zero=False)
        else:
            style.log_axis(axes, "y", min(p.y for c in shown for p in c.points), max(p.y for p in points))
        for curve in shown:
            style.line(axes, curve, palette, join=False)
        more = []
        for curve in free:
            from matplotlib.lines import Line2D

            axes.axvline(min(p.x for p in curve.points), color=INK, linewidth=1.2)
            more.append(Line2D([], [], color=INK, linewidth=1.2, label="FP16 at its best: KL 0"))
        axes.set_xlabel(
            "US dollars per million tokens"
            + {"total": ", in and out together", "out": " of output"}[chart.about["kind"]]
        )
        axes.set_ylabel("score of the task" if scored else "KL of the next token, nats")
        style.title(figure, "Quality against cost", chart.title)
        style.legend(figure, palette, [c.side for c in shown], more=more)
        items = [(p.x, p.y, p.label, palette.color(c.side.spec)) for c in shown for p in c.points if p.label]
        style.label_points(figure, axes, items)
        return figure

    good = "Up and left" if scored else "Down and left"
    return Drawing(
        "prices",
        "Quality against cost",
        f"{good} is better. At its cheapest batch each side; the number is that batch, where it fits. The price of the card is the one that was given. Red gates are left out. {where}.",
        draw,
    )


def drawn(drawings: Sequence[Drawing], widths: Sequence[float] | None = None) -> Iterator[tuple[Drawing, float, Any]]:
    """(drawing, inches, figure) of each, at its own width and for a phone."""
    import matplotlib

    rc: Any = style.STYLE
    with matplotlib.rc_context(rc):
        for drawing in drawings:
            for width in widths or (drawing.width, NARROW):
                yield drawing, width, drawing.draw(width)
