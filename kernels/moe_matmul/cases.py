"""What moe_matmul is tested, tuned and timed at."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from ...formats.layout import stack_experts
from ...formats.tensor import ExpertsTensor
from ..inspection import Expect
from ..shapes import Case, activations, blank_weight, empty, generator, int8_rows, weight
from . import contract

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# (experts, topk, hidden size H, inner size I) of an expert.
MODELS: dict[str, tuple[int, int, int, int]] = {
    "qwen3-30b-a3b": (128, 8, 2048, 768),
    "qwen3-235b-a22b": (128, 8, 4096, 1536),
    "deepseek-r1": (256, 8, 7168, 2048),
}
TOKENS = (1, 16, 64, 256, 1024, 4096)


@dataclass(frozen=True)
class ExpertsCase(Case):
    """m tokens, each routed to `topk` of `experts` experts with weights [n, k]; `up`: n = 2 I rows, gate rows first.

    routes: "random" (topk different experts), "ties" (the same expert may stand twice), "one" (all to expert 1), "slice"
    (half of the ids are -1, experts of another machine), "none" (all are).
    """

    experts: int = 4
    topk: int = 2
    up: bool = True
    routes: str = "random"


def small(
    m: int, n: int, k: int, spec: str, dtype: torch.dtype, experts: int, topk: int, up: bool, routes: str = "random"
) -> ExpertsCase:
    """A small case; its name says all: `small.m5.n64.k128.e4.top2.up.w8a8.fp16.ties`."""
    kind = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}[dtype]
    face = "up" if up else "down"
    name = f"small.m{m}.n{n}.k{k}.e{experts}.top{topk}.{face}.{spec}.{kind}.{routes}"
    return ExpertsCase(name, m, n, k, spec, dtype, experts=experts, topk=topk, up=up, routes=routes)


def real(spec: str) -> tuple[ExpertsCase, ...]:
    """Both matmuls of an expert layer at every batch: `qwen3-30b-a3b.gate_up.t64.w4a16-g128`."""
    return tuple(
        ExpertsCase(f"{model}.{face}.t{m}.{spec}", m, n, k, spec, BF16, False, False, experts, topk, face == "gate_up")
        for model, (experts, topk, hidden, inner) in MODELS.items()
        for face, n, k in (("gate_up", 2 * inner, hidden), ("down", hidden, inner))
        for m in TOKENS
    )


SMALL = (
    small(1, 2, 1, "w4a16", FP16, 1, 1, True),
    small(1, 1, 1, "w8a8", FP16, 1, 1, False),
    small(1, 128, 128, "w4a16-g128", BF16, 32, 2, True),
    small(1, 64, 128, "w8a8", BF16, 32, 2, False),
    small(1, 70, 256, "w4a16-g64-asym", FP16, 32, 3, True, "slice"),
    small(2, 67, 129, "w8a8", FP16, 32, 2, False, "ties"),
    small(3, 74, 53, "w4a16", FP16, 3, 2, True),
    small(3, 53, 37, "w4a16-asym", FP16, 3, 2, False, "ties"),
    small(5, 130, 96, "w4a16-g32", FP32, 4, 3, True, "slice"),
    small(7, 127, 192, "w4a16-g64", FP16, 4, 2, False, "slice"),
    small(16, 64, 384, "w4a16-g128-asym", FP16, 5, 2, True, "ties"),
    small(17, 64, 160, "w4a16-g32-asym", FP16, 3, 2, False, "ties"),
    small(9, 96, 320, "w4a16-g64", FP32, 4, 2, False),
    small(33, 64, 256, "w4a16-g128", FP16, 4, 1, True, "one"),
    small(40, 66, 256, "w4a16-g128", FP16, 2, 2, False, "one"),
    small(6, 38, 61, "w8a8", FP16, 4, 2, True, "slice"),
    small(16, 66, 257, "w8a8", FP32, 4, 3, True, "ties"),
    small(17, 129, 640, "w8a8", FP16, 3, 2, False),
    small(70, 64, 128, "w8a8", FP16, 3, 1, True, "one"),
    small(5, 64, 128, "w8a8", BF16, 4, 2, False, "none"),
    small(5, 64, 128, "w4a16-g128", FP16, 4, 2, True, "none"),
)
CASES = SMALL + real("w4a16-g128") + real("w8a8")


def routes(case: ExpertsCase, random: torch.Generator) -> torch.Tensor:
    """ids int32 [m, topk] as the case says."""
    size, where = (case.m, case.topk), random.device
    if case.routes == "random":
        order = torch.rand(case.m, case.experts, generator=random, device=where).argsort(1)
        return order[:, : case.topk].to(torch.int32).contiguous()
    ids = torch.randint(0, case.experts, size, generator=random, device=where, dtype=torch.int32)
    if case.routes == "slice":
        mine = torch.rand(size, generator=random, device=where) < 0.5
        return ids.where(mine, torch.full_like(ids, -1))
    fixed = {"one": min(1, case.experts - 1), "none": -1}
    return torch.full_like(ids, fixed[case.routes]) if case.routes in fixed else ids


def experts(case: ExpertsCase, random: torch.Generator) -> ExpertsTensor:
    """A plain stack of random experts."""
    return stack_experts((weight(case, random) for _ in range(case.experts)), case.experts)


def inputs(case: ExpertsCase, seed: int, device: str = "cpu") -> tuple[Any, ...]:
    """The op's arguments for a case, random in `seed`; the weight is plain."""
    random = generator(case, seed, device)
    ids = routes(case, random)
    weights = None if case.up else torch.rand(ids.shape, generator=random, device=device)
    rows = case if case.up else replace(case, m=case.m * case.topk)
    if case.spec == "w8a8":
        x, sx, _ = int8_rows(rows, random)
        return x, experts(case, random), ids, weights, sx, case.dtype
    return activations(rows, random), experts(case, random), ids, weights


def blank(case: ExpertsCase) -> tuple[Any, ...]:
    """The flat arguments of a case without data, as the Triton body takes them."""
    one = blank_weight(case, contract.PACKINGS["triton"][8 if case.spec == "w8a8" else 4])
    data, scale = (t.new_empty((case.experts, *t.shape)) for t in (one.data, one.scale))
    w = ExpertsTensor(data, scale, None, one.spec, one.packing, (case.experts, case.n, case.k))
    rows = case.m if case.up else case.m * case.topk
    ids = empty(case.m, case.topk, dtype=torch.int32)
    weights = None if case.up else empty(case.m, case.topk)
    if case.spec == "w8a8":
        return contract.unwrap(empty(rows, case.k, dtype=torch.int8), w, ids, weights, empty(rows), case.dtype)
    return contract.unwrap(empty(rows, case.k, dtype=case.dtype), w, ids, weights)


def problems(expect: Expect) -> list[Case]:
    """What inspection compiles of everything: each layer at every batch, in each spec and type."""
    layers = [case for case in CASES if case.real and case.spec == "w8a8"]
    kinds = [(spec, expect.dtypes[0]) for spec in expect.specs] + [(expect.specs[0], d) for d in expect.dtypes[1:]]
    return [replace(case, name=f"{case.name}.{s}.{d}", spec=s, dtype=d) for case in layers for s, d in kinds]


def _quick(spec: str, *wanted: str) -> tuple[Case, ...]:
    return tuple(case for case in CASES if case.name in {f"{name}.{spec}" for name in wanted})


EXPECT = {
    "matmul_experts_w4a16": Expect(
        quick=_quick(
            "w4a16-g128",
            "qwen3-30b-a3b.gate_up.t1",
            "qwen3-30b-a3b.gate_up.t64",
            "qwen3-30b-a3b.down.t64",
            "qwen3-30b-a3b.gate_up.t4096",
        ),
        specs=("w4a16-g128", "w4a16-g64", "w4a16-g32", "w4a16"),
        dtypes=(BF16, FP16),
        mma={"sm_80": "HMMA", "sm_89": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"},
        weight_operand={"sm_80": "registers", "sm_89": "registers", "sm_90": "registers", "sm_100": "tensor memory"},
        ceilings={
            "sm_80": {16: (2.5, 2.8, 3.7), 32: (3.1, 3.5), 64: (5.0,)},
            "sm_89": {16: (2.5, 2.8, 3.7), 32: (3.1, 3.5), 64: (5.0,)},
            "sm_90": {16: (2.7, 3.1, 4.0), 32: (2.9, 3.3, 4.5), 64: (4.6, 5.6, 7.9)},
            "sm_100": {16: (3.6, 3.7, 4.0), 32: (3.8, 3.8, 4.4), 64: (6.1, 6.2, 7.8)},
            "sm_100 3.6": {16: (3.6, 3.7, 4.0), 32: (3.8, 3.8, 4.4), 64: (6.3, 6.4, 7.9)},
        },
    ),
    "matmul_experts_w8a8": Expect(
        quick=_quick("w8a8", "qwen3-30b-a3b.gate_up.t16", "qwen3-30b-a3b.down.t4096"),
        specs=("w8a8",),
        dtypes=(BF16, FP16),
        mma={"sm_80": "IMMA", "sm_89": "IMMA", "sm_90": "IGMMA", "sm_100": "UTCIMMA", "sm_100 3.6": "IMMA"},
        weight_operand={
            "sm_80": "registers",
            "sm_89": "registers",
            "sm_90": "shared memory",
            "sm_100": "shared memory",
            "sm_100 3.6": "registers",
        },
        ceilings={
            "sm_80": {16: (0.7,), 32: (0.9,), 64: (1.7,)},
            "sm_89": {16: (0.7,), 32: (0.9,), 64: (1.7,)},
            "sm_90": {16: (1.0,), 32: (1.0,), 64: (1.6,)},
            "sm_100": {16: (1.1,), 32: (1.1,), 64: (2.0,)},
            "sm_100 3.6": {16: (0.7,), 32: (0.9,), 64: (1.7,)},
        },
    ),
}
