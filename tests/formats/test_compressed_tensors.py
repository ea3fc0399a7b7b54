"""compressed_tensors.py: golden bytes, round trips, the bytes and configs of the compressed-tensors package, bad files."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig
from compressed_tensors.quantization.lifecycle.forward import dequantize as their_dequantize
from compressed_tensors.quantization.lifecycle.forward import quantize as their_quantize

from percard.formats import compressed_tensors as ct
from percard.formats.affine import dequantize, quantize
from percard.formats.pack import pack
from percard.formats.spec import FormatError, QuantSpec
from percard.formats.targets import matches, targets_of
from percard.formats.tensor import QuantTensor

SPECS = [
    "w4a16-g128", "w4a16-g64", "w4a16-g32-asym", "w4a16", "w4a16-asym", "w8a16", "w8a16-g128", "w8a16-g64-asym",
    "w3a16-g64", "w3a16-g128", "w4a8", "w4a8-g64", "w8a8",
]  # fmt: skip


def random_tensor(n: int, k: int, name: str, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> QuantTensor:
    """Random codes with both extremes, random scales of the dtype they are stored in, random zeros."""
    spec = QuantSpec.parse(name)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(spec.qmin, spec.qmax + 1, (n, k), generator=generator).to(torch.int8)
    codes[0, 0], codes[-1, -1] = spec.qmin, spec.qmax
    scale = (torch.rand(n, spec.groups(k), generator=generator) + 0.01).to(ct.scale_dtype_of(spec, dtype))
    zero = None
    if not spec.symmetric:
        zero = torch.randint(spec.qmin, spec.qmax + 1, scale.shape, generator=generator).to(torch.int8)
    return QuantTensor(codes, scale, zero, spec, "plain", (n, k))


def words_of(*words: str) -> list[int]:
    numbers = [int(word, 16) for word in words]
    return [n - (1 << 32) if n >= 1 << 31 else n for n in numbers]


def test_golden_row_of_11() -> None:
    """G7."""
    codes = torch.tensor([[u - 8 for u in range(1, 12)]], dtype=torch.int8)
    qt = QuantTensor(codes, torch.ones(1, 1, dtype=torch.bfloat16), None, QuantSpec.parse("w4a16"), "plain", (1, 11))
    tensors = ct.write(qt, torch.bfloat16)
    assert tensors["weight_packed"].tolist() == [words_of("87654321", "00000BA9")]
    assert tensors["weight_shape"].tolist() == [1, 11] and tensors["weight_shape"].dtype == torch.int64
    assert torch.equal(ct.read(tensors, qt.spec).data, codes)


def test_golden_zero_words() -> None:
    """G3 and G4: zero points along the rows."""
    w = torch.tensor([[-1, -0.5, 0, 0.25, 0.375, 1, 2, 2.75] + [0.0] * 24])
    tensors = ct.write(quantize(w, QuantSpec.parse("w4a16-g32-asym")), torch.bfloat16)
    assert tensors["weight_packed"][0, 0].item() == words_of("FC865420")[0]
    assert tensors["weight_zero_point"].tolist() == [[4]]
    spec = QuantSpec.parse("w4a16-g32-asym")
    z = torch.tensor([[r - 8, 7 - r] for r in range(10)], dtype=torch.int8)
    qt = QuantTensor(torch.zeros(10, 64, dtype=torch.int8), torch.ones(10, 2), z, spec, "plain", (10, 64))
    words = ct.write(qt, torch.float32)["weight_zero_point"]
    assert words.tolist() == [words_of("76543210", "89ABCDEF"), words_of("00000098", "00000067")]


def test_golden_three_bits() -> None:
    """G9 dense, and the padded words of files from before October 2025 (10 codes each, as in G8)."""
    codes = torch.tensor([[u - 4 for u in list(range(8)) * 8]], dtype=torch.int8)
    spec = QuantSpec.parse("w3a16-g64")
    tensors = ct.write(QuantTensor(codes, torch.ones(1, 1), None, spec, "plain", (1, 64)), torch.float32)
    assert tensors["weight_packed"].tolist() == [words_of("88FAC688", "C688FAC6", "FAC688FA") * 2]
    u = (codes[0] + 4).tolist()
    padded = [sum(c << (3 * i) for i, c in enumerate(u[at : at + 10])) for at in range(0, 64, 10)]
    assert padded[0] == 0x08FAC688 and len(padded) == 7
    tensors["weight_packed"] = torch.tensor([padded], dtype=torch.int32)
    assert torch.equal(ct.read(tensors, spec).data, codes)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 128), (33, 384)])
def test_round_trip(name: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    qt = random_tensor(*shape, name, dtype, seed=len(name))
    tensors = ct.write(qt, dtype)
    assert {s: (t.dtype, tuple(t.shape)) for s, t in tensors.items()} == ct.plan(shape, qt.spec, dtype)
    assert all(t.is_contiguous() for t in tensors.values())
    back = ct.read(tensors, qt.spec)
    assert back.shape == shape and back.scale.dtype == qt.scale.dtype
    assert torch.equal(back.data, qt.data) and torch.equal(back.scale, qt.scale)
    assert (back.zero is None) == (qt.zero is None) and (back.zero is None or torch.equal(back.zero, qt.zero))
    again = ct.write(back, dtype)
    assert all(torch.equal(again[suffix], t) for suffix, t in tensors.items())


@pytest.mark.parametrize("name", ["w4a16", "w8a16", "w4a16-asym", "w8a8"])
@pytest.mark.parametrize("k", [1, 7, 11, 100])
def test_round_trip_of_odd_rows(name: str, k: int) -> None:
    qt = random_tensor(5, k, name, seed=k)
    back = ct.read(ct.write(qt, torch.bfloat16), qt.spec)
    assert torch.equal(back.data, qt.data)
    assert back.zero is None or torch.equal(back.zero, qt.zero)


# -- the package --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("n", [32, 64, 96, 11])
def test_same_codes_same_words(bits: int, n: int) -> None:
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, (13, n), generator=torch.Generator().manual_seed(n)).to(torch.int8)
    assert torch.equal(pack(codes, bits), pack_to_int32(codes, bits))
    assert torch.equal(pack(codes, bits, dim=0), pack_to_int32(codes, bits, packed_dim=0))
    assert torch.equal(unpack_from_int32(pack(codes, bits), bits, codes.shape), codes)


def their_args(spec: QuantSpec) -> QuantizationArgs:
    return QuantizationArgs(**ct._group_config(spec, ["Linear"])["weights"])


@pytest.mark.parametrize("name", [name for name in SPECS if name != "w4a8-g64"])
def test_quantize_of_fp32_finds_their_codes(name: str) -> None:
    """For the same fp32 weights, scales and zeros. (bf16 weights they divide in bf16; we do not.)"""
    spec = QuantSpec.parse(name)
    w = torch.randn(16, 256, generator=torch.Generator().manual_seed(4))
    qt = quantize(w, spec, torch.float32)
    theirs = their_quantize(w, qt.scale, qt.zero, their_args(spec), dtype=torch.int8)
    assert torch.equal(theirs, qt.data)
    values = their_dequantize(theirs, qt.scale, qt.zero, their_args(spec), dtype=torch.float32)
    assert torch.equal(values, dequantize(qt))


@pytest.mark.parametrize("name", SPECS)
def test_their_compressor_reads_and_writes_our_tensors(name: str) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    qt = random_tensor(24, 256, name, torch.float32)
    tensors = ct.write(qt, torch.float32)
    scheme = QuantizationScheme(**ct._group_config(qt.spec, ["Linear"]))
    compressor = BaseCompressor.get_value_from_registry(ct.container(qt.spec))
    assert torch.equal(compressor.decompress(tensors, scheme)["weight"], dequantize(qt))
    theirs = {"weight": dequantize(qt), "weight_scale": qt.scale}
    if qt.zero is not None:
        theirs["weight_zero_point"] = qt.zero
    theirs = compressor.compress(theirs, scheme)
    assert sorted(theirs) == sorted(tensors)
    for suffix, tensor in tensors.items():
        assert theirs[suffix].dtype == tensor.dtype and torch.equal(theirs[suffix], tensor), suffix


# -- config -------------------------------------------------------------------------------------------------------------

LEAVES = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
LEAVES += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
MODULES = [f"model.layers.{i}.{leaf}" for i in range(12) for leaf in LEAVES]


def names_of(specs: dict[str, QuantSpec]) -> list[str]:
    """The tensor names of such a checkpoint, with some that are not quantised."""
    out = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    for module, spec in specs.items():
        out += [f"{module}.{suffix}" for suffix in ct.plan((128, 128), spec, torch.bfloat16)]
        out.append(f"{module.rpartition('.')[0]}.norm.weight")
    return out


@pytest.mark.parametrize("name", SPECS)
def test_one_spec(name: str) -> None:
    specs = dict.fromkeys(MODULES, QuantSpec.parse(name))
    section = ct.config(specs, ["lm_head"])
    assert section["config_groups"]["group_0"]["targets"] == ["Linear"]
    config = {"model_type": "qwen3", "quantization_config": json.loads(json.dumps(section))}
    assert ct.claims(config) and ct.claims(section)
    assert ct.specs(config, names_of(specs)) == specs
    theirs = QuantizationConfig.model_validate(section)
    assert theirs.format == section["format"] == ct.container(specs[MODULES[0]])


def test_config_is_the_documented_one() -> None:
    expected = {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {
            "targets": ["Linear"], "format": "pack-quantized",
            "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128, "dynamic": False},
            "input_activations": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True},
        }},
    }  # fmt: skip
    found = ct.config(dict.fromkeys(MODULES, QuantSpec.parse("w4a8-g128")), ["lm_head"])
    assert json.dumps(found) == json.dumps(expected)  # the order of the keys too


def test_several_specs() -> None:
    four, eight, row = (QuantSpec.parse(name) for name in ("w4a16-g64", "w8a16-g128", "w8a8"))
    specs = dict.fromkeys(MODULES, four)
    specs |= {m: eight for m in MODULES if (m.endswith("down_proj") and ".layers.3." in m) or ".layers.11." in m}
    specs |= {m: row for m in MODULES if m.endswith("o_proj")}
    specs["lm_head"] = row
    section = ct.config(specs, [])
    assert section["format"] == "mixed-precision"
    assert [g["format"] for g in section["config_groups"].values()] == [
        "pack-quantized",
        "int-quantized",
        "pack-quantized",
    ]
    targets = [t for g in section["config_groups"].values() for t in g["targets"]]
    assert "Linear" not in targets
    assert ct.specs({"quantization_config": section}, [*names_of(specs), "lm_head.weight_scale"]) == specs
    QuantizationConfig.model_validate(section)
    for fused in ("self_attn.qkv_proj", "mlp.gate_up_proj"):  # engines look at the members of these, not at the name
        assert not any(matches(f"model.layers.5.{fused}", [t]) for t in targets)
    for module, spec in specs.items():  # whatever the engine calls the body of the model
        groups = section["config_groups"].values()
        renamed = module.replace("model.layers", "language_model.model.layers")
        assert [g["format"] for g in groups if matches(renamed, g["targets"])] == [ct.container(spec)]


def test_experts() -> None:
    four, eight = QuantSpec.parse("w4a16-g128"), QuantSpec.parse("w8a16-g128")
    specs = {f"model.layers.{i}.mlp.experts.{e}.{leaf}": four for i in range(3) for e in range(12)
             for leaf in ("gate_proj", "up_proj", "down_proj")}  # fmt: skip
    specs |= {f"model.layers.{i}.self_attn.{leaf}_proj": eight for i in range(3) for leaf in "qkvo"}
    section = ct.config(specs, ["lm_head", r"re:.*\.mlp\.gate$"])
    targets = section["config_groups"]["group_0"]["targets"]
    assert targets == [r"re:(.*\.)?layers\.\d+\.mlp\.experts\.\d+\.(down_proj|gate_proj|up_proj)$"]
    assert ct.specs({"quantization_config": section}, names_of(specs)) == specs


def test_targets_of_clashing_prefixes() -> None:
    four, eight = QuantSpec.parse("w4a16"), QuantSpec.parse("w8a16")
    specs = {"model.layers.0.fc": four, "mtp.layers.0.fc": eight, "layers.0.fc": four, "top": four, "0.fc": eight}
    for spec in (four, eight):
        targets = targets_of(specs, spec)
        assert {m for m in specs if matches(m, targets)} == {m for m, s in specs.items() if s == spec}


def test_fused_modules_share_a_spec() -> None:
    four, eight = QuantSpec.parse("w4a16-g128"), QuantSpec.parse("w8a16")
    base = dict.fromkeys(MODULES, four)
    for module in ("model.layers.3.self_attn.k_proj", "model.layers.0.mlp.up_proj"):
        with pytest.raises(FormatError, match="engines fuse"):
            ct.config(base | {module: eight}, [])
        rest = {m: s for m, s in base.items() if m != module}
        for ignore in (module, f"re:.*{module.rpartition('.')[2]}$"):
            with pytest.raises(FormatError, match="is ignored; engines fuse"):
                ct.config(rest, [ignore])
    experts = {f"model.layers.0.mlp.experts.{e}.down_proj": four for e in range(4)}
    with pytest.raises(FormatError, match="all experts of a layer have one spec"):
        ct.config(experts | {"model.layers.0.mlp.experts.2.down_proj": eight}, [])
    assert ct.config(base | {"model.layers.3.mlp.down_proj": eight, "model.layers.3.self_attn.o_proj": eight}, [])
    with pytest.raises(FormatError, match="without a quantised module"):
        ct.config({}, [])


def group(**weights: Any) -> dict[str, Any]:
    return {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "group", "group_size": 128} | weights}


def section(*groups: dict[str, Any], **top: Any) -> dict[str, Any]:
    return {"quant_method": "compressed-tensors", "format": "pack-quantized",
            "config_groups": {f"group_{i}": g for i, g in enumerate(groups)}} | top  # fmt: skip


ONE = ["model.layers.0.mlp.up_proj.weight_packed", "model.layers.0.mlp.up_proj.weight_scale"]


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (section(group()), "w4a16-g128"),
        (section(group(strategy=None)), "w4a16-g128"),
        (section(group(strategy=None, group_size=-1)), "w4a16"),
        (section(group(strategy=None, group_size=None)), "w4a16"),
        (section(group(strategy="tensor", num_bits=8)), "w8a16"),
        (section(group(symmetric=False)), "w4a16-g128-asym"),
        (section(group(observer="mse", observer_kwargs={}, actorder="static", zp_dtype=None)), "w4a16-g128"),
        (
            section(group() | {"input_activations": {"num_bits": 8, "strategy": "tensor", "dynamic": False}}),
            "w4a8-g128",
        ),
        (section(group(), format=None), "w4a16-g128"),
        (section(group() | {"format": "int-quantized"}, format="mixed-precision"), "w4a16-g128"),
        (section(group(), sparsity_config={"format": "dense"}, kv_cache_scheme={"num_bits": 8}), "w4a16-g128"),
        ({"quant_method": "compressed-tensors", "config_groups": {"W4A16": ["Linear"]}}, "w4a16-g128"),
        ({"quant_method": "compressed-tensors", "config_groups": {"w4a16_asym": ["Linear"]}}, "w4a16-g128-asym"),
        ({"quant_method": "compressed-tensors", "config_groups": {"W8A8": ["re:.*up_proj"]}}, "w8a8"),
        ({"quant_method": "compressed-tensors", "config_groups": {"W4A8": ["Linear"]}}, "w4a8-g128"),
    ],
)
def test_foreign_configs(found: dict[str, Any], expected: str) -> None:
    for config in ({"model_type": "x", "quantization_config": found}, {"text_config": {"quantization_config": found}}):
        assert ct.claims(config)
        assert {str(s) for s in ct.specs(config, ONE).values()} == {expected}


def test_order_of_matching() -> None:
    """Exact names before regexes before the class, whatever the order of the groups; ignore wins over all."""
    eight = group(num_bits=8)
    exact = group(num_bits=8, group_size=64) | {"targets": ["a.up_proj"]}
    config = section(group(), eight | {"targets": [r"re:.*\.up_proj$"]}, exact)
    names = [f"{m}.weight_packed" for m in ("a.up_proj", "b.up_proj", "c.down_proj")]
    found = ct.specs({"quantization_config": config}, names)
    assert [str(found[m]) for m in ("a.up_proj", "b.up_proj", "c.down_proj")] == [
        "w8a16-g64",
        "w8a16-g128",
        "w4a16-g128",
    ]
    with pytest.raises(FormatError, match="is in the ignore list"):
        ct.specs({"quantization_config": config | {"ignore": ["re:.*down"]}}, names)


def test_does_not_claim() -> None:
    for config in ({}, {"quantization_config": None}, {"quantization_config": {"quant_method": "gptq"}}, {"x": 1}):
        assert not ct.claims(config)


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (section(group(colour=1)), "group_0.weights has the unknown key 'colour'"),
        (section(group() | {"colour": 1}), "group_0 has the unknown key 'colour'"),
        (section(group() | {"input_activations": {"colour": 1}}), "unknown key"),
        (section(group() | {"weights": 4}), "weights is not an object"),
        (section({"targets": ["Linear"]}), "no weights to quantise"),
        (section(group() | {"targets": []}), "has no targets"),
        (section(group() | {"targets": "Linear"}), "has no targets"),
        (section(group() | {"targets": ["re:("]}), "not a regex"),
        (section(group() | {"targets": ["other"]}), "no group of the config names it"),
        (section(), "no config_groups"),
        (section(group(), config_groups={"W4A16": "Linear"}), "not an object"),
        (section(group(), config_groups={"W9A9": ["Linear"]}), "unknown preset 'W9A9'"),
        (section(group(), format="zip"), "unknown format 'zip'"),
        (section(group() | {"format": "zip"}), "unknown format 'zip'"),
        (section(group(), format="float-quantized"), "container float-quantized is not read"),
        (section(group(), format="marlin-24"), "container marlin-24 is not read"),
        (section(group(), transform_config={"a": 1}), "transform_config"),
        (section(group(), sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config"),
        (section(group(), ignore="lm_head"), "ignore is not a list"),
        (section(group(type="float")), "type float"),
        (section(group(num_bits=5)), "w5a16 is not a spec"),
        (section(group(group_size=16)), "group 16 is not one of"),
        (section(group(group_size=None)), "group_size None"),
        (section(group(strategy="block")), "strategy block"),
        (section(group(dynamic=True)), "change at run time"),
        (section(group(actorder="group")), "actorder group"),
        (section(group() | {"input_activations": {"num_bits": 8, "type": "float"}}), "type float, are not run"),
        (section(group() | {"input_activations": {"num_bits": 4}}), "activations of 4 bits"),
        (section(group() | {"input_activations": {"strategy": "group"}}), "strategy group are not run"),
        (section(group() | {"output_activations": {"num_bits": 8}}), "quantised outputs"),
        (section(group(symmetric=False) | {"input_activations": {"num_bits": 8}}), "asymmetric weights with int8"),
    ],
)
def test_bad_configs(found: dict[str, Any], says: str) -> None:
    with pytest.raises(FormatError, match=says) as error:
        ct.specs({"quantization_config": found}, ONE)
    assert "\n" not in str(error.value)


def test_named_but_not_quantised() -> None:
    config = {"quantization_config": section(group() | {"targets": ["a.up_proj", "Linear"]})}
    with pytest.raises(FormatError, match=r"a.up_proj: group 'group_0' quantises it, but it has no weight_scale"):
        ct.specs(config, [*ONE, "a.up_proj.weight"])


# -- bad modules ----------------------------------------------------------------------------------------------------------


def module(
    name: str = "w4a16-g64", n: int = 16, k: int = 128, **change: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """The tensors of one module, some of them replaced or (None) taken away."""
    tensors = ct.write(random_tensor(n, k, name, torch.float32), torch.float32) | change
    return {suffix: tensor for suffix, tensor in tensors.items() if tensor is not None}


NAN, ZERO8 = torch.full((16, 2), float("nan")), torch.zeros(16, 2, dtype=torch.int8)


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("w4a16-g64", {"weight_shape": torch.tensor([16, 192])}, "weight_scale is \\[16, 2\\], expected \\[16, 3\\]"),
        ("w4a16", {"weight_shape": torch.tensor([16, 256])}, "weight_packed is .*expected int32 \\[16, 32\\]"),
        ("w4a16", {"weight_shape": torch.tensor([17, 128])}, "weight_scale is \\[16, 1\\]"),
        ("w4a16", {"weight_shape": torch.tensor([128])}, "weight_shape says \\[128\\]"),
        ("w4a16-g64", {"weight_shape": torch.tensor([16, 100])}, "not divisible by group 64"),
        ("w4a16-g64", {"weight_shape": torch.tensor([16, 32])}, "not divisible by group 64"),
        ("w4a16-g64", {"weight_shape": None}, "no weight_shape and no 2-D weight"),
        ("w4a16-g64", {"weight_scale": None}, "weight_scale is missing"),
        ("w4a16-g64", {"weight_scale": torch.ones(16, 4)}, "expected \\[16, 2\\]"),
        ("w4a16-g64", {"weight_scale": torch.ones(1)}, "expected \\[16, 2\\]"),
        ("w4a16-g64", {"weight_scale": NAN}, "NaN or Inf"),
        ("w4a16-g64", {"weight_scale": torch.ones(16, 2, dtype=torch.int8)}, "weight_scale is torch.int8"),
        ("w4a16-g64", {"weight_scale": torch.ones(16, 2).to(torch.float8_e4m3fn)}, "weight_scale is torch.float8"),
        ("w4a16-g64", {"weight_packed": None}, "neither weight_packed nor weight"),
        ("w4a16-g64", {"weight_packed": torch.zeros(16, 16)}, "weight_packed is torch.float32"),
        ("w4a16-g64", {"weight_packed": torch.zeros(2, 8, 16, dtype=torch.int32)}, "weight_packed is"),
        ("w4a16-g64", {"weight_zero_point": ZERO8 + 1}, "is not neutral"),
        ("w4a16-g64-asym", {"weight_zero_point": None}, "weight_zero_point is missing"),
        ("w4a16-g64-asym", {"weight_zero_point": torch.zeros(3, 2, dtype=torch.int32)}, "expected \\[2, 2\\]"),
        ("w4a16-g64-asym", {"weight_zero_point": torch.zeros(16, 2)}, "expected int8"),
        ("w4a16-g64", {"weight_g_idx": torch.full((128,), 2, dtype=torch.int32)}, "there are 2 groups"),
        ("w4a16-g64", {"weight_g_idx": torch.arange(128) % 2}, "columns are out of order"),
        ("w4a16-g64", {"weight_g_idx": torch.arange(64)}, "has 64 entries, expected 128"),
        ("w8a8", {"weight": torch.zeros(16, 128)}, "weight is torch.float32"),
        ("w8a8", {"weight": torch.zeros(2, 16, 128, dtype=torch.int8)}, "no 2-D weight"),
        ("w8a8", {"weight": None}, "no weight_shape and no 2-D weight"),
        ("w3a16-g64", {"weight_packed": torch.zeros(16, 11, dtype=torch.int32)}, "expected int32 \\[16, 12\\]"),
    ],
)
def test_bad_modules(name: str, change: dict[str, Any], says: str) -> None:
    with pytest.raises(FormatError, match=says) as error:
        ct.read(module(name, **change), QuantSpec.parse(name), module="model.layers.0.fc")
    assert str(error.value).startswith("model.layers.0.fc: ") and "\n" not in str(error.value)


def test_stated_shape_wins() -> None:
    with pytest.raises(FormatError, match="weight_shape says \\[16, 128\\], expected \\[16, 64\\]"):
        ct.read(module("w4a16"), QuantSpec.parse("w4a16"), (16, 64))


def test_neutral_extras_are_accepted() -> None:
    spec = QuantSpec.parse("w4a16-g64")
    plain = ct.read(module(), spec)
    neutral = torch.full((2, 2), words_of("88888888")[0], dtype=torch.int32)
    for extra in (
        {"weight_zero_point": neutral},
        {"weight_zero_point": ZERO8},
        {"weight_g_idx": torch.full((128,), -1, dtype=torch.int32)},
        {"weight_g_idx": (torch.arange(128) // 64).to(torch.int32)},
        {"input_scale": torch.ones(1), "input_zero_point": torch.zeros(1)},
    ):
        assert torch.equal(ct.read(module(**extra), spec).data, plain.data)


def test_w4a8_in_a_container_of_bytes() -> None:
    """What compressed-tensors makes of W4A8 by itself: one 4-bit code per byte. Read, and written packed."""
    qt = random_tensor(16, 128, "w4a8-g64")
    back = ct.read({"weight": qt.data, "weight_scale": qt.scale}, qt.spec)
    assert torch.equal(back.data, qt.data)
    assert sorted(ct.write(back, torch.bfloat16)) == ["weight_packed", "weight_scale", "weight_shape"]
    with pytest.raises(FormatError, match=r"has codes 0\.\.9, w4a8-g64 allows -8\.\.7"):
        ct.read(
            {"weight": torch.arange(10, dtype=torch.int8).repeat(64).reshape(5, 128), "weight_scale": torch.ones(5, 2)},
            qt.spec,
        )


def test_one_scale_for_the_whole_weight() -> None:
    spec = QuantSpec.parse("w8a8")
    for scale in (torch.tensor([0.5]), torch.tensor(0.5), torch.full((4,), 0.5), torch.full((4, 1), 0.5)):
        qt = ct.read({"weight": torch.ones(4, 6, dtype=torch.int8), "weight_scale": scale}, spec)
        assert torch.equal(dequantize(qt), torch.full((4, 6), 0.5))


def test_zero_and_negative_scales_are_read_but_not_written() -> None:
    for value in (0.0, -1.0):
        scale = torch.full((16, 2), value)
        qt = ct.read(module(weight_scale=scale), QuantSpec.parse("w4a16-g64"))
        assert torch.equal(qt.scale, scale)
        with pytest.raises(FormatError, match="not finite and above zero"):
            ct.write(qt, torch.float32)


def test_scales_are_not_rounded_silently() -> None:
    with pytest.raises(FormatError, match="would be rounded to"):
        ct.write(random_tensor(4, 128, "w4a16", torch.float32), torch.bfloat16)
    ct.write(random_tensor(4, 128, "w8a8", torch.float32), torch.bfloat16)  # kept in fp32
    with pytest.raises(FormatError, match="not written by the integer codec"):
        ct.container(QuantSpec.parse("fp8-dynamic"))
