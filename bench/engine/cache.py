"""The static KV cache: keys and values of every layer, allocated once for a run."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .config import Config


@dataclass
class Cache:
    """`keys` and `values` are [layers, batch, kv_heads, length, head_dim], so that what a head reads in a step lies in one
    piece; sequence b has filled its first `lengths[b]` positions. What stands after them is never read: prompts are
    padded on the right, so the next token of a short sequence overwrites its padding.

    `lengths` lies on the host: one place that knows, no device round trip to read it.
    """

    keys: torch.Tensor
    values: torch.Tensor
    lengths: list[int]

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
        shape = (layers or config.layers, batch, config.kv_heads, length, config.head_dim)
        return cls(
            torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device), [0] * batch
        )

    @property
    def batch(self) -> int:
        return self.keys.shape[1]

    @property
    def room(self) -> int:
        """Positions of one sequence."""
        return self.keys.shape[3]

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
