// matmul_w8a8: see __init__.py for the formula.
#include "ops.h"
#include "parallel.h"
#include "simd.h"

namespace percard {
namespace PERCARD_ISA {

void matmul_w8a8(const MatmulW8A8& a) {
    const int64_t blocks = (a.n + 15) / 16, lines = round_up(a.k, 128) / 4;
    parallel(blocks, a.m * a.k * 16.0, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) {
            const int8_t* w = a.w + b * lines * 64;
            for (int64_t m = 0; m < a.m; ++m) {
                int32_t acc[16] = {};
                const int8_t* x = a.xq + m * a.stride_xm;
                for (int64_t k = 0; k < a.k; ++k)
                    for (int r = 0; r < 16; ++r) acc[r] += x[k] * w[k / 4 * 64 + r * 4 + k % 4];
                for (int64_t r = 0; r < min_of(16, a.n - b * 16); ++r) {
                    float y = static_cast<float>(acc[r]) * a.sx[m] * a.scale[b * 16 + r];
                    if (a.bias) y = y + a.bias[b * 16 + r];
                    store_float(a.y, m * a.n + b * 16 + r, a.y_dtype, y);
                }
            }
        }
    });
}

}  // namespace PERCARD_ISA
}  // namespace percard
