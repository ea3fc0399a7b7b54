"""The meaning of distill_loss, in plain torch: float64 inside, gradients by their formulas (a test holds them to autograd)."""

from __future__ import annotations

from typing import Any

import torch

from .contract import Distill


def divergence(a: Distill) -> tuple[torch.Tensor, torch.Tensor]:
    """D [N] and its gradient in the logits [N, vocab], at T = 1 of logits that were divided by T."""
    lq = torch.log_softmax(a.z_s[:, : a.vocab].double() / a.T, 1)
    if a.z_t is None:
        return _kept(a, lq)
    lp = torch.log_softmax(a.z_t[:, : a.vocab].double() / a.T, 1)
    q, p = lq.exp(), lp.exp()
    if a.kind == "fkl":
        return (p * (lp - lq)).sum(1), q - p
    if a.kind == "rkl":
        part = (q * (lq - lp)).sum(1, keepdim=True)
        return part[:, 0], q * (lq - lp - part)
    beta = torch.tensor(a.beta, dtype=torch.float64, device=q.device)
    lm = torch.logaddexp(lp + beta.log(), lq + (1 - beta).log())
    r = (1 - beta) * (lq - lm)
    part = (q * r).sum(1, keepdim=True)
    return beta * (p * (lp - lm)).sum(1) + part[:, 0], q * (r - part)


def _kept(a: Any, lq: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Kept ids and a bucket for the rest, which is left out where every id is kept."""
    inside = (a.ids >= 0) & (a.ids < a.vocab)
    at = torch.where(inside, a.ids, 0).long()
    is_kept = torch.zeros_like(lq).scatter_add_(1, at, inside.double()) > 0
    log_rest_q = torch.where(is_kept, -torch.inf, lq).logsumexp(1, keepdim=True)
    log_p = torch.cat((torch.where(inside, a.logp.double(), -torch.inf), a.log_rest.double()[:, None]), 1)
    log_p[:, -1:] = torch.where(log_rest_q == -torch.inf, log_rest_q, log_p[:, -1:])
    log_p = log_p - log_p.logsumexp(1, keepdim=True)
    p, log_q = log_p.exp(), torch.cat((lq.gather(1, at), log_rest_q), 1)
    d = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(1)
    teacher = torch.zeros_like(lq).scatter_add_(1, at, torch.where(inside, p[:, :-1], 0.0))
    others = p[:, -1:] * (lq - torch.where(log_rest_q == -torch.inf, 0.0, log_rest_q)).exp()
    return d, lq.exp() - torch.where(is_kept, teacher, others)


def run(*flat: Any) -> torch.Tensor:
    a = Distill(*flat)
    z, w = a.z_s[:, : a.vocab].double(), a.weight.double()[:, None]
    d, dz = (x * f for x, f in zip(divergence(a), (a.T**2, a.T), strict=True))
    labels = torch.full_like(a.weight, -1).long() if a.labels is None else a.labels
    inside = (labels >= 0) & (labels < a.vocab)
    right = torch.zeros_like(z).scatter_(1, torch.where(inside, labels, 0)[:, None], 1.0)
    lq = torch.log_softmax(z, 1)
    dz = dz + a.hard * torch.where(inside[:, None], lq.exp() - right, 0.0)
    finite = (z.isfinite() & (True if a.z_t is None else a.z_t[:, : a.vocab].isfinite())).all(1, keepdim=True)
    told = (torch.stack((d, -torch.where(inside, (lq * right).sum(1), 0.0)), 1), dz)
    loss, dz = (torch.where(w == 0, 0.0, torch.where(finite, w * x, torch.nan)) for x in told)
    a.z_s.zero_()[:, : a.vocab] = dz.to(a.z_s.dtype)
    return loss.to(a.weight.dtype)
