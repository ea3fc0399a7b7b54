"""One decode step of the engine: four layers of Qwen3-0.6B's shape and its head, after 256 tokens."""

from __future__ import annotations

import pytest
import torch

from percard.bench import engine
from percard.formats.spec import QuantSpec

LAYERS, DEPTH = 4, 256


@pytest.mark.bench
@pytest.mark.parametrize("spec", ["bf16", "w8a8", "w4a16-g64", "w4a8-g64"])
def test_decode_step(timed, device, spec):
    parsed = None if spec == "bf16" else QuantSpec.parse(spec)
    head = "16bit" if parsed is None else "int8-row"
    model = engine.load("shape:qwen3-0.6b", spec=parsed, layers=LAYERS, head=head, max_len=DEPTH + 2, device=device)
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab, (1, DEPTH + 1), generator=random).to(device)
    with torch.inference_mode():
        cache = model.new_cache(1, DEPTH + 2)
        model.prefill(ids[:, :DEPTH], cache)
        stepped, whole = model.step(ids[:, DEPTH], cache).float(), model.logits(ids)[:, -1].float()
        # A step is the last position of the whole up to rounding. A row of normal values in int8 is off by 3.5 / 127 / sqrt(12),
        # 0.8 %; both ways round it at four places of each of four layers, at worst on their own: 0.8 % x sqrt(2 x 16) = 4.5 %,
        # of which twice is allowed. A step at a wrong position is off by more than half.
        assert float((stepped - whole).norm() / whole.norm()) < 0.09

        def step() -> torch.Tensor:
            cache.rewind(DEPTH)
            return model.step(ids[:, DEPTH], cache)

        flops = 2 * (LAYERS * model.config.block_parameters() + model.config.vocab * model.config.hidden)
        timed(step, f"qwen3-0.6b.model.tg1.d{DEPTH}.b1 ({LAYERS} layers)", spec, model.step_bytes(1), flops)
