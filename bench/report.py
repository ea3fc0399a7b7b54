"""The report of model runs: one table for the terminal, for markdown and for JSON, and a picture of the trade.

Every ratio stands under a title that says card, model, layers, batch, tokens and rounds: a bare factor is not printed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from . import report_caches
from .clock import Sample
from .record import Record

WIDTH = 120  # columns that every table fits in
_FLOATS = ("bf16", "fp32", "fp16")
_HEADER = ("spec", "gate", "KL", "top-1", "ppl", "MB", "prefill tok/s", "x", "decode tok/s", "x", "head16", "kernel")


@dataclass(frozen=True)
class Row:
    """One line of the report, baseline and variants alike. Rates are {median, lo, hi}, None = not measured.

    `size_bytes` are the weights in memory of the model that was timed (of the one that was gated if none was).
    `*_ratio` is {ratio, ci95} against the baseline of the same rounds; `decode_tok_s_16bit_head` stands beside a
    decode with an int8 copy of the head. `cache` names a quantised one, None = of 16 bits.
    """

    spec: str
    quality_model: str | None
    speed_model: str | None
    gate: str
    size_bytes: int | None
    perplexity: float | None
    kl: float | None
    top1: float | None
    prefill_tok_s: dict[str, float] | None
    decode_tok_s: dict[str, float] | None
    kernel: str | None
    head: str
    decode_tok_s_16bit_head: dict[str, float] | None = None
    prefill_ratio: dict[str, Any] | None = None
    decode_ratio: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()
    cache: str | None = None


def rows(records: Iterable[Record]) -> list[Row]:
    """Lines from the model records of one run, baseline first. Later records of a cell replace earlier ones.

    Of several caches and depths the first; all of them stand in report_caches.py's table.
    """
    groups: dict[str, dict[tuple[str, str], Record]] = {}
    told = (r for r in records if r.level == "model" and (r.status == "ok" or (r.quality or {}).get("gate") == "red"))
    for record in report_caches.first_of_each(told):
        named = "baseline" if record.scheme["spec"] in _FLOATS else record.scheme["spec"]
        phase = "prefill" if ".pp" in record.case else "decode"
        groups.setdefault(named, {})[phase, record.scheme["head"]] = record
    return [_row(group) for _, group in sorted(groups.items(), key=lambda item: item[0] != "baseline")]


def _row(group: Mapping[tuple[str, str], Record]) -> Row:
    heads = [head for _, head in group]
    head = "int8-row" if "int8-row" in heads else heads[0]
    phases = {phase: group.get((phase, head)) for phase in ("prefill", "decode")}
    # Of the two phases decode says the size and the kernel: a prefill in another float type holds a second copy.
    first = next(record for record in reversed(phases.values()) if record is not None)
    specs = list(dict.fromkeys(r.scheme["spec"] for r in phases.values() if r is not None))
    quality, model, notes = first.quality or {}, first.model, list(first.scheme.get("notes") or ())
    if len(specs) > 1:
        notes.append("prefill in {}, decode in {}".format(*specs))
    notes += quality.get("reasons") or ()
    return Row(
        spec="/".join(specs),
        quality_model=quality.get("model"),
        speed_model=speed_name(model),
        gate=quality.get("gate", "none"),
        size_bytes=(first.memory or {}).get("weights"),
        perplexity=quality.get("ppl"),
        kl=quality.get("kl"),
        top1=quality.get("top1"),
        prefill_tok_s=_rate(phases["prefill"]),
        decode_tok_s=_rate(phases["decode"]),
        kernel=_kernel(first),
        head=head,
        decode_tok_s_16bit_head=_rate(group.get(("decode", "16bit"))),
        prefill_ratio=_ratio(phases["prefill"]),
        decode_ratio=_ratio(phases["decode"]),
        notes=tuple(dict.fromkeys(notes)),
        cache=report_caches.cache_of(first),
    )


def speed_name(model: Mapping[str, Any]) -> str:
    """The model as it was timed: "qwen3-0.6b (synthetic, 8 of 28 layers)"."""
    words = ["synthetic"] if model.get("weights") == "synthetic" else []
    if model.get("layers_run") != model.get("layers"):
        words.append(f"{model['layers_run']} of {model['layers']} layers")
    return model["id"] + (f" ({', '.join(words)})" if words else "")


def _kernel(record: Record) -> str | None:
    if "impl" not in record.body:  # it could not be loaded
        return None
    isa = record.body.get("isa")
    return record.body["impl"] + (f" ({isa})" if isa else "")


def _rate(record: Record | None) -> dict[str, float] | None:
    if record is None or not record.latency_us or not record.tokens:
        return None
    per_call = record.shape["batch"] * (record.shape["isl"] if ".pp" in record.case else 1)
    found = Sample.of([s / 1e6 for s in record.latency_us["samples"]]).rate(per_call)
    return {"median": found.median, "lo": found.lo, "hi": found.hi}


def _ratio(record: Record | None) -> dict[str, Any] | None:
    if record is None or not record.tokens:
        return None
    return (record.tokens.get("vs_fp16") or {}).get("same_batch")


def title(records: Sequence[Record]) -> str:
    """What the figures are of: model, batch, tokens, rounds, machine."""
    first = next(r for r in records if r.level == "model")
    shape, machine = first.shape, first.card.get("name") or first.cpu["model"]
    threads = "" if first.card else f", {first.cpu['threads']} threads"
    return (
        f"{speed_name(first.model)}: prefill of {shape['isl']}, then {shape['osl']} tokens, batch {shape['batch']}, "
        f"{first.clock['rounds']} rounds; {machine}{threads}, torch {first.env['torch']}"
    )


def footnotes(records: Sequence[Record]) -> list[str]:
    """What a reader must know: baseline probe, gate protocol, noise, instruction sets, notes of each variant."""
    found: dict[str, None] = {}
    if any(record.scheme.get("head") == "int8-row" for record in records):
        found.setdefault(
            "int8-row head: decode of a variant holds an int8 copy of the head; head16 = with the 16-bit head"
        )
    models = [record for record in records if record.level == "model"]
    floors = [record.cpu.get("noise_floor_pct", record.card.get("noise_floor_pct")) for record in models]
    most = max((floor for floor in floors if floor is not None), default=None)
    for record in models:
        if record.error is not None:
            found.setdefault(f"{record.scheme.get('spec')}: {record.status}: {record.error.get('message')}")
        phase = "prefill" if ".pp" in record.case else "decode"
        if record.body.get("baseline_probe"):
            chosen, times = record.body["baseline_dtype"], record.body["baseline_probe"]
            found.setdefault(f"baseline of {phase}: torch {chosen}, the fastest ({times} a layer)")
            if record.body.get("dtype", chosen) != chosen:
                found.setdefault(f"{record.scheme['spec']}: {phase} in {record.body['dtype']}, the fastest for it")
        quality = record.quality or {}
        if quality.get("protocol"):
            # The protocol ends with the model's own dtype and head; the part all share is enough here.
            found.setdefault(f"gate on {quality['model']}: {quality['protocol'].split('; reference in')[0]}")
        if most is not None:
            found.setdefault(f"noise floor: the baseline differs from itself by {most:.1f} %")
        isa = f"torch uses {record.cpu['torch_isa']}" if not record.card and "torch_isa" in record.cpu else None
        if isa:
            found.setdefault(isa + (f", our bodies {record.body['isa']}" if record.body.get("isa") else ""))
        for words in record.clock.get("noisy") or ():
            found.setdefault(f"noisy: {words}")
        cache = report_caches.cache_of(record)
        for words in [*(record.scheme.get("notes") or ()), *(quality.get("reasons") or ())]:
            found.setdefault(f"{record.scheme['spec']}{f', {cache} KV' if cache else ''}: {words}")
    if any(words.startswith("torch uses") and "our bodies" in words for words in found):
        found = {w: None for w in found if not w.startswith("torch uses") or "our bodies" in w}
    return list(found)


def cells(row: Row) -> tuple[str, ...]:
    """A row as the words of the table, in the order of its header."""

    def rate(found: dict[str, float] | None) -> str:
        if found is None:
            return "-"
        digits = 0 if found["median"] >= 100 else 1
        return f"{found['median']:.{digits}f} ({found['lo']:.{digits}f}-{found['hi']:.{digits}f})"

    def ratio(found: dict[str, Any] | None) -> str:
        return "-" if found is None else f"{found['ratio']:.2f}"

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    beside = row.decode_tok_s_16bit_head if row.head != "16bit" else None
    return (
        row.spec + (f", {row.cache} KV" if row.cache else ""),
        row.gate,
        number(row.kl, ".4f"),
        number(row.top1, ".1%"),
        number(row.perplexity, ".2f"),
        "-" if row.size_bytes is None else f"{row.size_bytes / 1e6:.1f}",
        rate(row.prefill_tok_s),
        ratio(row.prefill_ratio),
        rate(row.decode_tok_s),
        ratio(row.decode_ratio),
        "-" if beside is None else f"{beside['median']:.1f}",
        row.kernel or "-",
    )


def table(found: Sequence[Row], heading: str = "") -> Table:
    """The rich table. Print it on a console of WIDTH columns."""
    styles = {"green": "green", "red": "bold red"}
    drawn = Table(
        title=heading or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
    )
    for index, name in enumerate(_HEADER):
        words = index in (0, 1, len(_HEADER) - 1)
        drawn.add_column(name, justify="left" if words else "right", overflow="fold", no_wrap=words)
    for row in found:
        values = list(cells(row))
        style = styles.get(row.gate)
        values[1] = f"[{style}]{row.gate}[/]" if style else row.gate
        # The op that reads the weight; what runs before it and the instruction set stand in the footnotes and the JSON.
        values[-1] = values[-1].split(" + ")[-1].split(" (")[0]
        drawn.add_row(*values)
    return drawn


def markdown(found: Sequence[Row], heading: str = "", notes: Sequence[str] = ()) -> str:
    """The same table and footnotes as markdown."""
    lines = [f"{heading}\n"] if heading else []
    lines.append("| " + " | ".join(_HEADER) + " |")
    lines.append("|" + "|".join("---" if i in (0, 1, 11) else "---:" for i in range(len(_HEADER))) + "|")
    lines += ["| " + " | ".join(cells(row)) + " |" for row in found]
    lines += ["", *(f"- {words}" for words in notes)] if notes else []
    return "\n".join(lines) + "\n"


def as_json(found: Sequence[Row], records: Sequence[Record]) -> dict[str, Any]:
    """{"baseline": row, "variants": [row, ...]} with the same keys, and what the figures are of."""
    first = records[0] if records else None
    return {
        "schema": 1,
        "title": title(records) if records else "",
        "baseline": asdict(found[0]) if found else None,
        "variants": [asdict(row) for row in found[1:]],
        "machine": {"card": first.card, "cpu": first.cpu, "env": first.env} if first else {},
        "notes": footnotes(records),
    }


def write(
    folder: str | Path, records: Sequence[Record], *, heading: str = "percard report", sections: Mapping[str, str] = {}
) -> list[Path]:
    """Writes report.md, report.json and, when matplotlib is installed, pareto.png into `folder`.

    `sections` {title: markdown} follow the table. Returns the files; without matplotlib report.md says why one is
    missing.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    found, files = rows(records), [target / "report.md", target / "report.json"]
    drawn, reason = picture(found, target / "pareto.png", title(records))
    parts = [f"# {heading}\n", markdown(found, title(records), footnotes(records))]
    if caches := report_caches.rows(records):
        parts.append(report_caches.markdown(caches))
    parts.append("![decode rate against agreement](pareto.png)\n" if drawn else f"{reason}\n")
    parts += [f"## {name}\n\n{body}\n" for name, body in sections.items()]
    files[0].write_text("\n".join(parts), encoding="utf-8")
    files[1].write_text(json.dumps(as_json(found, records), indent=2) + "\n", encoding="utf-8")
    return [*files, target / "pareto.png"] if drawn else files


def picture(found: Sequence[Row], path: Path, heading: str) -> tuple[bool, str]:
    """Draws decode rate (right = faster) against top-1 agreement (up = nearer to 16 bits), area = bytes.

    (True, "") or (False, why there is no picture). Rows without a speed or a gate are left out.
    """
    shown = [row for row in found if row.decode_tok_s is not None and row.top1 is not None]
    if len(shown) < 2:
        return False, "No pareto.png: fewer than two rows have both a speed and a quality."
    try:
        import matplotlib  # only a picture needs it

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return False, "No pareto.png: matplotlib is not installed (pip install 'percard[bench]')."
    figure, axes = pyplot.subplots(figsize=(8, 5), dpi=120)
    largest = max(row.size_bytes or 1 for row in shown)
    for row in shown:
        rate, top1 = row.decode_tok_s or {}, 100 * (row.top1 or 0.0)
        spread = [[rate["median"] - rate["lo"]], [rate["hi"] - rate["median"]]]
        axes.errorbar(rate["median"], top1, xerr=spread, color="gray", capsize=3, zorder=1)
        size = 40 + 360 * (row.size_bytes or 0) / largest
        axes.scatter(rate["median"], top1, s=size, alpha=0.7, zorder=2, label=row.spec)
    # A legend and not labels at the points: specs of like quality lie too close for those.
    for handle in axes.legend(title="area: bytes held", loc="best").legend_handles:
        if handle is not None:
            handle.set(sizes=[60])
    axes.set_xlabel("decode, tokens per second (bar: spread over rounds)")
    axes.set_ylabel("top-1 agreement with 16 bits, %")
    axes.set_title(heading, fontsize=8, wrap=True)
    axes.margins(0.15)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
    return True, ""
