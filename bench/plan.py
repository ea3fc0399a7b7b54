"""What a model takes of cards, in bytes and seconds: pure formulas over a Shape, a Card and a demand. No weights, no device.

    usable      = util x memory - overhead, a card                       memory as the driver reports it where that is known
    weights     = quantised linears x (bits/8 + scales) + 2 x all other parameters
    kv tokens   = (cards x usable - weights) / (kv a token x copies)     copies: TP ranks that hold the same keys
    experts hit = E x (1 - (1 - k/E)^B)                                  uniform routing
    t_mem       = (weights a step reads + B x context x kv a token x copies) / (cards x bandwidth x e_bw)
    t_flop      = 2 x active parameters x B / (cards x rate(spec) x e_fl)
    t_comm      = layers x 2 x (2(n-1)/n x B x hidden x 2 bytes / link + 10 us)
    step        = max(t_mem, t_flop) + t_comm;   tokens/s/card = B / step / cards;   tokens/s/user = 1 / step

The two shares e_bw and e_fl come from bench/efficiency.py: measured where records were fitted, else labelled defaults. The
weights a step reads leave out what it does not: the input table, the vision tower, MTP layers. A latent cache (MLA) reads little
and computes much, so its attention is counted in t_flop, at the bf16 rate; for keys and values by head it is not, as reading them costs more.
Design: docs/plan.md. The forms are those of public planners (ai-dynamo/aiconfigurator, cli99/llm-analysis), written anew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..formats.kvcache import KVSpec
from ..formats.spec import FormatError, QuantSpec
from . import efficiency
from .card_table import Card, rate_field
from .plan_parts import Shape, kv_bytes_per_token

UTIL, OVERHEAD_GB = 0.90, 2.0
NODE = 8  # cards of one host; beyond it the network is the link
NETWORK_BYTES_S = 50e9  # one way a card between hosts: 400 Gbit/s, an assumption
HOP_S = 10e-6  # of one all-reduce, whatever its size
DISPUTED = (0.8, 1.2)  # a disputed row or field multiplies the ends of the band

Find = Callable[[str, str, "int | None"], efficiency.Efficiency]


@dataclass(frozen=True)
class Split:
    """How a model lies on `cards`: tensor parallel over all, experts by row or whole (`ep`), latent attention copied or by request."""

    cards: int = 1
    ep: bool = False
    attention_dp: bool = False

    def __str__(self) -> str:
        words = f"TP{self.cards}"
        words += f" EP{self.cards}" if self.ep else ""
        return words + (" DPA" if self.attention_dp else "")


ONE = Split()


@dataclass(frozen=True)
class Memory:
    """Bytes over all cards: what may be used, weights (copies included), what is left for the cache; `per_token` of it with copies."""

    usable: float
    weights: float
    per_token: float

    @property
    def left(self) -> float:
        return self.usable - self.weights

    @property
    def tokens(self) -> int:
        """Tokens of cache that fit; 0 when the weights do not."""
        return max(0, int(self.left / self.per_token))


@dataclass(frozen=True)
class Step:
    """Predicted seconds of one decode step or one prefill, and what they are made of. `bound`: memory, compute or links.

    `bytes` and `flops` over all cards; `shares` the two efficiencies; `basis` and `band` of a rate (tokens/s) made of it: the
    truth is expected between rate x (1 + band[0]) and rate x (1 + band[1]). `sources` says where each figure is from.
    """

    seconds: float
    mem: float
    flop: float
    comm: float
    bytes: float
    flops: float
    shares: tuple[float, float]
    basis: str
    band: tuple[float, float]
    sources: tuple[tuple[str, str], ...]

    @property
    def bound(self) -> str:
        if self.comm > max(self.mem, self.flop):
            return "links"
        return "memory" if self.mem >= self.flop else "compute"


def weight_bytes(
    shape: Shape, spec: QuantSpec | None, *, mtp: bool = True, head: str = "16bit", plain: float = 2.0
) -> float:
    """Bytes of all weights, once. `head` "int8-row": one byte a weight and a scale a row (an engine of ours holds it so).

    A tied head in int8 stands beside the 16-bit table that tokens are looked up in.
    """
    total = sum(part.nbytes(spec, plain) for part in shape.parts if mtp or part.name != "mtp")
    if spec is not None and head == "int8-row":
        total += _head_bytes(shape, head, plain) - (0 if shape.tied else plain * shape.head_params)
    return total


def memory(
    shape: Shape,
    spec: QuantSpec | None,
    kv: KVSpec,
    card: Card,
    split: Split,
    *,
    util: float = UTIL,
    overhead_gb: float = OVERHEAD_GB,
    mtp: bool = True,
    weights: float | None = None,
) -> Memory:
    """What fits. `weights`: exact bytes of a checkpoint, in place of those that the formula says."""
    held = weight_bytes(shape, spec, mtp=mtp) if weights is None else weights
    if split.attention_dp:
        held += (split.cards - 1) * shape.part("attention").nbytes(spec)
    usable = split.cards * (util * card.memory - overhead_gb * 1e9)
    return Memory(usable, held, kv_bytes_per_token(shape, kv) * copies(shape, split))


def copies(shape: Shape, split: Split) -> float:
    """How often a token's keys and values are held: heads are copied where TP has more ranks than heads, a latent on every rank."""
    if split.attention_dp:
        return 1.0
    return float(split.cards) if shape.latent else max(1.0, split.cards / shape.kv_heads)


def experts_hit(shape: Shape, tokens: float) -> float:
    """The share of experts that `tokens` tokens meet when each takes any with equal chance."""
    return 1.0 - (1.0 - shape.per_token / shape.experts) ** tokens if shape.experts else 1.0


def predict_decode(
    shape: Shape,
    spec: QuantSpec | None,
    kv: KVSpec,
    batch: int,
    depth: float,
    card: Card,
    *,
    split: Split = ONE,
    head: str = "16bit",
    plain: float = 2.0,
    find: Find = efficiency.find,
) -> Step:
    """Seconds of one step of `batch` sequences that hold `depth` tokens each; every one of them gets a token.

    spec None = 16-bit weights. `plain`: bytes of a number that is not quantised, 4 where an engine holds fp32 (then for the
    cache as well). `head` "int8-row" as weight_bytes. `find(card id, "decode.<spec>", batch)` gives the shares, by default the
    fitted rows of the package. FormatError when the card has no rate for the spec, or sizes are out of range.
    """
    _sane(batch=batch, depth=depth)
    kv_token = kv_bytes_per_token(shape, kv, int(plain)) * copies(shape, split)
    weights = _read(shape, spec, batch, head, plain, split)
    moved = weights + batch * depth * kv_token
    flops, attention = 2.0 * shape.active * batch, 0.0
    if shape.latent:  # absorbed form: scores over the latent and rope, values over the latent, for every query head
        rank = shape.raw.get("kv_lora_rank") or shape.latent
        attention = 2.0 * shape.layers * shape.heads * (shape.latent + rank) * batch * depth
    return _step(shape, spec, "decode", batch, moved, flops, attention, card, split, find)


def predict_prefill(
    shape: Shape,
    spec: QuantSpec | None,
    kv: KVSpec,
    batch: int,
    prompt: int,
    card: Card,
    *,
    split: Split = ONE,
    head: str = "16bit",
    plain: float = 2.0,
    find: Find = efficiency.find,
) -> Step:
    """Seconds until `batch` prompts of `prompt` tokens have gone through all layers at once and the first token is there.

    Parameters as predict_decode; shares of "prefill.<spec>" at batch x prompt tokens. Attention is causal and multiplies at
    the bf16 rate, with a share of its own ("attention.prefill") where one was fitted; the head is applied to the last token of each prompt only.
    """
    _sane(batch=batch, depth=prompt)
    tokens = batch * prompt
    kv_token = kv_bytes_per_token(shape, kv, int(plain)) * copies(shape, split)
    moved = _read(shape, spec, tokens, head, plain, split) + tokens * kv_token
    flops = 2.0 * ((shape.active - shape.head_params) * tokens + shape.head_params * batch)
    attention = batch * shape.layers * shape.heads * (shape.head_dim + shape.v_head_dim) * float(prompt) ** 2
    return _step(shape, spec, "prefill", tokens, moved, flops, attention, card, split, find)


def turning_points(
    shape: Shape, spec: QuantSpec | None, card: Card, shares: tuple[float, float] = (1.0, 1.0)
) -> tuple[float, float | None]:
    """(rows where linears of `spec` become compute-bound, rows from where they gain nothing over bf16; None = they always gain).

    Rows M of one linear: time a weight = max(bytes / bandwidth, 2 M / rate), for the spec and for bf16. For experts M is the
    tokens that one expert gets, batch x k / E. `shares` = (e_bw, e_fl) of both; (1, 1) = the roofs themselves.
    """
    rate, plain_rate = _rate(card, spec), _rate(card, None)
    bandwidth = card.bandwidth_gbs * 1e9 * shares[0]
    linears = [linear for part in shape.parts if part.steps for linear in part.linears]
    params = sum(linear.params for linear in linears)
    bytes_each = sum(part.nbytes(spec) - 2 * part.other for part in shape.parts if part.steps) / params
    bound_from = rate * shares[1] * bytes_each / (2 * bandwidth)
    if rate > plain_rate:
        return bound_from, None
    return bound_from, rate * shares[1] / bandwidth


def _read(shape: Shape, spec: QuantSpec | None, tokens: float, head: str, plain: float, split: Split) -> float:
    """Bytes of weights that a step over `tokens` tokens reads, over all cards."""
    found = _head_bytes(shape, head if spec is not None else "16bit", plain)
    for part in shape.parts:
        if part.steps and part.name != "head":
            hit = experts_hit(shape, tokens) if part.name == "experts" else 1.0
            times = split.cards if split.attention_dp and part.name == "attention" else 1
            found += part.nbytes(spec, plain) * hit * times
    return found


def _head_bytes(shape: Shape, head: str, plain: float) -> float:
    return shape.head_params + 2.0 * shape.vocab if head == "int8-row" else plain * shape.head_params


def _step(
    shape: Shape,
    spec: QuantSpec | None,
    level: str,
    tokens: int,
    moved: float,
    flops: float,
    attention: float,
    card: Card,
    split: Split,
    find: Find,
) -> Step:
    """`flops` at the rate of the spec, `attention` at that of bf16."""
    found = find(card.id, efficiency.name(level, spec), tokens)
    bandwidth = card.bandwidth_gbs * 1e9
    mem = moved / (split.cards * bandwidth * found.e_bw)
    e_att, words = found.e_fl, ""
    if attention and (apart := find(card.id, "attention.prefill", tokens)).basis_fl in ("measured", "interpolated"):
        # Where layers were measured: its small products and what stands between them reach less than linears do.
        e_att, words = apart.e_fl, f"; attention of prompts {apart.e_fl:.3f}: {apart.source}"
    flop = (flops / (_rate(card, spec) * found.e_fl) + attention / (_rate(card, None) * e_att)) / split.cards
    comm, link = _comm(shape, tokens, card, split.cards)
    bound = "mem" if mem >= flop else "flop"
    basis, band = found.term(bound)
    field = "bandwidth_gbs" if bound == "mem" else rate_field(spec)
    if basis == "brochure" and card.doubtful(field):
        band = ((1 + band[0]) * DISPUTED[0] - 1, (1 + band[1]) * DISPUTED[1] - 1)
    sources = (
        ("bandwidth", f"{card.bandwidth_gbs:g} GB/s{_doubt(card, 'bandwidth_gbs')}"),
        ("rate", f"{_rate(card, spec) / 1e12:g} TOPS ({rate_field(spec)}){_doubt(card, rate_field(spec))}"),
        ("shares", f"e_bw {found.e_bw:.2f}, e_fl {found.e_fl:.2f}: {found.source}{words}"),
        ("link", link),
    )
    return Step(
        max(mem, flop) + comm,
        mem,
        flop,
        comm,
        moved,
        flops + attention,
        (found.e_bw, found.e_fl),
        basis,
        band,
        sources,
    )


def _comm(shape: Shape, tokens: int, card: Card, cards: int) -> tuple[float, str]:
    if cards == 1:
        return 0.0, "one card: nothing is sent"
    link, words = card.link()
    if cards > NODE:
        link, words = min(link, NETWORK_BYTES_S), f"assumed: more than {NODE} cards, a 400 Gbit/s network"
    seconds = shape.layers * 2 * (2 * (cards - 1) / cards * tokens * shape.hidden * 2 / link + HOP_S)
    return seconds, f"{link / 1e9:g} GB/s one way ({words}), 10 us a hop"


def _rate(card: Card, spec: QuantSpec | None) -> float:
    found = card.rate(spec)
    if found is None:
        field = rate_field(spec)
        kinds = "fp8" if field == "fp8_tflops" else "int8"
        raise FormatError(f"{card.id}: no {kinds} rate ({field}), which {spec} multiplies at; take w4a16-g128 or w8a16")
    return found[0]


def _doubt(card: Card, field: str) -> str:
    words = ["not checked against a vendor document"] if field in card.unverified else []
    others = dict(card.alternatives).get(field)
    words += [f"others publish {', '.join(f'{v:g}' for v in others)}"] if others else []
    return f" ({'; '.join(words)})" if words else ""


def _sane(batch: int, depth: float) -> None:
    if not 1 <= batch <= 1_000_000:
        raise FormatError(f"batch is {batch}, expected 1 to 1000000 sequences")
    if not 0 <= depth <= 1_000_000_000:
        raise FormatError(f"context is {depth}, expected 0 to 1e9 tokens")
