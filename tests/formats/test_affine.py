"""affine.py: golden vectors, the formulas, edge cases, two-level scales."""

from __future__ import annotations

import math

import pytest
import torch

from percard.formats.affine import (
    decode,
    dequantize,
    encode,
    find_scales,
    quantize,
    scale_dtype_of,
    two_level,
    two_level_scales,
)
from percard.formats.spec import FormatError, QuantSpec

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def row32(values: list[float]) -> torch.Tensor:
    """One row of 32 weights that starts with `values`; the rest is zero, so the scale is that of `values`."""
    return torch.tensor([values + [0.0] * (32 - len(values))])


@pytest.mark.parametrize("dtype", FLOATS)
def test_golden_int4_symmetric(dtype: torch.dtype) -> None:
    """G2."""
    w = row32([-1.875, -1, -0.375, 0, 0.125, 0.25, 1, 1.625]).to(dtype)
    qt = quantize(w, QuantSpec.parse("w4a16-g32"))
    assert qt.scale.tolist() == [[0.25]] and qt.zero is None
    assert qt.data[0, :8].tolist() == [-8, -4, -2, 0, 0, 1, 4, 6]
    assert dequantize(qt, dtype)[0, :8].tolist() == [-2, -1, -0.5, 0, 0, 0.25, 1, 1.5]


@pytest.mark.parametrize("dtype", FLOATS)
def test_golden_int4_asymmetric(dtype: torch.dtype) -> None:
    """G3."""
    w = row32([-1, -0.5, 0, 0.25, 0.375, 1, 2, 2.75]).to(dtype)
    qt = quantize(w, QuantSpec.parse("w4a16-g32-asym"))
    assert qt.scale.tolist() == [[0.25]] and qt.zero is not None and qt.zero.tolist() == [[-4]]
    assert qt.data[0, :8].tolist() == [-8, -6, -4, -3, -2, 0, 4, 7]
    assert dequantize(qt)[0, :8].tolist() == [-1, -0.5, 0, 0.25, 0.5, 1, 2, 2.75]


def test_golden_int8_row() -> None:
    """G5."""
    w = torch.tensor([[-1.9921875, -0.0078125, 0.0078125, 0.0234375, 1, 1.9921875]])
    qt = quantize(w, QuantSpec.parse("w8a8"), torch.float32)
    assert qt.scale.item() == 1 / 64
    assert qt.data[0].tolist() == [-128, 0, 0, 2, 64, 127]


SPECS = ["w8a8", "w8a16", "w8a16-g128", "w4a16", "w4a16-g32", "w4a16-g64-asym", "w4a16-asym", "w3a16-g64", "w4a8"]


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("scale_dtype", FLOATS)
def test_formula_in_plain_python(name: str, scale_dtype: torch.dtype) -> None:
    """Every code, zero and value against the table of the docstring, number by number."""
    spec = QuantSpec.parse(name)
    generator = torch.Generator().manual_seed(7)
    w = torch.randn(3, 128, generator=generator)
    w[1] = w[1].abs()  # one-sided rows: zero stays in the range
    w[2] = -w[2].abs() * 1e-3
    qt = quantize(w, spec, scale_dtype)
    groups = spec.groups(128)
    size = 128 // groups
    values = dequantize(qt)
    steps = 2**spec.weight_bits - 1
    for n in range(3):
        for g in range(groups):
            x = w[n, g * size : (g + 1) * size]
            if spec.symmetric:
                s = (x.abs().max() / (steps / 2)).to(scale_dtype).float()
                z = torch.tensor(0.0)
            else:
                lo, hi = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
                s = (torch.tensor(hi) - torch.tensor(lo)).div(steps).to(scale_dtype).float()
                z = (spec.qmin - torch.tensor(lo) / s).clamp(spec.qmin, spec.qmax).round()
                assert qt.zero is not None and qt.zero[n, g] == z
            assert qt.scale[n, g] == s.to(scale_dtype)
            q = (x / s + z).clamp(spec.qmin, spec.qmax).round()
            assert torch.equal(qt.data[n, g * size : (g + 1) * size].float(), q)
            assert torch.equal(values[n, g * size : (g + 1) * size], (q - z) * s)


@pytest.mark.parametrize("name", [*SPECS, "w4a8-g64"])
def test_codes_are_a_fixed_point(name: str) -> None:
    """Values that lie on the grid come back as the same codes, with the same scale and zero."""
    spec = QuantSpec.parse(name)
    qt = quantize(torch.randn(9, 256, generator=torch.Generator().manual_seed(3)), spec)
    assert torch.equal(encode(dequantize(qt), qt.scale, qt.zero, spec), qt.data)
    again = quantize(dequantize(qt), spec, qt.scale.dtype, qt.scale, qt.zero)
    assert torch.equal(again.data, qt.data)


def test_chunks_do_not_show() -> None:
    """More weights than one step holds, with a row longer than a step."""
    spec = QuantSpec.parse("w4a16-g64-asym")
    w = torch.randn(3, (1 << 20) + 64, generator=torch.Generator().manual_seed(1))
    qt = quantize(w, spec)
    for n in range(3):
        one = quantize(w[n : n + 1], spec)
        assert torch.equal(one.data, qt.data[n : n + 1]) and torch.equal(one.scale, qt.scale[n : n + 1])


def test_bf16_and_strided_weights_are_read_as_fp32() -> None:
    w = torch.randn(64, 96, generator=torch.Generator().manual_seed(5)).to(torch.bfloat16)
    for name in ("w4a16-g32", "w8a8"):
        spec = QuantSpec.parse(name)
        expected = quantize(w.float().t()[:, :32].contiguous(), spec, torch.float32)
        found = quantize(w.t()[:, :32], spec, torch.float32)
        assert torch.equal(found.data, expected.data) and torch.equal(found.scale, expected.scale)


def test_zero_groups_have_scale_one() -> None:
    w = torch.zeros(2, 64)
    w[1, 32:] = 1.0
    for name in ("w4a16-g32", "w4a16-g32-asym"):
        qt = quantize(w, QuantSpec.parse(name))
        assert qt.scale[0].tolist() == [1.0, 1.0] and qt.scale[1, 0] == 1.0
        assert torch.count_nonzero(dequantize(qt)[0]) == 0
    assert quantize(torch.zeros(3, 5), QuantSpec.parse("w8a8")).scale.tolist() == [[1.0]] * 3


def test_tiny_weights_keep_a_positive_scale() -> None:
    """Scales that would round to zero are held above it, so that nothing divides by zero."""
    w = torch.full((1, 32), 1e-9)
    qt = quantize(w, QuantSpec.parse("w4a16-g32"), torch.float16)
    assert qt.scale.item() == 2.0**-24
    assert torch.isfinite(dequantize(qt)).all()
    assert quantize(torch.full((1, 32), 1e-44), QuantSpec.parse("w4a16-g32")).scale.item() > 0


def test_error_is_at_most_half_a_step() -> None:
    w = torch.randn(16, 256, generator=torch.Generator().manual_seed(2))
    for name in ("w8a8", "w4a16-g64-asym", "w3a16-g64"):
        spec = QuantSpec.parse(name)
        qt = quantize(w, spec, torch.float32)
        step = qt.scale.repeat_interleave(256 // qt.scale.shape[1], dim=1)
        # half a step by rounding; the end of a symmetric grid is half a step short, and a zero point is rounded too
        assert ((dequantize(qt) - w).abs() <= step * (1.0 if not spec.symmetric else 0.5 + 1e-5)).all()


def test_empty_shapes() -> None:
    for shape in ((0, 64), (3, 0), (0, 0)):
        for name in ("w4a16-g32", "w8a8", "w4a16-g32-asym"):
            if shape[1] == 0 and name == "w8a8":
                continue
            qt = quantize(torch.zeros(shape), QuantSpec.parse(name))
            assert qt.data.shape == shape and dequantize(qt).shape == shape


def test_decode_rounds_once() -> None:
    spec = QuantSpec.parse("w8a16")
    codes = torch.tensor([[127, -128, 1]], dtype=torch.int8)
    scale = torch.tensor([[0.0123]])
    assert torch.equal(decode(codes, scale, None, spec, torch.bfloat16), (codes.float() * scale).to(torch.bfloat16))


def test_scale_dtype() -> None:
    assert scale_dtype_of(QuantSpec.parse("w8a8"), torch.bfloat16) == torch.float32
    assert scale_dtype_of(QuantSpec.parse("w8a16"), torch.bfloat16) == torch.bfloat16
    assert scale_dtype_of(QuantSpec.parse("w4a8-g64"), torch.float16) == torch.float16


def test_two_level_golden() -> None:
    """G18: S = 13 x 2^-10, m = 1 3 11 16."""
    s = torch.tensor([[1.0, 3.0, 11.0, 16.0]]) * 13 * 2**-10
    stored = s.to(torch.bfloat16)
    assert [f"{v & 0xFFFF:04X}" for v in stored.view(torch.int16)[0].tolist()] == ["3C50", "3D1C", "3E0F", "3E50"]
    found = two_level(stored)
    assert found is not None
    assert found[0].item() == 13 * 2**-10 and found[1].tolist() == [[1, 3, 11, 16]]


def test_two_level_all_products() -> None:
    """Every S of 4 significant bits and every m: exact in bf16, and found again."""
    for c in range(8, 16):
        row = torch.tensor([[c * m * 2.0**-12 for m in range(1, 17)]])
        assert torch.equal(row.to(torch.bfloat16).float(), row)
        found = two_level(row.to(torch.bfloat16))
        assert found is not None and torch.equal((found[0] * found[1]), row)


def test_two_level_takes_the_smallest() -> None:
    found = two_level(torch.tensor([[8.0, 8.0]]))
    assert found is not None and found[0].item() == 0.5 and found[1].tolist() == [[16, 16]]


@pytest.mark.parametrize(
    "row", [[1.0, 17.0], [1.0, 1.0625 * 3.7], [0.3, 0.7], [0.0, 1.0], [math.nan, 1.0], [-1.0, 1.0]]
)
def test_two_level_says_no(row: list[float]) -> None:
    assert two_level(torch.tensor([row])) is None


@pytest.mark.parametrize("dtype", FLOATS)
def test_two_level_scales(dtype: torch.dtype) -> None:
    spec = QuantSpec.parse("w4a8-g64")
    generator = torch.Generator().manual_seed(11)
    w = torch.randn(32, 512, generator=generator) * torch.logspace(-6, 2, 32)[:, None]
    w[3] = 0
    w[4, :64] = 0
    scale = two_level_scales(w, spec, dtype)
    assert scale.dtype == dtype and two_level(scale) is not None
    qt = quantize(w, spec, dtype)
    assert torch.equal(qt.scale, scale)
    free = quantize(w, spec, dtype, find_scales(w, spec, dtype)[0])
    normal = slice(8, 32)  # rows whose scales fp16 can hold
    error = (dequantize(qt) - w)[normal].square().sum(1) / (dequantize(free) - w)[normal].square().sum(1)
    assert error.mean() < 1.05  # the price of two levels is small, since m is searched


def test_two_level_scales_search_m() -> None:
    """For each group no other m of 1..16 has a smaller error."""
    spec = QuantSpec.parse("w4a8-g32")
    w = torch.randn(4, 128, generator=torch.Generator().manual_seed(13))
    split = two_level(two_level_scales(w, spec, torch.float32))
    assert split is not None
    # the smallest S that fits may be finer than the S of the search: compare on the scales themselves
    best = (decode(encode(w, split[0] * split[1], None, spec), split[0] * split[1], None, spec) - w).square()
    best = best.reshape(4, 4, 32).sum(2)
    top = (w.abs().reshape(4, 4, 32).amax(2) / 7.5).amax(1, keepdim=True) / 16
    mantissa, exponent = torch.frexp(top)
    row = torch.ldexp(torch.ceil(mantissa * 16), exponent - 4)
    for m in range(1, 17):
        s = (row * m).expand(4, 4).contiguous()
        error = (decode(encode(w, s, None, spec), s, None, spec) - w).square().reshape(4, 4, 32).sum(2)
        assert (best <= error * (1 + 1e-5)).all()


W = torch.randn(2, 100)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: quantize(W, QuantSpec.parse("w4a16-g64")), "100 is not divisible by group 64.*no group fits"),
        (lambda: quantize(torch.randn(2, 96), QuantSpec.parse("w4a16-g64")), "groups that fit: g32"),
        (lambda: quantize(torch.tensor([[1.0, math.nan]]), QuantSpec.parse("w8a8")), "NaN or Inf"),
        (lambda: quantize(torch.tensor([[1.0, -math.inf]]), QuantSpec.parse("w4a16-asym")), "NaN or Inf"),
        (lambda: quantize(torch.full((1, 64), math.nan), QuantSpec.parse("w4a8-g64")), "NaN or Inf"),
        (lambda: quantize(torch.tensor([[9e9]]), QuantSpec.parse("w8a16"), torch.float16), "does not fit into"),
        (lambda: quantize(W, QuantSpec.parse("w8a8"), scale=torch.ones(2, 2)), "expected \\(2, 1\\)"),
        (lambda: quantize(W, QuantSpec.parse("w8a8"), scale=torch.zeros(2, 1)), "above zero"),
        (lambda: quantize(W * math.inf, QuantSpec.parse("w8a8"), scale=torch.ones(2, 1)), "NaN or Inf"),
        (lambda: quantize(torch.ones(2, 2, dtype=torch.int32), QuantSpec.parse("w8a8")), "float matrix"),
        (lambda: quantize(W, QuantSpec.parse("fp8-dynamic")), "float format"),
        (lambda: two_level_scales(W, QuantSpec.parse("w8a8")), "symmetric 4-bit"),
    ],
)
def test_refuses(call, says: str) -> None:
    with pytest.raises(FormatError, match=says):
        call()
