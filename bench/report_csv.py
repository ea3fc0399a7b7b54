"""table.csv: a line per record, a column per figure of every section, for spreadsheets and data frames.

Nested keys are joined by dots ("tokens.vs_fp16.same_batch.ratio"); lists of words are joined by "; ", an interval [lo, hi]
becomes two columns. Samples stay in records.jsonl. `against` becomes the fastest rival and torch's fastest float.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from .record import SECTIONS, Record

_FIRST = (
    "level", "case", "status", "scheme.spec", "scheme.kv_spec", "scheme.head", "quality.gate", "quality.kl", "quality.top1",
    "shape.batch", "tokens.tok_s_in", "tokens.tok_s", "tokens.tok_s_per_card", "tokens.tok_s_per_user",
    "latency_us.median", "latency_us.lo", "latency_us.hi",
)  # fmt: skip
_LEFT_OUT = {"schema", "against", "latency_us.samples"}


def flat(record: Record) -> dict[str, Any]:
    """The columns of one record that hold something."""
    row = json.loads(record.to_json())
    found = {name: value for name, value in _leaves("", row) if name not in _LEFT_OUT and value is not None}
    done = [r for r in record.against or () if r["status"] == "ok" and r.get("median")]
    floats = [r for r in done if r["impl"].startswith("torch ")]
    for title, rivals in (("float", floats), ("rival", done)):
        if rivals:
            best = min(rivals, key=lambda r: r["median"])
            ends = best.get("ci95") or (None, None)
            found |= {f"fastest_{title}.impl": best["impl"], f"fastest_{title}.median_us": best["median"]}
            found |= {f"fastest_{title}.ratio": best.get("ratio")}
            found |= {f"fastest_{title}.ratio.lo": ends[0], f"fastest_{title}.ratio.hi": ends[1]}
    return found


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(f"{name}.{key}" if name else str(key), item)
    elif isinstance(value, list) and name.endswith("ci95") and len(value) == 2:
        yield name.removesuffix("ci95") + "lo95", value[0]
        yield name.removesuffix("ci95") + "hi95", value[1]
    elif isinstance(value, list):
        yield name, "; ".join(json.dumps(v) if isinstance(v, Mapping | list) else str(v) for v in value) or None
    else:
        yield name, value


def text(records: Iterable[Record]) -> str:
    """The table: what identifies a row and its rates first, then the sections in the order of the schema."""
    rows = [flat(record) for record in records]
    sections = ["", *SECTIONS, "fastest_float", "fastest_rival"]

    def place(column: str) -> tuple[int, int]:
        head = column.partition(".")[0]
        return (
            (_FIRST.index(column), 0)
            if column in _FIRST
            else (len(_FIRST), sections.index(head) if head in sections else 0)
        )

    columns = sorted(dict.fromkeys(name for row in rows for name in row), key=place)
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
