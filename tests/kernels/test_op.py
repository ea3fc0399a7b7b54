"""Op and Body: who serves, who refuses and how that reads, and what torch sees."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from percard.kernels.matmul_w4a8 import matmul_w4a8
from percard.kernels.op import Body, Op, Unsupported, reference_body, rows_contiguous, triton_body
from percard.kernels.quantize_rows import quantize_rows

_NUMBERS = itertools.count()


def toy(*bodies: Body) -> Op:
    """x + 1 under a fresh name, served by `bodies`."""

    def check(x: torch.Tensor, packing: str) -> None:
        if x.ndim != 2:
            raise ValueError(f"toy: x has {x.ndim} dimensions, expected 2")

    contract = SimpleNamespace(
        SCHEMA="(Tensor x, str packing) -> Tensor",
        unwrap=lambda x, packing="plain": (x, packing),
        check=check,
        out_like=lambda x, packing: torch.empty_like(x),
    )
    return Op(f"toy{next(_NUMBERS)}", contract, bodies)  # type: ignore[arg-type]


def body(name: str, packing: str = "plain", absent: str | None = None, calls: list[str] | None = None) -> Body:
    """A body that reads one packing and notes that it ran, and what it was asked."""

    def note(what: str) -> None:
        if calls is not None:
            calls.append(f"{name} {what}")

    def is_absent(where: str) -> str | None:
        note("absent?")
        return absent

    def takes(x: torch.Tensor, found: str) -> str | None:
        return None if found == packing else f"reads {packing}, this is {found}; pack it"

    def run(x: torch.Tensor, found: str) -> torch.Tensor:
        note("run")
        return x + 1

    return Body(name, packing, is_absent, takes, lambda: run)


def test_the_first_body_that_takes_the_arguments_runs() -> None:
    calls: list[str] = []
    op = toy(body("a", "rows8", calls=calls), body("b", "plain", calls=calls), body("c", "plain", calls=calls))
    x = torch.zeros(2, 3)
    assert torch.equal(op(x), x + 1)
    assert torch.equal(op(x, "rows8"), x + 1)
    assert [c for c in calls if c.endswith("run")] == ["b run", "a run"]


def test_what_a_device_has_is_asked_once() -> None:
    calls: list[str] = []
    op = toy(body("a", absent="is not built; build it", calls=calls), body("b", calls=calls))
    for _ in range(5):
        op(torch.zeros(1, 1))
    assert calls.count("a absent?") == 1
    assert calls.count("b run") == 5


def test_when_all_refuse_one_error_gives_every_reason() -> None:
    op = toy(
        body("a", absent="is not built; build it"), body("b", "rows8"), reference_body(lambda x, packing: x, "plain")
    )
    with pytest.raises(Unsupported) as caught:
        op(torch.zeros(1, 1))
    text = str(caught.value)
    assert "\n" not in text
    for part in (
        "a: is not built; build it",
        "b: reads rows8, this is plain; pack it",
        "reference: slow",
        "impl='reference'",
    ):
        assert part in text


def test_explain_says_the_same_without_raising() -> None:
    op = toy(
        body("a", absent="is not built; build it"), body("b"), body("c"), reference_body(lambda x, packing: x, "plain")
    )
    lines = op.explain(torch.zeros(1, 1)).splitlines()
    assert [line.split(maxsplit=2)[1:] for line in lines] == [
        ["a", "refuses: is not built; build it"],
        ["b", "serves"],
        ["c", "stands by"],
        ["reference", "only when asked for (impl='reference')"],
    ]


def test_a_body_asked_for_by_name_runs_or_says_why_not() -> None:
    op = toy(body("a", absent="is not built; build it"), body("b"), reference_body(lambda x, packing: x + 2, "plain"))
    x = torch.zeros(1, 1)
    assert op(x, impl="reference") == 2
    with pytest.raises(Unsupported, match="a: is not built; build it"):
        op(x, impl="a")
    with pytest.raises(ValueError, match="has no body 'marlin'; it has a, b, reference"):
        op(x, impl="marlin")


def test_body_on_is_what_will_serve() -> None:
    op = toy(
        body("a", "rows8", absent="is not built; build it"),
        body("b", "rows16"),
        reference_body(lambda x, packing: x, "plain"),
    )
    assert op.body_on("cpu").packing == "rows16"
    assert op.body_on("cpu", "reference").packing == "plain"
    with pytest.raises(Unsupported, match="a: is not built"):
        op.body_on("cpu", "a")
    nothing = toy(body("a", absent="is not built; build it"), reference_body(lambda x, packing: x, "plain"))
    with pytest.raises(Unsupported, match=r"is not built.*reference: slow"):
        nothing.body_on("cpu")


def test_the_contract_is_checked_before_any_body() -> None:
    calls: list[str] = []
    op = toy(body("a", calls=calls))
    for call in (
        lambda: op(torch.zeros(3)),
        lambda: op(torch.zeros(3), impl="a"),
        lambda: op.torch_op(torch.zeros(3), "plain"),
    ):
        with pytest.raises(ValueError, match="expected 2"):
            call()
    assert "a run" not in calls


def test_a_call_of_a_known_key_is_not_checked_again() -> None:
    calls: list[str] = []
    op = toy(body("a", calls=calls), body("b", "rows8", calls=calls))
    check = op.contract.check
    op.contract.check = lambda *flat: (calls.append("check"), check(*flat))  # type: ignore[attr-defined]
    keyed = Op(f"toy{next(_NUMBERS)}", op.contract, op.bodies)
    keyed._key = lambda x, packing: (x.shape, packing)
    x = torch.zeros(2, 3)
    for impl in (None, "a"):
        calls.clear()
        for _ in range(3):
            assert torch.equal(keyed(x, impl=impl), x + 1)
        assert calls.count("check") == 1 and calls.count("a run") == 3
    assert torch.equal(keyed(x, "rows8"), x + 1) and calls[-1] == "b run"
    for _ in range(2):  # what was refused is refused again
        with pytest.raises(ValueError, match="expected 2"):
            keyed(torch.zeros(3))
        with pytest.raises(Unsupported, match="reads plain, this is rows8"):
            keyed(x, "rows8", impl="a")
    assert keyed(torch.zeros(0, 3)).shape == (0, 3)


def test_no_rows_come_back_without_a_call() -> None:
    calls: list[str] = []
    op = toy(body("a", calls=calls))
    assert op(torch.zeros(0, 3)).shape == (0, 3)
    assert op(torch.zeros(0, 3), impl="a").shape == (0, 3)
    assert "a run" not in calls


def test_tracing_and_autograd_see_the_torch_op() -> None:
    op = toy(body("a"))
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    x = torch.zeros(2, 3)
    for impl, overload in ((None, "default"), ("a", "a")):
        graphs.clear()
        torch._dynamo.reset()
        torch.compile(lambda x: op(x, impl=impl) * 2, fullgraph=True, backend=keep)(x)
        targets = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
        assert f"percard.{op.name}.{overload}" in targets


def test_triton_serves_a_cpu_only_by_name_and_only_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    there = triton_body("nowhere.gpu", "rows8", lambda *flat: None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "TRITON_INTERPRET=1" in (there.absent("cpu") or "")
    assert "move them" in (there.absent("mps") or "")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "cpu" in there.by_name_on


def test_rows_contiguous_copies_only_what_it_must() -> None:
    wide = torch.zeros(4, 10)
    for kept in (wide, wide[:, 2:7], wide[::2], wide[:1].expand(3, -1), wide.T[:1].T):
        assert rows_contiguous(kept) is kept
    assert rows_contiguous(wide.T).stride(-1) == 1


def test_costs_count_what_moves_once() -> None:
    x = torch.zeros(3, 10, dtype=torch.bfloat16)
    assert quantize_rows.contract.cost(x).bytes == 3 * 10 * 3 + 3 * 8
    xq, sx, xsum = torch.zeros(3, 64, dtype=torch.int8), torch.ones(3), torch.zeros(3, dtype=torch.int32)
    w, scale = torch.zeros(8, 64, dtype=torch.int8), torch.ones(8, 2)
    cost = matmul_w4a8.contract.cost(xq, sx, xsum, w, scale, None, 8, 64, 32, "plain", torch.float16)
    assert cost.flops == 2 * 3 * 8 * 64
    assert cost.bytes == 3 * 64 + 3 * 8 + 3 * 8 * 2 + 8 * 64 + 8 * 2 * 4
