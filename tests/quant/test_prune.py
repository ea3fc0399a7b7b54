"""Pruning: a child is its source with parts zeroed, in transformers and in the engine; scores, alignment, kills, refusals."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from percard.bench import engine
from percard.formats.checkpoint import Checkpoint
from percard.formats.spec import FormatError
from percard.quant import prune, prune_scores
from percard.quant.methods.depth import BlockInfluence, lowest
from percard.quant.methods.experts import ExpertScore
from percard.quant.methods.width import ChannelScore, head_norms, heads_to_keep, top
from percard.quant.prune_plan import Wish, plan
from percard.quant.prune_sizes import Rule, Sizes, align
from percard.quant.text import Calibration

from .conftest import CONFIGS
from .test_resume import with_text

Tiny = Callable[..., Path]
FREE = Rule(group=32, tp=1)
CUTS: dict[str, dict[str, int]] = {
    "layers": {"layers": 5},
    "ffn": {"ffn": 192},
    "heads": {"heads": 2},
    "kv_heads": {"kv_heads": 1},
    "hidden": {"hidden": 96},
    "experts": {"experts": 5},
    "expert_ffn": {"expert_ffn": 64},
    "all": {"layers": 5, "hidden": 96, "heads": 2},
}
CASES = [
    (kind, cut) for kind in CONFIGS for cut in CUTS if (kind != "qwen3_moe") <= (cut not in ("experts", "expert_ffn"))
]


def source(tiny: Tiny, kind: str, **over: Any) -> Path:
    """A random fp32 model of six blocks, with every bias that its family can have, and a text of its own beside it."""
    if kind == "llama":
        over = {"attention_bias": True, "mlp_bias": True, "change": _biases, **over}
    if kind == "qwen3_moe":
        over = {
            "num_experts": 8,
            "moe_intermediate_size": 96,
            "mlp_only_layers": [0, 4],
            "norm_topk_prob": True,
            **over,
        }
    return with_text(tiny(kind, dtype=torch.float32, num_hidden_layers=6, max_position_embeddings=64, **over), 12)


def _biases(tensors: dict[str, torch.Tensor]) -> None:
    random = torch.Generator().manual_seed(9)
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        tensors[name.replace(".weight", ".bias")] = torch.randn(tensors[name].shape[0], generator=random) * 0.1


def wish(src: Path, sizes: dict[str, int], **over: Any) -> Wish:
    given = {"rule": FREE, "calibration": Calibration(str(src / "calibration.jsonl"), 8, 32), **over}
    return Wish(sizes=sizes, **given)


def hf_logits(folder: Path, ids: torch.Tensor, change: Callable[[Any], None] = lambda model: None) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    change(model)
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def kept_by(model: Any, child: Path, sizes: Sizes) -> None:
    """Zeroes in `model`, by hooks, what the child does not have: which parts those are is read off the child's weights."""
    made, report = Checkpoint.open(child), json.loads((child / prune.REPORT).read_text())
    kept = report["kept_layers"]
    layers = model.model.layers
    for i, layer in enumerate(layers):
        if i not in kept:
            layer.forward = lambda x, *args, **kw: x
    hidden = columns(model.model.embed_tokens.weight, made.read("model.embed_tokens.weight"))

    def only(index: torch.Tensor, dim: int) -> torch.Tensor:
        keep = torch.zeros(dim)
        keep[index] = 1
        return keep

    wide = only(hidden, sizes.hidden)
    model.model.embed_tokens.register_forward_hook(lambda m, x, y: y * wide)
    for new, old in enumerate(kept):
        layer, prefix = layers[old], f"model.layers.{new}."
        layer.register_forward_hook(lambda m, x, y: (y[0] if isinstance(y, tuple) else y) * wide)
        layer.self_attn.register_forward_hook(lambda m, x, y: (y[0] * wide, *y[1:]))
        o = made.read(f"{prefix}self_attn.o_proj.weight")
        heads = only(columns(layer.self_attn.o_proj.weight[hidden], o), sizes.heads * sizes.head_dim)
        layer.self_attn.o_proj.register_forward_pre_hook(lambda m, x, keep=heads: (x[0] * keep,))
        if hasattr(layer.mlp, "down_proj"):
            down = made.read(f"{prefix}mlp.down_proj.weight")
            inner = only(columns(layer.mlp.down_proj.weight[hidden], down), sizes.ffn)
            layer.mlp.down_proj.register_forward_pre_hook(lambda m, x, keep=inner: (x[0] * keep,))
        else:
            router = made.read(f"{prefix}mlp.gate.weight")
            experts = columns(layer.mlp.gate.weight[:, hidden].T, router.T)
            gone = 1 - only(experts, sizes.experts)
            real = F.linear

            def forward(x: torch.Tensor, gate: Any = layer.mlp.gate, gone: torch.Tensor = gone) -> Any:
                logits = real(x.reshape(-1, x.shape[-1]), gate.weight).masked_fill(gone.bool(), float("-inf"))
                best, index = torch.topk(logits.softmax(-1), gate.top_k, dim=-1)
                return logits, best / best.sum(-1, keepdim=True) if gate.norm_topk_prob else best, index

            layer.mlp.gate.forward = forward
            with torch.no_grad():
                for e in experts.tolist():
                    here = made.read(f"{prefix}mlp.experts.{experts.tolist().index(e)}.down_proj.weight")
                    keep = only(columns(layer.mlp.experts.down_proj[e][hidden], here), sizes.expert_ffn)
                    layer.mlp.experts.down_proj[e] *= keep


def columns(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Which columns of `before` [N, K] are those of `after` [n, k]: rows may be fewer, so the first rows that agree decide."""
    rows = min(len(before), len(after))
    same = (before[:rows, :, None] == after[:rows, None, :]).all(0)
    found = same.nonzero()
    assert len(found) == after.shape[1], "columns of random weights are told apart"
    return found[:, 0]


@pytest.mark.parametrize(("kind", "cut"), CASES, ids=["-".join(c) for c in CASES])
def test_slicing_equals_masking(tiny: Tiny, tmp_path: Path, kind: str, cut: str) -> None:
    src, out = source(tiny, kind), tmp_path / "child"
    done = prune.run(src, out, wish(src, CUTS[cut]))
    config = json.loads((src / "config.json").read_text())
    sizes = Sizes.of(config, "here")
    ids = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(1))
    child = hf_logits(out, ids)
    masked = hf_logits(src, ids, lambda model: kept_by(model, out, sizes))
    whole = hf_logits(src, ids)
    assert float((child - masked).abs().max()) <= 1e-4 * float(masked.abs().max())
    assert float((child - whole).abs().max()) > 1e-3 * float(whole.abs().max()), "something must have been cut"
    if not set(done["cuts"]) & {"experts"}:
        assert done["check"]["worst"] <= 1e-4
    if kind != "mistral":  # which the engine does not run
        ours = engine.load(out, dtype=torch.float32).logits(ids)
        assert float((ours - child).abs().max()) <= 1e-4 * float(child.abs().max())
    before, after = (sum(i.nbytes for i in Checkpoint.open(p).tensors.values()) // 4 for p in (src, out))
    assert (before, after) == (done["parameters"], done["child_parameters"])


def test_kept_weights_keep_their_bytes(tiny: Tiny, tmp_path: Path) -> None:
    src, out = source(tiny, "qwen2"), tmp_path / "child"
    done = prune.run(src, out, wish(src, {"layers": 4}))
    assert done["kept_layers"][:2] == [0, 1] and done["kept_layers"][-2:] == [4, 5]
    before, after = Checkpoint.open(src), Checkpoint.open(out)
    for name in after.names:
        old = name
        if name.startswith("model.layers."):
            number, rest = name.removeprefix("model.layers.").split(".", 1)
            old = f"model.layers.{done['kept_layers'][int(number)]}.{rest}"
        assert torch.equal(after.read(name), before.read(old)), name
    assert (out / "tokenizer.json").read_bytes() == (src / "tokenizer.json").read_bytes()


def test_lists_of_blocks_move_with_them(tiny: Tiny, tmp_path: Path) -> None:
    kinds = ["full_attention"] * 6
    src = source(tiny, "qwen3_moe", layer_types=kinds, max_window_layers=3, mlp_only_layers=[1, 4])
    done = prune.run(src, tmp_path / "child", wish(src, {"layers": 5}))
    config = json.loads((tmp_path / "child" / "config.json").read_text())
    kept = done["kept_layers"]
    assert config["layer_types"] == kinds[:5] and config["num_hidden_layers"] == 5
    assert config["max_window_layers"] == sum(i < 3 for i in kept)
    assert config["mlp_only_layers"] == [n for n, i in enumerate(kept) if i in (1, 4)]
    other = source(tiny, "qwen3", name="other", per_block_scale=[1.0] * 6)
    with pytest.raises(FormatError, match="per_block_scale is a list with an entry for each of 6 blocks"):
        plan(other, wish(other, {"layers": 5}))
    assert plan(other, wish(other, {"ffn": 192})).given.ffn == 192


def test_block_influence() -> None:
    score = BlockInfluence()
    score.add(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0, 1.0], [0.0, 3.0]]))
    assert score.value == pytest.approx(0.1464466094, abs=1e-7)
    assert lowest({0: 0.0, 1: 0.3, 2: 0.2, 3: 0.2, 4: 0.0}, 1) == 2
    with pytest.raises(ValueError, match="first and last 2 stay"):
        lowest({0: 0.0, 1: 0.3}, 2)


def test_scores_against_plain_sums() -> None:
    random = torch.Generator().manual_seed(3)
    x = torch.randn(6, 5, 8, generator=random)
    expected = x.abs().mean(1).square().sum(0).sqrt()
    for split in (1, 2, 3, 6):
        score = ChannelScore(8)
        for part in x.split(split):
            score.add(part)
        torch.testing.assert_close(score.scores.float(), expected, rtol=1e-6, atol=0)
    assert torch.equal(head_norms(x, 4), torch.stack([x[..., :4].norm(dim=-1), x[..., 4:].norm(dim=-1)], dim=-1))
    assert top(torch.tensor([1.0, 3.0, 3.0, 0.0, 3.0]), 2).tolist() == [1, 2]
    query, kv = heads_to_keep(torch.tensor([1.0, 2.0, 9.0, 0.5, 3.0, 4.0], dtype=torch.float64), 3, 2, 1)
    assert (query.tolist(), kv.tolist()) == ([2, 5], [1, 2])
    reap = ExpertScore(3)
    y, g = torch.randn(7, 4, generator=random), torch.rand(7, generator=random)
    reap.add(1, y[:3], g[:3])
    reap.add(1, y[3:], g[3:])
    assert reap.scores[1] == pytest.approx(float((y.norm(dim=1) * g).mean()), rel=1e-6)
    assert reap.scores[0] == reap.scores[2] == 0 and reap.tokens.tolist() == [0, 7, 0]


@pytest.mark.parametrize("cut", ["layers", "hidden", "ffn", "heads", "experts"])
def test_scores_do_not_depend_on_how_windows_are_batched(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: str
) -> None:
    src = source(tiny, "qwen3_moe")
    found = []
    for tokens in (32, 2048):
        monkeypatch.setattr(prune_scores, "TOKENS_AT_ONCE", tokens)
        monkeypatch.setattr(prune, "_slice", _stop)
        out = tmp_path / str(tokens)
        with pytest.raises(KeyboardInterrupt):
            prune.run(src, out, wish(src, CUTS[cut]))
        work = tmp_path / f".{tokens}.percard-unfinished" / ".percard-work"
        if cut == "layers":
            entry = json.loads((work / "journal.jsonl").read_text().splitlines()[1])
            found.append({k: torch.tensor(v) for k, v in entry["scores"].items()})
        else:
            found.append(load_file(work / prune.SCORES))
    assert found[0].keys() == found[1].keys() and found[0]
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-5, atol=1e-7)


def _stop(*args: Any) -> None:
    raise KeyboardInterrupt


def test_a_killed_run_goes_on_with_the_same_bytes(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src = source(tiny, "qwen3")
    asked = wish(src, {"layers": 4, "ffn": 192})
    prune.run(src, tmp_path / "whole", asked)
    monkeypatch.setattr(prune, "UNIT", 1)  # a journal line for every tensor
    out, lines = tmp_path / "killed", []
    for stage in range(4):
        child = os.fork()
        if not child:  # SIGKILL once so many lines more are in the journal
            seen = 0

            def add(self: Any, entry: dict[str, Any], stage: int = stage, real: Any = prune.Journal.add) -> None:
                nonlocal seen
                real(self, entry)
                seen += 1
                if seen > stage:
                    os.kill(os.getpid(), signal.SIGKILL)

            prune.Journal.add = add  # type: ignore[method-assign]
            torch.set_num_threads(1)
            prune.run(src, out, asked)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert not out.exists()
        lines.append(
            len((tmp_path / ".killed.percard-unfinished" / ".percard-work" / "journal.jsonl").read_text().splitlines())
        )
    assert lines == [2, 4, 7, 11]
    prune.run(src, out, asked)
    for name in ("model.safetensors", "config.json"):
        digests = {hashlib.sha256((tmp_path / p / name).read_bytes()).hexdigest() for p in ("whole", "killed")}
        assert len(digests) == 1, name
    with pytest.raises(FileExistsError, match="output exists"):
        prune.run(src, out, asked)


SOURCE = Sizes(36, 4096, 32, 8, 128, 12288)
MOE = Sizes(48, 2048, 32, 4, 128, 6144, 128, 768, 8)


@pytest.mark.parametrize(
    ("sizes", "asked", "rule", "given"),
    [
        (SOURCE, {"ffn": 9000}, Rule(128, 2), {"ffn": 9216}),
        (SOURCE, {"ffn": 9000}, Rule(128, 4), {"ffn": 9216}),
        (SOURCE, {"ffn": 9217}, Rule(128, 4), {"ffn": 9728}),
        (SOURCE, {"hidden": 3000}, Rule(128, 2), {"hidden": 3072}),
        (SOURCE, {"heads": 24}, Rule(128, 2), {"heads": 24, "kv_heads": 8}),
        (SOURCE, {"kv_heads": 4}, Rule(128, 2), {"heads": 16, "kv_heads": 4}),
        (SOURCE, {"layers": 32}, Rule(), {"layers": 32}),
        (MOE, {"experts": 97}, Rule(), {"experts": 104}),
        (MOE, {"experts": 100}, Rule(ep=16), {"experts": 112}),
        (MOE, {"expert_ffn": 500}, Rule(128, 1), {"expert_ffn": 512}),
    ],
)
def test_sizes_are_rounded_up_to_what_can_be_served(sizes: Sizes, asked: dict, rule: Rule, given: dict) -> None:
    found = align(sizes, asked, rule)
    assert {name: getattr(found, name) for name in given} == given


@pytest.mark.parametrize(
    ("sizes", "asked", "rule", "words"),
    [
        (
            SOURCE,
            {"heads": 20},
            Rule(128, 2),
            r"8 KV heads need as many query heads each \(2.5 here\); the next such number is 24",
        ),
        (SOURCE, {"ffn": 20000}, Rule(), "the source has 12288; pruning makes a model smaller"),
        (SOURCE, {"ffn": 12200}, Rule(), "nothing would be cut"),
        (SOURCE, {"layers": 0}, Rule(), "expected at least 1"),
        (SOURCE, {"layers": 3}, Rule(), "the first 2 and the last 2 blocks stay"),
        (SOURCE, {"experts": 4}, Rule(), "this model has no experts"),
        (MOE, {"experts": 4}, Rule(ep=1), None),
        (MOE, {"kv_heads": 3}, Rule(128, 2), "do not divide over 2 cards"),
        (Sizes(8, 256, 4, 2, 64, 768), {"heads": 2}, Rule(128, 1), None),
        (Sizes(8, 256, 4, 2, 64, 768), {"heads": 2}, Rule(128, 2), "do not divide|no multiple of 2 x 128"),
    ],
)
def test_sizes_that_cannot_be_served_are_refused(sizes: Sizes, asked: dict, rule: Rule, words: str | None) -> None:
    if words is None:
        assert align(sizes, asked, rule) != sizes
        return
    with pytest.raises(FormatError, match=words):
        align(sizes, asked, rule)


def test_a_target_is_met_by_the_largest_child_that_meets_it(tiny: Tiny) -> None:
    src = source(tiny, "qwen3")
    whole = sum(i.nbytes for i in Checkpoint.open(src).tensors.values()) // 4
    asked = {"rule": Rule(64, 1), "calibration": Calibration(str(src / "calibration.jsonl"), 8, 32)}
    found = plan(src, Wish(target_params=0.9, **asked))
    assert found.child_parameters <= 0.9 * whole and found.cuts == {"ffn": (256, 192)}
    assert plan(src, Wish(target_params=0.9 * whole, **asked)).cuts == found.cuts
    deep = plan(src, Wish(target_params=0.5, **asked))
    assert set(deep.cuts) == {"ffn", "layers"} and any("beyond a third" in w for w in deep.warnings)
    cheap = plan(src, Wish(target_cost=0.9, **asked), cost=lambda c: c["intermediate_size"] * c["num_hidden_layers"])
    assert cheap.cuts == {"ffn": (256, 192)}
    with pytest.raises(FormatError, match="smaller than one round of pruning goes"):
        plan(src, Wish(target_params=0.1, **asked))
    with pytest.raises(FormatError, match="give --card"):
        plan(src, Wish(target_cost=0.5, **asked))


@pytest.mark.parametrize(
    ("over", "words"),
    [
        ({}, "say how small"),
        ({"sizes": {"ffn": 64}, "target_params": 0.5}, "one of them"),
        ({"target_params": 0.0}, "expected a share"),
        ({"target_params": float("nan")}, "expected a share"),
        ({"target_cost": 1.5}, "below 1"),
        ({"sizes": {"ffn": 64}, "depth": "magic"}, "--depth-score magic: not known; choose one of bi, loss, random"),
        ({"sizes": {"ffn": 64}, "width": "magic"}, "--width-score magic"),
    ],
)
def test_a_wish_that_says_nothing_or_too_much(over: dict[str, Any], words: str) -> None:
    with pytest.raises(FormatError, match=words):
        Wish(**over)


def test_bad_sources_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    src = source(tiny, "qwen3", quantization_config={"quant_method": "awq"})
    with pytest.raises(FormatError, match="already quantised; prune the 16-bit checkpoint first"):
        plan(src, wish(src, {"ffn": 192}))

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = float("nan")

    bad = source(tiny, "llama", name="bad", change=lambda t: (_biases(t), spoil(t))[0])
    with pytest.raises(FormatError, match="NaN or Inf"):
        prune.run(bad, tmp_path / "out", wish(bad, {"ffn": 192}))
    with pytest.raises(FormatError, match=r"layers\.1\.mlp\.down_proj\.weight holds NaN or Inf"):
        prune.run(bad, tmp_path / "out", wish(bad, {"ffn": 192}, width="random", check=False))
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.percard-unfinished").exists()
    with pytest.raises(FormatError, match="--tp 0"):
        Rule(tp=0)
    short = source(tiny, "qwen3", name="short")
    (short / "calibration.jsonl").write_text('{"ids": [1, 2, 3]}\n{"ids": [4, 5]}\n')
    with pytest.raises(FormatError, match="less than one window of 32"):
        plan(short, wish(short, {"ffn": 192}))
