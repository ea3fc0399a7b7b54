// Weights of 15 bits times whole numbers of 8: exact sums in int32, the same on every ISA.
//
// A weight is 0 .. kMost. 256 of them times int8 stay within 256 * 32760 * 128 = 2^30. Where the processor has no tiles
// the numbers lie as pairs of int16, two neighbours of the sum in one 32-bit lane; AMX takes them as bytes and the
// weights as two planes of bytes, high and low.
#pragma once

#include "simd.h"

namespace percard {
namespace PERCARD_ISA {

constexpr int64_t kWeights = 256;         // of one sum
constexpr float kMost = 32760.0f;         // so that 2^x, a little off, does not pass 32767
constexpr float kLogMost = 14.99964773f;  // log2 of it

// 2^x of 16 lanes for x of kLeast .. 15 (less counts as that), within 2^-18, or 2^-23 if kFine; NaN stays NaN. kLeast
// is -126, or -127, of which it makes 0, and so of all that is below -126.5.
//
//   n = round(x), which the addition of 1.5 * 2^23 leaves in the low bits, 127 with it;   2^x = 2^n * Q(x - n)
//
// Q has the least relative error on -0.5 .. 0.5 that a polynomial of degree 4, or 5, can have.
template <bool kFine, int kLeast = -126>
PERCARD_INLINE F32 power_of_two(F32 x) {
    const F32 magic = set_f32(12583039.0f);
    x = max(set_f32(kLeast), x);  // in this order NaN stays NaN
    const F32 s = add(x, magic), r = sub(x, sub(s, magic));
    F32 q;
    if constexpr (kFine) {
        q = fma(set_f32(0x1.5c08e6p-10f), r, set_f32(0x1.3d0c54p-7f));
        q = fma(q, r, set_f32(0x1.c6b6e4p-5f));
        q = fma(q, r, set_f32(0x1.ebf918p-3f));
        q = fma(q, r, set_f32(0x1.62e428p-1f));
        q = fma(q, r, set_f32(0x1.000002p+0f));
    } else {
        q = fma(set_f32(0x1.3997d6p-7f), r, set_f32(0x1.ca1442p-5f));
        q = fma(q, r, set_f32(0x1.ec06dap-3f));
        q = fma(q, r, set_f32(0x1.62e0dcp-1f));
        q = fma(q, r, set_f32(0x1.ffffe8p-1f));
    }
    return mul(q, as_f32(shift_left<23>(as_i32(s))));
}

// 16 lanes within int16.
PERCARD_INLINE void store_i16(int16_t* p, I32 x) {
#if defined(PERCARD_ISA_avx512_vnni) || defined(PERCARD_ISA_amx_int8)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(x.v));
#elif defined(PERCARD_ISA_avx2) || defined(PERCARD_ISA_avx_vnni)
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xd8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), words);
#else
    for (int i = 0; i < 16; ++i) p[i] = static_cast<int16_t>(x.v[i]);
#endif
}

// 16 lanes of two int16: a, which is within int16, and above it b.
PERCARD_INLINE I32 pairs_of(I32 a, I32 b) { return add(bit_and(a, set_i32(0xffff)), shift_left<16>(b)); }

// sum + low * two[0] + high * two[1] of each lane's pair.
PERCARD_INLINE I32 dot_pairs(I32 sum, I32 pairs, const int16_t* two) {
#if defined(PERCARD_ISA_avx512_vnni) || defined(PERCARD_ISA_amx_int8)
    return {_mm512_dpwssd_epi32(sum.v, pairs.v, _mm512_set1_epi32(four(two)))};
#elif defined(PERCARD_ISA_avx_vnni)
    const __m256i both = _mm256_set1_epi32(four(two));
    return {_mm256_dpwssd_avx_epi32(sum.a, pairs.a, both), _mm256_dpwssd_avx_epi32(sum.b, pairs.b, both)};
#elif defined(PERCARD_ISA_avx2)
    const __m256i both = _mm256_set1_epi32(four(two));
    return add(sum, I32{_mm256_madd_epi16(pairs.a, both), _mm256_madd_epi16(pairs.b, both)});
#else
    for (int i = 0; i < 16; ++i) {
        const int32_t low = static_cast<int16_t>(pairs.v[i]), high = pairs.v[i] >> 16;
        sum.v[i] += low * two[0] + high * two[1];
    }
    return sum;
#endif
}

}  // namespace PERCARD_ISA
}  // namespace percard
