"""What only Triton's interpreter can show here: unpacking against packing, every Config, workspaces, far offsets.

Runs in a process of its own (test_gpu.py starts it), since TRITON_INTERPRET must stand before triton is imported.
By hand: TRITON_INTERPRET=1 pytest tests/kernels/test_gpu_interpreted.py
"""

from __future__ import annotations

import importlib
import itertools
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from percard.formats.layout import repack
from percard.formats.spec import QuantSpec
from percard.formats.tensor import QuantTensor
from percard.kernels.conformance import difference, poisoned_memory
from percard.kernels.inspection import ARCHS
from percard.kernels.matmul_w4a8.cases import two_level
from percard.kernels.shapes import small

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs in Triton's interpreter; test_gpu.py starts it", allow_module_level=True)

import triton
import triton.language as tl

from percard.kernels import tiles, tuning

FP16, FP32 = torch.float16, torch.float32
H200 = ARCHS["sm_90"]


@triton.jit
def unpack16(w_ptr, word_ptr, y_ptr, N: tl.constexpr):
    """y[n, 32 p + j] = u - z of plane p, for one block of packing planes16_w4."""
    n, j = tl.arange(0, N), tl.arange(0, 32)
    packed = tl.load(w_ptr + n[:, None] * 32 + j[None, :])
    word = tl.load(word_ptr + n)
    for p in tl.static_range(4):
        w = tiles.unpack_plane16(packed, word, p, tl.float16, False)
        tl.store(y_ptr + n[:, None] * 128 + 32 * p + j[None, :], w.to(tl.float32) * tiles.word_scale(word)[:, None])


@triton.jit
def unpack16_w8(w_ptr, word_ptr, y_ptr, N: tl.constexpr, HAS_ZERO: tl.constexpr):
    """y[n, 64 p + j] = (q - z) * scale of plane p, for one block of packing planes16_w8."""
    n, j = tl.arange(0, N), tl.arange(0, 64)
    packed = tl.load(w_ptr + n[:, None] * 64 + j[None, :])
    word = tl.load(word_ptr + n)
    scale = tiles.word8_scale(word, HAS_ZERO)
    for p in tl.static_range(2):
        w = tiles.unpack_plane16_w8(packed, word, p, tl.float16, HAS_ZERO, False)
        tl.store(y_ptr + n[:, None] * 128 + 64 * p + j[None, :], w.to(tl.float32) * scale[:, None])


@triton.jit
def unpack8(w_ptr, y_ptr, N: tl.constexpr):
    """y[n, 64 p + j] = 16 q of plane p, for one block of packing planes8_w4."""
    n, j = tl.arange(0, N), tl.arange(0, 64)
    packed = tl.load(w_ptr + n[:, None] * 64 + j[None, :])
    for p in tl.static_range(2):
        w = tiles.unpack_plane8(packed, p, False)
        tl.store(y_ptr + n[:, None] * 128 + 64 * p + j[None, :], w)


@triton.jit
def unpack8_times(w_ptr, m_ptr, y_ptr, N: tl.constexpr):
    """y[n, 64 p + j] = q * m[n] of plane p, for one block of packing planes8_w4."""
    n, j = tl.arange(0, N), tl.arange(0, 64)
    packed = tl.load(w_ptr + n[:, None] * 64 + j[None, :])
    m = tl.load(m_ptr + n)
    for p in tl.static_range(2):
        w = tiles.unpack_plane8_times(packed, m, p, False)
        tl.store(y_ptr + n[:, None] * 128 + 64 * p + j[None, :], w)


def every_code(name: str) -> QuantTensor:
    """64 x 128: each of the 16 (256) codes; each of the 16 zero points (64 from end to end)."""
    spec = QuantSpec.parse(name)
    count = 1 << spec.weight_bits
    codes = ((torch.arange(64)[:, None] * (count // 16) + torch.arange(128)[None, :]) % count - count // 2).to(
        torch.int8
    )
    scale = (torch.arange(64)[:, None] + 1).to(torch.bfloat16) * 2.0**-10
    zero = None if spec.symmetric else (torch.arange(64)[:, None] * count // 64 - count // 2).to(torch.int8)
    return QuantTensor(codes, scale, zero, spec, "plain", (64, 128))


@pytest.mark.parametrize("name", ["w4a16", "w4a16-asym"])
def test_card_unpacks_what_the_host_packed_16(name: str) -> None:
    qt = every_code(name)
    packed, y = repack(qt, "planes16_w4"), torch.full((64, 128), torch.nan)
    unpack16[(1,)](packed.data, packed.scale, y, N=64)
    zero = torch.zeros(64, 1) if qt.zero is None else qt.zero
    assert torch.equal(y, (qt.data - zero) * qt.scale.float())


@pytest.mark.parametrize("name", ["w8a16", "w8a16-asym"])
def test_card_unpacks_what_the_host_packed_16_w8(name: str) -> None:
    qt = every_code(name)
    packed, y = repack(qt, "planes16_w8"), torch.full((64, 128), torch.nan)
    unpack16_w8[(1,)](packed.data, packed.scale, y, N=64, HAS_ZERO=qt.zero is not None)
    zero = torch.zeros(64, 1, dtype=torch.int8) if qt.zero is None else qt.zero
    assert len(qt.data.unique()) == 256
    assert torch.equal(y, (qt.data.int() - zero.int()) * qt.scale.float())


def test_card_unpacks_what_the_host_packed_8() -> None:
    qt = every_code("w4a8")
    packed, y = repack(qt, "planes8_w4"), torch.full((64, 128), 77, dtype=torch.int8)
    unpack8[(1,)](packed.data, y, N=64)
    assert torch.equal(y.to(torch.int32), 16 * qt.data.to(torch.int32))


def test_card_multiplies_codes_by_the_integers_of_their_groups() -> None:
    qt, m = every_code("w4a8"), torch.arange(64, dtype=torch.int32) % 17
    packed, y = repack(qt, "planes8_w4"), torch.full((64, 128), 77, dtype=torch.int8)
    unpack8_times[(1,)](packed.data, m, y, N=64)
    assert torch.equal(y.to(torch.int32), qt.data.to(torch.int32) * m[:, None])


def test_the_assembly_does_what_its_picture_says() -> None:
    """The constants of the inline assembly, applied to every pair of nibbles with torch: what the twin gives."""
    u = torch.arange(16, dtype=torch.int32)
    for z in range(32):
        bf16 = ((u | 0x4300).to(torch.int16).view(torch.bfloat16)).float()
        minus = torch.tensor([(z | 0xC300) - (1 << 16)], dtype=torch.int16).view(torch.bfloat16).float()
        assert torch.equal(bf16 + minus, (u - z).float())
        fp16 = ((u << 4 | 0x5400).to(torch.int16).view(FP16)).float()
        minus = torch.tensor([(z << 4 | 0xD400) - (1 << 16)], dtype=torch.int16).view(FP16).float()
        assert torch.equal(fp16 + minus, (u - z).float())
    r = torch.arange(256, dtype=torch.int32)
    q = r.to(torch.uint8).view(torch.int8).float()
    low, high = (
        ((r & mask) | bits).to(torch.int16).view(torch.bfloat16).float()
        for mask, bits in ((0x7F, 0x4300), (0x80, -0x3D00))
    )
    assert torch.equal(low + high, q), "-0x3D00 has the bits of 0xC300"
    wide = ((r & 0xFF) ^ 0x6480).to(torch.int16).view(FP16).float()
    for z in range(-128, 128):
        minus = torch.tensor([(z + 128) | -0x1C00], dtype=torch.int16).view(FP16).float()  # 0xE400
        assert torch.equal(wide + minus, q - z)
        assert torch.equal((q - z).to(torch.bfloat16).float(), q - z), "the last sum of bf16 is exact"
    u = torch.stack(torch.meshgrid(*[torch.arange(16)] * 4, indexing="ij")).reshape(4, -1)  # four codes of a register
    four = sum(u[i] << (8 * i) for i in range(4))
    for m in range(17):  # (r * m + c) ^ 0x80808080 modulo 2^32, with c as unpack_plane8_times makes it
        c = (m * -0x08080808 - 0x7F7F7F80) % 2**32
        word = ((four * m + c) % 2**32) ^ 0x80808080
        for i in range(4):
            byte = ((word >> (8 * i)) & 255).to(torch.uint8).view(torch.int8)
            assert torch.equal(byte.to(torch.int64), (u[i] - 8) * m)
    for plane, shifted in ((0, r << 4), (1, r)):
        byte = ((shifted ^ 0x80) & 0xF0).to(torch.uint8).view(torch.int8)
        code = ((r >> (4 * plane)) & 15) - 8
        assert torch.equal(byte.to(torch.int32), 16 * code)


def answers(op: str, case: Any, seed: int, **changes: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(what the kernels give under a changed Config, what the reference gives, what may lie between)."""
    package = importlib.import_module(f"percard.kernels.{op}")
    module, cases = (importlib.import_module(f"percard.kernels.{op}.{part}") for part in ("gpu", "cases"))
    the_op = getattr(package, op)
    args = cases.inputs(case, seed)
    plain = the_op.contract.unwrap(*args)
    want = the_op.run_of(the_op.body("reference"))(*plain)
    packing = the_op.body("triton").packing
    flat = the_op.contract.unwrap(*(repack(a, packing) if isinstance(a, QuantTensor) else a for a in args))
    with poisoned_memory():
        group = QuantSpec.parse(case.spec).group or case.k
        base = module.heuristic(module.tuning.Shape(case.m, case.n, case.k, group, case.dtype), H200)
        got, launches = module.plan(H200, *flat, config=replace(base, **changes))
        tiles.start(launches, got.device)
    return got, want, the_op.contract.tolerance(want, *plain)


CONFIGS = {
    "matmul_w8a8": [
        {"split_k": s, "block_n": n, "block_m": m, "dots": d, "raster": r}
        for s, (n, m), d, r in itertools.product((1, 3, 5), ((64, 16), (128, 64)), (1, 2), (1, 8))
    ],
    "matmul_w4a16": [
        {"split_k": s, "block_n": n, "block_m": m, "pack_blocks": b, "scale_weight": c}
        for s, (n, m), b, c in itertools.product((1, 3), ((64, 16), (128, 32)), (1, 2), (False, True))
    ],
    "matmul_w8a16": [
        {"split_k": s, "block_n": n, "block_m": m, "pack_blocks": b, "scale_weight": c}
        for s, (n, m), b, c in itertools.product((1, 3), ((64, 16), (128, 32)), (1, 2), (False, True))
    ],
    "matmul_w4a8": [
        {"split_k": s, "block_n": n, "block_m": m, "raster": r}
        for s, (n, m), r in itertools.product((1, 3, 5), ((64, 16), (128, 64)), (1, 2))
    ],
}
SPECS = {
    "matmul_w8a8": ("w8a8",),
    "matmul_w4a16": ("w4a16", "w4a16-g32-asym", "w4a16-g64", "w4a16-g128"),
    "matmul_w8a16": ("w8a16", "w8a16-g32-asym", "w8a16-g64", "w8a16-g128"),
    "matmul_w4a8": ("w4a8", "w4a8-g32", "w4a8-g64", "w4a8-g128"),
}


@pytest.mark.parametrize(("op", "number"), [(op, i) for op, configs in CONFIGS.items() for i in range(len(configs))])
def test_every_config_gives_the_same_answer(op: str, number: int) -> None:
    """Tiles of any size, split or not, several tiles along both sides, bias; workspaces start as NaN."""
    changes = CONFIGS[op][number]
    spec = SPECS[op][number % len(SPECS[op])]
    got, want, allowed = answers(op, small(19, 150, 768, spec, FP16, bias=True), number, **changes)
    if changes.get("scale_weight"):
        largest = 16 if op == "matmul_w8a16" else 1  # codes reach 16 times as far
        allowed = allowed + 2.0**-5 * largest  # each weight is rounded to fp16 after its scale
    assert difference(op, got, want, allowed) is None, f"{spec} {changes}"


@pytest.mark.parametrize("spec", ["w4a16", "w4a16-g32-asym", "w4a16-g128", "w8a16", "w8a16-g32-asym", "w8a16-g128"])
def test_a_weight_made_whole_by_chunks(spec: str) -> None:
    """Way D: our kernel fills chunk after chunk in the same memory, torch multiplies; several chunks, a cut last one."""
    op = f"matmul_{spec[:5].rstrip('-')}"
    k = 900 if "-" not in spec else 1024
    got, want, allowed = answers(op, small(5, 1100, k, spec, FP16, bias=True), 7, dequantize_mb=1)
    allowed = allowed + 2.0**-9 * want.abs().max()  # each weight is rounded to fp16 after its scale
    assert difference(op, got, want, allowed) is None


def test_the_copy_of_a_w8a8_layer_made_whole() -> None:
    """matmul_w8a16 on packing rows8: several chunks, a padded last one, a bias; the contract lets it for many rows only."""
    cases = importlib.import_module("percard.kernels.matmul_w8a16.cases")
    module = importlib.import_module("percard.kernels.matmul_w8a16.gpu")
    op = importlib.import_module("percard.kernels.matmul_w8a16").matmul_w8a16
    x, w, bias = cases.inputs(small(5, 700, 1000, "w8a8", FP16, bias=True), 3)
    plain = op.contract.unwrap(x, w, bias)
    want = op.run_of(op.body("reference"))(*plain)
    flat = op.contract.unwrap(x, repack(w, "rows8"), bias)
    with poisoned_memory():
        config = replace(module.heuristic(tuning.Shape(5, 700, 1000, 1000, FP16), H200), dequantize_mb=1)
        y, launches = module.plan(H200, *flat, config=config)
        assert len(launches) == 4, "two chunks"
        tiles.start(launches, y.device)
    allowed = op.contract.tolerance(want, *plain) + 2.0**-9 * want.abs().max()
    assert difference("rows8", y, want, allowed) is None
    many = torch.zeros(65, 1000, dtype=torch.bfloat16)
    assert op.body("triton").takes(many, *flat[1:]) is None
    for wrong in (many[:64], many.half()):
        assert "more than 64 rows of bfloat16" in op.body("triton").takes(wrong, *flat[1:])
    assert op.body("triton").takes(many, *flat[1:9], True) is not None, "torch's matmul promises nothing about batches"


@pytest.mark.parametrize("spec", ["w4a16-g128", "w8a16", "w4a8-g128"])
def test_rows_that_share_a_workspace_do_not_depend_on_it(spec: str) -> None:
    """K is split in two, and 257 rows take the workspace twice: still each row is what it is alone."""
    op = f"matmul_{spec.split('-')[0]}"
    package = importlib.import_module(f"percard.kernels.{op}")
    module, cases = (importlib.import_module(f"percard.kernels.{op}.{part}") for part in ("gpu", "cases"))
    the_op, rows = getattr(package, op), 3 if "a8" in spec else 1
    args = cases.inputs(small(257, 40, 1024, spec, FP16, bias=True), 5)
    packing = the_op.body("triton").packing
    args = tuple(repack(a, packing) if isinstance(a, QuantTensor) else a for a in args)

    def run(*given: Any) -> torch.Tensor:
        with poisoned_memory():
            y, launches = module.plan(H200, *the_op.contract.unwrap(*given, batch_invariant=True))
            assert len(launches) == 2 * -(-y.shape[0] // 256), "a kernel and a sum for each 256 rows"
            tiles.start(launches, y.device)
        return y

    whole = run(*args)
    for part in (slice(0, 1), slice(250, 257), slice(256, 257)):
        assert torch.equal(run(*(a[part] for a in args[:rows]), *args[rows:]), whole[part])


def test_the_tuner_runs_these_kernels(tmp_path: Path) -> None:
    """Real op, real candidates, the gates as on a card; only the compiler and the clock are made up."""
    from percard.kernels import tuner

    class Machine:
        card, triton, where = replace(H200, l2_bytes=1 << 16), "3.9.0", torch.device("cpu")
        timed: ClassVar[list[int]] = []

        def refuses(self, launches: Any) -> str | None:
            return None

        def time(self, turns: Any, rounds: int) -> dict[str, list[float]]:
            self.timed.append(len(turns))
            assert all(len(turn) >= 2 for turn in turns.values()), "copies that are more than the cache holds"
            return {name: [2.0 if name.startswith("heuristic") else 1.0] * rounds for name in turns}

    subject = tuner.subject("matmul_w4a16")
    case = small(1, 64, 256, "w4a16-g64", FP16)
    subject = replace(subject, cases=SimpleNamespace(CASES=(replace(case, small=False),), inputs=subject.cases.inputs))
    (outcome,) = tuner.run(tuner.problems([subject]), Machine(), tmp_path)
    assert outcome.status == "tuned" and outcome.entry is not None
    assert Machine.timed[0] >= 5 and Machine.timed[1] == 3 + tuner.FINALISTS, "the heuristic twice, and torch's bf16"
    table = tuning.load(tmp_path / "x" / "tuned.json", "3.9.0")
    assert table == {}, "what was written lies where it was asked for and nowhere else"
    (entry,) = tuning.read(tmp_path / "matmul_w4a16.json")
    assert subject.gpu.Config(**entry["config"]) in subject.gpu.candidates(subject.shape(case), H200)


def test_a_split_leaves_int8_bits_alone() -> None:
    for op, spec in (("matmul_w8a8", "w8a8"), ("matmul_w4a8", "w4a8"), ("matmul_w4a8", "w4a8-g64")):
        case = small(5, 70, 1280, spec, FP32, bias=True)
        case = two_level(case) if "-g" in spec else case
        got = [answers(op, case, 3, split_k=s)[0] for s in (1, 2, 5)]
        assert torch.equal(got[0], got[1]) and torch.equal(got[0], got[2])


def test_a_step_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="a step is 256 codes, expected a divisor of the padded K = 384"):
        answers("matmul_w4a16", small(1, 64, 384, "w4a16", FP16), 0, pack_blocks=2)
    with pytest.raises(ValueError, match="block_k is 256, expected a divisor of the padded K = 384"):
        answers("matmul_w8a8", small(1, 64, 384, "w8a8", FP16), 0, block_k=256)


def far_rows(rows: int, columns: int, stride: int, dtype: torch.dtype) -> torch.Tensor:
    """[rows, columns] whose rows lie `stride` elements apart: memory that is never touched is never there."""
    try:
        return torch.empty((rows - 1) * stride + columns, dtype=dtype).as_strided((rows, columns), (stride, 1))
    except RuntimeError as error:
        pytest.skip(f"the machine does not lend that much address space: {error}")


def test_rows_of_x_beyond_two_to_the_31() -> None:
    x = far_rows(3, 200, 2**31 + 64, torch.int8)
    x.copy_(torch.randint(-127, 128, (3, 200), dtype=torch.int8))
    weight = importlib.import_module("percard.kernels.matmul_w8a8.cases").inputs(small(3, 40, 200, "w8a8", FP16), 0)[2]
    op = importlib.import_module("percard.kernels.matmul_w8a8").matmul_w8a8
    sx = torch.rand(3)
    want = op(x.contiguous(), sx, weight, None, FP32, impl="reference")
    flat = op.contract.unwrap(x.contiguous(), sx, repack(weight, "rows8"), None, FP32)
    assert torch.equal(op.run_of(op.body("triton"))(x, *flat[1:]), want)


def test_rows_to_quantise_beyond_two_to_the_31() -> None:
    x = far_rows(3, 100, 2**31 + 8, FP16)
    x.copy_(torch.randn(3, 100))
    op = importlib.import_module("percard.kernels.quantize_rows").quantize_rows
    want, got = op(x.contiguous(), impl="reference"), op.run_of(op.body("triton"))(x)
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


def test_a_workspace_beyond_two_to_the_31() -> None:
    """add_slices where slice 2 starts past 2^31 elements."""
    m, n = 2, 2**30
    part = far_rows(3 * m, 8, n, FP32)
    y, values = torch.empty(m, 8), torch.randn(3, m, 8)
    part.copy_(values.view(3 * m, 8))
    options = {"SLICES": 3, "HAS_SX": False, "HAS_SW": False, "HAS_BIAS": False, "BLOCK": 8}
    tiles.add_slices[(1, m)](part, part, part, part, y, m, n, 8, **options)
    assert torch.equal(y, values[0] + values[1] + values[2])
