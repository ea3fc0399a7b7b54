// quantize_rows: scale[m] = absmax(x[m, :]) / 127, q = round_half_even(x * (127 / absmax)), row_sum[m] = sum of q[m,
// :].
//
// Two passes over a row that stays in the cache: the largest absolute value, then the codes.
#include "ops.h"
#include "parallel.h"
#include "rows.h"

namespace percard {
namespace PERCARD_ISA {
namespace quantize {

PERCARD_INLINE void row(const QuantizeRows& a, int64_t m, int dtype) {
    const int64_t at = m * a.stride_xm;
    const auto load = [&](int64_t k, int64_t count)
                          __attribute__((always_inline)) { return load_part_as(a.x, at + k, dtype, count); };
    quantize_row(a.k, load, load, a.q + m * a.k, a.scale + m, a.row_sum + m);
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
