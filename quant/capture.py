"""`percard capture`: what a teacher says about a text, written down once, so that students train without it in memory.

    plan      tokens, windows, shards and bytes, from the text, config and headers; no weight is read
    teach     for each shard the windows that it holds go through the teacher, block by block (prune_scores.Chain)
    keep      of every position the k likeliest next tokens and the rest, as capture_cache.py has them

A shard follows from its own windows alone, so a run that was killed goes on with the first shard that is missing and ends with the
same bytes. A window over the border of two shards is run for both.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from ..formats.checkpoint import Checkpoint
from ..formats.spec import FormatError
from . import capture_text, output, report, vocabulary, walk
from .capture_cache import FACTS, SCHEMA, WINDOWS, ShardWriter, row_bytes, sha256_of, shard_name
from .capture_text import Stream
from .journal import NAME, Journal, machine, source_mark
from .output import Output
from .progress import Callback, Meter
from .prune_scores import Chain
from .spill import Spill
from .vocabulary import Words
from .walk import Map, block_of, finite

TOP_K, SEQ_LEN, SHARD_TOKENS = 64, 2048, 1_000_000
LOGITS = 1 << 24  # numbers of a chunk of logits: 64 MB in fp32


@dataclass(frozen=True, eq=False)
class Teacher:
    """A 16-bit checkpoint and its tokenizer. vocab: the ids that are tokens and have a row in the head."""

    source: Checkpoint
    found: Map
    words: Words

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Teacher:
        """FormatError for a checkpoint that the blocks here do not know, is quantised, or has another model's tokenizer."""
        source = Checkpoint.open(Path(folder))
        found = walk.of(source)
        words = Words.of(source.path)
        rows = int(source.config["vocab_size"])
        if len(words) > rows:
            raise FormatError(
                f"{words.path}: {len(words)} tokens, the model has {rows}; tokenizer.json belongs to another model"
            )
        return cls(source, found, words)

    @property
    def vocab(self) -> int:
        return len(self.words)

    @property
    def positions(self) -> int | None:
        """Tokens that it was made for; None: the config does not say."""
        limit = self.source.config.get("max_position_embeddings")
        return None if limit is None else int(limit)

    def facts(self) -> dict[str, Any]:
        """Name and sha256 of everything that its words depend on: config.json and every byte of its weights."""
        digest = hashlib.sha256(json.dumps(self.source.config, sort_keys=True).encode())
        for path in sorted({info.file for info in self.source.tensors.values()}):
            digest.update(f"{path.name} {sha256_of(path)}\n".encode())
        return {"name": self.source.path.resolve().name, "sha256": digest.hexdigest()}

    def must_know(self, k: int) -> None:
        """FormatError for a k that this vocabulary does not have."""
        if not 1 <= k <= self.vocab:
            raise FormatError(f"--top-k {k}: this teacher has {self.vocab} tokens; choose 1 to {self.vocab}")


@dataclass(frozen=True, eq=False)
class Plan:
    """What a capture of a text would do; no weight was read. k = 0: only the text."""

    teacher: Teacher
    stream: Stream
    k: int
    shard_tokens: int

    def __post_init__(self) -> None:
        if self.shard_tokens < 1:
            raise FormatError(f"--shard-tokens {self.shard_tokens}: a shard has at least 1")

    @property
    def shards(self) -> list[tuple[int, int]]:
        """(first row, row behind the last) of each."""
        rows, step = self.stream.rows, self.shard_tokens
        return [(start, min(rows, start + step)) for start in range(0, rows, step)]

    def to_dict(self) -> dict[str, Any]:
        """For people and JSON. work_bytes: activations on the disk while it runs, fp32, three files at the worst moment."""
        longest = max((self.stream.padded(self.stream.over(*s)).numel() for s in self.shards), default=0)
        return {
            "verb": "capture",
            "teacher": self.teacher.source.path.name,
            "vocab": self.teacher.vocab,
            "k": self.k,
            "tokens": self.stream.rows,
            "counted": self.stream.counted(),
            "windows": self.stream.windows,
            "window": self.stream.window,
            "shards": len(self.shards),
            "bytes_per_token": row_bytes(self.k),
            "bytes": self.stream.rows * row_bytes(self.k),
            "work_bytes": 3 * 4 * longest * int(self.teacher.source.config["hidden_size"]) if self.k else 0,
            "data": self.stream.facts,
        }


def plan(
    teacher: str | os.PathLike[str],
    data: str,
    *,
    top_k: int = TOP_K,
    seq_len: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
) -> Plan:
    """Checks teacher and text, and tokenises the text. seq_len None: SEQ_LEN, or less where the teacher has fewer positions.

    FormatError for what cannot be.
    """
    opened = Teacher.open(teacher)
    opened.must_know(top_k)
    if seq_len is None:
        seq_len = min(SEQ_LEN, opened.positions or SEQ_LEN)
    stream = capture_text.of_text(data, opened.source.path, opened.vocab, seq_len, opened.positions)
    return Plan(opened, stream, top_k, shard_tokens)


def run(
    planned: Plan,
    dst: str | os.PathLike[str],
    *,
    force: bool = False,
    fresh: bool = False,
    progress: Callback | None = None,
) -> dict[str, Any]:
    """Captures into the new folder `dst`; returns what lies there as capture.json.

    FormatError or FileExistsError with nothing left behind; an interrupt or a full disk leaves finished shards for the same call.
    """
    out_path = Path(dst)
    output.refuse(planned.teacher.source.path, out_path, force)
    with Output(out_path, force, fresh) as out:
        out.keep, out.note = (out.work / NAME).exists(), output.KEPT
        journal = Journal(
            out.work / NAME, mark(planned.teacher, planned.k, planned.shard_tokens, planned.stream.sha256)
        )
        write_shards(planned, out, journal, progress)
        done = finish(planned, out, journal, {"kind": "text"}, [])
        out.publish()
    return done


def mark(teacher: Teacher, k: int, shard_tokens: int, text: Any) -> dict[str, Any]:
    """The journal's fingerprint: all that the bytes depend on."""
    import transformers

    versions = {"percard": report.versions()["percard"], "transformers": transformers.__version__}
    recipe = {"k": k, "shard_tokens": shard_tokens}
    tokenizer = teacher.words.sha256
    base = {"source": source_mark(teacher.source), "tokenizer": tokenizer, "recipe": recipe, "text": text}
    return {**base, **versions, **machine()}


def write_shards(planned: Plan, out: Output, journal: Journal, progress: Callback | None) -> None:
    """Every shard that the journal does not know yet."""
    blocks = int(planned.teacher.source.config["num_hidden_layers"]) + 1 if planned.k else 1
    meter = Meter("capture", blocks * len(planned.shards), progress, "blocks")
    finished = {e["unit"] for e in journal.entries}
    for number, (start, stop) in enumerate(planned.shards):
        if f"shard {number}" in finished:
            meter.skip(blocks)
            continue
        path = out.folder / shard_name(number)
        with ShardWriter(path, stop - start, planned.k) as writer:
            tokens = torch.from_numpy(planned.stream.tokens[start:stop].copy())
            writer.put(0, {"tokens": tokens, "doc": torch.from_numpy(planned.stream.docs(start, stop))})
            if planned.k:
                _teach(planned, start, stop, writer, out.work / "activations", meter)
        meter.add(1, f"shard {number}")
        entry = {"unit": f"shard {number}", "rows": stop - start, "bytes": path.stat().st_size}
        output.sync(out.folder)
        journal.add({**entry, "sha256": sha256_of(path)})
        out.keep = True


def _teach(planned: Plan, start: int, stop: int, writer: ShardWriter, work: Path, meter: Meter) -> None:
    """The teacher's words about rows start .. stop - 1, from the windows that hold them."""
    teacher, stream = planned.teacher, planned.stream
    windows = stream.over(start, stop)
    if work.exists():
        output.discard(work)
    work.mkdir()
    chain = Chain(teacher.source, teacher.found, stream.padded(windows), torch.float32, work, meter)
    last = chain.run(range(len(chain.frame)), label=f"rows from {start}: ")
    spill, head = Spill(last), chain.frame.head(chain.read)[: teacher.vocab]
    step = max(1, LOGITS // teacher.vocab)
    for row, index in enumerate(windows):
        begin, end = int(stream.begin[index]), int(stream.begin[index + 1])
        x = chain.frame.normed(spill.read(row, row + 1)[0, : end - begin], chain.read)
        first, behind = max(start, begin), min(stop, end)
        for at in range(first, behind, step):
            rows = x[at - begin : min(behind, at + step) - begin]
            ids, logp, rest = top(F.linear(rows, head), planned.k)
            if not bool(torch.isfinite(logp).all()):
                _blame(teacher)
            writer.put(at - start, {"ids": ids, "logp": logp, "log_rest": rest})
    output.discard(work)


def _blame(teacher: Teacher) -> None:
    """FormatError for logits that are no numbers behind blocks whose outputs are."""
    for name in teacher.source.names:
        if block_of(teacher.found, name) is None:
            finite(teacher.source, name)
    raise FormatError(
        f"{teacher.source.path}: the logits hold NaN or Inf though the weights are finite; take another text"
    )


def top(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(ids int64 [n, k] by falling probability, logp fp32 [n, k], log_rest fp32 [n]) of logits [n, vocab] at temperature 1."""
    logits = logits.float()
    total = logits.logsumexp(dim=-1, keepdim=True)
    values, ids = logits.topk(k, dim=-1)
    # Summed over the others, not 1 - sum: that difference would be noise where the rest is small.
    rest = logits.scatter(-1, ids, -math.inf).logsumexp(dim=-1)
    return ids, values - total, rest - total[:, 0]


def finish(planned: Plan, out: Output, journal: Journal, facts: dict[str, Any], extra: list[Path]) -> dict[str, Any]:
    """Tokenizer, windows and capture.json. extra: more files of the folder whose sha256 belongs into it."""
    teacher, stream = planned.teacher, planned.stream
    shutil.copyfile(teacher.words.path, out.folder / vocabulary.FILE)
    files = [*extra, out.folder / vocabulary.FILE]
    if stream.window is None:
        lengths = torch.from_numpy(stream.begin[1:] - stream.begin[:-1]).int()
        save_file({"length": lengths, "prompt": torch.from_numpy(stream.prompts).int()}, out.folder / WINDOWS)
        files.append(out.folder / WINDOWS)
    shards = {e["unit"]: e for e in journal.entries}
    done: dict[str, Any] = {
        "schema": SCHEMA,
        "verb": "capture",
        **facts,
        "teacher": teacher.facts(),
        "tokenizer": {"sha256": teacher.words.sha256, "tokens": len(teacher.words)},
        "vocab": teacher.vocab,
        "k": planned.k,
        "temperature": 1.0,
        "data": {**stream.facts, "tokens_sha256": stream.sha256},
        "packing": {
            "window": stream.window,
            "windows": stream.windows,
            "attention": "a window sees all of itself, documents before as well, and nothing of other windows",
        },
        "tokens": stream.rows,
        "counted": stream.counted(),
        "shards": [
            {"file": shard_name(i), **{key: shards[f"shard {i}"][key] for key in ("rows", "bytes", "sha256")}}
            for i in range(len(planned.shards))
        ],
        "files": [{"file": path.name, "sha256": sha256_of(path)} for path in files],
        "versions": report.versions(),
    }
    output.write(out.folder / FACTS, json.dumps(done, indent=1, ensure_ascii=False) + "\n")
    return done
