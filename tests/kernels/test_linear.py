"""linear, prepare and QuantLinear: the way from a plain weight to the body that serves."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from percard.formats import affine, layout
from percard.formats.spec import QuantSpec
from percard.formats.tensor import QuantTensor
from percard.kernels.linear import NOT_YET, ROUTES, QuantLinear, linear, linear_quantized, ops_of, prepare, quantizes
from percard.kernels.op import Unsupported
from percard.kernels.quantize_rows import quantize_rows

SPECS = ("w8a8", "w8a16", "w8a16-g64-asym", "w4a16", "w4a16-g64", "w4a16-g32-asym", "w4a8", "w4a8-g64")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def impls() -> list:
    """ "reference", and None (what this machine takes by itself) where a body is built."""
    missing = ops_of(QuantSpec.parse("w8a8"))[1].body("cpu").absent("cpu")
    return [
        "reference",
        pytest.param(None, marks=pytest.mark.skipif(missing is not None, reason=missing or ""), id="cpu"),
    ]


def plain(spec: str, n: int = 37, k: int = 192) -> QuantTensor:
    return affine.quantize(torch.randn(n, k) / k**0.5, QuantSpec.parse(spec))


def loss(got: torch.Tensor, want: torch.Tensor) -> float:
    got, want = got.detach().float(), want.detach().float()
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("impl", impls())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS)
def test_linear_is_x_times_the_dequantized_weight(spec: str, dtype: torch.dtype, impl: str | None) -> None:
    w, bias, x = plain(spec), torch.randn(37), torch.randn(2, 5, 192).to(dtype)
    want = nn.functional.linear(x.float(), affine.dequantize(w), bias)
    y = linear(x, prepare(w, "cpu", impl), bias, impl=impl)
    assert y.shape == (2, 5, 37) and y.dtype == dtype
    assert loss(y, want) < (0.012 if "a8" in spec else 0.004)


@pytest.mark.parametrize("impl", impls())
@pytest.mark.parametrize("spec", SPECS)
def test_leading_dimensions_and_strides(spec: str, impl: str | None) -> None:
    w = prepare(plain(spec), "cpu", impl)
    x = torch.randn(6, 192)
    y = linear(x, w, impl=impl)
    assert torch.equal(linear(x.view(3, 2, 192), w, impl=impl), y.view(3, 2, 37))
    assert torch.equal(linear(x[0], w, impl=impl), linear(x[:1], w, impl=impl)[0])
    wide = torch.randn(3, 4, 400)
    wide[:, ::2, 7:199] = x.view(3, 2, 192)
    assert torch.equal(linear(wide[:, ::2, 7:199], w, impl=impl), y.view(3, 2, 37))
    assert torch.equal(linear(x.T.contiguous().T, w, impl=impl), y)
    spread = x[:2].view(2, 1, 192).expand(2, 3, 192)  # rows of stride 0
    assert torch.equal(linear(spread, w, impl=impl), linear(spread.contiguous(), w, impl=impl))
    for empty in ((0, 192), (0, 3, 192), (2, 0, 192)):
        assert linear(torch.randn(empty), w, impl=impl).shape == (*empty[:-1], 37)


def test_a_plain_tensor_goes_to_torch() -> None:
    x, w, bias = torch.randn(2, 3, 8), torch.randn(5, 8), torch.randn(5)
    assert torch.equal(linear(x, w, bias), nn.functional.linear(x, w, bias))


def test_prepare_packs_for_the_body_that_serves() -> None:
    for spec in SPECS:
        w = plain(spec)
        assert prepare(w, "cpu", "reference") is w
        body = ops_of(w.spec)[-1].body("cpu")
        if body.absent("cpu") is not None:
            with pytest.raises(Unsupported, match=r"percard\._cpu"):
                prepare(w, "cpu")
            continue
        packed = prepare(w, "cpu")
        assert packed.packing == body.packing
        assert prepare(packed, "cpu") is packed
        assert torch.equal(layout.repack(packed, "plain").data, w.data)
        back = prepare(packed, "cpu", "reference")
        assert back.packing == "plain" and torch.equal(back.data, w.data)


def test_a_weight_that_nobody_packed_is_refused_with_the_remedy() -> None:
    for spec in SPECS:
        with pytest.raises(Unsupported, match=r"prepare|does not load") as caught:
            linear(torch.randn(2, 192), plain(spec))
        assert "impl='reference'" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("spec", ["w3a16-g64", "fp8-dynamic", "fp8-block", "mxfp4"])
def test_specs_without_an_op_say_what_to_take_instead(spec: str) -> None:
    parsed = QuantSpec.parse(spec)
    with pytest.raises(Unsupported, match=r"linear: .*quantize") as caught:
        ops_of(parsed)
    assert spec in str(caught.value)
    w = QuantTensor(torch.zeros(4, 128, dtype=torch.int8), torch.ones(4, 1), None, parsed, "somehow", (4, 128))
    with pytest.raises(Unsupported, match="w4a16-g"):
        linear(torch.zeros(1, 128), w)
    with pytest.raises(Unsupported):
        prepare(w, "cpu")


def test_every_integer_spec_is_routed_or_listed_as_not_yet() -> None:
    for bits in (3, 4, 8):
        for act in (8, 16):
            if (bits, act) != (3, 8):  # not a spec
                assert ((bits, act) in ROUTES) != ((bits, act) in NOT_YET)


def test_wrong_k_names_both_sizes() -> None:
    with pytest.raises(
        ValueError, match=r"linear: x has shape \(2, 191\), expected \[\.\.\., 192\] for a weight \[37, 192\]"
    ):
        linear(torch.randn(2, 191), plain("w8a8"), impl="reference")


@pytest.mark.parametrize("impl", impls())
@pytest.mark.parametrize("spec", SPECS)
def test_quant_linear(spec: str, impl: str | None) -> None:
    layer = nn.Linear(192, 37)
    mine = QuantLinear.from_linear(layer, spec, impl=impl)
    x = torch.randn(2, 3, 192)
    assert loss(mine(x), layer(x)) < (0.02 if spec.startswith("w8") else 0.15)
    assert torch.equal(mine(x), linear(x, mine.weight, layer.bias, impl=impl))
    assert f"192 -> 37, {spec} as {mine.packing}, bias" in repr(mine)
    assert not list(mine.parameters())
    weight = affine.quantize(
        layer.weight.detach(), QuantSpec.parse(spec), affine.scale_dtype_of(QuantSpec.parse(spec), torch.float32)
    )
    assert torch.equal(QuantLinear.from_plain(weight, layer.bias, impl=impl)(x), mine(x))
    bare = QuantLinear.from_plain(weight, impl=impl)
    assert "bias" not in repr(bare) and loss(bare(x) + layer.bias, mine(x)) < 1e-5
    assert torch.equal(copy.deepcopy(mine)(x), mine(x))


@pytest.mark.parametrize("impl", impls())
@pytest.mark.parametrize("spec", SPECS)
def test_state_dict_goes_round_and_onto_a_machine_with_other_bodies(spec: str, impl: str | None) -> None:
    x = torch.randn(4, 192)
    first, second = (nn.Sequential(QuantLinear.from_linear(nn.Linear(192, 37), spec, impl=impl)) for _ in range(2))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert state["0.codes"].shape == (37, 192)
    assert not torch.equal(first(x), second(x))
    second.load_state_dict(state)
    assert torch.equal(first(x), second(x))
    reference = nn.Sequential(QuantLinear.from_linear(nn.Linear(192, 37), spec, impl="reference"))
    reference.load_state_dict(state)
    assert loss(reference(x), first(x)) < 1e-5


def test_a_state_dict_that_does_not_fit_is_refused() -> None:
    mine = QuantLinear.from_linear(nn.Linear(192, 37), "w4a16-g64-asym", impl="reference")
    state = mine.state_dict()
    with pytest.raises(RuntimeError, match=r"Missing key.*zero"):
        mine.load_state_dict({k: v for k, v in state.items() if k != "zero"})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*g_idx"):
        mine.load_state_dict(state | {"g_idx": torch.zeros(192)})
    with pytest.raises(RuntimeError, match=r"scale has shape \(37, 1\), expected \(37, 3\)"):
        mine.load_state_dict(state | {"scale": torch.ones(37, 1)})
    with pytest.raises(RuntimeError, match=r"codes are torch.int8 \(36, 192\)"):
        mine.load_state_dict(state | {"codes": state["codes"][1:]})
    with pytest.raises(RuntimeError, match=r"bias has shape \(1,\)"):
        mine.load_state_dict(state | {"bias": torch.zeros(1)})


def test_a_change_of_dtype_leaves_the_weight_alone() -> None:
    mine = nn.Sequential(QuantLinear.from_linear(nn.Linear(192, 37), "w8a8", impl="reference"), nn.Linear(37, 2))
    scale = mine[0].scale.clone()
    mine.to(torch.bfloat16)
    assert mine[1].weight.dtype == torch.bfloat16
    assert mine[0].scale.dtype == torch.float32 and torch.equal(mine[0].scale, scale)
    assert mine(torch.randn(3, 192, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("impl", impls())
@pytest.mark.parametrize("spec", ["w8a8", "w4a16-g32-asym", "w4a8-g64"])
def test_compile_finds_no_graph_break(spec: str, impl: str | None) -> None:
    model = nn.Sequential(QuantLinear.from_linear(nn.Linear(192, 128), spec, impl=impl), nn.GELU())
    x = torch.randn(2, 3, 192)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert loss(compiled(x), model(x)) < 1e-6
    assert compiled(torch.randn(7, 192)).shape == (7, 128)
    w, bias = model[0].weight, torch.randn(128)
    torch._dynamo.reset()
    function = torch.compile(lambda x: linear(x, w, bias, impl=impl) + 1, fullgraph=True, backend="aot_eager")
    assert loss(function(x), linear(x, w, bias, impl=impl) + 1) < 1e-6


@pytest.mark.full  # half a minute of C++ compiler
@pytest.mark.parametrize("impl", impls())
def test_compile_to_code_of_the_machine(impl: str | None) -> None:
    model = nn.Sequential(QuantLinear.from_linear(nn.Linear(64, 32), "w4a8", impl=impl), nn.ReLU())
    x = torch.randn(3, 64)
    torch._dynamo.reset()
    with torch.inference_mode():
        assert loss(torch.compile(model, fullgraph=True)(x), model(x)) < 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("spec", SPECS)
def test_moving_to_a_card_packs_again(spec: str) -> None:
    here = QuantLinear.from_linear(nn.Linear(192, 37), spec, impl="reference")
    there = copy.deepcopy(here)
    there.impl = None
    there.to("cuda")
    x = torch.randn(5, 192, dtype=torch.bfloat16)
    assert there.packing == ops_of(there.spec)[-1].body("triton").packing
    assert there.bias is not None and there.bias.is_cuda
    assert loss(there(x.cuda()).cpu(), here(x)) < 1e-2


@pytest.mark.parametrize("impl", impls())
@pytest.mark.parametrize("spec", ["w8a8", "w4a8", "w4a8-g64"])
def test_rows_that_a_producer_made_int8_give_what_linear_gives(spec: str, impl: str | None) -> None:
    x, bias, w = torch.randn(20, 192), torch.randn(40), prepare(plain(spec, 40), "cpu", impl)
    assert quantizes(x, w, impl="reference") and not quantizes(x, torch.randn(40, 192))
    y = linear_quantized(quantize_rows(x, impl=impl), w, bias, torch.float32, impl=impl)
    assert torch.equal(y, linear(x, w, bias, impl=impl))


def test_rows_that_are_int8_are_refused_by_a_weight_that_wants_them_as_they_are() -> None:
    w = plain("w4a16-g64", 8, 64)
    assert not quantizes(torch.randn(2, 64), w, impl="reference")
    with pytest.raises(Unsupported, match="w4a16-g64 multiplies rows as they are, these are int8; call linear"):
        linear_quantized(quantize_rows(torch.randn(2, 64), impl="reference"), w, impl="reference")
