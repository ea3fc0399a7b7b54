"""The face of moe_matmul, and stacks of experts: refusals, torch's view, cost, packing, a whole layer, the test at load."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from percard.formats import affine, layout
from percard.formats.spec import FormatError, QuantSpec
from percard.kernels import linear, self_test
from percard.kernels.conformance import packed
from percard.kernels.moe_matmul import cases, moe_matmul
from percard.kernels.moe_matmul.cases import small
from percard.kernels.op import Unsupported

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
CONTRACT = moe_matmul.contract


def made(up: bool, spec: str, seed: int, n: int = 70) -> tuple[Any, ...]:
    """Random fp16 arguments: 4 tokens, 5 experts, top 3, a weight [n, 256]."""
    return cases.inputs(small(4, n, 256, spec, FP16, 5, 3, up, "slice"), seed)


def test_what_does_not_fit_is_refused_in_one_line(seed: int) -> None:
    x, w, ids, weights = made(False, "w4a16-g128", seed)
    xq, w8, _, _, sx, dtype = made(False, "w8a8", seed)
    wrong = [
        ((x, w, ids), "x has 12 rows, expected 4"),
        ((x[:4], w, ids, weights), "x has 4 rows, expected 12"),
        ((x[:, :100], w, ids, weights), r"expected \[M, 256\]"),
        ((x, w, ids[0], weights), r"ids is torch.int32 \(3,\)"),
        ((x, w, ids, weights[:, :2]), r"weights is torch.float32 \(4, 2\), expected contiguous float32 \(4, 3\)"),
        ((x, w8, ids, weights), "the experts are w8a8 and x is rows without scales"),
        ((xq, w, ids, weights, sx), "the experts are w4a16-g128 and x is int8 rows with scales"),
        ((xq, w8, ids, weights, sx[:5], dtype), "sx is torch.float32"),
        ((x, w8, ids, weights, sx[:12]), "expected int8 and symmetric w8a8"),
        ((x, w, ids, weights, None, FP32), "out_dtype is torch.float32, expected torch.float16"),
        ((x, replace(w, data=w.data.transpose(1, 2).contiguous().transpose(1, 2)), ids, weights), "contiguous"),
    ]
    for args, said in wrong:
        with pytest.raises(ValueError, match=said):
            moe_matmul(*args, impl="reference")
    odd = made(True, "w4a16", seed, n=69)
    with pytest.raises(ValueError, match="69 rows, expected an even number"):
        moe_matmul(*odd, impl="reference")
    with pytest.raises(Unsupported, match="reads experts packed as plain, these are planes16_w4"):
        moe_matmul(*packed(moe_matmul, "triton", (x, w, ids, weights)), impl="reference")


def test_torch_knows_the_op(seed: int) -> None:
    for spec in ("w4a16-g128", "w8a8"):
        flat = CONTRACT.unwrap(*made(False, spec, seed))
        torch.library.opcheck(torch.ops.percard.moe_matmul.reference, flat)


def test_cost_counts_the_experts_that_have_a_token() -> None:
    for tokens, active in ((1, 7.8), (16, 81), (64, 125.7), (4096, 128)):
        assert abs(CONTRACT.active_experts(8 * tokens, 128) - active) < 0.5
    flat = cases.blank(next(case for case in cases.CASES if case.name == "qwen3-30b-a3b.down.t4096.w8a8"))
    cost = CONTRACT.cost(*flat)
    assert cost.flops == 2 * 4096 * 8 * 2048 * 768
    assert cost.bytes > 128 * 2048 * 768 + 4096 * 8 * 768


@pytest.mark.parametrize("spec", ["w4a16-g32", "w8a8"])
def test_a_layer_of_experts(spec: str, seed: int) -> None:
    """linear.moe: up, quantise where int8, down; against dequantised weights."""
    random = torch.Generator().manual_seed(seed)
    quant = QuantSpec.parse(spec)

    def stack(n: int, k: int) -> Any:
        weights = (torch.randn(n, k, generator=random) / k**0.5 for _ in range(4))
        return layout.stack_experts((affine.quantize(w, quant, affine.scale_dtype_of(quant, BF16)) for w in weights), 4)

    w13, w2, x = stack(128, 96), stack(96, 64), torch.randn(6, 96, generator=random)
    ids, weights = torch.randint(-1, 4, (6, 2), generator=random), torch.rand(6, 2, generator=random)
    want = torch.zeros(6, 96)
    for t, j in torch.cartesian_prod(torch.arange(6), torch.arange(2)).tolist():
        if ids[t, j] >= 0:
            gate, up = (affine.dequantize(w13.expert(int(ids[t, j]))) @ x[t]).chunk(2)
            h = torch.nn.functional.silu(gate) * up
            want[t] += weights[t, j] * (affine.dequantize(w2.expert(int(ids[t, j]))) @ h)
    impls = ["reference"] + (["cpu"] if moe_matmul.body("cpu").absent("cpu") is None else [])
    for impl in impls:
        ready = [linear.prepare_experts(w, "cpu", impl) for w in (w13, w2)]
        got = linear.moe(x, *ready, ids, weights, impl=impl)
        assert got.dtype == FP32 and (got - want).abs().max() < (1e-4 if spec != "w8a8" else 3e-2) * want.abs().max()


def test_experts_that_no_body_multiplies_are_refused() -> None:
    one = affine.quantize(torch.randn(8, 32), QuantSpec.parse("w8a16"), BF16)
    with pytest.raises(Unsupported, match="no body multiplies experts in w8a16"):
        linear.prepare_experts(layout.stack_experts([one, one], 2), "cpu", "reference")


def test_a_stack_of_experts_holds_each(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    quant = QuantSpec.parse("w4a16-g32-asym")
    weights = [affine.quantize(torch.randn(7, 64, generator=random), quant) for _ in range(3)]
    stack = layout.stack_experts(iter(weights), 3)
    assert stack.shape == (3, 7, 64) and stack.nbytes == sum(w.nbytes for w in weights)
    for packing in ("planes16_w4", "rows16_k4_w4"):
        ready = layout.repack_experts(stack, packing)
        back = layout.repack_experts(ready, "plain")
        for e, w in enumerate(weights):
            alone = layout.repack(w, packing)
            assert torch.equal(ready.expert(e).data, alone.data) and torch.equal(ready.expert(e).scale, alone.scale)
            assert torch.equal(back.expert(e).data, w.data) and torch.equal(back.expert(e).zero, w.zero)
    with pytest.raises(FormatError, match="found 2 experts, expected 3"):
        layout.stack_experts(weights[:2], 3)
    other = affine.quantize(torch.randn(8, 64, generator=random), quant)
    with pytest.raises(FormatError, match=r"expert 1 is .* expected 3 experts like the first"):
        layout.stack_experts([weights[0], other], 3)
    with pytest.raises(FormatError, match="scale of 3 experts has shape"):
        replace(stack, scale=stack.scale[:2])


@pytest.mark.skipif(moe_matmul.body("cpu").absent("cpu") is not None, reason="the C++ module is not here")
@pytest.mark.parametrize("spec", ["w4a16-g32-asym", "w8a8"])
def test_experts_are_tried_at_load(spec: str, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr(self_test, "_RESULTS", {})
    monkeypatch.setattr(self_test, "CPU_ROWS", 64)
    stack = cases.experts(small(1, 150, 96, spec, FP16, 3, 1, True), torch.Generator().manual_seed(seed))
    packed_stack = linear.prepare_experts(stack, "cpu")
    assert packed_stack.packing.startswith("rows16_k4_") and list(self_test._RESULTS.values()) == [None]

    def wrong(*flat: Any) -> torch.Tensor:
        return CONTRACT.out_like(*flat).fill_(1)

    monkeypatch.setattr(self_test, "_RESULTS", {})
    monkeypatch.setitem(moe_matmul._runs, "cpu", wrong)
    with pytest.raises(Unsupported, match=r"moe_matmul cpu failed its self-test at \(3, 150, 96\) .* 1 tokens, down"):
        linear.prepare_experts(stack, "cpu")
    assert linear.prepare_experts(stack, "cpu", self_test=False).packing == packed_stack.packing
