"""What share of its roofs a machine reaches: looked up in fitted rows, else labelled defaults. No device is asked.

    time of a step = max(bytes / (bandwidth x e_bw), operations / (rate x e_fl))

`percard plan --check RECORDS --fit FILE` fits the two shares from records; rows of all machines stand together in
`cards/efficiency.json`. A row is about one card and one thing, at one bucket of tokens at once (M):

    decode.<spec>      a decode step of whole layers and head; M = sequences
    prefill.<spec>     a prompt through whole layers;         M = tokens at once
    linear.<spec>      linears alone, quantising activations included
    attention.<kv>     attention of a step over a cache of that spec (bf16, int8 ...)

`<spec>` prints as in formats/spec.py, 16-bit weights are `bf16`. Nothing is asked of a name: a thing without rows has defaults.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..formats.spec import FormatError, QuantSpec

PACKAGED = Path(__file__).resolve().parent / "cards" / "efficiency.json"
VERSION = 1
# AIConfigurator's factor on the bandwidth of NVIDIA cards; the middle of what llm-analysis says of rates (0.5 - 0.7).
DEFAULT_BW, DEFAULT_FL = 0.80, 0.60
BASES = ("measured", "interpolated", "scaled", "brochure")  # best first
# How far a time may be from its prediction. Proposals of the design; `plan --check` prints what they came to.
BANDS: dict[str, tuple[float, float]] = {
    "measured": (-0.10, 0.10),
    "interpolated": (-0.20, 0.20),
    "scaled": (-0.40, 0.40),
    "brochure": (-0.50, 0.15),
}
_MOST = 1.5  # a share above it says that the roof is not that of this machine


@dataclass(frozen=True)
class Efficiency:
    """Shares of bandwidth and rate, where they are from, and the band of what is made of them (of a rate in tokens/s).

    `basis` is the better one of `basis_bw` and `basis_fl`: a step that memory bounds needs no fitted rate. Who knows which
    term bounds asks `term`.
    """

    e_bw: float
    e_fl: float
    basis: str
    band: tuple[float, float]
    source: str
    basis_bw: str = "brochure"
    basis_fl: str = "brochure"
    spread: float = 0.0

    def term(self, bound: str) -> tuple[str, tuple[float, float]]:
        """(basis, band) of the term that bounds: "mem" or "flop"."""
        basis = self.basis_bw if bound == "mem" else self.basis_fl
        return basis, _band(basis, self.spread)


@dataclass(frozen=True)
class Row:
    """What was fitted: shares of `card` for `of` at `bucket` tokens at once; None = this bound was not met there.

    `n` measurements, none of them further than the share `spread` from the fit; `source` names records and their date.
    """

    card: str
    of: str
    bucket: int
    e_bw: float | None
    e_fl: float | None
    n: int
    spread: float
    source: str


@dataclass(frozen=True)
class Point:
    """One measurement: `seconds` for `bytes` and `flops` on a machine of `bandwidth` bytes/s and `rate` operations/s."""

    card: str
    of: str
    tokens: int
    seconds: float
    bytes: float
    flops: float
    bandwidth: float
    rate: float
    source: str


def bucket_of(tokens: int) -> int:
    """The power of two that is nearest on a logarithmic scale: 1, 2, 4 ..."""
    return 1 << max(0, round(math.log2(max(1, tokens))))


def name(level: str, spec: QuantSpec | str | None) -> str:
    """The name of a thing: name("decode", None) is "decode.bf16"; the other 16-bit and fp32 types are bf16's kin."""
    word = "bf16" if spec is None or str(spec) in ("fp16", "fp32", "float16", "float32", "bfloat16") else str(spec)
    return f"{level}.{word}"


def find(card_id: str, op_or_level: str, bucket: int | None = None, files: Sequence[str | Path] = ()) -> Efficiency:
    """Shares of `op_or_level` (see above) on a card at `bucket` tokens at once; None = at any.

    Rows of `files` come before the packaged ones. In this order: the very bucket (measured), other buckets between
    neighbours on a logarithmic scale or the nearest one, another group size of the same bits (interpolated), the median over
    other machines of the kind, CPU or card (scaled), the defaults (brochure). Each of the two shares for itself.
    """
    known = _known(tuple(str(file) for file in files))
    wanted = None if bucket is None else bucket_of(bucket)
    bw = _share(known, card_id, op_or_level, wanted, "e_bw") or (DEFAULT_BW, "brochure", "default 0.80", 0.0)
    fl = _share(known, card_id, op_or_level, wanted, "e_fl") or (DEFAULT_FL, "brochure", "default 0.60", 0.0)
    best = min(bw[1], fl[1], key=BASES.index)
    spread = max(part[3] for part in (bw, fl) if part[1] == best)
    words = bw[2] if bw[2] == fl[2] else f"e_bw: {bw[2]}; e_fl: {fl[2]}"
    return Efficiency(bw[0], fl[0], best, _band(best, spread), words, bw[1], fl[1], spread)


def fit(points: Iterable[Point]) -> list[Row]:
    """A row for each card, thing and bucket: the median share of the bound that the roofs say, over all its points."""
    groups: dict[tuple[str, str, int], list[Point]] = {}
    for point in points:
        groups.setdefault((point.card, point.of, bucket_of(point.tokens)), []).append(point)
    rows = []
    for (card_id, of, bucket), some in sorted(groups.items()):
        shares: dict[str, list[float]] = {"e_bw": [], "e_fl": []}
        for p in some:
            memory, compute = p.bytes / p.bandwidth, p.flops / p.rate
            shares["e_bw" if memory >= compute else "e_fl"].append(max(memory, compute) / p.seconds)
        found = {term: statistics.median(s) if s else None for term, s in shares.items()}
        off = [abs(s / found[term] - 1) for term, ss in shares.items() for s in ss if found[term]]  # type: ignore[operator]
        sources = ", ".join(dict.fromkeys(p.source for p in some))
        rows.append(
            _checked(Row(card_id, of, bucket, found["e_bw"], found["e_fl"], len(some), max(off), sources), "fit")
        )
    return rows


def read(path: str | Path) -> tuple[Row, ...]:
    """The rows of an efficiency file. FormatError names the row and what is wrong."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FormatError(f"{path}: not there; make one with percard plan --check RECORDS --fit {path}") from None
    except (ValueError, OSError) as error:
        raise FormatError(f"{path}: not readable as JSON ({error})") from None
    rows = data.get("rows") if isinstance(data, Mapping) else None
    if not isinstance(rows, list) or data.get("version") != VERSION:
        raise FormatError(f'{path}: expected {{"version": {VERSION}, "rows": [...]}}; fit it again with plan --check')
    return tuple(_row(row, f"{path}: row {number}") for number, row in enumerate(rows, 1))


def save(path: str | Path, rows: Iterable[Row]) -> None:
    """Adds rows to a file, in place of those about the same card, thing and bucket."""
    target = Path(path)
    kept = {(row.card, row.of, row.bucket): row for row in (read(target) if target.exists() else ())}
    kept |= {(row.card, row.of, row.bucket): row for row in rows}
    lines = ",\n".join("    " + json.dumps(_rounded(asdict(kept[key]))) for key in sorted(kept))
    text = f'{{\n  "version": {VERSION},\n  "rows": [\n{lines}\n  ]\n}}\n'
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(target.name + ".new")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(target)
    _known.cache_clear()


def is_cpu(card_id: str) -> bool:
    """Whether an id is that of a CPU, as `bench card` names them."""
    return card_id.startswith("cpu-")


@cache
def _known(files: tuple[str, ...]) -> dict[tuple[str, str, int], Row]:
    found: dict[tuple[str, str, int], Row] = {}
    for path in (PACKAGED, *map(Path, files)):  # the later ones win
        found |= {(row.card, row.of, row.bucket): row for row in read(path)}
    return found


def _share(
    known: Mapping[tuple[str, str, int], Row], card_id: str, of: str, bucket: int | None, term: str
) -> tuple[float, str, str, float] | None:
    """(share, basis, source, spread), or None when no machine of the kind has one."""
    for like in (of, _kin(known, card_id, of)):
        mine = {row.bucket: row for row in known.values() if row.card == card_id and row.of == like} if like else {}
        mine = {m: row for m, row in mine.items() if getattr(row, term) is not None}
        if mine:
            value, near = _between({m: getattr(row, term) for m, row in mine.items()}, bucket)
            row = mine[near]
            measured = like == of and bucket in mine
            words = row.source if measured else f"{row.source} (from {like} at M={near})"
            return value, "measured" if measured else "interpolated", words, row.spread
    others: dict[str, dict[int, float]] = {}
    for row in known.values():
        share = getattr(row, term)
        if row.of == of and share is not None and row.card != card_id and is_cpu(row.card) == is_cpu(card_id):
            others.setdefault(row.card, {})[row.bucket] = share
    if not others:
        return None
    value = statistics.median(_between(shares, bucket)[0] for shares in others.values())
    return value, "scaled", f"median of {', '.join(sorted(others))}", 0.0


def _kin(known: Mapping[tuple[str, str, int], Row], card_id: str, of: str) -> str | None:
    """Another group size of the same bits on this card: w4a16-g64 for w4a16-g128."""
    level, _, spec = of.partition(".")
    bits = spec.split("-")[0]
    found = sorted({row.of for row in known.values() if row.card == card_id and row.of != of})
    return next((o for o in found if o.partition(".")[0] == level and o.partition(".")[2].split("-")[0] == bits), None)


def _between(shares: Mapping[int, float], bucket: int | None) -> tuple[float, int]:
    """(share at a bucket, the bucket it leans on): between neighbours over log M, the nearest one outside of them."""
    if bucket is None:
        return statistics.median(shares.values()), min(shares)
    near = min(shares, key=lambda m: (abs(math.log2(m / bucket)), m))
    below, above = [m for m in shares if m <= bucket], [m for m in shares if m >= bucket]
    if not below or not above or max(below) == min(above):
        return shares[near], near
    lo, hi = max(below), min(above)
    part = math.log2(bucket / lo) / math.log2(hi / lo)
    return shares[lo] + part * (shares[hi] - shares[lo]), near


def _band(basis: str, spread: float) -> tuple[float, float]:
    """The band of a basis, never narrower than what the fit itself left."""
    lo, hi = BANDS[basis]
    return min(lo, -spread), max(hi, spread)


def _row(raw: Any, where: str) -> Row:
    try:
        row = Row(**raw)
    except TypeError:
        keys = ", ".join(Row.__dataclass_fields__)
        raise FormatError(f"{where}: expected an object with {keys}, found {str(raw)[:80]}") from None
    return _checked(row, where)


def _checked(row: Row, where: str) -> Row:
    for term in ("e_bw", "e_fl"):
        share = getattr(row, term)
        if share is not None and not (isinstance(share, int | float) and 0 < share <= _MOST):
            raise FormatError(
                f"{where}: {term} of {row.of} on {row.card} is {share}, expected above 0 and at most {_MOST}; "
                "are the records and the roofs of one machine? measure its roofs with percard bench card"
            )
    if type(row.bucket) is not int or row.bucket < 1 or not isinstance(row.spread, int | float):
        raise FormatError(
            f"{where}: bucket {row.bucket!r} and spread {row.spread!r}, expected a whole number and a share"
        )
    return row


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}
