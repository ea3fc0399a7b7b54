"""What the loop of an attention over pages must show in its machine code, beside what inspection.py asks of every kernel.

Each line stands for a way in which a compiler makes a slow kernel without a word:

    int8 products           some over rounded queries, else none     keys are converted in the loop
    copies of 16 bytes      a tile of K and one of V, whole          pages are copied in smaller pieces
    copies of words         one word a key, a few times               scale words are read one by one
    loads                   the id of the next page                  a load waits in every step
    loads of small numbers  0                                        numbers of 1 or 2 bytes are never copied ahead
    bytes of shared memory  0                                        V is turned byte by byte: no transposing ldmatrix for bytes
    conversions             those of the scores                      values become bf16 by I2F
    buffers                 stages - 1, of wgmma one more            a look-up of pages inside the step has eaten the pipeline
    instructions            at most BUDGET                           anything else
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

MANY = 1 << 20
# Instructions of one step of 16, 32 or 64 rows and 64 keys, D = 128, of one warp, by release of Triton: the longest of four
# architectures, and 5 %.
BUDGET = {
    "3.9": {
        "bf16": {16: 281, 32: 421, 64: 411},
        "int8": {16: 390, 32: 571, 64: 698},
        "k8v4": {16: 422, 32: 655, 64: 962},
        "int4": {16: 443, 32: 686, 64: 1176},
    },
    "3.6": {
        "bf16": {16: 297, 32: 437, 64: 442},
        "int8": {16: 417, 32: 578, 64: 786},
        "k8v4": {16: 446, 32: 854, 64: 1074},
        "int4": {16: 476, 32: 868, 64: 1243},
    },
}


def copies_of_16(how: Any, keys: int, threads: int) -> int:
    """By a thread, of a tile of K and one of V: rows filled up to a power of two, pages of 16 bits, not fp32.

    None of a tile that gives a thread less: 32 keys of 4 bits among 256 threads are copied 8 bytes at a time.
    """
    return sum(
        keys * columns * wide // (16 * threads)
        for columns, wide in zip((how.k_width, how.v_columns), how.wide, strict=True)
    )


def facts(launch: Any, loop: list[str], ttgir: str, triton: str) -> dict[str, tuple[int, int, int]]:
    """(found, least, most) by name, of a launch of a kernel that reads pages (option HOW): hot loop, and Triton's own form of it."""
    how, options = launch.options["HOW"], launch.options
    rows, keys, threads = options["BLOCK_M"], options["BLOCK_N"], 32 * options["num_warps"]

    def count(pattern: str) -> int:
        return sum(re.match(pattern, text) is not None for text in loop)

    wide = count(r"LDGSTS\S*\.128")
    # Triton's tiles of keys that have several buffers: memdesc<3x64x128xi8, ..., mutable>
    held = [int(n) for n in re.findall(rf"local_alloc\s*: \(\) -> !ttg\.memdesc<(\d+)x{keys}x\d+x", ttgir)]
    copied = copies_of_16(how, keys, threads) if how.whole_copies else 0
    rounded = MANY if how.rounds_q else 0
    ids = 1 if how.page >= keys else keys
    given = dict(zip(launch.kernel.arg_names, launch.args, strict=False))
    plain = how.size == 128 and how.page >= keys and given["softcap"] is None and given["window"] is None
    plain = plain and (how.rounds_q or how.k_bits == 16)
    budget = BUDGET.get(triton[:3], {}).get(how.name.split()[0].removesuffix("-sym"), {}).get(rows, MANY)
    buffers = options["num_stages"] - 1
    # Of heads beyond 128 numbers two warps may make the same scores, each for half of the values. Keys that meet queries of 16
    # bits are converted, by I2F on sm_80.
    conversions = rows * keys // threads * (1 + (how.size > 128))
    conversions = conversions if how.rounds_q else 0 if how.k_bits == 16 else MANY
    return {
        "int8 products": (count(r"(IMMA|IGMMA|UTCIMMA)\b"), min(1, rounded), rounded),
        "copies of 16 bytes": (wide, copied, copied),
        "copies of words": (
            count("LDGSTS") - wide,
            min(1, how.word),
            min(max(4, rows // 4), how.word) if copied else MANY,
        ),
        "loads": (count(r"LDG\."), 0, ids),
        "loads of small numbers": (count(r"LDG\.\S*[US](8|16)"), 0, 0),
        "bytes of shared memory": (count(r"LDS\.[US]8"), 0, 0),
        "conversions": (count("I2F"), 0, conversions),
        # one more where a warpgroup may still read values of a tile while the next ones are copied
        "buffers": (min(held, default=0), buffers, buffers + (rows >= 64 and how.v_bits == 16)),
        "instructions": (len(loop), 1, budget if plain else MANY),
    }


def products(spec: str, rows: int, arch: str, triton: str) -> str:
    """The MMAs of a kernel over rounded queries: of a warp, or of a warpgroup for tiles of 64 rows where there are such."""
    whole, codes = "HMMA", "IMMA"
    if rows >= 64 and arch == "sm_90":
        whole, codes = "HGMMA", "IGMMA"
    elif rows >= 64 and arch == "sm_100":
        whole, codes = "UTCHMMA", "IMMA" if triton.startswith("3.6") else "UTCIMMA"
    return whole if spec == "bf16" else "+".join(sorted((whole, codes)))


def faults(row: Mapping[str, Any], arch: str) -> list[str]:
    """What of a row of inspection.py is not as it should be: `loads is 9, expected 0 to 1`."""
    spec, rows = row["config"].split()[1], int(re.search(r" m(\d+)", row["config"])[1])  # type: ignore[index]
    wanted = products(spec, rows, arch, row["triton"])
    if " q16 " not in row["config"] and row["mma"] != wanted:
        return [f"MMA is {row['mma'] or 'none'}, expected {wanted}"]
    return [
        f"{name} is {n}, expected {least if least == most else f'{least} to {most}'}"
        for name, (n, least, most) in row["loop"].items()
        if not least <= n <= most
    ]
