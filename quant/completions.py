"""`percard capture --generate`: what a teacher writes to a list of prompts, filtered, as text to train on.

    plan      prompts become ids; a line holds {"prompt": ".."}, {"text": ".."}, {"messages": [..]} (the chat template opens the
              answer) or {"ids": [..]}
    write     n samples a prompt, each with a seed that follows from --seed, the prompt's number and its own; what `--keep` refuses
              is counted and dropped
    teach     with --top-k the teacher's words about every completion (capture.py)

completions.jsonl has a line per completion that was kept: prompt and sample (numbers from 0), prompt_tokens, ids (prompt and
completion, with the end-of-text id where it ended), text, ended. The first prompt_tokens ids carry no loss. Prompts are the unit of
the journal: a run that was killed goes on with the next one. How text is made is passed in; the model of it is another floor's.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..formats.header import parse_json
from ..formats.spec import FormatError
from . import capture, capture_text, output
from .capture import Plan, Teacher
from .capture_cache import row_bytes
from .journal import NAME, Journal
from .keep import Keep
from .output import Output
from .progress import Callback, Meter
from .sources import MAX_LINE, Document, checked_messages
from .text import Encoder, Tally
from .walk import finite

FILE = "completions.jsonl"
VERDICTS = ("kept", "dropped", "timed_out", "empty", "no_tokens")


@dataclass(frozen=True)
class Answer:
    """What the teacher added to a prompt: new ids, with the end-of-text id where it ended; its text; whether it ended."""

    ids: list[int]
    text: str
    ended: bool


# (ids of a prompt, how many samples, seed of the first; the next ones count up) -> as many answers. The same seed, the same text.
Generate = Callable[[list[int], int, int], list[Answer]]


@dataclass(frozen=True)
class Prompt:
    """A line of the prompts: its ids and how it stands in the file."""

    ids: list[int]
    line: str


@dataclass(frozen=True, eq=False)
class CompletionPlan:
    """What a run would do; no weight was read. sampling: max_new, temperature, top_p. k = 0: no log-probabilities."""

    teacher: Teacher
    prompts: list[Prompt]
    data: dict[str, Any]
    n: int
    seed: int
    keep: Keep
    k: int
    shard_tokens: int
    sampling: dict[str, Any] = field(default_factory=dict)

    def room(self, prompt: Prompt) -> int:
        """New tokens that the answer to a prompt may have."""
        most, limit = int(self.sampling["max_new"]), self.teacher.positions
        return most if limit is None else min(most, limit - len(prompt.ids))

    def to_dict(self) -> dict[str, Any]:
        """For people and JSON; tokens and bytes are what they are at most."""
        tokens = self.n * sum(len(p.ids) + self.room(p) for p in self.prompts)
        return {
            "verb": "capture",
            "teacher": self.teacher.source.path.name,
            "vocab": self.teacher.vocab,
            "k": self.k,
            "prompts": len(self.prompts),
            "completions": self.n * len(self.prompts),
            "tokens": tokens,
            "bytes_per_token": row_bytes(self.k),
            "bytes": tokens * row_bytes(self.k),
            "data": self.data,
        }


def plan(
    teacher: str | os.PathLike[str],
    prompts: str | os.PathLike[str],
    *,
    n: int = 4,
    seed: int = 0,
    keep: Keep | None = None,
    top_k: int | None = None,
    shard_tokens: int = capture.SHARD_TOKENS,
    max_new: int = 512,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> CompletionPlan:
    """Checks teacher and prompts. FormatError names the line of what cannot be."""
    if min(n, max_new, shard_tokens) < 1:
        raise FormatError(f"--n {n} --max-new {max_new} --shard-tokens {shard_tokens}: all are at least 1")
    if not (temperature >= 0 and 0 < top_p <= 1):
        raise FormatError(f"--temperature {temperature:g} must be at least 0, --top-p {top_p:g} above 0 and at most 1")
    if temperature == 0 and n > 1:
        raise FormatError(
            f"--temperature 0 with --n {n} writes {n} times the same; take --n 1, or a higher temperature"
        )
    opened = Teacher.open(teacher)
    if top_k is not None:
        opened.must_know(top_k)
    path = Path(prompts)
    found = list(_prompts(path, opened))
    if not found:
        raise FormatError(f'{path}: no prompts; give a line of JSON for each, such as {{"prompt": "..."}}')
    with path.open("rb") as file:
        data = {"source": str(path), "name": path.name, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    sampling = {"max_new": max_new, "temperature": temperature, "top_p": top_p}
    return CompletionPlan(opened, found, data, n, seed, keep or Keep.parse(None), top_k or 0, shard_tokens, sampling)


def _prompts(path: Path, teacher: Teacher) -> Iterator[Prompt]:
    """The prompts of a file, checked line by line."""
    if not path.is_file():
        raise FormatError(
            f"{path}: prompts {'are a folder' if path.is_dir() else 'are not there'}; give a *.jsonl file"
        )
    encoder, limit = Encoder(teacher.source.path, teacher.vocab, answer=True), teacher.positions
    with path.open("rb") as file:
        for number, raw in enumerate(iter(lambda: file.readline(MAX_LINE), b""), 1):
            where = f"{path}: line {number}"
            if not raw.strip():
                continue
            tree = parse_json(raw, where)
            ids = encoder.encode(_document(tree, where), Tally()).tolist()
            if not ids:
                raise FormatError(f"{where}: an empty prompt; give at least one character")
            if limit is not None and len(ids) >= limit:
                raise FormatError(f"{where}: {len(ids)} tokens, the teacher takes {limit} with its answer; shorten it")
            yield Prompt(ids, raw.decode().strip())


def _document(tree: Any, where: str) -> Document:
    keys = ("ids", "messages", "prompt", "text")
    key = next((key for key in keys if isinstance(tree, dict) and key in tree), None)
    if key is None:
        raise FormatError(f"{where}: expected an object with one of {', '.join(keys)}")
    value = tree[key]
    if key == "messages":
        return Document(where, messages=checked_messages(value, where), tools=tree.get("tools") or None)
    if key == "ids":
        if not isinstance(value, list) or not all(type(i) is int for i in value):
            raise FormatError(f'{where}: "ids" must be a list of whole numbers')
        return Document(where, ids=value)
    if not isinstance(value, str):
        raise FormatError(f'{where}: "{key}" is {type(value).__name__}, expected a string')
    return Document(where, text=value)


def run(
    planned: CompletionPlan,
    speak: Callable[[], Generate],
    dst: str | os.PathLike[str],
    *,
    force: bool = False,
    fresh: bool = False,
    progress: Callback | None = None,
) -> dict[str, Any]:
    """Writes completions into the new folder `dst`; returns what lies there as capture.json.

    speak() loads the model and gives the function that generates; it is called only when a prompt is open, and forgotten before the
    teacher's words are taken. FormatError when nothing was kept.
    """
    out_path = Path(dst)
    output.refuse(planned.teacher.source.path, out_path, force)
    with Output(out_path, force, fresh) as out:
        out.keep, out.note = (out.work / NAME).exists(), output.KEPT
        journal = Journal(out.work / NAME, _mark(planned))
        file = out.folder / FILE
        counts = _write(planned, speak, file, out, journal, progress)
        if not counts["kept"]:
            said = ", ".join(f"{counts[v]} {v.replace('_', ' ')}" for v in VERDICTS[1:])
            remedy = (
                f"loosen --keep {planned.keep.words}"
                if counts["dropped"] + counts["timed_out"]
                else "take other prompts"
            )
            raise FormatError(f"{planned.data['name']}: no completion was kept ({said}); {remedy}")
        stream = capture_text.of_sequences(_kept(file), planned.data)
        taught = Plan(planned.teacher, stream, planned.k, planned.shard_tokens)
        capture.write_shards(taught, out, journal, progress)
        facts = {
            "kind": "completions",
            "completions": {
                "prompts": len(planned.prompts),
                "n": planned.n,
                "seed": planned.seed,
                **planned.sampling,
                "keep": planned.keep.words,
                **counts,
            },
        }
        done = capture.finish(taught, out, journal, facts, [file])
        out.publish()
    return done


def _mark(planned: CompletionPlan) -> dict[str, Any]:
    ids = hashlib.sha256(json.dumps([p.ids for p in planned.prompts]).encode()).hexdigest()
    text = {"prompts": ids, "file": planned.data["sha256"], "n": planned.n, "seed": planned.seed, **planned.sampling}
    keep = {"keep": planned.keep.words, "timeout": planned.keep.timeout}
    return capture.mark(planned.teacher, planned.k, planned.shard_tokens, text | keep)


def _write(
    planned: CompletionPlan,
    speak: Callable[[], Generate],
    file: Path,
    out: Output,
    journal: Journal,
    progress: Callback | None,
) -> dict[str, int]:
    """completions.jsonl, prompt after prompt; how many of each verdict, and of those kept how many did not end."""
    finished = [e for e in journal.entries if e["unit"].startswith("prompt ")]
    meter = Meter("generate", len(planned.prompts), progress, "prompts")
    meter.skip(len(finished))
    counts = Counter(dict.fromkeys((*VERDICTS, "unended"), 0))
    for entry in finished:
        counts.update(entry["counts"])
    generate: Generate | None = None
    with file.open("ab") as stream:
        stream.truncate(finished[-1]["bytes"] if finished else 0)  # lines of a prompt that a kill cut short
        stream.seek(0, os.SEEK_END)
        for number in range(len(finished), len(planned.prompts)):
            generate = generate or _sound(planned.teacher, speak)
            prompt, verdicts = planned.prompts[number], Counter[str]()
            for sample, answer in enumerate(generate(prompt.ids, planned.n, seed_of(planned.seed, number))):
                verdict = _verdict(planned, prompt, answer)
                verdicts[verdict] += 1
                if verdict == "kept":
                    verdicts["unended"] += not answer.ended
                    stream.write(_line(number, sample, prompt, answer))
            stream.flush()
            os.fsync(stream.fileno())
            journal.add({"unit": f"prompt {number}", "bytes": stream.tell(), "counts": dict(verdicts)})
            out.keep = True
            counts.update(verdicts)
            meter.add(1, f"prompt {number}, {counts['kept']} kept")
    return dict(counts)


def _sound(teacher: Teacher, speak: Callable[[], Generate]) -> Generate:
    """The model that speaks; FormatError when a weight of it is no number: what it wrote would look like text all the same."""
    for name in teacher.source.names:
        finite(teacher.source, name)
    return speak()


def seed_of(seed: int, prompt: int) -> int:
    """Seed of a prompt's first sample: far from those of all others, whatever n is."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{prompt}".encode()).digest()[:6], "little")


def _verdict(planned: CompletionPlan, prompt: Prompt, answer: Answer) -> str:
    if not answer.ids:
        return "empty"
    if max(answer.ids) >= planned.teacher.vocab:  # a padded row of the head
        return "no_tokens"
    return planned.keep.judge(answer.text, prompt.line)


def _line(number: int, sample: int, prompt: Prompt, answer: Answer) -> bytes:
    entry = {"prompt": number, "sample": sample, "prompt_tokens": len(prompt.ids), "ids": [*prompt.ids, *answer.ids]}
    words = json.dumps({**entry, "text": answer.text, "ended": answer.ended}, ensure_ascii=False)
    return words.encode("utf-8", "replace") + b"\n"


def _kept(file: Path) -> Iterator[tuple[list[int], int]]:
    with file.open("rb") as lines:
        for line in lines:
            entry = json.loads(line)
            yield entry["ids"], entry["prompt_tokens"]
