"""The sizes that ops are tested, tuned and timed at: layers of real models, and small cases that try the edges.

Every op's `cases.py` is made of these; tests, bench and tuner read the same list.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch

from ..formats.layout import has_words, padded_shape, storage
from ..formats.spec import QuantSpec
from ..formats.tensor import QuantTensor

# (N, K) of the four linears of a decoder block: q, k and v are one matmul, gate and up are one matmul.
LAYERS: dict[str, dict[str, tuple[int, int]]] = {
    "qwen3-0.6b": {"qkv": (4096, 1024), "o": (1024, 2048), "gate_up": (6144, 1024), "down": (1024, 3072)},
    "qwen3-8b": {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (24576, 4096), "down": (4096, 12288)},
    "qwen3-32b": {"qkv": (10240, 5120), "o": (5120, 8192), "gate_up": (51200, 5120), "down": (5120, 25600)},
}
DECODE = (1, 4, 16, 64, 256)  # sequences that take one token each
PREFILL = (512, 1024, 4096, 16384)  # tokens of prompts taken at once


@dataclass(frozen=True)
class Case:
    """One problem: x [m, k] of `dtype`, weight [n, k] in `spec` ("" for an op without a weight), with a bias or not.

    `small` cases have at most about 32 programs: they run on every machine, Triton's under the interpreter. The others
    are layers of real models, for a card and the bench.
    """

    name: str
    m: int
    n: int
    k: int
    spec: str = ""
    dtype: torch.dtype = torch.bfloat16
    bias: bool = False
    small: bool = True

    @property
    def real(self) -> bool:
        """True for a layer of a real model."""
        return not self.small

    @property
    def seed(self) -> int:
        """A number of the case's own, the same in every process."""
        return zlib.crc32(self.name.encode())


def small(m: int, n: int, k: int, spec: str = "", dtype: torch.dtype = torch.bfloat16, bias: bool = False) -> Case:
    """A small case; its name says all: `small.m3.n37.k53.w8a8.bf16.bias`."""
    kind = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    parts = ["small", f"m{m}", f"n{n}" if n else "", f"k{k}", spec, kind, "bias" if bias else ""]
    return Case(".".join(p for p in parts if p), m, n, k, spec, dtype, bias)


def real(spec: str, mark: str = "", models: tuple[str, ...] = tuple(LAYERS)) -> tuple[Case, ...]:
    """Every layer at every batch: `qwen3-8b.down.decode.b16`, `qwen3-8b.down.prefill.t4096`; `mark` goes at the end."""
    batches = [(f"decode.b{m}", m) for m in DECODE] + [(f"prefill.t{m}", m) for m in PREFILL]
    return tuple(
        Case(f"{model}.{layer}.{batch}{mark}", m, n, k, spec, small=False)
        for model in models
        for layer, (n, k) in LAYERS[model].items()
        for batch, m in batches
    )


def generator(case: Case, seed: int, device: str = "cpu") -> torch.Generator:
    """Random numbers of one case in one run; tests draw a fresh `seed` and print it."""
    return torch.Generator(device).manual_seed((case.seed << 20) ^ seed)


def activations(case: Case, random: torch.Generator) -> torch.Tensor:
    """x [m, k] in the case's dtype: normal, with a few columns that stand out as in real models."""
    x = torch.randn(case.m, case.k, generator=random, device=random.device)
    outliers = torch.rand(case.k, generator=random, device=random.device) < 0.01
    return torch.where(outliers, 30 * x, x).to(case.dtype)


def weight(case: Case, random: torch.Generator) -> QuantTensor:
    """A plain weight [n, k] of random codes: every code and zero point occurs, scales spread over a factor of four."""
    spec, device = QuantSpec.parse(case.spec), random.device
    shape, groups = (case.n, case.k), (case.n, spec.groups(case.k))

    def codes(size: tuple[int, int]) -> torch.Tensor:
        return torch.randint(spec.qmin, spec.qmax + 1, size, generator=random, device=device, dtype=torch.int8)

    scale = torch.rand(groups, generator=random, device=device) * 0.03 + 0.01
    scale = scale if spec.weight_bits == 8 and spec.act_bits == 8 else scale.to(torch.bfloat16)
    return QuantTensor(codes(shape), scale, None if spec.symmetric else codes(groups), spec, "plain", shape)


def bias(case: Case, random: torch.Generator) -> torch.Tensor | None:
    """fp32 [n], or None when the case has none."""
    return torch.randn(case.n, generator=random, device=random.device) if case.bias else None


def int8_rows(case: Case, random: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What quantize_rows would return, drawn at random: q int8 [m, k] in -127..127, scale fp32 [m], row_sum int32 [m]."""
    size = (case.m, case.k)
    q = torch.randint(-127, 128, size, generator=random, device=random.device, dtype=torch.int8)
    scale = torch.rand(case.m, generator=random, device=random.device) * 0.03 + 0.001
    return q, scale, q.sum(1, dtype=torch.int32)


def blank_weight(case: Case, packing: str) -> QuantTensor:
    """A packed weight of a case without data (device "meta"), for compiling without a card."""
    spec, (dtype, size) = QuantSpec.parse(case.spec), storage((case.n, case.k), packing)
    columns, padded_k = padded_shape((case.n, case.k), packing)
    groups = 1 if spec.group is None else padded_k // spec.group
    words = has_words(spec, packing)
    scale = torch.empty(groups, columns, dtype=torch.int32 if words else torch.float32, device="meta")
    zero = None if words or spec.symmetric else torch.empty(groups, columns, dtype=torch.int8, device="meta")
    data = torch.empty(size, dtype=dtype, device="meta")
    return QuantTensor(data, scale, zero, spec, packing, (case.n, case.k))


def empty(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor of a size without data."""
    return torch.empty(size, dtype=dtype, device="meta")
