// exp, tanh and SiLU of 16 lanes, made of single multiplications and additions only: all ISAs give the same bits, and
// so does the Triton twin (kernels/tiles.py).
#pragma once

#include "simd.h"

namespace percard {
namespace PERCARD_ISA {

// e^x within 1.51 ulp (every fp32 number of -87 .. 88 was tried); past that it goes to 0 and to infinity as fp32 does.
//
//   n = round(x / ln 2), r = x - n ln 2 in two parts, of which the first is exact;   e^x = 2^n * (1 + r + r^2 Q(r))
//
// Q has the least relative error that a polynomial of degree 4 can have here, 3.1e-9. 2^n is multiplied in two halves,
// since 2^128 is no fp32 number but e^88.7 is one.
PERCARD_INLINE F32 exp(F32 x) {
    const F32 magic = set_f32(12582912.0f);              // 1.5 * 2^23: adding it rounds to a whole number, half to even
    x = min(set_f32(104.0f), max(set_f32(-104.0f), x));  // in this order NaN stays NaN
    const F32 n = sub(add(mul(x, set_f32(1.44269504f)), magic), magic);
    const F32 r = sub(sub(x, mul(n, set_f32(0.693359375f))), mul(n, set_f32(-2.12194440e-4f)));
    F32 q = set_f32(0x1.6a23cep-10f);
    q = add(mul(q, r), set_f32(0x1.123a2p-7f));
    q = add(mul(q, r), set_f32(0x1.5558f2p-5f));
    q = add(mul(q, r), set_f32(0x1.555492p-3f));
    q = add(mul(q, r), set_f32(0x1.fffffcp-2f));
    const F32 p = add(add(mul(q, mul(r, r)), r), set_f32(1.0f));
    const F32 half = sub(add(mul(n, set_f32(0.5f)), magic), magic);
    const I32 bias = set_i32(127);
    const F32 low = as_f32(shift_left<23>(add(to_i32(half), bias)));
    const F32 high = as_f32(shift_left<23>(add(to_i32(sub(n, half)), bias)));
    return mul(mul(p, low), high);
}

// (e^2|x| - 1) / (e^2|x| + 1) with the sign of x, within 4 ulp: e^y - 1 = 2^n (r + r^2 Q(r)) + (2^n - 1), n, r and Q as
// in exp, so nothing is lost near 0.
PERCARD_INLINE F32 tanh(F32 x) {
    const F32 magic = set_f32(12582912.0f), y = mul(min(set_f32(15.0f), abs(x)), set_f32(2.0f));  // NaN stays NaN
    const F32 n = sub(add(mul(y, set_f32(1.44269504f)), magic), magic);
    const F32 r = sub(sub(y, mul(n, set_f32(0.693359375f))), mul(n, set_f32(-2.12194440e-4f)));
    F32 q = set_f32(0x1.6a23cep-10f);
    q = add(mul(q, r), set_f32(0x1.123a2p-7f));
    q = add(mul(q, r), set_f32(0x1.5558f2p-5f));
    q = add(mul(q, r), set_f32(0x1.555492p-3f));
    q = add(mul(q, r), set_f32(0x1.fffffcp-2f));
    const F32 scale = as_f32(shift_left<23>(add(to_i32(n), set_i32(127))));
    const F32 less = add(mul(scale, add(mul(q, mul(r, r)), r)), sub(scale, set_f32(1.0f)));
    const F32 size = div(less, add(less, set_f32(2.0f)));
    return as_f32(add(as_i32(size), bit_and(as_i32(x), set_i32(-0x7fffffff - 1))));
}

// x / (1 + e^-x), within 4 ulp; NaN for NaN and for -infinity, as torch gives it.
PERCARD_INLINE F32 silu(F32 x) { return div(x, add(exp(sub(set_f32(0.0f), x)), set_f32(1.0f))); }

}  // namespace PERCARD_ISA
}  // namespace percard
