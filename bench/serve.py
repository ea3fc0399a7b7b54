"""`percard bench serve`: seeded requests in waves, FP16 against every spec and cache, A B A B in one process.

    1  a mix of requests is drawn once (load.py); every side and every round serves the same ones (waves.py), over pages
       of one pool (engine/pool.py)
    2  a cell is one spec over all caches asked for: the 16-bit side and its own are loaded side by side
    3  real weights pass the quality gate first; red = rows without speed. Synthetic weights say that they have no quality
    4  at each concurrency every side serves all requests, in turn, `rounds` times: tokens per second, TTFT, TPOT, gaps
    5  three ratios against FP16 (ratios.py); memory, energy, money

The 16-bit side runs in the float type that serves this mix fastest here; the first cell has the noise floor: that side
against itself.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..formats.checkpoint import Checkpoint
from ..formats.kvcache import PAGE, pages_of
from ..formats.spec import FormatError, QuantSpec
from . import card, cells, contexts, energy, load, ops, quality, record, roof, serve_rows, soundness, waves
from .cells import Cell
from .engine import Model, load_config
from .engine import kv as caches
from .engine import load as load_model
from .engine.pool import Pool
from .fair import cache_noise, memory_fits
from .load import Mix, Request
from .model_choice import EXAMPLE
from .probe import FLOATS
from .ratios import Bound
from .record import Record
from .serve_speed import Speed, measure

BASELINE, AGAIN = "baseline", "baseline again"
WARM_TOKENS = 2  # of an answer while warming up
TRY_S = 1.5  # of requests that float types are compared by


@dataclass(frozen=True)
class Plan:
    """What is served. `specs` of weights besides 16 bits, `kv` of caches; `concurrency` requests in a wave, for each of it.

    `memory` bytes that weights and caches may take together (None = what the machine has), `usd_hour` the price of a
    card; `gate_tokens` of the text for the gate.
    """

    mix: Mix
    specs: tuple[str, ...] = ()
    kv: tuple[str, ...] = ("bf16",)
    requests: int = 32
    concurrency: tuple[int, ...] = (1, 4, 16)
    bound: Bound | None = None
    rounds: int = 3
    layers: int | None = None
    head: str = "int8-row"
    seed: int = 0
    memory: float | None = None
    usd_hour: float | None = None
    gate_tokens: int = 16384


@dataclass
class Side:
    """One line of a cell: a model over a cache, its pool, the quality section and what it served at each concurrency."""

    name: str
    model: Model
    pool: Pool
    stepper: waves.Stepper
    quality: dict[str, Any]
    load_s: float
    rounds: dict[int, list[waves.Round]] = field(default_factory=dict)
    meters: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def timed(self) -> bool:
        return self.quality.get("gate") != "red"


class Session:
    """One run: the source, the requests, the 16-bit side that cells share. What costs time happens at its first use."""

    def __init__(
        self,
        source: str | Path,
        plan: Plan,
        where: torch.device,
        say: Callable[[str], None],
        *,
        text: str | Path | None = None,
        gates: Mapping[str, Mapping[str, Any]] | None = None,
        impl: str | None = None,
        command: str = "",
    ) -> None:
        self.source, self.where, self.say, self.impl, self.command = source, where, say, impl, command
        self.text, self.gates = text, gates or {}
        config = load_config(source)
        if not self.synthetic and "quantization_config" in Checkpoint.open(Path(source)).config:
            raise FormatError(
                f"{source}: is quantised already; give the 16-bit checkpoint, --specs are made of it at load"
            )
        if not 1 <= (plan.layers or config.layers) <= config.layers:
            raise FormatError(f"{config.name}: layers={plan.layers} is outside 1 .. {config.layers}")
        self.whole, self.config = config, replace(config, layers=plan.layers or config.layers)
        self.plan = plan
        self.specs = [None, *(QuantSpec.parse(s) for s in plan.specs)]
        for name in plan.kv:  # what is not known or does not fit is told before anything is loaded
            if not caches.of(name, self.config, str(source)).quantised and name != "bf16":
                said = f"a {name} cache keeps its first layer bf16, and no more than that one runs"
                raise FormatError(f"{source}: {said}; give --layers 2 or more")
        if not (self.synthetic or text or gates):
            raise FormatError(f"{source}: real weights need a held-out text for the quality gate; give --text FILE")
        self.requests = plan.mix.draw(plan.requests, plan.seed)
        fitting = [r for r in self.requests if r.prompt + r.answer <= config.context]
        if not fitting:
            raise FormatError(
                f"{config.name}: no request of {plan.mix.name} fits the context of {config.context}; give a smaller --scale"
            )
        self.fitting, self.limit = fitting, max(r.prompt + r.answer for r in fitting)
        self.floor_pct: float | None = None

    @property
    def synthetic(self) -> bool:
        return str(self.source).startswith("shape:")

    @functools.cached_property
    def speed(self) -> Speed:
        """Seconds of one layer of the 16-bit side, and its float type."""
        self.say("probing one layer in each float type")
        batches = tuple(sorted({min(self.plan.concurrency), max(self.plan.concurrency)}))
        return measure(self.config, batches, load.means(self.fitting), self.where)

    @functools.cached_property
    def ids(self) -> torch.Tensor | None:
        """Of the held-out text."""
        return None if self.text is None else quality.read_ids(self.text, self.source, self.plan.gate_tokens)

    @functools.cached_property
    def prompts(self) -> list[torch.Tensor]:
        return load.prompts(self.requests, self.config.vocab, self.plan.seed, self.ids)

    @functools.cached_property
    def base(self) -> Model:
        """The 16-bit side over a 16-bit cache."""
        memory_fits(self.config, [s for s in self.specs if s is not None][:1], self.where)
        near, found = self.speed.dtypes, []
        for dtype in near:
            self.say(f"loading {self.source} in {FLOATS[dtype]}, {self.config.layers} layers")
            model = self._load(None, dtype)
            by_row = replace(model, mv=True)
            single = min(self.plan.concurrency) == 1 and dtype in self.speed.mv
            if len(near) == 1 and not single:
                return model
            tried = {c: self._tried(model, c) for c in self.plan.concurrency}
            if single and (rows := self._tried(by_row, 1)) < tried[1]:
                model, tried[1] = by_row, rows
            found.append((sum(map(math.log, tried.values())), model))
        return min(found, key=lambda pair: pair[0])[1]

    def _tried(self, model: Model, concurrency: int) -> float:
        """Seconds of the first requests, as many as take TRY_S or make a wave.

        Layers that come near each other do not make models that do, so what came near is tried whole.
        """
        pool, stepper, count = Pool.of(model, self.tokens, self.limit), waves.Stepper(model), concurrency
        while count < len(self.fitting):
            if self.speed.serve_s(self.fitting[: count + concurrency], concurrency) > TRY_S:
                break
            count += concurrency
        cut = self._cut(count, self.limit)
        return min(waves.run(stepper, pool, *cut, concurrency).wall_s for _ in range(2))

    @functools.cached_property
    def machine(self) -> dict[str, Any]:
        """Sections that all records share."""
        found = card.fingerprint(self.where)
        rate = card.read_bandwidth(self.where) / 1e9
        if self.where.type == "cuda":
            found["card"]["roof"] = {"copy_gbs": rate}
        else:
            found["cpu"] = found["cpu"] | {"read_gbs": rate}
        return found | {"code": record.code_section(self.command)}

    @functools.cached_property
    def noisy(self) -> list[str]:
        return card.noise(self.where) + cache_noise(self.config, self.where)

    @property
    def memory(self) -> float:
        """Bytes that weights and caches may take."""
        if self.plan.memory is not None:
            return self.plan.memory
        return card.total_bytes(self.where)

    def _load(self, spec: QuantSpec | None, dtype: torch.dtype) -> Model:
        longest = max(self.limit, 0 if self.text is None else min(self.config.context, 2048))
        return load_model(
            self.source, spec=spec, dtype=dtype, layers=self.config.layers, impl=self.impl if spec else None,
            seed=self.plan.seed, max_len=longest, device=self.where, share=self.base if spec else None,
        )  # fmt: skip

    # ---- cells ----------------------------------------------------------------------------------------------------

    def cells(self) -> list[Cell]:
        """The 16-bit weights over each cache, then each spec: a cell each."""
        found = []
        for spec in self.specs:
            name = "16-bit weights" if spec is None else str(spec)
            keys = tuple(self.key(*row) for row in self.rows_of(spec))
            about = serve_rows.about(self, spec, self.plan.kv[0], max(self.plan.concurrency))
            found.append(Cell(name, keys, self.predicted(spec), functools.partial(self.measured, spec), about))
        return found

    def rows_of(self, spec: QuantSpec | None) -> list[tuple[str, str, int]]:
        """(spec, cache, concurrency) of each record of a cell, in the order in which they come."""
        kept = self.plan.kv
        if spec is None:
            kept = ("bf16", *(kv for kv in kept if kv != "bf16"))
        named = BASELINE if spec is None else str(spec)
        return [(named, kv, c) for kv in kept for c in self.plan.concurrency]

    def key(self, spec: str, kv: str, concurrency: int) -> str:
        """What makes a record what it is; `spec` BASELINE for 16-bit weights."""
        plan = self.plan
        return record.cell_key(
            level="serve", case=self.case(concurrency), load=self.load_section(), spec=spec, kv=kv, head=plan.head,
            layers=self.config.layers, context=self.config.context, rounds=plan.rounds, impl=self.impl,
            bound=plan.bound.section() if plan.bound else None, memory=plan.memory, usd_hour=plan.usd_hour,
            weights=None if self.synthetic else _files(Path(self.source)), op_source_hash=self.source_hash,
            machine=roof.identity(self.where.type), torch=torch.__version__, ladder=plan.concurrency,
        )  # fmt: skip

    @functools.cached_property
    def source_hash(self) -> str:
        return ops.source_hash(*ops.OPS)

    def case(self, concurrency: int) -> str:
        return f"{self.config.name}.serve.{self.plan.mix.name}.b{concurrency}"

    def load_section(self) -> dict[str, Any]:
        """shape.load of a record; `rate` None: a wave starts when the one before has ended."""
        mix = self.plan.mix
        return {"mix": mix.name, "source": mix.source, "rate": None, "seed": self.plan.seed} | {
            "requests": len(self.requests), "refused": len(self.requests) - len(self.fitting), "arrival": "waves",
        }  # fmt: skip

    def predicted(self, spec: QuantSpec | None) -> float:
        """Seconds of a cell as if every side were the 16-bit one: a bound from above for most."""
        sides = 1 + len(self.rows_of(spec)) // len(self.plan.concurrency)
        total = self.speed.load_s * (1 if spec is None else 2)
        for c in self.plan.concurrency:
            warm = [replace(r, answer=min(r.answer, WARM_TOKENS)) for r in self.fitting[:c]]
            total += sides * (self.plan.rounds * self.speed.serve_s(self.fitting, c) + self.speed.serve_s(warm, c))
        if self.text is not None:
            passes = 3 * sides * self.plan.gate_tokens
            total += passes * self.speed.token_s
        return total

    def _cut(self, count: int, answer: int = WARM_TOKENS) -> tuple[list[Request], list[torch.Tensor]]:
        """The first requests, their answers cut short, and their prompts: what warms a side up."""
        pairs = [(r, ids) for r, ids in zip(self.requests, self.prompts, strict=True) if r in self.fitting]
        pairs = pairs[:count]
        return [replace(r, answer=min(r.answer, answer)) for r, _ in pairs], [ids for _, ids in pairs]

    def measured(self, spec: QuantSpec | None) -> Iterator[Record]:
        """The records of a cell."""
        began = time.perf_counter()
        sides = self.sides(spec)
        self.gate(sides)
        timed = {name: side for name, side in sides.items() if side.timed}
        if len(timed) > 1 or spec is None:
            for c in self.plan.concurrency:
                self.say(
                    f"{c} at a time: {len(self.requests)} requests, {self.plan.rounds} rounds of {len(timed)} sides"
                )
                self.serve(timed, c)
        if AGAIN in timed:
            self.floor_pct = serve_rows.floor(sides[BASELINE], sides[AGAIN])
        seconds = time.perf_counter() - began
        yield from serve_rows.records(self, spec, sides, seconds)

    def sides(self, spec: QuantSpec | None) -> dict[str, Side]:
        """The 16-bit side, and of this cell's weights one over each cache; caches of one kind are one pool."""
        base, pools = self.base, {}
        found: dict[str, Side] = {}

        def add(name: str, model: Model, load_s: float) -> None:
            kind = contexts.kind_of(model)
            if kind not in pools:
                pools[kind] = Pool.of(model, self.tokens, self.limit)
            found[name] = Side(name, model, pools[kind], waves.Stepper(model), {}, load_s)

        add(BASELINE, base, self.speed.load_s)
        if spec is None:
            add(AGAIN, base, 0.0)
            held, load_s = base, 0.0
        else:
            began = time.perf_counter()
            sixteen = self.whole.dtype if self.whole.dtype.itemsize == 2 else torch.bfloat16
            self.say(f"loading {self.source} as {spec}")
            held = self._load(spec, sixteen).with_head(self.plan.head)
            load_s = time.perf_counter() - began
        for named, kv, c in self.rows_of(spec):
            if c == self.plan.concurrency[0] and (named, kv) != (BASELINE, "bf16"):
                add(f"{named}, {kv} cache", held.with_kv(kv), load_s)
        return found

    @functools.cached_property
    def tokens(self) -> int:
        """Room that the largest wave takes, in whole pages of tokens."""
        most = 0
        for c in self.plan.concurrency:
            for first in range(0, len(self.fitting), c):
                wave = self.fitting[first : first + c]
                most = max(most, sum(pages_of(r.prompt + r.answer) for r in wave))
        return most * PAGE

    def gate(self, sides: Mapping[str, Side]) -> None:
        """Fills the quality section of every side: measured on the text, brought along, or synthetic."""
        base = sides[BASELINE]
        for side in sides.values():
            model = side.model
            weighed = model.spec is not None or model.kv.quantised
            brought = self.gates.get(side.name)
            if not weighed:
                side.quality = {"gate": "synthetic" if self.synthetic else "none", "reasons": [], "model": None}
            elif self.ids is not None:
                self.say(f"quality of {side.name} on {len(self.ids)} tokens")
                window = min(base.model.max_len, 2048)
                found, verdict = contexts.judged(base.model, model, self.ids, window)
                side.quality = quality.section(found, verdict, self.config.name)
                base.quality = quality.reference_section(found, self.config.name)
            elif brought is not None:
                side.quality = dict(brought)
            elif self.synthetic:
                reasons = ["speed at true shapes, quality not measured"]
                side.quality = {"gate": "synthetic", "reasons": reasons, "model": None}
                side.quality["sqnr_db"] = model.weights.sqnr_db
            else:
                side.quality = {"gate": "red", "reasons": ["no gate was brought for this side"], "model": None}
            wrong = soundness.faults(base.model, model, max(self.plan.concurrency)) if weighed else []
            if wrong:
                side.quality = side.quality | {"gate": "red", "reasons": [*side.quality.get("reasons", []), *wrong]}
        if AGAIN in sides:
            sides[AGAIN].quality = base.quality

    def serve(self, sides: Mapping[str, Side], concurrency: int) -> None:
        """Rounds of all sides in turn, after a short wave that warms each up."""
        counter = _counter(self.where)
        for turn in range(-1, self.plan.rounds):
            for side in sides.values():
                if turn < 0:
                    waves.run(side.stepper, side.pool, *self._cut(concurrency), concurrency)
                    continue
                with energy.measured(self.where, found=counter) as meter:
                    made = waves.run(side.stepper, side.pool, self.requests, self.prompts, concurrency)
                side.rounds.setdefault(concurrency, []).append(made)
                side.meters[concurrency] = meter.section(made.tokens_out)


def _counter(where: torch.device) -> energy.Source | None:
    try:
        return energy.source(where)
    except energy.NoCounter:
        return None


def _files(folder: Path) -> list[tuple[str, int]]:
    """Names and sizes of the weights of a checkpoint."""
    return sorted((p.name, p.stat().st_size) for p in folder.glob("*.safetensors"))


def run(
    source: str | Path,
    plan: Plan,
    *,
    text: str | Path | None = None,
    gates: Mapping[str, Mapping[str, Any]] | None = None,
    impl: str | None = None,
    device: torch.device | None = None,
    out: str | Path | None = None,
    progress: Callable[[str], None] | None = None,
    command: str = "",
    **resume: Any,
) -> list[Record]:
    """Serves the requests of `plan` with `source` (a 16-bit checkpoint, or `shape:<name>`); records of the 16-bit side first.

    Real weights need `text`, a held-out UTF-8 file for the gate, or `gates` {"w8a8, int8 cache": quality section} measured
    elsewhere. `out` is gone on with, `resume` as in cells.run. FormatError for bad input, NotComparable when sides do
    not fit this machine together.
    """
    say = progress or (lambda words: None)
    where = device or card.default_device()
    session = Session(source, plan, where, say, text=text, gates=gates, impl=impl, command=command)
    target = None if out is None else Path(out)
    for row in cells.settled(target).values():
        if row.cell_key == session.key(BASELINE, "bf16", plan.concurrency[0]):
            session.floor_pct = (row.cpu or row.card).get("noise_floor_pct")
    return cells.run(session.cells(), target, say=say, **resume)


def choice(
    quick: bool, source: str | Path | None, text: str | Path | None = None, **asked: Any
) -> tuple[str, Plan, str | Path | None]:
    """(source, plan, text) of fields of a Plan, `mix` and `bound` as words; `quick` fills what is not asked for.

    Quick is a card's few seconds of Qwen3-8B's shape, or on a CPU the small trained model of the checkout with its gate.
    FormatError when no source is named.
    """
    given: dict[str, Any] = {}
    if quick:
        on_card = card.default_device().type == "cuda"
        given = {
            "specs": ("w8a8", "w4a16-g64"),
            "kv": ("bf16", "int8"),
            "requests": 24,
            "scale": 0.1,
            "bound": "ttft=1s,tpot=50ms",
        }
        given |= {"concurrency": (1, 4), "rounds": 3}
        if source is None and on_card:
            source, given["layers"], given["concurrency"] = "shape:qwen3-8b", 8, (1, 16)
        elif source is None:
            source, text = EXAMPLE, text or EXAMPLE / "heldout.txt"
            if not (EXAMPLE / "config.json").is_file():
                raise FormatError(
                    f"{EXAMPLE}: no checkpoint there; run --quick in a checkout of percard, or name DIR or shape:NAME"
                )
    if source is None:
        raise FormatError("no model was named; expected DIR or shape:NAME, or --quick")
    given |= asked
    mix = load.mix_of(given.pop("mix", "chat"), given.pop("scale", 1.0))
    bound = Bound.parse(given.pop("bound")) if given.get("bound") else None
    return str(source), Plan(mix, bound=bound, **given), text
