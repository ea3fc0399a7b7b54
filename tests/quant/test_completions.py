"""Completions: the same seed, the same text; what is kept and what is counted; prompts carry no loss; kills lose nothing."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from percard.formats.spec import FormatError
from percard.quant import completions
from percard.quant.capture_cache import Capture
from percard.quant.completions import Answer, CompletionPlan, seed_of
from percard.quant.keep import Keep

from .test_capture import TOKENS, bytes_of, whole, with_tokenizer

Tiny = Callable[..., Path]
PROMPTS = [{"prompt": "w1 w2 w3"}, {"text": "w4"}, {"ids": [5, 6, 7, 8, 9]}]


@pytest.fixture
def teacher(tiny: Tiny) -> Path:
    return with_tokenizer(tiny("qwen3", dtype=torch.float32, max_position_embeddings=64))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(p) + "\n" for p in PROMPTS))
    return tmp_path / "p.jsonl"


class Speaker:
    """Random words from the seed alone; every third sample is cut, the others end with id 2. `asked`: seeds of its prompts."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self) -> completions.Generate:
        return self.generate

    def generate(self, ids: list[int], n: int, seed: int) -> list[Answer]:
        self.asked.append(seed)
        answers = []
        for sample in range(n):
            random = torch.Generator().manual_seed(seed + sample)
            new = torch.randint(3, TOKENS, (5 + sample,), generator=random).tolist()
            ends = sample % 3 != 2
            answers.append(Answer([*new, 2] if ends else new, " ".join(f"w{i}" for i in new), ends))
        return answers


def plan(teacher: Path, prompts: Path, keep: str | None = None, **more: Any) -> CompletionPlan:
    return completions.plan(teacher, prompts, keep=Keep.parse(keep, 5), n=3, max_new=20, **more)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]


def test_prompts_carry_no_loss_and_every_completion_is_a_window(teacher: Path, prompts: Path, tmp_path: Path) -> None:
    done = completions.run(plan(teacher, prompts, top_k=6, shard_tokens=37), Speaker(), tmp_path / "d")
    written, found = lines(tmp_path / "d"), Capture.open(tmp_path / "d", teacher)
    assert [(e["prompt"], e["sample"]) for e in written] == [(p, s) for p in range(3) for s in range(3)]
    assert len(found) == 9 and len(done["shards"]) > 2 and done["kind"] == "completions"
    assert {k: done["completions"][k] for k in ("kept", "dropped", "unended")} == {
        "kept": 9,
        "dropped": 0,
        "unended": 3,
    }
    for entry, window in zip(written, found, strict=True):
        prompt = entry["prompt_tokens"]
        assert entry["ids"] == window.tokens.tolist() and prompt == (3, 1, 5)[entry["prompt"]]
        assert entry["ended"] == (entry["ids"][-1] == 2)
        # Row t is about token t + 1: the prompt's last row is the first that counts, the last row of all never does.
        rows = len(entry["ids"])
        assert window.counted.tolist() == [prompt - 1 <= t < rows - 1 for t in range(rows)]
        expected = whole(teacher, window.tokens)
        logp = window.logp.double()  # type: ignore[union-attr]
        # fp16 rounds by at most 2^-11 of the value.
        assert bool(((expected.gather(1, window.ids) - logp).abs() <= 2**-11 * logp.abs() + 1e-4).all())
        sums = logp.exp().sum(-1) + window.log_rest.double().exp()  # type: ignore[union-attr]
        assert float((sums - 1).abs().max()) < 2e-3
    assert sum(int(w.counted.sum()) for w in found) == done["counted"]


def test_without_top_k_only_the_text_is_kept(teacher: Path, prompts: Path, tmp_path: Path) -> None:
    done = completions.run(plan(teacher, prompts), Speaker(), tmp_path / "d")
    found = Capture.open(tmp_path / "d", teacher)
    assert found.k == 0 and found.windows(0).ids is None and found.windows(0).logp is None
    assert [w.tokens.tolist() for w in found] == [e["ids"] for e in lines(tmp_path / "d")]
    assert done["shards"][0]["bytes"] - 8 * done["tokens"] < 512


def test_the_same_seed_gives_the_same_text(teacher: Path, prompts: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        completions.run(plan(teacher, prompts, seed=seed), Speaker(), tmp_path / name)
    text = [(tmp_path / name / "completions.jsonl").read_bytes() for name in "abc"]
    assert text[0] == text[1] != text[2]
    seeds = {seed_of(seed, prompt) + sample for seed in range(20) for prompt in range(50) for sample in range(4)}
    assert len(seeds) == 4000


def test_keep_by_a_regular_expression(teacher: Path, prompts: Path, tmp_path: Path) -> None:
    everything = Speaker()
    completions.run(plan(teacher, prompts), everything, tmp_path / "all")
    done = completions.run(plan(teacher, prompts, r"\bw1\d\b"), Speaker(), tmp_path / "some")
    wanted = [e for e in lines(tmp_path / "all") if any(w in {f"w1{i}" for i in range(10)} for w in e["text"].split())]
    assert lines(tmp_path / "some") == wanted and 0 < len(wanted) < 9
    assert (done["completions"]["kept"], done["completions"]["dropped"]) == (len(wanted), 9 - len(wanted))
    with pytest.raises(FormatError, match=r"no completion was kept \(9 dropped, 0 timed out"):
        completions.run(plan(teacher, prompts, "never"), Speaker(), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_keep_by_a_command(teacher: Path, prompts: Path, tmp_path: Path) -> None:
    """The checker sees the completion on stdin and the prompt's line; both ways, and one that never answers."""
    check = tmp_path / "check.py"
    check.write_text(
        "import json, os, sys\n"
        "line, text = json.loads(os.environ['PERCARD_PROMPT']), sys.stdin.read()\n"
        "sys.exit(0 if 'ids' in line and len(text.split()) != 6 else 3)\n"
    )
    done = completions.run(plan(teacher, prompts, f"cmd:{sys.executable} {check}"), Speaker(), tmp_path / "d")
    assert [(e["prompt"], e["sample"]) for e in lines(tmp_path / "d")] == [(2, 0), (2, 2)]
    assert done["completions"]["kept"] == 2 and done["completions"]["dropped"] == 7


def test_a_command_that_takes_too_long_is_a_no_and_leaves_no_process(tmp_path: Path) -> None:
    slow = tmp_path / "slow.sh"
    slow.write_text(f"#!/bin/sh\nsleep 60 & echo $! > {tmp_path}/pid\nwait\n")
    slow.chmod(0o755)
    assert Keep.parse(f"cmd:{slow}", 0.5).judge("text " * 100_000, "{}") == "timed_out"
    child = int((tmp_path / "pid").read_text())
    for _ in range(100):  # the kernel ends it in its own time
        status = Path(f"/proc/{child}/status")
        if not status.exists() or "Z (zombie)" in status.read_text():
            break
        time.sleep(0.05)
    else:
        pytest.fail(f"process {child} is still there")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("(a+)+$", "could take forever: loops inside loops, or too many; write it more simply"),
        ("(", "is not a regex"),
        ("", "--keep is empty"),
        ("cmd:", "nothing cannot be run"),
        ("cmd:no-such-program-here x", "'no-such-program-here' cannot be run"),
        ("cmd:'open", "not a command line"),
    ],
)
def test_filters_that_cannot_be(words: str, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        Keep.parse(words)


def test_a_killed_run_goes_on_with_the_next_prompt(teacher: Path, prompts: Path, tmp_path: Path) -> None:
    planned = plan(teacher, prompts, r"w[1-8]", top_k=4)
    completions.run(planned, Speaker(), tmp_path / "whole")

    class Deadly(Speaker):
        def generate(self, ids: list[int], n: int, seed: int) -> list[Answer]:
            if len(self.asked) == 2:
                unfinished = tmp_path / ".d.percard-unfinished" / "completions.jsonl"
                unfinished.open("ab").write(b'{"prompt": 2, "sam')  # a line that a kill cut short
                os.kill(os.getpid(), signal.SIGKILL)
            return super().generate(ids, n, seed)

    child = os.fork()
    if not child:
        try:
            completions.run(planned, Deadly(), tmp_path / "d")
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    with pytest.raises(FileExistsError, match="differs from it in the text"):
        completions.run(plan(teacher, prompts, r"w[1-8]", top_k=4, seed=1), Speaker(), tmp_path / "d")
    speaker = Speaker()
    completions.run(planned, speaker, tmp_path / "d")
    assert speaker.asked == [seed_of(0, 2)]
    assert bytes_of(tmp_path / "d") == bytes_of(tmp_path / "whole")


def test_answers_that_are_no_text_are_counted(teacher: Path, prompts: Path, tmp_path: Path) -> None:
    def generate(ids: list[int], n: int, seed: int) -> list[Answer]:
        return [Answer([], "", False), Answer([3, TOKENS], "w3", False), Answer([4, 2], "w4", True)]

    done = completions.run(plan(teacher, prompts), lambda: generate, tmp_path / "d")
    counts = done["completions"]
    assert (counts["kept"], counts["empty"], counts["no_tokens"], counts["unended"]) == (3, 3, 3, 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no prompts"),
        ("{", "line 1: not valid JSON"),
        ('{"prompt": "w1"}\n{"question": "w1"}', "line 2: expected an object with one of"),
        ('{"prompt": 3}', '"prompt" is int'),
        ('{"prompt": ""}', "line 1: an empty prompt"),
        ('{"ids": [95]}', "line 1: token id 95"),
        ('{"ids": [' + "1, " * 63 + "1]}", "line 1: 64 tokens, the teacher takes 64 with its answer"),
        ('{"messages": []}', "not empty"),
    ],
)
def test_prompts_that_cannot_be(teacher: Path, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(FormatError, match=message):
        plan(teacher, tmp_path / "p.jsonl")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"temperature": 0.0}, "writes 3 times the same"),
        ({"top_p": 0.0}, "--top-p 0 above 0"),
        ({"top_k": 91}, "choose 1 to 90"),
        ({"shard_tokens": 0}, "at least 1"),
    ],
)
def test_wishes_that_cannot_be(teacher: Path, prompts: Path, more: dict, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        plan(teacher, prompts, **more)


def test_messages_end_where_the_answer_begins(teacher: Path, tmp_path: Path) -> None:
    template = "{% for m in messages %}w1 {{ m['content'] }} w2 {% endfor %}{% if add_generation_prompt %}w3{% endif %}"
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    (teacher / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "p.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "w7 w8"}], "answer": 3}))
    (prompt,) = plan(teacher, tmp_path / "p.jsonl").prompts
    assert prompt.ids == [1, 7, 8, 2, 3] and json.loads(prompt.line)["answer"] == 3
