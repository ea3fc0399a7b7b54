"""How a model's caches hold keys and values: what was asked for, as a spec and an offset of keys for each layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...formats.kv_layers import KVLayers
from ...formats.kvcache import BF16, SPECS, KVSpec, layer_specs
from ...formats.spec import FormatError
from ...kernels.attention import MOST
from .config import Config

CALIBRATED = "calibrated"  # what lies beside the checkpoint: percard_kv.json and percard_kv.safetensors
NOT_FOUR = (
    0,
)  # layers that keep bf16 under 4 bits when nothing was calibrated: the first one loses most (docs/cache.md)


@dataclass(frozen=True, eq=False)
class Layers:
    """`name` is what was asked for. `specs` and `mu` (fp32 [Hkv, D] or None) one per layer; both empty: bf16 everywhere.

    bf16 means as they are, in the type of the model.
    """

    name: str = "bf16"
    specs: tuple[KVSpec, ...] = ()
    mu: tuple[torch.Tensor | None, ...] = ()

    @property
    def quantised(self) -> bool:
        return any(spec.quantised for spec in self.specs)

    @property
    def bits(self) -> float:
        """Bits of a number of the cache on average over keys, values and layers, scales left out."""
        specs = self.specs or (BF16,)
        return sum(spec.k_bits + spec.v_bits for spec in specs) / (2 * len(specs))

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of figures must know: which layers are not as the name says."""
        if len(set(self.specs)) < 2:
            return ()
        words = []
        for spec in dict.fromkeys(self.specs):
            mine = [i for i, of in enumerate(self.specs) if of == spec]
            if str(spec) != self.name:
                words.append(f"{spec} in layer{'s' if len(mine) > 1 else ''} {', '.join(map(str, mine))}")
        return (f"cache {self.name}: {'; '.join(words)}",)


PLAIN = Layers()
Asked = str | KVSpec | Sequence[KVSpec] | Layers | KVLayers | None


def of(asked: Asked, config: Config, source: str = "") -> Layers:
    """The Layers that were asked for: a name, a spec for all layers, one per layer, or None = bf16.

    "calibrated" reads what `percard calibrate-kv` left beside the checkpoint `source`; a KVLayers is taken as it is. A spec with 4 bits leaves the first layer bf16, unless it is given layer by layer. FormatError for a spec that is
    not known, or that this model's heads do not fit.
    """
    if asked is None or isinstance(asked, Layers):
        found = asked or PLAIN
    elif isinstance(asked, KVLayers):
        found = Layers(CALIBRATED, asked.specs, asked.mu)
    elif asked == CALIBRATED:
        if source.startswith("shape:"):
            raise FormatError(f"{source}: synthetic weights have no calibrated cache; name a spec: {', '.join(SPECS)}")
        read = KVLayers.load(source, kv_heads=config.kv_heads, head_dim=config.head_dim)
        found = Layers(CALIBRATED, read.specs, read.mu)
    elif isinstance(asked, str | KVSpec):
        spec = parse(asked) if isinstance(asked, str) else asked
        four = 4 in (spec.k_bits, spec.v_bits)
        found = (
            Layers(str(spec), layer_specs(config.layers, spec, NOT_FOUR if four else ())) if spec.quantised else PLAIN
        )
    else:
        found = Layers("mixed", tuple(asked))
    return _fitting(found, config, source)


def parse(text: str) -> KVSpec:
    """The spec of a printed name; FormatError that names "calibrated" as well."""
    if text not in SPECS:
        raise FormatError(f"cache spec {text!r} is not one; known: {', '.join(SPECS)}, or {CALIBRATED}")
    return KVSpec.parse(text)


def _fitting(found: Layers, config: Config, source: str) -> Layers:
    """`found`, cut to the layers that run; FormatError when the model is not made for it."""
    if not found.specs:
        return found
    if len(found.specs) < config.layers:
        raise FormatError(
            f"{source or config.name}: {len(found.specs)} cache specs for {config.layers} layers; give one for each"
        )
    if found.quantised and (config.head_dim % 16 or config.head_dim > MOST):
        raise FormatError(
            f"{source or config.name}: heads of {config.head_dim} numbers have no {found.name} cache, expected a multiple of "
            f"16 up to {MOST}; take bf16"
        )
    specs, mu = found.specs[: config.layers], found.mu[: config.layers] or (None,) * config.layers
    wanted = (config.kv_heads, config.head_dim)
    for layer, (spec, offset) in enumerate(zip(specs, mu, strict=True)):
        if offset is not None and tuple(offset.shape) != wanted:
            raise FormatError(
                f"{source or config.name}: mu of layer {layer} is {tuple(offset.shape)}, expected {wanted}; calibrate again"
            )
        if offset is not None and not spec.quantised:
            mu = (*mu[:layer], None, *mu[layer + 1 :])
    return Layers(found.name, specs, mu)
