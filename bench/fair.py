"""What a fair comparison needs on this machine: how many layers, memory for all sides at once, weights beyond the cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ..formats.spec import FormatError, QuantSpec
from . import card
from .engine.config import Config
from .probe import PHASES, Probe
from .ratios import UTIL, Bound

_CACHE_SHARE = 4  # weights must be so many times the cache, or a part of them never leaves it


class NotComparable(ValueError):
    """These sides cannot be compared fairly here; the text says why and what to change. Exit code 3."""


@dataclass(frozen=True)
class Plan:
    """What to time. `prompt` and `new` tokens, `layers` of the model (None = all, or as many as `budget_s` allows).

    `kv` names the caches of every quantised side, or of the 16-bit weights when there is none; the baseline's is bf16.
    `contexts` are depths of the cache at which steps are timed, () = after the prompt. `batches` is the ladder, () = `batch`
    alone. `bound`, and `memory_gb` (None = the device's), `util` and `overhead_gb` (None = 2 GB on a card, nothing on a CPU)
    are what bench/ratios.py needs for same_bound and max_fit; `usd_hour` prices a card. `energy` False = no window for joules.
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
    batches: tuple[int, ...] = ()
    bound: Bound | None = None
    memory_gb: float | None = None
    util: float = UTIL
    overhead_gb: float | None = None
    usd_hour: float | None = None
    energy: bool = True

    @property
    def ladder(self) -> tuple[int, ...]:
        """The batches to time, smallest first."""
        return tuple(sorted(set(self.batches or (self.batch,))))


@dataclass(frozen=True)
class Budget:
    """Memory that a service may fill: `memory` and `overhead` in bytes, `util` a share, `of` says whose memory it is."""

    memory: float
    util: float
    overhead: float
    of: str

    def __str__(self) -> str:
        return f"{self.util:.0%} of {self.memory / 1e9:.3g} GB ({self.of}) less {self.overhead / 1e9:g} GB"


def budget(plan: Plan, device: torch.device) -> Budget:
    """What --memory-gb, --util and --overhead-gb say; the device's memory where nothing was given."""
    if not 0 < plan.util <= 1:
        raise FormatError(f"--util {plan.util:g}: expected a share above 0 and at most 1, such as 0.9")
    for flag, value in (("--memory-gb", plan.memory_gb), ("--overhead-gb", plan.overhead_gb)):
        if value is not None and not 0 <= value < 1e6:
            raise FormatError(f"{flag} {value:g}: expected a size in GB")
    if plan.memory_gb == 0:
        raise FormatError("--memory-gb 0: expected a size above 0")
    overhead = (2.0 if device.type == "cuda" else 0.0) if plan.overhead_gb is None else plan.overhead_gb
    if plan.memory_gb is None:
        whose = "this card's memory" if device.type == "cuda" else "this machine's memory"
        return Budget(card.total_bytes(device), plan.util, 1e9 * overhead, whose)
    return Budget(1e9 * plan.memory_gb, plan.util, 1e9 * overhead, "given")


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
