"""The pairwise cover covers, and is small."""

from __future__ import annotations

from itertools import combinations, product

from .pairwise import pairwise


def test_every_pair_occurs() -> None:
    factors = {"a": range(5), "b": "xyz", "c": (True, False), "d": (1, 1.5, "1", None)}
    rows = pairwise(factors)
    for one, two in combinations(factors, 2):
        assert {(row[one], row[two]) for row in rows} == set(product(factors[one], factors[two]))
    assert len(rows) < 30, "of 120"
    assert rows == pairwise(factors)
