"""distill_loss(z_s, weight, z_t | topk=(ids, logp, log_rest), labels=None, kind, beta, T, vocab, hard) -> loss fp32 [N, 2]; z_s becomes dz.

z_s [N, V] bf16 | fp16 | fp32 (float64: the reference alone), written in place; z_t [N, V'] of any of these types; rows of any stride,
their last 1. weight fp32 [N]: what a row counts, mask / N; 0 is not looked at. labels int [N]: an id that is negative or not below
vocab has no cross-entropy. loss: divergence and cross-entropy of a row, times its weight; dz: of the first plus hard times the second. Kept ids are distinct; those outside of 0 .. vocab - 1 are left out. The teacher's kept probabilities and
log_rest are scaled to sum to 1 (a cache in fp16 is off by up to 2e-3). vocab None: the smaller V. ValueError names what does not fit.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from ..op import DTYPE_CODES, Cost, pointer
from ..weight import check_place, ulp

OP = "distill_loss"
SCHEMA = (
    "(Tensor(a!) z_s, Tensor weight, Tensor? z_t, Tensor? ids, Tensor? logp, Tensor? log_rest, Tensor? labels, str kind,"
    " float beta, float T, int vocab, float hard) -> Tensor"
)
KINDS = ("fkl", "rkl", "jsd", "topk")  # their numbers in csrc/ops.h
IN_PLACE = (0,)  # public arguments that a call changes
TopK = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Maybe = torch.Tensor | None


class Distill(NamedTuple):
    """The flat arguments, in the order of SCHEMA."""

    z_s: torch.Tensor
    weight: torch.Tensor
    z_t: Maybe
    ids: Maybe
    logp: Maybe
    log_rest: Maybe
    labels: Maybe
    kind: str
    beta: float
    T: float
    vocab: int
    hard: float


def unwrap(
    z_s: torch.Tensor,
    weight: torch.Tensor,
    z_t: Maybe = None,
    topk: TopK | None = None,
    labels: Maybe = None,
    kind: str = "fkl",
    beta: float = 0.5,
    T: float = 1.0,
    vocab: int | None = None,
    hard: float = 0.0,
) -> Distill:
    """jsd with beta 0 is fkl, with beta 1 rkl. ids become int32, labels int64, kept log-probabilities the type of the weights."""
    kind = {0.0: "fkl", 1.0: "rkl"}.get(beta, kind) if kind == "jsd" else kind
    ids, logp, log_rest = topk or (None, None, None)
    if vocab is None:
        vocab = min(z.shape[-1] for z in (z_s, z_t) if z is not None)
    return Distill(
        z_s, weight.contiguous(), z_t, _as(ids, torch.int32), _as(logp, weight.dtype), _as(log_rest, weight.dtype),
        _as(labels, torch.int64), kind, float(beta), float(T), int(vocab), float(hard),
    )  # fmt: skip


def _as(t: Maybe, dtype: torch.dtype) -> Maybe:
    return None if t is None else t.to(dtype).contiguous()


def check(*flat: Any) -> None:
    a = Distill(*flat)
    types = (*DTYPE_CODES, torch.float64)
    for name, z in (("z_s", a.z_s), ("z_t", a.z_t)):
        if z is None:
            continue
        if z.ndim != 2 or z.shape[0] != a.z_s.shape[0] or z.dtype not in types:
            found = f"{z.dtype} {tuple(z.shape)}"
            raise ValueError(f"{OP}: {name} is {found}, expected bfloat16, float16 or float32 [N, V], N of z_s")
        if z.shape[1] > 1 and z.stride(1) != 1:
            raise ValueError(f"{OP}: {name} has strides {z.stride()}, expected 1 for the last; call contiguous()")
    rows, wanted = a.z_s.shape[0], torch.float64 if a.z_s.dtype == torch.float64 else torch.float32
    if a.z_s.shape[0] > 1 and a.z_s.stride(0) < a.z_s.shape[1]:
        raise ValueError(f"{OP}: rows of z_s overlap (strides {a.z_s.stride()}) and are written; call contiguous()")
    if a.weight.dtype != wanted or a.weight.shape != (rows,):
        raise ValueError(f"{OP}: weight is {a.weight.dtype} {tuple(a.weight.shape)}, expected {wanted} {(rows,)}")
    if a.labels is not None and a.labels.shape != (rows,):
        raise ValueError(f"{OP}: labels has shape {tuple(a.labels.shape)}, expected {(rows,)}")
    _check_teacher(a, rows)
    most = min(z.shape[1] for z in (a.z_s, a.z_t) if z is not None)
    if not 1 <= a.vocab <= most:
        raise ValueError(f"{OP}: vocab is {a.vocab}, expected 1 to {most}, the logits of a row")
    if not (0 < a.T < math.inf and 0 <= a.beta <= 1 and 0 <= a.hard < math.inf):
        said = f"T is {a.T}, beta {a.beta}, hard {a.hard}"
        raise ValueError(f"{OP}: {said}; expected T above 0, beta of 0 to 1, hard of 0 or more")
    check_place(OP, a.z_s, weight=a.weight, z_t=a.z_t, ids=a.ids, logp=a.logp, log_rest=a.log_rest, labels=a.labels)


def _check_teacher(a: Distill, rows: int) -> None:
    """Logits for fkl, rkl and jsd; kept ids for topk, at T = 1 alone: what the rest weighs at another T is not in a cache."""
    kept = (a.ids, a.logp, a.log_rest)
    if a.kind not in KINDS:
        raise ValueError(f"{OP}: kind is {a.kind!r}, expected {', '.join(KINDS)}")
    if a.kind == "topk":
        if a.ids is None or a.logp is None or a.log_rest is None or a.z_t is not None:
            raise ValueError(f"{OP}: kind 'topk' reads topk=(ids, logp, log_rest), not z_t")
        shapes = tuple(tuple(t.shape) for t in (a.ids, a.logp, a.log_rest))
        if a.ids.ndim != 2 or shapes != ((rows, a.ids.shape[1]),) * 2 + ((rows,),):
            raise ValueError(f"{OP}: ids, logp, log_rest are {shapes}, expected [N, k], [N, k], [N] with N = {rows}")
        if a.T != 1:
            raise ValueError(f"{OP}: T is {a.T}, a top-k cache serves T = 1 only; take a live teacher")
    elif a.z_t is None or any(t is not None for t in kept):
        raise ValueError(f"{OP}: kind {a.kind!r} reads z_t, not topk")


def out_like(*flat: Any) -> torch.Tensor:
    a = Distill(*flat)
    return torch.empty(a.z_s.shape[0], 2, dtype=a.weight.dtype, device=a.z_s.device)


def written(*flat: Any) -> tuple[torch.Tensor]:
    """What a call changes in place: the gradient stands where the student's logits were."""
    return (flat[0],)


def cost(*flat: Any) -> Cost:
    """Both rows read once, the student's written once; an exponential counts 20, and there are two of each number."""
    a = Distill(*flat)
    rows, moved = a.z_s.shape[0], 2 * a.z_s.shape[1] * a.z_s.element_size()
    moved += a.vocab * a.z_t.element_size() if a.z_t is not None else 8 * (a.ids.shape[1] if a.ids is not None else 0)
    return Cost(flops=(40 if a.z_t is None else 90) * rows * a.vocab, bytes=rows * (moved + 8))


def native(out: torch.Tensor, *flat: Any) -> tuple[int | float, ...]:
    a = Distill(*flat)
    held = (a.z_s, a.weight, a.z_t, a.ids, a.logp, a.log_rest, a.labels, out)
    strides = (a.z_s.stride(0), 0 if a.z_t is None else a.z_t.stride(0))
    sizes = (a.z_s.shape[0], a.z_s.shape[1], a.vocab, 0 if a.ids is None else a.ids.shape[1], *strides)
    kinds = (DTYPE_CODES[a.z_s.dtype], 0 if a.z_t is None else DTYPE_CODES[a.z_t.dtype], KINDS.index(a.kind))
    return (*(pointer(t) for t in held), *sizes, *kinds, a.beta, a.T, a.hard)


def tolerance(want: tuple[torch.Tensor, ...], *flat: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss: 1e-5 of itself; dz: 1e-4 of the largest of its row, one rounding to its type; and what cancels in both.

    A log-probability is a logit less a logarithm: rounded at the size of the largest, and at 1 / T. Where teacher and student agree
    nothing but these roundings is left, so they stand as an absolute part: 2^-21 (4 ulp) of the reach, times what multiplies them.
    """
    a = Distill(*flat)
    rows = [z[:, : a.vocab] for z in (a.z_s, a.z_t) if z is not None]
    reach = torch.stack([torch.nan_to_num(z.double()).abs().amax(1) for z in rows]).amax(0) / min(a.T, 1.0)
    reach = reach + math.log(a.vocab) + 1
    if a.logp is not None and a.log_rest is not None and a.logp.shape[1]:
        kept = torch.cat((a.logp, a.log_rest[:, None]), 1).double()
        reach = reach + torch.where(kept.isfinite(), kept.abs(), 0.0).amax(1)
    loss, dz = want
    by = a.weight.double() * reach * 2.0**-21
    most = torch.nan_to_num(dz.double()).abs().amax(1, keepdim=True)
    slack = (by * (a.T + a.hard))[:, None] + 1e-4 * most
    exact = torch.float32 if dz.dtype == torch.float64 else dz.dtype
    by_part = torch.stack((by * a.T**2, by), 1)
    return 1e-5 * loss.abs().double() + by_part, slack + ulp(dz.to(exact))


def _floats(a: Distill) -> str | None:
    if torch.float64 in (a.z_s.dtype, None if a.z_t is None else a.z_t.dtype):
        return "float64 logits are for the reference; cast them to float32, or ask for impl='reference'"
    return None


def triton_takes(*flat: Any) -> str | None:
    a = Distill(*flat)
    if a.ids is not None and a.ids.shape[1] > 1024:
        return f"{a.ids.shape[1]} kept ids of a row, at most 1024; cut the cache, or ask for impl='reference'"
    return _floats(a)


def cpu_takes(*flat: Any) -> str | None:
    return _floats(Distill(*flat))
