// search_scale: see __init__.py for the formula.
#include <cmath>

#include "ops.h"
#include "parallel.h"
#include "simd.h"

namespace percard {
namespace PERCARD_ISA {

static float stored(float scale, int dtype) {
    if (dtype == kBFloat16) scale = float_of(static_cast<uint32_t>(to_bf16(scale)) << 16);
    if (dtype == kFloat16) scale = from_f16(to_f16(scale));
    const float least = dtype == kFloat16 ? 5.9604644775390625e-08f : 1.1754943508222875e-38f;
    return scale < least ? least : scale;
}

static float clamp(float v, float low, float high) { return v < low ? low : (v > high ? high : v); }

static float best_scale(const SearchScale& a, const float* w) {
    const float qmin = -static_cast<float>(1 << (a.bits - 1)), qmax = -qmin - 1.0f, steps = qmax - qmin;
    float low = 0.0f, high = 0.0f;
    for (int64_t k = 0; k < a.group; ++k) {
        low = w[k] < low ? w[k] : low;
        high = w[k] > high ? w[k] : high;
    }
    const float absmax = high > -low ? high : -low;
    const float widest = a.symmetric ? absmax / (steps / 2.0f) : (high - low) / steps;
    if (!(widest > 0.0f)) return 1.0f;
    const float zero =
        a.symmetric ? 0.0f : __builtin_rintf(clamp(qmin - low / stored(widest, a.scale_dtype), qmin, qmax));
    float best = 1.0f, least = __builtin_inff();
    for (int i = 0; i < 80; ++i) {
        const float scale = stored(widest * static_cast<float>(1.0 - i / 100.0), a.scale_dtype);
        if (!(scale <= 3.4028234663852886e38f)) continue;
        float error = 0.0f;
        for (int64_t k = 0; k < a.group; ++k) {
            const float code = __builtin_rintf(clamp(w[k] / scale + zero, qmin, qmax));
            const float e = (code - zero) * scale - w[k];
            error += a.norm == 2.0f ? e * e : ::powf(__builtin_fabsf(e), a.norm);
        }
        if (error < least) {
            least = error;
            best = scale;
        }
    }
    return best;
}

void search_scale(const SearchScale& a) {
    const int64_t groups = a.k / a.group;
    parallel(a.n * groups, a.group * 500.0, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
            store_float(a.out, i, a.scale_dtype, best_scale(a, a.w + i / groups * a.stride_wn + i % groups * a.group));
    });
}

}  // namespace PERCARD_ISA
}  // namespace percard
