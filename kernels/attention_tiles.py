"""What the kernels of attention over pages share: how bytes of a page become operands of MMA, scores and weighted sums.

A tile of queries, rows = tokens x heads of one key head, meets a tile of keys and values, as formats/kvcache.py holds them:

    q [M, D] -> codes int8, step [M]           k int8 [N, D] or bytes [N, D/2], operands as they are
    t = (codes . k) * k_scale + q_sum * k_off  [M, N]      int32 sums, exact
    p = 2^(t * step - m)                       [M, N]
    acc += bf16(p * v_scale) . v               v whole numbers in bf16, exact; off += sum p * v_off, one number a row

V is read as 16-bit units where MMA takes its operands from registers: there is no transposing ldmatrix for bytes. A unit holds
two bytes or four nibbles of one token, and each of them is a tile of its own, with sums of its own ("parts"):

    int8   bits 15 ... 8 | 7 ... 0        part 0: dims 2j          part 1: dims 2j + 1
                x[2j+1]  |  x[2j]
    int4   bits 15..12 | 11..8  | 7..4 | 3..0           halves: nibble n of byte c is dim c + n D/2, pairs: 2c + n
           byte 2j + 1 |        | byte 2j |             parts 0, 1 of byte 2j, parts 2, 3 of byte 2j + 1
"""

from __future__ import annotations

import triton
import triton.language as tl

# ---- where things lie ----------------------------------------------------------------------------------------------


@triton.jit
def page_at(table_row, start, last, HOW: tl.constexpr, BLOCK_N: tl.constexpr):
    """The page of a tile's keys: one number where a tile lies in one page, else one for each key; 0 past the end."""
    if HOW.page >= BLOCK_N:
        page = tl.load(table_row + start // HOW.page, mask=start < last, other=0).to(tl.int64)
    else:
        at = start + tl.arange(0, BLOCK_N)
        page = tl.load(table_row + at // HOW.page, mask=at < last, other=0).to(tl.int64)  # [BLOCK_N]
    return page


@triton.jit
def tile_at(page, start, step_page, step_row, LINE: tl.constexpr, HOW: tl.constexpr, BLOCK_N: tl.constexpr):
    """Elements from the first page to a tile: a number, or one for each key [BLOCK_N]; rows_of has the rest."""
    at = page * step_page
    if HOW.page >= BLOCK_N:
        at += (page * 0 + start % HOW.page) * step_row
    return at * LINE


@triton.jit
def rows_of(step_row, LINE: tl.constexpr, HOW: tl.constexpr, BLOCK_N: tl.constexpr):
    """Elements from where a tile begins to each of its keys [BLOCK_N]; the same for all tiles."""
    offs_n = tl.arange(0, BLOCK_N)
    return (offs_n % min(HOW.page, BLOCK_N)).to(tl.int64) * step_row * LINE


@triton.jit
def key_dims(PART: tl.constexpr, HOW: tl.constexpr):
    """The dims of the columns of a part of q and k, and which of them there are: [k_width] each."""
    offs = tl.arange(0, HOW.k_width)
    if HOW.k_bits != 4:
        dims = offs
    elif HOW.pairs:
        dims = 2 * offs + PART
    else:
        dims = offs + PART * (HOW.size // 2)
    return dims, offs < HOW.size // HOW.k_parts


@triton.jit
def value_dims(PART: tl.constexpr, HOW: tl.constexpr):
    """The dims of the columns of a part of V, and which of them there are: [v_width] each."""
    offs = tl.arange(0, HOW.v_width)
    if HOW.v_bits != 4:
        dims = offs * HOW.v_parts + PART
        there = dims < HOW.size
    else:
        if HOW.v_parts == 1:
            byte, nibble = offs // 2, offs % 2
        elif HOW.v_parts == 2:
            byte, nibble = offs, PART
        else:
            byte, nibble = 2 * offs + PART // 2, PART % 2
        there = byte < HOW.size // 2
        dims = 2 * byte + nibble if HOW.pairs else byte + nibble * (HOW.size // 2)
    return dims, there


# ---- queries -------------------------------------------------------------------------------------------------------


@triton.jit
def load_queries(q_rows, inside, mu_ptr, HOW: tl.constexpr):
    """Parts of q [M, k_width] in its own type, from rows' pointers [M], and sum_d q mu, fp32 [M]; mu_ptr: of the key head, or None."""
    dims, there = key_dims(0, HOW)
    q = (tl.load(q_rows[:, None] + dims[None, :], mask=inside[:, None] & there[None, :], other=0.0),)
    shift = tl.zeros(inside.shape, tl.float32)
    if mu_ptr is not None:
        mu = tl.load(mu_ptr + dims, mask=there, other=0.0)
        shift += tl.sum(q[0].to(tl.float32) * mu[None, :], axis=1)
    if HOW.k_parts == 2:
        dims, there = key_dims(1, HOW)
        q = (q[0], tl.load(q_rows[:, None] + dims[None, :], mask=inside[:, None] & there[None, :], other=0.0))
        if mu_ptr is not None:
            mu = tl.load(mu_ptr + dims, mask=there, other=0.0)
            shift += tl.sum(q[1].to(tl.float32) * mu[None, :], axis=1)
    return q, shift


@triton.jit
def _code(q, by):
    # fp32 of 1.5 * 2^23 has steps of 1, so the add rounds to the nearest even integer
    return ((q.to(tl.float32) * by[:, None] + 12582912.0) - 12582912.0).to(tl.int8)


@triton.jit
def rounded_queries(q, HOW: tl.constexpr):
    """(parts of q as operands of MMA, step [M], their sums over dims [M]): the same codes as attention.rounded_q.

    A step is never 0, so that a maximum of scores can be taken before it multiplies them; NaN or Inf in a row makes it NaN.
    """
    low = q[0].to(tl.float32)
    most, total = tl.max(tl.abs(low), axis=1), tl.sum(low, axis=1)
    if HOW.k_parts == 2:
        high = q[1].to(tl.float32)
        most, total = tl.maximum(most, tl.max(tl.abs(high), axis=1)), total + tl.sum(high, axis=1)
    step = most * 0.0 + 1.0
    if HOW.rounds_q:
        by = tl.where(most > 0.0, tl.div_rn(127.0, tl.where(most > 0.0, most, 1.0)), 0.0)
        step = tl.maximum(tl.div_rn(most, 127.0), 2.0**-100) + total * 0.0
        codes = _code(q[0], by)
        total = tl.sum(codes.to(tl.int32), axis=1)
        if HOW.k_parts == 2:
            more = _code(q[1], by)
            total += tl.sum(more.to(tl.int32), axis=1)
            q = (codes, more)
        else:
            q = (codes,)
    return q, step, total.to(tl.float32)


# ---- scale words ---------------------------------------------------------------------------------------------------


@triton.jit
def _half(word):
    """fp32 of the fp16 number in the lowest 16 bits."""
    return word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _number(ptrs, live, MASKED: tl.constexpr):
    return tl.load(ptrs, mask=live, other=0) if MASKED else tl.load(ptrs)


@triton.jit
def _apart(words, step, live, BITS: tl.constexpr, HOW: tl.constexpr, MASKED: tl.constexpr):
    """Scale and offset [BLOCK_N] of words whose numbers are read one by one; `step` to the second one of a word."""
    scale = _number(words, live, MASKED).to(tl.float32)
    offset = scale
    if BITS == 4 and not HOW.symmetric:
        if HOW.zeros == "mantissa":
            offset = -(scale.to(tl.int32, bitcast=True) & 15).to(tl.float32) * scale
        else:
            offset = _number(words + step, live, MASKED).to(tl.float32)
            if HOW.zeros == "zero":
                offset = -offset * scale
    return scale, offset


@triton.jit
def load_words(k_words, v_words, k_step, v_step, live, HOW: tl.constexpr, MASKED: tl.constexpr):
    """(k_scale, k_offset, v_scale, v_offset) fp32 [BLOCK_N] of pointers to the words of each key; 0 where MASKED and not live.

    One number of 32 or 64 bits a key is copied asynchronously; numbers of 16 bits are not, and would stop the loop.
    """
    if HOW.word == 0:
        k_scale, k_offset = _apart(k_words, k_step, live, HOW.k_bits, HOW, MASKED)
        v_scale, v_offset = _apart(v_words, v_step, live, HOW.v_bits, HOW, MASKED)
    else:
        word = _number(k_words, live, MASKED)
        k_scale, v_scale = _half(word), _half(word >> 16)
        k_offset, v_offset = k_scale, v_scale
        if HOW.word == 64:
            k_offset, v_offset = _half(word >> 32), _half(word >> 48)
    if HOW.k_bits == 4 and HOW.symmetric:
        k_offset = -8.0 * k_scale
    return k_scale, k_offset, v_scale, v_offset


@triton.jit
def load_tile(
    places, page, start, last, stride_k, stride_v, HOW: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr
):
    """(k [BLOCK_N, k_width], v [BLOCK_N, v_columns], words) of the keys from `start` on; `places` of the first tile of a head.

    Where MASKED, words past `last` are 0 and so are values of 16 bits, which may be NaN there; a byte cannot be. Rows there are
    of the same page or of page 0.
    """
    live = start + tl.arange(0, BLOCK_N) < last
    k_at = tile_at(page, start, stride_k[0], stride_k[2], HOW.k_line, HOW, BLOCK_N)
    v_at = tile_at(page, start, stride_v[0], stride_v[2], HOW.v_line, HOW, BLOCK_N)
    if HOW.page < BLOCK_N:
        k_at, v_at = k_at[:, None], v_at[:, None]
    if HOW.k_row < HOW.k_width:
        k = tl.load(places[0] + k_at, mask=(tl.arange(0, HOW.k_width) < HOW.k_row)[None, :], other=0)
    else:
        k = tl.load(places[0] + k_at)
    there = (tl.arange(0, HOW.v_columns) < HOW.v_row)[None, :]
    if HOW.v_bits == 16 and MASKED:
        v = tl.load(places[1] + v_at, mask=there & live[:, None], other=0.0)
    elif HOW.v_row < HOW.v_columns:
        v = tl.load(places[1] + v_at, mask=there, other=0)
    else:
        v = tl.load(places[1] + v_at)
    words = (live, live, live, live)  # numbers as they are have none; a tuple of None does not pass a function's end
    if HOW.v_bits != 16:
        k_at = tile_at(page, start, stride_k[3], stride_k[5], 1, HOW, BLOCK_N)
        v_at = tile_at(page, start, stride_v[3], stride_v[5], 1, HOW, BLOCK_N)
        words = load_words(places[2] + k_at, places[3] + v_at, stride_k[6], stride_v[6], live, HOW, MASKED)
    return k, v, words


# ---- scores --------------------------------------------------------------------------------------------------------


@triton.constexpr_function
def _nibbles(part: int) -> str:
    shift = "shr.u32 t, $1, 4;" if part else "mov.b32 t, $1;"
    return f"{{ .reg .b32 t; {shift} and.b32 $0, t, 0x0F0F0F0F; }}"


@triton.jit
def _key_nibbles(k, PART: tl.constexpr, HOW: tl.constexpr):
    """Low (0) or high (1) nibbles of bytes [BLOCK_N, columns], int8 of 0 .. 15; by assembly four at a time."""
    if HOW.asm:
        code = tl.inline_asm_elementwise(_nibbles(PART), "=r,r", [k], tl.int8, is_pure=True, pack=4)
    else:
        code = ((k >> (4 * PART)) & 15).to(tl.int8)
    return code


@triton.jit
def scores(q, k, q_sum, k_scale, k_offset, HOW: tl.constexpr):
    """q . k' over the step of q, fp32 [M, BLOCK_N]: q as rounded_queries gives it, k as it lies in the page."""
    kind: tl.constexpr = tl.int32 if HOW.rounds_q else tl.float32
    if HOW.k_bits == 4:
        low, high = _key_nibbles(k, 0, HOW).to(q[0].dtype), _key_nibbles(k, 1, HOW).to(q[0].dtype)
        s = tl.dot(q[0], tl.trans(low), input_precision="ieee", out_dtype=kind)
        s = tl.dot(q[1], tl.trans(high), acc=s, input_precision="ieee", out_dtype=kind).to(tl.float32)
        s = tl.fma(q_sum[:, None], k_offset[None, :], s * k_scale[None, :])
    else:
        s = tl.dot(q[0], tl.trans(k.to(q[0].dtype)), input_precision="ieee", out_dtype=kind).to(tl.float32)
        if HOW.k_bits == 8:
            s = s * k_scale[None, :]
    return s


# ---- values --------------------------------------------------------------------------------------------------------
# Bytes and nibbles to bf16, two in a register: a 32-bit register r holds the units of two keys, 16 bits each.
#
#     int8, part p    0x4300 | (b & 0x7F) = 128 + low 7 bits     0xC300 | (b & 0x80) = -128 or -256      their sum is b
#     int4, part p    0x4300 | u          = 128 + u              plus -128, or -136 where 8 means 0
#
# (a & b) | c is one LOP3 (0xEA). The sum is an fma with 1.0: add.bf16x2 needs sm_90. tiles.py does the same to weights.


@triton.constexpr_function
def _byte(part: int) -> str:
    shift = "shr.u32 t, $1, 8;" if part else "mov.b32 t, $1;"
    low, high = "lop3.b32 low, t, 0x007F007F, 0x43004300, 0xEA;", "lop3.b32 t, t, 0x00800080, 0xC300C300, 0xEA;"
    return f"{{ .reg .b32 t, low, one; mov.b32 one, 0x3F803F80; {shift} {low} {high} fma.rn.bf16x2 $0, low, one, t; }}"


@triton.constexpr_function
def _nibble(part: int, symmetric: bool) -> str:
    shift = f"shr.u32 t, $1, {4 * part};" if part else "mov.b32 t, $1;"
    unpack = "lop3.b32 t, t, 0x000F000F, 0x43004300, 0xEA;"
    minus = "0xC308C308" if symmetric else "0xC300C300"
    return f"{{ .reg .b32 t, one, z; mov.b32 one, 0x3F803F80; mov.b32 z, {minus}; {shift} {unpack} fma.rn.bf16x2 $0, t, one, z; }}"


@triton.constexpr_function
def _operand(how):
    """Type in which weights and quantised values are multiplied."""
    return tl.float32 if how.fp32 else tl.bfloat16


@triton.jit
def _part(v, PART: tl.constexpr, HOW: tl.constexpr):
    """Byte or nibble PART of units int16 [BLOCK_N, columns] as a whole number, signed or 0..15 (minus 8: symmetric)."""
    if HOW.asm:
        asm: tl.constexpr = _byte(PART) if HOW.v_bits == 8 else _nibble(PART, HOW.symmetric)
        code = tl.inline_asm_elementwise(asm, "=r,r", [v], tl.int16, is_pure=True, pack=2).to(tl.bfloat16, bitcast=True)
    elif HOW.v_bits == 8:
        code = (v << (8 - 8 * PART)) >> 8
    else:
        code = ((v >> (4 * PART)) & 15) - (8 if HOW.symmetric else 0)
    return code.to(_operand(HOW))


@triton.jit
def _together(a, b):
    """Columns of two tiles [N, W] in turn, [N, 2 W]: what they hold of a column is in one thread already."""
    return tl.reshape(tl.join(a, b), (a.shape[0], 2 * a.shape[1]))


@triton.jit
def values(v, HOW: tl.constexpr):
    """The parts of V [BLOCK_N, v_width] as operands of MMA; value_dims says which dims they are."""
    if HOW.v_unit == 0:
        parts = (v,)
    elif HOW.v_unit == 2:
        parts = (_part(v, 0, HOW), _part(v, 1, HOW))
        if HOW.v_bits == 4:
            parts = (parts[0], parts[1], _part(v, 2, HOW), _part(v, 3, HOW))
            if HOW.v_parts < 4:
                parts = (_together(parts[0], parts[2]), _together(parts[1], parts[3]))
        if HOW.v_parts == 1:
            parts = (_together(parts[0], parts[1]),)
    elif HOW.v_bits == 8:
        parts = (v.to(_operand(HOW)),)
    else:
        less: tl.constexpr = 8 if HOW.symmetric else 0
        parts = (((v & 15).to(tl.int8) - less).to(_operand(HOW)), ((v >> 4).to(tl.int8) - less).to(_operand(HOW)))
        if HOW.v_parts == 1:
            parts = (_together(parts[0], parts[1]),)
    return parts


@triton.jit
def weighted(acc, kept, p, v, HOW: tl.constexpr):
    """acc * kept + p . v for every part; p [M, BLOCK_N], kept [M]."""
    parts = values(v, HOW)
    p = p.to(parts[0].dtype)
    kept = kept[:, None]
    new = (tl.dot(p, parts[0], acc=acc[0] * kept, input_precision="ieee"),)
    if HOW.v_parts > 1:
        new = (new[0], tl.dot(p, parts[1], acc=acc[1] * kept, input_precision="ieee"))
    if HOW.v_parts == 4:
        c = tl.dot(p, parts[2], acc=acc[2] * kept, input_precision="ieee")
        new = (new[0], new[1], c, tl.dot(p, parts[3], acc=acc[3] * kept, input_precision="ieee"))
    return new


@triton.jit
def no_sums(BLOCK_M: tl.constexpr, HOW: tl.constexpr):
    """Sums of every part of V, fp32 [BLOCK_M, v_width], at 0."""
    width: tl.constexpr = HOW.v_width
    zero = tl.zeros((BLOCK_M, width), tl.float32)
    sums = (zero,)
    if HOW.v_parts == 2:
        sums = (zero, zero)
    elif HOW.v_parts == 4:
        sums = (zero, zero, zero, zero)
    return sums


@triton.jit
def capped(x):
    """tanh(x), fp32."""
    e = tl.exp2(-2.8853900817779268 * tl.abs(x))  # e^(-2 |x|)
    size = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0.0, -size, size)


@triton.jit
def meet(state, q, k, v, words, visible, q_sum, step, shift, cap, HOW: tl.constexpr, MASKED: tl.constexpr):
    """A tile of queries meets a tile of keys. state: (m, l, off [M] each, acc); words: what load_words gives.

    step [M]: what makes a score the exponent of 2. cap None, or log2(e) * softcap; then step and shift [M] give the score over
    softcap. visible [M, BLOCK_N] where MASKED: a weight of 0 would let through NaN of a key that a row does not see.
    """
    m, l, off, acc = state  # noqa: E741
    k_scale, k_offset, v_scale, v_offset = words
    t = scores(q, k, q_sum, k_scale, k_offset, HOW)  # [M, BLOCK_N]
    if cap is not None:
        t = capped(tl.fma(t, step[:, None], shift[:, None])) * cap
        step = step * 0.0 + 1.0
    if MASKED:
        t = tl.where(visible, t, float("-inf"))
    largest = tl.maximum(m, tl.max(t, axis=1) * step)
    base = tl.where(largest == float("-inf"), 0.0, largest) if MASKED else largest  # a row that has seen nothing yet
    p = tl.exp2(tl.fma(t, step[:, None], -base[:, None]))
    kept = tl.exp2(m - base)
    l = l * kept + tl.sum(p, axis=1)  # noqa: E741
    if HOW.v_offsets:
        more = p * v_offset[None, :]
        if MASKED:
            more = tl.where(visible, more, 0.0)
        off = off * kept + tl.sum(more, axis=1)
    if HOW.v_bits != 16:
        p = p * v_scale[None, :]
        if MASKED:
            p = tl.where(visible, p, 0.0)
    return largest, l, off, weighted(acc, kept, p, v, HOW)
