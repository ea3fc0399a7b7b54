"""Idioms that the kernels of several ops share: where a program stands, 4-bit codes to MMA operands, sums of splits.

All matmuls compute the transposed product, so that the weight is the left operand and may stay in registers on its way
from packed code to MMA (on Hopper the right operand always comes from shared memory):

    y^T [N, M]  =  W [N, K] @ x^T [K, M]                 a tile of y^T is [BLOCK_N, BLOCK_M], stored through tl.trans

           K-major, both                                   16 tokens are the narrowest tile: one kernel serves M = 1 .. 64
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from . import device

# The order of float operations is written out (tl.fma where one rounding is meant): bits must not move with a compiler's
# default. Triton 3.9 announces that its default changes.
FUSION = False
# Triton's interpreter knows no inline assembly; kernels were made for it, or not, when triton was imported.
INTERPRETED = triton.knobs.runtime.interpret


def registers(card: device.Card) -> dict[str, int]:
    """Option of a kernel that unpacks: leave is given to use all 255 registers of a thread, except on sm_90.

    Left alone, ptxas spills 8 to 24 bytes of some tiles where one register less makes room for one more program on an SM.
    Split K starts one or two programs per SM, so nobody would come to take that room. On sm_90 it does not happen.
    """
    return {} if card.sm == 90 else {"maxnreg": 255}


class Launch(NamedTuple):
    """One kernel start: what `run` starts and what inspection.py compiles, so that they are the same thing.

    `step` is the (rows, codes) of the weight that one step of the loop multiplies, (0, 0) for a kernel without a weight.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: tuple
    options: dict[str, Any]
    step: tuple[int, int] = (0, 0)


class Product(NamedTuple):
    """A step among launches that torch's own matmul (cuBLAS) takes: y [M, N'] = x [M, K] @ w [N', K]^T + bias [N'].

    y may be columns of a wider tensor. The bias is fp32 and is added after the rounding of y.
    """

    x: torch.Tensor
    w: torch.Tensor
    bias: torch.Tensor | None
    y: torch.Tensor

    def run(self) -> None:
        torch.mm(self.x, self.w.t(), out=self.y)
        if self.bias is not None:
            self.y.add_(self.bias)


def start(launches: Sequence[Launch | Product], where: torch.device) -> None:
    """Starts kernels, and torch's products among them, in order on the device where their tensors are."""
    with device.current(where):
        for launch in launches:
            if isinstance(launch, Product):
                launch.run()
            else:
                launch.kernel[launch.grid](*launch.args, **launch.options)


def runner(plan: Callable[..., tuple[Any, Sequence[Launch | Product]]]) -> Callable[..., Any]:
    """The body of an op, `run(*flat)`: the outputs of `plan(card, *flat)`, its kernels started where the first tensor is.

    `card` and `config` are for who tries a Config; None is the card that is there, and what config_for says.
    """

    def run(*flat: Any, card: device.Card | None = None, config: Any = None) -> Any:
        where = flat[0].device
        outputs, launches = plan(card or device.card_of(where), *flat, config=config)
        start(launches, where)
        return outputs

    return run


def chunks(n: int, k_pad: int, megabytes: int) -> list[tuple[int, int]]:
    """(first, last) rows of a weight, 16-bit values of which fill at most `megabytes`; borders at multiples of 64 rows."""
    rows = max(1, (megabytes << 20) // (2 * k_pad) // 64) * 64
    return [(first, min(first + rows, n)) for first in range(0, n, rows)]


@triton.jit
def tile_index(pid, tiles_n, tiles_m, GROUP: tl.constexpr):
    """Program number -> (tile along N, tile along M), `GROUP` rows of W tiles at a time.

    Programs that run at the same time then share x tiles and W tiles in L2:   GROUP = 2, tiles_m = 3
        n\\m  0  1  2
         0   0  2  4
         1   1  3  5
         2   6  8 10
    """
    per_group = GROUP * tiles_m
    first_n = (pid // per_group) * GROUP
    rows = tl.minimum(tiles_n - first_n, GROUP)
    inside = pid % per_group
    return first_n + inside % rows, inside // rows


@triton.jit
def tile_of(M, N, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, RASTER: tl.constexpr):
    """Rows of W and tokens of this program's tile: offs_n [BLOCK_N], offs_m [BLOCK_M]."""
    tile_n, tile_m = tile_index(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(M, BLOCK_M), RASTER)
    return tile_n * BLOCK_N + tl.arange(0, BLOCK_N), tile_m * BLOCK_M + tl.arange(0, BLOCK_M)


@triton.jit
def part_of_k(steps, steps_per_split):
    """This program's part of the loop over K: its number, its first step, the step behind its last."""
    split = tl.program_id(1)
    first = split * steps_per_split
    return split, first, tl.minimum(first + steps_per_split, steps)


@triton.jit
def store_int32(
    acc, split, offs_n, offs_m, M, N, sx_ptr, sw_ptr, bias_ptr, y_ptr, stride_ym,
    HAS_BIAS: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    """Exact sums int32 [BLOCK_N, BLOCK_M] times sx[m] * sw[n], plus bias; PARTIAL: as they are, as part `split` of K."""
    mask_n, mask_m = offs_n < N, offs_m < M
    y_ptrs = y_ptr + (split * M + offs_m).to(tl.int64)[:, None] * stride_ym + offs_n[None, :]
    mask_y = mask_m[:, None] & mask_n[None, :]
    if PARTIAL:
        tl.store(y_ptrs, tl.trans(acc), mask=mask_y)  # [BLOCK_M, BLOCK_N]
    else:
        sx = tl.load(sx_ptr + offs_m, mask=mask_m, other=0.0)  # [BLOCK_M]
        sw = tl.load(sw_ptr + offs_n, mask=mask_n, other=0.0)  # [BLOCK_N]
        y = acc.to(tl.float32) * sx[None, :] * sw[:, None]
        if HAS_BIAS:
            y += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0)[:, None]
        tl.store(y_ptrs, tl.trans(y).to(y_ptr.dtype.element_ty), mask=mask_y)  # [BLOCK_M, BLOCK_N]


# 4-bit codes to bf16 or fp16, two in a register. Of the words of packing planes16_w4 one 32-bit register holds two:
#
#     bit 31  28 27  24 23  20 19  16 15  12 11   8 7    4 3    0
#       [ u3'  |  u2' |  u1' |  u0' |  u3  |  u2  |  u1  |  u0  ]      plane p is u_p of k and u_p' of k + 1
#
#     bf16   0x4300 = 0 10000110 0000000 = 128, one step is 1       (r >> 4p) & 0x000F000F | 0x43004300  =  128 + u
#     fp16   0x5400 = 0 10101 0000000000 =  64, one step is 1/16    (r >> 4p-4) & 0x00F000F0 | 0x54005400 =  64 + u
#
# and one packed add of -(128 + z) or -(64 + z) gives u - z, exact for z = 0..31. Three instructions for two weights, two
# for plane 0 of bf16 and plane 1 of fp16. (a & b) | c is one LOP3 (0xEA): the idea is Marlin's (IST-DASLab/marlin).
# The add of bf16 is an fma with 1.0, because add.bf16x2 needs sm_90; it is one instruction as well.


@triton.constexpr_function
def _plane16_bf16(plane: int) -> str:
    shift = f"shr.u32 t, $1, {4 * plane};" if plane else "mov.b32 t, $1;"
    unpack = "lop3.b32 t, t, 0x000F000F, 0x43004300, 0xEA;"
    return f"{{ .reg .b32 t, one; mov.b32 one, 0x3F803F80; {shift} {unpack} fma.rn.bf16x2 $0, t, one, $2; }}"


@triton.constexpr_function
def _plane16_fp16(plane: int) -> str:
    shift = ("shl.b32 t, $1, 4;", "mov.b32 t, $1;", "shr.u32 t, $1, 4;", "shr.u32 t, $1, 8;")[plane]
    unpack = "lop3.b32 t, t, 0x00F000F0, 0x54005400, 0xEA;"
    return f"{{ .reg .b32 t; {shift} {unpack} add.rn.f16x2 $0, t, $2; }}"


@triton.jit
def minus_zero(word, DTYPE: tl.constexpr):
    """Scale words int32 [BLOCK_N] -> the int16 bits of -(128 + z) in bf16 or of -(64 + z) in fp16."""
    if tl.bfloat16 == DTYPE:
        bits = (word & 0x1F) | 0xC300
    else:
        bits = ((word & 0x1F) << 4) | 0xD400
    return bits.to(tl.int16)


@triton.jit
def word_scale(word):
    """Scale words int32 -> their scales fp32: all bits but the lowest five, which hold the zero point."""
    return (word & -32).to(tl.float32, bitcast=True)


@triton.jit
def unpack_plane16(w_packed, word, PLANE: tl.constexpr, DTYPE: tl.constexpr, USE_ASM: tl.constexpr):
    """Plane `PLANE` of words int16 [BLOCK_N, 32] with scale words int32 [BLOCK_N] -> u - z in bf16 or fp16."""
    if not USE_ASM:
        code = (w_packed >> (4 * PLANE)) & 0xF
        w = (code - (word & 0x1F).to(tl.int16)[:, None]).to(DTYPE)
    elif tl.bfloat16 == DTYPE:
        zero = minus_zero(word, DTYPE)[:, None]
        w = tl.inline_asm_elementwise(
            _plane16_bf16(PLANE), "=r,r,r", [w_packed, zero], tl.bfloat16, is_pure=True, pack=2
        )
    else:
        zero = minus_zero(word, DTYPE)[:, None]
        w = tl.inline_asm_elementwise(
            _plane16_fp16(PLANE), "=r,r,r", [w_packed, zero], tl.float16, is_pure=True, pack=2
        )
    return w


# 8-bit codes to bf16 or fp16, two in a register. Of packing planes16_w8 a 32-bit register holds two words:
#
#     bit 31       24 23       16 15        8 7         0
#       [  plane 1'  |  plane 0'  |  plane 1  |  plane 0  ]       the signed code q of k, q' of k + 1
#
#     bf16   0x4300 | (q & 0x7F) = 128 + low 7 bits     0xC300 | (q & 0x80) = -128 or -256      their sum is q
#     fp16   0x6400 | (q ^ 0x80) = 1152 + q             plus -(1152 + z) is q - z
#
# bf16 has 8 bits, so the sign goes a way of its own, and a zero point costs one more fma; all of -255..255 is exact in it.
# 3.5 instructions for two weights in bf16 (4.5 with zero points), 2.5 in fp16.


@triton.constexpr_function
def _plane16_w8(plane: int, bf16: bool, has_zero: bool) -> str:
    shift = "shr.u32 t, $1, 8;" if plane else "mov.b32 t, $1;"
    if not bf16:
        unpack = "lop3.b32 t, t, 0x00FF00FF, 0x64806480, 0x6A;"
        zero = "" if has_zero else "mov.b32 z, 0xE480E480;"
        return f"{{ .reg .b32 t, z; {zero} {shift} {unpack} add.rn.f16x2 $0, t, {'$2' if has_zero else 'z'}; }}"
    low, high = "lop3.b32 low, t, 0x007F007F, 0x43004300, 0xEA;", "lop3.b32 t, t, 0x00800080, 0xC300C300, 0xEA;"
    code = "fma.rn.bf16x2 t, low, one, t;" if has_zero else "fma.rn.bf16x2 $0, low, one, t;"
    zero = "fma.rn.bf16x2 $0, t, one, $2;" if has_zero else ""
    return f"{{ .reg .b32 t, low, one; mov.b32 one, 0x3F803F80; {shift} {low} {high} {code} {zero} }}"


@triton.jit
def word8_scale(word, HAS_ZERO: tl.constexpr):
    """fp32 scales [BLOCK_N], or int32 words of scale and z + 128 if HAS_ZERO -> the scales fp32."""
    return (word & -256).to(tl.float32, bitcast=True) if HAS_ZERO else word


@triton.jit
def minus_zero8(word, DTYPE: tl.constexpr):
    """Scale words int32 [BLOCK_N] -> the int16 bits of -z in bf16 or of -(1152 + z) in fp16."""
    if tl.bfloat16 == DTYPE:
        bits = (128 - (word & 255)).to(tl.float32).to(tl.bfloat16).to(tl.int16, bitcast=True)
    else:
        bits = ((word & 255) | 0xE400).to(tl.int16)
    return bits


@triton.jit
def unpack_plane16_w8(
    w_packed, word, PLANE: tl.constexpr, DTYPE: tl.constexpr, HAS_ZERO: tl.constexpr, USE_ASM: tl.constexpr
):
    """Plane `PLANE` of words int16 [BLOCK_N, J] -> q - z in bf16 or fp16.

    `word` [BLOCK_N] is int32, scale and zero point in one, if HAS_ZERO, else the fp32 scale. That one is handed to the
    assembly, which does not read it: see unpack_plane8_with.
    """
    if USE_ASM:
        asm: tl.constexpr = _plane16_w8(PLANE, tl.bfloat16 == DTYPE, HAS_ZERO)
        if HAS_ZERO:
            zero = minus_zero8(word, DTYPE)[:, None]
            bits = tl.inline_asm_elementwise(asm, "=r,r,r", [w_packed, zero], tl.int16, is_pure=True, pack=2)
        else:
            follow = word.to(tl.int32, bitcast=True)[:, None]
            bits = tl.inline_asm_elementwise(asm, "=r,r,r,r", [w_packed, follow], tl.int16, is_pure=True, pack=2)
        w = bits.to(DTYPE, bitcast=True)
    else:
        code = (w_packed << (8 - 8 * PLANE)) >> 8
        if HAS_ZERO:
            code += (128 - (word & 255)).to(tl.int16)[:, None]
        w = code.to(DTYPE)
    return w


# 4-bit codes to int8, four in a register. Of packing planes8_w4 a 32-bit register holds four bytes u1 u0:
#
#     u = q + 8, so u ^ 8 is q in two's complement; in the upper half of a byte it is the int8 16 q:
#     plane 1   (r ^ 0x80808080) & 0xF0F0F0F0             plane 0   ((r << 4) ^ 0x80808080) & 0xF0F0F0F0
#
# Three instructions for eight weights ((a ^ b) & c is one LOP3, 0x28) and no zero point left to fold: the sums are 16 times
# what is meant, exactly, and a sum of K products stays within int32 for K <= 132,104 like any int8 product.


@triton.constexpr_function
def _plane8(plane: int) -> str:
    shift = "mov.b32 t, $1;" if plane else "shl.b32 t, $1, 4;"
    return f"{{ .reg .b32 t; {shift} lop3.b32 $0, t, 0x80808080, 0xF0F0F0F0, 0x28; }}"


@triton.jit
def unpack_plane8(w_packed, PLANE: tl.constexpr, USE_ASM: tl.constexpr):
    """Plane `PLANE` of bytes int8 [BLOCK_N, J] -> int8 [BLOCK_N, J], 16 times the signed code."""
    if USE_ASM:
        w = tl.inline_asm_elementwise(_plane8(PLANE), "=r,r", [w_packed], tl.int8, is_pure=True, pack=4)
    elif PLANE == 0:
        w = ((w_packed << 4) ^ -128) & -16
    else:
        w = (w_packed ^ -128) & -16
    return w


@triton.jit
def unpack_plane8_with(w_packed, scale, PLANE: tl.constexpr, USE_ASM: tl.constexpr):
    """As unpack_plane8; fp32 `scale` [BLOCK_N] is handed to the assembly, which does not read it.

    Only a load that feeds a dot is pipelined. So the scale's load travels ahead with the codes, and lands in the shared
    memory from which each thread takes the scales of its own rows; it costs no instruction here.
    """
    if USE_ASM:
        follow = scale.to(tl.int32, bitcast=True)[:, None]
        w = tl.inline_asm_elementwise(_plane8(PLANE), "=r,r,r,r,r,r", [w_packed, follow], tl.int8, is_pure=True, pack=4)
    else:
        w = unpack_plane8(w_packed, PLANE, USE_ASM)
    return w


# Rows to int8, the tail of every op that makes activations for int8 matmuls; kernels/rows.py has the meaning.


@triton.jit
def row_scale(peak, poison):
    """(is the row neither zero nor poisoned, 127 / absmax or 0, scale) of a row.

    peak fp32 [BLOCK]: the largest absolute values that each place has met; poison fp32 [BLOCK]: sums of value * 0. A
    maximum may drop NaN, a sum does not, and Inf * 0 is NaN.
    """
    absmax = tl.max(peak, axis=0)
    poisoned = tl.sum(poison, axis=0)
    live = (absmax >= 2.0**-100) & (poisoned == 0.0)
    inverse = tl.where(live, tl.div_rn(127.0, tl.where(live, absmax, 1.0)), 0.0)
    return live, inverse, tl.where(live, tl.div_rn(absmax, 127.0), 1.0) + poisoned


@triton.jit
def row_code(y, live, inverse):
    """Codes -127 .. 127 of fp32 numbers [BLOCK], still as fp32."""
    product = tl.where(live, y, 0.0) * inverse
    # fp32 of 1.5 * 2^23 has steps of 1, so the add rounds to the nearest even integer
    return tl.minimum(tl.maximum((product + 12582912.0) - 12582912.0, -127.0), 127.0)


@triton.jit
def exp(x):
    """e^x of fp32, within 1.51 ulp: step by step what csrc/silu.h does, so the same bits (nothing here may be fused).

    n = round(x / ln 2), r = x - n ln 2 in two parts, of which the first is exact;   e^x = 2^n * (1 + r + r^2 Q(r))
    """
    x = tl.minimum(tl.maximum(x, -104.0), 104.0)
    n = (x * 1.44269504 + 12582912.0) - 12582912.0
    r = (x - n * 0.693359375) - n * -2.12194440e-4
    q = 0.0013814539415761828 * r + 0.00836874544620514
    q = q * r + 0.04166838899254799
    q = q * r + 0.1666652113199234
    q = q * r + 0.4999999403953552
    p = (q * (r * r) + r) + 1.0
    half = (n * 0.5 + 12582912.0) - 12582912.0  # 2^n in two factors: e^88.7 is an fp32 number, 2^128 is not
    low = ((half.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    high = (((n - half).to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return (p * low) * high


@triton.jit
def silu(x):
    """x / (1 + e^-x) of fp32, within 4 ulp, the same bits as csrc/silu.h."""
    return tl.div_rn(x, exp(-x) + 1.0)


# Two-level scales s = S * m multiply the code by m = 1..16 and stay int8. r holds four codes u = 0..15, and no lane of
#
#     r * m + c,   c = (128 - 8 m) * 0x01010101        u m + 128 - 8 m  =  q m + 128, at least 0 and at most 240
#
# carries into the next; ^ 0x80808080 takes the 128 back. Three or four instructions for four weights. QServe
# (mit-han-lab/omniserve) multiplies registers of four codes too, and subtracts by an instruction of its own.


@triton.constexpr_function
def _plane8_times(plane: int) -> str:
    shift = "shr.u32 t, $1, 4;" if plane else "mov.b32 t, $1;"
    times = "and.b32 t, t, 0x0F0F0F0F; mad.lo.u32 t, t, $2, $6; xor.b32 $0, t, 0x80808080;"
    return f"{{ .reg .b32 t; {shift} {times} }}"


@triton.jit
def unpack_plane8_times(w_packed, m, PLANE: tl.constexpr, USE_ASM: tl.constexpr):
    """Plane `PLANE` of bytes int8 [BLOCK_N, J] -> int8 [BLOCK_N, J], the signed code times m, int32 [BLOCK_N] in 0..16."""
    if USE_ASM:
        add = m * -0x08080808 - 0x7F7F7F80
        args = [w_packed, m[:, None], add[:, None]]
        w = tl.inline_asm_elementwise(_plane8_times(PLANE), "=r,r,r,r,r,r,r,r,r,r", args, tl.int8, is_pure=True, pack=4)
    else:
        code = ((w_packed >> (4 * PLANE)) & 0xF).to(tl.int32) - 8
        w = (code * m[:, None]).to(tl.int8)
    return w


@triton.jit(do_not_specialize=["M"])
def add_slices(
    part_ptr, sx_ptr, sw_ptr, bias_ptr, y_ptr,
    M, N,
    stride_ym,
    SLICES: tl.constexpr, HAS_SX: tl.constexpr, HAS_SW: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y[m, n] = (sum over s of part[s, m, n], in the order of s) * sx[m] * sw[n] + bias[n]

    part [SLICES, M, N] fp32 or int32, contiguous; sx [M], sw [N], bias [N] fp32, each or none; y [M, N], rows stride_ym apart.

        part  s=0 [....]  s=1 [....]  ...      one program adds BLOCK neighbours of one row of y:
                  └───── + ─────┘              always first to last, so the bits do not depend on who came first
    """
    m = tl.program_id(1).to(tl.int64)
    offs_n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask_n = offs_n < N

    total = tl.load(part_ptr + m * N + offs_n, mask=mask_n, other=0)  # [BLOCK]
    for s in tl.static_range(1, SLICES):
        total += tl.load(part_ptr + (s * tl.num_programs(1) + m) * N + offs_n, mask=mask_n, other=0)

    y = total.to(tl.float32)
    if HAS_SX:
        y *= tl.load(sx_ptr + m)
    if HAS_SW:
        y *= tl.load(sw_ptr + offs_n, mask=mask_n, other=0.0)
    if HAS_BIAS:
        y += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0)
    tl.store(y_ptr + m * stride_ym + offs_n, y.to(y_ptr.dtype.element_ty), mask=mask_n)


def add_slices_launch(
    part: torch.Tensor,
    sx: torch.Tensor | None,
    sw: torch.Tensor | None,
    bias: torch.Tensor | None,
    y: torch.Tensor,
) -> Launch:
    """The second kernel of a split-K product: part [SLICES, M, N] -> y [M, N]."""
    slices, m, n = part.shape
    block = 1024
    flags = {"SLICES": slices, "HAS_SX": sx is not None, "HAS_SW": sw is not None, "HAS_BIAS": bias is not None}
    args = (part, *(part if t is None else t for t in (sx, sw, bias)), y, m, n, y.stride(0))
    options = {"BLOCK": block, "num_warps": 4, "enable_fp_fusion": FUSION}
    return Launch(add_slices, (triton.cdiv(n, block), m), args, flags | options)
