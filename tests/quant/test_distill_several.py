"""Distilling from several teachers at once: captures together, a model that reads what another one wrote, what is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from percard.cli import app
from percard.formats.spec import FormatError
from percard.quant import capture, completions, distill, distill_data, distill_report
from percard.quant.capture_cache import Capture
from percard.quant.distill_data import CapturedData, Data
from percard.quant.distill_losses import Objective, distill_objective
from percard.quant.distill_plan import plan
from percard.quant.keep import Keep

from .test_capture import with_tokenizer
from .test_completions import Speaker
from .test_distill import curve, models, wish

Tiny = Callable[..., Path]


@pytest.fixture
def both(tiny: Tiny) -> tuple[Path, Path]:
    """(student, teacher) with a tokenizer of 96 words."""
    student, teacher = models(tiny)
    for folder in (student, teacher):
        with_tokenizer(folder, 96)
    return student, teacher


def captured(teacher: Path, lines: list[str], out: Path, k: int = 96) -> Path:
    """A capture of lines of ids."""
    text = out.with_suffix(".jsonl")
    text.write_text("".join(line + "\n" for line in lines))
    capture.run(capture.plan(teacher, str(text), top_k=k, seq_len=32), out)
    return out


def written(teacher: Path, out: Path, k: int = 0) -> Path:
    """Completions of three prompts, nine windows of random words."""
    prompts = out.with_suffix(".jsonl")
    prompts.write_text("".join(json.dumps({"ids": list(range(3, 5 + i))}) + "\n" for i in range(3)))
    asked = completions.plan(
        teacher, prompts, keep=Keep.parse(None, 5), n=3, max_new=20, **({"top_k": k} if k else {})
    )  # fmt: skip
    completions.run(asked, Speaker(), out)
    return out


def lines_of(student: Path) -> list[str]:
    return (student / "calibration.jsonl").read_text().splitlines()


def test_two_captures_are_one_text(both: tuple[Path, Path], tmp_path: Path) -> None:
    student, teacher = both
    lines, asked = lines_of(student), dataclasses.replace(wish(student), data=None)
    whole = captured(teacher, lines, tmp_path / "whole")
    parts = [captured(teacher, lines[:7], tmp_path / "front"), captured(teacher, lines[7:], tmp_path / "back")]
    distill.run(student, whole, tmp_path / "one", asked)
    done = distill.run(student, parts, tmp_path / "two", asked)
    assert curve(tmp_path / "two") == curve(tmp_path / "one")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]
    assert done["data"]["windows"] == 12 and [s["windows"] for s in done["data"]["sources"]] == [7, 5]
    assert done["captures"] == [str(p) for p in parts] and done["text"] == "front + back" and not done["warnings"]
    assert "front + back" in (tmp_path / "two" / "README.md").read_text()


def test_the_fewest_kept_tokens_are_read_and_the_others_join_the_rest(both: tuple[Path, Path], tmp_path: Path) -> None:
    student, teacher = both
    lines = lines_of(student)
    few, many = (captured(teacher, lines[:6], tmp_path / f"k{k}", k) for k in (5, 96))
    ours, theirs = (CapturedData(Capture.open(folder), 5, 96).row(2).kept for folder in (many, few))
    assert ours is not None and theirs is not None
    assert torch.equal(ours.ids, theirs.ids) and torch.equal(ours.logp, theirs.logp)
    # Ninety-one roundings to fp16, of logarithms up to 16: 2^-8 each at most.
    torch.testing.assert_close(ours.log_rest, theirs.log_rest, rtol=0, atol=2**-8)
    asked = dataclasses.replace(wish(student), data=None)
    planned = plan(student, [many, captured(teacher, lines[6:], tmp_path / "rest", 5)], asked)
    assert planned.k == 5 and planned.to_dict()["loss"] == "topk"
    assert planned.warnings == (
        "k96: keeps 96 tokens of a position, 5 are read as of the others; what is behind joins the rest",
    )


def test_a_sure_teacher_is_cross_entropy() -> None:
    random = torch.Generator().manual_seed(4)
    x, w = torch.randn(9, 6, generator=random), torch.randn(11, 6, generator=random)
    labels = torch.randint(0, 11, (9,), generator=random)
    counted = torch.arange(9) != 8
    found = []
    for target, objective in (
        (distill_data.certain(labels, 4, 11), Objective("topk")),
        (None, Objective("none", hard=1.0)),
    ):
        leaves = [t.clone().requires_grad_() for t in (x, w)]
        loss, _ = distill_objective(*leaves, target, labels, counted, objective, vocab=11, total=8)
        loss.backward()
        found.append([loss.detach(), *(t.grad for t in leaves)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    kept = distill_data.certain(labels, 11, 11)
    assert bool((kept.ids.sort().values == torch.arange(11)).all()) and bool((kept.logp[:, 1:].exp() == 0).all())


def test_completions_and_a_capture_together(both: tuple[Path, Path], tmp_path: Path) -> None:
    student, teacher = both
    text = captured(teacher, lines_of(student), tmp_path / "text", 8)
    said = written(teacher, tmp_path / "said")
    found = Data([CapturedData(Capture.open(folder), 8, 96) for folder in (text, said)], 0)
    assert found.windows == 12 + 9
    seen = [found.batch(step, 7) for step in range(3)]
    assert sum(len(b.ids) for b in seen) == 21 and all(b.kept is not None and b.kept.ids.shape[1] == 8 for b in seen)
    prompts = Capture.open(said)
    counted = sum(int(b.counted.sum()) for b in seen)
    assert counted == 12 * 31 + sum(int(prompts.windows(i).counted.sum()) for i in range(9)) < found.count(21) - 21
    sure = sum(int((b.kept.logp[:, 0] == 0).reshape(b.counted.shape)[b.counted].sum()) for b in seen)  # type: ignore[union-attr]
    assert sure == counted - 12 * 31, "completions without probabilities are sure, the others are not"
    asked = dataclasses.replace(wish(student, steps=24), data=None)
    done = distill.run(student, [said, text], tmp_path / "out", asked)
    assert sum(curve(tmp_path / "out")[-3:]) < 0.95 * sum(curve(tmp_path / "out")[:3])
    assert done["loss"] == "topk" and done["teacher"] == str(text), "the one that keeps probabilities"
    assert "said: keeps no probabilities; its tokens count as sure (cross-entropy)" in done["warnings"]
    hard = dataclasses.replace(asked, loss="none", hard=1.0, steps=2)
    assert distill.run(student, [said, text], tmp_path / "hard", hard)["curve"][0]["divergence"] == 0
    both_soft = plan(student, [text, written(teacher, tmp_path / "soft", 8)], asked)
    assert both_soft.k == 8 and not both_soft.warnings


def test_a_model_reads_what_was_captured(both: tuple[Path, Path], tmp_path: Path) -> None:
    student, teacher = both
    lines, asked = lines_of(student), wish(student)
    distill.run(student, teacher, tmp_path / "text", asked)
    front, back = (captured(teacher, part, tmp_path / name, 4) for name, part in (("f", lines[:7]), ("b", lines[7:])))
    done = distill.run(student, [front, teacher, back], tmp_path / "read", dataclasses.replace(asked, data=None))
    assert done["loss"] == "fkl" and curve(tmp_path / "read") == curve(tmp_path / "text")
    assert "f: its text is trained on; what it kept is not read, teacher says it anew" in done["warnings"]
    (tmp_path / "short.jsonl").write_text("".join(line + "\n" for line in lines[:7]))
    mixed = dataclasses.replace(asked, data=str(tmp_path / "short.jsonl"), batch=8)  # neither has a batch of its own
    done = distill.run(student, [teacher, back], tmp_path / "mixed", mixed)
    assert [s["windows"] for s in done["data"]["sources"]] == [7, 5] and done["window"] == 32
    distill.run(student, teacher, tmp_path / "plain", dataclasses.replace(asked, batch=8))
    assert curve(tmp_path / "mixed") == curve(tmp_path / "plain")
    assert json.loads((tmp_path / "mixed" / distill_report.NAME).read_text())["captures"] == [str(back)]


def test_another_second_capture_is_another_run(
    both: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = both
    lines, asked = lines_of(student), dataclasses.replace(wish(student, steps=4), data=None)
    a, b, c = (captured(teacher, lines[i : i + 4], tmp_path / f"c{i}") for i in (0, 4, 8))
    real = distill.Writer.finish
    distill.run(student, [a, b], tmp_path / "whole", asked)

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(distill.Writer, "finish", stop)
    with pytest.raises(KeyboardInterrupt):
        distill.run(student, [a, b], tmp_path / "out", asked)
    monkeypatch.setattr(distill.Writer, "finish", real)
    with pytest.raises(FileExistsError, match="differs from it in captures"):
        distill.run(student, [a, c], tmp_path / "out", asked)
    distill.run(student, [a, b], tmp_path / "out", asked)
    assert curve(tmp_path / "out") == curve(tmp_path / "whole")


def test_what_several_teachers_cannot_be(both: tuple[Path, Path], tiny: Tiny, tmp_path: Path) -> None:
    student, teacher = both
    lines, asked = lines_of(student), wish(student)
    none = dataclasses.replace(asked, data=None)
    one, two = (captured(teacher, part, tmp_path / name) for name, part in (("one", lines[:3]), ("two", lines[3:5])))
    other = with_tokenizer(tiny("qwen3", name="other", max_position_embeddings=32), 96)
    longer = with_tokenizer(tiny("qwen3", name="longer", max_position_embeddings=64), 96)
    far = tmp_path / "far"
    (tmp_path / "far.jsonl").write_text(json.dumps({"ids": list(range(64))}) + "\n")
    capture.run(capture.plan(longer, str(tmp_path / "far.jsonl"), top_k=4, seq_len=64), far)
    fewer = captured(with_tokenizer(tiny("qwen3", name="fewer", max_position_embeddings=32), 90), [
        json.dumps({"ids": [i % 90 for i in range(32)]})], tmp_path / "ninety", 8)  # fmt: skip
    for teachers, over, words in (
        ([], none, "--teacher is missing"),
        ([teacher, other], asked, r"runs along already; one model and any number of captures"),
        ([one, two, one], none, r"one: given twice"),
        ([one, student], none, "student and teacher are the same folder"),
        ([one, two], none, None),
        ([one, two], dataclasses.replace(none, batch=6), "one, .*two: 5 windows, less than one batch of 6"),
        ([teacher, one], none, "one: 3 windows, less than one batch of 4"),
        ([one, two], asked, "are captures and bring their own text; leave --data out, or add a model"),
        (
            [teacher, one],
            dataclasses.replace(asked, loss="topk"),
            "teacher is a model; give the folder of a capture alone",
        ),
        ([teacher, far], asked, "far: has windows of 64 tokens, both models 32 positions"),
        ([one, fewer], none, "ninety: was captured over 90 tokens, .*one over 96; capture both with one tokenizer"),
    ):
        if words is None:
            assert plan(student, teachers, over).window == 32
            continue
        with pytest.raises(FormatError, match=words):
            plan(student, teachers, over)
    spoilt = captured(other, lines[5:9], tmp_path / "spoilt")
    assert (
        "from 2 teachers; the student learns something between them" in plan(student, [one, spoilt], none).warnings[0]
    )
    shard = next(spoilt.glob("shard-*"))
    shard.write_bytes(shard.read_bytes()[:-3] + b"odd")
    with pytest.raises(FormatError, match="changed since; capture it again"):
        distill.run(student, [one, spoilt], tmp_path / "out", none)
    assert not (tmp_path / "out").exists()


def test_the_command_takes_teacher_twice(both: tuple[Path, Path], tmp_path: Path) -> None:
    student, teacher = both
    parts = [captured(teacher, lines_of(student)[i : i + 6], tmp_path / f"c{i}", 4) for i in (0, 6)]
    words = ["distill", str(student), "--teacher", str(parts[0]), "--teacher", str(parts[1]), "--batch", "4"]
    done = CliRunner().invoke(app, [*words, "--dry-run", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)
    assert found["captures"] == [str(p) for p in parts] and found["loss"] == "topk" and found["window"] == 32
