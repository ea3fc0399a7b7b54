"""Distilling: losses against autograd and golden values, a run and its output, kills, refusals."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from percard.formats.checkpoint import Checkpoint
from percard.formats.spec import FormatError
from percard.quant import capture, distill, distill_data, distill_losses, distill_report, distill_state, distill_train
from percard.quant.distill_losses import Dense, Objective, Target, TopK, distill_objective
from percard.quant.distill_plan import Refused, Wish, plan
from percard.quant.distill_train import Diverged, Schedule

from .test_capture import with_tokenizer
from .test_resume import with_text

Tiny = Callable[..., Path]
Z_S, Z_T = torch.tensor([[0.0, 1.0, 2.0, 4.0]]), torch.tensor([[1.0, 0.0, 2.0, 3.0]])
GOLDEN = [
    (Objective("fkl"), 0.156164, (-0.071925, 0.009312, -0.124426, 0.187038)),
    (Objective("rkl"), 0.112111, (-0.028264, 0.005912, -0.096388, 0.118740)),
    (Objective("jsd", 0.5), 0.031527, (-0.009504, 0.001721, -0.026793, 0.034576)),
    (Objective("jsd", 0.1), 0.013248, None),
    (Objective("jsd", 0.001), 0.000156, None),
    (Objective("fkl", temperature=2.0), 0.256300, None),
    (Objective("rkl", temperature=2.0), 0.225558, None),
    (Objective("jsd", 0.5, 2.0), 0.059378, None),
]


@pytest.mark.parametrize(("objective", "loss", "gradient"), GOLDEN, ids=[str(i) for i in range(len(GOLDEN))])
def test_golden_losses(objective: Objective, loss: float, gradient: tuple[float, ...] | None) -> None:
    found, dz = _of_logits(Z_S, Dense(Z_T, torch.eye(4)), objective)
    assert float(found) == pytest.approx(loss, abs=1e-6)
    if gradient is not None:
        assert dz[0].tolist() == pytest.approx(gradient, abs=1e-6)


@pytest.mark.parametrize(("k", "loss"), [(1, 0.101078), (2, 0.101078), (3, 0.156164), (4, 0.156164)])
def test_golden_topk(k: int, loss: float) -> None:
    assert float(_of_logits(Z_S, _kept(Z_T, k), Objective("topk"))[0]) == pytest.approx(loss, abs=1e-6)


def _of_logits(z: torch.Tensor, target: Target, objective: Objective) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of the divergences of rows z [N, V], gradient by z): hidden states that are logits, a head that is one."""
    z = z.clone().requires_grad_()
    n, vocab = z.shape
    every, none = torch.ones(n, dtype=torch.bool), torch.full((n,), -1)
    loss, _ = distill_objective(z, torch.eye(vocab), target, none, every, objective, vocab=vocab, total=1)
    loss.backward()
    assert z.grad is not None
    return loss.detach(), z.grad


def _kept(z: torch.Tensor, k: int) -> TopK:
    logp, ids = torch.log_softmax(z, -1).sort(dim=-1, descending=True, stable=True)
    return TopK(ids[:, :k], logp[:, :k], logp[:, k:].logsumexp(-1))


def _plain(z_s: torch.Tensor, z_t: torch.Tensor, o: Objective, k: int) -> torch.Tensor:
    """The divergence as the formulas have it, for autograd; [N]."""
    a, b = torch.log_softmax(z_s / o.temperature, -1), torch.log_softmax(z_t / o.temperature, -1)
    if o.kind == "fkl":
        return o.temperature**2 * (b.exp() * (b - a)).sum(-1)
    if o.kind == "rkl":
        return o.temperature**2 * (a.exp() * (a - b)).sum(-1)
    if o.kind == "jsd":
        m = (o.beta * b.exp() + (1 - o.beta) * a.exp()).log()
        both = o.beta * (b.exp() * (b - m)).sum(-1) + (1 - o.beta) * (a.exp() * (a - m)).sum(-1)
        return o.temperature**2 * both
    kept = _kept(z_t, k)
    inside = torch.zeros_like(a, dtype=torch.bool).scatter_(1, kept.ids, True)
    rest = a.masked_fill(inside, float("-inf")).logsumexp(-1)
    each = (kept.logp.exp() * (kept.logp - a.gather(1, kept.ids))).sum(-1)
    return each + kept.log_rest.exp() * (kept.log_rest - rest)


@pytest.mark.parametrize("kind", ["fkl", "rkl", "jsd", "topk", "none"])
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_losses_and_gradients_are_autograds(kind: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    random = torch.Generator().manual_seed(4)
    vocab, n, heat = 11, 8, 1.0 if kind == "topk" else 1.7
    monkeypatch.setattr(distill_losses, "CHUNK_BYTES", chunk * 2 * 4 * vocab)
    x, w = torch.randn(n, 6, generator=random), torch.randn(13, 6, generator=random)
    x_t, w_t = torch.randn(n, 5, generator=random), torch.randn(16, 5, generator=random)
    w_t[vocab:] = 50.0  # padding of a head: it must weigh nothing
    labels, counted = torch.randint(0, vocab, (n,), generator=random), torch.rand(n, generator=random) > 0.3
    objective = Objective(kind, 0.3, heat, 0.5)
    z_t = x_t @ w_t[:vocab].T
    target: Any = {"topk": _kept(z_t, 4), "none": None}.get(kind, Dense(x_t, w_t))
    total = 20
    leaves = [t.clone().requires_grad_() for t in (x, w)]
    loss, parts = distill_objective(*leaves, target, labels, counted, objective, vocab=vocab, total=total)
    (3 * loss).backward()
    plain = [t.clone().requires_grad_() for t in (x, w)]
    z = plain[0] @ plain[1][:vocab].T
    soft = _plain(z, z_t, objective, 4) if kind != "none" else z.sum(-1) * 0
    hard = F.cross_entropy(z, labels, reduction="none")
    expected = ((soft + 0.5 * hard) * counted).sum() / total
    (3 * expected).backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(parts[1], (hard * counted).sum() / total, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(leaves, plain, strict=True):
        assert ours.grad is not None and theirs.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    assert bool((leaves[1].grad[vocab:] == 0).all())  # type: ignore[index]


def test_losses_at_the_edges() -> None:
    z = torch.randn(4, 9, generator=torch.Generator().manual_seed(0)) * 80
    for kind in ("fkl", "rkl", "jsd"):
        loss, dz = _of_logits(z, Dense(z, torch.eye(9)), Objective(kind))
        assert abs(float(loss)) < 1e-4 and float(dz.abs().max()) < 1e-5, kind
        loss, dz = _of_logits(z, Dense(z.flip(0), torch.eye(9)), Objective(kind))
        assert bool(torch.isfinite(loss)) and bool(torch.isfinite(dz).all()), kind
    alone, dz = _of_logits(z, Dense(z.flip(0), torch.eye(9)), Objective("none"))  # a teacher of hidden states
    assert float(alone) == float(dz.abs().max()) == 0
    nothing = torch.zeros(3, dtype=torch.bool)
    x, w = torch.randn(3, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    loss, _ = distill_objective(
        x, w, None, torch.zeros(3, dtype=torch.int64), nothing, Objective("none", hard=1.0), vocab=9, total=1
    )
    loss.backward()
    assert float(loss.detach()) == 0 and float(x.grad.abs().max()) == float(w.grad.abs().max()) == 0  # type: ignore[union-attr]


def models(tiny: Tiny, kind: str = "qwen3", **student: Any) -> tuple[Path, Path]:
    """(student, teacher): random models of one tokenizer, the student smaller; a text beside it."""
    over = {"dtype": torch.bfloat16, "max_position_embeddings": 32}

    def louder(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:  # a random model says next to nothing: nothing could be learnt from it
            if tensors[name].ndim > 1:
                tensors[name] *= 4

    teacher = tiny(kind, name="teacher", num_hidden_layers=3, change=louder, **over)
    small = {"num_hidden_layers": 2, "intermediate_size": 192, "shards": 1, **student}
    return with_text(tiny(kind, name="student", **over, **small), 12), teacher


def wish(student: Path, **over: Any) -> Wish:
    given = {"steps": 6, "batch": 4, "seq_len": 32, "lr": 3e-3, "every": 2, "device": "cpu", **over}
    return Wish(str(student / "calibration.jsonl"), **given)


def curve(folder: Path) -> list[float]:
    return [point["loss"] for point in json.loads((folder / distill_report.NAME).read_text())["curve"]]


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe", "llama"])
def test_a_student_learns_and_is_an_ordinary_checkpoint(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    from transformers import AutoModelForCausalLM

    student, teacher = models(tiny, kind)
    seen: list[Any] = []
    out = tmp_path / "out"
    done = distill.run(student, teacher, out, wish(student, steps=20, every=50), progress=seen.append)
    losses = curve(out)
    assert len(losses) == 20 and sum(losses[-3:]) < 0.9 * sum(losses[:3])
    assert "tok/s" in seen[-1].label and seen[-1].done == 20
    before, after = Checkpoint.open(student), Checkpoint.open(out)
    assert {n: (i.dtype, i.shape) for n, i in before.tensors.items()} == {
        n: (i.dtype, i.shape) for n, i in after.tensors.items()
    }
    assert ("lm_head.weight" in after.names) == (kind != "qwen3")
    changed = [n for n in after.names if not torch.equal(after.read(n), before.read(n))]
    assert len(changed) > 0.8 * len(after.names)
    _, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert (out / distill_report.PICTURE).read_bytes()[:4] == b"\x89PNG"
    card = (out / "README.md").read_text()
    assert "`teacher`" in card and "forward KL" in card and f"{done['trained_tokens']:,}" in card and "LICENSE" in card
    assert (out / "LICENSE").is_file() and not (out / ".percard-work").exists()


def test_hidden_states_through_projections_that_are_dropped(tiny: Tiny, tmp_path: Path) -> None:
    student, teacher = models(tiny, hidden_size=64)
    found = {}
    for kind in ("mse", "cosine"):
        asked = wish(student, loss="none", hidden=kind, hidden_blocks="0:1,1:2", steps=12, every=50)
        distill.run(student, teacher, tmp_path / kind, asked)
        found[kind] = curve(tmp_path / kind)
        assert found[kind][-1] < 0.95 * found[kind][0]
        names = Checkpoint.open(tmp_path / kind).names
        assert names == Checkpoint.open(student).names
    assert found["mse"] != found["cosine"]


def test_checkpointing_parts_and_bf16_change_no_curve(tiny: Tiny, tmp_path: Path) -> None:
    student, teacher = models(tiny)
    over = {"hidden": "cosine", "hidden_blocks": "1:2", "hard": 0.1, "steps": 3}
    distill.run(student, teacher, tmp_path / "a", wish(student, **over))
    distill.run(student, teacher, tmp_path / "b", wish(student, checkpointing=False, micro=1, **over))
    assert curve(tmp_path / "a") == pytest.approx(curve(tmp_path / "b"), rel=1e-5)
    distill.run(student, teacher, tmp_path / "c", wish(student, dtype="bf16", **over))
    # bf16 keeps 8 bits: 2^-8 relative in each of two heads' logits, which the loss is first order in.
    assert curve(tmp_path / "a") == pytest.approx(curve(tmp_path / "c"), rel=2**-5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_caller_without_gradients_does_not_matter(tiny: Tiny, tmp_path: Path, mode: Any) -> None:
    student, teacher = models(tiny)
    asked = wish(student, steps=2)
    distill.run(student, teacher, tmp_path / "plain", asked)
    with mode():
        distill.run(student, teacher, tmp_path / "within", asked)
    assert curve(tmp_path / "plain") == curve(tmp_path / "within")


def test_a_killed_run_repeats_its_curve(tiny: Tiny, tmp_path: Path) -> None:
    student, teacher = models(tiny)
    asked = wish(student, steps=7)
    distill.run(student, teacher, tmp_path / "whole", asked)
    out = tmp_path / "killed"
    left = tmp_path / ".killed.percard-unfinished" / ".percard-work"
    for stage, (where, stays) in enumerate([("step", 2), ("state", 2), ("step", 4), ("write", 7)]):
        child = os.fork()
        if not child:  # SIGKILL behind step 2 and 3 more, while a state is written, while the result is written
            _kill_at(where, 3)
            distill.run(student, teacher, out, asked)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert not out.exists()
        assert max(int(p.name[6:]) for p in distill_state.states(left)) == stays, stage
    with pytest.raises(FileExistsError, match="differs from it in what is trained how"):
        distill.run(student, teacher, out, dataclasses.replace(asked, temperature=2.0))
    distill.run(student, teacher, out, asked)
    assert curve(out) == curve(tmp_path / "whole")
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def _kill_at(where: str, steps: int) -> None:
    """Makes this process kill itself: behind so many steps, when a state has its bytes but no name, or at the end."""
    torch.set_num_threads(1)
    die = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
    if where == "step":
        real, seen = distill_state.Curve.add, []

        def add(self: Any, point: dict[str, Any]) -> None:
            real(self, point)
            seen.append(point)
            die() if len(seen) == steps else None

        distill_state.Curve.add = add  # type: ignore[method-assign]
    elif where == "state":
        Path.rename = die  # type: ignore[method-assign,assignment]
    else:
        distill.Writer.finish = die  # type: ignore[method-assign]


def test_a_capture_stands_in_for_the_teacher(tiny: Tiny, tmp_path: Path) -> None:
    student, teacher = models(tiny)
    for folder in (student, teacher):
        with_tokenizer(folder, 96)
    text, cache = student / "calibration.jsonl", tmp_path / "cache"
    capture.run(capture.plan(teacher, str(text), top_k=96, seq_len=32), cache)
    asked = wish(student, steps=4)
    distill.run(student, teacher, tmp_path / "live", asked)
    found = dataclasses.replace(asked, data=None)
    distill.run(student, cache, tmp_path / "kept", found)
    # The whole vocabulary is kept, so it is forward KL; fp16 rounds a log-probability of 4 to 8 by 2^-9 at most, which the loss
    # is off by where all are rounded one way, and as much again through the steps before.
    assert curve(tmp_path / "kept") == pytest.approx(curve(tmp_path / "live"), abs=2**-8)
    assert json.loads((tmp_path / "kept" / distill_report.NAME).read_text())["loss"] == "topk"
    for over, words in (
        ({"data": str(text)}, "brings its own text"),
        ({"loss": "rkl"}, "it serves topk"),
        ({"temperature": 2.0}, "holds temperature 1"),
        ({"hidden": "mse", "hidden_blocks": "1"}, "has no hidden states"),
        ({"batch": 13}, "12 windows, less than one batch of 13"),
    ):
        with pytest.raises(FormatError, match=words):
            plan(student, cache, dataclasses.replace(found, **over))
    with pytest.raises(FormatError, match="give the folder of a capture"):
        plan(student, teacher, dataclasses.replace(asked, loss="topk"))


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_state(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = models(tiny)
    out, left = tmp_path / "out", tmp_path / ".out.percard-unfinished"
    real = distill_train._step

    def poisoned(*args: Any) -> dict[str, Any]:
        point = real(*args)
        return point | ({"loss": float("nan")} if point["step"] == 5 else {})

    monkeypatch.setattr(distill_train, "_step", poisoned)
    # The state of step 4 is doubted: no step that started from it went well.
    with pytest.raises(
        Diverged, match=r"step 5: the loss is nan at batch sha256 [0-9a-f]{16}; .* state of step 2 is kept"
    ):
        distill.run(student, teacher, out, wish(student))
    assert not out.exists() and [p.name for p in distill_state.states(left / ".percard-work")] == ["state-00000002"]
    monkeypatch.setattr(distill_train, "_step", real)
    distill.run(student, teacher, out, wish(student, lr=1e-3))
    assert len(curve(out)) == 6 and not left.exists()
    monkeypatch.setattr(distill_train, "_step", lambda *a: poisoned(*a) | {"norm": float("inf")})
    with pytest.raises(Diverged, match=r"step 1: the gradient is inf .* no good state is there yet"):
        distill.run(student, teacher, tmp_path / "other", wish(student))
    assert not (tmp_path / "other").exists() and not (tmp_path / ".other.percard-unfinished").exists()


def test_the_order_of_windows_and_the_schedule() -> None:
    walk = [i for step in range(6) for i in distill_data.order(7, 3, step * 3, 3)]
    assert sorted(walk[:7]) == sorted(walk[7:14]) == list(range(7)) and walk[:7] != walk[7:14]
    assert walk != [i for step in range(6) for i in distill_data.order(7, 4, step * 3, 3)]
    rates = [Schedule(200, 1, 1, 1.0, 0.0, 1).rate(i) for i in range(200)]
    assert rates[:3] == pytest.approx([0.1, 0.2, 0.3]) and max(rates) == 1.0 and rates[-1] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert Schedule(1000, 1, 1, 1.0, 0.0, 1).rate(19) == 1.0 > Schedule(1000, 1, 1, 1.0, 0.0, 1).rate(18)
    assert Schedule(3, 1, 1, 1.0, 0.0, 1).rate(2) == 1.0


def test_norms_are_not_decayed(tiny: Tiny) -> None:
    student, _ = models(tiny)
    from percard.quant import distill_models

    model = distill_models.load(student, torch.float32)
    made = distill_models.Student(model, Objective(), None, 96, torch.float32, 128)
    found = distill_train.optimiser_of(made, Schedule(1, 1, 1, 1e-3, 0.1, 1))
    assert [g["weight_decay"] for g in found.param_groups] == [0.1, 0.0]
    assert all(p.ndim == 1 for p in found.param_groups[1]["params"])
    assert sum(len(g["params"]) for g in found.param_groups) == len(list(made.parameters()))


def test_roles_that_look_swapped_are_a_question(tiny: Tiny, tmp_path: Path) -> None:
    student, teacher = models(tiny)
    with_text(teacher, 12)
    asked = wish(teacher, steps=1)
    assert "are they swapped?" in plan(teacher, student, asked).question
    with pytest.raises(Refused, match="say --yes if a larger student is meant"):
        distill.run(teacher, student, tmp_path / "out", asked)
    assert not (tmp_path / "out").exists()
    distill.run(teacher, student, tmp_path / "out", asked, yes=True)
    assert not plan(student, teacher, wish(student)).question


def test_vocabularies_are_aligned_by_the_tokenizer(tiny: Tiny, tmp_path: Path) -> None:
    student, teacher = models(tiny)
    padded = tiny("qwen3", name="padded", num_hidden_layers=3, vocab_size=128, max_position_embeddings=32)

    def tokenizer(folder: Path, words: list[str]) -> None:
        from tokenizers import Tokenizer, models, pre_tokenizers

        made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
        made.pre_tokenizer = pre_tokenizers.Whitespace()
        made.save(str(folder / "tokenizer.json"))

    words = [f"w{i}" for i in range(90)]
    for folder in (student, padded):
        tokenizer(folder, words)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{i * 7 % 90}" for i in range(400)))
    asked = dataclasses.replace(wish(student, steps=2), data=str(text))
    assert plan(student, padded, asked).vocab == 90
    distill.run(student, padded, tmp_path / "out", asked)
    tokenizer(padded, [*words[:41], "other", *words[42:]])
    with pytest.raises(
        FormatError, match=r"id 41 is 'w41', in .* it is 'other'; teacher and student need one tokenizer"
    ):
        plan(student, padded, asked)
    tokenizer(padded, [*words, "more"])
    assert plan(student, padded, asked).vocab == 90
    with pytest.raises(FormatError, match="not a tokenizer"):
        plan(student, teacher, asked)
    (padded / "tokenizer.json").unlink()
    with pytest.raises(FormatError, match="not there; it says which ids are tokens"):
        plan(student, padded, asked)


def test_bad_input_is_one_clear_line(tiny: Tiny, tmp_path: Path) -> None:
    student, teacher = models(tiny)

    def refused(match: str, folder: Path = student, other: Path = teacher, **over: Any) -> None:
        with pytest.raises(FormatError, match=match):
            distill.run(folder, other, tmp_path / "out", dataclasses.replace(wish(student), **over))
        assert not (tmp_path / "out").exists()

    empty, short = tmp_path / "empty.jsonl", tmp_path / "short.jsonl"
    empty.write_text("")
    short.write_text('{"ids": [1, 2, 3]}\n{"ids": [4, 5]}\n')
    refused("the file is empty; give text to train on", data=str(empty))
    refused("5 tokens are less than one window of 32", data=str(short))
    refused("calibration file is not there|is not there", data=str(tmp_path / "none.jsonl"))
    refused("12 windows of 32, less than one batch of 13", batch=13)
    refused("the teacher is not there", other=tmp_path / "none")
    refused("same folder", other=student)
    refused("which of the teacher's 3 blocks belongs", hidden="mse", hidden_blocks="1")
    refused("the student has blocks 0 to 1", hidden="mse", hidden_blocks="2:2")
    refused("'x' is no block", hidden="mse", hidden_blocks="x")
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    refused("the teacher is quantised")


@pytest.mark.parametrize(
    ("over", "words"),
    [
        ({"loss": "magic"}, "--loss magic: not known; choose one of fkl, rkl, jsd, topk, none"),
        ({"loss": "none"}, "leaves nothing to train on"),
        ({"steps": 2, "tokens": 5}, "give one of them"),
        ({"steps": 0}, "--steps 0: expected at least 1"),
        ({"lr": 0.0}, "expected a number above 0"),
        ({"lr": float("nan")}, "expected a number above 0"),
        ({"temperature": -1.0}, "--temperature -1"),
        ({"beta": 1.5}, "--beta 1.5"),
        ({"hard": -1.0}, "--hard -1"),
        ({"hidden": "mse"}, "go together"),
        ({"hidden": "l1", "hidden_blocks": "1"}, "--hidden l1"),
        ({"dtype": "fp8"}, "--dtype fp8"),
    ],
)
def test_a_wish_that_cannot_be(over: dict[str, Any], words: str) -> None:
    with pytest.raises(FormatError, match=words):
        Wish("text.txt", **over)


def test_blocks_of_a_pruned_student_are_mapped(tiny: Tiny) -> None:
    student, teacher = models(tiny)
    (student / "prune.json").write_text(json.dumps({"kept_layers": [0, 2], "cuts": {"layers": [3, 2]}}))
    found = plan(student, teacher, wish(student, hidden="mse", hidden_blocks="0,1"))
    assert found.hidden is not None and found.hidden.pairs == ((0, 0), (1, 2))


def test_without_matplotlib_the_report_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "matplotlib is not installed" in distill_report.draw([{"step": 1, "loss": 1.0}], tmp_path / "x.png")
    assert len(distill_report.thinned([{"step": i} for i in range(9001)])) <= distill_report.POINTS + 1
