"""The engine: the decode loop that FP16 and quantised models both run through.

Example:
    model = load("out/w4a16", head="int8-row")
    model = load("shape:qwen3-8b", spec=QuantSpec.parse("w4a16-g128"))    synthetic weights at true shapes
    model = load("out/w4a16", kv="int8")                                     keys and values in 8 bits
    model.generate([[1, 2, 3]], max_new=64)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from ...formats.checkpoint import Checkpoint
from ...formats.spec import FormatError, QuantSpec
from .. import card
from . import kv as caches
from . import rope, weights
from .cache import Cache
from .config import Config, load_config, parse_config, shape_names
from .model import HEADS, Model
from .weights import RealSource, SyntheticSource

__all__ = ["HEADS", "Cache", "Config", "Model", "load", "load_config", "shape_names"]


@torch.inference_mode()
def load(
    source: str | Path,
    *,
    spec: QuantSpec | None = None,
    dtype: torch.dtype | None = None,
    layers: int | None = None,
    head: str = "16bit",
    impl: str | None = None,
    seed: int = 0,
    max_len: int = 4096,
    batch_invariant: bool = False,
    device: torch.device | str | None = None,
    share: Model | None = None,
    kv: caches.Asked = None,
    progress: Callable[[int, int], None] | None = None,
) -> Model:
    """The model in folder `source`, or synthetic weights of `shape:<name>`.

    `spec` rounds 16-bit linears at load (the head keeps 16 bits unless `head="int8-row"`); a quantised checkpoint
    brings its own. `dtype` of activations and 16-bit weights: the config's by default. `layers` runs the first so many
    blocks. `impl` names the body of every op, None = the first that serves. `max_len` tokens per sequence at most
    (never above the model's context). `batch_invariant`: the logits of a sequence do not depend on the others, to the bit
    (invariant.py; slow, and 8 bytes for each 16-bit weight; prompts are read back from the cache; a mixture's router and its
    16-bit experts stay torch's, which promises nothing). `share` is a synthetic model of the same shape and seed that lends its embedding
    and 16-bit head. `kv` is how caches hold keys and values: a name such as "int8", a KVSpec, one per layer, "calibrated",
    None = bf16 (bench/engine/kv.py). `progress(done, blocks)`. FormatError for anything that cannot be read.
    """
    if head not in HEADS:
        raise ValueError(f"head {head!r} is not known; known: {', '.join(HEADS)}")
    synthetic = str(source).startswith("shape:")
    where = torch.device(device) if device is not None else card.default_device()
    checkpoint = None
    if synthetic:
        config = load_config(source)
    else:
        checkpoint = Checkpoint.open(Path(source))
        config = parse_config(checkpoint.config, Path(source).resolve().name, str(Path(source) / "config.json"))
    if layers is not None:
        if not 1 <= layers <= config.layers:
            raise FormatError(f"{source}: layers={layers} is outside 1 .. {config.layers}")
        config = replace(config, layers=layers)
    dtype = config.dtype if dtype is None else dtype
    kept = caches.of(kv, config, str(source))
    if checkpoint is None:
        lent = None
        if share is not None and (share.source, share.seed, share.dtype) == (str(source), seed, dtype):
            lent = share.weights
        origin: RealSource | SyntheticSource = SyntheticSource(dtype, where, spec, seed, lent)
    else:
        origin = RealSource(checkpoint, dtype, where, spec)
        spec = origin.main_spec
    held = weights.build(config, origin, dtype=dtype, device=where, impl=impl, progress=progress)
    turns = rope.table(config.rope, config.head_dim, min(max_len, config.context), where)
    model = Model(config, held, dtype, where, spec, "16bit", impl, str(source), seed if synthetic else None, turns)
    return replace(model, batch_invariant=batch_invariant, kv=kept).with_head(head)
