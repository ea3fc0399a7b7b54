"""GPTQ: held against forty lines of float64 that follow the paper, with an explicit inverse, column by column."""

from __future__ import annotations

import math

import pytest
import torch

from percard.formats import affine
from percard.formats.spec import FormatError, QuantSpec
from percard.quant.methods.gptq import OPTIONS, correct, gptq, loss_of, prepare, serves
from percard.quant.methods.records import Rounded, Stats
from percard.quant.methods.rtn import rtn

SPECS = (
    "w4a16-g32", "w4a16-g64", "w4a16-g128", "w4a16-g32-asym", "w4a16-g128-asym", "w3a16-g64", "w3a16-g128", "w8a8",
    "w8a16", "w8a16-g128", "w4a8-g128", "w4a8",
)  # fmt: skip
BF16 = torch.bfloat16


def stats_of(x: torch.Tensor) -> Stats:
    size = x.abs() if len(x) else x.new_zeros(1, x.shape[1])
    return Stats(x.T @ x, size.amax(0), size.mean(0), x[:512], len(x))


def case(n: int = 48, k: int = 256, tokens: int = 600, seed: int = 0) -> tuple[torch.Tensor, Stats]:
    """A weight [n, k], and inputs that share directions and differ in size, as those of a language model do."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, k, generator=random) + torch.randn(tokens, 8, generator=random) @ torch.randn(
        8, k, generator=random
    )
    x *= torch.rand(k, generator=random) * 3 + 0.1
    return torch.randn(n, k, generator=random) * 0.05, stats_of(x)


def run(w: torch.Tensor, stats: Stats, spec: str, **options: object) -> Rounded:
    its = QuantSpec.parse(spec)
    return gptq(w, stats, its, scale_dtype=affine.scale_dtype_of(its, BF16), **options)


def damped(damp: float, stats: Stats, columns: int | None = None) -> float:
    """What a damp becomes with these tokens."""
    return damp * (1 + 8 * (columns or stats.gram.shape[0]) / stats.tokens)


def by_the_paper(
    w: torch.Tensor, stats: Stats, spec: QuantSpec, damp: float, order: str = "static"
) -> tuple[torch.Tensor, float]:
    """(codes int8, tr(dW H dW^T) / 2) of GPTQ with scales from the largest weights, all in float64."""
    dtype = affine.scale_dtype_of(spec, BF16)
    h = 2 * stats.gram.double() / stats.tokens
    w = w.clone()
    dead = h.diagonal() == 0
    h[dead, dead] = 1.0
    w[:, dead] = 0
    if spec.act_bits == 8 and spec.group:
        scale, zero = affine.two_level_scales(w, spec, dtype), None
    else:
        scale, zero = affine.find_scales(w, spec, dtype)
    damped = h + damp * h.diagonal()[~dead].mean() * torch.eye(len(h), dtype=torch.float64)
    damped[dead, dead] = 1.0
    places = h.diagonal().masked_fill(dead, 0).argsort(descending=True, stable=True)
    if order == "none":
        places = torch.arange(len(h))
    u = torch.linalg.cholesky(torch.linalg.inv(damped[places][:, places]), upper=True)
    left, size = w.double()[:, places], w.shape[1] // scale.shape[1]
    codes = torch.empty(w.shape, dtype=torch.int8)
    for i, column in enumerate(places.tolist()):
        s = scale[:, column // size].double()
        z = 0 if zero is None else zero[:, column // size].double()
        q = (left[:, i] / s + z).clamp(spec.qmin, spec.qmax).round()
        codes[:, column] = q.to(torch.int8)
        error = (left[:, i] - (q - z) * s) / u[i, i]
        left[:, i:] -= error[:, None] * u[i, i:]
    d = affine.decode(codes, scale, zero, spec).double() - w
    return codes, float(((d @ h) * d).sum()) / 2


@pytest.mark.parametrize("order", ["static", "none"])
@pytest.mark.parametrize("spec", SPECS)
def test_codes_and_loss_are_those_of_the_paper(spec: str, order: str) -> None:
    w, stats = case()
    codes, loss = by_the_paper(w, stats, QuantSpec.parse(spec), damped(0.01, stats), order)
    found = run(w, stats, spec, scales="absmax", order=order)
    assert (found.tensor.data == codes).float().mean() > 0.995
    assert float(found.facts["loss"].sum()) == pytest.approx(loss, rel=1e-3)


@pytest.mark.parametrize(("spec", "k"), [("w4a16-g32", 160), ("w4a16-g64-asym", 192), ("w3a16-g64", 320), ("w8a8", 72)])
@pytest.mark.parametrize("block", [1, 100, 128, 4096])
def test_sizes_that_no_block_divides(spec: str, k: int, block: int) -> None:
    w, stats = case(n=16, k=k)
    codes, loss = by_the_paper(w, stats, QuantSpec.parse(spec), damped(0.01, stats))
    found = run(w, stats, spec, scales="absmax", block=block)
    assert (found.tensor.data == codes).float().mean() > 0.995
    assert float(found.facts["loss"].sum()) == pytest.approx(loss, rel=1e-3)


@pytest.mark.parametrize("scales", ["absmax", "mse", "weighted"])
@pytest.mark.parametrize("spec", SPECS)
def test_loss_is_what_the_codes_cost_and_below_that_of_nearest(spec: str, scales: str) -> None:
    w, stats = case(seed=1)
    its = QuantSpec.parse(spec)
    found = run(w, stats, spec, scales=scales)
    assert torch.allclose(found.facts["loss"], loss_of(w, found.tensor, stats), rtol=2e-3, atol=1e-7)
    nearest = rtn(w, None, its, scale_dtype=affine.scale_dtype_of(its, BF16)).tensor
    assert found.facts["loss"].sum() < 0.5 * loss_of(w, nearest, stats).sum()
    error = affine.dequantize(found.tensor) - w
    assert found.facts["noise"] == pytest.approx(float(error.square().sum()), rel=1e-4)


@pytest.mark.parametrize("spec", ["w3a16-g64", "w4a16-g64", "w4a16-g128-asym", "w4a8"])
def test_scales_weighted_by_what_errors_cost_beat_the_largest_weight(spec: str) -> None:
    loss = {
        scales: sum(float(run(*case(seed=seed), spec, scales=scales).facts["loss"].sum()) for seed in range(4))
        for scales in ("absmax", "weighted")
    }
    assert loss["weighted"] < 0.99 * loss["absmax"]
    assert OPTIONS["scales"].default == "weighted"


@pytest.mark.parametrize("spec", ["w3a16-g64", "w4a16-g128", "w4a16-g128-asym", "w4a8", "w4a8-g128", "w8a8"])
def test_scales_follow_the_channels_that_carry_outliers(spec: str) -> None:
    """Some channels of every language model are far larger than the rest; the loss is of inputs not seen before."""
    random = torch.Generator().manual_seed(0)
    size = torch.rand(256, generator=random) + 0.1
    size[torch.randperm(256, generator=random)[:3]] *= 50
    mix = torch.randn(16, 256, generator=random)
    seen, fresh = (
        stats_of((torch.randn(n, 256, generator=random) + torch.randn(n, 16, generator=random) @ mix) * size)
        for n in (600, 2000)
    )
    w = torch.randn(64, 256, generator=random) * 0.02
    w[torch.rand(64, 256, generator=random) < 0.003] *= 5
    loss = {s: float(loss_of(w, run(w, seen, spec, scales=s).tensor, fresh).sum()) for s in ("absmax", "weighted")}
    assert loss["weighted"] < (0.9 if spec == "w8a8" else 0.65) * loss["absmax"]


@pytest.mark.parametrize("scales", ["absmax", "mse", "weighted"])
@pytest.mark.parametrize("spec", ["w4a16-g64", "w4a16-g64-asym", "w4a8-g128", "w8a16"])
def test_bound_is_what_scales_cover(spec: str, scales: str) -> None:
    w, stats = case()
    its = QuantSpec.parse(spec)
    groups = its.groups(w.shape[1])
    bound = w.reshape(w.shape[0], groups, -1).abs().amax(2) * 0.6
    found = run(w, stats, spec, bound=bound, scales=scales).tensor
    reach = bound * (2.0 if not its.symmetric else 1.0) / ((2**its.weight_bits - 1) / 2)
    slack = 1.5 if spec == "w4a8-g128" else 1.01  # two-level scales are whole multiples
    assert bool((found.scale.float() <= reach * slack).all())
    free = run(w, stats, spec, scales=scales).tensor
    assert float(found.scale.float().mean()) < 0.95 * float(free.scale.float().mean())
    loose = run(w, stats, spec, bound=bound * 100, scales=scales).tensor
    assert torch.equal(loose.data, free.data) and torch.equal(loose.scale, free.scale)


def test_prepared_says_the_same_as_not_prepared() -> None:
    w, stats = case()
    for options in ({}, {"damp": 0.05, "order": "none"}):
        once = prepare(stats, **options)
        a = run(w, stats, "w4a16-g64", prepared=once, **options)
        b = run(w, stats, "w4a16-g64", **options)
        assert torch.equal(a.tensor.data, b.tensor.data) and torch.equal(a.facts["loss"], b.facts["loss"])
        assert torch.equal(a.tensor.scale, b.tensor.scale) and a.facts["damp"] == damped(
            options.get("damp", 0.01), stats
        )


def test_same_bits_on_every_run_and_inputs_stay_as_they_were() -> None:
    w, stats = case(n=130, k=384)
    before = w.clone(), stats.gram.clone()
    first, second = run(w, stats, "w4a16-g128"), run(w.clone(), stats, "w4a16-g128")
    assert torch.equal(first.tensor.data, second.tensor.data) and torch.equal(first.tensor.scale, second.tensor.scale)
    assert torch.equal(first.facts["loss"], second.facts["loss"])
    assert torch.equal(w, before[0]) and torch.equal(stats.gram, before[1])


def test_stacked_rows_are_the_rows_alone_but_for_roundoff() -> None:
    w, stats = case(n=96)
    whole = run(w, stats, "w4a16-g64")
    parts = [run(w[a:b], stats, "w4a16-g64") for a, b in ((0, 1), (1, 40), (40, 96))]
    assert torch.equal(whole.tensor.scale, torch.cat([p.tensor.scale for p in parts]))
    assert (whole.tensor.data == torch.cat([p.tensor.data for p in parts])).float().mean() > 0.999
    loss = torch.cat([p.facts["loss"] for p in parts])
    assert float(whole.facts["loss"].sum()) == pytest.approx(float(loss.sum()), rel=1e-3)


def test_order_does_not_matter_where_all_columns_weigh_the_same() -> None:
    w, stats = case()
    gram = stats.gram / stats.gram.diagonal().sqrt()
    gram = gram / stats.gram.diagonal().sqrt()[:, None]
    gram.diagonal().fill_(1.0)
    even = Stats(gram, stats.absmax, stats.absmean, stats.sample, stats.tokens)
    static, none = (run(w, even, "w4a16-g64", order=order) for order in ("static", "none"))
    assert torch.equal(static.tensor.data, none.tensor.data) and torch.equal(static.tensor.scale, none.tensor.scale)


def test_static_order_lowers_the_loss() -> None:
    losses = {o: float(run(*case(k=512), "w4a16-g128", order=o).facts["loss"].sum()) for o in ("static", "none")}
    assert losses["static"] < losses["none"]


def test_size_of_the_inputs_does_not_matter() -> None:
    w, stats = case()
    small = Stats(stats.gram * 2.0**-40, stats.absmax, stats.absmean, stats.sample, stats.tokens)
    a, b = run(w, stats, "w4a16-g64"), run(w, small, "w4a16-g64")
    assert torch.equal(a.tensor.data, b.tensor.data)
    assert torch.allclose(a.facts["loss"] * 2.0**-40, b.facts["loss"], rtol=1e-6)


@pytest.mark.parametrize("spec", ["w4a16-g64", "w4a16-g64-asym", "w8a8"])
def test_dead_columns_become_zero_and_are_counted(spec: str) -> None:
    w, stats = case()
    dead = torch.tensor([3, 64, 65, 255])
    stats.gram[dead] = 0
    stats.gram[:, dead] = 0
    codes, loss = by_the_paper(w, stats, QuantSpec.parse(spec), damped(0.01, stats, 252))
    found = run(w, stats, spec, scales="absmax")
    assert found.facts["dead"] == 4
    assert not affine.dequantize(found.tensor)[:, dead].any()
    assert (found.tensor.data == codes).float().mean() > 0.995
    assert float(found.facts["loss"].sum()) == pytest.approx(loss, rel=1e-3)


@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize("spec", ["w4a16-g64", "w8a8", "w4a16-g32-asym"])
def test_one_row_and_none(spec: str, n: int) -> None:
    w, stats = case(n=n)
    found = run(w, stats, spec)
    assert found.tensor.shape == (n, 256) and found.facts["loss"].shape == (n,)


def test_one_token_is_enough_for_a_factor() -> None:
    random = torch.Generator().manual_seed(3)
    w, x = torch.randn(8, 128, generator=random), torch.randn(1, 128, generator=random)
    found = run(w, stats_of(x), "w4a16-g64")
    nearest = affine.quantize(w, QuantSpec.parse("w4a16-g64"), BF16)
    assert found.facts["fallbacks"] == [] and found.facts["damp"] == 0.01 * (1 + 8 * 128)
    assert found.facts["loss"].sum() < 0.5 * loss_of(w, nearest, stats_of(x)).sum()


@pytest.mark.parametrize("tokens", [100, 256])
def test_few_tokens_are_believed_less(tokens: int) -> None:
    """The loss is of inputs not seen before; dividing damp by what it grows by gives the constant one."""
    w, fresh = case(tokens=3000)
    random = torch.Generator().manual_seed(9)
    x = torch.linalg.cholesky(fresh.gram / fresh.tokens)
    seen = stats_of(torch.randn(tokens, 256, generator=random) @ x.T)
    grown = run(w, seen, "w4a16-g64")
    constant = run(w, seen, "w4a16-g64", damp=0.01 / damped(1.0, seen))
    assert constant.facts["damp"] == pytest.approx(0.01)
    assert loss_of(w, grown.tensor, fresh).sum() < 0.95 * loss_of(w, constant.tensor, fresh).sum()


def test_one_massive_channel_does_not_damp_the_others_away() -> None:
    stats = case()[1]
    x = torch.cat([stats.sample, stats.sample])
    x[:, 17] *= 1000
    quiet, loud = prepare(stats), prepare(stats_of(x))
    assert loud.mean / len(x) < 3 * quiet.mean / stats.tokens


@pytest.mark.parametrize("tokens", [0, 5])
def test_no_input_at_all_is_rounded_to_nearest_and_said(tokens: int) -> None:
    w = case()[0]
    stats = stats_of(torch.zeros(tokens, 256))
    found = run(w, stats, "w4a16-g64")
    spec = QuantSpec.parse("w4a16-g64")
    assert torch.equal(found.tensor.data, rtn(w, None, spec, scale_dtype=BF16).tensor.data)
    (why,) = found.facts["fallbacks"]
    assert "rounded to nearest" in why and ("no token" in why) == (tokens == 0)
    assert not found.facts["loss"].any()


@pytest.mark.parametrize("damp", [0.01, 0.0])
def test_a_gram_without_factor_takes_three_more_damps_then_nearest(damp: float) -> None:
    w, stats = case()
    gram = torch.full((256, 256), 100.0)
    gram.diagonal().fill_(1.0)  # not positive at any of the damps
    found = run(w, Stats(gram, stats.absmax, stats.absmean, stats.sample, stats.tokens), "w4a16-g64", damp=damp)
    first = damped(damp, stats)
    tried = [first, *((max(first, 0.001) * 10.0**i) for i in (1, 2, 3))]
    assert [f"damp {d:g}:" in why for d, why in zip(tried, found.facts["fallbacks"], strict=True)] == [True] * 4
    assert found.facts["fallbacks"][-1].endswith("rounded to nearest")
    nearest = rtn(w, None, QuantSpec.parse("w4a16-g64"), scale_dtype=BF16).tensor
    assert torch.equal(found.tensor.data, nearest.data) and torch.equal(found.tensor.scale, nearest.scale)


def test_a_damp_that_helps_is_named() -> None:
    w = case()[0]
    stats = stats_of(torch.randn(200, 256, generator=torch.Generator().manual_seed(1)))  # fewer tokens than columns
    gram = stats.gram.clone()
    gram.diagonal().sub_(0.2 * gram.diagonal().mean())  # least eigenvalue below what damp 0.01 adds
    broken = Stats(gram, stats.absmax, stats.absmean, stats.sample, stats.tokens)
    found = run(w, broken, "w4a16-g64")
    first = damped(0.01, broken)
    assert found.facts["damp"] == pytest.approx(10 * first)
    assert found.facts["fallbacks"] == [f"no Cholesky factor at damp {first:g}: damp x 10"]
    singular = stats_of(torch.randn(3, 256))
    assert run(w, singular, "w4a16-g64", damp=0.0).facts["damp"] > 0.0


def test_nan_is_refused_wherever_it_is() -> None:
    w, stats = case()
    bad = stats.gram.clone()
    bad[5, 7] = math.nan
    for value in (math.nan, math.inf):
        bad[5, 7] = value
        with pytest.raises(FormatError, match="gram"):
            prepare(Stats(bad, stats.absmax, stats.absmean, stats.sample, stats.tokens))
        broken = w.clone()
        broken[2, 9] = value
        with pytest.raises(FormatError, match="weight"):
            run(broken, stats, "w4a16-g64")


def test_bad_options_and_sizes_are_refused() -> None:
    w, stats = case()
    with pytest.raises(ValueError, match="order"):
        prepare(stats, order="falling")
    with pytest.raises(ValueError, match="scales"):
        run(w, stats, "w4a16-g64", scales="best")
    with pytest.raises(FormatError, match="channels"):
        run(w[:, :128], stats, "w4a16-g64")
    with pytest.raises(FormatError):
        run(*case(k=96), "w4a16-g64")
    assert serves(QuantSpec.parse("w4a8-g128")) is None
    assert "float" in str(serves(QuantSpec.parse("fp8-dynamic")))


def test_scales_of_int8_activations_stay_two_level() -> None:
    found = run(*case(), "w4a8-g128")
    assert affine.two_level(found.tensor.scale) is not None


def test_correct_is_least_squares_against_the_float_input() -> None:
    """W' of least |W x - W' x'|^2 + ridge, by float64; without a difference the weight stays."""
    random = torch.Generator().manual_seed(17)
    x = torch.randn(2000, 64, generator=random) * torch.linspace(0.3, 2, 64)
    y = x + 0.2 * torch.randn(2000, 64, generator=random)  # what the quantised chain has instead
    w = torch.randn(24, 64, generator=random)
    gram = y.T @ y
    factor = prepare(Stats(gram, y.abs().amax(0), y.abs().mean(0), y[:512], 2000))
    found = correct(w, (x - y).T @ y, factor)
    ridge = factor.damp * factor.mean * torch.eye(64, dtype=torch.float64)
    shift = (x - y).double().T @ y.double()
    expected = w.double() + w.double() @ shift @ torch.linalg.inv(gram.double() + ridge)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    off = [float((w @ x.T - each @ y.T).norm()) for each in (found, w)]
    assert off[0] < 0.99 * off[1], off
    assert torch.equal(correct(w, torch.zeros(64, 64), factor), w)
