"""Statistics: sums as defined, independent of how the text was cut into batches; activations survive the disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from percard.formats.spec import FormatError
from percard.quant import calibrate
from percard.quant.calibrate import Collector
from percard.quant.spill import Spill, SpillWriter


def rows(n: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("k", [8, 1500])
def test_sums_are_as_defined(k: int) -> None:
    x = rows(700, k)
    found = Collector(k, 1)
    for part in x.split(97):
        found.add(part.view(1, -1, k))
    s = found.stats()
    torch.testing.assert_close(s.gram, (x.double().T @ x.double()).float(), rtol=1e-4, atol=1e-3)
    assert torch.equal(s.gram, s.gram.T) and s.tokens == 700
    torch.testing.assert_close(s.absmax, x.abs().amax(0))
    torch.testing.assert_close(s.absmean, x.abs().mean(0))


def test_sample_is_an_even_draw_of_rows_whatever_the_batches() -> None:
    x = torch.arange(5000.0)[:, None].repeat(1, 4)
    drawn = []
    for size in (5000, 333):
        found = Collector(4, 7)
        for part in x.split(size):
            found.add(part)
        drawn.append(found.stats().sample[:, 0].sort().values)
    assert torch.equal(drawn[0], drawn[1]) and len(drawn[0].unique()) == calibrate.SAMPLE
    assert abs(float(drawn[0].mean()) - 2500) < 250 and float(drawn[0].max()) > 4500


def test_nan_is_named() -> None:
    found = Collector(4, 0)
    found.add(rows(10, 4))
    bad = rows(5, 4)
    bad[3, 2] = float("nan")
    with pytest.raises(FormatError, match="token 13"):
        found.add(bad)


def test_nothing_seen_is_zero() -> None:
    s = Collector(4, 0).stats()
    assert s.tokens == 0 and not s.gram.any() and s.sample.shape == (0, 4)


def test_scaled_statistics_are_those_of_scaled_rows() -> None:
    x, scale = rows(300, 16), torch.rand(16) + 0.5
    plain, scaled = Collector(16, 3), Collector(16, 3)
    plain.add(x)
    scaled.add(x / scale)
    a, b = plain.stats().scaled(scale), scaled.stats()
    for left, right in ((a.gram, b.gram), (a.absmax, b.absmax), (a.absmean, b.absmean), (a.sample, b.sample)):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


def test_blend_adds_so_many_tokens_of_the_mean() -> None:
    one, mean = Collector(8, 1), Collector(8, 2)
    one.add(rows(10, 8))
    x = rows(400, 8, 5)
    mean.add(x)
    both = calibrate.blended(one.stats(), mean.stats(), 100)
    assert both.tokens == 110
    torch.testing.assert_close(both.gram, one.stats().gram + x.T @ x / 4, rtol=1e-4, atol=1e-3)


def test_spill_and_back(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    x = rows(6 * 5, 7).view(6, 5, 7).bfloat16()
    with SpillWriter(tmp_path / "act.safetensors", torch.bfloat16, (6, 5, 7)) as out:
        out.add(x[:4])
        assert not (tmp_path / "act.safetensors").exists()
        out.add(x[4:])
    assert len(out.sha256) == 64
    found = Spill(tmp_path / "act.safetensors")
    assert torch.equal(found.read(1, 5), x[1:5]) and found.shape == (6, 5, 7)
    assert torch.equal(load_file(tmp_path / "act.safetensors")["x"], x)
    with pytest.raises(FormatError, match="--fresh"):
        Spill(tmp_path / "other.safetensors")
