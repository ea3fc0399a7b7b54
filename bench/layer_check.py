"""Do layers add up to the model? layers x layer + head and sampling, against the step that `bench model` measured.

Pure: records of level `layer` (bench/layer.py) and of level `model` in, rows out. What is left over is the embedding, what a
layer alone does not show (its neighbours in the cache), and a machine that was not the same in both runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .probe import FLOATS
from .record import Record

FLAG = 0.15  # a residual above it is flagged
_FLOATS = frozenset(FLOATS.values()) | {"bfloat16", "float16", "float32"}


@dataclass(frozen=True)
class Sum:
    """One model record and the sum of its parts, in seconds; `reason` says why there is none, then the parts are 0."""

    case: str
    spec: str
    head: str
    measured: float
    layers: int
    layer: float = 0.0
    head_s: float = 0.0
    reason: str = ""

    @property
    def total(self) -> float:
        return self.layers * self.layer + self.head_s

    @property
    def residual(self) -> float:
        """What the model took beyond the sum, as a share of what it took; below 0 the sum is longer."""
        return 1 - self.total / self.measured

    @property
    def flagged(self) -> bool:
        return not self.reason and abs(self.residual) > FLAG


def sums(layers: Sequence[Record], models: Sequence[Record]) -> list[Sum]:
    """A Sum for each timed prompt and step of level `model`, in their order; other models than in `layers` are left out."""
    ids = {row.model.get("id") for row in layers}
    some = [row for row in models if row.level == "model" and row.model.get("id") in ids and _timed(row)]
    return [_sum(layers, row) for row in some if ".model.mix" not in row.case]  # prompt and steps are there apart


def lines(found: Sequence[Sum]) -> Iterator[str]:
    """The sums in words, a line each; flagged ones say so."""
    for one in found:
        start = f"{one.case} {one.spec}, {one.head} head: model {1e3 * one.measured:.2f} ms"
        if one.reason:
            yield f"{start}; no sum: {one.reason}"
            continue
        parts = f"{one.layers} x {1e3 * one.layer:.3f} + head {1e3 * one.head_s:.2f} = {1e3 * one.total:.2f} ms"
        flag = f"  FLAG above {FLAG:.0%}" if one.flagged else ""
        yield f"{start}, {parts}, residual {one.residual:+.1%}{flag}"


def layer_of(layers: Sequence[Record], row: Record) -> Record | str:
    """The layer record that a model record is made of: same model, phase, tokens, batch, spec and cache. Or why none is."""
    prefill = row.case.split(".model.")[-1].startswith("pp")
    tokens, key = (row.shape.get("isl"), "isl") if prefill else (row.shape.get("kv_len"), "kv_len")
    some = [r for r in layers if r.model.get("id") == row.model.get("id") and _timed(r) and not r.model.get("shard")]
    some = [r for r in some if r.shape.get("batch") == row.shape.get("batch") and r.shape.get(key) == tokens]
    some = [r for r in some if (".layer.pp" in r.case) == prefill and ".layer." in r.case]
    if not some:
        return (
            f"no layer record at {'a prompt' if prefill else 'a depth'} of {tokens} and batch {row.shape.get('batch')}"
        )
    spec = str(row.scheme.get("spec"))
    same = [r for r in some if _like(r.scheme.get("spec"), spec)]
    if not same:
        return f"no layer record of {spec}"
    kept = [r for r in same if prefill or _like(r.scheme.get("kv_spec"), row.scheme.get("kv_spec"))]
    if not kept:
        return f"no layer record over a cache of {row.scheme.get('kv_spec')}"
    exact = [r for r in kept if r.body.get("dtype") == row.body.get("dtype")]
    if not exact and spec in _FLOATS:
        return f"the model's 16-bit side is {row.body.get('dtype')}, the layer's is {kept[-1].body.get('dtype')}"
    return (exact or kept)[-1]


def head_of(layers: Sequence[Record], row: Record) -> Record | str:
    """The head record of a model record, or why there is none."""
    some = [r for r in layers if r.model.get("id") == row.model.get("id") and ".head." in r.case and _timed(r)]
    some = [r for r in some if r.shape.get("batch") == row.shape.get("batch")]
    kind = row.scheme.get("head") or "16bit"
    some = [r for r in some if r.scheme.get("head") == kind]
    return some[-1] if some else f"no record of a {kind} head at batch {row.shape.get('batch')}"


def attention_of(layers: Sequence[Record], row: Record) -> float | None:
    """Seconds of a layer's attention over the prompt of a layer record, None when it was not measured."""
    some = [r for r in layers if ".attention." in r.case and r.model.get("id") == row.model.get("id") and _timed(r)]
    some = [r for r in some if r.shape == row.shape and not r.model.get("shard")]
    return _seconds(some[-1]) if some else None


def _sum(layers: Sequence[Record], row: Record) -> Sum:
    assert row.latency_us is not None
    about = (row.case, str(row.scheme.get("spec")), str(row.scheme.get("head")), row.latency_us["median"] / 1e6)
    count = int(row.model.get("layers_run") or row.model.get("layers") or 0)
    layer, head = layer_of(layers, row), head_of(layers, row)
    for part in (layer, head):
        if isinstance(part, str):
            return Sum(*about, count, reason=part)
    return Sum(*about, count, _seconds(layer), _seconds(head))  # type: ignore[arg-type]


def _seconds(row: Record) -> float:
    assert row.latency_us is not None
    return row.latency_us["median"] / 1e6


def _timed(row: Record) -> bool:
    return row.status == "ok" and bool((row.latency_us or {}).get("median"))


def _like(one: object, other: object) -> bool:
    """Equal, or both 16-bit or fp32 numbers as they are."""
    return one == other or (str(one) in _FLOATS and str(other) in _FLOATS)
