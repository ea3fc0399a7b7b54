"""Calibration text: every kind of source, the cutting, the choice by seed, and what is refused with which words."""

from __future__ import annotations

import json
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import FrozenInstanceError
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from percard.bench.quality import read_ids
from percard.formats.spec import FormatError
from percard.quant import sources
from percard.quant import text as texts
from percard.quant.text import Calibration, Windows, overlap, windows

BOS, VOCAB = 256, 258  # bytes, <s>, <m>
TEMPLATE = (
    "{% for m in messages %}<m>{{ m.role }}:{{ m.content }}{% if m.role == 'odd' %}{{ raise_exception('who is\nodd') }}"
    "{% endif %}{% endfor %}{% if tools %}{{ tools | length }} tools{% endif %}"
)


def byte_tokenizer() -> Tokenizer:
    """One token per byte, <s> before every text: what it does to a text can be said by hand."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "<m>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE})
    )
    return folder


@pytest.fixture
def lines(tmp_path: Path) -> Callable[..., str]:
    """`lines({"text": ..}, "raw line", ..)` -> path of a JSONL file."""

    def write(*entries: Any, name: str = "c.jsonl") -> str:
        text = "".join((e if isinstance(e, str) else json.dumps(e)) + "\n" for e in entries)
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write


@pytest.fixture
def words(tmp_path: Path) -> Callable[..., str]:
    """`words(b"..")` -> path of a plain file."""

    def write(data: bytes, name: str = "c.txt") -> str:
        (tmp_path / name).write_bytes(data)
        return str(tmp_path / name)

    return write


def cut(model: Path, source: str | None, samples: int = 256, seq_len: int = 8, seed: int = 0, **more: Any) -> Windows:
    vocab, positions = more.pop("vocab", VOCAB), more.pop("positions", None)
    return windows(Calibration(source, samples, seq_len, seed), model, vocab, positions, **more)


def spell(model: Path, ids: torch.Tensor) -> str:
    return Tokenizer.from_file(str(model / "tokenizer.json")).decode(ids.tolist(), skip_special_tokens=False)


def refused(model: Path, source: str | None, *parts: str, **more: Any) -> None:
    """FormatError of one line with all of `parts` in it."""
    with pytest.raises(FormatError) as caught:
        cut(model, source, **more)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


# --- cutting and choosing ---------------------------------------------------------------------------------------------


def test_documents_lie_end_to_end_without_padding(model: Path, lines: Callable[..., str]) -> None:
    source = lines({"text": "abcde"}, "", {"text": ""}, {"text": "fghijklmno", "other": 1})
    found = cut(model, source)
    assert found.ids.dtype == torch.int64 and found.ids.shape == (2, 8)
    stream = "".join(spell(model, row) for row in found.ids)
    assert stream == "<s>abcde<s>fghijklmn"
    facts = found.facts
    assert (facts["documents"], facts["documents_empty"], facts["tokens"]) == (2, 1, 17)
    assert (facts["windows_found"], facts["windows_used"], facts["window"]) == (2, 2, 8)
    assert (facts["shortest"], facts["longest"]) == (6, 11)
    assert facts["dropped"] == round(1 - 16 / 17, 4)
    assert facts["documents_split"] == 0.5
    assert facts["template"] is False and facts["read"] == "all"


def test_plain_text_gives_the_ids_that_the_gate_reads(model: Path, words: Callable[..., str]) -> None:
    source = words("erste Zeile, größer\r\nzweite\n\n  dritte Zeile 漢字\n".encode())
    found = cut(model, source, seq_len=5)
    assert found.ids.flatten().equal(read_ids(source, model)[: found.ids.numel()])
    assert found.facts["documents"] == 1
    assert found.facts["sha256"] == sha256(Path(source).read_bytes()).hexdigest()
    assert found.facts["sha256_of"] == "file"


@pytest.mark.parametrize("piece", [1, 2, 3, 5, 16])
def test_a_long_text_read_in_parts_gives_the_same_ids(
    model: Path, words: Callable[..., str], lines: Callable[..., str], monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    text = "日本語の文章、ñandú 🙂🙂🙂 end\nsecond line\n\nand a third one without an end" * 3
    as_file, as_line = words(text.encode()), lines({"text": text})
    whole = cut(model, as_file), cut(model, as_line)
    monkeypatch.setattr(sources, "PIECE", piece)
    parts = cut(model, as_file), cut(model, as_line)
    for before, after in zip(whole, parts, strict=True):
        assert after.ids.equal(before.ids) and after.facts == before.facts
    assert whole[0].ids.equal(whole[1].ids)


def test_equal_input_gives_equal_ids_and_the_seed_chooses(model: Path, lines: Callable[..., str]) -> None:
    source = lines({"text": " ".join(f"{i:07d}" for i in range(100))[:799]})
    first, again, other = (cut(model, source, samples=30, seed=seed) for seed in (1, 1, 2))
    assert first.ids.equal(again.ids) and first.sha256 == again.sha256 and first.facts == again.facts
    assert not first.ids.equal(other.ids) and first.sha256 != other.sha256
    all_of_it = cut(model, source, samples=100)
    assert len(all_of_it.ids) == 100 and len(first.ids) == 30
    place = {tuple(row): i for i, row in reversed(list(enumerate(all_of_it.ids.tolist())))}
    chosen = [place[tuple(row)] for row in first.ids.tolist()]
    assert len(set(chosen)) == 30
    assert texts._choose(100, 30, 1) == sorted(texts._choose(100, 30, 1))
    assert first.facts["notes"] == []


def test_the_choice_is_even_and_stays_what_it_was() -> None:
    assert texts._choose(12, 4, 0) == [4, 7, 9, 10] and texts._choose(12, 4, 1) == [4, 7, 8, 11]
    counts = Counter(i for seed in range(400) for i in texts._choose(20, 5, seed))
    assert sum(counts.values()) == 2000 and len(counts) == 20
    assert all(60 < n < 140 for n in counts.values())  # 100 +- 4.6 standard deviations


def test_reading_stops_when_the_seed_has_enough_to_choose_from(model: Path, lines: Callable[..., str]) -> None:
    rows = [{"text": f"{i:07d}"} for i in range(40)]
    whole, broken = lines(*rows, name="a.jsonl"), lines(*rows, "this is never read", name="b.jsonl")
    found = cut(model, broken, samples=2)
    assert found.facts["windows_found"] == 8 == texts.READ_AHEAD * 2 and found.facts["read"] == "front"
    assert found.facts["documents"] == 8 and found.facts["tokens"] == 64 and found.facts["windows_used"] == 2
    assert found.ids.equal(cut(model, whole, samples=2).ids)
    assert found.facts["sha256"] == sha256(Path(broken).read_bytes()).hexdigest()  # a small file is hashed whole


def test_a_very_large_file_is_hashed_as_far_as_it_was_read(
    model: Path, lines: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = lines(*({"text": f"{i:07d}"} for i in range(40)))
    monkeypatch.setattr(sources, "HASH_WHOLE", 100)
    facts = cut(model, source, samples=2).facts
    front = Path(source).read_bytes()[: 8 * len('{"text": "0000000"}\n')]
    assert facts["sha256"] == sha256(front).hexdigest() and facts["sha256_of"] == f"first {len(front)} bytes"


def test_fewer_windows_than_asked_are_noted(model: Path, lines: Callable[..., str]) -> None:
    facts = cut(model, lines({"text": "x" * 20}), samples=5).facts
    assert facts["windows_used"] == 2
    assert any("5 windows asked for, the text has 2" in note for note in facts["notes"])
    assert any("another seed gives the same" in note for note in facts["notes"])


def test_seq_len_above_positions_is_cut_or_refused(model: Path, lines: Callable[..., str]) -> None:
    source = lines({"text": "x" * 50})
    found = cut(model, source, seq_len=64, positions=16)
    assert found.ids.shape == (3, 16)
    assert "seq_len 64 cut to the model's 16 positions" in found.facts["notes"]
    refused(model, source, "seq_len 64", "16 positions", seq_len=64, positions=16, strict=True)
    assert cut(model, source, seq_len=16, positions=16, strict=True).ids.shape == (3, 16)


def test_the_records_are_frozen_and_facts_are_json(model: Path, lines: Callable[..., str]) -> None:
    found = cut(model, lines({"text": "x" * 50}))
    assert json.loads(json.dumps(found.facts)) == found.facts
    with pytest.raises(FrozenInstanceError):
        found.sha256 = ""  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        Calibration().samples = 1  # type: ignore[misc]
    for wrong in ({"samples": 0}, {"seq_len": 1}, {"seed": -1}):
        with pytest.raises(FormatError, match=r"calibration\.\w+ is -?\d, it must be at least"):
            Calibration(**wrong)


def test_limits_that_were_saved_with_a_tokenizer_do_not_count(tmp_path: Path, lines: Callable[..., str]) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=200)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert cut(tmp_path, lines({"text": "x" * 30})).facts["tokens"] == 31


# --- the kinds of documents -------------------------------------------------------------------------------------------


def test_lines_of_ids_of_one_length_are_the_windows(tmp_path: Path, lines: Callable[..., str]) -> None:
    rows = [[i, i + 1, i + 2] for i in range(9)]
    source = lines(*({"ids": row} for row in rows))
    found = cut(tmp_path, source)  # no tokenizer.json there: none is needed
    assert found.ids.tolist() == rows and found.facts["window"] == 3 and found.facts["dropped"] == 0
    fewer = cut(tmp_path, source, samples=2).ids.tolist()
    assert fewer == [rows[i] for i in texts._choose(8, 2, 0)]
    assert cut(tmp_path, source, seq_len=2).ids.tolist() == torch.tensor(rows).flatten()[:26].reshape(13, 2).tolist()


def test_ids_of_several_lengths_are_documents(tmp_path: Path, lines: Callable[..., str]) -> None:
    found = cut(tmp_path, lines({"ids": [1, 2, 3]}, {"ids": [4, 5]}, {"ids": [6, 7, 8, 9]}), seq_len=4)
    assert found.ids.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert found.facts["scripts"] == {} and found.facts["documents"] == 3


def test_messages_go_through_the_chat_template(model: Path, lines: Callable[..., str]) -> None:
    chat = [{"role": "user", "content": "hi"}, {"role": "bot", "content": [{"type": "text", "text": "yo"}]}]
    source = lines({"messages": chat, "text": "not this"}, {"messages": chat[:1], "tools": [{"name": "f"}]})
    found = cut(model, source, seq_len=16)
    stream = "<m>user:hi<m>bot:yo<m>user:hi1 tools"
    assert spell(model, found.ids.flatten()) == stream[: len(spell(model, found.ids.flatten()))]
    assert found.facts["tokens"] == len(stream) - 2 * 3 and BOS not in found.ids  # <m> is one token of three letters
    assert found.facts["template"] is True
    refused(model, lines({"messages": [{"role": "odd", "content": ""}]}), "line 1", "template refuses", "who is odd")


def test_messages_without_transformers_or_template(
    model: Path, tmp_path: Path, lines: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = lines({"messages": [{"role": "user", "content": "hi"}]})
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    refused(tmp_path, source, "c.jsonl: line 1", "no chat template", '{"text": ...}')
    monkeypatch.setitem(sys.modules, "transformers", None)
    refused(model, source, "c.jsonl: line 1", "pip install 'percard[quant]'")


@pytest.mark.parametrize("split", ["", ":validation"])
def test_rows_of_a_data_set(model: Path, monkeypatch: pytest.MonkeyPatch, split: str) -> None:
    asked: list[tuple[str, str, bool]] = []

    def load_dataset(name: str, *, split: str, streaming: bool) -> Iterator[dict[str, Any]]:
        asked.append((name, split, streaming))
        yield from ({"text": f"row {i:05d}", "url": "u", "messages": None} for i in range(10**9))

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    found = cut(model, f"hf:org/name{split}", samples=3, seq_len=10)
    assert asked == [("org/name", split[1:] or "train", True)]
    assert found.ids.shape == (3, 10) and spell(model, found.ids[0])[:8] == "<s>row 0"
    assert found.facts["documents"] == 12 and found.facts["sha256_of"] == "first 12 rows"
    assert found.facts["source"] == f"hf:org/name{split}"
    assert cut(model, f"hf:org/name{split}", samples=3, seq_len=10).facts == found.facts


def test_data_sets_that_cannot_be_read(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused(model, "hf:name", "pip install datasets")
    refused(model, "hf:", "no name")

    def broken(*_: Any, **__: Any) -> Iterator[dict[str, Any]]:
        yield {"text": "fine"}
        raise OSError("the\nline fell")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=broken))
    refused(model, "hf:name", "hf:name: row 2", "the line fell")
    for rows, part in (([], "no rows"), ([{"prompt": "x"}], "keys 'prompt'"), ([{"text": None}], "NoneType")):
        source = types.SimpleNamespace(load_dataset=lambda *_, rows=rows, **__: rows)
        monkeypatch.setitem(sys.modules, "datasets", source)
        refused(model, "hf:name", part)
    failing = types.SimpleNamespace(load_dataset=lambda *_, **__: (_ for _ in ()).throw(ValueError("no such set")))
    monkeypatch.setitem(sys.modules, "datasets", failing)
    refused(model, "hf:name", "no such set")


def test_the_built_in_texts(model: Path) -> None:
    entries = [json.loads(line) for line in sources.BUILTIN.read_text(encoding="utf-8").splitlines()]
    languages = Counter(entry["lang"] for entry in entries)
    assert len(entries) == 64 == len({entry["text"] for entry in entries})
    assert {"en", "zh", "es", "ar", "hi", "ja", "ru", "fr", "de", "pt", "ko", "tr"} <= set(languages)
    assert {"python", "c", "sql", "json", "maths", "dialogue"} <= set(languages)
    assert all(100 < len(entry["text"]) < 1000 for entry in entries)
    for entry in entries:
        if entry["lang"] == "python":
            compile(entry["text"], "builtin", "exec")
    found = cut(model, None, seq_len=128)
    assert found.facts["source"] == found.facts["name"] == "built-in" and found.facts["documents"] == 64
    assert any("smoke tests only" in note for note in found.facts["notes"])
    assert {"latin", "cyrillic", "arabic", "devanagari", "han", "kana", "hangul"} == set(found.facts["scripts"])
    assert sum(found.facts["scripts"].values()) == pytest.approx(1, abs=0.01)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entries", "parts"),
    [
        (["{'text': 1}"], ["line 1", "not JSON", '{"text": ...}']),
        ([{"text": "x" * 9}, "", "hello"], ["line 3", "not JSON"]),
        (["[1, 2]"], ["line 1", "list", "expected an object"]),
        (["[" * 100000], ["line 1", "not JSON", "nested"]),
        ([{"content": "x", "Text": "y"}], ["line 1", "keys 'Text', 'content'", '"messages"']),
        ([{}], ["line 1", "keys nothing"]),
        ([{"text": 5}], ["line 1", '"text" is int']),
        (['{"text": "\\ud800 half"}'], ["line 1", "surrogate"]),
        ([{"ids": [1]}], ["line 1", "1 token ids", "at least 2"]),
        ([{"ids": []}], ["line 1", "0 token ids"]),
        ([{"ids": [1, 2.5]}], ["line 1", "whole numbers"]),
        ([{"ids": [1, True]}], ["line 1", "whole numbers"]),
        ([{"ids": "12"}], ["line 1", "whole numbers"]),
        ([{"ids": [1, 2]}, {"ids": [3, VOCAB]}], ["line 2", f"id {VOCAB}", f"0 to {VOCAB - 1}", "another tokenizer"]),
        ([{"ids": [1, -1]}], ["line 1", "id -1"]),
        ([{"ids": [1, 1 << 70]}], ["line 1", "another tokenizer"]),
        ([{"messages": []}], ["line 1", "not empty"]),
        ([{"messages": "hi"}], ["line 1", '"messages" must be a list']),
        ([{"messages": [{"content": "hi"}]}], ["line 1", '"role"']),
        ([{"messages": [{"role": "u", "content": 3}]}], ["line 1", '"content" is int']),
        ([{"messages": [{"role": "u", "content": [{"type": "image"}]}]}], ["line 1", "image", "only text"]),
        ([{"text": "short"}], ["6 tokens in 1 documents", "one window of 8", "seq_len of at most 6"]),
        (["", "  ", ""], ["nothing but empty lines"]),
        ([], ["the file is empty"]),
    ],
)
def test_a_bad_jsonl_is_refused(model: Path, lines: Callable[..., str], entries: list[Any], parts: list[str]) -> None:
    refused(model, lines(*entries), "c.jsonl", *parts)


def test_bad_files_are_refused(
    model: Path, tmp_path: Path, words: Callable[..., str], lines: Callable[..., str]
) -> None:
    refused(model, str(tmp_path / "none.txt"), "none.txt", "not there", "hf:NAME")
    refused(model, str(tmp_path), "is a folder")
    refused(model, words(b""), "c.txt", "the file is empty")
    refused(model, words(b" \n\n\t\n"), "c.txt", "nothing but empty lines")
    refused(model, words(b"{}", "c.json"), "c.json", "one object per line", "c.jsonl")
    refused(model, words(b"fine\nalso fine\nbad \xff byte\n"), "c.txt: line 3", "0xff", "not UTF-8")
    refused(model, words(b"cut off at the end \xe6\x97"), "c.txt: line 1", "not UTF-8")
    refused(model, words(b'{"text": "ok"}\n{"text": "\xff"}\n', "d.jsonl"), "d.jsonl: line 2", "0xff")
    refused(model, words("héllo".encode("utf-16")), "UTF-16")
    refused(model, words('{"text": "x"}'.encode("utf-16"), "e.jsonl"), "e.jsonl: line 1", "UTF-16")


def test_a_byte_order_mark_is_left_out_and_noted(model: Path, words: Callable[..., str]) -> None:
    plain = cut(model, words(b"0123456789"))
    marked = cut(model, words(b"\xef\xbb\xbf0123456789"))
    as_line = cut(model, words(b'\xef\xbb\xbf{"text": "0123456789"}\n', "c.jsonl"))
    assert marked.ids.equal(plain.ids) and as_line.ids.equal(plain.ids)
    assert any("byte order mark" in note for note in marked.facts["notes"])


def test_a_line_longer_than_memory_allows_is_refused(
    model: Path, lines: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "MAX_LINE", 1 << 20)
    refused(model, lines({"text": "x"}, {"text": "y" * (1 << 20)}), "c.jsonl: line 2", "longer than 1 MB")


def test_the_tokenizer_must_be_the_models(model: Path, tmp_path: Path, lines: Callable[..., str]) -> None:
    source = lines({"text": "x" * 20})
    refused(model, source, "c.jsonl: line 1", f"id {BOS}", "tokenizer.json belongs to another model", vocab=200)
    refused(tmp_path, source, "tokenizer.json", "not there")
    (tmp_path / "tokenizer.json").write_text('{"odd": 1}')
    refused(tmp_path, source, "tokenizer.json", "not a tokenizer")


# --- overlap ----------------------------------------------------------------------------------------------------------


def test_overlap_finds_a_text_at_any_offset() -> None:
    random = torch.Generator().manual_seed(0)
    a, b = (torch.randint(0, 50000, (4096,), generator=random) for _ in range(2))
    assert overlap(a, b) == 0 and overlap(a, a) == 1
    assert overlap(a.reshape(8, 512), torch.cat([b[:13], a])) == 1
    mixed = torch.cat([a[:1024], b[:3072]])
    assert overlap(mixed, a) == pytest.approx(0.25)
    assert overlap(a, mixed) == pytest.approx(0.25)
    touched = a.clone()
    touched[::32] += 1
    assert overlap(touched, a) == 0


def test_overlap_stays_within_rows_and_takes_short_ones() -> None:
    ids = torch.arange(640)
    assert overlap(ids[16:48], ids.reshape(20, 32)) == 0  # a piece over the border of two windows is in neither
    assert overlap(ids[:8], ids) == 1 and overlap(ids[:8] + 1000, ids) == 0
    assert overlap(ids[:0], ids) == 0 and overlap(ids, ids[:0]) == 0
    assert overlap(torch.zeros(64, dtype=torch.int64), torch.ones(64, dtype=torch.int64)) == 0
