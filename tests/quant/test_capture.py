"""Captures: what is read back is what the teacher says; kills, changed files and other tokenizers are noticed."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from percard.formats.spec import FormatError
from percard.quant import capture
from percard.quant.capture_cache import Capture, row_bytes
from percard.quant.progress import Progress
from percard.quant.vocabulary import Words

Tiny = Callable[..., Path]
EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-qwen3"
TOKENS = 90  # of the 96 rows of the small models' heads


def with_tokenizer(folder: Path, tokens: int = TOKENS, **renamed: str) -> Path:
    """Gives a folder a tokenizer of the words w0, w1, ... with some of them renamed."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder.mkdir(exist_ok=True)
    words = {renamed.get(f"w{i}", f"w{i}"): i for i in range(tokens)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def with_documents(folder: Path, *sizes: int) -> Path:
    """data.jsonl of random ids: a document per size."""
    random = torch.Generator().manual_seed(3)
    lines = [json.dumps({"ids": torch.randint(0, TOKENS, (n,), generator=random).tolist()}) for n in sizes]
    path = folder / "data.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def teacher(tiny: Tiny) -> Path:
    return with_tokenizer(tiny("qwen3", dtype=torch.float32, max_position_embeddings=64))


@pytest.fixture
def made(teacher: Path, tmp_path: Path) -> Path:
    """A capture of documents of 21, 30 and 50 tokens: 6 windows of 16, shards of 25 rows, k = 8."""
    data = with_documents(tmp_path, 21, 30, 50)
    planned = capture.plan(teacher, str(data), top_k=8, seq_len=16, shard_tokens=25)
    capture.run(planned, tmp_path / "cache")
    return tmp_path / "cache"


def whole(teacher: Path, ids: torch.Tensor) -> torch.Tensor:
    """log-probabilities [T, TOKENS] by transformers' own forward."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    with torch.no_grad():
        return model(ids[None]).logits[0, :, :TOKENS].double().log_softmax(-1)


def bytes_of(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def test_rows_are_what_the_teacher_says(teacher: Path, made: Path, tmp_path: Path) -> None:
    found = Capture.open(made, teacher)
    flat = [i for line in (tmp_path / "data.jsonl").read_text().splitlines() for i in json.loads(line)["ids"]]
    assert len(found) == 6 and found.tokens == 96 and found.k == 8 and found.vocab == TOKENS
    assert found.lengths.tolist() == [16] * 6 and len(found.facts["shards"]) == 4
    assert found.facts["data"]["left_over"] == 5 and found.facts["data"]["documents"] == 3
    counted = 0
    for index, window in enumerate(found):
        assert window.tokens.tolist() == flat[16 * index : 16 * index + 16]
        expected = whole(teacher, window.tokens)
        logp, ids, rest = window.logp.double(), window.ids, window.log_rest.double()  # type: ignore[union-attr]
        # fp16 has 11 bits: half a unit in the last place is 2^-11 of the value; the two forwards differ in fp32 by far less.
        assert bool(((expected.gather(1, ids) - logp).abs() <= 2**-11 * logp.abs() + 1e-4).all())
        assert bool((logp[:, :-1] >= logp[:, 1:]).all()) and torch.equal(ids, expected.topk(8).indices)
        assert float((logp.exp().sum(-1) + rest.exp() - 1).abs().max()) < 2e-3
        counted += int(window.counted.sum())
    assert counted == found.facts["counted"] == 96 - 6 - 2


def test_the_last_row_of_a_window_and_of_a_document_counts_nothing(made: Path) -> None:
    found = Capture.open(made)
    doc = torch.cat([w.doc for w in found])
    assert doc.tolist() == ([0] * 21 + [1] * 30 + [2] * 50)[:96]
    uncounted = (~torch.cat([w.counted for w in found])).nonzero()[:, 0].tolist()
    assert uncounted == sorted({*range(15, 96, 16), 20, 50})


def test_shards_cut_through_windows_and_documents_change_nothing(teacher: Path, made: Path, tmp_path: Path) -> None:
    data = str(tmp_path / "data.jsonl")
    capture.run(capture.plan(teacher, data, top_k=8, seq_len=16), tmp_path / "one")
    one, several = Capture.open(tmp_path / "one"), Capture.open(made)
    assert len(one.facts["shards"]) == 1 and one.lengths.tolist() == several.lengths.tolist()
    for a, b in zip(one, several, strict=True):
        assert torch.equal(a.tokens, b.tokens) and torch.equal(a.doc, b.doc) and torch.equal(a.ids, b.ids)
        assert float((a.logp.float() - b.logp.float()).abs().max()) <= 2**-8  # type: ignore[union-attr]


def test_bytes_of_a_token(teacher: Path, tmp_path: Path) -> None:
    """8 for text and document, 6 for each id kept, 2 for the rest; the headers of the shards are all that comes on top."""
    assert [row_bytes(k) for k in (64, 32, 16, 0)] == [394, 202, 106, 8]
    planned = capture.plan(teacher, str(with_documents(tmp_path, 4096)), top_k=64, seq_len=64)
    told = planned.to_dict()
    done = capture.run(planned, tmp_path / "cache")
    assert told["bytes"] == 394 * 4096 and told["shards"] == 1
    assert 0 < done["shards"][0]["bytes"] - told["bytes"] < 512


def test_k_may_be_the_whole_vocabulary_and_no_more(teacher: Path, tmp_path: Path) -> None:
    data = str(with_documents(tmp_path, 40))
    capture.run(capture.plan(teacher, data, top_k=TOKENS, seq_len=16), tmp_path / "cache")
    window = Capture.open(tmp_path / "cache").windows(1)
    assert bool(torch.isneginf(window.log_rest).all())  # type: ignore[arg-type]
    assert sorted(window.ids[0].tolist()) == list(range(TOKENS))  # type: ignore[index]
    for k in (TOKENS + 1, 0):
        with pytest.raises(FormatError, match=f"--top-k {k}: this teacher has 90 tokens; choose 1 to 90"):
            capture.plan(teacher, data, top_k=k, seq_len=16)


def test_the_trained_example_as_text(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text((EXAMPLE / "heldout.txt").read_text()[:3000])
    capture.run(capture.plan(EXAMPLE, str(tmp_path / "t.txt"), seq_len=128), tmp_path / "cache")
    found = Capture.open(tmp_path / "cache", EXAMPLE)
    sums = [w.logp.double().exp().sum(-1) + w.log_rest.double().exp() for w in found]  # type: ignore[union-attr]
    assert float((torch.cat(sums) - 1).abs().max()) < 2e-3
    hits = [(w.ids[:-1] == w.tokens[1:, None]).any(-1).float().mean() for w in found]  # type: ignore[index]
    assert found.k == 64 and float(torch.stack(hits).mean()) > 0.6  # row t is about token t + 1


def test_another_tokenizer_is_refused_by_its_first_token(made: Path, tmp_path: Path) -> None:
    found = Capture.open(made, with_tokenizer(tmp_path / "longer", TOKENS + 4))
    assert found.vocab == TOKENS
    with pytest.raises(FormatError, match=r"id 7 is 'other'.* it is 'w7'"):
        Capture.open(made, with_tokenizer(tmp_path / "other", w7="other"))
    with pytest.raises(FormatError, match="80 tokens, the capture was made with 90"):
        Capture.open(made, with_tokenizer(tmp_path / "shorter", 80))
    with pytest.raises(FormatError, match=r"tokenizer\.json: not there"):
        Capture.open(made, tmp_path)


def test_a_tokenizer_of_another_model(tiny: Tiny, tmp_path: Path) -> None:
    data = str(with_documents(tmp_path, 40))
    with pytest.raises(FormatError, match="97 tokens, the model has 96"):
        capture.plan(with_tokenizer(tiny("qwen3"), 97), data, top_k=4, seq_len=16)


def test_what_was_changed_or_cut_is_refused(made: Path) -> None:
    shard = made / "shard-00001.safetensors"
    good = shard.read_bytes()
    shard.write_bytes(good[:-40] + bytes([good[-40] ^ 1]) + good[-39:])
    with pytest.raises(FormatError, match=r"shard-00001\.safetensors: sha256 .* changed since"):
        Capture.open(made)
    assert len(Capture.open(made, verify=False)) == 6
    shard.write_bytes(good[:-40])
    with pytest.raises(FormatError, match="truncated"):
        Capture.open(made, verify=False)
    shard.unlink()
    with pytest.raises(FormatError, match=r"shard-00001\.safetensors: missing"):
        Capture.open(made, verify=False)
    shard.write_bytes((made / "shard-00003.safetensors").read_bytes())
    with pytest.raises(FormatError, match="another capture's"):
        Capture.open(made, verify=False)
    shard.write_bytes(good)
    (made / "tokenizer.json").write_text("{}")
    with pytest.raises(FormatError, match=r"tokenizer\.json: sha256"):
        Capture.open(made)


def test_facts_that_are_not_ours(made: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"no capture\.json"):
        Capture.open(tmp_path / "nowhere")
    facts = json.loads((made / "capture.json").read_text())
    for change, message in (
        ({"schema": 9}, "schema 9"),
        ({"verb": "prune"}, "'prune'"),
        ({"k": 7}, "another capture's"),
        ({"packing": {}}, "not as it was written"),
        ({"packing": {"window": 16, "windows": 5}}, "windows of 80 tokens over shards of 96"),
    ):
        (made / "capture.json").write_text(json.dumps({**facts, **change}))
        with pytest.raises(FormatError, match=message):
            Capture.open(made)


@pytest.mark.parametrize("at", ["shard-00000.safetensors", "shard-00002.safetensors", "capture.json"])
def test_killed_runs_go_on_and_end_with_the_same_bytes(
    teacher: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """SIGKILL right before a file gets its name; finished shards are not taught again."""
    planned = capture.plan(teacher, str(tmp_path / "data.jsonl"), top_k=8, seq_len=16, shard_tokens=25)
    dst = tmp_path / "killed"
    child = os.fork()
    if not child:
        rename = Path.rename

        def deadly(self: Path, target: Path) -> Path:
            if Path(target).name == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return rename(self, target)

        Path.rename = deadly  # type: ignore[method-assign, assignment]
        try:
            capture.run(planned, dst)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL and not dst.exists()
    taught: list[int] = []
    teach = capture._teach
    monkeypatch.setattr(capture, "_teach", lambda p, start, *rest: (taught.append(start), teach(p, start, *rest)))
    capture.run(planned, dst)
    assert taught == {"shard-00000.safetensors": [0, 25, 50, 75], "shard-00002.safetensors": [50, 75]}.get(at, [])
    assert bytes_of(dst) == bytes_of(made)


def test_an_unfinished_run_of_something_else_is_not_gone_on_with(teacher: Path, tmp_path: Path) -> None:
    data, dst = str(with_documents(tmp_path, 70)), tmp_path / "cache"

    def planned(k: int) -> capture.Plan:
        return capture.plan(teacher, data, top_k=k, seq_len=16, shard_tokens=25)

    with pytest.raises(KeyboardInterrupt):
        capture.run(planned(8), dst, progress=lambda event: _stop_at(event, "shard 1"))
    with pytest.raises(FileExistsError, match="differs from it in the recipe"):
        capture.run(planned(7), dst)
    capture.run(planned(7), dst, fresh=True)
    assert Capture.open(dst).k == 7


def _stop_at(event: Progress, label: str) -> None:
    if event.label == label:
        raise KeyboardInterrupt


def test_what_lies_there_is_replaced_by_force_only(teacher: Path, made: Path, tmp_path: Path) -> None:
    planned = capture.plan(teacher, str(tmp_path / "data.jsonl"), top_k=4, seq_len=16)
    with pytest.raises(FileExistsError, match="output exists"):
        capture.run(planned, made)
    assert Capture.open(made).k == 8
    capture.run(planned, made, force=True)
    assert Capture.open(made).k == 4


@pytest.mark.parametrize(
    ("sizes", "seq_len", "message"),
    [
        ((), 16, "the file is empty"),
        ((9,), 16, None),
        ((5, 9), 16, "14 tokens are less than one window of 16; give more text, or a --seq-len of at most 14"),
        ((40, 50), 65, "above the teacher's 64 positions"),
        ((40, 50), 1, "at least 2 tokens"),
    ],
)
def test_too_little_text(teacher: Path, tmp_path: Path, sizes: tuple, seq_len: int, message: str | None) -> None:
    path = with_documents(tmp_path, *sizes)
    if not sizes:
        path.write_text("")
    if message is None:  # lines of ids of one length are the windows themselves
        assert capture.plan(teacher, str(path), top_k=4, seq_len=seq_len).stream.window == 9
        return
    with pytest.raises(FormatError, match=message):
        capture.plan(teacher, str(path), top_k=4, seq_len=seq_len)


def test_ids_that_are_padding_are_no_tokens(teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text(json.dumps({"ids": [1, TOKENS + 1] * 9}))
    with pytest.raises(FormatError, match=r"token id 91, the model's vocabulary has 0 to 89"):
        capture.plan(teacher, str(tmp_path / "data.jsonl"), top_k=4, seq_len=16)


def test_words_of_a_file(tmp_path: Path) -> None:
    words = Words.of(with_tokenizer(tmp_path, 5))
    assert words.tokens == ("w0", "w1", "w2", "w3", "w4")
    (tmp_path / "tokenizer.json").write_text('{"odd": 1}')
    with pytest.raises(FormatError, match="not a tokenizer"):
        Words.of(tmp_path)
