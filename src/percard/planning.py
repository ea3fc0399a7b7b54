"""`percard plan`: its flags, one call, tables. The figures are made in bench/plan.py and bench/plan_rows.py."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import console
from .bench_options import AsJson, words

if TYPE_CHECKING:
    from rich.console import RenderableType

    from .bench.card_table import Card
    from .bench.plan_parts import Shape
    from .bench.plan_rows import Demand, Row, Stored

_SECONDS = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(us|ms|s)")
_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


@dataclass(frozen=True)
class Plan:
    """Rows of a model over cards, and what they were asked with."""

    shape: Shape
    demand: Demand
    rows: list[Row]
    every_card: bool
    explain: bool
    disk: Stored | None

    @property
    def exit_code(self) -> int:
        return console.DONE if self.best(self.rows) else console.REFUSED

    @staticmethod
    def best(rows: Sequence[Row]) -> Row | None:
        """The row that serves with the most tokens per second and card."""
        serving = [row for row in rows if row.status == "serves"]
        return max(serving, key=lambda row: row.tok_s_card or 0.0) if serving else None

    def to_dicts(self) -> list[dict[str, Any]]:
        return [as_data(row, self.shape, self.demand, self.disk) for row in self.rows]

    def show(self) -> Iterator[RenderableType]:
        yield _title(self)
        best = self.best(self.rows)
        shown = list(_best_of_each(self.rows)) if self.every_card else [r for r in self.rows if r.split and r.step]
        if shown:
            yield _table(shown, self.every_card, None if self.every_card else best)
        yield from _reasons([r for r in self.rows if not self.every_card or not _any_shown(r, shown)], self.every_card)
        if best is not None and not self.every_card:
            yield _sentence(best, self.demand)
            yield _weights(best, self.shape, self.demand)
        yield _reading(self)
        if self.explain:
            for row in shown:
                yield from _explained(row, self.shape)


def verb(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="A folder, a config.json, or a name such as qwen3-235b-a22b."),
    ] = None,
    card: Annotated[str, typer.Option("--card", help="Id of a card, such as h20-96, or all.")] = "",
    cards: Annotated[int | None, typer.Option("--cards", help="How many; default: the fewest that serve.")] = None,
    spec: Annotated[str, typer.Option(help="Specs with commas, or auto.")] = "auto",
    kv: Annotated[str, typer.Option("--kv", help="Caches with commas: bf16,int8,k8v4,int4.")] = "bf16",
    ctx: Annotated[str, typer.Option("--ctx", help="Tokens that each user may hold: 8192, 8k.")] = "8192",
    users: Annotated[int, typer.Option("--users", help="Sequences at once.")] = 32,
    tpot: Annotated[str | None, typer.Option(help="Bound on the time of an output token, such as 50ms.")] = None,
    ttft: Annotated[str | None, typer.Option(help="Bound on the time to the first token, such as 2s.")] = None,
    usd_hour: Annotated[float | None, typer.Option("--usd-hour", help="Price of one card and hour in dollars.")] = None,
    util: Annotated[float, typer.Option("--util", help="Share of a card's memory that may be used.")] = 0.90,
    overhead_gb: Annotated[float, typer.Option("--overhead-gb", help="GB a card kept for the stack.")] = 2.0,
    mtp: Annotated[bool, typer.Option("--mtp/--no-mtp", help="Count layers that predict further tokens.")] = True,
    explain: Annotated[bool, typer.Option("--explain", help="Every figure with its formula and source.")] = False,
    card_file: Annotated[
        list[Path] | None, typer.Option("--card-file", help="JSON file with more cards; may be given again.")
    ] = None,
    efficiency: Annotated[
        list[Path] | None, typer.Option("--efficiency", help="File that plan --check --fit wrote; may be given again.")
    ] = None,
    check: Annotated[
        list[Path] | None, typer.Option("--check", help="Records to hold predictions against; instead of MODEL.")
    ] = None,
    fit: Annotated[Path | None, typer.Option("--fit", help="With --check: file that gets the shares they say.")] = None,
    table: Annotated[Path | None, typer.Option("--table", help="With --check: the rows as markdown.")] = None,
    as_json: AsJson = False,
) -> None:
    if check:
        if model is not None:
            raise typer.BadParameter(f"MODEL {model} beside --check; records name their models")
        from . import planning_check

        code = planning_check.run(
            check,
            card=card,
            card_files=card_file or (),
            efficiency_files=efficiency or (),
            fit=fit,
            table=table,
            as_json=as_json,
        )
        raise typer.Exit(code)
    if fit is not None or table is not None:
        raise typer.BadParameter("--fit and --table go with --check RECORDS")
    if model is None:
        raise typer.BadParameter("MODEL is missing; give a folder, a config.json or a name such as qwen3-8b")
    if not card:
        raise typer.BadParameter("--card is missing; give an id such as h20-96, or all")
    made = make(
        model,
        card,
        cards=cards,
        spec=spec,
        kv=kv,
        demand={
            "users": users,
            "ctx": _tokens(ctx),
            "tpot_s": _seconds("--tpot", tpot),
            "ttft_s": _seconds("--ttft", ttft),
            "util": util,
            "overhead_gb": overhead_gb,
            "mtp": mtp,
            "usd_hour": usd_hour,
        },
        explain=explain,
        card_files=card_file or (),
        efficiency_files=efficiency or (),
    )
    if as_json:
        for row in made.to_dicts():
            console.emit_json(row)
    else:
        for part in made.show():
            console.show(part)
    raise typer.Exit(made.exit_code)


def make(
    model: str,
    card: str,
    *,
    cards: int | None = None,
    spec: str = "auto",
    kv: str = "bf16",
    demand: Mapping[str, Any] | None = None,
    explain: bool = False,
    card_files: Sequence[Path] = (),
    efficiency_files: Sequence[Path] = (),
) -> Plan:
    """The plan of a model on a card, or on all; flags as the verb has them."""
    from .bench import card_table, efficiency, plan_parts, plan_rows

    def find(card_id: str, of: str, bucket: int | None = None) -> efficiency.Efficiency:
        return efficiency.find(card_id, of, bucket, files=efficiency_files)

    known = card_table.cards(card_files)
    wanted: list[Card] = list(known.values()) if card == "all" else [card_table.find(card, known)]
    shape = plan_parts.load_shape(model)
    disk = plan_rows.stored(model, shape)
    asked = plan_rows.Demand(**(demand or {}))
    specs = words(spec)
    if spec == "auto":
        specs = [plan_rows.STORED] if disk is not None else []
        specs += [name for name in plan_rows.AUTO if disk is None or name != str(disk.spec or "bf16")]
    if not specs or not words(kv):
        from .formats.spec import FormatError

        raise FormatError("--spec or --kv names nothing; give words with commas, such as --spec w8a8 --kv bf16,int8")
    rows: list[Row] = []
    for each in wanted:
        rows += plan_rows.plan(shape, each, asked, cards=cards, specs=specs, kvs=words(kv), disk=disk, find=find)
    return Plan(shape, asked, rows, card == "all", explain, disk)


def as_data(row: Row, shape: Shape, demand: Demand, disk: Stored | None = None) -> dict[str, Any]:
    """A row for --json. Predicted figures have two significant digits, bytes are exact."""
    from .bench.plan_parts import kv_bytes_per_token
    from .bench.plan_rows import two
    from .formats.kvcache import KVSpec

    def short(value: float | None) -> float | None:
        return None if value is None else two(value)

    found: dict[str, Any] = {
        "model": row.model,
        "params": shape.params,
        "mtp_params": shape.mtp_params,
        "active_params": round(shape.active),
        "card": row.card.id,
        "spec": row.spec,
        "kv": row.kv,
        "status": row.status,
        "why": row.why or None,
        "demand": demand,
        "memory_basis": row.card.memory_basis,
        "notes": row.notes,
    }
    if row.split is None or row.memory is None:
        return found
    found |= {
        "cards": row.split.cards,
        "split": str(row.split),
        "weights_bytes": round(row.memory.weights),
        "usable_bytes": round(row.memory.usable),
        "kv_bytes_per_token": kv_bytes_per_token(shape, KVSpec.parse(row.kv)),
        "kv_bytes_per_token_with_copies": round(row.memory.per_token),
        "kv_tokens": row.memory.tokens,
        "tokens_per_user": row.tokens_user,
        "parts_bytes": dict(parts(row, shape, demand)) if disk is None or "stored" not in row.spec else None,
    }
    if row.step is None or row.prefill is None:
        return found
    return found | {
        "tok_s_per_card": short(row.tok_s_card),
        "tok_s_per_user": short(row.tok_s_user),
        "tpot_ms": short(row.step.seconds * 1e3),
        "ttft_s": short(row.prefill.seconds),
        "decode_ms": {k: short(getattr(row.step, k) * 1e3) for k in ("mem", "flop", "comm")},
        "prefill_ms": {k: short(getattr(row.prefill, k) * 1e3) for k in ("mem", "flop", "comm")},
        "bound": {"decode": row.step.bound, "prefill": row.prefill.bound},
        "usd_per_mtok": None if row.usd_hour is None else {"in": short(row.usd_in), "out": short(row.usd_out)},
        "compute_bound_from_rows": short(row.rows_from),
        "break_even_rows": short(row.break_even),
        "break_even_users": short(row.users_even),
        "basis": row.basis,
        "band": row.band,
        "decode": {"basis": row.step.basis, "band": row.step.band, "sources": dict(row.step.sources)},
        "prefill": {"basis": row.prefill.basis, "band": row.prefill.band, "sources": dict(row.prefill.sources)},
        "card_source": row.card.source,
    }


def parts(row: Row, shape: Shape, demand: Demand) -> Iterator[tuple[str, int]]:
    """(part, bytes over all cards) of the weights of a row."""
    from .bench.plan_rows import spec_of

    spec = spec_of(row.spec)
    for part in shape.parts:
        if part.name != "mtp" or demand.mtp:
            times = row.split.cards if row.split and row.split.attention_dp and part.name == "attention" else 1
            yield part.name, round(part.nbytes(spec) * times)


def _title(plan: Plan) -> str:
    shape = plan.shape
    words_ = f"{shape.name}: {shape.params / 1e9:.2f} B parameters, {shape.active / 1e9:.2f} B active a token"
    if shape.mtp_params:
        words_ += (
            f", {shape.mtp_params / 1e9:.2f} B more in MTP layers ({'counted' if plan.demand.mtp else 'left out'})"
        )
    return f"{words_}; {plan.demand.users} users x {plan.demand.ctx} tokens"


def _table(rows: Sequence[Row], every_card: bool, best: Row | None) -> RenderableType:
    from rich.table import Table

    from .bench.plan_rows import two

    priced = any(row.usd_hour is not None for row in rows)
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0) if every_card else (0, 2, 0, 0))
    for name in [*(["card"] if every_card else []), "spec", "cache", "split"]:
        table.add_column(name, no_wrap=True, overflow="fold")
    numbers = ["weights\nGB", "cache\ntokens", "tok/s\n/card", "tok/s\n/user", "TTFT\ns"]
    numbers += ([] if every_card else ["gains to\nbatch"]) + (["$/Mtok\nout"] if priced else [])
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("bound by", "basis, band %"):
        table.add_column(name, no_wrap=True)
    for row in rows:
        if row.memory is None or row.step is None or row.prefill is None or row.band is None:
            continue
        mark = "*" if row is best else "" if row.status == "serves" else "!"
        cells = [row.card.id] if every_card else []
        cells += [row.spec + mark, row.kv, str(row.split), _gb(row.memory.weights), f"{row.memory.tokens:,}"]
        cells += [f"{two(row.tok_s_card or 0):g}", f"{two(row.tok_s_user or 0):g}"]
        cells += [
            f"{two(row.prefill.seconds):g}",
            *([] if every_card else [_gains(row)]),
            *([f"{two(row.usd_out or 0):g}"] if priced else []),
        ]
        cells += [row.step.bound, f"{row.basis} {100 * row.band[0]:+.0f} {100 * row.band[1]:+.0f}"]
        table.add_row(*cells)
    return table


def _gb(count: float) -> str:
    return f"{count / 1e9:.1f}" if count >= 1e10 else f"{count / 1e9:.3g}"


def _gains(row: Row) -> str:
    """The batch from which a spec's linears gain nothing over bf16; experts each get a share of it."""
    from .bench.plan_rows import two

    if row.spec.startswith("bf16"):
        return ""
    even = row.users_even or row.break_even
    return f"{two(even):g}" if even else "any"


def _best_of_each(rows: Sequence[Row]) -> Iterator[Row]:
    """Of every card the best row that serves, the fewest cards first."""
    found = []
    for card in dict.fromkeys(row.card.id for row in rows):
        best = Plan.best([row for row in rows if row.card.id == card])
        found += [best] if best is not None else []
    yield from sorted(found, key=lambda row: (row.split.cards if row.split else 0, -(row.tok_s_card or 0)))


def _reasons(rows: Sequence[Row], every_card: bool) -> Iterator[str]:
    """Why rows do not serve, and what is to be known of those that do; rows with the same words share a line."""
    told: dict[str, list[str]] = {}
    for row in rows:
        who = f"{row.card.id}, {row.spec}" if every_card else row.spec
        for words_ in ([f"{row.status}: {row.why}"] if row.why else []) + ([] if every_card else list(row.notes)):
            told.setdefault(words_, []).append(f"{who} over {row.kv}")
    for words_, whose in told.items():
        yield f"{', '.join(whose)}: {words_}"


def _any_shown(row: Row, shown: Sequence[Row]) -> bool:
    return any(other.card.id == row.card.id for other in shown)


def _sentence(row: Row, demand: Demand) -> str:
    """Precision, memory basis, demand and cache in one sentence, so that nobody repeats a bare number of cards."""
    count = row.split.cards if row.split else 0
    return (
        f"best: {count} x {row.card.id} for {row.model} in {row.spec} over a cache of {row.kv}, {demand.users} users x "
        f"{demand.ctx} tokens ({row.tokens_user:,} a user fit), {demand.util:.0%} of {row.card.memory_basis} less "
        f"{demand.overhead_gb:g} GB a card"
    )


def _weights(row: Row, shape: Shape, demand: Demand) -> str:
    if "stored" in row.spec:
        return f"weights: {row.memory.weights / 1e9 if row.memory else 0:.3f} GB, as the headers of the files say"
    held = sorted(parts(row, shape, demand), key=lambda item: -item[1])
    return f"weights in {row.spec}, GB: " + ", ".join(f"{name} {n / 1e9:.3g}" for name, n in held)


def _reading(plan: Plan) -> str:
    lines = ["tok/s: decoding without pause, every user at the full context. TTFT: one prompt of that length, alone."]
    if any(row.status != "serves" and row.step for row in plan.rows):
        lines.append("! does not serve the demand, see its line.")
    bases = {row.basis for row in plan.rows if row.basis}
    if "brochure" in bases:
        lines.append("brochure: peaks of the card's row x default shares (0.80 of bandwidth, 0.60 of rate).")
    if not plan.explain:
        lines.append("--explain shows sources.")
    return " ".join(lines)


def _explained(row: Row, shape: Shape) -> Iterator[str]:
    from .bench.plan import HOP_S
    from .bench.plan_parts import kv_bytes_per_token
    from .bench.plan_rows import two
    from .formats.kvcache import KVSpec

    if row.memory is None or row.step is None or row.prefill is None or row.split is None:
        return
    n, card, room = row.split.cards, row.card, row.memory
    yield f"\n{row.spec}, {row.kv} cache, {row.split} on {n} x {card.id}"
    yield f"  usable   {room.usable / 1e9:.1f} GB = {n} x (util x {card.memory / 1e9:.1f} GB - overhead); {card.memory_basis}"
    held = (
        "bytes of the files" if "stored" in row.spec else f"parameters of {shape.source} x bits and scales of the spec"
    )
    yield f"  weights  {room.weights / 1e9:.1f} GB: {held}"
    once = kv_bytes_per_token(shape, KVSpec.parse(row.kv))
    yield f"  cache    {room.tokens:,} tokens = {room.left / 1e9:.1f} GB / {room.per_token:,.0f} bytes a token ({once:,} held once)"
    for name, step in (("decode", row.step), ("prefill", row.prefill)):
        yield (
            f"  {name:8} {two(step.seconds * 1e3):g} ms = max(memory {two(step.mem * 1e3):g}, compute "
            f"{two(step.flop * 1e3):g}) + links {two(step.comm * 1e3):g}; {step.basis}, {100 * step.band[0]:+.0f} "
            f"{100 * step.band[1]:+.0f} %"
        )
        yield f"           {two(step.bytes / 1e9):g} GB moved, {two(step.flops / 1e12):g} TFLOP over all cards"
        for what, source in step.sources:
            yield f"           {what}: {source}"
    if row.spec != "bf16" and row.rows_from is not None:
        even = f"from {two(row.break_even):g} rows on" if row.break_even else "at no batch"
        users = f" ({two(row.users_even):g} users over experts)" if row.users_even else ""
        yield f"  batch    linears of {row.spec} turn compute-bound at {two(row.rows_from):g} rows, and gain nothing over bf16 {even}{users}"
    yield f"  card     {card.source} ({card.confidence}). {card.notes}"
    if n > 1:
        yield f"  links    2 all-reduces a layer, {HOP_S * 1e6:g} us each beside the bytes"


def _tokens(text: str) -> int:
    match = re.fullmatch(r"([0-9]{1,9})(k?)", text.strip().lower())
    if match is None:
        raise typer.BadParameter(f"--ctx {text}: expected tokens, such as 8192 or 8k")
    return int(match[1]) * (1024 if match[2] else 1)


def _seconds(flag: str, text: str | None) -> float | None:
    if text is None:
        return None
    match = _SECONDS.fullmatch(text.strip().lower())
    if match is None:
        raise typer.BadParameter(f"{flag} {text}: expected a time with its unit, such as 50ms or 2s")
    return float(match[1]) * _UNITS[match[2]]
