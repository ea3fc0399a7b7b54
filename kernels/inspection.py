"""What the compiler makes of a kernel, read from the machine code; needs no card.

Triton's wheel carries ptxas, cuobjdump and nvdisasm. The launches that an op's `gpu.py` plans for a problem are compiled
for an architecture as they would be started there, and their cubins are disassembled. A compilation that succeeds proves
nothing (Triton 3.6 turns some tiles into a bare trap on sm_100), so what counts is the MMA in the hot loop.

    python -m percard.kernels.inspection [--arch sm_80,sm_90] [--all] [--triton FOLDER] [--json] [OP ...]

Everything that imports Triton runs in worker processes, outside of Triton's interpreter whatever this process is in.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from . import attention_code, machine_code
from .device import H200, Card
from .launches import describe, key
from .shapes import Case

ARCHS = {
    "sm_80": Card("NVIDIA A100", 80, 108, 166912, 40 << 20),
    "sm_89": Card("NVIDIA L40S", 89, 142, 101376, 96 << 20),
    "sm_90": H200,
    "sm_100": Card("NVIDIA B200", 100, 148, 232448, 126 << 20),
}


@dataclass(frozen=True)
class Expect:
    """What the machine code of an op must show; stands as EXPECT in its cases.py.

    quick: problems compiled in every test run; all problems: each of specs in the first of dtypes, the first in each. mma and weight_operand: by
    architecture ("" for an op without MMA). ceilings: by architecture, then by BLOCK_M: instructions per weight for groups
    of 128 and more, of 64, of 32. narrow_stores: how many instructions may store less than 16 bytes; None: any.
    """

    quick: tuple[Case, ...]
    specs: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    mma: dict[str, str]
    weight_operand: dict[str, str]
    ceilings: dict[str, dict[int, tuple[float, ...]]]
    narrow_stores: int | None = None

    def of(self, field: str, arch: str, triton: str) -> Any:
        """What a field says of an architecture: under "sm_100 3.6" for one release of Triton, else under "sm_100"."""
        table = getattr(self, field)
        return table.get(f"{arch} {'.'.join(triton.split('.')[:2])}", table[arch])


@dataclass(frozen=True)
class Row:
    """One compiled kernel. spilled_bytes is stack per thread; instructions_per_weight counts the hot loop per thread.

    weight_operand: "registers", "shared memory" or "tensor memory", with "+ stores to shared memory" when the hot loop
    stores there; "none" without MMA. loop: attention_code.facts of a kernel that reads pages.
    """

    op: str
    config: str
    arch: str
    triton: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    mma: str
    weight_operand: str
    instructions_per_weight: float | None
    narrow_stores: int = 0
    loop: dict[str, Any] | None = None


@dataclass(frozen=True)
class Job:
    """The launch number `index` that an op plans for a case on the card of an architecture."""

    op: str
    arch: str
    case: Case
    index: int


# ---- compiling ------------------------------------------------------------------------------------------------------


def plan(op: str, case: Case, arch: str) -> list[Any]:
    """The launches that an op plans for a case on the card of an architecture. No data: tensors on "meta"."""
    gpu = importlib.import_module(f".{op}.gpu", __package__)
    cases = importlib.import_module(f".{op}.cases", __package__)
    return [launch for launch in gpu.plan(ARCHS[arch], *cases.blank(case))[1] if hasattr(launch, "kernel")]


class _NoCard:
    """Stands for Triton's driver: says what to compile for, and cannot start anything."""

    def __init__(self, arch: str):
        self.sm = ARCHS[arch].sm

    def get_current_device(self) -> int:
        return self.sm  # Triton keeps compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.sm, 32)


def _tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _disassembled(cubin: bytes, *flags: str) -> str:
    """What cuobjdump says of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([_tool("cuobjdump"), *flags, file.name], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _usage(text: str) -> dict[str, int]:
    """Registers (REG) and bytes of stack (STACK) of a thread."""
    return {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", text)}


@functools.lru_cache(maxsize=4096)
def _stack(cubin: bytes) -> int:
    return _usage(_disassembled(cubin, "-res-usage"))["STACK"]


def triton_version() -> str:
    """Of the Triton that is installed."""
    import triton

    return triton.__version__


def refuses(card: Card, launches: Sequence[Any], arch: str | None = None) -> str | None:
    """None, or why kernels should not be started on a card: they spill, take more shared memory than it has, or do not
    compile. With `arch` no card is needed, and what was compiled lies in Triton's cache; this process then starts nothing."""
    if arch is not None:
        from triton.runtime.driver import driver

        driver.set_active(_NoCard(arch))
    for launch in launches:
        if not hasattr(launch, "kernel"):  # a product that torch runs
            continue
        try:
            kernel = launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.options)
        except Exception as error:  # whatever the compiler has to say
            return f"does not compile: {' '.join(str(error.__cause__ or error).split())[:300]}"
        if kernel.metadata.shared > card.shared_bytes:
            return f"takes {kernel.metadata.shared} bytes of shared memory, {card.name} has {card.shared_bytes}"
        spilled = _stack(kernel.asm["cubin"])
        if spilled:
            return f"spills {spilled} bytes"
    return None


def measure(job: Job) -> Row:
    """Compiles and disassembles one launch. Runs in a worker process; RuntimeError names what did not compile."""
    import triton
    from triton.runtime.driver import driver

    launch = plan(job.op, job.case, job.arch)[job.index]
    driver.set_active(_NoCard(job.arch))
    try:
        kernel = launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.options)
    except Exception as error:
        cause = error.__cause__ or error
        raise RuntimeError(f"{job.op} on {job.arch}: {describe(launch)} does not compile: {cause}") from error
    text = _disassembled(kernel.asm["cubin"], "-sass", "-res-usage")
    usage = _usage(text)
    code = machine_code.instructions(text)
    loop = machine_code.hot_loop(code)
    kinds = sorted({match[1] for _, _, t in code if (match := machine_code.MMA.match(t))})
    mma, operand, per_weight = "+".join(kinds), "none", None
    pages = (
        attention_code.facts(launch, loop, kernel.asm["ttgir"], triton.__version__) if "HOW" in launch.options else None
    )
    if loop:
        threads = 32 * launch.options["num_warps"]
        steps = machine_code.steps(loop, launch.step, launch.options["BLOCK_M"], threads)
        operand = machine_code.operand(kinds[0], loop)
        per_weight = round(len(loop) / (steps * launch.step[0] * launch.step[1] / threads), 2)
    return Row(
        job.op, describe(launch), job.arch, triton.__version__, usage["REG"], usage["STACK"], kernel.metadata.shared,
        mma, operand, per_weight, machine_code.narrow_stores(code), pages,
    )  # fmt: skip


def _work() -> None:
    """A worker process: pickled jobs on stdin, a JSON line per job on stdout, `error` for what does not compile."""
    for job in pickle.loads(sys.stdin.buffer.read()):
        try:
            answer: dict[str, Any] = asdict(measure(job))
        except RuntimeError as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)


def _distribute(work: list[Job], workers: int, triton_at: str | None) -> list[dict[str, Any]]:
    """Rows of jobs from fresh Python processes: outside of the interpreter, with the Triton that was asked for first.

    Fresh ones, since Triton's mode and version are settled when it is first imported, and this process may have done so.
    """
    path = [p for p in (triton_at, *sys.path) if p]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": os.pathsep.join(path)}
    command = [sys.executable, "-c", f"from {__package__} import inspection; inspection._work()"]

    def run(part: list[Job]) -> list[dict[str, Any]]:
        done = subprocess.run(command, input=pickle.dumps(part), env=env, capture_output=True)
        answers = [json.loads(line) for line in done.stdout.splitlines()]
        if len(answers) != len(part):
            raise RuntimeError(f"a compiler process ended with {done.returncode}: {done.stderr.decode()[-2000:]}")
        return answers

    workers = max(1, min(workers, len(work)))
    parts = [work[i::workers] for i in range(workers)]
    with ThreadPoolExecutor(workers) as pool:
        answers = list(pool.map(run, parts))
    rows = [answers[i % workers][i // workers] for i in range(len(work))]
    wrong = [row["error"] for row in rows if "error" in row]
    if wrong:
        raise RuntimeError("; ".join(wrong))
    return rows


# ---- what to compile ------------------------------------------------------------------------------------------------


def op_names() -> list[str]:
    """The ops that have a Triton body."""
    return sorted(p.parent.name for p in Path(__file__).parent.glob("*/gpu.py"))


def expected(op: str, kernel: str = "") -> Expect:
    """EXPECT of an op's cases.py; where it says different things of several kernels, what it says of `kernel`."""
    expect = importlib.import_module(f".{op}.cases", __package__).EXPECT
    return expect[kernel] if isinstance(expect, dict) else expect


def narrow_stores(op: str) -> int | None:
    """How many stores of less than 16 bytes an op's kernels may have; None: not held."""
    expect = importlib.import_module(f".{op}.cases", __package__).EXPECT
    return None if isinstance(expect, dict) else expect.narrow_stores


def problems(op: str, everything: bool) -> list[Case]:
    """The quick problems of an op, or all that its heuristic tells apart: layers of real models at every bucket of M.

    An op whose problems are more than (M, N, K) lists them itself: `problems(expect)` in its cases.py.
    """
    module = importlib.import_module(f".{op}.cases", __package__)
    expects = module.EXPECT.values() if isinstance(module.EXPECT, dict) else [module.EXPECT]
    quick = [case for expect in expects for case in expect.quick]
    if not everything:
        return quick
    if hasattr(module, "problems"):
        return quick + [case for expect in expects for case in module.problems(expect)]
    expect, cases = module.EXPECT, module.CASES
    layers = sorted({(case.n, case.k) for case in cases if case.real})
    kinds = [(spec, expect.dtypes[0]) for spec in expect.specs] + [(expect.specs[0], d) for d in expect.dtypes[1:]]
    return quick + [
        Case(f"m{1 << bucket}.n{n}.k{k}.{spec}.{dtype}", 1 << bucket, n, k, spec, dtype, small=False)
        for (n, k), (spec, dtype), bucket in itertools.product(layers, kinds, range(15))
    ]


def jobs(ops: Sequence[str], archs: Sequence[str], everything: bool) -> list[Job]:
    """One job per distinct kernel: launches that compile to the same code are compiled once."""
    found: dict[tuple, Job] = {}
    for op, arch in itertools.product(ops, archs):
        for case in problems(op, everything):
            for index, launch in enumerate(plan(op, case, arch)):
                found.setdefault((op, arch, *key(launch)), Job(op, arch, case, index))
    return list(found.values())


def inspect(
    ops: Iterable[str] | None = None,
    archs: Iterable[str] | None = None,
    *,
    everything: bool = False,
    workers: int = 2,
    triton_at: str | None = None,
) -> list[dict[str, Any]]:
    """Rows (dicts with the fields of `Row`) for some ops and architectures; None is all of them.

    everything: all kernels that the heuristics choose for real layers, not only the quick problems. triton_at: a folder
    with another Triton. ValueError names an op or architecture that there is not; RuntimeError what does not compile.
    """
    names = op_names() if not ops else list(ops)
    wanted = list(ARCHS) if not archs else list(archs)
    for given, known, kind in ((names, op_names(), "op"), (wanted, list(ARCHS), "architecture")):
        unknown = [g for g in given if g not in known]
        if unknown:
            raise ValueError(f"no {kind} {', '.join(map(repr, unknown))} with a Triton body; known: {', '.join(known)}")
    return _distribute(jobs(names, wanted, everything), workers, triton_at)


def faults(rows: Iterable[dict[str, Any]]) -> list[str]:
    """One line for each thing in `rows` that is not as the op's EXPECT says. Empty: all is well."""
    found = []
    for row in rows:
        arch = row["arch"]
        where = f"{row['config']} on {arch}, Triton {row['triton']}"
        if row["spilled_bytes"]:
            found.append(f"{where}: spills {row['spilled_bytes']} bytes, expected none")
        if row["shared_bytes"] > ARCHS[arch].shared_bytes:
            found.append(f"{where}: takes {row['shared_bytes']} bytes of shared memory, has {ARCHS[arch].shared_bytes}")
        may = narrow_stores(row["op"])
        if may is not None and row["narrow_stores"] > may:
            found.append(f"{where}: {row['narrow_stores']} stores of less than 16 bytes, expected at most {may}")
        if row["loop"]:
            found += [f"{where}: {fault}" for fault in attention_code.faults(row, arch)]
        if not row["config"].startswith("matmul"):
            continue
        expect = expected(row["op"], row["config"].split()[0])
        mma, operand, ceilings = (expect.of(f, arch, row["triton"]) for f in ("mma", "weight_operand", "ceilings"))
        if row["mma"] != mma:
            found.append(f"{where}: MMA is {row['mma'] or 'none'}, expected {mma}")
            continue
        if row["weight_operand"] != operand:
            found.append(f"{where}: weight comes from {row['weight_operand']}, expected {operand}")
        tile, group = re.search(r" m(\d+)", row["config"]), re.search(r" group(32|64) ", row["config"])
        ceiling = ceilings[int(tile[1])][{"64": 1, "32": 2}[group[1]] if group else 0]  # type: ignore[index]
        if row["instructions_per_weight"] is None or row["instructions_per_weight"] > ceiling:
            found.append(
                f"{where}: {row['instructions_per_weight']} instructions per weight, expected at most {ceiling}"
            )
    return found


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """One table, a line per row; the name of the op is the beginning of its config."""
    keys = [f for f in Row.__dataclass_fields__ if f not in ("op", "narrow_stores", "loop")]
    heads = "| kernel | arch | Triton | registers | spilled | shared | MMA | weight from | instructions / weight |"
    lines = [heads, "|" + "---|" * len(keys)]
    lines += ["| " + " | ".join("" if row[k] is None else str(row[k]) for k in keys) + " |" for row in rows]
    return "\n".join(lines) + "\n"


PAGE = """# What the compiler makes of the kernels

Read from the machine code by `percard inspect`, which needs no card. Written by `make inspect-page`; a test compares it with
what the installed Triton gives. The kernels of each op's typical problems stand here; `percard inspect --all` compiles every
kernel that the heuristics choose for the layers of real models, and `make test-full` holds all of them to the same bounds.

- `spilled` is stack per thread in bytes, `shared` shared memory per program in bytes.
- `weight from`: where the left operand of the MMA comes from. 4-bit weights come from registers (on sm_100 from tensor memory)
  and are never written back to shared memory; 8-bit weights need no unpacking and come from shared memory on sm_90 and sm_100.
- `instructions / weight` counts the hot loop per thread. An H200 at 4.3 TB/s can issue 3.4 for a 4-bit weight, 6.8 for an
  8-bit weight (computed); above 64 tokens the MMA is the limit, not this.
- Triton 3.6 has no int8 tcgen05, so int8 on sm_100 is `mma.sync` (IMMA) there.

None of this is a measurement: these kernels have not yet run on a card. What has not:

| not yet run on a card | shown instead |
|---|---|
| speed of every Triton body, and every heuristic's choice of tile and split | machine code below |
| inline assembly | the same bits by torch, every code and zero point (tests/kernels/test_gpu_interpreted.py); assembled for four architectures |
| bf16 products | fp16 in Triton's interpreter, which is wrong about bf16 |
| CUDA graphs, `torch.compile` over the Triton bodies | tests marked `gpu` |

The interpreter of Triton 3.6 needs numpy below 2.4.

"""


def main(argv: Sequence[str] | None = None) -> int:
    """The module as a command; 4 when something is not as expected."""
    parser = argparse.ArgumentParser(description="Compile kernels without a card and read what came out.")
    parser.add_argument("ops", nargs="*")
    parser.add_argument("--arch", default=",".join(ARCHS))
    parser.add_argument("--all", action="store_true", help="every kernel that the heuristics choose for real layers")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--triton", help="a folder with another Triton, as `pip install --target` makes it")
    parser.add_argument("--json", action="store_true")
    parser.add_argument(
        "--page", type=Path, help="write docs/inspect.md: the installed Triton, then the one of --triton"
    )
    options = parser.parse_args(argv)
    rows = []
    for at in dict.fromkeys([None, options.triton] if options.page else [options.triton]):
        rows += inspect(
            options.ops, options.arch.split(","), everything=options.all, workers=options.workers, triton_at=at
        )
    if options.page:
        options.page.write_text(PAGE + markdown(rows))
    else:
        print(json.dumps(rows, indent=1) if options.json else markdown(rows), end="")
    wrong = faults(rows)
    print("\n".join(wrong), file=sys.stderr, end="\n" if wrong else "")
    return 4 if wrong else 0


if __name__ == "__main__":  # by the module's own name, so that workers can read its jobs
    raise SystemExit(importlib.import_module(f"{__package__}.inspection").main())
