"""The meaning of attention_decode, in plain torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ...formats.kvcache import KVPages, check_values


def _sequences(*flat: Any) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(its tokens, q [n, Hq, D], k and v [Hq, S, D], what token i sees [n, S]) of each sequence, fp32."""
    q, k_pages, v_pages, table, lengths, _, n = flat[:7]
    check_values(KVPages(k_pages, v_pages), table=table, lengths=lengths)
    for b, length in enumerate(lengths.tolist()):
        at = torch.arange(length, device=q.device)
        pages, rows = table[b, at // k_pages.shape[2]].long(), at % k_pages.shape[2]
        group = q.shape[1] // k_pages.shape[1]
        k, v = (p[pages, :, rows].float().transpose(0, 1).repeat_interleave(group, 0) for p in (k_pages, v_pages))
        seen = at <= length - n + torch.arange(n, device=q.device)[:, None]
        yield slice(b * n, (b + 1) * n), q[b * n : (b + 1) * n].float(), k, v, seen


def run(*flat: Any) -> tuple[torch.Tensor, torch.Tensor]:
    q, scale, with_lse = flat[0], flat[5], flat[9]
    out, lse = (
        torch.zeros(q.shape, dtype=q.dtype, device=q.device),
        q.new_full(q.shape[:2], -torch.inf, dtype=torch.float32),
    )
    for tokens, mine, k, v, seen in _sequences(*flat):
        scores = torch.einsum("nhd,hsd->nhs", mine * scale, k).masked_fill(~seen[:, None], -torch.inf)
        lse[tokens] = scores.logsumexp(-1)
        p = (scores - lse[tokens][..., None].nan_to_num(nan=torch.nan, neginf=0.0)).exp()
        # a key that a token does not see must not reach it through 0 * NaN either
        heard = v.expand(len(seen), *v.shape).masked_fill(~seen[:, None, :, None], 0.0)  # [n, Hq, S, D]
        out[tokens] = torch.einsum("nhs,nhsd->nhd", p, heard).to(q.dtype)
    return out, lse if with_lse else lse[:, :0]


def sizes_of(*flat: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What errors act on: sum_t p_t |v_t| [T, Hq, D], and the largest scale * sum |q| |k_t| [T, Hq, 1]; for tolerance."""
    q, scale = flat[0], flat[5]
    reach, spread = q.new_zeros(q.shape, dtype=torch.float32), q.new_zeros((*q.shape[:2], 1), dtype=torch.float32)
    for tokens, mine, k, v, seen in _sequences(*flat):
        if not v.shape[1]:
            continue
        scores = torch.einsum("nhd,hsd->nhs", mine * scale, k).masked_fill(~seen[:, None], -torch.inf)
        reach[tokens] = torch.einsum("nhs,hsd->nhd", scores.softmax(-1).nan_to_num(0.0), v.abs().nan_to_num(0.0))
        spread[tokens] = torch.einsum("nhd,hsd->nhs", mine.abs() * abs(scale), k.abs()).amax(-1, keepdim=True)
    return reach, spread.nan_to_num(0.0)
