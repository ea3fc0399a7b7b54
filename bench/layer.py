"""`percard bench layer`: one decoder layer at true shapes, or one rank's shard of it, 16 bits against quantised, A B A B.

    1  a probe finds the float type that is fastest for each phase: that is the baseline, as in `bench model`
    2  copies of a layer of random weights stand side by side, as the layers of a model do, so that memory is cold
    3  prefill of a prompt through them, a decode step at a depth of the cache, and the head: sides in turn
    4  one Record of level `layer` per side; times are those of one layer

What it adds to `bench ops`: norms, activation quantisation, rotations, attention over the cache, and their launches. What a
model adds to it is told by layer_check.py: layers x layer + head and sampling against the step that `bench model` measured.

    qwen3-0.6b.layer.pp512.b1      a prompt of 512       qwen3-0.6b.layer.tg.d512.b1   a step with 512 in the cache
    qwen3-0.6b.attention.pp512.b1  the attention of that prompt alone: norms and turns of heads, append, softmax, products
    qwen3-0.6b.head.b1             last norm, head and argmax of one row per sequence
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ..formats import affine, shard
from ..formats.kvcache import BF16, KVSpec
from ..formats.spec import FormatError, QuantSpec
from ..formats.tensor import QuantTensor
from ..kernels.linear import linear, ops_of, prepare
from ..kernels.op import Tape
from . import card, cells, clock, record
from .cells import Cell
from .engine import attend, rope
from .engine.cache import Cache
from .engine.config import Config, load_config
from .engine.model import Matmul, Model, block, one_row_linear
from .engine.weights import INT8_ROW, Block, SyntheticSource, Weight, Weights, copied, one_block
from .probe import FLOATS, Probe, probe
from .record import Record

BASELINE = "baseline"
_COLD = {"cpu": 2**30, "cuda": 2**29}  # bytes of 16-bit weights that a pass goes through, if the model has as many
_SAMPLE_S = 0.03  # of a CPU sample, at least


@dataclass(frozen=True)
class Plan:
    """What to time: `prompts` and `depths` in tokens, `batches` sequences, `kv` caches of decode, `shard` such as "4:0"."""

    prompts: tuple[int, ...] = (512,)
    depths: tuple[int, ...] = (512,)
    batches: tuple[int, ...] = (1,)
    kv: tuple[str, ...] = ("bf16",)
    rounds: int = 5
    copies: int | None = None
    shard: str | None = None
    seed: int = 0


@dataclass(frozen=True)
class Work:
    """One cell: `phase` prefill, attention (of a prompt), decode or head; `tokens` of the prompt or in the cache (0: a head)."""

    phase: str
    tokens: int
    batch: int

    @property
    def prompt(self) -> bool:
        return self.phase in ("prefill", "attention")

    @property
    def case(self) -> str:
        if self.phase == "head":
            return f"head.b{self.batch}"
        part = "attention" if self.phase == "attention" else "layer"
        return f"{part}.{f'pp{self.tokens}' if self.prompt else f'tg.d{self.tokens}'}.b{self.batch}"


@dataclass(frozen=True)
class Side:
    """One line of a comparison; `spec` None = the baseline. `kv` is the cache of its decode."""

    name: str
    spec: QuantSpec | None
    kv: KVSpec


def run(
    source: str,
    specs: Sequence[str] = ("w8a8", "w4a16-g128", "w4a8-g128"),
    *,
    plan: Plan | None = None,
    impl: str | None = None,
    device: torch.device | None = None,
    out: str | Path | None = None,
    progress: Callable[[str], None] | None = None,
    command: str = "",
    retry: bool = False,
    force: bool = False,
    dry_run: bool = False,
) -> list[Record]:
    """Times a layer of `shape:<name>` (or `<name>`) in 16 bits and in each of `specs`; a Record per side and cell.

    `out` keeps the records, and cells that it holds are not measured again. FormatError for an unknown shape or spec, a
    depth beyond the context, or a shard that the spec cannot be cut into.
    """
    plan = plan or Plan()
    where = device or card.default_device()
    whole = load_config(source if str(source).startswith("shape:") else f"shape:{source}")
    parsed = [QuantSpec.parse(spec) for spec in specs]
    for tokens in (*plan.prompts, *plan.depths):
        if tokens + 1 > whole.context:
            raise FormatError(f"{whole.name}: {tokens} tokens and one more do not fit the context of {whole.context}")
    config = whole if plan.shard is None else rank_of(whole, plan.shard, parsed)
    bench = _Bench(whole, config, parsed, plan, impl, where, progress or (lambda words: None), command)
    todo = [bench.cell(work) for work in bench.works()]
    return cells.run(todo, None if out is None else Path(out), say=bench.say, retry=retry, force=force, dry_run=dry_run)


def rank_of(config: Config, text: str, specs: Sequence[QuantSpec] = ()) -> Config:
    """What rank r of tp holds of a layer, from "tp:r": heads and features by tp; key heads are copied where tp has more.

    FormatError with the remedies when it cannot be cut so.
    """
    tp, _, rank = text.partition(":")
    if not (tp.isdecimal() and rank.isdecimal() and int(rank) < int(tp)):
        raise FormatError(f"shard {text!r}: expected TP:RANK such as 4:0, the rank below the number of cards")
    count, e = int(tp), config.experts
    inner = (("moe_intermediate_size", e.ffn),) if e is not None else (("intermediate_size", config.ffn),)
    sizes = shard.Sizes(inner, config.heads, config.head_dim, config.kv_heads)
    for spec in (*specs, QuantSpec.parse("w8a8")):  # w8a8 asks for whole features, as 16 bits do
        if found := shard.problems(spec, count, sizes):
            raise FormatError(f"{config.name} in {spec}, shard {text}: {'; '.join(found)}")
    if inner[0][1] % count:
        raise FormatError(
            f"{config.name}: {inner[0][0]} {inner[0][1]} does not divide by {count}; take a smaller shard"
        )
    return replace(
        config,
        heads=config.heads // count,
        kv_heads=max(1, config.kv_heads // count),
        ffn=config.ffn // count if e is None else config.ffn,
        experts=None if e is None else replace(e, ffn=e.ffn // count),
    )


class _Bench:
    """What the cells of one run share: probes, copies of the layer, heads; each made when a cell first needs it."""

    def __init__(
        self,
        whole: Config,
        config: Config,
        specs: list[QuantSpec],
        plan: Plan,
        impl: str | None,
        where: torch.device,
        say: Callable[[str], None],
        command: str,
    ) -> None:
        self.whole, self.config, self.specs, self.plan, self.impl, self.where = whole, config, specs, plan, impl, where
        self.say, self.command = say, command
        fits = -(-_COLD[where.type] // (2 * config.block_parameters()))
        self.copies = plan.copies or max(1, min(config.layers, fits))
        self.kvs = [KVSpec.parse(name) for name in plan.kv]
        self._probes: dict[str, Probe] = {}
        self._layers: dict[tuple[str, torch.dtype], list[Block]] = {}
        self._turns = rope.table(config.rope, config.head_dim, max((*plan.prompts, *plan.depths)) + 1, where)

    def works(self) -> list[Work]:
        plan = self.plan
        found = [Work("prefill", tokens, batch) for tokens in plan.prompts for batch in plan.batches]
        found += [Work("attention", work.tokens, work.batch) for work in found]
        found += [Work("decode", depth, batch) for depth in plan.depths for batch in plan.batches]
        return found + ([Work("head", 0, batch) for batch in plan.batches] if plan.shard is None else [])

    def sides(self, work: Work) -> list[Side]:
        """Baseline first; every cache only where a step reads it. Without specs the caches stand over 16-bit weights.

        A head is 16-bit or int8 by row (which is w8a8), whatever the blocks are; a prompt attends alike on every side.
        """
        if work.phase == "attention":
            return [Side(BASELINE, None, BF16)]
        if work.phase == "head":
            return [Side(BASELINE, None, BF16), *([Side(str(INT8_ROW), INT8_ROW, BF16)] if self.specs else [])]
        if work.phase == "prefill":
            return [Side(BASELINE, None, BF16), *(Side(str(s), s, BF16) for s in self.specs)]
        found = [Side(BASELINE, None, BF16)]
        for spec in self.specs or [None]:  # type: ignore[list-item]
            for kv in self.kvs:
                if spec is not None or kv.quantised:
                    found.append(Side(f"{spec or '16-bit weights'}{f', {kv} cache' if kv.quantised else ''}", spec, kv))
        return found

    def cell(self, work: Work) -> Cell:
        case = f"{self.whole.name}.{work.case}"
        sides = self.sides(work)
        # A guess: a CPU at 10 GB/s and half a teraflop, a card a hundred times as fast; probing and drawing on top.
        rows, parameters = work.batch * (work.tokens if work.prompt else 1), self._parameters(work)
        one = max(2 * parameters / 1e10, 2 * rows * parameters / 5e11) / (1 if self.where.type == "cpu" else 100)
        count = 1 if work.phase == "head" else self.copies
        seconds = len(sides) * (one * count * (self.plan.rounds + 2) + parameters * 2e-8) + 2
        about = {"level": "layer", "case": case, "shape": self._shape(work), "model": self._model()}
        return Cell(case, tuple(self._key(work, s) for s in sides), seconds, lambda: self._measure(work, sides), about)

    def _parameters(self, work: Work) -> int:
        return self.whole.vocab * self.whole.hidden if work.phase == "head" else self.config.block_parameters()

    @torch.inference_mode()
    def _measure(self, work: Work, sides: Sequence[Side]) -> list[Record]:
        if self.where.type == "cuda" and work.phase == "decode":
            made = {side.name: [self._call(side, work)] for side in sides}
            found = clock.card_ab(made, device=self.where, rounds=self.plan.rounds)
            samples = {name: times.graph for name, times in found.items()}
        else:
            calls = {side.name: self._call(side, work) for side in sides}
            slowest = max(s.median for s in clock.ab(calls, rounds=1, device=self.where).values())
            repeat = max(1, min(50, round(_SAMPLE_S / max(slowest, 1e-9))))
            samples = clock.ab(calls, rounds=self.plan.rounds, calls=repeat, device=self.where)
        count = 1 if work.phase == "head" else self.copies
        each = {name: clock.Sample.of([s / count for s in sample.samples]) for name, sample in samples.items()}
        shared = card.fingerprint(self.where)
        shared["cpu"] = shared["cpu"] | ({"read_gbs": self._roof / 1e9} if self.where.type == "cpu" else {})
        return [self._record(side, work, each, shared) for side in sides]

    @functools.cached_property
    def _roof(self) -> float:
        return card.read_bandwidth(self.where)

    def _probe(self, side: Side) -> Probe:
        name = str(side.spec) if side.spec else BASELINE
        if name not in self._probes:
            options: dict[str, Any] = {
                "device": self.where,
                "prompt": max(self.plan.prompts),
                "batch": min(self.plan.batches),
            }
            floats = list(FLOATS) if self.where.type == "cpu" else [self.config.dtype]
            if side.spec is not None:
                floats = [dtype for dtype in floats if dtype.itemsize == 2]
                options["impl"] = self.impl
            self.say(f"probing one layer in {name}")
            self._probes[name] = probe(self.config, side.spec, floats, **options)
        return self._probes[name]

    def _dtype(self, side: Side, work: Work) -> torch.dtype:
        if work.phase == "head" and side.spec is not None:  # the head of the first spec's blocks
            side = replace(side, spec=self.specs[0])
        return self._probe(side).fastest("prefill" if work.prompt else "decode")

    def _matmul(self, side: Side, work: Work) -> Matmul:
        """Single 16-bit rows go the way that was faster for the baseline."""
        rows = self._dtype(side, work) in self._probe(Side(BASELINE, None, BF16)).mv and not work.prompt
        return functools.partial(one_row_linear if rows else linear, impl=self.impl if side.spec else None)

    def _blocks(self, side: Side, dtype: torch.dtype) -> list[Block]:
        """The copies; of the quantised ones one set serves all types, but for norms, which are small."""
        key = (str(side.spec) if side.spec else BASELINE, dtype)
        if key not in self._layers:
            made = SyntheticSource(dtype, self.where, side.spec, self.plan.seed)
            impl = self.impl if side.spec else None
            first = one_block(self.config, made, dtype=dtype, device=self.where, impl=impl)
            self._layers[key] = [first, *(copied(first) for _ in range(self.copies - 1))]
        return self._layers[key]

    def _call(self, side: Side, work: Work) -> Callable[[], Any]:
        """One pass through all copies, or one head."""
        dtype, matmul = self._dtype(side, work), self._matmul(side, work)
        if work.phase == "head":
            return self._head(side, work, dtype, matmul)
        blocks, config, impl = self._blocks(side, dtype), self.config, self.impl if side.spec else None
        random = torch.Generator(self.where).manual_seed(self.plan.seed)
        width = work.tokens if work.prompt else 1
        x = torch.randn(work.batch, width, config.hidden, generator=random, device=self.where).to(dtype)
        length = work.tokens + (work.phase == "decode")
        cache = Cache.new(config, work.batch, length, dtype, self.where, self.copies, [side.kv] * self.copies)
        tape = Tape() if self.where.type == "cpu" and work.phase == "decode" else None
        if work.prompt:
            slots = cache.prompt_slots(width, [width] * work.batch)
            over = attend.causal(config, self._turns[:width], dtype, cache, slots=slots, impl=impl)
        else:
            cache.fill_random()
            cache.rewind(work.tokens)
            cache.point()
            over = attend.one(config, self._turns, cache, impl=impl, tape=tape)

        def once() -> None:
            rows, add = x.clone(), None
            for i, layer in enumerate(blocks):
                rows, add = block(rows, add, layer, config, i, over, matmul, impl, tape=tape)

        if work.phase == "attention":
            size = config.q_size + 2 * config.kv_size
            qkv = torch.randn(work.batch, width, size, generator=random, device=self.where).to(dtype)
            return lambda: [over(qkv, layer, i) for i, layer in enumerate(blocks)]
        if tape is None:
            return once
        once()  # notes the calls, as a step of the engine does on a CPU
        return tape.again

    def _head(self, side: Side, work: Work, dtype: torch.dtype, matmul: Matmul) -> Callable[[], Any]:
        """Last norm, head (int8 by row beside quantised blocks) and argmax; heads in turn, so that none is in cache."""
        config = self.whole
        random = torch.Generator(self.where).manual_seed(self.plan.seed)
        dense = torch.randn(config.vocab, config.hidden, generator=random, device=self.where).div_(config.hidden**0.5)
        dense = dense.to(dtype)
        held: Weight = dense
        if side.spec is not None:
            held = prepare(
                affine.quantize(dense, INT8_ROW, affine.scale_dtype_of(INT8_ROW, dtype)), self.where, self.impl
            )
        turn = [held, *(_clone(held) for _ in range(_COLD[self.where.type] // max(1, _nbytes(held))))]
        x = torch.randn(work.batch, config.hidden, generator=random, device=self.where).to(dtype)
        norm, place = torch.ones(config.hidden, device=self.where, dtype=dtype), iter(range(1 << 62))

        def once() -> torch.Tensor:
            rows = F.rms_norm(x, (config.hidden,), norm, config.norm_eps)
            return matmul(rows, turn[next(place) % len(turn)]).float().argmax(dim=-1)

        for _ in turn:  # what a copy was written with is still on its way from the cache to memory
            once()
        return once

    def _key(self, work: Work, side: Side) -> str:
        this = card.fingerprint(self.where)
        machine = this["card"].get("uuid") or this["cpu"]["model"]
        plan = self.plan
        return record.cell_key(
            level="layer", case=f"{self.whole.name}.{work.case}", spec=str(side.spec or BASELINE), kv=str(side.kv),
            shard=plan.shard, copies=self.copies, rounds=plan.rounds, seed=plan.seed, impl=self.impl, machine=machine,
            threads=torch.get_num_threads(), torch=torch.__version__,
        )  # fmt: skip

    def _shape(self, work: Work) -> dict[str, Any]:
        shape: dict[str, Any] = {"batch": work.batch}
        if work.phase == "head":
            return shape | {"M": work.batch, "N": self.whole.vocab, "K": self.whole.hidden}
        return shape | ({"isl": work.tokens} if work.prompt else {"kv_len": work.tokens})

    def _model(self) -> dict[str, Any]:
        found = {"id": self.whole.name, "weights": "synthetic", "layers_run": 1, "layers": self.whole.layers}
        return found | ({"shard": self.plan.shard} if self.plan.shard else {})

    def _record(self, side: Side, work: Work, samples: dict[str, clock.Sample], shared: dict[str, Any]) -> Record:
        sample, base = samples[side.name], samples[BASELINE]
        spec, dtype = side.spec, self._dtype(side, work)
        gain = clock.ratio(base, sample)
        named = FLOATS[self._dtype(Side(BASELINE, None, BF16), work)]
        against = {"impl": f"torch {named}", "status": "ok", "median": base.median * 1e6, "lo": base.lo * 1e6}
        against |= {"hi": base.hi * 1e6, "ratio": gain.median, "ci95": [gain.lo, gain.hi]}
        latency = {name: getattr(sample, name) * 1e6 for name in ("median", "lo", "hi", "iqr")}
        moved, flops, weights = self._cost(side, work, dtype)
        bits = dtype.itemsize * 8
        return Record(
            cell_key=self._key(work, side),
            level="layer",
            case=f"{self.whole.name}.{work.case}",
            code=record.code_section(self.command),
            env=shared["env"],
            card=shared["card"],
            cpu=shared["cpu"],
            model=self._model(),
            shape=self._shape(work),
            scheme={
                "spec": str(spec) if spec else FLOATS[dtype],
                "kv_spec": str(side.kv) if side.kv.quantised else FLOATS[dtype],
                "weight_bits": spec.weight_bits if spec else bits,
                "act_bits": spec.act_bits if spec else bits,
                "symmetric": spec.symmetric if spec else None,
                "group": spec.group if spec else None,
                "head": "int8-row" if spec and work.phase == "head" else "16bit",
            },
            body={"impl": self._bodies(side, dtype, work), "dtype": FLOATS[dtype], "baseline_dtype": named},
            clock={
                "mode": "graph" if self.where.type == "cuda" and work.phase == "decode" else "wall",
                "l2": "cold",
                "copies": self.copies,
                "rounds": len(sample.samples),
                "drift": sample.drift,
                "noisy": card.noise(self.where),
                "power": "burst",
            },
            latency_us=latency | {"samples": [s * 1e6 for s in sample.samples]},
            against=None if side.name == BASELINE else [against],
            roofline={
                "bytes": moved,
                "flops": flops,
                "mbu": moved / self._roof / sample.median,
                "bound": None if work.prompt else "mem",
            },
            memory={"weights": weights},
            quality={"gate": "synthetic", "reasons": ["speed at true shapes, quality not measured"]},
        )

    def _bodies(self, side: Side, dtype: torch.dtype, work: Work) -> str:
        """The ops that serve, as the engine names them."""
        mv = work.batch == 1 and not work.prompt and dtype in self._probe(Side(BASELINE, None, BF16)).mv
        if side.spec is None:
            return "torch mv" if mv else "torch"
        if work.phase == "head":
            names = (f"{op.name}.{op.body_on(self.where.type, self.impl).name}" for op in ops_of(INT8_ROW))
            return " + ".join(names)
        blank = torch.empty(0)
        held = Weights(blank, tuple(self._blocks(side, dtype)[:1]), blank, blank)
        found = Model(self.config, held, dtype, self.where, side.spec, "16bit", self.impl, "", 0, self._turns)
        return found.kernel

    def _cost(self, side: Side, work: Work, dtype: torch.dtype) -> tuple[int, int, int]:
        """(bytes moved at least, operations, bytes of weights) of a layer or a head, for this side."""
        rows = work.batch * (work.tokens if work.prompt else 1)
        if work.phase == "head":
            size = self._parameters(work) * (dtype.itemsize if side.spec is None else 1)
            return size, 2 * rows * self._parameters(work), size
        c, blocks = self.config, self._blocks(side, dtype)[:1]
        blank = torch.empty(0)
        size = Weights(blank, tuple(blocks), blank, blank).nbytes
        kv = side.kv.bytes_per_token(c.head_dim, c.kv_heads, dtype)
        pairs = work.batch * (work.tokens * (work.tokens + 1) // 2 if work.prompt else work.tokens + 1)
        if work.phase == "attention":
            return rows * (kv + (2 * c.q_size + 2 * c.kv_size) * dtype.itemsize), 4 * pairs * c.q_size, 0
        return size + work.batch * work.tokens * kv, 2 * rows * c.block_parameters() + 4 * pairs * c.q_size, size


def _nbytes(w: Weight) -> int:
    return w.nbytes


def _clone(w: Weight) -> Weight:
    if not isinstance(w, QuantTensor):
        return w.clone()
    zero = None if w.zero is None else w.zero.clone()
    return replace(w, data=w.data.clone(), scale=w.scale.clone(), zero=zero)
