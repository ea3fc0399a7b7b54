"""The one-layer probe: which float dtype is fastest for a phase on this machine, and how long a model will take.

FP16 in "against FP16" means the fastest float dtype that torch has here, per phase. Which one that is differs by
machine (bf16 where there are bf16 units, fp32 on an AVX2 CPU for prefill), so it is measured, not assumed.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from ..formats.spec import QuantSpec
from ..kernels.linear import linear
from ..kernels.op import Tape
from . import clock
from .engine import attend, rope
from .engine.cache import Cache
from .engine.config import Config
from .engine.model import Model, block, one_row_linear
from .engine.weights import SyntheticSource, copied, one_block

PHASES = ("prefill", "decode")
_COLD = 2**28  # bytes of 16-bit weights that a decode probe goes through: one layer alone would stay in a CPU's cache
NEAR = 1.25  # a layer that takes so much more may still belong to the faster model
FLOATS = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float16: "fp16"}


@dataclass(frozen=True)
class Probe:
    """Seconds of one decoder block by phase and dtype; `failed` says why a dtype has none. Decode is one token, and a
    float one has its share of the head.

    `mv` are the dtypes whose decode was faster through torch.mv; their seconds are those of torch.mv.
    """

    seconds: dict[str, dict[torch.dtype, float]]
    failed: dict[torch.dtype, str]
    mv: frozenset[torch.dtype] = frozenset()

    def fastest(self, phase: str) -> torch.dtype:
        """The dtype with the least time. RuntimeError when no dtype ran."""
        found = self.seconds[phase]
        if not found:
            raise RuntimeError(f"no float dtype ran one layer: {'; '.join(self.failed.values())}")
        return min(found, key=lambda dtype: found[dtype])

    def words(self, phase: str) -> str:
        """The times in ms, fastest first: "bf16 2.31 ms, fp32 3.90 ms"."""
        found = sorted(self.seconds[phase].items(), key=lambda item: item[1])
        through = self.mv if phase == "decode" else frozenset()
        return ", ".join(f"{FLOATS[d]}{' mv' if d in through else ''} {seconds * 1e3:.2f} ms" for d, seconds in found)


def probe(
    config: Config,
    spec: QuantSpec | None,
    dtypes: Sequence[torch.dtype],
    *,
    device: torch.device,
    prompt: int,
    batch: int = 1,
    impl: str | None = None,
    phases: Sequence[str] = PHASES,
    now: Callable[[], float] = time.perf_counter,
) -> Probe:
    """Times one block of random weights at the true shape: `prompt` tokens at once, and one token at that depth; without a
    spec a decode has its share of the head.

    The same weights in each dtype, quantised to `spec` first (None = as they are). A dtype that torch cannot run is
    left out with its reason. On a CPU a float decode of one sequence is tried through torch.mv as well. `phases` ("decode",)
    leaves the prompt out.
    """
    seconds: dict[str, dict[torch.dtype, float]] = {phase: {} for phase in PHASES}
    failed: dict[torch.dtype, str] = {}
    mv = set()
    for dtype in dtypes:
        try:
            taken = _one(config, spec, dtype, device, prompt, batch, impl, phases, now)
        except (RuntimeError, NotImplementedError) as error:
            failed[dtype] = f"{FLOATS[dtype]}: {str(error).splitlines()[0]}"
            continue
        for phase in phases:
            seconds[phase][dtype] = taken[phase]
        if taken.get("mv", float("inf")) < taken["decode"]:
            seconds["decode"][dtype] = taken["mv"]
            mv.add(dtype)
    return Probe(seconds, failed, frozenset(mv))


@torch.inference_mode()
def _one(
    config: Config,
    spec: QuantSpec | None,
    dtype: torch.dtype,
    device: torch.device,
    prompt: int,
    batch: int,
    impl: str | None,
    phases: Sequence[str],
    now: Callable[[], float],
) -> dict[str, float]:
    weights = one_block(config, SyntheticSource(dtype, device, spec, 0), dtype=dtype, device=device, impl=impl)
    # The same number of copies for every dtype and spec, as a model has the same number of layers.
    copies = max(1, min(config.layers, _COLD // (2 * config.block_parameters())))
    layers = [weights] + [copied(weights) for _ in range(copies - 1)]
    turns = rope.table(config.rope, config.head_dim, prompt + 1, device)
    x = torch.randn(batch, prompt if "prefill" in phases else 1, config.hidden, device=device).to(dtype)
    cache = Cache.new(config, batch, prompt + 1, dtype, device, layers=copies)
    cache.rewind(prompt)
    cache.point()

    def prefill() -> None:
        matmul = functools.partial(linear, impl=impl)
        block(x.clone(), None, weights, config, 0, attend.causal(config, turns[:prompt], dtype), matmul, impl)

    def decode(matmul: Callable[..., torch.Tensor]) -> Callable[[], object]:
        """A step as the engine makes it: noted on a CPU."""
        tape = Tape() if device.type == "cpu" else None
        over, by = attend.one(config, turns, cache, impl=impl, tape=tape), functools.partial(matmul, impl=impl)

        def step() -> None:
            token, add = x[:, -1:].clone(), None
            for i, layer in enumerate(layers):
                token, add = block(token, add, layer, config, i, over, by, impl, tape=tape)

        if tape is None:
            return step
        step()
        return tape.again

    found = {"prefill": _best(prefill, device, now)} if "prefill" in phases else {}
    found["decode"] = _best(decode(linear), device, now) / copies
    mv = spec is None and batch == 1 and device.type == "cpu"
    if mv:
        found["mv"] = _best(decode(one_row_linear), device, now) / copies
    if spec is None:
        # The head of a small model is a third of what a step reads. Its time does not depend on the numbers in it.
        head, last = torch.full((config.vocab, config.hidden), 0.01, device=device, dtype=dtype), x[:, -1:].contiguous()
        found["decode"] += _best(lambda: linear(last, head), device, now) / config.layers
        if mv:
            found["mv"] += _best(lambda: one_row_linear(last, head), device, now) / config.layers
    return found


@torch.inference_mode()
def settle(
    found: Probe,
    load: Callable[[torch.dtype], Model],
    *,
    prompt: int,
    batch: int,
    now: Callable[[], float] = time.perf_counter,
) -> Probe:
    """The dtypes whose layer came near the fastest, timed as whole models: seconds per layer, head and all.

    One layer does not settle it: layers that differ by 2 % were seen to make models that differ by 60 %. `load` gives the
    16-bit or fp32 model. `found` itself when nothing came near.
    """
    near = {
        p: [d for d, s in found.seconds[p].items() if s <= NEAR * min(found.seconds[p].values())]
        for p in PHASES
        if found.seconds[p]
    }
    if all(len(dtypes) == 1 for dtypes in near.values()):
        return found
    seconds: dict[str, dict[torch.dtype, float]] = {phase: {} for phase in PHASES}
    mv = set()
    for dtype in dict.fromkeys(d for dtypes in near.values() for d in dtypes):
        model = load(dtype)
        cache, layers = model.new_cache(batch, prompt + 1), model.config.layers
        cache.fill_random()
        ids = torch.randint(0, model.config.vocab, (batch, prompt), device=model.device)

        def prefill(model: Model = model, cache: Cache = cache, ids: torch.Tensor = ids) -> None:
            cache.rewind()
            model.prefill(ids, cache)

        def decode(model: Model, cache: Cache = cache, ids: torch.Tensor = ids) -> None:
            cache.rewind(prompt)
            model.step(ids[:, 0], cache)

        if dtype in near.get("prefill", ()):
            seconds["prefill"][dtype] = _best(prefill, model.device, now) / layers
        if dtype in near["decode"]:
            by_row = replace(model, mv=True)
            seconds["decode"][dtype] = _best(functools.partial(decode, model), model.device, now) / layers
            rows = _best(functools.partial(decode, by_row), model.device, now) / layers if dtype in found.mv else None
            if rows is not None and rows < seconds["decode"][dtype]:
                seconds["decode"][dtype] = rows
                mv.add(dtype)
    return Probe(seconds, found.failed, frozenset(mv))


def _best(function: Callable[[], object], device: torch.device, now: Callable[[], float]) -> float:
    """The best of a few calls after one that warms up; a slow body is called twice only."""
    best, start = float("inf"), now()
    for turn in range(9):
        clock.synchronize(device)
        begin = now()
        function()
        clock.synchronize(device)
        end = now()
        if turn > 0:
            best = min(best, end - begin)
            if end - start > 0.5:
                break
    return best
