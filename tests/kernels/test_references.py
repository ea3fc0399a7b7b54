"""The references themselves, against the formulas of their docstrings written out in Python numbers."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from percard.formats.affine import dequantize
from percard.formats.spec import QuantSpec
from percard.kernels import shapes
from percard.kernels.conformance import difference, faults
from percard.kernels.matmul_w4a8 import cases as w4a8_cases
from percard.kernels.matmul_w4a8 import matmul_w4a8
from percard.kernels.matmul_w4a16 import cases as w4a16_cases
from percard.kernels.matmul_w4a16 import matmul_w4a16
from percard.kernels.matmul_w8a8 import cases as w8a8_cases
from percard.kernels.matmul_w8a8 import matmul_w8a8
from percard.kernels.matmul_w8a16 import cases as w8a16_cases
from percard.kernels.matmul_w8a16 import matmul_w8a16
from percard.kernels.quantize_rows import quantize_rows
from percard.kernels.weight import ulp, values

FP32 = torch.float32


def exact(x: torch.Tensor, w: torch.Tensor) -> list[list[Fraction]]:
    """x @ w^T in rational numbers."""
    rows, columns = ([[Fraction(v) for v in row] for row in t.double().tolist()] for t in (x, w))
    return [[sum((a * b for a, b in zip(r, c, strict=True)), Fraction()) for c in columns] for r in rows]


def close(got: torch.Tensor, want: list[list[Fraction]], rtol: float = 1e-5) -> None:
    expected = torch.tensor([[float(v) for v in row] for row in want], dtype=torch.float64)
    assert got.shape == expected.shape
    assert ((got.double() - expected).abs() <= rtol * expected.abs() + 1e-4).all()


def test_quantize_rows() -> None:
    x = torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0], [3.0, float("nan"), 1.0], [float("inf"), 1.0, 2.0]])
    q, scale, row_sum = quantize_rows(x, impl="reference")
    assert q.tolist() == [[64, -127, 32], [0, 0, 0], [0, 0, 0], [0, 0, 0]]  # 63.5 and 31.75 round to even and up
    assert scale[0].item() == torch.tensor(2 / 127).item() and scale[1] == 1
    assert scale[2].isnan() and scale[3].isnan()
    assert row_sum.tolist() == [-31, 0, 0, 0]
    assert (q.dtype, scale.dtype, row_sum.dtype) == (torch.int8, torch.float32, torch.int32)


def test_quantize_rows_comes_within_half_a_step() -> None:
    x = torch.randn(20, 77) * torch.logspace(-6, 6, 20)[:, None]
    q, scale, _ = quantize_rows(x, impl="reference")
    assert ((q * scale[:, None] - x).abs() <= scale[:, None] * 0.50001).all()
    assert (q.abs().amax(1) == 127).all()


@pytest.mark.parametrize("bias", [False, True])
def test_matmul_w8a8(bias: bool) -> None:
    xq, sx, w, b, _ = w8a8_cases.inputs(shapes.small(3, 4, 9, "w8a8", bias=bias), 1)
    want = exact(xq.double() * sx.double()[:, None], dequantize(w, torch.float64))
    want = [[v + (Fraction(float(b[n])) if bias else 0) for n, v in enumerate(row)] for row in want]
    close(matmul_w8a8(xq, sx, w, b, FP32, impl="reference"), want)


@pytest.mark.parametrize("spec", ["w4a16", "w4a16-g32", "w4a16-asym", "w4a16-g64-asym", "w8a16", "w8a16-g64-asym"])
def test_matmuls_of_floats(spec: str) -> None:
    op, cases = (matmul_w8a16, w8a16_cases) if spec.startswith("w8") else (matmul_w4a16, w4a16_cases)
    x, w, b = cases.inputs(shapes.small(2, 3, 128, spec, FP32, bias=True), 2)
    zero = torch.zeros_like(w.scale) if w.zero is None else w.zero
    group = w.spec.group or 128
    by_hand = (w.data.double() - zero.double().repeat_interleave(group, 1)) * w.scale.double().repeat_interleave(
        group, 1
    )
    assert torch.equal(values(w.data, w.scale, w.zero, group).double(), by_hand)
    assert torch.equal(dequantize(w).double(), by_hand)
    want = [[v + Fraction(float(b[n])) for n, v in enumerate(row)] for row in exact(x, by_hand)]
    close(op(x, w, b, impl="reference"), want)


@pytest.mark.parametrize("spec", ["w4a8", "w4a8-g32", "w4a8-g64"])
def test_matmul_w4a8(spec: str) -> None:
    xq, sx, xsum, w, b, _ = w4a8_cases.inputs(shapes.small(2, 3, 128, spec, bias=True), 3)
    want = exact(xq.double() * sx.double()[:, None], dequantize(w, torch.float64))
    want = [[v + Fraction(float(b[n])) for n, v in enumerate(row)] for row in want]
    close(matmul_w4a8(xq, sx, xsum, w, b, FP32, impl="reference"), want)


def test_sums_stay_exact_at_the_largest_k() -> None:
    """127 * -128 * 132104 is the widest int32 sum that the contract lets through."""
    k = matmul_w8a8.contract.MAX_K
    case = shapes.small(1, 1, k, "w8a8")
    xq, sx, w, _, _ = w8a8_cases.inputs(case, 0)
    xq, sx = torch.full_like(xq, 127), torch.ones_like(sx)
    w.data.fill_(-128)
    w.scale.fill_(1.0)
    assert 127 * 128 * k < 2**31 <= 127 * 128 * (k + 1)
    assert matmul_w8a8(xq, sx, w, None, FP32, impl="reference").item() == float(
        torch.tensor(-127 * 128 * k, dtype=FP32)
    )


def test_ulp_is_the_distance_to_the_next_number() -> None:
    for dtype in (torch.bfloat16, torch.float16, FP32):
        x = torch.tensor([1.0, 1.5, -3.0, 1e-3, 1000.0, 0.0, float("nan"), float("inf")]).to(dtype)
        step = ulp(x).to(torch.float64)
        after = torch.nextafter(x.abs(), torch.full_like(x, torch.inf)).double() - x.abs().double()
        assert torch.equal(step[:6], after[:6])
        assert (step[6:] == 0).all()


def test_cases_draw_every_code_and_new_numbers_for_new_seeds() -> None:
    case = shapes.small(4, 64, 128, "w4a16-g32-asym")
    x, w, _ = w4a16_cases.inputs(case, 1)
    assert sorted(w.data.unique().tolist()) == list(range(-8, 8)) and len(w.zero.unique()) == 16
    again, other = w4a16_cases.inputs(case, 1), w4a16_cases.inputs(case, 2)
    assert torch.equal(again[0], x) and torch.equal(again[1].data, w.data)
    assert not torch.equal(other[0], x) and not torch.equal(other[1].data, w.data)


@pytest.mark.parametrize("cases", [w8a8_cases, w4a16_cases, w8a16_cases, w4a8_cases])
def test_case_names_are_unique_and_the_real_shapes_are_there(cases: object) -> None:
    found = {case.name: case for case in cases.CASES}  # type: ignore[attr-defined]
    assert len(found) == len(cases.CASES)  # type: ignore[attr-defined]
    down = found["qwen3-8b.down.decode.b16"]
    assert (down.m, down.n, down.k, down.real) == (16, 4096, 12288, True)
    assert found["qwen3-32b.gate_up.prefill.t4096"].n == 51200
    for case in found.values():
        QuantSpec.parse(case.spec).groups(case.k)


def test_a_wrong_body_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The measure itself: a body that drops a bias, leaves its output unwritten, or is two ulps off is not in tolerance."""
    args = w4a16_cases.inputs(shapes.small(3, 16, 128, "w4a16-g64", torch.float16, bias=True), 5)
    body = matmul_w4a16.body("triton")
    right = matmul_w4a16.run_of(matmul_w4a16.body("reference"))
    plain = {"packing": "plain", "absent": lambda where: None, "takes": lambda *flat: None}

    def with_run(run: object) -> list[str]:
        import dataclasses

        fake = dataclasses.replace(body, load=lambda: run, **plain)
        monkeypatch.setattr(matmul_w4a16, "bodies", (fake, *matmul_w4a16.bodies[1:]))
        monkeypatch.setitem(matmul_w4a16._runs, "triton", run)
        return faults(matmul_w4a16, "triton", args)

    assert with_run(right) == []
    assert "48 of 48" not in "".join(with_run(right))
    assert "elements are off" in with_run(lambda *f: right(*f[:4], None, *f[5:]))[0]
    assert "48 of 48" in with_run(lambda *f: matmul_w4a16.contract.out_like(*f))[0]
    assert "expected torch.float16" in with_run(lambda *f: right(*f).float())[0]


def test_rounded_weights_are_in_tolerance_above_64_rows_of_bf16_only() -> None:
    for m, dtype, fits in ((64, torch.bfloat16, False), (65, torch.bfloat16, True), (65, torch.float16, False)):
        args = w4a16_cases.inputs(shapes.small(m, 64, 512, "w4a16-g128-asym", dtype), 7)
        flat = matmul_w4a16.contract.unwrap(*args)
        want = matmul_w4a16(*args, impl="reference")
        allowed = matmul_w4a16.contract.tolerance(want, *flat)
        weight = values(*flat[1:4], 128)
        rounded = (args[0].float() @ weight.to(torch.bfloat16).float().T).to(dtype)
        assert (difference("rounded", rounded, want, allowed) is None) == fits
        one_group_lost = (args[0][:, 128:].float() @ weight[:, 128:].T).to(dtype)
        assert difference("lost", one_group_lost, want, allowed) is not None


def test_difference_allows_what_it_is_told_and_no_more() -> None:
    want, allowed = torch.tensor([1.0, 2.0, float("nan")]), torch.tensor([0.1, 0.1, 0.0])
    assert difference("x", torch.tensor([1.05, 1.95, float("inf")]), want, allowed) is None
    assert "the worst at (1,)" in (difference("x", torch.tensor([1.05, 2.2, float("nan")]), want, allowed) or "")
    assert "the worst at (2,)" in (difference("x", torch.tensor([1.0, 2.0, 3.0]), want, allowed) or "")
    assert "the worst at (0,)" in (
        difference("x", torch.tensor([float("nan"), 2.0, float("nan")]), want, allowed) or ""
    )
