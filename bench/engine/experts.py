"""The experts of a mixture: which ones a token takes, and their products, 16-bit or quantised.

Shapes: T tokens, E experts, P = T * topk pairs of a token and one of its experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ...formats.tensor import ExpertsTensor
from ...kernels.linear import moe


@dataclass(frozen=True)
class Moe:
    """One sparse MLP: router [E, hidden], w13 [E, 2 ffn, hidden] (gate rows, then up rows), w2 [E, hidden, ffn].

    Both weights are tensors, or both are packed for moe_matmul.
    """

    router: torch.Tensor
    w13: torch.Tensor | ExpertsTensor
    w2: torch.Tensor | ExpertsTensor
    per_token: int
    normalized: bool

    @property
    def quantised(self) -> bool:
        return isinstance(self.w13, ExpertsTensor)

    @property
    def nbytes(self) -> int:
        """Bytes of the experts, without the router, which every step reads."""
        return sum(w.nbytes for w in (self.w13, self.w2))


def route(h: torch.Tensor, m: Moe) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts of each token and their weights, int64 and fp32 [T, topk], the heaviest first; h [T, hidden].

    Softmax over all experts in fp32, as transformers has it; the best `per_token` of them, summing to 1 if `normalized`.
    """
    chances = F.softmax(F.linear(h, m.router), dim=-1, dtype=torch.float32)
    weights, ids = chances.topk(m.per_token, dim=-1)
    return ids, weights / weights.sum(-1, keepdim=True) if m.normalized else weights


def run(
    x: torch.Tensor, m: Moe, matmul: Callable[..., torch.Tensor], impl: str | None, batch_invariant: bool = False
) -> torch.Tensor:
    """What the experts make of normed rows x [B, T, hidden]: the same shape."""
    h = x.view(-1, x.shape[-1])
    ids, weights = route(h, m)
    if isinstance(m.w13, ExpertsTensor) and isinstance(m.w2, ExpertsTensor):
        return moe(h, m.w13, m.w2, ids, weights, impl=impl, batch_invariant=batch_invariant).view(x.shape)
    assert isinstance(m.w13, torch.Tensor) and isinstance(m.w2, torch.Tensor)
    return sixteen_bit(h, ids, weights, m.w13, m.w2, matmul).view(x.shape)


def sixteen_bit(
    h: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    matmul: Callable[..., torch.Tensor],
) -> torch.Tensor:
    """The baseline: pairs sorted by expert, one product per expert that has any, SwiGLU in the type of h: [T, hidden]."""
    tokens, topk = ids.shape
    flat = ids.flatten()
    order = flat.argsort(stable=True)
    rows = h[order // topk]  # [P, hidden]
    counts = torch.zeros(w13.shape[0], dtype=torch.int64, device=h.device).scatter_add_(0, flat, torch.ones_like(flat))
    made = torch.empty_like(rows)
    if h.device.type == "cuda" and h.dtype == torch.bfloat16:
        made[order] = grouped(rows, counts, w13, w2)
    else:
        made[order] = one_by_one(rows, counts, w13, w2, matmul)
    # fp32 sums inside of the product, rounded once
    return torch.bmm(weights.to(h.dtype)[:, None], made.view(tokens, topk, -1))[:, 0]


def grouped(rows: torch.Tensor, counts: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
    """Sorted rows [P, hidden] through their experts, `counts` [E] of them each, by torch's grouped product (bf16 only).

    All experts are one launch and the host is asked nothing, so that a decode loop on a card can be captured.
    """
    ends, ffn = counts.cumsum(0, dtype=torch.int32), w2.shape[2]
    gate_up = torch._grouped_mm(rows, w13.transpose(1, 2), offs=ends)
    return torch._grouped_mm(F.silu(gate_up[:, :ffn]).mul_(gate_up[:, ffn:]), w2.transpose(1, 2), offs=ends)


def one_by_one(
    rows: torch.Tensor, counts: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, matmul: Callable[..., torch.Tensor]
) -> torch.Tensor:
    """The same, a product per expert that has any row: in any float type, but the host waits for `counts`."""
    out, start, ffn = torch.empty_like(rows), 0, w2.shape[2]
    for expert, count in enumerate(counts.tolist()):
        if count == 0:
            continue
        end = start + count
        gate_up = matmul(rows[start:end], w13[expert])
        out[start:end] = matmul(F.silu(gate_up[:, :ffn]).mul_(gate_up[:, ffn:]), w2[expert])
        start = end
    return out
