"""A checkpoint that we write, loaded by transformers with compressed-tensors: the logits of our dequantised weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from percard.formats import compressed_tensors as ct
from percard.formats.affine import dequantize, quantize
from percard.formats.checkpoint import Checkpoint, Writer
from percard.formats.spec import QuantSpec

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

SIZES = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 32,
    "num_key_value_heads": 2, "vocab_size": 200, "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("source")
    transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES)).to(torch.float32).save_pretrained(folder)
    return Checkpoint.open(folder)


def specs_of(source: Checkpoint, name: str) -> dict[str, QuantSpec]:
    modules = [n.removesuffix(".weight") for n in source.names if n.endswith("_proj.weight")]
    if name != "mixed":
        return dict.fromkeys(modules, QuantSpec.parse(name))
    specs = dict.fromkeys(modules, QuantSpec.parse("w4a16-g64"))
    specs |= {m: QuantSpec.parse("w8a16") for m in modules if ".layers.1.self_attn." in m}
    return specs | {m: QuantSpec.parse("w8a8") for m in modules if m.endswith("down_proj")}


@pytest.mark.parametrize(
    ("name", "error"), [("w4a16-g64", 0), ("w4a16-g32-asym", 0), ("mixed", 0.01), ("w4a8-g64", 0.03), ("w8a8", 0.03)]
)
def test_transformers_loads_it(tmp_path: Path, source: Checkpoint, name: str, error: float) -> None:
    """Equal where activations are left alone; else they divide them by 127.5, and our weights are not run at 8 bits here."""
    specs = specs_of(source, name)
    plan: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for tensor in source.names:
        module, info = tensor.removesuffix(".weight"), source.info(tensor)
        if module in specs:
            shape = (info.shape[0], info.shape[1])
            plan |= {f"{module}.{s}": v for s, v in ct.plan(shape, specs[module], torch.float32).items()}
        else:
            plan[tensor] = (info.dtype, info.shape)
    weights = {}
    with Writer(tmp_path / "m", plan, max_shard=200_000) as out:
        for tensor in source.names:
            module = tensor.removesuffix(".weight")
            if module in specs:
                qt = quantize(source.read(tensor), specs[module], torch.float32)
                weights[tensor] = dequantize(qt)
                for suffix, t in ct.write(qt, torch.float32).items():
                    out.add(f"{module}.{suffix}", t)
            else:
                weights[tensor] = source.read(tensor)
                out.add_raw(tensor, source.raw(tensor))
        out.copy_side_files(source)
        out.finish(source.config | {"quantization_config": ct.config(specs, ["lm_head"])})
    found = Checkpoint.open(tmp_path / "m")
    assert ct.claims(found.config) and ct.specs(found.config, found.names) == specs
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    ours = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES))
    ours.load_state_dict(weights)
    ids = torch.randint(0, 200, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, logits = ours(ids).logits, theirs(ids).logits
    assert torch.isfinite(logits).all()
    assert (logits - expected).abs().max() <= error + 1e-6
