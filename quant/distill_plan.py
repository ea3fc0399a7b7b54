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
from . import distill_data, walk
from .distill_losses import LOSSES, Objective
from .distill_models import Hidden

PRUNED = "prune.json"
HIDDEN = ("mse", "cosine")


class Refused(RuntimeError):
    """A question of the dry run that nobody has answered. Exit code 3."""

    code = 3


@dataclass(frozen=True)
class Wish:
    """What is asked for. steps and tokens None: once through the text. hidden_blocks: "3,7", or "3:4,7:9" as student:teacher.

    lr is the peak rate; batch counts windows of a step over all processes, micro those that run at once in one (None: all).
    """

    data: str
    loss: str = "fkl"
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
        if self.loss not in LOSSES or self.loss == "topk":
            known = ", ".join(n for n in LOSSES if n != "topk")
            raise FormatError(f"--loss {self.loss}: not known; choose one of {known}")
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
        for name, low in (
            ("steps", 1),
            ("tokens", 1),
            ("seq_len", 2),
            ("batch", 1),
            ("micro", 1),
            ("every", 1),
            ("seed", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < low:
                raise FormatError(f"--{name.replace('_', '-')} {value}: expected at least {low}")
        ranges: tuple[tuple[str, float, float], ...] = (
            ("lr", 0.0, math.inf), ("temperature", 0.0, math.inf), ("hidden_weight", 0.0, math.inf),
        )  # fmt: skip
        for name, low, high in ranges:
            if not low < getattr(self, name) < high:
                raise FormatError(f"--{name.replace('_', '-')} {getattr(self, name):g}: expected a number above 0")
        if not 0 <= self.beta <= 1:
            raise FormatError(f"--beta {self.beta:g}: expected 0 (forward KL) to 1 (reverse KL)")
        for name in ("hard", "decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise FormatError(f"--{name} {getattr(self, name):g}: expected 0 or more")

    @property
    def objective(self) -> Objective:
        return Objective(self.loss, self.beta, self.temperature, self.hard)


@dataclass(frozen=True, eq=False)
class Plan:
    """What a run would do. vocab: ids that both sides know; blocks: the student's block -> the teacher's, as pruning left it."""

    student: Checkpoint
    teacher: Checkpoint
    found: walk.Map
    wish: Wish
    vocab: int
    window: int
    parameters: tuple[int, int]
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
    def memory(self) -> dict[str, int]:
        """Bytes over all processes: weights of both, gradients and both moments in fp32; without activations."""
        bits = 2 if self.wish.dtype == "bf16" else 4
        return {"student": 16 * self.parameters[0], "teacher": bits * self.parameters[1]}

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "student": str(self.student.path),
            "teacher": str(self.teacher.path),
            "family": self.found.family.name,
            "parameters": {"student": self.parameters[0], "teacher": self.parameters[1]},
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
    """Checks both models, their tokenizers and the front of the text. FormatError for what cannot be."""
    if Path(student).resolve() == Path(teacher).resolve():
        raise FormatError(f"{student}: student and teacher are the same folder; there is nothing to learn")
    ours, found = _open(Path(student), "student")
    theirs, _ = _open(Path(teacher), "teacher")
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
    if wish.loss != "none" and wish.hard >= 1:
        notes.append("hard labels weigh as much as the teacher: cross-entropy alone lets a student drift from it")
    return Plan(ours, theirs, found, wish, vocab, window, sizes, hidden, text, question, tuple(notes))


def _open(folder: Path, role: str) -> tuple[Checkpoint, walk.Map]:
    if not folder.is_dir():
        raise FormatError(f"{folder}: the {role} is not there; give its folder")
    source = Checkpoint.open(folder)
    if any(source.config.get(k) is not None for k in ("quantization_config", "compression_config")):
        raise FormatError(f"{folder}: the {role} is quantised; give the 16-bit checkpoint, quantise the student after")
    infos = source.tensors
    shapes, dtypes = {n: i.shape for n, i in infos.items()}, {n: i.dtype for n, i in infos.items()}
    return source, walk.survey(source.config, shapes, dtypes, str(folder))


def _parameters(source: Checkpoint) -> int:
    return sum(int(np.prod(i.shape)) for i in source.tensors.values())


def shared_vocabulary(student: Checkpoint, teacher: Checkpoint) -> int:
    """Ids 0 to n - 1 that mean the same on both sides; rows of a head behind them are padding and get no probability.

    FormatError names the first token that differs, or the tokenizer that is missing or larger than its head.
    """
    files = [source.path / "tokenizer.json" for source in (student, teacher)]
    for path, role in zip(files, ("student", "teacher"), strict=True):
        if not path.is_file():
            raise FormatError(f"{path}: not there; whether ids of the {role} mean the same needs its tokenizer.json")
    heads = [int(source.config["vocab_size"]) for source in (student, teacher)]
    tables = [_tokens(path) for path in files]
    if tables[0] is None or tables[1] is None:  # of text this could be nothing, but data may be ids
        if files[0].read_bytes() == files[1].read_bytes():
            return min(heads)
        broken = files[0] if tables[0] is None else files[1]
        raise FormatError(f"{broken}: not a tokenizer; take the model's own")
    count = min(max(table, default=-1) + 1 for table in tables)
    for number in range(count):
        ours, theirs = tables[0].get(number), tables[1].get(number)
        if ours != theirs:
            raise FormatError(
                f"{student.path}: student and teacher have different tokenizers: id {number} is {ours!r} here and {theirs!r} "
                f"in {teacher.path}; distilling compares probabilities of the same tokens, take a teacher of the same family"
            )
    for table, head, path in zip(tables, heads, files, strict=True):
        if max(table) >= head and count > head:
            raise FormatError(
                f"{path}: has id {max(table)}, the model's head has {head} rows; it belongs to another model"
            )
    return count


def _tokens(path: Path) -> dict[int, str] | None:
    """id -> token; None for a file that is no tokenizer."""
    from tokenizers import Tokenizer

    try:
        words = Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
    except Exception:  # the library raises plain Exception
        return None
    return {number: word for word, number in words.items()} or None


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
