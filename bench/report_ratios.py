"""Two tables of model runs: tokens per card against FP16 three ways, and every batch of the ladder with its rates and roofs.

A factor never stands alone: the batch of this side and of FP16 are beside it, lengths, bound and memory in the title. What has no
figure has a number, and the reason stands under the table. Where a ladder ended before what fits or is allowed, a star says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.table import Table

from . import model_ratios, ratios, report_caches
from .ratios import Bound
from .record import Record

HEADER = ("spec", "cache", "gate", "of", "same batch, x", "same bound, x", "max fit, x")
LADDER = (
    "spec", "cache", "batch", "prompt t/s", "steps t/s", "whole t/s", "per user", "TTFT ms", "TPOT ms", "MBU %", "MFU %",
    "% spec", "bound", "J/t", "$/Mt",
)  # fmt: skip
_WAYS = ("same_batch", "same_bound", "max_fit")
_FLOATS = ("bf16", "fp32", "fp16")
_STYLES = {"green": "green", "red": "bold red"}


@dataclass
class Lines:
    """Lines of a table, and what stands under it."""

    header: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    title: str = ""
    words: int = 1  # columns from the left that hold words


def _name(record: Record) -> tuple[str, str, str]:
    """(spec, cache, head) of a side; FP16 is FP16 in whatever float type it ran."""
    spec = record.scheme["spec"]
    return "FP16" if spec in _FLOATS else spec, report_caches.cache_of(record) or "16bit", record.scheme["head"]


def _timed(records: Iterable[Record]) -> list[Record]:
    """Rows with figures of speed, the last of each cell."""
    found = [r for r in records if r.level == "model" and r.status == "ok" and r.tokens and "vs_fp16" in r.tokens]
    return list({r.cell_key: r for r in found}.values())


def three(records: Sequence[Record]) -> Lines:
    """The three ratios of every side, of its decode at each depth and of the whole; none for records without them."""
    lines = Lines(HEADER, words=4)
    done = [r for r in model_ratios.completed(_timed(records)) if r.tokens and "max_fit" in r.tokens["vs_fp16"]]
    last = {(*_name(r), _of(r)): r for r in sorted(done, key=lambda r: r.shape["batch"])}
    order = dict.fromkeys((*_name(r), _of(r)) for r in done)
    heads: dict[tuple[str, str], str] = {}
    for spec, cache, head, _ in order:
        if heads.setdefault((spec, cache), head) != "int8-row":  # beside an int8 head the 16-bit one is left out
            heads[spec, cache] = head
    shown = [last[n] for n in order if n[:2] != ("FP16", "16bit") and heads[n[0], n[1]] == n[2]]
    if not shown:
        return lines
    numbers: dict[str, int] = {}
    for r in shown:
        assert r.tokens is not None
        versus = r.tokens["vs_fp16"]
        gate = (r.quality or {}).get("gate", "none")
        lines.rows.append((*_name(r)[:2], gate, _of(r), *(ratios.cell(versus.get(way), numbers) for way in _WAYS)))
    lines.notes = [f"[{number}] {why}" for why, number in numbers.items()]
    lines.notes.append(
        "a/b: batch of this side / batch of FP16; [lo, hi]: 95 % interval over rounds; tg: steps, mix: the whole"
    )
    if any("*" in cell for row in lines.rows for cell in row):
        capped = next(
            w["reason"]
            for r in shown
            if r.tokens
            for way in _WAYS
            if (w := r.tokens["vs_fp16"].get(way) or {}).get("reason") and w.get("ratio") is not None
        )
        lines.notes.append(f"* the ladder ended before the limit: {capped}")
    lines.title = _title(shown)
    return lines


def _of(record: Record) -> str:
    """What is compared, without model and batch: "tg32.d512", "mix512x32"."""
    return record.case.split(".model.")[-1].rsplit(".b", 1)[0]


def _title(shown: Sequence[Record]) -> str:
    """What all lines have in common: model, lengths, bound, memory, machine."""
    first, versus = shown[0], (shown[0].tokens or {})["vs_fp16"]
    layers = "" if first.model["layers_run"] == first.model["layers"] else f", {first.model['layers_run']} layers"
    weights = ", synthetic" if first.model.get("weights") == "synthetic" else ""
    parts = [f"{first.model['id']}{weights}{layers}: tokens per card against FP16, {first.shape['isl']} in"]
    if first.shape.get("osl"):
        parts[0] += f" and {first.shape['osl']} out"
    if bound := (versus.get("same_bound") or {}).get("bound"):
        parts.append(f"bound {Bound.of_section(bound)}")
    if memory := (versus.get("max_fit") or {}).get("memory"):
        parts.append(
            f"max fit in {memory['util']:.0%} of {memory['bytes'] / 1e9:.3g} GB ({memory['of']}) less {memory['overhead'] / 1e9:g} GB"
        )
    parts.append(first.card.get("name") or first.cpu.get("model") or "")
    return "; ".join(filter(None, parts))


def ladder(records: Sequence[Record]) -> Lines:
    """A line for each side and batch: rates of prompt, steps and whole, latencies, shares of roofs, joules and dollars."""
    lines = Lines(LADDER, words=2)
    groups: dict[tuple[Any, ...], dict[str, Record]] = {}
    for r in _timed(records):
        phase = "prefill" if ".pp" in r.case else "mixed" if ".mix" in r.case else "decode"
        # A prompt has no depth of its own: it stands beside the steps after it.
        depth = r.shape["isl"] if phase != "decode" else r.shape.get("kv_len", r.shape["isl"])
        groups.setdefault((*_name(r), depth, r.shape["batch"]), {})[phase] = r
    for (spec, cache, head, depth, batch), found in groups.items():
        decode = found.get("decode")
        if decode is None:
            continue
        if head == "16bit" and any(k[:2] == (spec, cache) and k[2] != head for k in groups):
            continue  # the twin beside an int8 head
        at = "" if depth == decode.shape["isl"] else f", depth {depth}"
        lines.rows.append((spec, cache + at, str(batch), *_figures(found)))
    lines.notes = _reasons(r for found in groups.values() for r in found.values())
    return lines


def _figures(found: Mapping[str, Record]) -> tuple[str, ...]:
    """The cells of LADDER after batch."""
    decode = found["decode"]

    def tokens(phase: str, name: str) -> Any:
        return ((found[phase].tokens or {}) if phase in found else {}).get(name)

    roof, energy = decode.roofline or {}, decode.energy or {}
    price = ((decode.money or {}).get("usd_per_mtok") or {}).get("out")
    joules = energy.get("j_per_out_token") if energy.get("power_valid") else None
    latency = ((tokens("decode", name) or {}).get("p50") for name in ("ttft_s", "tpot_s"))
    return (
        *(_number(tokens(*which)) for which in (("prefill", "tok_s_in"), ("decode", "tok_s"), ("mixed", "tok_s"))),
        _number(tokens("decode", "tok_s_per_user")),
        *(_number(None if value is None else 1e3 * value) for value in latency),
        *(_number(None if roof.get(name) is None else 100 * roof[name]) for name in ("mbu", "mfu")),
        _number(roof.get("pct_of_spec")),
        roof.get("bound") or "-",
        _number(joules),
        _number(price),
    )


def _reasons(records: Iterable[Record]) -> list[str]:
    """Why there are no joules, once each, and what the shares are of."""
    whys = {r.energy["power_reason"] for r in records if r.energy and not r.energy.get("power_valid")}
    notes = [f"no joules: {why}" for why in sorted(filter(None, whys))]
    return [
        *notes,
        "t: tokens; whole: prompt and answer, its output tokens; MBU, MFU: of the read rate and the float rate measured here",
    ]


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 1 else f"{value:.3g}"


def tables(records: Sequence[Record]) -> list[Lines]:
    """The ratios and the ladder, or nothing for records from before there were three."""
    found = three(records)
    return [found, ladder(records)] if found.rows else []


def table(lines: Lines) -> Table:
    """The rich table; the notes are the caller's to print."""
    drawn = Table(
        title=lines.title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
    )
    for index, name in enumerate(lines.header):
        words = index < lines.words
        drawn.add_column(name, justify="left" if words else "right", overflow="fold", no_wrap=words)
    for row in lines.rows:
        cells = [f"[{_STYLES[cell]}]{cell}[/]" if cell in _STYLES else cell.replace("[", "\\[") for cell in row]
        drawn.add_row(*cells)
    return drawn


def markdown(lines: Lines) -> str:
    """The same with its notes as markdown."""
    out = [f"{lines.title}\n"] if lines.title else []
    out.append("| " + " | ".join(lines.header) + " |")
    out.append("|" + "|".join("---" if i < lines.words else "---:" for i in range(len(lines.header))) + "|")
    out += ["| " + " | ".join(row) + " |" for row in lines.rows]
    out += ["", *(f"- {words}" for words in lines.notes)] if lines.notes else []
    return "\n".join(out) + "\n"
