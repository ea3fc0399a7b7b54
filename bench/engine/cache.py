"""The KV cache of a run: pages of every layer, allocated once, and where the next token of each sequence goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...formats.kvcache import BF16, PAGE, KVPages, KVSpec, new_pages, pages_of, quantize, slots_of
from .config import Config

VACANT = -1  # the length of a row that no sequence has
_RANDOM_PAGES = 64  # that differ; a pool of them again and again reads like any other


@dataclass(eq=False)
class Cache:
    """`pages` of each layer, of its own spec; all layers share one table and have the same number of pages.

    Sequence b owns the pages in its row of `table` int32 [B, pages] and has filled its first `lengths[b]` of `room` positions;
    VACANT means that the row is nobody's and takes no part. What stands after them is never read. `lengths` lies on the host: one place that knows, no device round trip to read it.
    `positions` and `slots` int64 [B] and `ends` int32 [B] are what a step reads of it, on the device and always in the same
    place (`point`). `steps` are the noted steps of models over this cache (Model.step). `rooms`, where sequences do not have
    all of `room`, says how much each has.
    """

    pages: tuple[KVPages, ...]
    table: torch.Tensor
    room: int
    lengths: list[int]
    positions: torch.Tensor = field(init=False)
    slots: torch.Tensor = field(init=False)
    ends: torch.Tensor = field(init=False)
    steps: dict[Any, Any] = field(default_factory=dict)
    rooms: Sequence[int] = ()

    def __post_init__(self) -> None:
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
        specs: Sequence[KVSpec] = (),
        mu: Sequence[torch.Tensor | None] = (),
    ) -> Cache:
        """An empty cache for `batch` sequences of at most `length` tokens; `layers` None = all of the model's.

        `specs` and `mu` (fp32 [Hkv, D] or None) one per layer; without them every layer is bf16, held in `dtype`.
        """
        count, each = layers or config.layers, pages_of(length)
        specs, mu = tuple(specs) or (BF16,) * count, tuple(mu) or (None,) * count
        if (len(specs), len(mu)) != (count, count):
            raise ValueError(f"{len(specs)} cache specs and {len(mu)} offsets, expected one of each of {count} layers")
        shape: Any = (batch * each, config.kv_heads, config.head_dim)
        offsets = [None if m is None else m.to(device).contiguous() for m in mu]
        pages = tuple(
            new_pages(*shape, dtype=dtype, device=device, spec=spec, mu=offset)
            for spec, offset in zip(specs, offsets, strict=True)
        )
        table = torch.arange(batch * each, dtype=torch.int32, device=device).view(batch, each)
        return cls(pages, table, length, [0] * batch)

    @property
    def batch(self) -> int:
        return self.table.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all that was allocated for keys, values and their scales."""
        return sum(pages.nbytes for pages in self.pages)

    @property
    def token_bytes(self) -> float:
        """The same by token that has room."""
        return self.nbytes / (self.table.numel() * PAGE)

    @torch.inference_mode()
    def fill_random(self, seed: int = 0) -> None:
        """Keys and values of the scale of real ones everywhere, for figures of speed; zeros would draw less power."""
        for pages in self.pages:
            device, spec = pages.k.device, pages.spec
            generator = torch.Generator(device).manual_seed(seed)
            for rows, words, bits in zip((pages.k, pages.v), pages.words, (spec.k_bits, spec.v_bits), strict=True):
                size = rows.shape[3] * (2 if bits == 4 else 1)
                count = min(_RANDOM_PAGES, len(rows))
                x = torch.randn(count, *rows.shape[1:3], size, generator=generator, device=device)
                if words is None:
                    _tile(rows, x.to(rows.dtype))
                    continue
                codes, scale, offset = quantize(x, bits, spec.symmetric)
                _tile(rows, codes)
                _tile(words[..., 0], scale)
                if offset is not None:
                    _tile(words[..., 1], offset)

    def rewind(self, length: int = 0) -> None:
        """Every sequence ends at `length` again; what follows will be overwritten."""
        if not 0 <= length <= self.room:
            raise ValueError(f"cannot rewind to {length}: the cache has {self.room} positions")
        self.lengths = [length] * self.batch

    def need(self, *new: int) -> None:
        """ValueError unless `new` more positions fit: of each sequence, or one number for every one of them."""
        each = new * self.batch if len(new) == 1 else new
        for n, more, room in zip(self.lengths, each, self.rooms or [self.room] * self.batch, strict=True):
            if n != VACANT and n + more > room:
                raise ValueError(
                    f"the cache has {room} positions, {n} are filled and {more} more are asked for; "
                    f"make it with new_cache(batch, length={n + more})"
                )

    def point(self) -> None:
        """Brings positions, slots and ends to one token after each sequence. Equal lengths bring nothing from the host."""
        first = self.lengths[0]
        if min(self.lengths) == max(self.lengths):
            self.positions.fill_(first)
            self.slots.copy_(self.table[:, first // PAGE]).mul_(PAGE).add_(first % PAGE)
        else:
            at = torch.tensor(self.lengths)
            self.positions.copy_(at.clamp_min(0))
            self.slots.copy_(slots_of(self.table, self.positions, PAGE))
            if VACANT in self.lengths:
                self.slots.masked_fill_((at == VACANT).to(self.slots.device), -1)
                self.ends.copy_(at.add_(1))
                return
        self.ends.copy_(self.positions).add_(1)

    def grow(self) -> None:
        """Every sequence has one token more."""
        self.lengths = [n if n == VACANT else n + 1 for n in self.lengths]

    def prompt_slots(self, width: int, counts: Sequence[int]) -> torch.Tensor:
        """Slots int64 [B * width] of the first `width` positions of each sequence; -1 past its count: padding has none."""
        at = torch.arange(width, device=self.table.device)
        slots = self.table[:, at // PAGE].to(torch.int64) * PAGE + at % PAGE
        if min(counts) < width:
            slots = slots.masked_fill(at >= torch.tensor(counts, device=at.device)[:, None], -1)
        return slots.view(-1)

    def chunk(self, counts: Sequence[int]) -> Chunk:
        """`counts[b]` tokens after what each sequence b holds."""
        device = self.table.device
        owner = torch.arange(self.batch).repeat_interleave(torch.tensor(counts))
        positions = torch.cat([torch.arange(n, n + m) for n, m in zip(self.lengths, counts, strict=True)]).to(device)
        slots = slots_of(self.table[owner.to(device)], positions, PAGE)
        starts = torch.tensor([0, *counts]).cumsum(0).to(device, torch.int32)
        ends = torch.tensor(self.lengths) + torch.tensor(counts)
        filled = tuple(self.lengths)
        return Chunk(self, filled, tuple(counts), positions, slots, starts, ends.to(device, torch.int32))


@dataclass(frozen=True, eq=False)
class Chunk:
    """Fresh tokens of every sequence, packed one sequence after another: N = sum(counts) of them.

    `before` tokens lie in the cache already. positions and slots int64 [N]; starts int32 [B + 1], ends int32 [B] (with the
    fresh ones).
    """

    cache: Cache
    before: tuple[int, ...]
    counts: tuple[int, ...]
    positions: torch.Tensor
    slots: torch.Tensor
    starts: torch.Tensor
    ends: torch.Tensor


def _tile(target: torch.Tensor, pages: torch.Tensor) -> None:
    """Some pages into all of them, again and again."""
    for start in range(0, target.shape[0], pages.shape[0]):
        part = target[start : start + pages.shape[0]]
        part.copy_(pages[: part.shape[0]])
