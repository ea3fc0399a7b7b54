"""shard.py: the table of TP and groups, padding that changes nothing."""

from __future__ import annotations

import pytest
import torch

from percard.formats.affine import dequantize, quantize
from percard.formats.shard import Sizes, fits, fitting_tp, group_of, pad_intermediate, padded, problems
from percard.formats.spec import FormatError, QuantSpec

ALL = [1, 2, 4, 8]
# model, intermediate sizes, heads, head size, TP at g128, g64, g32
TABLE = [
    ("Qwen2.5-72B", (29568,), 64, 128, [1], [1, 2], [1, 2, 4]),
    ("Qwen2.5-32B", (27648,), 40, 128, ALL, ALL, ALL),
    ("Qwen3-32B", (25600,), 64, 128, ALL, ALL, ALL),
    ("Qwen3-14B", (17408,), 40, 128, ALL, ALL, ALL),
    ("Qwen3-8B", (12288,), 32, 128, ALL, ALL, ALL),
    ("Qwen3-1.7B", (6144,), 16, 128, ALL, ALL, ALL),
    ("Qwen3-0.6B", (3072,), 16, 128, ALL, ALL, ALL),
    ("Llama-3-8B", (14336,), 32, 128, ALL, ALL, ALL),
    ("Llama-3-70B", (28672,), 64, 128, ALL, ALL, ALL),
    ("Qwen2.5-14B", (13824,), 40, 128, [1, 2, 4], ALL, ALL),
    ("Qwen3-4B", (9728,), 32, 128, [1, 2, 4], ALL, ALL),
    ("Qwen2.5-7B", (18944,), 28, 128, [1, 2, 4], [1, 2, 4], [1, 2, 4]),
    ("Qwen2.5-3B", (11008,), 16, 128, [1, 2], [1, 2, 4], ALL),
    ("Llama-2-7B", (11008,), 32, 128, [1, 2], [1, 2, 4], ALL),
    ("Qwen2.5-1.5B", (8960,), 12, 128, [1, 2], [1, 2, 4], [1, 2, 4]),
    ("Qwen2.5-0.5B", (4864,), 14, 64, [1], [1, 2], [1, 2]),
    ("Qwen3-30B-A3B", (768,), 32, 128, [1, 2], [1, 2, 4], ALL),
    ("Qwen3-235B-A22B", (1536,), 64, 128, [1, 2, 4], ALL, ALL),
    ("DeepSeek-V3", (2048, 18432), 128, 128, [*ALL, 16], [*ALL, 16], [*ALL, 16]),
]


def sizes(intermediate: tuple[int, ...], heads: int, head_dim: int) -> Sizes:
    return Sizes(tuple(("intermediate_size", i) for i in intermediate), heads, head_dim)


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row[0])
def test_table(row: tuple) -> None:
    _, intermediate, heads, head_dim, *expected = row
    for group, tps in zip((128, 64, 32), expected, strict=True):
        among = (1, 2, 4, 8, 16) if 16 in tps else (1, 2, 4, 8)
        for name in ("w4a16", "w4a8", "w8a16"):
            assert fitting_tp(QuantSpec.parse(f"{name}-g{group}"), sizes(intermediate, heads, head_dim), among) == tps


@pytest.mark.parametrize(
    ("size", "tp", "to", "percent"),
    [
        (29568, 8, 29696, 0.43), (13824, 8, 14336, 3.7), (9728, 8, 10240, 5.3), (11008, 8, 11264, 2.3),
        (8960, 4, 9216, 2.9), (768, 8, 1024, 33.3), (12288, 8, 12288, 0.0),
    ],
)  # fmt: skip
def test_padding_of_the_table(size: int, tp: int, to: int, percent: float) -> None:
    spec = QuantSpec.parse("w4a16-g128")
    assert padded(size, spec, tp) == to and fits(to, spec, tp)
    assert 100 * (to - size) / size == pytest.approx(percent, rel=0.02)
    assert not any(fits(s, spec, tp) for s in range(size, to, 32))


def test_reasons_name_the_remedies() -> None:
    spec = QuantSpec.parse("w4a16-g128")
    (line,) = problems(spec, 2, sizes((4864,), 14, 64))
    assert line == "o_proj: heads x head size 896 / tp 2 = 448 is not a multiple of 128; give o_proj g64"
    (line,) = problems(spec, 2, sizes((29568,), 64, 128))
    assert line == (
        "down_proj: intermediate_size 29568 / tp 2 = 14784 is not a multiple of 128; "
        "pad intermediate_size to 29696 (+0.43 %), or give down_proj g64"
    )
    (line,) = problems(spec, 8, Sizes((("moe_intermediate_size", 768),), 32, 128))
    assert "pad moe_intermediate_size to 1024 (+33 %), or give down_proj g32, or use expert parallelism" in line
    lines = problems(spec, 8, sizes((18944,), 28, 128))
    assert "28 heads do not divide by tp 8; take one of 1, 2, 4, 7, 14, 28" in lines
    (line,) = problems(spec, 4, Sizes((("intermediate_size", 12288),), 24, 128, 6))
    assert line == "6 KV heads can neither be split nor repeated over tp 4"
    assert problems(spec, 4, Sizes((("intermediate_size", 12288),), 24, 128, 2)) == []
    (line,) = problems(spec, 32, sizes((18432,), 128, 128))
    assert "18432 / tp 32 = 576 is not a multiple of 128" in line
    assert problems(spec, 0, sizes((128,), 1, 128)) == ["tp 0 is not a number of cards; take 1 or more"]


@pytest.mark.parametrize(
    ("name", "group"),
    [("w8a8", 1), ("w4a16", 8), ("w4a8", 8), ("w8a16", 4), ("w4a16-g32", 32), ("fp8-block", 128), ("fp8-dynamic", 1)],
)
def test_group_of_a_spec(name: str, group: int) -> None:
    assert group_of(QuantSpec.parse(name)) == group


def test_sizes_from_config() -> None:
    qwen = {"hidden_size": 896, "num_attention_heads": 14, "num_key_value_heads": 2, "intermediate_size": 4864}
    assert Sizes.from_config(qwen) == Sizes((("intermediate_size", 4864),), 14, 64, 2)
    assert Sizes.from_config(qwen | {"head_dim": 128}).head_dim == 128
    moe = qwen | {"moe_intermediate_size": 768, "decoder_sparse_step": 1, "mlp_only_layers": []}
    assert Sizes.from_config(moe).intermediate == (("moe_intermediate_size", 768),)
    assert len(Sizes.from_config(moe | {"mlp_only_layers": [0]}).intermediate) == 2
    deepseek = moe | {"first_k_dense_replace": 3, "v_head_dim": 128}
    assert Sizes.from_config(deepseek).intermediate == (("intermediate_size", 4864), ("moe_intermediate_size", 768))
    for key, value in (("num_attention_heads", None), ("intermediate_size", "4864"), ("hidden_size", -1)):
        with pytest.raises(FormatError, match=f"{key} is .* expected a positive integer"):
            Sizes.from_config(qwen | {key: value})


def mlp(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    return (torch.nn.functional.silu(x @ gate.t()) * (x @ up.t())) @ down.t()


@pytest.mark.parametrize("name", ["w4a16-g128", "w4a16-g64-asym", "w4a8-g64", "w8a8", "w4a16"])
def test_padding_changes_nothing(name: str) -> None:
    """Codes and scales of the true part are the same bytes; the function is the same; what is added is zero."""
    generator = torch.Generator().manual_seed(9)
    spec = QuantSpec.parse(name)
    size, to = 384, padded(384, QuantSpec.parse("w4a16-g128"), 4)
    assert to == 512
    weights = {
        "gate_proj": torch.randn(size, 128, generator=generator),
        "up_proj": torch.randn(size, 128, generator=generator),
        "down_proj": torch.randn(128, size, generator=generator),
    }
    plain = {leaf: quantize(w, spec) for leaf, w in weights.items()}
    wide = {leaf: quantize(pad_intermediate(leaf, w, to), spec) for leaf, w in weights.items()}
    for leaf, qt in plain.items():
        rows, columns = qt.shape
        assert torch.equal(wide[leaf].data[:rows, :columns], qt.data)
        assert torch.equal(wide[leaf].scale[:rows, : qt.scale.shape[1]], qt.scale)
        assert qt.zero is None or torch.equal(wide[leaf].zero[:rows, : qt.zero.shape[1]], qt.zero)
        values = dequantize(wide[leaf])
        assert torch.count_nonzero(values[rows:]) == 0 and torch.count_nonzero(values[:, columns:]) == 0
        if spec.symmetric:
            assert torch.count_nonzero(wide[leaf].data[rows:]) == 0
            assert bool((wide[leaf].scale[rows:] == 1).all())
    x = torch.randn(5, 128, generator=generator)
    a = mlp(x, *(dequantize(plain[leaf]) for leaf in weights))
    b = mlp(x, *(dequantize(wide[leaf]) for leaf in weights))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(a.abs().max()))


def test_padding_of_biases_and_refusals() -> None:
    assert pad_intermediate("gate_proj", torch.ones(3), 5).tolist() == [1, 1, 1, 0, 0]
    assert pad_intermediate("down_proj", torch.ones(3), 5).tolist() == [1, 1, 1]
    same = torch.ones(3, 2)
    assert pad_intermediate("up_proj", same, 3) is same
    with pytest.raises(FormatError, match="padding does not cut"):
        pad_intermediate("up_proj", same, 2)
    with pytest.raises(FormatError, match="q_proj: only"):
        pad_intermediate("q_proj", same, 4)
