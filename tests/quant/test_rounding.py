"""Many weights of one input are rounded as each alone would be, however their rows are cut into jobs."""

from __future__ import annotations

import pytest
import torch

from percard.formats.spec import QuantSpec
from percard.quant import rounding
from percard.quant.methods import METHODS
from percard.quant.methods.records import Stats
from percard.quant.recipe import Step
from percard.quant.walk import Linear

SPEC = QuantSpec.parse("w4a16-g32")


def stats(k: int) -> Stats:
    x = torch.randn(300, k, generator=torch.Generator().manual_seed(3)) * torch.linspace(0.2, 3, k)
    return Stats(x.T @ x, x.abs().amax(0), x.abs().mean(0), x, 300)


@pytest.mark.parametrize("rows", [[5], [64, 16, 16], [1, 200, 3]])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_jobs_cover_every_row_once(rows: list[int], threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "MOST_WEIGHTS", 40 * 128)
    found = rounding.jobs(rows, 128, threads)
    seen = [(i, r) for job in found for i, a, b in job for r in range(a, b)]
    assert seen == [(i, r) for i, n in enumerate(rows) for r in range(n)]
    assert max(sum(b - a for _, a, b in job) for job in found) <= 40


@pytest.mark.parametrize("method", ["rtn", "gptq", "hqq"])
def test_as_each_alone_and_bounds_stay_with_their_rows(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "MOST_WEIGHTS", 50 * 128)
    made = torch.Generator().manual_seed(5)
    weights = {name: torch.randn(n, 128, generator=made) for name, n in (("q", 64), ("k", 16), ("v", 32))}
    bound = weights["v"].reshape(32, 4, 32).abs().amax(2) * 0.5 if method != "hqq" else None
    wanted = [
        rounding.Wanted(Linear(n, (len(w), 128), 0, "q"), lambda w=w: w, bound if n == "v" else None)  # type: ignore[misc]
        for n, w in weights.items()
    ]
    step, s = Step.of(method), stats(128)
    found = list(rounding.round_all(step, wanted, s, SPEC, torch.bfloat16))
    assert [d.linear.name for d in found] == ["q", "k", "v"]
    for done in found:
        name = done.linear.name
        alone = METHODS[method].run(
            weights[name],
            s,
            SPEC,
            scale_dtype=torch.bfloat16,
            bound=bound if name == "v" else None,
            **dict(step.options),
        )
        assert torch.equal(done.tensor.scale, alone.tensor.scale), name
        assert (done.tensor.data == alone.tensor.data).float().mean() > 0.99
        assert done.facts["noise"] == pytest.approx(alone.facts["noise"], rel=0.02)
        if "loss" in alone.facts:
            assert done.facts["loss"] == pytest.approx(float(torch.as_tensor(alone.facts["loss"]).sum()), rel=0.02)
    if bound is not None:
        most = found[2].tensor.scale.float() * 7.5
        assert bool((most <= bound * 1.01).all()) and float(most.max()) < float(weights["v"].abs().max())


def test_an_error_names_the_weight() -> None:
    bad = torch.full((4, 128), float("nan"))
    wanted = [rounding.Wanted(Linear("model.x", (4, 128), 0, "x"), lambda: bad)]
    with pytest.raises(ValueError, match=r"model\.x: "):
        list(rounding.round_all(Step.of("rtn"), wanted, None, SPEC, torch.bfloat16))
