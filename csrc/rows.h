// A row of numbers to int8 codes with one scale: the tail of every op that makes activations for int8 products.
//
//   scale = absmax / 127      q = round_half_even(v * (127 / absmax))      row_sum = sum of q
//
// Only steps that round the same way everywhere are used (one division, one product per number), so all ISAs give the
// same bits. kernels/rows.py says the same in torch, kernels/tiles.py in Triton.
#pragma once

#include "simd.h"

namespace percard {
namespace PERCARD_ISA {

constexpr float kTiny = 7.888609052210118e-31f;     // 2^-100: less counts as a row of zeros
constexpr float kLargest = 3.4028234663852886e38f;  // of fp32

// The numbers x as `dtype` holds them.
PERCARD_INLINE F32 rounded_to(F32 x, int dtype) {
    if (dtype == kFloat32) return x;
    uint16_t half[16];
    store_as(half, 0, dtype, x);
    return load_as_f32(half, 0, dtype);
}

// Stores the first `count` of 16 numbers as `dtype`, and returns what was stored; lanes past `count` become 0.
PERCARD_INLINE F32 keep_part(void* p, int64_t at, int dtype, F32 x, int64_t count) {
    store_part(p, at, dtype, x, count);
    return load_part_as(p, at, dtype, count);
}

// The sum of 16 lanes, always in the same order.
PERCARD_INLINE float total(F32 x) {
    float lanes[16], sum = 0.0f;
    store_f32(lanes, x);
    for (float lane : lanes) sum += lane;
    return sum;
}

// first(k, count) gives the 16 numbers from k on, 0 past the first `count` (which may be negative); again(k, count)
// gives the same ones once more. The largest absolute value comes from the first pass, the codes from the second.
template <typename First, typename Again>
PERCARD_INLINE void quantize_row(int64_t all, const First& first, const Again& again, int8_t* q, float* scale,
                                 int32_t* row_sum) {
    F32 most = set_f32(0.0f);
    bool finite = true;
    for (int64_t k = 0; k < all; k += 64) {
        F32 here = set_f32(0.0f);
        for (int i = 0; i < 64; i += 16) {
            const F32 v = abs(first(k + i, all - k - i));
            here = max(here, v);
            finite = finite && all_at_most(v, kLargest);  // a maximum may lose a NaN, so each number is asked
        }
        most = max(here, most);
    }
    const float absmax = largest(most);
    const bool live = finite && absmax >= kTiny;
    const F32 inverse = set_f32(live ? 127.0f / absmax : 0.0f), low = set_f32(-127.0f), high = set_f32(127.0f);
    I32 sum = set_i32(0);
    for (int64_t k = 0; k < all; k += 16) {
        const F32 v = live ? again(k, all - k) : set_f32(0.0f);
        const I32 codes = to_i32(max(min(mul(v, inverse), high), low));
        sum = add(sum, codes);
        if (k + 16 <= all) {
            store_i8(q + k, codes);
        } else {
            int8_t last[16];
            store_i8(last, codes);
            std::memcpy(q + k, last, all - k);
        }
    }
    int32_t sums[16], count = 0;
    store_i32(sums, sum);
    for (int32_t s : sums) count += s;
    *scale = finite ? (live ? absmax / 127.0f : 1.0f) : __builtin_nanf("");
    *row_sum = count;
}

}  // namespace PERCARD_ISA
}  // namespace percard
