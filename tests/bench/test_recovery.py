"""What pruning loses and distilling brings back: arms, what is remembered, what is asked, the committed record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file

from percard.bench import engine, recovery, recovery_arms
from percard.bench.recovery import Cells, Failed
from percard.bench.recovery_arms import Arm, all_arms, checks, distil_arms, prune_arms
from percard.cli import app
from percard.formats.spec import FormatError

from .conftest import write_checkpoint

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-qwen3"


class Workshop:
    """Stands in for the commands: writes what was asked into the folder behind --out. `ran`: every command."""

    def __init__(self) -> None:
        self.ran: list[list[str]] = []
        self.fails = False

    def __call__(self, command: list[str], threads: int, told: Any) -> None:
        self.ran.append(command)
        told({"event": "progress"})
        out = Path(command[command.index("--out") + 1])
        if self.fails:
            out.with_name(f".{out.name}.percard-unfinished").mkdir(exist_ok=True)
            raise Failed("percard distill ended with 1: no room")
        out.mkdir()
        (out / "distill.json").write_text(json.dumps({"steps": 3, "other": 4}))


@pytest.fixture
def cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Workshop, list[str]]:
    """A function that opens the cells of two arms, the second begun from the first; the workshop; what was said."""
    monkeypatch.setattr(recovery, "write_texts", lambda model, folder: {"train": model.name})
    monkeypatch.setattr(recovery.quality, "read_ids", lambda *a: torch.arange(8))
    kl = {"a": 0.5, "b": 0.2}
    scored = lambda self, arm: {"kl": kl[arm.name], "ce_lost": 2 * kl[arm.name] ** 2, "parameters": 7}  # noqa: E731
    monkeypatch.setattr(Cells, "_score", scored)
    shop, said = Workshop(), []

    def opened(second: str = "distill {work}/a --data {data} --out {out}") -> Cells:
        arms = [
            Arm("a", "child", "one", ("prune {model} --out {out}",)),
            Arm("b", "distil", "two", (second,), "a", ("a",)),
        ]
        return Cells(arms, tmp_path / "model", tmp_path / "work folder", said.append, call=shop)

    return opened, shop, said


def test_an_arm_is_run_once_and_again_when_what_it_depends_on_changes(cells: Any) -> None:
    opened, shop, _ = cells
    found = opened().get("b")
    work = opened().work
    assert shop.ran == [
        ["prune", str(work.parent / "model"), "--out", str(work / "a")],
        ["distill", str(work / "a"), "--data", str(work / "train.jsonl"), "--out", str(work / "b")],
    ]
    assert found["kl_back"] == pytest.approx(0.6) and found["ce_back"] == pytest.approx(0.84)
    assert found["distill"] == {"steps": 3} and found["resumed"] is False and found["seconds"] >= 0
    assert opened().get("b") == found == opened().finished("b") and len(shop.ran) == 2
    other = opened("distill {work}/a --lr 1 --out {out}")
    assert other.finished("a") is not None and other.finished("b") is None
    other.get("b")
    assert len(shop.ran) == 3, "the child is still good"
    other.weights = {"model.safetensors": "another"}
    assert other.finished("a") is None
    other.get("b")
    assert len(shop.ran) == 5
    other.forget()
    assert other.finished("a") is None and not (work / "b").exists()


def test_a_failed_arm_goes_on_and_says_so(cells: Any) -> None:
    opened, shop, said = cells
    opened().get("a")
    shop.fails = True
    with pytest.raises(Failed, match="no room"):
        opened().get("b")
    assert opened().finished("b") is None
    shop.fails = False
    found = opened().get("b")
    assert found["resumed"] is True and said[-1] == "b: two, going on"
    arms = {"fkl": {**found, "seconds": 5.0}}
    assert "fkl.seconds" not in [c["name"] for c in checks(arms)], "those of the last piece alone mean nothing"
    arms["fkl"]["resumed"] = False
    assert "fkl.seconds" in [c["name"] for c in checks(arms)]


def test_a_command_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(Failed, match=r"percard prune nowhere .* ended with 2: .*nowhere"):
        recovery.percard(["prune", "nowhere", "--ffn", "64", "--out", str(tmp_path / "x")], 1, lambda event: None)


@pytest.mark.parametrize("arm", all_arms(), ids=lambda arm: arm.name)
def test_commands_are_percards_own(arm: Arm) -> None:
    group: Any = typer.main.get_command(app)
    for command in arm.commands:
        verb, *words = [word.format(model="m", work="w", out="o", data="d", prompts="p") for word in command.split()]
        group.commands[verb].make_context(verb, words)  # every flag is known and every value is of its type


def test_names_are_folders_of_their_own_and_needs_are_there() -> None:
    arms = {arm.name: arm for arm in all_arms()}
    assert len(arms) == len(all_arms()) and "arms" not in arms
    for arm in arms.values():
        assert {arm.start} - {""} <= set(arm.needs) <= set(arms)
        named = {word.split("/")[1] for c in arm.commands for word in c.split() if word.startswith("{work}/")}
        assert named == set(arm.needs), arm.name
    short = {arm.name: arm.commands for arm in all_arms(20)}
    assert "--steps 20 " in short["fkl"][0] and short["child"] == arms["child"].commands


def test_scores_are_those_of_plain_arithmetic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [write_checkpoint(tmp_path / str(i), "qwen3") for i in range(2)]
    tensors = load_file(folders[1] / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] *= 0.5
    save_file(tensors, folders[1] / "model.safetensors", {"format": "pt"})
    models = [engine.load(folder, dtype=torch.float32) for folder in folders]
    ids = torch.randint(0, models[0].config.vocab, (3 * 32 + 5,), generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(recovery, "WINDOW", 32)
    found = recovery.score(folders[1], models[0], ids)
    parts = ids[:96].view(3, 32)
    p, q = (m.logits(parts)[:, :-1].double().softmax(-1) for m in models)
    wanted = parts[:, 1:, None]
    assert found["tokens"] == 3 * 31
    assert found["kl"] == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-4)
    ours, theirs = (-x.gather(-1, wanted).log() for x in (q, p))
    assert found["ce"] == pytest.approx(float(ours.mean()), rel=1e-5)
    assert found["ce_lost"] == pytest.approx(float((ours - theirs).mean()), rel=1e-3, abs=1e-6)
    assert found["ce_lost_error"] == pytest.approx(float((ours - theirs).std()) / 93**0.5, rel=1e-3)
    assert found["top1"] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))


def test_every_choice_is_the_model_that_pruning_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "WINDOW", 16)
    model = engine.load(write_checkpoint(tmp_path / "whole", "qwen3"), dtype=torch.float32)
    ids = torch.randint(0, model.config.vocab, (64,), generator=torch.Generator().manual_seed(1))
    found = recovery.every_choice(model, ids, 1)
    assert set(found) == {"0,1", "0,2", "1,2"}
    for kept, kl in found.items():
        child = write_checkpoint(tmp_path / kept, "qwen3", num_hidden_layers=2)
        tensors = load_file(tmp_path / "whole" / "model.safetensors")
        for new, old in enumerate(kept.split(",")):
            tensors |= {
                n.replace(f".{old}.", f".{new}.to."): t
                for n, t in list(tensors.items())
                if n.startswith(f"model.layers.{old}.")
            }
        made = {n.replace(".to.", "."): t for n, t in tensors.items() if ".to." in n or ".layers." not in n}
        save_file({n: t.contiguous().clone() for n, t in made.items()}, child / "model.safetensors", {"format": "pt"})
        assert recovery.score(child, model, ids)["kl"] == pytest.approx(kl, rel=1e-4)


def test_the_texts_are_seeded_and_apart(tmp_path: Path) -> None:
    found = recovery.write_texts(EXAMPLE, tmp_path)
    train, prompts = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "prompts")
    )
    assert sum(len(line["text"]) for line in train) > recovery.CHARACTERS
    assert len(prompts) == recovery.PROMPTS == found["prompts"]["documents"]
    starts = {line["text"][: recovery.PROMPT] for line in train}
    assert not starts & {line["prompt"] for line in prompts}
    before = (tmp_path / "train.jsonl").stat().st_mtime_ns
    assert recovery.write_texts(EXAMPLE, tmp_path) == found
    assert (tmp_path / "train.jsonl").stat().st_mtime_ns == before, "distilling that was killed knows its text by it"
    (tmp_path / "again").mkdir()
    assert recovery.write_texts(EXAMPLE, tmp_path / "again") == found
    with pytest.raises(FormatError, match=r"train.py: not there; take the repository's examples/tiny-qwen3"):
        recovery.write_texts(tmp_path, tmp_path)


def _arms(**over: float) -> dict[str, dict[str, Any]]:
    base: dict[str, Any] = {"kl": 0.1, "ce_lost": 0.2, "ce_lost_error": 0.01, "seconds": 100.0, "resumed": False}
    back = {"fkl": 0.8, "hard": 0.2, "topk": 0.79, "both": 0.75, "depth": 0.7}
    arms = {name: {**base, "kl_back": over.get(name, share), "ce_back": 0.9} for name, share in back.items()}
    for case, (_, _, (score, *_)) in recovery_arms.CASES.items():
        for seed in recovery_arms.SEEDS:
            arms[f"{case}-{score}-{seed}"] = {**base, "kl": over.get("scored", 0.05), "prune": {"kept_layers": [0, 2]}}
            arms[f"{case}-random-{seed}"] = {**base, "kl": 0.2 if seed else over.get("lucky", 0.15)}
    arms["choices"] = {"choices": {"0,1": 0.3, "0,2": over.get("chosen", 0.1), "1,2": 0.15, "0,3": 0.2}}
    return arms | {"child": dict(base), "deep": dict(base)}


def test_what_is_asked() -> None:
    names = [c["name"] for c in checks(_arms())]
    assert len(set(names)) == len(names) >= 10 and all(c["held"] for c in checks(_arms()))
    for over, missed in (
        ({"fkl": 0.6}, {"fkl.kl"}),
        ({"hard": 0.75}, {"fkl.ahead"}),
        ({"topk": 0.71}, {"topk.of_live"}),
        ({"depth": 0.6}, {"depth.kl"}),
        ({"both": 0.71}, {"both.of_live"}),
        ({"scored": 0.11}, {"prune.layers.mean", "prune.ffn.mean"}),
        ({"lucky": 0.04}, {"prune.layers.worst", "prune.ffn.worst"}),
        ({"chosen": 0.25}, {"prune.layers.rank"}),
    ):
        assert {c["name"] for c in checks(_arms(**over)) if not c["held"]} == missed
    assert checks({}) == []


def test_tables_hold_what_the_record_holds() -> None:
    arms = [{"name": name, "kind": "prune", "words": "w", "cpu_seconds": 66.0, "ce": 3.0, "top1": 0.5, "parameters": 1234, **arm}
            for name, arm in _arms().items() if "kl" in arm]  # fmt: skip
    found = {"model": "m", "text": "t", "command": "c", "arms": arms, "checks": checks(_arms())}
    assert "| `--ffn 576`, at random | 0.1500 | 0.2000 | 0.2000 |\n" in recovery.choices(found)
    assert "by loss" not in recovery.choices(found), "which was not run"
    table = recovery.markdown(found, ("prune",)).splitlines()
    assert len(table) == 2 + len(arms) and all(line.count("|") == table[0].count("|") for line in table)
    assert recovery.markdown(found, ("distil",)).count("\n") == 2
    page = recovery.page(found)
    assert all(part in page for part in (recovery.choices(found), recovery.asked(found)))
    shown, wanted = recovery.tables(found)
    assert shown.row_count == len(arms) and wanted.row_count == len(found["checks"])


RECORD = EXAMPLE.parents[1] / "bench" / "results" / "recovery-tiny-qwen3.json"


def test_the_committed_record_holds_and_is_what_docs_say() -> None:
    found = json.loads(RECORD.read_text())
    arms = {arm["name"]: arm for arm in found["arms"]}
    assert found["schema"] == recovery.SCHEMA and found["model"] == EXAMPLE.name and found["cpu"]["model"]
    known = {arm.name: arm for arm in all_arms()}
    assert list(arms) == [name for name in known if name in arms], "in order"
    assert {arm.name for arm in (*prune_arms(), *distil_arms())} <= set(arms)
    for arm in [known[name] for name in arms]:
        assert arms[arm.name]["commands"] == [f"percard {command}" for command in arm.commands], arm.name
        assert arms[arm.name]["seconds"] > 0 and len(arms[arm.name]["source"]) == 64
        if arm.start:
            assert arms[arm.name]["distill"]["steps"] == recovery_arms.STEPS
            again = recovery.recovered(arms[arm.name], arms[arm.start])
            assert {key: arms[arm.name][key] for key in again} == pytest.approx(again)
    assert found["checks"] == checks(arms) and {c["name"] for c in found["checks"] if not c["held"]} == set()
    assert {c["name"] for c in checks(_arms())} <= {c["name"] for c in found["checks"]}
    docs = EXAMPLE.parents[1] / "docs"
    for name, table in (
        ("prune.md", recovery.choices(found)),
        ("distill.md", recovery.markdown(found, ("child", "distil"))),
        ("distill.md", recovery.asked(found)),
    ):
        assert table in (docs / name).read_text(), f"{name}: copy the table that `--out` writes beside the record"
