"""Large zeroed tensors on a CPU in pages of 2 MiB, where the system gives them.

A cache is read in pieces of some KiB from all over hundreds of MiB. In pages of 4 KiB each piece costs a walk of the page table;
one of 2 MiB holds hundreds of pieces. Linux gives such pages to memory that asks (madvise, THP), and asking changes nothing else.
"""

from __future__ import annotations

import math
import mmap

import torch

_PAGE = 2 << 20
LEAST = 2 * _PAGE  # bytes; less is not worth a mapping of its own


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
    """torch.zeros of that shape, type and device; on a CPU a large one asks for huge pages."""
    size = math.prod(shape) * dtype.itemsize
    if torch.device(device).type != "cpu" or size < LEAST or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(shape, dtype=dtype, device=device)
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared memory gets none
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without huge pages, or no room for a mapping
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.frombuffer(memory, dtype=torch.uint8, count=size).view(dtype).view(shape)
