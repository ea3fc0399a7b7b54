"""The test of a body at load: it passes good bodies, refuses wrong ones with words, and lets the next one serve."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from percard.formats import affine, layout
from percard.formats.spec import QuantSpec
from percard.formats.tensor import QuantTensor
from percard.kernels import self_test
from percard.kernels.linear import ROUTES, QuantLinear, explain, linear, ops_of, prepare
from percard.kernels.op import Body, Unsupported

SPECS = ("w8a8", "w8a16-g64", "w4a16-g64-asym", "w4a16", "w4a8", "w4a8-g64")
needs_cpp = pytest.mark.skipif(
    ops_of(QuantSpec.parse("w8a8"))[1].body("cpu").absent("cpu") is not None, reason="the C++ module is not built"
)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    self_test.forget()
    yield
    self_test.forget()


def plain(spec: str, n: int = 150, k: int = 192) -> QuantTensor:
    return affine.quantize(torch.randn(n, k) / k**0.5, QuantSpec.parse(spec))


def off_by_a_little(run: Any) -> Any:
    """A body that is wrong in one place: what a miscompiled tile looks like."""

    def wrong(*flat: Any) -> torch.Tensor:
        y = run(*flat)
        y[-1, -1] += 0.5
        return y

    return wrong


def broken(monkeypatch: pytest.MonkeyPatch, spec: str, change: Any = off_by_a_little) -> None:
    op = ops_of(QuantSpec.parse(spec))[-1]
    monkeypatch.setitem(op._runs, "cpu", change(op.run_of(op.body("cpu"))))


@needs_cpp
@pytest.mark.parametrize("spec", SPECS)
def test_good_bodies_pass_and_are_tried_once(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    w = plain(spec)
    packed = prepare(w, "cpu")
    assert "self-test        passed" in explain(torch.randn(2, 192), packed)
    monkeypatch.setattr(self_test, "_tried", lambda *_: pytest.fail("tried again"))
    prepare(plain(spec), "cpu")
    prepare(packed, "cpu")


@needs_cpp
@pytest.mark.parametrize("spec", SPECS)
def test_a_wrong_body_is_refused(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, spec)
    with pytest.raises(Unsupported, match="failed its self-test") as caught:
        prepare(plain(spec), "cpu")
    text = str(caught.value)
    assert "1 of " in text and "(150, 192)" in text and "self_test=False" in text and "\n" not in text
    packed = prepare(plain(spec), "cpu", self_test=False)
    assert "self-test        failed: " in explain(torch.randn(2, 192), packed)
    with pytest.raises(Unsupported):
        QuantLinear.from_plain(plain(spec))
    assert QuantLinear.from_plain(plain(spec), self_test=False).packing == packed.packing


@needs_cpp
def test_a_wrong_producer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    quantize_rows = ROUTES[8, 8][0]
    run = quantize_rows.run_of(quantize_rows.body("cpu"))

    def wrong(x: torch.Tensor) -> Any:
        q, scale, total = run(x)
        return q + 1, scale, total

    monkeypatch.setitem(quantize_rows._runs, "cpu", wrong)
    with pytest.raises(Unsupported, match=r"quantize_rows cpu, M = 1: .* elements are off"):
        prepare(plain("w8a8"), "cpu")


@needs_cpp
def test_a_body_that_raises_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def raising(run: Any) -> Any:
        def wrong(*flat: Any) -> torch.Tensor:
            raise RuntimeError("no kernel image is available")

        return wrong

    broken(monkeypatch, "w4a16", raising)
    with pytest.raises(Unsupported, match="RuntimeError: no kernel image is available"):
        prepare(plain("w4a16"), "cpu")


@needs_cpp
def test_the_next_body_serves_and_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    op = ops_of(QuantSpec.parse("w4a16"))[-1]
    second = Body("plain_torch", "plain", lambda where: None, op.body("reference").takes, op.body("reference").load)
    monkeypatch.setattr(op, "bodies", (*op.bodies, second))
    monkeypatch.setitem(op._torch_ops, "plain_torch", op._torch_ops["reference"])
    broken(monkeypatch, "w4a16")
    with pytest.warns(
        UserWarning, match="matmul_w4a16 plain_torch serves, since matmul_w4a16 cpu failed its self-test"
    ):
        w = prepare(plain("w4a16"), "cpu")
    assert w.packing == "plain"
    op._ready.pop("cpu", None)
    monkeypatch.setattr(op, "_ready", {})
    assert linear(torch.randn(2, 192), w).shape == (2, 150)


@needs_cpp
@pytest.mark.parametrize("packing", ["rows8", "rows16_k4_w8", "planes16_w4", "planes8_w4", "rows16_k4_w4", "plain"])
def test_rows_of_a_packed_weight(packing: str) -> None:
    bits = 8 if packing.endswith("8") else 4
    for spec in (f"w{bits}a16-g64-asym", f"w{bits}a16", "w4a8-g32" if bits == 4 else "w8a8"):
        if packing in ("planes8_w4", "rows8") and "asym" in spec:
            continue
        w = plain(spec, n=150)
        whole = layout.repack(w, packing)
        for start, stop in ((0, 64), (64, 128), (128, 150), (0, 150)):
            part = layout.repack(self_test.rows_of(whole, start, stop), "plain")
            assert torch.equal(part.data, w.data[start:stop]) and torch.equal(
                part.scale.float(), w.scale[start:stop].float()
            )
            assert (w.zero is None) == (part.zero is None) and (
                w.zero is None or torch.equal(part.zero, w.zero[start:stop])
            )


@needs_cpp
def test_a_tall_weight_is_tried_on_its_last_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    op, seen = ops_of(QuantSpec.parse("w4a16"))[-1], []

    def watch(run: Any) -> Any:
        def body(*flat: Any) -> torch.Tensor:
            seen.append(flat[5])
            return run(*flat)

        return body

    broken(monkeypatch, "w4a16", watch)
    prepare(plain("w4a16", n=5000, k=64), "cpu")
    assert len(seen) == 2 and all(self_test.CPU_ROWS <= n < self_test.CPU_ROWS + 64 for n in seen)
    assert op.body("cpu").packing == "rows16_k4_w4"


@needs_cpp
@pytest.mark.bench
def test_it_takes_milliseconds(benchmark: Any) -> None:
    w = layout.repack(plain("w4a16-g64", n=4096, k=4096), "rows16_k4_w4")
    benchmark.pedantic(prepare, (w, "cpu"), rounds=5, iterations=1)
    assert benchmark.stats.stats.min < 0.3
