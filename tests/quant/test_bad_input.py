"""Bad input: one clear line that names the file, what was wrong and the remedy; nothing is left behind."""

from __future__ import annotations

import errno
import json
import os
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from percard.formats.spec import FormatError
from percard.quant import output, preflight, quantize
from percard.quant.recipe import Recipe, RecipeError

Tiny = Callable[..., Path]
DOWN = "model.layers.1.mlp.down_proj.weight"
SHARD = "model-00002-of-00002.safetensors"


def cut(folder: Path) -> None:
    file = folder / SHARD
    os.truncate(file, file.stat().st_size - 8)


def lie(folder: Path) -> None:
    """A header whose shape and offsets disagree."""
    file = folder / SHARD
    data = file.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = data[8 : 8 + size].replace(b'"shape":[128,256]', b'"shape":[128,255]')
    file.write_bytes(data[:8] + header + data[8 + size :])


def index(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    file = folder / "model.safetensors.index.json"
    tree = json.loads(file.read_text())
    change(tree["weight_map"])
    file.write_text(json.dumps(tree))


def only_pickle(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def config(folder: Path, **over: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **over}))


BROKEN: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "missing shard": (lambda f: (f / SHARD).unlink(), (SHARD, "missing")),
    "truncated shard": (cut, (SHARD, "truncated")),
    "header lies about sizes": (lie, (SHARD, "offsets")),
    "empty shard": (lambda f: (f / SHARD).write_bytes(b""), (SHARD, "0 bytes")),
    "index names a tensor that is not there": (lambda f: index(f, lambda m: m.update(ghost=SHARD)), ("ghost", SHARD)),
    "index lacks a tensor": (lambda f: index(f, lambda m: m.pop(DOWN)), (DOWN, "does not name it")),
    "index points outside": (
        lambda f: index(f, lambda m: m.update({DOWN: "../x.safetensors"})),
        (DOWN, "../x.safetensors"),
    ),
    "no config": (lambda f: (f / "config.json").unlink(), ("config.json", "missing")),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), ("config.json", "JSON")),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), ("config.json", "list")),
    "unknown architecture": (lambda f: config(f, model_type="rwkv"), ("rwkv", "known model types")),
    "already quantised": (
        lambda f: config(f, quantization_config={"quant_method": "awq"}),
        ("already quantised", "awq"),
    ),
    "pickle checkpoint": (only_pickle, ("pytorch_model.bin", "pickle", "save_pretrained")),
}


def refused(
    src: Path, dst: Path, wish: Recipe, kind: type[Exception] | tuple[type[Exception], ...] = FormatError
) -> str:
    """The error text of a run that must fail, after a look at what it left."""
    before = sorted(str(p) for p in dst.parent.rglob("*"))
    with pytest.raises(kind) as caught:
        quantize.run(src, dst, wish)
    assert sorted(str(p) for p in dst.parent.rglob("*")) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", BROKEN)
def test_broken_source(tiny: Tiny, tmp_path: Path, name: str) -> None:
    src = tiny()
    break_it, says = BROKEN[name]
    break_it(src)
    text = refused(src, tmp_path / "out", Recipe.from_flags(spec="w4a16-g64"))
    assert str(src) in text and all(word in text for word in says)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("tensor", "options"),
    [(DOWN, {}), (DOWN, {"search": False}), ("model.embed_tokens.weight", {}), ("model.norm.weight", {})],
)
def test_nan_and_inf(
    tiny: Tiny, tmp_path: Path, bad: float, dtype: torch.dtype, tensor: str, options: dict[str, Any]
) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[tensor][3] = bad

    src = tiny(change=spoil, dtype=dtype)
    text = refused(src, tmp_path / "out", Recipe.from_flags(spec="w4a16-g64", options=options))
    assert tensor in text and "NaN or Inf" in text and ".safetensors" in text and "repair" in text
    if tensor == "model.norm.weight":
        assert "at [3]" in text


def test_source_that_is_not_there(tmp_path: Path, tiny: Tiny) -> None:
    wish = Recipe.from_flags(spec="w8a8")
    assert "no such folder" in refused(tmp_path / "nowhere", tmp_path / "out", wish)
    file = tiny() / "config.json"
    assert "is a file" in refused(file, tmp_path / "out", wish)
    (tmp_path / "empty").mkdir()
    assert "no *.safetensors" in refused(tmp_path / "empty", tmp_path / "out", wish)


def test_group_that_does_not_divide(tiny: Tiny, tmp_path: Path) -> None:
    src = tiny(intermediate_size=192)
    text = refused(src, tmp_path / "out", Recipe.from_flags(spec="w4a16-g128"))
    assert "down_proj" in text and "192" in text and "groups that fit: g32, g64" in text


def test_outputs_that_cannot_be(tiny: Tiny, tmp_path: Path) -> None:
    src, wish = tiny(), Recipe.from_flags(spec="w4a16-g64")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    assert "--force" in refused(src, tmp_path / "full", wish, FileExistsError)
    assert "is a file" in refused(src, tmp_path / "file", wish, FileExistsError)
    assert "symbolic link" in refused(src, tmp_path / "link", wish, FileExistsError)
    assert "same folder" in refused(src, src, wish)
    assert "same folder" in refused(src, src.parent / "x" / ".." / src.name, wish)
    assert "inside each other" in refused(src, src / "out", wish)
    assert "inside each other" in refused(src, src.parent, wish)
    assert "not a folder" in refused(src, tmp_path / "file" / "out", wish, (FormatError, NotADirectoryError))
    with pytest.raises(FileExistsError, match="remove it yourself"):
        quantize.run(src, tmp_path / "full", wish, force=True)
    assert (tmp_path / "full" / "thesis.tex").exists()


def test_an_empty_output_folder_is_fine_and_parents_are_made(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    quantize.run(tiny(), tmp_path / "out", Recipe.from_flags(spec="w4a16-g64"))
    quantize.run(tiny(), tmp_path / "a" / "b" / "out", Recipe.from_flags(spec="w4a16-g64"))
    assert (tmp_path / "out" / "config.json").exists() and (tmp_path / "a" / "b" / "out" / "config.json").exists()


def test_tied_head_with_ignore_replaced(tiny: Tiny, tmp_path: Path) -> None:
    wish = Recipe.parse("stages: [{quantize: {spec: w8a16, ignore!: []}}]")
    assert "embeddings" in refused(tiny("qwen3"), tmp_path / "out", wish, RecipeError)


def test_two_runs_at_once(tiny: Tiny, tmp_path: Path) -> None:
    with output.Output(tmp_path / "out"):
        with pytest.raises(FileExistsError, match="another run is writing it"):
            quantize.run(tiny(), tmp_path / "out", Recipe.from_flags(spec="w4a16-g64"))
        assert (tmp_path / ".out.percard-unfinished").exists()  # the first run's folder was not touched
    assert not (tmp_path / ".out.percard-unfinished").exists()


@pytest.mark.parametrize("after", [0, 1, 5, 40])
def test_disk_full(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    calls = 0

    def write(fd: int, data: Any, offset: int) -> int:
        nonlocal calls
        calls += 1
        if calls > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, data, offset)

    src, real = tiny(), os.pwrite
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", write)
        refused(src, tmp_path / "deep" / "out", Recipe.from_flags(spec="w4a16-g64"), OSError)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["src"]
    quantize.run(src, tmp_path / "deep" / "out", Recipe.from_flags(spec="w4a16-g64"))


@pytest.mark.full
def test_disk_really_full(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        src, wish = tiny(), Recipe.from_flags(spec="w8a8")
        with pytest.raises(preflight.Refused, match="of disk"):
            quantize.run(src, disk / "out", wish)
        monkeypatch.setattr(preflight, "disk_free", lambda dst: 1 << 40)
        with pytest.raises(OSError, match="No space left") as caught:
            quantize.run(src, disk / "out", wish)
        assert caught.value.errno == errno.ENOSPC and list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)
