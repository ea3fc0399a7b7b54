"""What a student is trained on: divergences from the teacher over chunks of tokens, so that no step holds all logits.

    fkl    sum p log(p/q)                                        dz = T/N (q - p)
    rkl    sum q log(q/p)                                        dz = T/N q (r - sum q r),  r = log(q/p)
    jsd    beta KL(p, m) + (1 - beta) KL(q, m),  m = beta p + (1 - beta) q      the same, r = (1 - beta) log(q/m)
    topk   KL over the kept ids and one bucket for the rest      dz = T/N: kept q_i - p_i, rest q_i (1 - p_rest/q_rest)

p and q are teacher and student softmax of z/T over the vocabulary that both share, T^2 outside, mean over the N tokens that
count. fkl and rkl: Hinton et al. 2015, arXiv 1503.02531, and Gu et al. 2023, arXiv 2306.08543; generalised JSD: Agarwal et al.
2023, arXiv 2306.13649. That gradients are computed in the forward pass, chunk by chunk, is Liger-Kernel's idea
(arXiv 2410.10989).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

LOSSES = ("fkl", "rkl", "jsd", "topk", "none")
CHUNK_BYTES = 256 << 20  # what the logits of teacher and student for one chunk of tokens may take
_TINY = 1e-30  # a probability below it counts as that much: log stays finite, products with it are 0


@dataclass(frozen=True)
class Objective:
    """The loss in words: kind, beta of jsd, temperature T, weight of the hard cross-entropy beside it.

    `none` is no divergence at all: hard labels alone.
    """

    kind: str = "fkl"
    beta: float = 0.5
    temperature: float = 1.0
    hard: float = 0.0


@dataclass(frozen=True, eq=False)
class Dense:
    """A teacher that is there: x [N, Ht] before its head, w [V or more, Ht]."""

    x: torch.Tensor
    w: torch.Tensor


@dataclass(frozen=True, eq=False)
class TopK:
    """What a capture keeps of a teacher at T = 1: ids int [N, k], logp [N, k], log_rest [N] (log of the mass of all other ids)."""

    ids: torch.Tensor
    logp: torch.Tensor
    log_rest: torch.Tensor

    def rows(self, index: slice) -> TopK:
        return TopK(self.ids[index], self.logp[index], self.log_rest[index])


Target = Dense | TopK | None


def distill_objective(
    x: torch.Tensor,
    w: torch.Tensor,
    target: Target,
    labels: torch.Tensor,
    counted: torch.Tensor,
    objective: Objective,
    *,
    vocab: int,
    total: int,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss fp32 [], parts fp32 [2]): what is minimised, and divergence and cross-entropy alone, for the log.

    x [N, Hs] and head w [>= vocab, Hs] of the student; labels int64 [N]; counted bool [N]. Rows of either head behind `vocab`
    are padding: left out on both sides, which is -inf. `total`: tokens that count in the whole batch, of which these may be a
    part, so that losses and gradients of parts add up. dtype: of the two products with the heads; sums are fp32.
    """
    loss, parts = _Chunked.apply(x, w, target, labels, counted, objective, vocab, total, dtype)
    return loss, parts


class _Chunked(torch.autograd.Function):
    """Loss and gradients in one pass; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        w: torch.Tensor,
        target: Target,
        labels: torch.Tensor,
        counted: torch.Tensor,
        objective: Objective,
        vocab: int,
        total: int,
        dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        want_x, want_w = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        head = w[:vocab].to(dtype)
        theirs = target.w[:vocab].to(dtype) if isinstance(target, Dense) else None
        dx = torch.zeros_like(x, dtype=torch.float32) if want_x else None
        dw = torch.zeros(w.shape, dtype=torch.float32, device=w.device) if want_w else None
        parts = torch.zeros(2, dtype=torch.float32, device=x.device)
        where = counted.nonzero()[:, 0]
        step = max(1, CHUNK_BYTES // (2 * vocab * 4))
        with torch.autocast(x.device.type, enabled=False):
            for index in where.split(step):
                rows = x[index].to(dtype)
                z = (rows @ head.T).float()
                if isinstance(target, Dense):
                    assert theirs is not None
                    soft, dz = divergence(z, (target.x[index].to(dtype) @ theirs.T).float(), objective)
                elif isinstance(target, TopK):
                    kept = TopK(target.ids[index].long(), target.logp[index].float(), target.log_rest[index].float())
                    soft, dz = topk_divergence(z, kept)
                else:
                    soft, dz = z.new_zeros(()), torch.zeros_like(z)
                log_q = torch.log_softmax(z, dim=-1)
                wanted = labels[index, None]
                parts += torch.stack([soft, -log_q.gather(1, wanted).sum()])
                if objective.hard:
                    dz += (
                        log_q.exp_()
                        .scatter_add_(1, wanted, -torch.ones_like(wanted, dtype=z.dtype))
                        .mul_(objective.hard)
                    )
                dz /= total
                if dx is not None:
                    dx[index] = (dz.to(dtype) @ head).float()
                if dw is not None:
                    dw[:vocab] += (dz.to(dtype).T @ rows).float()
        parts /= total
        ctx.save_for_backward(dx.to(x.dtype) if dx is not None else None, dw.to(w.dtype) if dw is not None else None)
        ctx.mark_non_differentiable(parts)
        return parts[0] + objective.hard * parts[1], parts

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        dx, dw = ctx.saved_tensors
        scale = grads[0]
        mine = [None if g is None else (g * scale).to(g.dtype) for g in (dx, dw)]
        return (*mine, None, None, None, None, None, None, None)


def divergence(z_s: torch.Tensor, z_t: torch.Tensor, objective: Objective) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum over rows of T^2 D, its gradient by z_s [N, V]) of logits [N, V]."""
    heat = objective.temperature
    log_q, log_p = torch.log_softmax(z_s / heat, -1), torch.log_softmax(z_t / heat, -1)
    kind = objective.kind if objective.kind != "jsd" else {0.0: "fkl", 1.0: "rkl"}.get(objective.beta, "jsd")
    if kind == "fkl":
        p = log_p.exp()
        # Ids that the teacher rules out (-inf) weigh nothing, whatever their logarithms are; a NaN stays one.
        each = torch.where(p == 0, 0.0, p * (log_p - log_q)).sum()
        return heat**2 * each, log_q.exp_().sub_(p).mul_(heat)
    q = log_q.exp()
    if kind == "rkl":
        r = log_q - log_p.clamp_(min=math.log(_TINY))
        each = torch.where(q == 0, 0.0, q * r).sum(-1, keepdim=True)
        loss = each.sum()
    else:
        beta = objective.beta
        p = log_p.exp()
        log_m = (beta * p + (1 - beta) * q).clamp_(min=_TINY).log_()
        r = (log_q - log_m).mul_(1 - beta)
        each = torch.where(q == 0, 0.0, q * r).sum(-1, keepdim=True)
        loss = each.sum() + beta * torch.where(p == 0, 0.0, p * (log_p - log_m)).sum()
    gradient = torch.where(q == 0, 0.0, q * (r - each))
    return heat**2 * loss, gradient.mul_(heat)


def topk_divergence(z: torch.Tensor, kept: TopK) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum over rows, gradient by z [N, V]) of KL over the kept ids [N, k] and one bucket for all others, T = 1."""
    log_q = torch.log_softmax(z, -1)
    q = log_q.exp()
    theirs, mine = kept.logp.exp(), log_q.gather(1, kept.ids)
    p_rest = kept.log_rest.exp()[:, None]
    others = q.scatter(1, kept.ids, 0.0)
    q_rest = others.sum(-1, keepdim=True).clamp_(min=_TINY)
    each = torch.where(theirs == 0, 0.0, theirs * (kept.logp - mine)).sum()
    rest = torch.where(p_rest == 0, 0.0, p_rest * (kept.log_rest[:, None] - q_rest.log())).sum()
    dz = others.mul_(1 - p_rest / q_rest)
    return each + rest, dz.scatter_(1, kept.ids, q.gather(1, kept.ids) - theirs)


def hidden_loss(
    kind: str, student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor], counted: torch.Tensor, total: int
) -> torch.Tensor:
    """Mean over listed blocks and tokens that count of what one hidden state is off by; fp32 [].

    student, teacher: outputs [B, T, H] of the blocks that belong together, the student's projected to the teacher's width;
    counted bool [B, T]. mse: over channels, over the mean square of the teacher's state, so that deep blocks with large
    states do not outweigh the rest (0 = equal, 1 = as good as nothing); cosine: 1 - cos.
    """
    found = student[0].new_zeros((), dtype=torch.float32)
    for ours, theirs in zip(student, teacher, strict=True):
        a, b = ours.float(), theirs.float()
        if kind == "mse":
            each = (a - b).square().mean(-1) / b.square().mean(-1).clamp(min=1e-12)
        else:
            each = 1 - F.cosine_similarity(a, b, dim=-1)
        found = found + (each * counted).sum() / total
    return found / len(student)
