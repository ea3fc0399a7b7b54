"""What a calibration of the cache found, beside a checkpoint: a spec for each layer and the offsets of its keys.

    percard_kv.json           {"schema": 1, "config_sha256": "..", "offsets_sha256": "..", "kv_heads": 8, "head_dim": 128,
                               "layers": [{"spec": "int8", "offset": false}, {"spec": "int4", "offset": true}, ..],
                               "calibration": {..}}
    percard_kv.safetensors    "layers.1.mu" fp32 [Hkv, D] for each layer with an offset: `mu` of formats/kvcache.py

Both are optional, and config.json does not know of them: integer caches have no form in checkpoints that others read. What
was calibrated is told by the sha256 of config.json, so files that were copied beside another model are refused. The JSON is
written last and names the sha256 of the other file: a pair of which one half is from another run is refused as well.
"calibration" is for people: the text, its windows, what each choice measured. Nothing here depends on the size of a page.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .header import print_header, read_header, read_json
from .kvcache import SPECS, KVSpec
from .spec import FormatError

SCHEMA = 1
LAYERS, OFFSETS = "percard_kv.json", "percard_kv.safetensors"
UNFINISHED = "percard_kv.unfinished.jsonl"  # what a calibration that was cut has measured
FILES = (LAYERS, OFFSETS, UNFINISHED)
_MAX_BYTES = 32 << 20  # of either file; 100 layers of 16 heads of 256 take 1.6 MB
_AGAIN = "run percard calibrate-kv again"


@dataclass(frozen=True, eq=False)
class KVLayers:
    """A spec per layer, and per layer its `mu` fp32 [Hkv, D] or None. `calibration`: what was measured, plain JSON.

    FormatError when they do not fit each other: as many offsets as specs, all of one shape, none for a bf16 layer.
    """

    specs: tuple[KVSpec, ...]
    mu: tuple[torch.Tensor | None, ...]
    kv_heads: int
    head_dim: int
    calibration: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.specs or len(self.specs) != len(self.mu):
            raise FormatError(
                f"{len(self.specs)} layers with {len(self.mu)} offsets, expected one for each, at least one"
            )
        for i, (spec, mu) in enumerate(zip(self.specs, self.mu, strict=True)):
            if mu is None:
                continue
            if not spec.quantised:
                raise FormatError(f"layer {i} is {spec} and has an offset; keys that are not rounded need none")
            if mu.dtype != torch.float32 or tuple(mu.shape) != (self.kv_heads, self.head_dim):
                wanted = f"float32 {(self.kv_heads, self.head_dim)}"
                raise FormatError(f"the offset of layer {i} is {mu.dtype} {tuple(mu.shape)}, expected {wanted}")
            if not bool(torch.isfinite(mu).all()):
                raise FormatError(f"the offset of layer {i} holds NaN or Inf")

    @property
    def name(self) -> str:
        """The specs in a line: "2 bf16 + 26 int8"."""
        names = [str(spec) for spec in self.specs]
        return " + ".join(f"{names.count(n)} {n}" for n in dict.fromkeys(names))

    def bytes_per_token(self, dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes of cache that a token takes in all layers; `dtype` is the model's."""
        return sum(spec.bytes_per_token(self.head_dim, self.kv_heads, dtype) for spec in self.specs)

    def save(self, folder: str | Path, *, force: bool = False) -> tuple[Path, Path]:
        """Writes the two files beside folder/config.json, each whole or not at all; FormatError if one is there, unless `force`."""
        folder = Path(folder)
        if not force:
            refuse_existing(folder)
        named = {f"layers.{i}.mu": mu for i, mu in enumerate(self.mu) if mu is not None}
        header, ranges = print_header({n: (mu.dtype, tuple(mu.shape)) for n, mu in named.items()})
        offsets = bytearray(header) + bytearray(sum(size for _, size in ranges.values()))
        for name, (at, size) in ranges.items():
            offsets[at : at + size] = named[name].detach().cpu().contiguous().numpy().tobytes()
        said = {
            "schema": SCHEMA,
            "config_sha256": fingerprint(folder),
            "offsets_sha256": hashlib.sha256(offsets).hexdigest(),
            "kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "layers": [{"spec": str(s), "offset": mu is not None} for s, mu in zip(self.specs, self.mu, strict=True)],
            "calibration": dict(self.calibration),
        }
        words = (json.dumps(said, indent=1, allow_nan=False) + "\n").encode()
        _write(folder / OFFSETS, bytes(offsets))
        _write(folder / LAYERS, words)
        return folder / LAYERS, folder / OFFSETS

    @classmethod
    def load(
        cls, folder: str | Path, *, layers: int | None = None, kv_heads: int | None = None, head_dim: int | None = None
    ) -> KVLayers:
        """The calibration beside a checkpoint; the numbers, where given, are those of the model and must agree.

        FormatError for files that are missing, damaged, of another model, of another run or of an unknown schema.
        """
        folder = Path(folder)
        path = folder / LAYERS
        if not path.exists():
            raise FormatError(f"{path}: is missing; percard calibrate-kv {folder} --text F writes it")
        raw = read_json(path, _MAX_BYTES)
        if type(schema := raw.get("schema")) is not int or schema != SCHEMA:
            raise FormatError(f"{path}: schema {_shown(schema)}, this percard reads {SCHEMA}; {_AGAIN}")
        if raw.get("config_sha256") != fingerprint(folder):
            raise FormatError(f"{path}: was measured on a model with another config.json; {_AGAIN} for this one")
        shape = (_size(path, raw, "kv_heads", kv_heads), _size(path, raw, "head_dim", head_dim))
        rows = raw.get("layers")
        if not isinstance(rows, list) or not rows or not all(_is_row(row) for row in rows):
            raise FormatError(f'{path}: layers is not a list of {{"spec": name, "offset": true or false}}; {_AGAIN}')
        if odd := [row["spec"] for row in rows if row["spec"] not in SPECS]:
            raise FormatError(f"{path}: cache spec {_shown(odd[0])} is not one; known: {', '.join(SPECS)}; {_AGAIN}")
        if layers is not None and len(rows) != layers:
            raise FormatError(f"{path}: holds {len(rows)} layers, the model has {layers}; {_AGAIN}")
        calibration = raw.get("calibration")
        if not isinstance(calibration, dict):
            raise FormatError(f"{path}: calibration is a {type(calibration).__name__}, expected an object; {_AGAIN}")
        found = _read_offsets(folder / OFFSETS, raw.get("offsets_sha256"), [row["offset"] for row in rows], shape)
        try:
            specs = tuple(KVSpec.parse(row["spec"]) for row in rows)
            return cls(specs, found, *shape, calibration)
        except FormatError as error:
            raise FormatError(f"{path}: {error}; {_AGAIN}") from None


def refuse_existing(folder: str | Path) -> None:
    """FormatError if a calibration lies in `folder` already."""
    for name in (LAYERS, OFFSETS):
        if (Path(folder) / name).exists():
            raise FormatError(f"{Path(folder) / name}: is there already; --force replaces it")


def fingerprint(folder: str | Path) -> str:
    """The sha256 of a checkpoint's config.json, as hex."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FormatError(f"{path}: is missing; give the folder of a checkpoint")
    if (size := path.stat().st_size) > _MAX_BYTES:
        raise FormatError(f"{path}: {size} bytes, at most {_MAX_BYTES} are read; is it the right file?")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _size(path: Path, raw: Mapping[str, Any], key: str, wanted: int | None) -> int:
    """A size of the JSON; FormatError unless it is one, and the one that is wanted."""
    found = raw.get(key)
    if type(found) is not int or not 1 <= found <= 1 << 20 or (wanted is not None and found != wanted):
        raise FormatError(f"{path}: {key} is {_shown(found)}, expected {wanted or 'a number above 0'}; {_AGAIN}")
    return found


def _shown(value: Any) -> str:
    """A value of a file in an error, cut."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _is_row(row: Any) -> bool:
    return isinstance(row, dict) and isinstance(row.get("spec"), str) and isinstance(row.get("offset"), bool)


def _read_offsets(
    path: Path, sha256: Any, wanted: list[bool], shape: tuple[int, int]
) -> tuple[torch.Tensor | None, ...]:
    """mu by layer where `wanted`; FormatError unless the file is the one that the JSON names and holds just those."""
    if not path.is_file():
        raise FormatError(f"{path}: is {'not a file' if path.exists() else 'missing'}, {LAYERS} needs it; {_AGAIN}")
    if (size := path.stat().st_size) > _MAX_BYTES:
        raise FormatError(f"{path}: {size} bytes, at most {_MAX_BYTES} are read; is it the right file?")
    data = bytearray(path.read_bytes())
    if hashlib.sha256(data).hexdigest() != sha256:
        raise FormatError(f"{path}: is not the file that {LAYERS} was written with; {_AGAIN}, or copy both")
    tensors = read_header(path)
    expected = {f"layers.{i}.mu" for i, has in enumerate(wanted) if has}
    if set(tensors) != expected:
        odd = sorted(set(tensors) ^ expected)[0]
        says = "holds" if odd in tensors else "lacks"
        raise FormatError(f"{path}: {says} {_shown(odd)}, and {LAYERS} says otherwise; {_AGAIN}")
    found: list[torch.Tensor | None] = [None] * len(wanted)
    for i, has in enumerate(wanted):
        if not has:
            continue
        info = tensors[f"layers.{i}.mu"]
        if info.dtype != torch.float32 or info.shape != shape:
            raise FormatError(f"{path}: layers.{i}.mu is {info.dtype} {info.shape}, expected float32 {shape}; {_AGAIN}")
        part = torch.frombuffer(data, dtype=torch.uint8, count=info.nbytes, offset=info.begin)
        found[i] = part.clone().view(torch.float32).view(shape)
    return tuple(found)


def _write(path: Path, data: bytes) -> None:
    """A file whole or not at all; what was begun is removed when it fails."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
