"""What cuobjdump prints of a kernel: instructions, its hot loop, its MMAs and where they take their left operand from.

HGMMA.64x16x16.F32.BF16 R32, R40, gdesc[UR16], R32      sm_90: left operand in registers, right one in shared memory
IGMMA.64x256x32.S8.S8 R24, gdesc[UR4], R24              sm_90: both in shared memory
HMMA.16816.F32.BF16 / IMMA.16832.S8.S8                  sm_80, sm_89: both in registers
UTCHMMA tmem[UR7], gdesc[UR14], tmem[UR8], ...          sm_100 (tcgen05): left operand in tensor memory
"""

from __future__ import annotations

import itertools
import re

MMA = re.compile(r"(HGMMA|IGMMA|QGMMA|HMMA|IMMA|UTC[A-Z]*MMA)\b")
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(\S[^;]*);")
_PREDICATED = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+@")
_WARPGROUP_SHAPE = re.compile(r"[HIQ]GMMA(?:\.SP)?\.(\d+)x(\d+)x(\d+)")
_WARP_SHAPES = {"16816": (16, 8, 16), "1688": (16, 8, 8), "16832": (16, 8, 32)}


def instructions(sass: str) -> list[tuple[int, bool, str]]:
    """(address, predicated, text) of each instruction in what cuobjdump -sass prints."""
    found = []
    for line in sass.splitlines():
        match = _INSTRUCTION.match(line)
        if match:
            found.append((int(match[1], 16), _PREDICATED.match(line) is not None, match[2].strip()))
    return found


def narrow_stores(code: list[tuple[int, bool, str]]) -> int:
    """Instructions that store less than 16 bytes of a thread to global memory."""
    return sum(text.startswith("STG") and ".128" not in text.split()[0] for _, _, text in code)


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


def steps(loop: list[str], step: tuple[int, int], block_m: int, threads: int) -> float:
    """How many steps of the kernel one round of the hot loop is (the compiler may unroll)."""
    rows, codes = step
    done = sum(_multiply_adds(t, threads) for t in loop if MMA.match(t))
    if done:
        return done / (rows * codes * block_m / threads)
    issued = [t for t in loop if t.startswith("UTC") and MMA.match(t)]
    per_step = -(-rows // 128) * codes / (32 if issued and issued[0].startswith("UTCIMMA") else 16)
    return len(issued) / per_step


def operand(mma: str, loop: list[str]) -> str:
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
