"""What of a student stands beside what of its teacher: ids of both vocabularies, blocks of both decoders."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..formats.checkpoint import Checkpoint
from ..formats.spec import FormatError
from . import vocabulary
from .vocabulary import Words

PRUNED = "prune.json"


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


def block_pairs(text: str, student: Checkpoint, teacher: Checkpoint) -> tuple[tuple[int, int], ...]:
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
                "is not known (no prune.json that says so); write student:teacher, such as 3:4"
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
            told = json.loads(path.read_text(encoding="utf-8"))
            kept: Any = told.get("kept_layers")
            before = told.get("cuts", {}).get("layers", [counts[0]])[0]
        except (ValueError, AttributeError, LookupError):
            raise FormatError(f"{path}: not a report of percard prune; remove it, or prune again") from None
        # A teacher with other blocks than those it was cut from: of two prunings it knows the second.
        if before == counts[1] and isinstance(kept, list) and len(kept) == counts[0] and max(kept, default=0) < before:
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
