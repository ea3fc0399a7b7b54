"""What a distilling run leaves beside the weights: the loss curve as a picture, the model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import output, report
from .distill_match import pruning_of
from .distill_plan import Plan

NAME, PICTURE = "distill.json", "distill-loss.png"
POINTS = 2000  # of the curve in the report


def thinned(curve: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """At most POINTS of the curve, evenly, the last one among them."""
    step = -(-len(curve) // POINTS) or 1
    kept = [dict(point) for point in curve[::step]]
    if curve and kept[-1] != curve[-1]:
        kept.append(dict(curve[-1]))
    return kept


def draw(curve: Sequence[Mapping[str, Any]], path: Path) -> str:
    """The curve as PNG; "" or, without matplotlib, why there is none."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return f"no {path.name}: matplotlib is not installed (pip install 'percard[bench]')"
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    steps = [point["step"] for point in curve]
    for key, label in (
        ("divergence", "divergence from the teacher"),
        ("ce", "cross-entropy"),
        ("hidden", "hidden states"),
    ):
        values = [point[key] for point in curve]
        if any(values):
            axes.plot(steps, values, label=label, linewidth=1)
    axes.set_xlabel("step")
    axes.set_ylabel("nats per token")
    axes.set_yscale("log")
    axes.legend()
    figure.savefig(path, dpi=150)
    return ""


def recovered(quality: Mapping[str, Any]) -> dict[str, float] | None:
    """Shares of the lost KL and cross-entropy that came back; None without a loss to speak of."""
    import math

    before, after = quality["before"], quality["after"]
    lost = math.log(before["perplexity"] / before["perplexity_source"])
    if before["kl"] <= 0 or lost <= 0:
        return None
    return {
        "kl": 1 - after["kl"] / before["kl"],
        "ce": math.log(before["perplexity"] / after["perplexity"]) / lost,
    }


def write_card(folder: Path, done: Mapping[str, Any], planned: Plan) -> None:
    """The card: README.md, or percard-card.md beside one that was there and is not percard's own."""
    ours = "by percard"
    readme = folder / report.CARD_NAME
    foreign = readme.is_file() and ours not in readme.read_text(encoding="utf-8", errors="replace")
    output.write(folder / (report.SECOND_CARD_NAME if foreign else report.CARD_NAME), _card(done, planned))


def _card(done: Mapping[str, Any], planned: Plan) -> str:
    base, parent = (folder.resolve().name for folder in (planned.student.path, planned.reference))
    count = f" ({planned.parameters[1]:,} parameters)" if planned.parameters[1] else ", of which a capture was read"
    licence = report.Licence.of(planned.student.path)
    cut = pruning_of(planned.student)
    lines = [
        "---",
        *([f"license: {licence.name}"] if licence.name else []),
        "tags: [distilled]" if not cut else "tags: [pruned, distilled]",
        "---",
        "",
        f"# {base}, distilled from {parent}",
        "",
        f"`{base}` ({planned.parameters[0]:,} parameters) was trained by percard {done['versions']['percard']} towards its teacher "
        f"`{parent}`{count}.",
        *([f"Licence of the student: {licence}."] if str(licence) else []),
        *([f"Licence of the teacher: {words}."] if (words := str(report.Licence.of(planned.reference))) else []),
        "",
        *facts(done, planned),
    ]
    return "\n".join(lines) + "\n"


def facts(done: Mapping[str, Any], planned: Plan) -> list[str]:
    """How it was trained, what came of it, what to know: lines of a card."""
    wish, data, cut = planned.wish, done["data"], pruning_of(planned.student)
    terms = {
        "fkl": "forward KL",
        "rkl": "reverse KL",
        "jsd": f"generalised JSD, beta {wish.beta:g}",
        "none": "",
        "topk": "KL of the kept tokens and the rest",
    }[planned.objective.kind]
    losses = [f"{terms} at temperature {wish.temperature:g}"] if terms else []
    losses += [f"{wish.hard:g} x cross-entropy"] if wish.hard else []
    losses += [f"{wish.hidden_weight:g} x {wish.hidden} of hidden states"] if wish.hidden else []
    lines = [
        f"- loss: {' + '.join(losses)}",
        f"- tokens: {done['trained_tokens']:,} in {done['steps']:,} steps of {wish.batch} windows of {data['window']}",
        f"- data: `{data['name']}`, sha256 {str(data['sha256'])[:16]}, {data['tokens']:,} tokens, seed {wish.seed}",
        f"- AdamW, peak learning rate {wish.rate:g}, cosine to a tenth, products in {done['dtype']}",
    ]
    if cut:
        sizes = ", ".join(f"{name} {before} to {after}" for name, (before, after) in cut.get("cuts", {}).items())
        lines.append(f"- before that it was pruned: {sizes}")
    if (quality := done.get("quality")) is not None:
        lines += ["", "| against the teacher, held-out text | before | after |", "|---|---:|---:|"]
        for key, label, form in (
            ("kl", "KL, nats", "{:.4f}"),
            ("top1", "top-1", "{:.1%}"),
            ("perplexity", "perplexity", "{:.2f}"),
        ):
            lines.append(f"| {label} | {form.format(quality['before'][key])} | {form.format(quality['after'][key])} |")
        lines += ["", f"Perplexity of the teacher: {quality['after']['perplexity_source']:.2f}."]
    lines += ["", "To know:", "", *(f"- {words}" for words in done["warnings"])] if done["warnings"] else []
    return lines
