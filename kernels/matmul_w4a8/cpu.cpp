// matmul_w4a8: see __init__.py for the formula.
#include "ops.h"
#include "parallel.h"
#include "simd.h"

namespace percard {
namespace PERCARD_ISA {

void matmul_w4a8(const MatmulW4A8& a) {
    const int64_t blocks = (a.n + 15) / 16, lines = round_up(a.k, 128) / 8, np = blocks * 16;
    parallel(blocks, a.m * a.k * 16.0, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) {
            const uint8_t* w = a.w + b * lines * 64;
            for (int64_t m = 0; m < a.m; ++m) {
                float sum[16] = {};
                const int8_t* x = a.xq + m * a.stride_xm;
                for (int64_t start = 0, g = 0; start < a.k; start += a.group, ++g) {
                    int32_t acc[16] = {};
                    for (int64_t k = start; k < min_of(a.k, start + a.group); ++k)
                        for (int r = 0; r < 16; ++r) {
                            const uint8_t byte = w[k / 8 * 64 + r * 4 + k % 4];
                            acc[r] += x[k] * (((k & 4) ? byte >> 4 : byte & 15) - 8);
                        }
                    for (int r = 0; r < 16; ++r)
                        sum[r] = __builtin_fmaf(static_cast<float>(acc[r]), a.scale[g * np + b * 16 + r], sum[r]);
                }
                for (int64_t r = 0; r < min_of(16, a.n - b * 16); ++r) {
                    float y = sum[r] * a.sx[m];
                    if (a.bias) y = y + a.bias[b * 16 + r];
                    store_float(a.y, m * a.n + b * 16 + r, a.y_dtype, y);
                }
            }
        }
    });
}

}  // namespace PERCARD_ISA
}  // namespace percard
