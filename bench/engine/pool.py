"""One pool of pages for all sequences: lent at admission, given back when a sequence ends, is cancelled or never began.

    borrow     pages for prompt and answer together, so that nothing that runs ever stops for want of a page; None while
               others hold them; OverLong for what would never fit, which holds nothing
    batch      the cache of some sequences that run together: its table names their pages, wherever those lie
    give_back  the pages of a sequence that has ended, in whatever way

A page is any sequence's: what it held before is never read, so it is not cleared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from ...formats.kvcache import PAGE, KVPages, pages_of
from .cache import VACANT, Cache

if TYPE_CHECKING:
    from .model import Model


_KEPT = (
    16  # caches of so many numbers of rows, the last used: a noted step over one holds the activations of all layers
)


class OverLong(ValueError):
    """A request that this pool can never hold; the text says what it asks for and what there is."""


@dataclass(eq=False)
class Lease:
    """Pages of one sequence of at most `room` tokens, prompt and answer together; `length` tokens of it are in them.

    No pages: they were given back.
    """

    pages: list[int]
    room: int
    length: int = 0


@dataclass(eq=False)
class Pool:
    """`pages` of each layer, of which no sequence takes more than `limit` tokens' worth.

    `free` are the numbers of the pages that nobody holds. Caches of `batch` share the pages and are kept, one for each
    number of rows, so that noted steps over them can be taken again.
    """

    pages: tuple[KVPages, ...]
    limit: int
    free: list[int] = field(init=False)
    _caches: dict[int, Cache] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.free = list(range(self.count))

    @classmethod
    def of(cls, model: Model, tokens: int, limit: int | None = None) -> Pool:
        """A pool with room for `tokens` (in whole pages) of caches as `model` has them.

        `limit` tokens of one sequence at most, never more than the model's table of rotations covers. ValueError for
        less than a page.
        """
        if tokens < PAGE:
            raise ValueError(f"a pool of {tokens} tokens holds no page of {PAGE}; give it at least one")
        limit = model.max_len if limit is None else min(limit, model.max_len)
        whole = Cache.new(
            model.config, 1, tokens // PAGE * PAGE, model.dtype, model.device, specs=model.kv.specs, mu=model.kv.mu
        )
        return cls(whole.pages, limit)

    @property
    def count(self) -> int:
        """How many pages there are, lent ones included."""
        return self.pages[0].k.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all that was allocated for keys, values and their scales."""
        return sum(pages.nbytes for pages in self.pages)

    def never(self, prompt: int, answer: int) -> str | None:
        """None, or why a request of so many tokens can never run here."""
        if prompt < 1 or answer < 1:
            return f"a request of {prompt} prompt and {answer} answer tokens; give at least one of each"
        asked = f"{prompt} prompt and {answer} answer tokens"
        if prompt + answer > self.limit:
            return f"{asked} are above the {self.limit} of a sequence; shorten the request"
        need = pages_of(prompt + answer)
        if need > self.count:
            return f"{asked} need {need} pages of {PAGE} tokens, the pool has {self.count}; give it more memory"
        return None

    def borrow(self, prompt: int, answer: int) -> Lease | None:
        """Pages for a request, or None while others hold too many. OverLong, holding nothing, when it can never run."""
        if (why := self.never(prompt, answer)) is not None:
            raise OverLong(why)
        need = pages_of(prompt + answer)
        if need > len(self.free):
            return None
        return Lease([self.free.pop() for _ in range(need)], prompt + answer)

    def give_back(self, lease: Lease) -> None:
        """Takes the pages of a sequence that has ended. Twice is no harm: it then holds none."""
        self.free.extend(reversed(lease.pages))
        lease.pages.clear()

    def batch(self, leases: Sequence[Lease], rows: int | None = None) -> Cache:
        """The cache of these sequences, one row each, at the lengths they have.

        `rows` more than that leaves the last ones vacant: a step then gives numbers without meaning there and writes
        nothing. A later call with as many rows takes the same cache for other sequences. Who fills it tells the
        leases (`note`). ValueError for a lease without pages.
        """
        rows = len(leases) if rows is None else rows
        if not 1 <= len(leases) <= rows:
            raise ValueError(f"{len(leases)} sequences do not fit a batch of {rows}")
        if not all(lease.pages for lease in leases):
            raise ValueError("a sequence of this batch has given its pages back; leave it out")
        width = pages_of(self.limit)
        cache = self._caches.pop(rows, None)
        if cache is None:
            if len(self._caches) == _KEPT:
                del self._caches[next(iter(self._caches))]
            table = torch.zeros(rows, width, dtype=torch.int32, device=self.pages[0].k.device)
            cache = Cache(self.pages, table, self.limit, [VACANT] * rows)
        self._caches[rows] = cache
        # Entries past a sequence's own pages repeat its first one: never read, and a page that is there.
        named = [lease.pages + lease.pages[:1] * (width - len(lease.pages)) for lease in leases]
        named += [[0] * width] * (rows - len(leases))
        cache.table.copy_(torch.tensor(named, dtype=torch.int32))
        cache.lengths = [lease.length for lease in leases] + [VACANT] * (rows - len(leases))
        cache.rooms = [lease.room for lease in leases] + [0] * (rows - len(leases))
        return cache

    @staticmethod
    def note(cache: Cache, leases: Sequence[Lease]) -> None:
        """Tells sequences how long they have become in the cache that `batch` made of them."""
        for lease, length in zip(leases, cache.lengths, strict=False):
            lease.length = length
