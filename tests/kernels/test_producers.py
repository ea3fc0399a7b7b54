"""rmsnorm_quantize and silu_mul_quantize: against their references, against the unfused path, and all bodies together.

Triton's bodies run on a card, or in its interpreter: test_in_the_interpreter starts this file again in a process of its own.
The interpreter cuts bf16 off instead of rounding it, so bf16 is left to the card.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from percard.kernels import device, op, rows
from percard.kernels.conformance import answer, faults
from percard.kernels.quantize_rows import quantize_rows
from percard.kernels.rmsnorm_quantize import cases as rmsnorm_cases
from percard.kernels.rmsnorm_quantize import rmsnorm_quantize
from percard.kernels.silu_mul_quantize import cases as silu_cases
from percard.kernels.silu_mul_quantize import silu_mul_quantize

from .conftest import only, unserved

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
BOTH = ("rmsnorm_quantize", "silu_mul_quantize")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def draw(body: Any, m: int, k: int, seed: int, dtype: torch.dtype = FP16, residual: bool = True) -> tuple:
    """Random arguments of a body's op; the result has k columns."""
    case = rmsnorm_cases.tiny(m, k, dtype, residual and body.op is rmsnorm_quantize)
    return body.cases.inputs(case, seed, body.where)


def with_x(args: tuple, x: torch.Tensor) -> tuple:
    return (x, *args[1:])


@only(*BOTH)
def test_small_cases(body: Any, seed: int, subtests: pytest.Subtests) -> None:
    for case in body.cases.SMALL:
        if unserved(body, case.dtype) or (
            body.name == "triton" and body.where == "cpu" and case.k > 20000 and seed % 4
        ):
            continue  # the interpreter takes its time over the longest rows: in one run of four
        with subtests.test(case.name):
            assert faults(body.op, body.name, body.cases.inputs(case, seed, body.where)) == []


@pytest.mark.gpu
@only(*BOTH)
def test_real_cases_on_a_card(body: Any, seed: int, subtests: pytest.Subtests) -> None:
    for case in body.cases.CASES:
        with subtests.test(case.name):
            assert faults(body.op, body.name, body.cases.inputs(case, seed, body.where)) == []


@only(*BOTH)
@pytest.mark.parametrize("k", [1, 3, 15, 16, 17, 63, 65, 127, 129, 1000])
def test_odd_widths(body: Any, k: int, seed: int) -> None:
    for dtype in (FP16, BF16, FP32):
        if not unserved(body, dtype):
            assert faults(body.op, body.name, draw(body, 3, k, seed, dtype)) == []
            assert faults(body.op, body.name, draw(body, 2, k, seed, dtype, residual=False)) == []


@only(*BOTH)
def test_no_rows_is_no_call(body: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*flat: Any) -> None:
        raise AssertionError("a body was called for M = 0")

    monkeypatch.setitem(body.op._runs, body.name, never)
    want, got = (answer(body.op, name, draw(body, 0, 40, 0)) for name in ("reference", body.name))
    assert [(t.shape, t.dtype) for t in got] == [(t.shape, t.dtype) for t in want]
    assert got[0].shape == (0, 40) and got[1].shape == got[2].shape == (0,)


@only(*BOTH)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_poisons_itself_only(body: Any, value: float, seed: int) -> None:
    args = draw(body, 6, 256, seed)
    clean = answer(body.op, body.name, args)
    for column in (0, 131, args[0].shape[1] - 1):
        x = args[0].clone()
        x[4, column] = value
        out = answer(body.op, body.name, with_x(args, x))
        assert out[1][4].isnan() and not out[0][4].any() and out[2][4] == 0
        for got, want in zip(out, clean, strict=True):
            assert torch.equal(got[[0, 1, 2, 3, 5]], want[[0, 1, 2, 3, 5]])
        assert faults(body.op, body.name, with_x(args, x)) == []


@only("rmsnorm_quantize")
def test_a_residual_that_is_not_finite_and_a_sum_that_overflows(body: Any, seed: int) -> None:
    x, weight, eps, residual = draw(body, 3, 70, seed)
    residual = residual.clone()
    residual[0, 69] = float("nan")
    x = x.clone()
    x[1, 3], residual[1, 3] = 60000, 60000  # fp16 ends at 65504
    out = answer(body.op, body.name, (x, weight, eps, residual))
    assert out[1].isnan().tolist() == [True, True, False]
    assert out[3][1, 3].isinf()
    assert faults(body.op, body.name, (x, weight, eps, residual)) == []


@only(*BOTH)
def test_rows_of_zeros(body: Any, seed: int) -> None:
    args = draw(body, 5, 200, seed, residual=False)
    x = args[0].clone()
    x[[0, 3]] = 0
    q, scale, row_sum = answer(body.op, body.name, with_x(args, x))[:3]
    assert not q[[0, 3]].any() and (scale[[0, 3]] == 1).all() and not row_sum[[0, 3]].any()
    assert q[1].any() and faults(body.op, body.name, with_x(args, x)) == []


@only(*BOTH)
@pytest.mark.parametrize("size", [1e-30, 1e-6, 1e4, 1e30])
def test_extreme_sizes(body: Any, size: float, seed: int) -> None:
    """In fp32; at 1e30 the squares overflow, and the norm is a row of zeros as torch's is."""
    args = draw(body, 4, 256, seed, FP32)
    x = args[0] * size
    if body.op is rmsnorm_quantize:
        args = (*args[:3], args[3] * size)
    assert faults(body.op, body.name, with_x(args, x)) == []


@only(*BOTH)
def test_rows_that_are_not_contiguous(body: Any, seed: int) -> None:
    args = draw(body, 5, 256, seed)
    x = args[0]
    wide = torch.full((10, x.shape[1] + 44), 7, dtype=x.dtype, device=x.device)
    wide[::2, 20 : 20 + x.shape[1]] = x
    views = (wide[::2, 20 : 20 + x.shape[1]], x.T.contiguous().T, x[:1].expand(5, -1), x.flip(0))
    for i, view in enumerate(views):
        want = answer(body.op, body.name, with_x(args, view.contiguous()))
        got = answer(body.op, body.name, with_x(args, view))
        assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True)), f"view {i}"
    if body.op is rmsnorm_quantize:
        want = answer(body.op, body.name, (*args[:3], views[0].contiguous()))
        got = answer(body.op, body.name, (*args[:3], views[0]))
        assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


@only(*BOTH)
def test_a_row_alone_has_the_same_bits_as_in_a_batch_and_every_time(body: Any, seed: int) -> None:
    args = draw(body, 17, 257, seed)
    batch = answer(body.op, body.name, args)
    for row in (0, 16):
        mine = tuple(a[row : row + 1] if isinstance(a, torch.Tensor) and a.ndim == 2 else a for a in args)
        alone = answer(body.op, body.name, mine)
        assert all(torch.equal(a[0], b[row]) for a, b in zip(alone, batch, strict=True))
    for _ in range(2 if INTERPRETED else 100):
        assert all(torch.equal(a, b) for a, b in zip(batch, answer(body.op, body.name, args), strict=True))


@only(*BOTH)
def test_row_sums_are_those_of_the_codes(body: Any, seed: int) -> None:
    q, _, row_sum = answer(body.op, body.name, draw(body, 9, 1031, seed))[:3]
    assert torch.equal(row_sum, q.sum(1, dtype=torch.int32)) and (q.abs().amax(1) == 127).all()


@only("rmsnorm_quantize")
def test_bodies_take_rounded_steps_where_the_sum_of_squares_is_exact(body: Any, seed: int) -> None:
    """Whole numbers up to 8: any order of the sum gives the same number, and all else is rounded once."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randint(-8, 9, (7, 900), generator=random).to(FP16).to(body.where)
    residual = torch.randint(-8, 9, (7, 900), generator=random).to(FP16).to(body.where)
    weight = torch.randn(900, generator=random).to(FP16).to(body.where)
    for given in (None, residual):
        got = answer(body.op, body.name, (x, weight, 1e-5, given))
        r = (x if given is None else x + given).float().cpu()
        root = (r.square().sum(1, keepdim=True) / torch.tensor(900.0) + 1e-5).sqrt()
        y = (r * (torch.ones_like(root) / root) * weight.float().cpu()).to(FP16)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(got, rows.quantize(y.float()), strict=False))


@only("silu_mul_quantize")
def test_bodies_other_than_the_reference_have_the_bits_of_one_polynomial(body: Any, seed: int) -> None:
    for dtype in (FP16, BF16, FP32):
        if unserved(body, dtype):
            continue
        x = draw(body, 5, 640, seed, dtype)[0]
        gate, up = x.float().cpu().chunk(2, 1)
        s = (gate / (1 + polynomial(-gate))).to(dtype).float()
        want = rows.quantize((s * up).to(dtype).float())
        got = answer(body.op, body.name, (x,))
        assert all(torch.equal(a.cpu(), b) for a, b in zip(got, want, strict=True)), dtype


def polynomial(x: torch.Tensor) -> torch.Tensor:
    """exp of fp32 as csrc/silu.h and tiles.exp have it, in torch."""
    x = x.clamp(-104, 104)
    n = (x * 1.44269504).round()
    r = (x - n * 0.693359375) - n * -2.12194440e-4
    q = torch.full_like(x, float.fromhex("0x1.6a23cep-10"))
    for c in ("0x1.123a2p-7", "0x1.5558f2p-5", "0x1.555492p-3", "0x1.fffffcp-2"):
        q = q * r + float.fromhex(c)
    half = (n * 0.5).round()
    return (((q * (r * r) + r) + 1.0) * torch.exp2(half)) * torch.exp2(n - half)


def test_the_polynomial_is_within_its_error() -> None:
    x = torch.cat([torch.linspace(-87, 88, 2_000_001), torch.randn(100_000) * 1e-3])
    want = x.double().exp()
    ulp = torch.exp2(torch.floor(torch.log2(want)) - 23)
    assert ((polynomial(x).double() - want).abs() / ulp).max() < 1.51
    ends = polynomial(torch.tensor([-1e4, -104.0, 0.0, 88.73, 1e4]))
    assert ends[0] <= 1e-45 and ends[2] == 1 and ends[3:].isinf().all()


@pytest.mark.parametrize("dtype", [FP16, BF16, FP32])
def test_the_reference_has_the_bits_of_the_unfused_path(dtype: torch.dtype, seed: int) -> None:
    for m, k in ((300, 64), (70, 1031), (20, 5120)):
        x, weight, eps, residual = rmsnorm_cases.inputs(rmsnorm_cases.tiny(m, k, dtype, True), seed)
        for given in (None, residual):
            *made, r = rmsnorm_quantize(x, weight, eps, given, impl="reference")
            total = x if given is None else x.clone().add_(given)
            want = quantize_rows(F.rms_norm(total, (k,), weight, eps), impl="reference")
            assert all(torch.equal(a, b) for a, b in zip(made, want, strict=True))
            assert torch.equal(r, total) if given is not None else r.shape == (0, k)
        (gate_up,) = silu_cases.inputs(rmsnorm_cases.tiny(m, k, dtype), seed)
        want = quantize_rows(F.silu(gate_up[:, :k]).mul_(gate_up[:, k:]), impl="reference")
        made = silu_mul_quantize(gate_up, impl="reference")
        assert all(torch.equal(a, b) for a, b in zip(made, want, strict=True))


@only(*BOTH)
def test_fused_and_unfused_agree_but_for_borders(body: Any, seed: int) -> None:
    """The served body against the same quantize_rows behind torch's norm and SiLU: nearly all codes are equal."""
    for dtype in (FP16, BF16, FP32):
        if unserved(body, dtype):
            continue
        args = draw(body, 16, 1024, seed, dtype)
        if body.op is rmsnorm_quantize:
            x, weight, eps, residual = args
            y = F.rms_norm(x + residual, (1024,), weight, eps)
        else:
            gate, up = args[0].chunk(2, 1)
            y = F.silu(gate) * up
        got, want = answer(body.op, body.name, args)[0], quantize_rows(y, impl=body.name)[0]
        assert (got != want).float().mean() < 2e-3 and (got.int() - want.int()).abs().max() <= 2


@pytest.mark.skipif(not INTERPRETED, reason="runs in Triton's interpreter")
@pytest.mark.parametrize("name", BOTH)
def test_triton_gives_the_same_with_a_row_at_once_and_in_parts(name: str, seed: int) -> None:
    gpu = importlib.import_module(f"percard.kernels.{name}.gpu")
    the_op, cases = {"rmsnorm_quantize": (rmsnorm_quantize, rmsnorm_cases)}.get(name, (silu_mul_quantize, silu_cases))
    args = cases.inputs(rmsnorm_cases.tiny(3, 700, FP16, name == "rmsnorm_quantize"), seed)
    found = []
    for block in (128, 256, 1024, 2048):

        def run(*flat: Any, block: int = block) -> Any:
            out = gpu.run(*flat, card=device.H200, config=gpu.Config(block, 4))
            found.append(out)
            return out

        assert faults(the_op, "triton", args, run) == [], block
    if name == "silu_mul_quantize":  # without a sum there is nothing that a block could change
        assert all(torch.equal(a, b) for out in found[1:] for a, b in zip(found[0], out, strict=True))


def test_all_instruction_sets_have_scalars_bits(seed: int) -> None:
    try:
        native = op.native()
    except op.Unsupported as error:
        pytest.skip(str(error))
    before = native.isa()
    try:
        for m, k in ((1, 1), (3, 15), (2, 16), (5, 63), (4, 64), (7, 1000), (3, 4099)):
            for dtype in (FP16, BF16, FP32):
                case = rmsnorm_cases.tiny(m, k, dtype, True)
                norm, silu = rmsnorm_cases.inputs(case, seed), silu_cases.inputs(case, seed)
                norm[0][m // 2], silu[0][m // 3] = 0, torch.finfo(dtype).max
                silu[0][0, 0] = -95.0
                found = []
                for isa in native.isas():
                    native.force_isa(isa)
                    found.append((*rmsnorm_quantize(*norm, impl="cpu"), *silu_mul_quantize(*silu, impl="cpu")))
                for other in found[1:]:
                    for a, b in zip(found[0], other, strict=True):
                        bits = {4: torch.int32, 2: torch.int16, 1: torch.int8}[a.element_size()]
                        assert torch.equal(a.view(bits), b.view(bits))
    finally:
        native.force_isa(before)


def test_threads_do_not_change_a_bit(seed: int) -> None:
    if rmsnorm_quantize.body("cpu").absent("cpu") is not None:
        pytest.skip("the C++ module is not here")
    norm = rmsnorm_cases.inputs(rmsnorm_cases.tiny(65, 2048, BF16, True), seed)
    silu = silu_cases.inputs(rmsnorm_cases.tiny(65, 2048, BF16), seed)
    one = (*rmsnorm_quantize(*norm), *silu_mul_quantize(*silu))
    torch.set_num_threads(4)
    many = (*rmsnorm_quantize(*norm), *silu_mul_quantize(*silu))
    assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True))


def test_nothing_is_written_past_the_outputs(seed: int) -> None:
    try:
        native = op.native()
    except op.Unsupported as error:
        pytest.skip(str(error))
    for m, k in ((1, 5), (3, 17), (2, 130)):
        x, weight, eps, residual = rmsnorm_cases.inputs(rmsnorm_cases.tiny(m, k, FP16, True), seed)
        q, r = torch.full((m * k + 64,), 7, dtype=torch.int8), torch.full((m * k + 64,), 7, dtype=FP16)
        scale, sums = torch.empty(m), torch.empty(m, dtype=torch.int32)
        pointers = [t.data_ptr() for t in (x, weight, residual, q, scale, sums, r)]
        native.rmsnorm_quantize(*pointers, m, k, k, k, 2, eps)
        assert (q[m * k :] == 7).all() and (r[m * k :] == 7).all()
        (gate_up,) = silu_cases.inputs(rmsnorm_cases.tiny(m, k, FP16), seed)
        native.silu_mul_quantize(*(t.data_ptr() for t in (gate_up, q, scale, sums)), m, k, 2 * k, 2)
        assert (q[m * k :] == 7).all()


@only(*BOTH)
def test_opcheck_and_compile(body: Any, seed: int) -> None:
    if body.where == "cpu" and body.name == "triton":
        return  # the interpreter cannot be traced; what is traced is the same for every body
    for residual in (True, False):
        args = draw(body, 6, 128, seed, residual=residual)
        flat = body.op.contract.unwrap(*args)
        torch.library.opcheck(body.op._torch_ops[body.name], flat)
        torch.library.opcheck(body.op.torch_op, flat)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: body.op(*a), fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(body.op(*args), compiled(*args), strict=True))


@pytest.mark.gpu
@only(*BOTH)
def test_graph_capture_and_replay_with_new_inputs(body: Any, seed: int) -> None:
    args, other = draw(body, 16, 512, seed), draw(body, 16, 512, seed + 1)
    body.op(*args)  # compiles outside of the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = body.op(*args)
    for mine, new in zip(args, other, strict=True):
        if isinstance(mine, torch.Tensor):
            mine.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(body.op(*args), out, strict=True))


def test_tolerance_leaves_no_freedom_where_there_is_none() -> None:
    """A reach of nothing is exact; a code may move only where a number lies on a border, or the largest number moves."""
    y = torch.tensor([[1.0, -0.5, 0.25, 0.0], [127.0, 63.5, 1.2, -3.0]])
    want = rows.quantize(y)
    codes, scale, sums = rows.reach(y, y, want)
    assert not codes.any() and not sums.any() and (scale < 2e-7).all()
    codes, _, sums = rows.reach(y - 1e-5, y + 1e-5, want)
    assert codes.tolist() == [[0, 1, 0, 0], [0, 1, 0, 0]] and sums.tolist() == [1, 1]  # -63.5 and 63.5
    assert rows.reach(y * 0.9, y * 1.1, want)[1][1] == pytest.approx(0.2, rel=1e-4)


X = torch.zeros(3, 8, dtype=FP16)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: rmsnorm_quantize(X[0], X[0]), r"x has shape \(8,\), expected \[M, K\].*flatten"),
        (lambda: rmsnorm_quantize(X.int(), X[0]), "x is torch.int32, expected bfloat16"),
        (lambda: rmsnorm_quantize(X, X[0].float()), "weight is torch.float32.*cast it once at load"),
        (lambda: rmsnorm_quantize(X, X[0, :4]), r"weight is torch.float16 \(4,\)"),
        (lambda: rmsnorm_quantize(X, X[0], 1e-6, X[:2]), r"residual is torch.float16 \(2, 8\)"),
        (lambda: rmsnorm_quantize(X, X[0], 1e-6, X.float()), "residual is torch.float32"),
        (lambda: rmsnorm_quantize(X, X[0], -1.0), "eps is -1.0"),
        (lambda: rmsnorm_quantize(X, X[0].to("meta")), "weight is on meta"),
        (lambda: silu_mul_quantize(X[0]), r"x has shape \(8,\), expected \[M, 2 I\]"),
        (lambda: silu_mul_quantize(X[:, :7]), r"x has shape \(3, 7\)"),
        (lambda: silu_mul_quantize(X.double()), "x is torch.float64"),
    ],
)
def test_refusals(call: Callable[[], Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreted process")
def test_in_the_interpreter(run_interpreted: Callable[..., str]) -> None:
    """This file again with Triton's bodies."""
    said = run_interpreted(Path(__file__), "-k", "triton")
    passed = re.search(r"(\d+) passed", said)
    assert passed and int(passed[1]) >= 30, said[-500:]
