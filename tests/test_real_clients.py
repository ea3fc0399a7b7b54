"""Real clients read what we write: transformers with the compressed-tensors package, on the small trained model.

Both sides compute in fp32 with a 16-bit head. W4A16 has no rounding of activations, so the logits agree to fp32 noise.
For W8A8 the package divides activations by 127.5 and we, like the serving kernels, by 127: the two agree closely, and
our own arithmetic run at 127.5 agrees almost everywhere.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from percard.bench import engine
from percard.bench.engine import model as engine_model
from percard.formats import affine
from percard.formats.tensor import QuantTensor
from percard.quant import quantize
from percard.quant.recipe import Recipe

MODEL = Path(__file__).parents[1] / "examples" / "tiny-qwen3"
WINDOW, WINDOWS = 512, 4


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    """[WINDOWS, WINDOW] of the held-out text."""
    ids = Tokenizer.from_file(str(MODEL / "tokenizer.json")).encode((MODEL / "heldout.txt").read_text("utf-8")).ids
    return torch.tensor(ids[: WINDOW * WINDOWS]).view(WINDOWS, WINDOW)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint per spec, as `percard quantize` writes it."""
    folder = tmp_path_factory.mktemp("clients")
    for spec in ("w4a16-g64", "w8a8", "w4a8-g64", "w3a16-g64"):
        quantize.run(MODEL, folder / spec, Recipe.from_flags(spec=spec))
    return {path.name: path for path in folder.iterdir()}


def theirs(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """Logits [B, T, V] of transformers, whose quantizer hands the weights to compressed-tensors."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return model(ids).logits.float()


def ours(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """Logits [B, T, V] of the engine with reference bodies."""
    return engine.load(folder, dtype=torch.float32, impl="reference").logits(ids).float()


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """The smallest cosine over positions."""
    return float(F.cosine_similarity(a.flatten(0, 1), b.flatten(0, 1), dim=1).min())


def top1(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.argmax(-1) == b.argmax(-1)).float().mean())


@pytest.mark.parametrize("spec", ["w4a16-g64", "w3a16-g64"])
def test_weight_only_logits_are_those_of_transformers(written, tokens, spec):
    a, b = theirs(written[spec], tokens), ours(written[spec], tokens)
    assert cosine(a, b) > 0.9999
    assert top1(a, b) > 0.99


@pytest.mark.parametrize("spec", ["w8a8", "w4a8-g64"])
def test_int8_activations_agree_in_spite_of_their_other_divisor(written, tokens, spec):
    a, b = theirs(written[spec], tokens), ours(written[spec], tokens)
    assert cosine(a, b) > 0.995
    assert top1(a, b) > 0.96


def test_at_their_divisor_w8a8_agrees_almost_everywhere(written, tokens, monkeypatch):
    def linear(x, w, bias=None, **how):
        if isinstance(w, QuantTensor):
            scale = (x.abs().amax(-1, keepdim=True) / 127.5).clamp_min(torch.finfo(torch.float32).tiny)
            x = (x / scale).clamp(-128, 127).round() * scale
            w = affine.dequantize(w)
        return F.linear(x, w, bias)

    monkeypatch.setattr(engine_model, "linear", linear)
    monkeypatch.setattr(engine_model, "quantizes", lambda *args, **how: False)  # no fused producer before it
    assert top1(theirs(written["w8a8"], tokens), ours(written["w8a8"], tokens)) > 0.99


def test_a_wrong_scale_would_be_noticed(written, tokens):
    """The check above can fail: two checkpoints that differ only in precision are told apart by it."""
    assert top1(theirs(written["w3a16-g64"], tokens), ours(written["w4a16-g64"], tokens)) < 0.99
