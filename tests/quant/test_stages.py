"""Recipes of several stages: what is read, which mistakes are named, and the dry run on models that are not there yet."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from percard.formats.checkpoint import Checkpoint
from percard.formats.spec import FormatError
from percard.quant import prune, quantize, stages_plan
from percard.quant.fields import RecipeError
from percard.quant.recipe import Recipe
from percard.quant.stages import Stages
from percard.quant.stages_plan import Planner, Step

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-qwen3"
TEXT, HELD = EXAMPLE / "calibration.txt", EXAMPLE / "heldout.txt"
PRUNE = "prune: {ffn: 576}"
DISTILL = f"distill: {{teacher: source, data: {TEXT}, steps: 2, batch: 2, seq_len: 64}}"


def recipe(*stages: str, top: str = "") -> str:
    """A recipe of tiny-qwen3 with these stages."""
    lines = "\n".join(f"  - {stage}" for stage in stages)
    usual = {
        "calibration": f"calibration: {{source: {TEXT}, samples: 4, seq_len: 64}}",
        "verify": f"verify: {{text: {HELD}, tokens: 512}}",
    }
    more = "\n".join(line for key, line in usual.items() if f"{key}:" not in top)
    return f"model: {EXAMPLE}\nstages:\n{lines}\n{more}\n{top}\n"


def planned(tmp_path: Path, *stages: str, top: str = "", source: Path = EXAMPLE) -> list[Step]:
    """The dry run of these stages."""
    ghosts = tmp_path / "ghosts"
    shutil.rmtree(ghosts, ignore_errors=True)
    ghosts.mkdir()
    return Planner(Stages.parse(recipe(*stages, top=top)), source, tmp_path / "out", ghosts).run()


def test_a_recipe_as_people_write_it() -> None:
    found = Stages.parse(
        """
        model: Qwen/Qwen3-8B
        serve: {engine: vllm==0.33.0, sm: 90, tp: 2}
        stages:
          - prune: {ffn: 9216, layers: 32, score: {ffn: act, layers: bi}}
          - capture: {data: mix.jsonl, top_k: 64}
          - distill: {teacher: source, loss: fkl, tokens: 2.5e9, seq_len: 8192, batch: 768, lr: [1.0e-4, 1e-5], data: mix.jsonl}
          - distill: {name: again, teacher: capture/, loss: topk, lr: 1e-4, steps: 100}
          - quantize: {spec: w4a16-g128, methods: [{awq: {clip: true}}, {gptq: {order: static}}]}
          - verify
          - bench: {prompt: 512}
        calibration: {source: calib.jsonl, samples: 512, seq_len: 2048}
        verify: {text: heldout.jsonl, level: model, against: source, on_red: report}
        output: {dir: ./out}
        """
    )
    assert [stage.name for stage in found.stages] == [
        "prune",
        "capture",
        "distill",
        "again",
        "quantize",
        "verify",
        "bench",
    ]
    prune_, _, first, second, quantised, verify, bench = (stage.wish for stage in found.stages)
    assert prune_.sizes == {"ffn": 9216, "layers": 32} and (prune_.width, prune_.depth) == ("activation", "bi")
    assert (prune_.rule.group, prune_.rule.tp) == (128, 2), "a child is aligned for how it will be quantised and served"
    assert (first.tokens, first.lr, first.loss) == (2_500_000_000, 1e-4, "fkl") and second.lr == 1e-4
    assert found.stages[3].teachers == ("capture",) and found.stages[2].teachers == ("source",)
    assert [s.method for s in quantised.steps] == ["awq", "gptq"] and quantised.calibration.samples == 512
    assert (
        verify["level"] == "model"
        and bench["prompt"] == 512
        and found.check.gate["kl"] == 0.03
        and found.out == "./out"
    )


def test_names_and_groups() -> None:
    found = Stages.parse(recipe(PRUNE, DISTILL, PRUNE, DISTILL, "quantize: {spec: w4a16-g64}"))
    assert [stage.name for stage in found.stages] == ["prune", "distill", "prune-2", "distill-2", "quantize"]
    assert all(stage.wish.rule.group == 64 for stage in found.stages if stage.kind == "prune")
    limits = Stages.parse(recipe(PRUNE, top=f"verify: {{text: {HELD}, gate: {{kl: 0.1}}}}")).check.gate
    assert limits == {"kl": 0.1, "top1": None, "perplexity": None}, "own limits replace the usual ones"


@pytest.mark.parametrize(
    ("stages", "top", "words"),
    [
        (["prun: {ffn: 576}"], "", "stages[0]: found 'prun', did you mean 'prune'?"),
        (["prune: {fnn: 576}"], "", "stages[0] prune: unknown key 'fnn', did you mean 'ffn'?"),
        (["prune: {ffn: many}"], "", "prune.ffn: found 'many', expected a number"),
        (["prune: {}"], "", "say how small"),
        (["prune: {ffn: 576, rounds: 2}"], "", "write both once for each round"),
        (["prune: {target_cost: 0.7}"], "", "name it with card"),
        (["prune: {ffn: 576, depth_score: luck}"], "", "choose one of bi, loss, random"),
        (["prune: {ffn: 576, score: {ffn: act, heads: random}}"], "", "widths are scored one way"),
        ([PRUNE, "distill: {data: x.txt}"], "", "stages[1] distill.teacher is missing"),
        ([PRUNE, "distill: {teacher: captur}"], "", "'captur' is no folder and no earlier stage"),
        ([PRUNE, "distill: {teacher: distill}"], "", "'distill' is no folder and no earlier stage"),
        ([PRUNE, "distill: {teacher: source, lr: [1e-4, 1e-6]}"], "", "write the peak alone"),
        ([PRUNE, "distill: {teacher: source, steps: 2, tokens: 5}"], "", "both say how long"),
        ([PRUNE, "distill: {teacher: source, stepps: 2}"], "", "did you mean 'steps'?"),
        ([PRUNE, "distill: {teacher: source, steps: .nan}"], "", "expected a number"),
        ([PRUNE, "prune: {ffn: 448, name: prune}"], "", "belongs to an earlier stage"),
        ([PRUNE, "prune: {ffn: 448, name: ../x}"], "", "cannot be a folder here"),
        ([PRUNE, "prune: {ffn: 448, name: source}"], "", "cannot be a folder here"),
        (["capture: {data: a.txt, generate: b.jsonl}"], "", "one of them"),
        (["capture: {data: a.txt, n: 4}"], "", "capture.n: is for generate"),
        (["capture: {generate: b.jsonl, seq_len: 4}"], "", "capture.seq_len: is for data"),
        (["capture: {generate: b.jsonl, keep: '(a+)+b'}"], "", "stages[0] capture:"),
        (["verify"], "", "nothing quantised to open yet"),
        (["quantize: {spec: w4a16-g64}", "verify: {level: deep}"], "", "choose one of bytes, weights, blocks, model"),
        (["quantize: {spec: w4a16-g64}", "verify: {level: model}"], "verify: {}", "give verify.text"),
        ([PRUNE, "bench"], "verify: {}", "no figure of speed without quality beside it"),
        (["bench"], "", "no child to time yet"),
        (["quantize: {spec: w5}"], "", "stages[0] quantize: quantize.spec"),
        (["quantize: {speck: w8a8}"], "", "did you mean 'spec'?"),
        ([PRUNE], "verify: {gates: {kl: 1}}", "did you mean 'gate'?"),
        ([PRUNE], "verify: {on_red: cry}", "choose one of report, stop, promote"),
        ([PRUNE], "outputs: {dir: x}", "did you mean 'output'?"),
    ],
)
def test_mistakes_are_named(stages: list[str], top: str, words: str) -> None:
    with pytest.raises((RecipeError, FormatError)) as caught:
        Stages.parse(recipe(*stages, top=top))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_the_two_verbs_name_each_other() -> None:
    with pytest.raises(RecipeError, match="give it to percard run"):
        Recipe.parse(recipe(PRUNE, "quantize: {spec: w8a8}"))
    with pytest.raises(RecipeError, match="model is missing"):
        Stages.parse("stages: [{quantize: {spec: w8a8}}]")


def test_later_stages_are_checked_on_what_earlier_ones_would_write(tmp_path: Path) -> None:
    stages = [
        PRUNE,
        f"capture: {{data: {TEXT}, top_k: 8, seq_len: 64}}",
        "distill: {teacher: capture, steps: 2, batch: 2}",
        "quantize: {spec: w4a16-g64, methods: [gptq]}",
        "verify",
        "bench",
    ]
    steps = planned(tmp_path, *stages)
    assert [step.student for step in steps] == ["source", "prune", "prune", "distill", "quantize", "quantize"]
    assert steps[4].origin == "distill" and not any(step.refusals or step.question for step in steps)
    assert "ffn 768 -> 576" in steps[0].words and "topk, 2 steps of 2 x 64 tokens" in steps[2].words
    used = sum(path.stat().st_blocks * 512 for path in (tmp_path / "ghosts").rglob("*.safetensors"))
    assert used < 200_000 < steps[0].bytes, "models that are not there take no room"
    # What the dry run says the stages write is what they write.
    parsed = Stages.parse(recipe(*stages))
    prune.run(EXAMPLE, tmp_path / "child", parsed.stages[0].wish)
    child = Checkpoint.open(tmp_path / "child")
    ghost = Checkpoint.open(tmp_path / "ghosts" / "prune")
    assert child.nbytes == ghost.nbytes == steps[0].bytes and child.config == ghost.config
    assert {n: i.shape for n, i in child.tensors.items()} == {n: i.shape for n, i in ghost.tensors.items()}
    quantize.run(tmp_path / "child", tmp_path / "int4", parsed.stages[3].wish)
    assert Checkpoint.open(tmp_path / "int4").nbytes == steps[3].bytes


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        (["prune: {ffn: 9000}"], "stage 1 of 1 (prune): ffn 9000: the source has 768"),
        ([PRUNE, "prune: {ffn: 700}"], "stage 2 of 2 (prune-2): ffn 700: the source has 640"),
        (["prune: {layers: 0}"], "layers 0: expected at least 1"),
        (["prune: {target_params: 0.01}"], "smaller than one round of pruning goes"),
        ([PRUNE, "distill: {teacher: ./nowhere, data: x.txt}"], "teacher ./nowhere: no such folder"),
        ([PRUNE, "distill: {teacher: source, data: nowhere.txt}"], "stage 2 of 2 (distill): nowhere.txt"),
        ([PRUNE, f"distill: {{teacher: source, data: {TEXT}, batch: 100000, seq_len: 512}}"], "less than one batch of 100000"),
        ([PRUNE, "distill: {teacher: source, steps: 2}"], "--data is missing"),
        (["distill: {teacher: source, data: x.txt}"], "student and teacher are the same folder"),
        (["quantize: {spec: w8a8}", "prune: {ffn: 576}"], "stage 2 of 2 (prune): "),
        (["quantize: {spec: w8a8}", "quantize: {spec: w4a16-g64}"], "stage 2 of 2 (quantize-2): "),
        (["capture: {data: nowhere.txt}"], "stage 1 of 1 (capture): nowhere.txt"),
        ([f"capture: {{data: {TEXT}, top_k: 5000, seq_len: 64}}"], "--top-k 5000: this teacher has 4096"),
        ([f"capture: {{data: {TEXT}, seq_len: 64}}", PRUNE, "distill: {teacher: capture, loss: fkl}"], "it serves topk"),
        ([f"capture: {{data: {TEXT}, seq_len: 512}}", PRUNE, "distill: {teacher: capture, batch: 4000}"], "less than one batch"),
        ([PRUNE, "quantize: {spec: w8a8}", "prune: {ffn: 448}"], "out/quantize: source is already quantised"),
        ([PRUNE, "bench: {new: 600}"], "does not fit the context of 512"),
    ],
)  # fmt: skip
def test_the_dry_run_names_stage_and_reason(tmp_path: Path, stages: list[str], words: str) -> None:
    with pytest.raises((FormatError, RecipeError, ValueError, NotImplementedError)) as caught:
        planned(tmp_path, *stages)
    assert words in str(caught.value)


def test_training_what_is_quantised(tmp_path: Path) -> None:
    """Scales of a quantised child, or a 16-bit one that becomes INT4 while it trains; both are quantised from then on."""
    scales = f"distill: {{teacher: [prune], train: scales, data: {TEXT}, steps: 2, batch: 2, seq_len: 64}}"
    again = scales.replace("[prune]", "distill")  # an earlier stage with the same shapes is not the student itself
    steps = planned(tmp_path, PRUNE, "quantize: {spec: w4a16-g64}", scales, "verify")
    assert "scales of w4a16-g64" in steps[2].words and steps[3].student == "distill" and steps[3].origin == "prune"
    steps = planned(tmp_path, PRUNE, DISTILL, "quantize: {spec: w4a16-g64}", again, scales)
    assert "from the codes of distill-2" in steps[4].words and steps[4].origin == "distill"
    steps = planned(tmp_path, PRUNE, DISTILL.replace("steps: 2", "steps: 2, qad: w4a16-g64"), "verify")
    assert "weights of w4a16-g64, from GPTQ over calibration.txt" in steps[1].words and steps[2].origin == "prune"
    assert steps[1].bytes < steps[0].bytes / 2


def test_completions_count_as_many_windows_as_there_can_be(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "def add(a, b):"}\n{"prompt": "import "}\n')
    capture = f"capture: {{generate: {prompts}, n: 3, max_new: 8}}"
    steps = planned(tmp_path, PRUNE, capture, "distill: {teacher: capture, hard: 1, batch: 6, steps: 1}")
    assert "6 completions of 2 prompts" in steps[1].words and "none, 1 steps" in steps[2].words
    with pytest.raises(FormatError, match="6 windows, less than one batch of 7"):
        planned(tmp_path, PRUNE, capture, "distill: {teacher: capture, hard: 1, batch: 7, steps: 1}")


def test_another_tokenizer_swapped_roles_and_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other"
    shutil.copytree(EXAMPLE, other)
    words: dict[str, Any] = json.loads((other / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    first, second = (next(w for w, i in vocabulary.items() if i == n) for n in (300, 301))
    vocabulary[first], vocabulary[second] = 301, 300
    (other / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(FormatError, match=r"stage 2 of 2 \(distill\).*id 300 is"):
        planned(tmp_path, PRUNE, DISTILL.replace("source", f"{other}/"))
    small = tmp_path / "small"
    prune.run(
        EXAMPLE, small, Stages.parse(recipe("prune: {ffn: 448, score: {ffn: random}, check: false}")).stages[0].wish
    )
    steps = planned(tmp_path, PRUNE, DISTILL.replace("source", f"{small}/"))
    assert "are they swapped?" in steps[1].question
    assert stages_plan.room(tmp_path / "out", steps) == ""
    monkeypatch.setattr(stages_plan.preflight, "disk_free", lambda path: 1000)
    assert "free some or choose another output.dir" in stages_plan.room(tmp_path / "out", steps)
