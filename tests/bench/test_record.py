"""Records: one line there and back, what schema 1 refuses, and files that a crash cut."""

from __future__ import annotations

import json

import pytest

from percard.bench import record
from percard.bench.record import Record, append, cell_key, read
from percard.formats.spec import FormatError

ROW = {"cell_key": "k", "level": "model", "case": "m.model.tg8.d64.b1"}


def test_a_line_comes_back_as_it_went():
    row = Record(**ROW, tokens={"tok_s": 12.5}, latency_us={"samples": [1.0, 2.0]}, quality={"gate": "green"})
    line = row.to_json()
    assert "\n" not in line and "energy" not in json.loads(line)
    assert Record.from_json(line) == row


def test_numbers_that_json_does_not_know_are_null():
    line = Record(
        **ROW, tokens={"tok_s": float("nan"), "vs_fp16": {"same_batch": {"ci95": [1.0, float("inf")]}}}
    ).to_json()
    assert json.loads(line)["tokens"] == {"tok_s": None, "vs_fp16": {"same_batch": {"ci95": [1.0, None]}}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"level": "galaxy"}, "level 'galaxy' is not one of op, layer, model, serve"),
        ({"status": "fine"}, "status 'fine'"),
        ({"quality": {"gate": "amber"}}, "quality.gate 'amber'"),
        ({"tokens": {"tokens_a_second": 3}}, "tokens has unknown keys tokens_a_second"),
        ({"tokens": {"tok_s": 3}, "quality": {"gate": "red"}}, "red gate carries no speed"),
    ],
)
def test_what_a_record_refuses(change, words):
    with pytest.raises(FormatError, match=words):
        Record(**(ROW | change))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "f:3: not JSON"),
        ("[]", "no schema number"),
        ('{"schema": 0}', "older than 1"),
        ('{"schema": 1, "level": "op", "case": "c"}', "cell_key are missing"),
        ('{"schema": 1, "cell_key": "k", "level": "op", "case": "c", "colour": 1}', "unknown keys colour"),
    ],
)
def test_what_the_reader_refuses(line, words):
    with pytest.raises(FormatError, match=words):
        Record.from_json(line, "f:3")


def test_a_newer_schema_is_read_with_a_warning():
    line = json.dumps(ROW | {"schema": 2, "colour": 1, "tokens": {"tok_s": 3, "hue": 2}})
    with pytest.warns(UserWarning, match="colour"):
        assert Record.from_json(line).tokens == {"tok_s": 3, "hue": 2}


def test_rows_are_appended_and_synced(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(record.os, "fsync", lambda fd: synced.append(fd))
    path = tmp_path / "new" / "records.jsonl"
    rows = [Record(**ROW, seconds=float(i)) for i in range(3)]
    for row in rows:
        append(path, row)
    assert list(read(path)) == rows and len(synced) == 3


def test_a_row_that_a_crash_cut_is_dropped(tmp_path):
    path = tmp_path / "records.jsonl"
    first, second = Record(**ROW), Record(**ROW, status="cut")
    append(path, first)
    with path.open("a") as file:
        file.write(second.to_json()[:40])
    assert list(read(path)) == [first]
    append(path, second)
    assert list(read(path)) == [first, second]
    path.write_text(second.to_json()[:40])
    append(path, first)
    assert list(read(path)) == [first]


def test_the_key_of_a_cell_is_its_content():
    key = cell_key(case="c", shape={"batch": 1, "isl": 2})
    assert key == cell_key(shape={"isl": 2, "batch": 1}, case="c") and len(key) == 64
    assert key != cell_key(case="c", shape={"batch": 2, "isl": 2})


def test_the_checkout_is_named():
    code = record.code_section("percard bench model x")
    assert code["command"] == "percard bench model x"
    assert code["git_sha"] is None or len(code["git_sha"]) == 40


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"latency_us": {"samples": "fast"}},
            r"f:3: record .*latency_us.samples is 'fast'; expected a list of numbers",
        ),
        ({"latency_us": {"samples": [1.0, None]}}, "latency_us.samples"),
        ({"latency_us": {"median": True}}, "latency_us.median is True; expected a number"),
        ({"scheme": []}, r"scheme is \[\]; expected an object"),
        ({"tokens": {"vs_fp16": {"same_batch": 3}}}, "tokens.vs_fp16.same_batch is 3; expected an object"),
        ({"tokens": {"vs_fp16": {"same_batch": {"ratio": "2x"}}}}, "same_batch.ratio is '2x'; expected a number"),
        ({"against": [None]}, "against: one is null"),
        ({"against": {"impl": "torch"}}, "against is .*; expected a list of objects"),
        ({"case": 7}, "case is 7; expected a text"),
        ({"quality": {"gate": ["green"]}}, "quality.gate"),
        ({"latency_us": {"median": 3}, "quality": {"gate": "red"}}, "a red gate carries no speed figure"),
    ],
)
def test_wrong_types_are_named(change, words):
    with pytest.raises(FormatError, match=words) as raised:
        Record.from_json(json.dumps(ROW | {"schema": 1} | change), "f:3")
    assert str(raised.value).endswith("remove the row or measure it again")


def test_numbers_that_are_not_finite_are_read_as_not_measured():
    row = Record.from_json(
        '{"schema": 1, "cell_key": "k", "level": "op", "case": "c", "latency_us": {"median": NaN, "lo": 1e999}}'
    )
    assert row.latency_us == {"median": None, "lo": None}


def test_a_file_that_is_not_text_is_named(tmp_path):
    path = tmp_path / "weights.bin"
    path.write_bytes(b"\x80\x81\x00")
    with pytest.raises(FormatError, match=r"weights.bin: not text .*give the JSONL"):
        list(read(path))
