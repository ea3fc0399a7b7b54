"""`percard bench card`: its flags, one call, one row."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from . import console


def bench_card(
    out: Annotated[Path | None, typer.Option("--out", help="Card table to write the row into; others stay.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: the card when there is one.")] = None,
    id: Annotated[str | None, typer.Option("--id", help="Name of the row for percard plan --card.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One shape a product, half the time.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the row as JSON.")] = False,
) -> None:
    import torch

    from .bench import card, card_row

    if device not in (None, "cpu", "cuda"):
        raise typer.BadParameter(f"--device {device}: expected cpu or cuda")
    if device == "cuda" and card.default_device().type != "cuda":
        raise typer.BadParameter("--device cuda: torch sees no CUDA card; try --device cpu")
    row = card_row.measure(
        torch.device(device) if device else None,
        id=id,
        quick=quick,
        say=console.showing_steps(as_json),
        command=" ".join(["percard", *sys.argv[1:]]),
    )
    if out is not None:
        card_row.write(out, row)
    if as_json:
        console.emit_json(row)
        return
    for line in card_row.lines(row):
        console.show(line)
    if out is not None:
        console.show(f"{out}: percard plan MODEL --card-file {out} --card {row['id']}")
