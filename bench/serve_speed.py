"""How fast the 16-bit side of a serve run is, before it is loaded: which float type to take, and how long cells will take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from .engine.config import Config
from .load import Request
from .probe import FLOATS, NEAR, Probe, probe

_PROMPT, _SHORT = 512, 32  # tokens of a probe's prompt: for prefill at most, and where only steps are looked at
_DRAWN = 2.5e8  # synthetic weights that are drawn in a second, about; a checkpoint is read faster
_REST = 1.3  # a model takes so much more than its layers: batches that change, rows that are brought together, Python


@dataclass(frozen=True)
class Speed:
    """Seconds of a whole 16-bit model: `token_s` of a prompt's token, `step_s` of a step by rows; `load_s` to load it.

    `dtypes` are the float types that came near the fastest, that one first; `mv` those whose single rows are faster
    through torch.mv; `words` tell the times of a layer.
    """

    dtypes: tuple[torch.dtype, ...]
    mv: frozenset[torch.dtype]
    words: str
    token_s: float
    step_s: Mapping[int, float]
    load_s: float

    def rows_s(self, rows: int) -> float:
        """Seconds of a step of so many rows, on the line through those that were measured."""
        known = sorted(self.step_s.items())
        (low, first), (high, last) = known[0], known[-1]
        return first if low == high else first + (last - first) * (rows - low) / (high - low)

    def serve_s(self, requests: Sequence[Request], concurrency: int) -> float:
        """Seconds of these requests in waves."""
        total = self.token_s * sum(r.prompt for r in requests)
        for first in range(0, len(requests), concurrency):
            ends = sorted(r.answer for r in requests[first : first + concurrency])
            before = 1  # the first token comes with the prompt
            for place, end in enumerate(ends):
                total += max(0, end - before) * self.rows_s(len(ends) - place)
                before = max(before, end)
        return total


def measure(config: Config, batches: Sequence[int], lengths: tuple[int, int], where: torch.device) -> Speed:
    """Probes a layer in each float type at one row and at the most; `lengths` are mean tokens of prompt and answer.

    What counts is the time of an answer with its prompt, each concurrency alike.
    """
    isl, osl = lengths
    floats = list(FLOATS) if where.type == "cpu" else [config.dtype]
    prompt = max(1, min(isl, _PROMPT))
    single = probe(config, None, floats, device=where, prompt=prompt, batch=1)
    rows: dict[int, Probe] = {1: single}
    for batch in batches:
        if batch > 1:
            rows[batch] = probe(config, None, floats, device=where, prompt=min(_SHORT, prompt), batch=batch)
    wanted = [b for b in batches if b in rows]

    def answer_s(dtype: torch.dtype) -> float:
        each = [rows[b].seconds["decode"].get(dtype, float("inf")) * osl / b for b in wanted]
        return len(wanted) * single.seconds["prefill"].get(dtype, float("inf")) / prompt * isl + sum(each)

    found = sorted((dtype for dtype in floats if answer_s(dtype) < float("inf")), key=answer_s)
    if not found:
        raise RuntimeError(f"no float dtype ran one layer: {'; '.join(single.failed.values())}")
    best = found[0]
    steps = {b: rows[b].seconds["decode"][best] * config.layers * _REST for b in rows}
    tables = config.vocab * config.hidden * (1 if config.tied else 2)
    words = f"prefill {single.words('prefill')}; "
    words += "; ".join(f"decode of {b}: {rows[b].words('decode')}" for b in sorted(rows))
    return Speed(
        tuple(d for d in found if answer_s(d) <= NEAR * answer_s(best)),
        single.mv,
        words,
        single.seconds["prefill"][best] / prompt * config.layers * _REST,
        steps,
        (config.layers * config.block_parameters() + tables) / _DRAWN,
    )
