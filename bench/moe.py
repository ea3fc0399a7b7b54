"""One layer of experts, quantised against bf16: routed tokens through w13, SwiGLU, w2 and the weighted sum, in one time.

The 16-bit side holds the very values that the quantised side dequantises to, and is torch's best: on a card its grouped
product, as in the engine (engine/experts.py). Tokens are routed at random, and each call of a turn routes others: so one
call after the other reads other experts, and the L2 holds none of them when its turn comes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from ..formats.affine import dequantize
from ..formats.layout import stack_experts
from ..formats.spec import QuantSpec
from ..formats.tensor import ExpertsTensor
from ..kernels import conformance
from ..kernels.linear import moe, prepare_experts
from ..kernels.moe_matmul import cases, moe_matmul
from ..kernels.op import Cost
from ..kernels.shapes import Case, generator, weight
from . import clock, ops
from .engine.experts import sixteen_bit
from .stage import Cell

SPECS, SLOT_MODEL = ("w4a16-g128", "w8a8"), "qwen3-30b-a3b"
TOKENS = (16, 64, 1, 256, 1024, 4096)  # in the order in which their figures decide something
# (experts, topk, hidden, inner): real models, and one for a CPU without patience.
MODELS: dict[str, tuple[int, int, int, int]] = {**cases.MODELS, "tiny": (4, 2, 128, 128)}
_ROUTINGS = 16
_AGREES = {"w4a16-g128": 0.02, "w8a8": 0.06}  # relative error against the 16-bit side: what int8 rows cost


def case_name(model: str, spec: str, tokens: int) -> str:
    """`qwen3-30b-a3b.experts.t64.w4a16-g128`."""
    return f"{model}.experts.t{tokens}.{spec}"


def sections(model: str, spec: str, tokens: int) -> dict[str, Any]:
    """What a row says of itself before it is measured."""
    parsed, (experts, _, hidden, inner) = QuantSpec.parse(spec), MODELS[model]
    scheme = {"spec": spec, "weight_bits": parsed.weight_bits, "act_bits": parsed.act_bits, "group": parsed.group}
    about = {"id": model, "weights": "synthetic", "routing": f"uniform, {experts} experts"}
    shape = {"M": tokens, "N": 2 * inner, "K": hidden}
    scheme |= {"symmetric": parsed.symmetric}
    return {"level": "layer", "case": case_name(model, spec, tokens), "model": about, "shape": shape, "scheme": scheme}


def cell(
    model: str,
    spec: str,
    tokens: int,
    device: str,
    rounds: int = 7,
    seed: int = 0,
    roof: Mapping[str, float] | None = None,
) -> Iterator[dict[str, Any]]:
    """One row (sections of a Record): agreement with the references first, then times of both sides in the same rounds."""
    where = torch.device(device)
    faults = gate(model, spec, tokens, device, seed)
    if faults:
        error = {"type": "Conformance", "message": "; ".join(faults), "stage": "gate"}
        yield {"status": "failed", "quality": {"gate": "red", "reasons": faults}, "error": error}
        return
    with torch.inference_mode():
        row = _time(model, spec, tokens, where, rounds, seed, roof or {})
    yield row  # outside: the caller is not to run in that mode


def slot_cells(device: str, seed: int, roof: Mapping[str, float]) -> list[Cell]:
    """The cells of a slot's stage: a real layer on a card, a tiny one to try the run elsewhere."""
    on_card = device == "cuda"
    model, tokens, rounds = (SLOT_MODEL, TOKENS, 7) if on_card else ("tiny", TOKENS[:1], 2)
    made = []
    for count in tokens:
        for spec in SPECS:
            code = {"op_source_hash": ops.source_hash("moe_matmul", "quantize_rows")}
            about = {"model": model, "spec": spec, "tokens": count, "rounds": rounds}
            arguments = {**about, "device": device, "seed": seed, "roof": roof}
            row, name = {**sections(model, spec, count), "code": code}, case_name(model, spec, count)
            identity = {"task": "experts", **about, **code}
            made.append(Cell(name, f"{__name__}:cell", arguments, 5.0, identity, row, kind="experts"))
    return made


def gate(model: str, spec: str, tokens: int, device: str, seed: int) -> list[str]:
    """Faults of both matmuls of the layer at this size, with the body that would serve."""
    body = moe_matmul.body_on(torch.device(device).type).name
    found = []
    for case in _cases(model, spec, tokens):
        found += conformance.faults(moe_matmul, body, cases.inputs(case, seed, device))
    return found


def _cases(model: str, spec: str, tokens: int) -> list[cases.ExpertsCase]:
    experts, topk, hidden, inner = MODELS[model]
    faces = (("gate_up", 2 * inner, hidden), ("down", hidden, inner))
    return [
        cases.ExpertsCase(
            f"{model}.{face}.t{tokens}.{spec}", tokens, n, k, spec, torch.bfloat16, False, False, experts, topk,
            face == "gate_up",
        )
        for face, n, k in faces
    ]  # fmt: skip


def _time(
    model: str, spec: str, tokens: int, where: torch.device, rounds: int, seed: int, roof: Mapping[str, float]
) -> dict[str, Any]:
    experts, topk, hidden, _ = MODELS[model]
    up, down = _cases(model, spec, tokens)
    random = generator(up, seed, where.type)
    (w13, dense13), (w2, dense2) = (_weights(case, random, where) for case in (up, down))
    given = []
    for _ in range(_ROUTINGS):
        x = torch.randn(tokens, hidden, generator=random, device=where).to(torch.bfloat16)
        ids = torch.rand(tokens, experts, generator=random, device=where).argsort(1)[:, :topk].to(torch.int32)
        weights = torch.rand(tokens, topk, generator=random, device=where)
        given.append((x, ids.contiguous(), weights / weights.sum(1, keepdim=True)))
    linear = torch.nn.functional.linear
    turns: dict[str, list[Callable[[], Any]]] = {
        "percard": [functools.partial(moe, x, w13, w2, ids, weights) for x, ids, weights in given],
        "torch bfloat16": [
            functools.partial(sixteen_bit, x, ids.long(), weights, dense13, dense2, linear) for x, ids, weights in given
        ],
    }
    ours, theirs = (turn[0]().float() for turn in turns.values())
    off = float((ours - theirs).norm() / theirs.norm())
    if not off <= _AGREES.get(spec, 0.06):
        message = f"the layer is off by {off:.2%} from the bf16 product of the same values"
        error = {"type": "Conformance", "message": message, "stage": "gate"}
        return {"status": "failed", "quality": {"gate": "red", "reasons": [message]}, "error": error}
    seen = ops.card_times(turns, where, rounds) if where.type == "cuda" else ops.cpu_times(turns, rounds)
    mine, base = seen.times["percard"], seen.times["torch bfloat16"]
    gain = clock.ratio(base, mine)
    work = _work(w13, w2, *given[0])
    latency = {"median": mine.median, "lo": mine.lo, "hi": mine.hi, "iqr": mine.iqr}
    latency |= {"p10": clock.quantile(mine.samples, 0.1), "p90": clock.quantile(mine.samples, 0.9)}
    us = {name: value * 1e6 for name, value in latency.items()} | {"samples": [t * 1e6 for t in mine.samples]}
    against = {"impl": "torch bfloat16", "status": "ok", "ratio": gain.median, "ci95": [gain.lo, gain.hi]}
    against |= {"median": base.median * 1e6, "lo": base.lo * 1e6, "hi": base.hi * 1e6}
    if "percard" in seen.eager:
        us["eager"] = seen.eager["percard"] * 1e6
        against["eager"] = seen.eager["torch bfloat16"] * 1e6
    watched = dict(seen.board)
    power = watched.pop("power_w", None)
    cold = min(tokens * topk, experts) * (w13.nbytes + w2.nbytes) // experts * _ROUTINGS
    return {
        "model": {"experts_touched": _touched(given, experts)},
        "body": {
            "impl": moe_matmul.body_on(where.type).name,
            "baseline_dtype": "bfloat16",
            "same_fusions": False,
        },
        "clock": {
            "mode": "graph" if where.type == "cuda" else "wall",
            "l2": "cold" if cold >= 4 * ops.card.last_level_cache(where) else "warm",
            "copies": _ROUTINGS,
            "power": "burst",
            "rounds": len(mine.samples),
            "calls_per_sample": seen.calls,
            "drift": mine.drift,
        },
        "latency_us": us,
        "against": [against],
        "roofline": ops.roofline(work, mine.median, roof, QuantSpec.parse(spec).act_bits),
        "energy": {"avg_power_w": power} if power is not None else None,
        "quality": {"gate": "synthetic", "reasons": ["agrees with its reference at this shape"]},
        "card": watched,
        "words": f"{us['median']:.1f} us, {gain.median:.2f} x torch bfloat16",
    }


def _weights(case: Case, random: torch.Generator, where: torch.device) -> tuple[ExpertsTensor, torch.Tensor]:
    """The experts of one matmul, packed for the body that serves, and their values in bf16 [E, N, K]."""
    experts = case.experts  # type: ignore[attr-defined]
    each = [weight(case, random) for _ in range(experts)]
    dense = torch.stack([dequantize(w, torch.bfloat16) for w in each])
    return prepare_experts(stack_experts(iter(each), experts), where), dense


def _work(w13: ExpertsTensor, w2: ExpertsTensor, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Cost:
    """Operations and bytes of both matmuls, by the op's contract."""
    pairs, contract = ids.numel(), moe_matmul.contract
    inner = torch.empty((pairs, w2.shape[2]), dtype=x.dtype, device=x.device)
    if w13.spec.act_bits == 16:
        parts = [contract.unwrap(x, w13, ids), contract.unwrap(inner, w2, ids, weights)]
    else:
        rows = [t.to(torch.int8) for t in (x, inner)]
        scales = [torch.ones(len(t), device=x.device) for t in rows]
        parts = [contract.unwrap(rows[0], w13, ids, None, scales[0], x.dtype)]
        parts.append(contract.unwrap(rows[1], w2, ids, weights, scales[1], x.dtype))
    costs = [contract.cost(*flat) for flat in parts]
    return Cost(sum(c.flops for c in costs), sum(c.bytes for c in costs))


def _touched(given: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], experts: int) -> float:
    """Experts that have a token, on average over the routings."""
    return round(sum(len(ids.unique()) for _, ids, _ in given) / len(given), 1)
