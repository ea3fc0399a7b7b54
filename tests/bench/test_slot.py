"""The slot for real on a CPU with tiny cases, its stages one by one, its report, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from percard import compose
from percard.bench import decode, folder, ops, slot, slot_report, slot_tasks
from percard.bench.record import Record
from percard.bench.runner import BAD_INPUT, CUT, DONE, RED, SHARE
from percard.bench.stage import Cell, Run, Stage
from percard.bench.worker import Worker

FEW = ("small.m1.n1.k1.w8a8.fp16", "small.m3.n37.k53.w8a8.fp16.bias")


def checks(run: Run) -> None:
    """One case in Triton's interpreter, two in C++."""
    cells = [
        Cell(
            f"{impl} {name}",
            "percard.bench.ops:check",
            {"op": "matmul_w8a8", "impl": impl, "case": name, "device": "cpu", "seed": 5},
            1.0,
            {"impl": impl, "case": name},
            {"op": "matmul_w8a8", "impl": impl},
        )
        for impl, name in (("triton", FEW[0]), ("cpu", FEW[0]), ("cpu", FEW[1]))
    ]
    run.cells(cells, into=slot.CONFORMANCE, env={"TRITON_INTERPRET": "1"})


def one_op(run: Run) -> None:
    """A row that is a Record; the time it holds is not looked at."""
    about = ops.sections("w8a8", ops.case_of("matmul_w8a8", FEW[1]))
    arguments = {"spec": "w8a8", "case": FEW[1], "device": "cpu", "rounds": 1, "with_rivals": False}
    run.cells([Cell("w8a8", "percard.bench.ops:time_case", arguments, 5.0, {"case": FEW[1]}, about)])


SHORT = (
    Stage("fingerprint", 25, slot.fingerprint, essential=True, patient=True),
    Stage("correctness", 100, checks, essential=True),
    Stage("ops", 400, one_op, essential=True),
)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_slot_on_a_cpu_and_again(tmp_path: Path) -> None:
    out, said = tmp_path / "slot", []
    assert slot.run(out, 10, device="cpu", stages=SHORT, say=said.append) == DONE, said
    manifest = json.loads((out / "manifest.json").read_text())
    assert [s["state"] for s in manifest["stages"]] == ["done"] * 3 and manifest["device"] == "cpu"
    made = [Record.from_json(line) for line in (out / "records.jsonl").read_text().splitlines()]
    assert [row.status for row in made] == ["ok"] and made[0].latency_us is not None
    assert made[0].cpu["read_gbs"] > 0 and made[0].env["torch"] == torch.__version__, "sections of the machine"
    checked = list(folder.read_lines(out / "conformance.jsonl"))
    assert [(row["impl"], row["quality"]["gate"]) for row in checked] == [
        ("triton", "green"), ("cpu", "green"), ("cpu", "green"),
    ]  # fmt: skip
    report = (out / "report.md").read_text()
    assert "| matmul_w8a8 | triton | 1 |" in report and FEW[1] in report and "noise floor" in report
    assert (out / "table.csv").read_text().splitlines()[1].startswith(f"op,{FEW[1]},w8a8")
    page = (out / "report.html").read_text()
    assert "Slot: complete" in page and FEW[1] in page and "<svg" not in page, "one row makes no plot"
    assert "torch" in (out / "env.txt").read_text()
    size = (out / "records.jsonl").stat().st_size

    begin = time.monotonic()
    assert slot.run(out, 10, device="cpu", stages=SHORT, say=said.append) == DONE
    assert (out / "records.jsonl").stat().st_size == size and time.monotonic() - begin < 200
    assert len(json.loads((out / "manifest.json").read_text())["calls"]) == 2
    for path in (*out.glob("*.jsonl"), out / "card.json"):
        path.unlink()
    assert slot_report.markdown(out, folder.rows_of(out)) == (out / "report.md").read_text(), "archives alone will do"
    assert [row.case for row in compose.read_records(out)] == [FEW[1]]


def test_sigterm_ends_a_real_slot(tmp_path: Path) -> None:
    """SIGTERM while a worker process is in a cell: exit code 5, nothing left running, and the folder can be read."""
    (tmp_path / "sleepy.py").write_text(
        "import time, os\n"
        "def cell():\n"
        "    yield {'part': 'pid', 'pid': os.getpid()}\n"
        "    time.sleep(600)\n"
    )  # fmt: skip
    out = tmp_path / "slot"
    script = (
        "import sys\n"
        "from percard.bench import slot\n"
        "from percard.bench.stage import Cell, Stage\n"
        "def work(run):\n"
        "    run.cells([Cell('sleep', 'sleepy:cell', {}, 5.0, {'a': 1})], into='x.jsonl')\n"
        f"sys.exit(slot.run({str(out)!r}, 5, device='cpu', stages=(Stage('a', 10, work),)))\n"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": path})
    end = time.monotonic() + 200
    while not (out / "x.jsonl").exists() and time.monotonic() < end:
        time.sleep(0.1)
    process.terminate()
    assert process.wait(60) == CUT
    rows = list(folder.read_lines(out / "x.jsonl"))
    assert [row["status"] for row in rows] == ["ok", "cut"] and "SIGTERM" in rows[1]["error"]["message"]
    with pytest.raises(ProcessLookupError):
        os.kill(rows[0]["pid"], 0)
    assert json.loads((out / "manifest.json").read_text())["state"] == "cut" and (out / "report.md").exists()


def test_what_is_refused(tmp_path: Path) -> None:
    said: list[str] = []
    if not torch.cuda.is_available():
        assert slot.run(tmp_path / "a", 5, say=said.append) == BAD_INPUT
        assert "no CUDA card" in said[-1] and "--device cpu" in said[-1] and "\n" not in said[-1]
        assert not (tmp_path / "a").exists(), "a refusal leaves nothing"
    assert slot.run(tmp_path / "b", 0.0, device="cpu", say=said.append) == BAD_INPUT and "--minutes" in said[-1]
    assert slot.run(tmp_path / "b", 5, device="tpu", say=said.append) == BAD_INPUT and "cuda, cpu" in said[-1]
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "thesis.txt").write_text("x")
    assert slot.run(tmp_path / "c", 5, device="cpu", say=said.append) == BAD_INPUT and "empty folder" in said[-1]
    assert slot.run(tmp_path / "c" / "thesis.txt", 5, device="cpu", say=said.append) == BAD_INPUT


def test_shares_add_up() -> None:
    assert sum(stage.seconds for stage in slot.STAGES) == 570 == 600 * SHARE
    assert sum(stage.seconds for stage in slot.STAGES) * 0.8 == 456, "at 8 minutes, and 24 s of reserve"
    assert [stage.name for stage in slot.STAGES if stage.essential] == ["fingerprint", "correctness", "ops"]
    assert len({stage.name for stage in slot.STAGES}) == len(slot.STAGES)


class Listing:
    """Stands for a Run: keeps the cells that a stage makes."""

    def __init__(self, where: Path, device: str) -> None:
        self.folder, self.device, self.made = where, device, []
        self.runner = self
        self.about = {"uuid": "u", "arch": "sm_90"}

    def cells(self, cells: list[Cell], **options: Any) -> None:
        self.made += cells

    def left(self) -> float:
        return 60.0

    def ask(self, task: str, arguments: dict[str, Any], timeout: float) -> list[dict[str, Any]]:
        assert arguments["arch"] == "sm_90"
        return [{"op": op, "case": case, "index": 0} for op, case in arguments["problems"]]


@pytest.mark.parametrize("device", slot.DEVICES)
@pytest.mark.parametrize(
    "stage", [slot.compile_kernels, slot.correctness, slot.time_ops, slot.time_model, slot.time_serve]
)
def test_cells_of_the_stages(tmp_path: Path, stage: Any, device: str) -> None:
    listing = Listing(tmp_path, device)
    stage(listing)
    assert listing.made and all(cell.seconds > 0 for cell in listing.made)
    keys = [json.dumps(cell.identity, sort_keys=True) for cell in listing.made]
    assert len(set(keys)) == len(keys), "each cell has a key of its own"
    for cell in listing.made:
        json.dumps(cell.arguments)
        module, name = cell.task.split(":")
        assert hasattr(sys.modules[module], name)
        if stage in (
            slot.time_ops,
            slot.time_model,
            slot.time_serve,
        ):  # its row must be a Record even when it never ran
            cut = {"status": "cut", "error": {"type": "Cut", "message": "", "stage": "deadline"}, "seconds": 0.0}
            slot.completed(tmp_path, {}, {**cell.row, **cut, "cell_key": "k"})


def test_what_a_card_would_run(tmp_path: Path) -> None:
    listing = Listing(tmp_path, "cuda")
    slot.correctness(listing)
    bodies = {(c.arguments["op"], c.arguments["impl"]) for c in listing.made if "op" in c.arguments}
    assert bodies == {(name, "triton") for name in ops.OPS}, "on a card it is Triton that is asked"
    tests = [c for c in listing.made if c.task.endswith("pytest_rows")]
    assert len(tests) == (1 if slot.checkout() else 0)
    assert all(c.arguments["limit_s"] < listing.left() for c in tests)


def test_compiling_a_kernel(tmp_path: Path) -> None:
    """One kernel for sm_90, in a process of its own as in a slot, and equal kernels once."""
    env = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    worker = Worker(tmp_path / "log", env)
    rows: list[dict[str, Any]] = []
    names = ["small.m1.k128.bf16", "small.m16.k129.bf16", "small.m1.k128.bf16"]
    arguments: dict[str, Any] = {"arch": "sm_90", "problems": [["quantize_rows", name] for name in names]}
    assert worker.run("percard.bench.slot_tasks:distinct_kernels", arguments, 60.0, rows.append).status == "ok"
    assert 1 <= len(rows) <= 2 and rows[0] == {"op": "quantize_rows", "case": names[0], "index": 0}
    made: list[dict[str, Any]] = []
    outcome = worker.run("percard.bench.slot_tasks:compile_kernel", {**rows[0], "arch": "sm_90"}, 120.0, made.append)
    assert outcome.status == "ok", outcome
    assert made[0]["registers"] > 0 and made[0]["spilled_bytes"] == 0 and made[0]["faults"] == []
    assert list((tmp_path / "cache").iterdir()), "what was compiled is there for the run"
    unknown = worker.run("percard.bench.slot_tasks:distinct_kernels", {**arguments, "arch": "sm_70"}, 60.0, rows.append)
    assert unknown.status == "refused" and unknown.error is not None and "sm_70" in unknown.error["message"]
    worker.close()


def tree(where: Path, text: str) -> str:
    (where / "tests").mkdir()
    (where / "tests" / "test_it.py").write_text("import pytest, time\n" + text)
    (where / "pytest.ini").write_text("[pytest]\nmarkers = gpu: x\n")
    return str(where)


def test_pytest_rows(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        "@pytest.mark.gpu\ndef test_a(): pass\n"
        "@pytest.mark.gpu\n@pytest.mark.parametrize('x', ['a b', 'c'])\ndef test_b(x): assert x == 'c', 'why it is red'\n"
        "@pytest.mark.gpu\ndef test_real_cases(): assert 0\n"
        "def test_other(): assert 0\n",
    )
    *parts, own = slot_tasks.pytest_rows(root, "gpu", "not real_cases", 60.0)
    assert [(row["part"].split("::")[1], row["status"]) for row in parts] == [
        ("test_a", "ok"), ("test_b[a b]", "failed"), ("test_b[c]", "ok"),
    ]  # fmt: skip
    assert own["quality"]["gate"] == "red" and "why it is red" in own["error"]["message"]
    *_, nothing = slot_tasks.pytest_rows(root, "gpu", "nothing_like_this", 60.0)
    assert nothing["status"] == "absent"


def test_pytest_rows_are_cut(tmp_path: Path) -> None:
    root = tree(tmp_path, "@pytest.mark.gpu\ndef test_a(): time.sleep(100)\n")
    begin = time.monotonic()
    *_, own = slot_tasks.pytest_rows(root, "gpu", "test", 4.0)
    assert own["status"] == "cut" and time.monotonic() - begin < 30


def test_decode_cell(tmp_path: Path, checkpoint: Any) -> None:
    source = str(checkpoint("qwen3"))
    rows = list(decode.cell(source, "w8a8", [1, 2], 8, "cpu", rounds=2, prompt=16))
    assert [row.get("part") for row in rows] == ["pp16.b1", "w8a8 16bit head b1", "w8a8 b1", "w8a8 16bit head b2", None]
    for row in rows:
        words = {name: row.pop(name, None) for name in ("part", "words")}
        assert "tok/s" in words["words"]
        Record(cell_key="k", level="model", **row)
    own = rows[-1]
    assert own["scheme"]["head"] == "int8-row" and own["tokens"]["vs_fp16"]["same_batch"]["batch"] == 2
    assert own["memory"]["weights"] != rows[-2]["memory"]["weights"], "both heads are counted in bytes"
    first = next(r for r in rows if ".tg" in r["case"])
    assert "max_fit" not in first["tokens"]["vs_fp16"]
    versus = rows[-1]["tokens"]["vs_fp16"]
    assert versus["max_fit"]["batch"] == 2 and versus["max_fit"]["fits"] > versus["max_fit"]["fits_fp16"] > 0
    assert versus["same_bound"] == {"ratio": None, "reason": "a slot has no bound"}
    *_, over, own = decode.cell(source, "w8a8", [1], 8, "cpu", rounds=2, prompt=16, kv=["int8"])
    assert over["part"] == "w8a8, int8 cache b1" and over["scheme"]["kv_spec"] == "int8"
    assert (own["scheme"]["kv_spec"], over["memory"]["kv_bytes_per_token"]) == ("bf16", 3 * 2 * (2 * 32 + 4))
    (*_, base) = decode.cell(source, None, [1], 8, "cpu", rounds=2, prompt=16)
    assert base["scheme"]["spec"] == "float32" and "part" not in base


def test_decode_with_broken_logits_is_red(monkeypatch: pytest.MonkeyPatch, checkpoint: Any) -> None:
    source = str(checkpoint("qwen3"))
    whole = decode.load(source)

    def broken(name: str, spec: Any = None, **options: Any) -> Any:
        model = type(whole)(**{**vars(whole), "spec": spec})
        if spec is not None:
            monkeypatch.setattr(type(whole), "with_head", lambda self, head: self)
            monkeypatch.setattr(
                type(whole), "logits", lambda self, ids: torch.full((1, 4, 7), float("nan") if self.spec else 0.0)
            )
        return model

    decode._baseline.cache_clear()
    monkeypatch.setattr(decode, "load", broken)
    (row,) = decode.cell(source, "w8a8", [1], 8, "cpu", rounds=1, prompt=16)
    decode._baseline.cache_clear()
    assert row["quality"]["gate"] == "red" and "NaN" in row["error"]["message"] and "tokens" not in row


def test_report_of_stacks_and_what_is_left_out(tmp_path: Path) -> None:
    rows = []
    for layer, ours in zip(("qkv", "o", "gate_up", "down"), (1.0, 2.0, 3.0, 4.0), strict=True):
        row = {"level": "op", "case": f"qwen3-8b.{layer}.decode.b16", "status": "ok", "shape": {"M": 16}}
        row |= {"scheme": {"spec": "w8a8"}, "latency_us": {"median": ours, "lo": ours, "hi": ours}}
        row["against"] = [
            {
                "impl": "torch bfloat16",
                "status": "ok",
                "median": 5.0,
                "lo": 5.0,
                "hi": 5.0,
                "ratio": 5 / ours,
                "ci95": [1, 2],
            },
            {"impl": "torch._int_mm alone", "status": "absent", "reason": "M = 16 is refused below 17"},
        ]
        rows.append(row)
    rows.append(
        {
            "level": "op",
            "case": "qwen3-8b.o.prefill.t4096",
            "status": "cut",
            "scheme": {"spec": "w8a8"},
            "error": {"message": "m"},
        }
    )
    (tmp_path / "manifest.json").write_text(
        json.dumps(
            {
                "machine": {"card": "X"},
                "state": "cut",
                "calls": [{"minutes": 5, "started": "now"}],
                "about": {},
                "stages": [],
            }
        )
    )
    text = slot_report.markdown(tmp_path, rows)
    assert "| qwen3-8b | w8a8 | 2.00 |" in text, "20 us of bf16 over 10 us of ours"
    assert "M = 16 is refused below 17" in text and "cut: no time was left (w8a8 qwen3-8b.o.prefill.t4096)" in text
    assert slot_report._stacks(rows[1:]) == "", "three linears are no layer"
    assert len(slot_report.table_csv(rows).splitlines()) == 6


def test_red_conformance_is_exit_code_4(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wrong.py").write_text(
        "def cell():\n    yield {'status': 'failed', 'quality': {'gate': 'red'}, 'error': {'message': 'off'}}\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    stage = Stage(
        "correctness", 10, lambda run: run.cells([Cell("x", "wrong:cell", {}, 1.0, {"a": 1})], into=slot.CONFORMANCE)
    )
    assert slot.run(tmp_path / "out", 1, device="cpu", stages=(stage,), say=lambda line: None) == RED
