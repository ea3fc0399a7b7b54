"""`percard bench attention`: the ops over a paged cache, each spec of it, against torch's attention over what is not quantised.

    1  the body is compared with its reference in the op's tolerance, at these heads and this spec, lengths cut to GATE tokens
    2  a cache of full size is built: rows drawn once and quantised once, laid into as many pools of random pages as together hold
       four times the last cache (layers of a model, in turn); the rivals get the same rows, dense and in their own type
    3  ours and the rivals are timed in the same rounds, in turn (clock.py); relative L1 and cosine against attention over the
       rows as they were drawn stand in quality.reasons

Bytes of a token are those of the tensors that were allocated, divided by the tokens they hold. Rivals: attention_rivals.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ..formats import kvcache
from ..formats.kvcache import KVPages, KVSpec
from ..formats.spec import FormatError
from ..kernels import conformance
from ..kernels.op import Cost, Op, Unsupported, native_isa
from . import card, cells, clock, ops
from .attention_rivals import DTYPE, Calls, Problem, Rows, arguments, copies_of, rivals
from .here import Here
from .record import Record
from .stage import Cell

OPERATIONS = ("attention_decode", "attention_prefill", "kv_append", "gather_dequantize")
MODELS = {"qwen3-0.6b": (16, 8, 128), "qwen3-8b": (32, 8, 128), "qwen3-32b": (64, 8, 128), "qwen2.5-7b": (28, 4, 128)}
GATE = 700  # tokens of the longest sequence that is compared with the reference
FRESH = 512  # tokens of a sequence that a prefill takes at once
_AGREES = 0.03  # relative L1 of a rival in 16 bits against the first one


def op_of(p: Problem) -> Op:
    """FormatError for an op that is not one of these."""
    if p.op not in ops.OPS or p.op not in OPERATIONS:
        raise FormatError(f"no op {p.op!r} over a cache; known: {', '.join(o for o in OPERATIONS if o in ops.OPS)}")
    return ops.OPS[p.op][0]


# ---- one row ---------------------------------------------------------------------------------------------------------


def gate(p: Problem, where: torch.device, impl: str, seed: int) -> list[str]:
    """Faults of a body at these heads and this spec: a sequence of GATE tokens at most, and one of a page and a bit."""
    short = min(p.context, GATE)
    rows = Rows(replace(p, context=short, batch=2, tokens=min(p.tokens, short)), where, seed)
    given = arguments(rows, *rows.pool())
    for a in given[2:4]:
        if p.op != "kv_append" and isinstance(a, torch.Tensor) and a.shape == (2,):
            a[1] = max(rows.p.tokens, min(short, kvcache.PAGE + 1))
    return conformance.faults(op_of(p), impl, given)


def cell(
    op: str,
    kv: str,
    heads: int,
    kv_heads: int,
    size: int,
    context: int,
    batch: int,
    device: str,
    tokens: int = 1,
    impl: str | None = None,
    rounds: int = 7,
    seed: int = 0,
    roof: Mapping[str, float] | None = None,
) -> Iterator[dict[str, Any]]:
    """One row (sections of a Record). A body that refuses is a row that says so; a red gate has no figure."""
    p, where = Problem(op, kv, heads, kv_heads, size, context, batch, tokens), torch.device(device)
    the_op, rows = op_of(p), Rows(p, where, seed)
    pages, table = rows.pool()
    try:
        body = the_op.pick(*the_op.contract.unwrap(*arguments(rows, pages, table)), impl=impl).name
    except Unsupported as error:
        yield {"status": "refused", "error": {"type": "Unsupported", "message": str(error), "stage": "pick"}}
        return
    if body != "reference" and (faults := gate(p, where, body, seed)):
        told = {"type": "Conformance", "message": "; ".join(faults), "stage": "gate"}
        yield {"status": "failed", "quality": {"gate": "red", "reasons": faults}, "error": told}
        return
    with torch.inference_mode():
        row = _time(rows, pages, table, body, rounds, roof or {})
    yield row  # outside: the caller is not to run in that mode


def _time(
    rows: Rows, pages: KVPages, table: torch.Tensor, body: str, rounds: int, roof: Mapping[str, float]
) -> dict[str, Any]:
    p, where, op = rows.p, table.device, op_of(rows.p)
    copies = copies_of(pages.nbytes, where)
    pools = [(pages, table)] + [rows.pool() for _ in range(copies - 1)]
    turns: dict[str, Calls] = {"percard": [functools.partial(op, *arguments(rows, *pool), impl=body) for pool in pools]}
    others, against = rivals(rows)
    answers = {"percard": _answer(rows, turns["percard"][0]())}
    for name, make in others.items():
        try:
            calls = make()
            answers[name] = _answer(rows, calls[0]())
        except (RuntimeError, NotImplementedError, ImportError, TypeError) as error:
            why = " ".join(str(error).split())[:200]
            against.append({"impl": name, "status": "failed", "reason": why})
            continue
        first = next(a for n, a in answers.items() if n != "percard")
        off = apart(answers[name], first)[0] if p.op != "kv_append" else 0.0
        if not off <= _AGREES:
            against.append({"impl": name, "status": "suspect", "reason": f"its answer is off by {off:.1%}"})
            continue
        turns[name] = calls
    timed = [n for n in turns if n != "percard"]
    truth = answers["torch float32" if "torch float32" in timed else timed[0]] if timed else None
    said = []
    if truth is not None and p.op != "kv_append":
        off, cosine = apart(answers["percard"], truth)
        what = "attention over unquantised rows" if p.op != "gather_dequantize" else "the same by torch"
        said.append(f"rel L1 {off:.5f}, cosine {cosine:.6f} to {what}")
    seen = ops.card_times(turns, where, rounds) if where.type == "cuda" else ops.cpu_times(turns, rounds)
    cold = copies * pages.nbytes >= 4 * card.last_level_cache(where)
    return _row(p, pages, body, seen, [dict(a) for a in against], roof, copies, cold, said)


def _answer(rows: Rows, out: Any) -> torch.Tensor:
    """What a call gave, as [tokens, heads, D] in fp32."""
    p = rows.p
    if p.op == "gather_dequantize":
        return torch.stack(tuple(out)).float()
    out = out[0] if isinstance(out, tuple) else out
    if out.ndim == 4 and out.shape[1] == p.kv_heads and out.shape[0] == p.batch and p.op != "kv_append":
        group = p.heads // p.kv_heads
        out = out.unflatten(2, (group, p.tokens)).permute(0, 3, 1, 2, 4)  # [B, n, Hkv, G, D]
    return out.reshape(-1, p.heads, p.size).float()


def apart(got: torch.Tensor, want: torch.Tensor) -> tuple[float, float]:
    """Relative L1 and cosine."""
    off = float((got - want).abs().sum() / want.abs().sum())
    return off, float(F.cosine_similarity(got.flatten().double(), want.flatten().double(), dim=0))


def work(p: Problem, kv_bytes: float) -> Cost:
    """Operations, and bytes that must move; kv_bytes are those of a token of all heads of the cache."""
    cached, fresh = p.batch * p.context, p.batch * p.tokens
    own = fresh * p.heads * p.size * DTYPE.itemsize
    row = 2 * p.kv_heads * p.size * DTYPE.itemsize
    if p.op == "kv_append":
        return Cost(8 * fresh * (p.heads + 2 * p.kv_heads) * p.size, int(2 * own + fresh * (row + kv_bytes)))
    if p.op == "gather_dequantize":
        return Cost(2 * cached * 2 * p.kv_heads * p.size, int(cached * (row + kv_bytes)))
    keys = p.batch * p.tokens * (p.context - (p.tokens - 1) / 2)
    return Cost(int(4 * keys * p.heads * p.size), int(cached * kv_bytes + 2 * own))


def _row(
    p: Problem,
    pages: KVPages,
    body: str,
    seen: ops.Seen,
    against: list[dict[str, Any]],
    roof: Mapping[str, float],
    copies: int,
    cold: bool,
    said: Sequence[str],
) -> dict[str, Any]:
    ours = seen.times["percard"]
    for name, sample in seen.times.items():
        if name != "percard":
            gain = clock.ratio(sample, ours)
            taken = {"median": sample.median * 1e6, "lo": sample.lo * 1e6, "hi": sample.hi * 1e6}
            eager = {"eager": seen.eager[name] * 1e6} if name in seen.eager else {}
            against.append(
                {"impl": name, "status": "ok", **taken, "ratio": gain.median, "ci95": [gain.lo, gain.hi]} | eager
            )
    against.sort(key=lambda rival: rival.get("median") or math.inf)
    per_token = pages.nbytes / (pages.k.shape[0] * pages.page)
    needed = work(p, per_token)
    latency = {"median": ours.median, "lo": ours.lo, "hi": ours.hi, "iqr": ours.iqr}
    us: dict[str, Any] = {name: value * 1e6 for name, value in latency.items()}
    us["samples"] = [t * 1e6 for t in ours.samples]
    if "percard" in seen.eager:
        us["eager"] = seen.eager["percard"] * 1e6
    watched = dict(seen.board)
    power = watched.pop("power_w", None)
    base = next((rival for rival in against if rival["status"] == "ok"), None)
    words = f"{us['median']:.1f} us, {needed.bytes / ours.median / 1e9:.1f} GB/s"
    words += f", {base['ratio']:.2f} x {base['impl']}" if base else ""
    on_card = bool(seen.eager)
    return {
        "body": {
            "impl": body,
            "isa": native_isa() if body == "cpu" else None,
            "dtype": str(DTYPE).removeprefix("torch."),
            "baseline_dtype": base["impl"].removeprefix("torch ") if base else None,
        },
        "clock": {
            "mode": "graph" if on_card else "wall",
            "l2": "cold" if cold else "warm",
            "copies": copies,
            "power": "burst",
            "rounds": len(ours.samples),
            "calls_per_sample": seen.calls,
            "drift": ours.drift,
        },
        "latency_us": us,
        "against": against,
        "roofline": ops.roofline(needed, ours.median, roof, 8 if p.spec.quantised else 16),
        "energy": {"avg_power_w": power} if power is not None else None,
        "memory": {"kv": pages.nbytes, "kv_bytes_per_token": per_token},
        "quality": {"gate": "synthetic", "reasons": ["agrees with its reference at these heads", *said]},
        "card": watched,
        "words": ", ".join([words, *said]),
    }


# ---- many ------------------------------------------------------------------------------------------------------------


def plan(
    names: Sequence[str],
    specs: Sequence[str],
    contexts: Sequence[int],
    batches: Sequence[int],
    heads: Sequence[tuple[int, int, int]],
) -> list[Problem]:
    """Every problem, rivals of one shape together; fresh tokens: 1, and FRESH for a prefill. FormatError for what is unknown."""
    found = []
    for name in names:
        for q, kv, size in heads:
            if q < kv or kv < 1 or q % kv or size % 16 or size < 16:
                raise FormatError(f"heads {q}/{kv}/{size}: expected query heads, a divisor of them, a multiple of 16")
            for context in contexts:
                for batch in batches:
                    tokens = min(FRESH, context) if name == "attention_prefill" else 1
                    found += [Problem(name, str(KVSpec.parse(s)), q, kv, size, context, batch, tokens) for s in specs]
    for p in found:
        op_of(p)
    return found


def choice(size: str | None, device: str) -> dict[str, Sequence[Any]]:
    """The arguments of `plan` that `--quick` (under two minutes) and `--full` (hours) mean on a device, or neither."""
    quick, full, on_card = size == "quick", size == "full", device == "cuda"
    known = tuple(o for o in OPERATIONS if o in ops.OPS)
    contexts: tuple[int, ...] = (8192, 32768)
    if quick:
        contexts = (32768,) if on_card else (2048,)
    return {
        "names": known if full else OPERATIONS[:1],
        "specs": ("bf16", "int8") if quick else ("bf16", "int8", "k8v4", "int4"),
        "contexts": (2048, *contexts, 131072) if full else contexts,
        "batches": (1,) if quick else (1, 8, 32) if full else (1, 8),
        "heads": tuple(MODELS.values()) if full else (MODELS["qwen3-8b"],),
    }


def for_slot(on_card: bool) -> list[Problem]:
    """What a slot times, by worth: on a card at Qwen3-8B's heads up to 128k tokens, on a CPU enough to try the run."""
    heads = [MODELS["qwen3-8b"]] if on_card else [(4, 2, 32)]
    contexts, batches = ([32768, 131072, 8192], [1, 8]) if on_card else ([130], [1])
    specs = ["int8", "bf16", "k8v4", "int4"][: None if on_card else 2]
    found = plan([o for o in OPERATIONS[:1] if o in ops.OPS], specs, contexts, batches[:1], heads)
    found += plan([o for o in OPERATIONS[1:] if o in ops.OPS], specs, contexts[:1], batches[:1], heads)
    found += plan(OPERATIONS[:1], specs, contexts[:1], batches[1:], heads)
    return found


def slot_cells(device: str, seed: int, roof: Mapping[str, float]) -> list[Cell]:
    """The cells of a slot's stage."""
    rounds, cells = 7 if device == "cuda" else 2, []
    for p in for_slot(device == "cuda"):
        code = {"op_source_hash": ops.source_hash(p.op)}
        identity = {"task": "attention", **vars(p), "rounds": rounds, **code}
        arguments = {**vars(p), "device": device, "rounds": rounds, "seed": seed, "roof": roof}
        if p.op == "attention_prefill" and device == "cuda":
            arguments["impl"] = (
                "triton"  # where it leaves calls to the engine's own attention, it is measured all the same
            )
        row = {**p.sections(), "code": code}
        cells.append(Cell(p.name, f"{__name__}:cell", arguments, 3.0, identity, row, kind="attention"))
    return cells


def heads_of(words: Sequence[str]) -> list[tuple[int, int, int]]:
    """`32/8/128`, or the name of a model, as query heads, key heads, numbers of a head. FormatError for neither."""
    found = []
    for word in words:
        parts = word.split("/")
        if word in MODELS:
            found.append(MODELS[word])
        elif len(parts) == 3 and all(part.isdigit() for part in parts):
            found.append((int(parts[0]), int(parts[1]), int(parts[2])))
        else:
            raise FormatError(f"heads {word!r}: expected Hq/Hkv/D such as 32/8/128, or one of {', '.join(MODELS)}")
    return found


def run(
    todo: Sequence[Problem],
    *,
    impl: str | None = None,
    rounds: int = 7,
    device: torch.device | None = None,
    out: str | Path | None = None,
    progress: Callable[[str], None] | None = None,
    command: str = "",
    **resume: Any,
) -> list[Record]:
    """Times problems (of `plan`) here and now, a Record each; `out` is gone on with, `resume` as in cells.run.

    A problem that fails is a record too.
    """
    say = progress or (lambda words: None)
    machine = Here(device or card.default_device(), say, command)
    made = []
    for p in todo:
        given = {**vars(p), "impl": impl, "rounds": rounds}
        seconds = 2.0 + (0.0 if machine.where.type == "cuda" else rounds * p.batch * p.context / 50_000)
        made.append(machine.cell(p.name, cell, given, p.sections(), ops.source_hash(p.op), seconds))
    return cells.run(made, None if out is None else Path(out), say=say, **resume)
