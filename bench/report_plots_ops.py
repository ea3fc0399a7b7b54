"""The figures of single ops and layers: roofline, heat map of speed-ups, break-even batch. See report_plots.py."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from . import report_series as series
from . import report_style as style
from .report_lines import Side
from .report_series import STACK, Chart, Curve, Grid
from .report_style import INK, MUTED, PAPER, SIZE, Drawing, Palette

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def roofline(chart: Chart, palette: Palette) -> Drawing:
    roofs = dict(chart.about["roofs"])
    memory = roofs.pop("memory", None)
    seen = max(p.y for c in chart.curves for p in c.points)

    def draw(width: float) -> Figure:
        from matplotlib.lines import Line2D

        figure, (axes,) = style.panels(width, 4.0 if width > 5 else 5.0)
        points = [p for c in chart.curves for p in c.points]
        left, right = min(p.x for p in points), max(p.x for p in points)
        tops = [p.hi for p in points] + list(roofs.values())
        bottom = min(p.lo for p in points)
        style.log_axis(axes, "x", left, right)
        style.log_axis(axes, "y", bottom, 1.3 * max(tops))
        ends = axes.get_xlim()
        roof = max(roofs.values(), default=seen)
        more = []
        if memory:
            corner = roof / memory
            xs = [ends[0], min(max(corner, ends[0]), ends[1])]
            axes.plot(xs, [x * memory for x in xs], color=INK, linewidth=1.6)
            more.append(Line2D([], [], color=INK, linewidth=1.6, label=f"memory, {memory / 1e9:,.0f} GB/s"))
        for at, (name, value) in enumerate(sorted(roofs.items(), key=lambda item: -item[1])):
            start = max(ends[0], value / memory) if memory else ends[0]
            axes.plot([start, ends[1]], [value, value], color=INK, linewidth=1.6, linestyle=style.DASHES[at % 4])
            words = f"{name}, {value / 1e12:,.3g} T/s"
            more.append(Line2D([], [], color=INK, linewidth=1.6, linestyle=style.DASHES[at % 4], label=words))
        if not roofs:
            axes.axhline(seen, color=MUTED, linewidth=1.0, linestyle=style.DASHES[2])
            words = f"highest seen, {seen / 1e12:,.3g} T/s"
            more.append(Line2D([], [], color=MUTED, linewidth=1.0, linestyle=style.DASHES[2], label=words))
        for curve in chart.curves:
            style.line(axes, curve, palette, join=False)
        axes.set_xlabel("arithmetic intensity, FLOP per byte")
        axes.set_ylabel("rate, FLOP per second")
        style.title(figure, "Roofline, with the roofs measured here", chart.title)
        style.legend(figure, palette, [c.side for c in chart.curves], more=more)
        return figure

    words = (
        "" if roofs else " The rate of its arithmetic was not measured, so the dotted line is only the highest seen."
    )
    return Drawing(
        "roofline",
        "Roofline",
        f"Up is better; a dot on the line has no more to gain. Dots above the memory roof read a cache that was warm.{words}",
        draw,
    )


_EDGES = (0.25, 0.35, 0.5, 0.7, 0.9, 1.1, 1.4, 2.0, 2.8, 4.0)


def heat(grid: Grid) -> Drawing:
    def draw(width: float) -> Figure:
        from matplotlib import colormaps
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import BoundaryNorm

        wide, specs = width > 5, list(grid.specs)
        columns = min(len(specs), 3) if wide else 1
        rows = -(-len(specs) // columns)
        height = rows * (0.75 + 0.3 * len(grid.layers)) + 1.15
        figure, found = style.panels(width, height, rows, columns)
        colours, norm = colormaps["PuOr"], BoundaryNorm(_EDGES, 256, extend="both")
        for axes in found[len(specs) :]:
            axes.remove()
        for axes, spec in zip(found, specs, strict=False):
            held = grid.specs[spec]
            values = [[held[a, m].y if (a, m) in held else math.nan for m in grid.tokens] for a in grid.layers]
            axes.pcolormesh(values, cmap=colours, norm=norm, edgecolors=PAPER, linewidth=1.5)
            for i, layer in enumerate(grid.layers):
                for j, m in enumerate(grid.tokens):
                    if (layer, m) not in held:
                        continue
                    point = held[layer, m]
                    sure = point.lo > 1 or point.hi < 1
                    r, g, b, _ = colours(norm(point.y))
                    ink = "#ffffff" if 0.299 * r + 0.587 * g + 0.114 * b < 0.55 else "#111111"
                    words = f"{point.y:.2f}" if sure else f"({point.y:.2f})"
                    axes.text(j + 0.5, i + 0.5, words, ha="center", va="center", fontsize=SIZE - 1.5, color=ink)
            axes.set_yticks([i + 0.5 for i in range(len(grid.layers))], grid.layers)
            axes.set_xticks([j + 0.5 for j in range(len(grid.tokens))], [style.tokens(m) for m in grid.tokens])
            axes.invert_yaxis()
            axes.tick_params(length=0)
            axes.grid(visible=False)
            for spine in axes.spines.values():
                spine.set_visible(False)
            axes.set_title(spec, loc="left", fontsize=SIZE, fontweight="bold")
            axes.set_xlabel("M, rows of activations")
        bar = figure.colorbar(
            ScalarMappable(norm, colours),
            ax=found[: len(specs)],
            location="bottom",
            fraction=0.05,
            aspect=40 if wide else 25,
            shrink=0.5 if wide else 0.95,
            extend="both",
        )
        bar.set_label("speed-up, times torch's fastest float")
        bar.set_ticks(list(_EDGES), labels=[f"{e:g}" for e in _EDGES])
        bar.outline.set_visible(False)
        style.title(figure, f"Speed-up over M and layer: {grid.title}")
        return figure

    caption = f"Purple: faster than torch's fastest float in the same rounds; orange: slower. In brackets where the 95 % interval contains 1. {STACK.capitalize()}: the four linears in one time, its ends from all slow and all fast rounds. {grid.machine}."
    return Drawing("heat", "Speed-up over M and layer", caption, draw, whole=True)


def break_even(grid: Grid, palette: Palette) -> Drawing:
    whole = any(layer == STACK for held in grid.specs.values() for layer, _ in held)

    def draw(width: float) -> Figure:
        from matplotlib.lines import Line2D

        figure, (axes,) = style.panels(width, 3.9 if width > 5 else 4.9)
        wanted = STACK if whole else grid.layers[0]
        curves = [Curve(Side(s, None), tuple(p for (a, _), p in sorted(h.items(), key=lambda i: i[0][1]) if a == wanted))
                  for s, h in grid.specs.items()]  # fmt: skip
        curves = [c for c in curves if c.points]
        points = [p for c in curves for p in c.points]
        ridge = grid.ridge.get("ridge")
        style.log_axis(axes, "x", grid.tokens[0], max(grid.tokens[-1], ridge or 1), at=grid.tokens)
        lo, hi = min(p.lo for p in points), max(p.hi for p in points)
        style.log_axis(axes, "y", min(lo, 0.8), max(hi, 1.25))
        axes.axhline(1, color=INK, linewidth=1.2)
        more = [Line2D([], [], color=INK, linewidth=1.2, label="torch's fastest float")]
        if ridge:
            axes.axvline(ridge, color=MUTED, linewidth=1.2, linestyle=style.DASHES[2])
            more.append(
                Line2D(
                    [], [], color=MUTED, linewidth=1.2, linestyle=style.DASHES[2], label=f"expected: M = {ridge:.0f}"
                )
            )
        for curve in curves:
            style.line(axes, curve, palette)
            at, _ = series.crossing(curve.points)
            if at is not None:
                axes.plot(
                    at,
                    1,
                    marker="o",
                    markersize=9,
                    markerfacecolor="none",
                    markeredgewidth=1.6,
                    color=palette.color(curve.side.spec),
                )
        axes.set_xlabel("M, rows of activations")
        axes.set_ylabel("speed-up, times torch's fastest float")
        style.title(figure, f"Break-even batch, {wanted}", grid.title)
        style.legend(figure, palette, [c.side for c in curves], more=more)
        return figure

    expected = (
        f" Expected for weight-only specs on {grid.ridge['card']}, from published figures: rate over bandwidth."
        if grid.ridge
        else ""
    )
    return Drawing(
        "break-even",
        "Break-even batch",
        f"Above 1 the quantised linears are faster. Rings: where they meet FP16, read between two measured M. Bars: all slow and all fast rounds.{expected} {grid.machine}.",
        draw,
    )
