"""The header of a safetensors file, parsed and printed by ourselves: so that only ranges are read, and nothing is trusted.

    8 bytes   little-endian length N of the header
    N bytes   JSON object, starts with "{", padded with spaces to a multiple of 8
    data      the tensors, one after another, without holes

Source: https://github.com/huggingface/safetensors#format. Stricter than the library where it is lax: a name twice, holes,
overlaps and trailing bytes are refused here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .spec import FormatError

# In the order in which the library lays tensors out: by falling alignment, then by name.
DTYPES: dict[str, torch.dtype] = {
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_RANK = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}
MAX_HEADER = 100_000_000
_AGAIN = "fetch or write the file again"


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: `nbytes` bytes at `begin`, counted from the start of `file`."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    file: Path
    begin: int


def parse_json(text: bytes, where: str) -> Any:
    """JSON from UTF-8 bytes; a name that stands twice in one object is an error. FormatError starts with `where`."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise FormatError(f"{where}: the name {twice!r} stands twice; readers disagree on which counts, {_AGAIN}")
        return out

    if text.startswith(b"\xef\xbb\xbf"):
        raise FormatError(f"{where}: starts with a byte order mark; save it as UTF-8 without one")
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=once)
    except FormatError:
        raise
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0] if not isinstance(error, RecursionError) else "nested too deeply"
        raise FormatError(f"{where}: not valid JSON ({reason}); {_AGAIN}") from None


def read_json(path: Path, max_bytes: int = 64 << 20) -> dict[str, Any]:
    """A JSON object from a file of at most `max_bytes`. FormatError names the file and what is wrong with it."""
    if not path.is_file():  # a pipe would never end, a device neither
        raise FormatError(f"{path}: is {'not a file' if path.exists() else 'missing'}; {_AGAIN}")
    with path.open("rb") as file:
        text = file.read(max_bytes + 1)
    if len(text) > max_bytes:
        size = path.stat().st_size
        raise FormatError(f"{path}: {size} bytes, at most {max_bytes} are read; is it the right file?")
    found = parse_json(text, str(path))
    if not isinstance(found, dict):
        raise FormatError(f"{path}: holds a {type(found).__name__}, expected a JSON object")
    return found


def _sizes(entry: Any, name: str, where: str) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    """dtype, shape, begin and end of one header entry, each checked by itself."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"{where}: tensor {name!r} needs dtype, shape and data_offsets, nothing else; {_AGAIN}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise FormatError(f"{where}: tensor {name!r} has dtype {dtype!r}, known are {', '.join(DTYPES)}")
    for key, numbers in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 1 << 63 for n in numbers):
            raise FormatError(f"{where}: tensor {name!r}: {key} is not a list of integers of 0 and more; {_AGAIN}")
    if len(offsets) != 2 or len(shape) > 64:
        raise FormatError(
            f"{where}: tensor {name!r} has {len(offsets)} offsets and {len(shape)} dimensions, expected 2 and at most 64"
        )
    size = DTYPES[dtype].itemsize
    if math.prod(n for n in shape if n) * size >= 1 << 63:
        raise FormatError(f"{where}: tensor {name!r}: the size of shape {shape} overflows; {_AGAIN}")
    begin, end = offsets
    nbytes = math.prod(shape) * size
    if end - begin != nbytes:
        raise FormatError(
            f"{where}: tensor {name!r} {dtype} {shape} takes {nbytes} bytes, its offsets {offsets} say {end - begin}; {_AGAIN}"
        )
    return DTYPES[dtype], tuple(shape), begin, end


def read_header(path: Path) -> dict[str, TensorInfo]:
    """All tensors of a safetensors file, by name. Reads only the header.

    FormatError for everything that the top of this page does not allow; no tensor has been touched then.
    """
    where = str(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise FormatError(f"{where}: {size} bytes are no safetensors file, expected at least 8; {_AGAIN}")
        length = int.from_bytes(start, "little")
        if length > MAX_HEADER:
            raise FormatError(
                f"{where}: header says {length} bytes, at most {MAX_HEADER} are read; not a safetensors file?"
            )
        if 8 + length > size:
            raise FormatError(f"{where}: header says {length} bytes, the file has {size} in all: truncated; {_AGAIN}")
        text = file.read(length)
    if not text.startswith(b"{"):
        raise FormatError(f"{where}: header starts with {text[:1]!r}, expected '{{'; not a safetensors file?")
    header = parse_json(text, where)
    if not isinstance(header, dict):
        raise FormatError(f"{where}: header is a {type(header).__name__}, expected an object; {_AGAIN}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FormatError(f"{where}: __metadata__ is not an object of strings; {_AGAIN}")
    data = 8 + length
    tensors: dict[str, TensorInfo] = {}
    ranges: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        try:
            name.encode("utf-8")
        except UnicodeEncodeError:
            raise FormatError(f"{where}: tensor name {name!r} is not valid Unicode; {_AGAIN}") from None
        dtype, shape, begin, end = _sizes(entry, name, where)
        tensors[name] = TensorInfo(dtype, shape, end - begin, path, data + begin)
        ranges.append((begin, end, name))
    position = 0
    for begin, end, name in sorted(ranges):
        if begin != position:
            what = "leaves a hole" if begin > position else "overlaps the one before"
            raise FormatError(f"{where}: tensor {name!r} at byte {begin} {what}, expected {position}; {_AGAIN}")
        position = end
    if data + position != size:
        what = "truncated" if data + position > size else "trailing bytes"
        raise FormatError(f"{where}: tensors end at byte {data + position}, the file has {size}: {what}; {_AGAIN}")
    return tensors


def nbytes_of(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor; FormatError for a dtype that safetensors has no name for."""
    if dtype not in _NAMES:
        raise FormatError(f"{dtype} cannot be stored in safetensors; known are {', '.join(str(d) for d in _NAMES)}")
    return math.prod(shape) * dtype.itemsize


def print_header(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The first bytes of a file that holds `tensors`, and (begin, nbytes) of each, counted from the start of the file.

    The bytes are those of `safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})`.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    ranges: dict[str, tuple[int, int]] = {}
    position = 0
    for name in sorted(tensors, key=lambda n: (_RANK.get(tensors[n][0], -1), n)):
        dtype, shape = tensors[name]
        nbytes = nbytes_of(dtype, shape)
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [position, position + nbytes]}
        ranges[name] = (position, nbytes)
        position += nbytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: (start + at, n) for name, (at, n) in ranges.items()}
