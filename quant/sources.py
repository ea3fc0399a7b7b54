"""Where calibration text comes from: files, data sets, the built-in texts; each gives documents, one after another.

A source is read from the front and only as far as its reader goes on asking, so a file of any size may be given. What
was read is hashed on the way. Every error names the file and the line.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..formats.spec import FormatError

BUILTIN = Path(__file__).parent / "texts" / "builtin.jsonl"
PIECE = 1 << 20  # bytes tokenised at once: the tokenizer keeps some 200 bytes for each token
MAX_LINE = 64 << 20  # bytes of a line of JSON
HASH_WHOLE = 1 << 30  # a longer file is hashed as far as it was read
KEYS = ("ids", "messages", "text")


@dataclass(frozen=True)
class Document:
    """One of ids, messages, text. `more`: text goes on the document before it."""

    where: str
    ids: list[int] | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[Any] | None = None
    text: str | None = None
    more: bool = False


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def open_source(source: str | None) -> Jsonl | Plain | DataSet:
    if source is None:
        return Jsonl(BUILTIN, "built-in")
    if source.startswith("hf:"):
        return DataSet(source)
    path = Path(source).expanduser()
    if path.suffix.lower() == ".json":
        raise FormatError(f"{path}: JSON is read line by line; write one object per line and name it {path.stem}.jsonl")
    return Jsonl(path, source) if path.suffix.lower() == ".jsonl" else Plain(path, source)


def open_text(source: str) -> Jsonl | Plain | DataSet:
    """As `open_source`, for a text that is not calibrated on: errors call it the text."""
    try:
        return open_source(source)
    except FormatError as error:
        raise FormatError(str(error).replace("calibration file", "the text")) from None


class _File:
    """A file that is read from the front and hashed on the way. `name` is printed in errors."""

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name, self.bom = path, name, False
        self.label = name if path == BUILTIN else path.name  # what is published: no folder of this machine
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "is not there"
            raise FormatError(f"{name}: calibration file {what}; give a text file, a *.jsonl or hf:NAME")
        self._size, self._read, self._hash = path.stat().st_size, 0, hashlib.sha256()

    def _open(self) -> BinaryIO:
        try:
            file = self.path.open("rb")
        except OSError as error:
            raise FormatError(f"{self.name}: cannot be read ({error.strerror}); check its permissions") from None
        front = file.read(3)
        if front[:2] in (b"\xff\xfe", b"\xfe\xff"):
            file.close()
            raise FormatError(f"{self.name}: line 1: UTF-16 text, expected UTF-8; convert it (iconv -t utf-8)")
        self.bom = front == b"\xef\xbb\xbf"
        if self.bom:
            self._count(front)
        else:
            file.seek(0)
        return file

    def _count(self, data: bytes) -> bytes:
        self._read += len(data)
        self._hash.update(data)
        return data

    def digest(self) -> dict[str, Any]:
        """sha256 of the file, or of its front where the rest of a very large one was not read."""
        if self._read < self._size <= HASH_WHOLE:
            with self.path.open("rb") as file:
                file.seek(self._read)
                while data := file.read(1 << 20):
                    self._count(data)
        of = "file" if self._read >= self._size else f"first {self._read} bytes"
        return {"sha256": self._hash.hexdigest(), "sha256_of": of}

    def nothing(self, empty: int) -> str:
        if not self._size:
            return "the file is empty"
        return f"{empty} documents, all of them empty" if empty else "nothing but empty lines"

    def _not_utf8(self, line: int, error: UnicodeDecodeError) -> FormatError:
        byte = error.object[error.start]
        return FormatError(
            f"{self.name}: line {line}: byte 0x{byte:02x} is not UTF-8 text; convert the file (iconv -t utf-8)"
        )


class Plain(_File):
    def documents(self) -> Iterator[Document]:
        """The whole file as one document, in parts of about PIECE bytes that end with a line where there are lines."""
        line, carry, more, blank = 1, b"", False, True
        with self._open() as file:
            while data := self._count(file.read(PIECE)):
                data = carry + data + self._count(file.readline(PIECE))
                carry, last = b"", self._read >= self._size
                try:
                    text = data.decode()
                except UnicodeDecodeError as error:
                    if last or len(data) - error.start > 3:
                        raise self._not_utf8(line + data[: error.start].count(b"\n"), error) from None
                    data, carry = data[: error.start], data[error.start :]  # a character that the next part completes
                    text = data.decode()
                blank = blank and not text.strip()
                if not blank:
                    # Line breaks as Python's text mode has them, so that ids equal those of the text read at once.
                    text = text.replace("\r\n", "\n").replace("\r", "\n")
                    yield Document(f"{self.name}: line {line}", text=text, more=more)
                    more = True
                line += data.count(b"\n")


class Jsonl(_File):
    def documents(self) -> Iterator[Document]:
        """A document per line; empty lines are passed over."""
        with self._open() as file:
            number = 0
            while raw := self._count(file.readline(MAX_LINE)):
                number += 1
                where = f"{self.name}: line {number}"
                if len(raw) >= MAX_LINE:
                    raise FormatError(f"{where}: longer than {MAX_LINE >> 20} MB; is it one JSON object per line?")
                try:
                    text = raw.decode()
                except UnicodeDecodeError as error:
                    raise self._not_utf8(number, error) from None
                if not text.strip():
                    continue
                try:
                    tree = json.loads(text)
                except (ValueError, RecursionError) as error:
                    problem = one_line(error) if isinstance(error, ValueError) else "nested too deeply"
                    raise FormatError(
                        f'{where}: not JSON ({problem}); expected {{"text": ...}}, {{"messages": [...]}} or {{"ids": [...]}}'
                    ) from None
                yield from _documents(tree, where)


class DataSet:
    """Rows of a data set, streamed in order. sha256 is that of the rows that were read, each as JSON."""

    bom = False

    def __init__(self, source: str) -> None:
        name, _, split = source.removeprefix("hf:").partition(":")
        if not name:
            raise FormatError(f"{source}: no name; write hf:NAME or hf:NAME:SPLIT")
        self.name = self.label = source
        self._path, self._split = name, split or "train"
        self._hash, self._rows = hashlib.sha256(), 0

    def documents(self) -> Iterator[Document]:
        try:
            from datasets import load_dataset
        except ImportError:
            raise FormatError(
                f"{self.name}: needs the package datasets: pip install datasets, or give a file"
            ) from None
        try:
            rows = iter(load_dataset(self._path, split=self._split, streaming=True))
        except Exception as error:  # network, names, formats: each has its own exception
            raise FormatError(
                f"{self.name}: cannot be loaded ({one_line(error)}); check the name, or give a file"
            ) from None
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:
                raise FormatError(f"{self.name}: row {self._rows + 1}: cannot be read ({one_line(error)})") from None
            self._rows += 1
            known = {key: row[key] for key in (*KEYS, "tools") if row.get(key) is not None}
            self._hash.update(json.dumps(known, ensure_ascii=True, sort_keys=True, default=str).encode() + b"\n")
            yield from _documents(known or dict(row), f"{self.name}: row {self._rows}")

    def digest(self) -> dict[str, Any]:
        return {"sha256": self._hash.hexdigest(), "sha256_of": f"first {self._rows} rows"}

    def nothing(self, empty: int) -> str:
        return f"{empty} documents, all of them empty" if empty else "no rows"


def _documents(tree: Any, where: str) -> Iterator[Document]:
    """The document of one JSON object, checked; a very long text in parts."""
    if not isinstance(tree, Mapping):
        raise FormatError(f'{where}: {type(tree).__name__}, expected an object such as {{"text": ...}}')
    key = next((key for key in KEYS if key in tree), None)
    if key is None:
        found = ", ".join(sorted(repr(str(k)) for k in tree)[:8]) or "nothing"
        raise FormatError(f'{where}: keys {found}, expected one of "text", "messages", "ids"; rename the right one')
    value = tree[key]
    if key == "text":
        if not isinstance(value, str):
            raise FormatError(f'{where}: "text" is {type(value).__name__}, expected a string')
        start = 0
        while True:
            end = value.find("\n", start + PIECE, start + 2 * PIECE) + 1 or min(start + 2 * PIECE, len(value))
            yield Document(where, text=value[start:end], more=start > 0)
            start = end
            if start >= len(value):
                break
    elif key == "ids":
        if not isinstance(value, list) or not all(type(i) is int for i in value):
            raise FormatError(f'{where}: "ids" must be a list of whole numbers')
        if len(value) < 2:
            raise FormatError(f"{where}: {len(value)} token ids, a document has at least 2; leave the line out")
        yield Document(where, ids=value)
    else:
        yield Document(where, messages=checked_messages(value, where), tools=tree.get("tools") or None)


def checked_messages(value: Any, where: str) -> list[dict[str, Any]]:
    """Messages with plain strings as content: most templates would print a list of parts as Python does."""
    if not isinstance(value, list) or not value:
        raise FormatError(f'{where}: "messages" must be a list of {{"role": ..., "content": ...}}, not empty')
    out = []
    for message in value:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise FormatError(f'{where}: a message without "role"; expected {{"role": "user", "content": ...}}')
        content = message.get("content")
        if isinstance(content, list):
            kinds = {part.get("type") if isinstance(part, Mapping) else type(part).__name__ for part in content}
            if kinds - {"text"} or not all(isinstance(part.get("text"), str) for part in content):
                raise FormatError(f"{where}: content of kind {sorted(map(str, kinds - {'text'}))}; only text is read")
            content = "".join(part["text"] for part in content)
        elif content is not None and not isinstance(content, str):
            raise FormatError(f'{where}: "content" is {type(content).__name__}, expected a string')
        out.append({**message, "content": content})
    return out
