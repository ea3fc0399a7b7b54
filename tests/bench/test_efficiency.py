"""Shares of roofs: what was fitted is found again, what was not is labelled."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from percard.bench import efficiency
from percard.bench.efficiency import Point, Row, find, fit, name, read, save
from percard.formats.spec import FormatError, QuantSpec

CARD = "cpu-planted-2t"


@pytest.fixture(autouse=True)
def nothing_packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of real machines would lend to planted ones."""
    (tmp_path / "none.json").write_text('{"version": 1, "rows": []}')
    monkeypatch.setattr(efficiency, "PACKAGED", tmp_path / "none.json")
    efficiency._known.cache_clear()


def row(of: str, bucket: int, bw: float | None, fl: float | None, card: str = CARD, spread: float = 0.02) -> Row:
    return Row(card, of, bucket, bw, fl, 3, spread, "planted")


def planted(tmp_path: Path, *rows: Row) -> list[Path]:
    save(tmp_path / "e.json", rows)
    return [tmp_path / "e.json"]


def test_a_card_that_nobody_measured_has_labelled_defaults() -> None:
    found = find("no-such-card", "decode.w8a8", 1)
    assert (found.e_bw, found.e_fl, found.basis, found.band) == (0.80, 0.60, "brochure", (-0.50, 0.15))
    assert "default" in found.source


def test_the_very_bucket_is_measured_and_the_others_interpolated(tmp_path: Path) -> None:
    files = planted(tmp_path, row("decode.w8a8", 1, 0.8, None), row("decode.w8a8", 16, 0.4, None))
    one = find(CARD, "decode.w8a8", 1, files)
    assert (one.e_bw, one.basis, one.band) == (0.8, "measured", (-0.10, 0.10))
    assert one.basis_fl == "brochure" and one.e_fl == 0.60
    four = find(CARD, "decode.w8a8", 4, files)
    assert four.e_bw == pytest.approx(0.6) and four.basis == "interpolated" and four.band == (-0.20, 0.20)
    far = find(CARD, "decode.w8a8", 4096, files)
    assert far.e_bw == 0.4 and far.basis == "interpolated" and "M=16" in far.source
    assert four.term("mem") == ("interpolated", (-0.20, 0.20)) and four.term("flop")[0] == "brochure"


def test_another_group_size_of_the_same_bits_is_kin_and_other_bits_are_not(tmp_path: Path) -> None:
    files = planted(tmp_path, row("decode.w4a16-g64", 1, 0.7, None))
    assert find(CARD, "decode.w4a16-g128", 1, files).basis == "interpolated"
    assert find(CARD, "decode.w4a8-g64", 1, files).basis == "brochure"
    assert find(CARD, "prefill.w4a16-g64", 1, files).basis == "brochure"


def test_other_machines_lend_only_to_their_kind(tmp_path: Path) -> None:
    files = planted(
        tmp_path,
        row("decode.w8a8", 1, 0.5, None, "cpu-a"),
        row("decode.w8a8", 1, 0.7, None, "cpu-b"),
        row("decode.w8a8", 1, 0.9, None, "cpu-c"),
    )
    found = find("cpu-new", "decode.w8a8", 1, files)
    assert (found.e_bw, found.basis, found.band) == (0.7, "scaled", (-0.40, 0.40))
    assert find("h20-96", "decode.w8a8", 1, files).basis == "brochure"


def test_a_fit_gives_the_bound_that_the_roofs_say() -> None:
    def point(tokens: int, seconds: float, flops: float) -> Point:
        return Point(CARD, "decode.w8a8", tokens, seconds, 1e9, flops, 1e10, 1e12, "planted")

    # 0.1 s of memory; 1e9 operations take 1 ms, 1e12 take 1 s
    rows = fit([point(1, 0.125, 1e9), point(1, 0.2, 1e9), point(1, 0.16, 1e9), point(512, 2.0, 1e12)])
    assert [(r.bucket, r.e_bw, r.e_fl, r.n) for r in rows] == [(1, 0.625, None, 3), (512, None, 0.5, 1)]
    assert rows[0].spread == pytest.approx(0.28) and rows[1].spread == 0


def test_a_fit_is_found_again_and_its_spread_widens_the_band(tmp_path: Path) -> None:
    save(tmp_path / "e.json", [row("decode.w8a8", 1, 0.5, None, spread=0.28)])
    save(tmp_path / "e.json", [row("prefill.w8a8", 512, None, 0.4)])
    save(tmp_path / "e.json", [row("decode.w8a8", 1, 0.6, None, spread=0.28)])
    assert [(r.of, r.e_bw) for r in read(tmp_path / "e.json")] == [("decode.w8a8", 0.6), ("prefill.w8a8", None)]
    assert find(CARD, "decode.w8a8", 1, [tmp_path / "e.json"]).band == (-0.28, 0.28)


def test_names() -> None:
    assert name("decode", None) == name("decode", "fp32") == "decode.bf16"
    assert name("prefill", QuantSpec.parse("w4a16-g128")) == "prefill.w4a16-g128"
    assert [efficiency.bucket_of(m) for m in (1, 3, 5, 6, 512, 700, 800)] == [1, 4, 4, 8, 512, 512, 1024]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not readable as JSON"),
        ('{"version": 2, "rows": []}', "expected"),
        (json.dumps({"version": 1, "rows": [{"card": "x"}]}), "row 1: expected an object with card, of"),
        (json.dumps({"version": 1, "rows": [vars(row("decode.w8a8", 1, 1.7, None))]}), "is 1.7, expected above 0"),
        (json.dumps({"version": 1, "rows": [vars(row("decode.w8a8", 0, 0.7, None))]}), "bucket 0"),
    ],
)
def test_a_bad_file_is_told_in_a_line(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "e.json"
    path.write_text(text)
    with pytest.raises(FormatError, match=words) as told:
        read(path)
    assert "\n" not in str(told.value)


SHIPPED = efficiency.PACKAGED


def test_the_packaged_file_is_well_formed() -> None:
    assert read(SHIPPED)
    for one in read(SHIPPED):
        assert one.source and one.n >= 1 and efficiency.bucket_of(one.bucket) == one.bucket, one
        assert one.e_bw or one.e_fl, one
