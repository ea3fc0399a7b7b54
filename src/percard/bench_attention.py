"""`percard bench attention`: its flags, one call, one table. cli.py hangs it into the command line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from . import console


def bench_attention(
    kv: Annotated[str, typer.Option("--kv", help="Cache specs, with commas.")] = "bf16,int8,k8v4,int4",
    context: Annotated[str, typer.Option(help="Cached tokens of a sequence, with commas.")] = "8192,32768",
    batch: Annotated[str, typer.Option(help="Sequences, with commas.")] = "1,8",
    heads: Annotated[str, typer.Option(help="Hq/Hkv/D or a model's name, with commas.")] = "32/8/128",
    op: Annotated[
        str, typer.Option("--op", help="attention_decode, attention_prefill, kv_append, gather_dequantize.")
    ] = "attention_decode",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of A B A B.")] = 7,
    impl: Annotated[str | None, typer.Option(help="A body by name: triton, cpu.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Append the records to this JSONL file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one object a line.")] = False,
) -> None:
    from .bench import attention, slot_report

    for flag, words in (("--context", context), ("--batch", batch)):
        if not all(word.isdigit() and int(word) for word in words.split(",")):
            raise typer.BadParameter(f"{flag} {words}: expected whole numbers above 0 with commas")
    records = attention.run(
        op.split(","),
        kv.split(","),
        [int(word) for word in context.split(",")],
        [int(word) for word in batch.split(",")],
        attention.heads_of(heads.split(",")),
        impl=impl,
        rounds=rounds,
        out=out,
        progress=console.showing_steps(as_json),
        command=" ".join(["percard", *sys.argv[1:]]),
    )
    raise typer.Exit(console.show_records(records, as_json, lambda rows: [slot_report.of_records(rows)]))
