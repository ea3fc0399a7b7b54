"""The engine over quantised caches: steps, prompts, prefixes and gates see the same keys; bytes are as the formats say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from percard.bench import engine as engine_module
from percard.bench import quality
from percard.bench.engine import attend, load_config
from percard.bench.engine.cache import Cache
from percard.bench.engine.kv import Layers
from percard.formats.kv_layers import KVLayers
from percard.formats.kvcache import BF16, PAGE, SPECS, KVSpec
from percard.formats.spec import FormatError
from percard.kernels.op import Unsupported

KINDS = ("llama", "qwen2", "qwen3", "qwen3-moe")
QUANTISED = tuple(name for name in SPECS if name != "bf16")
TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny-qwen3"
CPU = torch.device("cpu")
load = engine_module.load


def ids_of(batch: int, width: int, vocab: int = 211, seed: int = 1) -> torch.Tensor:
    return torch.randint(1, vocab, (batch, width), generator=torch.Generator().manual_seed(seed))


def kl(reference: torch.Tensor, other: torch.Tensor) -> float:
    p, q = reference.double().log_softmax(-1), other.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def stepped(model, ids: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
    """Logits [B, T, V] of single steps from an empty cache on."""
    cache = cache or model.new_cache(*ids.shape)
    return torch.stack([model.step(ids[:, i], cache) for i in range(ids.shape[1])], 1)


def near(whole: torch.Tensor, got: torch.Tensor, plain: torch.Tensor) -> None:
    """The same keys, sums in another order and weights of attention rounded as a body may: to bf16.

    That is 2^-9 / sqrt(3) = 0.001 of a value, by chance; an 8-bit code is off by absmax / 127 / sqrt(12), which is 0.006 of a
    usual value when absmax is 2.7 of them. So a fifth of what the cache itself moves logits by, and its square in KL. Less than
    what the queries' own 8 bits make.
    """
    assert kl(whole, got) < 0.04 * kl(plain, whole) + 1e-6
    assert (whole - got).abs().median() < 0.2 * (whole - plain).abs().median() + 1e-5


@pytest.mark.parametrize("kv", SPECS)
@pytest.mark.parametrize("kind", KINDS)
def test_steps_equal_prompts_that_are_read_back(checkpoint, kind, kv):
    """Token by token through decode, in one piece, in two pieces, and without a cache of one's own: the same keys."""
    model = load(checkpoint(kind), device="cpu", kv=kv)
    ids = ids_of(2, 70)
    plain, whole = model.with_kv(None).logits(ids), model.logits(ids)
    assert torch.equal(whole, plain) == (kv == "bf16")
    near(whole, stepped(model, ids), plain)
    for width in (70, 41):
        cache = model.new_cache(2, 70)
        last = model.prefill(ids[:, :width], cache, read_back=True)
        near(whole[:, width - 1], last, plain[:, width - 1])
    last = model.prefill(ids[:, 41:], cache, read_back=True)
    near(whole[:, -1], last, plain[:, -1])
    assert cache.lengths == [70, 70]


@pytest.mark.parametrize("kv", ["bf16", "int8", "int4"])
def test_where_the_op_leaves_prompts_to_torch(checkpoint, kv, monkeypatch):
    """What serves where attention over 16-bit rows is the faster way: rows are gathered, and torch attends."""
    model = load(checkpoint("qwen2"), device="cpu", kv=kv)
    ids, cache = ids_of(2, 70), model.new_cache(2, 70)
    plain = model.with_kv(None).logits(ids)
    want = model.prefill(ids, cache, [70, 33], read_back=True)

    def refuse(*given: object, **more: object) -> None:
        raise Unsupported("leaves it")

    monkeypatch.setattr(attend, "attention_prefill", refuse)
    monkeypatch.setattr(attend, "_ROWS", 32)  # in several parts
    cache.rewind()
    got = model.prefill(ids, cache, [70, 33], read_back=True)
    near(want, got, plain[[0, 1], [69, 32]])


@pytest.mark.parametrize("kv", SPECS)
def test_fresh_tokens_see_each_other_in_16_bits(checkpoint, kv):
    """The fast way: a prompt over an empty cache gives the logits of no cache at all, and leaves quantised keys."""
    model = load(checkpoint("qwen2"), device="cpu", kv=kv)
    ids, lengths = ids_of(3, 40), [40, 17, 1]
    plain = model.with_kv(None).logits(ids)
    cache = model.new_cache(3, 80)
    got = model.prefill(ids, cache, lengths)
    assert torch.allclose(got, plain[range(3), [n - 1 for n in lengths]], atol=1e-4)
    assert all(pages.spec == spec for pages, spec in zip(cache.pages, model.kv.specs or (BF16,) * 3, strict=True))
    # what follows reads it back
    more = ids_of(3, 9, seed=2)
    after = model.prefill(more, cache, [9, 4, 9])
    assert cache.lengths == [49, 21, 10]
    for b, (had, new) in enumerate(zip(lengths, [9, 4, 9], strict=True)):
        text = torch.cat((ids[b, :had], more[b, :new]))[None]
        whole = model.with_kv(None).logits(text)[0, -1]
        assert kl(whole, after[b]) < {"bf16": 1e-8}.get(kv, 0.3)
        if kv == "bf16":
            assert torch.allclose(after[b], whole, atol=1e-3)


@pytest.mark.parametrize("kv", QUANTISED)
def test_unequal_prompts_keep_to_themselves(checkpoint, kv):
    """A batch of unequal prompts, read back and stepped on, is each of them alone; padding is written nowhere."""
    model = load(checkpoint("qwen3"), device="cpu", kv=kv)
    ids, lengths = ids_of(3, 66), [66, 5, 31]
    cache = model.new_cache(3, 80)
    for pages in cache.pages:  # recycled pages: NaN in scales, 0x80 in bytes, NaN in rows of 16 bits
        for part in (pages.k, pages.v):
            part.view(torch.uint8).fill_(0x80) if not part.is_floating_point() else part.fill_(torch.nan)
        if pages.scales is not None:
            pages.scales.fill_(torch.nan)
    got = [model.prefill(ids, cache, lengths, read_back=True)]
    got += [model.step(ids[:, i], cache) for i in range(4)]
    for pages in cache.pages:
        scales = pages.scales if pages.scales is not None else pages.k
        first = cache.table[1, 0]
        assert not scales[first, :, : 5 + 4].isnan().any() and scales[first, :, 5 + 4 :].isnan().all()
    for b, length in enumerate(lengths):
        alone = model.new_cache(1, 80)
        want = [model.prefill(ids[b : b + 1, :length], alone, read_back=True)]
        want += [model.step(ids[b : b + 1, i], alone) for i in range(4)]
        for mine, other in zip(want, got, strict=True):
            assert kl(mine, other[b : b + 1]) < 1e-5, f"sequence {b}"


@pytest.mark.parametrize("kv", ["int8", "int4"])
def test_rewind_and_again(checkpoint, kv):
    model = load(checkpoint("llama"), device="cpu", kv=kv)
    ids = ids_of(2, 30)
    cache = model.new_cache(2, 40)
    first = stepped(model, ids, cache)
    cache.rewind(20)
    assert torch.equal(model.step(ids[:, 20], cache), first[:, 20])  # noted steps, over the same keys
    cache.rewind()
    assert torch.equal(stepped(model, ids, cache), first)
    assert model.generate([[5, 9, 17]], 8, stop=()) == model.generate([[5, 9, 17]], 8, stop=())


def test_offsets_of_keys_help_where_channels_are_far_from_zero(checkpoint):
    """Qwen2's key bias, without the turn: a static offset takes most of what int4 loses, and steps see it as prompts do."""
    folder = checkpoint("qwen2", rope_theta=1e12)  # slow turns keep a bias where it is
    model = load(folder, device="cpu")
    ids = ids_of(4, 64)
    cache = model.new_cache(4, 64)
    plain = model.logits(ids)
    model.prefill(ids, cache)
    specs = (KVSpec.parse("int4"),) * 3
    mu = tuple(pages.k.float().transpose(1, 2).reshape(-1, 2, 16)[: 4 * PAGE].mean(0) for pages in cache.pages)
    without = model.with_kv(specs)
    held = model.with_kv(KVLayers(specs, mu, 2, 16))
    assert held.kv.name == "calibrated" and without.kv.name == "mixed"
    assert kl(plain, held.logits(ids)) < 0.5 * kl(plain, without.logits(ids))
    near(held.logits(ids), stepped(held, ids), plain)
    after = held.new_cache(4, 64)
    held.prefill(ids[:, :40], after)
    assert kl(plain[:, -1], held.prefill(ids[:, 40:], after)) < kl(plain[:, -1], without.logits(ids)[:, -1])


def test_a_calibration_is_read_when_asked_for(checkpoint, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in checkpoint("qwen3").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    with pytest.raises(FormatError, match=r"percard_kv.json: is missing; percard calibrate-kv"):
        load(folder, device="cpu", kv="calibrated")
    specs = (BF16, KVSpec.parse("int8"), KVSpec.parse("int4"))
    mu = torch.arange(64, dtype=torch.float32).view(2, 32)
    KVLayers(specs, (None, None, mu), 2, 32).save(folder)
    assert load(folder, device="cpu").kv.specs == ()
    model = load(folder, device="cpu", kv="calibrated")
    assert model.kv.specs == specs and torch.equal(model.kv.mu[2], mu)
    assert model.notes == ("cache calibrated: bf16 in layer 0; int8 in layer 1; int4 in layer 2",)
    assert torch.equal(model.new_cache(1, 8).pages[2].mu, mu)
    assert load(folder, device="cpu", kv="calibrated", layers=2).kv.specs == specs[:2]


def test_four_bits_leave_the_first_layer_unless_told(checkpoint):
    folder = checkpoint("qwen3")
    int4 = KVSpec.parse("int4")
    assert load(folder, device="cpu", kv="int4").kv.specs == (BF16, int4, int4)
    assert load(folder, device="cpu", kv="int4").notes == ("cache int4: bf16 in layer 0",)
    assert load(folder, device="cpu", kv=(int4,) * 3).kv.specs == (int4,) * 3
    assert load(folder, device="cpu", kv=KVSpec.parse("int8")).kv.specs == (KVSpec.parse("int8"),) * 3
    assert load(folder, device="cpu", kv="bf16").kv is engine_module.kv.PLAIN


# ---- bytes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kv", "size"), [("bf16", 4096), ("int8", 2080), ("k8v4", 1600), ("int4", 1088), ("int4-sym", 1056)]
)
def test_bytes_of_a_token_as_allocated(kv, size):
    """8 heads of 128, one layer: rows and scale words, nothing else."""
    config = load_config("shape:qwen3-0.6b")
    assert (config.kv_heads, config.head_dim) == (8, 128)
    specs = (KVSpec.parse(kv),) * 2
    cache = Cache.new(config, 3, 130, torch.bfloat16, CPU, layers=2, specs=specs)
    held = sum(t.untyped_storage().nbytes() for p in cache.pages for t in (p.k, p.v, p.scales) if t is not None)
    assert held == cache.nbytes == 2 * 3 * 3 * PAGE * size and cache.token_bytes == 2 * size
    assert {pages.k.shape[0] for pages in cache.pages} == {9}


def test_a_context_of_32k_fits_in_the_bytes_that_were_predicted(tmp_path, monkeypatch):
    """Two layers with the heads of Qwen3-0.6B, a step at the end of 32k tokens; of all 28 layers the prediction."""
    raw = json.loads((load_config.__globals__["SHAPES"] / "qwen3-0.6b.json").read_text())
    raw |= {"num_hidden_layers": 2, "vocab_size": 300, "hidden_size": 128, "intermediate_size": 128}
    (tmp_path / "wide.json").write_text(json.dumps(raw))
    whole = load_config("shape:qwen3-0.6b")
    specs = Layers("int8", (KVSpec.parse("int8"),) * whole.layers).specs
    assert 32768 * sum(s.bytes_per_token(whole.head_dim, whole.kv_heads) for s in specs) == 28 * 2080 * 32768
    monkeypatch.setitem(load_config.__globals__, "SHAPES", tmp_path)
    for kv, size in (("int8", 2 * 2080), ("int4", 4096 + 1088)):
        model = load("shape:wide", device="cpu", dtype=torch.bfloat16, kv=kv, max_len=32768)
        cache = model.new_cache(1, 32768)
        assert cache.nbytes == 32768 * size == 32768 * model.kv_bytes_per_token
        cache.fill_random()
        cache.rewind(32767)
        assert torch.isfinite(model.step(torch.tensor([7]), cache)).all()
        assert cache.lengths == [32768]


def test_random_pages_are_of_a_real_scale():
    config = load_config("shape:qwen3-0.6b")
    from percard.formats.kvcache import read

    for kv in SPECS:
        cache = Cache.new(config, 1, 70 * PAGE, torch.bfloat16, CPU, layers=1, specs=(KVSpec.parse(kv),))
        cache.fill_random()
        k, v = read(cache.pages[0], torch.tensor([0, 69]), torch.tensor([3, 60]), 128)
        assert 0.8 < k.std() < 1.2 and 0.8 < v.std() < 1.2 and torch.isfinite(k).all() and torch.isfinite(v).all()


# ---- quality and refusals -----------------------------------------------------------------------------------------


def test_the_small_trained_model_passes_its_gates():
    """int8 within 0.1 % of perplexity; each spec within its own limits; more bits are nearer."""
    ids = quality.read_ids(TINY / "heldout.txt", TINY, 4096)
    base = load(TINY, device="cpu")
    found = {kv: quality.compare(base, base.with_kv(kv), ids) for kv in ("int8", "k8v4", "int4")}
    for kv, q in found.items():
        assert quality.gate_cache(q, kv) == ("green", []), f"{kv}: {quality.words(q)}"
    assert abs(found["int8"].perplexity_rise) < 0.001
    assert 0 < found["int8"].kl < found["k8v4"].kl < found["int4"].kl


def test_gates_of_caches():
    good = quality.Quality(0.0001, 0.999, 10.0, 10.0, 100, "")
    bad = quality.Quality(float("nan"), 0.95, 10.02, 10.0, 100, "")
    assert quality.gate_cache(good, "int8-sym".removesuffix("-sym")) == ("green", [])
    word, reasons = quality.gate_cache(bad, "int8")
    assert word == "red" and len(reasons) == 3 and "cache int8: KL nan is above" in reasons[0]
    assert quality.gate_cache(bad, "bf16")[0] == "none"
    mixed = Layers("mixed", (BF16, KVSpec.parse("int8"), KVSpec.parse("int4-sym")))
    assert "cache int4" in quality.gate_cache(bad, mixed)[1][0]  # held to the limits of the fewest bits


def test_refusals(checkpoint):
    folder = checkpoint("qwen3")
    with pytest.raises(FormatError, match=r"'int5' is not one; known: bf16, int8, .*calibrated"):
        load(folder, device="cpu", kv="int5")
    with pytest.raises(FormatError, match="2 cache specs for 3 layers"):
        load(folder, device="cpu", kv=(BF16, BF16))
    with pytest.raises(FormatError, match="mu of layer 1 is"):
        wrong = Layers("x", (KVSpec.parse("int8"),) * 3, (None, torch.zeros(2, 8), None))
        load(folder, device="cpu", kv=wrong)
    odd = checkpoint("qwen3", head_dim=24)
    with pytest.raises(FormatError, match="heads of 24 numbers have no int8 cache, expected a multiple of 16"):
        load(odd, device="cpu", kv="int8")
    with pytest.raises(FormatError, match="synthetic weights have no calibrated cache"):
        load("shape:qwen3-0.6b", device="cpu", kv="calibrated")
    model = load(folder, device="cpu", kv="int8", max_len=64)
    cache = model.new_cache(1, 60)
    model.prefill(ids_of(1, 50), cache)
    with pytest.raises(ValueError, match="50 are filled and 20 more"):
        model.prefill(ids_of(1, 20), cache)
    with pytest.raises(ValueError, match="2 cache specs"):
        Cache.new(model.config, 1, 8, torch.float32, CPU, specs=(BF16, BF16))
