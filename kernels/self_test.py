"""The test of a body at load: does it give the reference's numbers at this very shape, on this very machine?

Wrong numbers of a kernel on a new card look like a bad model, and nobody notices for weeks. So each distinct (ops, spec, N, K,
packing, device) is tried once per process when its weight is packed: random rows, one and seventeen of them, through the
bodies that will serve (on a card 1024 as well, which may go another way); 64 rows of the weight through the references; within the tolerance that the op's contract states.
It costs a few milliseconds, beside what compiling costs anyway. On a CPU a tall weight is tried on its last 2048 rows.

Names no op: kernels/linear.py says which ones, and how the outputs of the first become arguments of the last.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..formats.layout import repack, stack_experts
from ..formats.tensor import ExpertsTensor, QuantTensor
from .conformance import difference, faults
from .op import Op

TOKENS = (1, 17)
FAILED = "failed its self-test"  # in the error of a weight that no body serves rightly
ROWS = 64  # of the weight go through the reference, for each number of tokens: the first ones and the last ones
CPU_ROWS = 2048
MANY = 1024  # rows that are tried on a card as well: there another way may serve a prompt
Arrange = Callable[
    [tuple[Any, ...], QuantTensor], tuple[Any, ...]
]  # (rows as the last op takes them, weight) -> arguments

_RESULTS: dict[tuple, str | None] = {}


def key_of(ops: Sequence[Op], bodies: Sequence[str], w: QuantTensor | ExpertsTensor, options: tuple = ()) -> tuple:
    """What one test stands for."""
    device = w.data.device
    return tuple(op.name for op in ops), tuple(bodies), str(w.spec), w.shape, w.packing, str(device), options


def result(key: tuple) -> str:
    """What the test of a key came to, in words for `explain`."""
    if key not in _RESULTS:
        return "not run"
    return "passed" if _RESULTS[key] is None else f"failed: {_RESULTS[key]}"


def fault(
    ops: Sequence[Op],
    bodies: Sequence[str],
    w: QuantTensor,
    arrange: Arrange,
    options: tuple = (),
) -> str | None:
    """None when the bodies named for `ops` serve this packed weight rightly, else the first thing that is wrong.

    Asked once per key; afterwards the answer is remembered. Whatever a body raises is a fault too.
    """
    return _remembered(key_of(ops, bodies, w, options), lambda: _tried(ops, bodies, w, arrange))


def experts_fault(op: Op, body: str, w: ExpertsTensor) -> str | None:
    """As `fault`, for the op of a stack of experts: both of its faces, on the first two experts. On a CPU, and of a tall
    weight, on its last rows; these are a weight of their own, so half of them may be gate rows."""
    return _remembered(key_of((op,), (body,), w), lambda: _experts_tried(op, body, w))


def _remembered(key: tuple, test: Callable[[], str | None]) -> str | None:
    if key not in _RESULTS:
        try:
            with torch.no_grad():
                _RESULTS[key] = test()
        except Exception as error:  # a compiler's, a driver's, a library's: none of them may reach the first request
            _RESULTS[key] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return _RESULTS[key]


def forget() -> None:
    """Every key is tested again at its next load."""
    _RESULTS.clear()


def rows_of(w: QuantTensor, start: int, stop: int) -> QuantTensor:
    """Rows start .. stop of a packed or plain weight, views; start at a multiple of 64, stop too or N."""
    shape = (stop - start, w.shape[1])
    if w.packing == "plain":
        zero = None if w.zero is None else w.zero[start:stop]
        return replace(w, data=w.data[start:stop], scale=w.scale[start:stop], zero=zero, shape=shape)
    tall = 16 if w.packing.startswith("rows16_") else 64
    end = -(-stop // tall) * tall
    data = w.data[start // 16 : end // 16] if tall == 16 else w.data[start:end]
    zero = None if w.zero is None else w.zero[:, start:end].contiguous()
    return replace(w, data=data, scale=w.scale[:, start:end].contiguous(), zero=zero, shape=shape)


def _tried(ops: Sequence[Op], bodies: Sequence[str], w: QuantTensor, arrange: Arrange) -> str | None:
    device, (n, k) = w.data.device, w.shape
    if device.type == "cpu" and n > CPU_ROWS:
        w = rows_of(w, (n - CPU_ROWS) // 64 * 64, n)
        n = w.shape[0]
    # Triton's interpreter is right about fp16 only.
    dtype = torch.float16 if os.environ.get("TRITON_INTERPRET") == "1" else torch.bfloat16
    random = torch.Generator(device).manual_seed(n * 1_000_003 + k)
    last_rows = (n - 1) // ROWS * ROWS
    tries = [*zip(TOKENS, (0, last_rows), strict=True), *([(MANY, 0)] if device.type == "cuda" else [])]
    for m, start in tries:
        x = torch.randn(m, k, generator=random, device=device).to(dtype)
        given: tuple[Any, ...] = (x,)
        for op, name in zip(ops[:-1], bodies[:-1], strict=True):
            want = op(*given, impl="reference")
            got = op(*given, impl=name)
            allowed = op.contract.tolerance(want, *op.contract.unwrap(*given))
            for part in zip(got, want, allowed, strict=True):
                wrong = difference(f"{op.name} {name}, M = {m}", *part)
                if wrong is not None:
                    return wrong
            given = got
        last, name = ops[-1], bodies[-1]
        y = last(*arrange(given, w), impl=name)
        stop = min(start + ROWS, n)
        flat = last.contract.unwrap(*arrange(given, repack(rows_of(w, start, stop), "plain")))
        want = last.run_of(last.body("reference"))(*flat)
        wrong = difference(
            f"{last.name} {name}, M = {m}, rows {start} .. {stop - 1}",
            y[:, start:stop],
            want,
            last.contract.tolerance(want, *flat),
        )
        if wrong is not None:
            return wrong
    return None


def _experts_tried(op: Op, body: str, w: ExpertsTensor) -> str | None:
    device, (count, n, k) = w.data.device, w.shape
    most = CPU_ROWS if device.type == "cpu" else 4 * CPU_ROWS
    start, count = max(0, n - most) // 64 * 64, min(count, 2)
    plain = stack_experts((repack(rows_of(w.expert(e), start, n), "plain") for e in range(count)), count)
    dtype = torch.float16 if os.environ.get("TRITON_INTERPRET") == "1" else torch.bfloat16
    random = torch.Generator(device).manual_seed(n * 1_000_003 + k)
    for m in TOKENS:
        ids = torch.randint(0, count, (m, 2), generator=random, device=device, dtype=torch.int32)
        for weights in (torch.rand(m, 2, generator=random, device=device), None):
            if weights is None and plain.shape[1] % 2:
                continue
            rows = m if weights is None else 2 * m
            x, sx = torch.randn(rows, k, generator=random, device=device), None
            if w.spec.act_bits == 8:
                x, sx = (40 * x).clamp(-127, 127).to(torch.int8), torch.rand(rows, generator=random, device=device) / 40
            else:
                x = x.to(dtype)
            wrong = faults(op, body, (x, plain, ids, weights, sx, dtype))
            if wrong:
                return f"{wrong[0]}, {m} tokens, {'up' if weights is None else 'down'}"
    return None
