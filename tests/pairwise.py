"""A few rows of choices in which every pair of values of two factors occurs, in place of their whole product."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any


def pairwise(factors: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Rows that cover every pair; greedy and always the same. Values are told apart by their place in the list."""
    names = list(factors)
    left = {
        (a, i, b, j) for a, b in combinations(names, 2) for i in range(len(factors[a])) for j in range(len(factors[b]))
    }
    rows = []
    while left:
        a, i, b, j = min(left, key=lambda pair: (names.index(pair[0]), pair[1], names.index(pair[2]), pair[3]))
        row = {a: i, b: j}
        for name in names:
            if name not in row:
                row[name] = max(
                    range(len(factors[name])), key=lambda value: (_gain(left, names, row, name, value), -value)
                )
        left -= {(x, row[x], y, row[y]) for x, y in combinations(names, 2)}
        rows.append({name: factors[name][row[name]] for name in names})
    return rows


def _gain(left: set[tuple[str, int, str, int]], names: list[str], row: dict[str, int], name: str, value: int) -> int:
    """How many pairs a value would cover with what is chosen."""
    at = names.index(name)
    return sum(
        ((name, value, other, chosen) if at < names.index(other) else (other, chosen, name, value)) in left
        for other, chosen in row.items()
    )
