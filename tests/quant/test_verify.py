"""verify finds every planted fault, and none where there is none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from percard.formats.spec import FormatError
from percard.quant import quantize
from percard.quant.progress import Progress
from percard.quant.recipe import Recipe
from percard.quant.verify import verify

Tiny = Callable[..., Path]
UP = "model.layers.0.mlp.up_proj"


@pytest.fixture
def pair(tiny: Tiny, tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """`pair(spec, kind)` -> (source, quantised)."""

    def make(spec: str = "w4a16-g64", kind: str = "llama") -> tuple[Path, Path]:
        src = tiny(kind)
        quantize.run(src, tmp_path / "out", Recipe.from_flags(spec=spec))
        return src, tmp_path / "out"

    return make


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Rewrites the one shard of `folder` after `change`."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("spec", ["w4a16-g64", "w4a16-g64-asym", "w8a8", "w4a8-g64", "w3a16-g64"])
@pytest.mark.parametrize("level", ["bytes", "weights"])
def test_what_we_write_is_green(pair: Callable[..., tuple[Path, Path]], spec: str, level: str) -> None:
    src, dst = pair(spec)
    seen: list[Progress] = []
    report = verify(dst, src, level=level, progress=seen.append)
    assert report.status == "green" and not report.failures and not report.flags and report.verb == "verify"
    assert len(report.modules) == 14 and report.checks["quantised"] == 14
    assert all((m.sqnr is not None) == (level == "weights") for m in report.modules)
    assert set(report.checks["side_files"]) == {"LICENSE", "tokenizer.json"}
    assert seen[-1].done == seen[-1].total


def swap_rows(tensors: dict[str, torch.Tensor]) -> None:
    for suffix in ("weight_packed", "weight_scale"):
        tensors[f"{UP}.{suffix}"] = tensors[f"{UP}.{suffix}"].roll(1, 0).contiguous()


FAULTS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str, str]] = {
    "norm changed": (lambda t: t["model.norm.weight"].add_(1), "bytes", "model.norm.weight differs"),
    "one bit of an embedding": (
        lambda t: t["model.embed_tokens.weight"].view(torch.int16)[95, 127:].bitwise_xor_(1),
        "bytes", "embed_tokens.weight differs",
    ),
    "tensor missing": (lambda t: t.pop("model.norm.weight"), "bytes", "model.norm.weight is missing"),
    "scale missing": (lambda t: t.pop(f"{UP}.weight_scale"), "bytes", "weight_scale is missing"),
    "tensor too many": (lambda t: t.update(extra=torch.ones(1)), "bytes", "extra should not be there"),
    "packed too narrow": (
        lambda t: t.update({f"{UP}.weight_packed": t[f"{UP}.weight_packed"][:, 1:].contiguous()}), "bytes", "expected",
    ),
    "scale in another dtype": (
        lambda t: t.update({f"{UP}.weight_scale": t[f"{UP}.weight_scale"].float()}), "bytes", "is torch.float32",
    ),
    "wrong shape said": (lambda t: t[f"{UP}.weight_shape"].add_(1), "weights", "weight_shape says [257, 129]"),
    "scale of NaN": (lambda t: t[f"{UP}.weight_scale"][2:3].fill_(float("nan")), "weights", "NaN or Inf"),
    "scale of zero": (lambda t: t[f"{UP}.weight_scale"][2:3].zero_(), "weights", "not finite and above zero"),
    "scale negative": (lambda t: t[f"{UP}.weight_scale"][2:3].neg_(), "weights", "not finite and above zero"),
    "rows shifted": (swap_rows, "weights", "SQNR"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults(pair: Callable[..., tuple[Path, Path]], name: str) -> None:
    src, dst = pair()
    change, level, says = FAULTS[name]
    edit(dst, change)
    report = verify(dst, src, level=level)
    texts = [*report.failures, *report.flags]
    assert report.status == "red" and len(texts) == 1, texts
    assert says in texts[0] and (UP in texts[0] or "model." in texts[0] or "extra" in texts[0])


def test_swapped_experts_are_loud(pair: Callable[..., tuple[Path, Path]]) -> None:
    src, dst = pair(kind="qwen3_moe")

    def swap(tensors: dict[str, torch.Tensor]) -> None:
        one, two = (f"model.layers.1.mlp.experts.{e}.up_proj." for e in (0, 2))
        for suffix in ("weight_packed", "weight_scale"):
            tensors[one + suffix], tensors[two + suffix] = tensors[two + suffix], tensors[one + suffix]

    edit(dst, swap)
    report = verify(dst, src)
    assert report.status == "red" and len(report.flags) == 2 and all("experts" in f for f in report.flags)


def test_side_files_and_config(pair: Callable[..., tuple[Path, Path]]) -> None:
    src, dst = pair()
    (dst / "tokenizer.json").write_text("{}")
    (dst / "LICENSE").unlink()
    config = json.loads((dst / "config.json").read_text())
    (dst / "config.json").write_text(json.dumps({**config, "rope_theta": 5.0}))
    texts = verify(dst, src, level="bytes").failures
    assert len(texts) == 3
    for word in ("tokenizer.json: differs", "LICENSE: is missing", "differs from the source in rope_theta"):
        assert any(word in text for text in texts), texts


def test_the_wrong_source(pair: Callable[..., tuple[Path, Path]], tiny: Tiny) -> None:
    _, dst = pair()

    def other(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if n.endswith("_proj.weight")]:
            tensors[name] = tensors[name].flip(0).contiguous()

    report = verify(dst, tiny(name="other", change=other))
    assert len(report.flags) == 14 and "right source" in report.flags[0]


def test_folders_that_are_no_pair(pair: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    src, dst = pair()
    with pytest.raises(FormatError, match=r"config\.json: no quantization_config"):
        verify(src, src)
    with pytest.raises(FormatError, match="already quantised"):
        verify(dst, dst)
    with pytest.raises(FormatError, match="no such folder"):
        verify(tmp_path / "nowhere", src)
    with pytest.raises(ValueError, match="bytes, weights"):
        verify(dst, src, level="model")
