"""A user's task: what the reader refuses, how answers are scored, lengths, and the interval of a share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from percard.bench import engine, quality, task
from percard.bench.task import Item, Scored, Task, wilson
from percard.bench.vocabulary import Vocabulary
from percard.formats.spec import FormatError

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny-qwen3"
GOOD = {"prompt": "a", "expected": "b"}


def written(folder: Path, *lines: Any) -> Path:
    path = folder / "mine.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_a_file_of_questions(tmp_path: Path) -> None:
    choice = {"prompt": "p", "expected": " b", "score": "choice", "choices": [" a", " b"]}
    path = written(tmp_path, GOOD, "", {**GOOD, "score": "regex", "max_new": 3}, choice)
    found = Task.load(path)
    assert found.name == "mine" and [item.line for item in found.items] == [1, 3, 4]
    assert [item.tokens_out for item in found.items] == [task.MAX_NEW, 3, 1]
    assert found.items[2].choices == (" a", " b") and found.text == "ab\na\np b"
    assert [item.line for item in Task.load(path, 2).items] == [1, 3] and len(Task.load(path, 9).items) == 3
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode())  # as some editors begin a file
    assert len(Task.load(path).items) == 1


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "mine.jsonl:2: not JSON"),
        ([1], r"mine.jsonl:2: is \[1\]; expected an object"),
        ({"expected": "b"}, "2: prompt is missing; expected a text"),
        ({"prompt": "a"}, "2: expected is missing"),
        ({"prompt": "", "expected": "b"}, '2: prompt is ""; expected a text of at least one'),
        ({"prompt": "a", "expected": 4}, "2: expected is 4; expected a text"),
        ({**GOOD, "answer": "b"}, "2: unknown keys answer; known: choices, expected, max_new"),
        ({**GOOD, "score": "f1"}, '2: score is "f1"; expected one of exact, regex, choice'),
        ({**GOOD, "score": ["exact"]}, "2: score is"),
        ({**GOOD, "score": "regex", "expected": "("}, "2: expected is no pattern"),
        ({**GOOD, "score": "choice"}, "2: choices is null; expected a list of texts"),
        ({**GOOD, "score": "choice", "choices": "ab"}, '2: choices is "ab"; expected a list'),
        ({**GOOD, "score": "choice", "choices": ["b", 3]}, "2: choices is"),
        ({**GOOD, "score": "choice", "choices": ["b"]}, "at least two that differ"),
        ({**GOOD, "score": "choice", "choices": ["b", "a", "b"]}, "at least two that differ"),
        ({**GOOD, "score": "choice", "choices": [" b", "a"]}, "not among its choices; spaces count"),
        ({**GOOD, "choices": ["b", "a"]}, 'choices belong to score "choice", this is exact'),
        *(({**GOOD, "max_new": n}, "2: max_new is .*; expected a whole number") for n in (0, -1, 1.5, True, "8")),
    ],
)
def test_what_the_reader_refuses(tmp_path: Path, line: Any, words: str) -> None:
    with pytest.raises(FormatError, match=words):
        Task.load(written(tmp_path, GOOD, line))


def test_files_that_are_no_task(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="holds no question"):
        Task.load(written(tmp_path, "", " "))
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}')
    with pytest.raises(FormatError, match="not UTF-8"):
        Task.load(tmp_path / "latin.jsonl")
    with pytest.raises(FileNotFoundError):
        Task.load(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("item", "answer", "right"),
    [
        (Item(1, "p", "in"), "\n in\nmore", True),
        (Item(1, "p", "in"), " inside", False),
        (Item(1, "p", "in"), "", False),
        (Item(1, "p", "a\nb "), " a\nb", True),
        (Item(1, "p", "a\nb"), "a\nb\nc", False),
        (Item(1, "p", r"\bdir\(", "regex"), "x\nos.listdir(", False),
        (Item(1, "p", r"dir\(", "regex"), "x\nos.listdir(", True),
    ],
)
def test_right_and_wrong_answers(item: Item, answer: str, right: bool) -> None:
    assert item.right(answer) is right


@pytest.fixture(scope="module")
def tiny() -> engine.Model:
    return engine.load(TINY, dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def words() -> Vocabulary:
    return Vocabulary(TINY)


def test_questions_together_are_answered_as_alone(tiny: engine.Model, words: Vocabulary) -> None:
    """In fp32, where neighbours in a batch move logits by rounding only."""
    texts = ["import ", "def f(self):\n    return ", "for i in range(", "class A:\n    def __init__(self", "x = "]
    asked = [words.ids(text) for text in texts]
    alone = [words.continuation(ids, tiny.generate([ids], 6)[0]) for ids in asked]
    items = tuple(Item(i, t, a, max_new=6) for i, (t, a) in enumerate(zip(texts, alone, strict=True)) if a.strip())
    assert len(items) >= 4
    assert task.score(tiny, words, Task("all right", items)).score == 1.0
    wrong = tuple(Item(i.line, i.prompt, i.expected + "!", max_new=6) for i in items[:2])
    assert task.score(tiny, words, Task("two wrong", wrong + items[2:])).right[:3] == (False, False, True)
    seen = [Item(i.line, i.prompt, i.expected[:2].strip() or ".", "regex", max_new=6) for i in items]
    done: list[int] = []
    assert task.score(tiny, words, Task("patterns", tuple(seen)), tell=done.append).score == 1.0
    assert done[-1] == len(items)


def test_a_choice_is_the_likeliest(tiny: engine.Model, words: Vocabulary) -> None:
    """Held to log-probabilities of whole texts, one by one; choices of several tokens, some of which join the prompt."""
    prompt, choices = "class A:\n    def __init__(self", [", name):", ")", " + 1", "_more, x", "):\n        pass"]
    ids, wholes = words.ids(prompt), [words.ids(prompt + c) for c in choices]
    found = task.likelihoods(tiny, ids, wholes)
    start = next(i for i in range(len(ids) + 1) if any(whole[: i + 1] != ids[: i + 1] for whole in wholes))
    for whole, value in zip(wholes, found, strict=True):
        table = tiny.logits(torch.tensor([whole]))[0].double().log_softmax(-1)
        want = sum(float(table[i - 1, whole[i]]) for i in range(start, len(whole)))
        assert value == pytest.approx(want, abs=1e-3)
    best = choices[found.index(max(found))]
    items = [Item(1, prompt, c, "choice", tuple(choices)) for c in choices]
    assert task.score(tiny, words, Task("c", tuple(items))).right == tuple(c == best for c in choices)


def test_a_tokenizer_that_joins_the_prompt_to_a_choice(words: Vocabulary, tiny: engine.Model) -> None:
    ids, whole = words.ids("sel"), words.ids("self")
    assert len(whole) == 1 and ids != whole
    with pytest.raises(FormatError, match="line 7: the tokenizer of m joins prompt and choice"):
        task.prompts(Task("t", (Item(7, "sel", "f", "choice", ("f", "x")),)), words, 512, "m")


def test_questions_that_do_not_fit(words: Vocabulary) -> None:
    long = Task("t", (Item(1, "x", "y"), Item(2, "x " * 40, "y", max_new=30)))
    assert len(task.prompts(long, words, 200, "m")) == 2
    with pytest.raises(FormatError, match=r"t line 2: .* tokens and its answer do not fit the 60 tokens of m"):
        task.prompts(long, words, 60, "m")


def test_lengths_of_answers(tiny: engine.Model, words: Vocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    items = tuple(Item(i, text, "y") for i, text in enumerate(["x = ", "import os\n" * 60, "def ", "if "]))
    found = task.lengths(tiny, words, Task("t", items), count=3, limit=9)
    room = tiny.max_len - min(tiny.max_len - 1, len(words.ids(items[1].prompt)))
    assert len(found) == 3 and found[0] <= 9 and found[1] <= max(1, room)
    answer = tiny.generate([words.ids("x = ")], 9, stop=())[0]
    monkeypatch.setitem(words.__dict__, "stops", (answer[4],))  # as generation_config.json of a chat model may say
    assert task.lengths(tiny, words, Task("t", items[:1]), limit=9) == [answer.index(answer[4])]


def test_ratio_of_lengths_and_its_gate() -> None:
    assert task.length_ratio([1, 2, 3], [2, 2, 2]) == 1.0 and task.length_ratio([3], [0]) is None
    assert not quality.gate_length(0.9) and not quality.gate_length(1.1) and not quality.gate_length(None)
    assert "1.20 times as long" in quality.gate_length(1.2)[0] and quality.gate_length(0.5)


@pytest.mark.parametrize(
    ("right", "n", "lo", "hi"),
    # Newcombe 1998 (Statistics in Medicine 17, 857), table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval(right: int, n: int, lo: float, hi: float) -> None:
    assert wilson(right, n) == pytest.approx((lo, hi), abs=5e-5)
    assert wilson(n - right, n) == pytest.approx((1 - hi, 1 - lo), abs=5e-5)


def test_a_score_for_the_record() -> None:
    assert Scored("t", (True, False, True, True)).section() == {
        "name": "t",
        "score": 0.75,
        "n": 4,
        "ci95": list(wilson(3, 4)),
    }
    for n in (0, -1):
        with pytest.raises(ValueError, match="is no share"):
            wilson(0, n)


def test_the_example_is_a_task() -> None:
    found = Task.load(TINY / "task.jsonl")
    assert len(found.items) == 200 and {item.score for item in found.items} == {"choice", "exact"}
