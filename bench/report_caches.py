"""The table of a run over several caches or contexts: a line for each cache and depth, what it holds and how fast it decodes.

`x` is against the 16-bit weights over a cache of 16 bits, `x cache` against the same weights over such a cache; both at the same
depth, in the same rounds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.table import Table

from . import clock
from .clock import Sample
from .record import Record

HEADER = (
    "spec",
    "cache",
    "context",
    "gate",
    "KL",
    "top-1",
    "ppl",
    "KV B/token",
    "KV MB",
    "decode tok/s",
    "x",
    "x cache",
)
_LEFT = (0, 1, 3)
_FLOATS = ("bf16", "fp32", "fp16")
_STYLES = {"green": "green", "red": "bold red"}


def cache_of(record: Record) -> str | None:
    """The name of a quantised cache; None for one of 16 bits, and for records that do not say."""
    name = record.scheme.get("kv_spec")
    return None if name in _FLOATS else name


def first_of_each(records: Iterable[Record]) -> list[Record]:
    """What the table of whole models shows of a run: of each spec its first cache, at the first depth and the first batch."""
    held: list[Record] = []
    kinds: dict[str, list[str | None]] = {}
    for record in records:
        if ".mix" in record.case:  # prompt and steps together: report_ratios.py
            continue
        spec = "16bit" if record.scheme["spec"] in _FLOATS else record.scheme["spec"]
        kind = kinds.setdefault(spec, [cache_of(record), None, None])
        if cache_of(record) != kind[0]:
            continue
        phase = 1 if ".pp" in record.case else 2
        kind[phase] = kind[phase] or record.case
        if record.case != kind[phase]:
            continue
        held.append(record)
    return held


def rows(records: Iterable[Record]) -> list[tuple[str, ...]]:
    """The lines of the table, none for a run over one cache of 16 bits at one depth. The 16-bit twin of an int8 head is left out."""
    found = [r for r in records if r.level == "model" and r.status == "ok" and ".tg" in r.case]
    found = [r for r in found if r.shape["batch"] == found[0].shape["batch"]]  # of a ladder the first
    if len({(cache_of(r), r.case) for r in found}) < 2:
        return []
    heads: dict[str, str] = {}
    for record in found:
        heads.setdefault(record.scheme["spec"], record.scheme["head"])
    shown = [r for r in found if r.scheme["head"] == heads[r.scheme["spec"]]]
    shown.sort(key=lambda r: (list(heads).index(r.scheme["spec"]), r.shape["kv_len"]))
    plain = {(r.scheme["spec"], r.case): r for r in shown if cache_of(r) is None}
    return [cells(r, plain.get((r.scheme["spec"], r.case))) for r in shown]


def _times(record: Record | None) -> Sample | None:
    """Seconds of the rounds; None for a row that was not timed."""
    if record is None or not record.latency_us:
        return None
    return Sample.of([s / 1e6 for s in record.latency_us["samples"]])


def cells(record: Record, plain: Record | None = None) -> tuple[str, ...]:
    """A decode record as the words of a line, in the order of HEADER; `plain`: the same weights over a cache of 16 bits."""
    quality, memory, tokens = record.quality or {}, record.memory or {}, record.tokens
    depth = record.shape.get("kv_len", record.shape["isl"])
    per_token = memory.get("kv_bytes_per_token")

    def number(name: str, form: str) -> str:
        return "-" if quality.get(name) is None else format(quality[name], form)

    rate, gain = "-", "-"
    if tokens:
        rate = f"{tokens['tok_s']:.1f}"
        if record.latency_us:
            work = record.shape["batch"] * 1e6
            rate += f" ({work / record.latency_us['hi']:.1f}-{work / record.latency_us['lo']:.1f})"
        gain = f"{tokens['vs_fp16']['same_batch']['ratio']:.2f}"
    ours, theirs = _times(record), _times(plain)
    by_cache = "-" if ours is None or theirs is None else f"{clock.ratio(theirs, ours).median:.2f}"
    return (
        record.scheme["spec"],
        record.scheme.get("kv_spec", "-"),
        f"{depth // 1024}k" if depth % 1024 == 0 else str(depth),
        quality.get("gate", "none"),
        number("kl", ".4f"),
        number("top1", ".1%"),
        number("ppl", ".2f"),
        "-" if per_token is None else f"{per_token}",
        "-" if memory.get("kv") is None else f"{memory['kv'] / 1e6:.1f}",
        rate,
        gain,
        by_cache,
    )


def table(found: Sequence[tuple[str, ...]], heading: str = "") -> Table:
    """The rich table."""
    drawn = Table(
        title=heading or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
    )
    for index, name in enumerate(HEADER):
        drawn.add_column(name, justify="left" if index in _LEFT else "right", no_wrap=True)
    for values in found:
        gate = f"[{_STYLES[values[3]]}]{values[3]}[/]" if values[3] in _STYLES else values[3]
        drawn.add_row(*values[:3], gate, *values[4:])
    return drawn


def markdown(found: Sequence[tuple[str, ...]], heading: str = "") -> str:
    """The same table as markdown."""
    lines = [f"{heading}\n"] if heading else []
    lines.append("| " + " | ".join(HEADER) + " |")
    lines.append("|" + "|".join("---" if i in _LEFT else "---:" for i in range(len(HEADER))) + "|")
    lines += ["| " + " | ".join(values) + " |" for values in found]
    return "\n".join(lines) + "\n"
