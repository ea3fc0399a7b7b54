"""What distill_loss is tested, tuned and timed at. m is rows of logits (a chunk of tokens), k their vocabulary."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from ..inspection import Expect
from ..shapes import Case, empty, generator
from .contract import Distill

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class DistillCase(Case):
    """m rows of k logits over `vocab` ids (0: all), normal of `size`. kept: ids of a top-k cache. hard: weight of cross-entropy, 0 for
    no labels. masked: every how manyeth row counts nothing. same: the teacher's logits are the student's. wider: more of the
    teacher's logits."""

    kind: str = "fkl"
    beta: float = 0.5
    T: float = 1.0
    vocab: int = 0
    kept: int = 0
    hard: float = 0.0
    masked: int = 3
    same: bool = False
    wider: int = 0
    size: float = 3.0


def small(m: int, k: int, kind: str = "fkl", dtype: torch.dtype = FP32, **more: Any) -> DistillCase:
    """A small case; its name says all: `small.m3.k37.jsd.fp32.beta0.1`."""
    name = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}[dtype]
    said = [f"{key}{value}" for key, value in more.items()]
    return DistillCase(".".join([f"small.m{m}.k{k}.{kind}.{name}", *said]), m, 0, k, "", dtype, kind=kind, **more)


SMALL = (
    small(1, 1),
    small(3, 37),
    small(5, 1031, vocab=1000, T=2.0),
    small(4, 4099, dtype=BF16, hard=0.5),
    small(2, 300, dtype=FP16, same=True),
    small(1, 129, "rkl"),
    small(6, 517, "rkl", FP16, T=0.5, wider=11),
    small(4, 130, "rkl", same=True, T=3.0),
    small(7, 1000, "rkl", BF16, hard=1.0, masked=2),
    small(3, 255, "jsd"),
    small(5, 777, "jsd", beta=0.1, T=2.0, vocab=700, hard=0.25),
    small(4, 130, "jsd", FP16, beta=0.9),
    small(4, 200, "jsd", same=True, beta=0.001),
    small(3, 300, "fkl", size=80.0),
    small(3, 300, "rkl", size=80.0),
    small(3, 300, "jsd", size=80.0),
    small(5, 257, "topk", kept=8),
    small(4, 1031, "topk", FP16, kept=64, vocab=999, hard=0.5),
    small(3, 16, "topk", kept=16),
    small(3, 40, "topk", kept=1, size=80.0),
    small(4, 333, "topk", kept=0, hard=1.0),
    small(17, 600, "topk", BF16, kept=16, masked=1),
)
HEADS = {"qwen3-0.6b": 151936, "llama-3.1-8b": 128256}
REAL = tuple(
    DistillCase(f"{model}.head.{kind}.b{m}", m, 0, v, small=False, kind=kind, kept=64 if kind == "topk" else 0)
    for model, v in HEADS.items()
    for m in (128, 512)
    for kind in ("fkl", "rkl", "jsd", "topk")
)
CASES = SMALL + REAL


def inputs(case: DistillCase, seed: int, device: str = "cpu") -> tuple[Any, ...]:
    """The op's arguments for a case, random in `seed`."""
    random = generator(case, seed, device)

    def normal(*shape: int) -> torch.Tensor:
        return case.size * torch.randn(*shape, generator=random, device=device)

    vocab = case.vocab or case.k
    z_s, other = normal(case.m, case.k).to(case.dtype), normal(case.m, case.k + case.wider)
    z_t: torch.Tensor | None = z_s.clone() if case.same else (other / 2).to(case.dtype)
    weight = torch.rand(case.m, generator=random, device=device) + 0.5
    weight[1 :: case.masked] = 0
    labels = None
    if case.hard:
        labels = torch.randint(0, vocab, (case.m,), generator=random, device=device)
        labels[-1:] = labels[-1:] if case.m < 3 else -100
    topk = None
    if case.kind == "topk":
        log_p = torch.log_softmax(other[:, :vocab].float(), 1)
        kept, ids = log_p.topk(case.kept)
        rest = log_p.scatter(1, ids, -torch.inf).logsumexp(1)
        topk, z_t = (ids.int(), kept.half().float(), rest.half().float()), None
        weight[0] = 1.0
    return z_s, weight / case.m, z_t, topk, labels, case.kind, case.beta, case.T, vocab, case.hard


def blank(case: DistillCase) -> tuple[Any, ...]:
    """The flat arguments of a case without data, as the Triton body takes them."""
    n, v, topk = case.m, case.k, case.kind == "topk"
    z_t = None if topk else empty(n, v, dtype=case.dtype)
    ids, logp = (empty(n, case.kept, dtype=t) if topk else None for t in (torch.int32, FP32))
    labels = empty(n, dtype=torch.int64) if case.hard else None
    return Distill(
        empty(n, v, dtype=case.dtype), empty(n), z_t, ids, logp, empty(n) if topk else None, labels, case.kind, case.beta,
        case.T, case.vocab or v, case.hard,
    )  # fmt: skip


def problems(expect: Expect) -> list[Case]:
    """What inspection compiles of everything: each kind in each type, with labels and without, rows of odd length."""
    kinds = {case.kind: case for case in REAL}
    return [
        replace(case, name=f"{kind}.v{v}.hard{hard}.{dtype}", k=v, hard=hard, dtype=dtype, kept=kept)
        for kind, case in kinds.items()
        for dtype in expect.dtypes
        for hard in (0.0, 1.0)
        for v in (151936, 151669, 32000, 256)
        for kept in ((8, 64, 128) if kind == "topk" else (0,))
    ]


EXPECT = Expect(
    quick=tuple(c for c in REAL if c.name.startswith("qwen3-0.6b") and c.m == 128),
    specs=("",),
    dtypes=(BF16, FP16, FP32),
    mma={"sm_80": "", "sm_89": "", "sm_90": "", "sm_100": ""},
    weight_operand={"sm_80": "none", "sm_89": "none", "sm_90": "none", "sm_100": "none"},
    ceilings={"sm_80": {}, "sm_89": {}, "sm_90": {}, "sm_100": {}},
)
