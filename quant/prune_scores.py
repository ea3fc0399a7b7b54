"""What a text says about the parts of a decoder: one pass block by block for all widths, one more for every block to drop.

The float chain of sequential.py without rounding: the weights of one block in memory, activations on the disk. Depth is scored
again after each drop (what a block does depends on those before it), widths once, in the chain of the blocks that stay.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ..formats.checkpoint import Checkpoint
from ..formats.spec import FormatError
from . import blocks
from .blocks import Block, Frame
from .methods import depth
from .methods.experts import ExpertScore
from .methods.width import ChannelScore, head_norms
from .progress import Meter
from .prune_sizes import ENDS, Sizes
from .spill import Spill, SpillWriter
from .walk import Map, block_of, finite

TOKENS_AT_ONCE = 2048  # of one forward call
Saw = Callable[[torch.Tensor, torch.Tensor], None]  # a batch of a block's inputs and outputs


class Chain:
    """The model over calibration windows ids int64 [n, T], with any of its blocks left out. work: a folder for activations."""

    def __init__(
        self, source: Checkpoint, found: Map, ids: torch.Tensor, dtype: torch.dtype, work: Path, meter: Meter
    ) -> None:
        blocks.check(source.config, found, str(source.path))
        self.source, self.found, self.ids, self.dtype, self.work, self.meter = source, found, ids, dtype, work, meter
        self.frame = Frame(source.config, found, dtype, str(source.path))
        self.batch = max(1, TOKENS_AT_ONCE // ids.shape[1])
        self.shape = (ids.shape[0], ids.shape[1], int(source.config["hidden_size"]))
        self._arguments: dict[int, list[dict[str, Any]]] = {}
        self.first = work / "input.safetensors"
        self._counter = itertools.count()
        embedding = self.read("model.embed_tokens.weight")
        with SpillWriter(self.first, dtype, self.shape) as out:
            for start in range(0, self.shape[0], self.batch):
                out.add(self.frame.start(ids[start : start + self.batch], embedding)[0])

    def read(self, name: str) -> torch.Tensor:
        """A tensor of the source in the dtype of the arithmetic."""
        return self.source.read(name).to(self.dtype)

    def run(
        self,
        numbers: Sequence[int],
        *,
        start: Path | None = None,
        at: Callable[[Block], contextlib.AbstractContextManager[Saw | None]] | None = None,
        label: str = "",
        read: blocks.Read | None = None,
    ) -> Path:
        """Sends the windows (or the activations in file `start`) through blocks `numbers`; returns the file of the last outputs.

        at(block) is entered while a block works and may give a function that sees its inputs and outputs. read: other weights than
        the source's.
        """
        here = start or self.first
        for place, number in enumerate(numbers):
            block = self.frame.block(number, read or self.read)
            then = self.work / f"after-{next(self._counter)}.safetensors"
            watch = at(block) if at is not None else contextlib.nullcontext()
            with watch as saw, SpillWriter(then, self.dtype, self.shape) as out:
                for x, arguments in self._batches(here, number):
                    y = block.forward(x, arguments)
                    if not bool(torch.isfinite(y).all()):
                        self._blame(number)
                    if saw is not None:
                        saw(x, y)
                    out.add(y)
            if place:
                here.unlink()
            here = then
            self.meter.add(1, f"{label}block {number}")
        return here

    def _blame(self, number: int) -> None:
        """FormatError for a block whose outputs are no numbers; names the tensor where it is one of its own."""
        for name in self.source.names:
            if block_of(self.found, name) == number:
                finite(self.source, name)
        raise FormatError(
            f"{self.source.path}: block {number} gives NaN or Inf on this text though its weights are finite; take another "
            "text, or repair the source"
        )

    def _batches(self, file: Path, number: int) -> Iterator[tuple[torch.Tensor, dict[str, Any]]]:
        spill = Spill(file)
        for start in range(0, self.shape[0], self.batch):
            x = spill.read(start, min(self.shape[0], start + self.batch))
            if len(x) not in self._arguments:
                self._arguments[len(x)] = self.frame.arguments(len(x), self.shape[1])
            yield x, self._arguments[len(x)][number]

    def loss(self, file: Path) -> float:
        """Mean cross-entropy in nats of the next token, from the last block's outputs."""
        spill, head, total = Spill(file), self.frame.head(self.read), 0.0
        for index in range(self.shape[0]):
            x = self.frame.normed(spill.read(index, index + 1), self.read)[0, :-1]
            total += float(F.cross_entropy(F.linear(x, head).float(), self.ids[index, 1:], reduction="sum"))
        return total / (self.shape[0] * (self.shape[1] - 1))

    def drop(self, file: Path) -> None:
        """Removes activations that nobody needs any more."""
        if file != self.first:
            file.unlink(missing_ok=True)


def depth_scores(chain: Chain, kept: Sequence[int], score: str) -> dict[int, float]:
    """Block -> how much the chain of `kept` blocks would miss it, by `score` of methods/depth.py."""
    if score == "bi":
        found: dict[int, float] = {}

        @contextlib.contextmanager
        def at(block: Block) -> Iterator[Saw]:
            influence = depth.BlockInfluence()
            yield influence.add
            found[block.index] = influence.value

        chain.drop(chain.run(kept, at=at, label="influence of "))
        return found
    losses, here = {}, chain.first
    for place, number in enumerate(kept):
        if ENDS <= place < len(kept) - ENDS:
            last = chain.run(kept[place + 1 :], start=here, label=f"without block {number}: ")
            losses[number] = chain.loss(last)
            if last != here:
                chain.drop(last)
        then = chain.run([number], start=here, label="on to ")
        chain.drop(here)
        here = then
    whole = chain.loss(here)
    chain.drop(here)
    # The ends have no figure of their own: they stay anyway.
    return {number: losses.get(number, float("inf")) - whole for number in kept}


def depth_passes(layers: int, drops: int, score: str) -> int:
    """Blocks that all scorings together will run, for the meter."""
    counts = range(layers, layers - drops, -1)
    return sum(n if score == "bi" else n + n * (n - 1) // 2 for n in counts)


class WidthScores:
    """Scores of channels, heads and experts of the blocks that stay; `tensors` are what `save` writes, fp64."""

    def __init__(self, sizes: Sizes, wanted: Iterable[str]) -> None:
        self.sizes, self.wanted = sizes, set(wanted)
        self.tensors: dict[str, torch.Tensor] = {}
        self._hidden = torch.zeros(sizes.hidden, dtype=torch.float64)

    @contextlib.contextmanager
    def at(self, block: Block) -> Iterator[None]:
        """Watches a block while the windows go through it."""
        sizes, prefix, number = self.sizes, block.prefix, block.index
        seen: dict[str, ChannelScore] = {}
        watchers: dict[str, blocks.Watch] = {}
        windows = 0  # of the batch at work: experts see its tokens in a row

        def note(
            name: str, score: ChannelScore, view: Callable[[torch.Tensor], torch.Tensor] = lambda x: x
        ) -> blocks.Watch:
            seen[name] = score
            return lambda x: score.add(view(x))

        def begins(x: torch.Tensor) -> None:
            nonlocal windows
            windows = x.shape[0]
            if "hidden" in self.wanted:
                norms[0].add(x)

        norms = [ChannelScore(sizes.hidden), ChannelScore(sizes.hidden)]
        watchers[f"{prefix}self_attn.q_proj"] = begins
        experts = ExpertScore(sizes.experts) if block.experts is not None else None
        if "hidden" in self.wanted:
            if experts is not None:
                watchers[f"{prefix}mlp.experts"] = lambda x: norms[1].add(x.view(windows, -1, x.shape[-1]))
            else:
                watchers[f"{prefix}mlp.gate_proj"] = norms[1].add
        if "ffn" in self.wanted and experts is None:
            watchers[f"{prefix}mlp.down_proj"] = note(f"ffn.{number}", ChannelScore(sizes.ffn))
        if self.wanted & {"heads", "kv_heads"}:
            watchers[f"{prefix}self_attn.o_proj"] = note(
                f"heads.{number}", ChannelScore(sizes.heads), lambda x: head_norms(x, sizes.head_dim)
            )
        if "expert_ffn" in self.wanted and experts is not None:
            for expert in range(sizes.experts):
                # Tokens of an expert belong to no window any more: each counts as one.
                watchers[f"{prefix}mlp.experts.{expert}.down_proj"] = note(
                    f"expert_ffn.{number}.{expert}", ChannelScore(sizes.expert_ffn), lambda x: x[:, None]
                )
        with block.watching(watchers):
            if block.experts is not None and experts is not None and "experts" in self.wanted:
                block.experts.watch_output = experts.add
            try:
                yield
            finally:
                if block.experts is not None:
                    block.experts.watch_output = None
        self.tensors |= {name: score.scores for name, score in seen.items()}
        if "hidden" in self.wanted:
            self._hidden += norms[0].squares + norms[1].squares
            self.tensors["hidden"] = self._hidden.sqrt()
        if experts is not None and "experts" in self.wanted:
            self.tensors[f"experts.{number}"] = experts.scores
            self.tensors[f"tokens.{number}"] = experts.tokens.double()
