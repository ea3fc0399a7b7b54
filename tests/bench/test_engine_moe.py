"""Qwen3-MoE in the engine: transformers is the judge in fp32, a dequantised twin for quantised experts."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from percard.bench.engine import load, load_config
from percard.bench.engine.config import parse_config
from percard.bench.engine.experts import Moe, grouped, one_by_one, route, sixteen_bit
from percard.formats import affine, compressed_tensors
from percard.formats.spec import FormatError, QuantSpec
from percard.formats.tensor import ExpertsTensor
from percard.quant import quantize
from percard.quant.recipe import Recipe

IDS = torch.arange(1, 41).reshape(2, 20)
BIG = {"hidden_size": 128, "moe_intermediate_size": 64, "num_hidden_layers": 2}
VARIANTS = [
    {},
    {"norm_topk_prob": False},
    {"decoder_sparse_step": 2},
    {"mlp_only_layers": [1], "num_experts_per_tok": 1},
    {"num_experts_per_tok": 12},
]


def quantised_copy(source, target, spec: QuantSpec):
    """A compressed-tensors checkpoint of `source`, expert by expert, and the same weights dequantised."""
    tensors, raw = load_file(source / "model.safetensors"), json.loads((source / "config.json").read_text())
    config = parse_config(raw, "x")
    modules = [f"model.layers.{i}.{m}" for i in range(config.layers) for m in config.linears(i)]
    plain, packed = dict(tensors), dict(tensors)
    for module in modules:
        qt = affine.quantize(tensors[f"{module}.weight"], spec, affine.scale_dtype_of(spec, torch.bfloat16))
        plain[f"{module}.weight"] = affine.dequantize(qt, torch.float32)
        del packed[f"{module}.weight"]
        for suffix, tensor in compressed_tensors.write(qt, torch.bfloat16).items():
            packed[f"{module}.{suffix}"] = tensor.contiguous()
    ignored = ["lm_head", *(f"model.layers.{i}.mlp.gate" for i in range(config.layers))]
    section = {"quantization_config": compressed_tensors.config(dict.fromkeys(modules, spec), ignored)}
    for folder, held, extra in ((target / "plain", plain, {}), (target / "packed", packed, section)):
        folder.mkdir(parents=True)
        save_file(held, str(folder / "model.safetensors"), metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(raw | extra))
    return target / "packed", target / "plain"


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_logits_equal_transformers(checkpoint, changes) -> None:
    transformers = pytest.importorskip("transformers")
    folder = checkpoint("qwen3-moe", **changes)
    ours = load(folder, device="cpu")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = theirs(input_ids=IDS).logits
    assert expected.std() > 0.5, "logits without spread would hide a mistake"
    assert (ours.logits(IDS) - expected).abs().max() < 1e-4


def test_cached_steps_equal_logits_without_cache(checkpoint) -> None:
    ours = load(checkpoint("qwen3-moe"), device="cpu")
    cache = ours.new_cache(2, 24)
    steps = [ours.prefill(IDS[:, :16], cache, [16, 9])]
    steps += [ours.step(IDS[:, 16 + i], cache) for i in range(4)]
    for b, length in enumerate([16, 9]):
        whole = torch.cat((IDS[b, :length], IDS[b, 16:20]))
        expected = ours.logits(whole[None])[0, length - 1 :]
        assert torch.allclose(torch.stack([step[b] for step in steps]), expected, atol=1e-4)


@pytest.mark.parametrize("name", ["w4a16-g32", "w4a16-g64-asym", "w4a16"])
def test_quantised_experts_run_as_their_dequantised_twin(checkpoint, tmp_path, name) -> None:
    packed, plain = quantised_copy(checkpoint("qwen3-moe", **BIG), tmp_path, QuantSpec.parse(name))
    ours = load(packed, device="cpu", dtype=torch.float32, impl="reference")
    twin = load(plain, device="cpu", dtype=torch.float32)
    assert isinstance(ours.weights.blocks[0].moe.w13, ExpertsTensor) and not ours.notes
    assert ours.kernel == "matmul_w4a16.reference + moe_matmul.reference" and not ours.same_fusions
    assert (ours.logits(IDS) - twin.logits(IDS)).abs().max() < 1e-4
    assert ours.nbytes < twin.nbytes


@pytest.mark.parametrize("name", ["w4a16-g32", "w8a8"])
def test_what_the_workshop_writes_runs_as_what_is_rounded_at_load(checkpoint, tmp_path, name) -> None:
    """quantise -> compressed-tensors, expert by expert -> engine, without a search for scales."""
    folder = checkpoint("qwen3-moe", dtype=torch.bfloat16, torch_dtype="bfloat16", **BIG)
    report = quantize.run(folder, tmp_path / "out", Recipe.from_flags(spec=name, options={"search": False}))
    assert sum(".experts." in m.name for m in report.modules) == 2 * 12 * 3
    written = load(tmp_path / "out", device="cpu")
    at_load = load(folder, device="cpu", spec=QuantSpec.parse(name))
    assert written.spec == at_load.spec and not written.notes
    assert torch.equal(written.weights.blocks[1].moe.w2.data, at_load.weights.blocks[1].moe.w2.data)
    assert torch.equal(written.logits(IDS), at_load.logits(IDS))


def test_w8a8_experts_stay_near(checkpoint) -> None:
    folder = checkpoint("qwen3-moe", **BIG)
    exact = load(folder, device="cpu")
    ours = load(folder, device="cpu", spec=QuantSpec.parse("w8a8"), impl="reference")
    assert ours.kernel.startswith("rmsnorm_quantize.reference + quantize_rows") and "moe_matmul" in ours.kernel
    p, q = exact.logits(IDS).log_softmax(-1), ours.logits(IDS).log_softmax(-1)
    assert 0 < (p.exp() * (p - q)).sum(-1).mean() < 0.05


@pytest.mark.parametrize("name", ["w4a16-g64", "w8a8"])
def test_the_served_body_equals_the_reference(checkpoint, name) -> None:
    folder, spec = checkpoint("qwen3-moe", **BIG), QuantSpec.parse(name)
    served, judge = load(folder, spec=spec, device="cpu"), load(folder, spec=spec, device="cpu", impl="reference")
    assert "moe_matmul.cpu" in served.kernel
    p, q = served.logits(IDS).log_softmax(-1), judge.logits(IDS).log_softmax(-1)
    assert (p.exp() * (p - q)).sum(-1).mean() < 1e-3
    assert len(served.generate([[1, 2, 3], [4, 5]], 6, stop=())[1]) == 6


def test_a_spec_that_no_expert_kernel_serves_is_dequantised_with_a_note(checkpoint) -> None:
    ours = load(checkpoint("qwen3-moe", **BIG), device="cpu", spec=QuantSpec.parse("w4a8-g64"), impl="reference")
    assert any("experts in w4a8-g64: dequantised" in note for note in ours.notes)
    assert isinstance(ours.weights.blocks[0].moe.w2, torch.Tensor)


def test_routing_takes_the_heaviest_and_normalises() -> None:
    router = torch.tensor([[0.0], [2.0], [1.0], [-1.0]])
    m = Moe(router, torch.empty(4, 2, 1), torch.empty(4, 1, 1), 2, True)
    ids, weights = route(torch.ones(1, 1), m)
    assert ids.tolist() == [[1, 2]] and weights.sum() == pytest.approx(1)
    assert weights[0, 0] / weights[0, 1] == pytest.approx(torch.e, rel=1e-5)
    plain = route(torch.ones(1, 1), Moe(router, m.w13, m.w2, 2, False))[1]
    assert torch.allclose(plain, torch.tensor([0.0, 2.0, 1.0, -1.0]).softmax(0)[[1, 2]])


def test_the_grouped_baseline_is_the_sum_of_its_experts() -> None:
    """Unused experts, one that takes every token, and a single row through a product of its own."""
    random = torch.Generator().manual_seed(3)
    w13, w2 = torch.randn(5, 14, 8, generator=random), torch.randn(5, 8, 7, generator=random)
    for ids in (torch.tensor([[0, 3], [3, 1], [3, 0]]), torch.tensor([[4, 2]])):
        h, weights = torch.randn(len(ids), 8, generator=random), torch.rand(ids.shape, generator=random)
        want = torch.zeros_like(h)
        for t, j in [(t, j) for t in range(len(ids)) for j in range(2)]:
            gate, up = (w13[ids[t, j]] @ h[t]).chunk(2)
            want[t] += weights[t, j] * (w2[ids[t, j]] @ (torch.nn.functional.silu(gate) * up))
        calls = []

        def matmul(x, w, calls=calls):
            calls.append(len(x))
            return x @ w.T

        assert torch.allclose(sixteen_bit(h, ids, weights, w13, w2, matmul), want, atol=1e-4)
        assert sum(calls) == 2 * ids.numel() and len(calls) == 2 * len(ids.unique())


def test_the_product_that_a_card_takes_is_that_of_one_expert_after_the_other() -> None:
    """torch's grouped product runs on a CPU as well: the way of a card, without one."""
    random = torch.Generator().manual_seed(4)
    w13, w2 = (torch.randn(6, n, k, generator=random).bfloat16() / 8 for n, k in ((64, 64), (64, 32)))
    rows, counts = torch.randn(11, 64, generator=random).bfloat16(), torch.tensor([0, 4, 0, 1, 6, 0])
    want = one_by_one(rows, counts, w13, w2, torch.nn.functional.linear)
    assert torch.allclose(grouped(rows, counts, w13, w2).float(), want.float(), rtol=0.02, atol=0.02)


def test_what_one_step_reads_grows_with_the_batch(checkpoint) -> None:
    model = load(checkpoint("qwen3-moe"), device="cpu")
    one, all_of_them = model.step_bytes(1), model.step_bytes(10**6)
    experts = sum(b.moe.nbytes for b in model.weights.blocks)
    assert all_of_them - one == pytest.approx(experts * 9 / 12, rel=1e-6)
    assert one < model.step_bytes(2) < all_of_them == model.nbytes - model.weights.embedding.nbytes


def test_built_in_shapes_and_their_sizes() -> None:
    small, large = (load_config(f"shape:qwen3-{n}") for n in ("30b-a3b", "235b-a22b"))
    for config, total in ((small, 30.5e9), (large, 235.1e9)):
        tables = 2 * config.vocab * config.hidden
        assert config.layers * config.block_parameters() + tables == pytest.approx(total, rel=0.01)
    assert small.experts.count == 128 and small.experts.per_token == 8 and small.experts.ffn == 768


def test_a_synthetic_mixture_loads_with_fewer_layers(checkpoint, monkeypatch) -> None:
    small = json.loads((checkpoint("qwen3-moe") / "config.json").read_text())
    config = parse_config(small, "tiny-moe")
    monkeypatch.setattr("percard.bench.engine.load_config", lambda source: config)
    one = load("shape:tiny-moe", layers=1, dtype=torch.float32, device="cpu")
    two = load("shape:tiny-moe", layers=2, dtype=torch.float32, device="cpu")
    assert torch.equal(one.weights.blocks[0].moe.w13, two.weights.blocks[0].moe.w13)
    assert not torch.equal(two.weights.blocks[0].moe.w2, two.weights.blocks[1].moe.w2)
    half = two.with_dtype(torch.bfloat16)
    assert half.weights.blocks[1].moe.w13.dtype == torch.bfloat16 == half.weights.blocks[1].moe.router.dtype
    assert torch.isfinite(half.logits(IDS)).all()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_experts_per_tok": 13}, "num_experts_per_tok is 13, expected at most 12"),
        ({"num_experts": None}, "num_local_experts is None"),
        ({"mlp_only_layers": "no"}, "mlp_only_layers is 'no'"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size is 0"),
    ],
)
def test_broken_configs_are_named(checkpoint, changes, said) -> None:
    raw = json.loads((checkpoint("qwen3-moe") / "config.json").read_text())
    with pytest.raises(FormatError, match=said):
        parse_config(raw | changes, "x")


def test_transformers_5_writes_the_count_under_another_name(checkpoint) -> None:
    raw = json.loads((checkpoint("qwen3-moe") / "config.json").read_text())
    raw["num_local_experts"] = raw.pop("num_experts")
    assert parse_config(raw, "x").experts.count == 12
