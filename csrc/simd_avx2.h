// 16 lanes in two 256-bit registers. Also AVX-VNNI, which differs in the two Dot structs only. simd.h includes it.
#pragma once

#include <immintrin.h>

#include "scalar.h"

namespace percard {
namespace PERCARD_ISA {

struct F32 {
    __m256 a, b;  // lanes 0..7, 8..15
};
struct I32 {
    __m256i a, b;
};
using Bytes = I32;

PERCARD_INLINE F32 set_f32(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
PERCARD_INLINE I32 set_i32(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
PERCARD_INLINE F32 load_f32(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
PERCARD_INLINE I32 load_i32(const void* p) {
    const auto* q = static_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
PERCARD_INLINE void store_f32(float* p, F32 x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
PERCARD_INLINE void store_bytes(void* p, Bytes x) {
    auto* q = static_cast<__m256i*>(p);
    _mm256_storeu_si256(q, x.a);
    _mm256_storeu_si256(q + 1, x.b);
}
PERCARD_INLINE void store_i32(int32_t* p, I32 x) { store_bytes(p, x); }
PERCARD_INLINE F32 add(F32 x, F32 y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
PERCARD_INLINE F32 sub(F32 x, F32 y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
PERCARD_INLINE F32 mul(F32 x, F32 y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
PERCARD_INLINE F32 div(F32 x, F32 y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
PERCARD_INLINE F32 min(F32 x, F32 y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
PERCARD_INLINE F32 max(F32 x, F32 y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
PERCARD_INLINE F32 abs(F32 x) {
    const __m256 mask = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    return {_mm256_and_ps(x.a, mask), _mm256_and_ps(x.b, mask)};
}
PERCARD_INLINE F32 round(F32 x) {
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(x.a, kNearest), _mm256_round_ps(x.b, kNearest)};
}
PERCARD_INLINE F32 fma(F32 x, F32 y, F32 z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
PERCARD_INLINE F32 madd(F32 x, F32 y, F32 z) { return fma(x, y, z); }
PERCARD_INLINE I32 add(I32 x, I32 y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
PERCARD_INLINE I32 sub(I32 x, I32 y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
PERCARD_INLINE I32 mul(I32 x, I32 y) { return {_mm256_mullo_epi32(x.a, y.a), _mm256_mullo_epi32(x.b, y.b)}; }
PERCARD_INLINE I32 bit_and(I32 x, I32 y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
template <int kBits>
PERCARD_INLINE I32 shift_right(I32 x) {
    return {_mm256_srli_epi32(x.a, kBits), _mm256_srli_epi32(x.b, kBits)};
}
template <int kByte>
PERCARD_INLINE I32 signed_byte(I32 x) {
    if constexpr (kByte < 3) x = {_mm256_slli_epi32(x.a, 24 - 8 * kByte), _mm256_slli_epi32(x.b, 24 - 8 * kByte)};
    return {_mm256_srai_epi32(x.a, 24), _mm256_srai_epi32(x.b, 24)};
}
template <int kBits>
PERCARD_INLINE I32 shift_left(I32 x) {
    return {_mm256_slli_epi32(x.a, kBits), _mm256_slli_epi32(x.b, kBits)};
}
PERCARD_INLINE F32 to_f32(I32 x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
PERCARD_INLINE I32 to_i32(F32 x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
PERCARD_INLINE F32 as_f32(I32 x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
PERCARD_INLINE I32 as_i32(F32 x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
PERCARD_INLINE float sum_of_lanes(F32 x) {
    const __m256 eight = _mm256_add_ps(x.a, x.b);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
PERCARD_INLINE float largest_of_lanes(F32 x) {
    const __m256 eight = _mm256_max_ps(x.a, x.b);
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}
PERCARD_INLINE bool all_at_most(F32 x, float bound) {
    const __m256 high = _mm256_set1_ps(bound);
    const __m256 fits = _mm256_and_ps(_mm256_cmp_ps(x.a, high, _CMP_LE_OQ), _mm256_cmp_ps(x.b, high, _CMP_LE_OQ));
    return _mm256_movemask_ps(fits) == 0xff;
}
PERCARD_INLINE F32 load_as_f32(const void* p, int64_t at, int dtype) {
    if (dtype == kFloat32) return load_f32(static_cast<const float*>(p) + at);
    const auto* q = reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(p) + at);
    const __m128i low = _mm_loadu_si128(q), high = _mm_loadu_si128(q + 1);
    if (dtype == kFloat16) return {_mm256_cvtph_ps(low), _mm256_cvtph_ps(high)};
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(low), 16)),
            _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(high), 16))};
}
PERCARD_INLINE __m256i bf16_bits(__m256 x) {  // in the low halves of the lanes
    const __m256i u = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
}
PERCARD_INLINE void store_as(void* p, int64_t at, int dtype, F32 x) {
    if (dtype == kFloat32) return store_f32(static_cast<float*>(p) + at, x);
    auto* q = reinterpret_cast<__m128i*>(static_cast<uint16_t*>(p) + at);
    if (dtype == kFloat16) {
        _mm_storeu_si128(q, _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT));
        _mm_storeu_si128(q + 1, _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT));
        return;
    }
    const __m256i both = _mm256_packus_epi32(bf16_bits(x.a), bf16_bits(x.b));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(q), _mm256_permute4x64_epi64(both, 0xd8));
}
PERCARD_INLINE void store_i8(int8_t* p, I32 x) {
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xd8);
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}
PERCARD_INLINE I32 load_i8(const int8_t* p) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_cvtepi8_epi32(bytes), _mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8))};
}
PERCARD_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

template <bool kZero>
struct Codes {
    I32 from = set_i32(8);
    explicit Codes(const int8_t* zero) {
        if (kZero) from = add(from, load_i8(zero));
    }
    template <int kShift>
    PERCARD_INLINE_MEMBER F32 at(I32 line) const {
        return to_f32(sub(bit_and(shift_right<kShift>(line), set_i32(15)), from));
    }
};

PERCARD_INLINE Bytes load_bytes(const void* p) { return load_i32(p); }
PERCARD_INLINE Bytes low_nibbles(Bytes x) { return bit_and(x, set_i32(0x0f0f0f0f)); }
PERCARD_INLINE Bytes high_nibbles(Bytes x) { return bit_and(shift_right<4>(x), set_i32(0x0f0f0f0f)); }

#ifdef __AVXVNNI__
struct DotU4 {
    I32 acc;
    PERCARD_INLINE_MEMBER void start(I32 from) { acc = from; }
    PERCARD_INLINE_MEMBER void step(Bytes w, const int8_t* x) {
        const __m256i x4 = _mm256_set1_epi32(four(x));
        acc.a = _mm256_dpbusd_avx_epi32(acc.a, w.a, x4);
        acc.b = _mm256_dpbusd_avx_epi32(acc.b, w.b, x4);
    }
    I32 sum() const { return acc; }
};

// w ^ 0x80 is w + 128, unsigned: the sum is too large by 128 times the sum of the inputs.
struct DotS8 {
    using Wide = Bytes;
    static constexpr int64_t kXBytes = 4, kOffset = 128;
    DotU4 dot;
    PERCARD_INLINE_MEMBER void start(I32 from) { dot.start(from); }
    PERCARD_INLINE_MEMBER static Wide widen(const void* line) {
        const I32 w = load_i32(line);
        const __m256i flip = _mm256_set1_epi8(-128);
        return {_mm256_xor_si256(w.a, flip), _mm256_xor_si256(w.b, flip)};
    }
    static Wide load(const void* wide) { return load_i32(wide); }
    static void store(void* p, Wide w) { store_bytes(p, w); }
    static void widen_x(void* out, const int8_t* x) { std::memcpy(out, x, 4); }
    PERCARD_INLINE_MEMBER void step(const Wide& w, const void* x) { dot.step(w, static_cast<const int8_t*>(x)); }
    I32 sum() const { return dot.acc; }
};
constexpr int kIntTokens = 5;
constexpr double kIntMacsPerNs = 100;
#else
// vpmaddubsw adds two products: at most 2 * 15 * 128 = 3840. Eight of them stay within int16, the ninth might not.
struct DotU4 {
    I32 acc;
    __m256i a, b;  // int16 sums
    PERCARD_INLINE_MEMBER void start(I32 from) {
        acc = from;
        a = b = _mm256_setzero_si256();
    }
    PERCARD_INLINE_MEMBER void step(Bytes w, const int8_t* x) {
        const __m256i x4 = _mm256_set1_epi32(four(x));
        a = _mm256_add_epi16(a, _mm256_maddubs_epi16(w.a, x4));
        b = _mm256_add_epi16(b, _mm256_maddubs_epi16(w.b, x4));
    }
    PERCARD_INLINE_MEMBER I32 sum() const {
        const __m256i ones = _mm256_set1_epi16(1);
        return add(acc, I32{_mm256_madd_epi16(a, ones), _mm256_madd_epi16(b, ones)});
    }
};

// vpmaddubsw would saturate on full int8, so both sides widen to int16: exact. A line becomes the inputs 0, 2 and the
// inputs 1, 3 of each row as pairs of int16, by shifts within a lane; x is written in the same order.
struct DotS8 {
    struct Wide {
        I32 even, odd;
    };
    static constexpr int64_t kXBytes = 8, kOffset = 0;
    I32 acc;
    PERCARD_INLINE_MEMBER void start(I32 from) { acc = from; }
    PERCARD_INLINE_MEMBER static Wide widen(const void* line) {
        const I32 w = load_i32(line);
        return {{_mm256_srai_epi16(_mm256_slli_epi16(w.a, 8), 8), _mm256_srai_epi16(_mm256_slli_epi16(w.b, 8), 8)},
                {_mm256_srai_epi16(w.a, 8), _mm256_srai_epi16(w.b, 8)}};
    }
    PERCARD_INLINE_MEMBER static Wide load(const void* wide) {
        return {load_i32(wide), load_i32(static_cast<const char*>(wide) + 64)};
    }
    static void store(void* p, Wide w) {
        store_bytes(p, w.even);
        store_bytes(static_cast<char*>(p) + 64, w.odd);
    }
    static void widen_x(void* out, const int8_t* x) {
        const int16_t pairs[4] = {x[0], x[2], x[1], x[3]};
        std::memcpy(out, pairs, 8);
    }
    PERCARD_INLINE_MEMBER void step(const Wide& w, const void* x) {
        const auto* pairs = static_cast<const char*>(x);
        const __m256i even = _mm256_set1_epi32(four(pairs)), odd = _mm256_set1_epi32(four(pairs + 4));
        acc = add(acc, I32{_mm256_madd_epi16(w.even.a, even), _mm256_madd_epi16(w.even.b, even)});
        acc = add(acc, I32{_mm256_madd_epi16(w.odd.a, odd), _mm256_madd_epi16(w.odd.b, odd)});
    }
    I32 sum() const { return acc; }
};
constexpr int kIntTokens = 4;
constexpr double kIntMacsPerNs = 60;
#endif

constexpr int kFloatTokens = 6;
constexpr double kFloatMacsPerNs = 30;

}  // namespace PERCARD_ISA
}  // namespace percard
