"""The gate: how far a quantised model's next-token distribution is from the 16-bit model's, and whether that will do.

    KL       mean over positions of KL(reference || model), nats: 0 = the same distribution
    top-1    share of positions where both name the same most likely token
    perplexity   exp of the mean negative log-likelihood of the text, for each side

No speed figure of a model is printed beside a red gate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ..formats.spec import FormatError, QuantSpec
from .engine import Model
from .engine.kv import Layers

_CHUNK = 256  # positions whose logits exist at one time, on both sides
SMALL = 50_000_000  # below so many parameters only KL and top-1 decide: a small model's perplexity scatters

# Bits of a weight -> the worst that passes. A change here is a reviewed change. 3-bit weights have no gate: their
# figures are printed and never green.
THRESHOLDS: dict[int, dict[str, float]] = {
    8: {"kl": 0.01, "top1": 0.97, "perplexity": 0.01},
    4: {"kl": 0.03, "top1": 0.93, "perplexity": 0.02},
}

# The same for caches, against the same weights over bf16, of models of any size: what is compared differs in nothing else, so
# perplexities of a small model scatter less than these. A symmetric spec is held to its kin.
CACHES: dict[str, dict[str, float]] = {
    "int8": {"kl": 0.002, "top1": 0.98, "perplexity": 0.001},
    "k8v4": {"kl": 0.01, "top1": 0.96, "perplexity": 0.005},
    "int4": {"kl": 0.03, "top1": 0.93, "perplexity": 0.02},
}

# Greedy answers: mean length over the reference's. MLPerf inference holds language models to the same.
LENGTHS = (0.9, 1.1)


@dataclass(frozen=True)
class Quality:
    """`kl` in nats per token, `top1` a share, perplexities of model and reference, `tokens` scored positions."""

    kl: float
    top1: float
    perplexity: float
    perplexity_reference: float
    tokens: int
    protocol: str

    @property
    def perplexity_rise(self) -> float:
        """Relative: 0.01 = one per cent worse than the reference."""
        return self.perplexity / self.perplexity_reference - 1


def read_ids(text: str | Path, model_dir: str | Path, limit: int | None = None) -> torch.Tensor:
    """Ids int64 [n] of a UTF-8 text file, by the tokenizer.json of a model folder, at most `limit` of them.

    Special tokens (a BOS) are added as the tokenizer itself does. FormatError names the file that is missing.
    """
    from tokenizers import Tokenizer  # only who measures a text needs it

    path, vocabulary = Path(text), Path(model_dir) / "tokenizer.json"
    try:
        words = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"{path}: not readable as UTF-8 text ({error}); give a text file") from None
    if not vocabulary.is_file():
        raise FormatError(f"{vocabulary}: not there; a text can only be scored with the model's tokenizer")
    ids = Tokenizer.from_file(str(vocabulary)).encode(words).ids
    return torch.tensor(ids[:limit], dtype=torch.int64)


def windows(ids: torch.Tensor, window: int) -> list[torch.Tensor]:
    """`ids` [n] cut into pieces of `window` tokens without overlap; a last piece of one token has nothing to score."""
    if window < 2:
        raise ValueError(f"window {window} must be at least 2: the first token only predicts")
    return [piece for piece in ids.split(window) if len(piece) > 1]


def compare(
    reference: Model,
    model: Model,
    ids: torch.Tensor | Sequence[int],
    window: int | None = None,
    vocab: int | None = None,
) -> Quality:
    """Scores `model` against `reference` on a text of ids [n], window by window, a few positions at a time.

    `window` None = the reference's training context, at most 2048 (the common protocol). vocab: ids from there on are padding
    of either head and get no probability. ValueError when the two have different vocabularies and none is given, or the text
    is too short to score.
    """
    if vocab is None and reference.config.vocab != model.config.vocab:
        raise ValueError(f"vocabularies differ: {reference.config.vocab} and {model.config.vocab}; not comparable")
    ids = torch.as_tensor(ids, dtype=torch.int64)
    limit = min(reference.config.context, reference.max_len, model.max_len)
    window = min(2048, limit) if window is None else window
    if window > limit:
        raise ValueError(f"window {window} is above the {limit} tokens that both models take")
    pieces = windows(ids, window)
    if not pieces:
        raise ValueError(f"the text has {len(ids)} tokens; at least 2 are needed to score one")
    kl = nll = nll_reference = 0.0
    agree = count = 0
    for piece in pieces:
        ours, theirs = model.hidden(piece[None])[0, :-1], reference.hidden(piece[None])[0, :-1]
        targets = piece[1:].to(model.device)
        for start in range(0, len(targets), _CHUNK):
            part = slice(start, start + _CHUNK)
            p = F.log_softmax(reference.head_logits(theirs[part])[:, :vocab].to(model.device), dim=-1)
            q = F.log_softmax(model.head_logits(ours[part])[:, :vocab], dim=-1)
            # Summed in double: thousands of values near zero are added up.
            kl += float((p.exp() * (p - q)).sum(dim=-1).double().sum())
            nll -= float(q.gather(1, targets[part, None]).double().sum())
            nll_reference -= float(p.gather(1, targets[part, None]).double().sum())
            agree += int((p.argmax(dim=-1) == q.argmax(dim=-1)).sum())
            count += len(p)
    names = [str(m.dtype).removeprefix("torch.") for m in (reference, model)]
    protocol = (
        f"{count} tokens in {len(pieces)} windows of {window}, stride {window}, no overlap; KL(reference || model) in "
        f"nats; reference in {names[0]}, model in {names[1]} with head {model.head}"
    )
    return Quality(kl / count, agree / count, math.exp(nll / count), math.exp(nll_reference / count), count, protocol)


def is_small(model: Model) -> bool:
    """True for models (like tiny-qwen3) where only KL and top-1 decide."""
    config = model.config
    parameters = config.layers * config.block_parameters() + config.vocab * config.hidden * (1 if config.tied else 2)
    return parameters < SMALL


def gate(quality: Quality, spec: QuantSpec | str | None, small_model: bool = False) -> tuple[str, list[str]]:
    """("green" | "red" | "none", reasons in words). "none": nothing gates this spec (16-bit or 3-bit weights)."""
    parsed = QuantSpec.parse(spec) if isinstance(spec, str) else spec
    if parsed is None:
        return "none", ["16-bit weights are the reference"]
    limits = THRESHOLDS.get(parsed.weight_bits)
    if limits is None:
        return "none", [f"{parsed.weight_bits}-bit weights have no gate: figures are printed, never green"]
    reasons = beyond(quality, {n: v for n, v in limits.items() if not (small_model and n == "perplexity")})
    return ("red", reasons) if reasons else ("green", [])


def gate_cache(quality: Quality, kv: Layers | str) -> tuple[str, list[str]]:
    """("green" | "red" | "none", reasons) of a cache, `quality` being against the same weights over bf16.

    Layers of several specs are held to the limits of the one with the fewest bits.
    """
    names = [kv] if isinstance(kv, str) else [str(spec) for spec in kv.specs]
    held = [name.removesuffix("-sym") for name in names if name.removesuffix("-sym") in CACHES]
    if not held:
        return "none", ["a bf16 cache is the reference"]
    name = max(held, key=list(CACHES).index)
    reasons = [f"cache {name}: {words}" for words in beyond(quality, CACHES[name])]
    return ("red", reasons) if reasons else ("green", [])


def gate_length(ratio: float | None) -> list[str]:
    """What is wrong with the length of greedy answers against the reference's; [] also when the reference says nothing."""
    if ratio is None or LENGTHS[0] <= ratio <= LENGTHS[1]:
        return []
    return [f"answers are {ratio:.2f} times as long as the reference's, outside {LENGTHS[0]} .. {LENGTHS[1]}"]


def beyond(quality: Quality, limits: Mapping[str, float]) -> list[str]:
    """What is worse than its limit, in words; a figure without a limit is not judged. "Not good" so that a NaN is worse."""
    reasons = []
    if "kl" in limits and not quality.kl <= limits["kl"]:
        reasons.append(f"KL {quality.kl:.4f} is above {limits['kl']}")
    if "top1" in limits and not quality.top1 >= limits["top1"]:
        reasons.append(f"top-1 agreement {quality.top1:.1%} is below {limits['top1']:.0%}")
    if "perplexity" in limits and not quality.perplexity_rise <= limits["perplexity"]:
        reasons.append(f"perplexity rises {quality.perplexity_rise:.2%}, more than {limits['perplexity']:.1%}")
    return reasons


def words(quality: Quality) -> str:
    """The three figures in a line."""
    return f"KL {quality.kl:.5f}, top-1 {quality.top1:.2%}, perplexity {quality.perplexity_rise:+.3%}"


def section(
    quality: Quality, verdict: tuple[str, list[str]], model_name: str, gate_key: str | None = None
) -> dict[str, Any]:
    """The `quality` section of a Record (bench/record.py)."""
    gate_word, reasons = verdict
    return {
        "gate": gate_word,
        "model": model_name,
        "protocol": quality.protocol,
        "ppl": quality.perplexity,
        "ppl_rel": quality.perplexity_rise,
        "kl": quality.kl,
        "top1": quality.top1,
        "tokens": quality.tokens,
        "reasons": reasons,
        "gate_key": gate_key,
    }


def reference_section(quality: Quality, model_name: str) -> dict[str, Any]:
    """The same for the reference itself: its own perplexity, nothing gated."""
    return {"gate": "none", "model": model_name, "protocol": quality.protocol, "ppl": quality.perplexity_reference} | {
        "ppl_rel": 0.0,
        "kl": 0.0,
        "top1": 1.0,
        "tokens": quality.tokens,
        "reasons": ["16-bit weights are the reference"],
    }
