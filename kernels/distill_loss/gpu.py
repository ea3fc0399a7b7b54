"""Triton body of distill_loss: one program per row, which reads its logits two or three times and leaves their gradient there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

from .. import tuning
from ..device import Card
from ..tiles import FUSION, Launch, runner
from . import contract

OP_VERSION = 2  # raised when a kernel changes so that tuned entries of the one before mean nothing


@triton.jit
def _row_sum(row_ptr, scale, LAST, BLOCK_V: tl.constexpr):
    """(largest, sum of e^(x - largest), numbers of -Inf, 0 or NaN if a number is not finite) of x = row * scale, LAST numbers.

    -Inf is counted apart, since a kernel may have put it there itself.
    """
    offs = tl.arange(0, BLOCK_V)
    low = float("-inf")
    most = tl.max(tl.full((BLOCK_V,), -1e38, tl.float32), axis=0)
    total = tl.zeros((BLOCK_V,), dtype=tl.float32)
    poison = tl.zeros((BLOCK_V,), dtype=tl.float32)
    gone = tl.zeros((BLOCK_V,), dtype=tl.float32)
    for first in range(0, LAST, BLOCK_V):
        inside = first + offs < LAST
        x = tl.load(row_ptr + first + offs, mask=inside, other=low).to(tl.float32) * scale  # [BLOCK_V]
        here = tl.maximum(most, tl.max(x, axis=0))
        total = total * tl.exp(most - here) + tl.exp(x - here)
        most = here
        is_low = x == low
        gone += tl.where(is_low & inside, 1.0, 0.0)
        poison += tl.where(is_low, 0.0, x * 0.0)
    return most, tl.sum(total, axis=0), tl.sum(gone, axis=0), tl.sum(poison, axis=0)


@triton.jit
def _ratio_logs(x, y, log_q, log_p):
    """log((1 - beta) q / m) and log(beta p / m) of x and y less their largest; log_q, log_p are added to them."""
    lq, lp = x + log_q, y + log_p
    mean = tl.maximum(lq, lp) + tl.log(1.0 + tl.exp(-tl.abs(lq - lp)))
    return lq - mean, lp - mean


@triton.jit
def distill_loss_kernel(
    s_ptr, t_ptr, weight_ptr, label_ptr, loss_ptr,
    V, VOCAB,
    stride_s, stride_t,
    T, inv_t, beta, log_beta, log_rest, hard,
    KIND: tl.constexpr, HAS_LABELS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """loss = weight (T^2 D, cross-entropy); s becomes the gradient of T^2 D + hard * cross-entropy. KIND 0 forward KL, 1 reverse KL,
    2 JSD.

    s [N, V] bf16 | fp16 | fp32, rows stride_s apart, in place; t [N, >= VOCAB], rows stride_t apart; weight fp32 [N], loss fp32 [N, 2]; label
    int64 [N]. log_beta, log_rest: ln beta and ln(1 - beta).

        s   [ BLOCK_V | BLOCK_V | ... | BLO. : past VOCAB ]     program i: row i. Sums, then D, then the gradient over s;
        t   [ BLOCK_V | BLOCK_V | ... | BLO. ]                  forward KL needs no D for it and takes both in one pass

    After the idea of Liger-Kernel (github.com/linkedin/Liger-Kernel): the gradient is made in the forward pass.
    """
    i = tl.program_id(0).to(tl.int64)
    s_row, t_row = s_ptr + i * stride_s, t_ptr + i * stride_t
    weight = tl.load(weight_ptr + i)
    last = tl.where(weight != 0.0, VOCAB, 0)  # of a row that counts nothing nothing is read
    offs = tl.arange(0, BLOCK_V)

    top_s, sum_s, gone_s, poison_s = _row_sum(s_row, inv_t, last, BLOCK_V)
    top_t, sum_t, gone_t, poison_t = _row_sum(t_row, inv_t, last, BLOCK_V)
    bad = poison_s + poison_t + tl.where(gone_s + gone_t > 0.0, float("nan"), 0.0)
    apart = tl.log(sum_s) - tl.log(sum_t)  # log p - log q = y - x + apart
    lq, lp = log_rest - tl.log(sum_s), log_beta - tl.log(sum_t)
    label = i * 0 - 1
    top_1, sum_1 = top_s, sum_s
    cross = 0.0
    if HAS_LABELS:
        label = tl.load(label_ptr + i)
        label = tl.where((label >= 0) & (label < last), label, -1)
        top_1, sum_1, _, _ = _row_sum(s_row, 1.0, last, BLOCK_V)
        right = tl.load(s_row + label, mask=label >= 0, other=0.0).to(tl.float32)
        cross = tl.where(label >= 0, tl.log(sum_1) - (right - top_1), 0.0)
    add = tl.where(label >= 0, weight * hard, 0.0)

    one = tl.zeros((BLOCK_V,), dtype=tl.float32)
    two = tl.zeros((BLOCK_V,), dtype=tl.float32)
    if KIND != 0:
        for first in range(0, last, BLOCK_V):
            inside = first + offs < last
            x = tl.load(s_row + first + offs, mask=inside, other=0.0).to(tl.float32) * inv_t - top_s  # [BLOCK_V]
            y = tl.load(t_row + first + offs, mask=inside, other=0.0).to(tl.float32) * inv_t - top_t  # [BLOCK_V]
            if KIND == 1:
                one += tl.where(inside, tl.exp(x) * (x - y), 0.0)
            else:
                q, p = _ratio_logs(x, y, lq, lp)
                one += tl.where(inside, tl.exp(x) * q, 0.0)
                two += tl.where(inside, tl.exp(y) * p, 0.0)
    mean = tl.sum(one, axis=0) / sum_s

    tl.debug_barrier()  # all have read the label's logit
    for first in range(0, V, BLOCK_V):
        inside = first + offs < last
        z = tl.load(s_row + first + offs, mask=inside, other=0.0).to(tl.float32)  # [BLOCK_V]
        x = z * inv_t - top_s
        y = tl.load(t_row + first + offs, mask=inside, other=0.0).to(tl.float32) * inv_t - top_t  # [BLOCK_V]
        q = tl.exp(x) / sum_s
        if KIND == 0:
            ey = tl.exp(y)
            one += tl.where(inside, ey * (y - x), 0.0)
            dz = q - ey / sum_t
        elif KIND == 1:
            dz = q * (x - y - mean)
        else:
            over, _ = _ratio_logs(x, y, lq, lp)
            dz = (1.0 - beta) * q * (over - mean)
        dz *= weight * T
        if HAS_LABELS:
            dz += add * (tl.exp(z - top_1) / sum_1 - tl.where(first + offs == label, 1.0, 0.0))
        dz = tl.where(inside, dz + bad, 0.0)
        tl.store(s_row + first + offs, dz.to(s_ptr.dtype.element_ty), mask=first + offs < V)

    if KIND == 0:
        d = tl.sum(one, axis=0) / sum_t + apart
    elif KIND == 1:
        d = mean - apart
    else:
        d = beta * (tl.sum(two, axis=0) / sum_t - log_beta) + (1.0 - beta) * (mean - log_rest)
    tl.store(loss_ptr + 2 * i, tl.where(weight != 0.0, weight * (T * T * d) + bad, 0.0))
    tl.store(loss_ptr + 2 * i + 1, tl.where(weight != 0.0, weight * cross + bad, 0.0))


@triton.jit
def distill_loss_topk_kernel(
    s_ptr, ids_ptr, logp_ptr, log_rest_ptr, weight_ptr, label_ptr, loss_ptr,
    V, VOCAB, K,
    stride_s,
    hard,
    HAS_LABELS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """loss = weight (KL over kept ids and a bucket for the others, cross-entropy); s becomes the gradient of KL + hard * cross-entropy.

    s [N, V] bf16 | fp16 | fp32, rows stride_s apart, in place; ids int32, logp fp32 [N, K]; log_rest, weight fp32 [N], loss fp32
    [N, 2]; label int64 [N].

        s   [ .  *  .  .  *  .  .  .  *  . ]     * kept: taken out into registers and -Inf put there, so that one loop sums the
                                                 others and one writes c e^x over them; then * get what is theirs
    """
    i = tl.program_id(0).to(tl.int64)
    s_row = s_ptr + i * stride_s
    weight = tl.load(weight_ptr + i)
    last = tl.where(weight != 0.0, VOCAB, 0)
    offs, offs_k = tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_K)
    low = float("-inf")

    ids = tl.load(ids_ptr + i * K + offs_k, mask=offs_k < K, other=-1)  # [BLOCK_K]
    kept = (ids >= 0) & (ids < last)
    lp = tl.where(kept, tl.load(logp_ptr + i * K + offs_k, mask=kept, other=low), low)  # [BLOCK_K]
    z = tl.load(s_row + ids, mask=kept, other=0.0).to(tl.float32)  # [BLOCK_K]
    label = i * 0 - 1
    right = 0.0
    if HAS_LABELS:
        label = tl.load(label_ptr + i)
        label = tl.where((label >= 0) & (label < last), label, -1)
        right = tl.load(s_row + label, mask=label >= 0, other=0.0).to(tl.float32)
    tl.debug_barrier()  # all have read what is overwritten here
    tl.store(s_row + ids, tl.full((BLOCK_K,), low, tl.float32).to(s_ptr.dtype.element_ty), mask=kept)
    tl.debug_barrier()

    most, left, gone, poison = _row_sum(s_row, 1.0, last, BLOCK_V)
    count = tl.sum(tl.where(kept, 1.0, 0.0), axis=0)
    poison += tl.sum(tl.where(kept, z * 0.0, 0.0), axis=0)
    bad = poison + tl.where(gone != count, float("nan"), 0.0)
    has_rest = left > 0.0
    log_p_rest = tl.where(has_rest, tl.load(log_rest_ptr + i), low)
    top = tl.maximum(most, tl.max(tl.where(kept, z, -1e38), axis=0))
    e = tl.where(kept, tl.exp(z - top), 0.0)  # [BLOCK_K]
    sum_q = tl.sum(e, axis=0) + left * tl.exp(most - top)
    sum_p = tl.sum(tl.exp(lp), axis=0) + tl.exp(log_p_rest)
    p, p_rest = tl.exp(lp) / sum_p, tl.exp(log_p_rest) / sum_p
    q = e / sum_q
    far = lp - tl.log(sum_p) - (z - top - tl.log(sum_q))
    d = tl.sum(tl.where(p > 0.0, p * far, 0.0), axis=0)
    log_q_rest = tl.log(tl.where(has_rest, left, 1.0)) + (most - top) - tl.log(sum_q)
    d += tl.where(p_rest > 0.0, p_rest * (log_p_rest - tl.log(sum_p) - log_q_rest), 0.0)
    add = tl.where(label >= 0, weight * hard, 0.0)
    cross = tl.where(label >= 0, tl.log(sum_q) - (right - top), 0.0)

    to_q = tl.exp(most - top) / sum_q  # softmax of the others is e^(x - most) to_q
    to_p = tl.where(has_rest, p_rest / tl.where(has_rest, left, 1.0), 0.0)
    share = weight * (to_q - to_p) + add * to_q
    for first in range(0, V, BLOCK_V):
        inside = first + offs < last
        x = tl.load(s_row + first + offs, mask=inside, other=low).to(tl.float32)  # [BLOCK_V]
        dz = tl.exp(x - most) * share - tl.where(first + offs == label, add, 0.0)
        dz = tl.where(inside, dz + bad, 0.0)
        tl.store(s_row + first + offs, dz.to(s_ptr.dtype.element_ty), mask=first + offs < V)
    tl.debug_barrier()
    dz = weight * (q - p) + add * (q - tl.where(ids == label, 1.0, 0.0)) + bad
    tl.store(s_row + ids, dz.to(s_ptr.dtype.element_ty), mask=kept)
    tl.store(loss_ptr + 2 * i, tl.where(weight != 0.0, weight * d + bad, 0.0))
    tl.store(loss_ptr + 2 * i + 1, tl.where(weight != 0.0, weight * cross + bad, 0.0))


@dataclass(frozen=True)
class Config:
    """Logits of a row that a program takes at once, and its warps."""

    block_v: int
    num_warps: int


def heuristic(shape: tuning.Shape, card: Card) -> Config:
    """16 numbers a thread of rows up to 4096, and of longer ones as much at a time."""
    block = min(max(triton.next_power_of_2(shape.k), 128), 4096)
    return Config(block_v=block, num_warps=min(max(block // 512, 1), 8))


def candidates(shape: tuning.Shape, card: Card) -> list[Config]:
    """What a tuner tries beside the heuristic: 1024 to 16384 at once, 8 to 32 numbers a thread."""
    changes = [{"block_v": b, "num_warps": w} for b in (1024, 2048, 4096, 8192, 16384) for w in (2, 4, 8, 16, 32)]
    return tuning.variants(heuristic(shape, card), changes, lambda c: 8 <= c.block_v // (32 * c.num_warps) <= 32)


config_for = tuning.finder(Path(__file__).with_name("tuned.json"), triton.__version__, OP_VERSION, Config, heuristic)


def plan(card: Card, *flat: Any, config: Config | None = None) -> tuple[torch.Tensor, list[Launch]]:
    """The losses, and the kernel that fills them and writes the gradient."""
    a = contract.Distill(*flat)
    n, v = a.z_s.shape
    loss = contract.out_like(*flat)
    config = config or config_for(tuning.Shape(n, 0, v, v, a.z_s.dtype), card)
    labels = a.labels is not None
    options = {
        "HAS_LABELS": labels,
        "BLOCK_V": config.block_v,
        "num_warps": config.num_warps,
        "enable_fp_fusion": FUSION,
    }
    given = a.labels if labels else a.weight
    if a.z_t is None:
        k = a.ids.shape[1]  # type: ignore[union-attr]
        kept = (a.z_s, a.ids, a.logp, a.log_rest, a.weight, given, loss, v, a.vocab, k, a.z_s.stride(0), a.hard)
        options = {"BLOCK_K": max(triton.next_power_of_2(k), 16)} | options
        return loss, [Launch(distill_loss_topk_kernel, (n,), kept, options)]
    beta = torch.tensor(a.beta, dtype=torch.float64)
    logs = float(beta.log()), float((1 - beta).log())
    args = (
        a.z_s, a.z_t, a.weight, given, loss, v, a.vocab, a.z_s.stride(0), a.z_t.stride(0), a.T, 1 / a.T, a.beta, *logs,
        a.hard,
    )  # fmt: skip
    kinds = {"KIND": contract.KINDS.index(a.kind)}
    return loss, [Launch(distill_loss_kernel, (n,), args, kinds | options)]


run = runner(plan)
