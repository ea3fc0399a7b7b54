"""What a pruned child must be: the tensors its config promises, and the function of its source with the cut parts zeroed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ..formats.checkpoint import Checkpoint
from ..formats.spec import FormatError
from . import walk
from .blocks import Frame, Read
from .progress import Callback, Meter
from .prune_child import Child
from .walk import EMBEDDING, HEAD, Map

TOKENS = 32  # of the one window that both run
WORST = 1e-4  # of the largest logit: two orders of sums in fp32


def check(
    source: Checkpoint, found: Map, child: Child, folder: Path, progress: Callback | None = None
) -> dict[str, Any]:
    """Opens the written child again and runs it beside the masked source, both in fp32, block by block.

    FormatError when names or shapes are not what its config promises, or logits are not those of the masked source. Where
    experts are gone the router's choice differs by meaning, so only finite logits are asked for.
    """
    made = Checkpoint.open(folder) if (folder / "config.json").is_file() else None
    if made is None:
        raise FormatError(f"{folder}: holds no config.json; the child was not finished")
    small = walk.of(made)
    ids = torch.randint(0, int(source.config["vocab_size"]), (1, TOKENS), generator=torch.Generator().manual_seed(0))
    meter = Meter("check", len(child.keep.layers), progress, "blocks")
    ours = _logits(
        made.config, small, lambda name: made.read(name).float(), range(len(child.keep.layers)), ids, str(folder), meter
    )
    if not bool(torch.isfinite(ours).all()):
        raise FormatError(f"{folder}: the child gives NaN or Inf")
    if child.keep.experts:
        return {"words": f"{len(made.names)} tensors as the config promises; logits finite", "worst": None}
    theirs = _logits(source.config, found, masked(source, child), child.keep.layers, ids, str(source.path), None)
    worst = float((ours - theirs).abs().max() / theirs.abs().max())
    if not worst <= WORST:
        raise FormatError(
            f"{folder}: the child's logits differ from the source's with the cut parts zeroed by {worst:.2g} of the largest; "
            "this is a bug, please report it"
        )
    words = f"{len(made.names)} tensors as the config promises; logits equal the source's with the cut parts zeroed (off by {worst:.1e} of the largest)"
    return {"words": words, "worst": worst}


def masked(source: Checkpoint, child: Child) -> Read:
    """Reads the source with zeros where the child has nothing, in fp32."""

    def read(name: str) -> torch.Tensor:
        cut = child.cut(name)
        tensor = source.read(name)
        return tensor.float() if cut is None else cut.mask(tensor)

    return read


@torch.no_grad()
def _logits(
    config: Mapping[str, Any],
    found: Map,
    read: Read,
    numbers: range | tuple[int, ...],
    ids: torch.Tensor,
    where: str,
    meter: Meter | None,
) -> torch.Tensor:
    """fp32 logits [1, T, V] of ids through blocks `numbers`."""
    frame = Frame(config, found, torch.float32, where)
    embedding = read(EMBEDDING)
    assert isinstance(embedding, torch.Tensor)
    x, arguments = frame.start(ids, embedding)
    for number in numbers:
        x = frame.block(number, read).forward(x, arguments[number])
        if meter is not None:
            meter.add(1, f"block {number}")
    head = embedding if found.tied else read(HEAD)
    assert isinstance(head, torch.Tensor)
    return F.linear(frame.normed(x, read), head)
