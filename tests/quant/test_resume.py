"""A run that was killed goes on where it was and ends with the bytes of one that was not."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from percard.formats.spec import FormatError
from percard.quant import output, quantize, sequential
from percard.quant.journal import Journal
from percard.quant.recipe import Recipe

Tiny = Callable[..., Path]
DRIVER = Path(__file__).with_name("resume_driver.py")
JOURNAL = ".out.percard-unfinished/.percard-work/journal.jsonl"


def with_text(folder: Path, windows: int = 6, length: int = 32, vocab: int = 96) -> Path:
    """Adds calibration.jsonl of token ids."""
    random = torch.Generator().manual_seed(11)
    ids = torch.randint(0, vocab, (windows, length), generator=random).tolist()
    (folder / "calibration.jsonl").write_text("".join(json.dumps({"ids": row}) + "\n" for row in ids))
    return folder


def drive(folder: Path, tmp_path: Path, *arguments: str) -> tuple[int, int]:
    """(how many runs were killed, how many of them went on with finished units)."""
    (tmp_path / "work" / "whole").mkdir(parents=True)
    (tmp_path / "work" / "killed").mkdir()
    command = [sys.executable, str(DRIVER), str(folder), str(tmp_path / "work"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"killed (\d+) runs, (\d+) went on", done.stdout)
    assert found is not None
    return int(found[1]), int(found[2])


@pytest.mark.parametrize(("method", "spec"), [("rtn", "w4a16-g64"), ("gptq", "w4a16-g64")])
def test_ten_kills(tiny: Tiny, tmp_path: Path, method: str, spec: str) -> None:
    src = with_text(tiny("qwen3_moe", max_position_embeddings=64, num_hidden_layers=3))
    killed, resumed = drive(src, tmp_path, method, spec, "10", "5")
    assert killed == 10 and resumed >= 2


@pytest.mark.full
@pytest.mark.parametrize("method", ["rtn", "gptq", "awq", "smoothquant"])
def test_fifty_kills(tiny: Tiny, tmp_path: Path, method: str) -> None:
    src = with_text(tiny("qwen3_moe", max_position_embeddings=64, num_hidden_layers=4))
    spec = "w8a8" if method == "smoothquant" else "w4a16-g64"
    killed, resumed = drive(src, tmp_path, method, spec, "50", "6")
    assert killed == 50 and resumed >= 10


def recipe(src: Path, **over: object) -> Recipe:
    given = {
        "spec": "w4a16-g64",
        "method": "gptq",
        "calibration": src / "calibration.jsonl",
        "seq_len": 32,
        "samples": 6,
    }
    return Recipe.from_flags(**(given | over))  # type: ignore[arg-type]


def stop_after(monkeypatch: pytest.MonkeyPatch, block: int, error: BaseException) -> None:
    """Lets the next runs end with `error` in a block."""
    true = sequential.Sequential.block

    def block_(self: sequential.Sequential, index: int) -> sequential.Made:
        if index == block:
            raise error
        return true(self, index)

    monkeypatch.setattr(sequential.Sequential, "block", block_)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_error_of_the_machine_keeps_finished_blocks(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    src = with_text(tiny("llama", max_position_embeddings=64, num_hidden_layers=3))
    quantize.run(src, tmp_path / "whole", recipe(src))
    with monkeypatch.context() as patch:
        stop_after(patch, 2, error)
        with pytest.raises(type(error)):
            quantize.run(src, tmp_path / "out", recipe(src))
    assert len((tmp_path / JOURNAL).read_text().splitlines()) == 4  # fingerprint, around the blocks, two blocks
    seen: list[int] = []
    true = sequential.Sequential.block
    with monkeypatch.context() as patch:
        patch.setattr(sequential.Sequential, "block", lambda self, i: (seen.append(i), true(self, i))[1])
        done = quantize.run(src, tmp_path / "out", recipe(src))
    assert seen == [2] and len(done.modules) == 21
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def test_another_recipe_is_refused_and_named_and_fresh_starts_over(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    src = with_text(tiny("llama", max_position_embeddings=64, num_hidden_layers=3))
    with monkeypatch.context() as patch:
        stop_after(patch, 1, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            quantize.run(src, tmp_path / "out", recipe(src))
    with pytest.raises(FileExistsError, match=r"differs from it in the recipe; .* --fresh"):
        quantize.run(src, tmp_path / "out", recipe(src, spec="w4a16-g32"))
    with pytest.raises(FileExistsError, match="differs from it in the calibration text"):
        quantize.run(src, tmp_path / "out", recipe(with_text(src, 5)))
    assert (tmp_path / JOURNAL).exists(), "a refusal must not lose what was finished"
    quantize.run(src, tmp_path / "out", recipe(src, spec="w4a16-g32"), fresh=True)
    assert (tmp_path / "out" / "config.json").exists() and not (tmp_path / JOURNAL).exists()


def test_a_changed_source_is_refused(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src = with_text(tiny("llama", max_position_embeddings=64))
    with monkeypatch.context() as patch:
        stop_after(patch, 1, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            quantize.run(src, tmp_path / "out", recipe(src))
    for path in src.glob("*.safetensors"):
        path.write_bytes(path.read_bytes())
    with pytest.raises(FileExistsError, match="the source's files"):
        quantize.run(src, tmp_path / "out", recipe(src))


def test_activations_that_are_not_the_ones_written_are_refused(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    src = with_text(tiny("llama", max_position_embeddings=64, num_hidden_layers=3))
    with monkeypatch.context() as patch:
        stop_after(patch, 2, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            quantize.run(src, tmp_path / "out", recipe(src))
    spill = (tmp_path / JOURNAL).with_name("act-00002.safetensors")
    data = bytearray(spill.read_bytes())
    data[-1] ^= 1
    spill.write_bytes(data)
    with pytest.raises(FormatError, match="start over with --fresh"):
        quantize.run(src, tmp_path / "out", recipe(src))


def test_what_a_kill_behind_the_last_rename_leaves_is_removed(tmp_path: Path) -> None:
    (tmp_path / "out" / output.WORK).mkdir(parents=True)
    (tmp_path / "out" / "config.json").write_text("{}")
    with pytest.raises(FileExistsError, match="not empty"):
        output.refuse(tmp_path / "src", tmp_path / "out", force=False)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["config.json"]


def test_a_torn_last_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "a" / "journal.jsonl"
    path.parent.mkdir()
    journal = Journal(path, {"recipe": 1})
    journal.add({"unit": "block 0"})
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"unit": "blo')
    assert Journal(path, {"recipe": 1}).entries == [{"unit": "block 0"}] and path.read_bytes() == whole
