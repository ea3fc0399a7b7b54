"""Decode over caches of several specs at several depths: what `bench model --kv ... --context ...` times and judges.

A depth is filled with random keys and values of the scale of real ones: what attention reads costs the same, and no prompt of
32k tokens has to run first. Sides with equal caches share one, so what lies in memory is a cache of each spec and float type.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..formats.spec import FormatError
from . import card, clock, quality
from .engine import Model
from .engine.cache import Cache
from .engine.config import Config
from .engine.graphs import capture
from .fair import NotComparable, Plan

AGAIN = "baseline again"  # the A/A run: its distance from the baseline is the noise floor
_K = 1024


def parse(text: str) -> tuple[int, ...]:
    """Depths of "1k,8k,32k" or "512,4096" in tokens; FormatError for anything else."""
    found = []
    for word in filter(None, text.lower().split(",")):
        digits = word.removesuffix("k")
        if not digits.isdecimal() or not int(digits):
            raise FormatError(f"context {word!r} is not a number of tokens; expected such as 512 or 8k, with commas")
        found.append(int(digits) * (_K if word.endswith("k") else 1))
    return tuple(dict.fromkeys(found))


def depths(plan: Plan) -> tuple[int, ...]:
    """Tokens in the cache before the first step that is timed, of each part of a run."""
    return plan.contexts or (plan.prompt,)


def fits_model(plan: Plan, config: Config) -> None:
    """FormatError when a depth and the new tokens are more than the model's context."""
    if plan.contexts and max(plan.contexts) + plan.new > config.context:
        raise FormatError(
            f"{config.name}: {max(plan.contexts)} tokens and {plan.new} new ones do not fit the context of "
            f"{config.context}; give a smaller --context"
        )


def fits_memory(models: Sequence[Model], plan: Plan, device: torch.device) -> None:
    """NotComparable when the caches of all sides do not fit memory at the same time, as A B A B needs them."""
    tokens = plan.batch * (max(depths(plan)) + plan.new)
    need = sum(m.kv_bytes_per_token * tokens for m in {kind_of(m): m for m in models}.values())
    free = card.free_bytes(device)
    if need > free:
        raise NotComparable(
            f"{models[0].config.name}: caches of {tokens} tokens need {need / 1e9:.1f} GB together and {free / 1e9:.1f} GB "
            "are free; give a smaller --context or --batch, or fewer --kv"
        )


def kind_of(model: Model) -> tuple[Any, ...]:
    """Models of one kind hold caches alike and can share one."""
    config = model.config
    return model.kv.name, model.kv.specs, model.dtype, config.layers, config.kv_heads, config.head_dim


@dataclass
class Timed:
    """Seconds of a step of each side at one depth; `kv_bytes` of each side's cache, measured; words on what went otherwise.

    `extra` are bytes beside weights and cache at the worst moment, None = not known.
    """

    samples: dict[str, clock.Sample]
    kv_bytes: dict[str, int]
    words: list[str]
    extra: dict[str, int | None] = field(default_factory=dict)

    @property
    def floor_pct(self) -> float:
        """How far the baseline is from itself."""
        return abs(clock.ratio(self.samples["baseline"], self.samples[AGAIN]).median - 1) * 100


class Peaks:
    """Extra bytes of each side, from the untimed first call that clock.ab makes of it: `before` goes ahead of every call."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._of, self._peak = device, "", card.Peak(device)
        self.extra: dict[str, int | None] = {}

    def before(self, name: str, turn: int) -> None:
        if self._of:
            self.extra.setdefault(self._of, self._peak.bytes())
        self._of = name if turn < 0 else ""
        if turn < 0:
            self._peak = card.Peak(self._device)


def time_decode(
    models: Mapping[str, Model],
    plan: Plan,
    depth: int,
    device: torch.device,
    sustained: Callable[[str, Callable[[], Any]], None] | None = None,
) -> Timed:
    """Seconds of one greedy step at `depth`, from `new` steps in a row (one CUDA graph on a card). "baseline" is among them.

    `sustained(name, call)` comes after the rounds, a call makes `new` steps: for what needs seconds of one side alone.
    """
    caches: dict[tuple[Any, ...], Cache] = {}
    calls: dict[str, Callable[[], Any]] = {}
    firsts: dict[str, torch.Tensor] = {}
    done = Timed({}, {}, [])
    for name, model in models.items():
        kind = kind_of(model)
        if kind not in caches:
            caches[kind] = model.new_cache(plan.batch, depth + plan.new)
            caches[kind].fill_random()
        cache = caches[kind]
        done.kv_bytes[name] = cache.nbytes
        firsts[name] = torch.zeros(plan.batch, dtype=torch.int64, device=device)

        def steps(model: Model = model, name: str = name, cache: Cache = cache) -> None:
            tokens = firsts[name]
            cache.rewind(depth)
            for _ in range(plan.new):
                tokens = model.step(tokens, cache).argmax(dim=-1)

        peak = card.Peak(device) if device.type == "cuda" else None  # a graph takes its memory when it is captured
        try:
            calls[name] = capture(steps, device)
            if peak is not None:
                done.extra[name] = peak.bytes()
        except RuntimeError as error:
            calls[name] = steps
            why = str(error).splitlines()[0]
            done.words.append(f"{name}: no CUDA graph ({why}), steps are launched one by one")
    calls[AGAIN], firsts[AGAIN] = calls["baseline"], firsts["baseline"]
    vocab = models["baseline"].config.vocab

    peaks = Peaks(device)

    def before(name: str, turn: int) -> None:
        firsts[name].copy_(tokens_of(vocab, (plan.batch,), turn, device))
        peaks.before(name, turn)

    whole = clock.ab(calls, rounds=plan.rounds, device=device, before=before)
    done.extra = peaks.extra | done.extra
    if sustained is not None:
        for name in models:
            sustained(name, calls[name])
    done.samples = {n: clock.Sample.of([s / plan.new for s in sample.samples]) for n, sample in whole.items()}
    return done


def tokens_of(vocab: int, shape: tuple[int, ...], seed: int, device: torch.device) -> torch.Tensor:
    """Seeded random ids: the same for every side of a round, fresh in each round."""
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(seed + 1)).to(device)


def judged(base: Model, model: Model, ids: torch.Tensor, window: int) -> tuple[quality.Quality, tuple[str, list[str]]]:
    """What `model` with its weights and its cache says against `base`, and the verdict on both.

    Weights pass the gate of their spec with this cache, and a quantised cache one of its own: the same weights, over bf16.
    """
    found = quality.compare(base, model, ids, window)
    word, reasons = quality.gate(found, model.spec, quality.is_small(model))
    if not model.kv.quantised:
        return found, (word, reasons)
    plain = found if model.spec is None else quality.compare(model.with_kv(None), model, ids, window)
    cache_word, cache_reasons = quality.gate_cache(plain, model.kv)
    said = f"cache {model.kv.name} against bf16: {quality.words(plain)}"
    if model.spec is None:
        return found, (cache_word, [*cache_reasons, said])
    return found, ("red" if cache_word == "red" else word, [*reasons, *cache_reasons, said])
