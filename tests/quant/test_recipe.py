"""Recipes: what is read is what is printed, and every mistake is one line that names the place and the remedy."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from percard.formats.spec import FormatError, QuantSpec
from percard.quant.recipe import MAX_BYTES, Recipe, RecipeError

FULL = r"""
model: Qwen/Qwen3-8B
serve: {engine: vllm==0.33.0, sm: 90, tp: 2}
stages:
  - quantize:
      spec: w4a16-g128
      methods: [{rtn: {search: true, norm: 2.4}}]
      layers: {'re:.*\.layers\.(0|35)\..*': w8a16-g128}
      ignore: [lm_head, 're:.*\.mlp\.gate$']
verify: {level: bytes}
output: {dir: ./out, to: compressed-tensors, card: false}
"""
SHORT = "stages: [{quantize: {spec: w4a16-g128}}]"


def test_every_field_is_read() -> None:
    recipe = Recipe.parse(FULL)
    assert recipe.spec == QuantSpec.parse("w4a16-g128")
    assert dict(recipe.rounding.options) == {"search": True, "norm": 2.4, "body": ""}
    assert recipe.layers == ((r"re:.*\.layers\.(0|35)\..*", QuantSpec.parse("w8a16-g128")),)
    assert recipe.ignore == ("lm_head", r"re:.*\.mlp\.gate$") and not recipe.replace_ignore
    assert (recipe.serve.engine, recipe.serve.sm, recipe.serve.tp) == ("vllm==0.33.0", 90, 2)
    assert (recipe.model, recipe.verify.level, recipe.out, recipe.card) == ("Qwen/Qwen3-8B", "bytes", "./out", False)


@pytest.mark.parametrize("text", [FULL, SHORT, "stages: [{quantize: {spec: w8a8, ignore!: []}}]"])
def test_print_and_parse_are_inverse(text: str) -> None:
    recipe = Recipe.parse(text)
    assert Recipe.parse(recipe.to_yaml()) == recipe
    assert Recipe.parse(recipe.to_yaml()).to_yaml() == recipe.to_yaml()


def test_flags_mean_the_same_as_a_file() -> None:
    assert Recipe.from_flags(spec="w4a16-g128") == Recipe.parse(SHORT)
    assert (
        Recipe.from_flags(spec="w8a8", options={"search": False}).to_yaml()
        == Recipe.parse("stages: [{quantize: {spec: w8a8, methods: [{rtn: {search: false}}]}}]").to_yaml()
    )


def test_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        Recipe.parse(SHORT).spec = QuantSpec.parse("w8a8")  # type: ignore[misc]


def quantize(inside: str) -> str:
    return f"stages: [{{quantize: {{spec: w4a16-g128, {inside}}}}}]"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("stage: []", "unknown key 'stage', did you mean 'stages'?"),
        ("stages: [{quantise: {}}]", "unknown key 'quantise', did you mean 'quantize'?"),
        ("stages: [{quantize: {spce: w8a8}}]", "unknown key 'spce', did you mean 'spec'?"),
        ("stages: [{quantize: {}}]", "quantize.spec is missing"),
        ("stages: []", "expected a list with one stage"),
        ("stages: [{quantize: {spec: w8a8}}, {quantize: {spec: w8a8}}]", "expected a list with one stage"),
        ("stages: [{quantize: {spec: w5a16}}]", "quantize.spec: unknown spec 'w5a16'"),
        ("stages: [{quantize: {spec: 8}}]", "quantize.spec: found 8, expected text"),
        ("stages: [{quantize: {spec: fp8-block}}]", "rtn rounds to integers"),
        (quantize("methods: [gptqq]"), "unknown method 'gptqq', did you mean 'gptq'?; known: rtn"),
        (quantize("methods: [rtm]"), "unknown method 'rtm', did you mean 'rtn'?"),
        (quantize("methods: [rtn, rtn]"), "expected exactly one of rtn"),
        (quantize("methods: []"), "expected a list, such as [rtn]"),
        (quantize("methods: [{rtn: {serach: true}}]"), "unknown key 'serach', did you mean 'search'?"),
        (quantize("methods: [{rtn: {norm: 9}}]"), "methods.rtn.norm: 9 is outside 1.0 .. 4.0"),
        (quantize("methods: [{rtn: {norm: .nan}}]"), "outside 1.0 .. 4.0"),
        (quantize("methods: [{rtn: {search: 1}}]"), "expected true or false"),
        (quantize("layers: {'re:(': w8a8}"), "is not a regex"),
        (quantize("layers: {'a': w9}"), "quantize.layers.'a': unknown spec"),
        (quantize("layers: {a: w8a8, a: w8a16}"), "key 'a' stands there twice"),
        (quantize("ignore: lm_head"), "expected a list of names"),
        (quantize("ignore: [], ignore!: []"), "keep one of them"),
        (
            SHORT + "\nverify: {level: models}",
            "did you mean 'model'?; choose one of none, bytes, weights, blocks, model",
        ),
        (SHORT + "\nverify: {level: model}", "verify.text is missing: level model runs both models"),
        (SHORT + "\nserve: {tp: 0}", "serve.tp: 0 is outside 1 .. 1024"),
        (SHORT + "\noutput: {to: gguf}", "choose one of compressed-tensors"),
        (SHORT + "\noutput: {card: maybe}", "output.card: found 'maybe', expected true or false"),
        ("- a\n- b", "recipe: found list"),
        ("", "stages: expected a list"),
        ("a: [", "not YAML"),
        ("a: &x [1]\nb: *x", "aliases (*x) are not read"),
        ("a: !!python/object/apply:os.system ['true']", "not YAML"),
        ("? [1, 2]\n: 3", "a key must be a word"),
        ("[" * 5000, "nested deeper than 16"),
    ],
)
def test_mistakes_are_named(text: str, says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(text)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_files(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    with pytest.raises(RecipeError, match="no such recipe file"):
        Recipe.load(file)
    file.write_text(SHORT)
    assert Recipe.load(file) == Recipe.parse(SHORT)
    file.write_text("stages: [{quantize: {spec: w4}}]")
    with pytest.raises(RecipeError, match=r"r\.yaml: quantize\.spec: unknown spec"):
        Recipe.load(file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match="UTF-8"):
        Recipe.load(file)
    file.write_text("#" * (MAX_BYTES + 1))
    with pytest.raises(RecipeError, match="at most"):
        Recipe.load(file)
    with pytest.raises(RecipeError, match="no such recipe file"):
        Recipe.load(tmp_path)


def test_flags_are_checked() -> None:
    with pytest.raises(FormatError, match="unknown spec"):
        Recipe.from_flags(spec="int4")
    with pytest.raises(RecipeError, match="known: rtn"):
        Recipe.from_flags(spec="w8a8", method="gptq-x")
    with pytest.raises(RecipeError, match="reads no text"):
        Recipe.from_flags(spec="w8a8", calibration="x.jsonl")
    with pytest.raises(RecipeError, match=r"serve\.tp"):
        Recipe.from_flags(spec="w8a8", tp=-1)
