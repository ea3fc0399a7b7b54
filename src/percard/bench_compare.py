"""`percard bench compare`: its flags, one call, its tables. bench_verbs.py hangs it into the command line."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from . import console


def bench_compare(
    runs: Annotated[
        list[str], typer.Argument(metavar="BASE NEW...", help="Files, folders, or REV:PATH of a git revision.")
    ],
    fail: Annotated[str, typer.Option("--fail", help="A change up to this share is none.")] = "3%",
    group: Annotated[str, typer.Option(help="Means over a case, op, layer or model.")] = "model",
    across: Annotated[bool, typer.Option("--across", help="Print even what may not be compared; exit code 3.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one object a line.")] = False,
) -> None:
    from .bench import compare, compare_table, sources

    if len(runs) < 2:
        raise typer.BadParameter(f"{len(runs)} run given: expected a base and at least one more")
    if group not in compare.GROUPS:
        raise typer.BadParameter(f"--group {group}: expected one of {', '.join(compare.GROUPS)}")
    allowed = compare.share(fail)
    base, *others = [sources.by_file(run) for run in runs]
    with sources.reading(", ".join(runs)):
        found = [compare.compare(base, other, fail=allowed, group=group) for other in others]
    refused = any(one.apart for one in found) and not across
    if as_json:
        for label, one in zip(runs[1:], found, strict=True):
            for line in _lines(one, refused):
                console.emit_json({"run": label, "base": runs[0], **line})
    elif refused:
        _explain(runs, found)
    else:
        for part in compare_table.parts(runs, found):
            console.show(part)
    codes = [one.exit_code for one in found]
    raise typer.Exit(next(code for code in (console.REFUSED, console.GATE_RED, console.DONE) if code in codes))


def _lines(one: Any, refused: bool) -> list[dict[str, Any]]:
    from .bench import compare_table

    lines: list[dict[str, Any]] = []
    if not refused:
        lines += [{"kind": "cell", **pair.to_dict()} for pair in one.pairs]
        lines += [{"kind": "group", **console.plain_data(group)} for group in one.groups]
    words = {"missing": one.missing, "new": one.added, "apart": one.apart}
    return [*lines, {"kind": "verdict", "words": compare_table.verdict(one), "exit": one.exit_code, **words}]


def _explain(runs: list[str], found: list[Any]) -> None:
    for label, one in zip(runs[1:], found, strict=True):
        for reason in one.apart:
            console.show(f"- {reason}")
        console.show(
            f"{label}: {'not comparable with ' + runs[0] if one.apart else 'comparable'}; --across prints anyway"
        )
