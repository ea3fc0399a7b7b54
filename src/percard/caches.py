"""The gate of a cache: what a checkpoint says over a quantised cache, against a bf16 one and against its source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .bench import engine, quality
from .bench.engine import kv as kinds
from .formats import compressed_tensors
from .formats.checkpoint import Checkpoint
from .formats.spec import FormatError


@dataclass(frozen=True)
class CacheGate:
    """What a model says over the cache `kv`. `gate` judges it against the same weights over a bf16 cache, by bench/quality.py.

    kl in nats per token, top1 a share, perplexity of this cache and of the bf16 one; `source_*` the same against the source over
    a bf16 cache, weights included. bytes_per_token of the cache, and of a bf16 one.
    """

    kv: str
    gate: str
    reasons: tuple[str, ...]
    kl: float
    top1: float
    perplexity: float
    perplexity_bf16: float
    source_kl: float
    source_top1: float
    source_perplexity: float
    bytes_per_token: int
    bytes_per_token_bf16: int
    tokens: int
    protocol: str
    notes: tuple[str, ...] = ()

    def show(self) -> str:
        """The figures in two lines."""
        smaller = self.bytes_per_token_bf16 / self.bytes_per_token
        rise = self.perplexity / self.perplexity_bf16 - 1
        lines = [
            f"{self.kv} cache, {self.bytes_per_token} bytes a token ({smaller:.2f} x fewer)",
            f"  against bf16     KL {self.kl:.5f}   top-1 {self.top1:.2%}   perplexity {self.perplexity:.4f} ({rise:+.3%})",
            f"  against source   KL {self.source_kl:.5f}   top-1 {self.source_top1:.2%}   "
            f"perplexity of the source {self.source_perplexity:.4f}",
        ]
        return "\n".join([*lines, *(f"  {words}" for words in self.notes)])


def is_quantised(folder: str | Path) -> bool:
    """Whether a checkpoint holds quantised weights."""
    return compressed_tensors.claims(Checkpoint.open(Path(folder)).config)


def gate_caches(
    dst: str | Path, src: Path, kv: Sequence[str], text: str | Path | None, tokens: int | None = None
) -> tuple[CacheGate, ...]:
    """Checkpoint `dst` over each cache in `kv`, on a held-out text of which at most `tokens` are read, through the engine.

    Each position attends to keys and values as the cache holds them, its own included, as a step of decoding does. FormatError
    without a text, for caches that are not known, and for those that this model's heads do not fit.
    """
    if text is None:
        raise FormatError(
            "--kv compares what a model says over each cache on a held-out text; give one with --text FILE"
        )
    config = engine.load_config(dst)
    for name in kv:
        kinds.of(name, config, str(dst))
    ids = quality.read_ids(text, src, tokens)
    made = engine.load(dst)
    same = Path(dst).resolve() == Path(src).resolve()
    source = made if same else engine.load(src)
    found = []
    for name in kv:
        over = made.with_kv(name)
        near = quality.compare(made, over, ids)
        far = near if same else quality.compare(source, over, ids)
        word, reasons = quality.gate_cache(near, over.kv)
        found.append(
            CacheGate(
                kv=name,
                gate=word,
                reasons=tuple(reasons),
                kl=near.kl,
                top1=near.top1,
                perplexity=near.perplexity,
                perplexity_bf16=near.perplexity_reference,
                source_kl=far.kl,
                source_top1=far.top1,
                source_perplexity=far.perplexity_reference,
                bytes_per_token=over.kv_bytes_per_token,
                bytes_per_token_bf16=made.kv_bytes_per_token,
                tokens=near.tokens,
                protocol=near.protocol,
                notes=over.kv.notes,
            )
        )
    return tuple(found)
