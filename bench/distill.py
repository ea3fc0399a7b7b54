"""`percard bench distill`: a head, a divergence and both gradients in one, against torch's composition and Liger-Kernel's fused one.

    1  the body is compared with its reference at rows of this vocabulary; loss and gradients of a few tokens with torch's, in fp32
    2  one call of each side says how much it holds at its worst moment, beyond inputs and the gradients that it returns
    3  all sides are timed in the same rounds, in turn (clock.ab), until the device has finished

torch: both products, log_softmax twice, kl_div, autograd: what a training loop writes, with all logits there at once. Where they would
not fit it is absent, and says so. Liger-Kernel (github.com/linkedin/Liger-Kernel): LigerFusedLinearJSD, on a card, where installed.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ..formats.spec import FormatError
from ..kernels import conformance, distill
from ..kernels.distill_loss import cases, distill_loss
from ..kernels.distill_loss.contract import KINDS, TopK
from ..kernels.op import Cost, Unsupported, native_isa
from . import card, cells, clock, ops
from .here import Here
from .record import Record
from .stage import Cell

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BETA, KEPT, FEW = 0.5, 64, 32  # of jsd; ids of a top-k cache; tokens that are compared with torch
# Of loss and of gradients (their norms): fp32 sums over 150,000 ids in another order, and one rounding of a logit to bf16.
_AGREES = {"fp32": 1e-3, "bf16": 3e-2}
_TENSORS = 6  # [N, V] in fp32 that torch's composition holds at once, and one for luck
_SEEN = 1 << 28  # bytes of logits below which a CPU's malloc answers from memory that it had kept, and no peak is seen
Answer = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # loss, dx, dw


@dataclass(frozen=True)
class Problem:
    """Divergence `kind` of `tokens` hidden states through two heads [vocab, hidden]."""

    kind: str
    tokens: int
    vocab: int
    hidden: int
    dtype: str

    @property
    def name(self) -> str:
        return f"distill_loss.{self.kind}.v{self.vocab}.h{self.hidden}.t{self.tokens}"

    @property
    def logits(self) -> int:
        """Bytes of the student's logits in fp32."""
        return 4 * self.tokens * self.vocab

    @property
    def returned(self) -> int:
        """Bytes of the gradients: of the states in their type, of the head in fp32."""
        return self.hidden * (self.tokens * DTYPES[self.dtype].itemsize + 4 * self.vocab)

    def sections(self) -> dict[str, Any]:
        """What a row says of itself before it is measured."""
        shape = {"M": self.tokens, "N": self.vocab, "K": self.hidden}
        return {"level": "op", "case": self.name, "shape": shape, "scheme": {"spec": self.dtype, "notes": [self.kind]}}


@dataclass(frozen=True)
class Sides:
    """Hidden states and heads of student and teacher, or the teacher's top-k."""

    p: Problem
    x: torch.Tensor
    w: torch.Tensor
    y: torch.Tensor
    u: torch.Tensor
    topk: TopK | None

    @classmethod
    def drawn(cls, p: Problem, where: torch.device, seed: int) -> Sides:
        """Random in `seed`; logits of size 3, a teacher that is near its student."""
        random, dtype = torch.Generator(where).manual_seed(seed), DTYPES[p.dtype]

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=random, device=where)

        x = normal(p.tokens, p.hidden)
        y, w = 0.9 * x + 0.4 * normal(p.tokens, p.hidden), normal(p.vocab, p.hidden).mul_(3 / math.sqrt(p.hidden))
        states = x.to(dtype), w.to(dtype), y.to(dtype), w.to(dtype, copy=True)
        return cls(p, *states, _kept(states[2], states[3]) if p.kind == "topk" else None)

    def few(self, tokens: int) -> Sides:
        """The first tokens, in fp32."""
        topk = None if self.topk is None else (self.topk[0][:tokens], self.topk[1][:tokens], self.topk[2][:tokens])
        x, w, y, u = (t.float() for t in (self.x[:tokens], self.w, self.y[:tokens], self.u))
        return Sides(replace(self.p, tokens=tokens, dtype="fp32"), x, w, y, u, topk)

    def ours(self, impl: str | None = None) -> Answer:
        """The fused way."""
        teacher = {"topk": self.topk} if self.topk is not None else {"x_t": self.y, "w_t": self.u}
        found = distill.distill_loss(self.x, self.w, **teacher, kind=self.p.kind, beta=BETA, impl=impl)  # type: ignore[arg-type]
        assert found.dw_s is not None
        return found.loss, found.dx_s, found.dw_s

    def torchs(self) -> Answer:
        """torch's composition, through autograd."""
        x, w = (t.detach().requires_grad_() for t in (self.x, self.w))
        with torch.enable_grad():
            log_q = torch.log_softmax((x @ w.T).float(), 1)
            loss = _divergence(self.p.kind, log_q, self.topk or torch.log_softmax((self.y @ self.u.T).float(), 1))
            dx, dw = torch.autograd.grad(loss, (x, w))
        return loss.detach(), dx, dw

    def ligers(self) -> Answer:
        """Liger-Kernel's Triton kernel; its beta 0 is forward KL, 1 reverse KL."""
        from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD  # type: ignore[import-not-found]

        x, w = (t.detach().requires_grad_() for t in (self.x, self.w))
        with torch.enable_grad():
            loss = LigerFusedLinearJSD({"fkl": 0.0, "rkl": 1.0}.get(self.p.kind, BETA))(x, w, self.y, self.u)
            return loss.detach(), *torch.autograd.grad(loss, (x, w))


def _kept(y: torch.Tensor, u: torch.Tensor) -> TopK:
    """The likeliest ids of each token, their log-probabilities and that of all others."""
    found = []
    for part in y.split(FEW):
        log_p = torch.log_softmax((part @ u.T).float(), 1)
        logp, ids = log_p.topk(KEPT)
        found.append((ids.int(), logp, log_p.scatter_(1, ids, -torch.inf).logsumexp(1)))
    ids, logp, rest = (torch.cat(parts) for parts in zip(*found, strict=True))
    return ids, logp, rest


def _divergence(kind: str, log_q: torch.Tensor, teacher: torch.Tensor | TopK) -> torch.Tensor:
    kl = functools.partial(F.kl_div, reduction="batchmean", log_target=True)  # kl(a, b): of b from a
    if not isinstance(teacher, torch.Tensor):
        ids, logp, rest = teacher
        mine = log_q.gather(1, ids.long())
        others = log_q.scatter(1, ids.long(), -torch.inf).logsumexp(1, keepdim=True)
        return kl(torch.cat((mine, others), 1), torch.cat((logp, rest[:, None]), 1))
    if kind == "fkl":
        return kl(log_q, teacher)
    if kind == "rkl":
        return kl(teacher, log_q)
    log_m = torch.logaddexp(teacher + math.log(BETA), log_q + math.log(1 - BETA))
    return BETA * kl(log_m, teacher) + (1 - BETA) * kl(log_m, log_q)


# ---- one row ---------------------------------------------------------------------------------------------------------


def gate(sides: Sides, impl: str, seed: int) -> list[str]:
    """Faults of the body at rows of this vocabulary, and of the whole at a few tokens."""
    p, where = sides.p, sides.x.device
    case = cases.small(3, p.vocab, p.kind, DTYPES[p.dtype], **({"kept": KEPT} if p.kind == "topk" else {}))
    faults = conformance.faults(distill_loss, impl, cases.inputs(case, seed, where.type))
    some = sides.few(min(p.tokens, FEW))
    off = _apart(some.ours(impl), some.torchs())
    return faults + ([off] if off else [])


def _apart(got: Answer, want: Answer, agrees: float = _AGREES["fp32"]) -> str | None:
    """None, or what is further apart than it may be."""
    for name, mine, theirs in zip(("loss", "dx", "dw"), got, want, strict=True):
        off = float((mine.float() - theirs.float()).norm() / theirs.float().norm())
        if not off <= agrees:
            return f"{name} is off by {off:.2%}, {agrees:.2%} are allowed"
    return None


def absent(p: Problem, where: torch.device, name: str) -> str | None:
    """None, or why a rival has no figure here."""
    if name == "torch composition":
        needed, free = _TENSORS * p.logits + 2 * p.returned, card.free_bytes(where)
        if needed <= free / 2:
            return None
        return f"its logits take about {needed / 1e9:.1f} GB, more than half of the {free / 1e9:.1f} GB that are free"
    if where.type != "cuda":
        return "serves a CUDA card"
    if p.kind == "topk":
        return "has no top-k"
    return None if importlib.util.find_spec("liger_kernel") else "not installed"


def cell(
    kind: str,
    tokens: int,
    vocab: int,
    hidden: int,
    dtype: str,
    device: str,
    impl: str | None = None,
    rounds: int = 7,
    seed: int = 0,
    roof: Mapping[str, float] | None = None,
) -> Iterator[dict[str, Any]]:
    """One row (sections of a Record). A body that refuses is a row that says so; a red gate has no figure."""
    p, where = Problem(kind, tokens, vocab, hidden, dtype), torch.device(device)
    try:
        body = distill_loss.body_on(where.type, impl).name
    except Unsupported as error:
        yield {"status": "refused", "error": {"type": "Unsupported", "message": str(error), "stage": "pick"}}
        return
    sides = Sides.drawn(p, where, seed)
    if faults := gate(sides, body, seed):
        told = {"type": "Conformance", "message": "; ".join(faults), "stage": "gate"}
        yield {"status": "failed", "quality": {"gate": "red", "reasons": faults}, "error": told}
        return
    yield _time(sides, body, rounds, roof or {})


def _time(sides: Sides, body: str, rounds: int, roof: Mapping[str, float]) -> dict[str, Any]:
    p, where = sides.p, sides.x.device
    turns: dict[str, Callable[[], Answer]] = {"percard": functools.partial(sides.ours, body)}
    others = {"torch composition": sides.torchs, "liger-kernel": sides.ligers}
    against: list[dict[str, Any]] = [
        {"impl": name, "status": "absent", "reason": why} for name in others if (why := absent(p, where, name))
    ]
    turns |= {name: call for name, call in others.items() if all(a["impl"] != name for a in against)}
    peaks: dict[str, int | None] = {}
    said = ["loss and gradients agree with torch's in fp32"]
    loss = 0.0
    for name in list(turns):
        peak = card.Peak(where)
        try:
            answer = turns[name]()
        except (RuntimeError, ImportError, TypeError) as error:
            if name == "percard":
                raise
            why = " ".join(str(error).split())[:200]
            against.append({"impl": name, "status": "failed", "reason": why})
            del turns[name]
            continue
        held = peak.bytes() if where.type == "cuda" or p.logits >= _SEEN else None
        peaks[name] = None if held is None else max(0, held - sum(t.nbytes for t in answer[1:]))
        if name == "percard":
            loss = float(answer[0])
        elif not abs(float(answer[0]) / loss - 1) <= _AGREES[p.dtype]:
            reason = f"its loss is {float(answer[0]):.5g}, ours {loss:.5g}"
            against.append({"impl": name, "status": "suspect", "reason": reason})
            del turns[name]
        if peaks[name] is not None:
            said.append(f"{name}: peak {peaks[name] / 1e6:.0f} MB, {peaks[name] / p.logits:.3f} of the logits")  # type: ignore[operator]
        del answer
    seen = clock.ab(turns, rounds=rounds, device=where)
    return _row(sides, body, seen, against, peaks["percard"], said, roof)


def _row(
    sides: Sides,
    body: str,
    seen: Mapping[str, clock.Sample],
    against: list[dict[str, Any]],
    peak: int | None,
    said: list[str],
    roof: Mapping[str, float],
) -> dict[str, Any]:
    ours, words = seen["percard"], []
    for name, sample in seen.items():
        if name != "percard":
            gain = clock.ratio(sample, ours)
            us = {key: value * 1e6 for key, value in (("median", sample.median), ("lo", sample.lo), ("hi", sample.hi))}
            against.append({"impl": name, "status": "ok", **us, "ratio": gain.median, "ci95": [gain.lo, gain.hi]})
            words.append(f"{gain.median:.2f} x {name}")
    latency = {"median": ours.median, "lo": ours.lo, "hi": ours.hi, "iqr": ours.iqr}
    latency |= {"p10": clock.quantile(ours.samples, 0.1), "p90": clock.quantile(ours.samples, 0.9)}
    return {
        "body": {"impl": body, "isa": native_isa() if body == "cpu" else None, "baseline_dtype": sides.p.dtype},
        "clock": {
            "mode": "eager" if sides.x.is_cuda else "wall",
            "l2": "cold",
            "copies": 1,
            "rounds": len(ours.samples),
        }
        | {"calls_per_sample": 1, "drift": ours.drift},
        "latency_us": {n: value * 1e6 for n, value in latency.items()} | {"samples": [t * 1e6 for t in ours.samples]},
        "against": against,
        "roofline": ops.roofline(_work(sides), ours.median, roof if sides.p.dtype == "bf16" else {}, 16),
        "memory": {"peak": peak} if peak is not None else None,
        "quality": {"gate": "synthetic", "reasons": said},
        "words": ", ".join([f"{ours.median * 1e3:.1f} ms", *words, *said[1:]]),
    }


def _work(sides: Sides) -> Cost:
    """Four products of the heads' size (three without a live teacher) and what the rows cost; inputs and gradients moved once."""
    p = sides.p
    of_row = cases.DistillCase("row", 1, 0, p.vocab, kind=p.kind, kept=KEPT if p.kind == "topk" else 0)
    rows = distill_loss.contract.cost(*cases.blank(of_row))
    live = 1 if p.kind != "topk" else 0
    moved = (1 + live) * (sides.x.nbytes + sides.w.nbytes) + p.returned
    return Cost(flops=2 * (3 + live) * p.tokens * p.vocab * p.hidden + p.tokens * rows.flops, bytes=moved)


# ---- what is measured ------------------------------------------------------------------------------------------------


def plan(
    kinds: Sequence[str] = (),
    tokens: Sequence[int] = (),
    vocab: int = 151936,
    hidden: int = 1024,
    dtype: str = "",
    device: str = "cuda",
) -> list[Problem]:
    """Problems by worth; what is not said is as on a card of its own, or small enough for a CPU. FormatError names what is unknown."""
    on_card = device == "cuda"
    kinds, tokens, dtype = kinds or (KINDS if on_card else ("fkl",)), tokens or (4096 if on_card else 512,), dtype
    dtype = dtype or ("bf16" if on_card else "fp32")
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise FormatError(f"no divergence {unknown[0]!r}; known: {', '.join(KINDS)}")
    if dtype not in DTYPES:
        raise FormatError(f"dtype {dtype!r}: expected {' or '.join(DTYPES)}")
    if min(vocab, hidden, *tokens) < 1 or ("topk" in kinds and vocab <= KEPT):
        raise FormatError(
            f"vocab {vocab}, hidden {hidden}, tokens {tokens}: expected 1 or more, and vocab above {KEPT}"
        )
    return [Problem(kind, count, vocab, hidden, dtype) for count in tokens for kind in kinds]


def source() -> str:
    """Hash (16 digits) of what decides how fast and how right a row is: the op and what multiplies around it."""
    text = ops.source_hash("distill_loss") + Path(distill.__file__).read_text(encoding="utf-8")
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def slot_cells(device: str, seed: int, roof: Mapping[str, float]) -> list[Cell]:
    """The cells of a slot's stage: Qwen3-0.6B's head with each divergence, then the head of Qwen3-8B; a small one on a CPU."""
    todo, rounds, made = plan(device=device), 7, []
    todo += plan(["fkl"], hidden=4096, device=device)
    if device != "cuda":
        todo, rounds = plan(["fkl", "topk"], [32], 2000, 64), 2
        todo = [replace(p, dtype="fp32") for p in todo]
    for p in todo:
        code = {"op_source_hash": source()}
        identity = {"task": "distill_loss", **vars(p), "rounds": rounds, **code}
        arguments = {**vars(p), "device": device, "rounds": rounds, "seed": seed, "roof": roof}
        row = {**p.sections(), "code": code}
        made.append(Cell(p.name, f"{__name__}:cell", arguments, 4.0, identity, row, kind="distill"))
    return made


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
    """Measures problems (of `plan`) here and now, a Record each; `out` is gone on with, `resume` as in cells.run."""
    say = progress or (lambda words: None)
    machine = Here(device or card.default_device(), say, command)
    made = []
    for p in todo:
        flops = 8 * p.tokens * p.vocab * p.hidden
        seconds = 2.0 + (2 * rounds + 4) * flops / (2e14 if machine.where.type == "cuda" else 1e11)
        about = {**vars(p), "impl": impl, "rounds": rounds}
        made.append(machine.cell(p.name, cell, about, p.sections(), source(), seconds))
    return cells.run(made, None if out is None else Path(out), say=say, **resume)
