"""The gate: figures that can be worked out by hand, thresholds, and texts."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from percard.bench import quality
from percard.bench.engine import load
from percard.bench.quality import THRESHOLDS, Quality, compare, gate
from percard.formats.spec import FormatError, QuantSpec

GOOD = Quality(kl=0.001, top1=0.99, perplexity=10.01, perplexity_reference=10.0, tokens=1000, protocol="")


@pytest.fixture(scope="module")
def models(checkpoint):
    folder = checkpoint("qwen3", hidden_size=128, intermediate_size=256)
    return load(folder, device="cpu"), load(folder, device="cpu", spec=QuantSpec.parse("w4a16-g64"), impl="reference")


def test_figures_equal_those_of_all_logits_at_once(models, monkeypatch):
    monkeypatch.setattr(quality, "_CHUNK", 7)  # positions are split, windows are not
    reference, model = models
    ids = torch.randint(0, 211, (150,), generator=torch.Generator().manual_seed(1))
    found = compare(reference, model, ids, window=64)
    kl = nll = base = agree = count = 0.0
    for piece in (ids[:64], ids[64:128], ids[128:]):
        p, q = (m.logits(piece[None])[0, :-1].log_softmax(-1) for m in models)
        kl += float(F.kl_div(q, p, log_target=True, reduction="sum"))
        nll += float(F.nll_loss(q, piece[1:], reduction="sum"))
        base += float(F.nll_loss(p, piece[1:], reduction="sum"))
        agree += float((p.argmax(-1) == q.argmax(-1)).sum())
        count += len(piece) - 1
    assert found.tokens == count == 147
    assert found.kl == pytest.approx(kl / count, rel=1e-4) and found.kl > 1e-4
    assert found.top1 == pytest.approx(agree / count) and found.top1 < 1
    assert found.perplexity == pytest.approx(math.exp(nll / count), rel=1e-5)
    assert found.perplexity_reference == pytest.approx(math.exp(base / count), rel=1e-5)
    for word in ("windows of 64", "stride 64", "147 tokens", "float32", "head 16bit"):
        assert word in found.protocol


def test_a_model_against_itself_is_perfect(models):
    found = compare(models[0], models[0], list(range(1, 90)), window=32)
    assert found.kl == 0 and found.top1 == 1 and found.perplexity == found.perplexity_reference
    assert "windows of 32" in found.protocol


def test_the_window_is_the_training_context_unless_said(models):
    ids = torch.randint(0, 211, (300,))
    assert "windows of 256" in compare(*models, ids).protocol
    with pytest.raises(ValueError, match="above the 256"):
        compare(*models, ids, window=512)
    with pytest.raises(ValueError, match="at least 2"):
        compare(*models, ids[:1])


def test_models_of_unlike_vocabularies_are_not_compared(models, checkpoint):
    other = load(checkpoint("llama", vocab_size=97), device="cpu")
    with pytest.raises(ValueError, match="vocabularies differ"):
        compare(models[0], other, [1, 2, 3])


@pytest.mark.parametrize("spec", ["w8a8", "w4a16-g128", "w4a8-g64"])
def test_each_threshold_turns_the_gate(spec):
    limits = THRESHOLDS[QuantSpec.parse(spec).weight_bits]
    assert gate(GOOD, spec) == ("green", [])
    for change, word in (
        ({"kl": limits["kl"] * 1.01}, "KL"),
        ({"top1": limits["top1"] - 0.001}, "top-1"),
        ({"perplexity": 10 * (1.001 + limits["perplexity"])}, "perplexity"),
        ({"kl": math.nan}, "KL"),
    ):
        verdict, reasons = gate(Quality(**(vars(GOOD) | change)), spec)
        assert verdict == "red" and len(reasons) == 1 and word in reasons[0]


def test_a_small_model_is_judged_by_kl_and_top1_only(models):
    worse = Quality(**(vars(GOOD) | {"perplexity": 12.0}))
    assert gate(worse, "w8a8", small_model=True)[0] == "green"
    assert quality.is_small(models[0])


def test_eight_bits_are_held_to_more_than_four():
    assert THRESHOLDS[8]["kl"] < THRESHOLDS[4]["kl"] and THRESHOLDS[8]["top1"] > THRESHOLDS[4]["top1"]
    middling = Quality(**(vars(GOOD) | {"kl": 0.02, "top1": 0.95}))
    assert gate(middling, "w8a8")[0] == "red" and gate(middling, "w4a8")[0] == "green"


def test_three_bits_and_sixteen_are_never_green():
    assert gate(GOOD, "w3a16-g64")[0] == "none" and "never green" in gate(GOOD, "w3a16-g64")[1][0]
    assert gate(GOOD, None)[0] == "none"


def test_texts_are_read_with_the_models_tokenizer(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    text = tmp_path / "text.txt"
    text.write_text("a b a c")
    with pytest.raises(FormatError, match=r"tokenizer\.json: not there"):
        quality.read_ids(text, tmp_path)
    words.save(str(tmp_path / "tokenizer.json"))
    assert quality.read_ids(text, tmp_path).tolist() == [0, 1, 0, 2]
    assert quality.read_ids(text, tmp_path, limit=2).tolist() == [0, 1]
    with pytest.raises(FormatError, match=r"no\.txt"):
        quality.read_ids(tmp_path / "no.txt", tmp_path)
    text.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FormatError, match="UTF-8"):
        quality.read_ids(text, tmp_path)
