"""Quantised beside llm-compressor: `python -m percard.bench.llmcompressor --out DIR`.

    theirs    llm-compressor 0.14 from PyPI, in an environment of its own under DIR, run by llmcompressor_side.py
    ours      `percard quantize` as a command
    same      model, calibration tokens (the very ids, windows drawn by a seed), bits, modules (lm_head stays 16-bit)
    scored    both by one tool: this bench's engine reads both checkpoints; KL, top-1, perplexity on a held-out text, fp32

What theirs does, read in its source and left at its defaults:

    scales    absmax of a group / 7.5 (4 bits), in the model's dtype, no search; `observer: memoryless_mse` searches
    GPTQ      H = 2 x x^T in fp32, dead columns 1, damp 0.01 of the mean diagonal, columns by falling diagonal ("static"),
              blocks of 128, fp32; where Cholesky fails, that weight is rounded to nearest
    pass      one pass per block over the unquantised block, all its linears rounded, one pass to propagate; bf16; int8
              activations are not simulated while calibrating
    SmoothQuant   alpha .5 (their examples: .8) of max - min per channel against twice the largest weight; norms only
    AWQ       20 ratios, error of the parent module's output, no clip, v -> o skipped under GQA. It pins memory, which
              torch refuses on a machine without a card, so there it ends with an error. `--unpinned` adds rows that leave
              that one call out, which changes no number: about ten minutes a cell on two cores

Every cell (side, method, spec, seed) is a file in DIR/cells: a run that was stopped goes on, a failed cell is a row with
its error and is tried again. Cells of ours are done anew when percard's own source has changed. `--throughput` times GPTQ
on one layer of Qwen3-8B instead, sides in turn.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from ..formats.spec import FormatError, QuantSpec
from . import card, quality
from .engine import Model, load, load_config
from .llmcompressor_sides import PACKAGES, SIDE, Absent, Side, install, our_source, ours, throughput

LIMIT = 1.02  # our mean KL over theirs, per method
SPECS = ("w4a16-g128", "w4a16-g64", "w3a16-g64", "w8a8")
_GROUPED, _W8A8 = SPECS[:3], SPECS[3:]
_EXAMPLE = Path("examples/tiny-qwen3")  # of the repository; a wheel does not ship it


@dataclass(frozen=True)
class Way:
    """How one side quantises. recipe: what goes into its own kind of recipe; calibrated: reads the windows; pin: see above."""

    name: str
    recipe: tuple[Any, ...]
    calibrated: bool = True
    pin: bool = True


_RTN: tuple[str, dict[str, Any]] = ("QuantizationModifier", {})
_GPTQ: tuple[str, dict[str, Any]] = ("GPTQModifier", {})


def _observed(name: str, observer: str) -> tuple[str, dict[str, Any]]:
    return name, {"observer": observer}


THEIRS = {
    way.name: way
    for way in (
        Way("rtn", (_RTN,), calibrated=False),
        Way("rtn, mse observer", (_observed("QuantizationModifier", "memoryless_mse"),), calibrated=False),
        Way("gptq", (_GPTQ,)),
        Way("gptq, mse observer", (_observed("GPTQModifier", "memoryless_mse"),)),
        Way("gptq, imatrix observer", (_observed("GPTQModifier", "imatrix_mse"),)),
        Way("smoothquant .5 + rtn", (("SmoothQuantModifier", {"smoothing_strength": 0.5}), _RTN)),
        Way("smoothquant .8 + rtn", (("SmoothQuantModifier", {"smoothing_strength": 0.8}), _RTN)),
        Way("smoothquant .5 + gptq", (("SmoothQuantModifier", {"smoothing_strength": 0.5}), _GPTQ)),
        Way("smoothquant .8 + gptq", (("SmoothQuantModifier", {"smoothing_strength": 0.8}), _GPTQ)),
        Way("awq + rtn", (("AWQModifier", {}), _RTN)),
        Way("awq + rtn without pinning", (("AWQModifier", {}), _RTN), pin=False),
        Way("awq + gptq without pinning", (("AWQModifier", {}), _GPTQ), pin=False),
    )
}
OURS = {
    way.name: way
    for way in (
        Way("rtn", ("rtn",), calibrated=False),
        Way("gptq", ("gptq",)),
        Way("smoothquant + rtn", ("smoothquant", "rtn")),
        Way("smoothquant + gptq", ("smoothquant", "gptq")),
        Way("awq + rtn", ("awq", "rtn")),
        Way("awq + gptq", ("awq", "gptq")),
    )
}
# Method of a row, specs, ours, theirs. Theirs with another observer than the default is there to be beaten by our best
# recipe; a method is compared with the method as it is by itself.
PAIRS: tuple[tuple[str, tuple[str, ...], str, str], ...] = (
    ("RTN", SPECS, "rtn", "rtn"),
    ("RTN, searched scales", _GROUPED, "rtn", "rtn, mse observer"),
    ("GPTQ", _GROUPED, "gptq", "gptq"),
    ("GPTQ, searched scales", _GROUPED, "gptq", "gptq, mse observer"),
    ("GPTQ, searched scales", _GROUPED, "gptq", "gptq, imatrix observer"),
    ("SmoothQuant", _W8A8, "smoothquant + rtn", "smoothquant .5 + rtn"),
    ("SmoothQuant", _W8A8, "smoothquant + rtn", "smoothquant .8 + rtn"),
    ("SmoothQuant", _W8A8, "smoothquant + gptq", "smoothquant .5 + gptq"),
    ("SmoothQuant", _W8A8, "smoothquant + gptq", "smoothquant .8 + gptq"),
    ("AWQ", _GROUPED, "awq + rtn", "awq + rtn"),
    ("AWQ", _GROUPED, "awq + rtn", "awq + rtn without pinning"),
    ("AWQ + GPTQ", _GROUPED, "awq + gptq", "awq + gptq without pinning"),
)


@dataclass(frozen=True)
class Plan:
    """What is compared on what; its `digest` names the folder of the cells."""

    model: Path
    calibration: Path
    text: Path
    seeds: int
    samples: int
    seq_len: int
    specs: tuple[str, ...]
    tokens: int | None = None
    unpinned: bool = False

    def digest(self) -> str:
        """Of all that a finished cell depends on, but for our own source (see Cells)."""
        found = hashlib.sha256(repr((PACKAGES, self.samples, self.seq_len, self.tokens)).encode())
        weights = sorted(self.model.glob("*.safetensors"))
        for path in (*weights, self.model / "config.json", self.calibration, self.text):
            found.update(hashlib.sha256(path.read_bytes()).digest())
        return found.hexdigest()[:12]


def draw_windows(ids: torch.Tensor, seq_len: int, samples: int, seed: int) -> list[list[int]]:
    """`samples` windows of `seq_len` of ids [n], without overlap, drawn by a seed; ValueError when there are too few."""
    pieces = [piece.tolist() for piece in ids.split(seq_len) if len(piece) == seq_len]
    if len(pieces) < samples:
        raise ValueError(f"the calibration text has {len(pieces)} windows of {seq_len} tokens, {samples} are asked for")
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(seed))
    return [pieces[i] for i in order[:samples].tolist()]


def their_recipe(way: Way, spec: QuantSpec) -> list[list[Any]]:
    """Modifiers as llmcompressor_side.py takes them: the last one rounds and gets scheme and ignore."""
    weights: dict[str, Any] = {"num_bits": spec.weight_bits, "type": "int", "symmetric": spec.symmetric}
    weights |= {"strategy": "channel"} if spec.group is None else {"strategy": "group", "group_size": spec.group}
    scheme = {"weights": weights}
    if spec.act_bits == 8:
        scheme["input_activations"] = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token"}
        scheme["input_activations"]["dynamic"] = True
    out = [[name, dict(arguments)] for name, arguments in way.recipe]
    last = out[-1][1]
    if "observer" in last:
        weights["observer"] = last.pop("observer")
    last |= {"scheme": scheme, "ignore": ["lm_head"]}
    return out


def remembering(model: Model) -> Model:
    """The same model, which runs each window once: every cell asks it for the same ones."""
    run = model.hidden
    known: dict[tuple[int, ...], torch.Tensor] = {}

    def hidden(ids: torch.Tensor) -> torch.Tensor:
        key = tuple(ids.flatten().tolist())
        if key not in known:
            known[key] = run(ids)
        return known[key]

    object.__setattr__(model, "hidden", hidden)
    return model


class Cells:
    """Runs cells and remembers them, one JSON file each."""

    def __init__(self, plan: Plan, folder: Path, side: Side, say: Callable[[str], None], *, keep: bool = False):
        self.plan, self.side, self.say, self.keep = plan, side, say, keep
        self.folder, self.work = folder / f"cells-{plan.digest()}", folder / "work"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.work.mkdir(exist_ok=True)
        self.ids = quality.read_ids(plan.text, plan.model, plan.tokens)
        self.reference: Model | None = None
        text = quality.read_ids(plan.calibration, plan.model)
        self.windows = []
        for seed in range(plan.seeds):
            path = self.folder / f"windows-{seed}.jsonl"
            drawn = draw_windows(text, plan.seq_len, plan.samples, seed)
            path.write_text("".join(json.dumps({"ids": window}) + "\n" for window in drawn))
            self.windows.append(path)

    def get(self, side: str, way: Way, spec: str, seed: int) -> dict[str, Any]:
        """The cell's figures, or {"error": why}; done now if it was not yet, or failed, or ours has changed since."""
        seed = seed if way.calibrated else 0
        key = f"{side}-{way.name}-{spec}-{seed}".replace(" ", "").replace(",", "-").replace("+", "-")
        path = self.folder / f"{key}.json"
        source = our_source() if side == "ours" else SIDE.read_text()
        stamp = hashlib.sha256(repr((source, way)).encode()).hexdigest()[:12]
        if path.is_file():
            found = json.loads(path.read_text())
            if "error" not in found and found["stamp"] == stamp:
                return found
        self.say(f"{side}: {way.name}, {spec}, seed {seed}")
        out = self.work / key
        shutil.rmtree(out, ignore_errors=True)
        cell: dict[str, Any] = {"side": side, "way": way.name, "spec": spec, "seed": seed, "stamp": stamp}
        windows = self.windows[seed] if way.calibrated else None
        try:
            if side == "ours":
                cell["seconds"] = ours(
                    self.plan.model, out, spec, way.recipe, windows, self.plan.samples, self.plan.seq_len
                )
            else:
                recipe = their_recipe(way, QuantSpec.parse(spec))
                answer = self.side.quantize(self.plan.model, out, recipe, windows, way.pin)
                cell |= {"seconds": answer["seconds"]}
                cell["warnings"] = [w for w in answer["warnings"] if "inversion" in w or "round-to-nearest" in w]
            cell |= self.score(out, spec)
        except Exception as error:  # a row says it, and the other cells go on
            cell["error"] = (
                str(error) if isinstance(error, Absent | FormatError) else f"{type(error).__name__}: {error}"
            )
            self.say(f"    {cell['error']}")
        part = path.with_suffix(".part")
        part.write_text(json.dumps(cell, indent=1))
        part.replace(path)
        if not self.keep:
            shutil.rmtree(out, ignore_errors=True)
        return cell

    @torch.inference_mode()
    def score(self, folder: Path, spec: str) -> dict[str, Any]:
        """KL, top-1 and perplexity of a checkpoint; FormatError when it is not what was asked for."""
        if self.reference is None:
            self.reference = remembering(load(self.plan.model, dtype=torch.float32, device="cpu"))
        model = load(folder, dtype=torch.float32, device="cpu")
        if str(model.spec) != spec:
            raise FormatError(f"{folder}: holds {model.spec}, expected {spec}")
        found = quality.compare(self.reference, model, self.ids)
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        scored = {"kl": found.kl, "top1": found.top1, "perplexity": found.perplexity, "bytes": size}
        return scored | {"perplexity_reference": found.perplexity_reference, "protocol": found.protocol}


def summary(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and range over the seeds of one way, or the first error."""
    failed = next((cell["error"] for cell in cells if "error" in cell), None)
    if failed is not None:
        return {"error": failed}
    out: dict[str, Any] = {"seeds": len(cells)}
    for name in ("kl", "top1", "perplexity", "seconds"):
        out[name] = statistics.fmean(cell[name] for cell in cells)
    kls = [cell["kl"] for cell in cells]
    return out | {"kl_lo": min(kls), "kl_hi": max(kls), "warnings": sum(len(c.get("warnings", ())) for c in cells)}


def rows_of(plan: Plan, get: Callable[[str, Way, str, int], dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per pair and spec, then the best of each side per spec: {method, spec, ours, theirs, ratio, verdict}."""
    means: dict[tuple[str, str, str], dict[str, Any]] = {}

    def mean(side: str, name: str, spec: str) -> dict[str, Any]:
        if (side, name, spec) not in means:
            way = (OURS if side == "ours" else THEIRS)[name]
            cells: list[dict[str, Any]] = []
            for seed in range(plan.seeds if way.calibrated else 1):
                cells.append(get(side, way, spec, seed))
                if "error" in cells[-1]:  # what fails with one seed is not tried with the next
                    break
            means[side, name, spec] = {"way": name} | summary(cells)
        return means[side, name, spec]

    rows = []
    for method, specs, our_way, their_way in PAIRS:
        limit = None if "searched" in method else LIMIT
        for spec in (s for s in specs if s in plan.specs and (plan.unpinned or THEIRS[their_way].pin)):
            theirs, mine = mean("theirs", their_way, spec), mean("ours", our_way, spec)
            rows.append({"method": method, "spec": spec, "ours": mine, "theirs": theirs} | verdict(mine, theirs, limit))
    for spec in (s for s in _GROUPED if s in plan.specs):
        best = {}
        for side in ("ours", "theirs"):
            found = [m for (s, _, p), m in means.items() if (s, p) == (side, spec) and "kl" in m]
            best[side] = min(found, key=lambda m: m["kl"], default={"way": "", "error": "no recipe ran"})
        rows.append({"method": "best recipe", "spec": spec} | best | verdict(best["ours"], best["theirs"], 1.0))
    return rows


def verdict(mine: dict[str, Any], theirs: dict[str, Any], limit: float | None) -> dict[str, Any]:
    """{"ratio", "limit", "verdict"}: held, missed, or why there is none. limit None: nothing is promised."""
    if "error" in mine:
        return {"limit": limit, "verdict": "ours failed"}
    if "error" in theirs:
        return {"limit": limit, "verdict": "theirs does not run"}
    ratio = mine["kl"] / theirs["kl"]
    return {"ratio": ratio, "limit": limit, "verdict": "" if limit is None else "held" if ratio <= limit else "missed"}


_COLUMNS = (
    "method",
    "spec",
    "theirs",
    "KL",
    "spread",
    "ours",
    "KL",
    "spread",
    "ratio",
    "limit",
    "verdict",
    "top-1",
    "ppl",
)


def table_rows(rows: list[dict[str, Any]]) -> list[list[str]]:
    """The rows as text, in the order of `_COLUMNS`; top-1 and perplexity as theirs / ours."""
    out = []
    for row in rows:
        cells = [row["method"], row["spec"]]
        for side in (row["theirs"], row["ours"]):
            if "error" in side:
                cells += [side["way"], "none", side["error"]]
            else:
                spread = f"{side['kl_lo']:.6f} .. {side['kl_hi']:.6f}" if side["seeds"] > 1 else "data-free"
                cells += [side["way"], f"{side['kl']:.6f}", spread]
        cells += [
            f"{row['ratio']:.3f}" if "ratio" in row else "",
            f"{row['limit']:.2f}" if row["limit"] else "",
            row["verdict"],
        ]
        for name, form in (("top1", "{:.2%}"), ("perplexity", "{:.3f}")):
            both = [form.format(side[name]) if name in side else "none" for side in (row["theirs"], row["ours"])]
            cells.append(" / ".join(both))
        out.append(cells)
    return out


def markdown(found: dict[str, Any]) -> str:
    """The whole comparison as a page."""
    plan, theirs = found["plan"], found["theirs"]
    lines = [f"# {plan['model']}: percard beside llm-compressor {theirs['llmcompressor']}", ""]
    lines += [f"{plan['seeds']} calibration seeds, each {plan['samples']} windows of {plan['seq_len']} tokens of"]
    lines += [f"{plan['calibration']}, the same ids to both sides. {found['protocol']}.", f"Text: {plan['text']}."]
    lines += [
        "top-1 and perplexity: theirs / ours; perplexity of the reference",
        f"{found['perplexity_reference']:.3f}.",
        "",
    ]
    lines += ["| " + " | ".join(_COLUMNS) + " |", "|" + " --- |" * len(_COLUMNS)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table_rows(found["rows"])]
    return "\n".join(lines) + "\n"


def shown(found: dict[str, Any]) -> Table:
    """The same for a terminal, without the long columns."""
    keep = [i for i, name in enumerate(_COLUMNS) if name not in ("spread",)]
    table = Table(title=f"KL on {Path(found['plan']['text']).name}: theirs, ours")
    for i in keep:
        table.add_column(_COLUMNS[i])
    for row in table_rows(found["rows"]):
        table.add_row(*(row[i] for i in keep))
    return table


def compare(plan: Plan, folder: Path, say: Callable[[str], None], *, keep: bool = False) -> dict[str, Any]:
    """Everything of one run as a JSON value; Absent when llm-compressor cannot be had."""
    side = Side(install(folder / "llm-compressor", say))
    try:
        versions = side.version()
        cells = Cells(plan, folder, side, say, keep=keep)
        used: dict[str, dict[str, Any]] = {}

        def get(name: str, way: Way, spec: str, seed: int) -> dict[str, Any]:
            cell = cells.get(name, way, spec, seed)
            used[f"{name} {way.name} {spec} {seed}"] = cell
            return cell

        rows = rows_of(plan, get)
    finally:
        side.close()
    scored = next((cell for cell in used.values() if "kl" in cell), {"protocol": "", "perplexity_reference": 0.0})
    said: dict[str, Any] = {name: getattr(plan, name).name for name in ("model", "calibration", "text")}
    said |= {name: getattr(plan, name) for name in ("seeds", "samples", "seq_len", "specs")}
    found: dict[str, Any] = {**card.fingerprint(torch.device("cpu"))}
    found |= {"theirs": versions, "plan": said | {"digest": plan.digest()}}
    found |= {"protocol": scored["protocol"], "perplexity_reference": scored["perplexity_reference"], "rows": rows}
    return found | {"cells": list(used.values())}


def save(found: dict[str, Any], path: Path, page: str | None) -> None:
    """JSON at `path` and the page beside it, each whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for where, text in ((path, json.dumps(found, indent=1) + "\n"), (path.with_suffix(".md"), page)):
        if text is not None:
            where.with_name(where.name + ".part").write_text(text)
            where.with_name(where.name + ".part").replace(where)


def main(
    out: Annotated[Path, typer.Option(help="Folder for the environment, the cells and the results.")],
    model: Annotated[Path, typer.Option(help="Checkpoint folder with its tokenizer.")] = _EXAMPLE,
    calibration: Annotated[Path, typer.Option(help="Text that windows are drawn from.")] = _EXAMPLE / "calibration.txt",
    text: Annotated[Path, typer.Option(help="Held-out text for the scores.")] = _EXAMPLE / "heldout.txt",
    seeds: Annotated[int, typer.Option(min=1, help="Calibration sets.")] = 3,
    samples: Annotated[int, typer.Option(min=1, help="Windows of a calibration set.")] = 64,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 512,
    schemes: Annotated[str, typer.Option(help="Specs, with commas.")] = ",".join(SPECS),
    tokens: Annotated[int | None, typer.Option(min=2, help="Score only the first so many tokens of the text.")] = None,
    record: Annotated[Path | None, typer.Option(help="Write the result here too.")] = None,
    keep: Annotated[bool, typer.Option(help="Keep the checkpoints of new cells in DIR/work.")] = False,
    speed: Annotated[bool, typer.Option("--throughput", help="Time GPTQ on a layer of Qwen3-8B instead.")] = False,
    unpinned: Annotated[
        bool, typer.Option("--unpinned", help="Also their AWQ with its pinning of memory left out.")
    ] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of A B A B with --throughput.")] = 2,
) -> None:
    """Quantises one model with llm-compressor and with percard and scores both with one tool."""
    console = Console()
    unknown = [name for name in schemes.split(",") if name not in SPECS]
    if unknown:
        raise typer.BadParameter(f"{unknown[0]!r} is not compared; known: {', '.join(SPECS)}", param_hint="--schemes")
    out.mkdir(parents=True, exist_ok=True)
    try:
        if speed:
            found = throughput(out, rounds=rounds, say=console.log)
            path, page = out / "llmcompressor-throughput.json", None
        else:
            load_config(model)
            plan = Plan(model, calibration, text, seeds, samples, seq_len, tuple(schemes.split(",")), tokens, unpinned)
            found = compare(plan, out, console.log, keep=keep)
            path, page = out / "llmcompressor.json", markdown(found)
    except (Absent, FormatError, ValueError) as error:
        console.print(f"percard: {error}", style="red", markup=False)
        raise typer.Exit(1) from None
    for where in [path, record] if record is not None else [path]:
        save(found, where, page)
    if speed:
        for line in found["lines"]:
            console.print(line)
    else:
        console.print(shown(found))
    console.print(f"written: {path}" + ("" if page is None else f" and {path.with_suffix('.md').name}"))


if __name__ == "__main__":
    typer.run(main)
