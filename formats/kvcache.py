"""A paged cache of keys and values: what lies where. Ops read pages from here and describe them nowhere else.

One layer is two tensors, page-major, head before row. A page holds P tokens; one page of one head is one piece of memory:

    k, v   [pages, Hkv, P, D]         page  0                  1
                                      head  0     1     2      0     1     2
                                      row   0..P  0..P  0..P   0..P  0..P  0..P      a row is D numbers of one token

    token t of sequence b             page = table[b, t // P],  row = t % P,  slot = page * P + row
    table [B, at least S / P] int32   any page may be any sequence's; what a page held before is never read

Strides are free but for the last, which is 1: a view of another engine's cache is read in place. Rows past the length of a
sequence may hold anything, NaN too. Page 0 is as good as any other; a slot below 0 is no slot.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .spec import FormatError

PAGE = 64  # tokens, unless asked otherwise
PAGES = (16, 32, 64, 128)
LATER = ("int8", "k8v4", "int4", "int4-sym", "k8v4-sym")


@dataclass(frozen=True)
class KVSpec:
    """How keys and values are held, by the bits of each. 16 is "as they are": in the type of the model, fp32 on a CPU too."""

    k_bits: int = 16
    v_bits: int = 16

    @classmethod
    def parse(cls, text: str) -> KVSpec:
        """The spec of a printed name; FormatError for one that is not known."""
        if text == "bf16":
            return cls()
        why = "is not built yet" if text in LATER else "is not one"
        raise FormatError(f"cache spec {text!r} {why}; known: bf16")

    def __str__(self) -> str:
        return "bf16"


BF16 = KVSpec()


@dataclass(frozen=True, eq=False)
class KVPages:
    """The pages of one layer: k and v [pages, Hkv, P, D], alike in shape and type."""

    k: torch.Tensor
    v: torch.Tensor
    spec: KVSpec = BF16

    @property
    def page(self) -> int:
        """Tokens of a page."""
        return self.k.shape[2]

    @property
    def nbytes(self) -> int:
        return self.k.numel() * self.k.element_size() + self.v.numel() * self.v.element_size()


def new_pages(
    pages: int,
    heads: int,
    head_dim: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    page: int = PAGE,
    spec: KVSpec = BF16,
) -> KVPages:
    """Fresh pages of one layer, zero; FormatError for sizes that no op takes."""
    shape = (pages, heads, page, head_dim)
    made = KVPages(torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device), spec)
    check_pages("new_pages", made.k, made.v, str(spec))
    return made


def pages_of(length: int, page: int = PAGE) -> int:
    """How many pages `length` tokens take."""
    return -(-length // page)


def slots_of(table: torch.Tensor, positions: torch.Tensor, page: int) -> torch.Tensor:
    """Slots int64 [B] of one token per sequence, at `positions` int64 [B]; table [B, pages] int32."""
    held = table.gather(1, (positions // page)[:, None])[:, 0]
    return held.to(torch.int64) * page + positions % page


def check_pages(op: str, k: torch.Tensor, v: torch.Tensor, spec: str) -> None:
    """FormatError unless k and v are pages of one layer as `spec` holds them. Looks at shapes and strides only."""
    if spec != "bf16":
        KVSpec.parse(spec)
    if k.ndim != 4 or k.shape != v.shape or k.dtype != v.dtype or not k.is_floating_point():
        found = f"{k.dtype} {tuple(k.shape)} and {v.dtype} {tuple(v.shape)}"
        raise FormatError(f"{op}: the pages are {found}, expected k and v alike, [pages, Hkv, P, D] of a float type")
    page, size = k.shape[2:]
    if page not in PAGES:
        raise FormatError(f"{op}: a page holds {page} tokens, expected one of {', '.join(map(str, PAGES))}")
    if size % 16 or size < 16:
        raise FormatError(f"{op}: a head has {size} numbers, expected a multiple of 16")
    if k.stride(3) != 1 or v.stride(3) != 1:
        raise FormatError(f"{op}: the pages have strides {k.stride()} and {v.stride()}, expected 1 for the last")


def check_values(
    pages: KVPages,
    *,
    table: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
) -> None:
    """FormatError unless every page and slot that would be read or written exists. Exact and slow: reads the tensors."""
    count, page = pages.k.shape[0], pages.page
    if slots is not None and slots.numel() and int(slots.max()) >= count * page:
        raise FormatError(f"slots: {int(slots.max())} is beyond the last of {count} pages of {page} tokens")
    if slots is not None and (live := slots[slots >= 0]).unique().numel() != live.numel():
        raise FormatError("slots: one slot stands twice; two tokens would be written over each other")
    if table is None or lengths is None:
        return
    for b, length in enumerate(lengths.tolist()):
        used = table[b, : pages_of(length, page)].tolist()
        if length < 0 or length > table.shape[1] * page:
            raise FormatError(
                f"lengths: sequence {b} has {length} tokens, its row of the table {table.shape[1] * page}"
            )
        if wrong := [p for p in used if not 0 <= p < count]:
            raise FormatError(f"table: sequence {b} names page {wrong[0]}, there are {count}")
