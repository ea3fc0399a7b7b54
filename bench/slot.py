"""`percard bench slot`: one command for a machine where a card is free only for ten minutes. docs/slot.md tells its use.

Stages by worth, each with its own deadline; what one leaves over goes to the next. Nothing is downloaded, nothing is
asked. The folder is valid at any moment, and a second call with the same folder goes on where the first was cut.
Later stages join by one more line in STAGES.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import folder as folder_module
from . import slot_report
from .folder import BadFolder
from .record import Record, code_section
from .runner import BAD_INPUT, Runner
from .stage import Cell, Run, Stage
from .worker import Worker, WorkerLike

DEVICES = ("cuda", "cpu")
LEAST_MINUTES, MOST_MINUTES = 0.2, 24 * 60.0
CONFORMANCE, INSPECT = "conformance.jsonl", "inspect.jsonl"
MODELS = ("qwen3-8b", "qwen3-32b")
SPECS = ("w4a16-g128", "w8a8", "w4a8-g128", "w4a8")
MODEL_SPECS = (None, "w4a16-g128", "w8a8", "w4a8-g128")
BATCHES, DEPTH, TUNED, TUNING = (1, 16, 64), 1024, "tuned", "tuning.jsonl"
CACHES, CACHES_SPEC, CACHES_DEPTH = ("int8", "k8v4", "int4"), "w4a16-g128", 8192
TUNED_OPS, TUNED_MODEL = ("matmul_w4a16", "matmul_w8a8", "matmul_w4a8"), "qwen3-8b"
_PACKAGE = __package__
_START_WORKER = functools.partial(Worker, first=f"{_PACKAGE}.slot_tasks:load")


# The stages ---------------------------------------------------------------------------------------------------------


def fingerprint(run: Run) -> None:
    """Which machine this is, its roofs, and how far one thing timed against itself differs: card.json, env.txt."""
    cell = Cell(
        "roofs",
        f"{_PACKAGE}.roof:measure",
        {"device": run.device},
        8.0 if run.device == "cuda" else 3.0,
        {"task": "roofs", "uuid": run.runner.about["uuid"]},
    )
    run.cells([cell], into="card.jsonl")
    this = run.runner.about["uuid"]
    rows = [
        row for row in folder_module.read_lines(run.folder / "card.jsonl") if row.get("card", {}).get("uuid") == this
    ]
    if rows:
        run.write("card.json", json.dumps(rows[-1], indent=1))
        lines = [f"{name} {value}" for name, value in rows[-1]["env"].items() if name != "env_vars"]
        lines += [f"{name}={value}" for name, value in rows[-1]["env"]["env_vars"].items()]
        run.write("env.txt", "\n".join([*lines, *(f"noisy: {why}" for why in rows[-1]["noisy"]), ""]))


def compile_kernels(run: Run) -> None:
    """The kernels of this slot for this card's architecture, in a pool of processes that touch no card: inspect.jsonl."""
    ops = _ops()
    arch, on_card = run.runner.about["arch"], run.device == "cuda"
    timed = ops.plan(MODELS, SPECS) if on_card else []
    wanted = [[ops.linear_ops(spec)[-1].name, case.name] for spec, case in timed]
    wanted += [
        [name, case.name] for name, (_, cases) in ops.OPS.items() for case in cases.SMALL[: None if on_card else 2]
    ]
    if on_card:
        wanted += [["quantize_rows", case.name] for case in ops.OPS["quantize_rows"][1].REAL]
    arguments = {"arch": arch, "problems": wanted}
    jobs = run.ask(f"{_PACKAGE}.slot_tasks:distinct_kernels", arguments, max(20.0, run.left()))
    cells = []
    for job in jobs:
        identity = {"task": "compile", "arch": arch, **job, "source": ops.source_hash(job["op"])}
        words = f"{job['op']} {job['case']} {job['index']}"
        task = f"{_PACKAGE}.slot_tasks:compile_kernel"
        cells.append(Cell(words, task, {**job, "arch": arch}, 4.0, identity, dict(job), kind="compile"))
    run.cells(cells, into=INSPECT, workers=max(2, _processes()))


def correctness(run: Run) -> None:
    """Every Triton body (on a CPU the C++ bodies as well) against its reference; in a checkout then `pytest -m gpu`."""
    ops = _ops()
    cells = []
    for name, (_, cases) in ops.OPS.items():
        chosen = [("triton", case) for case in cases.SMALL]
        if run.device == "cpu":
            # The interpreter takes seconds for what a card does in microseconds, and multiplies bf16 wrongly.
            simple = [case for case in cases.SMALL if str(case.dtype) == "torch.float16"]
            chosen = [("triton", case) for case in sorted(simple, key=lambda c: c.m * max(c.n, 1) * c.k)[:2]]
            chosen += [("cpu", case) for case in cases.SMALL]
        for impl, case in chosen:
            identity = {"task": "check", "op": name, "impl": impl, "case": case.name, "source": ops.source_hash(name)}
            arguments = {"op": name, "impl": impl, "case": case.name, "device": run.device, "seed": _seed()}
            row = {"op": name, "impl": impl, "case": case.name}
            words = f"{name} {impl} {case.name}"
            cells.append(Cell(words, f"{_PACKAGE}.ops:check", arguments, 3.0, identity, row, kind=f"check {impl}"))
    if run.device == "cpu":
        run.cells(cells, into=CONFORMANCE, env={"TRITON_INTERPRET": "1"})
        return
    run.cells(cells, into=CONFORMANCE, workers=min(8, _processes()))
    root = checkout()
    if root is not None and run.left() > 20:
        limit = run.left() - 10
        identity = {"task": "pytest -m gpu", "source": ops.source_hash(*ops.OPS)}
        # Real layers are gated one by one before they are timed; here are the tests that are more than a comparison.
        arguments = {"root": str(root), "marker": "gpu", "words": "not real_cases", "limit_s": limit}
        row = {"op": "all", "impl": "triton", "case": "pytest -m gpu"}
        cell = Cell("pytest -m gpu", f"{_PACKAGE}.slot_tasks:pytest_rows", arguments, limit / 1.3 - 5, identity, row)
        run.cells([cell], into=CONFORMANCE)


def time_ops(run: Run) -> None:
    """The linears of two models by worth, each against torch's bf16 and _int_mm in the same rounds; nothing tuned here yet."""
    run.cells(_op_cells(run))


def time_tuned(run: Run) -> None:
    """The linears that a Config of this slot won for, once more, in a process that reads the tuned files."""
    won = {
        (row["op"], row["case"])
        for row in folder_module.read_lines(run.folder / TUNING)
        if row.get("outcome") == "tuned"
    }
    ops = _ops()
    digest = hashlib.sha256(b"".join(p.read_bytes() for p in sorted((run.folder / TUNED).glob("*.json")))).hexdigest()
    cells = [
        dataclasses.replace(cell, name=f"{cell.name} tuned", identity={**cell.identity, "tuned": digest[:16]})
        for cell in _op_cells(run)
        if (ops.linear_ops(cell.arguments["spec"])[-1].name, cell.arguments["case"]) in won
    ]
    for cell in cells:
        cell.row["code"]["config_source"] = "tuned"  # type: ignore[index]
    run.cells(cells, env={"PERCARD_TUNED": str((run.folder / TUNED).resolve())})


def _op_cells(run: Run) -> list[Cell]:
    ops = _ops()
    if run.device == "cuda":
        todo = ops.plan(MODELS, SPECS)
    else:  # the smallest case of each spec: enough to try the run
        cases = [case for spec in SPECS for case in ops.OPS[ops.linear_ops(spec)[-1].name][1].SMALL]
        smallest = {
            spec: min((c for c in cases if c.spec == spec), key=lambda c: c.n * c.k, default=None) for spec in SPECS
        }
        todo = [(spec, case) for spec, case in smallest.items() if case is not None]
    roof = measured_roof(run.folder)
    cells = []
    for spec, case in todo:
        parts = [op.name for op in ops.linear_ops(spec)]
        about = ops.sections(spec, case)
        code, rounds = {"op_source_hash": ops.source_hash(*parts)}, 7 if run.device == "cuda" else 2
        arguments = {
            "spec": spec,
            "case": case.name,
            "device": run.device,
            "rounds": rounds,
            "roof": roof,
            "seed": _seed(),
        }
        identity = {"task": "op", "case": case.name, "spec": spec, "rounds": rounds, **code}
        seconds = 1.2 if run.device == "cuda" else 8.0  # a loaded CPU takes its time over rivals
        row = {**about, "code": code}
        cells.append(
            Cell(f"{spec} {case.name}", f"{_PACKAGE}.ops:time_case", arguments, seconds, identity, row, kind="op")
        )
    return cells


def time_experts(run: Run) -> None:
    """A layer of experts (Qwen3-30B-A3B) by worth, quantised against torch's grouped bf16 product in the same rounds."""
    cells = importlib.import_module(f"{_PACKAGE}.moe").slot_cells
    run.cells(cells(run.device, _seed(), measured_roof(run.folder)))


def time_attention(run: Run) -> None:
    """Ops over a paged cache at Qwen3-8B's heads, by worth: decode in every spec, what writes the cache, what unpacks it."""
    attention = importlib.import_module(f"{_PACKAGE}.attention")
    run.cells(attention.slot_cells(run.device, _seed(), measured_roof(run.folder)))


def tune_configs(run: Run) -> None:
    """Configs of one model's linears by worth, measured on this card: tuned/<op>.json, proposals that people merge.

    What it will try is compiled first, in a pool of processes that touch no card, for as many problems as there is time.
    """
    if run.device != "cuda":
        run.say("tune: a CPU has no Configs to measure")
        return
    ops, arch = _ops(), run.runner.about["arch"]
    asked = {"ops_wanted": list(TUNED_OPS), "model": TUNED_MODEL}
    todo = run.ask(f"{_PACKAGE}.slot_tasks:problems", asked, max(20.0, run.left()))
    todo = todo[: max(4, int(run.left() / 5))]
    firsts = {(job["op"], job["group"]): job for job in reversed(todo)}
    cells, compiles = [], []
    for job in todo:
        row = {"op": job["op"], "case": job["case"]}
        identity = {"arch": arch, **row, "model": TUNED_MODEL, "source": ops.source_hash(job["op"])}
        given = {**row, "model": TUNED_MODEL}
        words = f"{job['op']} {job['case']}"
        if firsts[job["op"], job["group"]] is job:
            task = f"{_PACKAGE}.slot_tasks:compile_candidates"
            compiles.append(
                Cell(
                    words,
                    task,
                    {**given, "arch": arch},
                    15.0,
                    {"task": "candidates", **identity},
                    row,
                    kind="candidates",
                )
            )
        out = str((run.folder / TUNED).resolve())
        arguments = {**given, "out": out, "seed": _seed()}
        task = f"{_PACKAGE}.slot_tasks:tune"
        cells.append(Cell(words, task, arguments, 4.0, {"task": "tune", **identity}, row, kind="tune"))
    run.cells(compiles[: 2 * _processes()], into="candidates.jsonl", workers=max(2, _processes()))
    run.cells(cells, into=TUNING)
    for path in sorted((run.folder / TUNED).glob("*.json")):
        run.files.append(f"{TUNED}/{path.name}") if f"{TUNED}/{path.name}" not in run.files else None


def time_model(run: Run) -> None:
    """Prefill and decode of Qwen3-8B with synthetic weights, each spec against bf16, with int8 head and with 16-bit head.

    Then steps of one spec over each cache, at a depth where caches are read as long as weights.
    """
    ops = _ops()
    on_card = run.device == "cuda"
    source, batches, depth, layers, rounds = "shape:qwen3-8b", list(BATCHES), DEPTH, None, 7
    if not on_card:
        source, batches, depth, layers, rounds = "shape:qwen3-0.6b", [1], 16, 1, 3
    cells = []
    wanted: list[tuple[str | None, list[int], int, list[str]]] = [
        (spec, batches, depth, []) for spec in MODEL_SPECS if on_card or spec != "w4a16-g128"
    ]
    if on_card:
        wanted.append((CACHES_SPEC, [16], CACHES_DEPTH, list(CACHES)))
    else:
        wanted.append(("w8a8", [1], 2 * depth, ["int8"]))
    for spec, batches, depth, kv in wanted:
        code = {"op_source_hash": ops.source_hash(*ops.OPS)}
        arguments: dict[str, Any] = {
            "source": source,
            "spec": spec,
            "batches": batches,
            "depth": depth,
            "layers": layers,
            "kv": kv,
        }
        arguments |= {"device": run.device, "rounds": rounds, "roof": measured_roof(run.folder)}
        identity = {
            "task": "model",
            **{k: arguments[k] for k in ("source", "spec", "batches", "depth", "layers", "rounds", "kv")},
            **code,
        }
        name = source.removeprefix("shape:")
        row = {"level": "model", "case": f"{name}.model.tg.d{depth}.b{batches[-1]}", "scheme": {"spec": spec or "bf16"}}
        row |= {"model": {"id": name, "weights": "synthetic"}, "code": code}
        words = f"{name} {spec or 'bf16'}{' over ' + ', '.join(kv) if kv else ''}"
        cells.append(Cell(words, f"{_PACKAGE}.decode:cell", arguments, 25.0, identity, row, kind="model"))
    run.cells(cells)


def time_serve(run: Run) -> None:
    """Seeded requests in waves over one pool of pages: 16 bits and two specs over two caches, TTFT, TPOT, tokens per card."""
    run.cells(importlib.import_module(f"{_PACKAGE}.serve_slot").cells(run.device))


def time_losses(run: Run) -> None:
    """A head, each divergence and their gradients, against torch's composition and Liger-Kernel."""
    cells = importlib.import_module(f"{_PACKAGE}.distill").slot_cells
    run.cells(cells(run.device, _seed(), measured_roof(run.folder)))


def train_qad(run: Run) -> None:
    """Steps of `percard distill` over random weights at true shapes, in 16 bits and quantisation-aware: qad.jsonl."""
    run.cells(importlib.import_module(f"{_PACKAGE}.slot_qad").slot_cells(run.device, _seed()), into=slot_report.QAD)


STAGES = (  # seconds of a ten-minute slot; they sum to 570, 30 s are the reserve
    Stage("fingerprint", 25, fingerprint, essential=True, patient=True),
    Stage("compile", 55, compile_kernels),
    Stage("correctness", 90, correctness, essential=True),
    Stage("ops", 100, time_ops, essential=True),
    Stage("attention", 55, time_attention),
    Stage("experts", 30, time_experts),
    Stage("model", 70, time_model),
    Stage("serve", 25, time_serve),
    Stage("tune", 45, tune_configs),
    Stage("tuned", 30, time_tuned),
    Stage("losses", 15, time_losses),
    Stage("qad", 30, train_qad),
)


# The verb -----------------------------------------------------------------------------------------------------------


def run(
    out: str | Path,
    minutes: float = 10.0,
    *,
    device: str = "cuda",
    retry_failed: bool = False,
    stages: Sequence[Stage] = STAGES,
    say: Callable[[str], None] | None = None,
    now: Callable[[], float] = time.monotonic,
    make_worker: Callable[[Path, Mapping[str, str]], WorkerLike] = _START_WORKER,
) -> int:
    """Runs the slot into folder `out` for at most `minutes`. Returns the exit code:

    0 complete, 1 error, 2 bad input (also: no card; `device="cpu"` tries the run without one), 4 a kernel disagrees with
    its reference, 5 cut but valid (time, SIGTERM, lost card), 130 interrupted. `out` of an earlier call is gone on with:
    finished stages and cells are skipped; `retry_failed` runs failed cells again. Rows that are not timings are told by
    `say`, a line each; None = stderr.
    """
    tell = say or (lambda text: print(text, file=sys.stderr, flush=True))
    target = Path(out)
    if device not in DEVICES:
        tell(f"device {device!r} is not known; known: {', '.join(DEVICES)}")
        return BAD_INPUT
    if not LEAST_MINUTES <= minutes <= MOST_MINUTES:
        tell(f"--minutes {minutes:g} is outside {LEAST_MINUTES:g} .. {MOST_MINUTES:g}")
        return BAD_INPUT
    start = now()
    # The worker asks for the device while this process loads torch, which it needs for the lists of cases only.
    loading = threading.Thread(target=_ops, daemon=True)
    loading.start()
    try:
        with folder_module.claimed(target):
            return _run(target, minutes, device, retry_failed, stages, tell, now, make_worker, start)
    except (BadFolder, NotADirectoryError, PermissionError) as error:
        tell(str(error))
        return BAD_INPUT


def _run(
    target: Path,
    minutes: float,
    device: str,
    retry_failed: bool,
    stages: Sequence[Stage],
    tell: Callable[[str], None],
    now: Callable[[], float],
    make_worker: Callable[[Path, Mapping[str, str]], WorkerLike],
    start: float,
) -> int:
    # Kernels are compiled here, whatever the caller's shell says of the interpreter.
    env = {"TRITON_INTERPRET": "0", "PERCARD_TUNED": str(target.resolve() / "none")}  # no cache of the user's decides
    env["TRITON_CACHE_DIR"] = os.environ.get("TRITON_CACHE_DIR", str(target.resolve() / "triton-cache"))
    asking = f"{_PACKAGE}.roof:identity"
    found: list[dict[str, Any]] = []
    worker = make_worker(target / "worker.log", env)
    outcome = worker.run(asking, {"device": device}, 120.0, found.append, lambda: False)
    if not found:
        worker.close()
        tell(
            (outcome.error or {}).get("message", f"the worker ended with {outcome.status}; see {target / 'worker.log'}")
        )
        return BAD_INPUT
    machine, uid = found[0]["same"], found[0]["uuid"]
    code = code_section(f"percard bench slot --minutes {minutes:g} --device {device}")
    runner = Runner(
        target,
        minutes,
        about={"code": code, "sources": sources(), "uuid": uid, "arch": found[0]["arch"]},
        device=device,
        identity=machine,
        env=env,
        complete=functools.partial(completed, target, code),
        report=slot_report.write,
        probe=Cell("is the card there", asking, {"device": device}, 5.0, {}),
        retry=retry_failed,
        say=tell,
        now=now,
        make_worker=make_worker,
        worker=worker,
        start=start,
        again=("fingerprint",),  # a later call may get another card of the same kind; its roofs are its own
    )
    return runner.run(stages)


def completed(target: Path, code: Mapping[str, Any], row: dict[str, Any]) -> str:
    """A row as the line of a full Record: the machine's sections, the version of the code, the checks of a Record."""
    shared = machine_sections(target)
    full = {name: folder_module.merge(shared.get(name) or {}, row.get(name) or {}) for name in ("env", "cpu", "card")}
    clock = folder_module.merge({"noisy": shared.get("noisy", [])}, row.get("clock") or {})
    section = {**{k: v for k, v in code.items() if v is not None}, **(row.get("code") or {})}
    return Record(**{**row, **full, "clock": clock, "code": section}).to_json()


def machine_sections(target: Path) -> dict[str, Any]:
    """Sections env, cpu and card that the fingerprint stage has measured; {} before it has."""
    try:
        return json.loads((target / "card.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def measured_roof(target: Path) -> dict[str, float]:
    """{copy_gbs, bf16, int8, fp8} of this machine as far as measured."""
    shared = machine_sections(target)
    roof = (shared.get("card") or {}).get("roof") or {"copy_gbs": (shared.get("cpu") or {}).get("read_gbs")}
    return {name: value for name, value in roof.items() if value}


def manifest(target: str | Path) -> dict[str, Any]:
    """What a run in this folder came to, so far."""
    return json.loads((Path(target) / folder_module.MANIFEST).read_text(encoding="utf-8"))


def checkout() -> Path | None:
    """The root of the source tree this package runs from, None in an installed wheel."""
    root = Path(__file__).resolve().parents[1]
    return root if (root / "pyproject.toml").exists() and (root / "tests").is_dir() else None


def sources() -> str:
    """sha256 (16 digits) of this package's code: finished stages of another code are entered again."""
    digest = hashlib.sha256()
    root = Path(__file__).resolve().parents[1]
    for floor in ("formats", "kernels", "bench"):
        for path in sorted((root / floor).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _ops() -> Any:
    return importlib.import_module(f"{_PACKAGE}.ops")


def _processes() -> int:
    return max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def _seed() -> int:
    """Fresh inputs in every run: a kernel must not pass because of one lucky draw."""
    return int.from_bytes(os.urandom(3), "big")
