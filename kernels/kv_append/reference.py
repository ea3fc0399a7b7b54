"""The meaning of kv_append, in plain torch."""

from __future__ import annotations

import torch

from ...formats.kvcache import KVPages, check_values, parse_form, quantize


def prepared(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    positions: torch.Tensor | None,
    cos_sin: torch.Tensor | None,
) -> torch.Tensor:
    """x [T, H, D] normed by head and turned by its position, fp32; without a weight or positions that step is left out."""
    y = x.float()
    if weight is not None:
        y = y * (y.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.float()
    if positions is not None and cos_sin is not None:
        cos, sin = cos_sin[positions][:, None].chunk(2, -1)  # [T, 1, D/2]
        low, high = y.chunk(2, -1)
        y = torch.cat((low * cos - high * sin, high * cos + low * sin), -1)
    return y


def run(
    k: torch.Tensor, v: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, scales: torch.Tensor | None,
    mu: torch.Tensor | None, slots: torch.Tensor, q: torch.Tensor | None, positions: torch.Tensor | None,
    cos_sin: torch.Tensor | None, q_weight: torch.Tensor | None, k_weight: torch.Tensor | None, eps: float, form: str,
) -> torch.Tensor:  # fmt: skip
    check_values(KVPages(k_pages, v_pages), slots=slots)
    spec, live = parse_form(form).spec, slots >= 0
    page, row = slots[live] // k_pages.shape[2], slots[live] % k_pages.shape[2]
    keys = prepared(k, k_weight, eps, positions, cos_sin)
    keys = keys if mu is None else keys - mu
    for into, x, bits, first in ((k_pages, keys, spec.k_bits, 0), (v_pages, v, spec.v_bits, 1)):
        if bits == 16:
            into[page, :, row] = x[live].to(into.dtype)
            continue
        codes, scale, offset = quantize(x[live], bits, spec.symmetric)
        into[page, :, row] = codes
        assert scales is not None  # check saw to it
        scales[page, :, row, first] = scale
        if spec.channels == 4:  # keys of int8 have no offset: 0 in its place
            scales[page, :, row, 2 + first] = torch.zeros_like(scale) if offset is None else offset
    if q is None:
        return k.new_empty((k.shape[0], 0, k.shape[2]))
    return prepared(q, q_weight, eps, positions, cos_sin).to(q.dtype)
