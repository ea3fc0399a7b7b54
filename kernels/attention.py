"""What the attentions over pages share: their arguments, the checks of them, their meaning, and what errors act on.

    q'   q as it is, or over quantised pages codes * absmax / 127, codes = round_half_even(q * (127 / absmax)) by row
    s[t] = scale * (q' . k'[t] + q . mu)              k', v' what the bytes of the pages mean (formats/kvcache.py)
    s[t] = softcap * tanh(s[t] / softcap)             where softcap is not 0
    lse  = log(sum_t e^s[t] + e^sink)                 without a sink for the head: its term is left out
    out  = sum_t e^(s[t] - lse) v'[t]

Query i of n, of a sequence of S keys, stands at position S - n + i and sees keys up to its own; with a window of W the last W of
them. A query that sees nothing gives zeros, and an lse of -infinity, or its sink.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from ..formats.kvcache import KVPages, check_pages, check_values, pages_as, pages_of, parse_form, read, table_row
from .op import DTYPE_CODES, Unsupported, rows_contiguous
from .weight import check_place, ulp

MOST = 256  # numbers of a head
TILE = 64  # keys that the C++ bodies take at once
FIELDS = (
    "Tensor q, Tensor k_pages, Tensor v_pages, Tensor? k_scales, Tensor? v_scales, Tensor? mu, Tensor table,"
    " Tensor? table_starts, Tensor lengths, Tensor? q_starts, Tensor? sinks, float scale, int max_q_len, int max_kv_len,"
    " int window, float softcap, int q_bits, bool deterministic, bool with_lse, str form"
)
Outputs = tuple[torch.Tensor, torch.Tensor]
Maybe = torch.Tensor | None
Given = tuple[torch.Tensor, torch.Tensor] | None  # values [sum S, Hkv, D] and starts [B + 1], in place of the pages'


class Attention(NamedTuple):
    """The flat arguments that decode and prefill have in common, in the order of FIELDS.

    q [T, Hq, D] bf16 | fp16 | fp32. k_pages, v_pages, their scale words, mu and form: formats/kvcache.py. table int32 [B, pages], or
    with table_starts int32 [B + 1] its pieces in one row. lengths int32 [B]. q_starts int32 [B + 1], None: max_q_len tokens of each.
    sinks fp32 [Hq]. window -1: none. q_bits 8: queries are rounded over quantised pages, 16: they are not.
    """

    q: torch.Tensor
    k_pages: torch.Tensor
    v_pages: torch.Tensor
    k_scales: Maybe
    v_scales: Maybe
    mu: Maybe
    table: torch.Tensor
    table_starts: Maybe
    lengths: torch.Tensor
    q_starts: Maybe
    sinks: Maybe
    scale: float
    max_q_len: int
    max_kv_len: int
    window: int
    softcap: float
    q_bits: int
    deterministic: bool
    with_lse: bool
    form: str

    @property
    def batch(self) -> int:
        return self.lengths.shape[0]

    @property
    def group(self) -> int:
        """Query heads of one key head."""
        return self.q.shape[1] // self.k_pages.shape[1]

    @property
    def quantised(self) -> bool:
        return parse_form(self.form).spec.quantised

    @property
    def rounds_q(self) -> bool:
        """Whether queries become int8."""
        return self.quantised and self.q_bits == 8

    @property
    def pages(self) -> KVPages:
        return pages_as(self.form, self.k_pages, self.v_pages, self.k_scales, self.v_scales, self.mu)


def flat_of(
    q: torch.Tensor,
    pages: KVPages,
    table: torch.Tensor,
    lengths: torch.Tensor,
    max_kv_len: int,
    max_q_len: int,
    *,
    q_starts: Maybe,
    table_starts: Maybe,
    scale: float | None,
    window: int,
    sinks: Maybe,
    softcap: float,
    q_bits: int,
    deterministic: bool,
    with_lse: bool,
) -> Attention:
    """The public arguments of an attention as flat ones; `scale` None is D^-0.5."""
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    return Attention(
        rows_contiguous(q), pages.k, pages.v, *pages.words, pages.mu, table, table_starts, lengths, q_starts, sinks,
        scale, max_q_len, max_kv_len, window, float(softcap), q_bits, deterministic, with_lse, pages.form,
    )  # fmt: skip


def check(op: str, a: Attention) -> None:
    """Raises what is wrong with the arguments, with names; looks at shapes, types and strides only."""
    if a.q.ndim != 3:
        raise ValueError(f"{op}: q has shape {tuple(a.q.shape)}, expected [T, Hq, D]")
    size = a.q.shape[2]
    check_pages(op, a.k_pages, a.v_pages, a.k_scales, a.v_scales, a.mu, a.form, size)
    heads, page = a.k_pages.shape[1:3]
    if a.q.dtype not in DTYPE_CODES or (not a.quantised and a.q.dtype != a.k_pages.dtype):
        raise ValueError(f"{op}: q is {a.q.dtype}, the pages {a.k_pages.dtype}; expected one float type for both")
    if size > MOST:
        raise Unsupported(f"{op}: a head has {size} numbers, expected at most {MOST}; use torch's attention")
    if a.q.shape[1] % heads or not a.q.shape[1] or a.q.stride(2) != 1:
        raise ValueError(f"{op}: q has shape {tuple(a.q.shape)}, expected [T, a multiple of {heads}, {size}]")
    batch = a.lengths.shape[0] if a.lengths.ndim == 1 else -1
    if a.q_starts is None and a.q.shape[0] != batch * a.max_q_len:
        found = f"{a.q.shape[0]} tokens and lengths {tuple(a.lengths.shape)}"
        raise ValueError(f"{op}: {found}, expected [B] lengths for B * {a.max_q_len} tokens")
    if a.lengths.dtype != torch.int32 or a.table.dtype != torch.int32:
        raise ValueError(f"{op}: lengths is {a.lengths.dtype} and table {a.table.dtype}, expected int32 for both")
    for name, starts in (("q_starts", a.q_starts), ("table_starts", a.table_starts)):
        right = starts is None or (
            starts.dtype == torch.int32 and starts.shape == (batch + 1,) and starts.is_contiguous()
        )
        if starts is not None and not right:
            found = f"{starts.dtype} {tuple(starts.shape)}"
            raise ValueError(f"{op}: {name} is {found}, expected contiguous int32 {(batch + 1,)}")
    _check_table(op, a, batch, page)
    if a.sinks is not None and (a.sinks.dtype != torch.float32 or a.sinks.shape != (a.q.shape[1],)):
        found = f"{a.sinks.dtype} {tuple(a.sinks.shape)}"
        raise ValueError(f"{op}: sinks is {found}, expected float32 {(a.q.shape[1],)}, one for each query head")
    if a.q_bits not in (8, 16):
        raise ValueError(f"{op}: q_bits is {a.q_bits}, expected 8 or 16")
    if a.window == 0 or a.window < -1 or a.softcap < 0:
        raise ValueError(
            f"{op}: window {a.window} and softcap {a.softcap}, expected a window of 1 or more (-1: none), softcap >= 0"
        )
    check_place(op, a.q, k_pages=a.k_pages, v_pages=a.v_pages, k_scales=a.k_scales, v_scales=a.v_scales, mu=a.mu)
    check_place(
        op, a.q, table=a.table, table_starts=a.table_starts, lengths=a.lengths, q_starts=a.q_starts, sinks=a.sinks
    )


def _check_table(op: str, a: Attention, batch: int, page: int) -> None:
    if not a.lengths.is_contiguous() or a.table.ndim != (2 if a.table_starts is None else 1) or a.table.stride(-1) != 1:
        kind = "[B, pages], rows in one piece" if a.table_starts is None else "[n] with table_starts"
        raise ValueError(f"{op}: table has shape {tuple(a.table.shape)}, expected {kind}")
    if a.max_kv_len < 1 or a.max_q_len < 1:
        raise ValueError(f"{op}: max_kv_len {a.max_kv_len} and max_q_len {a.max_q_len}, expected at least 1 for both")
    need = (batch, pages_of(a.max_kv_len, page))
    if a.table_starts is None and (a.table.shape[0] != batch or a.table.shape[1] < need[1]):
        found = f"table {tuple(a.table.shape)} and max_kv_len {a.max_kv_len}"
        raise ValueError(f"{op}: {found}, expected at least {need} pages of {page} tokens")


def out_like(a: Attention) -> Outputs:
    """Empty out like q (contiguous) and lse fp32 [T, Hq], or [T, 0]."""
    lse = torch.empty((a.q.shape[0], a.q.shape[1] if a.with_lse else 0), dtype=torch.float32, device=a.q.device)
    return dense_like(a.q), lse


def dense_like(x: torch.Tensor) -> torch.Tensor:
    """Empty and contiguous, of the shape, type and device of x: the call of torch that costs least."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def rounded_q(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, scale) of rows [..., D] in fp32: codes whole numbers of -127 .. 127, scale [..., 1] = absmax / 127."""
    q = q.float()
    most = q.abs().amax(-1, keepdim=True)
    # A tensor of 127s: torch turns 127.0 / t into 127 * (1 / t), and on a card a division by a number into a product.
    levels = torch.full_like(most, 127.0)
    by = torch.where(most > 0, levels / most, torch.zeros_like(most))
    return (q * by).round(), most / levels


class Sequence(NamedTuple):
    """One sequence of a call, fp32: its tokens, q [n, Hq, D] and q', k' and v' [Hq, S, D], mu [Hq, D], what token i sees [n, S].

    v_word [Hq, S, 2]: scale and offset of each value, v' = code * scale + offset; 0 and 0 for values that are as they are.
    """

    tokens: slice
    q: torch.Tensor
    rounded: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mu: torch.Tensor
    seen: torch.Tensor
    v_word: torch.Tensor


def sequences(a: Attention, values: Given = None) -> Iterator[Sequence]:
    """The sequences of a call, one after another."""
    check_values(a.pages, table=a.table, lengths=a.lengths, table_starts=a.table_starts)
    size, page = a.q.shape[2], a.k_pages.shape[2]
    for b, length in enumerate(a.lengths.tolist()):
        first, last = (b * a.max_q_len, (b + 1) * a.max_q_len) if a.q_starts is None else a.q_starts[b : b + 2].tolist()
        at = torch.arange(length, device=a.q.device)
        mine = table_row(a.table, b, a.table_starts)
        where = mine[at // page].long(), at % page
        found = (*read(a.pages, *where, size), _value_words(a.pages, *where))
        if values is not None:
            given = values[0][int(values[1][b]) :][:length].float()
            found = (found[0], given, torch.zeros_like(found[2]))
        k, v, v_word = (part.transpose(0, 1).repeat_interleave(a.group, 0) for part in found)
        q = a.q[first:last].float()
        codes, step = rounded_q(q)
        mu = q.new_zeros(q.shape[1:]) if a.mu is None else a.mu.repeat_interleave(a.group, 0)
        stands = length - (last - first) + torch.arange(last - first, device=q.device)[:, None]
        seen = at <= stands
        if a.window > 0:
            seen &= at > stands - a.window
        yield Sequence(slice(first, last), q, codes * step if a.rounds_q else q, k, v, mu, seen, v_word)


def _value_words(pages: KVPages, page: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """fp32 [n, Hkv, 2]: scale and offset of the values of tokens."""
    words = pages.words[1]
    if words is None:
        return torch.zeros(len(page), pages.v.shape[1], 2, device=pages.v.device)
    word = words[page, :, row].float()
    scale, zero = word[..., 0], torch.zeros_like(word[..., 0])
    if pages.spec.v_bits == 4 and pages.zeros == "offset" and not pages.spec.symmetric:
        return torch.stack((scale, word[..., 1]), -1)
    if pages.spec.v_bits == 4:
        mantissa = (scale.contiguous().view(torch.int32) & 15).float()
        zero = zero + 8 if pages.spec.symmetric else mantissa if pages.zeros == "mantissa" else word[..., 1]
    return torch.stack((scale, -zero * scale), -1)


def scores(a: Attention, s: Sequence) -> torch.Tensor:
    """s[t] of every token and head, [n, Hq, S]; -infinity where a token does not see a key."""
    found = torch.einsum("nhd,hsd->nhs", s.rounded * a.scale, s.k)
    found = found + a.scale * torch.einsum("nhd,hd->nh", s.q, s.mu)[..., None]
    if a.softcap:
        found = a.softcap * torch.tanh(found / a.softcap)
    return found.masked_fill(~s.seen[:, None], -torch.inf)


def reference(a: Attention, values: Given = None) -> Outputs:
    """The meaning of it, in plain torch and fp32."""
    out = torch.zeros(a.q.shape, dtype=a.q.dtype, device=a.q.device)
    lse = a.q.new_full(a.q.shape[:2], -torch.inf, dtype=torch.float32)
    for s in sequences(a, values):
        found = scores(a, s)
        total = found.logsumexp(-1)
        if a.sinks is not None:
            total = torch.logaddexp(total, a.sinks.expand_as(total))
        lse[s.tokens] = total
        p = (found - total[..., None].nan_to_num(nan=torch.nan, neginf=0.0)).exp()
        if bool(torch.isfinite(s.v).all()):
            out[s.tokens] = torch.einsum("nhs,hsd->nhd", p, s.v).to(a.q.dtype)
            continue
        # a key that a token does not see must not reach it through 0 * NaN either
        heard = s.v.expand(len(s.seen), *s.v.shape).masked_fill(~s.seen[:, None, :, None], 0.0)  # [n, Hq, S, D]
        out[s.tokens] = torch.einsum("nhs,nhsd->nhd", p, heard).to(a.q.dtype)
    return out, lse if a.with_lse else lse[:, :0]


def tolerance(want: Outputs, a: Attention, values: Given = None, tile: int = TILE) -> Outputs:
    """An ulp, the rounding of weights to the type in which a body multiplies V, and the order of sums.

    A score is off by 2^-18 of what is added up in it, scale * sum |q'| |k'| and its offsets, which moves a weight by twice that
    share, and all of sum_t p_t |v_t|, where a 4-bit value counts as its code times scale, and its offset.

    A weight is off by its rounding, which acts on codes times scale alone. Triton: half an ulp of bf16 over quantised pages, else of
    the type of V. C++ over quantised pages: whole numbers up to 2^15 - 1 for the largest w_t = p_t * scale_t of a `tile` of
    keys, so half of that largest w / (2^15 - 1) for every code of the tile, however small its own weight. The larger of both.
    """
    rounding = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 0.0}[a.q.dtype]
    if a.quantised:
        rounding = 2.0**-8
    reach, rounded = (a.q.new_zeros(a.q.shape, dtype=torch.float32) for _ in range(2))
    spread = a.q.new_zeros((*a.q.shape[:2], 1), dtype=torch.float32)
    for s in sequences(a, values):
        if not s.v.shape[1]:
            continue
        p = scores(a, s).softmax(-1).nan_to_num(0.0)
        coded = (s.v - s.v_word[..., 1:]).abs().nan_to_num(0.0)
        coded_reach = torch.einsum("nhs,hsd->nhd", p, coded)
        rounded[s.tokens] = rounding * coded_reach
        if a.quantised:
            rounded[s.tokens] = rounded[s.tokens].maximum(_whole_weights(p, coded, s, tile))
        reach[s.tokens] = coded_reach + torch.einsum("nhs,hsd->nhd", p, s.v_word[..., 1:].abs().nan_to_num(0.0))
        sums = torch.einsum("nhd,hsd->nhs", s.rounded.abs() * abs(a.scale), s.k.abs() + 2 * offsets(a, s)[0])
        spread[s.tokens] = (sums.nan_to_num(0.0).amax(-1) + abs(a.scale) * (s.q * s.mu).abs().sum(-1))[..., None]
    off = ulp(want[0]) + rounded + 2.0**-17 * (1 + spread) * reach
    return off, (2.0**-17 * (1 + spread[..., 0]))[:, : want[1].shape[1]]


def _whole_weights(p: torch.Tensor, coded: torch.Tensor, s: Sequence, tile: int) -> torch.Tensor:
    """[n, Hq, D]: what weights lose that are whole numbers of the largest of a tile; p [n, Hq, S], coded [Hq, S, D]."""
    scale = s.v_word[..., 0].abs().nan_to_num(0.0)
    codes = torch.where(scale[..., None] > 0, coded / scale[..., None], torch.zeros_like(coded))
    missing = -p.shape[-1] % tile
    w, codes = torch.nn.functional.pad(p * scale, (0, missing)), torch.nn.functional.pad(codes, (0, 0, 0, missing))
    seen = torch.nn.functional.pad(s.seen.float(), (0, missing)).unflatten(-1, (-1, tile))
    most = w.unflatten(-1, (-1, tile)).amax(-1)  # [n, Hq, tiles]
    return torch.einsum("nhi,nij,hijd->nhd", most, seen, codes.unflatten(1, (-1, tile))) / (2 * (2.0**15 - 1))


def offsets(a: Attention, s: Sequence) -> tuple[torch.Tensor, torch.Tensor]:
    """Sizes of what is added to codes times scale in keys and in values: [Hq, S, 1] each, at most the largest |x| of a row."""
    spec = parse_form(a.form).spec
    return tuple(
        part.abs().amax(-1, keepdim=True) if bits == 4 else part.new_zeros((*part.shape[:2], 1))
        for part, bits in ((s.k, spec.k_bits), (s.v, spec.v_bits))
    )  # type: ignore[return-value]


def dtype_codes(a: Attention) -> tuple[int, ...]:
    """What the C++ bodies are told of types and forms: of q, of pages (16 bits or fp32), bits of K and V, and how words are read.

    (q dtype, pages dtype, k_bits, v_bits, symmetric, nibbles: 0 halves 1 pairs, zeros: 0 offset 1 zero 2 mantissa, words: 0 fp32 2 fp16)
    """
    form = parse_form(a.form)
    pages = DTYPE_CODES.get(a.k_pages.dtype, 0)
    words = 0 if a.k_scales is None else DTYPE_CODES[a.k_scales.dtype]
    nibbles, zeros = int(form.nibbles == "pairs"), ("offset", "zero", "mantissa").index(form.zeros)
    return (
        DTYPE_CODES[a.q.dtype],
        pages,
        form.spec.k_bits,
        form.spec.v_bits,
        int(form.spec.symmetric),
        nibbles,
        zeros,
        words,
    )


def strides(t: Any, n: int) -> tuple[int, ...]:
    """The first n strides of a tensor, zeros for None."""
    return (0,) * n if t is None else t.stride()[:n]
