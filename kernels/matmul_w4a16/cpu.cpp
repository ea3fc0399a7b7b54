// matmul_w4a16: see __init__.py for the formula.
#include "ops.h"
#include "parallel.h"
#include "simd.h"

namespace percard {
namespace PERCARD_ISA {

void matmul_w4a16(const MatmulW4A16& a) {
    const int64_t blocks = (a.n + 15) / 16, lines = round_up(a.k, 128) / 8, np = blocks * 16;
    parallel(blocks, a.m * a.k * 16.0, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) {
            const uint8_t* w = a.w + b * lines * 64;
            for (int64_t m = 0; m < a.m; ++m) {
                float sum[16] = {};
                for (int64_t start = 0, g = 0; start < a.k; start += a.group, ++g) {
                    float acc[16] = {};
                    for (int64_t k = start; k < min_of(a.k, start + a.group); ++k) {
                        const float x = load_float(a.x, m * a.stride_xm + k, a.x_dtype);
                        for (int r = 0; r < 16; ++r) {
                            const uint8_t byte = w[k / 8 * 64 + r * 4 + k % 4];
                            const int zero = a.zero ? a.zero[g * np + b * 16 + r] : 0;
                            acc[r] += x * static_cast<float>(((k & 4) ? byte >> 4 : byte & 15) - 8 - zero);
                        }
                    }
                    for (int r = 0; r < 16; ++r) sum[r] += acc[r] * a.scale[g * np + b * 16 + r];
                }
                for (int64_t r = 0; r < min_of(16, a.n - b * 16); ++r) {
                    const float y = a.bias ? sum[r] + a.bias[b * 16 + r] : sum[r];
                    store_float(a.y, m * a.n + b * 16 + r, a.x_dtype, y);
                }
            }
        }
    });
}

}  // namespace PERCARD_ISA
}  // namespace percard
