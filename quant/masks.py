"""`percard prune --mask`: the same model with zeros, and which weights they are in masks.safetensors. No tensor gets smaller.

Block by block, as the methods that need a text do: a block's inputs are those that the masked blocks before it make.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..formats.checkpoint import Checkpoint, Writer
from ..formats.header import print_header
from ..formats.spec import FormatError
from . import output, report, text, walk
from .blocks import Block
from .calibrate import add_gram, mirror
from .methods import sparse
from .methods.sparse import Pattern
from .output import Output
from .progress import Callback, Meter
from .prune import REPORT
from .prune_scores import Chain
from .text import Calibration
from .walk import Linear, Map, finite

FILE = "masks.safetensors"


@dataclass(frozen=True)
class MaskWish:
    """method: magnitude, wanda or sparsegpt (methods/sparse.py) over all linears of the blocks; the head stays whole."""

    method: str
    pattern: Pattern
    calibration: Calibration = field(default_factory=lambda: Calibration(samples=128))

    def __post_init__(self) -> None:
        if self.method not in sparse.METHODS:
            raise FormatError(f"--mask {self.method}: not known; choose one of {', '.join(sparse.METHODS)}")


def run(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    wish: MaskWish,
    *,
    force: bool = False,
    progress: Callback | None = None,
) -> dict[str, Any]:
    """Masks `src` into the new folder `dst`; the report, which lies there as prune.json. Starts over when it was killed."""
    source, out_path = Checkpoint.open(Path(src)), Path(dst)
    output.refuse(source.path, out_path, force)
    found, where = walk.of(source), str(source.path)
    linears = [x for x in found.linears if x.block is not None]
    for x in linears:
        if not wish.pattern.fits(x.shape[1]):
            raise FormatError(
                f"{where}: {x.name} has {x.shape[1]} columns, no multiple of {wish.pattern.of}; take another pattern"
            )
    windows = None
    if wish.method != "magnitude":
        windows = text.windows(
            wish.calibration,
            source.path,
            int(source.config["vocab_size"]),
            source.config.get("max_position_embeddings"),
        )
    with Output(out_path, force, fresh=True) as out:
        masks, counts = _write(source, found, linears, wish, windows, out, progress)
        (out.folder / FILE).write_bytes(_packed(masks))
        done: dict[str, Any] = {
            "schema": 1,
            "verb": "prune",
            "mask": wish.method,
            "pattern": str(wish.pattern),
            "weights": sum(n for _, n in counts.values()),
            "zeros": sum(z for z, _ in counts.values()),
            "calibration": {} if windows is None else {**windows.facts, "windows_sha256": windows.sha256},
            "versions": report.versions(),
            "warnings": ["zeros are stored like other numbers: no engine runs this file faster than its source"],
        }
        output.write(out.folder / REPORT, json.dumps(done, indent=1) + "\n")
        out.publish()
    return done


def _write(
    source: Checkpoint,
    found: Map,
    linears: list[Linear],
    wish: MaskWish,
    windows: text.Windows | None,
    out: Output,
    progress: Callback | None,
) -> tuple[dict[str, tuple[np.ndarray, tuple[int, int]]], dict[str, tuple[int, int]]]:
    """Writes the checkpoint; packed masks, and (zeros, weights) of each linear."""
    meter = Meter("mask", len(linears), progress, "linears")
    masks: dict[str, tuple[np.ndarray, tuple[int, int]]] = {}
    counts: dict[str, tuple[int, int]] = {}
    plan = {n: (i.dtype, i.shape) for n, i in source.tensors.items()}
    with Writer(out.folder, plan, resume=()) as writer:

        def put(x: Linear, weight: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            made = weight.to(source.info(x.tensor).dtype)
            writer.add(x.tensor, made)
            masks[x.tensor] = np.packbits(mask.numpy().reshape(-1), bitorder="little"), x.shape
            counts[x.name] = int(mask.sum()), mask.numel()
            meter.add(1, x.name)
            return made

        if windows is None:
            for x in linears:
                weight = finite(source, x.tensor).float()
                mask = sparse.magnitude(weight, wish.pattern)
                put(x, weight.masked_fill(mask, 0.0), mask)
        else:
            folder = out.work / "activations"
            folder.mkdir()
            chain = Chain(
                source, found, windows.ids, torch.float32, folder, Meter("chain", len(found.blocks()), None, "blocks")
            )
            _by_blocks(chain, linears, wish, put)
            output.discard(folder)
        taken = {x.tensor for x in linears}
        for name in source.names:
            if name not in taken:
                writer.add_raw(name, source.raw(name))
        writer.copy_side_files(source)
        writer.finish(source.config)
    return masks, counts


class _Seen:
    """What a linear's inputs come to: tokens, sum of squares fp64 [K], and for SparseGPT the gram fp32 [K, K]."""

    def __init__(self, columns: int, gram: bool) -> None:
        self.tokens = 0
        self.squares = torch.zeros(columns, dtype=torch.float64)
        self.gram = torch.zeros(columns, columns) if gram else None

    def add(self, x: torch.Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1]).float()
        self.tokens += len(rows)
        self.squares += rows.double().square().sum(dim=0)
        if self.gram is not None:
            add_gram(self.gram, rows)


def _input(x: Linear) -> str:
    """A name for what a linear reads: q, k and v share one, gate and up (of an expert too) another."""
    return x.name.replace(".up_proj", ".gate_proj") if ".experts." in x.name else x.together


def _by_blocks(
    chain: Chain,
    linears: list[Linear],
    wish: MaskWish,
    put: Callable[[Linear, torch.Tensor, torch.Tensor], torch.Tensor],
) -> None:
    """Looks at each block's inputs while it is whole, masks it, and sends the windows on through what is left."""
    here = None
    for number in range(len(chain.frame)):
        mine = [x for x in linears if x.block == number]
        first: dict[str, str] = {}
        for x in mine:
            first.setdefault(_input(x), x.name)
        seen = {
            name: _Seen(next(x.shape[1] for x in mine if x.name == name), wish.method == "sparsegpt")
            for name in first.values()
        }

        def look(block: Block, seen: dict[str, _Seen] = seen) -> Any:
            return block.watching({name: found.add for name, found in seen.items()})

        chain.drop(chain.run([number], start=here, at=look))
        new: dict[str, torch.Tensor] = {}
        for x in mine:
            found = seen[first[_input(x)]]
            weight = finite(chain.source, x.tensor).float()
            if found.gram is None or found.tokens == 0:  # wanda, and an expert that no token reached
                mask = sparse.wanda(weight, (found.squares / max(found.tokens, 1)).float(), wish.pattern)
                weight = weight.masked_fill(mask, 0.0)
            else:
                weight, mask = sparse.sparsegpt(weight, mirror(found.gram), found.tokens, wish.pattern)
            new[x.tensor] = put(x, weight, mask).to(chain.dtype)

        def masked(name: str, new: dict[str, torch.Tensor] = new) -> torch.Tensor:
            return new[name] if name in new else chain.read(name)

        then = chain.run([number], start=here, read=masked)
        if here is not None:
            chain.drop(here)
        here = then


def _packed(masks: dict[str, tuple[np.ndarray, tuple[int, int]]]) -> bytes:
    """A safetensors file: under each weight's name its bits, uint8, first weight in the lowest bit (numpy order little)."""
    header, ranges = print_header({name: (torch.uint8, bits.shape) for name, (bits, _) in masks.items()})
    out = bytearray(len(header) + sum(nbytes for _, nbytes in ranges.values()))
    out[: len(header)] = header
    for name, (bits, _) in masks.items():
        begin, nbytes = ranges[name]
        out[begin : begin + nbytes] = bits.tobytes()
    return bytes(out)


def read_masks(folder: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """Weight name -> bool [N, K], True where `prune --mask` put a zero."""
    checkpoint = Checkpoint.open(Path(folder))
    from safetensors.numpy import load_file

    found = {}
    for name, bits in load_file(Path(folder) / FILE).items():
        shape = checkpoint.info(name).shape
        flat = np.unpackbits(bits, bitorder="little")[: int(np.prod(shape))]
        found[name] = torch.from_numpy(flat.astype(bool)).view(shape)
    return found
