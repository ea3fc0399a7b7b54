"""Calibration text: from a file, a data set or the built-in texts to windows of token ids, the same for the same input.

    source                  what it holds
    *.jsonl                 a document per line: {"ids": [..]}, {"messages": [..]} or {"text": ".."}, looked for in this order
    hf:NAME, hf:NAME:SPLIT  rows with the same keys, read in order through `datasets`; SPLIT is `train` if not said
    any other file          UTF-8 text, one document
    None                    64 short texts in a dozen languages that ship with the package: for smoke tests only

Documents are tokenised one by one with the special tokens that tokenizer.json itself adds, laid end to end without
padding and cut into windows of min(seq_len, positions) tokens. `messages` go through the model's own chat template,
which brings its special tokens along. Lines of ids that all have one length that fits are the windows themselves.

A long source is read from the front until READ_AHEAD x samples windows are full, and no further. Of more windows than
`samples`, those with the smallest sha256 of "seed:index" are taken, in the order of the text: a choice that depends on
no library's random numbers. A piece of text of PIECE bytes or more is tokenised in parts that end with a line.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..formats.spec import FormatError
from .sources import Document, one_line, open_source

READ_AHEAD = 4  # times `samples` windows are read, so that the seed has something to choose from
OVERLAP = 32  # tokens: two texts that share that many in a row share them for a reason


# Where a script begins; "" = no letters. Coarse on purpose: it shows a missing language, not a share to the percent.
_SCRIPTS: tuple[tuple[int, str], ...] = (
    (0x0, ""), (0x41, "latin"), (0x5B, ""), (0x61, "latin"), (0x7B, ""), (0xC0, "latin"), (0x250, ""),
    (0x370, "greek"), (0x400, "cyrillic"), (0x530, "other"), (0x590, "hebrew"), (0x600, "arabic"), (0x700, "other"),
    (0x900, "devanagari"), (0x980, "other"), (0xE00, "thai"), (0xE80, "other"), (0x1100, "hangul"), (0x1200, "other"),
    (0x1E00, "latin"), (0x1F00, "greek"), (0x2000, ""), (0x3040, "kana"), (0x3100, "other"), (0x3130, "hangul"),
    (0x3190, ""), (0x3400, "han"), (0xA000, "other"), (0xAC00, "hangul"), (0xD7B0, ""), (0xF900, "han"), (0xFB00, ""),
    (0x20000, "han"), (0x32000, ""),
)  # fmt: skip
_STARTS = np.array([start for start, _ in _SCRIPTS], dtype=np.uint32)


@dataclass(frozen=True)
class Calibration:
    """Which text statistics are taken from: `samples` windows of `seq_len` tokens. source None = the built-in texts."""

    source: str | None = None
    samples: int = 256
    seq_len: int = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in (("samples", 1), ("seq_len", 2), ("seed", 0)):
            if getattr(self, name) < low:
                raise FormatError(f"calibration.{name} is {getattr(self, name)}, it must be at least {low}")


@dataclass(frozen=True, eq=False)
class Windows:
    """ids int64 [n, T]; facts for report and model card, plain JSON values; sha256 of ids with their shape.

    facts: source as it was given, name without its folders; sha256 of sha256_of ("file", "first 9 bytes", "first 9
    rows"); read "all" or "front"; documents, documents_empty, documents_split (share that a window's border cuts);
    shortest and longest document, tokens in all, window: in tokens; windows_found, windows_used; dropped: share of the
    tokens read that no window used holds; seed; template: whether the chat template was used; scripts: shares of the
    letters read; notes: sentences for the user.
    """

    ids: torch.Tensor
    facts: dict[str, Any]
    sha256: str


@dataclass
class Tally:
    """What was read, document by document."""

    parts: list[np.ndarray] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)  # tokens per document
    lengths: set[int] = field(default_factory=set)  # of documents given as ids
    total: int = 0
    only_ids: bool = True
    template: bool = False
    letters: np.ndarray = field(default_factory=lambda: np.zeros(len(_SCRIPTS), dtype=np.int64))

    def add(self, ids: np.ndarray, more: bool) -> None:
        """A document, or (`more`) the next part of the last one."""
        if more:
            self.sizes[-1] += len(ids)
        else:
            self.sizes.append(len(ids))
        if self.only_ids:
            self.lengths.add(len(ids))
        self.parts.append(ids)
        self.total += len(ids)

    def cut(self, limit: int) -> np.ndarray:
        """All ids in a row, at most `limit`: only the last document can be above it."""
        over = max(0, self.total - limit)
        if over:
            self.sizes[-1] -= over
            self.total -= over
        return np.concatenate(self.parts)[: self.total]

    def rows(self, length: int) -> bool:
        """Whether every document is a line of ids of one length, at most `length`."""
        return self.only_ids and len(self.lengths) == 1 and min(self.lengths) <= length


def windows(
    calibration: Calibration, model_dir: str | Path, vocab: int, positions: int | None, *, strict: bool = False
) -> Windows:
    """Windows of token ids for a model of `vocab` ids and at most `positions` tokens (None: no limit is known).

    FormatError names file and line for what cannot be read, for ids outside of the vocabulary, for too little text,
    and, if `strict`, for a seq_len above `positions`, which is cut otherwise.
    """
    notes: list[str] = []
    length = calibration.seq_len
    if positions is not None and length > positions:
        if strict:
            raise FormatError(f"calibration.seq_len {length} is above the model's {positions} positions; lower it")
        notes.append(f"seq_len {length} cut to the model's {positions} positions")
        length = positions
    source = open_source(calibration.source)
    encoder = Encoder(Path(model_dir), vocab)
    tally = Tally()
    wanted = READ_AHEAD * calibration.samples
    whole = True
    for document in source.documents():
        tally.add(encoder.encode(document, tally), document.more)
        if tally.total >= wanted * length or (len(tally.sizes) >= wanted and tally.rows(length)):
            whole = False
            break
    if not tally.total:
        raise FormatError(f"{source.name}: {source.nothing(len(tally.sizes))}; give text to calibrate on")
    if tally.rows(length):
        length = min(tally.lengths)
    flat = tally.cut(wanted * length)
    sizes = [size for size in tally.sizes if size]
    found = len(flat) // length
    if found == 0:
        raise FormatError(
            f"{source.name}: {tally.total} tokens in {len(sizes)} documents are less than one window of {length}; "
            f"give more text or a seq_len of at most {tally.total}"
        )
    chosen = _choose(found, calibration.samples, calibration.seed)
    table = np.ascontiguousarray(flat[: found * length].reshape(found, length)[chosen], dtype=np.int64)
    if calibration.source is None:
        notes.append("built-in texts: for smoke tests only, give your own text for a checkpoint that is served")
    if found < calibration.samples:
        notes.append(f"{calibration.samples} windows asked for, the text has {found}")
    if found <= calibration.samples:
        notes.append("every window is used: another seed gives the same set")
    if source.bom:
        notes.append("a byte order mark at the front was left out")
    facts: dict[str, Any] = {
        "source": source.name,
        "name": source.label,
        **source.digest(),
        "read": "all" if whole else "front",
        "documents": len(sizes),
        "documents_empty": len(tally.sizes) - len(sizes),
        "documents_split": _split_share(sizes, length),
        "shortest": min(sizes),
        "longest": max(sizes),
        "tokens": tally.total,
        "window": length,
        "windows_found": found,
        "windows_used": len(chosen),
        "dropped": round(1 - len(chosen) * length / tally.total, 4),
        "seed": calibration.seed,
        "template": tally.template,
        "scripts": _shares(tally.letters),
        "notes": notes,
    }
    return Windows(torch.from_numpy(table), facts, _fingerprint(table))


def overlap(ids_a: torch.Tensor, ids_b: torch.Tensor) -> float:
    """Share of the 32-token pieces of `ids_a` that occur anywhere in `ids_b`: 0.0 = no text in common, 1.0 = all.

    Both are [n] or [n, T], pieces never cross a row; rows shorter than 32 tokens are compared by their whole length.
    """
    a, b = (np.atleast_2d(np.asarray(ids, dtype=np.int64)).astype(np.uint64) for ids in (ids_a, ids_b))
    size = min(OVERLAP, a.shape[1], b.shape[1])
    if not size or not len(a) or not len(b):
        return 0.0
    return float(np.isin(_hashes(a, size)[:, ::size], _hashes(b, size)).mean())


def _hashes(ids: np.ndarray, size: int) -> np.ndarray:
    """A 64-bit hash of every `size` ids in a row: [n, T] -> [n, T - size + 1]."""
    # Ids are near each other, so they are spread over 64 bits before the polynomial adds them up.
    mixed = (ids + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(32)
    count = ids.shape[1] - size + 1
    out = np.zeros((len(ids), count), dtype=np.uint64)
    for i in range(size):
        out = out * np.uint64(0x94D049BB133111EB) + mixed[:, i : i + count]
    return out


def _choose(found: int, samples: int, seed: int) -> list[int]:
    if found <= samples:
        return list(range(found))
    return sorted(sorted(range(found), key=lambda i: hashlib.sha256(f"{seed}:{i}".encode()).digest())[:samples])


def _fingerprint(table: np.ndarray) -> str:
    return hashlib.sha256(f"{table.shape}".encode() + table.astype("<i8").tobytes()).hexdigest()


def _split_share(sizes: list[int], length: int) -> float:
    """Share of documents that the border of a window cuts."""
    ends = np.cumsum(sizes)
    starts = ends - np.asarray(sizes)
    return round(float((starts // length != (ends - 1) // length).mean()), 4)


def _count_letters(text: str) -> np.ndarray:
    points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    return np.bincount(np.searchsorted(_STARTS, points, side="right") - 1, minlength=len(_SCRIPTS))


def _shares(letters: np.ndarray) -> dict[str, float]:
    sums: dict[str, int] = {}
    for (_, name), count in zip(_SCRIPTS, letters.tolist(), strict=True):
        if name and count:
            sums[name] = sums.get(name, 0) + count
    total = sum(sums.values())
    return {name: round(n / total, 3) for name, n in sorted(sums.items(), key=lambda item: (-item[1], item[0]))}


class Encoder:
    """tokenizer.json and the chat template of a model folder, each opened when the first document asks for it.

    answer: messages end where the model begins to answer (add_generation_prompt of the template).
    """

    def __init__(self, model_dir: Path, vocab: int, *, answer: bool = False) -> None:
        self.model_dir, self.vocab, self.answer = model_dir, vocab, answer
        self._tokenizer: Any = None
        self._chat: Any = None

    def encode(self, document: Document, tally: Tally) -> np.ndarray:
        """Ids int64 [n] of a document or of a part of one."""
        if document.ids is not None:
            ids, culprit = document.ids, "these ids come from another tokenizer"
        else:
            tally.only_ids = False
            text, special = document.text, not document.more
            if document.messages is not None:
                text, special = self._render(document), False  # the template wrote them
                tally.template = True
            assert text is not None
            try:
                tally.letters += _count_letters(text)
            except UnicodeEncodeError:
                raise FormatError(f"{document.where}: half a surrogate pair; this text cannot be UTF-8") from None
            ids = self._tokens(text, special) if text else []
            culprit = "tokenizer.json belongs to another model"
        if ids and not (min(ids) >= 0 and max(ids) < self.vocab):
            wrong = next(i for i in ids if not 0 <= i < self.vocab)
            raise FormatError(
                f"{document.where}: token id {wrong}, the model's vocabulary has 0 to {self.vocab - 1}; {culprit}"
            )
        return np.asarray(ids, dtype=np.int64)

    def _tokens(self, text: str, special: bool) -> list[int]:
        if self._tokenizer is None:
            from tokenizers import Tokenizer  # ids need none

            path = self.model_dir / "tokenizer.json"
            if not path.is_file():
                raise FormatError(f"{path}: not there; copy it from the model's page, or give lines of ids")
            try:
                self._tokenizer = Tokenizer.from_file(str(path))
            except Exception as error:  # the library raises plain Exception
                raise FormatError(f"{path}: not a tokenizer ({one_line(error)}); take the model's own") from None
            # Many published files still hold the limits of the last training run.
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
        return list(self._tokenizer.encode(text, add_special_tokens=special).ids)

    def _render(self, document: Document) -> str:
        if self._chat is None:
            try:
                from transformers import AutoTokenizer
            except ImportError:
                raise FormatError(
                    f"{document.where}: messages need the model's chat template: pip install 'percard[quant]'"
                ) from None
            try:
                chat = AutoTokenizer.from_pretrained(
                    str(self.model_dir), trust_remote_code=False, local_files_only=True
                )
            except Exception as error:
                raise FormatError(
                    f"{self.model_dir}: transformers cannot read its tokenizer ({one_line(error)}); "
                    'give lines of {"text": ...} instead of messages'
                ) from None
            if not getattr(chat, "chat_template", None):
                raise FormatError(
                    f"{document.where}: messages, but {self.model_dir} has no chat template; "
                    'give lines of {"text": ...}, or the template of the chat model'
                )
            self._chat = chat
        try:
            text = self._chat.apply_chat_template(
                document.messages, tools=document.tools, tokenize=False, add_generation_prompt=self.answer
            )
        except Exception as error:  # a template is a program: it may raise anything
            raise FormatError(f"{document.where}: the chat template refuses it ({one_line(error)})") from None
        return str(text)
