"""A pruned child: which blocks, channels, heads and experts of the source it keeps, under which names, with which config.

Every tensor of a family is a product of named axes; a `Keep` says which indices of each axis stay, for each block of its own
(ffn, heads, experts) or for the whole model (hidden, which the residual stream runs through). What is cut is cut for good: the
child is an ordinary model of the same family.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..formats.spec import FormatError
from .prune_sizes import Sizes, expert_key
from .walk import Map, Shape, block_of

_ATTENTION = {
    "self_attn.q_proj": ("query", "hidden"),
    "self_attn.k_proj": ("kv", "hidden"),
    "self_attn.v_proj": ("kv", "hidden"),
    "self_attn.o_proj": ("hidden", "query"),
    "self_attn.q_norm": (None,),
    "self_attn.k_norm": (None,),
    "self_attn.rotary_emb.inv_freq": (None,),
    "input_layernorm": ("hidden",),
    "post_attention_layernorm": ("hidden",),
    "mlp.gate_proj": ("ffn", "hidden"),
    "mlp.up_proj": ("ffn", "hidden"),
    "mlp.down_proj": ("hidden", "ffn"),
    "mlp.gate": ("experts", "hidden"),
}
_EXPERT = {
    "gate_proj": ("expert_ffn", "hidden"),
    "up_proj": ("expert_ffn", "hidden"),
    "down_proj": ("hidden", "expert_ffn"),
}
_AROUND = {"model.embed_tokens": (None, "hidden"), "lm_head": (None, "hidden"), "model.norm": ("hidden",)}
_EXPERT_NAME = re.compile(r"mlp\.experts\.(\d+)\.(\w+)")
# Lists of the config with an entry for each block, or with numbers of blocks, that `config_of` brings along.
_BY_BLOCK, _OF_BLOCKS = ("layer_types",), ("mlp_only_layers",)
_NEVER_BLOCKS = ("architectures", "eos_token_id", "short_factor", "long_factor", "mrope_section")


@dataclass(frozen=True, eq=False)
class Keep:
    """What stays, as sorted indices int64 into the source's axes; blocks by their number in the source.

    layers: which blocks. hidden None = all. ffn, query (heads), kv (heads), experts: block -> indices, a block that is
    missing keeps all. expert_ffn: (block, expert) -> indices.
    """

    layers: tuple[int, ...]
    hidden: torch.Tensor | None = None
    ffn: Mapping[int, torch.Tensor] = field(default_factory=dict)
    query: Mapping[int, torch.Tensor] = field(default_factory=dict)
    kv: Mapping[int, torch.Tensor] = field(default_factory=dict)
    experts: Mapping[int, torch.Tensor] = field(default_factory=dict)
    expert_ffn: Mapping[tuple[int, int], torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Cut:
    """What becomes of one tensor: its name in the child, for each dimension the indices that stay (None = all), a factor."""

    name: str
    index: tuple[torch.Tensor | None, ...]
    factor: float = 1.0

    def shape(self, before: Shape) -> Shape:
        return tuple(n if i is None else len(i) for n, i in zip(before, self.index, strict=True))

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        """The child's tensor, in the same dtype."""
        for dim, index in enumerate(self.index):
            if index is not None:
                tensor = tensor.index_select(dim, index)
        return tensor if self.factor == 1.0 else (tensor.double() * self.factor).to(tensor.dtype)

    def mask(self, tensor: torch.Tensor) -> torch.Tensor:
        """The source's tensor, fp32, with zeros where the child has nothing; with a factor, what its rounding made of the rest."""
        if self.factor != 1.0:
            made, at = self.apply(tensor).float() / self.factor, self.index[0]
            return made if at is None else torch.zeros(tensor.shape).index_copy(0, at, made)
        tensor = tensor.float()
        for dim, index in enumerate(self.index):
            if index is not None:
                kept = torch.zeros(tensor.shape[dim], dtype=torch.bool)
                kept[index] = True
                tensor = tensor * kept.view([-1 if d == dim else 1 for d in range(tensor.dim())])
        return tensor


def axes_of(found: Map, name: str) -> tuple[str | None, ...]:
    """The axes of a source tensor; FormatError for a name that no family has."""
    block = block_of(found, name)
    if block is None:
        stem = name.removesuffix(".weight")
        if stem in _AROUND:
            return _AROUND[stem]
    else:
        stem, _, leaf = name.removeprefix(found.family.block.format(block)).rpartition(".")
        if leaf == "inv_freq":
            return (None,)
        inner = _EXPERT_NAME.fullmatch(stem)
        axes = _EXPERT.get(inner[2]) if inner else _ATTENTION.get(stem)
        if axes is not None:
            return axes[:1] if leaf == "bias" else axes
    raise FormatError(f"tensor {name}: pruning does not know what its rows and columns stand for")


class Child:
    """The child of a source `found` with `config` and `sizes`, that keeps `keep` and gets `given` sizes."""

    def __init__(self, found: Map, config: Mapping[str, Any], sizes: Sizes, given: Sizes, keep: Keep) -> None:
        self.found, self.source, self.sizes, self.given, self.keep = found, config, sizes, given, keep
        self._number = {old: new for new, old in enumerate(keep.layers)}
        # A norm divides by the root of the mean square over all channels; where some are gone, the mean is over fewer.
        self._norm = math.sqrt(sizes.hidden / given.hidden)

    def cut(self, name: str) -> Cut | None:
        """What becomes of a source tensor, None = it goes."""
        block = block_of(self.found, name)
        new, expert = name, None
        if block is not None:
            if block not in self._number:
                return None
            head = self.found.family.block
            rest = name.removeprefix(head.format(block))
            inner = _EXPERT_NAME.match(rest)
            if inner is not None:
                expert = int(inner[1])
                kept = self.keep.experts.get(block)
                if kept is not None:
                    place = (kept == expert).nonzero()
                    if not len(place):
                        return None
                    rest = rest.replace(f"experts.{expert}.", f"experts.{int(place[0])}.", 1)
            new = head.format(self._number[block]) + rest
        axes = axes_of(self.found, name)
        norm = axes == ("hidden",) and not name.endswith(".bias")
        return Cut(new, tuple(self._index(axis, block, expert) for axis in axes), self._norm if norm else 1.0)

    def _index(self, axis: str | None, block: int | None, expert: int | None) -> torch.Tensor | None:
        if axis is None:
            return None
        if axis == "hidden":
            return self.keep.hidden
        assert block is not None
        if axis in ("query", "kv"):
            heads = (self.keep.query if axis == "query" else self.keep.kv).get(block)
            return None if heads is None else _spread(heads, self.sizes.head_dim)
        if axis == "expert_ffn":
            assert expert is not None
            return self.keep.expert_ffn.get((block, expert))
        return (self.keep.ffn if axis == "ffn" else self.keep.experts).get(block)

    def tensors(self, shapes: Mapping[str, Shape]) -> Iterator[tuple[str, Cut]]:
        """(source name, what becomes of it) of every tensor that stays, in the order of `shapes`."""
        for name in shapes:
            cut = self.cut(name)
            if cut is not None:
                yield name, cut

    def config(self, where: str) -> dict[str, Any]:
        """config.json of the child. FormatError for a list with an entry per block that nobody here knows how to cut."""
        source, given, kept = self.source, self.given, self.keep.layers
        out = dict(source)
        layers = self.sizes.layers
        if len(kept) < layers:
            for key in _lists(source, layers):
                if key not in (*_BY_BLOCK, *_OF_BLOCKS):
                    raise FormatError(
                        f"{where}/config.json: {key} is a list with an entry for each of {layers} blocks that pruning does "
                        "not know; cut width instead of layers"
                    )
            for key in _BY_BLOCK:
                if isinstance(source.get(key), list):
                    out[key] = [source[key][i] for i in kept]
            if isinstance(source.get("max_window_layers"), int):
                out["max_window_layers"] = sum(i < source["max_window_layers"] for i in kept)
            if given.experts and (source.get("mlp_only_layers") or (source.get("decoder_sparse_step") or 1) > 1):
                step, dense = source.get("decoder_sparse_step") or 1, source.get("mlp_only_layers") or []
                out["decoder_sparse_step"] = 1
                out["mlp_only_layers"] = [n for n, i in enumerate(kept) if i in dense or (i + 1) % step]
        out |= {"num_hidden_layers": given.layers, "hidden_size": given.hidden, "intermediate_size": given.ffn}
        if (given.heads, given.kv_heads, given.hidden) != (self.sizes.heads, self.sizes.kv_heads, self.sizes.hidden):
            out |= {"num_attention_heads": given.heads, "num_key_value_heads": given.kv_heads}
            out["head_dim"] = given.head_dim  # no quotient of the others any more
        if given.hidden != self.sizes.hidden and isinstance(source.get("rms_norm_eps"), float):
            # As the factor of the norms: what is added to a mean over fewer channels counts as before.
            out["rms_norm_eps"] = source["rms_norm_eps"] * self.sizes.hidden / given.hidden
        if given.experts:
            out |= {expert_key(source): given.experts, "moe_intermediate_size": given.expert_ffn}
        return out


def _lists(config: Mapping[str, Any], length: int, prefix: str = "") -> Iterator[str]:
    """Keys of lists of that length, those of objects inside as well (outer.inner); not those that never go by blocks."""
    for key, value in config.items():
        if isinstance(value, list) and len(value) == length and key not in _NEVER_BLOCKS:
            yield prefix + key
        elif isinstance(value, Mapping):
            yield from _lists(value, length, f"{prefix}{key}.")


def _spread(heads: torch.Tensor, size: int) -> torch.Tensor:
    """Indices of the numbers that heads [n] of `size` numbers consist of, [n * size]."""
    return (heads[:, None] * size + torch.arange(size)).flatten()
