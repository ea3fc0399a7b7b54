"""What rounded caches cost: the trained model's words, and a random Qwen2 whose keys have strong biases."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from percard.bench import kv_quality
from percard.bench.engine import Model, load
from percard.bench.kv_quality import Held, Judge
from percard.bench.quality import compare, read_ids
from percard.formats.kvcache import BF16, SPECS, KVSpec, new_pages, quantize, read

from .conftest import write_biased

TINY = Path("examples/tiny-qwen3")
ROUNDED = tuple(name for name in SPECS if name != "bf16")


def quiet(blocks: int, label: str) -> None:
    """Tells nobody."""


@pytest.fixture(scope="module")
def tiny() -> Model:
    return load(TINY, dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def heldout() -> list[torch.Tensor]:
    return list(read_ids(TINY / "heldout.txt", TINY, 6 * 512).split(512))


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = write_biased(tmp_path_factory.mktemp("biased") / "still", still=(0, 1, 2, 3))
    return load(folder, device="cpu")


@pytest.fixture(scope="module")
def drawn() -> list[torch.Tensor]:
    return list(torch.randint(0, 211, (6 * 256,), generator=torch.Generator().manual_seed(1)).split(256))


@pytest.fixture(scope="module")
def of_tiny(tiny, heldout):
    judge = Judge(tiny, heldout, quiet)
    return {name: judge([Held(KVSpec.parse(name))] * 8) for name in ROUNDED}


def test_a_row_comes_back_as_pages_hold_it():
    x = torch.randn(3, 5, 80, generator=torch.Generator().manual_seed(0))
    for bits, symmetric, name in ((8, False, "int8"), (4, False, "int4"), (4, True, "int4-sym")):
        pages = new_pages(1, 3, 80, dtype=torch.float32, page=16, spec=KVSpec.parse(name))
        rows, scale, offset = quantize(x, bits, symmetric)
        pages.v[0, :, :5, : rows.shape[-1]] = rows
        pages.scales[0, :, :5, 1] = scale
        if offset is not None:
            pages.scales[0, :, :5, 3] = offset
        at = torch.arange(5)
        _, found = read(pages, torch.zeros(5, dtype=torch.int64), at, 80)
        assert torch.equal(kv_quality.held_as(x, bits, symmetric, torch.float32), found.transpose(0, 1))
    assert torch.equal(kv_quality.held_as(x, 16, False, torch.bfloat16), x.bfloat16().float())


def test_a_cache_as_it_is_changes_nothing(tiny, heldout):
    """Keys in the type of the checkpoint, bf16, against none at all: their rounding alone."""
    found = Judge(tiny, heldout[:2], quiet)([Held()] * 8)
    assert (found.kl, found.top1, found.perplexity) == (0, 1, found.perplexity_reference)
    exact = Judge(
        dataclasses.replace(tiny, config=dataclasses.replace(tiny.config, dtype=torch.float32)), heldout[:2], quiet
    )
    plain = compare(tiny, tiny, torch.cat(heldout[:2]), 512)
    assert exact([Held()] * 8).perplexity == pytest.approx(plain.perplexity, rel=1e-6)
    assert found.perplexity == pytest.approx(plain.perplexity, rel=2e-3)


def test_offsets_are_the_means_of_keys_as_pages_hold_them(tiny, heldout):
    found = kv_quality.key_offsets(tiny, heldout[:2], quiet)
    caches = [tiny.new_cache(1, 512) for _ in range(2)]
    for piece, cache in zip(heldout, caches, strict=False):
        tiny.prefill(piece[None], cache)
    for layer, mu in enumerate(found):
        assert mu.dtype == torch.float32 and mu.shape == (2, 64)
        keys = torch.cat([c.pages[layer].k[c.table[0].long()].transpose(1, 2).flatten(0, 1) for c in caches])
        # Layers after the first have seen bf16 keys here and fp32 ones there.
        torch.testing.assert_close(mu, keys.mean(0), rtol=0, atol=2e-3 * float(keys.abs().max()))


def test_a_layer_alone_is_the_same_whichever_way_it_is_run(tiny, heldout):
    held = Held(KVSpec.parse("int4"))
    blocks: list[int] = []
    piece = heldout[0][:256]
    rows = list(kv_quality.by_layer(tiny, piece, [[held, Held()]] * 8, lambda count, label: blocks.append(count)))
    judge = Judge(tiny, [piece], quiet)
    for layer in (0, 3, 7):
        whole = judge([held if i == layer else Held() for i in range(8)])
        assert rows[layer][0] / 255 == pytest.approx(whole.kl, rel=1e-3) and whole.kl > 1e-5
    assert all(abs(row[1]) < 1e-3 for row in rows)  # as it is, summed over 255 positions
    assert sum(blocks) == 8 + 2 * sum(range(1, 9))  # only the blocks from a layer on run again


def test_the_engine_over_pages_measures_the_same(tiny, heldout):
    """The same figures through pages, tables and slots, where the engine keeps bf16 layers in fp32."""
    for name in ("int8", "k8v4", "int4"):
        specs = (KVSpec.parse(name),) * 8
        found = compare(tiny, tiny.with_kv(specs), heldout[0], 512)
        ours = Judge(tiny, heldout[:1], quiet)([Held(spec) for spec in specs])
        assert found.kl == pytest.approx(ours.kl, rel=0.25)


def test_the_trained_model(of_tiny):
    """Six windows of 512 held-out tokens; docs/calibrate-kv.md has the whole text."""
    int8, k8v4, int4 = (of_tiny[name] for name in ("int8", "k8v4", "int4"))
    assert abs(int8.perplexity_rise) < 1e-3
    assert int8.kl < 2e-4 and int8.top1 > 0.99
    assert k8v4.kl < 0.008 and k8v4.top1 > 0.95 and abs(k8v4.perplexity_rise) < 0.005
    assert int4.kl < 0.016 and int4.top1 > 0.93 and abs(int4.perplexity_rise) < 0.01
    assert 20 * int8.kl < k8v4.kl < int4.kl / 1.5  # each spec that is smaller costs more, by a clear factor
    assert k8v4.kl < of_tiny["k8v4-sym"].kl < of_tiny["int4-sym"].kl and int4.kl < of_tiny["int4-sym"].kl


def test_a_model_with_strong_key_biases(biased, drawn):
    """Random weights: KL and top-1, perplexity says nothing. An offset takes the bias of slow channels off the keys."""
    offsets = kv_quality.key_offsets(biased, drawn[0::2], quiet)
    assert min(float(mu.abs().max()) for mu in offsets) > 50
    judge = Judge(biased, drawn[1::2], quiet)
    plain, shifted = {}, {}
    for name in ROUNDED:
        spec = KVSpec.parse(name)
        plain[name] = judge([Held(spec)] * 4)
        shifted[name] = judge([Held(spec, mu) for mu in offsets])
    assert plain["int8"].kl < plain["k8v4"].kl < plain["int4"].kl
    assert shifted["int8"].kl < shifted["k8v4"].kl < shifted["int4"].kl
    # Without an offset 4-bit keys lose the model; with it they lose a fortieth of that.
    assert plain["int4"].kl > 0.3 and plain["int4"].top1 < 0.5
    assert shifted["int4"].kl < plain["int4"].kl / 10 and shifted["int4"].top1 > plain["int4"].top1 + 0.3
    assert shifted["int4-sym"].kl < plain["int4-sym"].kl / 5
    assert shifted["int8"].kl < plain["int8"].kl / 10 and shifted["int8"].top1 > 0.95
    # Values have no offset, so what is left of k8v4 is theirs.
    assert shifted["k8v4"].kl < plain["k8v4"].kl / 2


def test_a_bias_that_rope_turns_is_beyond_an_offset(tmp_path, drawn):
    model = load(write_biased(tmp_path / "turning", turning=(1,)), device="cpu")
    offsets = kv_quality.key_offsets(model, drawn[0::2], quiet)
    assert (
        float(offsets[1].abs().max()) < 30
    )  # waves of 30 to 100 units; the mean of a whole number of turns is nothing
    judge = Judge(model, drawn[1::2], quiet)
    int4 = KVSpec.parse("int4")
    rest = [Held()] * 2
    plain = judge([Held(), Held(int4), *rest])
    shifted = judge([Held(), Held(int4, offsets[1]), *rest])
    other = judge([Held(), Held(), Held(int4), Held()])
    assert plain.kl > 20 * other.kl and shifted.kl > plain.kl / 2
    assert judge([Held(), Held(BF16), *rest]).kl == 0
