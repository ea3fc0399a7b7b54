"""`percard bench distill`: its flags, one call, one table. cli.py hangs it into the command line."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from . import console
from .bench_options import AsJson, DryRun, Force, Out, Retry, command, numbers, resume, telling, words


def bench_distill(
    kinds: Annotated[
        str | None, typer.Option("--loss", help="fkl, rkl, jsd, topk, with commas; default: fkl, on a card all.")
    ] = None,
    tokens: Annotated[str | None, typer.Option(help="Tokens, with commas; default: 512, on a card 4096.")] = None,
    vocab: Annotated[int, typer.Option(min=1, help="Rows of the heads.")] = 151936,
    hidden: Annotated[int, typer.Option(min=1, help="Width of the hidden states.")] = 1024,
    dtype: Annotated[str, typer.Option(help="fp32 or bf16; default: fp32, on a card bf16.")] = "",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of A B A B.")] = 7,
    impl: Annotated[str | None, typer.Option(help="A body by name: triton, cpu.")] = None,
    out: Out = None,
    retry: Retry = None,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    from .bench import card, distill, slot_report

    asked: dict[str, Any] = {"kinds": kinds and words(kinds), "tokens": tokens and numbers("--tokens", tokens)}
    asked = {name: value for name, value in asked.items() if value}
    todo = distill.plan(**asked, vocab=vocab, hidden=hidden, dtype=dtype, device=card.default_device().type)
    how = resume(retry, force, dry_run) | {"impl": impl, "rounds": rounds}
    with telling("bench distill", as_json, dry_run) as say:
        records = distill.run(todo, out=out, progress=say, command=command(), **how)
    if not dry_run:
        raise typer.Exit(console.show_records(records, as_json, lambda rows: [slot_report.of_records(rows)]))
