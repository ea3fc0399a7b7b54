"""The planner against published facts: how many cards hold what, which splits engines refuse, how long a step takes."""

from __future__ import annotations

import dataclasses
import json

import pytest

from percard.bench import card_table, plan_rows
from percard.bench.efficiency import Efficiency
from percard.bench.plan import Split, memory, predict_decode, predict_prefill, turning_points
from percard.bench.plan_parts import load_shape
from percard.bench.plan_split import splits
from percard.formats.kvcache import KVSpec
from percard.formats.spec import FormatError, QuantSpec

CARDS = card_table.cards()
QWEN, R1 = load_shape("qwen3-235b-a22b"), load_shape("deepseek-r1")
# The demand of every golden row: 32 users x 8192 tokens = 262,144 tokens of cache, 90 % of memory, 2 GB a card, MTP counted.
DEMAND = plan_rows.Demand(users=32, ctx=8192, util=0.90, overhead_gb=2.0, mtp=True)


def defaults(card_id: str, of: str, bucket: int | None = None) -> Efficiency:
    return Efficiency(0.80, 0.60, "brochure", (-0.50, 0.15), "default")


def spec_of(name: str) -> QuantSpec | None:
    return plan_rows.spec_of(name)


def one(shape, card: str, spec: str, kv: str = "bf16", cards: int | None = None, demand=DEMAND) -> plan_rows.Row:
    (row,) = plan_rows.plan(shape, CARDS[card], demand, cards=cards, specs=[spec], kvs=[kv], find=defaults)
    return row


def held(shape, card: str, spec: str, cards: int, kv: str = "bf16", **more):
    return memory(shape, spec_of(spec), KVSpec.parse(kv), CARDS[card], Split(cards), **more)


@pytest.mark.parametrize(
    "shape, spec, kv, card, fewest, gb, thousand",
    [
        (QWEN, "bf16", "bf16", "h20-96", 8, 470.2, 656),
        (QWEN, "fp8-block", "bf16", "h20-96", 4, 236.4, 649),
        (QWEN, "w8a8", "bf16", "h20-96", 4, 236.6, 649),
        (QWEN, "w4a16-g128", "bf16", "h20-96", 2, 123.1, 299),
        (QWEN, "w4a16-g128", "int8", "h20-96", 2, 123.1, 589),
        (QWEN, "bf16", "bf16", "h20-141", 4, 470.2, 335),
        (QWEN, "fp8-block", "bf16", "h20-141", 4, 236.4, 1549),
        (QWEN, "fp8-block", "int8", "h20-141", 2, 236.4, 316),
        (QWEN, "w4a16-g128", "bf16", "h20-141", 2, 123.1, 749),
        (R1, "bf16", "bf16", "h20-96", 32, 1369.0, 677),
        (R1, "fp8-block", "bf16", "h20-96", 16, 688.5, 674),
        (R1, "w4a16-g128", "bf16", "h20-96", 8, 358.6, 648),
        (R1, "bf16", "bf16", "h20-141", 16, 1369.0, 685),
        (R1, "fp8-block", "bf16", "h20-141", 8, 688.5, 678),
        (R1, "w4a16-g128", "bf16", "h20-141", 4, 358.6, 627),
    ],
    ids=lambda value: getattr(value, "name", None) or str(value),
)
def test_the_fewest_cards_that_serve_the_demand(shape, spec, kv, card, fewest, gb, thousand):
    row = one(shape, card, spec, kv)
    assert (row.status, row.split.cards) == ("serves", fewest)
    assert row.memory.weights / 1e9 == pytest.approx(gb, abs=0.1)
    assert row.memory.tokens / 1e3 == pytest.approx(thousand, abs=1)


def test_what_lacks_on_half_of_the_cards():
    assert held(QWEN, "h20-96", "bf16", 4).left / 1e9 == pytest.approx(-109, abs=0.5)
    assert held(QWEN, "h20-96", "fp8-block", 2).left / 1e9 == pytest.approx(-56, abs=0.5)
    assert held(QWEN, "h20-141", "fp8-block", 2).tokens / 1e3 == pytest.approx(161, abs=1)
    assert held(QWEN, "h20-141", "w4a16-g128", 1).tokens / 1e3 == pytest.approx(55, abs=1)
    assert held(R1, "h20-96", "bf16", 16).tokens / 1e3 == pytest.approx(68, abs=1)
    assert held(R1, "h20-96", "fp8-block", 8).tokens / 1e3 == pytest.approx(61, abs=1)
    assert held(R1, "h20-96", "w4a16-g128", 4).tokens / 1e3 == pytest.approx(10, abs=1)
    row = one(R1, "h20-96", "fp8-block", cards=8)
    assert row.status == "loads only" and "262144" in row.why and "--users 7" in row.why
    assert "lack 109 GB" in one(QWEN, "h20-96", "bf16", cards=4).why


def test_nominal_gigabytes_say_something_else():
    """R1 in fp8 loads on 8 cards by their reported memory and misses them by 13 GB by the 96e9 bytes they are sold with."""
    nominal = dataclasses.replace(CARDS["h20-96"], memory_mib=None)
    assert "nominal" in nominal.memory_basis and "97871 MiB" in CARDS["h20-96"].memory_basis
    missing = memory(R1, spec_of("fp8-block"), KVSpec(), nominal, Split(8))
    assert missing.left / 1e9 == pytest.approx(-13, abs=0.5)
    assert held(R1, "h20-96", "fp8-block", 8).left > 0
    assert held(R1, "h20-96", "fp8-block", 8, util=0.95).tokens / 1e3 == pytest.approx(134, abs=1)
    # DeepSeek-R1#276: eight requests of 16k at most on 8 cards
    assert held(R1, "h20-96", "fp8-block", 8, util=0.95).tokens // 16_384 == 8


def test_field_reports_are_reproduced():
    """vllm#17327, sglang#5858, vllm#19315 and #19401, lmsys.org/blog/2025-09-26-sglang-ant-group."""
    assert held(QWEN, "h20-96", "bf16", 4).left < 0 < held(QWEN, "h20-96", "bf16", 8).left
    assert splits(QWEN, spec_of("fp8-block"), 4)[0] == [Split(4)]
    assert splits(QWEN, spec_of("fp8-block"), 8)[0] == [Split(8, ep=True)]
    assert held(QWEN, "h20-141", "bf16", 4).tokens > 0 and held(QWEN, "h20-141", "fp8-block", 2).tokens > 0
    assert Split(8) in splits(R1, spec_of("fp8-block"), 8)[0] and Split(16) in splits(R1, spec_of("fp8-block"), 16)[0]
    assert held(R1, "h20-96", "fp8-block", 8).tokens > 0


def test_a_latent_cache_is_on_every_rank_unless_requests_are_split():
    by_rank = memory(R1, spec_of("fp8-block"), KVSpec(), CARDS["h20-96"], Split(16))
    by_request = memory(R1, spec_of("fp8-block"), KVSpec(), CARDS["h20-96"], Split(16, attention_dp=True))
    assert by_rank.per_token == 16 * 70_272 and by_request.per_token == 70_272
    extra = by_request.weights - by_rank.weights
    assert extra == pytest.approx(15 * R1.part("attention").nbytes(spec_of("fp8-block")))
    # attention weights copied to 8 cards leave no room
    assert memory(R1, spec_of("fp8-block"), KVSpec(), CARDS["h20-96"], Split(8, attention_dp=True)).left < 0


def test_layers_that_predict_further_tokens_may_be_left_out():
    with_, without = (held(R1, "h20-96", "fp8-block", 16, mtp=mtp).weights / 1e9 for mtp in (True, False))
    assert with_ - without == pytest.approx(15.3, abs=0.1)  # 11.6 B in fp8, two tables of 0.93 B in bf16


@pytest.mark.parametrize(
    "model, spec, tp, words",
    [
        ("qwen3-235b-a22b", "w4a16-g128", 8, "1536 / TP 8 = 192"),
        ("qwen3-235b-a22b", "fp8-block", 8, "1536 / TP 8 = 192"),
        ("qwen3-30b-a3b", "w4a16-g128", 4, "768 / TP 4 = 192"),
        ("qwen3-30b-a3b", "fp8-block", 4, "768 / TP 4 = 192"),
        ("deepseek-r1", "fp8-block", 32, "18432 / TP 32 = 576"),
        ("deepseek-r1", "fp8-block", 32, "2048 / TP 32 = 64"),
        ("qwen2.5-72b", "w4a16-g128", 2, "29568 / TP 2 = 14784"),
        ("qwen2.5-72b", "w4a16-g128", 2, "padding it to 29696"),
        ("qwen2.5-72b", "w4a16-g128", 4, "29568 / TP 4 = 7392"),
        ("qwen3-235b-a22b", "bf16", 6, "vocabulary 151936"),
        ("qwen3-8b", "bf16", 6, "vocabulary 151936"),
        ("qwen2.5-7b", "bf16", 8, "heads 28"),
    ],
)
def test_splits_that_are_refused(model, spec, tp, words):
    found, why = splits(load_shape(model), spec_of(spec), tp)
    assert any(words in line and "take" in line for line in why)
    assert all(split.ep for split in found)
    if (load_shape(model).experts and tp == 8) or model == "qwen3-30b-a3b":
        assert found and "expert parallel" in why[0]


@pytest.mark.parametrize(
    "model, spec, tp",
    [
        ("qwen3-235b-a22b", "w4a16-g128", 4),
        ("deepseek-r1", "fp8-block", 16),
        ("qwen2.5-72b", "w4a16-g128", 1),
        ("qwen2.5-72b", "w4a16-g64", 2),
        ("qwen2.5-72b", "bf16", 8),
        ("qwen3-235b-a22b", "w8a8", 8),
    ],
)
def test_splits_that_work(model, spec, tp):
    assert splits(load_shape(model), spec_of(spec), tp)[0][0] == Split(tp)


@pytest.mark.parametrize(
    "spec, kv, cards, users, ms, per_card, per_user",
    [
        ("w8a8", "bf16", 4, 64, (22.0, 3.9, 2.2), 660, 41),
        ("w8a8", "int8", 4, 64, (20.1, 3.9, 2.2), 718, 45),
        ("w4a16-g128", "int8", 2, 64, (22.7, 15.5, 2.1), 1288, 40),
        ("w4a16-g128", "int8", 2, 128, (27.0, 31.0, 2.3), 1920, 30),
        ("w4a8-g128", "int8", 2, 128, (27.0, 15.5, 2.3), 2180, 34),
    ],
)
def test_steps_of_the_design_table(spec, kv, cards, users, ms, per_card, per_user):
    """Qwen3-235B-A22B on H20-96 at 4096 tokens; all within rounding of the table."""
    step = predict_decode(
        QWEN, spec_of(spec), KVSpec.parse(kv), users, 4096, CARDS["h20-96"], split=Split(cards), find=defaults
    )
    assert [1e3 * t for t in (step.mem, step.flop, step.comm)] == pytest.approx(ms, abs=0.1)
    assert users / step.seconds / cards == pytest.approx(per_card, rel=0.005)
    assert 1 / step.seconds == pytest.approx(per_user, abs=0.5)
    assert step.bound == ("compute" if ms[1] > ms[0] else "memory")


def test_copied_heads_are_read_as_often_as_they_are_held():
    """Eight ranks over four KV heads: the cache is read twice, 22.0 ms; held once it would be the 20.0 of a plain count."""
    step = predict_decode(QWEN, None, KVSpec(), 64, 4096, CARDS["h20-96"], split=Split(8), find=defaults)
    assert [1e3 * t for t in (step.mem, step.flop, step.comm)] == pytest.approx([21.98, 3.89, 2.26], abs=0.01)
    once = 64 * 4096 * 192_512 / (8 * 4e12 * 0.8)
    assert 1e3 * (step.mem - once) == pytest.approx(20.0, abs=0.05)


def test_published_rates_lie_in_the_band():
    """sglang#5846: fp8 TP4 on H20, 1000 in 2000 out, 492 tokens/s and card; the number of users is not said, so any."""
    rates = []
    for users in (16, 32, 64, 128):
        step = predict_decode(
            QWEN, spec_of("fp8-block"), KVSpec(), users, 2000, CARDS["h20-96"], split=Split(4), find=defaults
        )
        rates.append((users / step.seconds / 4 * (1 + step.band[0]), users / step.seconds / 4 * (1 + step.band[1])))
    assert any(low <= 492 <= high for low, high in rates)
    # lmsys blog: 5.7k output tokens/s of an 8-card node of R1 at 4096 in = 717 a card, decoding with EP16 and attention DP
    step = predict_decode(
        R1, spec_of("fp8-block"), KVSpec(), 512, 4096, CARDS["h20-96"], split=Split(16, True, True), find=defaults
    )
    assert 717 / 3 < 512 / step.seconds / 16 < 717 * 3


def test_where_four_bits_stop_paying():
    """The ridges of bench tables from cards.json: rate x bytes a weight / (2 x bandwidth), and rate / bandwidth."""
    shape, spec = load_shape("qwen3-8b"), spec_of("w4a16-g128")
    for card, begins, gone in (("h20-96", 10, 37), ("a100-80-sxm", 39, 153), ("h200-141-sxm", 53, 206)):
        found = turning_points(shape, spec, CARDS[card])
        assert [round(v) for v in found] == [pytest.approx(begins, abs=1), gone]
    assert turning_points(shape, spec_of("w8a8"), CARDS["h20-96"])[1] is None
    slow = turning_points(shape, spec_of("w8a8"), CARDS["b300-288-sxm"])
    assert slow[1] == pytest.approx(153.5e12 / 7.75e12, rel=0.01)


def test_the_card_decides_the_spec():
    assert "no FP8 rate" in one(QWEN, "a100-80-sxm", "fp8-block").why
    assert "would slow down" in one(load_shape("qwen3-8b"), "b300-288-sxm", "w8a8").why
    assert one(load_shape("qwen3-8b"), "b200-180-sxm", "w8a8").status == "serves"
    assert "latent" in one(R1, "h20-96", "fp8-block", "int8").why


def test_bounds_move_the_number_of_cards():
    shape = load_shape("qwen3-32b")
    free = one(shape, "h100-80-sxm", "w8a8")
    tight = dataclasses.replace(DEMAND, tpot_s=free.step.seconds * 0.7)
    row = one(shape, "h100-80-sxm", "w8a8", demand=tight)
    assert row.status == "serves" and row.split.cards > free.split.cards and row.step.seconds <= tight.tpot_s
    assert any("the band does not" in note for note in row.notes)
    late = one(shape, "h100-80-sxm", "w8a8", demand=dataclasses.replace(DEMAND, tpot_s=1e-5))
    assert late.status == "too slow" and "TPOT" in late.why and "up to 64" in late.why
    wait = one(shape, "h100-80-sxm", "w8a8", cards=4, demand=dataclasses.replace(DEMAND, ttft_s=0.001))
    assert wait.status == "too slow" and "TTFT" in wait.why
    loose = one(shape, "h100-80-sxm", "w8a8", demand=dataclasses.replace(DEMAND, tpot_s=10.0, ttft_s=100.0))
    assert [("whole band" in note) for note in loose.notes] == [True, True]


def test_price_and_basis_of_a_row():
    row = one(QWEN, "h20-96", "w8a8", demand=dataclasses.replace(DEMAND, users=64, ctx=4096, usd_hour=2.0))
    assert row.usd_out == pytest.approx(0.84, abs=0.01)
    assert row.usd_in == pytest.approx(2.0 * 4 * row.prefill.seconds / 4096 / 3600 * 1e6)
    assert row.basis == "brochure" and row.band == pytest.approx((-0.6, 0.38))  # H20 is a disputed row
    assert one(load_shape("qwen3-8b"), "h200-141-sxm", "w8a8").band == pytest.approx((-0.5, 0.15))
    assert one(QWEN, "h20-96", "w8a8").usd_out is None


def test_measured_shares_narrow_the_band():
    def measured(card_id, of, bucket=None):
        fine = of.startswith("decode")
        kind, band = ("measured", (-0.1, 0.1)) if fine else ("scaled", (-0.4, 0.4))
        return Efficiency(0.9, 0.7, kind, band, "a record", kind, kind)

    (row,) = plan_rows.plan(load_shape("qwen3-8b"), CARDS["h20-96"], DEMAND, specs=["w8a8"], find=measured)
    assert (row.step.basis, row.step.band, row.prefill.basis) == ("measured", (-0.1, 0.1), "scaled")
    assert (row.basis, row.band) == ("scaled", (-0.4, 0.4))  # the worse one speaks for the row


def test_a_prompt_is_computed_and_a_step_is_read():
    shape, card = load_shape("qwen3-8b"), CARDS["h200-141-sxm"]
    step = predict_decode(shape, None, KVSpec(), 1, 0, card, find=defaults)
    read = shape.params - shape.vocab * shape.hidden  # the input table is looked up, not read
    assert step.bytes == 2 * read and step.mem == pytest.approx(2 * read / (4.8e12 * 0.8))
    prefill = predict_prefill(shape, None, KVSpec(), 1, 4096, card, find=defaults)
    assert (step.bound, prefill.bound) == ("memory", "compute")
    linears = 2 * (shape.active - shape.head_params) * 4096 + 2 * shape.head_params
    causal = 36 * 32 * (128 + 128) * 4096**2  # q k and p v, half of the square each
    assert prefill.flops == pytest.approx(linears + causal)


def test_sizes_that_make_no_sense_are_refused():
    for wrong in (
        {"users": 0},
        {"ctx": 10**12},
        {"util": 1.5},
        {"overhead_gb": -1},
        {"usd_hour": 0.0},
        {"tpot_s": 0.0},
    ):
        with pytest.raises(FormatError, match="expected"):
            plan_rows.Demand(**wrong)
    with pytest.raises(FormatError, match="--cards"):
        one(QWEN, "h20-96", "bf16", cards=0)
    with pytest.raises(FormatError, match="batch"):
        predict_decode(QWEN, None, KVSpec(), 0, 1, CARDS["h20-96"])


def test_a_spec_that_cuts_a_group_is_refused(tmp_path):
    raw = dict(load_shape("qwen3-0.6b").raw) | {"intermediate_size": 3000}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    row = one(load_shape(tmp_path), "l4-24", "w4a16-g128")
    assert row.status == "refused" and "3000 is not divisible by group 128" in row.why
