"""Cards are data: rows are checked field by field, one is found by its name or refused, a user's file adds more."""

from __future__ import annotations

import json

import pytest

from percard.bench import card_table
from percard.bench.card import published
from percard.formats.spec import FormatError, QuantSpec

MINE = {
    "id": "mycard-48",
    "name": "My card",
    "arch": "ada",
    "sm": 89,
    "memory_mib": 46068,
    "bandwidth_gbs": 864,
    "bf16_tflops": 119.5,
    "int8_tops": 239,
    "source": "its datasheet",
}


def write(path, data):
    path.write_text(json.dumps(data))
    return path


def test_every_shipped_row_passes_the_checks_of_a_users_file():
    found = card_table.cards()
    assert list(found) == [row["id"] for row in published()] and len(found) >= 15
    h20 = found["h20-96"]
    assert h20.memory == 97_871 * 2**20 and h20.doubtful() and h20.link()[0] == 450e9
    assert h20.rate(QuantSpec.parse("w4a8")) == (296e12, "int8_tops")
    assert h20.rate(QuantSpec.parse("w4a16-g128")) == (148e12, "bf16_tflops")
    assert h20.rate(QuantSpec.parse("fp8-block")) == (296e12, "fp8_tflops")
    assert found["a10-24"].rate(QuantSpec.parse("fp8-dynamic")) is None
    assert not found["h200-141-sxm"].doubtful("bandwidth_gbs") and found["b200-180-sxm"].doubtful("bandwidth_gbs")
    assert "PCIe" in found["rtx-4090"].link()[1]


@pytest.mark.parametrize(
    "name, found",
    [("h20-96", "h20-96"), ("4090", "rtx-4090"), ("NVIDIA GeForce RTX 4090", "rtx-4090"), ("A100", "a100-80-sxm"),
     ("h20 141", "h20-141"), ("L4", "l4-24"), ("l40s", "l40s-48"), ("H200", "h200-141-sxm")],
)  # fmt: skip
def test_a_name_that_means_one_card(name, found):
    assert card_table.find(name, card_table.cards()).id == found


@pytest.mark.parametrize(
    "name, ids",
    [("H20", "h20-96, h20-141"), ("NVIDIA H20", "h20-96, h20-141"),
     ("rtx-pro-6000", "rtx-pro-6000-server, rtx-pro-6000-workstation")],
)  # fmt: skip
def test_an_ambiguous_name_lists_the_ids(name, ids):
    with pytest.raises(FormatError, match=f"ambiguous, it may be {ids}; give one of these"):
        card_table.find(name, card_table.cards())


@pytest.mark.parametrize("name", ["h2", "", "nvidia", "mi300", "h20-97"])
def test_an_unknown_name_lists_what_is_known(name):
    with pytest.raises(FormatError, match=r"no card .*known: a10-24, .*--card-file"):
        card_table.find(name, card_table.cards())


@pytest.mark.parametrize("wrap", [lambda row: row, lambda row: [row], lambda row: {"cards": [row]}])
def test_a_users_file_adds_cards(tmp_path, wrap):
    found = card_table.cards([write(tmp_path / "mine.json", wrap(MINE))])
    card = found["mycard-48"]
    assert len(found) == len(published()) + 1 and card.fp8_tflops is None and card.confidence == "user"
    assert card.memory == 46_068 * 2**20 and "46068 MiB" in card.memory_basis
    assert card_table.find("my card", found) is card
    nominal = {**MINE, "id": "n", "memory_mib": None, "memory_gb": 48, "link_gbs": 25}
    other = card_table.cards([write(tmp_path / "nominal.json", nominal)])["n"]
    assert other.memory == 48e9 and "nominal" in other.memory_basis and other.link() == (25e9, "link_gbs of the row")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"bandwidth_gbs": "864"}, "bandwidth_gbs is '864', expected a number of GB/s"),
        ({"bandwidth_gbs": 864e9}, "bandwidth_gbs is 8.64e+11 GB/s, expected 1 to 100000; is the unit right?"),
        ({"bf16_tflops": float("nan")}, "bf16_tflops is nan, expected a number"),
        ({"int8_tops": True}, "int8_tops is True, expected a number"),
        ({"memory_mib": 46}, "memory_mib is 46 MiB, expected 256 to"),
        ({"memory_mib": None}, "memory_mib is missing; nvidia-smi prints it"),
        ({"source": None}, "source is missing; a card needs id, name, arch, source"),
        ({"arch": "volta"}, "arch is 'volta', expected one of ampere"),
        ({"confidence": "sure"}, "confidence is 'sure', expected one of datasheet"),
        ({"id": "My Card"}, "id 'My Card', expected small letters"),
        ({"id": "all"}, "id 'all'"),
        ({"bandwith_gbs": 1}, "unknown field 'bandwith_gbs'; known: alternatives, arch, bandwidth_gbs"),
        ({"sm": 8.9}, "sm is 8.9, expected a compute capability"),
        ({"unverified": "tdp_w"}, "unverified is 'tdp_w', expected a list of words"),
        ({"alternatives": {"source": [1]}}, "alternatives of 'source', expected a field with a number"),
        ({"alternatives": {"tdp_w": ["x"]}}, "alternatives: tdp_w is 'x'"),
        ({"alternatives": {"tdp_w": 300}}, "expected {field: [values]}"),
        ({"id": "h20-96"}, "the id 'h20-96' is taken"),
        ({"name": 4}, "name is 4, expected words"),
    ],
)
def test_rows_that_are_wrong(tmp_path, change, words):
    file = write(tmp_path / "mine.json", {**MINE, **change})
    with pytest.raises(FormatError) as error:
        card_table.cards([file])
    assert words in str(error.value) and str(error.value).startswith(f"{file}: card 1: ")


def test_files_that_are_no_table(tmp_path):
    with pytest.raises(FormatError, match="not there; --card-file takes"):
        card_table.cards([tmp_path / "none.json"])
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(FormatError, match="not readable as JSON"):
        card_table.cards([tmp_path / "broken.json"])
    for data in ([], {"cards": []}, 3, {"cards": 3}):
        with pytest.raises(FormatError, match="holds no card"):
            card_table.cards([write(tmp_path / "empty.json", data)])
    with pytest.raises(FormatError, match="card 2: is int"):
        card_table.cards([write(tmp_path / "two.json", [MINE, 4])])
    with pytest.raises(FormatError, match="card 2: the id 'mycard-48' is taken"):
        card_table.cards([write(tmp_path / "twice.json", [MINE, MINE])])
