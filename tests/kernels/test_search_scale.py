"""search_scale: the grid is really searched, and every body reaches the reference's error."""

from __future__ import annotations

import pytest
import torch

from percard.formats import affine
from percard.formats.spec import QuantSpec
from percard.kernels.op import Unsupported
from percard.kernels.search_scale import cases, contract, reference, search_scale


def error_of(w: torch.Tensor, scale: torch.Tensor, spec: QuantSpec, dtype: torch.dtype, norm: float) -> torch.Tensor:
    """sum |dequantised - w|^norm of every group, in fp64, by formats/affine."""
    zero = None if spec.symmetric else affine.find_scales(w, spec, dtype)[1]
    value = affine.decode(affine.encode(w, scale, zero, spec), scale, zero, spec)
    return (value.double() - w).abs().pow(norm).reshape(*scale.shape, w.shape[1] // scale.shape[1]).sum(2)


@pytest.mark.parametrize("case", cases.SMALL, ids=lambda c: c.name)
def test_cpu_reaches_the_error_of_the_reference(case: cases.Case) -> None:
    w, spec, dtype, norm = cases.inputs(case, seed=3)
    try:
        found = search_scale(w, spec, dtype, norm, impl="cpu")
    except Unsupported as error:
        pytest.skip(str(error))
    wanted = search_scale(w, spec, dtype, norm, impl="reference")
    flat = contract.unwrap(w, spec, dtype, norm)
    assert found.shape == wanted.shape and found.dtype == dtype and bool((found > 0).all())
    mine, theirs = error_of(w, found, spec, dtype, norm), error_of(w, wanted, spec, dtype, norm)
    assert bool((mine <= theirs * (1 + contract.tolerance(*flat)["loss_rtol"]) + 1e-30).all())


@pytest.mark.parametrize("name", ["w4a16-g32", "w4a16-g32-asym", "w3a16-g64", "w8a8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_reference_is_the_best_of_the_grid(name: str, dtype: torch.dtype) -> None:
    spec = QuantSpec.parse(name)
    w = torch.randn(3, 128, generator=torch.Generator().manual_seed(5))
    w[1, 7] = 9.0
    got = search_scale(w, spec, dtype, impl="reference")
    widest = reference.start_of(w.reshape(-1, spec.group or 128), spec.weight_bits, spec.symmetric, dtype)[0]
    grid = [(widest * (1 - i / 100)).reshape(got.shape).to(dtype) for i in range(80)]
    errors = torch.stack([error_of(w, s, spec, dtype, 2.0) for s in grid])
    assert torch.allclose(error_of(w, got, spec, dtype, 2.0), errors.amin(0), rtol=1e-5)
    plain, _ = affine.find_scales(w, spec, dtype)
    assert bool((error_of(w, got, spec, dtype, 2.0) <= error_of(w, plain, spec, dtype, 2.0) * (1 + 1e-5)).all())


def test_an_outlier_is_clipped_and_zeros_have_scale_one() -> None:
    spec = QuantSpec.parse("w4a16-g128")
    w = torch.randn(2, 128, generator=torch.Generator().manual_seed(1))
    w[0, 5] = 6.0
    w[1] = 0
    scale = search_scale(w, spec, torch.float32, impl="reference")
    assert float(scale[0, 0]) < 6.0 / 7.5 and float(scale[1, 0]) == 1.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tiny_and_huge_weights_get_scales_that_can_be_stored(dtype: torch.dtype) -> None:
    spec = QuantSpec.parse("w4a16-g32")
    for size in (1e-38, 1e-8, 1e4):
        w = torch.linspace(-1, 1, 64).reshape(2, 32) * size
        scale = search_scale(w, spec, dtype, impl="reference")
        assert bool(torch.isfinite(scale).all()) and bool((scale > 0).all())


def test_rows_with_a_stride() -> None:
    spec = QuantSpec.parse("w4a16-g32")
    wide = torch.randn(6, 128, generator=torch.Generator().manual_seed(2))
    part = wide[::2, 32:96]
    for impl in ("reference", "cpu"):
        try:
            got = search_scale(part, spec, torch.bfloat16, impl=impl)
        except Unsupported:
            continue
        assert torch.equal(got, search_scale(part.contiguous(), spec, torch.bfloat16, impl=impl))


@pytest.mark.parametrize(
    ("w", "spec", "norm", "says"),
    [
        (torch.ones(4, 32, dtype=torch.bfloat16), "w4a16-g32", 2.0, "expected float32"),
        (torch.ones(4), "w4a16", 2.0, "expected float32 [N, K]"),
        (torch.ones(4, 48), "w4a16-g32", 2.0, "multiple of the group 32"),
        (torch.ones(4, 32), "w4a16-g32", 0.1, "norm is 0.1"),
        (torch.ones(4, 32), "fp8-dynamic", 2.0, "no integer codes"),
    ],
)
def test_bad_arguments(w: torch.Tensor, spec: str, norm: float, says: str) -> None:
    with pytest.raises(ValueError) as caught:
        search_scale(w, QuantSpec.parse(spec), torch.bfloat16, norm, impl="reference")
    assert says in str(caught.value)
