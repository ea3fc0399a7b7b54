"""accepts.json: whole, without contradiction, and about the containers that we write."""

from __future__ import annotations

import re

import pytest

from percard.formats import compressed_tensors as ct
from percard.formats.accepts import VERDICTS, lookup, rows
from percard.formats.spec import FormatError, QuantSpec


def test_rows_are_well_formed() -> None:
    for row in rows():
        assert row.verdict in VERDICTS and row.modules in ("dense", "experts") and row.checked in ("run", "read")
        assert re.fullmatch(r"==\d+(\.\d+)+(\.\*)?", row.versions)
        assert re.fullmatch(r"[a-z-]+:[\w./-]+\.py", row.source)
        assert row.needs is None or re.fullmatch(r"sm_\d+", row.needs)
        assert row.reason or row.verdict in ("runs", "decompresses"), (
            f"{row.engine} {row.specs}: a verdict wants its reason"
        )
        for name in row.specs:
            spec = QuantSpec.parse(name)
            assert str(spec) == name and ct.container(spec) == row.container


def test_no_two_rows_for_one_question() -> None:
    seen = [(row.engine, row.versions, row.modules, name) for row in rows() for name in row.specs]
    assert len(seen) == len(set(seen))


def test_lookup() -> None:
    spec = QuantSpec.parse("w4a16-g128")
    found = lookup("vllm", "0.33.0", spec)
    assert found is not None and found.verdict == "runs" and found.needs == "sm_75"
    assert lookup("vllm", "0.34.0", spec) is None and lookup("vllm", "0.3", spec) is None
    assert lookup("sglang", "0.5.23", QuantSpec.parse("w3a16-g64")).verdict == "refused"
    assert lookup("transformers", "5.17.0", QuantSpec.parse("w8a8"), "experts").verdict == "refused"
    with pytest.raises(FormatError, match=r"unknown engine .tgi.; .* knows sglang, transformers, vllm"):
        lookup("tgi", "1", spec)
