"""Op: one operation with several bodies. The first body that does not refuse is the one that runs.

An op folder holds `contract.py` (what goes in and out), `reference.py`, `gpu.py`, `cpu.cpp`; its `__init__.py` names the
bodies in the order in which they are asked. A body refuses with a reason and a remedy; when all refuse, one error
lists every reason. Nothing falls back silently to something slow: the reference, and Triton's interpreter on a CPU,
run only when asked for (`impl="reference"`). The public face takes a QuantTensor; torch sees tensors and scalars
(`torch.ops.percard.<name>`, and `torch.ops.percard.<name>.<body>` when a body is asked for by name).

Which bodies a device has is settled once, at the first call there. After that a call costs the contract's check and, for
each body up to the one that serves, one look at what it takes (the packing of the weight, mostly); where the contract has a
`key`, only the first call of its kind does.

A contract module has, all on the flat arguments of its torch schema, whose first is a tensor of M rows:
    SCHEMA        text after the op's name: "(Tensor x, ...) -> Tensor"
    unwrap(...)   the public arguments -> the flat ones; copies what is strided in a way that bodies do not read
    check(...)    raises ValueError with the tensor's name, what it is and what it should be
    out_like(...) empty outputs, a tensor or a tuple; when M is 0 they are the answer and no body is called
    cost(...)     Cost(flops, bytes)
    native(out, ...) the integers and floats of the C++ function, pointers first
    tolerance(want, ...) how far, element by element, a body may be from the reference's answer `want`
    <body>_takes(...) None, or "reason; remedy": what that body does not serve of what `check` lets through
    key(...)      hashable: all that `check` and what bodies take, or yield, look at; need not be there. A call whose key was served
                  before is served alike, unchecked: it could only pass again
    plan(...)     what calls of one key have in common, as a function of a call's flat arguments that gives (outputs, the arguments
                  of the C++ function); need not be there
    <body>_remark(...) None, or what `explain` says of a call that it serves; need not be there
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch  # before percard._cpu: the C++ module then shares torch's OpenMP threads
from torch.compiler import is_compiling

from . import device

_LIBRARY = torch.library.Library("percard", "FRAGMENT")
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/ops.h, enum Dtype
MOST_KEYS = 1024  # kinds of calls that an op remembers

Refusal = str | None  # None: serves. Otherwise "reason; remedy"
Run = Callable[..., Any]


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

    `absent(device type)` says why this machine cannot run it on such a device; asked once, then remembered.
    `takes(*flat)` says what it does not serve; asked at every call, so it must be cheap and must not look at data.
    `load()` imports the body and returns its `run(*flat)`. `by_name_on`: device types where it is too slow to be
    taken without having been asked for. `yields(*flat)` says why it leaves a call that it takes to others unless asked for by
    name ("reason; remedy"), or None. `bind(*flat)`: outputs, and a bare call that fills them (for a Tape); None = by run.
    `plan(*flat)`: the `run` of calls that have these arguments' key (module docstring); None = `run` as it is.
    """

    name: str
    packing: str | None
    absent: Callable[[str], Refusal]
    takes: Callable[..., Refusal]
    load: Callable[[], Run]
    by_name_on: tuple[str, ...] = ()
    bind: Callable[..., tuple[Any, Callable[[], Any]]] | None = None
    yields: Callable[..., Refusal] | None = None
    plan: Callable[..., Run] | None = None

    def unasked(self, *flat: Any) -> Refusal:
        """None, or why this body is not taken for these arguments, of those it takes, when nobody named it."""
        if device_type(flat) in self.by_name_on:
            return f"slow on {device_type(flat)}, runs only when asked for with impl={self.name!r}"
        return None if self.yields is None else self.yields(*flat)

    def refuses(self, *flat: Any) -> Refusal:
        """None, or why this body does not serve these arguments, and what to do."""
        return self.absent(device_type(flat)) or self.takes(*flat)


def device_type(flat: Sequence[Any]) -> str:
    """Where a call happens: "cpu" or "cuda", by its first tensor."""
    return next(a.device.type for a in flat if isinstance(a, torch.Tensor))


def _several(out: Any) -> tuple[torch.Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def rows_contiguous(x: torch.Tensor) -> torch.Tensor:
    """`x` with its last dimension contiguous, copied only if it is not; the stride between rows may be anything."""
    return x if x.ndim == 0 or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


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


def cpu_body(name: str, packing: str | None, contract: ModuleType, takes: Callable[..., Refusal]) -> Body:
    """The C++ body of op `name`; `takes(*flat)` says what it does not serve, as `Body.takes` does."""

    def absent(where: str) -> Refusal:
        if where != "cpu":
            return f"serves tensors on a CPU, these are on {where}; use the triton body"
        try:
            native()
        except Unsupported as error:
            return str(error)
        return None

    def load() -> Run:
        function = getattr(native(), name)

        def run(*flat: Any) -> Any:
            out = contract.out_like(*flat)
            function(*contract.native(out, *flat))
            return out

        return run

    def bind(*flat: Any) -> tuple[Any, Callable[[], Any]]:
        out = contract.out_like(*flat)
        return out, functools.partial(getattr(native(), name), *contract.native(out, *flat))

    def plan(*given: Any) -> Run:
        function, ready = getattr(native(), name), contract.plan(*given)

        def run(*flat: Any) -> Any:
            out, arguments = ready(*flat)
            function(*arguments)
            return out

        return run

    return Body("cpu", packing, absent, takes, load, bind=bind, plan=plan if hasattr(contract, "plan") else None)


def triton_body(
    module: str,
    packing: str | None,
    takes: Callable[..., Refusal],
    yields: Callable[..., Refusal] | None = None,
) -> Body:
    """The Triton body in `module` (a gpu.py with `run(*flat)`); on a CPU it runs by name only, in Triton's interpreter."""

    def absent(where: str) -> Refusal:
        if where == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            return "needs a CUDA card; on a CPU set TRITON_INTERPRET=1 to test it, or use the cpu body"
        if where not in ("cpu", "cuda"):
            return f"serves tensors on a CUDA card, these are on {where}; move them"
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed; pip install triton"
        return device.lacks_tensor_cores() if where == "cuda" else None

    def load() -> Run:
        return importlib.import_module(module).run

    return Body("triton", packing, absent, takes, load, by_name_on=("cpu",), yields=yields)


def reference_body(run: Run, packing: str | None, takes: Callable[..., Refusal] | None = None) -> Body:
    """The plain torch body: exact and slow, so it serves only when asked for by name."""
    takes = takes or (lambda *flat: None)
    return Body("reference", packing, lambda where: None, takes, lambda: run, by_name_on=("cpu", "cuda"))


def _taken(body: Body) -> Callable[..., Refusal]:
    """What a call asks a body that it did not name."""
    yields = body.yields
    return body.takes if yields is None else lambda *flat: body.takes(*flat) or yields(*flat)


class Tape:
    """Calls that are made once and noted, to be made again on the same memory: what a CPU has in place of a CUDA graph.

    While noting, an op checks its arguments, allocates its outputs and runs. `again()` repeats the bare calls, without checks
    or allocations: who calls puts new numbers into the tensors that the noted calls read, and finds the results where they
    lay the first time. All that is computed must be noted; views need not be.
    """

    def __init__(self) -> None:
        self._calls: list[Callable[[], Any]] = []
        self._held: list[Any] = []  # the calls hold addresses only

    def note(self, call: Callable[[], Any], *held: Any) -> None:
        """Makes a call that works in place, and notes it; `held` are the tensors that it touches."""
        call()
        self._calls.append(call)
        self._held.append(held)

    def keep(self, function: Callable[..., torch.Tensor], *args: Any) -> torch.Tensor:
        """function(*args), whose result will lie where this one lies."""
        out = function(*args)
        self._calls.append(lambda: out.copy_(function(*args)))
        return out

    def again(self) -> None:
        for call in self._calls:
            call()


class Op:
    """A named operation: `op(x, w, ...)`, `op.explain(x, w, ...)`, and `torch.ops.percard.<name>` for compilers."""

    def __init__(self, name: str, contract: ModuleType, bodies: Sequence[Body]):
        self.name, self.contract, self.bodies = name, contract, tuple(bodies)
        self._named = {body.name: body for body in bodies}
        self._runs: dict[str, Run] = {}
        self._ready: dict[str, tuple[tuple[Callable[..., Refusal], Body], ...]] = {}
        self._key: Callable[..., Any] | None = getattr(contract, "key", None)
        self._served: dict[Any, Run] = {}
        self.torch_op = self._register("", self._serve)
        self._torch_ops = {b.name: self._register(f".{b.name}", functools.partial(self._serve_by, b)) for b in bodies}

    def _register(self, overload: str, serve: Run) -> Any:
        """Makes torch know the op (or one body of it, as an overload): schema, CPU and CUDA, shapes for compilers."""
        qualified = f"{self.name}{overload}"
        _LIBRARY.define(f"{qualified}{self.contract.SCHEMA}")
        _LIBRARY.impl(qualified, serve, "CPU")
        _LIBRARY.impl(qualified, serve, "CUDA")
        torch.library.register_fake(f"percard::{qualified}", self.contract.out_like, lib=_LIBRARY)
        return getattr(getattr(torch.ops.percard, self.name), overload[1:] or "default")

    def __call__(self, *args: Any, impl: str | None = None, tape: Tape | None = None, **kwargs: Any) -> Any:
        """Checks, takes the first body that does not refuse (or the one named by `impl`), runs it, notes it on a tape."""
        flat = self.contract.unwrap(*args, **kwargs)
        if tape is not None:
            given = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
            if any(rows_contiguous(a) is not a for a in given):
                raise ValueError(
                    f"{self.name}: a tensor has strides that are copied, a tape would not see the next ones"
                )
            return self._note(tape, impl, *flat)
        first = flat[0]
        # torch's dispatcher costs as much as all else here. Only tracing and autograd need to see the op.
        seen = type(first) is not torch.Tensor or first.requires_grad or is_compiling()
        if impl is None:
            return self.torch_op(*flat) if seen else self._serve(*flat)
        body = self._named.get(impl) or self.body(impl)  # which raises, naming those there are
        if seen or (body.by_name_on and first.device.type in body.by_name_on):
            return self._torch_ops[impl](*flat)
        return self._serve_by(body, *flat)

    def body(self, name: str) -> Body:
        """The body of that name; ValueError lists those there are."""
        for body in self.bodies:
            if body.name == name:
                return body
        raise ValueError(f"{self.name} has no body {name!r}; it has {', '.join(b.name for b in self.bodies)}")

    def run_of(self, body: Body) -> Run:
        """`run(*flat)` of a body, imported at its first use."""
        if body.name not in self._runs:
            self._runs[body.name] = body.load()
        return self._runs[body.name]

    def pick(self, *flat: Any, impl: str | None = None) -> Body:
        """The body that serves these arguments; Unsupported lists all refusals."""
        asked = self.bodies if impl is None else (self.body(impl),)
        refusals = []
        for body in asked:
            reason = body.refuses(*flat)
            if reason is None and impl is None:
                reason = body.unasked(*flat)
            if reason is None:
                return body
            refusals.append(f"{body.name}: {reason}")
        raise Unsupported(f"{self.name}: no body serves this call: " + " | ".join(refusals))

    def body_on(self, where: str, impl: str | None = None) -> Body:
        """The body that a device type takes at load time, before there are tensors: its `packing` is the weight's.

        Unsupported, with every reason, when this machine has none; `impl` names one and is held to the same.
        """
        refusals = []
        for body in self.bodies if impl is None else (self.body(impl),):
            reason = body.absent(where)
            if reason is None and impl is None and where in body.by_name_on:
                reason = f"slow on {where}, runs only when asked for with impl={body.name!r}"
            if reason is None:
                return body
            refusals.append(f"{body.name}: {reason}")
        raise Unsupported(f"{self.name}: no body serves {where}: " + " | ".join(refusals))

    def explain(self, *args: Any, **kwargs: Any) -> str:
        """A line per body: serves, or why it refuses. Never raises for a refusal."""
        flat = self.contract.unwrap(*args, **kwargs)
        where, lines, served = device_type(flat), [], False
        for body in self.bodies:
            reason = body.refuses(*flat)
            if reason is not None:
                word = f"refuses: {reason}"
            elif where in body.by_name_on:
                word = f"only when asked for (impl={body.name!r})"
            elif body.yields is not None and (reason := body.yields(*flat)) is not None:
                word = f"only when asked for (impl={body.name!r}): {reason}"
            else:
                word, served = ("stands by" if served else "serves"), True
            if reason is None and (said := getattr(self.contract, f"{body.name}_remark", lambda *_: None)(*flat)):
                word += f"; {said}"
            lines.append(f"{self.name:16} {body.name:10} {word}")
        return "\n".join(lines)

    def _serve(self, *flat: Any) -> Any:
        """What torch calls: check, then the first body of this device that takes the arguments."""
        key = None if self._key is None else self._key(*flat)
        if key is not None and (served := self._served.get(key)) is not None:
            return served(*flat)
        self.contract.check(*flat)
        first = flat[0]
        if first.shape[0] == 0:
            return self.contract.out_like(*flat)
        where = "cpu" if first.is_cpu else "cuda"
        for takes, body in self._ready.get(where) or self._settle(where):
            if takes(*flat) is None:
                return self._run_like(key, body, *flat)(*flat)
        return self.run_of(self.pick(*flat))(*flat)  # raises, with every reason

    def _serve_by(self, body: Body, *flat: Any) -> Any:
        """What torch calls when the body was named."""
        key = None
        if self._key is not None and not body.by_name_on:  # what those lack may change: TRITON_INTERPRET
            key = body.name, self._key(*flat)
            if (served := self._served.get(key)) is not None:
                return served(*flat)
        self.contract.check(*flat)
        self.pick(*flat, impl=body.name)
        return self.contract.out_like(*flat) if flat[0].shape[0] == 0 else self._run_like(key, body, *flat)(*flat)

    def _run_like(self, key: Any, body: Body, *flat: Any) -> Run:
        """How `body` runs these arguments; remembered for all that have their key, unless that is None."""
        if key is None:
            return self.run_of(body)
        run = self.run_of(body) if body.plan is None else body.plan(*flat)
        if len(self._served) >= MOST_KEYS:
            self._served.clear()
        self._served[key] = run
        return run

    def _note(self, tape: Tape, impl: str | None, *flat: Any) -> Any:
        """One call on a tape."""
        self.contract.check(*flat)
        body = self.pick(*flat, impl=impl)
        if body.bind is not None:
            out, call = body.bind(*flat)
        else:
            run = self.run_of(body)
            out = run(*flat)

            def call() -> None:
                fresh = run(*flat)
                for kept, new in zip(_several(out), _several(fresh), strict=True):
                    kept.copy_(new)

        tape.note(call, out, flat)
        return out

    def _settle(self, where: str) -> tuple[tuple[Callable[..., Refusal], Body], ...]:
        """The bodies that a device type has without asking, loaded, in their order; remembered."""
        there = [b for b in self.bodies if where not in b.by_name_on and b.absent(where) is None]
        for body in there:
            self.run_of(body)
        self._ready[where] = tuple((_taken(b), b) for b in there)
        return self._ready[where]

    def __repr__(self) -> str:
        return f"Op({self.name}: {' > '.join(b.name for b in self.bodies)})"
