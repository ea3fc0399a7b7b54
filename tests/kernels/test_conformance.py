"""Every op x body x case against the op's reference, in the op's own tolerance, on fresh random inputs.

Triton's bodies run on a card (`make test-gpu`: all of these tests, and the real shapes); without one they run in Triton's
interpreter, in a process of their own (test_interpreter.py). By hand: TRITON_INTERPRET=1 pytest tests/kernels/test_conformance.py -k triton
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from percard.formats.spec import QuantSpec
from percard.formats.tensor import QuantTensor
from percard.kernels import shapes
from percard.kernels.conformance import answer, faults, packed, poisoned_memory
from percard.kernels.shapes import Case

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
INT8 = ("matmul_w8a8", "matmul_w4a8")
A16 = ("matmul_w4a16", "matmul_w8a16")
MATMULS = ("matmul_w8a8", *A16, "matmul_w4a8")
SPECS = {
    "quantize_rows": ("",),
    "matmul_w8a8": ("w8a8",),
    "matmul_w4a16": ("w4a16", "w4a16-g32", "w4a16-g64-asym", "w4a16-g128", "w4a16-asym"),
    "matmul_w8a16": ("w8a16", "w8a16-g32-asym", "w8a16-g64", "w8a16-asym", "w8a16-g128"),
    "matmul_w4a8": ("w4a8", "w4a8-g32", "w4a8-g64", "w4a8-g128"),
}


def only(*ops: str) -> Callable[[Callable], Callable]:
    """A test for some ops; conftest.py reads it."""

    def mark(test: Callable) -> Callable:
        test.ops = ops  # type: ignore[attr-defined]
        return test

    return mark


def unserved(body: Any, case: Case) -> str | None:
    """Why a Triton body is not asked for a case: types that it does not take, types that the interpreter gets wrong."""
    if body.name != "triton":
        return None
    if body.op.name in A16 and case.dtype == FP32:
        return f"{body.op.name} triton multiplies 16-bit activations"
    if body.where == "cpu" and case.dtype == BF16:
        return "Triton's interpreter multiplies the bit patterns of bf16 (triton#11584); bf16 runs on a card"
    return None


def check(body: Any, case: Case, seed: int) -> None:
    reason = unserved(body, case)
    if reason is not None:
        pytest.skip(reason)
    assert faults(body.op, body.name, body.cases.inputs(case, seed, body.where)) == [], f"{case.name}, seed {seed}"


def inputs(body: Any, m: int, n: int, k: int, seed: int, spec: str | None = None, bias: bool = False) -> tuple:
    """Random fp16 arguments of a body's op; the interpreter is at home in fp16."""
    spec = SPECS[body.op.name][-1 if k % 128 == 0 else 0] if spec is None else spec
    return body.cases.inputs(shapes.small(m, n, k, spec, FP16, bias), seed, body.where)


def weight_of(args: tuple) -> QuantTensor:
    return next(a for a in args if isinstance(a, QuantTensor))


def with_weight(args: tuple, **changes: Any) -> tuple:
    return tuple(replace(a, **changes) if isinstance(a, QuantTensor) else a for a in args)


def test_the_body_is_here(any_body: Any) -> None:
    """Says once which bodies this machine cannot show, and why; all other tests run for those that are here."""
    reason = any_body.op.body(any_body.name).absent(any_body.where)
    if reason is not None:
        pytest.skip(f"{any_body}: {reason}")
    assert any_body.op.body_on(any_body.where, any_body.name).name == any_body.name


def test_small_cases(body: Any, seed: int, subtests: pytest.Subtests) -> None:
    for case in body.cases.SMALL:
        if unserved(body, case) is None:
            with subtests.test(case.name):
                check(body, case, seed)


@pytest.mark.parametrize("m", [1, 2, 15, 17, 31, 33, 64])
def test_each_side_of_every_batch_size(body: Any, m: int, seed: int) -> None:
    assert faults(body.op, body.name, inputs(body, m, 80, 256, seed)) == []


@pytest.mark.parametrize(("n", "k"), [(1, 1), (1, 127), (2, 129), (67, 3), (13, 255)])
def test_odd_sizes(body: Any, n: int, k: int, seed: int) -> None:
    assert faults(body.op, body.name, inputs(body, 3, n, k, seed, bias=True)) == []


def test_no_rows_is_no_call(body: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*flat: Any) -> None:
        raise AssertionError("a body was called for M = 0")

    monkeypatch.setitem(body.op._runs, body.name, never)
    for k in (5, 128):
        want, got = (answer(body.op, name, inputs(body, 0, 9, k, 0)) for name in ("reference", body.name))
        assert [(t.shape, t.dtype) for t in got] == [(t.shape, t.dtype) for t in want]
        assert got[0].shape[0] == 0


def test_every_code(body: Any, seed: int) -> None:
    if body.op.name == "quantize_rows":
        x = torch.arange(-127.0, 128.0).expand(4, -1) * torch.tensor([[1e-8], [0.01], [1], [1e4]])
        q = answer(body.op, body.name, (x.to(body.where),))[0]
        assert torch.equal(q.cpu(), torch.arange(-127, 128, dtype=torch.int8).expand(4, -1))
        return
    for spec in SPECS[body.op.name]:
        quant = QuantSpec.parse(spec)
        codes = torch.arange(quant.qmin, quant.qmax + 1, dtype=torch.int8, device=body.where)
        args = inputs(body, 2, 2 * len(codes), 256, seed, spec)
        rows = torch.stack([codes.roll(i).repeat(256 // len(codes)) for i in range(2 * len(codes))])
        args = with_weight(args, data=rows.contiguous())
        if not quant.symmetric:  # every zero point with every code
            zero = codes.repeat(2)[:, None].expand(-1, quant.groups(256)).contiguous()
            args = with_weight(args, zero=zero)
        assert faults(body.op, body.name, args) == [], spec


@only(*MATMULS)
@pytest.mark.parametrize("size", [1e-8, 1e4, "spread", 0.0])
def test_extreme_weight_scales(body: Any, size: float | str, seed: int) -> None:
    for spec in SPECS[body.op.name]:
        args = inputs(body, 5, 70, 256, seed, spec, bias=size == 0.0)
        scale = weight_of(args).scale.float()
        decades = torch.linspace(-8, 4, 70, device=scale.device)[:, None]
        scale = scale * 10**decades if size == "spread" else torch.full_like(scale, size)
        args = with_weight(args, scale=scale.to(BF16))
        # Large scales leave the range of fp16; fp32 tells right from wrong there. Triton takes 16-bit x for w4a16.
        if body.op.name in INT8:
            args = (*args[:-1], FP32)
        elif body.name != "triton":
            args = (args[0].float(), *args[1:])
        else:
            args = (args[0] * 1e-3, *args[1:])
        assert faults(body.op, body.name, args) == [], spec


@pytest.mark.parametrize("size", [1e-8, 1e4])
def test_extreme_activation_scales(body: Any, size: float, seed: int) -> None:
    args = inputs(body, 5, 70, 256, seed)
    if body.op.name in INT8:
        args = (args[0], torch.full_like(args[1], size), *args[2:-1], FP32)
    elif body.op.name == "quantize_rows":
        args = (args[0].float() * size,)
    else:
        args = (args[0] * (1e-4 if size < 1 else 100.0), *args[1:])
    assert faults(body.op, body.name, args) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_poisons_itself_only(body: Any, value: float, seed: int) -> None:
    args = inputs(body, 6, 70, 256, seed)
    if body.op.name in INT8:
        sx = args[1].clone()
        sx[4] = float("nan")  # what quantize_rows returns for such a row
        args = (args[0], sx, *args[2:])
        out = answer(body.op, body.name, args)[0]
    else:
        x = args[0].clone()
        x[4, 131] = value
        args = (x, *args[1:])
        out = answer(body.op, body.name, args)[1 if body.op.name == "quantize_rows" else 0]
    finite = torch.isfinite(out)
    assert not finite[4].any()
    assert finite[[0, 1, 2, 3, 5]].all()
    assert faults(body.op, body.name, args) == []


def test_rows_of_zeros(body: Any, seed: int) -> None:
    args = inputs(body, 6, 70, 256, seed)
    x = args[0].clone()
    x[1], x[5] = 0, 0
    if body.op.name == "matmul_w4a8":
        args = (x, args[1], x.sum(1, dtype=torch.int32), *args[3:])
    else:
        args = (x, *args[1:])
    assert faults(body.op, body.name, args) == []
    out = answer(body.op, body.name, args)
    assert (out[0][[1, 5]] == 0).all()
    if body.op.name == "quantize_rows":
        assert (out[1][[1, 5]] == 1).all()


@only("quantize_rows")
def test_quantize_rows_at_the_ends_of_its_range(body: Any) -> None:
    x = torch.zeros(7, 131)
    x[0, 3], x[1, 130], x[2, 0] = 1e-38, 3.3e38, -(2.0**-100)
    x[3, 64], x[4] = 2.0**-101, 3.3e38
    x[5] = torch.arange(131) - 65.5  # 127 / absmax of many halves
    x[6], x[6, 7] = 1.0, 3e4  # one column that stands out
    x = x.to(body.where)
    assert faults(body.op, body.name, (x,)) == []
    q, scale, row_sum = answer(body.op, body.name, (x,))
    assert q[0].eq(0).all() and scale[0] == 1  # below 2^-100 counts as zero
    assert q[2, 0] == -127 and q.min() >= -127
    assert torch.equal(row_sum, q.sum(1, dtype=torch.int32))


def test_rows_that_are_not_contiguous(body: Any, seed: int) -> None:
    args = inputs(body, 5, 70, 256, seed)
    x = args[0]
    wide = torch.full((10, 300), 7, dtype=x.dtype, device=x.device)
    wide[::2, 20:276] = x
    views = (wide[::2, 20:276], x.T.contiguous().T, x[:1].expand(5, -1), x[::2], x.flip(0))
    for i, view in enumerate(views):
        rest = args[1:]
        if body.op.name in INT8:
            sx = rest[0].repeat_interleave(3)[::3][: view.shape[0]]
            rest = (sx, *rest[1:])
        if body.op.name == "matmul_w4a8":
            rest = (rest[0], view.sum(1, dtype=torch.int32).repeat_interleave(2)[::2], *rest[2:])
        whole = tuple(a.contiguous() if isinstance(a, torch.Tensor) else a for a in (view, *rest))
        want, got = answer(body.op, body.name, whole), answer(body.op, body.name, (view, *rest))
        assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True)), f"view {i}"


@only("quantize_rows", *INT8)
def test_a_row_alone_has_the_same_bits_as_in_a_batch(body: Any, seed: int) -> None:
    """Always where sums are int32: quantize_rows, W8A8, and W4A8 with one scale per row."""
    for m in (2, 5, 17, 40):
        args = inputs(body, m, 70, 257, seed, SPECS[body.op.name][0])
        batch = answer(body.op, body.name, args)
        row = m - 1
        rows = {"quantize_rows": 1, "matmul_w8a8": 2, "matmul_w4a8": 3}[body.op.name]
        alone = answer(body.op, body.name, tuple(a[row : row + 1] for a in args[:rows]) + args[rows:])
        assert all(torch.equal(a[0], b[row]) for a, b in zip(alone, batch, strict=True))


def test_the_same_bits_every_time(body: Any, seed: int) -> None:
    args = packed(body.op, body.name, inputs(body, 9, 70, 512, seed))
    first = answer(body.op, body.name, args)
    for _ in range(3 if body.where == "cpu" and body.name == "triton" else 20):
        assert all(torch.equal(a, b) for a, b in zip(first, answer(body.op, body.name, args), strict=True))


@only(*INT8)
def test_int8_sums_are_exact(body: Any, seed: int) -> None:
    args = inputs(body, 3, 33, 640, seed, SPECS[body.op.name][0])
    weight = weight_of(args)
    args = with_weight(args, scale=torch.ones_like(weight.scale))
    args = (args[0], torch.ones_like(args[1]), *args[2:-1], FP32)
    want = args[0].cpu().to(torch.int32) @ weight.data.cpu().to(torch.int32).T
    assert torch.equal(answer(body.op, body.name, args)[0].cpu(), want.float())


@only("matmul_w4a8")
@pytest.mark.parametrize("group", [32, 64, 128])
def test_two_level_sums_are_exact(body: Any, group: int, seed: int) -> None:
    """Every code times every m = 1..16, in int32 over all of K: a row alone and each shard have the bits of the whole."""
    k = 16 * group
    args = inputs(body, 18, 40, k, seed, f"w4a8-g{group}", bias=False)
    codes = torch.arange(-8, 8, dtype=torch.int8, device=body.where)
    rows = torch.stack([codes.roll(i).repeat(k // 16) for i in range(40)])
    m = torch.stack([torch.arange(1, 17, device=body.where).roll(i) for i in range(40)])
    args = with_weight(args, data=rows.contiguous(), scale=(m * 2.0**-6).to(BF16))
    args = (args[0], torch.ones_like(args[1]), *args[2:-1], FP32)
    assert faults(body.op, body.name, args) == []
    whole = rows.cpu().int() * m.cpu().int().repeat_interleave(group, 1)
    assert int(whole.min()) == -128 and int(whole.max()) == 112
    want = (args[0].cpu().int() @ whole.T).float() * 2.0**-6
    got = answer(body.op, body.name, args)[0].cpu()
    assert torch.equal(got, want)
    for first, last in ((0, 1), (3, 7), (17, 18)):
        alone = answer(body.op, body.name, (*(a[first:last] for a in args[:3]), *args[3:]))[0].cpu()
        assert torch.equal(alone, want[first:last])
    assert weight_of(packed(body.op, body.name, args)).scale.shape[0] == 17


def shards(weight: QuantTensor, parts: int) -> Iterator[tuple[slice, slice, QuantTensor]]:
    """(rows, columns, weight) of a tensor-parallel split by rows, then of one by columns at borders of groups."""
    n, k = weight.shape
    group = weight.spec.group or 1
    for i in range(parts):
        rows, columns = slice(n * i // parts, n * (i + 1) // parts), slice(0, k)
        zero = None if weight.zero is None else weight.zero[rows].contiguous()
        shape, codes, scale = (
            (rows.stop - rows.start, k),
            weight.data[rows].contiguous(),
            weight.scale[rows].contiguous(),
        )
        yield rows, columns, QuantTensor(codes, scale, zero, weight.spec, "plain", shape)
    for i in range(parts):
        first, last = (k // group * j // parts for j in (i, i + 1))
        columns = slice(first * group, last * group)
        at = slice(first, last) if weight.spec.group else slice(0, 1)
        zero = None if weight.zero is None else weight.zero[:, at].contiguous()
        codes, scale = weight.data[:, columns].contiguous(), weight.scale[:, at].contiguous()
        shape = (n, columns.stop - columns.start)
        yield slice(0, n), columns, QuantTensor(codes, scale, zero, weight.spec, "plain", shape)


@only(*MATMULS)
@pytest.mark.parametrize("parts", [2, 4, 8])
def test_tensor_parallel_shards(body: Any, parts: int, seed: int) -> None:
    for spec in SPECS[body.op.name][-2:]:
        args = inputs(body, 3, 131, 1024, seed, spec)
        whole = answer(body.op, body.name, args)[0].float()
        for rows, columns, part in shards(weight_of(args), parts):
            x = args[0][:, columns].contiguous()
            mine = tuple(part if isinstance(a, QuantTensor) else a for a in (x, *args[1:]))
            if body.op.name == "matmul_w4a8":
                mine = (*mine[:2], x.sum(1, dtype=torch.int32), *mine[3:])
            assert faults(body.op, body.name, mine) == [], f"{spec} {rows} {columns}"
            if columns == slice(0, 1024) and body.op.name in INT8 and part.spec.group is None:
                assert torch.equal(answer(body.op, body.name, mine)[0].float(), whole[:, rows])


def test_memory_is_poisoned() -> None:
    """The suite would not notice an unwritten output without this."""
    with poisoned_memory():
        assert torch.empty(64).isnan().all()
        assert torch.empty((3, 5), dtype=FP16).isnan().all()
        assert torch.ones(9, dtype=FP32).new_empty(4).isnan().all()
        assert (torch.empty(64, dtype=torch.int8) == 127).all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_opcheck(body: Any, seed: int) -> None:
    if body.where == "cpu" and body.name == "triton":
        return  # the interpreter cannot be traced; what is traced is the same for every body
    for m in (1, 6):
        flat = body.op.contract.unwrap(*packed(body.op, body.name, inputs(body, m, 24, 128, seed, bias=True)))
        torch.library.opcheck(body.op._torch_ops[body.name], flat)
        torch.library.opcheck(body.op.torch_op, flat)


def test_compile_sees_one_opaque_op(body: Any, seed: int) -> None:
    if body.where == "cpu" and body.name == "triton":
        return
    args = packed(body.op, body.name, inputs(body, 5, 24, 128, seed))

    def call(*args: Any) -> Any:
        return body.op(*args)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    want, got = call(*args), compiled(*args)
    want, got = (t if isinstance(t, tuple) else (t,) for t in (want, got))
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


@pytest.mark.gpu
def test_real_cases_on_a_card(body: Any, seed: int, subtests: pytest.Subtests) -> None:
    for case in body.cases.CASES:
        with subtests.test(case.name):
            check(body, case, seed)


@pytest.mark.gpu
def test_graph_capture_and_replay_with_new_inputs(body: Any, seed: int) -> None:
    for m in (1, 16, 130):
        args = packed(body.op, body.name, inputs(body, m, 192, 512, seed))
        other = packed(body.op, body.name, inputs(body, m, 192, 512, seed + 1))
        tensors = [(a, b) for a, b in zip(args, other, strict=True) if isinstance(a, torch.Tensor)]
        body.op(*args)  # compiles outside of the capture
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = body.op(*args)
        for mine, new in tensors:
            mine.copy_(new)
        graph.replay()
        torch.cuda.synchronize()
        want, got = body.op(*args), out
        want, got = (t if isinstance(t, tuple) else (t,) for t in (want, got))
        assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
