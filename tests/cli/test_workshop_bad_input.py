"""Bad input to prune, capture and distill on the command line: exit code, one line that names the remedy, nothing half-written."""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from percard import cli
from percard.quant import distill_state, output

from .conftest import SHARDS, Ran, tensors, write
from .test_bad_input import BROKEN

Run = Callable[..., Ran]
EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-qwen3"
PANGRAM = "the quick brown fox jumps over the lazy dog. "


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    """Texts, a teacher (another copy of the good checkpoint), a capture of it, all of which tests only read."""
    folder = tmp_path_factory.mktemp("place")
    shutil.copytree(checkpoint, folder / "teacher")
    shutil.copytree(checkpoint, folder / "student")
    (folder / "text.txt").write_text(PANGRAM * 40)
    (folder / "short.txt").write_text("a")
    (folder / "empty.txt").write_text("")
    (folder / "keys.jsonl").write_text('{"text": "a"}\n{"txt": 1}\n')
    (folder / "ids.jsonl").write_text('{"ids": [1, 299]}\n{"ids": [1, 2]}\n')
    (folder / "prompts.jsonl").write_text('{"prompt": "ab"}\n')
    capture = ["capture", folder / "teacher", "--data", folder / "text.txt", "--seq-len", 32, "--top-k", 4]
    assert cli.run([str(w) for w in [*capture, "--out", folder / "capture"]]) == 0
    quantize = ["quantize", folder / "student", "--spec", "w4a16-g64", "--out", folder / "w4"]
    assert cli.run([str(w) for w in quantize]) == 0
    return folder


def usual(place: Path, verb: str) -> list[object]:
    """Flags that are right."""
    text = place / "text.txt"
    windows = ["--seq-len", 32]
    train = ["--data", text, *windows, "--batch", 2, "--steps", 2, "--device", "cpu"]
    return {
        "prune": [place / "student", "--group", 64, "--tp", 1, "--calibration", text, *windows, "--samples", 4],
        "capture": [place / "teacher", "--data", text, *windows, "--top-k", 4],
        "distill": [place / "student", "--teacher", place / "teacher", *train],
        "quantised": [place / "w4", "--teacher", place / "teacher", *train],
        "quantised teacher": [place / "student", "--teacher", place / "w4", *train],
        "from capture": [place / "student", "--teacher", place / "capture", *train[4:]],
        "generate": [place / "teacher", "--generate", place / "prompts.jsonl", "--max-new", 2],
    }[verb]


def refused(percard: Run, folder: Path, words: list[object], code: int = 2) -> str:
    """Runs a command line that must fail and leave the folder as it was; the line that it said."""
    before = sorted(folder.rglob("*"))
    ran = percard(*words)
    assert ran.code == code and ran.out == "", (ran.code, ran.err, ran.out)
    assert sorted(folder.rglob("*")) == before
    last = ran.err.splitlines()[-1]  # before it there may be lines of progress
    assert last.startswith(f"percard {words[0]}: ") and ran.err.count(f"percard {words[0]}: ") == 1
    return last


@pytest.mark.parametrize("role", ["prune", "mask", "capture", "student", "teacher"])
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_checkpoint(name: str, role: str, broken: Path, place: Path, tmp_path: Path, percard: Run) -> None:
    spoil, words = BROKEN[name]
    spoil(broken)
    good = usual(place, {"mask": "prune", "student": "distill", "teacher": "distill"}.get(role, role))
    good[2 if role == "teacher" else 0] = broken
    more = {"prune": ["--ffn", 128], "mask": ["--mask", "wanda"]}.get(role, [])
    verb = {"mask": "prune", "student": "distill", "teacher": "distill"}.get(role, role)
    line = refused(percard, tmp_path, [verb, *good, *more, "--out", tmp_path / "out"])
    assert all(word in line for word in words if word != "gptq")
    assert name != "already quantised" or "quantised" in line


# verb, flags ({x} = a file of `place`), words of the line
TABLE: list[tuple[str, list[object], str]] = [
    ("prune", ["--layers", 0], "--layers"),
    ("prune", ["--layers", 1], "the first 2 and the last 2 blocks stay; give at least 2"),
    ("prune", ["--ffn", 0], "--ffn"),
    ("prune", ["--ffn", 512], "the source has 256; pruning makes a model smaller, give at most 256"),
    ("prune", ["--ffn", 250], "ffn 250 (of 256, in steps of 64): nothing would be cut"),
    (
        "prune",
        ["--ffn", 100, "--group", 512],
        "in steps of 512): nothing would be cut; ask for less, or a smaller --group",
    ),
    ("prune", ["--heads", 1, "--group", 128], "no multiple of 1 x 128; give others, or a smaller --tp or --group"),
    ("prune", ["--experts", 2], "this model has no experts; take ffn, layers, heads or hidden"),
    ("prune", ["--target-params", 0.05], "smaller than one round of pruning goes"),
    ("prune", ["--target-params", "nan"], "expected a share such as 0.75"),
    ("prune", ["--target-params", 1.0], "ask for fewer"),
    ("prune", ["--ffn", 128, "--depth-score", "magic"], "choose one of bi, loss, random"),
    ("prune", ["--ffn", 128, "--width-score", "magic"], "choose one of activation, random"),
    ("prune", ["--ffn", 128, "--text", "{no.txt}"], "the held-out text is not there"),
    ("prune", ["--ffn", 128, "--text", "{short.txt}"], "the held-out text has 1 tokens"),
    ("prune", ["--ffn", 128, "--text", "{empty.txt}"], "the held-out text has 0 tokens"),
    ("prune", ["--ffn", 128, "--calibration", "{empty.txt}"], "the file is empty; give text"),
    ("prune", ["--ffn", 128, "--calibration", "{short.txt}"], "less than one window of 32; give more text"),
    ("prune", ["--mask", "magic"], "choose one of magnitude, wanda, sparsegpt"),
    ("prune", ["--mask", "magnitude", "--sparsity", "3:7"], "no multiple of 7; take another pattern"),
    ("prune", ["--mask", "magnitude", "--sparsity", "nan"], "expected a share of zeros"),
    ("capture", ["--data", "{empty.txt}"], "the file is empty; give text for the teacher to read"),
    ("capture", ["--data", "{short.txt}"], "1 tokens are less than one window of 32; give more text"),
    ("capture", ["--data", "{student}"], "the text is a folder; give a text file"),
    ("capture", ["--data", "{student}/" + SHARDS[0]], "is not UTF-8 text; convert the file"),
    ("capture", ["--data", "{keys.jsonl}"], "line 2: keys 'txt', expected one of"),
    ("capture", ["--data", "{ids.jsonl}"], "token id 299, the model's vocabulary has 0 to 255"),
    ("capture", ["--top-k", 0], "choose 1 to 256"),
    ("capture", ["--top-k", 257], "this teacher has 256 tokens; choose 1 to 256"),
    ("capture", ["--seq-len", 65], "above the teacher's 64 positions; lower it"),
    ("generate", ["--generate", "{empty.txt}"], "no prompts; give a line of JSON for each"),
    ("generate", ["--keep", "(a+)+b"], "could take forever"),
    ("generate", ["--keep", "("], "is not a regex"),
    ("generate", ["--keep", "cmd:nosuchprogram"], "cannot be run; give a program's name"),
    ("generate", ["--temperature", 0], "take --n 1, or a higher temperature"),
    ("generate", ["--keep", "never to be seen", "--n", 1, "--temperature", 0], "no completion was kept"),
    ("distill", ["--teacher", "{none}"], "no such folder; give a checkpoint folder"),
    ("distill", ["--teacher", "{student}"], "student and teacher are the same folder"),
    ("distill", ["--teacher", "{teacher}"], "given twice; name each folder once"),
    ("distill", ["--data", "{empty.txt}"], "the file is empty; give text to train on"),
    ("distill", ["--data", "{short.txt}"], "1 tokens are less than one window of 32; give more text"),
    ("distill", ["--data", "{student}"], "the text is a folder; give a text file"),
    ("distill", ["--batch", 500], "56 windows of 32, less than one batch of 500; give more text, or a smaller --batch"),
    ("distill", ["--steps", 0], "--steps 0: expected at least 1"),
    ("distill", ["--tokens", 100], "give one of them"),
    ("distill", ["--lr", "nan"], "expected a number above 0"),
    ("distill", ["--loss", "magic"], "choose one of fkl, rkl, jsd, topk, none"),
    ("distill", ["--loss", "topk"], "give the folder of a capture alone, or take --loss fkl"),
    ("distill", ["--device", "cuda"], "or take --device cpu"),
    ("distill", ["--device", "tpu"], "expected cpu or cuda"),
    ("distill", ["--text", "{no.txt}"], "the held-out text is not there"),
    ("distill", ["--text", "{short.txt}"], "the held-out text has 1 tokens"),
    ("distill", ["--qad", "w9"], "unknown spec 'w9'; examples:"),
    ("distill", ["--scales-only"], "say which it will have, as in --qad w4a16-g64"),
    ("distill", ["--learn-scales"], "add --qad SPEC"),
    ("distill", ["--qad", "w4a16-g64", "--samples", 0], "--samples 0: expected at least 1"),
    ("distill", ["--qad", "w4a16-g64", "--calibration", "{no.txt}"], "is not there; give a text file"),
    ("distill", ["--qad", "w4a16-g64", "--calibration", "{short.txt}"], "less than one window of 32; give more text"),
    ("quantised", [], "or train it as it is with --qad"),
    ("quantised", ["--qad", "w3a16-g64"], "is w4a16-g64; say --qad w4a16-g64, or give the 16-bit student"),
    ("quantised", ["--qad", "w4a16-g64", "--calibration", "{text.txt}"], "has its codes already; leave it out"),
    ("quantised teacher", ["--qad", "w4a16-g64"], "the teacher is quantised; give the 16-bit checkpoint"),
    ("from capture", ["--data", "{text.txt}"], "brings its own text; leave --data out"),
    ("from capture", ["--loss", "fkl"], "it serves topk, or none with --hard 1"),
    ("from capture", ["--temperature", 2], "a capture holds temperature 1"),
    ("from capture", ["--hidden", "mse", "--hidden-blocks", 1], "has no hidden states; take a live teacher"),
    ("from capture", ["--batch", 500], "less than one batch of 500; take a smaller --batch"),
]


@pytest.mark.parametrize(("verb", "flags", "words"), TABLE, ids=[f"{v}-{'-'.join(map(str, f))}" for v, f, _ in TABLE])
def test_flags_that_cannot_be(
    verb: str, flags: list[object], words: str, place: Path, tmp_path: Path, percard: Run
) -> None:
    if flags[-2:] == ["--device", "cuda"] and _has_card():
        pytest.skip("this machine has a card")
    given = [str(f).replace("{", f"{place}/").replace("}", "") if "{" in str(f) else f for f in flags]
    name = {"prune": "prune", "capture": "capture", "generate": "capture"}.get(verb, "distill")
    before = sorted(place.rglob("*"))
    line = refused(percard, tmp_path, [name, *usual(place, verb), *given, "--out", tmp_path / "deep" / "out"])
    assert words in line
    assert sorted(place.rglob("*")) == before


def _has_card() -> bool:
    from percard.kernels import device

    return device.has_card()


RECIPES: list[tuple[dict[str, Any], str]] = [
    ({"stages": [{"distil": {}}]}, "did you mean 'distill'?"),
    ({"stages": [{"prune": {"fnn": 128}}]}, "unknown key 'fnn', did you mean 'ffn'?"),
    ({"stages": [{"prune": {"ffn": 999}}]}, "stage 1 of 1 (prune): ffn 999: the source has 256"),
    ({"teacher": "capture"}, "'capture' is no folder and no earlier stage"),
    ({"teacher": "./nowhere/x"}, "stage 2 of 2 (distill): teacher ./nowhere/x: no such folder; give one"),
    ({"name": "prune"}, "the folder prune belongs to an earlier stage; give this one another `name`"),
    ({"name": "../x"}, "cannot be a folder here"),
    ({"data": "{no.txt}"}, "stage 2 of 2 (distill): {no.txt}: the text is not there"),
    ({"data": "{short.txt}"}, "stage 2 of 2 (distill): {short.txt}: 1 tokens are less than one window of 32"),
    ({"batch": 500}, "stage 2 of 2 (distill): {text.txt}: 1800 tokens are 56 windows of 32, less than one batch"),
    ({"steps": 0}, "--steps 0: expected at least 1"),
    ({"verify": {"text": "{short.txt}"}}, "1 tokens; at least 2 are needed"),
    ({"model": "{w4}"}, "stage 1 of 2 (prune): {w4}: source is already quantised; prune the 16-bit checkpoint first"),
    ({"model": "{none}"}, "no such folder; give a checkpoint folder"),
]


@pytest.mark.parametrize(("change", "words"), RECIPES, ids=[words[:40] for _, words in RECIPES])
def test_recipes_that_cannot_be(change: dict[str, Any], words: str, place: Path, tmp_path: Path, percard: Run) -> None:
    """A wrong last stage is told before the first one starts."""
    cut = {"ffn": 128, "group": 64, "tp": 1, "width_score": "random"}
    train = {"teacher": "source", "data": "{text.txt}", "seq_len": 32, "batch": 2, "steps": 2}
    top = {"model": "{student}", "stages": [{"prune": cut}, {"distill": train}]}
    here = top if set(change) & {"stages", "model", "verify"} else train
    here.update(change)
    filled = json.dumps(top).replace("{no.txt}", f"{place}/no.txt")
    for name in ("text.txt", "short.txt", "student", "w4", "none", "no.txt"):
        filled, words = (text.replace(f"{{{name}}}", f"{place}/{name}") for text in (filled, words))
    (tmp_path / "recipe.yaml").write_text(filled)
    assert words in refused(percard, tmp_path, ["run", tmp_path / "recipe.yaml", "--out", tmp_path / "out"])


@pytest.mark.parametrize("verb", ["prune", "mask", "capture", "distill"])
def test_outputs_that_cannot_be(verb: str, place: Path, tmp_path: Path, percard: Run) -> None:
    name = "prune" if verb == "mask" else verb
    words = [name, *usual(place, name), *{"prune": ["--ffn", 128], "mask": ["--mask", "magnitude"]}.get(verb, [])]
    source, mine = Path(str(words[1])), tmp_path / "mine"
    mine.mkdir()
    (mine / "precious.txt").write_text("mine")
    for out, more, told in (
        (source, ["--force"], "output and source are the same folder; choose another --out"),
        (source / "x", [], "lie inside each other; choose another --out"),
        (place / "text.txt", [], "exists and is a file; choose another --out"),
        (place / "text.txt" / "x", [], "is a file, not a folder; choose another --out"),
        (mine, [], "output exists and is not empty; choose another --out, or replace it with --force"),
        (mine, ["--force"], "--force does not replace it; remove it yourself"),
    ):
        before = {p: p.stat().st_mtime_ns for p in place.rglob("*")}
        assert told in refused(percard, tmp_path, [*words, "--out", out, *more])
        assert {p: p.stat().st_mtime_ns for p in place.rglob("*")} == before
    assert [p.name for p in mine.iterdir()] == ["precious.txt"]


@pytest.mark.parametrize("verb", ["prune", "mask", "capture", "distill"])
def test_a_read_only_output(verb: str, place: Path, tmp_path: Path, percard: Run, monkeypatch: Any) -> None:
    def refuse(self: Path, *arguments: Any, **more: Any) -> None:
        raise OSError(30, "Read-only file system", str(self))

    name = "prune" if verb == "mask" else verb
    words = [name, *usual(place, name), *{"prune": ["--ffn", 128], "mask": ["--mask", "magnitude"]}.get(verb, [])]
    monkeypatch.setattr(output.Path, "mkdir", refuse)
    line = refused(percard, tmp_path, [*words, "--out", tmp_path / "out"], code=1)
    assert "Read-only file system; name another --out" in line


def _config(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        tree = json.loads((EXAMPLE / "config.json").read_text())
        change(tree)
        (folder / "config.json").write_text(json.dumps(tree))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "flags", "words"),
    [
        (_config(lambda c: c.update(per_block=[0] * 8)), ["--layers", 6], "per_block is a list with an entry for each of 8"),
        (_config(lambda c: c.update(a={"b": {"c": [0] * 8}})), ["--layers", 6], "a.b.c is a list with an entry for each of 8"),
        (_config(lambda c: c.update(model_type="deepseek_v3", architectures=["DeepseekV3ForCausalLM"])), ["--heads", 2],
         "unknown architecture (model_type 'deepseek_v3'"),
        (_config(lambda c: c.update(model_type="qwen3_vl", architectures=["Qwen3VLForConditionalGeneration"])),
         ["--hidden", 128], "known model types: qwen2, qwen3, llama, mistral, qwen3_moe"),
    ],
    ids=["list of blocks", "list inside", "heads on MLA", "hidden on VL"],
)  # fmt: skip
def test_configs_that_pruning_does_not_know(
    spoil: Callable[[Path], None], flags: list[object], words: str, tmp_path: Path, percard: Run
) -> None:
    shutil.copytree(EXAMPLE, tmp_path / "model")
    spoil(tmp_path / "model")
    line = refused(percard, tmp_path, ["prune", tmp_path / "model", *flags, "--group", 64, "--tp", 1, "--dry-run"])
    assert words in line


def test_a_list_that_never_goes_by_blocks_is_no_reason(tmp_path: Path, percard: Run) -> None:
    shutil.copytree(EXAMPLE, tmp_path / "model")
    _config(lambda c: c.update(eos_token_id=[0] * 8))(tmp_path / "model")
    ran = percard(
        "prune", tmp_path / "model", "--layers", 6, "--group", 64, "--tp", 1, "--depth-score", "random", "--dry-run"
    )
    assert ran.code == 0, ran.err


def _facts(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        tree = json.loads((folder / "capture.json").read_text())
        change(tree)
        (folder / "capture.json").write_text(json.dumps(tree))

    return spoil


def _shard(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / "shard-00000.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return spoil


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated shard": (_shard(lambda b: b[:-50]), "truncated; fetch or write the file again"),
    "changed shard": (_shard(lambda b: b[:-2] + b"xx"), "changed since; capture it again"),
    "lost shard": (lambda f: (f / "shard-00000.safetensors").unlink(), "missing; capture it again"),
    "lost tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "missing; capture it again"),
    "lost facts": (lambda f: (f / "capture.json").unlink(), "a capture without capture.json: not finished, or cut"),
    "torn facts": (lambda f: (f / "capture.json").write_text('{"schema": 1,'), "not valid JSON"),
    "no facts": (lambda f: (f / "capture.json").write_text("{}"), "or capture it again"),
    "another k": (_facts(lambda t: t.update(k=8)), "says 1792 rows of k = 8: another capture's; capture it again"),
    "vocab too large": (_facts(lambda t: t.update(vocab=9999)), "do not go together; capture it again"),
    "vocab too small": (_facts(lambda t: t.update(vocab=10)), "do not go together; capture it again"),
    "a key is missing": (_facts(lambda t: t.pop("tokenizer")), "not as it was written (KeyError: 'tokenizer')"),
    "a key of another type": (_facts(lambda t: t.update(shards="x")), "not as it was written (TypeError"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_capture(name: str, place: Path, tmp_path: Path, percard: Run) -> None:
    spoil, words = WRONG[name]
    shutil.copytree(place / "capture", tmp_path / "capture")
    spoil(tmp_path / "capture")
    flags = usual(place, "from capture")
    flags[2] = tmp_path / "capture"
    assert words in refused(percard, tmp_path, ["distill", *flags, "--out", tmp_path / "out"])


@pytest.mark.parametrize("teacher", ["teacher", "capture"])
def test_another_tokenizer(teacher: str, place: Path, tmp_path: Path, percard: Run) -> None:
    student = shutil.copytree(place / "student", tmp_path / "student")
    tree = json.loads((student / "tokenizer.json").read_text())
    words = tree["model"]["vocab"]
    first, second = (next(w for w, i in words.items() if i == n) for n in (40, 41))
    words[first], words[second] = 41, 40
    (student / "tokenizer.json").write_text(json.dumps(tree))
    flags = usual(place, "distill" if teacher == "teacher" else "from capture")
    flags[0] = student
    line = refused(percard, tmp_path, ["distill", *flags, "--out", tmp_path / "out"])
    assert "id 40 is" in line and "teacher and student need one tokenizer" in line


@pytest.mark.parametrize("role", ["capture", "student", "teacher", "prune"])
def test_no_tokenizer(role: str, place: Path, tmp_path: Path, percard: Run) -> None:
    model = shutil.copytree(place / "student", tmp_path / "model")
    (model / "tokenizer.json").unlink()
    verb = {"student": "distill", "teacher": "distill"}.get(role, role)
    flags = usual(place, verb)
    flags[2 if role == "teacher" else 0] = model
    more = ["--ffn", 128] if role == "prune" else []
    assert "tokenizer.json: not there" in refused(percard, tmp_path, [verb, *flags, *more, "--out", tmp_path / "out"])


@pytest.mark.parametrize("kind", ["text", "completions"])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight"])
def test_a_teacher_whose_last_words_are_no_numbers(
    name: str, kind: str, place: Path, tmp_path: Path, percard: Run
) -> None:
    """Behind the last block, and in a row of the head whose id is not in the text: no block's output shows it."""
    weights = tensors()
    weights[name].view(-1)[3] = float("inf")
    flags = usual(place, "capture" if kind == "text" else "generate")
    flags[0] = write(tmp_path / "model", weights)
    line = refused(percard, tmp_path, ["capture", *flags, "--out", tmp_path / "out"])
    assert f"tensor {name} holds NaN or Inf; repair the source" in line


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight_scale"])
def test_a_quantised_student_with_what_is_no_number(name: str, place: Path, tmp_path: Path, percard: Run) -> None:
    student = shutil.copytree(place / "w4", tmp_path / "w4")
    for file in student.glob("*.safetensors"):
        table = load_file(file)
        if name in table:
            table[name].view(-1)[3] = float("nan")
            save_file(table, file, {"format": "pt"})
    flags = usual(place, "quantised")
    flags[0] = student
    line = refused(percard, tmp_path, ["distill", *flags, "--qad", "w4a16-g64", "--out", tmp_path / "out"])
    assert name.rpartition(".")[0] in line and "holds NaN or Inf" in line


def test_a_loss_that_is_no_number_exits_1_and_leaves_nothing(place: Path, tmp_path: Path, percard: Run) -> None:
    words = ["distill", *usual(place, "distill"), "--lr", 1e30, "--steps", 20, "--out", tmp_path / "out"]
    line = refused(percard, tmp_path, words, code=1)
    assert "is nan at batch sha256" in line and "no good state is there yet" in line and "lower --lr" in line


def limited(words: list[object], said: Path, hook: Callable[[], None]) -> tuple[int, str]:
    """(exit code, last line) of a command line in a process of its own, in which `hook` was called before."""
    child = os.fork()
    if not child:
        try:
            file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            sys.stderr = os.fdopen(file, "w", buffering=1)
            hook()
            os._exit(cli.run([str(w) for w in words]))
        finally:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said.read_text().splitlines()[-1]


def _small() -> None:
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (50_000, 50_000)
    )  # bytes of a file; a disk that is full says another errno


def _small_behind_a_state() -> None:
    import torch

    torch.set_num_threads(1)
    real = distill_state.save

    def save(*arguments: Any) -> None:
        real(*arguments)
        _small()

    distill_state.save = save  # type: ignore[assignment]


@pytest.mark.parametrize("verb", ["prune", "mask", "capture"])
def test_a_full_disk_leaves_nothing(verb: str, place: Path, tmp_path: Path) -> None:
    name = "prune" if verb == "mask" else verb
    words = [name, *usual(place, name), *{"prune": ["--ffn", 128], "mask": ["--mask", "magnitude"]}.get(verb, [])]
    code, line = limited([*words, "--out", tmp_path / "out"], tmp_path / "said", _small)
    assert code == 1 and "disk full (File too large); free some space or name another --out" in line
    assert "the unfinished output was removed" in line and [p.name for p in tmp_path.iterdir()] == ["said"]


def test_a_full_disk_keeps_the_state_and_says_so(place: Path, tmp_path: Path, percard: Run) -> None:
    flags = [*usual(place, "distill"), "--every", 2, "--steps", 6]
    assert percard("distill", *flags, "--out", tmp_path / "whole").code == 0
    words = ["distill", *flags, "--out", tmp_path / "out"]
    code, line = limited(words, tmp_path / "said", _small_behind_a_state)
    left = tmp_path / ".out.percard-unfinished" / ".percard-work"
    assert code == 1 and "state-00000004.tmp: disk full (File too large); free some space or name another --out" in line
    assert "what is finished is kept: the same command goes on, --fresh starts over" in line and "removed" not in line
    assert sorted(p.name for p in left.iterdir() if "state" in p.name) == ["state-00000002"]
    assert percard(*words).code == 0 and not left.exists()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()
