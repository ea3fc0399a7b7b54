"""Options that measuring verbs share: where records go, what is measured again, how much, at which price."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from . import console

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, one object a line.")]
Out = Annotated[
    Path | None, typer.Option("--out", help="Append records to this JSONL file; cells that it holds are skipped.")
]
Retry = Annotated[str | None, typer.Option("--retry", help="`failed`: measure failed cells of --out again.")]
Force = Annotated[bool, typer.Option("--force", help="Measure all cells, whatever --out holds.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the cells and the seconds they should take; stop.")]
Quick = Annotated[bool, typer.Option("--quick", help="A small choice: under two minutes.")]
Full = Annotated[bool, typer.Option("--full", help="Everything that is known; may take hours, --out goes on.")]
UsdHour = Annotated[
    float | None, typer.Option("--usd-hour", min=0.0, help="Price of a card for an hour; adds cost per million tokens.")
]


def words(text: str) -> list[str]:
    """What stands between commas."""
    return [word for word in text.split(",") if word]


def numbers(flag: str, text: str) -> list[int]:
    """Whole numbers above 0 between commas; BadParameter names the flag."""
    found = words(text)
    if not found or not all(word.isdigit() and int(word) for word in found):
        raise typer.BadParameter(f"{flag} {text}: expected whole numbers above 0 with commas")
    return [int(word) for word in found]


def one_of(quick: bool, full: bool) -> str | None:
    """ "quick", "full" or None; BadParameter for both."""
    if quick and full:
        raise typer.BadParameter("--quick and --full say opposite things; keep one")
    return "quick" if quick else "full" if full else None


def resume(retry: str | None, force: bool, dry_run: bool) -> dict[str, Any]:
    """These three as cells.run takes them."""
    if retry not in (None, "failed"):
        raise typer.BadParameter(f"--retry {retry}: the one choice is failed")
    return {"retry": retry is not None, "force": force, "dry_run": dry_run}


def command() -> str:
    """The command line, for the records."""
    return " ".join(["percard", *sys.argv[1:]])


@contextmanager
def telling(verb: str, as_json: bool, dry_run: bool = False) -> Iterator[Callable[[str], None]]:
    """Progress of `percard <verb>` in words: on stderr, or on stdout when it is the result (dry_run).

    An interrupt ends the process here, since the parser would forget what it says about the cells that are kept.
    """
    if not dry_run:
        say = console.showing_steps(as_json)
    else:
        say = (lambda text: print(json.dumps({"cell": text}), flush=True)) if as_json else print  # type: ignore[assignment]
    try:
        yield say
    except KeyboardInterrupt as error:
        sys.exit(console.fail(error, f"percard {verb}", as_json))
