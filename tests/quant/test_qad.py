"""Distilling under quantisation: gradients, where a run starts, that what was trained is what is written, refusals."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from percard.formats import affine
from percard.formats.checkpoint import Checkpoint
from percard.formats.spec import FormatError, QuantSpec
from percard.kernels import rows
from percard.quant import capture, distill, distill_state, distill_train, qad, qad_child, quantize, verify
from percard.quant.distill_plan import Wish, plan
from percard.quant.pair import Pair
from percard.quant.qad import FakeLinear
from percard.quant.recipe import Recipe

from .test_capture import with_tokenizer
from .test_resume import with_text

Tiny = Callable[..., Path]
SPECS = ["w4a16-g64", "w3a16-g64", "w4a16-g64-asym", "w4a8-g64", "w8a8"]


def weight(seed: int = 0, rows_: int = 24, columns: int = 128) -> torch.Tensor:
    return torch.randn(rows_, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


@pytest.mark.parametrize("spec", SPECS)
def test_a_module_starts_from_the_codes_and_holds_what_it_writes(spec: str) -> None:
    """Weights near the rounded ones, or the centres: the same codes; after any step, value = codes and scales as written."""
    source, parsed = weight(), QuantSpec.parse(spec)
    # GPTQ moves weights before it rounds them: codes of another weight, not the nearest to the source.
    tensor = affine.quantize(source + 0.02 * weight(1), parsed)
    for near in (None, source):
        for weights, scales in ((True, False), (True, True), (False, True)):
            module = FakeLinear(tensor, None, train_weights=weights, train_scales=scales, near=near)
            assert torch.equal(module.tensor().data, tensor.data) and torch.equal(module.tensor().scale, tensor.scale)
            assert torch.equal(module.value(), affine.dequantize(tensor))
            random = torch.Generator().manual_seed(3)
            with torch.no_grad():
                for parameter in (p for p in module.parameters() if p.requires_grad):
                    size = 0.1 if parameter is module.scale_shift else 0.5
                    parameter += size * torch.randn(parameter.shape, generator=random)
            written = module.tensor()
            assert torch.equal(module.value(), affine.dequantize(written))
            assert not torch.equal(written.scale, tensor.scale) if scales else torch.equal(written.scale, tensor.scale)
            assert not torch.equal(written.data, tensor.data) if weights else torch.equal(written.data, tensor.data)
            if spec == "w4a8-g64":
                assert affine.two_level(tensor.scale) is not None and affine.two_level(written.scale) is not None
    near, centre = qad.start(tensor, source), qad.start(tensor, None)
    assert torch.equal(centre, tensor.data.float()) and 0.1 < float((near - centre).abs().mean()) < 0.4


def test_scales_stay_positive_and_turn_back() -> None:
    tensor = affine.quantize(weight(), QuantSpec.parse("w4a16-g64"))
    module = FakeLinear(tensor, None, train_weights=False, train_scales=True)
    assert module.scale_shift is not None
    with torch.no_grad():
        module.scale_shift[0] = -5.0
        module.scale_shift[1] = 50.0
    scale = module.scale()
    assert bool((scale > 0).all()) and bool((scale[1] <= 8 * tensor.scale[1].float()).all())
    module.scale().sum().backward()  # a step down: not where it is at the bottom, but where it is at the top
    grad = module.scale_shift.grad
    assert grad is not None and bool((grad[0] == 0).all()) and bool((grad[1] > 0).all())
    module.scale_shift.grad = None
    (-module.scale().sum()).backward()
    grad = module.scale_shift.grad
    assert grad is not None and bool((grad[0] < 0).all()) and bool((grad[1] == 0).all())


@pytest.mark.parametrize("spec", ["w4a16-g64", "w4a16-g64-asym"])
def test_the_gradient_of_scales_alone_is_exact(spec: str) -> None:
    """ds = sum over the group of dW (q - z), by autograd of the plain formula in float64."""
    tensor = affine.quantize(weight(), QuantSpec.parse(spec), torch.float32)
    module = FakeLinear(tensor, None, train_weights=False, train_scales=True)
    x, dy = torch.randn(5, 128), torch.randn(5, 24)
    (module(x) * dy).sum().backward()
    shift = torch.zeros(tensor.scale.shape, dtype=torch.float64, requires_grad=True)
    levels = tensor.data.double().view(*tensor.scale.shape, -1)
    levels = levels if tensor.zero is None else levels - tensor.zero.double().unsqueeze(2)
    value = (levels * (tensor.scale.double() * (1 + shift)).unsqueeze(2)).view(24, 128)
    ((x.double() @ value.T) * dy.double()).sum().backward()
    assert module.scale_shift is not None and module.scale_shift.grad is not None and shift.grad is not None
    torch.testing.assert_close(module.scale_shift.grad.double(), shift.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spec", ["w4a16-g64", "w4a16-g64-asym"])
def test_gradients_of_weights_pass_straight_through_inside_the_range(spec: str) -> None:
    """du = dvalue s by autograd with round(clamp(u)) = u + a constant; none where a step would lead further out."""
    parsed = QuantSpec.parse(spec)
    tensor = affine.quantize(weight(), parsed, torch.float32)
    module = FakeLinear(tensor, None, train_weights=True, train_scales=True)
    assert module.steps is not None and module.scale_shift is not None
    with torch.no_grad():
        module.steps[:, :8] += 0.3
        module.steps[0], module.steps[1] = parsed.qmin - 3, parsed.qmax + 3
    dvalue = torch.randn(24, 128)
    dvalue[0], dvalue[1] = dvalue[0].abs(), dvalue[1].abs()  # down: further out at the lower end, back at the upper
    (module.value() * dvalue).sum().backward()
    u = module.steps.detach().double().requires_grad_()
    shift = torch.zeros(tensor.scale.shape, dtype=torch.float64, requires_grad=True)
    s = (tensor.scale.double() * (1 + shift)).unsqueeze(2)
    zero = 0.0 if tensor.zero is None else tensor.zero.double().unsqueeze(2)
    t = u.view(*tensor.scale.shape, -1)
    q = t + (t.clamp(parsed.qmin, parsed.qmax).round() - t).detach()
    (((q - zero) * s).view(24, 128) * dvalue.double()).sum().backward()
    assert u.grad is not None and shift.grad is not None and module.steps.grad is not None
    u.grad[0] = 0.0
    torch.testing.assert_close(module.steps.grad, u.grad.float(), rtol=1e-5, atol=1e-7)
    assert bool((module.steps.grad[1] > 0).all())
    torch.testing.assert_close(module.scale_shift.grad, shift.grad.float(), rtol=1e-3, atol=1e-4)


def test_activations_are_rounded_as_the_engine_rounds_them() -> None:
    tensor = affine.quantize(weight(), QuantSpec.parse("w8a8"), torch.float32)
    module = FakeLinear(tensor, torch.ones(24), train_weights=True, train_scales=False)
    x = torch.randn(2, 3, 128, requires_grad=True)
    y = module(x)
    q, scale, _ = rows.quantize(x.detach().view(6, 128))
    whole = (q.double() @ tensor.data.double().T) * scale.double()[:, None] * tensor.scale.double().T + 1
    torch.testing.assert_close(y.view(6, 24).double(), whole, rtol=1e-5, atol=1e-5)
    y.sum().backward()
    torch.testing.assert_close(x.grad, affine.dequantize(tensor).sum(0).expand(2, 3, 128), rtol=1e-4, atol=1e-4)


# -- runs ----------------------------------------------------------------------------------------------------------------


def source_of(tiny: Tiny, kind: str = "qwen3", **over: Any) -> Path:
    return with_text(tiny(kind, name="source", max_position_embeddings=64, **over), windows=24)


def quantised(source: Path, out: Path, spec: str = "w4a16-g64", method: str = "gptq") -> Path:
    text = None if method == "rtn" else source / "calibration.jsonl"
    quantize.run(source, out, Recipe.from_flags(spec=spec, method=method, calibration=text, seq_len=32))
    return out


def wish(source: Path, **over: Any) -> Wish:
    given: dict[str, Any] = {"steps": 6, "batch": 4, "seq_len": 32, "every": 2, "device": "cpu", **over}
    return Wish(str(source / "calibration.jsonl"), **given)


def held(folder: Path, planned: Any) -> dict[str, torch.Tensor]:
    """The dequantised weights of what training changes, by module name."""
    made = Checkpoint.open(folder)
    return {x.name: affine.dequantize(qad_child.read(planned.qad, made, x)) for x in planned.qad.trained}


@pytest.mark.parametrize(
    ("kind", "spec", "over"),
    [
        ("qwen3", "w4a16-g64", {"scales_only": True, "lr": 3e-2}),
        ("qwen2", "w4a8-g64", {"scales_only": True, "lr": 1e-1}),
        ("qwen3", "w3a16-g64", {"qad": "w3a16-g64", "lr": 0.3}),
        ("llama", "w4a16-g64-asym", {"qad": "w4a16-g64-asym", "lr": 0.2, "learn_scales": True}),
        ("llama", "w8a8", {"qad": "w8a8", "lr": 0.4, "train_rest": True}),
    ],
)
def test_the_files_dequantise_to_the_weights_of_the_last_step(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, spec: str, over: dict[str, Any]
) -> None:
    from transformers import AutoModelForCausalLM

    source = source_of(tiny, kind)
    start, out = quantised(source, tmp_path / "start", spec), tmp_path / "out"
    trained: dict[str, torch.Tensor] = {}
    real = qad_child.write

    def watched(plan_: Any, made: Checkpoint, model: Any, folder: Path | None) -> None:
        trained.update({x.name: model.get_submodule(x.name).value().detach().clone() for x in plan_.trained})
        real(plan_, made, model, folder)

    monkeypatch.setattr(qad_child, "write", watched)
    asked = wish(source, **over)
    done = distill.run(start, source, out, asked)
    planned = plan(start, source, asked)
    found, before = held(out, planned), held(start, planned)
    assert found.keys() == trained.keys() and len(found) == 14
    assert all(torch.equal(found[name], trained[name]) for name in found)
    assert sum(not torch.equal(found[name], before[name]) for name in found) >= 12
    ours, theirs = Checkpoint.open(out), Checkpoint.open(start)
    assert {n: (i.dtype, i.shape) for n, i in ours.tensors.items()} == {
        n: (i.dtype, i.shape) for n, i in theirs.tensors.items()
    }
    changed = {n.rpartition(".")[2] for n in ours.names if not torch.equal(ours.read(n), theirs.read(n))}
    if asked.train_rest:
        rest = [n for n in ours.names if "layers." not in n or "norm" in n]
        assert all(not torch.equal(ours.read(n), theirs.read(n)) for n in rest if "norm" not in n)
        assert set(json.loads((out / "report.json").read_text())["trained"]) == set(rest)
    weights = {"weight"} if spec == "w8a8" else {"weight_packed"}
    expected = {"weight_scale"} if asked.scales_only else weights | ({"weight_scale"} if asked.learn_scales else set())
    assert changed == expected
    assert verify.verify(out, source, level="weights").status != "red" and not done["warnings"]
    said = json.loads((out / "report.json").read_text())
    assert {m["method"] for m in said["modules"]} == {"gptq, qad scales" if asked.scales_only else "gptq, qad"}
    assert Pair.open(out, source).said is not None
    card = (out / "README.md").read_text()
    assert "Trained after quantising" in card and spec in card and "`source`" in card
    if spec == "w4a16-g64":
        _, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]


def test_a_16_bit_student_is_quantised_first_and_may_be_its_own_teacher(tiny: Tiny, tmp_path: Path) -> None:
    source = source_of(tiny)
    asked = wish(source, qad="w4a16-g64", every=50)
    done = distill.run(source, source, tmp_path / "out", asked)
    assert done["qad"]["start"] == "GPTQ over calibration.jsonl" and done["curve"][0]["loss"] > 0
    assert verify.verify(tmp_path / "out", source).status != "red"
    start = quantised(source, tmp_path / "start")
    planned = plan(start, source, wish(source, qad="w4a16-g64"))
    model = qad_child.load(plan(source, source, asked).qad, Checkpoint.open(start))  # type: ignore[arg-type]
    weights = [model.get_submodule(x.name).steps for x in planned.qad.trained]  # type: ignore[union-attr]
    assert all(w.requires_grad for w in weights)
    for linear in planned.qad.trained:  # type: ignore[union-attr]
        tensor = model.get_submodule(linear.name).tensor()
        assert torch.equal(tensor.data, qad_child.read(planned.qad, planned.student, linear).data)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("over", "words"),
    [
        ({"qad": "w8a16-g64"}, "is w4a16-g64; say --qad w4a16-g64"),
        ({"qad": "w4a16-g64", "calibration": "x"}, "has its codes already"),
        ({"qad": "w5a16"}, "w5a16"),
        ({}, "the student is quantised; .* --qad"),
    ],
)
def test_what_a_quantised_student_cannot_be_asked(tiny: Tiny, tmp_path: Path, over: dict[str, Any], words: str) -> None:
    source = source_of(tiny)
    start = quantised(source, tmp_path / "start", method="rtn")
    with pytest.raises(FormatError, match=words):
        distill.run(start, source, tmp_path / "out", wish(source, **over))
    assert not (tmp_path / "out").exists()


def test_wishes_that_do_not_go_together() -> None:
    for over, words in (
        ({"scales_only": True, "learn_scales": True}, "say one of them"),
        ({"learn_scales": True}, "belongs to a quantised student"),
        ({"calibration": "x"}, "belongs to a quantised student"),
        ({"qad": "w4a16", "samples": 0}, "--samples 0"),
    ):
        with pytest.raises(FormatError, match=words):
            Wish("x", **over)
    assert [Wish("x", **o).rate for o in ({}, {"qad": "w4a16"}, {"scales_only": True}, {"lr": 2.0})] == [  # type: ignore[arg-type]
        5e-5, 1e-2, 1e-3, 2.0,
    ]  # fmt: skip


def test_a_killed_run_repeats_itself(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_of(tiny)
    start = quantised(source, tmp_path / "start", method="rtn")
    asked = wish(source, qad="w4a16-g64", learn_scales=True, lr=0.3)
    distill.run(start, source, tmp_path / "whole", asked)
    real = distill_state.Curve.add

    def dies(self: Any, point: dict[str, Any]) -> None:
        real(self, point)
        if point["step"] == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(distill_state.Curve, "add", dies)
    with pytest.raises(KeyboardInterrupt):
        distill.run(start, source, tmp_path / "cut", asked)
    monkeypatch.setattr(distill_state.Curve, "add", real)
    with pytest.raises(FileExistsError, match="what is trained how"):
        distill.run(start, source, tmp_path / "cut", dataclasses.replace(asked, learn_scales=False))
    distill.run(start, source, tmp_path / "cut", asked)
    files = [tmp_path / name / "model.safetensors" for name in ("whole", "cut")]
    assert files[0].read_bytes() == files[1].read_bytes()
    curves = [json.loads((tmp_path / name / "qad.json").read_text())["curve"] for name in ("whole", "cut")]
    assert curves[0] == curves[1] and len(curves[0]) == 6


def test_a_capture_teaches_scales(tiny: Tiny, tmp_path: Path) -> None:
    source = with_tokenizer(source_of(tiny), 96)
    start, cache = quantised(source, tmp_path / "start", method="rtn"), tmp_path / "cache"
    capture.run(capture.plan(source, str(source / "calibration.jsonl"), top_k=8, seq_len=32), cache)
    asked = dataclasses.replace(wish(source, scales_only=True, lr=1e-2, steps=12), data=None)
    done = distill.run(start, cache, tmp_path / "out", asked)
    assert done["loss"] == "topk" and done["parameters"]["teacher"] == 0
    before, after = (Checkpoint.open(folder) for folder in (start, tmp_path / "out"))
    assert {n.rpartition(".")[2] for n in after.names if not torch.equal(after.read(n), before.read(n))} == {
        "weight_scale"
    }
    points = [point["loss"] for point in done["curve"]]
    assert sum(points[-4:]) < sum(points[:4])


def test_two_processes_train_as_one(tiny: Tiny, tmp_path: Path) -> None:
    source = source_of(tiny)
    start = quantised(source, tmp_path / "start", method="rtn")
    asked = wish(source, qad="w4a16-g64", learn_scales=True, lr=0.05, steps=4)
    distill.run(start, source, tmp_path / "one", asked)
    flags = [
        *("--teacher", source, "--data", source / "calibration.jsonl", "--out", tmp_path / "two", "--device", "cpu"),
        *("--steps", 4, "--batch", 4, "--seq-len", 32, "--lr", 0.05, "--every", 2, "--qad", "w4a16-g64"),
        *("--learn-scales", "--json"),
    ]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "-m", "percard", "distill", str(start), *map(str, flags)],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / name / "qad.json").read_text())["curve"] for name in ("one", "two"))
    assert [p["loss"] for p in two] == pytest.approx([p["loss"] for p in one], abs=1e-4)
    assert Checkpoint.open(tmp_path / "two").names == Checkpoint.open(start).names
    assert verify.verify(tmp_path / "two", source).status != "red"


def test_the_dry_run_says_what_it_needs_and_refuses_what_cannot_be(tiny: Tiny, tmp_path: Path) -> None:
    source = source_of(tiny)
    start = quantised(source, tmp_path / "start", method="rtn")
    scales, weights = (plan(start, source, wish(source, **o)) for o in ({"scales_only": True}, {"qad": "w4a16-g64"}))
    assert scales.qad is not None and scales.qad.counts[:2] == (
        2 * (128 * 128 * 2 + 64 * 128 * 2 + 3 * 128 * 256),
        294912 // 64,
    )
    assert scales.memory["student"] < weights.memory["student"] < 16 * scales.parameters[0]
    assert scales.to_dict()["qad"]["train"] == ["scales"] and not scales.question
    with pytest.raises(FormatError, match="is 16-bit and has no scales yet"):
        plan(source, source, wish(source, scales_only=True))
    mixture = with_text(tiny("qwen3_moe", name="mixture", max_position_embeddings=64), windows=24)
    with pytest.raises(FormatError, match="mixtures of experts do not train with --qad"):
        plan(mixture, mixture, wish(mixture, qad="w4a16-g64"))


def test_a_loss_that_is_no_number_stops(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_of(tiny)
    start = quantised(source, tmp_path / "start", method="rtn")
    real = distill_train._step

    def poisoned(*args: Any) -> dict[str, Any]:
        point = real(*args)
        return point | ({"loss": float("nan")} if point["step"] == 4 else {})

    monkeypatch.setattr(distill_train, "_step", poisoned)
    with pytest.raises(distill_train.Diverged, match="the state of step 2 is kept"):
        distill.run(start, source, tmp_path / "out", wish(source, scales_only=True))
    assert not (tmp_path / "out").exists()
