"""What a fair comparison needs on this machine: how many layers, memory for all sides at once, weights beyond the cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ..formats.spec import FormatError, QuantSpec
from . import card
from .engine.config import Config
from .probe import PHASES, Probe

_CACHE_SHARE = 4  # weights must be so many times the cache, or a part of them never leaves it


class NotComparable(ValueError):
    """These sides cannot be compared fairly here; the text says why and what to change. Exit code 3."""


@dataclass(frozen=True)
class Plan:
    """What to time. `prompt` and `new` tokens, `layers` of the model (None = all, or as many as `budget_s` allows).

    `kv` names the caches of every quantised side, or of the 16-bit weights when there is none; the baseline's is bf16.
    `contexts` are depths of the cache at which steps are timed, () = after the prompt.
    """

    prompt: int = 512
    new: int = 32
    batch: int = 1
    rounds: int = 3
    layers: int | None = None
    budget_s: float | None = None
    head: str = "int8-row"
    seed: int = 0
    kv: tuple[str, ...] = ("bf16",)
    contexts: tuple[int, ...] = ()


def choose_layers(config: Config, probes: Mapping[str, Probe], plan: Plan) -> tuple[Config, Plan]:
    """The number of layers asked for, or as many (2 at least) as the probes say fit `budget_s`."""
    layers = config.layers if plan.layers is None else plan.layers
    if not 1 <= layers <= config.layers:
        raise FormatError(f"{config.name}: layers={layers} is outside 1 .. {config.layers}")
    if plan.layers is None and plan.budget_s is not None:
        head_in_blocks = config.vocab * config.hidden / config.block_parameters()
        fixed = per_layer = 0.0
        for found in probes.values():
            prefill, decode = (found.seconds[p][found.fastest(p)] for p in PHASES)
            # Decode counts twice: the baseline against itself, a variant with each head.
            per_layer += prefill + 2 * plan.new * decode
            fixed += 2 * plan.new * decode * head_in_blocks
        turns = plan.rounds + 1  # one warms up
        layers = int((plan.budget_s / turns - fixed) / per_layer)
        layers = max(min(layers, config.layers), min(2, config.layers))
    return replace(config, layers=layers), replace(plan, layers=layers)


def memory_fits(config: Config, specs: Sequence[QuantSpec], device: torch.device) -> None:
    """NotComparable when the sides do not fit memory together: A B A B needs them there at the same time."""
    blocks, table = config.layers * config.block_parameters(), config.vocab * config.hidden
    tables = 1 if config.tied else 2
    need = 2 * (blocks + tables * table)
    for spec in specs:
        need += int(blocks * (spec.weight_bits if spec.weight_bits != 3 else 16) / 8 * 1.05) + 3 * tables * table
    free = card.free_bytes(device)
    if need > free:
        raise NotComparable(
            f"{config.name}: baseline and {len(specs)} variants need {need / 1e9:.1f} GB together and "
            f"{free / 1e9:.1f} GB are free; give fewer --specs, or --layers N"
        )


def cache_noise(config: Config, device: torch.device) -> list[str]:
    """Weights that stay in cache make every figure too good: refused on a card, said in the row on a CPU."""
    size, weights = card.last_level_cache(device), 2 * config.layers * config.block_parameters()
    if not size or weights >= _CACHE_SHARE * size:
        return []
    words = f"weights of {weights / 2**20:.0f} MiB (16-bit) would stay in the {size / 2**20:.0f} MiB cache"
    if device.type == "cuda":
        raise NotComparable(f"{config.name}: {words}; give more --layers")
    return [f"cache: {words}"]
