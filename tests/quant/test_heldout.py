"""The held-out text: read as the bench reads it, and told from the text that was calibrated on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from percard.bench import quality
from percard.formats.spec import FormatError
from percard.quant import heldout, text

TRAINED = Path(__file__).resolve().parents[2] / "examples" / "tiny-qwen3"


def read(path: Path, tokens: int | None = None, window: int = 64) -> heldout.HeldOut:
    return heldout.read(path, TRAINED, 4096, window, tokens)


def calibrated(source: Path | None, **over: Any) -> tuple[dict[str, Any], torch.Tensor]:
    """What a report says about a calibration text, and its windows."""
    found = text.windows(text.Calibration(None if source is None else str(source), 64, 64, 0), TRAINED, 4096, 512)
    return {**found.facts, **over}, found.ids


def test_ids_are_those_of_the_bench(tmp_path: Path) -> None:
    path = tmp_path / "held.txt"
    path.write_text((TRAINED / "heldout.txt").read_text()[:3000])
    found = read(path)
    assert torch.equal(found.ids, quality.read_ids(path, TRAINED))
    assert [p.tolist() for p in found.pieces] == [p.tolist() for p in quality.windows(found.ids, 64)]
    assert len(read(path, tokens=65).ids) == 65 and len(read(path, tokens=65).pieces) == 1
    assert found.name == "held.txt" and len(found.sha256) == 64
    lines = tmp_path / "held.jsonl"
    lines.write_text(json.dumps({"text": path.read_text()}) + "\n")
    assert torch.equal(read(lines).ids, found.ids) and read(lines).sha256 != found.sha256


def test_files_that_are_no_text(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"nowhere\.txt: held-out text is not there"):
        read(tmp_path / "nowhere.txt")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(FormatError, match=r"empty\.txt: 0 tokens; at least 2"):
        read(tmp_path / "empty.txt")
    (tmp_path / "odd.txt").write_bytes(b"a\xff\xfe")
    with pytest.raises(FormatError, match="UTF-8"):
        read(tmp_path / "odd.txt")
    with pytest.raises(FormatError, match="belongs to another model"):
        heldout.read(TRAINED / "heldout.txt", TRAINED, 10, 64)


def test_the_calibration_text_is_flagged_by_its_hash_or_its_tokens(tmp_path: Path) -> None:
    whole = (TRAINED / "heldout.txt").read_text()
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    one.write_text(whole[:4000])
    two.write_text(whole[4000:8000])
    facts, ids = calibrated(one)
    flag, warning = heldout.compare(read(one), facts, None, TRAINED)
    assert "one.txt: the text is the calibration text (its sha256" in flag and not warning
    assert heldout.compare(read(two), facts, ids, TRAINED) == ("", "")
    assert heldout.compare(read(two), facts, None, TRAINED) == ("", "")  # read again from where it lies
    assert heldout.compare(read(two), {}, None, TRAINED) == ("", "")
    copy = tmp_path / "copy.txt"
    copy.write_text(whole[:4000] + " ")
    flag, _ = heldout.compare(read(copy), facts, None, TRAINED)
    assert "of it occur in the calibration windows" in flag
    mixed = tmp_path / "mixed.txt"
    mixed.write_text(whole[4000:9000] + whole[:600])
    flag, warning = heldout.compare(read(mixed), facts, ids, TRAINED)
    assert not flag and "the figures flatter" in warning


def test_a_calibration_text_that_is_gone_is_said(tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_text((TRAINED / "heldout.txt").read_text()[:4000])
    facts, _ = calibrated(path)
    path.unlink()
    flag, warning = heldout.compare(read(TRAINED / "heldout.txt", 200), facts, None, TRAINED)
    assert not flag and "could not be seen" in warning and "one.txt" in warning
    built_in, _ = calibrated(None)
    assert heldout.compare(read(TRAINED / "heldout.txt", 200), built_in, None, TRAINED) == ("", "")
