"""SmoothQuant: the same function, outliers moved, an exponent that is searched and may be none."""

from __future__ import annotations

import pytest
import torch

from percard.formats import affine
from percard.formats.spec import QuantSpec
from percard.kernels.rows import quantize
from percard.quant.methods.records import LinearGroup, Stats, Transform
from percard.quant.methods.smoothquant import serves, smoothquant

W8A8 = QuantSpec.parse("w8a8")


def stats_of(x: torch.Tensor) -> Stats:
    mean = x.abs().mean(0) if len(x) else x.new_zeros(x.shape[1])
    most = x.abs().amax(0) if len(x) else x.new_zeros(x.shape[1])
    return Stats(x.T @ x, most, mean, x[:512], len(x))


def layer(outliers: float, k: int = 256, seed: int = 0) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(inputs [1024, k] with 4 channels `outliers` times as large, readers q, k, v)."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(1024, k, generator=random)
    x[:, torch.randperm(k, generator=random)[:4]] *= outliers
    rows = {"q": k, "k": k // 2, "v": k // 2}
    return x, {name: torch.randn(n, k, generator=random) * 0.02 for name, n in rows.items()}


def int8_output(x: torch.Tensor, w: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    codes, scale, _ = quantize(x)
    weight = affine.dequantize(affine.quantize(w, spec, torch.float32))
    return (codes.float() * scale[:, None]) @ weight.T


def error(x: torch.Tensor, readers: dict[str, torch.Tensor], spec: QuantSpec, scale: torch.Tensor) -> float:
    return sum(float((int8_output(x / scale, w * scale, spec) - x @ w.T).square().sum()) for w in readers.values())


def run(x: torch.Tensor, readers: dict[str, torch.Tensor], spec: QuantSpec = W8A8, **options: object) -> Transform:
    group = LinearGroup(readers, dict.fromkeys(readers, spec), stats_of(x))
    return smoothquant(group, spec, scale_dtype=torch.float32, **options)


@pytest.mark.parametrize("outliers", [30.0, 100.0])
def test_outlier_channels_recover_at_least_ninety_percent(outliers: float) -> None:
    x, readers = layer(outliers)
    fresh = layer(outliers)[0].roll(1, 0)  # same channels, other order: what the search did not see comes too
    found = run(x[:512], readers)
    clean = error(layer(1.0)[0], readers, W8A8, torch.ones(256))
    floor = clean * float((fresh @ readers["q"].T).square().mean() / (layer(1.0)[0] @ readers["q"].T).square().mean())
    plain, smooth = (error(fresh, readers, W8A8, s) for s in (torch.ones(256), found.scale))
    assert found.facts["alpha"] > 0
    assert smooth < 0.1 * plain, f"{1 - smooth / plain:.1%} of the error recovered"
    assert smooth < 3 * floor


@pytest.mark.parametrize("alpha", [None, 0.5, 0.9])
def test_the_function_stays_the_same(alpha: float | None) -> None:
    x, readers = layer(50.0)
    scale = run(x, readers, alpha=alpha).scale.double()
    for w in readers.values():
        torch.testing.assert_close(
            (x.double() / scale) @ (w.double() * scale).T, x.double() @ w.double().T, rtol=0, atol=1e-11
        )


def test_the_scale_is_the_papers_up_to_a_constant() -> None:
    x, readers = layer(30.0)
    got = run(x, readers, alpha=0.8).scale
    want = x.abs().amax(0) ** 0.8 / torch.cat(list(readers.values())).abs().amax(0) ** 0.2
    torch.testing.assert_close(got / want, (got / want)[:1].expand_as(got), rtol=1e-5, atol=0)
    assert float(got.log().mean()) == pytest.approx(0, abs=1e-5)


def test_no_candidate_beats_the_chosen_one_and_identity_is_among_them() -> None:
    x, readers = layer(60.0)
    found = run(x, readers, rows=1 << 20)
    errors = dict(found.facts["errors"])
    assert set(errors) == {"0", "0.5", "0.65", "0.8", "0.9", "refined"}
    assert (errors.pop("refined") < min(errors.values())) == found.facts["refined"]
    assert errors[f"{found.facts['alpha']:g}"] == min(errors.values())
    measured = error(x[:512], readers, W8A8, found.scale)
    signal = sum(float((x[:512] @ w.T).square().sum()) for w in readers.values())
    assert measured / signal == pytest.approx(min(found.facts["errors"].values()), rel=1e-2)


def test_identity_wins_where_smoothing_only_harms() -> None:
    x, readers = layer(1.0)
    for w in readers.values():  # all of the difficulty is in the weights, and large inputs meet large weights
        w[:, :4] *= 100
    x[:, :4] *= 3
    found = run(x, readers, grid=(0.9,), refine=0)
    assert found.facts["alpha"] == 0.0
    assert torch.equal(found.scale, torch.ones(256))


def test_alpha_zero_is_the_identity() -> None:
    x, readers = layer(30.0)
    assert torch.equal(run(x, readers, alpha=0.0).scale, torch.ones(256))


def test_four_bit_weights_take_less_of_the_outliers() -> None:
    x, readers = layer(30.0)
    four = run(x, readers, QuantSpec.parse("w4a8-g128"))
    eight = run(x, readers)
    assert four.facts["alpha"] <= eight.facts["alpha"]
    spec = QuantSpec.parse("w4a8-g128")
    assert error(x, readers, spec, four.scale) <= error(x, readers, spec, torch.ones(256))


def test_unseen_channels_keep_their_scale_and_no_tokens_mean_identity() -> None:
    x, readers = layer(30.0)
    x[:, 7] = 0
    found = run(x, readers)
    assert found.facts["unseen"] == 1
    assert found.scale[7] == 1
    assert bool((torch.isfinite(found.scale) & (found.scale > 0)).all())
    nothing = run(x[:0], readers)
    assert torch.equal(nothing.scale, torch.ones(256))
    assert "no token" in nothing.facts["why"]


def test_readers_without_a_spec_are_no_reason_to_scale() -> None:
    x, readers = layer(30.0)
    group = LinearGroup(readers, {}, stats_of(x))
    found = smoothquant(group, W8A8, scale_dtype=torch.float32)
    assert torch.equal(found.scale, torch.ones(256))
    assert found.facts["why"] == "no reader is quantised"
    router = LinearGroup({**readers, "gate": torch.full((8, 256), 1e6)}, dict.fromkeys(readers, W8A8), stats_of(x))
    assert torch.equal(smoothquant(router, W8A8, scale_dtype=torch.float32).scale, run(x, readers).scale)


def test_serves() -> None:
    assert serves(W8A8) is None
    assert serves(QuantSpec.parse("w4a8-g128")) is None
    assert "take awq" in str(serves(QuantSpec.parse("w4a16-g128")))
    assert "float" in str(serves(QuantSpec.parse("fp8-dynamic")))
