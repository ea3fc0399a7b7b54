"""What this machine is. Asked lazily, answered once; nothing here runs at import."""

from __future__ import annotations

import contextlib
import functools
import os
from dataclasses import dataclass

import torch

ISAS = ("scalar", "avx2", "avx_vnni", "avx512_vnni", "amx_int8")


@dataclass(frozen=True)
class Card:
    """A CUDA device: name, compute capability times ten (90 = Hopper), SM count, bytes of shared memory and of L2."""

    name: str
    sm: int
    sms: int
    shared_bytes: int
    l2_bytes: int


def has_card() -> bool:
    """True when torch sees a CUDA device. Initialises nothing."""
    return torch.cuda.is_available()


def cards() -> int:
    """How many CUDA devices torch sees."""
    return torch.cuda.device_count()


@functools.cache
def card(index: int = 0) -> Card:
    """The CUDA device `index`; RuntimeError (torch's) without one."""
    props = torch.cuda.get_device_properties(index)
    shared = getattr(props, "shared_memory_per_block_optin", 0)
    return Card(props.name, props.major * 10 + props.minor, props.multi_processor_count, shared, props.L2_cache_size)


@functools.cache
def lacks_tensor_cores() -> str | None:
    """None, or why the Triton bodies cannot serve the card that is there."""
    sm = card().sm
    return None if sm >= 80 else f"{card().name} is sm_{sm}; the kernels need sm_80 (Ampere) or newer; use torch's fp16"


@functools.cache
def forced_isa() -> str | None:
    """Instruction set that PERCARD_ISA asks the C++ bodies to stay below, None for the best there is."""
    name = os.environ.get("PERCARD_ISA")
    if name is not None and name not in ISAS:
        raise ValueError(f"PERCARD_ISA={name!r} is unknown; choose one of {', '.join(ISAS)}")
    return name


# What the heuristics are drawn for, and what they are asked with where there is no card (Triton's interpreter).
H200 = Card("NVIDIA H200", 90, 132, 232448, 50 << 20)


def card_of(where: torch.device) -> Card:
    """The card that a tensor's device is; the H200 that the kernels are drawn for when it is no card."""
    return card(where.index or 0) if where.type == "cuda" else H200


def current(where: torch.device) -> contextlib.AbstractContextManager:
    """Makes the card of a tensor the one that kernels start on; nothing to do for a CPU."""
    return torch.cuda.device(where) if where.type == "cuda" else contextlib.nullcontext()
