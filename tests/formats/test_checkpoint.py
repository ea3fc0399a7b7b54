"""checkpoint.py: what is opened, what is refused and how it is said. The writer is in test_writer.py."""

from __future__ import annotations

import json
import os
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from percard.formats.checkpoint import INDEX, MARKER, Checkpoint
from percard.formats.header import DTYPES, print_header, read_header
from percard.formats.spec import FormatError


def raw_file(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A file with any header: an object is printed as JSON, bytes are taken as they are."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    """One header entry."""
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": list(offsets)}


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    """A few tensors of several dtypes and shapes, one of them empty, one a scalar."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "a.weight": torch.randn(7, 5, generator=generator),
        "b.weight": torch.randn(4, 6, generator=generator).to(torch.bfloat16),
        "c.scale": torch.tensor(3.5, dtype=torch.float16),
        "d.codes": torch.randint(-128, 128, (3, 3, 3), generator=generator).to(torch.int8),
        "e.empty": torch.empty(0, 4),
        "f.bits": torch.tensor([True, False, True]),
        "g.words": torch.randint(-(2**31), 2**31 - 1, (9,), generator=generator).to(torch.int32),
    }


def checkpoint(folder: Path, shards: int = 2) -> Path:
    """A checkpoint of `tensors()` in 1 or 2 shards, written by the library."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "qwen3", "x": 1}')
    found = tensors()
    if shards == 1:
        save_file(found, folder / "model.safetensors")
        return folder
    where = {}
    for i, names in enumerate((list(found)[:4], list(found)[4:]), 1):
        file = f"model-{i:05d}-of-00002.safetensors"
        save_file({name: found[name] for name in names}, folder / file, {"format": "pt"})
        where |= dict.fromkeys(names, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    return folder


@pytest.mark.parametrize("shards", [1, 2])
def test_reads_what_the_library_wrote(tmp_path: Path, shards: int) -> None:
    found = Checkpoint.open(checkpoint(tmp_path / "m", shards))
    assert found.config == {"model_type": "qwen3", "x": 1}
    assert sorted(found.names) == sorted(tensors())
    for name, expected in tensors().items():
        info = found.info(name)
        assert info.dtype == expected.dtype and info.shape == tuple(expected.shape)
        assert info.nbytes == expected.numel() * expected.element_size()
        read = found.read(name)
        assert read.dtype == expected.dtype and torch.equal(read, expected)
        raw = b"".join(found.raw(name, chunk=5))
        assert raw == bytes(expected.reshape(-1).view(torch.uint8).tolist()) and len(raw) == info.nbytes
        if expected.dim():
            n = expected.shape[0]
            for start, stop in ((0, n), (0, 0), (n // 2, n), (n, n)):
                assert torch.equal(found.read_rows(name, start, stop), expected[start:stop])
    assert found.nbytes == sum(t.numel() * t.element_size() for t in tensors().values())


def test_reads_every_dtype(tmp_path: Path) -> None:
    every = {}
    for name, dtype in DTYPES.items():
        every[name] = torch.randint(0, 2 if name == "BOOL" else 120, (16,), dtype=torch.uint8).view(dtype)
    save_file(every, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    found = Checkpoint.open(tmp_path)
    for name, expected in every.items():
        assert found.info(name).dtype == expected.dtype
        assert b"".join(found.raw(name)) == bytes(expected.view(torch.uint8).tolist())


def test_golden_file(tmp_path: Path) -> None:
    """G17."""
    header, ranges = print_header({"w": (torch.int32, (1,))})
    text = b'{"__metadata__":{"format":"pt"},"w":{"dtype":"I32","shape":[1],"data_offsets":[0,4]}}'
    assert header[8:].rstrip(b" ") == text and len(header) % 8 == 0 and ranges == {"w": (len(header), 4)}
    golden = bytes.fromhex("3800000000000000") + b'{"w":{"dtype":"I32","shape":[1],"data_offsets":[0,4]}}  '
    golden += bytes.fromhex("01000000")
    assert len(golden) == 68
    (tmp_path / "model.safetensors").write_bytes(golden)
    (tmp_path / "config.json").write_text("{}")
    assert Checkpoint.open(tmp_path).read("w").tolist() == [1]


def test_one_file_of_another_name(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "weights.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert Checkpoint.open(tmp_path).names == ["w"]


def test_side_files_and_skipped(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m")
    for name in ("tokenizer.json", "README.md", ".gitattributes", "chat_template.jinja", "code/modeling.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    for name in ("pytorch_model.bin", "old.pt", "x.pth", "y.pkl", "consolidated.safetensors"):
        (folder / name).write_text("never opened")
    (folder / "pytorch_model.bin.index.json").write_text("{}")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("x")
    (folder / "inner").mkdir()
    (folder / "inner" / "model.safetensors").write_text("x")
    (folder / "inner" / "config.json").write_text("x")
    found = Checkpoint.open(folder)
    side = [path.relative_to(folder).as_posix() for path in found.side_files]
    assert sorted(side) == [".gitattributes", "README.md", "chat_template.jinja", "code/modeling.py", "tokenizer.json"]
    skipped = {path.name for path in found.skipped}
    assert skipped == {
        "pytorch_model.bin", "old.pt", "x.pth", "y.pkl", "consolidated.safetensors", "pytorch_model.bin.index.json", "inner"
    }  # fmt: skip


def test_hub_cache_links(tmp_path: Path) -> None:
    """The layout of huggingface_hub: links into the blobs beside the snapshot are fine, others are not."""
    real = checkpoint(tmp_path / "real")
    snapshot = tmp_path / "models--x" / "snapshots" / "abc"
    blobs = tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, path in enumerate(sorted(real.iterdir())):
        (blobs / str(i)).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(i))
    assert sorted(Checkpoint.open(snapshot).names) == sorted(tensors())
    link = tmp_path / "link"
    link.symlink_to(real)
    assert sorted(Checkpoint.open(link).names) == sorted(tensors())


# -- what is refused ------------------------------------------------------------------------------------------------

BAD_HEADERS: dict[str, tuple[Any, str]] = {
    "empty file": (lambda p: p.write_bytes(b""), "0 bytes are no safetensors file"),
    "short": (lambda p: p.write_bytes(b"1234567"), "7 bytes are no safetensors file"),
    "header longer than the file": (lambda p: raw_file(p, {}, length=900), "header says 900 bytes.*truncated"),
    "header over the limit": (lambda p: raw_file(p, {}, length=1 << 62), "at most 100000000 are read"),
    "not an object": (lambda p: raw_file(p, b"[1, 2]  "), "header starts with b'\\['"),
    "not JSON": (lambda p: raw_file(p, b"{nonsense}"), "not valid JSON"),
    "not UTF-8": (lambda p: raw_file(p, b'{"\xff": 1}'), "not valid JSON"),
    "nested too deeply": (lambda p: raw_file(p, b'{"a":' + b"[" * 100_000), "not valid JSON"),
    "byte order mark": (lambda p: raw_file(p, b"\xef\xbb\xbf{}"), "header starts with"),
    "name twice": (lambda p: raw_file(p, b'{"w": 1, "w": 2}'), "'w' stands twice"),
    "name is no Unicode": (lambda p: raw_file(p, {"\ud800": entry()}, bytes(8)), "not valid Unicode"),
    "entry is no object": (lambda p: raw_file(p, {"w": 3}), "needs dtype, shape and data_offsets"),
    "entry lacks a key": (lambda p: raw_file(p, {"w": {"dtype": "F32", "shape": []}}), "needs dtype, shape"),
    "entry has a key too many": (lambda p: raw_file(p, {"w": entry() | {"x": 1}}), "needs dtype, shape"),
    "unknown dtype": (lambda p: raw_file(p, {"w": entry("F33")}, bytes(8)), "has dtype 'F33', known are"),
    "dtype is a list": (lambda p: raw_file(p, {"w": entry([])}, bytes(8)), "has dtype \\[\\]"),
    "negative size": (lambda p: raw_file(p, {"w": entry(shape=(-2,))}, bytes(8)), "shape is not a list of integers"),
    "size is a float": (lambda p: raw_file(p, {"w": entry(shape=[2.0])}, bytes(8)), "shape is not a list of integers"),
    "size is a bool": (lambda p: raw_file(p, {"w": entry(shape=[True])}, bytes(8)), "shape is not a list of integers"),
    "shape is a number": (lambda p: raw_file(p, {"w": entry(shape=2)}, bytes(8)), "shape is not a list of integers"),
    "size overflows": (lambda p: raw_file(p, {"w": entry(shape=[1 << 40, 1 << 40])}, bytes(8)), "overflows"),
    "size overflows beside a zero": (lambda p: raw_file(p, {"w": entry(shape=[1 << 62, 0, 9])}), "overflows"),
    "size is huge": (lambda p: raw_file(p, {"w": entry(shape=[10**30])}), "shape is not a list of integers"),
    "too many dimensions": (lambda p: raw_file(p, {"w": entry(shape=[1] * 65)}, bytes(8)), "65 dimensions"),
    "one offset": (lambda p: raw_file(p, {"w": entry(offsets=[8])}, bytes(8)), "1 offsets"),
    "offsets against shape": (lambda p: raw_file(p, {"w": entry(offsets=[0, 4])}, bytes(8)), "takes 8 bytes.*say 4"),
    "offsets backwards": (lambda p: raw_file(p, {"w": entry(offsets=[8, 0])}, bytes(8)), "takes 8 bytes"),
    "hole": (lambda p: raw_file(p, {"w": entry(offsets=[4, 12])}, bytes(12)), "leaves a hole"),
    "overlap": (
        lambda p: raw_file(p, {"v": entry(), "w": entry(offsets=[4, 12])}, bytes(12)),
        "'w' at byte 4 overlaps",
    ),
    "truncated": (lambda p: raw_file(p, {"w": entry()}, bytes(7)), "truncated"),
    "trailing bytes": (lambda p: raw_file(p, {"w": entry()}, bytes(9)), "trailing bytes"),
    "metadata of numbers": (
        lambda p: raw_file(p, {"__metadata__": {"a": 1}}),
        "__metadata__ is not an object of strings",
    ),
    "metadata is a list": (lambda p: raw_file(p, {"__metadata__": []}), "__metadata__ is not an object of strings"),
}


def one_line(error: pytest.ExceptionInfo[FormatError], file: Path) -> None:
    """The message is one line and names the file."""
    text = str(error.value)
    assert "\n" not in text and str(file) in text, text


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_broken_safetensors(tmp_path: Path, name: str) -> None:
    make, says = BAD_HEADERS[name]
    (tmp_path / "config.json").write_text("{}")
    make(tmp_path / "model.safetensors")
    with pytest.raises(FormatError, match=says) as error:
        Checkpoint.open(tmp_path)
    one_line(error, tmp_path / "model.safetensors")


def edit_index(folder: Path, change: Any) -> None:
    """Apply `change` to the weight_map."""
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"

BAD_FOLDERS: dict[str, tuple[Any, str, str]] = {
    "missing shard": (lambda f: (f / TWO).unlink(), TWO, "is missing; fetch"),
    "shard is a folder": (lambda f: ((f / TWO).unlink(), (f / TWO).mkdir()), TWO, "is not a file"),
    "missing tensor": (
        lambda f: edit_index(f, lambda m: m.update({"z.weight": ONE})), ONE, "'z.weight' is missing.*says that it is there"
    ),
    "tensor that the index does not name": (
        lambda f: edit_index(f, lambda m: m.pop("a.weight")), ONE, "'a.weight', .* does not name it"
    ),
    "tensor in two shards": (
        lambda f: save_file({**{n: t for n, t in tensors().items() if n >= "e"}, "a.weight": torch.ones(1)}, f / TWO),
        TWO, "'a.weight', .* says model-00001",
    ),
    "index leads out": (lambda f: edit_index(f, lambda m: m.update({"x": "../x.safetensors"})), INDEX, "'x' into '../x"),
    "index is absolute": (lambda f: edit_index(f, lambda m: m.update({"x": "/x.safetensors"})), INDEX, "'/x.safet"),
    "index names a folder": (lambda f: edit_index(f, lambda m: m.update({"x": "a/x.safetensors"})), INDEX, "beside the"),
    "index names dots": (lambda f: edit_index(f, lambda m: m.update({"x": ".."})), INDEX, "beside the index|only those"),
    "index with a backslash": (lambda f: edit_index(f, lambda m: m.update({"x": "a\\x.safetensors"})), INDEX, "beside"),
    "index with a zero byte": (lambda f: edit_index(f, lambda m: m.update({"x": "\0.safetensors"})), INDEX, "beside"),
    "index with a long name": (
        lambda f: edit_index(f, lambda m: m.update({"x": "x" * 300 + ".safetensors"})), INDEX, "beside"
    ),
    "index names a surrogate": (lambda f: edit_index(f, lambda m: m.update({"x": "\ud800.safetensors"})), INDEX, "beside"),
    "index names a pickle": (lambda f: edit_index(f, lambda m: m.update({"x": "x.bin"})), INDEX, "only those are opened"),
    "index names a number": (lambda f: edit_index(f, lambda m: m.update({"x": 3})), INDEX, "beside the index"),
    "index without a map": (lambda f: (f / INDEX).write_text("{}"), INDEX, "has no weight_map"),
    "index with an empty map": (lambda f: (f / INDEX).write_text('{"weight_map": {}}'), INDEX, "has no weight_map"),
    "index is a list": (lambda f: (f / INDEX).write_text("[]"), INDEX, "expected a JSON object"),
    "index is broken": (lambda f: (f / INDEX).write_text('{"weight_map": '), INDEX, "not valid JSON"),
    "index with a name twice": (lambda f: (f / INDEX).write_text('{"weight_map": {"a": "b", "a": "c"}}'), INDEX, "twice"),
    "no index": (lambda f: (f / INDEX).unlink(), "", "2 safetensors files without"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json", "is missing; fetch it"),
    "config is broken": (lambda f: (f / "config.json").write_text("{'a': 1}"), "config.json", "not valid JSON"),
    "config is empty": (lambda f: (f / "config.json").write_text(""), "config.json", "not valid JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "config.json", "expected a JSON object"),
    "config with a byte order mark": (
        lambda f: (f / "config.json").write_bytes(b"\xef\xbb\xbf{}"), "config.json", "byte order mark"
    ),
    "unfinished": (lambda f: (f / MARKER).write_text("{}"), "", "never finished"),
    "only a pickle": (
        lambda f: ([p.unlink() for p in f.glob("*.safetensors*")], (f / "pytorch_model.bin").write_bytes(b"\x80\x04")),
        "pytorch_model.bin", "pickle checkpoint.*convert it: python -c",
    ),
    "nothing": (lambda f: [p.unlink() for p in f.glob("*.safetensors*")], "", "holds no \\*.safetensors"),
    "shard is a link out": (
        lambda f: ((f / TWO).rename(f.parent / "away"), (f / TWO).symlink_to(f.parent / "away")), TWO, "leads out"
    ),
    "side file is a link out": (lambda f: (f / "t.json").symlink_to("/etc/hostname"), "t.json", "leads out"),
    "side file is a link in a circle": (lambda f: (f / "t.json").symlink_to("t.json"), "t.json", "is missing"),
    "config is a link out": (
        lambda f: ((f / "config.json").rename(f.parent / "c"), (f / "config.json").symlink_to(f.parent / "c")),
        "config.json", "leads out",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_broken_folder(tmp_path: Path, name: str) -> None:
    change, file, says = BAD_FOLDERS[name]
    folder = checkpoint(tmp_path / "m")
    change(folder)
    with pytest.raises(FormatError, match=says) as error:
        Checkpoint.open(folder)
    one_line(error, folder / file)


def test_not_there(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no such folder"):
        Checkpoint.open(tmp_path / "nowhere")
    (tmp_path / "model.safetensors").write_text("x")
    with pytest.raises(FormatError, match="is a file; give the folder"):
        Checkpoint.open(tmp_path / "model.safetensors")


def test_limits(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m")
    with pytest.raises(FormatError, match="more than 5 tensors"):
        Checkpoint.open(folder, max_tensors=5)
    with pytest.raises(FormatError, match="at most 20 are read"):
        Checkpoint.open(folder, max_index=20)


def test_cut_after_opening(tmp_path: Path) -> None:
    found = Checkpoint.open(checkpoint(tmp_path / "m", 1))
    file = tmp_path / "m" / "model.safetensors"
    os.truncate(file, file.stat().st_size - 40)
    last = found.names[-1]
    for call in (lambda: found.read("d.codes"), lambda: list(found.raw("d.codes")), lambda: found.read(last)):
        with pytest.raises(FormatError, match="ends inside tensor"):
            call()


def test_wrong_questions(tmp_path: Path) -> None:
    found = Checkpoint.open(checkpoint(tmp_path / "m"))
    for call in (lambda: found.read("nope"), lambda: found.info("nope"), lambda: list(found.raw("nope"))):
        with pytest.raises(FormatError, match="no tensor 'nope'"):
            call()
    for start, stop in ((-1, 2), (3, 2), (0, 8)):
        with pytest.raises(FormatError, match="has no rows"):
            found.read_rows("a.weight", start, stop)
    with pytest.raises(FormatError, match="has no rows"):
        found.read_rows("c.scale", 0, 1)


def test_header_survives_its_own_printing(tmp_path: Path) -> None:
    for seed in range(5):
        rng = random.Random(seed)
        plan = {
            f"{'é' * rng.randrange(3)}{i}": (
                rng.choice(list(DTYPES.values())),
                tuple(rng.choices(range(4), k=rng.randrange(4))),
            )
            for i in range(20)
        }
        header, ranges = print_header(plan)
        path = tmp_path / f"{seed}.safetensors"
        path.write_bytes(header + bytes(sum(n for _, n in ranges.values())))
        found = read_header(path)
        assert {name: (info.dtype, info.shape) for name, info in found.items()} == plan
        assert {name: (info.begin, info.nbytes) for name, info in found.items()} == ranges
