"""The plan: for each spec and cache the fewest cards that serve a demand, or why none do. Formulas: bench/plan.py."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..formats import compressed_tensors
from ..formats.checkpoint import Checkpoint
from ..formats.kvcache import KVSpec
from ..formats.spec import FormatError, QuantSpec
from . import efficiency, money
from .card_table import Card
from .plan import OVERHEAD_GB, UTIL, Find, Memory, Split, Step, memory, predict_decode, predict_prefill, turning_points
from .plan_parts import Shape, kv_bytes_per_token
from .plan_split import splits, whole_groups

AUTO = ("bf16", "fp8-block", "w8a8", "w4a16-g128", "w4a8-g128")
MOST_CARDS = 64
STORED = "as stored"
SERVES, LATE, LOADS, REFUSED = "serves", "too slow", "loads only", "refused"


@dataclass(frozen=True)
class Demand:
    """What is to be served: `users` at once with `ctx` tokens each; bounds in seconds or None; how memory is counted."""

    users: int = 32
    ctx: int = 8192
    tpot_s: float | None = None
    ttft_s: float | None = None
    util: float = UTIL
    overhead_gb: float = OVERHEAD_GB
    mtp: bool = True
    usd_hour: float | None = None

    def __post_init__(self) -> None:
        _within("--users", self.users, 1, 1_000_000, "sequences at once")
        _within("--ctx", self.ctx, 1, 100_000_000, "tokens of one sequence")
        _within("--util", self.util, 0.01, 1, "the share of memory that may be used")
        _within("--overhead-gb", self.overhead_gb, 0, 1000, "GB a card")
        for name, seconds in (("--tpot", self.tpot_s), ("--ttft", self.ttft_s)):
            if seconds is not None:
                _within(name, seconds, 1e-6, 1e6, "seconds")
        if self.usd_hour is not None:
            _within("--usd-hour", self.usd_hour, 1e-6, 1e6, "dollars of one card and hour")


@dataclass(frozen=True)
class Row:
    """One spec over one cache on `split.cards` cards. `status`: serves, too slow, loads only, refused; `why` with a remedy.

    `step` and `prefill` are predictions (one prompt of ctx tokens alone on the cards), None where nothing fits.
    """

    model: str
    card: Card
    spec: str
    kv: str
    status: str
    why: str = ""
    split: Split | None = None
    memory: Memory | None = None
    step: Step | None = None
    prefill: Step | None = None
    users: int = 0
    ctx: int = 0
    usd_hour: float | None = None
    rows_from: float | None = None  # rows of a linear where the spec turns compute-bound
    break_even: float | None = None  # rows from where it gains nothing over bf16
    users_even: float | None = None  # the same in users, of a mixture's experts
    notes: tuple[str, ...] = ()

    @property
    def tok_s_card(self) -> float | None:
        return self.users / self.step.seconds / self.split.cards if self.step and self.split else None

    @property
    def tok_s_user(self) -> float | None:
        return 1 / self.step.seconds if self.step else None

    @property
    def usd_out(self) -> float | None:
        """Dollars of a million output tokens, decoding without pause."""
        if self.usd_hour is None or not self.tok_s_card:
            return None
        return money.usd_per_mtok(self.usd_hour, self.tok_s_card)

    @property
    def usd_in(self) -> float | None:
        """Dollars of a million input tokens, prompts of ctx tokens one after another."""
        if self.usd_hour is None or not self.prefill or not self.split:
            return None
        return money.usd_per_mtok(self.usd_hour, self.ctx / self.prefill.seconds, self.split.cards)

    @property
    def tokens_user(self) -> int | None:
        """Tokens of cache for each of the users."""
        return self.memory.tokens // self.users if self.memory else None

    @property
    def basis(self) -> str:
        """The worse basis of decode and prefill."""
        found = [s.basis for s in (self.step, self.prefill) if s]
        return max(found, key=efficiency.BASES.index) if found else ""

    @property
    def band(self) -> tuple[float, float] | None:
        found = [s for s in (self.step, self.prefill) if s]
        return max(found, key=lambda s: efficiency.BASES.index(s.basis)).band if found else None


@dataclass(frozen=True)
class Stored:
    """A checkpoint on disk: bytes of its tensors from the headers of its shards, and the spec of most of its linears.

    `mtp` of the bytes are layers that predict further tokens; `act_order`: GPTQ's g_idx, which TP cannot cut.
    """

    nbytes: int
    mtp: int
    spec: QuantSpec | None
    path: str
    act_order: bool = False


def stored(model: str, shape: Shape) -> Stored | None:
    """The checkpoint that a folder holds; None when MODEL is no folder, or holds no safetensors."""
    folder = Path(model)
    if not folder.is_dir() or not any(folder.glob("*.safetensors")):
        return None
    found = Checkpoint.open(folder)
    last = tuple(f".layers.{shape.layers + i}." for i in range(64))
    mtp = sum(info.nbytes for name, info in found.tensors.items() if any(part in f".{name}" for part in last))
    spec: QuantSpec | None = None
    quantised = found.config.get("quantization_config")
    if compressed_tensors.claims(found.config):
        specs = list(compressed_tensors.specs(found.config, list(found.names)).values())
        spec = max(set(specs), key=specs.count) if specs else None
    elif isinstance(quantised, dict):
        spec = _foreign(quantised, folder)
    act_order = isinstance(quantised, dict) and quantised.get("desc_act") is True
    return Stored(found.nbytes, mtp, spec, str(folder), act_order)


def _foreign(config: dict[str, Any], folder: Path) -> QuantSpec:
    """The spec behind other projects' names of it."""
    method, bits = config.get("quant_method"), config.get("bits", config.get("w_bit"))
    group = config.get("group_size", config.get("q_group_size"))
    if method == "fp8":
        return QuantSpec.parse("fp8-block" if config.get("weight_block_size") else "fp8-dynamic")
    if method in ("gptq", "awq") and bits in (3, 4, 8) and group in (-1, None, 32, 64, 128):
        return QuantSpec(
            bits, 16, group if group in (32, 64, 128) else None, method == "gptq" and config.get("sym", True)
        )
    raise FormatError(
        f"{folder}/config.json: quant_method {method!r} with {bits} bits and group {group} is not known; "
        "plan its 16-bit source with --spec"
    )


def plan(
    shape: Shape,
    card: Card,
    demand: Demand,
    *,
    cards: int | None = None,
    specs: Sequence[str] = AUTO,
    kvs: Sequence[str] = ("bf16",),
    disk: Stored | None = None,
    find: Find = efficiency.find,
) -> list[Row]:
    """A row for each spec and cache, those that the card or the model cannot do with the reason. `cards` None = the fewest.

    Bounds in `demand` are held against the prediction itself; whether its band crosses a bound is said in the notes.
    """
    if cards is not None:
        _within("--cards", cards, 1, 4096, "cards")
    rows = []
    for name in specs:
        spec, weights = _spec(name, disk)
        said = str(spec) if spec is not None else "bf16"
        said += f" ({STORED})" if weights is not None else ""
        rows += [_one(shape, card, demand, cards, spec, said, KVSpec.parse(kv), weights, find) for kv in kvs]
    return rows


def spec_of(said: str) -> QuantSpec | None:
    """The spec that a row's name says; None for 16-bit weights."""
    word = said.removesuffix(f" ({STORED})")
    return None if word in ("bf16", "fp16", "16bit") else QuantSpec.parse(word)


def _spec(name: str, disk: Stored | None) -> tuple[QuantSpec | None, Stored | None]:
    if name == STORED:
        if disk is None:
            raise FormatError(f"--spec {STORED!r} needs a folder with safetensors files; name a spec instead")
        return disk.spec, disk
    return spec_of(name), None


def _one(
    shape: Shape,
    card: Card,
    demand: Demand,
    cards: int | None,
    spec: QuantSpec | None,
    said: str,
    kv: KVSpec,
    disk: Stored | None,
    find: Find,
) -> Row:
    refused = Row(shape.name, card, said, str(kv), REFUSED, users=demand.users, ctx=demand.ctx)
    if why := next(_unfit(shape, card, spec, kv), None):
        return replace(refused, why=why)
    best: Row | None = None
    lines: list[str] = []
    for count in [cards] if cards is not None else range(1, MOST_CARDS + 1):
        found, wrong = splits(shape, spec, count)
        if disk is not None and disk.act_order and count > 1:
            found, wrong = [], ["act order (desc_act, g_idx) cannot be cut by row; take --cards 1, or quantise without"]
        if cards is not None or (wrong and not _only_odd(wrong)):
            lines += [line for line in wrong if line not in lines]
        for split in found:
            row = _placed(shape, card, demand, spec, said, kv, split, disk, find)
            if row.status == SERVES:
                return replace(row, notes=(*row.notes, *_said(lines)))
            if best is None or _order(row) > _order(best):
                best = row
    if best is None:
        return replace(refused, why="; ".join(lines) or f"no number of cards up to {MOST_CARDS} can hold it")
    why = best.why if cards is not None else f"{best.why}; no number of cards up to {MOST_CARDS} serves the demand"
    return replace(best, why=why, notes=(*best.notes, *_said(lines)))


def _unfit(shape: Shape, card: Card, spec: QuantSpec | None, kv: KVSpec) -> Iterator[str]:
    """Why a spec or a cache is nothing for this card or model, whatever the number of cards."""
    yield from whole_groups(shape, spec)
    try:
        kv_bytes_per_token(shape, kv)
    except FormatError as error:
        yield str(error)
    rate, plain = card.rate(spec), card.rate(None)
    if rate is None:
        kind = "FP8" if spec is not None and spec.float_format else "INT8"
        yield f"{card.id} has no {kind} rate, which {spec} multiplies at; take w4a16-g128, or w8a16"
    elif plain is not None and rate[0] < plain[0] / 2:
        kind = f"{rate[0] / 1e12:g} TOPS of {rate[1]} against {plain[0] / 1e12:g} of bf16"
        yield f"{card.id} would slow down: {kind}; take fp8-block or w4a16-g128"


def _placed(
    shape: Shape,
    card: Card,
    demand: Demand,
    spec: QuantSpec | None,
    said: str,
    kv: KVSpec,
    split: Split,
    disk: Stored | None,
    find: Find,
) -> Row:
    """A row for one split: what fits, how fast, whether that is enough."""
    held = None if disk is None else float(disk.nbytes - (0 if demand.mtp else disk.mtp))
    room = memory(
        shape, spec, kv, card, split, util=demand.util, overhead_gb=demand.overhead_gb, mtp=demand.mtp, weights=held
    )
    row = Row(shape.name, card, said, str(kv), REFUSED, split=split, memory=room, users=demand.users, ctx=demand.ctx)
    row = replace(row, usd_hour=demand.usd_hour)
    if room.left <= 0:
        lacks = f"{split.cards} cards lack {-room.left / 1e9:.3g} GB for the weights"
        return replace(row, why=f"{lacks}; take more cards, fewer bits, or a card with more memory")
    step = predict_decode(shape, spec, kv, demand.users, demand.ctx, card, split=split, find=find)
    prefill = predict_prefill(shape, spec, kv, 1, demand.ctx, card, split=split, find=find)
    begins, even = turning_points(shape, spec, card, step.shares)
    rows_a_user = shape.per_token / shape.experts if shape.experts else 1.0
    row = replace(
        row,
        status=SERVES,
        step=step,
        prefill=prefill,
        rows_from=begins,
        break_even=even if spec is not None else None,
        users_even=even / rows_a_user if even is not None and spec is not None and shape.experts else None,
    )
    need = demand.users * demand.ctx
    if room.tokens < need:
        words = f"{room.tokens} tokens of cache fit, {demand.users} users x {demand.ctx} are {need}"
        fewer = room.tokens // demand.ctx
        remedy = f"take --users {fewer}" if fewer else f"take --ctx {max(1, room.tokens // demand.users)}"
        smaller = "" if shape.latent or kv.quantised else ", a smaller cache (--kv int8)"
        return replace(row, status=LOADS, why=f"{words}; {remedy}{smaller} or more cards")
    late, notes = [], []
    for name, bound, got in (("TPOT", demand.tpot_s, step), ("TTFT", demand.ttft_s, prefill)):
        if bound is None:
            continue
        best, worst = got.seconds / (1 + got.band[1]), got.seconds / (1 + got.band[0])
        if got.seconds > bound:
            late.append(f"{name} {_ms(got.seconds)} is above {_ms(bound)}")
        elif worst > bound:
            notes.append(
                f"{name} {_ms(got.seconds)} meets {_ms(bound)}, the band does not: {_ms(best)} to {_ms(worst)}"
            )
        else:
            notes.append(f"{name} {_ms(got.seconds)} meets {_ms(bound)} over the whole band")
    if late:
        remedy = "take fewer users, fewer bits, or more cards"
        return replace(row, status=LATE, why=f"{'; '.join(late)}; {remedy}", notes=tuple(notes))
    return replace(row, notes=tuple(notes))


def _order(row: Row) -> tuple[int, float]:
    """Which of two rows that do not serve says more: late before loads only before nothing; then the nearer one."""
    rank = (REFUSED, LOADS, LATE).index(row.status)
    if row.status == LATE and row.step and row.prefill:
        return rank, -(row.step.seconds + row.prefill.seconds)
    return rank, row.memory.left if row.memory else -math.inf


def _only_odd(lines: Sequence[str]) -> bool:
    """Whether a number of cards fails for heads or vocabulary only: nobody asked for that number."""
    return any(line.startswith(("heads ", "vocabulary ")) or "KV heads" in line for line in lines)


def _said(lines: Sequence[str]) -> list[str]:
    return [f"not with experts cut by row: {line}" if "expert parallel" in line else line for line in lines]


def _ms(seconds: float) -> str:
    """Two digits, with a unit."""
    return f"{two(seconds):g} s" if seconds >= 1 else f"{two(seconds * 1e3):g} ms"


def two(value: float) -> float:
    """Two significant digits: a plan knows no more."""
    return float(f"{value:.2g}")


def _within(name: str, value: float, least: float, most: float, what: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise FormatError(f"{name} is {value!r}, expected {least:.12g} to {most:.12g}: {what}")
