"""`percard capture`: its flags, the engine's samples passed down to the workshop, what was written in a few lines."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import bench_options as options
from . import console

if TYPE_CHECKING:
    from .quant.completions import CompletionPlan, Generate


def capture(
    teacher: Annotated[str, typer.Argument(metavar="TEACHER", help="Folder of a 16-bit checkpoint, or a hub id.")],
    out: Annotated[Path | None, typer.Option("--out", help="Folder to write; must not exist.")] = None,
    data: Annotated[str | None, typer.Option(help="Text that the teacher reads: .jsonl, a text file, hf:NAME.")] = None,
    generate: Annotated[Path | None, typer.Option(help="Instead: prompts (.jsonl) that the teacher completes.")] = None,
    top_k: Annotated[
        int | None,
        typer.Option("--top-k", help="Tokens kept of each position: 64, or with --generate none unless it is given."),
    ] = None,
    seq_len: Annotated[
        int | None, typer.Option("--seq-len", min=2, help="Tokens of a window: 2048, or the teacher's positions.")
    ] = None,
    shard_tokens: Annotated[int, typer.Option("--shard-tokens", min=1, help="Tokens of a file.")] = 1_000_000,
    n: Annotated[int, typer.Option("--n", min=1, help="Samples of each prompt.")] = 4,
    keep: Annotated[
        str | None,
        typer.Option(help="Completions to keep: a regular expression, or cmd:COMMAND that reads one and exits with 0."),
    ] = None,
    keep_timeout: Annotated[float, typer.Option("--keep-timeout", help="Seconds that the command may take.")] = 10.0,
    max_new: Annotated[int, typer.Option("--max-new", min=1, help="Tokens of a completion at most.")] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of sampling; log-probabilities are always at 1.")] = 1.0,
    top_p: Annotated[
        float, typer.Option("--top-p", min=0.0, max=1.0, help="Draw from this share of probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same completions.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh/--resume", help="Start over, or go on with what a killed run left.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say how many tokens and bytes; stop.")] = False,
    as_json: options.AsJson = False,
) -> None:
    from .hub import source

    if (data is None) == (generate is None):
        raise typer.BadParameter("give --data with a text, or --generate with prompts; one of them")
    if out is None and not dry_run:
        raise typer.BadParameter("--out is missing; name the folder to write")
    if generate is not None and seq_len is not None:
        raise typer.BadParameter("--seq-len is for --data; a completion is a window of its own, --max-new limits it")
    if data is not None and keep is not None:
        raise typer.BadParameter("--keep is for --generate; there is nothing to choose from in a text")
    folder = source(teacher)
    try:
        if generate is not None:
            sampling = {"max_new": max_new, "temperature": temperature, "top_p": top_p}
            wish = {"n": n, "seed": seed, "top_k": top_k, "shard_tokens": shard_tokens, **sampling}
            done = _completed(
                folder, generate, wish, (keep, keep_timeout), None if dry_run else out, force, fresh, as_json
            )
        else:
            assert data is not None
            wish = {"top_k": top_k, "seq_len": seq_len, "shard_tokens": shard_tokens}
            wish = {name: value for name, value in wish.items() if value is not None}
            done = _captured(folder, data, wish, None if dry_run else out, force, fresh, as_json)
    except KeyboardInterrupt as error:  # the parser would forget what it says about finished parts
        sys.exit(console.fail(error, "percard capture", as_json))
    if as_json:
        console.emit_json(done)
    else:
        for line in words(done, None if dry_run else out):
            console.show(line)


def _captured(
    folder: Path, data: str, wish: Mapping[str, Any], out: Path | None, force: bool, fresh: bool, as_json: bool
) -> dict[str, Any]:
    from .quant import capture as capturing

    planned = capturing.plan(folder, data, **wish)
    if out is None:
        return planned.to_dict()
    with console.showing_progress(as_json) as progress:
        return capturing.run(planned, out, force=force, fresh=fresh, progress=progress)


def _completed(
    folder: Path,
    prompts: Path,
    wish: Mapping[str, Any],
    keep: tuple[str | None, float],
    out: Path | None,
    force: bool,
    fresh: bool,
    as_json: bool,
) -> dict[str, Any]:
    from .quant import completions
    from .quant.keep import Keep

    planned = completions.plan(folder, prompts, keep=Keep.parse(*keep), **wish)
    if out is None:
        return planned.to_dict()
    with console.showing_progress(as_json) as progress:
        return completions.run(
            planned, lambda: speaker(folder, planned), out, force=force, fresh=fresh, progress=progress
        )


def speaker(folder: Path, planned: CompletionPlan) -> Generate:
    """The engine over the checkpoint in `folder`, as the workshop asks for samples."""
    from .bench import engine
    from .bench.vocabulary import Vocabulary
    from .quant.completions import Answer, Prompt

    longest = max(len(prompt.ids) + planned.room(prompt) for prompt in planned.prompts)
    model, vocabulary = engine.load(folder, max_len=longest), Vocabulary(folder)
    stops = list(dict.fromkeys([*model.config.eos, *vocabulary.stops]))
    temperature, top_p = planned.sampling["temperature"], planned.sampling["top_p"]

    def generate(ids: list[int], n: int, seed: int) -> list[Answer]:
        room = planned.room(Prompt(ids, ""))
        answers = model.generate(
            [ids] * n, room, temperature=temperature, top_p=top_p, seed=seed, stop=stops, keep_stop=True
        )
        made = []
        for new in answers:  # the student has to learn the id that ended it, which may be any of several
            ended = bool(new) and new[-1] in stops
            made.append(Answer(new, vocabulary.continuation(ids, new[:-1] if ended else new), ended))
        return made

    return generate


def words(done: Mapping[str, Any], out: Path | None) -> list[str]:
    """What was written, or would be, for people."""
    size, k = done["tokens"] * _bytes_per_token(done["k"]), done["k"]
    kept = f"the {k} likeliest of {done['vocab']:,} tokens and the rest" if k else "no log-probabilities"
    most = "at most " if out is None and "completions" in done else ""
    lines = [f"{out or 'dry run'}: {most}{done['tokens']:,} tokens, {kept}, {most}{console.amount(size, 'bytes')}"]
    if isinstance(made := done.get("completions"), Mapping):
        gone = [
            f"{made[name]} {name.replace('_', ' ')}"
            for name in ("dropped", "timed_out", "empty", "no_tokens")
            if made[name]
        ]
        lines.append(f"{made['kept']} of {made['prompts'] * made['n']} completions kept ({', '.join(gone) or 'all'})")
        if made["unended"]:
            lines.append(f"note: {made['unended']} of those kept did not end within their tokens; raise --max-new")
    elif made is not None:
        lines.append(f"{made:,} completions of {done['prompts']:,} prompts")
    if "work_bytes" in done:
        lines.append(
            f"{done['windows']:,} windows of {done['window']} tokens in {done['shards']} files; "
            f"activations take up to {console.amount(done['work_bytes'], 'bytes')} on the disk meanwhile"
        )
    left = done["data"].get("left_over")
    return [*lines, *([f"note: {left} tokens at the end fill no window and are left out"] if left else [])]


def _bytes_per_token(k: int) -> int:
    from .quant.capture_cache import row_bytes

    return row_bytes(k)
