"""attention_decode over int8 and 4-bit pages, and its options over every kind: bodies against the reference, and what must hold.

Triton's body runs on a card, or in its interpreter: test_in_the_interpreter starts this file again in a process of its own. There
a program takes a while, so it gets fewer and smaller problems.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from percard.formats.kvcache import KVPages, KVSpec, check_values, read
from percard.formats.spec import FormatError
from percard.kernels import op
from percard.kernels.attention_cases import LAYOUTS, paged, rows_to_pages
from percard.kernels.attention_decode import attention_decode, cases
from percard.kernels.attention_decode.cases import AttentionCase
from percard.kernels.conformance import answer, faults

from ..pairwise import pairwise
from .conftest import only, unserved

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
QUANTISED = ("int8", "k8v4", "int4", "k8v4-sym", "int4-sym")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def interpreted(body: Any) -> bool:
    return body.name == "triton" and body.where == "cpu"


def off(body: Any, case: AttentionCase, seed: int) -> list[str]:
    """What is wrong with a body's answer to a case; nothing for pages that Triton's interpreter cannot hold."""
    if unserved(body, case.dtype):
        return []
    return [f"{case.name}: {text}" for text in faults(body.op, body.name, cases.inputs(case, seed, body.where))]


@only("attention_decode")
def test_forms_of_pages_and_options(body: Any, seed: int, subtests: pytest.Subtests) -> None:
    for case in cases.FORMS:
        with subtests.test(case.name):
            assert off(body, case, seed) == []


FACTORS = {
    "spec": ("", *QUANTISED),
    "heads": ((1, 4), (4, 2), (5, 2), (6, 1), (7, 2), (8, 2), (16, 1), (32, 1), (64, 1)),  # G, key heads
    "size": (64, 80, 96, 128, 256),
    "tokens": (1, 2, 7, 16),
    "page": (16, 32, 64, 128),
    "lengths": ((70, 3), (129, 0), (64, 16, 1)),
    "window": (-1, 9, 45),  # smaller than a tile; ends inside of a page
    "layout": LAYOUTS,
    "sinks": (False, True),
    "softcap": (0.0, 12.0),
    "mu": (False, True),
    "csr": (False, True),
    "unequal": (False, True),
    "dtype": (FP16, FP32, BF16),
    "deterministic": (False, True),
    "q_bits": (8, 8, 16),
}


def case_of(
    spec: str, heads: tuple[int, int], size: int, tokens: int, page: int, lengths: Any, **more: Any
) -> AttentionCase:
    """A case of a row of FACTORS, without what has no meaning for its pages."""
    group, kv_heads = heads
    dtype = more.pop("dtype")
    if not spec:
        more |= {"mu": False, "layout": "nhd" if more["layout"] else "", "q_bits": 8}
    if more.pop("unequal"):
        more["fresh"] = tuple(tokens - i if i < 2 else 0 for i in range(len(lengths)))
    return cases.small(lengths, group * kv_heads, kv_heads, size, dtype, tokens, page, spec, **more)


@only("attention_decode")
def test_every_pair_of_choices(body: Any, seed: int) -> None:
    rows = pairwise(FACTORS)
    if interpreted(body):
        rows = [row for row in rows if row["heads"][0] * row["tokens"] <= 64][::8]
    assert [text for row in rows for text in off(body, case_of(**row), seed)] == []


@pytest.mark.full
@only("attention_decode")
def test_every_choice_of_sizes(body: Any, seed: int) -> None:
    """The whole product of what decides how a kernel is cut; options take turns."""
    if body.name == "cpu" and body.isa != op.native().isas()[-1]:
        pytest.skip("the other instruction sets give the same bits")
    sizes = ("spec", "heads", "size", "tokens", "page")
    turns = {name: values for name, values in FACTORS.items() if name not in sizes}
    wrong = []
    for i, chosen in enumerate(product(*(FACTORS[name] for name in sizes))):
        if interpreted(body) and i % 29:
            continue
        row = {name: values[(i // 7 + i * k) % len(values)] for k, (name, values) in enumerate(turns.items())}
        wrong += off(body, case_of(**dict(zip(sizes, chosen, strict=True)), **row), seed)
    assert wrong == []


@only("attention_decode")
@pytest.mark.parametrize("spec", ["int8", "int4"])
@pytest.mark.parametrize(
    "page", [16, pytest.param(32, marks=pytest.mark.full), 64, pytest.param(128, marks=pytest.mark.full)]
)
def test_every_fill_of_a_page(body: Any, spec: str, page: int, seed: int) -> None:
    lengths = tuple(page + fill for fill in range(page))
    if interpreted(body):
        lengths = lengths[1 :: page // 4]
    assert off(body, cases.small(lengths, 2, 1, 64, FP16, 1, page, spec), seed) == []


def one_page(spec: str, k: torch.Tensor, v: torch.Tensor, page: int = 16, mu: torch.Tensor | None = None) -> KVPages:
    """Pages, in order, of one sequence's rows k, v [S, Hkv, D]; what is past them is poison."""
    missing = -len(k) % page
    live = torch.arange(len(k) + missing, device=k.device) < len(k)
    k, v = (torch.cat((part, part.new_zeros(missing, *part.shape[1:]))).unflatten(0, (-1, page)) for part in (k, v))
    return rows_to_pages(k.float(), v.float(), live.view(-1, page), FP16, KVSpec.parse(spec), mu=mu)


def random(body: Any, seed: int) -> Callable[..., torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *size: torch.randn(*size, generator=generator).to(body.where)


def ask(body: Any, q: torch.Tensor, pages: KVPages, *lengths: int, table: Any = None, **how: Any) -> Any:
    """(out, lse) of sequences over pages in order, or over a table of page numbers."""
    per = pages.k.shape[0]
    table = torch.arange(per).expand(len(lengths), -1).contiguous() if table is None else torch.tensor(table)
    ends = torch.tensor(lengths, dtype=torch.int32, device=q.device)
    given = (q, pages, table.int().to(q.device), ends, max(1, *lengths))
    return body.op(*given, with_lse=True, impl=body.name, **how)


@only("attention_decode")
@pytest.mark.parametrize("spec", QUANTISED)
def test_rows_of_zeros_and_constant_rows(body: Any, spec: str, seed: int) -> None:
    """Keys that are all alike are averaged over, exactly; a constant value comes back."""
    draw = random(body, seed)
    v = draw(40, 2, 64)
    q = draw(1, 4, 64).half()
    for k in (torch.zeros_like(v), torch.full_like(v, -3.5), torch.full_like(v, 1e-9)):
        pages = one_page(spec, k, v)
        out, _ = ask(body, q, pages, 40)
        at = torch.arange(40, device=v.device)
        want = read(pages, at // 16, at % 16, 64)[1].mean(0).repeat_interleave(2, 0)
        assert torch.allclose(out[0].float(), want, atol=4e-3)
    out, _ = ask(body, q, one_page(spec, v, torch.full_like(v, 2.0)), 40)
    assert torch.allclose(out.float(), torch.full_like(out, 2.0).float(), rtol=8e-3)


@only("attention_decode")
@pytest.mark.parametrize("spec", ["int8", "k8v4", "int4", "int4-sym"])
def test_a_bad_row_marks_its_sequence_and_head_alone(body: Any, spec: str, seed: int) -> None:
    draw = random(body, seed)
    q = draw(3, 4, 64).half()
    for side, value in product((0, 1), (float("nan"), float("inf"))):
        rows = [draw(64, 2, 64), draw(64, 2, 64)]
        rows[side][37, 1, 5] = value
        pages = one_page(spec, *rows)
        out, _ = ask(body, q, pages, 20, 30, 20, table=[[0, 1], [1, 2], [3, 0]])
        assert torch.isfinite(out[[0, 2]]).all() and torch.isfinite(out[1, :2]).all()
        assert not torch.isfinite(out[1, 2:]).any(), f"{spec} {value} in {'KV'[side]}"


@only("attention_decode")
@pytest.mark.parametrize("spec", ["int8", "int4"])
def test_a_bad_row_that_is_not_seen_changes_nothing(body: Any, spec: str, seed: int) -> None:
    """A fresh token's bad row does not reach the tokens before it, nor does one that has left the window."""
    draw = random(body, seed)
    q = draw(2, 4, 64).half()
    for side, bad in product((0, 1), (3, 39)):
        rows = [draw(40, 2, 64), draw(40, 2, 64)]
        rows[side][bad] = float("nan")
        out, _ = ask(body, q, one_page(spec, *rows), 40, max_q_len=2, window=20)
        assert torch.isfinite(out[0]).all()
        assert bool(torch.isfinite(out[1]).all()) == (bad == 3)


@only("attention_decode")
@pytest.mark.parametrize("spec", ["int8", "int4"])
def test_shared_and_recycled_pages(body: Any, spec: str, seed: int) -> None:
    """A prefix found in other requests' pages gives the bits of one that lies in pages of its own."""
    draw = random(body, seed)
    k, v, q = draw(80, 2, 64), draw(80, 2, 64), draw(2, 4, 64).half()
    pages = one_page(spec, torch.cat((k, k[:32])), torch.cat((v, v[:32])))  # pages 5 and 6 are copies of 0 and 1
    own = ask(body, q, pages, 80, 50, table=[[0, 1, 2, 3, 4], [5, 6, 2, 3, -1]], deterministic=True)
    hit = ask(body, q, pages, 80, 50, table=[[5, 1, 2, 3, 4], [0, 1, 2, 3, -1]], deterministic=True)
    assert all(torch.equal(a, b) for a, b in zip(own, hit, strict=True))


@only("attention_decode")
def test_nothing_is_seen(body: Any, seed: int) -> None:
    draw = random(body, seed)
    pages, sinks = one_page("int8", draw(16, 1, 64), draw(16, 1, 64)), torch.tensor([0.5, -2.0]).to(body.where)
    q = draw(2, 2, 64).half()
    out, lse = ask(body, q, pages, 0, 0)
    assert (out == 0).all() and (lse == -torch.inf).all()
    out, lse = ask(body, q, pages, 0, 0, sinks=sinks)
    assert (out == 0).all() and torch.allclose(lse, sinks.expand(2, 2))
    alone, _ = ask(body, q, pages, 5, 5)
    heard, _ = ask(body, q, pages, 5, 5, sinks=torch.full_like(sinks, 60.0))
    assert (heard.abs() <= 1e-3).all() and (alone.abs() > 1e-2).any(), "a sink takes the weight, and gives nothing"


@only("attention_decode")
@pytest.mark.parametrize("spec", ["int8", "int4"])
def test_the_offset_shows_in_sums_only(body: Any, spec: str, seed: int) -> None:
    """The same bytes with and without mu: out is the same, lse is apart by scale * q . mu, and near that of the keys."""
    draw = random(body, seed)
    mu, v, q = 2 * draw(2, 64), draw(60, 2, 64), draw(1, 4, 64).half()
    k = draw(60, 2, 64) + mu
    pages = one_page(spec, k, v, mu=mu)
    out, lse = ask(body, q, pages, 60)
    plain, lse_plain = ask(body, q, replace(pages, mu=None), 60)
    shift = (q[0].float() * mu.repeat_interleave(2, 0)).sum(-1) / 8
    assert torch.allclose(out.float(), plain.float(), atol=1e-3)
    assert torch.allclose(lse - lse_plain, shift[None], atol=1e-4)
    true = torch.einsum("hd,shd->hs", q[0].float(), k.repeat_interleave(2, 1)).div(8).logsumexp(-1)
    assert torch.allclose(lse[0], true, atol=0.02 if spec == "int8" else 0.25)


@only("attention_decode")
@pytest.mark.parametrize("more", [{}, {"window": 300, "sinks": True}, {"fresh": (1, 2, 2), "mu": True}], ids=str)
def test_a_sequence_does_not_depend_on_the_batch(body: Any, more: dict[str, Any], seed: int) -> None:
    for spec in ("int8",) if interpreted(body) else QUANTISED:
        lengths = (550, 70, 3) if interpreted(body) else (1100, 70, 1030)
        case = cases.small(lengths, 4, 2, 64, FP16, 2, 64, spec, deterministic=True, **more)
        q, pages, table, ends, keys, n, *rest = cases.inputs(case, seed, body.where)
        starts, window, sinks = rest[3:6]
        how = {"deterministic": True, "with_lse": True, "impl": body.name, "window": window, "sinks": sinks}
        whole = body.op(q, pages, table, ends, keys, n, q_starts=starts, **how)
        bounds = [n * b for b in range(len(lengths) + 1)] if starts is None else starts.tolist()
        for b in range(len(lengths)):
            mine = slice(bounds[b], bounds[b + 1])
            given = (q[mine], pages, table[b : b + 1], ends[b : b + 1], int(ends[b]), bounds[b + 1] - bounds[b])
            for got, want in zip(body.op(*given, **how), whole, strict=True):
                assert torch.equal(got, want[mine]), f"{case.name}, sequence {b}"


@only("attention_decode")
@pytest.mark.parametrize("spec", ["", "int8", "int4"])
def test_any_number_of_splits(body: Any, spec: str, seed: int) -> None:
    for splits in (3,) if interpreted(body) else (1, 2, 3, 5, 40):
        assert off(body, cases.small((1100, 300, 2), 2, 1, 64, FP16, 2, 64, spec, splits=splits), seed) == []


@only("attention_decode")
@pytest.mark.parametrize("spec", ["int8", "k8v4", "int4"])
def test_tokens_at_once_and_one_by_one(body: Any, spec: str, seed: int) -> None:
    case = cases.small((90, 40), 4, 2, 64, FP16, 7, 16, spec, window=33, mu=True, sinks=True)
    q, pages, table, ends, keys, n, _, _, _, _, window, sinks, *_ = cases.inputs(case, seed, body.where)
    how = {"window": window, "sinks": sinks, "impl": body.name}
    together = body.op(q, pages, table, ends, keys, n, **how)[0].view(2, n, 4, 64)
    for i in range(n):
        alone = body.op(q.view(2, n, 4, 64)[:, i], pages, table, ends - (n - 1 - i), keys, **how)[0]
        assert torch.allclose(together[:, i].float(), alone.float(), atol=2e-2), i


@only("attention_decode")
def test_opcheck(body: Any, seed: int) -> None:
    if interpreted(body):
        return  # it cannot be traced; what is traced is the same for every body
    case = cases.small((70, 9), 4, 2, 64, FP16, 2, 16, "int4", mu=True, sinks=True, window=20, csr=True)
    args = list(cases.inputs(case, seed, body.where))
    args[1] = replace(args[1], scales=args[1].scales.nan_to_num(0.5))  # opcheck takes NaN for unequal
    flat = body.op.contract.unwrap(*args)
    torch.library.opcheck(body.op._torch_ops[body.name], flat)
    torch.library.opcheck(body.op.torch_op, flat)


def over(keys: torch.Tensor, values: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Plain fp32 attention of q [B, Hq, D] over keys and values [S, Hkv, D]: no rounding anywhere."""
    group = q.shape[1] // keys.shape[1]
    k, v = (part.repeat_interleave(group, 1).float() for part in (keys, values))
    p = (torch.einsum("bhd,shd->bhs", q.float(), k) * q.shape[-1] ** -0.5).softmax(-1)
    return torch.einsum("bhs,shd->bhd", p, v)


def l1(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.float() - want).abs().sum() / want.abs().sum())


@only("attention_decode")
@pytest.mark.parametrize("spec", QUANTISED)
def test_what_rounding_of_queries_costs(body: Any, spec: str, seed: int) -> None:
    """Relative L1 error over what the bytes say, on random numbers: 0.006 to 0.008, measured; hardly any without it."""
    draw, length = random(body, seed), 130 if interpreted(body) else 600
    k, v, q = draw(length, 2, 128), draw(length, 2, 128), draw(4, 8, 128).half()
    pages, at = one_page(spec, k, v), torch.arange(length, device=k.device)
    want = over(*read(pages, at // 16, at % 16, 128), q)
    assert l1(ask(body, q, pages, *([length] * 4))[0], want) <= 0.010
    assert l1(ask(body, q, pages, *([length] * 4), q_bits=16)[0], want) <= 0.004


BOUNDS = {  # of relative L1 error over keys and values themselves, and of the cosine; measured: two thirds of that
    "int8": (0.005, 0.9999),
    "k8v4": (0.060, 0.9970),
    "int4": (0.070, 0.9965),
    "k8v4-sym": (0.070, 0.9950),
    "int4-sym": (0.080, 0.9945),
}


@only("attention_decode")
@pytest.mark.parametrize("spec", QUANTISED)
def test_accuracy(body: Any, spec: str, seed: int) -> None:
    """Queries that look for something: each is near one key, as in a model, and values have a part that all share."""
    draw, length = random(body, seed), 130 if interpreted(body) else 1500
    k, v, q = draw(length, 2, 128), draw(length, 2, 128) + draw(1, 2, 128), draw(6, 8, 128)
    for i in range(6):
        q[i] += 0.068 * math.log(length) * k[17 * i + 1].repeat_interleave(4, 0)
    q = q.half()
    out, _ = ask(body, q, one_page(spec, k, v), *([length] * 6))
    truth, (most, cosine) = over(k, v, q), BOUNDS[spec]
    assert l1(out, truth) <= most
    assert float(torch.cosine_similarity(out.float().flatten(1), truth.flatten(1)).min()) >= cosine


@only("attention_decode")
@pytest.mark.parametrize("length", [2048, 32768])
def test_a_planted_key_is_found(body: Any, length: int, seed: int) -> None:
    """One key at every 97th position gets about 0.6 of all weight; int8 pages point to the same value as bf16 ones."""
    if interpreted(body) or (body.name == "cpu" and body.isa != op.native().isas()[-1] and length > 2048):
        if length > 2048:
            pytest.skip("long; the other instruction sets give the same bits")
        length = 400
    draw, page = random(body, seed), 64
    places = torch.arange(0, length, 97)[:: 2 if interpreted(body) else 1]
    k, v, q = draw(length, 1, 128), draw(length, 1, 128).sign(), draw(1, 1, 128)
    per, count = -(-length // page), len(places)
    margin = float((k[:, 0] @ q[0, 0] * 128**-0.5).logsumexp(0)) + 0.5
    planted = q[0] * (margin * 128**0.5 / float(q.square().sum()))
    # a page of its own for every place: the others are shared
    filled = torch.cat((k, k.new_zeros(per * page - length, 1, 128))).unflatten(0, (per, page))
    own = filled[places.to(k.device) // page].clone()
    own[torch.arange(count), places % page] = planted
    values = torch.cat((v, v.new_zeros(per * page - length, 1, 128))).unflatten(0, (per, page))
    keys, values = torch.cat((filled, own)), torch.cat((values, values[places.to(k.device) // page]))
    table = torch.arange(per).repeat(count, 1)
    table[torch.arange(count), places // page] = per + torch.arange(count)
    live = torch.ones(keys.shape[:2], dtype=torch.bool, device=k.device)
    kind = FP16 if interpreted(body) else BF16
    for spec in ("bf16", "int8"):
        pages = rows_to_pages(keys, values, live, kind, KVSpec.parse(spec))
        out, _ = ask(
            body, q.to(kind).expand(count, 1, 128).contiguous(), pages, *([length] * count), table=table.tolist()
        )
        winner = (out[:, 0].float() @ v[:, 0].T).argmax(-1).cpu()
        assert torch.equal(winner, places), spec


def ways(args: tuple[Any, ...]) -> Iterator[tuple[torch.Tensor, ...]]:
    """The answers of the C++ body on every instruction set and with one to three threads."""
    before = op.native().isa()
    for isa in op.native().isas():
        op.native().force_isa(isa)
        for threads in (1, 3):
            torch.set_num_threads(threads)
            yield answer(attention_decode, "cpu", args)
    torch.set_num_threads(1)
    op.native().force_isa(before)


@pytest.mark.parametrize("spec", QUANTISED)
def test_the_same_bits_on_every_isa_and_with_any_threads(spec: str, seed: int) -> None:
    if INTERPRETED:
        pytest.skip("C++ only")
    for more in ({"tokens": 1, "window": -1}, {"tokens": 5, "window": 700, "softcap": 9.0, "sinks": True, "mu": True}):
        case = cases.small((1300, 77), 10, 2, 80, FP16, more.pop("tokens"), 16, spec, **more)  # type: ignore[arg-type]
        first, *others = ways(cases.inputs(case, seed))
        assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("spec", ["bf16", "int8", "int4"])
def test_the_same_bits_from_pages_of_any_size_and_layout(spec: str, seed: int) -> None:
    if INTERPRETED:
        pytest.skip("C++ only")
    draw = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(128, 2, 128, generator=draw) for _ in range(2))
    q, found = torch.randn(1, 8, 128, generator=draw).half(), []
    for page, layout in ((64, ""), (16, ""), (128, "nhd"), (32, "record"), (1, ""), (64, "record")):
        rows = [part.unflatten(0, (-1, page)) for part in (k, v)]
        pages = rows_to_pages(*rows, torch.ones(128 // page, page).bool(), FP16, KVSpec.parse(spec), layout)
        table = torch.arange(128 // page, dtype=torch.int32)[None]
        found.append(attention_decode(q, pages, table, torch.tensor([113]).int(), 128, impl="cpu")[0])
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_refusals(seed: int) -> None:
    given = paged(torch.Generator().manual_seed(seed), (20,), 2, 64, FP16, 16, "int8")
    q, ends = torch.zeros(1, 4, 64).half(), torch.tensor([20], dtype=torch.int32)
    right = given.pages

    def call(pages: KVPages = right, table: torch.Tensor = given.table, **how: Any) -> Any:
        return attention_decode(q, pages, table, ends, 32, **how)

    for error, broken, said in (
        (FormatError, {"pages": replace(right, scales=None)}, "scales of k are none"),
        (FormatError, {"pages": replace(right, spec=KVSpec.parse("int4"))}, "expected uint8"),
        (FormatError, {"pages": replace(right, mu=torch.zeros(2, 32))}, "mu is torch.float32 .2, 32."),
        (ValueError, {"q_bits": 4}, "q_bits is 4, expected 8 or 16"),
        (ValueError, {"splits": -1}, "splits is -1"),
        (ValueError, {"window": 0}, "window of 1 or more"),
        (ValueError, {"sinks": torch.zeros(2)}, "one for each query head"),
        (ValueError, {"table_starts": torch.zeros(2).int()}, "with table_starts"),
        (FormatError, {"table": torch.full_like(given.table, 99), "impl": "reference"}, "names page 99"),
    ):
        with pytest.raises(error, match=said):
            call(**broken)  # type: ignore[arg-type]
    mixed = replace(right, scales=right.scales[..., :1].float(), v_scales=right.scales[..., 1:])
    with pytest.raises(op.Unsupported, match="of two types"):
        call(mixed, impl="cpu")
    check_values(right, table=given.table, lengths=ends)
    with pytest.raises(FormatError, match="has 99 tokens"):
        check_values(right, table=given.table, lengths=torch.tensor([99]))


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreted process")
def test_in_the_interpreter(run_interpreted: Callable[..., str]) -> None:
    """This file again with Triton's body."""
    said = run_interpreted(Path(__file__), "-k", "triton", "-m", "not full")
    passed = re.search(r"(\d+) passed", said)
    assert passed and int(passed[1]) >= 30, said[-500:]


@pytest.mark.full
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreted process")
def test_in_the_interpreter_of_the_oldest(run_interpreted: Callable[..., str], oldest_triton: Path) -> None:
    run_interpreted(Path(__file__), "-k", "triton", "-m", "not full", triton=oldest_triton)
