"""Row ranges side by side: one range per thread, each on one core.

torch's own threads meet at a barrier after every small operation, and on a busy machine all wait for the one that lost
its core. A range per thread has one meeting, at its end. Results come in the order of the ranges, so that what is summed
and written does not depend on who was faster.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

import torch

T = TypeVar("T")
MOST = 8  # reading and writing keep no more than these at work, and every range takes memory


def count() -> int:
    """How many ranges are in work at a time."""
    return max(1, min(MOST, torch.get_num_threads()))


class Workers:
    """A context manager around the threads; `over` runs work on them."""

    def __enter__(self) -> Workers:
        self._before = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(count(), "percard", initializer=torch.set_num_threads, initargs=(1,))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._before)  # threads that start later copy what was set last

    def over(self, work: Callable[[int, int], T], ranges: Iterable[tuple[int, int]]) -> Iterator[T]:
        """work(start, stop) of every range, in order; one range more than there are threads waits at most."""
        waiting: deque[Future[T]] = deque()
        try:
            for start, stop in ranges:
                waiting.append(self._pool.submit(work, start, stop))
                if len(waiting) > count():
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
