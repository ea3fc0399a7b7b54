// kv_append: what happens to fresh tokens before attention. A head's row is read into fp32, normed (optional), turned
// by its position (optional), rounded once, and written: keys and values to their slots in the pages, queries to q_out.
//
// 16 partial sums of squares, added up in one order, and single roundings everywhere: all ISAs give the same bits.
#include "ops.h"
#include "parallel.h"
#include "simd.h"

namespace percard {
namespace PERCARD_ISA {
namespace append {

constexpr int64_t kMost = 256;  // elements of a head; contract.py says so

// y [size] = turn(norm(x [size])). cos_sin is null or the row of this token's position: cosines, then sines.
template <int kDtype>
PERCARD_INLINE void head(const KvAppend& a, const void* x, int64_t at, const void* weight, const float* cos_sin,
                         void* y, int64_t to) {
    alignas(64) float row[kMost + 16], turned[kMost + 16];
    F32 squares = set_f32(0.0f);
    for (int64_t d = 0; d < a.size; d += 16) {
        const F32 v = load_as_f32(x, at + d, kDtype);
        squares = fma(v, v, squares);
        store_f32(row + d, v);
    }
    if (weight != nullptr) {
        const float mean = sum_of_lanes(squares) / static_cast<float>(a.size);
        const F32 inverse = set_f32(1.0f / __builtin_sqrtf(mean + a.eps));
        for (int64_t d = 0; d < a.size; d += 16)
            store_f32(row + d, mul(mul(load_f32(row + d), inverse), load_as_f32(weight, d, kDtype)));
    }
    const float* from = row;
    if (cos_sin != nullptr) {
        // low' = low cos - high sin, high' = high cos + low sin. Where half a head is no multiple of 16, lanes past it
        // are written and then written again: first all of the low half, then the high one.
        const int64_t half = a.size / 2;
        from = turned;
        for (int64_t d = 0; d < half; d += 16) {
            const F32 cosine = load_part(cos_sin + d, half - d), sine = load_part(cos_sin + half + d, half - d);
            const F32 low = load_f32(row + d), high = load_part(row + half + d, half - d);
            store_f32(turned + d, sub(mul(low, cosine), mul(high, sine)));
        }
        for (int64_t d = 0; d < half; d += 16) {
            const F32 cosine = load_part(cos_sin + d, half - d), sine = load_part(cos_sin + half + d, half - d);
            const F32 low = load_f32(row + d), high = load_part(row + half + d, half - d);
            store_f32(turned + half + d, add(mul(high, cosine), mul(low, sine)));
        }
    }
    for (int64_t d = 0; d < a.size; d += 16) store_as(y, to + d, kDtype, load_f32(from + d));
}

template <int kDtype>
void token(const KvAppend& a, int64_t t) {
    const float* cos_sin = a.cos_sin != nullptr ? a.cos_sin + a.positions[t] * a.size : nullptr;
    for (int64_t h = 0; a.q != nullptr && h < a.heads; ++h)
        head<kDtype>(a, a.q, t * a.stride_qt + h * a.stride_qh, a.q_weight, cos_sin, a.q_out,
                     (t * a.heads + h) * a.size);
    if (a.slots[t] < 0) return;
    const int64_t page = a.slots[t] / a.page, r = a.slots[t] % a.page;
    for (int64_t h = 0; h < a.kv_heads; ++h) {
        const int64_t to = page * a.stride_kp + h * a.stride_kh + r * a.stride_kr;
        head<kDtype>(a, a.k, t * a.stride_kt + h * a.stride_kth, a.k_weight, cos_sin, a.k_pages, to);
        const int64_t from = t * a.stride_vt + h * a.stride_vth;
        const int64_t into = page * a.stride_vp + h * a.stride_vh + r * a.stride_vr;
        std::memcpy(static_cast<char*>(a.v_pages) + into * dtype_bytes(kDtype),
                    static_cast<const char*>(a.v) + from * dtype_bytes(kDtype), a.size * dtype_bytes(kDtype));
    }
}

}  // namespace append

void kv_append(const KvAppend& a) {
    const auto tokens = a.dtype == kFloat32    ? append::token<kFloat32>
                        : a.dtype == kBFloat16 ? append::token<kBFloat16>
                                               : append::token<kFloat16>;
    parallel(a.tokens, (a.heads + 2 * a.kv_heads) * a.size * 0.3 + 30, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) tokens(a, t);
    });
}

}  // namespace PERCARD_ISA
}  // namespace percard
