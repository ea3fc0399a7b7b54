"""percard_kv.json and percard_kv.safetensors: there and back, and every damage refused in a line."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from percard.formats import kv_layers
from percard.formats.checkpoint import Checkpoint
from percard.formats.kv_layers import LAYERS, OFFSETS, KVLayers
from percard.formats.kvcache import BF16, KVSpec
from percard.formats.spec import FormatError

INT8, INT4 = KVSpec.parse("int8"), KVSpec.parse("int4")
CONFIG = '{"model_type": "qwen3", "hidden_size": 64}'
MU = torch.arange(64.0).view(2, 32) - 0.1


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(CONFIG)
    save_file({"w": torch.zeros(2)}, str(tmp_path / "weights.safetensors"))
    return tmp_path


def layers() -> KVLayers:
    return KVLayers((BF16, INT8, INT4), (None, None, MU), 2, 32, {"text": "t.txt", "kl": 0.25})


def test_there_and_back(folder):
    paths = layers().save(folder)
    assert [path.name for path in paths] == [LAYERS, OFFSETS]
    found = KVLayers.load(folder, layers=3, kv_heads=2, head_dim=32)
    assert found.specs == (BF16, INT8, INT4) and found.calibration == {"text": "t.txt", "kl": 0.25}
    assert found.mu[:2] == (None, None) and torch.equal(found.mu[2], MU)
    assert found.name == "1 bf16 + 1 int8 + 1 int4"
    # 2 heads of 32: 128 bytes in bf16, 64 + 4 in int8, 16 + 16 + 8 in int4, each times 2
    assert found.bytes_per_token() == 2 * (128 + 68 + 40)
    assert found.bytes_per_token(torch.float32) == 2 * (256 + 68 + 40)
    assert torch.equal(load_file(str(folder / OFFSETS))["layers.2.mu"], MU)
    assert (folder / "config.json").read_text() == CONFIG
    assert not list(folder.glob("*.tmp"))


def test_without_any_offset(folder):
    KVLayers((INT8, INT8), (None, None), 2, 32).save(folder)
    assert KVLayers.load(folder).mu == (None, None) and load_file(str(folder / OFFSETS)) == {}


def test_a_checkpoint_does_not_see_them(folder):
    before = Checkpoint.open(folder)
    layers().save(folder)
    found = Checkpoint.open(folder)  # one file of weights without an index stays one
    assert (found.names, found.side_files, found.skipped) == (before.names, before.side_files, before.skipped)


def test_what_does_not_fit_is_not_made():
    for specs, mu, words in (
        ((INT8,), (None, None), "1 layers with 2 offsets"),
        ((), (), "at least one"),
        ((BF16,), (MU,), "layer 0 is bf16 and has an offset"),
        ((INT8,), (MU[:, :16],), r"expected float32 \(2, 32\)"),
        ((INT8,), (MU.double(),), "torch.float64"),
        ((INT8,), (MU / 0,), "NaN or Inf"),
    ):
        with pytest.raises(FormatError, match=words):
            KVLayers(specs, mu, 2, 32)


def test_nothing_is_replaced_unasked(folder):
    layers().save(folder)
    with pytest.raises(FormatError, match=r"percard_kv.json: is there already; --force"):
        layers().save(folder)
    KVLayers((INT8,), (None,), 2, 32).save(folder, force=True)
    assert KVLayers.load(folder).specs == (INT8,)


def test_a_failed_write_leaves_what_was_there(folder, monkeypatch):
    layers().save(folder)
    old = (folder / LAYERS).read_bytes()

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        KVLayers((INT8,), (None,), 2, 32).save(folder, force=True)
    assert (folder / LAYERS).read_bytes() == old and not list(folder.glob("*.tmp"))
    assert KVLayers.load(folder).specs == (BF16, INT8, INT4)


def test_half_of_a_new_pair_is_refused(folder, monkeypatch):
    layers().save(folder)
    write = kv_layers._write

    def killed(path, data):
        if path.name == LAYERS:
            raise KeyboardInterrupt
        write(path, data)

    monkeypatch.setattr(kv_layers, "_write", killed)
    with pytest.raises(KeyboardInterrupt):
        KVLayers((INT4, INT8, INT4), (MU + 1, None, MU), 2, 32).save(folder, force=True)
    with pytest.raises(FormatError, match=r"is not the file that percard_kv.json was written with"):
        KVLayers.load(folder)


def test_another_model_is_refused(folder):
    layers().save(folder)
    for wrong, words in (
        ({"layers": 4}, "holds 3 layers, the model has 4"),
        ({"kv_heads": 4}, "kv_heads is 2, expected 4"),
        ({"head_dim": 64}, "head_dim is 32, expected 64"),
    ):
        with pytest.raises(FormatError, match=words):
            KVLayers.load(folder, **wrong)
    (folder / "config.json").write_text(CONFIG.replace("64", "128"))
    with pytest.raises(FormatError, match=r"another config.json; run percard calibrate-kv again"):
        KVLayers.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FormatError, match=r"config.json: is missing"):
        KVLayers.load(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema": 2}, "schema 2, this percard reads 1"),
        ({"schema": True}, "schema True"),
        ({"schema": None}, "schema None"),
        ({"kv_heads": "2"}, "kv_heads is '2'"),
        ({"head_dim": 0}, "head_dim is 0"),
        ({"layers": []}, "layers is not a list"),
        ({"layers": [{"spec": "int8"}]}, "layers is not a list"),
        ({"layers": [{"spec": "int3", "offset": False}] * 2 + [{"spec": "int4", "offset": True}]}, "'int3' is not one"),
        ({"layers": [{"spec": "bf16", "offset": False}] * 2 + [{"spec": "bf16", "offset": True}]}, "rounded need none"),
        ({"layers": [{"spec": "int4", "offset": True}] * 3}, "lacks 'layers.0.mu'"),
        ({"layers": [{"spec": "int4", "offset": False}] * 3}, "holds 'layers.2.mu'"),
        ({"offsets_sha256": "0" * 64}, "is not the file"),
        ({"calibration": [1]}, "calibration is a list"),
    ],
)
def test_a_damaged_json(folder, change, words):
    path, _ = layers().save(folder)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(FormatError, match=words) as error:
        KVLayers.load(folder)
    assert str(folder) in str(error.value) and "calibrate-kv" in str(error.value)


def test_damaged_files(folder):
    path, offsets = layers().save(folder)
    good = offsets.read_bytes()
    offsets.write_bytes(good[:-1] + b"\x01")
    with pytest.raises(FormatError, match="is not the file"):
        KVLayers.load(folder)
    offsets.unlink()
    with pytest.raises(FormatError, match="safetensors: is missing"):
        KVLayers.load(folder)
    offsets.mkdir()
    with pytest.raises(FormatError, match="not a file"):
        KVLayers.load(folder)
    path.write_text("{")
    with pytest.raises(FormatError, match="not valid JSON"):
        KVLayers.load(folder)
    path.unlink()
    with pytest.raises(FormatError, match=r"percard calibrate-kv .* --text F writes it"):
        KVLayers.load(folder)


def test_offsets_of_another_shape_or_no_numbers(folder):
    """A file whose hash is right, as a hand that edits both would make it."""
    import hashlib

    path, offsets = layers().save(folder)
    said = json.loads(path.read_text())
    for tensor, words in (
        (MU[:1].contiguous(), r"expected float32 \(2, 32\)"),
        (MU.half(), "float16"),
        (MU / 0, "NaN or Inf"),
    ):
        save_file({"layers.2.mu": tensor}, str(offsets))
        path.write_text(json.dumps(said | {"offsets_sha256": hashlib.sha256(offsets.read_bytes()).hexdigest()}))
        with pytest.raises(FormatError, match=words):
            KVLayers.load(folder)
    offsets.write_bytes(struct.pack("<Q", 1 << 40) + b"{}")
    path.write_text(json.dumps(said | {"offsets_sha256": hashlib.sha256(offsets.read_bytes()).hexdigest()}))
    with pytest.raises(FormatError, match="not a safetensors file"):
        KVLayers.load(folder)
