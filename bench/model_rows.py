"""What `bench model` measured, as Records: one per side, phase, depth and batch; the three ratios over all of them.

    pp512.b4            a prompt of 512 for each of 4 sequences
    tg32.d512.b4        one token for each of 4 sequences with 512 in the cache, from 32 in a row
    mix512x32.b4        the whole of it, 512 in and 32 out: both times, as rates of the whole

same_batch stands in every row. same_bound and max_fit are about a ladder of batches: a file has them in the rows of its last
batch, and `model_ratios.completed` fills them into all rows of a list.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from . import clock, model_ratios, money, ratios, record
from .engine import Model, load_config
from .engine import kv as caches
from .engine.config import Config
from .fair import Budget, Plan
from .model_sides import Side, Wanted
from .probe import FLOATS
from .record import Record
from .worker import Outcome

_LAUNCH = 1 / 3  # below this share of either roof, steps that were launched one by one wait for their launches


@dataclass(frozen=True)
class Setting:
    """What all rows of a run have in common: `machine`, `sources` and `weights` stand in cell keys for the card (or CPU) with
    its versions and instruction sets, for the code of the ops, and for the weights."""

    config: Config
    plan: Plan
    source: str
    budget: Budget
    machine: Mapping[str, Any]
    sources: str
    weights: str | None
    gate: str | None = None  # hash of the text that gates
    impl: str | None = None

    def case(self, phase: str, depth: int, batch: int) -> str:
        """The name of a row."""
        plan = self.plan
        kinds = {
            "prefill": f"pp{plan.prompt}",
            "decode": f"tg{plan.new}.d{depth}",
            "mixed": f"mix{plan.prompt}x{plan.new}",
        }
        return f"{self.config.name}.model.{kinds[phase]}.b{batch}"

    def shape(self, depth: int, batch: int) -> dict[str, Any]:
        """The section "shape", without the bound."""
        return {"batch": batch, "isl": self.plan.prompt, "osl": self.plan.new, "kv_len": depth}

    def key(self, side: Wanted, phase: str, depth: int, batch: int) -> str:
        """The cell_key of a row."""
        kv = caches.of(side.kv, self.config, self.source).specs
        return record.cell_key(
            level="model",
            case=self.case(phase, depth, batch),
            shape=self.shape(depth, batch),
            spec=side.label,
            head=side.head,
            kv=[str(spec) for spec in kv],
            layers=self.config.layers,
            weights=self.weights or "synthetic",
            gate=self.gate,
            machine=self.machine,
            op_source_hash=self.sources,
            impl=self.impl,
            rounds=self.plan.rounds,
            seed=self.plan.seed,
        )

    def about(self, side: Wanted, phase: str, depth: int, batch: int) -> dict[str, Any]:
        """What the row of a side says of itself when it has no figures."""
        layers = load_config(self.source).layers
        kind = "real" if self.weights else "synthetic"
        spec = side.spec
        return {
            "level": "model",
            "case": self.case(phase, depth, batch),
            "shape": self.shape(depth, batch),
            "model": {"id": self.config.name, "weights": kind, "layers_run": self.config.layers, "layers": layers}
            | ({"weights_hash": self.weights} if self.weights else {}),
            "scheme": {"spec": side.label, "kv_spec": side.kv or "bf16", "head": side.head}
            | ({"weight_bits": spec.weight_bits, "act_bits": spec.act_bits, "group": spec.group} if spec else {}),
        }


@dataclass(frozen=True)
class Machine:
    """Sections of this machine, the clock's, and its roofs: bytes and operations per second measured, and published."""

    sections: Mapping[str, dict[str, Any]]
    clock: Mapping[str, Any]
    gbs: float
    tops: float
    spec_gbs: float | None = None
    spec_tops: float | None = None


@dataclass(frozen=True)
class Measured:
    """One side in one phase, timed in the same rounds as `base`. Seconds are of a call: a prompt, a step, or the whole.

    `first` are seconds of the prompt before it (TTFT) and `step` of a step (TPOT), where they are known.
    """

    side: Side
    base: Side
    phase: str
    depth: int
    batch: int
    sample: clock.Sample
    against: clock.Sample
    first: clock.Sample | None = None
    step: clock.Sample | None = None
    kv_bytes: int | None = None
    extra: int | None = None
    energy: dict[str, Any] | None = None
    graph: bool = True
    run_id: str = ""
    seconds: float = 0.0


def row(setting: Setting, machine: Machine, found: Measured, probe_words: str) -> Record:
    """The Record of a side that was timed."""
    plan, side, phase, batch = setting.plan, found.side, found.phase, found.batch
    runs = "prefill" if phase == "prefill" else "decode"
    model = side.model(runs, batch)
    prompt = setting.plan.prompt
    spec, quantised = side.wanted.spec, side.wanted.kv is not None
    gain = clock.ratio(found.against, found.sample)
    key = setting.key(side.wanted, phase, found.depth, batch)
    versus = {"ratio": gain.median, "ci95": [gain.lo, gain.hi], "batch": batch, "batch_fp16": batch}
    versus |= {"baseline_key": setting.key(found.base.wanted, phase, found.depth, batch)}
    about = setting.about(side.wanted, phase, found.depth, batch)
    first, step = found.first, found.step
    priced = money.section(
        plan.usd_hour,
        prefill_s=first.median if first else None,
        decode_s=step.median * plan.new if step else None,
        tokens_in=batch * prompt,
        tokens_out=batch * plan.new,
    )
    return Record(
        cell_key=key,
        run_id=found.run_id,
        level="model",
        case=about["case"],
        seconds=round(found.seconds, 3),
        code=machine.sections["code"],
        env=machine.sections["env"],
        card=machine.sections["card"],
        cpu=machine.sections["cpu"],
        model=about["model"] | {"layers_run": model.config.layers, "layers": load_config(model.source).layers},
        shape=about["shape"] | ({"bound": plan.bound.section()} if plan.bound else {}),
        scheme={
            "spec": side.wanted.label if spec or side.wanted.child else FLOATS[model.dtype],
            "kv_spec": model.kv.name if quantised else FLOATS[model.dtype],
            "kv_bits": model.kv.bits if quantised else model.dtype.itemsize * 8,
            "weight_bits": spec.weight_bits if spec else model.dtype.itemsize * 8,
            "act_bits": spec.act_bits if spec else model.dtype.itemsize * 8,
            "group": spec.group if spec else None,
            "symmetric": spec.symmetric if spec else None,
            "head": side.wanted.head,
            "notes": list(model.notes),
        },
        body={
            "impl": model.kernel,
            "isa": model.isa,
            "dtype": FLOATS[model.dtype],
            "baseline_dtype": FLOATS[found.base.model(runs, batch).dtype],
            "baseline_probe": probe_words,
            "same_fusions": model.same_fusions,
            "attention_body": model.attention(runs),
        },
        clock=dict(machine.clock)
        | {
            "mode": "graph" if found.graph else "wall",
            "drift": found.sample.drift,
            "rounds": len(found.sample.samples),
        },
        latency_us={name: getattr(found.sample, name) * 1e6 for name in ("median", "lo", "hi", "iqr")}
        | {"samples": [t * 1e6 for t in found.sample.samples]},
        tokens=_tokens(found, plan, prompt)
        | {"vs_fp16": {"same_batch": versus} | ({} if phase == "prefill" else _later(setting, model))},
        roofline=None if phase == "mixed" else roofline(model.config, model, found, prompt, plan.new, machine),
        energy=found.energy,
        money=priced,
        memory=_memory(setting, model, found),
        quality=side.quality,
    )


def red(setting: Setting, machine: Machine, side: Side, phase: str, depth: int, batch: int) -> Record:
    """The Record of a side whose gate is red: no figure of speed."""
    about = setting.about(side.wanted, phase, depth, batch)
    model = side.model("prefill" if phase == "prefill" else "decode", batch)
    return Record(
        cell_key=setting.key(side.wanted, phase, depth, batch),
        level="model",
        case=about["case"],
        code=machine.sections["code"],
        env=machine.sections["env"],
        card=machine.sections["card"],
        cpu=machine.sections["cpu"],
        model=about["model"],
        shape=about["shape"],
        scheme=about["scheme"] | {"notes": list(model.notes)},
        body={"impl": model.kernel, "isa": model.isa},
        clock=dict(machine.clock),
        memory={"weights": model.nbytes, "kv_bytes_per_token": model.kv_bytes_per_token, "load_s": side.load_s},
        quality=side.quality,
    )


def failed(
    setting: Setting, side: Wanted, phase: str, depth: int, batch: int, ended: Outcome, quality: Any = None
) -> Record:
    """The Record of a side that could not be measured."""
    about = setting.about(side, phase, depth, batch)
    key = setting.key(side, phase, depth, batch)
    return Record(cell_key=key, status=ended.status, error=ended.error, quality=quality or None, **about)


def whole(first: clock.Sample, step: clock.Sample, new: int) -> clock.Sample:
    """Seconds of prompt and `new` tokens, of which the prompt gives the first one, round by round."""
    pairs = zip(first.samples, step.samples, strict=False)
    return clock.Sample.of([prompt + (new - 1) * one for prompt, one in pairs])


def _spread(sample: clock.Sample | None) -> dict[str, float] | None:
    if sample is None:
        return None
    return {f"p{round(100 * q)}": clock.quantile(sample.samples, q) for q in (0.5, 0.9, 0.99)}


def _tokens(found: Measured, plan: Plan, prompt: int) -> dict[str, Any]:
    """Rates of all sequences together, and latencies where they are known."""
    batch, seconds = found.batch, found.sample.median
    latencies = {"ttft_s": _spread(found.first), "tpot_s": _spread(found.step)}
    known = {name: value for name, value in latencies.items() if value is not None}
    if found.phase == "prefill":
        return {"tok_s_in": batch * prompt / seconds, "tok_s_per_card": batch * prompt / seconds} | known
    made = batch * (plan.new if found.phase == "mixed" else 1) / seconds
    tokens: dict[str, Any] = {
        "tok_s": made,
        "tok_s_per_card": made,
        "tok_s_per_user": made / batch,
        "concurrency": batch,
    } | known
    if found.phase == "mixed":
        tokens |= {"tok_s_in": batch * prompt / seconds, "req_s": batch / seconds, "e2e_s": _spread(found.sample)}
    return tokens


def _later(setting: Setting, model: Model) -> dict[str, Any]:
    """The ratios over the ladder before the ladder is there, and what `model_ratios.completed` needs to know of this side."""
    last = setting.plan.ladder[-1]
    pointer = f"stands in the row of batch {last}, the last of the ladder"
    return {
        "same_bound": ratios.nothing(pointer),
        "max_fit": ratios.nothing(pointer, memory=_asked(setting, model)),
    }


def _asked(setting: Setting, model: Model) -> dict[str, Any]:
    """What max_fit of this run needs to know of a side."""
    return needs(setting.budget, model, load_config(model.source).layers)


def needs(budget: Budget, model: Model, layers: int) -> dict[str, Any]:
    """The budget, and bytes of weights and of a cached token of all `layers` of a model of which some run."""
    run = model.config.layers
    table = {t.data_ptr(): t.nbytes for t in _tables(model)}
    blocks = model.nbytes - sum(table.values())
    return {
        "bytes": budget.memory,
        "util": budget.util,
        "overhead": budget.overhead,
        "of": budget.of,
        "weights": sum(table.values()) + blocks * layers / run,
        "kv_per_token": model.kv_bytes_per_token * layers / run,
    }


def _tables(model: Model) -> list[torch.Tensor]:
    """Tensors that a model has once, however many layers: embedding, last norm, head."""
    head = model.weights.head
    parts = [head] if isinstance(head, torch.Tensor) else [head.data, head.scale, head.zero]
    return [t for t in (model.weights.embedding, model.weights.norm, *parts) if t is not None]


def _memory(setting: Setting, model: Model, found: Measured) -> dict[str, Any]:
    """Bytes held and bytes left, of the layers that ran; sequences and tokens that fit, of all layers."""
    asked, plan = _asked(setting, model), setting.plan
    length = found.depth + (0 if found.phase == "prefill" else plan.new)
    kv = found.kv_bytes or found.batch * length * model.kv_bytes_per_token
    free = ratios.free_for_kv(asked["bytes"], asked["weights"], asked["util"], asked["overhead"])
    return {
        "weights": model.nbytes,
        "kv": kv,
        "kv_bytes_per_token": model.kv_bytes_per_token,
        "activations": found.extra,
        "peak": None if found.extra is None else model.nbytes + kv + found.extra,
        "free_for_kv": int(free),
        "max_tokens": max(0, int(free / asked["kv_per_token"])),
        "max_concurrency": model_ratios.fits(asked, plan.prompt + plan.new),
        "load_s": found.side.load_s,
    }


def active_parameters(config: Config) -> float:
    """Weights of the linears that one token goes through, in all layers that run."""
    total = 0.0
    for layer in range(config.layers):
        for name, (n, k) in config.linears(layer).items():
            share = config.experts.per_token / config.experts.count if config.experts and ".experts." in name else 1.0
            total += share * n * k
    return total


def roofline(config: Config, model: Model, found: Measured, prompt: int, new: int, machine: Machine) -> dict[str, Any]:
    """Bytes and operations that a call needs at least, and its share of the roofs.

    mbu and mfu are shares of the measured read rate and of the measured 16- or 32-bit float rate, for every spec alike (INT8
    units can pass 1); pct_of_roof is the larger one in per cent, pct_of_spec the same of the published card. `bound` is the
    roof it is nearer to, or "launch": under a third of both, and not in one graph on a card.
    """
    batch, table = found.batch, config.vocab * config.hidden
    per_key = 4 * config.heads * config.head_dim * config.layers  # QK and PV, a multiply and an add each
    moved: float
    if found.phase == "prefill":
        moved = model.step_bytes(batch * prompt) + batch * prompt * model.kv_bytes_per_token
        work = 2 * batch * (prompt * active_parameters(config) + table) + batch * per_key * prompt * (prompt + 1) / 2
    else:
        depth = found.depth + new / 2
        moved = model.step_bytes(batch) + batch * depth * model.kv_bytes_per_token
        work = 2 * batch * (active_parameters(config) + table) + batch * per_key * depth
    seconds = found.sample.median

    def share(amount: float, rate: float | None) -> float | None:
        return amount / seconds / rate if rate else None

    mbu, mfu = share(moved, machine.gbs * 1e9), share(work, machine.tops * 1e12)
    spec = [s for s in (share(moved, _times(machine.spec_gbs, 1e9)), share(work, _times(machine.spec_tops, 1e12))) if s]
    best = max(mbu or 0.0, mfu or 0.0)
    bound = "mem" if (mbu or 0.0) >= (mfu or 0.0) else "compute"
    if not found.graph and model.device.type == "cuda" and best < _LAUNCH:
        bound = "launch"
    return {
        "bytes": int(moved),
        "flops": int(work),
        "bound": bound,
        "mbu": mbu,
        "mfu": mfu,
        "pct_of_roof": 100 * best,
        "pct_of_spec": 100 * max(spec) if spec else None,
    }


def _times(value: float | None, unit: float) -> float | None:
    return None if value is None else value * unit
