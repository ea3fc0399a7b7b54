"""One key among many that a query means: int8 pages find the same one as bf16 pages, wherever it stands.

Keys have two channels eight times as large as the others, as trained models have them. A query is a part of the key it means
and something else: scores of all other keys scatter by about 1.5, and its own is 2 above the best of them, so at 32k tokens it
has a few hundredths of the weight. Values are random signs, a word for each position: the position whose word is nearest to
what came out is the winner.
"""

from __future__ import annotations

import math

import pytest
import torch

from percard.formats.kvcache import KVSpec, new_pages, pages_of
from percard.kernels.attention_decode import attention_decode
from percard.kernels.kv_append import kv_append

D, HEADS, EVERY, MARGIN = 128, 8, 97, 2.0


def planted(length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(q [n, D], where each one's key stands [n], k and v [length, D]): keys and values in bf16."""
    generator = torch.Generator().manual_seed(length)
    plain = torch.ones(D)
    plain[[5, 77]] = 0
    large = 1 + 7 * (1 - plain)
    k = (torch.randn(length, D, generator=generator) * large).bfloat16()
    v = (torch.randint(0, 2, (length, D), generator=generator) * 2 - 1).bfloat16()
    at = torch.arange(0, length, EVERY)
    rest = torch.randn(len(at), D, generator=generator) / large
    keys, mine = k.float() / math.sqrt(D), k.float()[at] * plain
    share = torch.full((len(at), 1), 0.7)
    for _ in range(20):  # the best of the others moves with the share, so it is found step by step
        q = share * mine + 1.2 * rest
        scores = q @ keys.T
        own = scores.gather(1, at[:, None])
        others = scores.scatter(1, at[:, None], -math.inf).amax(1, keepdim=True)
        share = share + (others + MARGIN - own) / own.clamp(min=1.0) * share
    return q.bfloat16(), at, k, v


def winners(name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The position whose word comes out for each query, int64 [n], over pages of a spec that lie anywhere."""
    length, count = len(k), pages_of(len(k))
    pages = new_pages(count, 1, D, dtype=torch.bfloat16, spec=KVSpec.parse(name))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    at = torch.arange(length)
    kv_append(k[:, None], v[:, None], pages, order[at // pages.page] * pages.page + at % pages.page)
    batch = -(-len(q) // HEADS)
    filled = torch.cat((q, q[: batch * HEADS - len(q)])).view(batch, HEADS, D)
    table, lengths = (
        order.to(torch.int32).expand(batch, -1).contiguous(),
        torch.full((batch,), length, dtype=torch.int32),
    )
    out, _ = attention_decode(filled, pages, table, lengths, max_kv_len=length)
    return (out.float().view(-1, D)[: len(q)] @ v.float().T).argmax(1)


@pytest.mark.parametrize("length", [2048, 32768])
def test_pages_with_8_bit_keys_find_what_bf16_pages_find(length):
    q, at, k, v = planted(length)
    scores = q.float() @ k.float().T / math.sqrt(D)
    own = scores.gather(1, at[:, None])[:, 0]
    best = scores.scatter(1, at[:, None], -math.inf).amax(1)
    assert float((own - best).min()) > 1.9 and float((own - best).max()) < 2.1
    assert 1.0 < float(scores.std()) < 2.0
    for name in ("bf16", "int8", "k8v4"):
        assert torch.equal(winners(name, q, k, v), at), name
    if length > 30_000:  # four bits of keys lose some: it is not that any cache would do
        lost = int((winners("int4-sym", q, k, v) != at).sum())
        assert 5 < lost < len(at) // 4
