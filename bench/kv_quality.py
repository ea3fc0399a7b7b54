"""What a rounded cache does to a model's words: of one layer alone, or of all layers at once, against a cache as it is.

The bytes are those of formats/kvcache.py, without pages: keys and values of a window go through `quantize` and `dequantize`
on their way into attention, every one of them, as in a decode, where the newest token is read back too; queries are rounded
as kernels round them over quantised pages. Attention itself is fp32 on both sides, so that nothing else is seen. The offset
`mu` is not added back: softmax does not see it. The cache as it is holds the type of the checkpoint (bf16), whatever the
model computes in here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..formats.kvcache import BF16, KVSpec, dequantize, quantize
from ..kernels.attention import rounded_q
from .engine import Model
from .engine.attend import Attend, Mix, causal
from .engine.model import block
from .quality import Quality

_CHUNK = 256  # positions whose logits exist at one time, on both sides
Tell = Callable[[int, str], None]  # so many more blocks were run, and on what


@dataclass(frozen=True, eq=False)
class Held:
    """How the cache of one layer is held: a spec and the offset of keys, fp32 [Hkv, D] or None."""

    spec: KVSpec = BF16
    mu: torch.Tensor | None = None


def held_as(x: torch.Tensor, bits: int, symmetric: bool, stored: torch.dtype) -> torch.Tensor:
    """fp32 of x [..., D] as it comes back from a cache of so many bits; 16 is the type `stored`."""
    if bits == 16:
        return x.to(stored).float()
    rows, scale, offset = quantize(x, bits, symmetric)
    words = scale[..., None] if offset is None else torch.stack((scale, offset), -1)
    return dequantize(rows, words, bits, x.shape[-1], symmetric)


def mixing(layers: Sequence[Held], stored: torch.dtype) -> Mix:
    """Causal attention over keys and values as `layers` hold them."""

    def mix(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int) -> torch.Tensor:
        held = layers[layer]
        k = k.float() if held.mu is None else k.float() - held.mu[:, None]
        k = held_as(k, held.spec.k_bits, held.spec.symmetric, stored)
        v = held_as(v, held.spec.v_bits, held.spec.symmetric, stored)
        rows = q.float()
        if held.spec.quantised:
            codes, step = rounded_q(rows)
            rows = codes * step
        gqa = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(rows, k, v, is_causal=True, enable_gqa=gqa).to(q.dtype)

    return mix


def _attend(model: Model, mix: Mix, length: int) -> Attend:
    return causal(model.config, model.cos_sin[:length], model.dtype, None, mix)


def _rest(model: Model, layer: int, x: torch.Tensor, add: torch.Tensor | None, attend: Attend) -> torch.Tensor:
    """The hidden states [T - 1, hidden] that predict a token, from what goes into block `layer` on. x, add are kept."""
    x, add = x.clone(), None if add is None else add.clone()
    for i in range(layer, model.config.layers):
        x, add = _block(model, i, x, add, attend)
    x = x if add is None else x + add
    return F.rms_norm(x, (model.config.hidden,), model.weights.norm, model.config.norm_eps)[0, :-1]


def _block(
    model: Model, i: int, x: torch.Tensor, add: torch.Tensor | None, attend: Attend
) -> tuple[torch.Tensor, torch.Tensor]:
    how = {"impl": model.impl, "batch_invariant": model.batch_invariant}
    return block(x, add, model.weights.blocks[i], model.config, i, attend, model.matmul, **how)  # type: ignore[arg-type]


def _embedded(model: Model, piece: torch.Tensor) -> torch.Tensor:
    return F.embedding(piece[None].to(model.device), model.weights.embedding)


@torch.inference_mode()
def key_offsets(model: Model, pieces: Sequence[torch.Tensor], tell: Tell) -> list[torch.Tensor]:
    """The mean of every channel of every key head over `pieces`, as keys go into a cache: fp32 [Hkv, D] by layer."""
    config = model.config
    sums = [torch.zeros(config.kv_heads, config.head_dim, dtype=torch.float64) for _ in range(config.layers)]
    plain = mixing([Held()] * config.layers, config.dtype)

    def look(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int) -> torch.Tensor:
        sums[layer] += k[0].double().sum(1).cpu()
        return plain(q, k, v, layer)

    for piece in pieces:
        _rest(model, 0, _embedded(model, piece), None, _attend(model, look, len(piece)))
        tell(config.layers, "offsets of keys")
    count = sum(len(piece) for piece in pieces)
    return [(total / count).float().to(model.device) for total in sums]


@torch.inference_mode()
def by_layer(
    model: Model, piece: torch.Tensor, candidates: Sequence[Sequence[Held]], tell: Tell
) -> Iterator[list[float]]:
    """For each layer: the KL summed over a window when that layer alone is held as each of its candidates.

    The states before a layer are computed once; only the blocks from it on run again for each candidate. A layer without
    candidates costs no more than its block.
    """
    config = model.config
    plain = [Held()] * config.layers
    attend = _attend(model, mixing(plain, config.dtype), len(piece))
    x, add = _embedded(model, piece), None
    reference = _rest(model, 0, x, add, attend)
    tell(config.layers, "the cache as it is")
    for layer in range(config.layers):
        ours = []
        for held in candidates[layer]:
            changed = [*plain[:layer], held, *plain[layer + 1 :]]
            ours.append(_rest(model, layer, x, add, _attend(model, mixing(changed, config.dtype), len(piece))))
            tell(config.layers - layer, f"layer {layer} in {held.spec}{'' if held.mu is None else ' with its offset'}")
        yield _kls(model, reference, ours)
        x, add = _block(model, layer, x, add, attend)


def _kls(model: Model, reference: torch.Tensor, ours: Sequence[torch.Tensor]) -> list[float]:
    """KL(reference || each of ours), summed over positions; the reference's logits are made once for all."""
    sums = [0.0] * len(ours)
    for start in range(0, len(reference) if ours else 0, _CHUNK):
        part = slice(start, start + _CHUNK)
        p = model.head_logits(reference[part]).log_softmax(-1)
        for i, hidden in enumerate(ours):
            sums[i] += _kl(p, model.head_logits(hidden[part]).log_softmax(-1))
    return sums


def _kl(p: torch.Tensor, q: torch.Tensor) -> float:
    """KL(p || q) of log-probabilities [n, V], summed in double."""
    return float((p.exp() * (p - q)).sum(-1).double().sum())


class Judge:
    """Holds the words of a model over a cache as it is, and compares others with them: `judge(layers) -> Quality`."""

    def __init__(self, model: Model, pieces: Sequence[torch.Tensor], tell: Tell) -> None:
        self.model, self.pieces, self.tell = model, list(pieces), tell
        self._hidden = functools.partial(self._words, [Held()] * model.config.layers)
        self._reference: list[torch.Tensor] = []  # hidden states: [T - 1, hidden] by window, filled when first asked

    @torch.inference_mode()
    def _words(self, layers: Sequence[Held], piece: torch.Tensor) -> torch.Tensor:
        attend = _attend(self.model, mixing(layers, self.model.config.dtype), len(piece))
        self.tell(self.model.config.layers, "all layers at once")
        return _rest(self.model, 0, _embedded(self.model, piece), None, attend)

    @torch.inference_mode()
    def __call__(self, layers: Sequence[Held]) -> Quality:
        """KL(as it is || as `layers` say), top-1 and perplexities over all windows."""
        if not self._reference:
            self._reference = [self._hidden(piece) for piece in self.pieces]
        kl = nll = nll_reference = 0.0
        agree = count = 0
        for piece, reference in zip(self.pieces, self._reference, strict=True):
            for scores in _scores(self.model, reference, self._words(layers, piece), piece):
                kl, nll, nll_reference = kl + scores[0], nll + scores[1], nll_reference + scores[2]
                agree, count = agree + scores[3], count + scores[4]
        protocol = (
            f"{count} tokens in {len(self.pieces)} windows of {len(self.pieces[0])}, no overlap; KL(cache as it is || rounded "
            f"cache) in nats; computed in {str(self.model.dtype).removeprefix('torch.')}, attention in float32"
        )
        return Quality(
            kl / count, agree / count, math.exp(nll / count), math.exp(nll_reference / count), count, protocol
        )


def _scores(
    model: Model, reference: torch.Tensor, ours: torch.Tensor, piece: torch.Tensor
) -> Iterator[tuple[float, float, float, int, int]]:
    """Sums of KL, both negative log-likelihoods, agreeing and all positions, a few hundred positions at a time."""
    targets = piece[1:].to(model.device)
    for start in range(0, len(targets), _CHUNK):
        part = slice(start, start + _CHUNK)
        p, q = (model.head_logits(h[part]).log_softmax(-1) for h in (reference, ours))
        nll, nll_reference = (-float(x.gather(1, targets[part, None]).double().sum()) for x in (q, p))
        yield _kl(p, q), nll, nll_reference, int((p.argmax(-1) == q.argmax(-1)).sum()), len(p)
