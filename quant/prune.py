"""`percard prune`: a checkpoint in, a smaller ordinary checkpoint of the same family out. The whole story, top to bottom.

    plan      sizes that were asked for, or a target, become sizes that stay servable (prune_sizes.py); no weight is read
    score     the text goes through the model, block by block: which blocks, channels, heads, experts matter (prune_scores.py)
    slice     tensor after tensor is cut and written (prune_child.py); what is kept is kept bit for bit, norms but for a factor
    check     the child's tensors are what its config promises, and it says what the source says with those parts zeroed

A run that was killed goes on: scores of finished rounds and finished tensors are in the journal. Pruning alone is not the end:
a dense child wants distilling (`percard distill`), and the dry run says so.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ..formats.checkpoint import Writer
from . import output, prune_check, report
from .journal import NAME, Journal, machine, source_mark, stretches
from .methods import depth, width
from .output import Output
from .progress import Callback, Meter
from .prune_child import Child, Keep
from .prune_plan import Cost, Plan, Wish, plan
from .prune_scores import Chain, WidthScores, depth_passes, depth_scores
from .prune_sizes import ENDS
from .walk import Shape, finite

REPORT, SCORES = "prune.json", "scores.safetensors"
UNIT = 512 << 20  # bytes of the source that a journal line of slicing stands for


def run(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    wish: Wish,
    *,
    cost: Cost | None = None,
    force: bool = False,
    fresh: bool = False,
    progress: Callback | None = None,
) -> dict[str, Any]:
    """Prunes `src` into the new folder `dst`; returns the report that lies there as prune.json.

    FormatError or FileExistsError with nothing left behind; an interrupt or a full disk leaves what is finished for the same call.
    """
    out_path = Path(dst)
    output.refuse(Path(src), out_path, force)
    planned = plan(src, wish, cost=cost)
    with Output(out_path, force, fresh) as out:
        out.keep, out.note = (out.work / NAME).exists(), output.KEPT
        journal = Journal(out.work / NAME, _fingerprint(planned))
        keep, facts = _choose(planned, out, journal, progress)
        child = Child(planned.found, planned.source.config, planned.sizes, planned.given, keep)
        _slice(planned, child, out, journal, progress)
        out.written = True
        done: dict[str, Any] = {
            "schema": 1,
            "verb": "prune",
            **planned.to_dict(),
            **facts,
            "versions": report.versions(),
        }
        if wish.check:
            done["check"] = prune_check.check(planned.source, planned.found, child, out.folder, progress)
        output.write(out.folder / REPORT, json.dumps(done, indent=1, ensure_ascii=False) + "\n")
        name = report.SECOND_CARD_NAME if (planned.source.path / report.CARD_NAME).exists() else report.CARD_NAME
        output.write(out.folder / name, _card(done, planned))
        out.publish()
    return done


def _fingerprint(planned: Plan) -> dict[str, Any]:
    wish = planned.wish
    recipe = {
        "sizes": dataclasses.asdict(planned.given),
        "depth": wish.depth,
        "width": wish.width,
        "seed": wish.calibration.seed,
    }
    mark: dict[str, Any] = {
        "source": source_mark(planned.source),
        "recipe": recipe,
        "percard": report.versions()["percard"],
    }
    if planned.windows is not None:
        import transformers

        mark |= {"calibration": planned.windows.sha256, "transformers": transformers.__version__}
    return mark | machine()


# Choosing -----------------------------------------------------------------------------------------------------------


def _choose(planned: Plan, out: Output, journal: Journal, progress: Callback | None) -> tuple[Keep, dict[str, Any]]:
    """What stays, and for the report why."""
    sizes, given, wish = planned.sizes, planned.given, planned.wish
    drops = sizes.layers - given.layers
    rounds = depth_passes(sizes.layers, drops, wish.depth) if wish.depth != "random" else 0
    widths = [n for n in planned.scored if n != "layers"]
    meter = Meter("score", rounds + (given.layers if widths else 0), progress, "blocks")
    chain: Chain | None = None

    def chained() -> Chain:
        nonlocal chain
        if chain is None:
            assert planned.windows is not None
            folder = out.work / "activations"
            output.discard(folder) if folder.exists() else None
            folder.mkdir()
            chain = Chain(planned.source, planned.found, planned.windows.ids, torch.float32, folder, meter)
        return chain

    kept = list(range(sizes.layers))
    history: list[dict[str, Any]] = []
    if drops and wish.depth == "random":
        gone = random.Random(wish.calibration.seed).sample(kept, drops)  # a control spares no end
        kept = [i for i in kept if i not in gone]
        history = [{"block": i} for i in gone]
    elif drops:
        done = {e["unit"]: e for e in journal.entries}
        for number in range(drops):
            entry = done.get(f"drop {number}")
            if entry is None:
                scores = depth_scores(chained(), kept, wish.depth)
                entry = {
                    "unit": f"drop {number}",
                    "block": depth.lowest(scores, ENDS),
                    "scores": {str(k): v if v < float("inf") else None for k, v in scores.items()},
                }
                journal.add(entry)
                out.keep = True
            kept.remove(entry["block"])
            history.append({"block": entry["block"], "scores": entry["scores"]})
    tensors: dict[str, torch.Tensor] = {}
    if widths:
        file = out.work / SCORES
        if not file.is_file():
            watching = WidthScores(sizes, widths)
            chained().run(kept, at=watching.at, label="scores of ")
            save_file(watching.tensors, file.with_suffix(".tmp"))
            file.with_suffix(".tmp").rename(file)
            out.keep = True
        tensors = load_file(file)
    if chain is not None:
        output.discard(out.work / "activations")
    keep = _keep(planned, tuple(kept), tensors)
    facts: dict[str, Any] = {"kept_layers": kept, "dropped": history}
    if keep.experts:
        facts["kept_experts"] = {str(i): index.tolist() for i, index in keep.experts.items()}
        facts["tokens_per_expert"] = {
            str(i): tensors[f"tokens.{i}"].long().tolist() for i in keep.experts if f"tokens.{i}" in tensors
        }
    return keep, facts


def _keep(planned: Plan, layers: tuple[int, ...], scores: Mapping[str, torch.Tensor]) -> Keep:
    """The best of each axis that shrinks, by `scores`, or by seeded random ones."""
    sizes, given, cuts = planned.sizes, planned.given, planned.cuts
    generator = torch.Generator().manual_seed(planned.wish.calibration.seed)

    def score(name: str, count: int) -> torch.Tensor:
        if planned.wish.width == "random":
            return torch.rand(count, generator=generator, dtype=torch.float64)
        return scores[name]

    mixtures = {x.block for x in planned.found.linears if ".mlp.experts." in x.name}
    sparse = {i for i in layers if i in mixtures}
    hidden = width.top(score("hidden", sizes.hidden), given.hidden) if "hidden" in cuts else None
    ffn = {i: width.top(score(f"ffn.{i}", sizes.ffn), given.ffn) for i in layers if "ffn" in cuts and i not in sparse}
    query, kv = {}, {}
    if {"heads", "kv_heads"} & set(cuts):
        for i in layers:
            query[i], kv[i] = width.heads_to_keep(
                score(f"heads.{i}", sizes.heads), sizes.kv_heads, given.kv_heads, given.per_group
            )
    experts = {
        i: width.top(score(f"experts.{i}", sizes.experts), given.experts)
        for i in layers
        if "experts" in cuts and i in sparse
    }
    inner = {}
    if "expert_ffn" in cuts:
        for i in sorted(sparse):
            for e in range(sizes.experts):
                inner[i, e] = width.top(score(f"expert_ffn.{i}.{e}", sizes.expert_ffn), given.expert_ffn)
    return Keep(layers, hidden, ffn, query, kv, experts, inner)


# Slicing ------------------------------------------------------------------------------------------------------------


def _slice(planned: Plan, child: Child, out: Output, journal: Journal, progress: Callback | None) -> None:
    """Writes the child, a journal line for about half a gigabyte of the source."""
    source = planned.source
    shapes: dict[str, Shape] = {n: i.shape for n, i in source.tensors.items()}
    cuts = dict(child.tensors(shapes))
    tensors = {cut.name: (source.info(name).dtype, cut.shape(shapes[name])) for name, cut in cuts.items()}
    units = stretches(cuts, lambda name: source.info(name).nbytes, UNIT)
    finished = {e["unit"] for e in journal.entries}
    done = [cuts[n].name for number, names in enumerate(units) for n in names if f"slice {number}" in finished]
    meter = Meter("slice", sum(source.info(n).nbytes for n in cuts), progress)
    with Writer(out.folder, tensors, resume=done) as writer:
        for number, names in enumerate(units):
            if f"slice {number}" in finished:
                meter.skip(sum(source.info(n).nbytes for n in names))
                continue
            for name in names:
                writer.add(cuts[name].name, cuts[name].apply(finite(source, name)))
                meter.add(source.info(name).nbytes, name)
            writer.sync()
            journal.add({"unit": f"slice {number}"})
            out.keep = True
        writer.copy_side_files(source)
        writer.finish(child.config(str(source.path)))


def _card(done: Mapping[str, Any], planned: Plan) -> str:
    """The model card: parent, licence, what was cut, by what, on which text."""
    base, licence = planned.source.path.resolve().name, report.Licence.of(planned.source.path)
    lines = [
        "---",
        *([f"license: {licence.name}"] if licence.name else []),
        "tags: [pruned]",
        "---",
        "",
        f"# {base}, pruned",
        "",
    ]
    lines.append(
        f"Pruned from `{base}` by percard {done['versions']['percard']}: {planned.parameters:,} parameters became "
        f"{planned.child_parameters:,} ({done['share']:.1%})."
    )
    lines += [f"Licence of the source: {licence}."] if str(licence) else []
    lines += ["", "| size | source | child |", "|---|---:|---:|"]
    lines += [f"| {name} | {before} | {after} |" for name, (before, after) in planned.cuts.items()]
    lines += ["", f"Blocks chosen by {planned.wish.depth}, channels, heads and experts by {planned.wish.width} scores."]
    if planned.windows is not None:
        facts = planned.windows.facts
        lines.append(f"Scored on {facts['windows_used']} windows of {facts['window']} tokens of {facts['name']}.")
    if "check" in done:
        lines.append(f"Checked: {done['check']['words']}.")
    lines += ["", "To know:", "", *(f"- {words}" for words in planned.warnings)] if planned.warnings else []
    return "\n".join(lines) + "\n"
