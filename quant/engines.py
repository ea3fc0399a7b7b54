"""What serving engines make of the result: rows of formats/accepts.json, splits over cards, commands for the card."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..formats import accepts, shard
from ..formats.spec import FormatError, QuantSpec
from .recipe import RecipeError, Serve
from .walk import Assignment, Map

ROW_PARALLEL = ("down_proj", "o_proj")  # their input is what tensor parallelism splits


def rows(serve: Serve, found: Map, assignment: Assignment) -> list[dict[str, Any]]:
    """What the named engine does with each spec of dense linears and of experts; empty when no engine is named."""
    if serve.engine is None:
        return []
    engine, _, version = serve.engine.partition("==")
    if not engine or not version:
        raise RecipeError(f"serve.engine: {serve.engine!r} needs a version, such as vllm==0.33.0")
    out = []
    for spec, modules in _used(found, assignment):
        try:
            row = accepts.lookup(engine, version, spec, modules)
        except FormatError as error:
            raise RecipeError(f"serve.engine: {error}") from None
        known: dict[str, Any] = {"verdict": "unknown", "reason": "nobody has looked", "needs": None, "source": None}
        if row is not None:
            known = {"verdict": row.verdict, "reason": row.reason, "needs": row.needs, "source": row.source}
        out.append({"engine": engine, "version": version, "spec": str(spec), "modules": modules, **known})
    return out


def refusals(found: Iterable[Mapping[str, Any]], sm: int | None) -> list[str]:
    """Why the engine will not load or not run it, one line each."""
    out = []
    for row in found:
        what = f"{row['engine']} {row['version']}: {row['spec']} for {row['modules']}"
        if row["verdict"] == "refused":
            out.append(
                f"{what} is refused ({row['reason']}); choose another spec, or leave --engine out to write it anyway"
            )
        needs = str(row["needs"] or "")
        if sm is not None and needs.startswith("sm_") and sm < int(needs[3:]):
            out.append(f"{what} needs {needs}, the card is sm_{sm}; choose another card or engine")
    return out


def line(row: Mapping[str, Any]) -> str:
    """One row for a terminal."""
    reason = f" ({row['reason']})" if row["reason"] else ""
    needs = f", needs {row['needs']}" if row["needs"] else ""
    return f"{row['engine']} {row['version']}: {row['spec']} for {row['modules']}: {row['verdict']}{needs}{reason}"


def splits(config: Mapping[str, Any], found: Map, assignment: Assignment, tp: int) -> list[str]:
    """Why `tp` cards cannot split it, with remedies: groups must not be cut in the linears whose input is split."""
    sizes = shard.Sizes.from_config(config)
    leaves: dict[QuantSpec, set[str]] = {}
    for linear in found.linears:
        leaf = linear.name.rpartition(".")[2]
        if linear.name in assignment.specs and leaf in ROW_PARALLEL:
            leaves.setdefault(assignment.specs[linear.name], set()).add(leaf)
    out: dict[str, None] = {}
    for spec, mine in leaves.items():
        others = tuple(f"{leaf}:" for leaf in ROW_PARALLEL if leaf not in mine)
        for text in shard.problems(spec, tp, sizes):
            if not text.startswith(others or ("\0",)):
                out[f"tp {tp}, {text}" if text.startswith(ROW_PARALLEL) else text] = None
    return list(out)


def commands(folder: Path, found: Map, assignment: Assignment) -> dict[str, str]:
    """Who loads it and how, for the model card: label -> command, or why not."""
    name = f"./{folder.name}"
    how = {
        "vllm": f"vllm serve {name}",
        "sglang": f"python -m sglang.launch_server --model-path {name}",
        "transformers": f"from transformers import AutoModelForCausalLM as M; model = M.from_pretrained('{name}')",
    }
    out = {"percard": f'percard generate {name} --prompt "Once"'}
    used = _used(found, assignment)
    for engine, versions in dict.fromkeys((r.engine, r.versions) for r in accepts.rows()):
        version = versions.removeprefix("==").removesuffix(".*")
        known = [accepts.lookup(engine, version, spec, modules) for spec, modules in used]
        mine = [row for row in known if row is not None]
        if engine not in how or len(mine) < len(used):
            continue
        refused = next((row for row in mine if row.verdict == "refused"), None)
        notes = "; ".join(dict.fromkeys(row.reason or row.verdict for row in mine))
        label = f"{engine} {version} ({notes})"
        out[label] = f"# not loaded: {refused.reason}" if refused is not None else how[engine]
    return out


def _used(found: Map, assignment: Assignment) -> list[tuple[QuantSpec, str]]:
    """Distinct (spec, "dense" or "experts") in the order of the model."""
    pairs = (
        (assignment.specs[x.name], "experts" if ".experts." in x.name else "dense")
        for x in found.linears
        if x.name in assignment.specs
    )
    return list(dict.fromkeys(pairs))
