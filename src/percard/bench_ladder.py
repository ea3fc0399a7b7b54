"""`percard bench ladder`: its flags, one call, a table with the cheapest passing pair first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import console
from .bench_options import AsJson, DryRun, Force, Out, Quick, Retry, UsdHour, command, resume, telling, words

if TYPE_CHECKING:
    from rich.console import RenderableType

    from .bench.ladder import Plan
    from .bench.ladder_verdicts import Verdict
    from .bench.record import Record

QUICK_QUESTIONS = 64


def bench_ladder(
    task: Annotated[Path, typer.Option(help='Questions as JSONL: {"prompt": .., "expected": .., "score": exact|..}.')],
    models: Annotated[str, typer.Option(help="Folders of 16-bit checkpoints, with commas; pruned ones too.")],
    specs: Annotated[str, typer.Option(help="Specs to make of each, with commas.")] = "bf16,w8a8,w4a16-g128",
    kv: Annotated[str, typer.Option("--kv", help="Caches of each, with commas: bf16,int8,k8v4,int4.")] = "bf16",
    task_drop: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Score that may be lost; default: 0.01 of the best 16-bit one."),
    ] = None,
    text: Annotated[Path | None, typer.Option(help="Held-out text for KL and top-1; default: the task's own.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Questions at once, when timed.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of A B A B.")] = 3,
    usd_hour: UsdHour = None,
    quick: Quick = False,
    out: Out = None,
    retry: Retry = None,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    from .bench import ladder
    from .bench.task import Task
    from .hub import source

    plan = ladder.Plan(tuple(words(specs)), tuple(words(kv)), batch, rounds, task_drop, text)
    if quick:
        plan = ladder.quick(plan)
    wanted = Task.load(task, QUICK_QUESTIONS if quick else None)
    folders = [source(name) for name in words(models)]
    if not folders or not plan.specs or not plan.kv:
        raise typer.BadParameter("--models, --specs and --kv need at least one name each")
    how = resume(retry, force, dry_run)
    with telling("bench ladder", as_json, dry_run) as say:
        rows = ladder.run(folders, wanted, plan, out=out, usd_hour=usd_hour, progress=say, command=command(), **how)
    if not dry_run:
        raise typer.Exit(console.show_records(rows, as_json, lambda found: tables(found, plan)))


def is_rung(row: Record) -> bool:
    """Whether a record is a ladder's."""
    return ".ladder." in row.case


def ladders(rows: Sequence[Record]) -> list[RenderableType]:
    """The tables of all ladders among records, each task and batch by itself; the last row of each cell counts."""
    found: dict[str, dict[str, Record]] = {}
    for row in filter(is_rung, rows):
        found.setdefault(row.case.split(".ladder.")[1], {})[row.cell_key] = row
    return [part for last in found.values() for part in tables(list(last.values()))]


def tables(rows: Sequence[Record], plan: Plan | None = None) -> list[RenderableType]:
    """The ladder of one task: score against cost, and under it why what does not pass does not."""
    from rich.table import Table

    from .bench import ladder, ladder_verdicts

    found, least = ladder_verdicts.verdicts(rows, plan or ladder.Plan())
    price = next((v.row.money for v in found if v.row.money), None)
    shape = rows[0].shape
    table = Table(
        title=f"{rows[0].case.split('.ladder.')[1]}, {rows[0].ts[:10]}", box=None, title_justify="left", pad_edge=False
    )
    for name in ("", "model", "spec", "cache"):
        table.add_column(name)
    heads = ["score %", *(["$/Mtok"] if price else []), "tok/s/card", "x 16-bit", "MB", "KL", "top-1 %", "length"]
    for name in heads:
        table.add_column(name, justify="right")
    for number, verdict in enumerate(found, 1):
        table.add_row("" if verdict.why else f"{number}", *_cells(verdict, bool(price)))
    parts: list[RenderableType] = [table]
    passing = [v for v in found if not v.why]
    if least is not None:
        parts.append(
            f"passes: gate not red and a score of at least {least:.1%}; {len(passing)} of {len(found)} pairs do"
        )
    if price:
        parts.append(
            f"$ of a million tokens, in and out together, at ${price['usd_per_card_hour']:g} a card and hour; cheapest first"
        )
    else:
        parts.append("no price was given (--usd-hour X): sorted by tokens per second per card, fastest first")
    parts.append(
        f"timed: {shape['batch']} at once, prompts of {' / '.join(map(str, dict.fromkeys(r.shape['isl'] for r in rows)))} tokens, "
        f"answers of {shape['osl']}; tok/s are output tokens over the whole time, prompts included"
    )
    parts.append(
        "in brackets: 95 % intervals; x 16-bit: against the same model in 16 bits, in the same rounds; MB: of weights"
    )
    failing = [(v.row, v.why) for v in found if v.why]
    named = [f"{row.model['id']} {row.scheme['spec']} {row.scheme['kv_spec']} cache: {why}" for row, why in failing]
    notes = [*ladder_verdicts.short_texts(rows), *ladder_verdicts.drifts(rows)]
    parts += [f"- {words}" for words in [*notes, *named]]
    return parts


def _cells(verdict: Verdict, priced: bool) -> list[str]:
    """A row of the table; what was not measured is empty."""
    row, judged = verdict.row, verdict.row.quality or {}
    asked, tokens = judged.get("task"), row.tokens or {}
    versus = (tokens.get("vs_fp16") or {}).get("same_batch")
    score = (
        ""
        if asked is None
        else f"{asked['score']:.1%} ({asked['ci95'][0]:.0%}-{asked['ci95'][1]:.0%})".replace("%", "")
    )
    cells = [row.model["id"], row.scheme["spec"], row.scheme["kv_spec"], score]
    if priced:
        cells.append("" if verdict.usd is None else f"{verdict.usd:.4g}")
    cells.append("" if verdict.tok_s is None else f"{verdict.tok_s:.1f}")
    cells.append("" if versus is None else f"{versus['ratio']:.2f} ({versus['ci95'][0]:.2f}-{versus['ci95'][1]:.2f})")
    cells.append("" if row.memory is None else f"{row.memory['weights'] / 1e6:.1f}")
    cells.append("" if judged.get("kl") is None else f"{judged['kl']:.4f}")
    cells.append("" if judged.get("top1") is None else f"{100 * judged['top1']:.1f}")
    ratio = judged.get("length_ratio")
    return [*cells, "" if ratio is None else f"{ratio:.2f}"]
