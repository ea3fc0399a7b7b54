"""What matmul_w4a8 is tested, tuned and timed at."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import torch

from ..inspection import Expect
from ..shapes import Case, bias, blank_weight, empty, generator, int8_rows, real, small, weight
from . import contract

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

TWO_LEVEL = ".two-level"  # end of a case's name: its group scales are S * m


def two_level(case: Case) -> Case:
    """The same sizes with two-level scales."""
    return replace(case, name=case.name + TWO_LEVEL)


SMALL = (
    small(1, 1, 1, "w4a8", FP16),
    small(1, 64, 128, "w4a8-g128", BF16),
    small(3, 37, 53, "w4a8", FP16, bias=True),
    small(2, 70, 96, "w4a8-g32", FP32),
    small(5, 127, 61, "w4a8", FP32),
    small(7, 33, 192, "w4a8-g64", FP16, bias=True),
    small(15, 129, 384, "w4a8-g128", FP16),
    small(16, 64, 256, "w4a8-g64", BF16, bias=True),
    small(17, 131, 160, "w4a8-g32", FP16),
    small(33, 65, 320, "w4a8-g64", FP32, bias=True),
    small(63, 191, 512, "w4a8-g128", FP16),
    small(65, 96, 257, "w4a8", FP16),
    small(129, 64, 128, "w4a8-g128", FP16),
    small(1, 16, 4096, "w4a8", FP16),
    two_level(small(1, 64, 256, "w4a8-g128", FP16)),
    two_level(small(3, 37, 96, "w4a8-g32", FP32, bias=True)),
    two_level(small(18, 131, 320, "w4a8-g64", FP16, bias=True)),
    two_level(small(65, 96, 384, "w4a8-g128", BF16)),
    two_level(small(2, 16, 4096, "w4a8-g32", FP16)),
)
CASES = (
    SMALL
    + real("w4a8")
    + tuple(two_level(case) for case in real("w4a8-g128", ".g128"))
    + real("w4a8-g128", ".g128", ("qwen3-8b",))
    + real("w4a8-g64", ".g64", ("qwen3-0.6b",))
)


def inputs(case: Case, seed: int, device: str = "cpu") -> tuple[Any, ...]:
    """The op's arguments for a case, random in `seed`; the weight is plain."""
    random = generator(case, seed, device)
    xq, sx, xsum = int8_rows(case, random)
    w = weight(case, random)
    if case.name.endswith(TWO_LEVEL):
        m = torch.randint(1, 17, w.scale.shape, generator=random, device=random.device)
        m[:, 0], m[:, -1] = 16, 15  # no common divisor, so m is what two_level finds
        row = torch.randint(8, 16, (case.n, 1), generator=random, device=random.device) * 2.0**-11
        w = replace(w, scale=(row * m).to(BF16))
    return xq, sx, xsum, w, bias(case, random), case.dtype


def blank(case: Case) -> tuple[Any, ...]:
    """The flat arguments of a case without data, as the Triton body takes them."""
    xq, sx = empty(case.m, case.k, dtype=torch.int8), empty(case.m)
    xsum = empty(case.m, dtype=torch.int32)
    w = blank_weight(case, "planes8_w4")
    if case.name.endswith(TWO_LEVEL):
        w = replace(w, scale=empty(w.scale.shape[0] + 1, w.scale.shape[1]))
    return contract.unwrap(xq, sx, xsum, w, empty(case.n) if case.bias else None, case.dtype)


def problems(expect: Expect) -> list[Case]:
    """What inspection compiles of everything: each layer at every bucket of M, in each spec and type."""
    layers = sorted({(case.n, case.k) for case in CASES if case.real})
    found = [
        Case(f"m{1 << bucket}.n{n}.k{k}.{spec}.{dtype}", 1 << bucket, n, k, spec, dtype, small=False)
        for (n, k), spec, dtype, bucket in itertools.product(layers, expect.specs, expect.dtypes, range(15))
    ]
    return [two_level(case) for case in found] if expect is EXPECT["matmul_w4a8_two_level"] else found


_MMA = {"sm_80": "IMMA", "sm_89": "IMMA", "sm_90": "IGMMA", "sm_100": "UTCIMMA", "sm_100 3.6": "IMMA"}
_FROM = dict.fromkeys(("sm_80", "sm_89", "sm_90", "sm_100 3.6"), "registers") | {"sm_100": "tensor memory"}
_GROUPS = ("w4a8-g128", "w4a8-g64", "w4a8-g32")
_LAYER = Case("qwen3-8b.o.decode.b1", 1, 4096, 4096, "w4a8", small=False)
_PROMPT = replace(_LAYER, name="qwen3-8b.o.prefill.t4096", m=4096)
EXPECT = {
    "matmul_w4a8_rows": Expect(
        quick=(_LAYER, _PROMPT),
        specs=("w4a8",),
        dtypes=(BF16,),
        mma=_MMA,
        weight_operand=_FROM,
        ceilings={
            "sm_80": {16: (1.0,), 32: (1.2,), 64: (1.9,), 128: (2.8,)},
            "sm_89": {16: (1.0,), 32: (1.2,), 64: (1.9,), 128: (2.8,)},
            "sm_90": {16: (1.3,), 32: (1.3,), 64: (1.8,), 128: (1.9,)},
            "sm_100": {16: (1.5,), 32: (1.5,), 64: (2.3,)},
        },
    ),
    "matmul_w4a8_groups": Expect(
        quick=(replace(_LAYER, name=_LAYER.name + ".g128", spec="w4a8-g128"),),
        specs=_GROUPS,
        dtypes=(BF16,),
        mma=_MMA,
        weight_operand=_FROM,
        ceilings={
            "sm_80": {16: (1.4, 1.8, 2.5), 32: (1.9, 2.5, 3.7), 64: (3.3, 4.6)},
            "sm_89": {16: (1.4, 1.8, 2.5), 32: (1.9, 2.5, 3.7), 64: (3.3, 4.6)},
            "sm_90": {16: (1.7, 2.0, 2.9), 32: (1.9, 2.5, 3.9), 64: (3.2, 4.4)},
            "sm_100": {16: (1.9, 2.2, 3.3), 32: (2.1, 2.7, 4.1), 64: (3.8, 4.5)},
            "sm_100 3.6": {16: (1.4, 1.6, 2.2), 32: (1.7, 2.3, 3.3), 64: (3.1, 4.2)},
        },
    ),
    "matmul_w4a8_two_level": Expect(
        quick=tuple(two_level(replace(c, name=c.name + ".g128", spec="w4a8-g128")) for c in (_LAYER, _PROMPT)),
        specs=_GROUPS,
        dtypes=(BF16,),
        mma=_MMA,
        weight_operand=_FROM,
        ceilings={
            "sm_80": {16: (1.7, 1.9, 2.1), 32: (1.9, 2.0, 2.3), 64: (2.8, 3.3, 3.2), 128: (3.7, 4.0, 4.0)},
            "sm_89": {16: (1.7, 1.9, 2.1), 32: (1.9, 2.0, 2.3), 64: (2.8, 3.3, 3.2), 128: (3.7, 4.0, 4.0)},
            "sm_90": {16: (1.9, 2.1, 2.5), 32: (2.0, 2.1, 2.5), 64: (2.7, 3.2, 3.5), 128: (2.8, 3.1, 3.5)},
            "sm_100": {16: (2.0, 2.1, 2.5), 32: (2.0, 2.1, 2.5), 64: (2.9, 3.4, 4.1)},
        },
    ),
}
