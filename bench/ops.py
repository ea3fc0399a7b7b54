"""`percard bench ops`: op x body x case against torch's floats and rivals. Correct first: a red gate has no figure.

    1  the body is compared with its reference in the op's tolerance (kernels/conformance.py) at this very shape
    2  ours, torch's floats and the rivals are timed in the same rounds, in turn (clock.py); weights are rotated copies
       that together are four times the cache, quantising activations lies inside the time of an A8 row
    3  one row: median and spread, the ratio to each rival per round, share of the roof that was measured here

On a card the headline is the time inside a CUDA graph; `eager` stands beside it, with the cost of each launch in it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ..formats.affine import dequantize
from ..formats.spec import FormatError, QuantSpec
from ..formats.tensor import QuantTensor
from ..kernels import conformance
from ..kernels.attention_decode import attention_decode
from ..kernels.attention_decode import cases as attention_decode_cases
from ..kernels.attention_prefill import attention_prefill
from ..kernels.attention_prefill import cases as attention_prefill_cases
from ..kernels.distill_loss import cases as distill_loss_cases
from ..kernels.distill_loss import distill_loss
from ..kernels.gather_dequantize import cases as gather_dequantize_cases
from ..kernels.gather_dequantize import gather_dequantize
from ..kernels.kv_append import cases as kv_append_cases
from ..kernels.kv_append import kv_append
from ..kernels.linear import linear, ops_of, prepare
from ..kernels.matmul_w4a8 import cases as w4a8_cases
from ..kernels.matmul_w4a8 import matmul_w4a8
from ..kernels.matmul_w4a16 import cases as w4a16_cases
from ..kernels.matmul_w4a16 import matmul_w4a16
from ..kernels.matmul_w8a8 import cases as w8a8_cases
from ..kernels.matmul_w8a8 import matmul_w8a8
from ..kernels.matmul_w8a16 import cases as w8a16_cases
from ..kernels.matmul_w8a16 import matmul_w8a16
from ..kernels.moe_matmul import cases as moe_cases
from ..kernels.moe_matmul import moe_matmul
from ..kernels.op import Cost, Op, native_isa
from ..kernels.quantize_rows import cases as quantize_rows_cases
from ..kernels.quantize_rows import quantize_rows
from ..kernels.rmsnorm_quantize import cases as rmsnorm_quantize_cases
from ..kernels.rmsnorm_quantize import rmsnorm_quantize
from ..kernels.shapes import LAYERS, Case, activations, generator, weight
from ..kernels.silu_mul_quantize import cases as silu_mul_quantize_cases
from ..kernels.silu_mul_quantize import silu_mul_quantize
from . import board, card, cells, clock, rivals
from .here import Here
from .record import Record

OPS: dict[str, tuple[Op, ModuleType]] = {
    op.name: (op, cases)
    for op, cases in (
        (quantize_rows, quantize_rows_cases),
        (rmsnorm_quantize, rmsnorm_quantize_cases),
        (silu_mul_quantize, silu_mul_quantize_cases),
        (matmul_w8a8, w8a8_cases),
        (matmul_w4a16, w4a16_cases),
        (matmul_w8a16, w8a16_cases),
        (matmul_w4a8, w4a8_cases),
        (moe_matmul, moe_cases),
        (kv_append, kv_append_cases),
        (attention_decode, attention_decode_cases),
        (attention_prefill, attention_prefill_cases),
        (gather_dequantize, gather_dequantize_cases),
        (distill_loss, distill_loss_cases),
    )
}
_KERNELS = Path(__file__).resolve().parents[1] / "kernels"
_SHARED_SOURCES = (
    "op.py", "rows.py", "tiles.py", "tuning.py", "weight.py", "weight_only.py", "weight_only_plan.py", "linear.py",
    "device.py", "attention.py", "attention_tiles.py",
)  # fmt: skip
_MOST_COPIES, _MOST_CPU_BYTES = 256, 1 << 28
WORTH = (1, 16, 256, 64, 4, 1024, 4096)  # tokens in the order in which their figures decide something
_SAMPLE_S = 0.03  # of a CPU sample, at least
_AGREES = 0.2  # relative error of a rival that counts as the same product; int8 activations with outliers come to 0.07


@functools.cache
def source_hash(*ops: str) -> str:
    """sha256 (16 digits) of what decides how fast and how right these ops are: their folders and what they share."""
    files = [_KERNELS / name for name in _SHARED_SOURCES]
    for op in ops:
        files += sorted(path for path in (_KERNELS / op).iterdir() if path.suffix in (".py", ".cpp", ".json"))
    digest = hashlib.sha256()
    for path in files:
        if path.exists():
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def case_of(op: str, name: str) -> Case:
    """The case of that name; KeyError says which op."""
    for case in OPS[op][1].CASES:
        if case.name == name:
            return case
    raise KeyError(f"{op} has no case {name!r}; see kernels/{op}/cases.py")


def check(op: str, impl: str, case: str, device: str, seed: int) -> Iterator[dict[str, Any]]:
    """The gate of one body at one case. A row whose quality.gate is green, or red with the worst element."""
    found, cases = OPS[op]
    faults = conformance.faults(found, impl, cases.inputs(case_of(op, case), seed, device))
    if faults:
        yield _red(faults)
    else:
        yield {"status": "ok", "quality": {"gate": "green", "reasons": []}, "words": "agrees with the reference"}


def _red(faults: list[str]) -> dict[str, Any]:
    """The row of a body that disagrees with its reference."""
    error = {"type": "Conformance", "message": "; ".join(faults), "stage": "gate"}
    return {"status": "failed", "quality": {"gate": "red", "reasons": faults}, "error": error}


def time_case(
    spec: str,
    case: str,
    device: str,
    impl: str | None = None,
    rounds: int = 7,
    seed: int = 0,
    roof: Mapping[str, float] | None = None,
    with_rivals: bool = True,
) -> Iterator[dict[str, Any]]:
    """One linear of `spec` at the named case, against floats and rivals. Yields one row (sections of a Record)."""
    where = torch.device(device)
    ops = ops_of(QuantSpec.parse(spec))
    matmul = ops[-1]
    problem = case_of(matmul.name, case)
    faults = gate(ops, problem, device, impl, seed)
    if faults:
        yield _red(faults)
        return
    with torch.inference_mode():
        row = _time(ops, problem, where, impl, rounds, seed, roof or {}, with_rivals)
    yield row  # outside: the caller is not to run in that mode


def gate(ops: Sequence[Op], problem: Case, device: str, impl: str | None, seed: int) -> list[str]:
    """Faults of every op of a linear at this shape, with the bodies that would serve."""
    faults = []
    for op in ops:
        body = op.body_on(torch.device(device).type, impl).name
        if body == "reference":
            continue
        given = problem
        if op is quantize_rows:
            given = dataclasses.replace(problem, n=0, spec="")
        faults += conformance.faults(op, body, OPS[op.name][1].inputs(given, seed, device))
    return faults


def _time(
    ops: Sequence[Op],
    problem: Case,
    where: torch.device,
    impl: str | None,
    rounds: int,
    seed: int,
    roof: Mapping[str, float],
    with_rivals: bool,
) -> dict[str, Any]:
    random = generator(problem, seed, where.type)
    x, plain = activations(problem, random), weight(problem, random)
    ready = prepare(plain, where, impl, self_test=False)  # the gate has compared it at this very shape
    cache = card.last_level_cache(where)
    against: list[dict[str, Any]] = []
    turns: dict[str, list[Callable[[], Any]]] = {}
    copies = _copies(ready.nbytes, cache, where)
    turns["percard"] = [functools.partial(linear, x, _clone(ready), impl=impl) for _ in range(copies)]
    floats = rivals.floats(where, x)
    exact = torch.nn.functional.linear(x.float(), _dense(plain))
    for rival in floats + (rivals.QUANTISED if with_rivals else ()):
        reason = rival.absent(x, plain)
        if reason is not None:
            against.append({"impl": rival.name, "status": "absent", "reason": reason})
            continue
        try:
            size = int(plain.shape[0] * plain.shape[1] * rival.bits / 8)
            calls = [rival.make(x, plain) for _ in range(_copies(size, cache, where))]
            off = _relative(calls[0]().float(), exact) if rival.exact else 0.0
        except (RuntimeError, NotImplementedError) as error:
            text = " ".join(str(error).split())[:200]
            against.append({"impl": rival.name, "status": "failed", "reason": text})
            continue
        if not off <= _AGREES:
            reason = f"its product is off by {off:.2%}: not the same task, or not called as it wants"
            against.append({"impl": rival.name, "status": "suspect", "reason": reason})
            continue
        turns[rival.name] = calls
    seen = card_times(turns, where, rounds) if where.type == "cuda" else cpu_times(turns, rounds)
    named, cold = {r.name for r in floats}, copies * ready.nbytes >= 4 * cache
    return _row(ops, problem, where, impl, x, plain, ready, seen, against, named, roof, copies, cold)


def _copies(nbytes: int, cache: int, where: torch.device) -> int:
    """Copies of a weight that keep the cache cold; fewer on a CPU whose cache they would fill memory for."""
    wanted = min(_MOST_COPIES, clock.copies_for_cold_cache(nbytes, cache))
    return wanted if where.type == "cuda" else max(1, min(wanted, _MOST_CPU_BYTES // nbytes))


@dataclasses.dataclass(frozen=True)
class Seen:
    """Times by name in seconds, eager medians by name (a card only), calls in a sample, what the board said."""

    times: dict[str, clock.Sample]
    eager: dict[str, float]
    calls: int
    board: dict[str, Any]


def card_times(turns: Mapping[str, Sequence[Callable[[], Any]]], where: torch.device, rounds: int) -> Seen:
    """Times on a card, in turn, while the board is watched."""
    watch = board.Watch(card.fingerprint(where)["card"]["uuid"])
    with watch.running():
        found = clock.card_ab(turns, device=where, rounds=rounds)
    ours = found["percard"]
    graph, eager = {n: t.graph for n, t in found.items()}, {n: t.eager.median for n, t in found.items()}
    return Seen(graph, eager, ours.calls * ours.replays, watch.summary())


def cpu_times(turns: Mapping[str, Sequence[Callable[[], Any]]], rounds: int) -> Seen:
    """Times on a CPU, in turn, each sample long enough to mean something."""

    def whole(turn: Sequence[Callable[[], Any]]) -> Callable[[], None]:
        place = iter(range(1 << 62))
        return lambda: turn[next(place) % len(turn)]()

    calls = {name: whole(turn) for name, turn in turns.items()}
    once = [sample.median for sample in clock.ab(calls, rounds=1).values()]
    # Long enough for the fastest, unless the slowest would then take ten times as long as a sample should.
    repeat = max(1, min(200, math.ceil(_SAMPLE_S / min(once)), math.ceil(10 * _SAMPLE_S / max(once))))
    return Seen(clock.ab(calls, rounds=rounds, calls=repeat), {}, repeat, {})


def _row(
    ops: Sequence[Op],
    problem: Case,
    where: torch.device,
    impl: str | None,
    x: torch.Tensor,
    plain: QuantTensor,
    ready: QuantTensor,
    seen: Seen,
    against: list[dict[str, Any]],
    floats: set[str],
    roof: Mapping[str, float],
    copies: int,
    cold: bool,
) -> dict[str, Any]:
    ours = seen.times["percard"]
    for name, sample in seen.times.items():
        if name != "percard":
            ratio = clock.ratio(sample, ours)
            against.append(
                {"impl": name, "status": "ok", **_us(sample), "ratio": ratio.median, "ci95": [ratio.lo, ratio.hi]}
                | ({"eager": seen.eager[name] * 1e6} if name in seen.eager else {})
            )
    timed = [rival for rival in against if rival["impl"] in floats and rival["status"] == "ok"]
    against.sort(key=lambda rival: (rival["impl"] not in floats, rival.get("median") or math.inf))
    base = min(timed, key=lambda rival: rival["median"], default=None)
    work = _work(ops, x, plain, ready)
    body = ops[-1].body_on(where.type, impl).name
    latency = {**_us(ours), "iqr": ours.iqr * 1e6, "samples": [t * 1e6 for t in ours.samples]}
    latency |= {"p10": clock.quantile(ours.samples, 0.1) * 1e6, "p90": clock.quantile(ours.samples, 0.9) * 1e6}
    if "percard" in seen.eager:
        latency["eager"] = seen.eager["percard"] * 1e6
    words = f"{latency['median']:.1f} us"
    if base is not None:
        words += f", {base['ratio']:.2f} x {base['impl']}"
    watched = dict(seen.board)
    power = watched.pop("power_w", None)
    return {
        "body": {
            "impl": body,
            "isa": native_isa() if body == "cpu" else None,
            "baseline_dtype": base["impl"].removeprefix("torch ") if base else None,
        },
        "clock": {
            "mode": "graph" if where.type == "cuda" else "wall",
            "l2": "cold" if cold else "warm",
            "copies": copies,
            "power": "burst",
            "rounds": len(ours.samples),
            "calls_per_sample": seen.calls,
            "drift": ours.drift,
        },
        "latency_us": latency,
        "against": against,
        "roofline": roofline(work, ours.median, roof, plain.spec.act_bits),
        "energy": {"avg_power_w": power} if power is not None else None,
        "quality": {"gate": "synthetic", "reasons": ["agrees with its reference at this shape"]},
        "card": watched,
        "words": words,
    }


def _work(ops: Sequence[Op], x: torch.Tensor, plain: QuantTensor, ready: QuantTensor) -> Cost:
    """Operations and bytes of the ops of a linear, by their contracts."""
    if len(ops) == 1:
        return ops[0].contract.cost(*ops[0].contract.unwrap(x, ready))
    first = ops[0].contract.cost(x)
    m, k = x.shape
    xq = torch.empty((m, k), dtype=torch.int8, device="meta")
    rows = [xq, torch.empty(m, device="meta"), torch.empty(m, dtype=torch.int32, device="meta")]
    given = rows[:2] if ops[1] is matmul_w8a8 else rows
    second = ops[1].contract.cost(*ops[1].contract.unwrap(*given, ready, None, x.dtype))
    return Cost(first.flops + second.flops, first.bytes + second.bytes)


def roofline(work: Cost, seconds: float, roof: Mapping[str, float], act_bits: int) -> dict[str, Any]:
    """Which roof bounds the case, and the share of it that was reached; None without measured roofs."""
    rate = roof.get("int8" if act_bits == 8 else "bf16")
    memory = work.bytes / (roof["copy_gbs"] * 1e9) if roof.get("copy_gbs") else None
    compute = work.flops / (rate * 1e12) if rate else None
    out: dict[str, Any] = {"bytes": work.bytes, "flops": work.flops, "bound": None}
    out |= {"mbu": None, "mfu": None, "pct_of_roof": None}
    if memory is not None:
        best = max(memory, compute or 0.0)
        out |= {"bound": "mem" if best == memory else "compute", "pct_of_roof": 100 * best / seconds}
        out |= {"mbu": memory / seconds, "mfu": None if compute is None else compute / seconds}
    return out


def linear_ops(spec: str) -> tuple[Op, ...]:
    """The ops that a linear of `spec` runs, in order."""
    return ops_of(QuantSpec.parse(spec))


def plan(
    models: Sequence[str], specs: Sequence[str], tokens: Sequence[int] = WORTH, layers: Sequence[str] = ()
) -> list[tuple[str, Case]]:
    """(spec, case) of every linear of `models` at `tokens`, by worth: tokens first, as ordered, then models, then specs.

    `layers` are parts of a block (down, gate_up, o, qkv), () = all.

    FormatError names a model that has no cases, or an unknown spec; Unsupported a spec that no op serves.
    """
    found = []
    for m in tokens:
        for model in models:
            if model not in LAYERS:
                raise FormatError(f"no cases for model {model!r}; known: {', '.join(LAYERS)}")
            for spec in specs:
                cases = OPS[ops_of(QuantSpec.parse(spec))[-1].name][1].CASES
                names = tuple(f"{model}.{layer}." for layer in layers) or f"{model}."
                fits = [c for c in cases if c.real and c.spec == spec and c.m == m and c.name.startswith(names)]
                found += [(spec, case) for case in fits]
    return found


def sections(spec: str, case: Case) -> dict[str, Any]:
    """What a row says of itself before it is measured."""
    parsed = QuantSpec.parse(spec)
    scheme = {"spec": spec, "weight_bits": parsed.weight_bits, "act_bits": parsed.act_bits, "group": parsed.group}
    shape = {"M": case.m, "N": case.n, "K": case.k}
    return {"level": "op", "case": case.name, "shape": shape, "scheme": scheme | {"symmetric": parsed.symmetric}}


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which linears to time and how long: `layers` are parts of a block, () = all; rivals beside torch's floats or not."""

    models: Sequence[str] = ("qwen3-0.6b",)
    specs: Sequence[str] = ("w4a16-g128", "w8a8", "w4a8")
    tokens: Sequence[int] = (1, 16, 512)
    layers: Sequence[str] = ()
    rounds: int = 7
    rivals: bool = True


def choice(size: str | None, device: str) -> Choice:
    """What `--quick` (under two minutes) and `--full` (all there is: hours) mean on a device, or neither."""
    if size == "quick":
        quick = Choice(layers=("gate_up", "down"), rivals=False)
        if device == "cuda":
            return dataclasses.replace(quick, models=("qwen3-8b",), tokens=(1, 16, 256))
        return dataclasses.replace(quick, specs=("w4a16-g128", "w8a8"), tokens=(1, 16), rounds=3)
    if size == "full":
        specs = dict.fromkeys(case.spec for _, cases in OPS.values() for case in cases.CASES if case.real and case.spec)
        return Choice(tuple(LAYERS), tuple(specs), (*WORTH, 512, 16384), rounds=11)
    return Choice()


def run(
    chosen: Choice | None = None,
    *,
    impl: str | None = None,
    device: torch.device | None = None,
    out: str | Path | None = None,
    progress: Callable[[str], None] | None = None,
    command: str = "",
    **resume: Any,
) -> list[Record]:
    """Times linears here and now, a Record per spec and case; `out` is gone on with, `resume` as in cells.run.

    A case that fails is a record that says so. FormatError for an unknown model or spec.
    """
    say = progress or (lambda words: None)
    where, chosen = device or card.default_device(), chosen or Choice()
    todo = plan(chosen.models, chosen.specs, chosen.tokens, chosen.layers)
    if not todo:
        asked = (", ".join(map(str, words)) for words in (chosen.models, chosen.tokens, chosen.specs))
        raise FormatError("no case of {} has {} tokens in {}".format(*asked))
    machine = Here(where, say, command)
    made = []
    for spec, case in todo:
        given = {"spec": spec, "case": case.name, "impl": impl, "rounds": chosen.rounds, "with_rivals": chosen.rivals}
        source = source_hash(*(op.name for op in linear_ops(spec)))
        seconds = 1.2 if where.type == "cuda" else _cpu_seconds(case, chosen.rounds)
        made.append(machine.cell(f"{spec} {case.name}", time_case, given, sections(spec, case), source, seconds))
    return cells.run(made, None if out is None else Path(out), say=say, **resume)


def _cpu_seconds(case: Case, rounds: int) -> float:
    """A guess for the time left: gate and weights, then five sides that are slow at 30 GFLOP/s."""
    flops = 2 * case.m * case.n * case.k
    return 1.0 + flops / 1e9 + (rounds + 2) * 5 * max(_SAMPLE_S, flops / 6e10)


def _us(sample: clock.Sample) -> dict[str, float]:
    return {"median": sample.median * 1e6, "lo": sample.lo * 1e6, "hi": sample.hi * 1e6}


def _clone(w: QuantTensor) -> QuantTensor:
    zero = None if w.zero is None else w.zero.clone()
    return dataclasses.replace(w, data=w.data.clone(), scale=w.scale.clone(), zero=zero)


def _dense(w: QuantTensor) -> torch.Tensor:
    return dequantize(w, torch.float32)


def _relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())
