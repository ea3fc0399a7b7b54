// rmsnorm_quantize: r = x + residual, y = (r / sqrt(mean(r^2) + eps)) * weight, then y to int8 codes row by row.
//
// Three passes over a row that stays in the cache: the sum of squares (and r), the largest absolute value (and y), the
// codes. 64 partial sums, added up in one order, so all ISAs give the same bits.
#include "ops.h"
#include "parallel.h"
#include "rows.h"

namespace percard {
namespace PERCARD_ISA {
namespace rmsnorm {

PERCARD_INLINE void row(const RmsnormQuantize& a, int64_t m, int dtype, void* y) {
    const int64_t at = m * a.stride_xm;
    F32 squares[4] = {set_f32(0.0f), set_f32(0.0f), set_f32(0.0f), set_f32(0.0f)};
    for (int64_t k = 0; k < a.k; k += 64) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const int64_t here = k + i * 16, count = a.k - here;
            F32 v = load_part_as(a.x, at + here, dtype, count);
            if (a.residual != nullptr) {
                v = add(v, load_part_as(a.residual, m * a.stride_rm + here, dtype, count));
                v = keep_part(a.r, m * a.k + here, dtype, v, count);
            }
            squares[i] = add(squares[i], mul(v, v));
        }
    }
    const float sum = total(add(add(squares[0], squares[1]), add(squares[2], squares[3])));
    const float root = __builtin_sqrtf(sum / static_cast<float>(a.k) + a.eps);
    const F32 inverse = set_f32(1.0f / root);
    const void* from = a.residual != nullptr ? a.r : a.x;
    const int64_t start = a.residual != nullptr ? m * a.k : at;
    const auto norm = [&](int64_t k, int64_t count) __attribute__((always_inline)) {
        const F32 v = load_part_as(from, start + k, dtype, count), w = load_part_as(a.weight, k, dtype, count);
        return keep_part(y, k, dtype, mul(mul(v, inverse), w), count);
    };
    const auto again = [&](int64_t k, int64_t count)
                           __attribute__((always_inline)) { return load_part_as(y, k, dtype, count); };
    quantize_row(a.k, norm, again, a.q + m * a.k, a.scale + m, a.row_sum + m);
}

}  // namespace rmsnorm

void rmsnorm_quantize(const RmsnormQuantize& a) {
    parallel(a.m, a.k * 0.5 + 30, [&](int64_t begin, int64_t end) {
        void* y = scratch(kSlotX, a.k * dtype_bytes(a.x_dtype));
        for (int64_t m = begin; m < end; ++m) {
            if (a.x_dtype == kFloat32)
                rmsnorm::row(a, m, kFloat32, y);
            else if (a.x_dtype == kBFloat16)
                rmsnorm::row(a, m, kBFloat16, y);
            else
                rmsnorm::row(a, m, kFloat16, y);
        }
    });
}

}  // namespace PERCARD_ISA
}  // namespace percard
