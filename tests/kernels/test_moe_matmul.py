"""moe_matmul: every body against the reference, and the reference against token after token; routes, bits, refusals.

Triton's body runs on a card (gpu), or in Triton's interpreter, in a process of its own that this file starts. By hand:
TRITON_INTERPRET=1 pytest tests/kernels/test_moe_matmul.py -k triton
"""

from __future__ import annotations

import importlib.util
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from percard.formats import affine
from percard.kernels import device, op
from percard.kernels.conformance import answer, faults, packed, poisoned_memory
from percard.kernels.moe_matmul import cases, moe_matmul
from percard.kernels.moe_matmul.cases import ExpertsCase, small

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
CONTRACT = moe_matmul.contract
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class Body(NamedTuple):
    """A body that is here: where it runs, and with which instruction set (None: not the C++ one)."""

    name: str
    where: str
    isa: str | None


def bodies() -> list[Any]:
    found = []
    if moe_matmul.body("cpu").absent("cpu") is None:
        found = [pytest.param(Body("cpu", "cpu", isa), id=f"cpu-{isa}") for isa in op.native().isas()]
    if device.has_card():
        found.append(pytest.param(Body("triton", "cuda", None), id="triton", marks=pytest.mark.gpu))
    elif INTERPRETED:
        found.append(pytest.param(Body("triton", "cpu", None), id="triton"))
    return found


@pytest.fixture(params=bodies())
def there(request: pytest.FixtureRequest) -> Iterator[Body]:
    chosen: Body = request.param
    if chosen.isa is None:
        yield chosen
        return
    before = op.native().isa()
    op.native().force_isa(chosen.isa)
    yield chosen
    op.native().force_isa(before)


def unserved(there: Body, case: ExpertsCase) -> bool:
    """Types that Triton's body does not take, and bf16, which its interpreter gets wrong (triton#11584)."""
    a16 = case.spec != "w8a8"
    return there.name == "triton" and ((a16 and case.dtype == FP32) or (there.where == "cpu" and case.dtype == BF16))


def made(there: Body, m: int, up: bool, spec: str, seed: int, **changes: Any) -> tuple[Any, ...]:
    """Random fp16 arguments: m tokens, 5 experts, top 3, a weight [70, 256]."""
    sizes = {"n": 70, "k": 256, "experts": 5, "topk": 3, "routes": "slice"} | changes
    case = small(m, sizes["n"], sizes["k"], spec, FP16, sizes["experts"], sizes["topk"], up, sizes["routes"])
    return cases.inputs(case, seed, there.where)


def test_small_cases(there: Body, seed: int, subtests: pytest.Subtests) -> None:
    for case in cases.SMALL:
        if not unserved(there, case):
            with subtests.test(case.name):
                assert faults(moe_matmul, there.name, cases.inputs(case, seed, there.where)) == [], f"seed {seed}"


@pytest.mark.gpu
def test_real_cases(seed: int, subtests: pytest.Subtests) -> None:
    for case in cases.CASES:
        if case.real and case.name.startswith("qwen3-30b") and case.m <= 1024:
            with subtests.test(case.name):
                assert faults(moe_matmul, "triton", cases.inputs(case, seed, "cuda")) == [], f"seed {seed}"


@pytest.mark.parametrize("up", [True, False])
@pytest.mark.parametrize("spec", ["w4a16-g64-asym", "w4a16", "w8a8"])
def test_the_reference_is_what_the_formula_says(up: bool, spec: str, seed: int) -> None:
    """Token after token, with dequantised weights: another way to the same numbers."""
    args = made(Body("reference", "cpu", None), 7, up, spec, seed, k=192)
    x, w, ids, weights, sx = (*args, None)[:5]
    x = x.float() if sx is None else x.float() * sx[:, None]
    got = moe_matmul(*args, impl="reference")
    want = torch.zeros(got.shape)
    for t, j in torch.cartesian_prod(torch.arange(7), torch.arange(3)).tolist():
        if ids[t, j] < 0:
            continue
        weight = affine.dequantize(w.expert(int(ids[t, j])))
        if up:
            gate, other = (weight @ x[t]).chunk(2)
            want[3 * t + j] = gate * torch.sigmoid(gate) * other
        else:
            want[t] += weights[t, j] * (weight @ x[3 * t + j])
    assert torch.allclose(got.float(), want, rtol=2e-3, atol=2e-3 * float(want.abs().max()))


@pytest.mark.parametrize("up", [True, False])
@pytest.mark.parametrize("spec", ["w4a16-g128", "w8a8"])
def test_the_order_of_tokens_does_not_change_their_bits(there: Body, up: bool, spec: str, seed: int) -> None:
    for m, kind in ((2, "ties"), (9, "slice"), (40, "one")):
        args = made(there, m, up, spec, seed, routes=kind)
        order = torch.randperm(m, generator=torch.Generator().manual_seed(seed)).to(there.where)
        pairs = (order[:, None] * 3 + torch.arange(3, device=there.where)).flatten()
        rows = order if up else pairs
        x, w, ids, weights, *rest = args
        other = (x[rows], w, ids[order], None if up else weights[order])
        if rest:
            other = (*other, rest[0][rows], rest[1])
        want, got = (answer(moe_matmul, there.name, a)[0] for a in (args, other))
        assert torch.equal(got, want[pairs if up else order]), f"{m} tokens"


@pytest.mark.parametrize("up", [True, False])
@pytest.mark.parametrize("spec", ["w4a16-g64", "w8a8"])
def test_a_token_alone_has_the_same_bits_as_in_a_batch(there: Body, up: bool, spec: str, seed: int) -> None:
    """Always with int8; with batch_invariant for 16-bit rows. Triton's kernels sum in one order anyway."""
    always = spec == "w8a8" or there.name == "triton"
    x, w, ids, weights, *rest = made(there, 20, up, spec, seed, routes="ties")
    rest = rest or [None, FP16]
    for flag in (True, False) if always else (True,):
        batch = answer(moe_matmul, there.name, (x, w, ids, weights, *rest, flag))[0]
        for first, last in ((0, 1), (4, 9)):
            cut = slice(first, last) if up else slice(3 * first, 3 * last)
            sx = None if rest[0] is None else rest[0][cut]
            part = (x[cut], w, ids[first:last], None if up else weights[first:last], sx, rest[1], flag)
            outputs = slice(3 * first, 3 * last) if up else slice(first, last)
            assert torch.equal(answer(moe_matmul, there.name, part)[0], batch[outputs])


def test_the_same_bits_every_time(there: Body, seed: int) -> None:
    for spec in ("w4a16-g64-asym", "w8a8"):
        args = packed(moe_matmul, there.name, made(there, 17, False, spec, seed))
        first = answer(moe_matmul, there.name, args)[0]
        for _ in range(2 if there.name == "triton" and there.where == "cpu" else 20):
            assert torch.equal(first, answer(moe_matmul, there.name, args)[0])


@pytest.mark.parametrize("spec", ["w4a16-g128", "w8a8"])
def test_a_token_that_is_not_finite_poisons_itself_only(there: Body, spec: str, seed: int) -> None:
    for up in (True, False):
        x, w, ids, weights, *rest = made(there, 6, up, spec, seed, routes="ties")
        bad = 4 if up else 3 * 4 + 1  # token 4, or what its second expert was given
        if rest:
            sx = rest[0].clone()
            sx[bad] = float("nan")
            rest = [sx, rest[1]]
        else:
            x = x.clone()
            x[bad, 131] = float("nan")
        out = answer(moe_matmul, there.name, (x, w, ids, weights, *rest))[0]
        finite = torch.isfinite(out).view(6, -1)
        assert not finite[4].any() and finite[[0, 1, 2, 3, 5]].all()
        assert faults(moe_matmul, there.name, (x, w, ids, weights, *rest)) == []


@pytest.mark.parametrize("foreign", [-1, 5, 1 << 30])
def test_an_expert_that_is_not_ours_adds_exactly_nothing(there: Body, foreign: int, seed: int) -> None:
    """Not even NaN of its row or its weight."""
    for m, spec in ((1, "w4a16-g128"), (9, "w4a16-g128"), (1, "w8a8"), (9, "w8a8")):
        x, w, ids, weights, *rest = made(there, m, False, spec, seed, routes="ties")
        options = (*(rest or [None, FP16]), True)  # fewer tokens of an expert must not change the bits of the others
        without, foreigners = weights.clone(), ids.clone()
        without[:, 1], foreigners[:, 1] = 0, foreign
        want = answer(moe_matmul, there.name, (x, w, ids, without, *options))[0]
        x, weights = x.clone(), weights.clone()
        weights[:, 1] = float("nan")
        if not rest:
            x[1::3] = float("nan")
        assert torch.equal(answer(moe_matmul, there.name, (x, w, foreigners, weights, *options))[0], want)
        x, w, ids, _, *rest = made(there, m, True, spec, seed, routes="ties")
        ids[0] = foreign
        if rest:
            rest[0][0] = float("nan")
        out = answer(moe_matmul, there.name, (x, w, ids, None, *rest))[0]
        assert (out[:3] == 0).all() and (m == 1 or (out[3:] != 0).any())


def test_no_tokens_is_no_call(there: Body, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*flat: Any) -> None:
        raise AssertionError("a body was called for no tokens")

    monkeypatch.setitem(moe_matmul._runs, there.name, never)
    for up, shape in ((True, (0, 35)), (False, (0, 70))):
        for spec in ("w4a16-g128", "w8a8"):
            got = answer(moe_matmul, there.name, made(there, 0, up, spec, 0))[0]
            assert got.shape == shape and got.dtype == FP16


def test_rows_that_are_not_contiguous(there: Body, seed: int) -> None:
    for spec in ("w4a16-g128", "w8a8"):
        x, w, ids, _, *rest = made(there, 5, True, spec, seed)
        wide = torch.full((10, 300), 7, dtype=x.dtype, device=x.device)
        wide[::2, 20:276] = x
        want = answer(moe_matmul, there.name, (x, w, ids, None, *rest))[0]
        for view in (wide[::2, 20:276], x.T.contiguous().T):
            spread = ids.to(torch.int64).repeat_interleave(2, 1)[:, ::2]
            assert torch.equal(answer(moe_matmul, there.name, (view, w, spread, None, *rest))[0], want)


@pytest.mark.skipif(moe_matmul.body("cpu").absent("cpu") is not None, reason="the C++ module is not here")
def test_threads_do_not_change_bits_nor_instruction_sets_those_of_int8(seed: int) -> None:
    """40 tokens are whole parts for each thread, one token is its experts' rows for all."""
    for m, up, spec in itertools.product((40, 1), (True, False), ("w8a8", "w4a16-g64-asym")):
        args = packed(moe_matmul, "cpu", made(Body("cpu", "cpu", None), m, up, spec, seed, n=1280, k=512))
        before, found = op.native().isa(), []
        for isa in op.native().isas():
            op.native().force_isa(isa)
            for threads in (1, 2):
                torch.set_num_threads(threads)
                found.append(answer(moe_matmul, "cpu", args)[0])
        op.native().force_isa(before)
        assert all(torch.equal(one, two) for one, two in zip(found[::2], found[1::2], strict=True)), f"{m} {up} {spec}"
        assert spec != "w8a8" or all(torch.equal(found[0], each) for each in found), f"{m} {up} {spec}"


@pytest.mark.skipif(moe_matmul.body("cpu").absent("cpu") is not None, reason="the C++ module is not here")
def test_more_tokens_of_one_expert_than_a_part_holds(seed: int) -> None:
    """257 tokens are two parts of 128 and 129, not one of 256 and a single token that is multiplied another way."""
    here = Body("cpu", "cpu", None)
    args = made(here, 257, True, "w4a16-g128", seed, topk=1, routes="one", k=128)
    assert faults(moe_matmul, "cpu", args) == []
    x, w, ids, _ = args
    want, got = (answer(moe_matmul, "cpu", (rows, w, ids, None))[0] for rows in (x, x.flip(0)))
    assert torch.equal(want, got.flip(0))


# ---- Triton's own parts ----------------------------------------------------------------------------------------------

needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="runs in Triton's interpreter; this file starts it")


@needs_interpreter
@pytest.mark.parametrize(("experts", "pairs", "block_m"), [(1, 1, 16), (3, 50, 16), (20, 7, 16), (6, 300, 64)])
def test_routes_hold_each_pair_once_in_order(experts: int, pairs: int, block_m: int, seed: int) -> None:
    """triton: the counting sort that the kernels are given."""
    from percard.kernels.moe_matmul.tiles import most_blocks, route_kernel

    ids = torch.randint(-1, experts + 1, (pairs,), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    most = most_blocks(pairs, experts, block_m)
    route = torch.full((pairs + 3 * most + 1,), 1 << 29, dtype=torch.int32)
    route_kernel[(experts + 1,)](ids, route, pairs, experts, most, BLOCK_M=block_m, BINS=32, CHUNK=128)
    order, (expert, first, end) = route[:pairs].long(), route[pairs:-1].view(3, most)
    mine = ids.clone().masked_fill_((ids < 0) | (ids >= experts), experts).long()
    assert torch.equal(order, mine.argsort(stable=True))
    blocks, place = int(route[-1]), 0
    assert blocks <= most
    for b in range(blocks):
        taken = mine[order[int(first[b]) : int(end[b])]]
        assert int(first[b]) == place and 1 <= len(taken) <= block_m
        assert (taken == (experts if int(expert[b]) < 0 else int(expert[b]))).all()
        place = int(end[b])
    assert place == pairs


@needs_interpreter
@pytest.mark.parametrize("up", [True, False])
@pytest.mark.parametrize("spec", ["w4a16-g64-asym", "w4a16", "w8a8"])
def test_every_config_gives_the_same_bits(up: bool, spec: str, seed: int) -> None:
    """triton: also those that no heuristic takes."""
    from percard.kernels import tiles
    from percard.kernels.moe_matmul import gpu

    here = Body("triton", "cpu", None)
    args = made(here, 9, up, spec, seed)
    want = answer(moe_matmul, "reference", args)[0]
    flat = CONTRACT.unwrap(*packed(moe_matmul, "triton", args))
    allowed = CONTRACT.tolerance(want, *CONTRACT.unwrap(*args))
    base = gpu.config_for(gpu.Shape(9, 70, 256, flat[9], flat[0].dtype, 5, 3, up), device.H200)
    found = []
    for change in ({}, {"direct": True}, {"block_m": 32}, {"block_n": 64, "block_k": 128, "dots": 2}, {"raster": 1}):
        with poisoned_memory():
            got, launches = gpu.plan(device.H200, *flat, config=replace(base, **change))
            tiles.start(launches, got.device)
        assert bool(((got.float() - want.float()).abs() <= allowed).all()), change
        found.append(got)
    assert all(torch.equal(found[0], each) for each in found)


@needs_interpreter
@pytest.mark.parametrize("spec", ["w4a16-g128", "w8a8"])
def test_experts_beyond_two_to_the_31(spec: str, seed: int) -> None:
    """triton: the second expert begins past 2^31 elements; memory that is never touched is never there."""
    from percard.kernels import tiles
    from percard.kernels.moe_matmul import gpu

    args = made(Body("triton", "cpu", None), 3, True, spec, seed, n=64, k=128, experts=2)
    x, w, ids, *rest = args
    args = (x, w, torch.ones_like(ids), *rest)
    want = answer(moe_matmul, "reference", args)[0]
    flat = list(CONTRACT.unwrap(*packed(moe_matmul, "triton", args)))
    data, stride = flat[2], 2**25 + 64
    try:
        memory = torch.empty(127 * stride + data.shape[2], dtype=data.dtype)
    except RuntimeError as error:
        pytest.skip(f"the machine does not lend that much address space: {error}")
    flat[2] = memory.as_strided(data.shape, (64 * stride, stride, 1))
    flat[2][1].copy_(data[1])
    got, launches = gpu.plan(device.H200, *flat)
    tiles.start(launches, got.device)
    allowed = CONTRACT.tolerance(want, *CONTRACT.unwrap(*args))
    assert bool(((got.float() - want.float()).abs() <= allowed).all())


OF_TRITON = "triton or routes_hold or every_config or beyond_two"


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreted process")
def test_in_the_interpreter(run_interpreted: Callable[..., str]) -> None:
    run_interpreted(Path(__file__), "-x", "-k", OF_TRITON)


@pytest.mark.full
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreted process")
def test_in_the_interpreter_of_the_oldest(run_interpreted: Callable[..., str], oldest_triton: Path) -> None:
    run_interpreted(Path(__file__), "-x", "-k", OF_TRITON, triton=oldest_triton)


@pytest.mark.gpu
def test_a_graph_serves_any_route(seed: int) -> None:
    """Captured once, replayed with other tokens and other experts."""
    here = Body("triton", "cuda", None)
    for m in (1, 16):
        x, w, ids, weights = packed(moe_matmul, "triton", made(here, m, False, "w4a16-g128", seed))
        moe_matmul(x, w, ids, weights)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = moe_matmul(x, w, ids, weights)
        for change in ((0, 4), (-1, 1)):
            x.normal_()
            ids.random_(*change)
            graph.replay()
            assert torch.equal(y, moe_matmul(x, w, ids, weights))


# ---- Configs, pure ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed; pip install triton")
def test_every_config_is_one_that_the_kernels_can_run() -> None:
    from percard.kernels.inspection import ARCHS
    from percard.kernels.moe_matmul import gpu

    for case in cases.CASES:
        for arch, card in ARCHS.items():
            shape = gpu.shape_of(case)
            for c in (gpu.config_for(shape, card), gpu.invariant(shape, card), *gpu.candidates(shape, card)):
                padded = -(-case.k // 128) * 128
                assert padded % c.block_k == 0 and c.block_k % (128 if case.spec != "w8a8" else 64 * c.dots) == 0
                assert c.block_n in (64, 128, 256) and c.block_m in (16, 32, 64) and c.num_warps in (4, 8)
                if arch == "sm_100" and case.spec != "w8a8":
                    assert c.block_n * c.block_m <= 128 * 64, "larger tiles are a bare trap in Triton 3.6"
            assert gpu.invariant(shape, card) == gpu.invariant(shape._replace(m=1), card)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed; pip install triton")
def test_few_pairs_are_not_sorted_and_blocks_are_narrow() -> None:
    from percard.kernels.moe_matmul import gpu
    from percard.kernels.moe_matmul.tiles import most_blocks

    def chosen(m: int) -> Any:
        return gpu.config_for(gpu.Shape(m, 1536, 2048, 128, BF16, 128, 8, True), device.H200)

    assert [(chosen(m).direct, chosen(m).block_m) for m in (1, 4, 5, 16, 128, 256, 512, 4096)] == [
        (True, 16), (True, 16), (False, 16), (False, 16), (False, 16), (False, 32), (False, 64), (False, 64)
    ]  # fmt: skip
    assert most_blocks(8, 128, 16) == 8 and most_blocks(1000, 3, 16) == 4 + 996 // 16 and most_blocks(0, 4, 16) == 0
