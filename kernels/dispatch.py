"""Which ops a layer takes at each number of tokens, and why: measured where it was measured, else a rule that says itself.

A layer holds one packed copy of its weight; a second route counts only when its body reads that copy (kernels/linear.py says
which routes there are, and is the only place that acts on the answer). Within an op the Config decides on the way (tiles,
split, making the weight whole for torch's matmul): kernels/tuning.py.

    dispatch.json   {"schema": 1, "entries": [{"card": "NVIDIA H200", "triton": "3.9", "spec": "w8a8", "n": 4096, "k": 4096,
                     "m_bucket": 4, "way": "matmul_w8a16", "us": {"matmul_w8a16": 9.1, "matmul_w8a8": 11.0}, "floor_us": 12}, ...]}

On a CPU `card` is "cpu". `floor_us` is torch's bf16 product of that size, whose weight nobody keeps: it is printed, not taken.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..formats.tensor import QuantTensor
from . import device as machine
from . import self_test, tuning
from .op import Op, Unsupported

BUCKETS = 17  # M up to 65536; above, what the last one says
FILE = Path(__file__).with_name("dispatch.json")


class Choice(NamedTuple):
    """The last op of a route, and why this one: an entry of dispatch.json, or the words of a rule."""

    way: str
    why: str


@functools.cache
def table(triton_version: str) -> dict[tuple, dict[str, Any]]:
    """Measured choices by (card, spec, n, k, bucket): the packaged file, then dispatch.json in the user's folder."""
    found: dict[tuple, dict[str, Any]] = {}
    for path in (FILE, tuning.user_folder() / "dispatch.json"):
        for e in tuning.read(path):
            if e["card"] == "cpu" or e["triton"] == tuning.release(triton_version):
                found[e["card"], e["spec"], e["n"], e["k"], e["m_bucket"]] = e
    return found


def choose(
    entry: dict[str, Any] | None,
    bucket: int,
    first: str,
    second: str,
    most: int,
    obstacle: str | None,
    on_card: bool,
    weak_int8: bool = False,
) -> Choice:
    """Between the route that ends in op `first` and the one that ends in `second`.

    `entry` is the measured choice or None; `obstacle` says why the second route cannot read this copy, None if it can;
    `most` is the largest M for which the rule prefers it on a card, where weight bytes are all and quantising the
    activations is one launch more. `weak_int8`: the card multiplies int8 slower than bf16.
    """
    m = 1 << bucket
    if obstacle is not None:
        return Choice(first, f"the one route of this copy: {obstacle}")
    if entry is not None and entry["way"] in (first, second):
        times = ", ".join(f"{name} {us:.1f} us" for name, us in entry["us"].items())
        floor = entry.get("floor_us")
        return Choice(entry["way"], f"measured: {times}" + (f", bf16 {floor:.1f} us" if floor else ""))
    if not on_card:
        return Choice(first, "not measured here, and on a CPU 8-bit products are the cheaper ones")
    if m > 64 and weak_int8:
        return Choice(second, "rule: this card multiplies int8 slower than bf16, so the weight is made whole")
    if m <= most:
        return Choice(second, f"rule: up to M = {most} the weight's bytes are all, and no activation is quantised")
    return Choice(first, f"rule: above M = {most} 8-bit products count")


def config_words(gpu: Any, shape: Any, card: Any, triton_version: str, invariant: bool = False) -> str:
    """The Config that a Triton body takes for a problem, and where it is from, with the figures if it was measured."""
    if invariant and hasattr(gpu, "invariant"):
        return f"{gpu.invariant(shape, card)}, the same for every M (batch_invariant)"
    config = gpu.config_for(shape, card)
    way = f"; {gpu.why(config, shape, card)}" if hasattr(gpu, "why") else ""
    path = Path(gpu.__file__).with_name("tuned.json")
    names = getattr(gpu, "Shape", tuning.Shape)._fields
    entry = tuning.entries(path, triton_version, gpu.OP_VERSION, names).get(tuning.key(shape, card))
    if entry is None:
        return f"{config}, by the heuristic for M <= {1 << tuning.bucket(shape.m)}, nothing measured{way}"
    times = [f"{entry[name]:.1f} us {word}" for name, word in _TIMES if entry.get(name)]
    return f"{config}, measured for M <= {1 << tuning.bucket(shape.m)}: {', '.join(times)}{way}"


def triton_version() -> str:
    """Of the Triton that is installed, "0.0" without one."""
    if importlib.util.find_spec("triton") is None:
        return "0.0"
    return importlib.import_module(f"{__package__}.inspection").triton_version()


def told(
    ops: Sequence[Op],
    why: str,
    rows: torch.Tensor,
    w: QuantTensor,
    arrange: Callable[..., tuple[Any, ...]],
    impl: str | None,
    batch_invariant: bool,
) -> str:
    """Lines that tell a route: ops and reason, the Config of each Triton body, the self-test, what each body says.

    `arrange(op, given)` makes the arguments of the last op.
    """
    (m, k), n, device = rows.shape, w.shape[0], w.data.device
    where = machine.card_of(device).name if device.type == "cuda" else device.type
    lines = [f"linear [{m}, {k}] x {w.spec} [{n}, {k}] as {w.packing} on {where}"]
    lines.append(f"{'route':16} {' > '.join(op.name for op in ops)}: {why}")
    given: tuple[Any, ...] = (rows,)
    tables, names = [], []
    for op in ops:
        last = op is ops[-1]
        arguments = arrange(op, given) if last else given
        tables.append(op.explain(*arguments))
        try:
            body = op.pick(*op.contract.unwrap(*arguments), impl=impl).name
        except Unsupported:
            break
        names.append(body)
        if body == "triton":
            gpu = importlib.import_module(f"{__package__}.{op.name}.gpu")
            group = (w.spec.group or k) if last else k
            if last and hasattr(gpu, "group_of"):
                group = gpu.group_of(w.scale, k, group)
            shape = tuning.Shape(m, n if last else 0, k, group, rows.dtype)
            words = config_words(gpu, shape, machine.card_of(device), triton_version(), batch_invariant)
            lines.append(f"{op.name:16} {words}")
        if not last:
            given = op(*given, impl=impl)
    if len(names) == len(ops):
        lines.append(f"{'self-test':16} {self_test.result(self_test.key_of(ops, names, w))}")
    return "\n".join([*lines, *tables])


_TIMES = (("us", "this one"), ("heuristic_us", "the heuristic's"), ("floor_us", "torch bf16"))
