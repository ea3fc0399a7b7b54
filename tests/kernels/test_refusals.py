"""Bad input is refused before memory is read, in one line: what was found, what was expected, what to do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from percard.formats import layout
from percard.formats.spec import FormatError, QuantSpec
from percard.formats.tensor import QuantTensor
from percard.kernels import shapes
from percard.kernels.matmul_w4a8 import cases as w4a8_cases
from percard.kernels.matmul_w4a8 import matmul_w4a8
from percard.kernels.matmul_w4a16 import cases as w4a16_cases
from percard.kernels.matmul_w4a16 import matmul_w4a16
from percard.kernels.matmul_w8a8 import cases as w8a8_cases
from percard.kernels.matmul_w8a8 import matmul_w8a8
from percard.kernels.matmul_w8a16 import cases as w8a16_cases
from percard.kernels.matmul_w8a16 import matmul_w8a16
from percard.kernels.op import Op, Unsupported
from percard.kernels.quantize_rows import quantize_rows

W8A8 = w8a8_cases.inputs(shapes.small(3, 20, 96, "w8a8", bias=True), 0)
W4A16 = w4a16_cases.inputs(shapes.small(3, 20, 96, "w4a16-g32-asym", bias=True), 0)
W8A16 = w8a16_cases.inputs(shapes.small(3, 20, 96, "w8a16-g32-asym", bias=True), 0)
W4A8 = w4a8_cases.inputs(shapes.small(3, 20, 96, "w4a8-g32", bias=True), 0)


def flat(op: Op, args: tuple, **changes: Any) -> tuple:
    """The flat arguments with some changed, by the names in the schema."""
    names = [part.split()[-1] for part in op.contract.SCHEMA.split(")")[0].strip("(").split(",")]
    values = dict(zip(names, op.contract.unwrap(*args), strict=True)) | changes
    assert len(values) == len(names)
    return tuple(values.values())


def refused(op: Op, arguments: tuple, *parts: str) -> None:
    """ValueError from the torch op (which all callers pass), one line, with the op's name and these parts."""
    with pytest.raises(ValueError) as caught:
        op.torch_op(*arguments)
    text = str(caught.value)
    assert "\n" not in text
    for part in (op.name, *parts):
        assert part in text, text


@pytest.mark.parametrize(
    ("op", "args"),
    [(matmul_w8a8, W8A8), (matmul_w4a16, W4A16), (matmul_w8a16, W8A16), (matmul_w4a8, W4A8)],
    ids=lambda v: getattr(v, "name", ""),
)
def test_weights_that_do_not_fit(op: Op, args: tuple) -> None:
    w: QuantTensor = next(a for a in args if isinstance(a, QuantTensor))
    body = op.body("cpu")
    packed = layout.repack(w, body.packing or "")
    refused(op, flat(op, args, w=w.data[:, :-1]), "w is torch.int8 (20, 95)", "(20, 96)")
    refused(op, flat(op, args, w=w.data.float()), "w is torch.float32")
    refused(op, flat(op, args, w=w.data.T.contiguous().T), "not contiguous", ".contiguous()")
    refused(op, flat(op, args, scale=w.scale[1:]), "scale has shape (19,", "expected (20,")
    refused(op, flat(op, args, scale=w.scale.int()), "scale is torch.int32", "float")
    refused(op, flat(op, args, scale=w.scale.T.contiguous()), "scale has shape")
    refused(op, flat(op, args, packing="marlin"), "packing 'marlin' is unknown", "rows16_k4_w4")
    refused(op, flat(op, args, packing=body.packing), "bytes", "pack it again")
    assert body.packing
    small = flat(op, args, w=packed.data[..., :-1], scale=packed.scale, packing=body.packing)
    if "zero" in op.contract.SCHEMA:
        small = flat(op, args, w=packed.data[..., :-1], scale=packed.scale, zero=packed.zero, packing=body.packing)
    refused(op, small, "bytes, expected", "pack it again")
    refused(op, flat(op, args, bias=torch.zeros(19)), "bias is torch.float32 (19,)", "(20,)")
    refused(op, flat(op, args, bias=torch.zeros(20, dtype=torch.float16)), "bias is torch.float16", "float32")
    refused(op, flat(op, args, n=0, w=w.data[:0], scale=w.scale[:0]), "at least one row")


@pytest.mark.parametrize(
    ("op", "args"),
    [(matmul_w8a8, W8A8), (matmul_w4a16, W4A16), (matmul_w8a16, W8A16), (matmul_w4a8, W4A8)],
    ids=lambda v: getattr(v, "name", ""),
)
def test_activations_that_do_not_fit(op: Op, args: tuple) -> None:
    name = "x" if op in (matmul_w4a16, matmul_w8a16) else "xq"
    x = args[0]
    refused(op, flat(op, args, **{name: x[:, :-1]}), f"{name} has shape (3, 95)", "[M, 96]", "flatten")
    refused(op, flat(op, args, **{name: x.view(1, 3, 96)}), f"{name} has shape (1, 3, 96)")
    refused(op, flat(op, args, **{name: x.T.contiguous().T}), "contiguous last dimension", ".contiguous()")
    refused(op, flat(op, args, **{name: x.double()}), f"{name} is torch.float64")
    if name == "x":
        return
    refused(op, flat(op, args, xq=x.float()), "xq is torch.float32, expected int8", "quantize_rows")
    refused(op, flat(op, args, sx=args[1][:2]), "sx is torch.float32 (2,)", "(3,)")
    refused(op, flat(op, args, sx=args[1].half()), "sx is torch.float16")
    refused(op, flat(op, args, sx=torch.ones(6)[::2]), "contiguous")
    refused(op, flat(op, args, out_dtype=torch.int8), "out_dtype is torch.int8", "bfloat16")
    if op is matmul_w4a8:
        refused(op, flat(op, args, xsum=args[2].long()), "xsum is torch.int64", "quantize_rows")


@pytest.mark.parametrize(
    ("op", "args"),
    [(matmul_w8a8, W8A8), (matmul_w4a16, W4A16), (matmul_w8a16, W8A16), (matmul_w4a8, W4A8)],
    ids=lambda v: getattr(v, "name", ""),
)
def test_tensors_on_different_devices(op: Op, args: tuple) -> None:
    w: QuantTensor = next(a for a in args if isinstance(a, QuantTensor))
    with pytest.raises(ValueError, match="w is on meta, x on cpu; move one of them"):
        op.contract.check(*flat(op, args, w=w.data.to("meta")))
    with pytest.raises(ValueError, match="bias is on meta"):
        op.contract.check(*flat(op, args, bias=torch.zeros(20, device="meta")))


def test_int8_sums_have_a_largest_k() -> None:
    k = 132105
    xq, sx, xsum = torch.zeros(1, k, dtype=torch.int8), torch.ones(1), torch.zeros(1, dtype=torch.int32)
    for op, spec in ((matmul_w8a8, "w8a8"), (matmul_w4a8, "w4a8")):
        w = QuantTensor(
            torch.zeros(1, k, dtype=torch.int8), torch.ones(1, 1), None, QuantSpec.parse(spec), "plain", (1, k)
        )
        rows = (xq, sx) if op is matmul_w8a8 else (xq, sx, xsum)
        with pytest.raises(ValueError, match=r"K is 132105, expected at most 132104.*split the layer"):
            op(*rows, w, impl="reference")


def test_groups_that_do_not_fit() -> None:
    for op, args in ((matmul_w4a16, W4A16), (matmul_w8a16, W8A16), (matmul_w4a8, W4A8)):
        for group in (0, -32, 16, 24, 33, 64, 128):  # 96 = 3 * 32
            refused(op, flat(op, args, group=group), f"group is {group}", "(32, 64, 128)")
    refused(
        matmul_w4a16, flat(matmul_w4a16, W4A16, zero=torch.zeros(20, 1, dtype=torch.int8)), "zero is torch.int8 (20, 1)"
    )
    refused(matmul_w4a16, flat(matmul_w4a16, W4A16, zero=torch.zeros(20, 3)), "zero is torch.float32", "int8")


def test_the_wrong_spec_for_an_op() -> None:
    w8, w4 = W8A8[2], W4A16[1]
    with pytest.raises(
        ValueError,
        match="matmul_w8a8: the weight is w4a16-g32-asym, expected 8-bit symmetric codes with one scale per row",
    ):
        matmul_w8a8(*W8A8[:2], w4)
    with pytest.raises(
        ValueError, match=r"matmul_w4a16: the weight is w8a8, expected 4-bit codes; kernels.linear.linear"
    ):
        matmul_w4a16(W4A16[0], w8)
    with pytest.raises(ValueError, match="matmul_w8a16: the weight is w4a16-g32-asym, expected 8-bit codes"):
        matmul_w8a16(W8A16[0], w4)
    with pytest.raises(ValueError, match="matmul_w4a8: the weight is w4a16-g32-asym, expected 4-bit symmetric codes"):
        matmul_w4a8(*W4A8[:3], w4)
    per_group = replace(w8, spec=QuantSpec.parse("w8a16-g32"), scale=w8.scale.expand(-1, 3))
    with pytest.raises(ValueError, match="w8a16-g32, expected 8-bit symmetric codes with one scale per row"):
        matmul_w8a8(*W8A8[:2], per_group)


@pytest.mark.parametrize(
    ("op", "args", "wrong"),
    [
        (matmul_w8a8, W8A8, "rows8"),
        (matmul_w4a16, W4A16, "planes8_w4"),
        (matmul_w8a16, W8A16, "rows8"),
        (matmul_w4a8, W4A8, "planes16_w4"),
    ],
    ids=lambda v: getattr(v, "name", ""),
)
def test_a_packing_for_another_body_names_the_one_that_is_read(op: Op, args: tuple, wrong: str) -> None:
    packed = tuple(layout.repack(a, wrong) if isinstance(a, QuantTensor) else a for a in args)
    if wrong == "planes16_w4":
        packed = tuple(replace(a, scale=torch.zeros(4, 64)) if isinstance(a, QuantTensor) else a for a in packed)
    with pytest.raises(
        Unsupported,
        match=f"reference: reads a weight packed as plain, this one is {wrong}; pack it once with kernels.linear.prepare",
    ):
        op(*packed, impl="reference")
    with pytest.raises(Unsupported) as caught:
        op(*packed)
    assert "\n" not in str(caught.value) and caught.value.args[0].count(" | ") == 2
    lines = op.explain(*packed).splitlines()
    assert len(lines) == 3 and all("refuses: " in line for line in lines)


def test_quantize_rows_refuses() -> None:
    refused(quantize_rows, (torch.zeros(3),), "x has shape (3,)", "flatten")
    refused(quantize_rows, (torch.zeros(2, 2, 2),), "x has shape (2, 2, 2)")
    refused(quantize_rows, (torch.zeros(2, 2, dtype=torch.int32),), "x is torch.int32", "cast")
    refused(quantize_rows, (torch.zeros(2, 5).T.contiguous().T,), "contiguous")


def test_a_weight_in_activation_order_cannot_be_made() -> None:
    """Codes with g_idx keep their groups only in file order; there is no field to carry another one to a body."""
    with pytest.raises(TypeError):
        QuantTensor(
            *(getattr(W4A16[1], f) for f in ("data", "scale", "zero", "spec", "packing", "shape")),
            g_idx=torch.arange(96),
        )  # type: ignore[call-arg]
    with pytest.raises(FormatError, match="scale has shape"):
        replace(W4A16[1], scale=W4A16[1].scale[:, :2])
