"""Checkpoints: a folder with config.json and safetensors shards, read by ranges and written as a stream.

Reading never runs code from a file: no pickle, no memory map of the whole. All headers are checked before any tensor is
touched. How writing goes stands in writer.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .header import TensorInfo, read_header, read_json
from .kv_layers import FILES as KV_FILES
from .spec import FormatError
from .writer import INDEX, MARKER, Writer

__all__ = ["INDEX", "MARKER", "Checkpoint", "TensorInfo", "Writer", "read_json"]

_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_CHUNK = 16 << 20  # bytes per piece of a stream


def _inside(path: Path, folder: Path) -> Path:
    """`path` if it is a file of `folder` and no link leads out of it (but into the blobs of its own hub cache)."""
    target, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))  # never raises, not even for circles
    homes = [home]
    if home.parent.name == "snapshots":  # the cache of huggingface_hub: snapshots/<revision>/x -> ../../blobs/<hash>
        homes.append(home.parent.parent / "blobs")
    if not any(target.is_relative_to(h) for h in homes):
        raise FormatError(f"{path}: a link that leads out of the folder, to {target}; copy the file into it")
    if not path.is_file():
        what = "is not a file" if path.exists() else "is missing"
        raise FormatError(f"{path}: {what}; fetch the checkpoint again")
    return path


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. `open` has checked config, index and all headers; tensors are read when asked for.

    `tensors` are in the order of the shards and of the bytes in them, so that reading along it is sequential.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    side_files: list[Path]  # all else that belongs to the model, to be copied as it is; absolute
    skipped: list[Path]  # weights in other containers, which are never opened

    @classmethod
    def open(cls, path: str | Path, *, max_tensors: int = 10_000_000, max_index: int = 64 << 20) -> Checkpoint:
        """Open a folder. FormatError names the file, what was wrong and the remedy, for all that is not as it should be."""
        folder = Path(path)
        if not folder.exists():
            raise FormatError(
                f"{folder}: no such folder; give the folder of a checkpoint (config.json and *.safetensors)"
            )
        if not folder.is_dir():
            raise FormatError(f"{folder}: is a file; give the folder that holds it, with its config.json")
        if (folder / MARKER).exists():
            raise FormatError(
                f"{folder}: an output that was never finished ({MARKER}); run the command that wrote it again"
            )
        side, skipped, shards = _sort_files(folder)
        index = folder / INDEX
        where: dict[str, str] = {}
        if index.exists() or index.is_symlink():
            where = _read_index(_inside(index, folder), max_index)
            names = list(dict.fromkeys(where.values()))
        else:
            names = _without_index(folder, shards, skipped)
        skipped += [folder / name for name in shards if name not in names]
        if not (folder / "config.json").exists():
            raise FormatError(f"{folder / 'config.json'}: is missing; fetch it from where the weights came from")
        config = read_json(_inside(folder / "config.json", folder))
        tensors: dict[str, TensorInfo] = {}
        for shard in sorted(names):
            found = read_header(_inside(folder / shard, folder))
            if len(tensors) + len(found) > max_tensors:
                raise FormatError(
                    f"{folder / shard}: more than {max_tensors} tensors in the checkpoint; raise max_tensors"
                )
            for name in sorted(found, key=lambda n: found[n].begin):
                if where and where.get(name) != shard:
                    other = where.get(name)
                    says = f"{index.name} says {other}" if other else f"{index.name} does not name it"
                    raise FormatError(f"{folder / shard}: holds tensor {name!r}, {says}; fetch index and shards again")
                tensors[name] = found[name]
        for name, shard in where.items():
            if name not in tensors:
                raise FormatError(
                    f"{folder / shard}: tensor {name!r} is missing, {index.name} says that it is there; fetch the shard again"
                )
        return cls(folder, config, tensors, side, sorted(skipped))

    @property
    def names(self) -> list[str]:
        """All tensor names, in the order of the bytes on disk."""
        return list(self.tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    def info(self, name: str) -> TensorInfo:
        """dtype, shape, size and place of a tensor; FormatError when there is none of that name."""
        if name not in self.tensors:
            raise FormatError(f"{self.path}: no tensor {name!r} in this checkpoint")
        return self.tensors[name]

    def read(self, name: str) -> torch.Tensor:
        """One tensor, in memory of its own."""
        info = self.info(name)
        return self._bytes(name, 0, info.nbytes).view(info.dtype).reshape(info.shape)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows start..stop-1 of a tensor along its first dimension; reads no other bytes."""
        info = self.info(name)
        if not info.shape or not 0 <= start <= stop <= info.shape[0]:
            raise FormatError(f"{info.file}: tensor {name!r} {list(info.shape)} has no rows {start}..{stop}")
        row = info.nbytes // info.shape[0] if info.shape[0] else 0
        data = self._bytes(name, start * row, (stop - start) * row)
        return data.view(info.dtype).reshape(stop - start, *info.shape[1:])

    def raw(self, name: str, chunk: int = _CHUNK) -> Iterator[bytes]:
        """The bytes of a tensor as they are on disk, in pieces of at most `chunk`."""
        info = self.info(name)
        with info.file.open("rb", buffering=0) as file:
            file.seek(info.begin)
            left = info.nbytes
            while left:
                piece = file.read(min(chunk, left))
                if not piece:
                    raise FormatError(
                        f"{info.file}: ends inside tensor {name!r}: it was cut since it was opened; fetch it again"
                    )
                left -= len(piece)
                yield piece

    def _bytes(self, name: str, offset: int, nbytes: int) -> torch.Tensor:
        """`nbytes` bytes of a tensor from `offset` on, as uint8."""
        info = self.tensors[name]
        data = torch.empty(nbytes, dtype=torch.uint8)
        view = data.numpy().data
        with info.file.open("rb", buffering=0) as file:
            file.seek(info.begin + offset)
            done = 0
            while done < nbytes:
                count = file.readinto(view[done : done + (64 << 20)])
                if not count:
                    raise FormatError(
                        f"{info.file}: ends inside tensor {name!r}: it was cut since it was opened; fetch it again"
                    )
                done += count
        return data


def _sort_files(folder: Path) -> tuple[list[Path], list[Path], list[str]]:
    """Side files, skipped files, and the names of all safetensors files directly in `folder`."""
    side: list[Path] = []
    skipped: list[Path] = []
    shards: list[str] = []
    for root, folders, files in os.walk(folder):
        here = Path(root)
        folders[:] = sorted(name for name in folders if not name.startswith("."))  # .git, .cache
        if here != folder and any(name == MARKER or name.endswith(".safetensors") for name in files):
            skipped.append(here)  # a checkpoint of its own, for example an output that was put into its source
            folders.clear()
            continue
        for name in sorted(files):
            path = here / name
            if name in KV_FILES:  # a calibration of this very checkpoint's cache: no weights, and nothing for a copy
                continue
            if name.endswith(".safetensors") and here == folder:
                shards.append(name)
            elif name.endswith((".safetensors.index.json", *_PICKLES)) or ".bin.index" in name:
                if path != folder / INDEX:
                    skipped.append(path)
            elif path != folder / "config.json":
                side.append(path)
    for path in side:
        _inside(path, folder)
    return side, skipped, shards


def _without_index(folder: Path, shards: list[str], skipped: list[Path]) -> list[str]:
    """The one safetensors file of a folder that has no index."""
    if "model.safetensors" in shards:
        return ["model.safetensors"]
    if len(shards) == 1:
        return shards
    if shards:
        raise FormatError(
            f"{folder}: {len(shards)} safetensors files without {INDEX}; fetch the index from the same place"
        )
    pickles = [path for path in skipped if path.suffix in _PICKLES]
    if pickles:
        raise FormatError(
            f"{pickles[0]}: a pickle checkpoint, which can run code when it is opened, so it is never opened here; where you "
            f'trust it, convert it: python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{folder}', dtype='auto').save_pretrained('{folder}-safetensors')\""
        )
    raise FormatError(f"{folder}: holds no *.safetensors; give the folder of a checkpoint")


def _read_index(path: Path, max_bytes: int) -> dict[str, str]:
    """weight_map of an index: tensor name to the name of a shard beside it."""
    where = read_json(path, max_bytes).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise FormatError(f"{path}: has no weight_map; fetch the index again")
    for name, shard in where.items():
        if not isinstance(shard, str) or not _file_name(shard):
            raise FormatError(
                f"{path}: puts tensor {name!r} into {shard!r}, expected the name of a file beside the index"
            )
        if not shard.endswith(".safetensors"):
            raise FormatError(
                f"{path}: puts tensor {name!r} into {shard!r}, which is no *.safetensors; only those are opened"
            )
    return where


def _file_name(name: str) -> bool:
    """A plain file name: no folder, nothing that a file system refuses."""
    try:
        length = len(name.encode("utf-8"))
    except UnicodeEncodeError:
        return False
    return 0 < length <= 255 and name == Path(name).name and "\\" not in name and "\0" not in name
