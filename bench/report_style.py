"""How a figure of a report looks: colours that colour-blind readers tell apart, markers, ticks, legends, labels that fit.

A figure is drawn once in the colours of print. `inline` puts CSS variables where those colours stand, so that the same picture
follows a light or a dark page; `standalone` leaves them and lays white paper below. Text is drawn as paths: it has the size that
was measured here on any machine, so what does not overlap in a test does not overlap anywhere.

Colours: Okabe and Ito, Color Universal Design (https://jfly.uni-koeln.de/color/), darkened where white paper needs it. A colour
is a spec and a marker is a cache, so that sixteen series need eight lines of legend.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .report_lines import BASELINE, Side
from .report_series import Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDE, WHOLE, NARROW = 6.1, 12.4, 3.75  # inches: half of a page, all of it, a phone
INK, MUTED, GRID, RED = "#1b1f24", "#5b636d", "#d9dde2", "#b3261e"
PAPER = "#fefefe"  # what is below a figure
# Okabe-Ito's blue, vermilion, green, purple, orange, sky; two more for long lists of specs.
COLORS = ("#0072b2", "#d55e00", "#00805f", "#b5578f", "#b57a00", "#3d9ad1", "#6b4fbb", "#7a6a3a")
DARK = ("#5cb3ec", "#ff8f4d", "#35c9a0", "#ec9acb", "#f2b93b", "#a5d8f7", "#b6a3f5", "#d1c08a")
DARK_INK = {INK: "#e8eaed", MUTED: "#a5acb5", GRID: "#3a4048", RED: "#ff6f66", PAPER: "#1d2126"}
MARKERS = ("o", "s", "^", "D", "v", "P", "*", "X")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)), (0, (3, 1, 1, 1, 1, 1)))
SIZE = 8.5  # points of text
STYLE: dict[str, Any] = {
    "svg.fonttype": "path",
    "svg.hashsalt": "percard",
    "font.family": "DejaVu Sans",
    "font.size": SIZE,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.minor.visible": False,
    "ytick.minor.visible": False,
    "legend.frameon": False,
    "legend.fontsize": SIZE - 0.5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


def missing() -> str:
    """Why there are no plots; "" when they can be drawn."""
    try:
        import matplotlib  # noqa: F401 - only plots need it
    except ImportError:
        return "No plots: matplotlib is not installed (pip install 'percard[bench]')."
    return ""


@dataclass(frozen=True)
class Drawing:
    """A figure to be drawn: its file name, how to read it, whether it takes the whole width, and draw(inches)."""

    name: str
    title: str
    caption: str
    draw: Callable[[float], Figure]
    whole: bool = False

    @property
    def width(self) -> float:
        return WHOLE if self.whole else WIDE


class Palette:
    """Colours of specs and markers of caches, the same in every figure of a report."""

    def __init__(self, sides: Iterable[Side]) -> None:
        held = list(sides)
        self.specs = [s for s in dict.fromkeys(side.spec for side in held) if s not in (BASELINE, "fastest rival")]
        self.caches = [None, *(c for c in dict.fromkeys(side.cache for side in held) if c)]

    def color(self, spec: str) -> str:
        if spec in (BASELINE, "fastest rival") or spec not in self.specs:
            return INK
        return COLORS[self.specs.index(spec) % len(COLORS)]

    def look(self, side: Side) -> dict[str, Any]:
        """color, marker and linestyle of a side."""
        at = self.caches.index(side.cache) if side.cache in self.caches else 0
        if side.spec == "fastest rival":
            return {"color": INK, "marker": "x", "linestyle": DASHES[2]}
        look = {
            "color": self.color(side.spec),
            "marker": MARKERS[at % len(MARKERS)],
            "linestyle": DASHES[at % len(DASHES)],
        }
        again = side.spec in self.specs and self.specs.index(side.spec) >= len(COLORS)
        return look | ({"fillstyle": "none"} if again else {})  # more specs than colours: the same ones, hollow


def line(axes: Axes, curve: Curve, palette: Palette, *, join: bool = True) -> None:
    """A curve with the spread of its points; the spread is drawn where it is wider than the marker's edge."""
    look = palette.look(curve.side)
    xs, ys = [p.x for p in curve.points], [p.y for p in curve.points]
    spread = [[p.y - p.lo for p in curve.points], [p.hi - p.y for p in curve.points]]
    axes.errorbar(xs, ys, yerr=spread, fmt="none", ecolor=look["color"], elinewidth=0.9, capsize=2, alpha=0.75)
    dash = look["linestyle"] if join and len(xs) > 1 else "none"
    axes.plot(xs, ys, **look | {"linestyle": dash}, markersize=4.5, linewidth=1.3)


def panels(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure of so many inches with its axes in reading order, laid out so that nothing sticks out."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, [axes for row in grid for axes in row]


def wrapped(words: str, width: float, size: float = SIZE) -> str:
    """Words in lines that fit `width` inches: a letter of DejaVu Sans is about 0.58 of its size wide."""
    import textwrap

    return "\n".join(textwrap.wrap(words, max(12, int(width * 72 / (0.58 * size)))))


def title(figure: Figure, words: str, below: str = "") -> None:
    """What a figure is, and of what, at its top left."""
    width = figure.get_size_inches()[0]
    text = wrapped(words, width - 0.1, SIZE + 1)
    figure.suptitle(text, x=0.012, ha="left", fontsize=SIZE + 1, fontweight="bold")
    if below:
        figure.axes[0].set_title(wrapped(below, width - 0.9, SIZE - 0.5), loc="left", fontsize=SIZE - 0.5, color=MUTED)


def number(value: float, *_: Any) -> str:
    """A tick as people write it: 0.02, 5, 1,000, 20k, 3M, 40G, 2T."""
    size = abs(value)
    for end, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= end:
            return f"{value / (1e3 if unit == 'k' else end):,.4g}{unit}"
    return f"{value:,.0f}" if size >= 100 or value == int(value) else f"{value:.3g}".replace("e-0", "e-")


def tokens(value: float, *_: Any) -> str:
    """A number of tokens: powers of two in units of 1,024, as contexts are named (32k = 32,768)."""
    return f"{value / 1024:.0f}k" if value >= 1024 and value % 1024 == 0 else number(value)


def log_axis(
    axes: Axes, which: str, lo: float, hi: float, *, most: int = 6, at: Sequence[float] = (), words: Any = number
) -> None:
    """A log axis with few ticks that say their value: those `at`, thinned, else 1, 2 and 5 times powers of ten."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    pad = (hi / lo) ** 0.06 if hi > lo else 1.6
    lo, hi = lo / pad, hi * pad
    ticks = [t for t in at if lo <= t <= hi]
    if not ticks:
        for steps in ((1, 2, 5), (1, 3), (1,)):
            powers = range(math.floor(math.log10(lo)), math.ceil(math.log10(hi)) + 1)
            ticks = [s * 10.0**p for p in powers for s in steps if lo <= s * 10.0**p <= hi]
            if len(ticks) <= most:
                break
    if len(ticks) > most:
        step = -(-len(ticks) // most)
        ticks = ticks[::step] if not at else ticks[::-1][::step][::-1]
    axis = axes.xaxis if which == "x" else axes.yaxis
    getattr(axes, f"set_{which}scale")("log")
    getattr(axes, f"set_{which}lim")(lo, hi)
    if len(ticks) < 2:  # a short range has no round numbers: its ends, to three digits
        ticks = sorted({float(f"{lo * pad**0.5:.2g}"), float(f"{hi / pad**0.5:.2g}")})
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(words))


def linear_axis(axes: Axes, which: str, lo: float, hi: float, *, most: int = 5, zero: bool = True) -> None:
    """A linear axis, from zero unless told otherwise."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    lo = 0.0 if zero else lo
    pad = 0.06 * (hi - lo) or abs(hi) or 1.0
    getattr(axes, f"set_{which}lim")(lo if zero else lo - pad, hi + pad)
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(MaxNLocator(nbins=most))
    axis.set_major_formatter(FuncFormatter(number))


def axis(axes: Axes, which: str, values: Sequence[float], *, most: int = 6) -> None:
    """Log where values span more than a factor of eight, else linear from zero."""
    lo, hi = min(values), max(values)
    if lo > 0 and hi / lo > 8:
        log_axis(axes, which, lo, hi, most=most)
    else:
        linear_axis(axes, which, lo, hi, most=most)


def legend(
    figure: Figure, palette: Palette, sides: Sequence[Side], *, base: str = "FP16", more: Sequence[Any] = ()
) -> None:
    """Specs by colour, caches by marker, `more` handles below them; right of a wide figure, below a narrow one."""
    from matplotlib.lines import Line2D

    def head(words: str) -> Line2D:
        return Line2D([], [], linestyle="none", label=words)

    specs = list(dict.fromkeys(s.spec for s in sides))
    caches = list(dict.fromkeys(s.cache for s in sides))
    first: list[Any] = []
    for spec in specs:
        look = palette.look(Side(spec, None)) | ({} if len(caches) == 1 or spec == "fastest rival" else {"marker": ""})
        if len(caches) == 1:
            look = palette.look(Side(spec, caches[0]))
        first.append(Line2D([], [], **look, markersize=5, linewidth=2, label=base if spec == BASELINE else spec))
    second = []
    if len(caches) > 1:
        for cache in caches:
            look = palette.look(Side(BASELINE, cache)) | {"color": MUTED}
            second.append(Line2D([], [], **look, markersize=5, linewidth=1.2, label=cache or "16-bit"))
    blocks = [[head("weights"), *first], [head("cache"), *second] if second else [], list(more)]
    blocks = [block for block in blocks if block]
    wide = figure.get_size_inches()[0] > 5
    if wide:
        handles = [handle for block in blocks for handle in block]
        drawn = figure.legend(handles=handles, loc="outside right upper", ncols=1, handlelength=2.4, labelspacing=0.45)
    else:
        most = max(len(block) for block in blocks[:2])
        columns = len(blocks[:2])
        filled = [h for block in blocks[:2] for h in [*block, *[head("") for _ in range(most - len(block))]]]
        if columns == 1 and most > 3:
            columns = 2
        extra = list(more)
        if (extra and len(blocks) > 2) or (extra and not second):
            filled = filled if second else blocks[0]
            filled = [*filled, *extra] if not second else filled
        if extra and second:
            rows = -(-len(extra) // 2)
            left, right = filled[:most], filled[most:]
            filled = [*left, *extra[:rows], *right, *extra[rows:], *[head("") for _ in range(2 * rows - len(extra))]]
        drawn = figure.legend(
            handles=filled,
            loc="outside lower left",
            ncols=columns,
            handlelength=2.2,
            columnspacing=1.2,
            labelspacing=0.4,
        )
    for text in drawn.get_texts():
        if text.get_text() in ("weights", "cache"):
            text.set_fontweight("bold")


NEAR = 24  # points: labels nearer than that, of one colour and saying the same, are one


def label_points(figure: Figure, axes: Axes, items: Sequence[tuple[float, float, str, str]]) -> int:
    """Writes words beside points (x, y, words, colour) where they fit and nowhere else; how many were written.

    A place fits when it touches no other label, no point and not the frame. Longer lists are tried in order. Points in a
    heap (within NEAR points) that would say the same in the same colour say it once.
    """
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    frame = axes.get_window_extent(renderer)
    dots = [axes.transData.transform((x, y)) for x, y, _, _ in items]
    taken = [text.get_window_extent(renderer) for text in axes.texts if text.get_text()]
    written = 0
    near = NEAR * figure.dpi / 72
    said: list[tuple[str, str, Any]] = []
    for (x, y, words, color), dot in zip(items, dots, strict=True):
        if any((w, c) == (words, color) and math.dist(dot, other) < near for w, c, other in said):
            continue
        for dx, dy, ha, va in ((4, 4, "left", "bottom"), (-4, 4, "right", "bottom"), (4, -4, "left", "top"), (-4, -4, "right", "top"), (0, 6, "center", "bottom"), (0, -6, "center", "top")):  # fmt: skip
            text = axes.annotate(
                words, (x, y), (dx, dy), textcoords="offset points", ha=ha, va=va, color=color, fontsize=SIZE - 1.5
            )
            text.set_in_layout(False)
            box = text.get_window_extent(renderer)
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            clear = not any(box.padded(1).overlaps(other) for other in taken)
            free = not any(box.padded(2.5).contains(*other) for other in dots if other is not dot)
            if inside and clear and free:
                taken.append(box)
                said.append((words, color, dot))
                written += 1
                break
            text.remove()
    return written


def svg(figure: Figure) -> str:
    """The figure as an <svg> element without prolog, metadata, namespaces or anything that a browser would fetch."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text)
    text = text.replace("xlink:href", "href")

    def short(match: re.Match[str]) -> str:  # a hundredth of a point is finer than any screen
        return re.sub(r"(\d+\.\d\d)\d+", r"\1", match[0])

    return re.sub(r' (?:d|x|y)="[^"]*"', short, text)


def inline(text: str, name: str, words: str) -> str:
    """An svg for the page: ids of its own, colours that follow the page, words for those who do not see it."""
    text = re.sub(r'id="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", text)
    for color, variable in variables().items():
        text = re.sub(rf"{color}\b", f"var({variable})", text, flags=re.IGNORECASE)
    width, height = (re.search(rf'{what}="([\d.]+)pt"', text) for what in ("width", "height"))
    size = f"{float(width[1]) / 72:.2f}in" if width and height else "100%"
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    label = words.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return text.replace("<svg", f'<svg role="img" aria-label="{label}" style="width:{size}"', 1)


def standalone(text: str) -> str:
    """An svg file: the namespaces again, on white paper."""
    names = 'xmlns="http://www.w3.org/2000/svg"'
    paper = '<rect width="100%" height="100%" fill="#ffffff"/>'
    head, rest = text.split(">", 1)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{head.replace("<svg", f"<svg {names}", 1)}>\n{paper}{rest}'


def variables() -> dict[str, str]:
    """{colour of print: CSS variable}."""
    named = {INK: "--ink", MUTED: "--muted", GRID: "--grid", RED: "--red", PAPER: "--card"}
    return named | {color: f"--s{i}" for i, color in enumerate(COLORS)}


def css(dark: bool) -> str:
    """The variables with their values on a light or a dark page."""
    values = {v: c for c, v in variables().items()}
    if dark:
        values |= {variables()[c]: d for c, d in DARK_INK.items()} | {f"--s{i}": c for i, c in enumerate(DARK)}
    return "".join(f"{name}:{value};" for name, value in values.items())
