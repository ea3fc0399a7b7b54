// 16 lanes in one 512-bit register, with VNNI. simd.h includes it.
#pragma once

#include <immintrin.h>

#include "scalar.h"

namespace percard {
namespace PERCARD_ISA {

struct F32 {
    __m512 v;
};
struct I32 {
    __m512i v;
};
using Bytes = I32;

PERCARD_INLINE F32 set_f32(float x) { return {_mm512_set1_ps(x)}; }
PERCARD_INLINE I32 set_i32(int32_t x) { return {_mm512_set1_epi32(x)}; }
PERCARD_INLINE F32 load_f32(const float* p) { return {_mm512_loadu_ps(p)}; }
PERCARD_INLINE I32 load_i32(const void* p) { return {_mm512_loadu_si512(p)}; }
PERCARD_INLINE void store_f32(float* p, F32 x) { _mm512_storeu_ps(p, x.v); }
PERCARD_INLINE void store_bytes(void* p, Bytes x) { _mm512_storeu_si512(p, x.v); }
PERCARD_INLINE void store_i32(int32_t* p, I32 x) { _mm512_storeu_si512(p, x.v); }
PERCARD_INLINE F32 add(F32 x, F32 y) { return {_mm512_add_ps(x.v, y.v)}; }
PERCARD_INLINE F32 sub(F32 x, F32 y) { return {_mm512_sub_ps(x.v, y.v)}; }
PERCARD_INLINE F32 mul(F32 x, F32 y) { return {_mm512_mul_ps(x.v, y.v)}; }
PERCARD_INLINE F32 div(F32 x, F32 y) { return {_mm512_div_ps(x.v, y.v)}; }
PERCARD_INLINE F32 min(F32 x, F32 y) { return {_mm512_min_ps(x.v, y.v)}; }
PERCARD_INLINE F32 max(F32 x, F32 y) { return {_mm512_max_ps(x.v, y.v)}; }
PERCARD_INLINE F32 abs(F32 x) { return {_mm512_abs_ps(x.v)}; }
PERCARD_INLINE F32 round(F32 x) { return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
PERCARD_INLINE F32 fma(F32 x, F32 y, F32 z) { return {_mm512_fmadd_ps(x.v, y.v, z.v)}; }
PERCARD_INLINE F32 madd(F32 x, F32 y, F32 z) { return fma(x, y, z); }
PERCARD_INLINE I32 add(I32 x, I32 y) { return {_mm512_add_epi32(x.v, y.v)}; }
PERCARD_INLINE I32 sub(I32 x, I32 y) { return {_mm512_sub_epi32(x.v, y.v)}; }
PERCARD_INLINE I32 mul(I32 x, I32 y) { return {_mm512_mullo_epi32(x.v, y.v)}; }
PERCARD_INLINE I32 bit_and(I32 x, I32 y) { return {_mm512_and_si512(x.v, y.v)}; }
template <int kBits>
PERCARD_INLINE I32 shift_right(I32 x) {
    return {_mm512_srli_epi32(x.v, kBits)};
}
template <int kByte>
PERCARD_INLINE I32 signed_byte(I32 x) {
    if constexpr (kByte < 3) x = {_mm512_slli_epi32(x.v, 24 - 8 * kByte)};
    return {_mm512_srai_epi32(x.v, 24)};
}
template <int kBits>
PERCARD_INLINE I32 shift_left(I32 x) {
    return {_mm512_slli_epi32(x.v, kBits)};
}
PERCARD_INLINE F32 to_f32(I32 x) { return {_mm512_cvtepi32_ps(x.v)}; }
PERCARD_INLINE I32 to_i32(F32 x) { return {_mm512_cvtps_epi32(x.v)}; }
PERCARD_INLINE F32 as_f32(I32 x) { return {_mm512_castsi512_ps(x.v)}; }
PERCARD_INLINE I32 as_i32(F32 x) { return {_mm512_castps_si512(x.v)}; }
PERCARD_INLINE float sum_of_lanes(F32 x) {
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(x.v), _mm512_extractf32x8_ps(x.v, 1));
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
PERCARD_INLINE float largest_of_lanes(F32 x) {
    const __m256 eight = _mm256_max_ps(_mm512_castps512_ps256(x.v), _mm512_extractf32x8_ps(x.v, 1));
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}
PERCARD_INLINE bool all_at_most(F32 x, float bound) {
    return _mm512_cmp_ps_mask(x.v, _mm512_set1_ps(bound), _CMP_LE_OQ) == 0xffff;
}
PERCARD_INLINE F32 load_as_f32(const void* p, int64_t at, int dtype) {
    if (dtype == kFloat32) return load_f32(static_cast<const float*>(p) + at);
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(p) + at));
    if (dtype == kFloat16) return {_mm512_cvtph_ps(half)};
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
PERCARD_INLINE __m512i bf16_bits(F32 x) {  // in the high halves of the lanes
    const __m512i u = _mm512_castps_si512(x.v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
    return _mm512_mask_or_epi32(rounded, nan, u, _mm512_set1_epi32(0x400000));
}
PERCARD_INLINE void store_as(void* p, int64_t at, int dtype, F32 x) {
    if (dtype == kFloat32) return store_f32(static_cast<float*>(p) + at, x);
    auto* q = reinterpret_cast<__m256i*>(static_cast<uint16_t*>(p) + at);
    if (dtype == kFloat16) return _mm256_storeu_si256(q, _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT));
    _mm256_storeu_si256(q, _mm512_cvtepi32_epi16(_mm512_srli_epi32(bf16_bits(x), 16)));
}
PERCARD_INLINE void store_i8(int8_t* p, I32 x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x.v));
}
PERCARD_INLINE I32 load_i8(const int8_t* p) {
    return {_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
PERCARD_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

// A table look-up takes the low 4 bits of a lane and gives code - 8 at once.
template <bool kZero>
struct Codes {
    __m512 table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    F32 zero = {};
    explicit Codes(const int8_t* p) {
        if (kZero) zero = to_f32(load_i8(p));
    }
    template <int kShift>
    PERCARD_INLINE_MEMBER F32 at(I32 line) const {
        const F32 code = {_mm512_permutexvar_ps(shift_right<kShift>(line).v, table)};
        return kZero ? sub(code, zero) : code;
    }
};

PERCARD_INLINE Bytes load_bytes(const void* p) { return load_i32(p); }
PERCARD_INLINE Bytes low_nibbles(Bytes x) { return bit_and(x, set_i32(0x0f0f0f0f)); }
PERCARD_INLINE Bytes high_nibbles(Bytes x) { return bit_and(shift_right<4>(x), set_i32(0x0f0f0f0f)); }

struct DotU4 {
    I32 acc;
    PERCARD_INLINE_MEMBER void start(I32 from) { acc = from; }
    PERCARD_INLINE_MEMBER void step(Bytes w, const int8_t* x) {
        acc.v = _mm512_dpbusd_epi32(acc.v, w.v, _mm512_set1_epi32(four(x)));
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
        return {_mm512_xor_si512(_mm512_loadu_si512(line), _mm512_set1_epi8(-128))};
    }
    static Wide load(const void* wide) { return load_i32(wide); }
    static void store(void* p, Wide w) { store_bytes(p, w); }
    static void widen_x(void* out, const int8_t* x) { std::memcpy(out, x, 4); }
    PERCARD_INLINE_MEMBER void step(const Wide& w, const void* x) { dot.step(w, static_cast<const int8_t*>(x)); }
    I32 sum() const { return dot.acc; }
};

constexpr int kIntTokens = 12;
constexpr int kFloatTokens = 14;
constexpr double kIntMacsPerNs = 200;
constexpr double kFloatMacsPerNs = 60;

}  // namespace PERCARD_ISA
}  // namespace percard
