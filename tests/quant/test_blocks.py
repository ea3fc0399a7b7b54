"""The block runner: block by block gives what the model itself gives, for every family, and each linear can be watched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from percard.formats import affine
from percard.formats.checkpoint import Checkpoint
from percard.formats.spec import FormatError, QuantSpec
from percard.quant import blocks, walk

from .conftest import CONFIGS


def opened(folder: Path) -> tuple[Checkpoint, walk.Map]:
    source = Checkpoint.open(folder)
    infos = source.tensors
    shapes, dtypes = {n: i.shape for n, i in infos.items()}, {n: i.dtype for n, i in infos.items()}
    return source, walk.survey(source.config, shapes, dtypes, str(folder))


def logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    source, found = opened(folder)
    frame = blocks.Frame(source.config, found, torch.float32, str(folder))
    x, arguments = frame.start(ids, source.read("model.embed_tokens.weight"))
    for i in range(len(frame)):
        x = frame.block(i, source.read).forward(x, arguments[i])
    return F.linear(frame.normed(x, source.read), frame.head(source.read))


@pytest.mark.parametrize("kind", CONFIGS)
def test_chain_equals_transformers(tiny: Callable[..., Path], kind: str) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny(kind, dtype=torch.float32, max_position_embeddings=64)
    ids = torch.randint(0, 96, (3, 17), generator=torch.Generator().manual_seed(3))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    torch.testing.assert_close(logits(folder, ids), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", CONFIGS)
def test_check_passes_for_every_family(tiny: Callable[..., Path], kind: str) -> None:
    source, found = opened(tiny(kind, max_position_embeddings=64))
    blocks.check(source.config, found, "here")


def test_check_fails_when_the_chain_differs(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    source, found = opened(tiny("qwen3_moe", max_position_embeddings=64))
    monkeypatch.setattr(blocks.Experts, "one", lambda self, expert, x: x)
    with pytest.raises(FormatError, match="gives other logits than its own forward"):
        blocks.check(source.config, found, "here")


def test_watchers_see_the_inputs_and_may_stop(tiny: Callable[..., Path]) -> None:
    source, found = opened(tiny("qwen3_moe", dtype=torch.float32, max_position_embeddings=64, mlp_only_layers=[]))
    frame = blocks.Frame(source.config, found, torch.float32, "here")
    ids = torch.randint(0, 96, (2, 9), generator=torch.Generator().manual_seed(4))
    x, arguments = frame.start(ids, source.read("model.embed_tokens.weight"))
    block = frame.block(0, source.read)
    seen: dict[str, list[torch.Tensor]] = {}

    def keep(name: str) -> Callable[[torch.Tensor], None]:
        return lambda value: seen.setdefault(name, []).append(value.reshape(-1, value.shape[-1]).clone())

    p = block.prefix
    names = [f"{p}self_attn.q_proj", f"{p}mlp.experts", *(f"{p}mlp.experts.{e}.down_proj" for e in range(3))]
    with block.watching({name: keep(name) for name in names}):
        whole = block.forward(x, arguments[0])
    normed = F.rms_norm(x, (128,), source.read(f"{p}input_layernorm.weight"), 1e-6).reshape(-1, 128)
    torch.testing.assert_close(seen[names[0]][0], normed, rtol=1e-5, atol=1e-5)
    assert seen[names[1]][0].shape == (18, 128)
    assert sum(len(seen[n][0]) for n in names[2:] if n in seen) == 18 * 2 == int(block.experts.tokens.sum())
    torch.testing.assert_close(block.forward(x, arguments[0]), whole, rtol=0, atol=0)

    def stop(value: torch.Tensor) -> None:
        raise blocks.Stop

    with pytest.raises(blocks.Stop), block.watching({names[0]: stop}):
        block.forward(x, arguments[0])


def test_a_quantised_weight_counts_with_its_values_and_int8_rows(tiny: Callable[..., Path]) -> None:
    source, found = opened(tiny("llama", dtype=torch.float32, max_position_embeddings=64))
    frame = blocks.Frame(source.config, found, torch.float32, "here")
    block = frame.block(1, source.read)
    name = "model.layers.1.mlp.down_proj"
    made = affine.quantize(source.read(f"{name}.weight"), QuantSpec.parse("w8a8"), torch.float32)
    block.put(name, made)
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(5))
    scale = x.abs().amax(1, keepdim=True) / 127
    expected = F.linear((x / scale).round() * scale, affine.dequantize(made))
    torch.testing.assert_close(block.slots[name](x), expected, rtol=1e-5, atol=1e-6)
