"""linear(x, w, bias): the one place that knows which op a spec means. QuantLinear is the one nn.Module.

    spec            ops                                 spec            ops
    w8a8            quantize_rows, matmul_w8a8          w8a16*          matmul_w8a16
    w4a8*           quantize_rows, matmul_w4a8          w4a16*          matmul_w4a16
    anything else   Unsupported, with what to take instead

A weight is packed once, at load, for the body that will serve on its device: `prepare(w, device)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..formats import affine, layout
from ..formats.spec import QuantSpec
from ..formats.tensor import ExpertsTensor, QuantTensor
from .matmul_w4a8 import matmul_w4a8
from .matmul_w4a16 import matmul_w4a16
from .matmul_w8a8 import matmul_w8a8
from .matmul_w8a16 import matmul_w8a16
from .moe_matmul import moe_matmul
from .op import Op, Unsupported
from .quantize_rows import quantize_rows

# (bits of a weight, bits of an activation) -> the ops of a linear, in order; the last one reads the weight.
ROUTES: dict[tuple[int, int], tuple[Op, ...]] = {
    (8, 8): (quantize_rows, matmul_w8a8),
    (8, 16): (matmul_w8a16,),
    (4, 16): (matmul_w4a16,),
    (4, 8): (quantize_rows, matmul_w4a8),
}
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
    x: torch.Tensor, w: torch.Tensor | QuantTensor, bias: torch.Tensor | None = None, *, impl: str | None = None
) -> torch.Tensor:
    """x [..., K] times w [N, K], plus bias [N]: [..., N] in the type of x (bf16, fp16 or fp32).

    `w` is a tensor (torch's own matmul) or a QuantTensor that `prepare` packed. `impl` names a body ("reference" takes
    a plain weight). ValueError for sizes, types and devices that do not fit; Unsupported, with every reason, when no
    body serves.
    """
    if isinstance(w, torch.Tensor):
        return nn.functional.linear(x, w, bias)
    ops = ops_of(w.spec)
    n, k = w.shape
    if x.shape[-1] != k:
        raise ValueError(f"linear: x has shape {tuple(x.shape)}, expected [..., {k}] for a weight [{n}, {k}]")
    rows = x if x.ndim == 2 else x.reshape(-1, k)
    if len(ops) == 1:
        y = ops[0](rows, w, bias, impl=impl)
    elif ops[1] is matmul_w8a8:
        xq, sx, _ = quantize_rows(rows, impl=impl)
        y = matmul_w8a8(xq, sx, w, bias, x.dtype, impl=impl)
    else:
        xq, sx, xsum = quantize_rows(rows, impl=impl)
        y = matmul_w4a8(xq, sx, xsum, w, bias, x.dtype, impl=impl)
    return y if x.ndim == 2 else y.reshape(*x.shape[:-1], n)


def prepare(w: QuantTensor, device: torch.device | str, impl: str | None = None) -> QuantTensor:
    """`w` on `device`, packed for the body that serves there (or for the one that `impl` names). Once, at load.

    Unsupported, with every reason, when this machine has no such body.
    """
    device = torch.device(device)
    for op in ops_of(w.spec):
        body = op.body_on(device.type, impl)
    if body.packing is None or (body.packing == w.packing and device == w.data.device):
        return w
    return layout.repack(layout.repack(w, "plain").to(device), body.packing)


def moe(
    x: torch.Tensor,
    w13: ExpertsTensor,
    w2: ExpertsTensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    *,
    impl: str | None = None,
) -> torch.Tensor:
    """The experts of a layer: x [T, K], w13 [E, 2I, K] (gate rows, then up rows), w2 [E, H, I] -> [T, H] in the type of x.

    ids [T, topk] name the experts of each token, -1 none; weights [T, topk] weigh what they say. Both weights as
    `prepare_experts` packed them, of one spec.
    """
    if w13.spec.act_bits == 16:
        h = moe_matmul(x, w13, ids, impl=impl)
        return moe_matmul(h, w2, ids, weights, impl=impl)
    xq, sx, _ = quantize_rows(x, impl=impl)
    h = moe_matmul(xq, w13, ids, None, sx, x.dtype, impl=impl)
    hq, sh, _ = quantize_rows(h, impl=impl)
    return moe_matmul(hq, w2, ids, weights, sh, x.dtype, impl=impl)


def prepare_experts(w: ExpertsTensor, device: torch.device | str, impl: str | None = None) -> ExpertsTensor:
    """`w` on `device`, packed for the body that serves there (or for the one that `impl` names). Once, at load."""
    device = torch.device(device)
    packings = moe_matmul.contract.PACKINGS[moe_matmul.body_on(device.type, impl).name]
    if w.spec.float_format is not None or (w.spec.weight_bits, w.spec.act_bits) not in ((4, 16), (8, 8)):
        raise Unsupported(f"moe_matmul: no body multiplies experts in {w.spec}; quantize them to w4a16-g128 or w8a8")
    return layout.repack_experts(w, packings[w.spec.weight_bits], device)


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

    def __init__(self, weight: QuantTensor, bias: torch.Tensor | None = None, *, impl: str | None = None):
        """`weight` as `prepare(weight, device, impl)` returns it; `from_plain` calls that for you."""
        super().__init__()
        ops_of(weight.spec)
        self.spec, self.impl = weight.spec, impl
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
    ) -> QuantLinear:
        """From a weight in any packing; it is packed for `device` (default: where it is)."""
        return cls(prepare(weight, weight.data.device if device is None else device, impl), bias, impl=impl)

    @classmethod
    def from_linear(
        cls,
        layer: nn.Linear,
        spec: QuantSpec | str,
        *,
        device: torch.device | str | None = None,
        impl: str | None = None,
    ) -> QuantLinear:
        """Rounds the weight of an nn.Linear to the nearest codes of `spec`, without calibration."""
        spec = QuantSpec.parse(spec) if isinstance(spec, str) else spec
        weight = layer.weight.detach()
        quantized = affine.quantize(weight, spec, affine.scale_dtype_of(spec, weight.dtype))
        return cls.from_plain(quantized, layer.bias, device=device, impl=impl)

    @property
    def weight(self) -> QuantTensor:
        """The weight as it lies in the buffers."""
        shape = (self.out_features, self.in_features)
        return QuantTensor(self.data, self.scale, self.zero, self.spec, self.packing, shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias, impl=self.impl)

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
            self._set(prepare(self.weight, device, self.impl), bias)
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
            self._set(prepare(plain, device, self.impl), None if bias is None else bias.to(device, torch.float32))
        except ValueError as error:  # a FormatError is one
            error_msgs.append(f"{prefix.rstrip('.') or 'QuantLinear'}: {error}")
