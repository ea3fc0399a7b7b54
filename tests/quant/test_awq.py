"""AWQ: the same function, never worse than no scale in what it keeps small, bounds that a rounding can take."""

from __future__ import annotations

import pytest
import torch

from percard.formats import affine
from percard.formats.spec import QuantSpec
from percard.quant.methods import awq as module
from percard.quant.methods import channels
from percard.quant.methods.awq import awq, serves
from percard.quant.methods.gptq import gptq
from percard.quant.methods.gptq import prepare as gptq_prepare
from percard.quant.methods.records import LinearGroup, Stats, Transform

W4 = QuantSpec.parse("w4a16-g64")
BF16 = torch.bfloat16


def inputs(k: int = 256, tokens: int = 1024, seed: int = 0) -> torch.Tensor:
    """Inputs as a model has them: channels that know of each other, some of them large."""
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(k // 2, k, generator=random) * 0.3 + torch.eye(k)[: k // 2]
    x = torch.randn(tokens, k // 2, generator=random) @ mix + 0.2 * torch.randn(tokens, k, generator=random)
    x[:, ::37] *= 12
    return x


def stats_of(x: torch.Tensor) -> Stats:
    empty = x.new_zeros(x.shape[1])
    mean, most = (x.abs().mean(0), x.abs().amax(0)) if len(x) else (empty, empty)
    return Stats(x.T @ x, most, mean, x[:512], len(x))


def weights(*rows: int, k: int = 256, seed: int = 1) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    spread = torch.rand(k, generator=random) + 0.2
    return {f"r{i}": torch.randn(n, k, generator=random) * 0.05 * spread for i, n in enumerate(rows)}


def run(
    readers: dict[str, torch.Tensor],
    x: torch.Tensor,
    spec: QuantSpec = W4,
    ties: tuple[int, int, int] | None = None,
    **options: object,
) -> Transform:
    group = LinearGroup(readers, dict.fromkeys(readers, spec), stats_of(x), ties, tuple(readers))
    return awq(group, spec, scale_dtype=BF16, **options)


def nearest(w: torch.Tensor, spec: QuantSpec, bound: torch.Tensor | None = None) -> torch.Tensor:
    covered = w
    if bound is not None:
        wide = bound.repeat_interleave(w.shape[1] // bound.shape[1], 1)
        covered = torch.minimum(torch.maximum(w, -wide), wide)
    scale, zero = affine.find_scales(covered, spec, BF16)
    return affine.dequantize(affine.quantize(w, spec, BF16, scale, zero))


def gram_loss(error: torch.Tensor, x: torch.Tensor) -> float:
    return float((x @ error.T).square().sum())


# -- the same function


def rms(x: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm


def test_between_a_norm_and_its_readers() -> None:
    x, readers = inputs().double(), weights(256, 128, 128)
    norm = torch.rand(256, dtype=torch.float64) + 0.5
    s = run(readers, rms(x, norm).float()).scale.double()
    assert float((s.log()).abs().max()) > 0.01
    for w in readers.values():
        want = rms(x, norm) @ w.double().T
        torch.testing.assert_close(rms(x, norm / s) @ (w.double() * s).T, want, rtol=0, atol=1e-10)


def test_between_values_and_o_where_query_heads_share_a_key_head() -> None:
    kv, group, d, tokens = 2, 3, 16, 40
    random = torch.Generator().manual_seed(0)
    x = inputs(64, tokens).double()
    p = torch.softmax(torch.randn(kv * group, tokens, tokens, generator=random), -1).double()
    v, bias = torch.randn(kv * d, 64, generator=random).double() * 0.1, torch.randn(kv * d, generator=random).double()
    o = weights(48, k=kv * group * d)

    def attention(v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        heads = (x @ v.T + bias).view(tokens, kv, d).transpose(0, 1).repeat_interleave(group, 0)
        return (p @ heads).transpose(0, 1).reshape(tokens, -1)

    spec = QuantSpec.parse("w4a16-g32")
    s = run(o, attention(v, bias).float(), spec, (kv, group, d)).scale.double()
    by_head = s.view(kv, group, d)
    assert torch.equal(by_head, by_head[:, :1].expand_as(by_head))
    assert float(by_head.std()) > 0
    rows = by_head[:, 0].reshape(-1)
    want = attention(v, bias) @ o["r0"].double().T
    got = attention(v / rows[:, None], bias / rows) @ (o["r0"].double() * s).T
    torch.testing.assert_close(got, want, rtol=0, atol=1e-11)
    forgotten = attention(v / rows[:, None], bias) @ (o["r0"].double() * s).T
    assert float((forgotten - want).abs().max()) > 1e-3  # the bias of v is divided too


def test_between_the_second_norm_and_a_mixture_with_its_router() -> None:
    x = inputs().double()
    readers = weights(96, 96, 96, 96)
    router = torch.randn(4, 256, generator=torch.Generator().manual_seed(5))
    group = LinearGroup({**readers, "gate": router}, dict.fromkeys(readers, W4), stats_of(x.float()), None, ("r0",))
    found = awq(group, W4, scale_dtype=BF16)
    s = found.scale.double()
    for w in (*readers.values(), router):
        torch.testing.assert_close((x / s) @ (w.double() * s).T, x @ w.double().T, rtol=0, atol=1e-10)
    assert torch.equal(found.scale, run(readers, x.float(), clip=False).scale)  # a router of 16 bits costs nothing
    assert list(found.bounds) == ["r0"]


def test_between_up_and_down() -> None:
    x, random = inputs(64).double(), torch.Generator().manual_seed(2)
    gate, up = (torch.randn(128, 64, generator=random).double() * 0.1 for _ in range(2))
    down = weights(64, k=128)

    def inner(up: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(x @ gate.T) * (x @ up.T)

    s = run(down, inner(up).float()).scale.double()
    want = inner(up) @ down["r0"].double().T
    torch.testing.assert_close(inner(up / s[:, None]) @ (down["r0"].double() * s).T, want, rtol=0, atol=1e-11)


# -- what it keeps small


@pytest.mark.parametrize("spec", ["w4a16-g64", "w4a16-g128-asym", "w3a16-g64", "w4a16"])
def test_rounding_to_nearest_is_never_worse_than_without_a_scale(spec: str) -> None:
    its = QuantSpec.parse(spec)
    x, readers = inputs(), weights(160, 96)
    found = run(readers, x, its, rows=1 << 20)

    def total(scale: torch.Tensor, bounds: dict[str, torch.Tensor]) -> float:
        return sum(gram_loss(nearest(w * scale, its, bounds.get(n)) / scale - w, x) for n, w in readers.items())

    one = torch.ones(256)
    scaled, before = total(found.scale, {}), total(one, {})
    assert found.facts["candidate"] != "identity" or found.facts["refined"]
    assert scaled / before == pytest.approx(found.facts["gain"], rel=0.01)
    assert scaled < 0.9 * before
    assert total(found.scale, dict(found.bounds)) < scaled


@pytest.mark.parametrize("spec", ["w4a16-g64", "w3a16-g64", "w4a16"])
def test_gptq_gains_from_scales_that_were_made_for_it(spec: str) -> None:
    its = QuantSpec.parse(spec)
    x, readers = inputs(), weights(192)
    stats, w = stats_of(x), readers["r0"]

    def loss(found: Transform, scales: str = "absmax") -> float:
        bound = found.bounds.get("r0")
        made = gptq(w * found.scale, stats.scaled(found.scale), its, scale_dtype=BF16, bound=bound, scales=scales)
        return gram_loss(affine.dequantize(made.tensor) / found.scale - w, x)

    plain = loss(Transform(torch.ones(256)))
    scaled = loss(run(readers, x, its, loss="gptq", clip=False))
    both = loss(run(readers, x, its, loss="gptq"))
    assert scaled < 0.97 * plain
    assert both < scaled
    searched = loss(Transform(torch.ones(256)), "weighted")
    assert loss(run(readers, x, its, loss="gptq", clip=False), "weighted") < 0.99 * searched


def test_what_a_channel_costs_gptq_is_what_remains_of_it() -> None:
    x = inputs(64, 400)
    stats = stats_of(x)
    got = module._each(stats, "gptq", 0.01)
    factor = gptq_prepare(stats, damp=0.01)
    h = stats.gram.double() + factor.damp * factor.mean * torch.eye(64)
    order = torch.argsort(stats.gram.diagonal(), descending=True, stable=True)
    upper = torch.linalg.cholesky(torch.linalg.inv(h[order][:, order]), upper=True)
    want = torch.empty(64, dtype=torch.float64)
    want[order] = upper.diagonal() ** -2
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=0)


def test_where_nothing_helps_the_identity_stays() -> None:
    x = torch.eye(64).repeat(4, 1)  # every input channel alike and alone
    w = torch.full((32, 64), 0.07)  # every weight exact in any scale
    found = run({"r0": w}, x, refine=0)
    assert found.facts["candidate"] == "identity"
    assert torch.equal(found.scale, torch.ones(64))
    assert found.facts["gain"] == 1.0


def test_inputs_of_eight_bits_count() -> None:
    x, readers = inputs(), weights(128)
    x[:, 5] *= 50
    spec = QuantSpec.parse("w8a8")
    found = run(readers, x, spec)
    plain = run(readers, x, QuantSpec.parse("w8a16"))
    peak = (x / found.scale).abs().amax(1).mean() / (x / found.scale).square().mean().sqrt()
    before = (x / plain.scale).abs().amax(1).mean() / (x / plain.scale).square().mean().sqrt()
    assert found.facts["gain"] < 0.5
    assert peak < 0.7 * before


def test_readers_count_at_their_own_spec() -> None:
    x, readers = inputs(), weights(64, 64)
    readers["r1"][:, 3] *= 40
    eight = QuantSpec.parse("w8a16")
    stats = stats_of(x)
    mixed = awq(LinearGroup(readers, {"r0": W4, "r1": eight}, stats), W4, scale_dtype=BF16)
    alone = awq(LinearGroup(readers, {"r0": W4}, stats), W4, scale_dtype=BF16)
    both = awq(LinearGroup(readers, {"r0": W4, "r1": W4}, stats), W4, scale_dtype=BF16)
    near = float((mixed.scale.log() - alone.scale.log()).abs().mean())
    assert near < float((both.scale.log() - alone.scale.log()).abs().mean())


# -- bounds


@pytest.mark.parametrize("loss", ["gram", "gptq"])
@pytest.mark.parametrize("spec", ["w4a16-g64", "w4a16-g32-asym", "w8a16", "w4a16"])
def test_bounds_have_the_shape_of_scales_and_stay_within_the_weights(spec: str, loss: str) -> None:
    its = QuantSpec.parse(spec)
    x, readers = inputs(), weights(48, 96)
    found = run(readers, x, its, loss=loss)
    assert set(found.bounds) == set(readers)
    for name, bound in found.bounds.items():
        w = readers[name] * found.scale
        full = w.abs().view(w.shape[0], its.groups(256), -1).amax(2)
        assert bound.shape == full.shape
        assert bound.dtype == torch.float32
        share = bound / full
        assert float(share.min()) >= 0.55 - 1e-5
        assert float(share.max()) <= 1 + 1e-6
        made = gptq(w, stats_of(x).scaled(found.scale), its, scale_dtype=BF16, bound=bound, scales="absmax").tensor
        if its.symmetric:
            most = bound * 2 / ((1 << its.weight_bits) - 1)
            torch.testing.assert_close(made.scale.float(), most, rtol=2**-7, atol=0)


@pytest.mark.parametrize("loss", ["gram", "gptq"])
def test_of_all_bounds_the_one_that_costs_least_is_taken(loss: str) -> None:
    x, readers = inputs(), weights(24)
    found = run(readers, x, loss=loss)
    w = readers["r0"] * found.scale
    each = module._each(stats_of(x), "gptq", 0.01) if loss == "gptq" else None
    full = w.abs().view(24, 4, 64).amax(2)
    costs = []
    for shrink in module.SHRINK:
        error = ((nearest(w, W4, full * shrink) - w) / found.scale).view(24, 4, 64)
        if each is not None:
            costs.append((error.square() * each.view(4, 64)).sum(2))
        else:
            outputs = torch.einsum("tgk,ngk->ngt", x.view(-1, 4, 64), error)
            costs.append(outputs.square().sum(2))
    least = torch.stack(costs).amin(0)
    taken = ((found.bounds["r0"] / full - 1) / -0.05).round().long()
    got = torch.stack(costs).gather(0, taken[None])[0]
    torch.testing.assert_close(got, least, rtol=1e-3, atol=0)
    assert len(taken.unique()) > 3


def test_only_readers_that_may_be_clipped_get_bounds() -> None:
    x, readers = inputs(), weights(48, 48, 48)
    specs = {"r0": W4, "r1": W4, "r2": QuantSpec.parse("w4a8-g128")}
    group = LinearGroup(readers, specs, stats_of(x), None, ("r1", "r2"))
    assert list(awq(group, W4, scale_dtype=BF16).bounds) == ["r1"]  # two-level scales are searched elsewhere
    found = awq(group, W4, scale_dtype=BF16, clip=False)
    assert not found.bounds
    assert "clipped" not in found.facts


# -- the edges


def test_channels_never_seen_keep_scale_one() -> None:
    x, readers = inputs(), weights(64)
    x[:, 9] = 0
    found = run(readers, x)
    assert found.scale[9] == 1
    assert found.facts["unseen"] == 1
    assert bool((torch.isfinite(found.scale) & (found.scale > 0)).all())
    assert all(bool(torch.isfinite(b).all()) for b in found.bounds.values())


@pytest.mark.parametrize(
    ("tokens", "change", "words"),
    [(0, 1.0, "no token"), (64, 0.0, "every input was zero"), (64, float("nan"), "NaN or Inf")],
)
def test_without_usable_inputs_there_is_no_scale(tokens: int, change: float, words: str) -> None:
    readers = weights(64)
    stats = stats_of(inputs()[:tokens] * change)
    if change != change:
        stats = Stats(stats.gram, stats.absmax, torch.ones(256), stats.sample, tokens)
    found = awq(LinearGroup(readers, {"r0": W4}, stats, None, ("r0",)), W4, scale_dtype=BF16, loss="gptq")
    assert torch.equal(found.scale, torch.ones(256))
    assert not found.bounds
    assert words in found.facts["why"]


def test_one_token_and_dead_columns_make_no_noise() -> None:
    x = inputs()[:1]
    x[:, :100] = 0
    for loss in ("gram", "gptq"):
        found = run(weights(64), x, loss=loss)
        assert bool((torch.isfinite(found.scale) & (found.scale > 0)).all())
        assert torch.equal(found.scale[:100], torch.ones(100))


def test_no_reader_quantised_and_unknown_loss() -> None:
    x, readers = inputs(), weights(64)
    found = awq(LinearGroup(readers, {}, stats_of(x)), W4, scale_dtype=BF16)
    assert found.facts["why"] == "no reader is quantised"
    with pytest.raises(ValueError, match="loss is 'mse'"):
        run(readers, x, loss="mse")
    assert serves(W4) is None
    assert "float" in str(serves(QuantSpec.parse("fp8-dynamic")))


def test_a_mixture_is_searched_on_rows_of_all_experts() -> None:
    experts = weights(*[24] * 32)
    group = LinearGroup(experts, dict.fromkeys(experts, W4), stats_of(inputs()))
    (rows,) = channels.sampled_rows(group, 110).values()
    assert 100 <= rows.shape[0] <= 111
    shown = [sum(bool((w == row).all(1).any()) for row in rows) for w in experts.values()]
    assert sum(shown) == rows.shape[0]
    assert max(shown) - min(shown) <= 1
    places = {
        int((w == row).all(1).nonzero()[0]) for w in experts.values() for row in rows if bool((w == row).all(1).any())
    }
    assert len(places) == 24  # not the same few rows of each expert
    few = run(experts, inputs(), rows=256)
    every = run(experts, inputs(), rows=1 << 20)
    assert few.facts["gain"] < 0.97
    cost = module._Cost.of(group, "gram", 1 << 20, 0.01, BF16)
    assert cost.of_scale(few.scale) < 1.03 * cost.of_scale(every.scale)


# -- the arithmetic of the search


@pytest.mark.parametrize("spec", ["w4a16-g32", "w4a16-g32-asym", "w8a16", "w3a16-g64"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_search_rounds_as_affine_does(spec: str, dtype: torch.dtype) -> None:
    its = QuantSpec.parse(spec)
    w = torch.randn(33, 256, generator=torch.Generator().manual_seed(0)) * 0.1
    w[3, :64] = 0
    w[4] = w[4].abs() + 1  # a row without negative weights
    got = module._rounding_error(w, its, dtype)
    want = affine.dequantize(affine.quantize(w, its, dtype)) - w
    torch.testing.assert_close(got, want, rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", ["w4a16", "w4a16-g32"])
def test_slopes_are_the_gradient(name: str) -> None:
    random = torch.Generator().manual_seed(0)
    w, each = torch.randn(20, 64, generator=random), torch.rand(64, generator=random)
    spec = QuantSpec.parse(name)
    log = torch.randn(64, generator=random) * 0.1
    for term in (channels.of_weights(w, spec, each), channels.of_inputs(w, [torch.randn(9, 64, generator=random)], 7)):
        x = log.double().requires_grad_(True)
        scale = (term.p * x).exp()
        wide = (term.size.double() * scale).view(20, term.groups, -1).amax(2).square().sum(0)
        cost = term.weight * (wide * (term.each.double() / scale.square()).view(term.groups, -1).sum(1)).sum()
        cost.backward()
        got, slope = term.slope(log)
        assert got == pytest.approx(float(cost.detach()), rel=1e-4)
        torch.testing.assert_close(slope.double(), x.grad, rtol=1e-4, atol=1e-7)
