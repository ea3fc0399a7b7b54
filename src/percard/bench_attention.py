"""`percard bench attention`: its flags, one call, one table. cli.py hangs it into the command line."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from . import console
from .bench_options import (
    AsJson,
    DryRun,
    Force,
    Full,
    Out,
    Quick,
    Retry,
    command,
    numbers,
    one_of,
    resume,
    telling,
    words,
)


def bench_attention(
    kv: Annotated[
        str | None, typer.Option("--kv", help="Cache specs, with commas; default: bf16,int8,k8v4,int4.")
    ] = None,
    context: Annotated[
        str | None, typer.Option(help="Cached tokens of a sequence, with commas; default: 8192,32768.")
    ] = None,
    batch: Annotated[str | None, typer.Option(help="Sequences, with commas; default: 1,8.")] = None,
    heads: Annotated[
        str | None, typer.Option(help="Hq/Hkv/D or a model's name, with commas; default: 32/8/128.")
    ] = None,
    op: Annotated[
        str | None,
        typer.Option("--op", help="attention_decode (default), attention_prefill, kv_append, gather_dequantize."),
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds of A B A B; default: 7.")] = None,
    impl: Annotated[str | None, typer.Option(help="A body by name: triton, cpu.")] = None,
    quick: Quick = False,
    full: Full = False,
    out: Out = None,
    retry: Retry = None,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    from .bench import attention, card, slot_report

    asked: dict[str, Any] = {"names": op and words(op), "specs": kv and words(kv)}
    asked["contexts"] = context and numbers("--context", context)
    asked["batches"] = batch and numbers("--batch", batch)
    asked["heads"] = heads and attention.heads_of(words(heads))
    size = one_of(quick, full)
    chosen = attention.choice(size, card.default_device().type) | {n: value for n, value in asked.items() if value}
    how = resume(retry, force, dry_run) | {"impl": impl, "rounds": rounds or (3 if size == "quick" else 7)}
    with telling("bench attention", as_json, dry_run) as say:
        records = attention.run(attention.plan(**chosen), out=out, progress=say, command=command(), **how)
    if not dry_run:
        raise typer.Exit(console.show_records(records, as_json, lambda rows: [slot_report.of_records(rows)]))
