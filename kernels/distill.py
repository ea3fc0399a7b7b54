"""distill_loss: fused linear and divergence. Chunk by chunk of tokens the hidden states are multiplied with the heads, the op turns the
student's logits into their gradient, that is multiplied back, and forgotten: the logits of a batch are never there at once.

    for each chunk of counted tokens:      z_s = x_s w_s^T    z_t = x_t w_t^T        torch
                                           parts += D(z_s, z_t),  z_s := dz           the op distill_loss
                                           dx_s = dz w_s      dw_s += dz^T x_s       torch

Gradients come with the loss, so an autograd.Function has only to hand them on, times what flows in. The pattern is Liger-Kernel's
(github.com/linkedin/Liger-Kernel, chunked_loss/fused_linear_distillation.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from .distill_loss import distill_loss as rows_loss
from .distill_loss.contract import TopK

CHUNK_BYTES = 256 << 20
_WHOLE_TILES = 16  # a chunk is a multiple of so many tokens, where it has as many


class Distilled(NamedTuple):
    """loss [] fp32; dx_s [N, Hs] in the type of x_s; dw_s [V, Hs] fp32, or None; parts fp32 [2]: T^2 D and cross-entropy alone, where
    there are labels; loss is the first plus `hard` times the second. float64 where x_s is."""

    loss: torch.Tensor
    dx_s: torch.Tensor
    dw_s: torch.Tensor | None
    parts: torch.Tensor


@torch.no_grad()
def distill_loss(
    x_s: torch.Tensor,
    w_s: torch.Tensor,
    x_t: torch.Tensor | None = None,
    w_t: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    *,
    kind: str = "fkl",
    beta: float = 0.5,
    T: float = 1.0,
    vocab: int | None = None,
    topk: TopK | None = None,
    labels: torch.Tensor | None = None,
    hard: float = 0.0,
    count: float | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    need_dw: bool = True,
    impl: str | None = None,
) -> Distilled:
    """T^2 D(teacher, student) + hard * cross-entropy, the mean over the tokens that `mask` counts, with its gradients.

    x_s [N, Hs], w_s [V, Hs] of one type bf16 | fp16 | fp32; the teacher is x_t [N, Ht], w_t [V', Ht] of one type, or topk = (ids [N, k],
    logp [N, k], log_rest [N]) with T = 1 and kind "topk", or nothing: cross-entropy of the labels alone. mask [N]: bool or weights, None counts
    all; labels int [N], negative for none. vocab: real ids, at most V and V'; rows of the heads past them have no mass and get no
    gradient. count: what the sum is divided by, None for the sum of the mask; a micro-batch names the count of its whole batch.
    chunk_bytes: memory for logits. Tokens that do not count are not multiplied, and may hold NaN; none at all give loss 0 and
    zero gradients. Waits once for the device, for which tokens count. ValueError names what does not fit.
    """
    _check(x_s, w_s, x_t, w_t, mask, topk, labels, chunk_bytes)
    tokens, exact = x_s.shape[0], torch.float64 if x_s.dtype == torch.float64 else torch.float32
    if vocab is None:
        vocab = w_s.shape[0] if w_t is None else min(w_s.shape[0], w_t.shape[0])
    pulls = x_t is not None or topk is not None or hard > 0  # else the cross-entropy is only told
    if x_t is None:
        if topk is not None and kind not in ("fkl", "topk"):
            raise ValueError(f"{rows_loss.name}: kind is {kind!r}, a top-k cache serves 'topk' only")
        kind, T = "topk", T if topk is not None else 1.0
        topk = topk or _nothing(tokens, x_s.device)
    weight = torch.ones(tokens, dtype=exact, device=x_s.device) if mask is None else mask.to(exact)
    rows = None if mask is None else weight.nonzero()[:, 0]
    weight = weight / (weight.sum() if count is None else count)
    parts = torch.zeros(2, dtype=exact, device=x_s.device)
    dx = torch.zeros_like(x_s, memory_format=torch.contiguous_format)
    dw = torch.zeros(w_s.shape, dtype=exact, device=x_s.device) if need_dw else None

    counted = tokens if rows is None else rows.shape[0]
    step = _chunk(counted, w_s, w_t, chunk_bytes)
    room = [None if w is None else torch.empty((step, w.shape[0]), dtype=w.dtype, device=w.device) for w in (w_s, w_t)]
    with torch.autocast(x_s.device.type, enabled=False):
        for at in _chunks(rows, counted, step):
            x = x_s[at]
            z_s, z_t = _logits(x, w_s, room[0]), None if x_t is None else _logits(x_t[at], w_t, room[1])
            parts += rows_loss(
                z_s, weight[at], z_t, None if topk is None else tuple(t[at] for t in topk),
                None if labels is None else labels[at], kind, beta, T, vocab, hard, impl=impl,
            ).sum(0)  # fmt: skip
            if not pulls:
                continue
            dx[at] = z_s @ w_s
            if dw is not None:
                _add_product(dw, z_s, x, chunk_bytes // 8)
    return Distilled(parts[0] + hard * parts[1], dx, dw, parts)


def _chunk(counted: int, w_s: torch.Tensor, w_t: torch.Tensor | None, chunk_bytes: int) -> int:
    """Tokens whose logits fill at most chunk_bytes; at least one."""
    each = sum(w.shape[0] * w.element_size() for w in (w_s, w_t) if w is not None)
    step = max(1, chunk_bytes // each)
    return min(step if step < _WHOLE_TILES else step // _WHOLE_TILES * _WHOLE_TILES, max(1, counted))


def _chunks(rows: torch.Tensor | None, counted: int, step: int) -> Iterator[slice | torch.Tensor]:
    """Which tokens a chunk has."""
    for first in range(0, counted, step):
        at = slice(first, min(first + step, counted))
        yield at if rows is None else rows[at]


def _logits(x: torch.Tensor, w: torch.Tensor | None, room: torch.Tensor | None) -> torch.Tensor:
    """x w^T, in the first rows of `room`."""
    assert w is not None and room is not None
    return torch.mm(x, w.t(), out=room[: x.shape[0]])


def _add_product(dw: torch.Tensor, dz: torch.Tensor, x: torch.Tensor, most_bytes: int) -> None:
    """dw += dz^T x in the type of dw. 16-bit products are made by blocks of rows, since they need memory of their own."""
    if dz.dtype == dw.dtype:
        dw.addmm_(dz.t(), x)
        return
    step = max(1, most_bytes // (dw.shape[1] * dw.element_size()))
    for first in range(0, dw.shape[0], step):
        dw[first : first + step] += dz[:, first : first + step].t() @ x


def _nothing(tokens: int, where: torch.device) -> TopK:
    """A teacher that says nothing: no kept id, all mass in the rest. Its divergence is 0."""
    none = torch.empty((tokens, 0), device=where)
    return none.int(), none, torch.zeros(tokens, device=where)


def _check(
    x_s: torch.Tensor,
    w_s: torch.Tensor,
    x_t: torch.Tensor | None,
    w_t: torch.Tensor | None,
    mask: torch.Tensor | None,
    topk: TopK | None,
    labels: torch.Tensor | None,
    chunk_bytes: int,
) -> None:
    """What is not the op's own to check: states and heads that belong together, one teacher at most."""
    name = rows_loss.name
    if (x_t is None) != (w_t is None) or (x_t is not None and topk is not None):
        raise ValueError(f"{name}: a teacher is x_t and w_t, or topk; pass one of them")
    if x_t is None and topk is None and labels is None:
        raise ValueError(f"{name}: no teacher and no labels; there is nothing to learn from")
    if chunk_bytes < 1:
        raise ValueError(f"{name}: chunk_bytes is {chunk_bytes}, expected at least 1")
    for who, x, w in (("s", x_s, w_s), ("t", x_t, w_t)):
        if x is None or w is None:
            continue
        if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[1] or x.dtype != w.dtype:
            found = f"{x.dtype} {tuple(x.shape)} and {w.dtype} {tuple(w.shape)}"
            raise ValueError(f"{name}: x_{who} and w_{who} are {found}, expected [N, H] and [V, H] of one type")
    per_token = {"x_t": x_t, "mask": mask, "labels": labels} | dict(
        zip(("ids", "logp", "log_rest"), topk or (), strict=False)
    )
    for who, t in per_token.items():
        if t is not None and t.shape[:1] != x_s.shape[:1]:
            raise ValueError(
                f"{name}: {who} has {t.shape[0] if t.ndim else 0} tokens, expected {x_s.shape[0]} as x_s has"
            )
