"""`percard calibrate-kv`: how few bytes each layer's cache may have, measured, and written beside the checkpoint.

The text is cut into windows that take turns: one to learn from, one to judge on. On the first kind every key channel's mean
is taken (the offset), then each layer alone is held in each spec, with the offset and without. From these figures follows a
row of plans, from the fewest bytes to all layers as they are, each step the one that buys the most KL for a byte. The plan
that is written is the cheapest whose KL, measured on the other windows with all layers at once, stays within the budget.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import __version__, console, hub
from .bench import card, engine, kv_quality
from .bench.engine import kv as kinds
from .bench.kv_quality import Held, Judge
from .bench.quality import Quality
from .formats.checkpoint import Checkpoint
from .formats.kv_layers import UNFINISHED, KVLayers, refuse_existing
from .formats.kvcache import BF16, KVSpec
from .formats.spec import FormatError
from .quant import heldout
from .quant.journal import Journal, machine, source_mark
from .quant.progress import Callback, Meter

if TYPE_CHECKING:
    from rich.console import RenderableType

    from .bench.engine import Config, Model

SPECS = ("int8", "k8v4", "int4")
BUDGET = 0.002  # nats a token: a fifth of what the gate of 8-bit weights allows
TOKENS = 8192
LONGEST = 2048  # tokens of a window
SHORTEST = 16
HELPS = 0.95  # an offset is kept where it brings the KL to this share or below; less is chance
_TRIES = 4  # plans that are measured, as the progress expects it


@dataclass(frozen=True)
class Choice:
    """A way to hold a layer: spec, whether keys have an offset, bytes per token, KL in nats a token of that layer alone.

    `kl_without` and `kl_with`: without an offset and with it; `kl` is that of the one chosen.
    """

    spec: KVSpec
    offset: bool
    bytes: int
    kl: float
    kl_without: float = 0.0
    kl_with: float = 0.0


Plan = tuple[Choice, ...]  # a choice per layer


@dataclass(frozen=True, eq=False)
class KVCalibration:
    """What a run found. `plan`: the choice per layer; `quality`: the plan's, on windows that nothing was learnt from.

    `options`: by layer what each spec gave alone; `tried`: plans that were measured on the way; `uniform`: every layer in one
    spec, with offsets where they help; `whole`: bytes per token of the cache as it is. A dry run has `facts` only.
    """

    folder: Path
    facts: dict[str, Any]
    whole: int
    plan: Plan = ()
    quality: Quality | None = None
    options: tuple[tuple[Choice, ...], ...] = ()
    tried: tuple[dict[str, float], ...] = ()
    uniform: dict[str, Quality] = field(default_factory=dict)
    files: tuple[Path, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """`record` with the folder and what was written."""
        return {"folder": str(self.folder), "files": [str(path) for path in self.files], **self.record()}

    def record(self) -> dict[str, Any]:
        """All that was measured, as it stands in percard_kv.json."""
        if self.quality is None:
            return dict(self.facts)
        return self.facts | {
            "protocol": self.quality.protocol,
            "perplexity_as_it_is": self.quality.perplexity_reference,
            "bytes_per_token_as_it_is": self.whole,
            "calibrated": {"bytes_per_token": _bytes(self.plan)} | _figures(self.quality),
            "all_layers": {
                name: {"bytes_per_token": sum(c.bytes for row in self.options for c in row if str(c.spec) == name)}
                | _figures(quality)
                for name, quality in self.uniform.items()
            },
            "tried": list(self.tried),
            "layers": [
                {"spec": str(c.spec), "offset": c.offset, "bytes_per_token": c.bytes, "kl_alone": c.kl}
                | {"kl": {str(o.spec): {"without": o.kl_without, "with_offset": o.kl_with} for o in row}}
                for c, row in zip(self.plan, self.options, strict=True)
            ],
        }

    def show(self) -> list[RenderableType]:
        """A row per layer, a row per spec for all of them, and what was written."""
        f = self.facts
        if self.quality is None:
            return [
                f"{self.folder}: {f['layers_of_model']} layers, {', '.join(f['specs'])} with and without an offset, on "
                f"{f['tokens']} tokens in windows of {f['window']}: about {f['passes']:.0f} times the work of reading them once",
                "nothing was run or written",
            ]
        from rich.table import Table

        names = [str(c.spec) for c in self.options[0]]
        layers = Table("layer", "spec", "offset", "KL alone", "bytes", *[f"{n}: KL, with offset" for n in names])
        for i, (choice, row) in enumerate(zip(self.plan, self.options, strict=True)):
            each = [f"{o.kl_without:.1e}  {o.kl_with:.1e}" for o in row]
            offset = "yes" if choice.offset else ""
            layers.add_row(str(i), str(choice.spec), offset, f"{choice.kl:.1e}", str(choice.bytes), *each)
        sums = Table("all layers", "KL", "top-1", "perplexity", "change", "bytes per token", "of as it is")
        perplexity = f"{self.quality.perplexity_reference:.3f}"
        sums.add_row("as it is", "0", "100.0%", perplexity, "", str(self.whole), "100%")
        said = self.record()
        for name, row in {**said["all_layers"], "calibrated": said["calibrated"]}.items():
            size = row["bytes_per_token"]
            words = (f"{row['kl']:.2e}", f"{row['top1']:.1%}", f"{row['perplexity']:.3f}")
            sums.add_row(name, *words, f"{row['perplexity_change']:+.3%}", str(size), f"{size / self.whole:.0%}")
        kept = f"KL {self.quality.kl:.2e} of a budget of {f['budget']:g}, {len(self.tried)} plans measured"
        wrote = " and ".join(path.name for path in self.files)
        return [layers, sums, self.quality.protocol, kept, f"{self.folder}: wrote {wrote}"]


def calibrate(
    path: str | Path,
    text: str | Path,
    *,
    budget: float = BUDGET,
    specs: Sequence[str] = SPECS,
    tokens: int = TOKENS,
    force: bool = False,
    dry_run: bool = False,
    progress: Callback | None = None,
) -> KVCalibration:
    """Chooses a cache spec per layer of the checkpoint `path` on the first `tokens` of `text`, and writes it there.

    `budget` is the KL in nats a token that all layers together may cost; `specs` are tried besides leaving a layer as it is.
    On a CPU 16-bit weights compute in fp32: activations that are rounded there cost as much as int8 pages do. ValueError for
    a budget that is none, FormatError for an unknown spec, a text too short, a calibration that is there (unless `force`), a
    checkpoint that cannot be read. Nothing is written before the end but what single layers measured, with which the same
    call goes on after it was cut.
    """
    if not budget >= 0:
        raise ValueError(f"--budget {budget} is no KL; give nats a token, such as {BUDGET}")
    wanted = _parsed(specs)
    folder = hub.source(path)
    if not force and not dry_run:
        refuse_existing(folder)
    config = engine.load_config(folder)
    held = heldout.read(text, folder, config.vocab, min(LONGEST, config.context), tokens)
    learn, judged_on = _windows(held)
    facts = _facts(held, learn, judged_on, config, wanted, budget)
    whole = config.layers * _bytes_of(BF16, config)
    kinds.of((wanted[0],) * config.layers, config, str(folder))  # whether this model's heads fit
    if dry_run:
        return KVCalibration(folder, facts, whole)
    on_cpu = card.default_device().type == "cpu"
    wish = {k: v for k, v in facts.items() if k != "budget"} | {
        "source": source_mark(Checkpoint.open(folder)),
        "fp32": on_cpu,
    }
    journal = _journal(folder / UNFINISHED, wish | machine(), 2 * len(wanted))  # fails now where nothing can be written
    try:
        model = engine.load(folder, dtype=torch.float32 if on_cpu else None)
        meter = Meter("calibrate", round(facts["passes"] * config.layers * len(learn)), progress, "blocks")
        offsets = kv_quality.key_offsets(model, learn, meter.add)
        options = _alone(model, learn, wanted, offsets, meter, journal)
        judge = Judge(model, judged_on, meter.add)

        def measure(plan: Plan) -> Quality:
            meter.total = max(meter.total, meter.done + config.layers * len(judged_on))
            return judge([Held(c.spec, offsets[i] if c.offset else None) for i, c in enumerate(plan)])

        uniform = {str(spec): measure(tuple(row[n] for row in options)) for n, spec in enumerate(wanted)}
        plan, quality, tried = choose([hull(row, _bytes_of(BF16, config)) for row in options], budget, measure)
        meter.add(meter.total - meter.done, "all layers at once")
    except BaseException as error:
        if not journal.entries:
            journal.path.unlink(missing_ok=True)
        elif isinstance(error, KeyboardInterrupt | OSError):
            error.add_note(f"{len(journal.entries)} measured layers are kept: the same command goes on")
        raise
    done = KVCalibration(folder, facts, whole, plan, quality, options, tried, uniform)
    mu = tuple(offsets[i].cpu() if c.offset else None for i, c in enumerate(plan))
    said = console.plain_data(done.record())
    found = KVLayers(tuple(c.spec for c in plan), mu, config.kv_heads, config.head_dim, said)
    done = replace(done, files=found.save(folder, force=force))
    journal.path.unlink()
    return done


def hull(options: Sequence[Choice], whole: int) -> Plan:
    """The choices of a layer that are ever worth it, fewest bytes first; the last leaves it as it is, in `whole` bytes.

    They are the lower convex hull of KL over bytes: what lies above it is never the best, whatever other layers take.
    """
    found: list[Choice] = []
    usable = [c for c in options if c.kl == c.kl and c.bytes < whole]  # a NaN is no choice
    for choice in sorted([*usable, Choice(BF16, False, whole, 0.0)], key=lambda c: (c.bytes, c.kl)):
        if found and choice.kl >= found[-1].kl and choice.bytes < whole:
            continue
        while len(found) > 1 and _gain(found[-2], choice) >= _gain(found[-2], found[-1]):
            found.pop()
        found.append(choice)
    return tuple(found)


def choose(
    hulls: Sequence[Plan], budget: float, measure: Callable[[Plan], Quality]
) -> tuple[Plan, Quality, tuple[dict[str, float], ...]]:
    """The cheapest of the plans in a row whose measured KL is within `budget`: (plan, its quality, plans that were measured).

    The row goes from the fewest bytes to all layers as they are, each step the best gain of KL for a byte that is left.
    The first guess adds up what layers cost alone; from there on measurements decide, by steps that double and then halve.
    All layers as they are cost nothing, so there is always an answer.
    """
    steps = [(_gain(a, b), -layer, b) for layer, row in enumerate(hulls) for a, b in itertools.pairwise(row)]
    steps.sort(key=lambda step: (step[0], step[1]), reverse=True)
    plan = [row[0] for row in hulls]
    plans = [tuple(plan)]
    for _, layer, choice in steps:
        plan[-layer] = choice
        plans.append(tuple(plan))
    found: dict[int, Quality] = {}
    tried = []

    def holds(at: int) -> bool:
        found[at] = measure(plans[at])
        alone = sum(c.kl for c in plans[at])
        tried.append({"bytes_per_token": _bytes(plans[at]), "kl": found[at].kl, "kl_added_up": alone})
        return found[at].kl <= budget

    low, high = -1, len(plans) - 1  # the plan at low fails, the one at high holds
    at, step = next(i for i, p in enumerate(plans) if sum(c.kl for c in p) <= budget), 1
    while high - low > 1:
        if low < at < high:
            if holds(at):
                high, at = at, at - step
            else:
                low, at = at, at + step
            step *= 2
        else:
            at, step = (low + high) // 2, len(plans)
    if high not in found:
        holds(high)
    return plans[high], found[high], tuple(tried)


def _gain(a: Choice, b: Choice) -> float:
    """KL that goes for each byte more from a to b."""
    return (a.kl - b.kl) / (b.bytes - a.bytes)


def _alone(
    model: Model,
    pieces: Sequence[torch.Tensor],
    specs: Sequence[KVSpec],
    offsets: Sequence[torch.Tensor],
    meter: Meter,
    journal: Journal,
) -> tuple[tuple[Choice, ...], ...]:
    """Per layer a Choice for each spec, by the KL of that layer alone over `pieces`; what the journal knows is not run again."""
    candidates = [[Held(spec, mu) for spec in specs for mu in (None, offset)] for offset in offsets]
    layers = len(offsets)
    known = {(entry["window"], entry["layer"]): entry["kl"] for entry in journal.entries}
    sums = torch.zeros(layers, 2 * len(specs), dtype=torch.float64)
    for number, piece in enumerate(pieces):
        left = [[] if (number, layer) in known else candidates[layer] for layer in range(layers)]
        meter.skip(sum((layers - i) * len(candidates[i]) for i, row in enumerate(left) if not row))
        if not any(left):
            meter.skip(layers)
        else:
            for layer, found in enumerate(kv_quality.by_layer(model, piece, left, meter.add)):
                if found:
                    known[number, layer] = found
                    journal.add({"window": number, "layer": layer, "kl": found})
        sums += torch.tensor([known[number, layer] for layer in range(layers)], dtype=torch.float64)
    means = (sums / sum(len(piece) - 1 for piece in pieces)).view(layers, len(specs), 2).tolist()
    return tuple(
        tuple(
            _best(spec, without, with_, _bytes_of(spec, model.config))
            for spec, (without, with_) in zip(specs, row, strict=True)
        )
        for row in means
    )


def _journal(path: Path, wish: dict[str, Any], width: int) -> Journal:
    """What an earlier run of the same wish has measured, `width` sums a line; of another wish, or not to be read: nothing."""
    try:
        found = Journal(path, wish)
        if all(_is_entry(entry, width) for entry in found.entries):
            return found
    except FileExistsError:
        pass
    path.unlink()
    return Journal(path, wish)


def _is_entry(entry: dict[str, Any], width: int) -> bool:
    sums = entry.get("kl")
    if not isinstance(sums, list) or len(sums) != width or not all(isinstance(x, float) for x in sums):
        return False
    return all(type(entry.get(key)) is int for key in ("window", "layer"))


def _best(spec: KVSpec, without: float, with_: float, size: int) -> Choice:
    offset = with_ <= HELPS * without
    return Choice(spec, offset, size, with_ if offset else without, without, with_)


def _parsed(names: Sequence[str]) -> tuple[KVSpec, ...]:
    """Specs without bf16, which is always a choice."""
    found = tuple(dict.fromkeys(KVSpec.parse(name) for name in names))
    found = tuple(spec for spec in found if spec.quantised)
    if not found:
        raise FormatError("--specs names no spec that is rounded; give some of int8, k8v4, int4, k8v4-sym, int4-sym")
    return found


def _windows(text: heldout.HeldOut) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(to learn from, to judge on): windows of one length that take turns."""
    window = min(text.window, len(text.ids) // 2)
    if window < SHORTEST:
        raise FormatError(f"{text.name}: {len(text.ids)} tokens; two windows of {SHORTEST} are needed at least")
    pieces = [piece for piece in text.ids.split(window) if len(piece) == window]
    return pieces[0::2], pieces[1::2]


def _facts(
    text: heldout.HeldOut,
    learn: Sequence[torch.Tensor],
    judge: Sequence[torch.Tensor],
    config: Config,
    specs: Sequence[KVSpec],
    budget: float,
) -> dict[str, Any]:
    """What is known before the first block runs. `passes`: work, in times that the windows to learn from are read once."""
    each = 2 * len(specs) * (config.layers + 1) / 2  # a layer's candidates run the blocks from it on
    passes = 2 + each + (1 + len(specs) + _TRIES) * len(judge) / len(learn)
    return {
        "percard": __version__,
        "text": text.name,
        "text_sha256": text.sha256,
        "tokens": sum(len(piece) for piece in (*learn, *judge)),
        "window": len(learn[0]),
        "windows_learnt_from": len(learn),
        "windows_judged_on": len(judge),
        "layers_of_model": config.layers,
        "specs": [str(spec) for spec in specs],
        "budget": budget,
        "passes": round(passes, 1),
    }


def _bytes_of(spec: KVSpec, config: Config) -> int:
    return spec.bytes_per_token(config.head_dim, config.kv_heads, config.dtype)


def _bytes(plan: Plan) -> int:
    return sum(choice.bytes for choice in plan)


def _figures(quality: Quality) -> dict[str, float]:
    return {
        "kl": quality.kl,
        "top1": quality.top1,
        "perplexity": quality.perplexity,
        "perplexity_change": quality.perplexity_rise,
    }
