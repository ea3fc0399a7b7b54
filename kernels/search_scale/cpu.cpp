// search_scale: see __init__.py for the formula. 80 scales of one group of weights are tried at once:
//
//   lanes = 16 of the 80 scales      one weight, broadcast   ->   16 errors
//
// so the sums need no step across lanes, and every ISA adds the errors of a scale in the order of the weights: same
// bits. The division is a true one: a product with 1 / scale would move codes that lie on a boundary.
#include <cmath>

#include "ops.h"
#include "parallel.h"
#include "simd.h"

namespace percard {
namespace PERCARD_ISA {
namespace search {

constexpr int kTrials = 80, kVectors = kTrials / 16;

// Scales as they are stored, and never below the least number that no device flushes to 0.
PERCARD_INLINE F32 stored(F32 scale, int dtype) {
    if (dtype != kFloat32) {
        uint16_t half[16];
        store_as(half, 0, dtype, scale);
        scale = load_as_f32(half, 0, dtype);
    }
    return max(scale, set_f32(dtype == kFloat16 ? 5.9604644775390625e-08f : 1.1754943508222875e-38f));
}

PERCARD_INLINE float clamp(float v, float low, float high) { return v < low ? low : (v > high ? high : v); }

struct Range {
    float qmin, qmax, zero;
};

template <bool kZero, bool kSquare>
PERCARD_INLINE F32 errors(const float* w, int64_t count, F32 scale, const Range& range, float norm) {
    const F32 low = set_f32(range.qmin), high = set_f32(range.qmax), zero = set_f32(range.zero);
    F32 sum = set_f32(0.0f);
    for (int64_t k = 0; k < count; ++k) {
        const F32 v = set_f32(w[k]);
        F32 code = div(v, scale);
        if (kZero) code = add(code, zero);
        code = round(min(max(code, low), high));
        if (kZero) code = sub(code, zero);
        const F32 e = sub(mul(code, scale), v);
        if (kSquare) {
            sum = add(sum, mul(e, e));
        } else {
            float lanes[16];
            store_f32(lanes, abs(e));
            for (float& lane : lanes) lane = ::powf(lane, norm);
            sum = add(sum, load_f32(lanes));
        }
    }
    return sum;
}

// The best scale of `count` weights, as it is stored.
static float best_scale(const SearchScale& a, const float* w, const float* shrink) {
    const int64_t count = a.group;
    const float qmin = -static_cast<float>(1 << (a.bits - 1)), qmax = -qmin - 1.0f, steps = qmax - qmin;
    F32 least = set_f32(0.0f), most = set_f32(0.0f);
    for (int64_t k = 0; k < count; k += 16) {
        const F32 v = load_part(w + k, count - k);
        least = min(v, least);
        most = max(v, most);
    }
    const float low = -largest(sub(set_f32(0.0f), least)), high = largest(most), absmax = high > -low ? high : -low;
    const float widest = a.symmetric ? absmax / (steps / 2.0f) : (high - low) / steps;
    if (!(widest > 0.0f)) return 1.0f;

    float first[16];
    store_f32(first, stored(set_f32(widest), a.scale_dtype));
    const float zero = a.symmetric ? 0.0f : __builtin_rintf(clamp(qmin - low / first[0], qmin, qmax));
    const Range range{qmin, qmax, zero};
    float best = 1.0f, least_error = __builtin_inff();
    for (int v = 0; v < kVectors; ++v) {
        const F32 scale = stored(mul(set_f32(widest), load_f32(shrink + v * 16)), a.scale_dtype);
        F32 error;
        if (a.norm != 2.0f)
            error = errors<true, false>(w, count, scale, range, a.norm);
        else if (a.symmetric)
            error = errors<false, true>(w, count, scale, range, a.norm);
        else
            error = errors<true, true>(w, count, scale, range, a.norm);
        float scales[16], sums[16];
        store_f32(scales, scale);
        store_f32(sums, error);
        for (int i = 0; i < 16; ++i) {  // an infinite scale has the error NaN and never wins
            if (!(sums[i] < least_error)) continue;
            least_error = sums[i];
            best = scales[i];
        }
    }
    return best;
}

}  // namespace search

void search_scale(const SearchScale& a) {
    float shrink[search::kTrials];
    for (int i = 0; i < search::kTrials; ++i) shrink[i] = static_cast<float>(1.0 - i / 100.0);
    const int64_t groups = a.group > 0 ? a.k / a.group : 0;
    parallel(a.n * groups, a.group * 25.0, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const float* w = a.w + i / groups * a.stride_wn + i % groups * a.group;
            store_float(a.out, i, a.scale_dtype, search::best_scale(a, w, shrink));
        }
    });
}

}  // namespace PERCARD_ISA
}  // namespace percard
