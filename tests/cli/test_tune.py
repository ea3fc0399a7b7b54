"""`percard tune` at the command line: what it lists anywhere, what it refuses without a card, and how it goes on."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from percard.kernels import device, tuner

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
without_card = pytest.mark.skipif(device.has_card(), reason="this machine has a card")


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERCARD_TUNED", str(tmp_path / "user"))


def test_a_dry_run_lists_the_work_anywhere(percard: Callable[..., Any], tmp_path: Path) -> None:
    ran = percard("tune", "matmul_w4a16", "--model", "qwen3-8b", "--dry-run", "--json")
    assert ran.code == 0, ran.err
    done = json.loads(ran.out)
    assert done["folder"] == str(tmp_path / "user") and done["dry"] and not (tmp_path / "user").exists()
    assert {line["op"] for line in done["lines"]} == {"matmul_w4a16"}
    assert {line["status"] for line in done["lines"]} == {"to do"}
    assert done["lines"][0]["case"] == "qwen3-8b.gate_up.decode.b1", "the largest layer at one token decides most"
    assert len({line["case"] for line in done["lines"]}) == len(done["lines"]) == 4 * 9
    text = percard("tune", "--model", "qwen3-0.6b", "--dry-run").out
    assert (
        all(name in text for name in ("quantize_rows", "matmul_w8a8", "matmul_w4a8"))
        and "candidates; now Config(" in text
    )
    if not device.has_card():
        assert "no card here: as it would be there" in text


def test_a_dry_run_knows_what_is_there(percard: Callable[..., Any], tmp_path: Path) -> None:
    subject = tuner.subject("quantize_rows")
    (problem, *_) = tuner.problems([subject], "qwen3-8b")
    card = device.card() if device.has_card() else device.H200
    entry = problem.key(card, tuner.triton_version()) | {"config": {"block_k": 128, "num_warps": 1}, "us": 1.0}
    tuner.tuning.store(tmp_path / "mine" / "quantize_rows.json", entry)
    given = ("tune", "quantize_rows", "--model", "qwen3-8b", "--dry-run", "--json", "--out", tmp_path / "mine")
    states = [line["status"] for line in json.loads(percard(*given).out)["lines"]]
    assert states.count("there") == 1
    states = [line["status"] for line in json.loads(percard(*given, "--again").out)["lines"]]
    assert "there" not in states


@without_card
def test_without_a_card_it_says_so_in_one_line(percard: Callable[..., Any], tmp_path: Path) -> None:
    ran = percard("tune")
    assert ran.code == 2 and "needs a CUDA card" in ran.error and "--dry-run" in ran.error
    assert not (tmp_path / "user").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nope"], "no op 'nope' that can be tuned; known: distill_loss, matmul_w4a16"),
        (["--model", "gpt-5"], "no cases for model 'gpt-5'; known: "),
        (["--minutes", "0"], "--minutes 0 is outside"),
    ],
)
def test_bad_input(percard: Callable[..., Any], arguments: list[str], words: str) -> None:
    ran = percard("tune", *arguments)
    assert ran.code == 2 and words in ran.error


class Toy:
    """A machine on which every second candidate wins, each problem takes a minute, and nothing is wrong."""

    card, triton, where = device.H200, "3.9.0", torch.device("cpu")
    clock = 0.0

    def refuses(self, launches: Any) -> str | None:
        return None

    def time(self, turns: Any, rounds: int) -> dict[str, list[float]]:
        Toy.clock += 30.0
        return {name: [1.0 if name == "1" else 2.0] * rounds for name in turns}


def test_routes_of_one_copy_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On this CPU a w8a8 and a w4a8 copy have two routes; the entry is the winner's, bf16 stands beside it."""
    from percard import tune as verb

    if verb.prepare.__globals__["matmul_w8a8"].body("cpu").absent("cpu") is not None:
        pytest.skip("the C++ module is not built")

    class Routes(Toy):
        card = replace(device.H200, l2_bytes=1 << 12)

        def time(self, turns: Any, rounds: int) -> dict[str, list[float]]:
            assert all(len(turn) > 1 for turn in turns.values()), "copies for a cold cache"
            for turn in turns.values():
                assert turn[0]().shape[-1] == 48
            return {name: [1.0 if name == "matmul_w8a16" else 2.0] * rounds for name in turns}

    monkeypatch.setattr(tuner, "problems", lambda *_: [])
    monkeypatch.setattr(verb, "LAYERS", {"toy": {"o": (48, 128)}})
    monkeypatch.setattr(verb, "ROUTE_TOKENS", (1, 4))
    done = verb.tune(model="toy", out=tmp_path, machine=Routes())
    assert [line["status"] for line in done.lines] == ["tuned"] * 4 and done.lines[0]["op"] == "route"
    entries = tuner.tuning.read(tmp_path / "dispatch.json")
    assert {(e["spec"], e["way"]) for e in entries} == {("w8a8", "matmul_w8a16"), ("w4a8", "matmul_w4a8")}
    assert all(set(e["us"]) == {f"matmul_{e['spec']}", f"matmul_{e['spec'][:2]}a16"} and e["floor_us"] for e in entries)
    assert {e["m_bucket"] for e in entries} == {0, 2}
    assert [line["status"] for line in verb.tune(model="toy", out=tmp_path, machine=Routes()).lines] == ["there"] * 4


def test_minutes_cut_it_and_a_second_call_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from percard import tune as verb

    subject = tuner.subject("quantize_rows")
    monkeypatch.setattr(tuner, "_fault", lambda *_: None)
    monkeypatch.setattr(tuner, "_copies", lambda args, l2: [args])
    monkeypatch.setattr(subject.cases, "inputs", lambda case, seed, where: (torch.zeros(1, 8),))
    events: list[Any] = []
    given: dict[str, Any] = {"model": "qwen3-8b", "out": tmp_path, "machine": Toy(), "now": lambda: Toy.clock}
    first = verb.tune(["quantize_rows"], minutes=3.5, progress=events.append, **given)
    states = [line["status"] for line in first.lines]
    assert states[:4] == ["tuned"] * 3 + ["cut"] and first.exit_code == 5
    assert [e.done for e in events] == list(range(1, len(states) + 1)) and events[-1].total == len(states)
    assert events[1].eta_s == pytest.approx(60.0 * (len(states) - 2)) and "quantize_rows qwen3-8b" in events[0].label
    rest = verb.tune(["quantize_rows"], **given)
    states = [line["status"] for line in rest.lines]
    assert states[:3] == ["there"] * 3 and set(states[3:]) == {"tuned"} and rest.exit_code == 0
    assert f"{len(states) - 3} tuned" in str(rest.show()[-1]) and str(tmp_path) in str(rest.show()[-1])
