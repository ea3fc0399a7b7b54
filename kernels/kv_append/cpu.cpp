// kv_append: what happens to fresh tokens before attention. A head's row is read into fp32, normed (optional), turned
// by its position (optional), and written: queries to q_out, keys and values to their slots in the pages, rounded once
// to the type of the model, or to 8 or 4 bits under a scale of their own (formats/kvcache.py has the formulas).
//
// 16 partial sums of squares, added up in one order, and single roundings everywhere: all ISAs give the same bits.
#include "ops.h"
#include "parallel.h"
#include "simd.h"

namespace percard {
namespace PERCARD_ISA {
namespace append {

constexpr int64_t kMost = 256;                           // elements of a head; contract.py says so
constexpr float kSmallest = 1e-6f, kLargest = 65504.0f;  // of a scale; 65504 is the largest number of fp16
constexpr float kFinite = 3.4028234663852886e38f;        // the largest number of fp32
constexpr uint16_t kNan = 0x7e00;

struct Row {
    alignas(64) float x[kMost + 16], turned[kMost + 16];
};

// turn(norm(x [size])) in fp32, somewhere in `row`. cos_sin is null or the row of this token's position: cosines, then
// sines.
template <int kDtype>
PERCARD_INLINE float* prepared(const KvAppend& a, const void* x, int64_t at, const void* weight, const float* cos_sin,
                               Row& row) {
    F32 squares = set_f32(0.0f);
    for (int64_t d = 0; d < a.size; d += 16) {
        const F32 v = load_as_f32(x, at + d, kDtype);
        squares = fma(v, v, squares);
        store_f32(row.x + d, v);
    }
    if (weight != nullptr) {
        const float mean = sum_of_lanes(squares) / static_cast<float>(a.size);
        const F32 inverse = set_f32(1.0f / __builtin_sqrtf(mean + a.eps));
        for (int64_t d = 0; d < a.size; d += 16)
            store_f32(row.x + d, mul(mul(load_f32(row.x + d), inverse), load_as_f32(weight, d, kDtype)));
    }
    if (cos_sin == nullptr) return row.x;
    // low' = low cos - high sin, high' = high cos + low sin. Where half a head is no multiple of 16, lanes past it are
    // written and then written again: first all of the low half, then the high one.
    const int64_t half = a.size / 2;
    for (int64_t d = 0; d < half; d += 16) {
        const F32 cosine = load_part(cos_sin + d, half - d), sine = load_part(cos_sin + half + d, half - d);
        const F32 low = load_f32(row.x + d), high = load_part(row.x + half + d, half - d);
        store_f32(row.turned + d, sub(mul(low, cosine), mul(high, sine)));
    }
    for (int64_t d = 0; d < half; d += 16) {
        const F32 cosine = load_part(cos_sin + d, half - d), sine = load_part(cos_sin + half + d, half - d);
        const F32 low = load_f32(row.x + d), high = load_part(row.x + half + d, half - d);
        store_f32(row.turned + half + d, add(mul(high, cosine), mul(low, sine)));
    }
    return row.turned;
}

template <int kDtype>
PERCARD_INLINE void keep(const KvAppend& a, const float* x, void* y, int64_t to) {
    for (int64_t d = 0; d < a.size; d += 16) store_as(y, to + d, kDtype, load_f32(x + d));
}

PERCARD_INLINE bool finite(const float* x, int64_t size) {
    bool good = true;
    for (int64_t d = 0; d < size; d += 16) good = good && all_at_most(abs(load_f32(x + d)), kFinite);
    return good;
}

// The scale as fp16 holds it.
PERCARD_INLINE uint16_t scale_of(float wanted) {
    if (!(wanted > kSmallest)) wanted = kSmallest;
    return to_f16(wanted < kLargest ? wanted : kLargest);
}

PERCARD_INLINE float largest_abs(const float* x, int64_t size) {
    F32 most = set_f32(0.0f);
    for (int64_t d = 0; d < size; d += 16) most = max(most, abs(load_f32(x + d)));
    return largest_of_lanes(most);
}

// Codes of x - offset, clamped to first .. last and moved by `shift`; x [size] is finite.
PERCARD_INLINE void codes_of(const float* x, int64_t size, uint16_t scale, float offset, float first, float last,
                             int shift, int8_t* y) {
    const F32 by = set_f32(from_f16(scale)), from = set_f32(offset), low = set_f32(first), high = set_f32(last);
    for (int64_t d = 0; d < size; d += 16) {
        const F32 code = max(min(div(sub(load_f32(x + d), from), by), high), low);
        store_i8(y + d, add(to_i32(code), set_i32(shift)));
    }
}

// x [size] as int8; its scale.
PERCARD_INLINE uint16_t quantized8(const float* x, int64_t size, int8_t* y) {
    if (!finite(x, size)) {
        std::memset(y, 0, size);
        return kNan;
    }
    const uint16_t scale = scale_of(largest_abs(x, size) / 127.0f);
    codes_of(x, size, scale, 0.0f, -127.0f, 127.0f, 0, y);
    return scale;
}

// x [size] as bytes of two numbers of 0 .. 15, x[j] and x[j + size / 2], and zeros up to `row`; scale, and offset.
PERCARD_INLINE uint16_t quantized4(const float* x, int64_t size, bool symmetric, uint8_t* y, int64_t row,
                                   uint16_t* offset) {
    *offset = kNan;
    if (!finite(x, size)) {
        std::memset(y, 0, row);
        return kNan;
    }
    alignas(64) int8_t codes[kMost];
    uint16_t scale;
    if (symmetric) {
        scale = scale_of(largest_abs(x, size) / 7.0f);
        codes_of(x, size, scale, 0.0f, -7.0f, 7.0f, 8, codes);
    } else {
        F32 least = load_f32(x), most = least;
        for (int64_t d = 16; d < size; d += 16) {
            least = min(least, load_f32(x + d));
            most = max(most, load_f32(x + d));
        }
        const float high = largest_of_lanes(most), low = -largest_of_lanes(sub(set_f32(0.0f), least));
        scale = scale_of((high - low) / 15.0f);
        *offset = to_f16((low < -kLargest ? -kLargest : low > kLargest ? kLargest : low) + 0.0f);
        codes_of(x, size, scale, from_f16(*offset), 0.0f, 15.0f, 0, codes);
    }
    const int64_t half = size / 2;
    for (int64_t j = 0; j < half; ++j) y[j] = static_cast<uint8_t>(codes[j] | codes[j + half] << 4);
    std::memset(y + half, 0, row - half);
    return scale;
}

// Writes x [size] to element `to` of the pages of keys (side 0) or values (side 1), and its numbers of the word.
template <int kDtype>
PERCARD_INLINE void put(const KvAppend& a, int side, const float* x, int64_t to, uint16_t* word) {
    void* pages = side == 0 ? a.k_pages : a.v_pages;
    const int bits = side == 0 ? a.k_bits : a.v_bits;
    if (bits == 16) return keep<kDtype>(a, x, pages, to);
    if (bits == 8) {
        word[side] = quantized8(x, a.size, static_cast<int8_t*>(pages) + to);
    } else {
        word[side] = quantized4(x, a.size, a.symmetric, static_cast<uint8_t*>(pages) + to,
                                side == 0 ? a.k_row : a.v_row, word + 2 + side);
    }
}

template <int kDtype>
void token(const KvAppend& a, int64_t t) {
    Row row;
    const float* cos_sin = a.cos_sin != nullptr ? a.cos_sin + a.positions[t] * a.size : nullptr;
    for (int64_t h = 0; a.q != nullptr && h < a.heads; ++h)
        keep<kDtype>(a, prepared<kDtype>(a, a.q, t * a.stride_qt + h * a.stride_qh, a.q_weight, cos_sin, row), a.q_out,
                     (t * a.heads + h) * a.size);
    if (a.slots[t] < 0) return;
    const int64_t page = a.slots[t] / a.page, r = a.slots[t] % a.page;
    for (int64_t h = 0; h < a.kv_heads; ++h) {
        uint16_t word[4] = {};  // k_scale, v_scale, k_offset, v_offset; 0 where there is none
        const int64_t into = page * a.stride_vp + h * a.stride_vh + r * a.stride_vr;
        float* key = prepared<kDtype>(a, a.k, t * a.stride_kt + h * a.stride_kth, a.k_weight, cos_sin, row);
        for (int64_t d = 0; a.mu != nullptr && d < a.size; d += 16)
            store_f32(key + d, sub(load_f32(key + d), load_f32(a.mu + h * a.size + d)));
        put<kDtype>(a, 0, key, page * a.stride_kp + h * a.stride_kh + r * a.stride_kr, word);
        const int64_t from = t * a.stride_vt + h * a.stride_vth;
        if (a.v_bits == 16) {
            std::memcpy(static_cast<char*>(a.v_pages) + into * dtype_bytes(kDtype),
                        static_cast<const char*>(a.v) + from * dtype_bytes(kDtype), a.size * dtype_bytes(kDtype));
            continue;
        }
        put<kDtype>(a, 1, prepared<kDtype>(a, a.v, from, nullptr, nullptr, row), into, word);
        uint16_t* words = a.scales + page * a.stride_sp + h * a.stride_sh + r * a.stride_sr;
        if (a.stride_sw == 1) {  // one word of 32 or 64 bits
            std::memcpy(words, word, a.words == 4 ? 8 : 4);
        } else {
            for (int64_t i = 0; i < a.words; ++i) words[i * a.stride_sw] = word[i];
        }
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
