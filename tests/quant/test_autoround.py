"""AutoRound: how the package is called, what is taken from it, what is refused. A small fake stands for the package."""

from __future__ import annotations

import dataclasses
import importlib.machinery
import json
import random
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from percard.formats import affine, compressed_tensors
from percard.formats.checkpoint import Checkpoint
from percard.formats.spec import FormatError, QuantSpec
from percard.formats.tensor import QuantTensor
from percard.quant import delegate, preflight, quantize
from percard.quant.delegate import Delegate
from percard.quant.methods import METHODS
from percard.quant.methods import autoround as method
from percard.quant.progress import Meter
from percard.quant.recipe import Recipe, RecipeError

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-qwen3"
BF16 = torch.bfloat16


class Fake(types.ModuleType):
    """A package that keeps its calls and makes up codes: those of rounding to nearest, one up where there is room.

    spoil(name, linear): what a test does to a linear afterwards.
    """

    def __init__(self) -> None:
        super().__init__("auto_round")
        self.__spec__ = importlib.machinery.ModuleSpec("auto_round", None)
        self.calls: list[dict[str, Any]] = []
        self.codes: dict[str, QuantTensor] = {}
        self.spoil: Callable[[str, nn.Module], None] = lambda name, linear: None
        self.ends: BaseException | None = None
        fake = self

        class AutoRound:
            def __init__(self, model: nn.Module, **given: Any) -> None:
                self.model, self.given = model, given
                fake.calls.append({"model": model, **given})

            def quantize(self) -> tuple[nn.Module, dict[str, Any]]:
                torch.manual_seed(999)
                random.seed(999)
                np.random.seed(999)
                torch.set_printoptions(precision=1)
                if fake.ends is not None:
                    raise fake.ends
                for name, linear in self.model.named_modules():
                    how = self.given["layer_config"].get(name, self.given["scheme"])
                    if isinstance(linear, nn.Linear) and how["bits"] < 16 and "lm_head" not in name:
                        fake.codes[name] = put(linear, how, self.given["scale_dtype"])
                        fake.spoil(name, linear)
                return self.model, {}

        self.AutoRound = AutoRound


def put(linear: Any, how: dict[str, Any], dtype: torch.dtype) -> QuantTensor:
    """Leaves in a linear what the package leaves there."""
    group = None if how["group_size"] == -1 else how["group_size"]
    spec = QuantSpec(how["bits"], 16, group, how["sym"])
    plain = affine.quantize(linear.weight.data, spec, dtype)
    codes = (plain.data + 1).clamp_(max=spec.qmax)
    made = QuantTensor(codes, plain.scale, plain.zero, spec, "plain", plain.shape)
    linear.weight.data.copy_(affine.dequantize(made))
    linear.scale = made.scale
    half = torch.full_like(made.scale, -spec.qmin)
    linear.zp = half if made.zero is None else made.zero.float() + half.float()
    return made


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    package = Fake()
    monkeypatch.setitem(sys.modules, "auto_round", package)
    return package


class Model(nn.Module):
    """Linears under the names of the tests."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.a, self.b, self.c = nn.Linear(128, 32), nn.Linear(64, 16, bias=False), nn.Linear(64, 8)


def specs(**names: str) -> dict[str, QuantSpec]:
    return {name: QuantSpec.parse(spec) for name, spec in names.items()}


IDS = torch.arange(60).reshape(5, 12)


@pytest.mark.parametrize("spec", ["w4a16-g128", "w4a16-g32-asym", "w4a16", "w3a16-g64", "w8a16", "w8a16-g128"])
def test_serves(spec: str) -> None:
    assert method.serves(QuantSpec.parse(spec)) is None


@pytest.mark.parametrize(
    ("spec", "why"),
    [("w8a8", "16-bit activations"), ("w4a8-g128", "int8|8 bits"), ("fp8-dynamic", "float"), ("w8a16-asym", "8-bit")],
)
def test_refuses_specs(spec: str, why: str, fake: Fake) -> None:
    reason = method.serves(QuantSpec.parse(spec))
    assert reason is not None
    with pytest.raises(FormatError, match=why):
        next(method.autoround(Model(), IDS, specs(a=spec), scale_dtype=BF16))
    assert not fake.calls


def test_how_the_package_is_called(fake: Fake) -> None:
    wanted = specs(a="w4a16-g64", b="w4a16-g64", c="w8a16")
    model = Model()
    list(
        method.autoround(
            model, IDS, wanted, scale_dtype=BF16, left=["d"], seed=7, iters=9, samples=4, batch=64, lr=0.5, ranges=False
        )
    )
    (call,) = fake.calls
    assert call["model"] is model
    assert call["scheme"] == {"bits": 4, "group_size": 64, "sym": True, "data_type": "int_sym_gptq", "act_bits": 16}
    assert set(call["layer_config"]) == {"c", "d"}
    assert call["layer_config"]["c"]["bits"] == 8
    assert call["layer_config"]["c"]["group_size"] == -1
    assert call["layer_config"]["d"]["bits"] == 16
    assert [w["input_ids"].tolist() for w in call["dataset"]] == [[row] for row in IDS[:4].tolist()]
    assert all(bool((w["attention_mask"] == 1).all()) for w in call["dataset"])
    assert (call["nsamples"], call["seqlen"], call["batch_size"]) == (4, 12, 4)
    assert (call["seed"], call["iters"], call["lr"], call["enable_minmax_tuning"]) == (7, 9, 0.5, False)
    assert (call["device_map"], call["amp"], call["scale_dtype"]) == ("cpu", False, BF16)
    assert call["tokenizer"].pad_token_id is None


def test_windows_are_copies(fake: Fake) -> None:
    before = IDS.clone()
    list(method.autoround(Model(), IDS, specs(a="w4a16"), scale_dtype=BF16))
    fake.calls[0]["dataset"][0]["input_ids"].fill_(0)
    assert torch.equal(IDS, before)
    assert fake.calls[0]["lr"] is None  # 0 means: the package's own


@pytest.mark.parametrize(
    ("spec", "dtype"),
    [
        ("w4a16-g64", BF16),
        ("w4a16-g32-asym", BF16),
        ("w4a16-asym", torch.float32),
        ("w3a16-g64", torch.float16),
        ("w8a16", BF16),
        ("w8a16-g32", torch.float32),
    ],
)
def test_codes_are_the_package_s(fake: Fake, spec: str, dtype: torch.dtype) -> None:
    model = Model()
    given = specs(b=spec, a=spec)
    made = dict(method.autoround(model, IDS, given, scale_dtype=dtype))
    assert list(made) == ["b", "a"]
    for name, tensor in made.items():
        expected = fake.codes[name]
        assert tensor.spec == given[name]
        assert tensor.scale.dtype == dtype
        assert torch.equal(tensor.data, expected.data)
        assert torch.equal(tensor.scale, expected.scale)
        assert (tensor.zero is None) == given[name].symmetric
        if tensor.zero is not None and expected.zero is not None:
            assert torch.equal(tensor.zero, expected.zero)
    assert model.a.weight.numel() == 0  # memory goes as codes come


def negative(name: str, linear: Any) -> None:
    linear.scale = -linear.scale


def none(name: str, linear: Any) -> None:
    del linear.scale


def few(name: str, linear: Any) -> None:
    linear.scale = linear.scale[:, :1]


def between(name: str, linear: Any) -> None:
    linear.weight.data[3, 5] += 0.4 * float(linear.scale[3, 0])


def holed(name: str, linear: Any) -> None:
    linear.weight.data[1, 1] = float("nan")


def shifted(name: str, linear: Any) -> None:
    linear.zp = linear.zp + 1


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (negative, "not above zero"),
        (none, "left this linear at 16 bits"),
        (few, "32 scales, expected 64"),
        (between, "does not hold"),
        (holed, "does not hold"),
        (shifted, "has none"),
    ],
)
def test_refuses_what_no_container_holds(fake: Fake, spoil: Callable[[str, nn.Module], None], why: str) -> None:
    fake.spoil = spoil
    with pytest.raises(FormatError, match=f"^a: .*{why}"):
        list(method.autoround(Model(), IDS, specs(a="w4a16-g64"), scale_dtype=BF16))


@pytest.mark.parametrize("zero", [None, torch.tensor(3.0), torch.full((32, 2), 16.0), torch.full((32, 2), 2.5)])
def test_refuses_zero_points_out_of_range(fake: Fake, zero: Any) -> None:
    fake.spoil = lambda name, linear: setattr(linear, "zp", zero)
    with pytest.raises(FormatError, match=r"^a: .*zero points"):
        list(method.autoround(Model(), IDS, specs(a="w4a16-g64-asym"), scale_dtype=BF16))


def test_a_linear_that_is_not_there(fake: Fake) -> None:
    with pytest.raises(FormatError, match=r"^nowhere: .*16 bits"):
        list(method.autoround(Model(), IDS, specs(nowhere="w4a16"), scale_dtype=BF16))


def test_random_numbers_go_on_as_if_nothing_was(fake: Fake) -> None:
    def draw() -> tuple[float, float, float]:
        return float(torch.rand(())), random.random(), float(np.random.rand())

    def seed() -> None:
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)

    model = Model()
    seed()
    expected = draw()
    seed()
    list(method.autoround(model, IDS, specs(a="w4a16"), scale_dtype=BF16))
    assert draw() == expected
    assert repr(torch.tensor(0.1234)) == "tensor(0.1234)"


def test_a_package_that_exits(fake: Fake) -> None:
    fake.ends = SystemExit(-1)
    with pytest.raises(RuntimeError, match="gave up"):
        list(method.autoround(Model(), IDS, specs(a="w4a16"), scale_dtype=BF16))


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    reason = method.missing()
    assert reason is not None
    assert "pip install auto-round" in reason
    assert "\n" not in reason


def test_nothing_of_it_is_imported_unless_asked() -> None:
    code = "import sys; import percard.quant.quantize, percard.quant.delegate; print('auto_round' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_memory_grows_with_all_that_is_held() -> None:
    least = method.memory(1000, 100, 0, (2, 8, 16), 1, 50)
    assert least >= 4 * 1000
    for more in (
        method.memory(2000, 100, 0, (2, 8, 16), 1, 50),
        method.memory(1000, 200, 0, (2, 8, 16), 1, 50),
        method.memory(1000, 100, 60, (2, 8, 16), 1, 50),
        method.memory(1000, 100, 0, (4, 8, 16), 1, 50),
        method.memory(1000, 100, 0, (2, 8, 16), 2, 50),
    ):
        assert more > least


def test_a_model_with_a_hole(tiny: Callable[..., Path]) -> None:
    src = tiny("qwen3", change=lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight") is None)
    with pytest.raises(FormatError, match="up_proj"):
        delegate._model(Checkpoint.open(src))


# -- the whole road


@pytest.fixture
def windows(tmp_path: Path) -> Path:
    """Six windows of 16 ids."""
    source = torch.Generator().manual_seed(5)
    path = tmp_path / "windows.jsonl"
    rows = torch.randint(0, 96, (6, 16), generator=source).tolist()
    path.write_text("".join(json.dumps({"ids": row}) + "\n" for row in rows))
    return path


def recipe(windows: Path, spec: str = "w4a16-g64", **more: Any) -> Recipe:
    return Recipe.from_flags(spec=spec, method="autoround", calibration=windows, seq_len=16, **more)


def test_quantize(tiny: Callable[..., Path], tmp_path: Path, windows: Path, fake: Fake) -> None:
    src, dst = tiny("qwen2"), tmp_path / "out"
    layers = {r"re:.*layers\.1\.self_attn\.(q|k|v)_proj": "w8a16"}
    rules = recipe(windows, layers=layers, ignore=[r"re:.*layers\.0\.mlp\.(gate|up)_proj"], options={"samples": 5})
    done = quantize.run(src, dst, rules)
    assert not done.failures
    (call,) = fake.calls
    assert len(call["dataset"]) == 5
    kept = {n for n, how in call["layer_config"].items() if how["bits"] == 16}
    assert kept == {"model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"}
    assert {m.name for m in done.modules} == set(fake.codes)
    assert {m.method for m in done.modules} == {"autoround"}
    assert all(m.facts["package"].startswith("auto_round") for m in done.modules)
    made = Checkpoint.open(dst)
    for name, expected in fake.codes.items():
        parts = {s: made.read(f"{name}.{s}") for s in compressed_tensors.plan(expected.shape, expected.spec, BF16)}
        tensor = compressed_tensors.read(parts, expected.spec, expected.shape)
        assert torch.equal(tensor.data, expected.data)
        assert torch.equal(tensor.scale, expected.scale)
    assert not (dst / delegate.FILE).exists()


def test_a_head_is_rounded_to_nearest(tiny: Callable[..., Path], tmp_path: Path, windows: Path, fake: Fake) -> None:
    tree = recipe(windows).to_dict()
    tree["stages"][0]["quantize"]["ignore!"] = []
    done = quantize.run(tiny("llama"), tmp_path / "out", Recipe.parse(json.dumps(tree)))
    assert {m.name: m.method for m in done.modules}["lm_head"] == "rtn"
    assert "lm_head" not in fake.codes


def test_codes_outlive_a_killed_run(tiny: Callable[..., Path], tmp_path: Path, windows: Path, fake: Fake) -> None:
    src = tiny("llama")
    plan = preflight.check(src, recipe(windows))

    class Sink:
        def __init__(self) -> None:
            self.tensors: dict[str, torch.Tensor] = {}

        def add(self, name: str, tensor: torch.Tensor) -> None:
            self.tensors[name] = tensor

    def entries() -> Iterator[tuple[dict[str, Any], dict[str, torch.Tensor]]]:
        sink: Any = Sink()
        one = Delegate(plan, tmp_path, Meter("quantize", plan.bytes_source, None))
        for index in range(2):
            yield one.quantise(index, sink), sink.tensors

    first, second = list(entries()), list(entries())
    assert len(fake.calls) == 1
    assert [e for e, _ in first] == [e for e, _ in second]
    assert all(torch.equal(first[-1][1][n], second[-1][1][n]) for n in first[-1][1])
    assert not list(tmp_path.glob("*.tmp"))


def test_preflight_says_what_it_takes(
    tiny: Callable[..., Path], windows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    src = tiny("llama")
    monkeypatch.setattr(method, "missing", lambda: "not installed; pip install auto-round")
    plan = preflight.check(src, recipe(windows))
    assert any("pip install auto-round" in text for text in plan.refusals)
    assert any("whole model in memory" in text for text in plan.warnings)
    gptq = preflight.check(src, Recipe.from_flags(spec="w4a16-g64", method="gptq", calibration=windows, seq_len=16))
    weights = sum(x.shape[0] * x.shape[1] for x in plan.found.linears)
    assert plan.memory > gptq.memory - 40 * weights  # both hold transformers
    more = delegate.needs(plan.source, plan.found, plan.assignment, plan.recipe, plan.windows)  # type: ignore[arg-type]
    assert more[0] > 4 * weights
    assert plan.memory == preflight.RESIDENT_CALIBRATED + more[0]


def test_transforms_do_not_go_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "before", dataclasses.replace(METHODS["rtn"], name="before", kind="transform"))
    with pytest.raises(RecipeError, match="takes the model as it is"):
        Recipe.parse("stages: [{quantize: {spec: w4a16-g64, methods: [before, autoround]}}]")


# -- the package itself


@pytest.mark.full
@pytest.mark.parametrize("spec", ["w4a16-g64", "w4a16-g32-asym", "w3a16-g64", "w8a16"])
def test_real_package(tmp_path: Path, spec: str) -> None:
    pytest.importorskip("auto_round")
    options = {"iters": 4, "samples": 8}
    text = EXAMPLE / "calibration.txt"
    rules = Recipe.from_flags(spec=spec, method="autoround", options=options, calibration=text, samples=8, seq_len=64)
    done = quantize.run(EXAMPLE, tmp_path / "out", rules)
    assert not done.failures
    assert len(done.modules) == 56
    lowest = min(m.sqnr or 0 for m in done.modules)
    assert lowest > {3: 10, 4: 17, 8: 38}[rules.spec.weight_bits], [(m.name, m.sqnr) for m in done.modules]


@pytest.mark.full
def test_real_package_with_experts(tiny: Callable[..., Path], tmp_path: Path, windows: Path) -> None:
    pytest.importorskip("auto_round")
    layers = {r"re:.*layers\.1\.mlp\.experts.*": "w8a16"}
    rules = recipe(windows, layers=layers, options={"iters": 2})
    done = quantize.run(tiny("qwen3_moe"), tmp_path / "out", rules)
    experts = {m.name: m for m in done.modules if ".experts." in m.name}
    assert len(experts) == 9
    assert all(m.spec == "w8a16" and (m.sqnr or 0) > 38 for m in experts.values())
