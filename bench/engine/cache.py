"""The KV cache of a run: pages of every layer, allocated once, and where the next token of each sequence goes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ...formats.kvcache import PAGE, KVPages, pages_of, slots_of
from .config import Config


@dataclass(eq=False)
class Cache:
    """`keys` and `values` are [layers, pages, kv_heads, PAGE, head_dim]; `pages` the same by layer, as ops take them.

    Sequence b owns the pages in its row of `table` int32 [B, pages] and has filled its first `lengths[b]` of `room` positions.
    What stands after them is never read: prompts are padded on the right, so the next token of a short sequence overwrites
    its padding. `lengths` lies on the host: one place that knows, no device round trip to read it. `positions` and `slots`
    int64 [B] and `ends` int32 [B] are what a step reads of it, on the device and always in the same place (`point`).
    `steps` are the noted steps of models over this cache (Model.step).
    """

    keys: torch.Tensor
    values: torch.Tensor
    table: torch.Tensor
    room: int
    lengths: list[int]
    pages: tuple[KVPages, ...] = field(init=False)
    positions: torch.Tensor = field(init=False)
    slots: torch.Tensor = field(init=False)
    ends: torch.Tensor = field(init=False)
    steps: dict[Any, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.pages = tuple(KVPages(k, v) for k, v in zip(self.keys, self.values, strict=True))
        self.positions = torch.zeros(self.batch, dtype=torch.int64, device=self.table.device)
        self.slots, self.ends = torch.zeros_like(self.positions), self.positions.to(torch.int32)

    @classmethod
    def new(
        cls,
        config: Config,
        batch: int,
        length: int,
        dtype: torch.dtype,
        device: torch.device,
        layers: int | None = None,
    ) -> Cache:
        """An empty cache for `batch` sequences of at most `length` tokens; `layers` None = all of the model's."""
        each = pages_of(length)
        shape = (layers or config.layers, batch * each, config.kv_heads, PAGE, config.head_dim)
        keys, values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        table = torch.arange(batch * each, dtype=torch.int32, device=device).view(batch, each)
        return cls(keys, values, table, length, [0] * batch)

    @property
    def batch(self) -> int:
        return self.table.shape[0]

    @property
    def nbytes(self) -> int:
        return 2 * self.keys.numel() * self.keys.element_size()

    def rewind(self, length: int = 0) -> None:
        """Every sequence ends at `length` again; what follows will be overwritten."""
        if not 0 <= length <= self.room:
            raise ValueError(f"cannot rewind to {length}: the cache has {self.room} positions")
        self.lengths = [length] * self.batch

    def need(self, new: int) -> None:
        """ValueError unless `new` more positions fit every sequence."""
        if max(self.lengths) + new > self.room:
            raise ValueError(
                f"the cache has {self.room} positions, {max(self.lengths)} are filled and {new} more are asked for; "
                f"make it with new_cache(batch, length={max(self.lengths) + new})"
            )

    def point(self) -> None:
        """Brings positions, slots and ends to one token after each sequence. Equal lengths bring nothing from the host."""
        first = self.lengths[0]
        if min(self.lengths) == max(self.lengths):
            self.positions.fill_(first)
            self.slots.copy_(self.table[:, first // PAGE]).mul_(PAGE).add_(first % PAGE)
        else:
            self.positions.copy_(torch.tensor(self.lengths))
            self.slots.copy_(slots_of(self.table, self.positions, PAGE))
        self.ends.copy_(self.positions).add_(1)

    def prompt_slots(self, width: int) -> torch.Tensor:
        """Slots int64 [B * width] of the first `width` positions of each sequence."""
        at = torch.arange(width, device=self.table.device)
        return (self.table[:, at // PAGE].to(torch.int64) * PAGE + at % PAGE).view(-1)
