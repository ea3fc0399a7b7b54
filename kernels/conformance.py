"""Does a body agree with its reference? Asked by the tests, and by the bench before it times anything.

Memory that an op leaves unwritten starts as NaN (integers: their largest number), so that it cannot look right by chance.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from ..formats.kvcache import KVPages
from ..formats.layout import repack, repack_experts
from ..formats.tensor import ExpertsTensor, QuantTensor
from .op import Op, Run

Expectation = tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh memory of torch holds NaN, or the largest integer, while this is open: outputs and workspaces alike."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic  # a module that makes its attributes when asked
    fill = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = fill


def _twin(t: torch.Tensor) -> torch.Tensor:
    """A copy with the strides of `t`."""
    return torch.empty(0, dtype=t.dtype, device=t.device).set_(  # type: ignore[call-overload]
        t.untyped_storage().clone(), t.storage_offset(), t.size(), t.stride()
    )


def packed(op: Op, impl: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """`args` with every weight packed as the body reads it, and copies of what it writes in place."""
    packing = op.body(impl).packing

    def ready(a: Any) -> Any:
        if isinstance(a, ExpertsTensor):
            return repack_experts(a, op.contract.PACKINGS[impl][a.spec.weight_bits])
        if isinstance(a, KVPages) and hasattr(op.contract, "written"):  # each body writes into pages of its own
            return replace(a, k=_twin(a.k), v=_twin(a.v), scales=None if a.scales is None else _twin(a.scales))
        return repack(a, packing) if packing and isinstance(a, QuantTensor) else a

    found = tuple(ready(a) for a in args)
    in_place = getattr(op.contract, "IN_PLACE", ())
    return tuple(_twin(a) if i in in_place else a for i, a in enumerate(found))


def answer(op: Op, impl: str, args: tuple[Any, ...], run: Run | None = None) -> tuple[torch.Tensor, ...]:
    """What a body makes of the op's public arguments (weight in any packing), in poisoned memory; always a tuple.

    What the op writes in place (contract.written) comes after its outputs. `run(*flat)` stands in for the body: the same one under a Config of the caller's.
    """
    ready = packed(op, impl, args)
    with poisoned_memory():
        out = op(*ready, impl=impl) if run is None else run(*op.contract.unwrap(*ready))
    out = out if isinstance(out, tuple) else (out,)
    if hasattr(op.contract, "written"):
        out = (*out, *op.contract.written(*op.contract.unwrap(*ready)))
    return out


def expectation(op: Op, args: tuple[Any, ...]) -> Expectation:
    """What the reference makes of the op's public arguments, and how far a body may be from it, output by output."""
    want = answer(op, "reference", args)
    flat = op.contract.unwrap(*packed(op, "reference", args))
    allowed = op.contract.tolerance(want if len(want) > 1 else want[0], *flat)
    return want, allowed if isinstance(allowed, tuple) else (allowed,)


def faults(
    op: Op, impl: str, args: tuple[Any, ...], run: Run | None = None, against: Expectation | None = None
) -> list[str]:
    """What is wrong with a body's answer to the op's public arguments; an empty list when it is in the op's tolerance.

    `against` is what `expectation` said of these arguments, for a caller who tries several bodies.
    """
    want, allowed = expectation(op, args) if against is None else against
    got = answer(op, impl, args, run)
    names = [f"{op.name} {impl}, output {i}" if len(want) > 1 else f"{op.name} {impl}" for i in range(len(want))]
    found = [difference(*each) for each in zip(names, got, want, allowed, strict=True)]
    return [text for text in found if text is not None]


def difference(name: str, got: torch.Tensor, want: torch.Tensor, allowed: torch.Tensor) -> str | None:
    """None when |got - want| <= allowed everywhere and both are finite in the same places; else the worst element."""
    if got.dtype != want.dtype or got.shape != want.shape:
        return f"{name}: {got.dtype} {tuple(got.shape)}, expected {want.dtype} {tuple(want.shape)}"
    if got.numel() == 0:
        return None
    a, b = got.double(), want.double()
    off = (a - b).abs() - allowed.double()
    off = torch.where(torch.isfinite(a) & torch.isfinite(b), off, torch.zeros_like(off))
    off = torch.where(torch.isfinite(a) != torch.isfinite(b), torch.full_like(off, torch.inf), off)
    wrong = int((off > 0).sum())
    if not wrong:
        return None
    at = tuple(int(i) for i in torch.unravel_index(off.argmax(), off.shape))
    values = f"got {float(a[at]):.9g}, want {float(b[at]):.9g} within {float(allowed[at]):.3g}"
    return f"{name}: {wrong} of {got.numel()} elements are off, the worst at {at}: {values}"
