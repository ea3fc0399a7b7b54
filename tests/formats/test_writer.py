"""writer.py: the bytes of the library, streams, and folders that are whole or do not load, whenever it is stopped."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from percard.formats import writer as writer_module
from percard.formats.checkpoint import INDEX, MARKER, Checkpoint, Writer
from percard.formats.header import DTYPES
from percard.formats.spec import FormatError

CONFIG = {"model_type": "qwen3", "quantization_config": {"é": [1, 2.5, None]}, "a": 1}


def some_tensors(count: int = 12, seed: int = 0) -> dict[str, torch.Tensor]:
    """Tensors of every dtype, of odd shapes, names out of order."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for i in range(count):
        dtype = list(DTYPES.values())[i % len(DTYPES)]
        shape = tuple(rng.choices((1, 2, 3, 5), k=rng.randrange(4)))
        size = dtype.itemsize * torch.Size(shape).numel()
        high = 2 if dtype == torch.bool else 100
        data = torch.randint(0, high, (size,), generator=generator, dtype=torch.uint8)
        out[f"layers.{rng.randrange(10**6)}.{'é' if i == 3 else 'w'}"] = data.view(dtype).reshape(shape)
    out["zero"] = torch.empty(3, 0)
    return out


def plan_of(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}


def write(dst: Path, tensors: dict[str, torch.Tensor], **options: Any) -> Writer:
    with Writer(dst, plan_of(tensors), **options) as out:
        for name in reversed(list(tensors)):
            out.add(name, tensors[name])
        out.finish(CONFIG)
    return out


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    flat = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*flat)


def test_bytes_are_those_of_the_library(tmp_path: Path) -> None:
    tensors = some_tensors(34)
    write(tmp_path / "ours", tensors)
    save_file(tensors, tmp_path / "theirs.safetensors", {"format": "pt"})
    assert (tmp_path / "ours" / "model.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    assert sorted(p.name for p in (tmp_path / "ours").iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads((tmp_path / "ours" / "config.json").read_text()) == CONFIG
    assert list(json.loads((tmp_path / "ours" / "config.json").read_text())) == list(CONFIG)


def test_shards(tmp_path: Path) -> None:
    tensors = {f"layer.{i}": torch.full((10,), float(i)) for i in range(7)}
    out = write(tmp_path / "m", tensors, max_shard=100)
    names = sorted(p.name for p in (tmp_path / "m").glob("*.safetensors"))
    assert names == [f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)]
    index = json.loads((tmp_path / "m" / INDEX).read_text())
    assert index["metadata"] == {"total_size": 280} and index["weight_map"] == out.shard_of
    for i, name in enumerate(names):
        part = {n: t for n, t in tensors.items() if out.shard_of[n] == name}
        assert list(part) == [f"layer.{j}" for j in range(2 * i, min(2 * i + 2, 7))]
        save_file(part, tmp_path / "theirs", {"format": "pt"})
        assert (tmp_path / "m" / name).read_bytes() == (tmp_path / "theirs").read_bytes()
        assert load_file(tmp_path / "m" / name).keys() == part.keys()
    found = Checkpoint.open(tmp_path / "m")
    assert all(same(found.read(name), t) for name, t in tensors.items())
    assert out.nbytes == sum(p.stat().st_size for p in (tmp_path / "m").glob("*.safetensors"))


def test_a_tensor_larger_than_a_shard_gets_its_own(tmp_path: Path) -> None:
    out = write(tmp_path / "m", {"a": torch.ones(1), "big": torch.ones(100), "c": torch.ones(1)}, max_shard=50)
    assert [out.shard_of[n][6:11] for n in ("a", "big", "c")] == ["00001", "00002", "00003"]


def test_order_of_adding_does_not_show(tmp_path: Path) -> None:
    tensors = some_tensors(20)
    write(tmp_path / "one", tensors, max_shard=60)
    with Writer(tmp_path / "two", plan_of(tensors), max_shard=60) as out:
        for name, t in tensors.items():
            if t.dim() and t.shape[0] > 1:
                for start in range(0, t.shape[0], 2):
                    out.add_rows(name, start, t[start : start + 2])
            else:
                raw = t.reshape(-1).view(torch.uint8).tolist()
                out.add_raw(name, (bytes(raw[i : i + 3]) for i in range(0, len(raw), 3)))
        out.finish(CONFIG)
    files = sorted(p.name for p in (tmp_path / "one").iterdir())
    assert files == sorted(p.name for p in (tmp_path / "two").iterdir())
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_strided_tensors(tmp_path: Path) -> None:
    t = torch.arange(24.0).reshape(4, 6)
    write(tmp_path / "m", {"t": t.t(), "s": t[:, ::2]})
    found = Checkpoint.open(tmp_path / "m")
    assert torch.equal(found.read("t"), t.t()) and torch.equal(found.read("s"), t[:, ::2])


def test_side_files(tmp_path: Path) -> None:
    source = tmp_path / "src"
    write(source, {"w": torch.ones(1)})
    (source / "code").mkdir()
    files = {"tokenizer.json": os.urandom(1000), "code/m.py": b"x = 1\n", "empty": b"", "README.md": b"theirs"}
    for name, data in files.items():
        (source / name).write_bytes(data)
    with Writer(tmp_path / "m", {"w": (torch.float32, (1,))}) as out:
        out.copy_side_files(Checkpoint.open(source))
        out.add("w", torch.ones(1))
        out.finish(CONFIG, {"README.md": b"ours", "notes/report.json": b"{}"})
    for name, data in (files | {"README.md": b"ours", "notes/report.json": b"{}"}).items():
        assert (tmp_path / "m" / name).read_bytes() == data
    assert not (tmp_path / "m" / MARKER).exists()


# -- what is refused ------------------------------------------------------------------------------------------------

PLAN = {"w": (torch.float32, (2, 2)), "v": (torch.int8, (4,))}


@pytest.mark.parametrize(
    ("use", "says"),
    [
        (lambda out: out.add("x", torch.ones(1)), "'x' is not in the plan"),
        (lambda out: out.add("w", torch.ones(2)), "the plan says"),
        (lambda out: out.add("w", torch.ones(2, 2, dtype=torch.float64)), "the plan says"),
        (lambda out: (out.add("w", torch.ones(2, 2)), out.add("w", torch.ones(2, 2))), "added twice"),
        (lambda out: out.add_raw("w", [bytes(15)]), "got 15 bytes, the plan says 16"),
        (lambda out: out.add_raw("w", [bytes(9), bytes(9)]), "gets 18 bytes"),
        (lambda out: out.add_rows("w", 1, torch.ones(1, 2)), "next is byte 0"),
        (lambda out: out.add_rows("w", 0, torch.ones(1, 3)), "the plan says"),
        (lambda out: out.add_rows("w", 0, torch.ones(3, 2)), "gets 24 bytes"),
        (lambda out: (out.add_rows("w", 0, torch.ones(1, 2)), out.add("w", torch.ones(2, 2))), "the plan says"),
        (lambda out: (out.add("w", torch.ones(2, 2)), out.finish({})), "1 planned tensors were not added.*'v'"),
        (lambda out: (fill(out), out.finish({}, {"../x": b""})), "cannot be the name of an extra file"),
        (lambda out: (fill(out), out.finish({}, {"/x": b""})), "cannot be the name of an extra file"),
        (lambda out: (fill(out), out.finish({}, {"config.json": b""})), "cannot be the name of an extra file"),
    ],
)
def test_misuse_is_refused_and_leaves_nothing(tmp_path: Path, use: Callable[[Writer], Any], says: str) -> None:
    with pytest.raises(FormatError, match=says), Writer(tmp_path / "m", PLAN) as out:
        use(out)
    assert list(tmp_path.iterdir()) == []


def fill(out: Writer) -> None:
    out.add("w", torch.ones(2, 2))
    out.add("v", torch.ones(4, dtype=torch.int8))


def test_only_into_a_new_or_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", {"w": torch.ones(1)})
    assert Checkpoint.open(tmp_path / "empty").names == ["w"]
    before = (tmp_path / "empty" / "model.safetensors").read_bytes()
    with pytest.raises(FormatError, match="is not empty; choose a new"):
        write(tmp_path / "empty", {"w": torch.zeros(1)})
    assert (tmp_path / "empty" / "model.safetensors").read_bytes() == before
    (tmp_path / "file").write_text("x")
    with pytest.raises(FormatError, match="is not a folder"):
        write(tmp_path / "file", {"w": torch.zeros(1)})
    assert (tmp_path / "file").read_text() == "x"
    with pytest.raises(FormatError, match="without a tensor"):
        Writer(tmp_path / "new", {})
    with pytest.raises(FormatError, match="cannot be stored"):
        Writer(tmp_path / "new", {"w": (torch.complex128, (1,))})


def test_an_empty_folder_of_the_user_stays(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    with pytest.raises(KeyboardInterrupt), Writer(tmp_path / "m", PLAN) as out:
        out.add("w", torch.ones(2, 2))
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == [tmp_path / "m"] and list((tmp_path / "m").iterdir()) == []


def test_leaving_without_finish_removes_everything(tmp_path: Path) -> None:
    with Writer(tmp_path / "deep" / "m", PLAN) as out:
        fill(out)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FormatError, match="outside of"):
        out.add("w", torch.ones(2, 2))


# -- full disk and sudden death -------------------------------------------------------------------------------------


def whole_run(dst: Path, source: Path) -> None:
    """A run that does everything a writer can do."""
    tensors = {f"w{i}": torch.full((50,), float(i)) for i in range(5)}
    with Writer(dst, plan_of(tensors), max_shard=400) as out:
        for name, t in tensors.items():
            out.add(name, t)
        out.copy_side_files(Checkpoint.open(source))
        out.finish(CONFIG, {"report.json": b"{}"})


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "src"
    write(folder, {"w": torch.ones(1)})
    (folder / "code").mkdir()
    (folder / "code" / "m.py").write_text("x")
    return folder


CALLS = ["pwrite", "fsync", "open"]


def patch_calls(patch: pytest.MonkeyPatch, before: Callable[[], None]) -> None:
    """Call `before` ahead of every system call that a writer makes to change the disk."""

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **options: Any) -> Any:
            before()
            return function(*args, **options)

        return called

    for name in CALLS:
        patch.setattr(writer_module.os, name, wrap(getattr(os, name)))
    for name in ("rename", "unlink", "mkdir"):
        patch.setattr(Path, name, wrap(getattr(Path, name)))


def count_calls(dst: Path, source: Path) -> int:
    """How many such calls a whole run makes."""
    count = 0

    def add() -> None:
        nonlocal count
        count += 1

    with pytest.MonkeyPatch.context() as patch:
        patch_calls(patch, add)
        whole_run(dst, source)
    return count


def test_full_disk_at_every_write(tmp_path: Path, source: Path) -> None:
    """ENOSPC comes out as it is, and nothing is left behind."""
    writes = 0
    while True:
        writes += 1
        left = writes

        def full(fd: int, data: Any, at: int, real: Callable[..., int] = os.pwrite) -> int:
            nonlocal left
            left -= 1
            if left == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(fd, data[: max(1, len(data) // 2)], at)  # short writes are legal, and must be gone on with

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(writer_module.os, "pwrite", full)
            try:
                whole_run(tmp_path / "m", source)
            except OSError as error:
                assert error.errno == errno.ENOSPC
                assert not (tmp_path / "m").exists()
                continue
        break
    assert writes > 10
    assert torch.equal(Checkpoint.open(tmp_path / "m").read("w4"), torch.full((50,), 4.0))


def check_after_death(dst: Path, source: Path) -> str:
    """Whatever is there: it is whole, or it does not load; and after cleaning up the next run succeeds."""
    state = "none" if not dst.exists() else "whole"
    if (dst / "config.json").exists():  # it looks finished to any reader, so all of it must be there
        for i in range(5):
            names = list(dst.glob("*.safetensors"))
            assert len(names) == 3
            assert any(f"w{i}" in load_file(name) for name in names)
        assert (dst / INDEX).exists() and (dst / "report.json").exists() and (dst / "code" / "m.py").exists()
    elif dst.exists():
        state = "unfinished"
        with pytest.raises(FormatError):
            Checkpoint.open(dst)
    if (dst / MARKER).exists():
        with pytest.raises(FormatError, match="never finished"):
            Checkpoint.open(dst)
        with pytest.raises(FormatError, match="clean_unfinished first"):
            whole_run(dst, source)
    if state != "whole" or (dst / MARKER).exists():
        Writer.clean_unfinished(dst)
        assert not dst.exists() or list(dst.iterdir()) == []
        whole_run(dst, source)
    assert len(Checkpoint.open(dst).names) == 5
    assert not Writer.clean_unfinished(dst)
    return state


def test_killed_before_any_call(tmp_path: Path, source: Path) -> None:
    """A child dies (as by kill -9) ahead of its n-th change of the disk, for every n."""
    calls = count_calls(tmp_path / "count", source)
    assert calls > 50
    states = set()
    for n in range(1, calls + 1):
        dst = tmp_path / f"m{n}"
        pid = os.fork()
        if pid == 0:  # the child: no assertion, no way back into pytest
            left = n

            def die() -> None:
                nonlocal left
                left -= 1
                if left == 0:
                    os._exit(9)

            try:
                patch_calls(pytest.MonkeyPatch(), die)
                whole_run(dst, source)
            finally:
                os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
        states.add(check_after_death(dst, source))
    assert states == {"none", "unfinished", "whole"}


RUN = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from test_writer import whole_run
print("ready", flush=True)
while True:
    whole_run(Path(sys.argv[1]), Path(sys.argv[2]))
    import shutil; shutil.rmtree(sys.argv[1])
"""


@pytest.mark.full
def test_killed_at_random_times(tmp_path: Path, source: Path) -> None:
    """The same by SIGKILL from outside. A run that was being deleted by this loop itself also counts as unfinished."""
    rng = random.Random(5)
    for n in range(20):
        dst = tmp_path / f"m{n}"
        child = subprocess.Popen(
            [sys.executable, "-c", RUN, str(dst), str(source), str(Path(__file__).parent)], stdout=subprocess.PIPE
        )
        assert child.stdout is not None and child.stdout.readline() == b"ready\n"
        time.sleep(rng.uniform(0, 0.05))
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        if (dst / MARKER).exists():
            assert Writer.clean_unfinished(dst)
            whole_run(dst, source)
            assert len(Checkpoint.open(dst).names) == 5


def test_clean_unfinished_removes_only_what_was_written(tmp_path: Path, source: Path) -> None:
    dst = tmp_path / "m"
    dst.mkdir()
    out = Writer(dst, PLAN)
    out.__enter__()
    out.add("w", torch.ones(2, 2))
    out.copy_side_files(Checkpoint.open(source))
    for shard in out._shards.values():
        shard.close()  # as if the process had died here
    (dst / "mine.txt").write_text("of the user")
    assert Writer.clean_unfinished(dst)
    assert [p.name for p in dst.iterdir()] == ["mine.txt"]
    assert not Writer.clean_unfinished(dst)
    assert not Writer.clean_unfinished(tmp_path / "nowhere")


@pytest.mark.parametrize("files", [["../victim"], ["/etc/x"], ["a/../../victim"], [3], "x"])
def test_a_marker_cannot_reach_out(tmp_path: Path, files: Any) -> None:
    (tmp_path / "victim").write_text("x")
    dst = tmp_path / "m"
    dst.mkdir()
    (dst / MARKER).write_text(json.dumps({"files": files, "made_folder": True}))
    with pytest.raises(FormatError, match="not a marker of percard"):
        Writer.clean_unfinished(dst)
    assert (tmp_path / "victim").exists()


def test_a_marker_does_not_follow_links(tmp_path: Path) -> None:
    (tmp_path / "away").mkdir()
    (tmp_path / "away" / "victim").write_text("x")
    dst = tmp_path / "m"
    dst.mkdir()
    (dst / "sub").symlink_to(tmp_path / "away")
    (dst / MARKER).write_text(json.dumps({"files": ["sub/victim"], "made_folder": False}))
    assert Writer.clean_unfinished(dst)
    assert (tmp_path / "away" / "victim").exists()


def test_a_second_writer_goes_on_where_the_first_stopped(tmp_path):
    tensors = {f"t{i}": torch.randn(40, 8) for i in range(6)}
    plan = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}

    def write(folder, names, resume, finish):
        with Writer(folder, plan, max_shard=3000, resume=resume) as writer:
            for name in names:
                writer.add(name, tensors[name])
            writer.sync()
            if finish:
                writer.finish({"a": 1})

    write(tmp_path / "whole", tensors, None, True)
    write(tmp_path / "parts", ["t1", "t4", "t5"], (), False)
    assert (tmp_path / "parts" / MARKER).exists() and not (tmp_path / "parts" / "config.json").exists()
    # t5 was written but nobody noted it: it is written again, also into a shard that was complete
    write(tmp_path / "parts", ["t0", "t2", "t3", "t5"], ["t1", "t4"], True)
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "parts" / path.name).read_bytes(), path.name
    assert sorted(p.name for p in (tmp_path / "whole").iterdir()) == sorted(
        p.name for p in (tmp_path / "parts").iterdir()
    )


def test_tensors_that_are_gone_are_not_resumed(tmp_path):
    plan = {"a": (torch.float32, (4,)), "b": (torch.float32, (4,))}
    with Writer(tmp_path / "out", plan, resume=()) as writer:
        writer.add("a", torch.ones(4))
    (tmp_path / "out" / "model.safetensors.tmp").unlink()
    with (
        pytest.raises(FormatError, match="are gone; start over with --fresh"),
        Writer(tmp_path / "out", plan, resume=["a"]),
    ):
        pass
