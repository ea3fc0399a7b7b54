"""attention_prefill: bodies against the reference over every kind of page, cuts of a prompt, bits, refusals.

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
from percard.formats.kvcache import KVPages
from percard.formats.spec import FormatError
from percard.kernels import device, op
from percard.kernels.attention_decode import attention_decode
from percard.kernels.attention_prefill import attention_prefill, cases
from percard.kernels.conformance import answer, faults
from percard.kernels.op import Unsupported

from .conftest import only, unserved

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
OP = "attention_prefill"


def call(body: Any, seed: int, *case: Any) -> tuple[Any, ...]:
    return cases.inputs(cases.small(*case), seed, body.where)


@only(OP)
def test_small_cases(body: Any, seed: int, subtests: pytest.Subtests) -> None:
    for case in cases.SMALL:
        if not unserved(body, case.dtype):
            with subtests.test(case.name):
                assert faults(body.op, body.name, cases.inputs(case, seed, body.where)) == [], (
                    f"{case.name}, seed {seed}"
                )


@pytest.mark.gpu
@only(OP)
def test_real_cases_on_a_card(body: Any, seed: int, subtests: pytest.Subtests) -> None:
    for case in cases.REAL:
        if case.heads <= 16:  # the reference holds all scores
            with subtests.test(case.name):
                assert faults(body.op, body.name, cases.inputs(case, seed, body.where)) == []


@only(OP)
@pytest.mark.parametrize("form", kvcache.SPECS)
def test_a_prompt_in_pieces_has_the_bits_of_the_whole(body: Any, form: str, seed: int) -> None:
    """A second chunk over a quantised prefix equals one pass: a token's sums do not know where its chunk began."""
    q, pages, table, lengths, starts, _, keys = call(body, seed, (300,), (300,), 4, 2, 64, FP16, form)[:7]
    whole = answer(body.op, body.name, (q, pages, table, lengths, starts, 300, keys))[0]
    for first, last in ((0, 100), (100, 133), (133, 300)):
        ends = torch.tensor([last], dtype=torch.int32, device=q.device)
        got = answer(body.op, body.name, (q[first:last], pages, table, ends, None, last - first, keys))[0]
        if body.name == "cpu":
            assert torch.equal(got, whole[first:last])
        assert torch.allclose(got.float(), whole[first:last].float(), atol=2e-2)


@only(OP)
@pytest.mark.parametrize("group", [1, 4, 5, 6, 7, 8, 16])
def test_groups(body: Any, group: int, seed: int) -> None:
    assert faults(body.op, body.name, call(body, seed, (19,), (70,), group, 1, 64, FP16, "int8")) == []


@only(OP)
@pytest.mark.parametrize("size", [64, 80, 96, 128, 256])
def test_sizes_of_heads(body: Any, size: int, seed: int) -> None:
    for form in ("bf16", "int8", "int4"):
        assert faults(body.op, body.name, call(body, seed, (21,), (50,), 4, 2, size, FP16, form)) == []


@only(OP)
def test_the_same_bits_every_time_and_on_every_isa(body: Any, seed: int) -> None:
    for case in (c for c in cases.SMALL if c.dtype == FP16):
        args = cases.inputs(case, seed, body.where)
        first = answer(body.op, body.name, args)
        again = answer(body.op, body.name, args)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), case.name
        if body.name == "cpu":
            before = op.native().isa()
            op.native().force_isa("scalar")
            other = answer(body.op, body.name, args)
            op.native().force_isa(before)
            assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True)), case.name
        if INTERPRETED:
            return


def test_threads_do_not_change_bits(seed: int) -> None:
    args = cases.inputs(cases.small((300, 70), (700, 70), 8, 2, 64, BF16, "int8", 64), seed)
    found = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        found.append(answer(attention_prefill, "cpu", args))
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@only(OP)
@pytest.mark.parametrize("form", ["bf16", "int8", "int4"])
def test_a_sequence_does_not_depend_on_the_batch(body: Any, form: str, seed: int) -> None:
    fresh, lengths = (70, 3, 129), (150, 40, 300)
    q, pages, table, ends, starts, _, keys = call(body, seed, fresh, lengths, 4, 2, 64, FP16, form)[:7]
    whole = answer(body.op, body.name, (q, pages, table, ends, starts, 129, keys))[0]
    for b, n in enumerate(fresh):
        first = int(starts[b])
        mine = (q[first : first + n], pages, table[b : b + 1], ends[b : b + 1], None, n, lengths[b])
        assert torch.equal(answer(body.op, body.name, mine)[0], whole[first : first + n])


@only(OP)
@pytest.mark.parametrize("page", kvcache.PAGES)
def test_lengths_at_the_borders_of_pages(body: Any, page: int, seed: int) -> None:
    around = (page - 1, page, page + 1, 2 * page) if body.name == "cpu" else (page - 1, page + 1)
    fresh = tuple(min(n, 20) for n in around)
    assert faults(body.op, body.name, call(body, seed, fresh, around, 4, 2, 32, FP16, "k8v4", page)) == []


@only(OP)
def test_against_torch_attention(body: Any, seed: int) -> None:
    """bf16 pages mean what scaled_dot_product_attention does, over a prefix too."""
    dtype = FP32 if body.name == "cpu" else FP16
    q, pages, table, lengths, starts, most, keys = call(body, seed, (60,), (150,), 8, 2, 64, dtype, "bf16")[:7]
    at = torch.arange(150, device=q.device)
    k, v = (p[table[0, at // 16].long(), :, at % 16].transpose(0, 1)[None] for p in (pages.k, pages.v))
    mask = at <= 90 + torch.arange(60, device=q.device)[:, None]
    want = F.scaled_dot_product_attention(q.transpose(0, 1)[None], k, v, attn_mask=mask, enable_gqa=True)
    out, _ = body.op(q, pages, table, lengths, starts, most, keys, impl=body.name)
    assert torch.allclose(out.transpose(0, 1).float(), want[0].float(), atol=2e-3)


@only(OP)
@pytest.mark.parametrize("form", ["bf16", "int8", "int4", "k8v4-sym"])
def test_equals_decode(body: Any, form: str, seed: int) -> None:
    """Up to 16 tokens two ops mean the same: both are within their tolerance of one answer."""
    args = call(body, seed, (16,), (200,), 8, 2, 64, FP16, form, 16, "sinks")
    q, pages, table, lengths, _, most, keys = args[:7]
    got, lse = body.op(*args, impl=body.name)
    if body.name == "triton" and body.where == "cpu":
        return  # the suite of decode runs its body
    other, other_lse = attention_decode(
        q, pages, table, lengths, keys, most, with_lse=True, sinks=args[11], impl=body.name
    )
    want = attention_prefill(*args, impl="reference")
    allowed = attention_prefill.contract.tolerance(want, *attention_prefill.contract.unwrap(*args))
    assert ((got.float() - other.float()).abs() <= 2 * allowed[0]).all()
    assert ((lse - other_lse).abs() <= 2 * allowed[1]).all()


@only(OP)
@pytest.mark.parametrize("form", ["bf16", "int8", "int4"])
def test_nan_reaches_those_who_see_it_and_nobody_else(body: Any, form: str, seed: int) -> None:
    """A key, or a value, of NaN: tokens before it, other heads and other sequences do not notice."""
    q, pages, table, lengths, starts, most, keys = call(body, seed, (40, 30), (60, 30), 4, 2, 64, FP16, form)[:7]
    at = (int(table[0, 2]), 0, 3)  # key 35 of sequence 0, key head 0: token 15 of its 40
    parts = (pages.k, pages.v) if form == "bf16" else pages.words
    for part in parts:
        held = part[at].clone()
        part[at] = torch.nan
        out, lse = body.op(q, pages, table, lengths, starts, most, keys, with_lse=True, impl=body.name)
        part[at] = held
        assert not torch.isfinite(out[15:40, :2]).any(), "those that see it"
        assert torch.isfinite(out[:, 2:]).all() and torch.isfinite(out[40:]).all()
        if (
            body.name == "cpu" or part is not pages.v
        ):  # Triton multiplies a tile of 16-bit values as it is: 0 * NaN is NaN
            assert torch.isfinite(out[:15]).all()
        assert torch.isfinite(lse[15:40, :2]).all() == (part is parts[1]), "values are not in the sum of weights"


@only(OP)
def test_a_prefix_on_recycled_pages(body: Any, seed: int) -> None:
    """Two sequences share a prefix in pages that once held other things: the same bits as from fresh pages."""
    args = call(body, seed, (20,), (84,), 4, 2, 64, FP16, "int8")
    q, pages, table, lengths, _, most, keys = args[:7]
    alone = answer(body.op, body.name, (q, pages, table, lengths, None, most, keys))[0]
    both = (torch.cat((q, q)), pages, table.expand(2, -1), lengths.expand(2).contiguous(), None, most, keys)
    shared = answer(body.op, body.name, both)[0]
    order = torch.randperm(pages.k.shape[0], device=q.device)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=q.device)
    moved = KVPages(pages.k[order], pages.v[order], pages.spec, pages.scales[order])
    elsewhere = (q, moved, inverse[table.long()].int(), lengths, None, most, keys)
    assert torch.equal(shared[:20], alone) and torch.equal(shared[20:], alone)
    assert torch.equal(answer(body.op, body.name, elsewhere)[0], alone)


@only(OP)
def test_an_offset_of_keys_does_not_move_lse(body: Any, seed: int) -> None:
    """lse with mu is that of the keys with mu added back."""
    args = call(body, seed, (30,), (50,), 4, 2, 64, FP16, "int8", 16, "mu")
    q, pages, table, lengths, starts, most, keys = args[:7]
    whole = KVPages(pages.k, pages.v, pages.spec, pages.scales)
    _, without = body.op(q, whole, table, lengths, starts, most, keys, with_lse=True, impl=body.name)
    _, lse = body.op(q, pages, table, lengths, starts, most, keys, with_lse=True, impl=body.name)
    shift = torch.einsum("thd,hd->th", q.float(), pages.mu.repeat_interleave(2, 0)) * 64**-0.5
    assert torch.allclose(lse, without + shift, atol=1e-4)


@only(OP)
def test_opcheck(body: Any, seed: int) -> None:
    if body.where == "cpu" and body.name == "triton":
        return  # the interpreter cannot be traced; what is traced is the same for every body
    args = list(call(body, seed, (20, 3), (32, 16), 4, 2, 64, FP16, "int8", 16, "given"))
    pages = args[1]
    args[1] = KVPages(pages.k, pages.v, pages.spec, pages.scales.nan_to_num(0.5))  # opcheck takes NaN for unequal
    flat = body.op.contract.unwrap(*args)
    torch.library.opcheck(body.op._torch_ops[body.name], flat)
    torch.library.opcheck(body.op.torch_op, flat)


def test_no_tokens(seed: int) -> None:
    q, pages, table, lengths, starts, most, keys = cases.inputs(cases.SMALL[3], seed)[:7]
    out, lse = attention_prefill(q[:0], pages, table, lengths, starts * 0, most, keys, with_lse=True)
    assert out.shape == (0, 4, 64) and lse.shape == (0, 4)


def row(**changes: Any) -> dict[str, Any]:
    """Arguments of a call that is right but for `changes`."""
    right = {
        "q": torch.zeros(5, 4, 32),
        "pages": KVPages(torch.zeros(3, 2, 16, 32), torch.zeros(3, 2, 16, 32)),
        "table": torch.zeros(2, 2, dtype=torch.int32),
        "lengths": torch.tensor([3, 2], dtype=torch.int32),
        "q_starts": torch.tensor([0, 3, 5], dtype=torch.int32),
        "max_q_len": 3,
        "max_kv_len": 32,
    }
    return right | changes


@pytest.mark.parametrize(
    ("error", "changes", "said"),
    [
        (ValueError, {"q": torch.zeros(5, 3, 32)}, "expected .T, a multiple of 2, 32."),
        (ValueError, {"q_starts": torch.zeros(2, dtype=torch.int32)}, r"q_starts is .*expected contiguous int32 \(3,\)"),
        (ValueError, {"q_starts": None}, "5 tokens and lengths"),
        (ValueError, {"max_kv_len": 40}, "at least .2, 3. pages of 16 tokens"),
        (ValueError, {"v": torch.zeros(5, 2, 32)}, "v and v_starts come together, found v alone"),
        (
            ValueError,
            {"v": torch.zeros(5, 2, 16), "v_starts": torch.zeros(3, dtype=torch.int32)},
            r"v is torch.float32 \(5, 2, 16\), expected torch.float32 \[keys of all sequences, 2, 32\]",
        ),
        (ValueError, {"v": torch.zeros(5, 2, 32), "v_starts": torch.zeros(3)}, "v_starts is torch.float32"),
        (ValueError, {"window": 0}, "expected a window of 1 or more"),
        (Unsupported, {"q": torch.zeros(5, 4, 512), "pages": KVPages(*[torch.zeros(3, 2, 16, 512)] * 2)}, "at most 256"),
        (FormatError, {"lengths": torch.tensor([33, 1]).int(), "impl": "reference"}, "has 33 tokens"),
        (FormatError, {"table": torch.full((2, 2), 9).int(), "impl": "reference"}, "names page 9"),
    ],
)  # fmt: skip
def test_refusals(error: type[Exception], changes: dict[str, Any], said: str) -> None:
    with pytest.raises(error, match=said):
        attention_prefill(**row(**changes))


def test_the_triton_body_yields_where_warpgroups_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    """A body that yields is passed over with its reason, and serves when it is named."""
    contract = attention_prefill.contract

    class Elsewhere:
        is_cuda, device = True, torch.device("cuda")

    for sm, said in ((80, None), (86, None), (89, None), (120, None), (90, "gather_dequantize"), (100, "on sm_100")):
        monkeypatch.setattr(contract.device, "card_of", lambda _, sm=sm: replace(device.H200, sm=sm))
        found = contract.triton_yields(Elsewhere())
        assert found is None if said is None else said in found and "impl='triton'" in found

    def yields(*_: Any) -> str:
        return "busy; ask by name"

    first, second = (op.Body(n, None, lambda _: None, lambda *_: None, lambda n=n: lambda q: q + len(n)) for n in "ab")
    made = op.Op.__new__(op.Op)
    made.name, made.contract, made._runs, made._ready = "made", contract, {}, {}
    made.bodies = (replace(first, yields=yields), second)
    q = torch.zeros(1)
    assert made.pick(q).name == "b" and made.pick(q, impl="a").name == "a"
    assert [takes(q) for takes, _ in made._settle("cpu")] == ["busy; ask by name", None]
    made.bodies = (replace(first, yields=yields),)
    with pytest.raises(Unsupported, match="a: busy; ask by name"):
        made.pick(q)


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreted process")
def test_in_the_interpreter(run_interpreted: Callable[..., str]) -> None:
    """This file again with Triton's bodies."""
    said = run_interpreted(Path(__file__), "-k", "triton and not yields")
    passed = re.search(r"(\d+) passed", said)
    assert passed and int(passed[1]) >= 25, said[-500:]


@pytest.mark.full
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreted process")
def test_in_the_interpreter_of_the_oldest(run_interpreted: Callable[..., str], oldest_triton: Path) -> None:
    run_interpreted(Path(__file__), "-k", "triton and not yields", triton=oldest_triton)
