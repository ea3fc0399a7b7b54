"""What the worker of a slot runs besides timing: the tests that want a card, compiling for it, and tuning."""

from __future__ import annotations

import os
import re
import selectors
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import ops

_LINE = re.compile(r"^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b(?:.*?\[ *\d+%\])?")
_SUMMARY = re.compile(r"^(?:FAILED|ERROR) (\S+::.+?) - (.*)")
_NOTHING_COLLECTED = 5


def load() -> None:
    """Does nothing: that this module is here means that torch and the ops are loaded."""


def distinct_kernels(arch: str, problems: list[list[str]]) -> Iterator[dict[str, Any]]:
    """{op, case, index} of each kernel that [op, name of a case] need on an architecture; equal machine code once."""
    from ..kernels import inspection  # imports Triton's compiler; only these two tasks want it

    if arch not in inspection.ARCHS:
        known = ", ".join(inspection.ARCHS)
        raise NotImplementedError(f"no figures for {arch} in kernels/inspection.py; known: {known}")
    seen = set()
    for op, name in problems:
        case = ops.case_of(op, name)
        if "a16" in case.spec and str(case.dtype) == "torch.float32":
            continue  # Triton bodies multiply 16-bit activations
        for index, launch in enumerate(inspection.plan(op, case, arch)):
            key = (op, *inspection.key(launch))
            if key not in seen:
                seen.add(key)
                yield {"op": op, "case": name, "index": index}


def compile_kernel(op: str, case: str, index: int, arch: str) -> Iterator[dict[str, Any]]:
    """One row of figures from the machine code, with what is not as the op's EXPECT says."""
    from ..kernels import inspection

    row = asdict(inspection.measure(inspection.Job(op, arch, ops.case_of(op, case), index)))
    try:
        told = inspection.faults([row])
    except (LookupError, TypeError):  # EXPECT has no ceiling for a tile that only small cases use
        told = []
    words = f"{row['registers']} registers, {row['spilled_bytes']} bytes spilled, {row['mma'] or 'no MMA'}"
    yield {**row, "faults": told, "words": words}


def problems(ops_wanted: list[str], model: str) -> Iterator[dict[str, Any]]:
    """{op, case, group} of what the tuner measures for a model, by worth; problems of one group share their kernels."""
    from ..kernels import tuner

    for problem in tuner.problems([tuner.subject(name) for name in ops_wanted], model):
        case = problem.case
        yield {"op": problem.subject.op.name, "case": case.name, "group": f"{case.spec} {case.dtype} {problem.shape.m}"}


def compile_candidates(op: str, case: str, model: str, arch: str) -> Iterator[dict[str, Any]]:
    """Compiles what the tuner will try for a problem, on a host's CPU: the cache then has it."""
    from ..kernels import inspection

    problem = _problem(op, case, model)
    gpu, cases, card = problem.subject.gpu, problem.subject.cases, inspection.ARCHS[arch]
    configs = [gpu.heuristic(problem.shape, card), *gpu.candidates(problem.shape, card)]
    plans = [gpu.plan(card, *cases.blank(problem.case), config=config)[1] for config in configs]
    refused = [why for why in (inspection.refuses(card, launches, arch) for launches in plans) if why is not None]
    yield {
        "status": "ok",
        "refused": refused,
        "words": f"{len(configs)} Configs compiled, {len(refused)} will be refused",
    }


def tune(op: str, case: str, model: str, out: str, seed: int) -> Iterator[dict[str, Any]]:
    """Measures one problem; its entry goes into folder `out`. One row: what the tuner came to."""
    from ..kernels import tuner

    machine = tuner.CardMachine()
    (outcome,) = tuner.run([_problem(op, case, model)], machine, Path(out), seed=seed)
    row: dict[str, Any] = {
        "outcome": outcome.status,
        "entry": outcome.entry,
        "words": f"{outcome.status}: {outcome.words}",
    }
    if outcome.status == "failed":
        error = {"type": "Conformance", "message": outcome.words, "stage": "gate"}
        row |= {"status": "failed", "quality": {"gate": "red", "reasons": [outcome.words]}, "error": error}
    yield row


def _problem(op: str, case: str, model: str) -> Any:
    from ..kernels import tuner

    return next(p for p in tuner.problems([tuner.subject(op)], model) if p.case.name == case)


def pytest_rows(root: str, marker: str, words: str, limit_s: float) -> Iterator[dict[str, Any]]:
    """Runs `pytest -m marker -k words tests` in a checkout for at most `limit_s` seconds: a row per test, then its own.

    The own row is red when a test failed, `cut` when time ran out, `absent` when no test has the marker.
    """
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "--import-mode=importlib", "-p", "no:cacheprovider"]
    command += ["-v", "--tb=no", "--color=no", "-rfE", "-m", marker, "-k", words, "tests"]
    process = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    counts: dict[str, int] = {}
    failed: list[str] = []
    reasons: dict[str, str] = {}
    tail: list[str] = []
    cut = False
    try:
        for line in _lines(process, time.monotonic() + limit_s):
            if line is None:
                cut = True
                break
            tail = [*tail, line][-5:] if line.strip() else tail
            if match := _SUMMARY.match(line):
                reasons[match[1]] = match[2]
            elif match := _LINE.match(line):
                counts[match[2]] = counts.get(match[2], 0) + 1
                red = match[2] in ("FAILED", "ERROR")
                failed += [match[1]] if red else []
                status = "failed" if red else "absent" if match[2] == "SKIPPED" else "ok"
                yield {"part": match[1], "status": status, "quality": {"gate": "red" if red else "none"}}
    finally:
        process.terminate() if process.poll() is None else None
        code = process.wait()
    words = ", ".join(f"{n} {word.lower()}" for word, n in counts.items()) or "no test ran"
    if failed:
        told = [f"{name} ({reasons[name]})" if name in reasons else name for name in failed[:5]]
        error = {"type": "Conformance", "message": f"{len(failed)} tests failed: {'; '.join(told)}", "stage": "pytest"}
        yield {"status": "failed", "quality": {"gate": "red", "reasons": failed}, "error": error}
    elif cut:
        error = {"type": "Cut", "message": f"{words} in {limit_s:.0f} s, the rest did not run", "stage": "deadline"}
        yield {"status": "cut", "error": error}
    elif code == _NOTHING_COLLECTED:
        yield {"status": "absent", "words": f"no test has the marker {marker}"}
    elif code:
        error = {"type": "Pytest", "message": f"exit code {code}: {' | '.join(tail)[-300:]}", "stage": "pytest"}
        yield {"status": "failed", "error": error}
    else:
        yield {"status": "ok", "words": words}


def _lines(process: subprocess.Popen[bytes], end: float) -> Iterator[str | None]:
    """Lines of a process as they come; a None when `end` has passed."""
    assert process.stdout is not None
    pending = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            left = end - time.monotonic()
            if left <= 0 or not selector.select(left):
                yield None
                return
            data = os.read(process.stdout.fileno(), 1 << 16)
            if not data:
                yield from (line.decode(errors="replace") for line in pending.splitlines())
                return
            *lines, pending = (pending + data).split(b"\n")
            yield from (line.decode(errors="replace") for line in lines)
