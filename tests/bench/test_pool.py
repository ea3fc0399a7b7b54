"""Pages are lent and come back, whatever becomes of a request; waves give the tokens of one-by-one decoding, to the bit."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from percard.bench import load as mixes
from percard.bench import waves
from percard.bench.engine import load
from percard.bench.engine.cache import VACANT
from percard.bench.engine.pool import OverLong, Pool
from percard.bench.load import Request
from percard.formats.kvcache import PAGE
from percard.formats.spec import QuantSpec

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny-qwen3"


def test_pages_are_lent_and_come_back(checkpoint):
    model = load(checkpoint("qwen3"), device="cpu")
    pool = Pool.of(model, 4 * PAGE + 5)
    assert (pool.count, pool.limit, len(pool.free)) == (4, 256, 4)
    first, second = pool.borrow(PAGE, 1), pool.borrow(10, 20)
    assert first is not None and second is not None and (len(first.pages), len(second.pages)) == (2, 1)
    assert not set(first.pages) & set(second.pages)
    assert pool.borrow(PAGE, 1) is None and len(pool.free) == 1, "a request that waits holds nothing"
    with pytest.raises(OverLong, match=r"200 prompt and 57 answer tokens are above the 256 of a sequence"):
        pool.borrow(200, 57)
    with pytest.raises(OverLong, match="at least one of each"):
        pool.borrow(5, 0)
    small = Pool.of(model, PAGE)
    with pytest.raises(OverLong, match="need 2 pages of 64 tokens, the pool has 1"):
        small.borrow(PAGE, 1)
    assert len(small.free) == 1
    pool.give_back(first)
    pool.give_back(first)
    assert len(pool.free) == 3 and sorted([*pool.free, *second.pages]) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="given its pages back"):
        pool.batch([second, first])
    with pytest.raises(ValueError, match="holds no page"):
        Pool.of(model, PAGE - 1)


@pytest.mark.parametrize("kv", ["bf16", "int8"])
def test_a_vacant_row_takes_no_part(checkpoint, kv):
    """What a card's graph of more rows than sequences does: nothing is written for the rest, the others are the same."""
    model = load(checkpoint("qwen3"), device="cpu", kv=kv, batch_invariant=True)
    pool = Pool.of(model, 8 * PAGE)
    ids = torch.randint(1, 211, (12,), generator=torch.Generator().manual_seed(1))

    def two_steps(rows: int) -> torch.Tensor:
        leases = [pool.borrow(7, 3), pool.borrow(5, 3)]
        cache = pool.batch(leases)
        model.prefill_packed(ids, cache, [7, 5])
        pool.note(cache, leases)
        assert [lease.length for lease in leases] == [7, 5]
        cache = pool.batch(leases, rows)
        out = []
        for token in (3, 4):
            out.append(model.step(torch.tensor([token] * rows), cache)[:2])
        assert cache.lengths == [9, 7, *[VACANT] * (rows - 2)]
        lent = {page for lease in leases for page in lease.pages}
        others = [page for page in range(pool.count) if page not in lent]
        assert not any(part[others].any() for pages in pool.pages for part in (pages.k, pages.v))
        for lease in reversed(leases):
            pool.give_back(lease)
        return torch.stack(out)

    want = two_steps(2)
    assert torch.equal(two_steps(5), want)
    assert len(pool.free) == pool.count


def test_a_sequence_does_not_outgrow_its_pages(checkpoint):
    model = load(checkpoint("qwen3"), device="cpu")
    pool = Pool.of(model, 8 * PAGE)
    cache = pool.batch([pool.borrow(4, 1), pool.borrow(40, 40)])
    with pytest.raises(ValueError, match="the cache has 5 positions"):
        model.prefill_packed(torch.ones(46, dtype=torch.long), cache, [6, 40])
    model.prefill_packed(torch.ones(44, dtype=torch.long), cache, [4, 40])
    model.step(torch.ones(2, dtype=torch.long), cache)
    with pytest.raises(ValueError, match="5 are filled and 1 more"):
        model.step(torch.ones(2, dtype=torch.long), cache)


@pytest.mark.parametrize("spec,kv", [(None, "bf16"), (None, "int8"), ("w8a8", "int8"), ("w4a16-g128", "k8v4")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_a_sequence_do_not_see_the_others(dtype, spec, kv):
    """Not only the tokens: every bit of the logits, of a packed prompt and of steps, whoever is beside it and wherever it lies."""
    spec = None if spec is None else QuantSpec.parse(spec)
    model = load(TINY, spec=spec, dtype=dtype, device="cpu", kv=kv, batch_invariant=True, layers=2)
    generator = torch.Generator().manual_seed(2)
    lengths = [70, 3, 64, 1, 129, 17]
    prompts = [torch.randint(1, 4096, (n,), generator=generator) for n in lengths]
    pool = Pool.of(model, 20 * PAGE)

    def logits(which: list[int]) -> torch.Tensor:
        leases = [pool.borrow(lengths[i], 4) for i in which]
        cache = pool.batch(leases)
        out = [model.prefill_packed(torch.cat([prompts[i] for i in which]), cache, [lengths[i] for i in which])]
        out += [model.step(torch.tensor([7 + step + i for i in which]), cache) for step in range(3)]
        for lease in leases:
            pool.give_back(lease)
        return torch.stack(out, 1)

    together = logits([0, 1, 2, 3, 4, 5])
    for i in range(6):
        assert torch.equal(logits([i])[0], together[i]), f"sequence {i} alone"
    assert torch.equal(logits([4, 1])[1], together[1])


# ---- waves --------------------------------------------------------------------------------------------------------


def mixed(count: int, most_prompt: int, most_answer: int, seed: int = 3) -> list[Request]:
    """Requests of mixed length, a few of one token, and of one page and a token."""
    generator = random.Random(seed)
    found = [Request(generator.randint(1, most_prompt), generator.randint(1, most_answer)) for _ in range(count)]
    found[1:4] = [Request(1, 1), Request(PAGE, 1), Request(PAGE + 1, 2)]
    return found


def one_by_one(model, requests: list[Request], prompts: list[torch.Tensor]) -> list[list[int]]:
    return [
        model.generate([ids.tolist()], request.answer, stop=())[0]
        for request, ids in zip(requests, prompts, strict=True)
    ]


def agree(model, count: int, most_prompt: int, most_answer: int, concurrency: int, pages: int) -> None:
    """Waves over a pool that does not hold all of a wave at times, and one by one."""
    requests = mixed(count, most_prompt, most_answer)
    prompts = mixes.prompts(requests, model.config.vocab, 5)
    pool = Pool.of(model, pages * PAGE, most_prompt + most_answer + PAGE)
    for kv in pool.pages:  # recycled pages: whatever lies there must not matter
        for part in (kv.k, kv.v):
            part.fill_(float("nan")) if part.is_floating_point() else part.fill_(77)
    found = waves.run(waves.Stepper(model), pool, requests, prompts, concurrency, keep=True)
    assert sorted(pool.free) == list(range(pool.count)), "all pages are free"
    assert [s.made for s in found.served] == [r.answer for r in requests] and not any(s.refused for s in found.served)
    want = one_by_one(model, requests, prompts)
    differ = [b for b, (s, tokens) in enumerate(zip(found.served, want, strict=True)) if s.tokens != tokens]
    assert not differ, f"requests {differ[:5]} of {count} differ from decoding alone"
    assert len({tuple(t) for t in want}) > count / 3, "answers that are all alike would hide a mistake"


@pytest.mark.parametrize("spec,kv", [(None, "bf16"), ("w8a8", "int8"), ("w4a16-g128", "int4")])
def test_200_requests_in_waves_are_what_each_is_alone(spec, kv):
    """Token for token, in fp32 on a CPU, batch-invariant: 200 requests, waves of up to 24 over 30 pages."""
    spec = None if spec is None else QuantSpec.parse(spec)
    model = load(TINY, spec=spec, dtype=torch.float32, device="cpu", kv=kv, batch_invariant=True, layers=2)
    agree(model, 200, 70, 8, 24, 30)


@pytest.mark.full
@pytest.mark.parametrize("spec,kv", [(None, "bf16"), ("w8a8", "int8"), ("w4a16-g128", "k8v4"), ("w4a8-g128", "int4")])
def test_200_requests_through_the_whole_model(spec, kv):
    spec = None if spec is None else QuantSpec.parse(spec)
    model = load(TINY, spec=spec, dtype=torch.float32, device="cpu", kv=kv, batch_invariant=True)
    agree(model, 200, 200, 40, 24, 40)


def test_all_pages_are_free_after_2000_cancelled_and_over_long_requests(checkpoint):
    model = load(checkpoint("qwen3"), device="cpu", layers=1)
    generator, kinds = random.Random(4), ["leaves", "gone", "long", "huge"]
    requests = []
    for i in range(2000):
        prompt, answer = generator.randint(1, 60), generator.randint(2, 9)
        kind = kinds[i % 4]
        if kind == "leaves":
            requests.append(Request(prompt, answer, leaves=generator.randint(1, answer - 1)))
        elif kind == "gone":
            requests.append(Request(prompt, answer, leaves=0))
        else:
            requests.append(Request(400 if kind == "long" else 190, 20))
    pool = Pool.of(model, 3 * PAGE)  # the context is 256 tokens, and the pool has less
    found = waves.run(waves.Stepper(model), pool, requests, mixes.prompts(requests, 211, 1), 16)
    assert sorted(pool.free) == [0, 1, 2]
    assert sum(s.refused is not None for s in found.served) == 1000
    assert "above the 256 of a sequence" in (found.served[2].refused or "")
    assert "pages of 64 tokens, the pool has 3" in (found.served[3].refused or "")
    assert [s.made for s in found.served] == [r.leaves if r.prompt < 100 else 0 for r in requests]


def test_pages_come_back_when_a_step_fails(checkpoint, monkeypatch):
    model = load(checkpoint("qwen3"), device="cpu")
    pool, requests = Pool.of(model, 8 * PAGE), [Request(5, 5), Request(9, 4)]

    def broken(self: object, tokens: object, cache: object) -> list[int]:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(waves.Stepper, "__call__", broken)
    with pytest.raises(RuntimeError, match="luck"):
        waves.run(waves.Stepper(model), pool, requests, mixes.prompts(requests, 211, 1), 2)
    assert len(pool.free) == pool.count


def test_times_of_a_wave(checkpoint):
    """A clock that ticks once for each look at it: TTFT, gaps and ends are what was between."""
    model = load(checkpoint("qwen3"), device="cpu")
    ticks = iter(range(1000))
    requests = [Request(4, 3), Request(6, 1), Request(waves.PROMPT_TOKENS, 1), Request(2, 2)]
    requests[2] = replace(requests[2], prompt=100)
    pool = Pool.of(model, 16 * PAGE)
    found = waves.run(
        waves.Stepper(model), pool, requests, mixes.prompts(requests, 211, 1), 4, now=lambda: float(next(ticks))
    )
    # looks: 0 the start, 1 the wave, 2 prompts, 3 before steps, 4 and 5 steps, 6 the end
    assert [s.ttft_s for s in found.served] == [1.0] * 4
    assert [s.e2e_s for s in found.served] == [4.0, 1.0, 1.0, 3.0]
    assert [s.itl_s for s in found.served] == [[2.0, 1.0], [], [], [2.0]]
    assert [s.tpot_s for s in found.served] == [1.5, None, None, 2.0]
    assert (found.wall_s, found.prefill_s, found.waves, found.rows) == (6.0, 2.0, 1, 4)
    assert (found.tokens_out, found.tokens_in) == (7, 112)
    assert waves.within(found.served, 1.0, 1.5) == 3 and waves.within(found.served, 0.5, 9.0) == 0
    assert waves.spread([s.e2e_s for s in found.served])["p50"] == 2.0
