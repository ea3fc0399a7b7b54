"""What a student is trained on: divergences from the teacher over chunks of tokens, so that no step holds all logits.

    fkl    sum p log(p/q)
    rkl    sum q log(q/p)
    jsd    beta KL(p, m) + (1 - beta) KL(q, m),  m = beta p + (1 - beta) q
    topk   KL over the kept ids and one bucket for the rest

p and q are teacher and student softmax of z/T over the vocabulary that both share, T^2 outside, mean over the N tokens that
count. fkl and rkl: Hinton et al. 2015, arXiv 1503.02531, and Gu et al. 2023, arXiv 2306.08543; generalised JSD: Agarwal et al.
2023, arXiv 2306.13649. kernels/distill.py computes them with their gradients; here they become a part of a training step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ..kernels.distill import CHUNK_BYTES, distill_loss
from ..kernels.distill_loss import distill_loss as row_loss

LOSSES = ("fkl", "rkl", "jsd", "topk", "none")


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


def must_serve(device: torch.device) -> None:
    """Unsupported, with every reason, where no body of distill_loss runs on the device."""
    row_loss.body_on(device.type)


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
    part, so that losses and gradients of parts add up. dtype: of the products with the heads; sums are fp32. Unsupported where
    no body of distill_loss serves the device.
    """
    loss, parts = _Fused.apply(x, w, target, labels, counted, objective, vocab, total, dtype)
    return loss, parts


class _Fused(torch.autograd.Function):
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
        given: dict[str, Any] = {"kind": "topk"}
        if objective.kind == "none":  # a teacher may be here for its hidden states alone
            pass
        elif isinstance(target, Dense):
            given = {"x_t": target.x.to(dtype), "w_t": target.w.to(dtype), "kind": objective.kind}
        elif isinstance(target, TopK):
            given |= {"topk": (target.ids, target.logp, target.log_rest)}
        found = distill_loss(
            x.to(dtype),
            w.to(dtype),
            mask=counted,
            **given,
            beta=objective.beta,
            T=objective.temperature,
            vocab=vocab,
            labels=labels,
            hard=objective.hard,
            count=total,
            chunk_bytes=CHUNK_BYTES,
            need_dw=ctx.needs_input_grad[1],
        )
        ctx.save_for_backward(found.dx_s.to(x.dtype), None if found.dw_s is None else found.dw_s.to(w.dtype))
        ctx.mark_non_differentiable(found.parts)
        return found.loss, found.parts

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        mine = [None if g is None else (g * grads[0]).to(g.dtype) for g in ctx.saved_tensors]
        return (*mine, None, None, None, None, None, None, None)


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
