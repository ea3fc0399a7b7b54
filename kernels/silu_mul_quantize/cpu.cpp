// silu_mul_quantize: y = silu(x[m, :k]) * x[m, k:], then y to int8 codes row by row.
//
// Two passes: y and its largest absolute value, then the codes of y, which stayed in the cache.
#include "ops.h"
#include "parallel.h"
#include "rows.h"
#include "silu.h"

namespace percard {
namespace PERCARD_ISA {
namespace swiglu {

PERCARD_INLINE void row(const SiluMulQuantize& a, int64_t m, int dtype, void* y) {
    const int64_t gate_at = m * a.stride_xm, up_at = gate_at + a.k;
    const auto product = [&](int64_t k, int64_t count) __attribute__((always_inline)) {
        const F32 gate = load_part_as(a.x, gate_at + k, dtype, count), up = load_part_as(a.x, up_at + k, dtype, count);
        return keep_part(y, k, dtype, mul(rounded_to(silu(gate), dtype), up), count);
    };
    const auto again = [&](int64_t k, int64_t count)
                           __attribute__((always_inline)) { return load_part_as(y, k, dtype, count); };
    quantize_row(a.k, product, again, a.q + m * a.k, a.scale + m, a.row_sum + m);
}

}  // namespace swiglu

void silu_mul_quantize(const SiluMulQuantize& a) {
    parallel(a.m, a.k * 1.0 + 30, [&](int64_t begin, int64_t end) {
        void* y = scratch(kSlotX, a.k * dtype_bytes(a.x_dtype));
        for (int64_t m = begin; m < end; ++m) {
            if (a.x_dtype == kFloat32)
                swiglu::row(a, m, kFloat32, y);
            else if (a.x_dtype == kBFloat16)
                swiglu::row(a, m, kBFloat16, y);
            else
                swiglu::row(a, m, kFloat16, y);
        }
    });
}

}  // namespace PERCARD_ISA
}  // namespace percard
