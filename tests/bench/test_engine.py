"""The engine is right: transformers is the judge, in fp32, on small models of every known architecture."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from percard.bench.engine import load
from percard.bench.engine.graphs import capture
from percard.bench.engine.model import Model

transformers = pytest.importorskip("transformers")
KINDS = ["llama", "llama3-rope", "llama-linear-rope", "qwen2", "qwen2-yarn", "qwen3", "qwen3-untied"]  # of conftest.py
LENGTHS = [37, 5, 64, 1]


def batch(vocab: int, seed: int = 1) -> torch.Tensor:
    """Right-padded random prompts of LENGTHS."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, vocab, (len(LENGTHS), max(LENGTHS)), generator=generator)
    for row, length in zip(ids, LENGTHS, strict=True):
        row[length:] = 0
    return ids


def judge(folder) -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module", params=KINDS)
def pair(request, checkpoint) -> tuple[Model, torch.nn.Module]:
    folder = checkpoint(request.param)
    return load(folder, device="cpu"), judge(folder)


def test_logits_equal_transformers(pair):
    ours, theirs = pair
    ids = batch(ours.config.vocab)
    mask = torch.zeros_like(ids)
    for row, length in zip(mask, LENGTHS, strict=True):
        row[:length] = 1
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=mask).logits
    got = ours.logits(ids, LENGTHS)
    assert expected.std() > 0.5, "logits without spread would hide a mistake"
    for b, length in enumerate(LENGTHS):
        error = (got[b, :length] - expected[b, :length]).abs().max()
        assert error < 1e-3, f"sequence {b}: {error}"
        assert not got[b, length:].any()


def test_cached_steps_equal_logits_without_cache(pair):
    """Prefill of unequal prompts, then steps: the same logits as one pass over each whole text."""
    ours, _ = pair
    ids, extra = batch(ours.config.vocab), batch(ours.config.vocab, seed=2)
    cache = ours.new_cache(len(LENGTHS), max(LENGTHS) + 6)
    for pages in cache.pages:  # what was never written must never be read
        pages.k.fill_(1e4)
        pages.v.fill_(1e4)
    steps = [ours.prefill(ids, cache, LENGTHS)]
    steps += [ours.step(extra[:, i], cache) for i in range(6)]
    for b, length in enumerate(LENGTHS):
        whole = torch.cat((ids[b, :length], extra[b, :6]))
        expected = ours.logits(whole[None])[0, length - 1 :]
        got = torch.stack([step[b] for step in steps])
        assert torch.allclose(got, expected, atol=1e-3), f"sequence {b}: {(got - expected).abs().max()}"
    assert cache.lengths == [length + 6 for length in LENGTHS]


def test_greedy_64_tokens_equal_transformers(pair):
    ours, theirs = pair
    prompts = [row[:length].tolist() for row, length in zip(batch(ours.config.vocab), LENGTHS, strict=True)]
    got = ours.generate(prompts, 64, stop=())
    for prompt, answer in zip(prompts, got, strict=True):
        with torch.no_grad():
            expected = theirs.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=64,
                min_new_tokens=64,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )[0, len(prompt) :].tolist()
        assert answer == expected


def test_equal_and_unequal_lengths_take_the_same_answer(checkpoint):
    model = load(checkpoint("qwen3"), device="cpu")
    prompts = [[5, 9, 17, 3], [5, 9, 17, 3, 88, 2]]
    assert model.generate(prompts, 12, stop=()) == [model.generate([p], 12, stop=())[0] for p in prompts]


def test_bf16_stays_near_fp32(checkpoint):
    folder = checkpoint("qwen3")
    exact, half = load(folder, device="cpu"), load(folder, device="cpu", dtype=torch.bfloat16)
    ids = batch(exact.config.vocab)[:1]
    p, q = exact.logits(ids).log_softmax(-1), half.logits(ids).log_softmax(-1)
    assert (p.exp() * (p - q)).sum(-1).mean() < 0.01
    assert half.nbytes * 2 == exact.nbytes


def test_generation_stops_and_keeps_the_others_going(checkpoint):
    model = load(checkpoint("llama"), device="cpu")
    prompts = [[1, 2, 3], [7, 8]]
    free = model.generate(prompts, 20, stop=())
    end = next(token for token in free[0] if token not in free[1])
    stopped = model.generate(prompts, 20, stop=[end])
    assert stopped[0] == free[0][: free[0].index(end)]
    assert stopped[1] == free[1]


def test_sampling_is_seeded_and_independent_of_the_batch(checkpoint):
    model = load(checkpoint("qwen2"), device="cpu")
    options = {"temperature": 0.9, "top_p": 0.95, "stop": ()}
    first = model.generate([[1, 2, 3], [4, 5]], 16, seed=3, **options)
    assert first == model.generate([[1, 2, 3], [4, 5]], 16, seed=3, **options)
    assert first[0] == model.generate([[1, 2, 3]], 16, seed=3, **options)[0]
    assert first != model.generate([[1, 2, 3], [4, 5]], 16, seed=4, **options)


def test_limits_are_named(checkpoint):
    model = load(checkpoint("qwen3"), device="cpu", max_len=16)
    with pytest.raises(ValueError, match="max_len=20"):
        model.logits(torch.ones(1, 20, dtype=torch.long))
    with pytest.raises(ValueError, match="max_len=17"):
        model.new_cache(1, 17)
    cache = model.new_cache(2, 8)
    with pytest.raises(ValueError, match="cache of 1"):
        model.prefill(torch.ones(1, 4, dtype=torch.long), cache)
    with pytest.raises(ValueError, match="lengths"):
        model.prefill(torch.ones(2, 4, dtype=torch.long), cache, [4, 0])
    model.prefill(torch.ones(2, 8, dtype=torch.long), cache)
    with pytest.raises(ValueError, match="length=9"):
        model.step(torch.ones(2, dtype=torch.long), cache)
    cache.rewind(3)
    assert model.step(torch.ones(2, dtype=torch.long), cache).shape == (2, model.config.vocab)
    with pytest.raises(ValueError, match="another tokenizer"):
        model.generate([[model.config.vocab]], 1)
    with pytest.raises(ValueError, match="no token"):
        model.generate([[]], 1)


def test_on_a_cpu_a_loop_stays_a_function():
    def loop() -> int:
        return 3

    assert capture(loop, torch.device("cpu")) is loop


@pytest.mark.gpu
@pytest.mark.parametrize("kv", ["bf16", "int8", "k8v4", "int4"])
def test_a_captured_decode_loop_equals_steps(checkpoint, kv):
    device = torch.device("cuda")
    model = load(checkpoint("qwen3"), device=device, kv=kv)
    cache, prompt = model.new_cache(2, 32), torch.randint(1, 211, (2, 16), device=device)
    first = model.prefill(prompt, cache).argmax(-1)
    expected, tokens = [], first
    for _ in range(8):
        tokens = model.step(tokens, cache).argmax(-1)
        expected.append(tokens)
    held, out = first.clone(), torch.zeros(8, 2, dtype=torch.int64, device=device)

    def loop() -> None:
        tokens = held
        cache.rewind(16)
        for i in range(8):
            tokens = model.step(tokens, cache).argmax(-1)
            out[i] = tokens

    replay = capture(loop, device)
    out.zero_()
    replay()
    assert torch.equal(out, torch.stack(expected))


def test_single_rows_through_mv_are_the_same(checkpoint):
    for kind in ("qwen2", "llama3-rope"):
        plain = load(checkpoint(kind), device="cpu")
        other = replace(plain, mv=True)
        assert other.generate([[5, 9, 17]], 16, stop=()) == plain.generate([[5, 9, 17]], 16, stop=())
        assert other.kernel == "torch mv" and plain.kernel == "torch"
        hidden = plain.hidden(torch.tensor([[5, 9, 17]]))[:, -1:]
        assert torch.allclose(other.head_logits(hidden), plain.head_logits(hidden), atol=1e-4)
