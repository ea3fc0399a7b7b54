"""Records runs of 20 linears, small, with every sample: what tests/bench/test_compare_recorded.py plants slow-downs in.

    python tests/bench/record_runs.py a.jsonl b.jsonl             # A/A: one process, the same work, in turn
    python tests/bench/record_runs.py slow.jsonl --slow 0.1       # a tenth more calls in each sample than are counted

Each run has copies of its weights of its own and goes through them in turn, so that one unlucky place in memory does not
decide. Rounds go through all cells, so that what the machine does meanwhile hits all of them. The noise floor is the
bench's own, taken before. Nothing is gated here: these are times to test statistics with, not to publish.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
from pathlib import Path

import torch

from percard.bench import card, ops, record, roof
from percard.bench.record import Record
from percard.formats.tensor import QuantTensor
from percard.kernels.linear import linear, prepare
from percard.kernels.op import native_isa
from percard.kernels.shapes import activations, generator, weight

SPECS, TOKENS, CELLS, COPIES = ("w8a8", "w4a16-g64", "w4a8-g64"), (1, 16), 20, 4
SAMPLE_S = 0.012


def main(arguments: list[str]) -> None:
    """Writes the records of one run per file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, nargs="+")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--slow", type=float, default=0.0, help="share of calls that are made and not counted")
    given = parser.parse_args(arguments)
    where = torch.device("cpu")
    shared = card.fingerprint(where)
    shared["cpu"] = shared["cpu"] | {"noise_floor_pct": roof.noise_floor(where)}
    cells = ops.plan(["qwen3-0.6b"], SPECS, TOKENS)[:CELLS]
    sides, inputs = [[] for _ in given.out], []  # per run and cell the copies of its weight; per cell the activations
    for _, case in cells:
        random = generator(case, 0, "cpu")
        inputs.append(activations(case, random))
        ready = prepare(weight(case, random), where, self_test=False)
        for side in sides:
            side.append([clone(ready) for _ in range(COPIES)])
    with torch.inference_mode():
        once = [min(timed(x, w, 5) for _ in range(3)) for x, w in zip(inputs, sides[0], strict=True)]
        counts = [max(10, math.ceil(SAMPLE_S / seconds)) for seconds in once]
        samples: list[list[list[float]]] = [[[] for _ in cells] for _ in sides]
        for turn in range(given.rounds):
            for i, x in enumerate(inputs):
                done = round(counts[i] * (1 + given.slow))
                for s in range(len(sides)) if turn % 2 else reversed(range(len(sides))):  # A B B A
                    samples[s][i].append(timed(x, sides[s][i], done) * done / counts[i] * 1e6)
    code = record.code_section(" ".join(["python", "tests/bench/record_runs.py", *arguments]))
    clock = {"mode": "wall", "l2": "warm", "copies": COPIES, "power": "burst", "rounds": given.rounds}
    clock["noisy"] = card.noise(where)
    for out, taken in zip(given.out, samples, strict=True):
        for (spec, case), times, count in zip(cells, taken, counts, strict=True):
            key = record.cell_key(case=case.name, spec=spec, rounds=given.rounds)
            timing = {"median": round(sorted(times)[len(times) // 2], 3), "samples": [round(t, 3) for t in times]}
            rest = {"clock": clock | {"calls_per_sample": count}, "latency_us": timing, "code": code}
            body = {"impl": "cpu", "isa": native_isa()}
            record.append(out, Record(cell_key=key, **ops.sections(spec, case), **shared, **rest, body=body))


def timed(x: torch.Tensor, copies: list[QuantTensor], calls: int) -> float:
    """Seconds of one of so many calls."""
    start = time.perf_counter()
    for i in range(calls):
        linear(x, copies[i % len(copies)])
    return (time.perf_counter() - start) / calls


def clone(w: QuantTensor) -> QuantTensor:
    """The same weight in memory of its own."""
    zero = None if w.zero is None else w.zero.clone()
    return dataclasses.replace(w, data=w.data.clone(), scale=w.scale.clone(), zero=zero)


if __name__ == "__main__":
    main(sys.argv[1:])
