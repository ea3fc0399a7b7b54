"""The dry run of distilling: everything that can be known before a weight is read. Wishes, refusals, one question, memory."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..formats.checkpoint import Checkpoint
from ..formats.spec import FormatError
from . import distill_data, qad_child, walk
from .capture_cache import FACTS, Capture, shard_name
from .distill_losses import LOSSES, Objective
from .distill_match import block_pairs, shared_vocabulary
from .distill_models import Hidden
from .qad_child import Qad

HIDDEN = ("mse", "cosine")
# Peak learning rates: of 16-bit weights; of weights under fake quantisation, in steps of their scale; of scales, as shares of
# what they were. What else is trained has a share of it (qad.py).
RATES = {"": 5e-5, "qad": 1e-2, "scales": 1e-3}


class Refused(RuntimeError):
    """A question of the dry run that nobody has answered. Exit code 3."""

    code = 3


@dataclass(frozen=True)
class Wish:
    """What is asked for. data None: that of a capture. loss None: topk of a capture, else fkl. steps and tokens None: once through the text. hidden_blocks: "3,7", or "3:4,7:9" as student:teacher.

    lr is the peak rate (None: by what is trained, see `rate`); batch counts windows of a step over all processes, micro those
    that run at once in one (None: all). qad: the spec that the student trains with, its weights, with learn_scales its scales
    too, with scales_only these alone, with train_rest embeddings, norms, biases and head as well; calibration (None: data) and samples: what GPTQ reads where the student is 16-bit.
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
    lr: float | None = None
    decay: float = 0.01
    every: int = 200
    seed: int = 0
    checkpointing: bool = True
    dtype: str | None = None  # of products: fp32 or bf16; None: bf16 on a card, fp32 on a CPU
    device: str | None = None
    qad: str | None = None
    scales_only: bool = False
    learn_scales: bool = False
    train_rest: bool = False
    calibration: str | None = None
    samples: int | None = None  # 256

    @property
    def quantised(self) -> bool:
        """Whether the student trains with the weights of a quantised checkpoint."""
        return self.qad is not None or self.scales_only

    @property
    def rate(self) -> float:
        """The peak learning rate."""
        return self.lr if self.lr is not None else RATES["scales" if self.scales_only else "qad" if self.qad else ""]

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
            ("samples", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise FormatError(f"--{name.replace('_', '-')} {value}: expected at least {least}")
        for name in ("lr", "temperature", "hidden_weight"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise FormatError(f"--{name.replace('_', '-')} {value:g}: expected a number above 0")
        if not 0 <= self.beta <= 1:
            raise FormatError(f"--beta {self.beta:g}: expected 0 (forward KL) to 1 (reverse KL)")
        for name in ("hard", "decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise FormatError(f"--{name} {getattr(self, name):g}: expected 0 or more")
        if self.scales_only and self.learn_scales:
            raise FormatError("--scales-only keeps the codes, --learn-scales trains them as well; say one of them")
        for name in ("learn_scales", "train_rest", "calibration", "samples"):
            if getattr(self, name) and not self.quantised:
                raise FormatError(f"--{name.replace('_', '-')} belongs to a quantised student; add --qad SPEC")


@dataclass(frozen=True, eq=False)
class Plan:
    """What a run would do. teacher: a checkpoint that runs along, or what one said. vocab: ids that both sides know.

    captures: all whose windows are trained on, the teacher among them where it is one.
    """

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
    captures: tuple[Capture, ...] = ()
    qad: Qad | None = None

    @property
    def k(self) -> int:
        """Kept ids that are read of every position: the fewest that any capture has; 0 where none are."""
        return min((c.k for c in self.captures if c.k), default=0) if self.objective.kind == "topk" else 0

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
        ours = 16 * self.parameters[0] if self.qad is None else self.qad.memory
        return {"student": ours, "teacher": bits * self.parameters[1]}

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "student": str(self.student.path),
            "teacher": str(self.reference),
            "captures": [str(capture.folder) for capture in self.captures],
            "family": self.found.family.name,
            "parameters": {"student": self.parameters[0], "teacher": self.parameters[1]},
            "loss": self.objective.kind,
            "vocab": self.vocab,
            "window": self.window,
            "wish": {**dataclasses.asdict(self.wish), "lr": self.wish.rate},
            "qad": None if self.qad is None else self.qad.to_dict(),
            "hidden": None if self.hidden is None else dataclasses.asdict(self.hidden),
            "text": self.text,
            "memory": self.memory,
            "question": self.question,
            "warnings": list(self.warnings),
        }


def plan(
    student: str | os.PathLike[str],
    teacher: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    wish: Wish,
) -> Plan:
    """Checks both models, their tokenizers and the front of the text. FormatError for what cannot be.

    teacher: a checkpoint, or the folder of a capture, which brings its text along; or several: captures together, or one checkpoint
    and captures whose text it reads along with `wish.data`.
    """
    folders = [Path(t) for t in ([teacher] if isinstance(teacher, str | os.PathLike) else teacher)]
    live, captured = _sorted(Path(student), folders, wish)
    qad = qad_child.opened(Path(student), wish) if wish.quantised else None
    ours, found = (qad.student, qad.found) if qad is not None else _open(Path(student), "student")
    captures = tuple(Capture.open(folder, ours.path, verify=False) for folder in captured)
    if live is None:
        planned = _from_captures(ours, found, captures, wish)
        return planned if qad is None else dataclasses.replace(planned, qad=qad, parameters=(sum(qad.counts[::2]), 0))
    theirs, _ = _open(live, "teacher")
    objective = _objective(wish, "fkl")
    if objective.kind == "topk":
        raise FormatError(f"--loss topk: {live} is a model; give the folder of a capture alone, or take --loss fkl")
    if wish.data is None and not captures:
        raise FormatError("--data is missing; give text to train on")
    vocab = shared_vocabulary(ours, theirs)
    for capture in captures:
        if capture.vocab > vocab:
            raise FormatError(
                f"{capture.folder}: was captured over {capture.vocab} tokens, student and teacher share {vocab}"
            )
    notes: list[str] = []
    window, positions = wish.seq_len, [c.config.get("max_position_embeddings") for c in (ours, theirs)]
    least = min([p for p in positions if p], default=None)
    longest = _longest(captures, least, "both models")
    if least is not None and window > least:
        notes.append(f"--seq-len {window} cut to the {least} positions of the models")
        window = least
    names, windows = [capture.folder.name for capture in captures], sum(len(capture) for capture in captures)
    if wish.data is not None:
        names.insert(0, distill_data.probe(wish.data, ours.path, vocab, window, max(1, wish.batch - windows)))
    elif windows < wish.batch:
        raise _too_few(captures, wish)
    sizes = (_parameters(ours) if qad is None else sum(qad.counts[::2]), _parameters(theirs))
    question = ""
    if sizes[0] > sizes[1]:
        question = (
            f"the student has {sizes[0]:,} parameters, the teacher {sizes[1]:,}: are they swapped? "
            "say --yes if a larger student is meant"
        )
    hidden = None
    if wish.hidden is not None:
        hidden = Hidden(wish.hidden, block_pairs(wish.hidden_blocks, ours, theirs), wish.hidden_weight)
    if objective.kind != "none" and wish.hard >= 1:
        notes.append("hard labels weigh as much as the teacher: cross-entropy alone lets a student drift from it")
    notes += [
        f"{capture.folder.name}: its text is trained on; what it kept is not read, {live.name} says it anew"
        for capture in captures
        if capture.k
    ]
    window = max(window, longest) if wish.data is not None else longest
    return Plan(
        ours, theirs, found, wish, objective, vocab, window, sizes, hidden, " + ".join(names), question, tuple(notes), captures, qad
    )  # fmt: skip


def _sorted(student: Path, teachers: Sequence[Path], wish: Wish) -> tuple[Path | None, list[Path]]:
    """The one model among the teachers, and the captures."""
    if not teachers:
        raise FormatError("--teacher is missing; give a model, or a folder of percard capture")
    for number, folder in enumerate(teachers):
        if folder.resolve() == student.resolve() and not wish.quantised:  # then it learns from its own 16-bit self
            raise FormatError(f"{student}: student and teacher are the same folder; there is nothing to learn")
        if folder.resolve() in [other.resolve() for other in teachers[:number]]:
            raise FormatError(f"--teacher {folder}: given twice; name each folder once")
    captured = [folder for folder in teachers if (folder / FACTS).is_file()]
    live = [folder for folder in teachers if folder not in captured]
    if len(live) > 1:
        raise FormatError(
            f"--teacher {live[1]}: {live[0]} runs along already; one model and any number of captures (percard capture)"
        )
    return (live[0] if live else None), captured


def _objective(wish: Wish, usual: str) -> Objective:
    return Objective(wish.loss or usual, wish.beta, wish.temperature, wish.hard)


def _longest(captures: Sequence[Capture], positions: int | None, whose: str) -> int:
    """Tokens of the longest window; FormatError when it has more than the positions of the models."""
    for capture in captures:
        longest = int(capture.lengths.max(initial=0))
        if positions and longest > positions:
            raise FormatError(
                f"{capture.folder}: has windows of {longest} tokens, {whose} {positions} positions; capture shorter ones"
            )
    return max((int(capture.lengths.max(initial=0)) for capture in captures), default=0)


def _too_few(captures: Sequence[Capture], wish: Wish) -> FormatError:
    folders, windows = ", ".join(str(c.folder) for c in captures), sum(len(c) for c in captures)
    return FormatError(f"{folders}: {windows} windows, less than one batch of {wish.batch}; take a smaller --batch")


def _from_captures(student: Checkpoint, found: walk.Map, captures: tuple[Capture, ...], wish: Wish) -> Plan:
    """What captured teachers allow: topk at temperature 1, or their text alone."""
    first, soft = captures[0], [capture for capture in captures if capture.k]
    folders = ", ".join(str(capture.folder) for capture in captures)
    are = "is a capture" if len(captures) == 1 else "are captures"
    objective = _objective(wish, "topk" if soft else "none")
    if wish.data is not None:
        raise FormatError(
            f"--data {wish.data}: {folders} {are} and bring{'s its' if len(captures) == 1 else ' their'} own text; leave --data out, "
            "or add a model with --teacher"
        )
    if objective.kind not in ("topk", "none") or (objective.kind == "topk" and not soft):
        able = "topk, or none with --hard 1" if soft else "none with --hard 1: it keeps the text alone"
        raise FormatError(f"--loss {objective.kind}: {folders} {are}; it serves {able}")
    if objective.kind == "none" and not wish.hard:
        raise FormatError(f"{folders}: keeps no probabilities, so there is nothing to train on; add --hard 1")
    if wish.temperature != 1:
        raise FormatError(
            f"--temperature {wish.temperature:g}: a capture holds temperature 1; what the rest weighs at another is not in it"
        )
    if wish.hidden is not None:
        raise FormatError(f"--hidden {wish.hidden}: {folders} {are} and has no hidden states; take a live teacher")
    longest = _longest(captures, student.config.get("max_position_embeddings"), "the student")
    if sum(len(capture) for capture in captures) < wish.batch:
        raise _too_few(captures, wish)
    head = int(student.config["vocab_size"])
    for capture in captures:
        if capture.vocab > head:
            raise FormatError(
                f"{capture.folder}: was captured over {capture.vocab} tokens, the student's head has {head} rows"
            )
        if capture.vocab != first.vocab:
            raise FormatError(
                f"{capture.folder}: was captured over {capture.vocab} tokens, {first.folder} over {first.vocab}; "
                "capture both with one tokenizer"
            )
    text = " + ".join(capture.folder.name for capture in captures)
    made = Plan(
        student, soft[0] if soft else first, found, wish, objective, first.vocab, longest, (_parameters(student), 0), None, text,
        captures=captures,
    )  # fmt: skip
    return dataclasses.replace(made, warnings=tuple(_mixed(made)))


def _mixed(planned: Plan) -> Iterator[str]:
    """What differs between captures that are trained on together."""
    teachers = {capture.facts["teacher"]["sha256"]: capture for capture in planned.captures}
    if len(teachers) > 1:
        yield f"{planned.text}: from {len(teachers)} teachers; the student learns something between them"
    if not planned.k:
        return
    for capture in planned.captures:
        if not capture.k:
            yield f"{capture.folder.name}: keeps no probabilities; its tokens count as sure (cross-entropy)"
        elif capture.k > planned.k:
            yield f"{capture.folder.name}: keeps {capture.k} tokens of a position, {planned.k} are read as of the others; what is behind joins the rest"


def _open(folder: Path, role: str) -> tuple[Checkpoint, walk.Map]:
    if not folder.is_dir():
        raise FormatError(f"{folder}: the {role} is not there; give its folder")
    if (folder / shard_name(0)).is_file():
        raise FormatError(f"{folder}: a capture without {FACTS}: not finished, or cut; run percard capture again")
    source = Checkpoint.open(folder)
    if any(source.config.get(k) is not None for k in ("quantization_config", "compression_config")):
        remedy = "quantise the student after, or train it as it is with --qad" if role == "student" else "its source"
        raise FormatError(f"{folder}: the {role} is quantised; give the 16-bit checkpoint, {remedy}")
    return source, walk.of(source)


def _parameters(source: Checkpoint) -> int:
    return sum(int(np.prod(i.shape)) for i in source.tensors.values())
