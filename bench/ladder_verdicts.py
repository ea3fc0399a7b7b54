"""Which pairs of a ladder pass, cheapest first, and why the others do not. Pure: from records."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .ladder import SIXTEEN, Plan
from .record import Record

FEW_TOKENS = 2000  # of a text: with fewer, a top-1 of 93 % scatters by more than one per cent (two standard errors)
DRIFT = 0.05  # share by which the 16-bit side may differ from cell to cell before it is told


@dataclass(frozen=True)
class Verdict:
    """A row of the ladder; `why` is empty when it passes, else what keeps it from passing."""

    row: Record
    why: str

    @property
    def score(self) -> float | None:
        return ((self.row.quality or {}).get("task") or {}).get("score")

    @property
    def usd(self) -> float | None:
        """Dollars of a million tokens, in and out together."""
        return ((self.row.money or {}).get("usd_per_mtok") or {}).get("total")

    @property
    def tok_s(self) -> float | None:
        return (self.row.tokens or {}).get("tok_s_per_card")


def verdicts(rows: Sequence[Record], plan: Plan) -> tuple[list[Verdict], float | None]:
    """What passes, cheapest first (fastest without a price), then what does not by score; and the least score that passes."""
    scores = [
        Verdict(row, "").score for row in rows if row.scheme == row.scheme | {"spec": SIXTEEN, "kv_spec": SIXTEEN}
    ]
    best = max((score for score in scores if score is not None), default=None)
    least = None if best is None else plan.allowed(best)
    found = [Verdict(row, _why(row, least)) for row in rows]

    def order(verdict: Verdict) -> tuple[Any, ...]:
        cost = verdict.usd if verdict.usd is not None else -(verdict.tok_s or 0.0)
        return bool(verdict.why), -(verdict.score or 0.0) if verdict.why else cost, cost

    return sorted(found, key=order), least


def short_texts(rows: Sequence[Record]) -> list[str]:
    """One line when KL and top-1 come from so few tokens that they decide by chance."""
    counts = [row.quality["tokens"] for row in rows if row.quality and row.quality.get("tokens")]
    if not counts or min(counts) >= FEW_TOKENS:
        return []
    return [
        f"KL and top-1 are of {min(counts)} tokens only and scatter; --text FILE compares on a longer held-out text"
    ]


def drifts(rows: Sequence[Record]) -> list[str]:
    """Models whose 16-bit side, timed anew beside each pair, was not equally fast each time: their rates scatter as much."""
    rates: dict[str, list[float]] = {}
    for row in rows:
        tokens = row.tokens or {}
        ratio = ((tokens.get("vs_fp16") or {}).get("same_batch") or {}).get("ratio")
        if ratio:
            rates.setdefault(row.model["id"], []).append(tokens["tok_s"] / ratio)
    return [
        f"{model}: 16 bits ran at {min(found):.0f} to {max(found):.0f} tok/s beside its pairs; this machine drifted, within the "
        "model trust x 16-bit"
        for model, found in rates.items()
        if max(found) > (1 + DRIFT) * min(found)
    ]


def _why(row: Record, least: float | None) -> str:
    if row.error is not None:
        return f"{row.status}: {row.error.get('message')}"
    judged = row.quality or {}
    if judged.get("gate") == "red":
        return f"gate red: {'; '.join(judged.get('reasons') or [])}"
    if judged.get("gate") == "none" and row.scheme["spec"] != SIXTEEN:
        return "; ".join(judged.get("reasons") or ["nothing gates this spec"])
    asked = judged["task"]
    if least is None:
        return "no 16-bit score to hold it against"
    if asked["score"] >= least:
        return ""
    short = math.ceil((least - asked["score"]) * asked["n"] - 1e-9)
    within = ", inside its interval" if asked["ci95"][1] >= least else ""
    return f"score below {least:.1%}: {short} of {asked['n']} questions short{within}"
