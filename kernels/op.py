"""Op: one operation with several bodies. The first body that does not refuse is the one that runs.

An op folder holds `contract.py` (what goes in and out), `reference.py`, `gpu.py`, `cpu.cpp`; its `__init__.py` names the
bodies in the order in which they are asked. A body refuses with a reason and a remedy; when all refuse, one error
lists every reason. Nothing falls back silently to something slow: the reference runs only when asked for
(`impl="reference"`). The public face takes a QuantTensor; torch sees tensors and scalars (`torch.ops.percard.<name>`).

A contract module has, all on the flat arguments of its torch schema:
    SCHEMA        text after the op's name: "(Tensor x, ...) -> Tensor"
    unwrap(...)   the public arguments -> the flat ones
    check(...)    raises ValueError with the tensor's name, what it is and what it should be
    out_like(...) empty outputs, a tensor or a tuple
    cost(...)     Cost(flops, bytes)
    native(out, ...) the integers and floats of the C++ function, pointers first
    tolerance(...) what a body may differ by from the reference
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch  # before percard._cpu: the C++ module then shares torch's OpenMP threads

from . import device

_LIBRARY = torch.library.Library("percard", "FRAGMENT")
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/ops.h, enum Dtype


class Unsupported(NotImplementedError):
    """No body can serve this; the text lists who refused, why, and what would help."""


@dataclass(frozen=True)
class Cost:
    """Work of one call: floating or integer operations (a multiply-add is two) and bytes moved at least once."""

    flops: int
    bytes: int


@dataclass(frozen=True)
class Body:
    """One way to run an op. `packing` is the layout of the weight it reads (formats/layout.py), None without a weight.

    `refuses(*flat)` is None or "reason; remedy"; `load()` imports the body and returns its `run(*flat)`.
    """

    name: str
    packing: str | None
    refuses: Callable[..., str | None]
    load: Callable[[], Callable[..., Any]]


def pointer(tensor: torch.Tensor | None) -> int:
    """Address of a tensor's first element, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


@functools.cache
def native() -> ModuleType:
    """The C++ module percard._cpu, loaded once; Unsupported says how to get it when it is not there."""
    try:
        module = importlib.import_module("percard._cpu")
    except ImportError as error:
        raise Unsupported(
            f"the C++ module percard._cpu does not load ({error}); "
            "install percard with a C++17 compiler at hand, or ask for impl='reference'"
        ) from error
    forced = device.forced_isa()
    if forced is not None:
        module.force_isa(forced)
    return module


def native_isa() -> str:
    """Instruction set that the C++ bodies run with: scalar, avx2, avx_vnni, avx512_vnni or amx_int8."""
    return native().isa()


def cpu_body(name: str, packing: str | None, contract: ModuleType, takes: Callable[..., str | None]) -> Body:
    """The C++ body of op `name`: any strides along the first dimension, last dimension contiguous.

    `takes(*flat)` says what this body does not serve, as `Body.refuses` does.
    """

    def refuses(*flat: Any) -> str | None:
        where = _device_type(flat)
        if where != "cpu":
            return f"serves tensors on a CPU, these are on {where}; use the triton body"
        try:
            native()
        except Unsupported as error:
            return str(error)
        return takes(*flat)

    def load() -> Callable[..., Any]:
        function = getattr(native(), name)

        def run(*flat: Any) -> Any:
            flat = tuple(_last_dim_contiguous(a) if isinstance(a, torch.Tensor) else a for a in flat)
            out = contract.out_like(*flat)
            function(*contract.native(out, *flat))
            return out

        return run

    return Body("cpu", packing, refuses, load)


def triton_body(module: str, packing: str | None, takes: Callable[..., str | None]) -> Body:
    """The Triton body in `module` (a gpu.py with `run(*flat)`); on a CPU it runs only under Triton's interpreter."""

    def refuses(*flat: Any) -> str | None:
        where = _device_type(flat)
        if where == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            return "needs a CUDA card; on a CPU set TRITON_INTERPRET=1 to test it, or use the cpu body"
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed; pip install triton"
        if where == "cuda" and (reason := device.lacks_tensor_cores()):
            return reason
        return takes(*flat)

    return Body("triton", packing, refuses, lambda: importlib.import_module(module).run)


def reference_body(run: Callable[..., Any], packing: str | None) -> Body:
    """The plain torch body: exact and slow, so it serves only when asked for by name."""
    return Body("reference", packing, lambda *flat: None, lambda: run)


class Op:
    """A named operation: `op(x, w, ...)`, `op.explain(x, w, ...)`, and `torch.ops.percard.<name>` for compilers."""

    def __init__(self, name: str, contract: ModuleType, bodies: Sequence[Body]):
        self.name, self.contract, self.bodies = name, contract, tuple(bodies)
        self._runs: dict[str, Callable[..., Any]] = {}
        _LIBRARY.define(f"{name}{contract.SCHEMA}")
        _LIBRARY.impl(name, self._serve, "CPU")
        _LIBRARY.impl(name, self._serve, "CUDA")
        torch.library.register_fake(f"percard::{name}", contract.out_like, lib=_LIBRARY)
        self.torch_op = getattr(torch.ops.percard, name).default

    def __call__(self, *args: Any, impl: str | None = None, **kwargs: Any) -> Any:
        """Checks, picks the first body that does not refuse (or the one named by `impl`), runs it."""
        flat = self.contract.unwrap(*args, **kwargs)
        if impl is None:
            return self.torch_op(*flat)
        self.contract.check(*flat)
        return self.run_of(self.pick(*flat, impl=impl))(*flat)

    def body(self, name: str) -> Body:
        """The body of that name; ValueError lists those there are."""
        for body in self.bodies:
            if body.name == name:
                return body
        raise ValueError(f"{self.name} has no body {name!r}; it has {', '.join(b.name for b in self.bodies)}")

    def run_of(self, body: Body) -> Callable[..., Any]:
        """`run(*flat)` of a body, imported at its first use."""
        if body.name not in self._runs:
            self._runs[body.name] = body.load()
        return self._runs[body.name]

    def pick(self, *flat: Any, impl: str | None = None) -> Body:
        """The body that serves these arguments; Unsupported lists all refusals."""
        asked = self.bodies if impl is None else (self.body(impl),)
        refusals = []
        for body in asked:
            if body.name == "reference" and impl is None:
                refusals.append(f"{body.name}: slow, runs only when asked for with impl='reference'")
                continue
            reason = body.refuses(*flat)
            if reason is None:
                return body
            refusals.append(f"{body.name}: {reason}")
        raise Unsupported(f"{self.name}: no body serves this call: " + " | ".join(refusals))

    def body_on(self, device_type: str, impl: str | None = None) -> Body:
        """The body that a device would take at load time, before there are tensors (for packing a weight)."""
        if impl is not None:
            return self.body(impl)
        wanted = "triton" if device_type == "cuda" else "cpu"
        return next((b for b in self.bodies if b.name == wanted), self.body("reference"))

    def explain(self, *args: Any, **kwargs: Any) -> str:
        """A line per body: serves, or why it refuses. Never raises for a refusal."""
        flat = self.contract.unwrap(*args, **kwargs)
        lines, served = [], False
        for body in self.bodies:
            reason = body.refuses(*flat)
            if body.name == "reference":
                word = "only when asked for (impl='reference')"
            elif reason is None:
                word, served = ("stands by" if served else "serves"), True
            else:
                word = f"refuses: {reason}"
            lines.append(f"{self.name:16} {body.name:10} {word}")
        return "\n".join(lines)

    def _serve(self, *flat: Any) -> Any:
        """What torch calls. Which body it is was settled by the device and the packing of the weight at load."""
        self.contract.check(*flat)
        return self.run_of(self.pick(*flat))(*flat)

    def __repr__(self) -> str:
        return f"Op({self.name}: {' > '.join(b.name for b in self.bodies)})"


def _device_type(flat: Sequence[Any]) -> str:
    return next(a.device.type for a in flat if isinstance(a, torch.Tensor))


def _last_dim_contiguous(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.ndim == 0 or tensor.stride(-1) == 1 or tensor.numel() == 0 else tensor.contiguous()
