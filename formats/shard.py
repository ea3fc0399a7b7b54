"""What tensor parallelism (TP) a spec allows, and the exact padding that makes it possible.

A linear whose input is split over `tp` cards (row-parallel: down_proj and o_proj) needs whole groups on every card:
in / tp must be a multiple of the group. Engines cannot cut a group. Heads must divide by tp as well.

Padding of the intermediate size is exact: gate and up get rows of zeros, down gets columns of zeros, and silu(0) * 0 = 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .spec import GROUPS, FormatError, QuantSpec


@dataclass(frozen=True)
class Sizes:
    """The sizes of a decoder that TP splits. Several intermediate sizes: dense layers, experts, shared experts."""

    intermediate: tuple[tuple[str, int], ...]  # (what it is called, size), e.g. ("intermediate_size", 12288)
    heads: int
    head_dim: int  # of v, so that heads * head_dim is the input of o_proj
    kv_heads: int | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Sizes:
        """From a config.json. FormatError when a size is missing or is no positive integer."""

        def size(key: str) -> int:
            value = config.get(key)
            if type(value) is not int or value <= 0:
                raise FormatError(f"config.json: {key} is {value!r}, expected a positive integer")
            return value

        heads = size("num_attention_heads")
        if config.get("v_head_dim") is not None:
            head_dim = size("v_head_dim")
        elif config.get("head_dim") is not None:
            head_dim = size("head_dim")
        else:
            head_dim = size("hidden_size") // heads
        kv_heads = size("num_key_value_heads") if config.get("num_key_value_heads") is not None else None
        keys = [key for key in ("moe_intermediate_size", "shared_expert_intermediate_size") if config.get(key)]
        dense = (
            config.get("mlp_only_layers")
            or config.get("first_k_dense_replace")
            or config.get("decoder_sparse_step", 1) != 1
        )
        if not keys or dense:
            keys.insert(0, "intermediate_size")
        return cls(tuple((key, size(key)) for key in keys), heads, head_dim, kv_heads)


def group_of(spec: QuantSpec) -> int:
    """Inputs that must stay together on one card: the group, the block of fp8-block, or one packed word."""
    if spec.float_format == "fp8-block":
        return 128
    if spec.group is not None:
        return spec.group
    if spec.float_format is not None or (spec.act_bits == 8 and spec.weight_bits == 8):
        return 1
    return 32 // spec.weight_bits if 32 % spec.weight_bits == 0 else 32


def fits(size: int, spec: QuantSpec, tp: int) -> bool:
    """Whether the input of a row-parallel linear, `size`, can be split over `tp` cards without cutting a group."""
    return tp > 0 and size % (group_of(spec) * tp) == 0


def padded(size: int, spec: QuantSpec, tp: int) -> int:
    """The least size from `size` on that `tp` cards can split."""
    step = group_of(spec) * tp
    return -(-size // step) * step


def problems(spec: QuantSpec, tp: int, sizes: Sizes) -> list[str]:
    """Why `tp` cards cannot split a model in this spec, one line each with the remedies and their cost; empty if they can."""
    if tp < 1:
        return [f"tp {tp} is not a number of cards; take 1 or more"]
    out = []
    if sizes.heads % tp:
        out.append(f"{sizes.heads} heads do not divide by tp {tp}; take one of {_divisors(sizes.heads)}")
    if sizes.kv_heads is not None and sizes.kv_heads % tp and tp % sizes.kv_heads:
        out.append(f"{sizes.kv_heads} KV heads can neither be split nor repeated over tp {tp}")
    rows = [(name, "down_proj", size) for name, size in sizes.intermediate]
    for name, leaf, size in [*rows, ("heads x head size", "o_proj", sizes.heads * sizes.head_dim)]:
        if fits(size, spec, tp):
            continue
        group = group_of(spec)
        remedies = []
        if leaf == "down_proj":
            to = padded(size, spec, tp)
            remedies.append(f"pad {name} to {to} (+{100 * (to - size) / size:.2g} %)")
        smaller = [g for g in sorted(GROUPS, reverse=True) if g < group and size % (g * tp) == 0]
        if smaller and spec.group is not None:
            remedies.append(f"give {leaf} g{smaller[0]}")
        if name == "moe_intermediate_size":
            remedies.append("use expert parallelism")
        if not remedies:
            remedies.append("take a smaller tp")
        share = f"{size / tp:g}"
        out.append(f"{leaf}: {name} {size} / tp {tp} = {share} is not a multiple of {group}; {', or '.join(remedies)}")
    return out


def fitting_tp(spec: QuantSpec, sizes: Sizes, among: tuple[int, ...] = (1, 2, 4, 8)) -> list[int]:
    """Those of `among` that can split the model in this spec."""
    return [tp for tp in among if not problems(spec, tp, sizes)]


def _divisors(n: int) -> str:
    return ", ".join(str(d) for d in range(1, min(n, 64) + 1) if n % d == 0)


def pad_intermediate(leaf: str, tensor: torch.Tensor, to: int) -> torch.Tensor:
    """A weight or bias of an MLP with its intermediate size padded by zeros to `to`, at the end.

    leaf: gate_proj or up_proj (weight [I, H] -> [to, H], bias [I] -> [to]) or down_proj (weight [H, I] -> [H, to], its
    bias is as it was). The function of the MLP stays the same.
    """
    if leaf not in ("gate_proj", "up_proj", "down_proj"):
        raise FormatError(f"{leaf}: only gate_proj, up_proj and down_proj have an intermediate size")
    if leaf == "down_proj" and tensor.dim() == 1:
        return tensor
    dim = 1 if leaf == "down_proj" else 0
    missing = to - tensor.shape[dim]
    if missing < 0:
        raise FormatError(f"{leaf}: {list(tensor.shape)} is larger than {to}; padding does not cut")
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=dim) if missing else tensor
