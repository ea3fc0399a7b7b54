"""Decode and prefill of a synthetic model as one cell of a slot: sides in turn, on a card in CUDA graphs.

`bench model` walks the whole road with a probe and a gate and takes wall times. A slot has minutes: it times the step
that serving repeats, at a fixed depth of the cache, each side as one graph. The 16-bit side is kept between cells.

With `kv` each cache named is a side as well: the same weights over quantised keys and values.

    tg.d1024.b16    one token for each of 16 sequences that have 1024 in the cache      pp512.b1    a prompt of 512
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from ..formats.spec import QuantSpec
from . import card, clock, contexts, model_ratios, model_rows, ratios
from .engine import Model, load, load_config
from .engine.cache import Cache
from .engine.config import Config
from .fair import Plan, budget
from .ratios import Point

PROMPT = 512


@torch.inference_mode()  # which it leaves wherever it yields
def cell(
    source: str,
    spec: str | None,
    batches: Sequence[int],
    depth: int,
    device: str,
    layers: int | None = None,
    rounds: int = 7,
    prompt: int = PROMPT,
    roof: Mapping[str, float] | None = None,
    impl: str | None = None,
    kv: Sequence[str] = (),
) -> Iterator[dict[str, Any]]:
    """Rows of one spec (None = the 16-bit side against itself): prefill, then a decode step at each batch.

    `kv` are caches that the step is timed over besides the bf16 one; the prefill is over bf16. Each quantised decode comes with its int8 head and, named "16bit head", with the head in 16 bits. The row of the
    last batch is the cell's own.
    """
    where = torch.device(device)
    limit = max(depth + 1, prompt)
    layers = layers or fitting_layers(load_config(source), where, max(batches) * (depth + 1) * (1 + len(kv)))
    base = _baseline(source, layers, device, limit)
    if not bool(torch.isfinite(base.logits(_ids(base, (1, 4)))).all()):
        raise ValueError(f"{source}: the 16-bit side gives NaN or Inf; its weights are not usable")
    sides: dict[str, Model] = {"baseline": base}
    if spec is None:
        sides["again"] = base
        name = "again"
    else:
        held = load(source, spec=QuantSpec.parse(spec), layers=layers, device=where, max_len=limit, impl=impl)
        name = spec
        sides[name] = held.with_head("int8-row")
        sides[f"{name} 16bit head"] = held
        if not bool(torch.isfinite(sides[name].logits(_ids(base, (1, 4)))).all()):
            error = {"type": "Conformance", "message": f"{spec}: logits are NaN or Inf", "stage": "gate"}
            yield {"status": "failed", "quality": {"gate": "red", "reasons": [error["message"]]}, "error": error}
            return
    prompted = {n: m for n, m in sides.items() if "16bit head" not in n}
    sides |= {f"{name}, {cache} cache": sides[name].with_kv(cache) for cache in kv}
    row = functools.partial(_row, name=name, sides=sides, roof=roof or {}, layers=layers)
    points: dict[str, list[Point]] = {}
    times = _prefill(prompted, prompt, where, rounds)
    yield row(f"pp{prompt}.b1", "prefill", 1, prompt, times) | {"part": f"pp{prompt}.b1"}
    for batch in batches:
        seen = _decode(sides, batch, depth, where, rounds)
        for side, sample in seen.items():
            rates = tuple(batch / t for t in sample.samples)
            points.setdefault(side, []).append(Point(batch, rates, tpot_s=sample.median, run=f"b{batch}"))
        for side in sorted((n for n in sides if n != "baseline"), key=lambda n: n == name):
            last = batch == batches[-1] and side == name
            made = row(f"tg.d{depth}.b{batch}", "decode", batch, depth, seen, name=side)
            if batch == batches[-1]:
                made["tokens"]["vs_fp16"] |= _over_batches(points, sides, side, depth, where)
            yield made if last else made | {"part": f"{side} b{batch}"}


def _over_batches(
    points: Mapping[str, Sequence[Point]], sides: Mapping[str, Model], side: str, depth: int, where: torch.device
) -> dict[str, Any]:
    """same_bound and max_fit of a side over the batches of the cell, for sequences of `depth` tokens of all layers."""
    layers, memory = load_config(sides[side].source).layers, budget(Plan(), where)
    asked = [model_rows.needs(memory, sides[name], layers) for name in ("baseline", side)]
    fit = ratios.max_fit(points["baseline"], points[side], *(model_ratios.fits(of, depth) for of in asked))
    return {"same_bound": ratios.nothing("a slot has no bound"), "max_fit": fit | {"memory": asked[1]}}


def fitting_layers(config: Config, where: torch.device, kv_tokens: int) -> int:
    """All layers, or as many as fit the memory twice in 16 bits, beside a cache of `kv_tokens` and the tables.

    The same number for every spec, so that rows compare.
    """
    found = card.fingerprint(where)["card"]
    memory = 0.85 * found["mem_mib"] * 2**20 if found else 0.8 * card.free_bytes(where)
    tables = 10 * config.vocab * config.hidden  # an embedding and a head on each side, an int8 copy of one head
    per_layer = 4 * config.block_parameters() + 4 * kv_tokens * config.kv_size
    return max(1, min(config.layers, int((memory - tables) / per_layer)))


@functools.lru_cache(maxsize=1)
def _baseline(source: str, layers: int, device: str, max_len: int) -> Model:
    return load(source, layers=layers, device=device, max_len=max_len)


def _ids(model: Model, shape: tuple[int, ...]) -> torch.Tensor:
    random = torch.Generator().manual_seed(1)
    return torch.randint(0, model.config.vocab, shape, generator=random).to(model.device)


def _prefill(sides: Mapping[str, Model], prompt: int, where: torch.device, rounds: int) -> dict[str, clock.Sample]:
    """Seconds of a prompt, wall time: its products are long enough to hide the launches."""
    calls, caches = {}, {}
    for name, model in sides.items():
        caches[name], ids = model.new_cache(1, prompt), _ids(model, (1, prompt))
        calls[name] = lambda m=model, n=name, i=ids: m.prefill(i, caches[n])
    return clock.ab(calls, rounds=min(rounds, 5), device=where, before=lambda name, turn: caches[name].rewind())


def _decode(
    sides: Mapping[str, Model], batch: int, depth: int, where: torch.device, rounds: int
) -> dict[str, clock.Sample]:
    """Seconds of one step at `depth`. Sides with equal caches share one: each reads the same keys and writes the same slot."""
    tokens = _ids(next(iter(sides.values())), (batch,))
    caches: dict[tuple[Any, ...], Cache] = {}

    def stepper(model: Model) -> Callable[[], torch.Tensor]:
        kind = contexts.kind_of(model)
        if kind not in caches:
            caches[kind] = model.new_cache(batch, depth + 1)
            caches[kind].fill_random()
        cache = caches[kind]

        def step() -> torch.Tensor:
            cache.rewind(depth)
            return model.step(tokens, cache)

        return step

    steps = {name: stepper(model) for name, model in sides.items()}
    if where.type == "cuda":
        found = clock.card_ab({name: [step] for name, step in steps.items()}, device=where, rounds=rounds)
        return {name: times.graph for name, times in found.items()}
    return clock.ab(steps, rounds=rounds)


def _row(
    case: str,
    phase: str,
    batch: int,
    tokens: int,
    times: Mapping[str, clock.Sample],
    *,
    name: str,
    sides: Mapping[str, Model],
    roof: Mapping[str, float],
    layers: int,
) -> dict[str, Any]:
    model, sample = sides[name], times[name]
    config, spec = model.config, model.spec
    gain = clock.ratio(times["baseline"], sample)
    versus = {"ratio": gain.median, "ci95": [gain.lo, gain.hi], "batch": batch, "batch_fp16": batch}
    per_call = batch * (tokens if phase == "prefill" else 1)
    rate = per_call / sample.median
    kind = "tok_s_in" if phase == "prefill" else "tok_s"
    moved = model.step_bytes(batch) + batch * tokens * model.kv_bytes_per_token if phase == "decode" else None
    share = 100 * moved / sample.median / (roof["copy_gbs"] * 1e9) if moved and roof.get("copy_gbs") else None
    dtype = str(model.dtype).removeprefix("torch.")
    on_card = model.device.type == "cuda"
    latency = {"median": sample.median, "lo": sample.lo, "hi": sample.hi, "iqr": sample.iqr}
    return {
        "case": f"{config.name}.model.{case}",
        "model": {
            "id": config.name,
            "weights": "synthetic" if model.synthetic else "real",
            "layers_run": layers,
            "layers": load_config(model.source).layers,
        },
        "shape": {"batch": batch, "isl": tokens, "kv_len": tokens},
        "scheme": {
            "spec": str(spec) if spec else dtype,
            "kv_spec": model.kv.name,
            "kv_bits": model.kv.bits,
            "weight_bits": spec.weight_bits if spec else 16,
            "act_bits": spec.act_bits if spec else 16,
            "group": spec.group if spec else None,
            "head": model.head,
            "notes": list(model.notes),
        },
        "body": {
            "impl": model.kernel,
            "dtype": dtype,
            "baseline_dtype": str(sides["baseline"].dtype).removeprefix("torch."),
            "same_fusions": model.same_fusions,
            "attention_body": model.attention(phase),
        },
        "clock": {
            "mode": "graph" if on_card and phase == "decode" else "wall",
            "l2": "cold" if on_card else "warm",
            "power": "burst",
            "rounds": len(sample.samples),
            "drift": sample.drift,
        },
        "latency_us": {n: v * 1e6 for n, v in latency.items()} | {"samples": [t * 1e6 for t in sample.samples]},
        "tokens": {kind: rate, "tok_s_per_card": rate, "vs_fp16": {"same_batch": versus}},
        "roofline": {"bytes": moved, "bound": "mem", "pct_of_roof": share} if moved else None,
        "memory": {
            "weights": model.nbytes,
            "kv": batch * tokens * model.kv_bytes_per_token,
            "kv_bytes_per_token": model.kv_bytes_per_token,
        },
        "quality": {
            "gate": "synthetic",
            "reasons": ["speed at true shapes, quality not measured"],
            "sqnr_db": model.weights.sqnr_db,
        },
        "words": f"{rate:.0f} tok/s, {gain.median:.2f} x {str(sides['baseline'].dtype).removeprefix('torch.')}",
    }
