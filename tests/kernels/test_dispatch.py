"""Which way a layer goes: measured entries, rules, obstacles, and what explain says of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from percard.formats import affine
from percard.formats.spec import QuantSpec
from percard.kernels import device, dispatch, linear, tuning
from percard.kernels.inspection import ARCHS

ENTRY = {"card": "cpu", "triton": "3.9", "spec": "w4a8-g64", "n": 48, "k": 128, "m_bucket": 2, "way": "matmul_w4a16"}
ENTRY |= {"us": {"matmul_w4a8": 10.0, "matmul_w4a16": 7.5}, "floor_us": 12.0}
needs_cpp = pytest.mark.skipif(
    linear.matmul_w4a8.body("cpu").absent("cpu") is not None, reason="the C++ module is not built"
)


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("PERCARD_TUNED", str(tmp_path))

    def forget() -> None:
        dispatch.table.cache_clear()
        linear._routes.cache_clear()

    forget()
    yield
    forget()


def choice(
    entry: dict[str, Any] | None = None, bucket: int = 0, obstacle: str | None = None, on_card: bool = True
) -> Any:
    return dispatch.choose(entry, bucket, "first", "second", 16, obstacle, on_card)


def test_the_rule() -> None:
    assert [choice(bucket=b).way for b in range(7)] == ["second"] * 5 + ["first"] * 2, "up to M = 16 on a card"
    assert all(choice(bucket=b, on_card=False).way == "first" for b in range(7))
    assert "up to M = 16" in choice().why and "not measured here" in choice(on_card=False).why


def test_what_was_measured_wins_unless_the_copy_does_not_allow_it() -> None:
    entry = {"way": "first", "us": {"first": 3.0, "second": 4.0}, "floor_us": 5.0}
    assert choice(entry).way == "first" and choice(entry).why == "measured: first 3.0 us, second 4.0 us, bf16 5.0 us"
    assert choice({**entry, "way": "second"}, bucket=9, on_card=False).way == "second"
    assert choice({**entry, "way": "second"}, obstacle="it reads rows8").way == "first"
    assert "it reads rows8" in choice(obstacle="it reads rows8").why
    assert choice({**entry, "way": "gone"}).why.startswith("rule"), "an op that is no longer a way of this layer"


@needs_cpp
def test_a_measured_way_is_gone(tmp_path: Path) -> None:
    """One packed copy, two ops: the entry holds for its bucket of M and no other."""
    tuning.store(tmp_path / "dispatch.json", ENTRY)
    w = linear.prepare(affine.quantize(torch.randn(48, 128) / 11, QuantSpec.parse("w4a8-g64")), "cpu")
    exact = affine.dequantize(w if w.packing == "plain" else linear.layout.repack(w, "plain"))
    for m, way in (
        (1, "matmul_w4a8"),
        (2, "matmul_w4a8"),
        (3, "matmul_w4a16"),
        (4, "matmul_w4a16"),
        (5, "matmul_w4a8"),
    ):
        x = torch.randn(m, 128)
        assert linear._ops_at(x, w)[-1].name == way
        y, want = linear.linear(x, w), x @ exact.T
        loss = float((y - want).norm() / want.norm())
        assert loss < (1e-5 if way == "matmul_w4a16" else 0.02) and (way == "matmul_w4a16" or loss > 1e-4)
    text = linear.explain(torch.randn(4, 128), w)
    assert "matmul_w4a16: measured: matmul_w4a8 10.0 us, matmul_w4a16 7.5 us, bf16 12.0 us" in text
    assert "batch_invariant: one route" in linear.explain(torch.randn(4, 128), w, batch_invariant=True)
    assert torch.equal(linear.linear(x[:3], w, batch_invariant=True), linear.linear(x, w, batch_invariant=True)[:3]), (
        "no dispatch by M"
    )


@needs_cpp
def test_explain_names_every_op_and_body() -> None:
    for spec in ("w8a8", "w4a16-g64", "w8a16"):
        w = linear.prepare(affine.quantize(torch.randn(48, 128) / 11, QuantSpec.parse(spec)), "cpu")
        text = linear.explain(torch.randn(2, 3, 128), w)
        assert f"linear [6, 128] x {spec} [48, 128] as {w.packing} on cpu" in text
        for op in linear.ops_of(w.spec):
            assert f"{op.name:16} cpu        serves" in text
    assert "torch's own matmul" in linear.explain(torch.randn(2, 3), torch.randn(4, 3))


def test_explain_of_a_weight_that_nobody_packed() -> None:
    w = affine.quantize(torch.randn(48, 128) / 11, QuantSpec.parse("w4a16"))
    assert "pack it once" in linear.explain(torch.randn(2, 128), w)


def test_words_of_a_config(tmp_path: Path) -> None:
    gpu = pytest.importorskip("percard.kernels.matmul_w4a16.gpu")
    card, shape = ARCHS["sm_90"], tuning.Shape(3, 4096, 4096, 128, torch.bfloat16)
    gpu.config_for.cache_clear()
    text = dispatch.config_words(gpu, shape, card, "3.9.0")
    assert "by the heuristic for M <= 4, nothing measured; way A, exact weights: 128 programs for 132 SMs" in text
    prompt = dispatch.config_words(gpu, shape._replace(m=2000), card, "3.9.0")
    assert "way D, chunks of 32 MB: computed 0.92 of bf16's rate" in prompt
    key = {"card": card.name, "triton": "3.9", "op_version": gpu.OP_VERSION, "m_bucket": 2, "n": 4096, "k": 4096}
    key |= {"group": 128, "dtype": "bfloat16", "us": 9.0, "heuristic_us": 10.0, "floor_us": 20.0}
    config = vars(gpu.heuristic(shape, card)) | {"num_stages": 5}
    tuning.store(tmp_path / "matmul_w4a16.json", {**key, "config": config})
    tuning.table.cache_clear()
    gpu.config_for.cache_clear()
    try:
        text = dispatch.config_words(gpu, shape, card, gpu.triton.__version__)
        if tuning.release(gpu.triton.__version__) == "3.9":
            assert (
                "num_stages=5" in text
                and "measured for M <= 4: 9.0 us this one, 10.0 us the heuristic's, 20.0 us" in text
            )
    finally:
        tuning.table.cache_clear()
        gpu.config_for.cache_clear()
    assert "the same for every M" in dispatch.config_words(gpu, shape, card, "3.9.0", invariant=True)


@pytest.mark.skipif(device.has_card(), reason="this machine has a card")
def test_obstacles() -> None:
    cpu = torch.device("cpu")
    second = linear.ALSO[8, 8][0]
    if second[-1].body("cpu").absent("cpu") is None:
        assert linear._obstacle(second, "rows16_k4_w8", cpu, torch.float32, 1) is None
        assert "reads rows16_k4_w8, the copy is rows8" in str(linear._obstacle(second, "rows8", cpu, torch.float32, 1))


@pytest.mark.parametrize(("sm", "prompt"), [(90, "matmul_w8a8"), (103, "matmul_w8a16")])
def test_the_copy_of_a_w8a8_layer_on_a_card(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sm: int, prompt: str
) -> None:
    """rows8 can be made whole for many rows of bf16: taken by rule where int8 is weak, elsewhere when it was measured."""
    card = device.Card("a card", sm, 148, 232448, 126 << 20)
    monkeypatch.setattr(device, "lacks_tensor_cores", lambda: None)
    monkeypatch.setattr(device, "card_of", lambda where: card)
    monkeypatch.setattr(dispatch, "triton_version", lambda: "3.9.0")
    given = (QuantSpec.parse("w8a8"), (64, 128), "rows8", torch.device("cuda", 0))
    routes = linear._routes(*given, torch.bfloat16)
    assert [ops[-1].name for ops, _ in routes] == ["matmul_w8a8"] * 7 + [prompt] * 10, "from 65 rows on"
    assert "the copy is rows8, this one for more than 64 rows of bf16" in routes[6][1].why
    assert {ops[-1].name for ops, _ in linear._routes(*given, torch.float16)} == {"matmul_w8a8"}
    entry = {"card": "a card", "triton": "3.9", "spec": "w8a8", "n": 64, "k": 128, "m_bucket": 8, "way": "matmul_w8a16"}
    tuning.store(
        tmp_path / "dispatch.json", {**entry, "us": {"matmul_w8a8": 9.0, "matmul_w8a16": 8.0}, "floor_us": 7.0}
    )
    dispatch.table.cache_clear()
    linear._routes.cache_clear()
    ops, choice = linear._routes(*given, torch.bfloat16)[8]
    assert (
        ops[-1].name == "matmul_w8a16"
        and choice.why == "measured: matmul_w8a8 9.0 us, matmul_w8a16 8.0 us, bf16 7.0 us"
    )
