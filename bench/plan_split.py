"""Which splits over cards a checkpoint can carry, said before anybody loads it.

    heads, vocabulary and, unless they are copied, key-value heads divide by TP
    row-parallel (o_proj, down_proj)      inputs / TP is a multiple of the group, of an fp8 block (128), of a packed word
    column-parallel (q k v gate up)       outputs / TP is a multiple of the fp8 block, and of 8
    expert parallel                       experts / EP is whole; an expert is not cut then

The arithmetic of groups is that of formats/shard.py. Field reports behind the rules: vllm#17569 and #25292 (experts of Qwen3),
sglang#3345 (DeepSeek-R1 in fp8 blocks), vllm#13640 (Qwen2.5-72B), QwenLM/Qwen3-Coder#449 (six cards).
"""

from __future__ import annotations

from collections.abc import Iterator

from ..formats import shard
from ..formats.spec import FormatError, QuantSpec
from .plan import Split
from .plan_parts import BLOCK, Shape

_WORD = 8  # outputs of 4-bit weights that share a packed word; kernels take rows by eight as well


def splits(shape: Shape, spec: QuantSpec | None, cards: int) -> tuple[list[Split], list[str]]:
    """(splits that work, in the order of trust; why the others do not), for `cards` cards that hold the model once.

    TP with experts cut by row, then with whole experts (EP); for a latent cache each again with attention by request.
    """
    found, refusals = [], []
    for ep in (False, True) if shape.experts and cards > 1 else (False,):
        wrong = list(problems(shape, spec, cards, ep=ep))
        if not wrong:
            found.append(Split(cards, ep))
            break
        refusals += [line for line in wrong if line not in refusals]
    if shape.latent and cards > 1:
        found += [Split(split.cards, split.ep, attention_dp=True) for split in found]
    return found, refusals


def problems(shape: Shape, spec: QuantSpec | None, tp: int, *, ep: bool = False) -> Iterator[str]:
    """Why `tp` cards cannot hold the model in `spec` (None = 16-bit), a line each with what was found and a remedy."""
    for what, size in (("heads", shape.heads), ("vocabulary", shape.vocab)):
        if size % tp:
            yield f"{what} {size} does not divide by TP {tp}; take one of {_divisors(shape.heads, shape.vocab)} cards"
    if not shape.latent and shape.kv_heads % tp and tp % shape.kv_heads:
        yield f"{shape.kv_heads} KV heads can neither be split nor copied over TP {tp}; take {_divisors(shape.kv_heads)}"
    if ep and shape.experts % tp:
        yield f"{shape.experts} experts do not divide by EP {tp}; take one of {_divisors(shape.experts)}"
    rows = [*shape.splits]
    if shape.heads % tp == 0:
        rows.append(("heads x head size", shape.heads * shape.v_head_dim, "attention"))
    for name, size, kind in rows:
        if ep and kind == "experts":
            continue
        yield from _cut(shape, spec, tp, name, size, kind)


def whole_groups(shape: Shape, spec: QuantSpec | None) -> Iterator[str]:
    """Why a spec cannot be written at all: an input size that no group divides."""
    if spec is None:
        return
    for part in shape.parts:
        for linear in part.linears:
            try:
                if spec.float_format != "fp8-block":
                    spec.groups(linear.into)
            except FormatError as error:
                yield f"{part.name} {linear.name}: {error}"
                return


def _cut(shape: Shape, spec: QuantSpec | None, tp: int, name: str, size: int, kind: str) -> Iterator[str]:
    """A size that row-parallel linears take in, and column-parallel ones give out."""
    if spec is None:
        if size % tp:
            yield f"{name} {size} does not divide by TP {tp}; take one of {_divisors(size)}"
        return
    group, step = shard.group_of(spec), BLOCK if spec.float_format == "fp8-block" else _WORD
    if shard.fits(size, spec, tp) and size % (step * tp) == 0:
        return
    need = group if not shard.fits(size, spec, tp) else step
    remedies = []
    smaller = [tp_ for tp_ in range(tp - 1, 0, -1) if tp % tp_ == 0 and size % (max(group, step) * tp_) == 0]
    if kind == "experts" and shape.experts % tp == 0:
        remedies.append(f"expert parallel (TP{tp} EP{tp}: {shape.experts // tp} whole experts a card)")
    if kind != "attention":
        to = -(-size // (need * tp)) * need * tp
        more = 100 * (to - size) / size
        remedies.append(f"padding it to {to} (+{more:.2g} %)" if more < 10 else f"padding it to {to} (+{more:.0f} %)")
    if spec.group is not None:
        fits = [g for g in sorted(shard.GROUPS, reverse=True) if g < group and size % (g * tp) == 0]
        remedies += [f"down_proj with g{fits[0]}" if kind != "attention" else f"o_proj with g{fits[0]}"] if fits else []
    if smaller:
        remedies.append(f"TP {smaller[0]}")
    yield (
        f"{name} {size} / TP {tp} = {size / tp:g} is not a multiple of {need}; "
        f"take {', or '.join(remedies) if remedies else 'another spec'}"
    )


def _divisors(*sizes: int) -> str:
    return ", ".join(str(n) for n in range(1, 65) if all(size % n == 0 for size in sizes))
