"""A row alone has the bits of that row in any batch, and a hundred runs have the same bits: every op and body that is here.

Triton's bodies: on a card as `gpu` tests, else in Triton's interpreter (test_interpreter.py starts it).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from percard.formats import affine
from percard.formats.spec import QuantSpec
from percard.formats.tensor import QuantTensor
from percard.kernels import shapes
from percard.kernels.conformance import answer, packed
from percard.kernels.linear import QuantLinear, linear, prepare

SPECS = {
    "matmul_w8a8": ("w8a8",),
    "matmul_w4a16": ("w4a16", "w4a16-g32-asym", "w4a16-g128"),
    "matmul_w8a16": ("w8a16", "w8a16-g32-asym", "w8a16-g128"),
    "matmul_w4a8": ("w4a8", "w4a8-g32", "w4a8-g128"),
}
ASKED = ("matmul_w4a16", "matmul_w8a16", "matmul_w4a8")  # the others are invariant whatever they are asked
ROWS = {
    "quantize_rows": 1,
    "matmul_w8a8": 2,
    "matmul_w4a8": 3,
    "matmul_w4a16": 1,
    "matmul_w8a16": 1,
}  # arguments with M rows


def interpreted(body: Any) -> bool:
    return body.name == "triton" and body.where == "cpu"


def inputs(body: Any, spec: str, m: int, n: int, k: int, seed: int, dtype: torch.dtype = torch.float16) -> tuple:
    args = body.cases.inputs(shapes.small(m, n, k, spec, dtype, bias=bool(spec)), seed, body.where)
    return (*args, True) if body.op.name in ASKED else args


def alone(body: Any, args: tuple, rows: slice) -> tuple[torch.Tensor, ...]:
    count = ROWS[body.op.name]
    return answer(body.op, body.name, tuple(a[rows] for a in args[:count]) + args[count:])


def same(got: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...], rows: slice) -> bool:
    return all(torch.equal(a, b[rows]) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("m", [2, 5, 17, 40, 70])
def test_a_row_alone_is_that_row_in_any_batch(body: Any, m: int, seed: int) -> None:
    if interpreted(body) and m not in (5, 70):
        pytest.skip("the interpreter is slow; the same on a card")
    k = 1024 if body.name == "triton" else 512  # K is split there
    for spec in SPECS.get(body.op.name, ("",)):
        args = inputs(body, spec, m, 70, k, seed)
        batch = answer(body.op, body.name, args)
        for rows in (slice(0, 1), slice(m - 1, m), slice(1, 1 + (m + 1) // 2)):
            assert same(alone(body, args, rows), batch, rows), f"{spec} rows {rows} of {m}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_in_other_types_as_well(body: Any, dtype: torch.dtype, seed: int) -> None:
    if body.name == "triton" and (interpreted(body) or dtype == torch.float32):
        pytest.skip("bf16 of Triton runs on a card, fp32 activations nowhere")
    for spec in SPECS.get(body.op.name, ("",)):
        args = inputs(body, spec, 33, 37, 384, seed, dtype)
        batch = answer(body.op, body.name, args)
        for rows in (slice(0, 1), slice(7, 10), slice(20, 33)):
            assert same(alone(body, args, rows), batch, rows), f"{spec} {dtype}"


def test_the_rows_around_do_not_matter(body: Any, seed: int) -> None:
    """Other numbers in the other rows, very large ones among them: same bits in this row."""
    for spec in SPECS.get(body.op.name, ("",))[-1:]:
        args, other = (inputs(body, spec, 6, 70, 256, s) for s in (seed, seed + 1))
        count = ROWS[body.op.name]
        mixed = tuple(torch.cat([b[:3], a[3:4], 2 * b[4:] if b.is_floating_point() else b[4:]]) for a, b in
                      zip(args[:count], other[:count], strict=True))  # fmt: skip
        want = answer(body.op, body.name, args)
        got = answer(body.op, body.name, mixed + args[count:])
        assert all(torch.equal(a[3], b[3]) for a, b in zip(got, want, strict=True)), spec


def test_a_hundred_runs_have_the_same_bits(body: Any, seed: int) -> None:
    runs = 3 if interpreted(body) else 100
    for m in (1, 9) if interpreted(body) else (1, 9, 130):
        for spec in SPECS.get(body.op.name, ("",))[-1:]:
            case = shapes.small(m, 70, 512, spec, torch.float16, bias=bool(spec))
            args = packed(body.op, body.name, body.cases.inputs(case, seed, body.where))
            first = body.op(*args, impl=body.name)
            first = first if isinstance(first, tuple) else (first,)
            for _ in range(runs):
                again = body.op(*args, impl=body.name)
                again = again if isinstance(again, tuple) else (again,)
                assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), f"{spec} M = {m}"


def of_producers(test: Any) -> Any:
    test.ops = ("rmsnorm_quantize", "silu_mul_quantize")  # conftest.py reads it
    return test


@of_producers
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_producers_too(body: Any, dtype: torch.dtype, seed: int) -> None:
    """A row alone, then a hundred runs: no op of the serving path depends on the batch or the day."""
    case = shapes.small(17, 0, 515, dtype=dtype, bias=body.op.name == "rmsnorm_quantize")
    x, *rest = body.cases.inputs(case, seed, body.where)
    batch = answer(body.op, body.name, (x, *rest))
    for rows in (slice(0, 1), slice(16, 17), slice(3, 9)):
        given = [a[rows] if isinstance(a, torch.Tensor) and a.ndim == 2 else a for a in rest]
        assert same(answer(body.op, body.name, (x[rows], *given)), batch, rows), f"rows {rows}"
    for _ in range(2 if interpreted(body) else 100):
        assert same(answer(body.op, body.name, (x, *rest)), batch, slice(None))


@pytest.mark.gpu
def test_a_hundred_runs_beside_other_work(body: Any, seed: int) -> None:
    """At sizes that split K, with a stream of products of torch on the card meanwhile."""
    side, big = torch.cuda.Stream(), torch.randn(4096, 4096, device=body.where, dtype=torch.bfloat16)
    for m in (1, 64, 1024):
        for spec in SPECS.get(body.op.name, ("",))[-1:]:
            case = shapes.small(m, 1024, 4096, spec, torch.bfloat16, bias=bool(spec))
            args = packed(body.op, body.name, body.cases.inputs(case, seed, body.where))
            first = body.op(*args, impl=body.name)
            first = first if isinstance(first, tuple) else (first,)
            for _ in range(100):
                with torch.cuda.stream(side):
                    torch.mm(big, big)
                again = body.op(*args, impl=body.name)
                again = again if isinstance(again, tuple) else (again,)
                assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), f"{spec} M = {m}"


@pytest.mark.gpu
def test_large_batches_on_a_card(body: Any, seed: int) -> None:
    """Across every border of tiles and of the rows that share a workspace."""
    for spec in SPECS.get(body.op.name, ("",)):
        args = inputs(body, spec, 1030, 512, 4096, seed, torch.bfloat16)
        batch = answer(body.op, body.name, args)
        for rows in (slice(0, 1), slice(255, 257), slice(1000, 1030), slice(0, 64), slice(3, 600)):
            assert same(alone(body, args, rows), batch, rows), f"{spec} {rows}"


def quantized(spec: str) -> QuantTensor:
    return affine.quantize(torch.randn(70, 512) / 512**0.5, QuantSpec.parse(spec))


@pytest.mark.parametrize("spec", ["w8a8", "w8a16-g64", "w4a16-g128-asym", "w4a8", "w4a8-g64"])
def test_linear_and_quant_linear(spec: str) -> None:
    try:
        w = prepare(quantized(spec), "cpu")
    except NotImplementedError as error:
        pytest.skip(str(error))
    x = torch.randn(2, 11, 512).to(torch.bfloat16)
    whole = linear(x, w, batch_invariant=True)
    for t in (0, 5, 10):
        assert torch.equal(linear(x[1, t], w, batch_invariant=True), whole[1, t])
    layer = QuantLinear(w, torch.randn(70), batch_invariant=True)
    batch = layer(x)
    assert torch.equal(layer(x[:1]), batch[:1]) and torch.equal(layer(x[1, 3]), batch[1, 3])
    assert torch.allclose(batch.float(), QuantLinear(w, layer.bias)(x).float(), rtol=0.05, atol=0.05)
