// quantize_rows: see __init__.py for the formula. One thread per block of rows.
#include "ops.h"
#include "parallel.h"
#include "simd.h"

namespace percard {
namespace PERCARD_ISA {

static void row(const QuantizeRows& a, int64_t m) {
    constexpr float kTiny = 7.888609052210118e-31f;  // 2^-100
    float absmax = 0.0f;
    bool finite = true;
    for (int64_t k = 0; k < a.k; ++k) {
        const float v = __builtin_fabsf(load_as_float(a.x, m * a.stride_xm + k, a.x_dtype));
        finite = finite && v <= 3.4028234663852886e38f;
        absmax = v > absmax ? v : absmax;
    }
    const bool live = finite && absmax >= kTiny;
    const float inverse = live ? 127.0f / absmax : 0.0f;
    int32_t sum = 0;
    for (int64_t k = 0; k < a.k; ++k) {
        float v = live ? load_as_float(a.x, m * a.stride_xm + k, a.x_dtype) * inverse : 0.0f;
        v = __builtin_rintf(v);
        v = v < -127.0f ? -127.0f : (v > 127.0f ? 127.0f : v);
        a.q[m * a.k + k] = static_cast<int8_t>(v);
        sum += static_cast<int32_t>(v);
    }
    a.scale[m] = finite ? (live ? absmax / 127.0f : 1.0f) : __builtin_nanf("");
    a.row_sum[m] = sum;
}

void quantize_rows(const QuantizeRows& a) {
    parallel(a.m, a.k * 1.0 + 1.0, [&](int64_t begin, int64_t end) {
        for (int64_t m = begin; m < end; ++m) row(a, m);
    });
}

}  // namespace PERCARD_ISA
}  // namespace percard
