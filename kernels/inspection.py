"""What the compiler makes of a kernel, read from the machine code; needs no card.

Triton's wheel carries ptxas, cuobjdump and nvdisasm. The launches that an op's `gpu.py` plans for a problem are compiled
for an architecture as they would be started there, and their cubins are disassembled. A compilation that succeeds proves
nothing (Triton 3.6 turns some tiles into a bare trap on sm_100), so what counts is the MMA in the hot loop.

    python -m percard.kernels.inspection [--arch sm_80,sm_90] [--all] [--triton FOLDER] [--json] [OP ...]

Everything that imports Triton runs in worker processes, outside of Triton's interpreter whatever this process is in.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .device import H200, Card
from .shapes import Case

ARCHS = {
    "sm_80": Card("NVIDIA A100", 80, 108, 166912, 40 << 20),
    "sm_89": Card("NVIDIA L40S", 89, 142, 101376, 96 << 20),
    "sm_90": H200,
    "sm_100": Card("NVIDIA B200", 100, 148, 232448, 126 << 20),
}
MMA = re.compile(r"(HGMMA|IGMMA|QGMMA|HMMA|IMMA|UTC[A-Z]*MMA)\b")
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(\S[^;]*);")
_PREDICATED = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+@")
_WARPGROUP_SHAPE = re.compile(r"[HIQ]GMMA(?:\.SP)?\.(\d+)x(\d+)x(\d+)")
_FREE = ("M", "K", "steps_per_split")  # parameters that the kernels do not specialise
_WARP_SHAPES = {"16816": (16, 8, 16), "1688": (16, 8, 8), "16832": (16, 8, 32), "16816.S8": (16, 8, 16)}


@dataclass(frozen=True)
class Expect:
    """What the machine code of an op must show; stands as EXPECT in its cases.py.

    quick: problems compiled in every test run; all problems: each of specs in the first of dtypes, the first in each. mma and weight_operand: by
    architecture ("" for an op without MMA). ceilings: by architecture, then by BLOCK_M: instructions per weight.
    """

    quick: tuple[Case, ...]
    specs: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    mma: dict[str, str]
    weight_operand: dict[str, str]
    ceilings: dict[str, dict[int, float]]

    def of(self, field: str, arch: str, triton: str) -> Any:
        """What a field says of an architecture: under "sm_100 3.6" for one release of Triton, else under "sm_100"."""
        table = getattr(self, field)
        return table.get(f"{arch} {'.'.join(triton.split('.')[:2])}", table[arch])


@dataclass(frozen=True)
class Row:
    """One compiled kernel. spilled_bytes is stack per thread; instructions_per_weight counts the hot loop per thread.

    weight_operand: "registers", "shared memory" or "tensor memory", with "+ stores to shared memory" when the hot loop
    stores there; "none" without MMA.
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


@dataclass(frozen=True)
class Job:
    """The launch number `index` that an op plans for a case on the card of an architecture."""

    op: str
    arch: str
    case: Case
    index: int


# ---- reading machine code -------------------------------------------------------------------------------------------


def instructions(sass: str) -> list[tuple[int, bool, str]]:
    """(address, predicated, text) of each instruction in what cuobjdump -sass prints."""
    found = []
    for line in sass.splitlines():
        match = _INSTRUCTION.match(line)
        if match:
            found.append((int(match[1], 16), _PREDICATED.match(line) is not None, match[2].strip()))
    return found


def _blocks(code: list[tuple[int, bool, str]]) -> tuple[list[range], list[list[int]]]:
    """Basic blocks (ranges of instruction numbers) and the blocks that each may go to."""
    at = {address: i for i, (address, _, _) in enumerate(code)}
    jumps: dict[int, int] = {}
    ends: set[int] = set()
    for i, (_, _, text) in enumerate(code):
        name = text.split()[0].split(".")[0]
        if name == "BRA":
            target = re.search(r"(0x[0-9a-f]+)\s*$", text)
            if target and int(target[1], 16) in at:
                jumps[i] = at[int(target[1], 16)]
        if name in ("BRA", "EXIT", "RET", "BRX"):
            ends.add(i)
    starts = sorted({0, *jumps.values(), *(i + 1 for i in ends if i + 1 < len(code))})
    ranges = [range(a, b) for a, b in itertools.pairwise([*starts, len(code)])]
    number = {r.start: b for b, r in enumerate(ranges)}
    successors = []
    for r in ranges:
        last = r[-1]
        _, predicated, text = code[last]
        # a branch may also carry its condition as an operand: BRA.U UP0, 0x1230
        conditional = predicated or "," in text
        to = [number[jumps[last]]] if last in jumps else []
        if (last not in ends or conditional) and last + 1 < len(code):
            to.append(number[last + 1])
        successors.append(to)
    return ranges, successors


def _dominators(successors: list[list[int]]) -> list[set[int]]:
    """For each block, the blocks that every way to it passes."""
    everything = set(range(len(successors)))
    before: list[list[int]] = [[] for _ in successors]
    for block, targets in enumerate(successors):
        for target in targets:
            before[target].append(block)
    dominators = [{0}] + [set(everything) for _ in successors[1:]]
    changed = True
    while changed:
        changed = False
        for block in range(1, len(successors)):
            new = set.intersection(*(dominators[b] for b in before[block])) if before[block] else set(everything)
            new = new | {block}
            if new != dominators[block]:
                dominators[block], changed = new, True
    return dominators


def hot_loop(code: list[tuple[int, bool, str]]) -> list[str]:
    """The instructions of the smallest loop that holds the most MMAs; empty when no loop holds one."""
    if not code:
        return []
    ranges, successors = _blocks(code)
    dominators = _dominators(successors)
    before: list[list[int]] = [[] for _ in successors]
    for block, targets in enumerate(successors):
        for target in targets:
            before[target].append(block)
    best: tuple[int, int] = (0, 0)
    body: list[str] = []
    for tail, targets in enumerate(successors):
        for head in targets:
            if head not in dominators[tail]:
                continue
            inside, open_blocks = {head, tail}, [tail]
            while open_blocks:
                block = open_blocks.pop()
                if block != head:
                    new = [b for b in before[block] if b not in inside]
                    inside.update(new)
                    open_blocks += new
            texts = [code[i][2] for b in sorted(inside) for i in ranges[b] if not code[i][2].startswith("NOP")]
            score = (sum(MMA.match(t) is not None for t in texts), -len(texts))
            if score[0] and score > best:
                best, body = score, texts
    return body


def _multiply_adds(text: str, threads: int) -> float:
    """Multiply-adds per thread of one MMA instruction; 0 for tcgen05, whose shape is in a descriptor."""
    match = _WARPGROUP_SHAPE.match(text)
    if match:
        return int(match[1]) * int(match[2]) * int(match[3]) / 128
    shape = re.match(r"[HI]MMA\.(\d+)", text)
    if shape is None:
        return 0.0
    m, n, k = _WARP_SHAPES[shape[1]]
    return m * n * k / 32


def _steps(loop: list[str], step: tuple[int, int], block_m: int, threads: int) -> float:
    """How many steps of the kernel one round of the hot loop is (the compiler may unroll)."""
    rows, codes = step
    done = sum(_multiply_adds(t, threads) for t in loop if MMA.match(t))
    if done:
        return done / (rows * codes * block_m / threads)
    issued = [t for t in loop if t.startswith("UTC") and MMA.match(t)]
    per_step = -(-rows // 128) * codes / (32 if issued and issued[0].startswith("UTCIMMA") else 16)
    return len(issued) / per_step


def _operand(mma: str, loop: list[str]) -> str:
    """Where the left operand of the MMAs in the hot loop comes from."""
    first = next(t for t in loop if MMA.match(t))
    operands = [o.strip() for o in first.split(None, 1)[1].split(",")]
    if mma.startswith("UTC"):
        place = "tensor memory" if operands[0].startswith("tmem") else "shared memory"
    elif mma.endswith("GMMA"):
        place = "registers" if operands[1].startswith("R") else "shared memory"
    else:
        place = "registers"
    stores = any(re.match(r"STSM?\b", t) for t in loop)
    return f"{place} + stores to shared memory" if stores else place


# ---- compiling ------------------------------------------------------------------------------------------------------


def describe(launch: Any) -> str:
    """Kernel, tile and flags of a launch: `matmul_w4a16 n128 m16 group128 asm warps4 stages4 bf16`."""
    short = {"BLOCK_N": "n", "BLOCK_M": "m", "BLOCK_K": "k", "num_warps": "warps", "num_stages": "stages"}
    words = [launch.kernel.__name__.removesuffix("_kernel")]
    for key, value in launch.options.items():
        if key in ("enable_fp_fusion", "RASTER", "USE_ASM"):
            continue
        if isinstance(value, bool):
            words += [key.lower()] if value else []
        else:
            words.append(f"{short.get(key, key.lower())}{value if value < 1 << 30 else 'row'}")
    dtypes = [str(a.dtype).removeprefix("torch.") for a in launch.args if isinstance(a, torch.Tensor)]
    return " ".join([*words, f"{dtypes[0]}>{dtypes[-1]}"])


def key(launch: Any) -> tuple:
    """What decides about the machine code: kernel, compile-time options, types, and which sizes divide by 16."""
    traits: list[Any] = []
    for name, value in zip(launch.kernel.arg_names, launch.args, strict=False):
        if isinstance(value, torch.Tensor):
            traits.append(value.dtype)
        elif name not in _FREE:
            traits.append(1 if value == 1 else value % 16 == 0)
    return launch.kernel.__name__, tuple(launch.options.items()), tuple(traits)


def plan(op: str, case: Case, arch: str) -> list[Any]:
    """The launches that an op plans for a case on the card of an architecture. No data: tensors on "meta"."""
    gpu = importlib.import_module(f".{op}.gpu", __package__)
    cases = importlib.import_module(f".{op}.cases", __package__)
    return gpu.plan(ARCHS[arch], *cases.blank(case))[1]


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
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [_tool("cuobjdump"), "-sass", "-res-usage", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    text = done.stdout + done.stderr
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", text)}
    code = instructions(text)
    loop = hot_loop(code)
    kinds = sorted({match[1] for _, _, t in code if (match := MMA.match(t))})
    mma, operand, per_weight = "+".join(kinds), "none", None
    if loop:
        threads = 32 * launch.options["num_warps"]
        steps = _steps(loop, launch.step, launch.options["BLOCK_M"], threads)
        operand = _operand(kinds[0], loop)
        per_weight = round(len(loop) / (steps * launch.step[0] * launch.step[1] / threads), 2)
    return Row(
        job.op, describe(launch), job.arch, triton.__version__, usage["REG"], usage["STACK"], kernel.metadata.shared,
        mma, operand, per_weight,
    )  # fmt: skip


def _enter(triton_at: str | None) -> None:
    """First thing in a worker: no interpreter, and the Triton that was asked for."""
    os.environ.pop("TRITON_INTERPRET", None)
    if triton_at is not None:
        sys.path.insert(0, triton_at)


# ---- what to compile ------------------------------------------------------------------------------------------------


def op_names() -> list[str]:
    """The ops that have a Triton body."""
    return sorted(p.parent.name for p in Path(__file__).parent.glob("*/gpu.py"))


def expected(op: str) -> Expect:
    """EXPECT of an op's cases.py."""
    return importlib.import_module(f".{op}.cases", __package__).EXPECT


def problems(op: str, everything: bool) -> list[Case]:
    """The quick problems of an op, or all that its heuristic tells apart: real layers, batches, specs, types, bias."""
    expect = expected(op)
    if not everything:
        return list(expect.quick)
    cases = importlib.import_module(f".{op}.cases", __package__).CASES
    found = list(expect.quick)
    kinds = [(spec, expect.dtypes[0]) for spec in expect.specs] + [(expect.specs[0], d) for d in expect.dtypes[1:]]
    for case, (spec, dtype) in itertools.product(cases, kinds):
        if case.real and case.spec == expect.quick[0].spec:
            found.append(replace(case, name=f"{case.name}.{spec}.{dtype}", spec=spec, dtype=dtype))
    return found


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
    work = jobs(names, wanted, everything)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_enter, initargs=(triton_at,)) as pool:
        return [asdict(row) for row in pool.map(measure, work)]


def faults(rows: Iterable[dict[str, Any]]) -> list[str]:
    """One line for each thing in `rows` that is not as the op's EXPECT says. Empty: all is well."""
    found = []
    for row in rows:
        arch, expect = row["arch"], expected(row["op"])
        where = f"{row['config']} on {arch}, Triton {row['triton']}"
        if row["spilled_bytes"]:
            found.append(f"{where}: spills {row['spilled_bytes']} bytes, expected none")
        if row["shared_bytes"] > ARCHS[arch].shared_bytes:
            found.append(f"{where}: takes {row['shared_bytes']} bytes of shared memory, has {ARCHS[arch].shared_bytes}")
        if not row["config"].startswith("matmul"):
            continue
        mma, operand, ceilings = (expect.of(f, arch, row["triton"]) for f in ("mma", "weight_operand", "ceilings"))
        if row["mma"] != mma:
            found.append(f"{where}: MMA is {row['mma'] or 'none'}, expected {mma}")
            continue
        if row["weight_operand"] != operand:
            found.append(f"{where}: weight comes from {row['weight_operand']}, expected {operand}")
        block_m = int(re.search(r" m(\d+)", row["config"])[1])  # type: ignore[index]
        ceiling = ceilings[block_m]
        if row["instructions_per_weight"] is None or row["instructions_per_weight"] > ceiling:
            found.append(
                f"{where}: {row['instructions_per_weight']} instructions per weight, expected at most {ceiling}"
            )
    return found


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table of docs/inspect.md."""
    keys = list(Row.__dataclass_fields__)
    lines = ["| " + " | ".join(k.replace("_", " ") for k in keys) + " |", "|" + "---|" * len(keys)]
    lines += ["| " + " | ".join("" if row[k] is None else str(row[k]) for k in keys) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """The module as a command; 4 when something is not as expected."""
    parser = argparse.ArgumentParser(description="Compile kernels without a card and read what came out.")
    parser.add_argument("ops", nargs="*")
    parser.add_argument("--arch", default=",".join(ARCHS))
    parser.add_argument("--all", action="store_true", help="every kernel that the heuristics choose for real layers")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--triton", help="a folder with another Triton, as `pip install --target` makes it")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    rows = inspect(
        options.ops, options.arch.split(","), everything=options.all, workers=options.workers, triton_at=options.triton
    )
    print(json.dumps(rows, indent=1) if options.json else markdown(rows), end="")
    wrong = faults(rows)
    print("\n".join(wrong), file=sys.stderr, end="\n" if wrong else "")
    return 4 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
