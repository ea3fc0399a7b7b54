"""How often a planted slow-down is found, and how often one is claimed where none is: on real samples, recorded once.

Runs of 20 linears in tests/bench/runs, by record_runs.py on two cores of a virtual machine with neighbours:

    a, b         in turn in one process, 40 rounds, the same weights in memory of their own
    later, slow  a process each, 25 rounds; `slow` makes a tenth more calls than it counts
    busy, busy-slow   the same at 12 and 8 rounds, while a neighbour was at work

A/A is one run against itself, two rounds to each side in turn: a and b change places every round, and what comes first finds
a colder cache. A run of another process has its weights elsewhere in
memory, which moves some cells by up to 5 %: that is a difference, and none of the code. docs/bench.md has the rates.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from percard.bench import compare, sources, stats

RUNS = Path(__file__).parent / "runs"


def halves(name: str, factor: float) -> compare.Comparison:
    """Rounds 1 2 5 6 ... of a run against 3 4 7 8 ..., these slowed by `factor`."""
    run = sources.load(RUNS / f"{name}.jsonl")
    sides = []
    for side, scale in ((0, 1.0), (1, factor)):
        taken = [[t for i, t in enumerate(record.latency_us["samples"]) if i // 2 % 2 == side] for record in run]
        times = [[scale * t for t in samples] for samples in taken]
        sides.append([dataclasses.replace(r, latency_us={"samples": t}) for r, t in zip(run, times, strict=True)])
    return compare.compare(*sides)


@pytest.mark.parametrize("name", ["a", "b", "later", "slow"])
def test_a_planted_tenth_is_found(name):
    found = halves(name, 1.10)
    assert len(found.pairs) == 20 and found.count("slower") >= 19 and found.exit_code == 4


@pytest.mark.parametrize("name", ["a", "b"])
def test_a_planted_gain_is_found_and_no_regression(name):
    faster = halves(name, 1 / 1.10)
    assert faster.count("faster") >= 19 and faster.exit_code == 0


@pytest.mark.parametrize("name", ["a", "b", "later", "slow", "busy", "busy-slow"])
def test_nothing_is_claimed_where_nothing_changed(name):
    found = halves(name, 1.0)
    assert len(found.pairs) == 20 and found.count("slower") + found.count("faster") <= 1
    assert found.count("slower") == 0 and found.exit_code == 0


@pytest.mark.parametrize("name", ["a", "b"])
def test_the_intervals_of_a_run_against_itself_hold_1(name):
    found = halves(name, 1.0)
    # Of 20 intervals of 95 % fewer than 16 hold in one of 400 runs (binomial).
    assert sum(pair.ci95[0] <= 1 <= pair.ci95[1] for pair in found.pairs) >= 16
    (group,) = found.groups
    assert group.cells == 20 and group.ci95[0] <= 1 <= group.ci95[1]
    assert group.ci95[1] - group.ci95[0] < 0.02


def test_runs_of_two_processes_differ_by_less_than_five_per_cent():
    """The slow-down that `slow` really has is found against either run of another process, and nothing else is."""
    runs = {name: sources.load(RUNS / f"{name}.jsonl") for name in ("a", "b", "later", "slow")}
    for base, new, slower in (("a", "later", 0), ("b", "later", 0), ("a", "slow", 19), ("later", "slow", 19)):
        found = compare.compare(runs[base], runs[new], fail=0.05)
        assert found.count("slower") >= slower if slower else not found.regressions, (base, new)


def test_a_few_rounds_beside_a_neighbour_prove_less_and_say_so():
    found = compare.compare(*(sources.load(RUNS / f"{name}.jsonl") for name in ("busy", "busy-slow")))
    assert found.count("slower") + found.count("unproven") + found.count("same") == 20
    assert found.count("unproven") > 0 and found.exit_code == 4
    assert all(stats.shifted(*(r.latency_us["samples"] for r in (p.base, p.new))) == p.p for p in found.pairs)
