"""HQQ: never worse than RTN in its own norm, whole zeros within the codes, and refusals that say why."""

from __future__ import annotations

import math

import pytest
import torch

from percard.formats import affine
from percard.formats.spec import FormatError, QuantSpec
from percard.formats.tensor import QuantTensor
from percard.quant.methods.hqq import hqq, serves
from percard.quant.methods.records import Rounded
from percard.quant.methods.rtn import rtn

SPECS = (
    "w4a16-g32", "w4a16-g64", "w4a16-g128", "w4a16", "w4a16-g64-asym", "w4a16-g128-asym", "w4a16-asym", "w3a16-g64",
    "w3a16-g128", "w8a8", "w8a16", "w8a16-g128", "w8a16-g64-asym",
)  # fmt: skip
BF16 = torch.bfloat16


def weight(n: int = 40, k: int = 256, seed: int = 0, shift: float = 0.0) -> torch.Tensor:
    """Normal weights, some of them far out, and if asked all of them shifted."""
    random = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=random)
    w[torch.rand(n, k, generator=random) < 0.01] *= 5
    return (w + shift) * 0.02


def run(w: torch.Tensor, spec: str, **options: object) -> Rounded:
    its = QuantSpec.parse(spec)
    return hqq(w, None, its, scale_dtype=affine.scale_dtype_of(its, BF16), **options)


def errors(w: torch.Tensor, tensor: QuantTensor, norm: float = 0.7) -> torch.Tensor:
    """sum |error|^norm of every group."""
    error = (affine.dequantize(tensor) - w).abs().double().pow(norm)
    return error.reshape(*tensor.scale.shape, -1).sum(2)


@pytest.mark.parametrize("shift", [0.0, 0.7])
@pytest.mark.parametrize("spec", SPECS)
def test_no_group_is_worse_than_rounded_to_nearest(spec: str, shift: float) -> None:
    w = weight(shift=shift)
    found = run(w, spec)
    its, dtype = found.tensor.spec, found.tensor.scale.dtype
    for search in (False, True):
        nearest = rtn(w, None, its, scale_dtype=dtype, search=search).tensor
        assert bool((errors(w, found.tensor) <= errors(w, nearest) * (1 + 1e-5)).all())
    assert found.facts["error"] == pytest.approx(float(errors(w, found.tensor).sum()), rel=1e-4)


@pytest.mark.parametrize("spec", [s for s in SPECS if s.startswith(("w3", "w4"))])
def test_it_gains_where_there_is_something_to_gain(spec: str) -> None:
    found = run(weight(shift=0.3), spec)
    assert found.facts["error"] < 0.995 * found.facts["error_start"]


@pytest.mark.parametrize("spec", [s for s in SPECS if s.endswith("-asym")])
def test_zeros_are_whole_and_within_the_codes(spec: str) -> None:
    w = torch.cat([weight(shift=s) for s in (-40.0, -1.0, 0.0, 1.0, 40.0)])
    tensor = run(w, spec).tensor
    assert tensor.zero is not None and tensor.zero.dtype == torch.int8
    assert int(tensor.zero.min()) >= tensor.spec.qmin and int(tensor.zero.max()) <= tensor.spec.qmax


def test_the_zero_moves_when_that_is_better() -> None:
    w = weight(n=200, shift=0.5)
    before = affine.find_scales(w, QuantSpec.parse("w4a16-g64-asym"))[1]
    assert (run(w, "w4a16-g64-asym").tensor.zero != before).float().mean() > 0.02


@pytest.mark.parametrize("spec", SPECS)
def test_codes_are_the_encoding_of_what_is_stored(spec: str) -> None:
    w = weight()
    tensor = run(w, spec).tensor
    assert tensor.scale.dtype == affine.scale_dtype_of(tensor.spec, BF16)
    assert torch.equal(tensor.data, affine.encode(w, tensor.scale, tensor.zero, tensor.spec))


@pytest.mark.parametrize("spec", ["w4a16-g64", "w4a16-g64-asym", "w8a8"])
def test_rows_stand_alone_and_every_run_is_the_same(spec: str) -> None:
    w = weight(n=1000)  # several chunks
    whole = run(w, spec).tensor
    again = run(w, spec).tensor
    parts = [run(w[a:b], spec).tensor for a, b in ((0, 1), (1, 300), (300, 1000))]
    for tensors in ([again], parts):
        assert torch.equal(whole.data, torch.cat([t.data for t in tensors]))
        assert torch.equal(whole.scale, torch.cat([t.scale for t in tensors]))


@pytest.mark.parametrize("spec", ["w4a16-g64", "w4a16-g64-asym"])
def test_twice_the_weight_has_the_same_codes(spec: str) -> None:
    w = weight()
    a, b = run(w, spec).tensor, run(w * 2.0**-6, spec).tensor
    assert torch.equal(a.data, b.data) and torch.equal(a.scale * 2.0**-6, b.scale)


@pytest.mark.parametrize("spec", ["w4a16-g64", "w4a16-g64-asym", "w8a8"])
def test_zeros_constants_and_no_rows(spec: str) -> None:
    w = torch.zeros(3, 128)
    w[1] = 0.5
    w[2, 5] = -3.0
    value = affine.dequantize(run(w, spec).tensor)
    assert not value[0].any() and torch.isfinite(value).all()
    assert torch.allclose(value[1], w[1], rtol=0.15) and abs(float(value[2, 5]) + 3.0) < 0.3
    assert run(torch.zeros(0, 128), spec).tensor.shape == (0, 128)


@pytest.mark.parametrize("spec", ["w4a8", "w4a8-g128", "fp8-dynamic"])
def test_specs_that_it_cannot_give_are_refused_with_a_reason(spec: str) -> None:
    why = serves(QuantSpec.parse(spec))
    assert why is not None and spec in why
    with pytest.raises(FormatError, match=spec):
        run(weight(), spec)


def test_every_other_spec_is_served() -> None:
    assert [spec for spec in SPECS if serves(QuantSpec.parse(spec)) is not None] == []


def test_bad_weights_are_refused() -> None:
    for value in (math.nan, math.inf):
        w = weight()
        w[3, 70] = value
        with pytest.raises(FormatError, match="NaN or Inf"):
            run(w, "w4a16-g64")
    with pytest.raises(FormatError):
        run(weight(k=96), "w4a16-g64")
