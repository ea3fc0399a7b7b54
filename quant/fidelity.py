"""How far a quantised model is from its source: both run side by side, block by block, over a text. No engine.

    level blocks   the FP block and the quantised one on the same FP input: error and noise of each block (report.Layer)
    level model    two chains as well, FP and quantised, each on its own inputs: KL, top-1 and perplexity at their ends

All arithmetic is fp32; int8 activations are rounded as the kernels round them (blocks.round_rows). Memory (`memory`): two
blocks (and a fused set more, where sets of a transformed model are tried at 16 bits), a head in its stored dtype, logits of a few hundred positions, and the hidden states of both chains, which beyond IN_MEMORY
bytes lie in files of which two exist at a time. Thresholds and windows are those of the bench's gate (bench/quality.py).
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ..formats.checkpoint import Checkpoint
from ..formats.spec import FormatError, QuantSpec
from ..formats.tensor import QuantTensor
from . import blocks
from .blocks import Block, Frame, Read
from .pair import Pair
from .progress import Callback, Meter
from .report import Gate, Layer
from .spill import Spill, SpillWriter
from .walk import EMBEDDING, Map

IN_MEMORY = 1 << 30  # bytes of hidden states that stay in memory
ERROR_TOKENS = 8192  # tokens over which the errors of single blocks are measured: they are means, and more cost time
GAIN_TOKENS = 4096  # the same where every fused set is tried at 16 bits
SMALL = 50_000_000  # below so many parameters only KL and top-1 decide: a small model's perplexity scatters
_BATCH = 4096  # tokens that go through a block at a time
_CHUNK = 256  # positions whose logits exist at one time, on both sides
_HEAD_ROWS = 1 << 14  # rows of a 16-bit head that exist in fp32 at one time

# Bits of a weight -> the worst that passes, equal to those of the bench's gate. 3-bit weights have none.
THRESHOLDS: dict[int, dict[str, float]] = {
    8: {"kl": 0.01, "top1": 0.97, "perplexity": 0.01},
    4: {"kl": 0.03, "top1": 0.93, "perplexity": 0.02},
}


@dataclass(frozen=True)
class Fall:
    """A fused set of a block: the block's noise (report.Layer) as it is, and with this set alone at 16 bits."""

    block: int
    together: str
    modules: tuple[str, ...]
    now: float
    then: float


@dataclass(frozen=True)
class Fidelity:
    """What `measure` found; `gate` at level model only, `falls` only when asked for."""

    layers: tuple[Layer, ...]
    gate: Gate | None = None
    falls: tuple[Fall, ...] = ()


def measure(
    pair: Pair,
    pieces: Sequence[torch.Tensor],
    *,
    level: str = "model",
    falls: bool = False,
    work: Path | None = None,
    progress: Callback | None = None,
) -> Fidelity:
    """Runs both models over `pieces`, windows of ids int64 [T], all of one length but the last. FormatError for a text
    that is too short or not of this vocabulary. work: where files of hidden states go; None = the system's folder.
    """
    if importlib.util.find_spec("transformers") is None:
        raise FormatError(
            f"level {level} runs the model's blocks through transformers, which is not installed; "
            "pip install 'percard[quant]', or take --level weights without a text"
        )
    wanted = list(pieces) if level == "model" else _first(pieces, GAIN_TOKENS if falls else ERROR_TOKENS)
    batches = _batches(wanted, pair)
    frame = Frame(pair.source.config, pair.found, torch.float32, str(pair.source.path))
    turned = _turn(pair)
    meter = Meter("compare", len(frame), progress, "blocks")
    layers, found = [], []
    with _folder(batches, int(frame.config.hidden_size), work) as folder:
        theirs, ours = _States("source", batches, folder), None
        table = _table(pair.source.read)
        arguments = {ids.shape[1]: _start(frame, table, ids[:1])[1] for ids in batches}
        theirs.begin(_start(frame, table, ids)[0] for ids in batches)
        if level == "model":
            table, ours = _table(pair.read), _States("made", batches, folder)
            ours.begin(_start(frame, table, ids)[0] for ids in batches)
        del table
        for index in range(len(frame)):
            fp, made = frame.block(index, pair.source.read), frame.block(index, pair.read)
            sums, seen = _Sums(), 0
            tries = [_Try(pair, fp, made, together) for together in _sets(made, pair)] if falls else []
            for i, ids in enumerate(batches):
                how = arguments[ids.shape[1]][index]
                x = theirs.get(i)
                y = fp.forward(x, how)
                if seen < ERROR_TOKENS:
                    a, b = turned(x), turned(y)
                    sums.add(a, b, made.forward(a, how))
                    for one in tries:
                        with one.at_16_bits():
                            one.sums.add(a, b, made.forward(a, how))
                    seen += ids.numel()
                theirs.put(i, y)
                if ours is not None:
                    ours.put(i, made.forward(ours.get(i), how))
            theirs.turn()
            if ours is not None:
                ours.turn()
            layers.append(Layer(index, sums.error, sums.noise))
            found += [Fall(index, one.together, one.modules, sums.noise, one.sums.noise) for one in tries]
            meter.add(1, fp.prefix.rstrip("."))
        gate = _score(frame, pair, theirs, ours, batches) if ours is not None else None
    return Fidelity(tuple(layers), gate, tuple(found))


def judged(gate: Gate, spec: QuantSpec | None, small: bool) -> Gate:
    """The same figures with a verdict by the thresholds of `spec`: "green", "red", or "none" where nothing judges it."""
    limits = THRESHOLDS.get(spec.weight_bits) if spec is not None and spec.float_format is None else None
    if limits is None:
        bits = "16" if spec is None else spec.weight_bits
        reasons: tuple[str, ...] = (f"{bits}-bit weights have no gate: figures are printed, never green",)
        word = "none"
    else:
        reasons = tuple(_misses(gate, limits, small))
        word = "red" if reasons else "green"
    used = {k: v for k, v in (limits or {}).items() if not (small and k == "perplexity")}
    return Gate(**{**vars(gate), "gate": word, "reasons": reasons, "spec": str(spec or ""), "limits": used})


def _misses(gate: Gate, limits: dict[str, float], small: bool) -> Iterator[str]:
    """Each threshold that was missed, in words. Written as "not good", so that a NaN is a miss."""
    if not gate.kl <= limits["kl"]:
        yield f"KL {gate.kl:.4f} is above {limits['kl']}"
    if not gate.top1 >= limits["top1"]:
        yield f"top-1 agreement {gate.top1:.1%} is below {limits['top1']:.0%}"
    if not small and not gate.rise <= limits["perplexity"]:
        yield f"perplexity rises {gate.rise:.2%}, more than {limits['perplexity']:.1%}"


def window_of(config: dict[str, Any]) -> int:
    """Tokens per window: the training context, at most 2048 (the common protocol)."""
    value = config.get("max_position_embeddings")
    return min(2048, value if isinstance(value, int) and value > 0 else 2048)


def memory(source: Checkpoint, found: Map, tokens: int) -> int:
    """Bytes that `measure` takes at most over a text of `tokens` tokens, beside Python and torch: two blocks in fp32 and
    what is read for them, the heads of both, logits, hidden states that are not in files, what is at work in a block."""
    largest = max(sum(4 * n * k for n, k in (x.shape for x in block)) for block in found.blocks())
    weight = max(4 * x.shape[0] * x.shape[1] for block in found.blocks() for x in block)
    widest = max(x.shape[0] for block in found.blocks() for x in block)
    vocabulary, hidden = source.info(EMBEDDING).shape
    logits = 6 * 4 * _CHUNK * vocabulary + 4 * _HEAD_ROWS * hidden
    tables = 2 * source.info(EMBEDDING).nbytes
    states = 2 * 4 * tokens * hidden
    at_work = 4 * _BATCH * (8 * hidden + 4 * widest)
    return 2 * largest + 3 * weight + tables + logits + at_work + (states if states <= IN_MEMORY else 0)


def disk(source: Checkpoint, tokens: int) -> int:
    """Bytes of files with hidden states that exist at one time: two of each chain, none where memory holds them."""
    states = 2 * 4 * tokens * source.info(EMBEDDING).shape[1]
    return 2 * states if states > IN_MEMORY else 0


class _Sums:
    """Sums over tokens that make the error and the noise of a block."""

    def __init__(self) -> None:
        self._wrong = self._done = self._share = 0.0
        self._tokens = 0

    def add(self, x: torch.Tensor, y: torch.Tensor, made: torch.Tensor) -> None:
        """x, y: input and FP output of the block [B, T, H]; made: the quantised block's output."""
        wrong = (made - y).square().sum(-1, dtype=torch.float64)
        self._wrong += float(wrong.sum())
        self._done += float((y - x).square().sum(dtype=torch.float64))
        self._share += float((wrong / y.square().sum(-1, dtype=torch.float64).clamp_min(1e-30)).sum())
        self._tokens += wrong.numel()

    @property
    def error(self) -> float:
        return math.sqrt(self._wrong / self._done) if self._done > 0 else 0.0

    @property
    def noise(self) -> float:
        return self._share / max(self._tokens, 1)


class _Try:
    """A fused set that can stand at 16 bits for a moment, in a block that is quantised."""

    def __init__(self, pair: Pair, fp: Block, made: Block, together: str) -> None:
        self.together, self.sums, self._pair, self._fp, self._made = together, _Sums(), pair, fp, made
        self.modules = tuple(x.name for x in pair.linears if x.block == made.index and x.together == together)

    @contextlib.contextmanager
    def at_16_bits(self) -> Iterator[None]:
        slots = [self._made.slots[name] for name in self.modules]
        before = [(slot.weight, slot.rounds_input) for slot in slots]
        for name, slot in zip(self.modules, slots, strict=True):
            tensor = f"{name}.weight"
            changed = self._pair.touches(tensor)
            slot.weight = self._pair.stored(tensor).float() if changed else self._fp.slots[name].weight
            slot.rounds_input = False
        try:
            yield
        finally:
            for slot, (weight, rounds) in zip(slots, before, strict=True):
                slot.weight, slot.rounds_input = weight, rounds


def _sets(made: Block, pair: Pair) -> list[str]:
    return list(dict.fromkeys(x.together for x in pair.linears if x.block == made.index))


class _States:
    """The hidden states of one chain, batch by batch: `get` what came into a block, `put` what goes out, `turn` to the next.

    With a folder, windows of full length lie in a file; the last, shorter one is always in memory.
    """

    def __init__(self, name: str, batches: Sequence[torch.Tensor], folder: Path | None) -> None:
        self._name, self._folder, self._turns = name, folder, 0
        full = batches[0].shape[1]
        starts = torch.tensor([0, *(len(b) if b.shape[1] == full else 0 for b in batches)]).cumsum(0).tolist()
        self._ranges = list(itertools.pairwise(starts))
        self._length = full
        self._held: dict[int, torch.Tensor] = {}
        self._file: Spill | None = None
        self._writer: SpillWriter | None = None

    def begin(self, states: Iterator[torch.Tensor]) -> None:
        """The states before the first block."""
        for i, x in enumerate(states):
            self.put(i, x)
        self.turn()

    def get(self, i: int) -> torch.Tensor:
        start, stop = self._ranges[i]
        if i in self._held or self._file is None:
            return self._held[i]
        return self._file.read(start, stop)

    def put(self, i: int, x: torch.Tensor) -> None:
        """In the order of the batches."""
        if self._folder is None or x.shape[1] != self._length:
            self._held[i] = x
            return
        if self._writer is None:
            path = self._folder / f"{self._name}-{self._turns:05d}.safetensors"
            self._writer = SpillWriter(path, x.dtype, (self._ranges[-1][1], self._length, x.shape[2]))
            self._writer.__enter__()
        self._writer.add(x)

    def turn(self) -> None:
        if self._writer is None:
            return
        self._writer.__exit__(None, None, None)
        if self._file is not None:
            self._file.path.unlink()
        self._file, self._writer, self._turns = Spill(self._writer.path), None, self._turns + 1


@contextlib.contextmanager
def _folder(batches: Sequence[torch.Tensor], hidden: int, work: Path | None) -> Iterator[Path | None]:
    """Where hidden states go when they are too many for memory (two chains, fp32); None = memory. Removed at the end."""
    if 2 * 4 * hidden * sum(ids.numel() for ids in batches) <= IN_MEMORY:
        yield None
        return
    made = Path(tempfile.mkdtemp(prefix="percard-compare-", dir=work))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _first(pieces: Sequence[torch.Tensor], tokens: int) -> list[torch.Tensor]:
    """The first windows that hold about `tokens` tokens, one at least."""
    taken: list[torch.Tensor] = []
    for piece in pieces:
        if taken and sum(len(p) for p in taken) + len(piece) > tokens:
            break
        taken.append(piece)
    return taken


def _batches(pieces: Sequence[torch.Tensor], pair: Pair) -> list[torch.Tensor]:
    """The windows as ids [B, T]: of one length together, the last, shorter one alone."""
    kept = [piece for piece in pieces if len(piece) > 1]  # one token has nothing to score
    if not kept:
        raise FormatError(f"{pair.made.path}: the text has fewer than 2 tokens; give a longer --text")
    vocabulary = pair.source.info(EMBEDDING).shape[0]
    largest = max(int(piece.max()) for piece in kept)
    if largest >= vocabulary:
        raise FormatError(
            f"{pair.source.path}: the text holds token {largest}, the model knows {vocabulary}; "
            "its tokenizer.json belongs to another model"
        )
    full = len(kept[0])
    whole = [piece for piece in kept if len(piece) == full]
    step = max(1, _BATCH // full)
    batches = [torch.stack(whole[i : i + step]) for i in range(0, len(whole), step)]
    return batches + [piece[None] for piece in kept if len(piece) != full]


def _table(read: Read) -> torch.Tensor:
    table = read(EMBEDDING)
    assert isinstance(table, torch.Tensor)
    return table


def _start(frame: Frame, table: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """frame.start with no more of the embedding `table` in fp32 than the ids need."""
    known, places = ids.unique(return_inverse=True)
    return frame.start(places.view(ids.shape), table[known])


def _turn(pair: Pair) -> Callable[[torch.Tensor], torch.Tensor]:
    """What brings hidden states of the source to where those of `made` are: a rotation, or nothing."""
    rotation = pair.transforms.rotation
    if rotation is None:
        return lambda x: x
    size = pair.source.info(EMBEDDING).shape[1]  # its rows are hidden states, so what is done to them is done to all
    matrix = rotation.apply(EMBEDDING, torch.eye(size), pair.source.read)
    return lambda x: x @ matrix


def _head(read: Read, name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """fp32 logits [T, V] of hidden states [T, H]; a 16-bit head stays in 16 bits, some rows of it become fp32 at a time."""
    weight = read(name)
    if isinstance(weight, QuantTensor):
        slot = blocks.Slot(torch.empty(0), None)
        slot.put(weight, torch.float32)
        return slot
    return lambda x: torch.cat([F.linear(x, rows.float()) for rows in weight.split(_HEAD_ROWS)], dim=-1)


@torch.no_grad()
def _score(frame: Frame, pair: Pair, theirs: _States, ours: _States, batches: Sequence[torch.Tensor]) -> Gate:
    """The figures at the end of both chains; the verdict comes later (`judged`)."""
    there, here = pair.heads
    head = here.removesuffix(".weight")
    theirs_head = _head(pair.source.read, there)
    same = head not in pair.specs and not pair.touches(here)
    ours_head = theirs_head if same else _head(pair.read, here)
    kl = nll = nll_reference = 0.0
    agree = count = windows = 0
    for i, ids in enumerate(batches):
        reference, model = frame.normed(theirs.get(i), pair.source.read), frame.normed(ours.get(i), pair.read)
        for row, piece in enumerate(ids):
            windows += 1
            targets = piece[1:]
            for start in range(0, len(targets), _CHUNK):
                part = slice(start, min(start + _CHUNK, len(targets)))
                p = F.log_softmax(theirs_head(reference[row, part]), dim=-1)
                q = F.log_softmax(ours_head(model[row, part]), dim=-1)
                # Summed in double: thousands of values near zero are added up.
                kl += float((p.exp() * (p - q)).sum(dim=-1).double().sum())
                nll -= float(q.gather(1, targets[part, None]).double().sum())
                nll_reference -= float(p.gather(1, targets[part, None]).double().sum())
                agree += int((p.argmax(dim=-1) == q.argmax(dim=-1)).sum())
                count += len(p)
    size = batches[0].shape[1]
    bits = str(pair.specs[head]) if head in pair.specs else "16bit"
    protocol = (
        f"{count} tokens in {windows} windows of {size}, stride {size}, no overlap; KL(reference || model) in nats; "
        f"reference in float32, model in float32 with head {bits}, block by block"
    )
    return Gate(
        "none",
        kl / count,
        agree / count,
        _perplexity(nll / count),
        _perplexity(nll_reference / count),
        count,
        protocol,
        "",
    )


def _perplexity(nll: float) -> float:
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf
