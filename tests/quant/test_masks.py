"""Masks: exact density, the rule of each method against a plain one, SparseGPT's update, what is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from percard.formats.checkpoint import Checkpoint
from percard.formats.spec import FormatError
from percard.quant import masks, quantize
from percard.quant.masks import MaskWish
from percard.quant.methods import sparse
from percard.quant.methods.sparse import Pattern
from percard.quant.recipe import Recipe
from percard.quant.text import Calibration

from .test_prune import source

Tiny = Callable[..., Path]


def weight_and_inputs(n: int = 24, k: int = 96, tokens: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(5)
    mixing = torch.randn(k, k, generator=random) * 0.2 + torch.eye(k)
    return torch.randn(n, k, generator=random), torch.randn(tokens, k, generator=random) @ mixing


@pytest.mark.parametrize("text", ["0.5", "0.3", "2:4", "1:3"])
def test_density_is_exact_and_the_lowest_go(text: str) -> None:
    weight, x = weight_and_inputs()
    pattern, mean = Pattern.parse(text), x.square().mean(0)
    found = sparse.wanda(weight, mean, pattern)
    score = weight.abs() * mean.sqrt()
    for row, marks in zip(score, found, strict=True):
        pieces = [slice(i, i + pattern.of) for i in range(0, 96, pattern.of)] if pattern.of else [slice(0, 96)]
        for piece in pieces:
            count = pattern.of - pattern.keep if pattern.of else int(pattern.share * 96)
            gone = set(row[piece].argsort()[:count].tolist())
            assert set(marks[piece].nonzero()[:, 0].tolist()) == gone
    whole = sparse.magnitude(weight, Pattern.parse("0.5"))
    assert int(whole.sum()) == weight.numel() // 2
    assert weight.abs()[whole].max() <= weight.abs()[~whole].min()


def test_sparsegpt_is_the_paper_s_loop() -> None:
    """Column after column over the inverse of H, as the paper writes it; ours goes by blocks and a factor."""
    weight, x = weight_and_inputs(8, 64)
    gram, pattern = x.T @ x, Pattern.parse("2:4")
    made, mask = sparse.sparsegpt(weight, gram, len(x), pattern)
    h = gram.double() * 2 / len(x)
    h += sparse.DAMP * h.diagonal().mean() * torch.eye(64, dtype=torch.float64)
    w, inverse = weight.double(), torch.linalg.inv(h)
    for j in range(64):
        if j % 4 == 0:
            ahead = inverse
            diagonal = []
            for _ in range(4):  # what the diagonal will be when the columns before are done
                diagonal.append(ahead[j + len(diagonal), j + len(diagonal)])
                i = j + len(diagonal) - 1
                ahead = ahead - torch.outer(ahead[:, i], ahead[i]) / ahead[i, i]
            group = w[:, j : j + 4].square() / torch.stack(diagonal)
            gone = torch.zeros_like(group, dtype=torch.bool).scatter_(1, group.argsort(dim=1)[:, :2], True)
            assert torch.equal(gone, mask[:, j : j + 4])
        error = torch.where(mask[:, j], w[:, j], 0.0) / inverse[j, j]
        w = w - error[:, None] * inverse[j]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    torch.testing.assert_close(made.double(), w.masked_fill(mask, 0.0), rtol=1e-3, atol=1e-4)
    assert not made[mask].any()


def test_sparsegpt_loses_less_than_wanda_than_magnitude() -> None:
    weight, x = weight_and_inputs(48, 96, 2000)
    x[:, :8] *= 10
    half = Pattern.parse("0.5")

    def loss(made: torch.Tensor) -> float:
        return float(((made - weight) @ x.T).square().sum())

    plain = loss(weight.masked_fill(sparse.magnitude(weight, half), 0.0))
    wanda = loss(weight.masked_fill(sparse.wanda(weight, x.square().mean(0), half), 0.0))
    updated = loss(sparse.sparsegpt(weight, x.T @ x, len(x), half)[0])
    assert updated < wanda < plain


@pytest.mark.parametrize("kind", ["qwen2", "qwen3_moe"])
@pytest.mark.parametrize(("method", "text"), [("magnitude", "0.5"), ("wanda", "2:4"), ("sparsegpt", "0.25")])
def test_a_masked_checkpoint_loads_and_says_where_its_zeros_are(
    tiny: Tiny, tmp_path: Path, kind: str, method: str, text: str
) -> None:
    src, out = source(tiny, kind), tmp_path / "out"
    calibration = Calibration(str(src / "calibration.jsonl"), 8, 32)
    done = masks.run(src, out, MaskWish(method, Pattern.parse(text), calibration))
    before, after, found = Checkpoint.open(src), Checkpoint.open(out), masks.read_masks(out)
    assert before.names and set(before.names) == set(after.names) and before.config == after.config
    assert {n for n in before.names if n.endswith("_proj.weight")} == set(found)
    for name in before.names:
        if name not in found:
            assert torch.equal(before.read(name), after.read(name)), name
            continue
        made, mask = after.read(name), found[name]
        assert not made[mask].any() and bool(made[~mask].all())
        if method != "sparsegpt":
            assert torch.equal(made[~mask], before.read(name)[~mask])
    assert done["zeros"] == sum(int(m.sum()) for m in found.values())
    share = float(Pattern.parse(text).share)
    assert share - 0.02 <= done["zeros"] / done["weights"] <= share
    report = quantize.run(out, tmp_path / "q", Recipe.from_flags(spec="w8a8"))
    assert report.status == "green"


@pytest.mark.parametrize("text", ["", "half", "0", "1", "1.5", "4:2", "2:2", "0:4", "2:100", "nan"])
def test_bad_patterns(text: str) -> None:
    with pytest.raises(FormatError, match=r"expected a share of zeros such as 0\.5, or a pattern such as 2:4"):
        Pattern.parse(text)


def test_bad_masks(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="--mask magic: not known; choose one of magnitude, wanda, sparsegpt"):
        MaskWish("magic", Pattern.parse("0.5"))
    src = source(tiny, "qwen3")
    with pytest.raises(FormatError, match="128 columns, no multiple of 3"):
        masks.run(src, tmp_path / "out", MaskWish("magnitude", Pattern.parse("1:3")))
    assert not (tmp_path / "out").exists()
