r"""A user's own task: questions in a file, the share that a model answers right, and how long its answers are.

    {"prompt": "import os\nfor name in os.list", "expected": "dir", "score": "regex"}
    {"prompt": "def f(x):\n    return x", "expected": " + 1", "max_new": 8}
    {"prompt": "2 > 1 is", "expected": " True", "score": "choice", "choices": [" True", " False"]}

    exact     the greedy answer, without space around it, is `expected`; it ends with its first line if `expected` is one line
    regex     the pattern `expected` is found in the greedy answer
    choice    of all `choices` the expected one has the highest log-likelihood after the prompt (sum over its tokens)

Lines are JSON objects; `score` is exact if not said, `max_new` tokens are generated at most (32 if not said).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..formats.spec import FormatError
from .engine import Model
from .vocabulary import Vocabulary

SCORES = ("exact", "regex", "choice")
MAX_NEW = 32
BATCH = 16  # prompts that are answered together
LENGTH_PROMPTS, LENGTH_LIMIT = 64, 128  # of the comparison of lengths: prompts, and tokens of an answer at most
_KEYS = {"prompt", "expected", "score", "choices", "max_new"}
_Z = 1.959964  # the normal quantile of a two-sided 95 % interval


@dataclass(frozen=True)
class Item:
    """One question; `line` of the file."""

    line: int
    prompt: str
    expected: str
    score: str = "exact"
    choices: tuple[str, ...] = ()
    max_new: int = MAX_NEW

    @property
    def tokens_out(self) -> int:
        """Tokens that serving this question makes: a choice is one."""
        return 1 if self.score == "choice" else self.max_new

    def right(self, answer: str) -> bool:
        """Whether a generated answer is right."""
        if self.score == "regex":
            return re.search(self.expected, answer) is not None
        answer, expected = answer.strip(), self.expected.strip()
        return (answer if "\n" in expected else answer.split("\n")[0].rstrip()) == expected


@dataclass(frozen=True)
class Task:
    """A file of questions; `name` is the file's."""

    name: str
    items: tuple[Item, ...]

    @classmethod
    def load(cls, path: str | Path, limit: int | None = None) -> Task:
        """The task in a JSONL file, `limit` of its questions evenly over it. FormatError names the line and what to change."""
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise FormatError(f"{path}: not UTF-8 ({error}); save it as UTF-8 text") from None
        items = []
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                items.append(_item(line, number, f"{path}:{number}"))
        if not items:
            raise FormatError(f'{path}: holds no question; a line is {{"prompt": "...", "expected": "..."}}')
        count = min(limit or len(items), len(items))
        return cls(path.stem, tuple(items[i * len(items) // count] for i in range(count)))

    @property
    def text(self) -> str:
        """All prompts with what is expected, as running text; a pattern is no text."""
        return "\n".join(i.prompt + ("" if i.score == "regex" else i.expected) for i in self.items)


def _item(line: str, number: int, where: str) -> Item:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise FormatError(f"{where}: not JSON ({error}); expected one object on each line") from None
    if not isinstance(row, dict):
        raise FormatError(f'{where}: is {_shown(row)}; expected an object {{"prompt": "...", "expected": "..."}}')
    if unknown := sorted(set(row) - _KEYS):
        raise FormatError(f"{where}: unknown keys {', '.join(unknown)}; known: {', '.join(sorted(_KEYS))}")
    for key in ("prompt", "expected"):
        value = row.get(key)
        if not isinstance(value, str) or not value:
            found = _shown(value) if key in row else "missing"
            raise FormatError(f"{where}: {key} is {found}; expected a text of at least one character")
    score = row.get("score", "exact")
    if score not in SCORES:
        raise FormatError(f"{where}: score is {_shown(score)}; expected one of {', '.join(SCORES)}")
    if score == "regex":
        try:
            re.compile(row["expected"])
        except re.error as error:
            raise FormatError(f"{where}: expected is no pattern ({error}); escape it, or score it as exact") from None
    max_new = row.get("max_new", MAX_NEW)
    if not isinstance(max_new, int) or isinstance(max_new, bool) or max_new < 1:
        raise FormatError(f"{where}: max_new is {_shown(max_new)}; expected a whole number of tokens above 0")
    return Item(number, row["prompt"], row["expected"], score, _choices(row, score, where), max_new)


def _choices(row: dict[str, Any], score: str, where: str) -> tuple[str, ...]:
    choices = row.get("choices")
    if score != "choice":
        if choices is not None:
            raise FormatError(f'{where}: choices belong to score "choice", this is {score}; drop them or say "choice"')
        return ()
    if not isinstance(choices, list) or not all(isinstance(c, str) and c for c in choices):
        raise FormatError(f"{where}: choices is {_shown(choices)}; expected a list of texts")
    if len(set(choices)) < max(2, len(choices)):
        raise FormatError(f"{where}: choices {_shown(choices)}; expected at least two that differ")
    if row["expected"] not in choices:
        raise FormatError(f"{where}: expected {_shown(row['expected'])} is not among its choices; spaces count")
    return tuple(choices)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


@dataclass(frozen=True)
class Scored:
    """What a model made of a task: one verdict for each question, in their order."""

    name: str
    right: tuple[bool, ...]

    @property
    def score(self) -> float:
        """The share that is right."""
        return sum(self.right) / len(self.right)

    def section(self) -> dict[str, Any]:
        """quality.task of a Record: {name, score, n, ci95}."""
        interval = wilson(sum(self.right), len(self.right))
        return {"name": self.name, "score": self.score, "n": len(self.right), "ci95": list(interval)}


def wilson(right: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a share of `right` out of `n` (Wilson 1927, https://doi.org/10.2307/2276774)."""
    if not 0 <= right <= n or n < 1:
        raise ValueError(f"{right} of {n} is no share")
    share, z2 = right / n, _Z * _Z
    middle, half = share + z2 / (2 * n), _Z * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z2 / n)), min(1.0, (middle + half) / (1 + z2 / n))


def prompts(task: Task, words: Vocabulary, longest: int, model: str) -> list[list[int]]:
    """Ids of every prompt. FormatError names the first line that does not fit `longest` tokens with its answer."""
    found = []
    for item in task.items:
        where, ids = f"{task.name} line {item.line}", words.ids(item.prompt)
        wholes = [words.ids(item.prompt + choice) for choice in item.choices]
        need = max(map(len, wholes)) if wholes else len(ids) + item.max_new
        if not ids or need > longest:
            raise FormatError(
                f"{where}: {len(ids)} tokens and its answer do not fit the {longest} tokens of {model}; shorten the prompt or "
                "lower max_new"
            )
        if wholes and _start(ids, wholes) >= min(map(len, wholes)):
            raise FormatError(
                f"{where}: the tokenizer of {model} joins prompt and choice to one token; lengthen the prompt"
            )
        found.append(ids)
    return found


def score(model: Model, words: Vocabulary, task: Task, *, tell: Callable[[int], None] = lambda done: None) -> Scored:
    """Asks `model` every question, greedily; `tell` gets how many are answered."""
    asked = prompts(task, words, model.max_len, model.source)
    right = [False] * len(task.items)
    done = 0
    spoken = [i for i, item in enumerate(task.items) if item.score != "choice"]
    limits = [item.max_new for item in task.items]
    for group in _groups(spoken, asked, limits, model.max_len):
        answers = _answers(model, words, [asked[i] for i in group], max(limits[i] for i in group))
        for i, new in zip(group, answers, strict=True):
            right[i] = task.items[i].right(words.continuation(asked[i], new[: limits[i]]))
        done += len(group)
        tell(done)
    for i, item in enumerate(task.items):
        if item.score == "choice":
            found = likelihoods(model, asked[i], [words.ids(item.prompt + c) for c in item.choices])
            right[i] = item.choices[found.index(max(found))] == item.expected
            done += 1
            tell(done)
    return Scored(task.name, tuple(right))


@torch.inference_mode()
def likelihoods(model: Model, prompt: Sequence[int], wholes: Sequence[Sequence[int]]) -> list[float]:
    """Log-likelihood of what follows the prompt in each of `wholes` (ids of prompt and choice together), in nats.

    A tokenizer may join a choice to the end of the prompt; so what is summed begins where any of them leaves the prompt.
    """
    start = _start(prompt, wholes)
    longest = max(map(len, wholes))
    padded = torch.tensor([[*whole, *[0] * (longest - len(whole))] for whole in wholes], dtype=torch.int64)
    hidden = model.hidden(padded)
    found = []
    for row, whole in zip(hidden, wholes, strict=True):
        logits = model.head_logits(row[start - 1 : len(whole) - 1])
        targets = torch.tensor(whole[start:], device=logits.device)
        found.append(float(logits.log_softmax(-1).gather(1, targets[:, None]).double().sum()))
    return found


def lengths(
    model: Model, words: Vocabulary, task: Task, *, count: int = LENGTH_PROMPTS, limit: int = LENGTH_LIMIT
) -> list[int]:
    """Tokens that `model` answers the first `count` prompts with before it ends a text, at most `limit`."""
    asked = [ids[: model.max_len - 1] for ids in map(words.ids, (item.prompt for item in task.items[:count]))]
    limits = [min(limit, model.max_len - len(ids)) for ids in asked]
    found = [0] * len(asked)
    for group in _groups(range(len(asked)), asked, limits, model.max_len):
        answers = _answers(model, words, [asked[i] for i in group], max(limits[i] for i in group))
        for i, new in zip(group, answers, strict=True):
            found[i] = min(len(new), limits[i])
    return found


def length_ratio(ours: Sequence[int], reference: Sequence[int]) -> float | None:
    """Mean length of our answers over that of the reference's; None when the reference says nothing."""
    return sum(ours) / sum(reference) if sum(reference) else None


def _answers(model: Model, words: Vocabulary, asked: Sequence[Sequence[int]], limit: int) -> list[list[int]]:
    return model.generate(asked, limit, stop=sorted({*model.config.eos, *words.stops}))


def _groups(
    which: Sequence[int], asked: Sequence[Sequence[int]], limits: Sequence[int], longest: int
) -> Iterator[list[int]]:
    """Questions that are answered together: of like length, at most BATCH, their longest prompt and answer within `longest`."""
    group: list[int] = []
    for i in sorted(which, key=lambda i: (len(asked[i]), limits[i], i)):
        fits = max(limits[j] for j in [*group, i]) + len(asked[i]) <= longest  # sorted, so this prompt is the longest
        if group and (len(group) == BATCH or not fits):
            yield group
            group = []
        group.append(i)
    if group:
        yield group


def _start(prompt: Sequence[int], wholes: Sequence[Sequence[int]]) -> int:
    """Where the first of `wholes` leaves the prompt; not before 1, since the first id is predicted by nothing."""
    alike = []
    for whole in wholes:
        pairs = enumerate(zip(prompt, whole, strict=False))
        alike.append(next((i for i, (x, y) in pairs if x != y), min(len(prompt), len(whole))))
    return max(1, min(alike))
