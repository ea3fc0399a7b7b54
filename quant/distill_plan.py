"""The dry run of distilling: everything that can be known before a weight is read. Wishes, refusals, one question, memory."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..formats.checkpoint import Checkpoint
from ..formats.spec import FormatError
from . import distill_data, vocabulary, walk
from .capture_cache import FACTS, Capture
from .distill_losses import LOSSES, Objective
from .distill_models import Hidden
from .vocabulary import Words

PRUNED = "prune.json"
HIDDEN = ("mse", "cosine")


class Refused(RuntimeError):
    """A question of the dry run that nobody has answered. Exit code 3."""

    code = 3


@dataclass(frozen=True)
class Wish:
    """What is asked for. data None: that of a capture. loss None: topk of a capture, else fkl. steps and tokens None: once through the text. hidden_blocks: "3,7", or "3:4,7:9" as student:teacher.

    lr is the peak rate; batch counts windows of a step over all processes, micro those that run at once in one (None: all).
    """

    data: str | None = None
    loss: str | None = None
    beta: float = 0.5
    temperature: float = 1.0
    hard: float = 0.0
    hidden: str | None = None
    hidden_blocks: str = ""
    hidden_weight: float = 1.0
    steps: int | None = None
    tokens: int | None = None
    seq_len: int = 2048
    batch: int = 32
    micro: int | None = None
    lr: float = 5e-5
    decay: float = 0.01
    every: int = 200
    seed: int = 0
    checkpointing: bool = True
    dtype: str | None = None  # of products: fp32 or bf16; None: bf16 on a card, fp32 on a CPU
    device: str | None = None

    def __post_init__(self) -> None:
        if self.loss is not None and self.loss not in LOSSES:
            raise FormatError(f"--loss {self.loss}: not known; choose one of {', '.join(LOSSES)}")
        if self.dtype not in (None, "fp32", "bf16"):
            raise FormatError(f"--dtype {self.dtype}: expected fp32 or bf16")
        if self.hidden is not None and self.hidden not in HIDDEN:
            raise FormatError(f"--hidden {self.hidden}: not known; choose one of {', '.join(HIDDEN)}")
        if (self.hidden is None) != (not self.hidden_blocks):
            raise FormatError("--hidden and --hidden-blocks go together: which loss, and at which blocks")
        if self.loss == "none" and not self.hard and self.hidden is None:
            raise FormatError("--loss none leaves nothing to train on; add --hard 1, or --hidden")
        if self.steps is not None and self.tokens is not None:
            raise FormatError("--steps and --tokens both say how long; give one of them")
        for name, least in (
            ("steps", 1),
            ("tokens", 1),
            ("seq_len", 2),
            ("batch", 1),
            ("micro", 1),
            ("every", 1),
            ("seed", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise FormatError(f"--{name.replace('_', '-')} {value}: expected at least {least}")
        for name in ("lr", "temperature", "hidden_weight"):
            if not 0 < getattr(self, name) < math.inf:
                raise FormatError(f"--{name.replace('_', '-')} {getattr(self, name):g}: expected a number above 0")
        if not 0 <= self.beta <= 1:
            raise FormatError(f"--beta {self.beta:g}: expected 0 (forward KL) to 1 (reverse KL)")
        for name in ("hard", "decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise FormatError(f"--{name} {getattr(self, name):g}: expected 0 or more")


@dataclass(frozen=True, eq=False)
class Plan:
    """What a run would do. teacher: a checkpoint that runs along, or what one said. vocab: ids that both sides know; blocks: the student's block -> the teacher's, as pruning left it."""

    student: Checkpoint
    teacher: Checkpoint | Capture
    found: walk.Map
    wish: Wish
    objective: Objective
    vocab: int
    window: int
    parameters: tuple[int, int]  # of student and teacher, 0 for a capture
    hidden: Hidden | None
    text: str
    question: str = ""
    warnings: tuple[str, ...] = ()

    def steps(self, windows: int) -> int:
        """How many, of a text with so many windows."""
        wish = self.wish
        if wish.steps is not None:
            return wish.steps
        if wish.tokens is not None:
            return max(1, math.ceil(wish.tokens / (wish.batch * self.window)))
        return max(1, windows // wish.batch)

    @property
    def reference(self) -> Path:
        """The teacher's folder."""
        return self.teacher.folder if isinstance(self.teacher, Capture) else self.teacher.path

    @property
    def memory(self) -> dict[str, int]:
        """Bytes over all processes: weights of both, gradients and both moments in fp32; without activations."""
        bits = 2 if self.wish.dtype == "bf16" else 4
        return {"student": 16 * self.parameters[0], "teacher": bits * self.parameters[1]}

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "student": str(self.student.path),
            "teacher": str(self.reference),
            "family": self.found.family.name,
            "parameters": {"student": self.parameters[0], "teacher": self.parameters[1]},
            "loss": self.objective.kind,
            "vocab": self.vocab,
            "window": self.window,
            "wish": dataclasses.asdict(self.wish),
            "hidden": None if self.hidden is None else dataclasses.asdict(self.hidden),
            "text": self.text,
            "memory": self.memory,
            "question": self.question,
            "warnings": list(self.warnings),
        }


def plan(student: str | os.PathLike[str], teacher: str | os.PathLike[str], wish: Wish) -> Plan:
    """Checks both models, their tokenizers and the front of the text. FormatError for what cannot be.

    teacher: a checkpoint, or the folder of a capture, which brings its text along.
    """
    if Path(student).resolve() == Path(teacher).resolve():
        raise FormatError(f"{student}: student and teacher are the same folder; there is nothing to learn")
    ours, found = _open(Path(student), "student")
    if (Path(teacher) / FACTS).is_file():
        return _from_capture(ours, found, Path(teacher), wish)
    theirs, _ = _open(Path(teacher), "teacher")
    objective = _objective(wish, "fkl")
    if objective.kind == "topk":
        raise FormatError(f"--loss topk: {teacher} is a model; give the folder of a capture, or take --loss fkl")
    if wish.data is None:
        raise FormatError("--data is missing; give text to train on")
    vocab = shared_vocabulary(ours, theirs)
    notes: list[str] = []
    window, positions = wish.seq_len, [c.config.get("max_position_embeddings") for c in (ours, theirs)]
    least = min([p for p in positions if p], default=None)
    if least is not None and window > least:
        notes.append(f"--seq-len {window} cut to the {least} positions of the models")
        window = least
    text = distill_data.probe(wish.data, ours.path, vocab, window, wish.batch)
    sizes = (_parameters(ours), _parameters(theirs))
    question = ""
    if sizes[0] > sizes[1]:
        question = (
            f"the student has {sizes[0]:,} parameters, the teacher {sizes[1]:,}: are they swapped? "
            "say --yes if a larger student is meant"
        )
    hidden = None
    if wish.hidden is not None:
        hidden = Hidden(wish.hidden, _pairs(wish.hidden_blocks, ours, theirs), wish.hidden_weight)
    if objective.kind != "none" and wish.hard >= 1:
        notes.append("hard labels weigh as much as the teacher: cross-entropy alone lets a student drift from it")
    return Plan(ours, theirs, found, wish, objective, vocab, window, sizes, hidden, text, question, tuple(notes))


def _objective(wish: Wish, usual: str) -> Objective:
    return Objective(wish.loss or usual, wish.beta, wish.temperature, wish.hard)


def _from_capture(student: Checkpoint, found: walk.Map, folder: Path, wish: Wish) -> Plan:
    """What a captured teacher allows: topk at temperature 1, or its text alone."""
    capture = Capture.open(folder, student.path, verify=False)
    objective = _objective(wish, "topk" if capture.k else "none")
    if wish.data is not None:
        raise FormatError(f"--data {wish.data}: {folder} is a capture and brings its own text; leave --data out")
    if objective.kind not in ("topk", "none") or (objective.kind == "topk" and not capture.k):
        able = "topk, or none with --hard 1" if capture.k else "none with --hard 1: it keeps the text alone"
        raise FormatError(f"--loss {objective.kind}: {folder} is a capture; it serves {able}")
    if objective.kind == "none" and not wish.hard:
        raise FormatError(f"{folder}: keeps no probabilities, so there is nothing to train on; add --hard 1")
    if wish.temperature != 1:
        raise FormatError(
            f"--temperature {wish.temperature:g}: a capture holds temperature 1; what the rest weighs at another is not in it"
        )
    if wish.hidden is not None:
        raise FormatError(
            f"--hidden {wish.hidden}: {folder} is a capture and has no hidden states; take a live teacher"
        )
    positions, longest = student.config.get("max_position_embeddings"), int(capture.lengths.max(initial=0))
    if positions and longest > positions:
        raise FormatError(
            f"{folder}: has windows of {longest} tokens, the student {positions} positions; capture shorter ones"
        )
    if len(capture) < wish.batch:
        raise FormatError(
            f"{folder}: {len(capture)} windows, less than one batch of {wish.batch}; take a smaller --batch"
        )
    head = int(student.config["vocab_size"])
    if capture.vocab > head:
        raise FormatError(f"{folder}: was captured over {capture.vocab} tokens, the student's head has {head} rows")
    text = str(folder.name)
    return Plan(student, capture, found, wish, objective, capture.vocab, longest, (_parameters(student), 0), None, text)


def _open(folder: Path, role: str) -> tuple[Checkpoint, walk.Map]:
    if not folder.is_dir():
        raise FormatError(f"{folder}: the {role} is not there; give its folder")
    source = Checkpoint.open(folder)
    if any(source.config.get(k) is not None for k in ("quantization_config", "compression_config")):
        raise FormatError(f"{folder}: the {role} is quantised; give the 16-bit checkpoint, quantise the student after")
    return source, walk.of(source)


def _parameters(source: Checkpoint) -> int:
    return sum(int(np.prod(i.shape)) for i in source.tensors.values())


def shared_vocabulary(student: Checkpoint, teacher: Checkpoint) -> int:
    """Ids 0 to n - 1 that mean the same on both sides; rows of a head behind them are padding and get no probability.

    FormatError names the first token that differs, or the tokenizer that is missing or larger than its head.
    """
    heads = [int(source.config["vocab_size"]) for source in (student, teacher)]
    files = [source.path / vocabulary.FILE for source in (student, teacher)]
    try:
        ours, theirs = (Words.of(source.path) for source in (student, teacher))
    except FormatError:
        # Text could not be read with it, but data may be ids, and the same file is the same tokenizer.
        if all(path.is_file() for path in files) and files[0].read_bytes() == files[1].read_bytes():
            return min(heads)
        raise
    theirs.must_agree(ours)
    count = min(len(ours), len(theirs))
    for words, head in ((ours, heads[0]), (theirs, heads[1])):
        if count > head:
            raise FormatError(
                f"{words.path}: {len(words)} tokens, the model's head has {head} rows; it belongs to another model"
            )
    return count


def _pairs(text: str, student: Checkpoint, teacher: Checkpoint) -> tuple[tuple[int, int], ...]:
    """Which block of the student is held against which of the teacher."""
    counts = [int(source.config["num_hidden_layers"]) for source in (student, teacher)]
    known = _kept(student, counts)
    found = []
    for word in text.split(","):
        ours, colon, theirs = word.partition(":")
        if not ours.strip().isdigit() or (colon and not theirs.strip().isdigit()):
            raise FormatError(
                f"--hidden-blocks {text}: {word!r} is no block; write 3,7 or student:teacher as in 3:4,7:9"
            )
        if not colon and known is None:
            raise FormatError(
                f"--hidden-blocks {text}: which of the teacher's {counts[1]} blocks belongs to one of the student's {counts[0]} "
                "is not known (no prune.json of it); write student:teacher, such as 3:4"
            )
        mine = int(ours)
        if mine < counts[0]:
            other = int(theirs) if colon else (known or [])[mine]
        if mine >= counts[0] or other >= counts[1]:
            raise FormatError(
                f"--hidden-blocks {text}: {word!r}, the student has blocks 0 to {counts[0] - 1}, the teacher 0 to {counts[1] - 1}"
            )
        found.append((mine, other))
    return tuple(found)


def _kept(student: Checkpoint, counts: list[int]) -> list[int] | None:
    """The teacher's block of each of the student's: from prune.json, or the same numbers where there are as many."""
    path = student.path / PRUNED
    if path.is_file():
        try:
            kept: Any = json.loads(path.read_text(encoding="utf-8")).get("kept_layers")
        except (ValueError, AttributeError):
            raise FormatError(f"{path}: not a report of percard prune; remove it, or prune again") from None
        if isinstance(kept, list) and len(kept) == counts[0] and max(kept, default=0) < counts[1]:
            return [int(i) for i in kept]
    return list(range(counts[0])) if counts[0] == counts[1] else None


def pruning_of(source: Checkpoint) -> Mapping[str, Any]:
    """Pruning that this checkpoint went through, empty when it did not."""
    path = source.path / PRUNED
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
