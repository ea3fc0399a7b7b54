"""distill_loss: bodies against the reference, the reference against autograd and known numbers, the chunked composite, its memory.

Triton's body runs on a card, or in its interpreter: test_in_the_interpreter starts this file again in a process of its own.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from percard.kernels import op
from percard.kernels.conformance import answer, faults
from percard.kernels.distill import distill_loss
from percard.kernels.distill_loss import cases as distill_cases
from percard.kernels.distill_loss import distill_loss as rows_loss

from .conftest import only, unserved

FP16, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
Z_S, Z_T = torch.tensor([[0.0, 1, 2, 4]]), torch.tensor([[1.0, 0, 2, 3]])
GOLDEN = {  # kind: loss at T = 1, at T = 2, gradient at T = 1
    "fkl": (0.156164, 0.256300, (-0.071925, 0.009312, -0.124426, 0.187038)),
    "rkl": (0.112111, 0.225558, (-0.028264, 0.005912, -0.096388, 0.118740)),
    "jsd": (0.031527, 0.059378, (-0.009504, 0.001721, -0.026793, 0.034576)),
}


def kept(z_t: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The k likeliest ids of each row, their log-probabilities, and that of all others."""
    log_p = torch.log_softmax(z_t.double(), 1)
    logp, ids = log_p.topk(k)
    rest = log_p.scatter(1, ids, -torch.inf).logsumexp(1)
    return ids.int(), logp.float(), rest.float()


@only("distill_loss")
def test_small_cases(body: Any, seed: int, subtests: pytest.Subtests) -> None:
    for case in body.cases.SMALL:
        if not unserved(body, case.dtype):
            with subtests.test(case.name):
                assert faults(body.op, body.name, body.cases.inputs(case, seed, body.where)) == []


@pytest.mark.gpu
@only("distill_loss")
def test_real_cases_on_a_card(body: Any, seed: int, subtests: pytest.Subtests) -> None:
    for case in body.cases.CASES:
        with subtests.test(case.name):
            assert faults(body.op, body.name, body.cases.inputs(case, seed, body.where)) == []


@only("distill_loss")
def test_known_numbers(body: Any) -> None:
    one = torch.ones(1, device=body.where)
    for kind, (at_1, at_2, gradient) in GOLDEN.items():
        for T, want in ((1.0, at_1), (2.0, at_2)):
            z = Z_S.clone().to(body.where)
            loss = body.op(z, one, Z_T.to(body.where), kind=kind, T=T, impl=body.name)
            assert loss[0].tolist() == pytest.approx([want, 0.0], abs=1e-6)
            if T == 1:
                assert z[0].tolist() == pytest.approx(list(gradient), abs=1e-6)
    for beta, want in ((0.1, 0.013248), (0.001, 0.000156), (0.0, 0.156164), (1.0, 0.112111)):
        z = Z_S.clone().to(body.where)
        loss = body.op(z, one, Z_T.to(body.where), kind="jsd", beta=beta, impl=body.name)
        assert float(loss[0, 0]) == pytest.approx(want, abs=1e-6)
    for k, want in ((1, 0.101078), (2, 0.101078), (3, 0.156164), (4, 0.156164)):
        z, cache = Z_S.clone().to(body.where), tuple(t.to(body.where) for t in kept(Z_T, k))
        assert float(body.op(z, one, topk=cache, kind="topk", impl=body.name)[0, 0]) == pytest.approx(want, abs=1e-6)
        if k >= 3:  # nothing is left to the bucket that kept ids do not say
            assert z[0].tolist() == pytest.approx(list(GOLDEN["fkl"][2]), abs=1e-6)


@only("distill_loss")
@pytest.mark.parametrize("vocab", [1, 15, 16, 17, 127, 129, 1023, 1025])
def test_odd_vocabularies(body: Any, vocab: int, seed: int) -> None:
    for kind in ("fkl", "rkl", "jsd", "topk"):
        more = {"kept": min(3, vocab)} if kind == "topk" else {"T": 1.5}
        case = distill_cases.small(3, vocab + 2, kind, vocab=vocab, hard=0.5, **more)
        assert faults(body.op, body.name, body.cases.inputs(case, seed, body.where)) == [], kind


@only("distill_loss")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_poisons_itself_only(body: Any, value: float, seed: int) -> None:
    for kind in ("fkl", "rkl", "jsd", "topk"):
        case = distill_cases.small(5, 300, kind, masked=9, kept=4 if kind == "topk" else 0)
        for of_teacher in (False, True):
            args = body.cases.inputs(case, seed, body.where)
            z = args[2] if of_teacher else args[0]
            if z is None:
                continue
            for column in (131,) if INTERPRETED else (0, 131, 299):
                z[3, column] = value
            assert faults(body.op, body.name, args) == []
            loss, dz = answer(body.op, body.name, args)
            assert loss.isnan().tolist() == [[row == 3] * 2 for row in range(5)]
            assert dz[3].isnan().all() and dz[[0, 1, 2, 4]].isfinite().all()


@only("distill_loss")
def test_a_row_that_counts_nothing_may_hold_anything(body: Any, seed: int) -> None:
    for kind in ("fkl", "rkl", "jsd", "topk"):
        args = body.cases.inputs(distill_cases.small(4, 300, kind, kept=5 if kind == "topk" else 0), seed, body.where)
        args[0][1] = torch.nan  # weight 0
        loss, dz = answer(body.op, body.name, args)
        assert not loss[1].any() and not dz[1].any() and loss[0, 0] > 0 and dz[0].any()


@only("distill_loss")
def test_ids_past_the_vocabulary_have_no_mass(body: Any, seed: int) -> None:
    """Logits there may be anything, even NaN; kept ids there are left out, as negative ones are."""
    for kind in ("fkl", "rkl", "jsd"):
        args = body.cases.inputs(distill_cases.small(3, 140, kind, vocab=120, masked=9), seed, body.where)
        want = answer(body.op, body.name, args)
        for z in (args[0], args[2]):
            z[:, 120:] = torch.nan
        loss, dz = answer(body.op, body.name, args)
        assert torch.equal(loss, want[0]) and torch.equal(dz, want[1]) and not dz[:, 120:].any()
    args = body.cases.inputs(distill_cases.small(3, 140, "topk", vocab=120, kept=6, masked=9), seed, body.where)
    args[3][0][:, 2], args[3][0][:, 4] = -1, 130
    assert faults(body.op, body.name, args) == []


@only("distill_loss")
def test_cross_entropy_is_told_apart_and_without_hard_it_pulls_nothing(body: Any, seed: int) -> None:
    for kind in ("fkl", "rkl", "jsd", "topk"):
        more = {"kept": 4} if kind == "topk" else {"T": 1.5}
        args = body.cases.inputs(distill_cases.small(4, 300, kind, masked=9, hard=0.5, **more), seed, body.where)
        z, weight, labels = args[0].clone(), args[1], args[4]
        told = body.op(z.clone(), *args[1:], impl=body.name)
        alone = body.op(plain := z.clone(), *args[1:4], None, *args[5:-1], 0.0, impl=body.name)
        beside = body.op(labelled := z.clone(), *args[1:-1], 0.0, impl=body.name)
        assert torch.equal(told, beside) and not alone[:, 1].any()
        cross = weight * F.cross_entropy(z, labels, reduction="none")
        for mine, want in ((told[:, 0], alone[:, 0]), (labelled, plain), (told[:, 1], cross)):
            torch.testing.assert_close(mine, want, rtol=1e-5, atol=1e-6)


@only("distill_loss")
def test_rows_that_are_not_contiguous(body: Any, seed: int) -> None:
    for kind in ("fkl", "jsd", "topk"):
        args = body.cases.inputs(distill_cases.small(4, 200, kind, kept=3 if kind == "topk" else 0), seed, body.where)
        want = answer(body.op, body.name, args)
        wide = torch.full((8, 231), 7.0, device=body.where)
        z_s, z_t = wide[::2, 5:205], args[2]
        z_s.copy_(args[0])
        if z_t is not None:
            z_t = torch.cat((args[2], args[2]), 1)[:, :200]
        loss = body.op(z_s, args[1], z_t, *args[3:], impl=body.name)
        assert torch.equal(loss, want[0]) and torch.equal(z_s, want[1])
        assert (wide[1::2] == 7).all() and (wide[:, :5] == 7).all() and (wide[:, 205:] == 7).all()


@only("distill_loss")
def test_a_row_alone_has_the_same_bits_as_in_a_batch_and_every_time(body: Any, seed: int) -> None:
    args = body.cases.inputs(distill_cases.small(6, 1500, "jsd", hard=0.5, masked=9), seed, body.where)
    batch = answer(body.op, body.name, args)
    alone = answer(body.op, body.name, tuple(a[4:5] if isinstance(a, torch.Tensor) else a for a in args))
    assert all(torch.equal(a[0], b[4]) for a, b in zip(alone, batch, strict=True))
    for _ in range(1 if INTERPRETED else 20):
        assert all(torch.equal(a, b) for a, b in zip(batch, answer(body.op, body.name, args), strict=True))


def test_all_instruction_sets_have_scalars_bits(seed: int) -> None:
    try:
        native = op.native()
    except op.Unsupported as error:
        pytest.skip(str(error))
    before = native.isa()
    try:
        for case in distill_cases.SMALL:
            args = distill_cases.inputs(case, seed)
            found = []
            for isa in native.isas():
                native.force_isa(isa)
                found.append(answer(rows_loss, "cpu", args))
            bits = {4: torch.int32, 2: torch.int16}
            for other in found[1:]:
                same = [
                    torch.equal(a.view(bits[a.element_size()]), b.view(bits[a.element_size()]))
                    for a, b in zip(found[0], other, strict=True)
                ]
                assert all(same), case.name
    finally:
        native.force_isa(before)


def test_threads_do_not_change_a_bit(seed: int) -> None:
    if rows_loss.body("cpu").absent("cpu") is not None:
        pytest.skip("the C++ module is not here")
    args = distill_cases.inputs(distill_cases.small(40, 5000, "rkl"), seed)
    one = answer(rows_loss, "cpu", args)
    torch.set_num_threads(4)
    assert all(torch.equal(a, b) for a, b in zip(one, answer(rows_loss, "cpu", args), strict=True))


@only("distill_loss")
def test_opcheck(body: Any, seed: int) -> None:
    if body.where == "cpu" and body.name == "triton":
        return  # the interpreter cannot be traced; what is traced is the same for every body
    for kind in ("fkl", "topk"):
        args = body.cases.inputs(
            distill_cases.small(3, 40, kind, hard=1.0, kept=2 if kind == "topk" else 0), seed, body.where
        )
        torch.library.opcheck(body.op._torch_ops[body.name], body.op.contract.unwrap(*args))
        torch.library.opcheck(body.op.torch_op, body.op.contract.unwrap(*args))


# ---- the reference and the composite ---------------------------------------------------------------------------------


class Fused(torch.autograd.Function):
    """What a training loop makes of the composite: gradients are there with the loss."""

    @staticmethod
    def forward(ctx: Any, x_s: torch.Tensor, w_s: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
        found = distill_loss(x_s, w_s, **arguments)
        ctx.save_for_backward(found.dx_s, found.dw_s)
        return found.loss

    @staticmethod
    def backward(ctx: Any, *flowing: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        dx, dw = ctx.saved_tensors
        return flowing[0] * dx, flowing[0] * dw, None


def drawn(tokens: int, vocab: int, seed: int, dtype: torch.dtype = FP32, hidden: tuple[int, int] = (12, 20)) -> list:
    """x_s, w_s, x_t, w_t, mask, labels"""
    random = torch.Generator().manual_seed(seed)
    sizes = ((tokens, hidden[0]), (vocab, hidden[0]), (tokens, hidden[1]), (vocab + 3, hidden[1]))
    made = [torch.randn(*size, generator=random).to(dtype) for size in sizes]
    mask, labels = torch.rand(tokens, generator=random) < 0.7, torch.randint(0, vocab - 3, (tokens,), generator=random)
    mask[0], mask[1], labels[0] = True, False, -100
    return [*made, mask, labels]


ARGUMENTS = [
    {"kind": "fkl", "T": 2.0, "hard": 0.5},
    {"kind": "rkl", "T": 0.7},
    {"kind": "jsd", "beta": 0.3, "hard": 0.1},
    {"kind": "topk", "hard": 0.25},
    {"kind": "hard", "hard": 1.0},
]


def arguments(given: dict[str, Any], made: list, vocab: int) -> dict[str, Any]:
    """Keyword arguments of the composite: a teacher as `kind` wants one."""
    _, _, x_t, w_t, mask, labels = made
    more = given | {"mask": mask, "labels": labels, "vocab": vocab}
    if given["kind"] == "topk":
        return more | {"topk": kept((x_t @ w_t.T)[:, :vocab], 4)}
    if given["kind"] == "hard":
        return more | {"kind": "fkl"}
    return more | {"x_t": x_t, "w_t": w_t}


@pytest.mark.parametrize("given", ARGUMENTS, ids=lambda g: g["kind"])
def test_gradients_of_the_reference_in_float64(given: dict[str, Any], seed: int) -> None:
    made = drawn(5, 9, seed, FP64, (4, 6))
    more = arguments(given, made, 8) | {"impl": "reference", "chunk_bytes": 2 * 9 * 8}
    x, w = (t.requires_grad_() for t in made[:2])
    assert torch.autograd.gradcheck(lambda x, w: Fused.apply(x, w, more), (x, w), atol=1e-7)


def composition(x: torch.Tensor, w: torch.Tensor, more: dict[str, Any]) -> torch.Tensor:
    """The same loss by torch's own operations, logits and all."""
    vocab, T, mask = more["vocab"], more.get("T", 1.0), more["mask"]
    z = (x @ w.T)[mask][:, :vocab]
    loss = z.new_zeros(())
    if "x_t" in more:
        log_p = torch.log_softmax((more["x_t"] @ more["w_t"].T)[mask][:, :vocab] / T, 1)
        log_q = torch.log_softmax(z / T, 1)
        if more["kind"] == "fkl":
            loss = loss + T * T * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
        elif more["kind"] == "rkl":
            loss = loss + T * T * F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
        else:
            beta = more["beta"]
            log_m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
            first = F.kl_div(log_m, log_p, reduction="batchmean", log_target=True)
            loss = loss + T * T * (
                beta * first + (1 - beta) * F.kl_div(log_m, log_q, reduction="batchmean", log_target=True)
            )
    if "topk" in more:
        ids, logp, log_rest = (t[mask] for t in more["topk"])
        log_q = torch.log_softmax(z, 1)
        mine = log_q.gather(1, ids.long())
        buckets = torch.cat((mine, torch.log1p(-mine.exp().sum(1, keepdim=True))), 1)
        loss = loss + F.kl_div(buckets, torch.cat((logp, log_rest[:, None]), 1), reduction="batchmean", log_target=True)
    if more.get("hard"):
        loss = loss + more["hard"] * F.cross_entropy(z, more["labels"][mask], reduction="sum") / len(z)
    return loss


@pytest.mark.skipif(INTERPRETED, reason="torch's own")
@pytest.mark.parametrize("given", ARGUMENTS, ids=lambda g: g["kind"])
def test_the_composite_against_torchs_composition(given: dict[str, Any], seed: int) -> None:
    """Loss and both gradients; chunks that divide the tokens and chunks that do not give the same."""
    made = drawn(37, 101, seed)
    more = arguments(given, made, 98)
    x, w = (t.clone().requires_grad_() for t in made[:2])
    want = composition(x, w, more)
    want.backward()
    for tokens in (1, 5, 16, 1000):
        x2, w2 = (t.clone().requires_grad_() for t in made[:2])
        got = Fused.apply(x2, w2, more | {"chunk_bytes": tokens * 4 * (101 + (104 if "x_t" in more else 0))})
        got.backward()
        assert got.item() == pytest.approx(want.item(), rel=2e-5)
        for mine, theirs in ((x2, x), (w2, w)):
            assert (mine.grad - theirs.grad).abs().max() <= 1e-4 * theirs.grad.abs().max()
    assert (found := distill_loss(*made[:2], **more, need_dw=False)).dw_s is None
    mask, labels = made[4:]
    cross = F.cross_entropy((x @ w.T)[mask, :98], labels[mask], reduction="sum") / int(mask.sum())
    assert float(found.parts[1]) == pytest.approx(cross.item(), rel=2e-5)
    assert float(found.parts[0] + given.get("hard", 0.0) * found.parts[1]) == pytest.approx(float(found.loss), rel=1e-6)
    halved = distill_loss(*made[:2], **more, count=2 * int(made[4].sum()))
    assert float(halved.loss) == pytest.approx(want.item() / 2, rel=2e-5)


@pytest.mark.skipif(INTERPRETED, reason="torch's own")
def test_bf16_states_and_heads(seed: int) -> None:
    made = drawn(40, 300, seed, BF16, (64, 64))
    more = arguments(ARGUMENTS[0], made, 300)
    x, w = (t.float().requires_grad_() for t in made[:2])
    want = composition(x, w, more | {"x_t": made[2].float(), "w_t": made[3].float()})
    want.backward()
    got = distill_loss(*made[:2], **more, chunk_bytes=20000)
    assert got.dx_s.dtype == BF16 and got.dw_s.dtype == FP32 and got.loss.dtype == FP32
    assert float(got.loss) == pytest.approx(want.item(), rel=2e-2)
    for mine, theirs in ((got.dx_s, x.grad), (got.dw_s, w.grad)):
        assert (mine.float() - theirs).abs().max() <= 2e-2 * theirs.abs().max()


def test_tokens_that_do_not_count_may_hold_anything_and_none_at_all_is_zero(seed: int) -> None:
    made = drawn(9, 30, seed)
    more = arguments(ARGUMENTS[0], made, 30) | {"impl": "reference"}
    want = distill_loss(*made[:2], **more)
    made[0][~made[4]], made[2][~made[4]] = torch.nan, torch.inf
    got = distill_loss(*made[:2], **more)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)) and got.loss > 0
    none = distill_loss(*made[:2], **(more | {"mask": torch.zeros(9, dtype=torch.bool)}))
    assert none.loss == 0 and not none.dx_s.any() and not none.dw_s.any()


def test_topk_rises_with_k_and_never_above_forward_kl(seed: int) -> None:
    made = drawn(6, 40, seed)
    more = arguments(ARGUMENTS[0] | {"T": 1.0, "hard": 0.0}, made, 40) | {"impl": "reference"}
    full = float(distill_loss(*made[:2], **more).loss)
    teacher = (made[2] @ made[3].T)[:, :40]
    more = {key: more[key] for key in ("mask", "vocab", "impl")}
    found = [float(distill_loss(*made[:2], topk=kept(teacher, k), kind="topk", **more).loss) for k in range(1, 41)]
    assert all(a <= b + 1e-6 for a, b in itertools.pairwise(found)) and found[0] < found[-1]
    assert found[-1] == pytest.approx(full, rel=1e-5)


PEAK = """
import json, re, sys, torch
import torch.nn.functional as F
from percard.kernels.distill import distill_loss
ours, tokens, vocab, hidden = sys.argv[1] == "ours", *map(int, sys.argv[2:5])
torch.set_num_threads(1)
def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) * 1024  # getrusage begins at the parent's
def go(n, v, h):
    x, w, y, u = (torch.ones(r, h).normal_() / h**.5 for r in (n, v, n, v))
    before = peak()
    if ours:
        found = distill_loss(x, w, y, u, chunk_bytes=n * v * 4 // 10, kind=sys.argv[5])
        return peak() - before - found.dx_s.nbytes - found.dw_s.nbytes
    x.requires_grad_(), w.requires_grad_()
    F.kl_div(torch.log_softmax(x @ w.T, 1), torch.log_softmax(y @ u.T, 1), reduction="batchmean", log_target=True).backward()
    return peak() - before - x.grad.nbytes - w.grad.nbytes
go(64, 64, 64)  # what libraries keep
print(json.dumps(go(tokens, vocab, hidden)))
"""


@pytest.mark.skipif(INTERPRETED or sys.platform != "linux", reason="memory of a process, as Linux tells it")
def test_the_logits_are_never_there_at_once() -> None:
    """The process's own peak, beyond inputs and returned gradients: an eighth of one [N, V] in fp32 at most; torch takes several."""
    if rows_loss.body("cpu").absent("cpu") is not None:
        pytest.skip("the C++ module is not here")
    tokens, vocab, hidden = 1024, 30001, 64

    def taken(*who: str) -> float:
        sizes = map(str, (tokens, vocab, hidden))
        done = subprocess.run(
            [sys.executable, "-c", PEAK, who[0], *sizes, *who[1:]], capture_output=True, text=True, check=True
        )
        return json.loads(done.stdout) / (tokens * vocab * 4)

    for kind in ("fkl", "jsd"):
        assert taken("ours", kind) <= 1 / 8, kind
    assert taken("torch") > 3


X, W = torch.zeros(3, 8), torch.zeros(20, 8)
CACHE = (torch.zeros(3, 2, dtype=torch.int32), torch.zeros(3, 2), torch.zeros(3))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: distill_loss(X, W), "no teacher and no labels"),
        (lambda: distill_loss(X, W, X), "a teacher is x_t and w_t, or topk"),
        (lambda: distill_loss(X, W, X, W, topk=CACHE), "a teacher is x_t and w_t, or topk"),
        (lambda: distill_loss(X, W.half(), X, W), r"x_s and w_s are torch.float32 \(3, 8\) and torch.float16"),
        (lambda: distill_loss(X, W, X[:2], W), "x_t has 2 tokens, expected 3"),
        (lambda: distill_loss(X, W, X, W, torch.ones(4)), "mask has 4 tokens"),
        (lambda: distill_loss(X, W, X, W, vocab=21), "vocab is 21, expected 1 to 20"),
        (lambda: distill_loss(X, W, X, W, T=0.0), "T is 0.0"),
        (lambda: distill_loss(X, W, X, W, T=float("nan")), "T is nan"),
        (lambda: distill_loss(X, W, X, W, beta=1.5), "beta 1.5"),
        (lambda: distill_loss(X, W, X, W, kind="mse"), "kind is 'mse', expected fkl, rkl, jsd, topk"),
        (lambda: distill_loss(X, W, topk=CACHE, kind="rkl"), "a top-k cache serves 'topk' only"),
        (lambda: distill_loss(X, W, topk=CACHE, kind="topk", T=2.0), "T is 2.0, a top-k cache serves T = 1 only"),
        (lambda: distill_loss(X, W, X, W, chunk_bytes=0), "chunk_bytes is 0"),
        (lambda: rows_loss(X.T, torch.ones(8), X.T), "z_s has strides"),
        (lambda: rows_loss(X[:1].expand(3, -1), torch.ones(3), X), "rows of z_s overlap"),
        (lambda: rows_loss(X, torch.ones(2), X), r"weight is torch.float32 \(2,\)"),
    ],
)
def test_refusals(call: Callable[[], Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()


def test_float64_is_for_the_reference() -> None:
    with pytest.raises(op.Unsupported, match="float64 logits are for the reference"):
        rows_loss(X.double(), torch.ones(3, dtype=FP64), X.double())


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreted process")
def test_in_the_interpreter(run_interpreted: Callable[..., str]) -> None:
    """This file again with Triton's body."""
    said = run_interpreted(Path(__file__), "-k", "triton")
    passed = re.search(r"(\d+) passed", said)
    assert passed and int(passed[1]) >= 14, said[-500:]
