// quantize_rows: scale[m] = absmax(x[m, :]) / 127, q = round_half_even(x * (127 / absmax)), row_sum[m] = sum of q[m,
// :].
//
// Two passes over a row that stays in the cache: the largest absolute value, then the codes. Only steps that round the
// same way everywhere are used (one division, one product per number), so all ISAs give the same bits.
#include "ops.h"
#include "parallel.h"
#include "simd.h"

namespace percard {
namespace PERCARD_ISA {
namespace quantize {

constexpr float kTiny = 7.888609052210118e-31f;     // 2^-100: less counts as a row of zeros
constexpr float kLargest = 3.4028234663852886e38f;  // of fp32

PERCARD_INLINE void row(const QuantizeRows& a, int64_t m, int dtype) {
    const int64_t at = m * a.stride_xm;
    F32 most = set_f32(0.0f);
    bool finite = true;
    for (int64_t k = 0; k < a.k; k += 64) {
        F32 here = set_f32(0.0f);
        for (int i = 0; i < 64; i += 16) {
            const F32 v = abs(load_part_as(a.x, at + k + i, dtype, a.k - k - i));
            here = max(here, v);
            finite = finite && all_at_most(v, kLargest);  // a maximum may lose a NaN, so each number is asked
        }
        most = max(here, most);
    }
    const float absmax = largest(most);
    const bool live = finite && absmax >= kTiny;
    const F32 inverse = set_f32(live ? 127.0f / absmax : 0.0f), low = set_f32(-127.0f), high = set_f32(127.0f);
    I32 sum = set_i32(0);
    int8_t* q = a.q + m * a.k;
    for (int64_t k = 0; k < a.k; k += 16) {
        const F32 v = live ? load_part_as(a.x, at + k, dtype, a.k - k) : set_f32(0.0f);
        const I32 codes = to_i32(max(min(mul(v, inverse), high), low));
        sum = add(sum, codes);
        if (k + 16 <= a.k) {
            store_i8(q + k, codes);
        } else {
            int8_t last[16];
            store_i8(last, codes);
            std::memcpy(q + k, last, a.k - k);
        }
    }
    int32_t sums[16], total = 0;
    store_i32(sums, sum);
    for (int32_t s : sums) total += s;
    a.scale[m] = finite ? (live ? absmax / 127.0f : 1.0f) : __builtin_nanf("");
    a.row_sum[m] = total;
}

}  // namespace quantize

void quantize_rows(const QuantizeRows& a) {
    parallel(a.m, a.k * 0.3 + 20, [&](int64_t begin, int64_t end) {
        for (int64_t m = begin; m < end; ++m) {
            if (a.x_dtype == kFloat32)
                quantize::row(a, m, kFloat32);
            else if (a.x_dtype == kBFloat16)
                quantize::row(a, m, kBFloat16);
            else
                quantize::row(a, m, kFloat16);
        }
    });
}

}  // namespace PERCARD_ISA
}  // namespace percard
