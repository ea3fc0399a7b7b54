"""linear(x, w, bias): the one place that knows which op a spec means. QuantLinear is the one nn.Module.

    spec            ops                                 spec            ops
    w8a8            quantize_rows, matmul_w8a8          w8a16*          matmul_w8a16
    w4a8*           quantize_rows, matmul_w4a8          w4a16*          matmul_w4a16
    anything else   Unsupported, with what to take instead

A weight is packed once, at load, for the body that will serve on its device, and that body is tried there against the
reference: `prepare(w, device)`. One packed copy serves every M; where it allows a second route, the op changes with M, here
and nowhere else: `explain(x, w)` tells which ops, which Config, and why. With `batch_invariant=True` nothing looks at M.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..formats import affine, layout
from ..formats.spec import QuantSpec
from ..formats.tensor import ExpertsTensor, QuantTensor
from . import device as machine
from . import dispatch, tuning
from . import self_test as _self_test
from .matmul_w4a8 import matmul_w4a8
from .matmul_w4a16 import matmul_w4a16
from .matmul_w8a8 import matmul_w8a8
from .matmul_w8a16 import matmul_w8a16
from .moe_matmul import moe_matmul
from .op import Op, Tape, Unsupported
from .quantize_rows import quantize_rows
from .rows import Rows

# (bits of a weight, bits of an activation) -> the ops of a linear, in order; the last one reads the weight.
ROUTES: dict[tuple[int, int], tuple[Op, ...]] = {
    (8, 8): (quantize_rows, matmul_w8a8),
    (8, 16): (matmul_w8a16,),
    (4, 16): (matmul_w4a16,),
    (4, 8): (quantize_rows, matmul_w4a8),
}
# A second route that may read the same packed copy, and the largest M for which a card's rule prefers it (dispatch.py).
ALSO: dict[tuple[int, int], tuple[tuple[Op, ...], int]] = {
    (8, 8): ((matmul_w8a16,), 16),
    (4, 8): ((matmul_w4a16,), 4),
}
# Bodies that make a copy of another packing whole by chunks and let torch multiply (way D), for many rows.
MADE_WHOLE = {("matmul_w8a16", "triton", "rows8")}
NOT_YET: dict[tuple[int, int], str] = {
    (3, 16): "no op multiplies 3-bit weights yet; quantize to w4a16-g64, or dequantize with formats.affine.dequantize",
}


def ops_of(spec: QuantSpec) -> tuple[Op, ...]:
    """The ops that a linear with this spec runs, in order; Unsupported says what to take instead."""
    key = (spec.weight_bits, spec.act_bits)
    if spec.float_format is None and key in ROUTES:
        return ROUTES[key]
    why = "no op multiplies this float format; quantize the 16-bit source to w8a8 or w4a16-g128"
    raise Unsupported(f"linear: {spec}: {NOT_YET[key] if spec.float_format is None else why}")


def linear(
    x: torch.Tensor,
    w: torch.Tensor | QuantTensor,
    bias: torch.Tensor | None = None,
    *,
    impl: str | None = None,
    batch_invariant: bool = False,
    tape: Tape | None = None,
) -> torch.Tensor:
    """x [..., K] times w [N, K], plus bias [N]: [..., N] in the type of x (bf16, fp16 or fp32).

    `w` is a tensor (torch's own matmul, which promises nothing about batches) or a QuantTensor that `prepare` packed.
    `impl` names a body ("reference" takes a plain weight). `batch_invariant`: the bits of a row of y do not depend on
    the other rows of x, nor on their number. `tape` notes the calls. ValueError for sizes, types and devices that do not
    fit; Unsupported, with every reason, when no body serves.
    """
    if isinstance(w, torch.Tensor):
        product = nn.functional.linear
        return product(x, w, bias) if tape is None else tape.keep(product, x, w, bias)
    n, k = w.shape
    if x.shape[-1] != k:
        raise ValueError(f"linear: x has shape {tuple(x.shape)}, expected [..., {k}] for a weight [{n}, {k}]")
    rows = x if x.ndim == 2 else x.reshape(-1, k)
    ops = _ops_for(rows, w, impl, batch_invariant)
    y = _along(ops, rows, w, bias, impl, batch_invariant, tape)
    return y if x.ndim == 2 else y.reshape(*x.shape[:-1], n)


def _along(
    ops: tuple[Op, ...],
    rows: torch.Tensor,
    w: QuantTensor,
    bias: torch.Tensor | None = None,
    impl: str | None = None,
    batch_invariant: bool = False,
    tape: Tape | None = None,
) -> torch.Tensor:
    """One route: what each op gives is what the next one takes."""
    given: tuple[Any, ...] = (rows,)
    for op in ops[:-1]:
        given = op(*given, impl=impl, tape=tape)
    return ops[-1](*_arguments(ops[-1], given, w, bias, rows.dtype, batch_invariant), impl=impl, tape=tape)


def quantizes(
    rows: torch.Tensor, w: torch.Tensor | QuantTensor, *, impl: str | None = None, batch_invariant: bool = False
) -> bool:
    """Whether `linear` begins with quantize_rows for so many rows of this type, so that a fused producer may do it instead."""
    return isinstance(w, QuantTensor) and _ops_for(rows, w, impl, batch_invariant)[0] is quantize_rows


def linear_quantized(
    rows: Rows,
    w: QuantTensor,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    *,
    impl: str | None = None,
    batch_invariant: bool = False,
    tape: Tape | None = None,
) -> torch.Tensor:
    """`linear` of rows that a producer made int8 already: (q [M, K], scale [M], row_sum [M]) -> [M, N] in `dtype`.

    Producers are quantize_rows, rmsnorm_quantize and silu_mul_quantize. Unsupported for a spec of 16-bit activations.
    """
    op = ops_of(w.spec)[-1]
    if op not in (matmul_w8a8, matmul_w4a8):
        raise Unsupported(f"linear: {w.spec} multiplies rows as they are, these are int8; call linear with the rows")
    return op(*_arguments(op, rows, w, bias, dtype, batch_invariant), impl=impl, tape=tape)


def _ops_for(rows: torch.Tensor, w: QuantTensor, impl: str | None, batch_invariant: bool) -> tuple[Op, ...]:
    """The ops of one call."""
    by_m = impl is None and not batch_invariant and (w.spec.weight_bits, w.spec.act_bits) in ALSO
    # A graph that torch compiles holds for many M: it takes the spec's own route.
    return _ops_at(rows, w) if by_m and not torch.compiler.is_compiling() else ops_of(w.spec)


def _arguments(
    op: Op,
    given: tuple[Any, ...],
    w: QuantTensor,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    batch_invariant: bool = False,
) -> tuple[Any, ...]:
    """Arguments of the op that reads the weight; `given` are rows, or what quantize_rows made of them."""
    if op is matmul_w8a8:  # int32 sums and one epilogue: batch-invariant whatever the Config
        return *given[:2], w, bias, dtype
    if op is matmul_w4a8:
        return (*given, w, bias, dtype, True) if batch_invariant else (*given, w, bias, dtype)
    return (*given, w, bias, True) if batch_invariant else (*given, w, bias)


def _ops_at(rows: torch.Tensor, w: QuantTensor) -> tuple[Op, ...]:
    """The ops that a weight takes for so many rows."""
    routes = _routes(w.spec, w.shape, w.packing, w.data.device, rows.dtype)
    return routes[min(tuning.bucket(rows.shape[0]), dispatch.BUCKETS - 1)][0]


@functools.lru_cache(maxsize=4096)
def _routes(
    spec: QuantSpec, shape: tuple[int, int], packing: str, device: torch.device, dtype: torch.dtype
) -> tuple[tuple[tuple[Op, ...], dispatch.Choice], ...]:
    """The ops of a layer by bucket of M, with the reason: settled once, at the first call."""
    first = ops_of(spec)
    second, most = ALSO[spec.weight_bits, spec.act_bits]
    on_card = device.type == "cuda"
    name = machine.card_of(device).name if on_card else "cpu"
    weak_int8 = on_card and machine.card_of(device).sm == 103  # a B300: int8 at a fourteenth of bf16
    table = dispatch.table(dispatch.triton_version() if on_card else "0.0")  # a CPU's serving path does not load Triton
    found = []
    for bucket in range(dispatch.BUCKETS):
        entry = table.get((name, str(spec), *shape, bucket))
        obstacle = _obstacle(second, packing, device, dtype, (1 << bucket) // 2 + 1)
        names = (first[-1].name, second[-1].name)
        choice = dispatch.choose(entry, bucket, *names, most, obstacle, on_card, weak_int8)
        found.append((second if choice.way == second[-1].name else first, choice))
    return tuple(found)


def _obstacle(ops: tuple[Op, ...], packing: str, device: torch.device, dtype: torch.dtype, m: int) -> str | None:
    """None, or why a second route does not read this packed copy for M rows."""
    try:
        body = ops[-1].body_on(device.type)
    except Unsupported as error:
        return str(error)
    if body.packing != packing:
        whole = (ops[-1].name, body.name, packing) in MADE_WHOLE
        if whole and m > 64 and dtype == torch.bfloat16:
            return None
        also = ", this one for more than 64 rows of bf16" if whole else ""
        return f"{ops[-1].name} reads {body.packing}, the copy is {packing}{also}"
    if device.type == "cuda" and dtype == torch.float32:
        return f"{ops[-1].name} multiplies 16-bit activations on a card, these are float32"
    return None


def prepare(
    w: QuantTensor, device: torch.device | str, impl: str | None = None, *, self_test: bool = True
) -> QuantTensor:
    """`w` on `device`, packed for the body that serves there (or for the one that `impl` names). Once, at load.

    Each distinct shape is tried once per process against the reference (self_test.py); a body that fails is left out
    with a warning when another one serves. Unsupported, with every reason, when this machine has no body, or none that
    passes.
    """
    device = torch.device(device)
    ops = ops_of(w.spec)
    wrong: list[str] = []
    for names in _bodies(ops, device.type, impl):
        body = ops[-1].body(names[-1])
        packed = w
        if body.packing is not None and (body.packing != w.packing or device != w.data.device):
            packed = layout.repack(layout.repack(w, "plain").to(device), body.packing)
        slow = any(device.type in op.body(name).by_name_on for op, name in zip(ops, names, strict=True))
        arrange = functools.partial(_arguments, ops[-1])
        fault = _self_test.fault(ops, names, packed, arrange) if self_test and not slow else None
        if fault is None:
            if wrong:
                warnings.warn(f"linear: {ops[-1].name} {names[-1]} serves, since {'; '.join(wrong)}", stacklevel=2)
            return packed
        wrong.append(f"{ops[-1].name} {names[-1]} {_self_test.FAILED} at {w.shape} {w.spec} on {device}: {fault}")
    remedy = "its numbers cannot be trusted here: try another Triton or driver, and report it; self_test=False loads it as is"
    raise Unsupported(f"linear: {'; '.join(wrong)}; {remedy}")


def _bodies(ops: tuple[Op, ...], where: str, impl: str | None) -> list[tuple[str, ...]]:
    """The bodies of a route that may serve on a device type, by preference; Unsupported when there is none."""
    front = [op.body_on(where, impl).name for op in ops[:-1]]
    first = ops[-1].body_on(where, impl).name
    there = [b.name for b in ops[-1].bodies if b.absent(where) is None and where not in b.by_name_on]
    return [(*front, name) for name in dict.fromkeys([first, *(there if impl is None else ())])]


def explain(
    x: torch.Tensor,
    w: torch.Tensor | QuantTensor,
    bias: torch.Tensor | None = None,
    *,
    impl: str | None = None,
    batch_invariant: bool = False,
) -> str:
    """What `linear` does with these arguments and why, in lines: route, Config, self-test, and each body's answer."""
    if isinstance(w, torch.Tensor):
        return f"linear: a {w.dtype} tensor, torch's own matmul"
    rows = x.reshape(-1, x.shape[-1])
    first, device = ops_of(w.spec), w.data.device
    by_m = impl is None and not batch_invariant and (w.spec.weight_bits, w.spec.act_bits) in ALSO
    ops, why = first, "the one route of this spec"
    if by_m:
        routes = _routes(w.spec, w.shape, w.packing, device, rows.dtype)
        ops, choice = routes[min(tuning.bucket(rows.shape[0]), dispatch.BUCKETS - 1)]
        why = choice.why
    elif batch_invariant:
        why = "batch_invariant: one route and one Config whatever M"
    arrange = functools.partial(_arguments, w=w, bias=bias, dtype=x.dtype, batch_invariant=batch_invariant)
    return dispatch.told(ops, why, rows, w, arrange, impl, batch_invariant)


def ways(rows: torch.Tensor, w: QuantTensor) -> dict[str, Callable[[], torch.Tensor]]:
    """The routes that this packed copy allows for so many rows, by the name of their last op: what a tuner compares."""
    found = {ops_of(w.spec)[-1].name: ops_of(w.spec)}
    second = ALSO.get((w.spec.weight_bits, w.spec.act_bits))
    if second is not None and _obstacle(second[0], w.packing, w.data.device, rows.dtype, rows.shape[0]) is None:
        found[second[0][-1].name] = second[0]
    return {name: functools.partial(_along, ops, rows, w) for name, ops in found.items()}


def moe(
    x: torch.Tensor,
    w13: ExpertsTensor,
    w2: ExpertsTensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    *,
    impl: str | None = None,
    batch_invariant: bool = False,
) -> torch.Tensor:
    """The experts of a layer: x [T, K], w13 [E, 2I, K] (gate rows, then up rows), w2 [E, H, I] -> [T, H] in the type of x.

    ids [T, topk] name the experts of each token, -1 none; weights [T, topk] weigh what they say. Both weights as
    `prepare_experts` packed them, of one spec. `batch_invariant` as in `linear`; with int8 rows it is always so.
    """
    if w13.spec.act_bits == 16:
        h = moe_matmul(x, w13, ids, batch_invariant=batch_invariant, impl=impl)
        return moe_matmul(h, w2, ids, weights, batch_invariant=batch_invariant, impl=impl)
    xq, sx, _ = quantize_rows(x, impl=impl)
    h = moe_matmul(xq, w13, ids, None, sx, x.dtype, impl=impl)
    hq, sh, _ = quantize_rows(h, impl=impl)
    return moe_matmul(hq, w2, ids, weights, sh, x.dtype, impl=impl)


def prepare_experts(
    w: ExpertsTensor, device: torch.device | str, impl: str | None = None, *, self_test: bool = True
) -> ExpertsTensor:
    """`w` on `device`, packed for the body that serves there (or for the one that `impl` names). Once, at load.

    Each distinct shape is tried once per process against the reference, as in `prepare`; Unsupported when it fails.
    """
    device = torch.device(device)
    body = moe_matmul.body_on(device.type, impl)
    packings = moe_matmul.contract.PACKINGS[body.name]
    if w.spec.float_format is not None or (w.spec.weight_bits, w.spec.act_bits) not in ((4, 16), (8, 8)):
        raise Unsupported(f"moe_matmul: no body multiplies experts in {w.spec}; quantize them to w4a16-g128 or w8a8")
    packed = layout.repack_experts(w, packings[w.spec.weight_bits], device)
    slow = device.type in body.by_name_on
    fault = _self_test.experts_fault(moe_matmul, body.name, packed) if self_test and not slow else None
    if fault is not None:
        remedy = "try another Triton or driver, and report it; self_test=False loads it as is"
        what = f"moe_matmul {body.name} {_self_test.FAILED} at {w.shape} {w.spec} on {device}: {fault}"
        raise Unsupported(f"{what}; its numbers cannot be trusted here: {remedy}")
    return packed


class QuantLinear(nn.Module):
    """A linear layer whose weight is quantised: for inference, no gradient reaches the weight.

    Buffers `data`, `scale`, `zero` hold the weight as the body of this machine reads it, `bias` is fp32. `.to(device)`
    packs again for the new device; a change of dtype leaves them alone, since activations decide what comes out.
    `state_dict` holds the plain weight, so that it can be loaded on any machine.
    """

    data: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    bias: torch.Tensor | None

    def __init__(
        self,
        weight: QuantTensor,
        bias: torch.Tensor | None = None,
        *,
        impl: str | None = None,
        batch_invariant: bool = False,
        self_test: bool = True,
    ):
        """`weight` as `prepare(weight, device, impl)` returns it; `from_plain` calls that for you.

        `batch_invariant` as in `linear`. `self_test` is what `prepare` is asked for whenever the weight is packed again.
        """
        super().__init__()
        ops_of(weight.spec)
        self.spec, self.impl, self.batch_invariant, self.self_test = weight.spec, impl, batch_invariant, self_test
        self.out_features, self.in_features = weight.shape
        self.packing = weight.packing
        if bias is not None:
            bias = bias.detach().to(device=weight.data.device, dtype=torch.float32)
        for name, tensor in (("data", weight.data), ("scale", weight.scale), ("zero", weight.zero), ("bias", bias)):
            self.register_buffer(name, tensor)

    @classmethod
    def from_plain(
        cls,
        weight: QuantTensor,
        bias: torch.Tensor | None = None,
        *,
        device: torch.device | str | None = None,
        impl: str | None = None,
        batch_invariant: bool = False,
        self_test: bool = True,
    ) -> QuantLinear:
        """From a weight in any packing; it is packed for `device` (default: where it is)."""
        ready = prepare(weight, weight.data.device if device is None else device, impl, self_test=self_test)
        return cls(ready, bias, impl=impl, batch_invariant=batch_invariant, self_test=self_test)

    @classmethod
    def from_linear(
        cls,
        layer: nn.Linear,
        spec: QuantSpec | str,
        *,
        device: torch.device | str | None = None,
        impl: str | None = None,
        batch_invariant: bool = False,
        self_test: bool = True,
    ) -> QuantLinear:
        """Rounds the weight of an nn.Linear to the nearest codes of `spec`, without calibration."""
        spec = QuantSpec.parse(spec) if isinstance(spec, str) else spec
        weight = layer.weight.detach()
        quantized = affine.quantize(weight, spec, affine.scale_dtype_of(spec, weight.dtype))
        how: dict[str, Any] = {"impl": impl, "batch_invariant": batch_invariant, "self_test": self_test}
        return cls.from_plain(quantized, layer.bias, device=device, **how)

    @property
    def weight(self) -> QuantTensor:
        """The weight as it lies in the buffers."""
        shape = (self.out_features, self.in_features)
        return QuantTensor(self.data, self.scale, self.zero, self.spec, self.packing, shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias, impl=self.impl, batch_invariant=self.batch_invariant)

    def extra_repr(self) -> str:
        bias = "" if self.bias is None else ", bias"
        return f"{self.in_features} -> {self.out_features}, {self.spec} as {self.packing}{bias}"

    def _set(self, weight: QuantTensor, bias: torch.Tensor | None) -> None:
        self.data, self.scale, self.zero, self.packing = weight.data, weight.scale, weight.zero, weight.packing
        self.bias = bias

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantLinear:
        device = fn(self.data).device  # codes are integers: torch moves them and never casts them
        if device != self.data.device:
            bias = None if self.bias is None else self.bias.to(device)
            self._set(prepare(self.weight, device, self.impl, self_test=self.self_test), bias)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        plain = layout.repack(self.weight, "plain")
        for name, tensor in (("codes", plain.data), ("scale", plain.scale), ("zero", plain.zero), ("bias", self.bias)):
            if tensor is not None:
                destination[prefix + name] = tensor

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        wanted = {"codes", "scale"} | (set() if self.spec.symmetric else {"zero"})
        wanted |= {"bias"} if self.bias is not None else set()
        found = {key[len(prefix) :] for key in state_dict if key.startswith(prefix)}
        missing_keys += sorted(prefix + name for name in wanted - found)
        unexpected_keys += sorted(prefix + name for name in found - wanted) if strict else []
        if not wanted <= found:
            return
        tensors = {name: state_dict[prefix + name] for name in wanted}
        try:
            shape = (self.out_features, self.in_features)
            plain = QuantTensor(tensors["codes"], tensors["scale"], tensors.get("zero"), self.spec, "plain", shape)
            bias = tensors.get("bias")
            if bias is not None and bias.shape != (self.out_features,):
                raise ValueError(f"bias has shape {tuple(bias.shape)}, expected {(self.out_features,)}")
            device = self.data.device
            ready = prepare(plain, device, self.impl, self_test=self.self_test)
            self._set(ready, None if bias is None else bias.to(device, torch.float32))
        except ValueError as error:  # a FormatError is one
            error_msgs.append(f"{prefix.rstrip('.') or 'QuantLinear'}: {error}")
