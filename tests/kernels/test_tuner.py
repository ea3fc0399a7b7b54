"""The tuner with a made-up machine and clock: gates, noise, resume, files. Nothing is timed and no card is asked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from percard.formats.spec import FormatError
from percard.kernels import device, tuner, tuning
from percard.kernels.inspection import ARCHS
from percard.kernels.matmul_w4a16 import cases, matmul_w4a16
from percard.kernels.op import Unsupported
from percard.kernels.shapes import Case

H200 = ARCHS["sm_90"]
CASES = tuple(
    Case(f"toy.{layer}.b{m}", m, n, k, "w4a16-g32", torch.float16, small=False)
    for layer, n, k in (("o", 16, 64), ("down", 32, 96))
    for m in (1, 3, 4)
)


@dataclass(frozen=True)
class Config:
    """What the made-up body has to choose: how long it takes, and whether it is right, spills or refuses."""

    us: int
    wrong: bool = False
    spills: bool = False
    refuses: bool = False


BASE = Config(100)
OTHERS = [Config(90), Config(50, wrong=True), Config(40, spills=True), Config(30, refuses=True), Config(99)]


def body(others: Sequence[Config] = tuple(OTHERS), version: int = 1) -> tuner.Subject:
    """The op matmul_w4a16 with a body that is its reference."""

    def plan(card: Any, *flat: Any, config: Config) -> tuple[torch.Tensor, list[Any]]:
        if config.refuses:
            raise ValueError("a step does not fit")
        codes, scale, zero = flat[1:4]
        if flat[9 - 1] != "plain":
            from percard.formats.layout import repack
            from percard.formats.spec import QuantSpec
            from percard.formats.tensor import QuantTensor

            shape = (flat[5], flat[6])
            plain = repack(QuantTensor(codes, scale, zero, QuantSpec.parse("w4a16-g32"), flat[8], shape), "plain")
            flat = (flat[0], plain.data, plain.scale, plain.zero, *flat[4:8], "plain", *flat[9:])
        y = matmul_w4a16.run_of(matmul_w4a16.body("reference"))(*flat)
        return (y + 1 if config.wrong else y), [SimpleNamespace(config=config)]

    gpu: Any = SimpleNamespace(
        OP_VERSION=version,
        __file__="kernels/matmul_w4a16/gpu.py",
        heuristic=lambda shape, card: BASE,
        candidates=lambda shape, card: list(others),
        plan=plan,
        run=lambda *flat, card, config: plan(card, *flat, config=config)[0],
    )
    return tuner.Subject(matmul_w4a16, gpu, SimpleNamespace(CASES=CASES, inputs=cases.inputs))  # type: ignore[arg-type]


class Toy:
    """A card that takes as long as the Config says; `jitter` is what each sample of the base differs by, in turn."""

    card, triton, where = H200, "3.9.0", torch.device("cpu")

    def __init__(self, jitter: Sequence[float] = (0.0,), seconds: float = 1.0) -> None:
        self.jitter, self.asked, self.clock, self.seconds = jitter, 0, 0.0, seconds

    def refuses(self, launches: Sequence[Any]) -> str | None:
        return "spills 8 bytes" if launches[0].config.spills else None

    def time(self, turns: Any, rounds: int) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {}
        self.clock += self.seconds
        for name, turn in turns.items():
            self.asked += 1
            config = turn[0].keywords.get("config", Config(80))  # none: torch's own product
            drawn = [self.jitter[(i + self.asked) % len(self.jitter)] for i in range(rounds)]
            found[name] = [1e-6 * config.us * (1 + d) for d in drawn]
        return found


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERCARD_TUNED", str(tmp_path / "user"))


def run(out: Path, subject: tuner.Subject | None = None, machine: Toy | None = None, **how: Any) -> list[tuner.Outcome]:
    return list(tuner.run(tuner.problems([subject or body()]), machine or Toy(), out, **how))


def test_one_problem_per_layer_and_bucket_by_worth() -> None:
    one = body()
    found = tuner.problems([one])
    assert [(p.case.n, p.shape.m) for p in found] == [(32, 1), (16, 1), (32, 4), (16, 4)], "M = 3 is in the bucket of 4"
    assert [p.case.m for p in found] == [1, 1, 4, 4], "measured at the largest M of the bucket"
    assert tuner.problems([one], "toy") == found
    with pytest.raises(FormatError, match="no cases for model 'nope'; known: toy"):
        tuner.problems([one], "nope")


def test_the_winner_is_written_and_found_again(tmp_path: Path) -> None:
    found = run(tmp_path)
    assert [o.status for o in found] == ["tuned"] * 4
    (entry, *_) = tuning.read(tmp_path / "matmul_w4a16.json")
    assert entry["config"] == {"us": 90, "wrong": False, "spills": False, "refuses": False}
    assert entry["us"] == 90 and entry["heuristic_us"] == 100 and entry["floor_us"] == 80
    assert entry["candidates"] == 5 and entry["rejected"] == 3
    assert (entry["card"], entry["triton"], entry["op_version"]) == (H200.name, "3.9", 1)
    packaged = tmp_path / "matmul_w4a16" / "tuned.json"
    (tmp_path / "user").mkdir()
    (tmp_path / "matmul_w4a16.json").rename(tmp_path / "user" / "matmul_w4a16.json")
    table = tuning.load(packaged, "3.9.1")
    shape = tuning.Shape(3, 32, 96, 32, torch.float16)
    assert tuning.choose(table, shape, H200, Config, lambda shape, card: BASE) == Config(90)
    assert tuning.choose(table, shape._replace(m=5), H200, Config, lambda shape, card: BASE) == BASE


def test_wrong_spilling_and_refusing_configs_are_never_timed(tmp_path: Path) -> None:
    machine = Toy()
    timed: list[int] = []
    original = machine.time

    def watch(turns: Any, rounds: int) -> dict[str, list[float]]:
        timed.extend(t[0].keywords["config"].us for t in turns.values() if "config" in t[0].keywords)
        return original(turns, rounds)

    machine.time = watch  # type: ignore[method-assign]
    run(tmp_path, machine=machine)
    assert set(timed) == {100, 90, 99}


def test_the_heuristic_stays_unless_another_is_better_by_more_than_noise(tmp_path: Path) -> None:
    (first, *_) = run(tmp_path / "a", body([Config(99)]))
    assert first.status == "kept" and first.entry is not None and first.entry["config"]["us"] == 100
    (first, *_) = run(tmp_path / "b", body([Config(95)]))
    assert first.status == "tuned"
    (first, *_) = run(tmp_path / "c", body([Config(95)]), Toy(jitter=(0.0, 0.2, -0.1)))
    assert first.status == "kept", "5 % of a clock that wavers by 30 % is nothing"


def test_faster() -> None:
    steady, better = [1.0] * 9, [0.9] * 9
    assert tuning.faster(steady, steady, better) == (True, pytest.approx(1 / 0.9), 0.0)
    assert not tuning.faster(steady, [1.06] * 9, better)[0], (
        "the base differs from itself by more than half of the gain"
    )
    assert not tuning.faster(steady, steady, [0.985] * 9)[0]
    assert (
        tuning.faster(steady, steady, [*better[:-1], 1.5])[0]
        and not tuning.faster(steady, steady, [0.9] * 6 + [2.0] * 3)[0]
    )


def test_what_is_there_is_skipped_unless_asked_for_again(tmp_path: Path) -> None:
    run(tmp_path)
    assert [o.status for o in run(tmp_path)] == ["there"] * 4
    assert [o.status for o in run(tmp_path, again=True)] == ["tuned"] * 4
    assert len(tuning.read(tmp_path / "matmul_w4a16.json")) == 4, "in place of the old ones"
    assert [o.status for o in run(tmp_path, body(version=2))] == ["tuned"] * 4, "another version of the op"
    assert {e["op_version"] for e in tuning.read(tmp_path / "matmul_w4a16.json")} == {2}


def test_minutes_cut_and_the_next_call_goes_on(tmp_path: Path) -> None:
    machine = Toy()
    found = run(tmp_path, machine=machine, seconds=5.0, now=lambda: machine.clock)
    assert [o.status for o in found] == ["tuned", "tuned", "cut", "cut"]
    assert [o.status for o in run(tmp_path)] == ["there", "there", "tuned", "tuned"]


def test_a_heuristic_that_fails_is_said_and_not_written(tmp_path: Path) -> None:
    subject = body()
    subject.gpu.heuristic = lambda shape, card: Config(1, wrong=True)
    found = run(tmp_path, subject)
    assert {o.status for o in found} == {"failed"} and "elements are off" in found[0].words
    assert not (tmp_path / "matmul_w4a16.json").exists()


def test_a_write_that_dies_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path)
    file = tmp_path / "matmul_w4a16.json"
    before = file.read_text()

    def full(number: int) -> None:
        raise OSError(28, "no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        run(tmp_path, again=True)
    assert file.read_text() == before and json.loads(before)["schema"] == 1


def test_the_ladder_of_files(tmp_path: Path) -> None:
    """The user's entries win over the packaged; those of another op version hold for nobody, and that is said."""
    packaged = tmp_path / "matmul_w4a16" / "tuned.json"
    key = {"card": H200.name, "triton": "3.9", "m_bucket": 0, "n": 1, "k": 2, "group": 3, "dtype": "float16"}
    tuning.store(packaged, {**key, "op_version": 1, "config": {"us": 1}})
    tuning.store(packaged, {**key, "n": 9, "op_version": 1, "config": {"us": 2}})
    tuning.store(tmp_path / "user" / "matmul_w4a16.json", {**key, "op_version": 1, "config": {"us": 3}})
    table = tuning.load(packaged, "3.9.0")
    assert sorted(fields["us"] for fields in table.values()) == [2, 3]
    with pytest.warns(UserWarning, match="2 entries are of another version of the op than 2, they are ignored"):
        assert tuning.load(packaged, "3.9.0", 2) == {}
    assert tuning.load(packaged, "3.6.0") == {}
    (tmp_path / "user" / "matmul_w4a16.json").write_text("{")
    with pytest.warns(UserWarning, match="is left out"):
        assert len(tuning.load(packaged, "3.9.0")) == 2, "a broken cache does not stop a server"
    packaged.write_text('{"schema": 7, "entries": []}')
    with pytest.raises(ValueError, match="schema is 7, expected 1"):
        tuning.load(packaged, "3.9.0")


def test_an_entry_with_fields_that_are_gone_counts_as_none() -> None:
    shape = tuning.Shape(1, 2, 3, 3, torch.float16)
    table = {tuning.key(shape, H200): {"us": 1, "no_such_field": 2}}
    assert tuning.choose(table, shape, H200, Config, lambda shape, card: BASE) == BASE


@pytest.mark.parametrize("name", tuner.names())
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_candidates_are_pure_bounded_and_runnable(name: str, arch: str) -> None:
    """Of every op: at most 24, distinct, without the heuristic's own, and each one that plan takes."""
    subject, card = tuner.subject(name), ARCHS[arch]
    problems = [
        p for p in tuner.problems([subject]) if p.case.name.startswith(("qwen3-8b.", "qwen3-30b", "qwen3-0.6b.head"))
    ]
    assert problems
    planned = {1, 64, 4096, max(p.shape.m for p in problems)}
    for problem in problems:
        found = subject.gpu.candidates(problem.shape, card)
        assert found == subject.gpu.candidates(problem.shape, card)
        assert 1 <= len(found) <= tuning.MOST_CANDIDATES and len(set(found)) == len(found)
        assert subject.gpu.heuristic(problem.shape, card) not in found
        for config in found if problem.shape.m in planned else ():
            subject.gpu.plan(card, *subject.cases.blank(problem.case), config=config)


def test_an_unknown_op_and_a_machine_without_a_card() -> None:
    with pytest.raises(ValueError, match="no op 'nope' that can be tuned; known: distill_loss, matmul_w4a16"):
        tuner.subject("nope")
    if not device.has_card():
        with pytest.raises(Unsupported, match=r"needs a CUDA card; .*--dry-run"):
            tuner.CardMachine()
