"""kv_append and attention_decode: bodies against references, pages that hold NaN, canaries, bits, refusals.

Triton's bodies run on a card, or in its interpreter: test_in_the_interpreter starts this file again in a process of its own.
The interpreter computes on the bits of bf16, so bf16 is left to the card.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from percard.formats import kvcache
from percard.formats.kvcache import KVPages, KVSpec
from percard.formats.spec import FormatError
from percard.kernels import op
from percard.kernels.attention_decode import attention_decode
from percard.kernels.attention_decode import cases as attention_cases
from percard.kernels.conformance import answer, faults
from percard.kernels.kv_append import cases as append_cases
from percard.kernels.kv_append import kv_append
from percard.kernels.op import Tape, Unsupported

from .conftest import only, unserved

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
BOTH = ("kv_append", "attention_decode")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def attention(body: Any, seed: int, *case: Any, **more: Any) -> tuple[Any, ...]:
    return attention_cases.inputs(attention_cases.small(*case, **more), seed, body.where)


@only(*BOTH)
def test_small_cases(body: Any, seed: int, subtests: pytest.Subtests) -> None:
    for case in body.cases.SMALL:
        if not unserved(body, case.dtype):
            with subtests.test(case.name):
                args = body.cases.inputs(case, seed, body.where)
                assert faults(body.op, body.name, args) == [], f"{case.name}, seed {seed}"


@pytest.mark.gpu
@only(*BOTH)
def test_real_cases_on_a_card(body: Any, seed: int, subtests: pytest.Subtests) -> None:
    for case in body.cases.REAL:
        with subtests.test(case.name):
            assert faults(body.op, body.name, body.cases.inputs(case, seed, body.where)) == []


@only("attention_decode")
@pytest.mark.parametrize("page", kvcache.PAGES)
def test_lengths_at_the_borders_of_pages(body: Any, page: int, seed: int) -> None:
    around = (page - 1, page, page + 1, 2 * page) if body.name == "cpu" else (page - 1, page + 1)
    assert faults(body.op, body.name, attention(body, seed, around, 4, 2, 32, FP16, 1, page)) == []


@only("attention_decode")
@pytest.mark.parametrize("group", [1, 4, 5, 6, 7, 8, 16])
def test_groups(body: Any, group: int, seed: int) -> None:
    tokens = {1: 16, 4: 7, 5: 2}.get(group, 1)
    assert faults(body.op, body.name, attention(body, seed, (70,), group, 1, 64, FP16, tokens)) == []


@only("attention_decode")
@pytest.mark.parametrize("tokens", [1, 2, 7, 16])
def test_a_token_sees_itself_and_those_before(body: Any, tokens: int, seed: int) -> None:
    """Together they get what each gets alone, when the cache ends with it."""
    args = attention(body, seed, (90, 40), 4, 2, 64, FP16, tokens)
    q, pages, table, lengths, keys = args[:5]
    got = answer(body.op, body.name, args)[0].view(2, tokens, 4, 64)
    for i in range(tokens):
        mine = (q.view(2, tokens, 4, 64)[:, i], pages, table, lengths - (tokens - 1 - i), keys)
        alone = answer(body.op, body.name, mine)[0]
        assert torch.allclose(got[:, i].float(), alone.float(), atol=2e-3)


@only("attention_decode")
def test_against_torch_attention(body: Any, seed: int) -> None:
    q, pages, table, lengths, keys = attention(body, seed, (150,), 8, 2, 64, FP32 if body.name == "cpu" else FP16)[:5]
    at = torch.arange(150, device=q.device)
    k, v = (p[table[0, at // 16].long(), :, at % 16].transpose(0, 1)[None] for p in (pages.k, pages.v))
    want = F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)[:, :, 0]
    out, _ = body.op(q, pages, table, lengths, keys, impl=body.name)
    assert torch.allclose(out.float(), want.float(), atol=2e-3)


@only("attention_decode")
def test_nan_in_one_sequence_stays_there(body: Any, seed: int) -> None:
    q, pages, table, lengths, keys = attention(body, seed, (80, 80, 20), 4, 2, 64, FP16)[:5]
    for part in (pages.k, pages.v):
        held = part[table[1, 2], 0, 3].clone()
        part[table[1, 2], 0, 3] = float("nan")
        out = body.op(q, pages, table, lengths, keys, impl=body.name)[0]
        part[table[1, 2], 0, 3] = held
        assert not torch.isfinite(out[1, :2]).any() and torch.isfinite(out[[0, 2]]).all()
        assert torch.isfinite(out[1, 2:]).all(), "the other key head of that sequence"


@only("attention_decode")
def test_a_sequence_does_not_depend_on_the_batch(body: Any, seed: int) -> None:
    if body.name == "triton" and body.where == "cpu":
        case = attention_cases.small((1100, 70), 4, 2, 32, FP16, 1, 16, deterministic=True)
    else:
        case = attention_cases.small((1100, 70, 513, 2000), 8, 2, 128, FP16, 2, 64, deterministic=True)
    q, pages, table, lengths, keys, n = attention_cases.inputs(case, seed, body.where)[:6]
    whole = body.op(q, pages, table, lengths, keys, n, deterministic=True, with_lse=True, impl=body.name)
    for b in range(len(lengths)):
        mine = (q[b * n : (b + 1) * n], pages, table[b : b + 1], lengths[b : b + 1], int(lengths[b]), n)
        alone = body.op(*mine, deterministic=True, with_lse=True, impl=body.name)
        assert all(torch.equal(a, w[b * n : (b + 1) * n]) for a, w in zip(alone, whole, strict=True))


@only(*BOTH)
def test_the_same_bits_every_time_and_on_every_isa(body: Any, seed: int) -> None:
    case = body.cases.SMALL[1] if body.name == "cpu" else next(c for c in body.cases.SMALL if c.dtype == FP16)
    args = body.cases.inputs(case, seed, body.where)
    first = answer(body.op, body.name, args)
    for _ in range(2 if INTERPRETED else 20):
        again = answer(body.op, body.name, args)
        assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(first, again, strict=True))
    if body.name == "cpu":
        op.native().force_isa("scalar")
        other = answer(body.op, body.name, args)
        assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(first, other, strict=True))


def test_threads_do_not_change_bits(seed: int) -> None:
    """Few pairs: the chunks of one are spread over threads; many: they follow one another."""
    for heads in (1, 8):
        args = attention_cases.inputs(attention_cases.small((3000,), 2 * heads, heads, 128, BF16, 1, 64), seed)
        found = []
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            found.append(answer(attention_decode, "cpu", args))
        torch.set_num_threads(1)
        assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
        assert faults(attention_decode, "cpu", args) == []


@only("kv_append")
def test_nothing_else_is_written(body: Any, seed: int) -> None:
    """Rows of other slots, and a canary around the pages, keep what they held."""
    for flags in (("norm", "turn"), ("strided",)):
        case = append_cases.small(5, 4, 2, 64, FP16, 16, *flags)
        k, v, _, slots, *rest = append_cases.inputs(case, seed, body.where)
        memory = append_cases.pages_like(case, 4, body.where, 7.0)
        pages = KVPages(memory.k[1:3], memory.v[1:3])
        live = slots[slots >= 0]
        body.op(k, v, pages, slots, *rest, impl=body.name)
        mine = torch.zeros(4 * 16, dtype=torch.bool, device=body.where)
        mine[16 + live] = True
        rows = memory.v.transpose(1, 2).reshape(64, 2, 64)
        assert (rows[~mine] == 7).all() and torch.equal(rows[16 + live], v[slots >= 0])
        assert (memory.k.transpose(1, 2).reshape(64, 2, 64)[~mine] == 7).all()


@only("kv_append")
def test_q_out_is_norm_then_rotation(body: Any, seed: int) -> None:
    case = append_cases.small(3, 4, 2, 64, FP32 if body.name == "cpu" else FP16, 16, "norm", "turn")
    args = append_cases.inputs(case, seed, body.where)
    q, positions, cos_sin, weight = (args[i].float() if i != 5 else args[i] for i in (4, 5, 6, 7))
    normed = F.rms_norm(q, (64,), weight, append_cases.EPS)
    cos, sin = (torch.cat((part, part), -1)[:, None] for part in cos_sin[positions].chunk(2, -1))
    low, high = normed.chunk(2, -1)
    want = normed * cos + torch.cat((-high, low), -1) * sin
    got = answer(kv_append, body.name, args)[0]
    assert torch.allclose(got.float(), want, atol=1e-5 if got.dtype == FP32 else 2e-2)


@only(*BOTH)
def test_what_is_appended_is_what_is_read(body: Any, seed: int) -> None:
    """A prompt, then tokens one by one into recycled pages, against attention over the whole text."""
    if body.op is kv_append:
        return
    heads, size, page = 4, 32, 16
    random = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(20, n, size, generator=random).to(FP16).to(body.where) for n in (heads, 2, 2))
    pages = KVPages(*(torch.full((4, 2, page, size), float("nan"), dtype=FP16, device=body.where) for _ in range(2)))
    table = torch.tensor([[3, 1]], dtype=torch.int32, device=body.where)
    at = torch.arange(20, device=body.where)
    slots = table[0, at // page].long() * page + at % page
    kv_append(k[:15], v[:15], pages, slots[:15], impl=body.name)
    for t in range(15, 20):
        kv_append(k[t : t + 1], v[t : t + 1], pages, slots[t : t + 1], impl=body.name)
        ends = torch.tensor([t + 1], dtype=torch.int32, device=body.where)
        got, _ = attention_decode(q[t : t + 1], pages, table, ends, 20, impl=body.name)
        rows = [part[: t + 1].transpose(0, 1)[None].float() for part in (k, v)]
        want = F.scaled_dot_product_attention(q[t][None, :, None].float(), *rows, enable_gqa=True)[0, :, 0]
        assert torch.allclose(got[0].float(), want, atol=2e-3)


def test_no_tokens_and_slots_below_zero(seed: int) -> None:
    case = append_cases.small(2, 4, 2, 64, FP16, 16, "norm", "turn")
    args = append_cases.inputs(case, seed)
    none = (args[0][:0], args[1][:0], args[2], args[3][:0], args[4][:0], args[5][:0], *args[6:])
    assert kv_append(*none).shape == (0, 4, 64)
    kv_append(*args[:3], torch.full((2,), -1), *args[4:])
    assert args[2].k.isnan().all() and args[2].v.isnan().all()


@only(*BOTH)
def test_opcheck(body: Any, seed: int) -> None:
    if body.where == "cpu" and body.name == "triton":
        return  # the interpreter cannot be traced; what is traced is the same for every body
    case = next(c for c in body.cases.SMALL if c.dtype == FP16)
    args = list(body.cases.inputs(case, seed, body.where))
    at = next(i for i, a in enumerate(args) if isinstance(a, KVPages))
    args[at] = KVPages(args[at].k.nan_to_num(0.5), args[at].v.nan_to_num(0.5))  # opcheck takes NaN for unequal
    flat = body.op.contract.unwrap(*args)
    torch.library.opcheck(body.op._torch_ops[body.name], flat)
    torch.library.opcheck(body.op.torch_op, flat)


def test_compile_sees_the_pages_change(seed: int) -> None:
    args = append_cases.inputs(append_cases.SMALL[2], seed)

    def call(k: torch.Tensor, v: torch.Tensor, pages: KVPages, *rest: Any) -> torch.Tensor:
        return kv_append(k, v, pages, *rest) + 1

    want = [t.clone() for t in (kv_append(*args) + 1, args[2].k, args[2].v)]
    fresh = KVPages(torch.full_like(args[2].k, float("nan")), torch.full_like(args[2].v, float("nan")))
    torch._dynamo.reset()
    got = torch.compile(call, fullgraph=True, backend="aot_eager")(args[0], args[1], fresh, *args[3:])
    for a, b in zip(want, (got, fresh.k, fresh.v), strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


def test_a_tape_repeats_on_new_numbers(seed: int) -> None:
    for impl in ("cpu", "reference"):
        tape = Tape()
        args = append_cases.inputs(append_cases.small(2, 4, 2, 64, FP32, 16, "norm", "turn"), seed)
        table = torch.arange(args[2].k.shape[0], dtype=torch.int32)[None].expand(2, -1)
        ends = torch.ones(2, dtype=torch.int32)
        args = (*args[:3], torch.tensor([0, 0 + 16]), *args[4:])
        table = torch.tensor([[0], [1]], dtype=torch.int32)

        def both(tape: Tape | None, args: tuple = args, table: torch.Tensor = table, ends: torch.Tensor = ends) -> Any:
            q = kv_append(*args, impl=impl, tape=tape)
            return attention_decode(q, args[2], table, ends, 16, impl=impl, tape=tape)[0]

        held = both(tape)
        args[0].normal_()
        args[1].normal_()
        tape.again()
        got = held.clone()
        assert torch.equal(got, both(None))
    with pytest.raises(ValueError, match="strides that are copied"):
        kv_append(args[0].transpose(0, 1).transpose(1, 2), *args[1:], tape=Tape())


def row(**changes: Any) -> tuple[Any, ...]:
    """Arguments of a call of attention_decode that is right but for `changes`."""
    right = {
        "q": torch.zeros(2, 4, 32),
        "pages": KVPages(torch.zeros(3, 2, 16, 32), torch.zeros(3, 2, 16, 32)),
        "table": torch.zeros(2, 2, dtype=torch.int32),
        "lengths": torch.ones(2, dtype=torch.int32),
        "keys": 32,
    }
    return tuple((right | changes).values())


def append_row(**changes: Any) -> tuple[Any, ...]:
    pages = KVPages(torch.zeros(3, 2, 16, 32), torch.zeros(3, 2, 16, 32))
    right = {"k": torch.zeros(2, 2, 32), "v": torch.zeros(2, 2, 32), "pages": pages, "slots": torch.arange(2)}
    return tuple((right | changes).values())


@pytest.mark.parametrize(
    ("error", "call", "said"),
    [
        (ValueError, lambda: attention_decode(*row(q=torch.zeros(2, 3, 32))), "expected .T, a multiple of 2, 32."),
        (ValueError, lambda: attention_decode(*row(q=torch.zeros(2, 4, 32).half())), "expected one float type"),
        (ValueError, lambda: attention_decode(*row(keys=40)), "at least .2, 3. pages of 16 tokens"),
        (ValueError, lambda: attention_decode(*row(lengths=torch.ones(2))), "expected int32 for both"),
        (ValueError, lambda: attention_decode(*row(), 3), "2 tokens and lengths"),
        (
            Unsupported,
            lambda: attention_decode(*row(q=torch.zeros(34, 4, 32)), 17),
            "expected 1 to 16; attention_prefill",
        ),
        (ValueError, lambda: attention_decode(*row(), window=0), "expected a window of 1 or more"),
        (ValueError, lambda: attention_decode(*row(), softcap=-1.0), "softcap >= 0"),
        (ValueError, lambda: attention_decode(*row(), sinks=torch.zeros(3)), "one for each query head"),
        (ValueError, lambda: attention_decode(*row(), q_starts=torch.zeros(3)), "q_starts is torch.float32"),
        (
            FormatError,
            lambda: attention_decode(*row(pages=KVPages(torch.zeros(3, 2, 24, 32), torch.zeros(3, 2, 24, 32)))),
            "a page holds 24 tokens, expected one of 1, 2, 4",
        ),
        (
            FormatError,
            lambda: kv_append(*append_row(k=torch.zeros(2, 2, 40))),
            "40 numbers, expected a multiple of 16",
        ),
        (
            FormatError,
            lambda: attention_decode(*row(pages=KVPages(torch.zeros(3, 2, 16, 32), torch.zeros(3, 2, 32, 32)))),
            "the pages of v are torch.float32 .3, 2, 32, 32., expected a float type",
        ),
        (
            FormatError,
            lambda: attention_decode(*row(lengths=torch.tensor([33, 1]).int()), impl="reference"),
            "has 33 tokens",
        ),
        (
            FormatError,
            lambda: attention_decode(*row(table=torch.full((2, 2), 9).int()), impl="reference"),
            "names page 9",
        ),
        (FormatError, lambda: kv_append(*append_row(slots=torch.tensor([0, 48])), impl="reference"), "48 is beyond"),
        (FormatError, lambda: kv_append(*append_row(slots=torch.tensor([5, 5])), impl="reference"), "stands twice"),
        (
            ValueError,
            lambda: kv_append(*append_row(v=torch.zeros(2, 2, 16))),
            "v is torch.float32 .2, 2, 16., expected",
        ),
        (ValueError, lambda: kv_append(*append_row(slots=torch.arange(2).int())), "expected contiguous int64"),
        (ValueError, lambda: kv_append(*append_row(), positions=torch.arange(2)), "come together"),
        (ValueError, lambda: kv_append(*append_row(), q=torch.zeros(2, 3, 32)), "q is torch.float32"),
        (
            ValueError,
            lambda: kv_append(*append_row(), positions=torch.arange(2), cos_sin=torch.zeros(9, 16)),
            r"expected contiguous float32 \[max_pos, 32\]",
        ),
        (FormatError, lambda: KVSpec.parse("q3"), "'q3' is not one; known: bf16"),
        (FormatError, lambda: kvcache.new_pages(2, 2, 32, dtype=FP32, page=20), "20 tokens"),
    ],
)
def test_refusals(error: type[Exception], call: Callable[[], Any], said: str) -> None:
    with pytest.raises(error, match=said):
        call()


@pytest.mark.parametrize("impl", [None, "cpu"])
def test_every_way_to_be_wrong_is_seen_after_calls_that_were_right(impl: str | None) -> None:
    q, _, table, lengths, _ = row()
    k, words = torch.zeros(3, 2, 16, 32, dtype=torch.int8), torch.ones(3, 2, 16, 2).half()
    pages = KVPages(k, k.clone(), KVSpec.parse("int8"), words)
    first = attention_decode(q, pages, table, lengths, 32, impl=impl)
    assert torch.equal(attention_decode(q, pages, table, lengths, 32, impl=impl)[0], first[0])
    ones = torch.ones(3, dtype=torch.int32)
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("q has shape", {"q": torch.zeros(2, 3, 32)}),
        ("q has shape", {"q": torch.zeros(2, 128)}),
        ("2 tokens and lengths", {"lengths": ones}),
        ("at least", {"max_kv_len": 33}),
        ("expected at least 1", {"max_kv_len": 0}),
        ("expected at least", {"table": table[:, :1]}),
        ("expected int32", {"table": table.long()}),
        ("expected .B, pages.", {"table": torch.zeros(2, 4, dtype=torch.int32)[:, ::2]}),
        ("expected .B, pages.", {"lengths": torch.zeros(4, dtype=torch.int32)[::2]}),
        ("the pages of v", {"pages": replace(pages, v=k[:, :, :8])}),
        ("the pages of k", {"pages": replace(pages, k=k.to(torch.uint8), v=k)}),
        ("scales of k", {"pages": replace(pages, scales=words[:2])}),
        ("scales of k", {"pages": replace(pages, scales=words.int())}),
        ("mu is", {"pages": replace(pages, mu=torch.zeros(2, 16))}),
        ("q_starts is", {"q_starts": ones.long()}),
        ("table_starts is", {"table_starts": ones[:2]}),
        ("sinks is", {"sinks": torch.zeros(3)}),
        ("q_bits is 4", {"q_bits": 4}),
        ("a window of 1", {"window": 0}),
        ("softcap", {"softcap": -1.0}),
        ("splits is -1", {"splits": -1}),
        ("1 to 16", {"max_q_len": 17}),
    ]
    for said, changes in wrong:
        given = {"q": q, "pages": pages, "table": table, "lengths": lengths, "max_kv_len": 32}
        for _ in range(2):
            with pytest.raises((ValueError, Unsupported), match=said):
                attention_decode(**(given | changes), impl=impl)


def test_a_length_that_grows_reads_the_keys_that_there_are(seed: int) -> None:
    pages = KVPages(*(torch.randn(3, 2, 16, 32, generator=torch.manual_seed(seed + i)) for i in range(2)))
    q, table = torch.randn(1, 4, 32), torch.tensor([[2, 0]], dtype=torch.int32)
    for longest in range(1, 33):
        for lengths in (torch.tensor([longest], dtype=torch.int32), torch.tensor([32], dtype=torch.int32)):
            got = attention_decode(q, pages, table, lengths, longest, with_lse=longest % 2 == 0)
            cut = torch.tensor([longest], dtype=torch.int32)
            want = attention_decode(q, pages, table, cut, longest, with_lse=True, impl="reference")
            assert torch.allclose(got[0], want[0], atol=1e-5) and got[1].shape == (1, 4 * (longest % 2 == 0))
            assert longest % 2 or torch.allclose(got[1], want[1], atol=1e-5)


def test_the_cache_format() -> None:
    assert str(KVSpec.parse("bf16")) == "bf16"
    pages = kvcache.new_pages(5, 2, 128, dtype=BF16)
    assert pages.page == 64 and pages.k.shape == (5, 2, 64, 128)
    assert pages.nbytes == 5 * 64 * 2 * 512, "512 bytes per token and key head"
    assert [kvcache.pages_of(n) for n in (0, 1, 64, 65)] == [0, 1, 1, 2]
    table = torch.tensor([[4, 2], [0, 3]], dtype=torch.int32)
    assert kvcache.slots_of(table, torch.tensor([70, 3]), 64).tolist() == [2 * 64 + 6, 3]


@pytest.mark.parametrize("length", [1, 63, 256, 257, 5000, 131072])
@pytest.mark.parametrize("splits", [1, 2, 7, 64])
def test_chunks_cover_a_sequence(length: int, splits: int) -> None:
    chunk = attention_decode.contract.chunk(length, splits)
    assert chunk * splits >= length and chunk % 64 == 0 and chunk >= 256
    pytest.importorskip("triton")
    from percard.kernels.attention_decode import gpu

    for batch in (1, 8, 200):
        count = gpu.splits(batch, 1, 8, length, 132)
        assert (1 <= count <= 64 and (count - 1) * 256 < length) or count == 1
        assert batch * count <= 1024


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreted process")
def test_in_the_interpreter(run_interpreted: Callable[..., str]) -> None:
    """This file again with Triton's bodies."""
    said = run_interpreted(Path(__file__), "-k", "triton")
    passed = re.search(r"(\d+) passed", said)
    assert passed and int(passed[1]) >= 25, said[-500:]


@pytest.mark.full
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreted process")
def test_in_the_interpreter_of_the_oldest(run_interpreted: Callable[..., str], oldest_triton: Path) -> None:
    run_interpreted(Path(__file__), "-k", "triton", triton=oldest_triton)
