"""`percard bench layer`: its flags, one call, a table, and the check against a model's step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import console
from .bench_options import AsJson, DryRun, Force, Out, Quick, Retry, command, numbers, resume, telling, words

if TYPE_CHECKING:
    from rich.console import RenderableType

    from .bench.record import Record


def bench_layer(
    source: Annotated[str, typer.Argument(metavar="NAME", help="A built-in shape: qwen3-0.6b and its kin.")],
    specs: Annotated[str, typer.Option(help="Specs, with commas.")] = "w8a8,w4a16-g128,w4a8-g128",
    kv: Annotated[str, typer.Option("--kv", help="Caches of decode, with commas: bf16,int8,k8v4,int4.")] = "bf16",
    prompt: Annotated[str, typer.Option(help="Tokens of a prompt, with commas.")] = "512",
    depth: Annotated[str, typer.Option(help="Tokens in the cache before a step, with commas.")] = "512",
    batch: Annotated[str, typer.Option(help="Sequences, with commas.")] = "1",
    shard: Annotated[str | None, typer.Option(help="One rank's part: TP:RANK, such as 4:0.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of A B A B.")] = 5,
    impl: Annotated[str | None, typer.Option(help="A body by name: triton, cpu.")] = None,
    model_records: Annotated[
        Path | None, typer.Option(help="Records of bench model: do layers and head add up to its steps?")
    ] = None,
    out: Out = None,
    retry: Retry = None,
    force: Force = False,
    quick: Quick = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    from . import compose
    from .bench import layer, layer_check

    plan = layer.Plan(
        prompts=tuple(numbers("--prompt", prompt)),
        depths=tuple(numbers("--depth", depth)),
        batches=tuple(numbers("--batch", batch)),
        kv=tuple(words(kv)),
        rounds=rounds,
        shard=shard,
    )
    if quick:
        plan = layer.Plan((64,), (64,), (1,), plan.kv, 3, copies=2, shard=shard)
    models = [] if model_records is None else compose.read_records(model_records)
    with telling("bench layer", as_json, dry_run) as say:
        records = layer.run(
            source, words(specs), plan=plan, impl=impl, out=out, progress=say, command=command(),
            **resume(retry, force, dry_run),
        )  # fmt: skip
    found = layer_check.sums(records, models)
    if dry_run:
        return
    code = console.show_records(records, as_json, show)
    for line in layer_check.lines(found):
        console.emit_json({"check": line}) if as_json else console.show(line)
    if model_records is not None and not found:
        console.show(f"{model_records}: no timed record of {source}; nothing to add up to")
    failed = any(record.status in ("failed", "oom") for record in records)
    raise typer.Exit(code or (console.ERROR if failed else console.DONE))


def show(records: Sequence[Record]) -> Iterator[RenderableType]:
    """The times of a layer, a row for each side."""
    from rich.table import Table

    timed = [record for record in records if record.latency_us]
    if timed:
        about = timed[0].model
        shard = f", rank {about['shard']}" if about.get("shard") else ""
        table = Table(title=f"{about['id']}: one layer{shard}, times per layer", title_justify="left", pad_edge=False)
        for name in ("case", "spec", "cache", "median us", "spread us", "x baseline (95 %)", "GB/s", "baseline"):
            table.add_column(name, justify="right" if "us" in name or name in ("GB/s", "x baseline (95 %)") else "left")
        for record in timed:
            table.add_row(*_cells(record))
        yield table
    for record in records:
        if record.error:
            yield f"{record.case}: {record.status}: {record.error.get('message', '')}"
    if timed:
        yield "- random weights at true shapes: quality not measured; copies of the layer stand in turn, memory is cold"
        yield from (f"- {words}" for words in timed[-1].clock.get("noisy") or ())


def _cells(record: Record) -> list[str]:
    times: dict[str, Any] = record.latency_us or {}
    base = record.against[0] if record.against else None
    gain = f"{base['ratio']:.2f} ({base['ci95'][0]:.2f}-{base['ci95'][1]:.2f})" if base else "1"
    moved = (record.roofline or {}).get("bytes")
    rate = f"{moved / times['median'] / 1e3:.1f}" if moved and ".pp" not in record.case else ""
    cache = record.scheme.get("kv_spec", "") if ".tg." in record.case else ""
    spec = f"{record.scheme['spec']}{' head' if '.head.' in record.case else ''}"
    return [
        record.case.removeprefix(f"{record.model['id']}."),
        spec, str(cache), f"{times['median']:.0f}", f"{times['lo']:.0f}-{times['hi']:.0f}", gain, rate,
        str(record.body.get("baseline_dtype")),
    ]  # fmt: skip
