// Whole numbers of a tile of keys and values: products with int8 queries, and with weights of 16 bits. Exact, so every
// ISA gives the same sums.
//
// A key is a row of bytes, int8, or 0 .. 15 once two 4-bit numbers of a byte are apart. A value becomes int16, beside
// the value of the next token, because the sum over tokens is made in pairs:
//
//   staged [pairs, wide, 2]     v[2 i][d] v[2 i + 1][d]        sum_t p[t] v[t][d], |p| < 2^15, |v| < 2^7, 64 tokens:
//   int32
#pragma once

#include "fixed_point.h"

namespace percard {
namespace PERCARD_ISA {
namespace attention {

constexpr int64_t kTokens = 64;  // of a tile

#if defined(PERCARD_ISA_avx512_vnni) || defined(PERCARD_ISA_amx_int8)

constexpr int kPairSums = 16;  // I32 of sums that stay in registers
constexpr int kDots = 16;      // products of a query row and a key that are made side by side

// out[2 d + i] = byte d of a (i = 0) or b, signed.
PERCARD_INLINE void interleave(Bytes a, Bytes b, int16_t* out) {
    const __m512i low = _mm512_unpacklo_epi8(a.v, b.v), high = _mm512_unpackhi_epi8(a.v, b.v);
    const __m512i first = _mm512_permutex2var_epi64(low, _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), high);
    const __m512i second = _mm512_permutex2var_epi64(low, _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15), high);
    _mm512_storeu_si512(out, _mm512_cvtepi8_epi16(_mm512_castsi512_si256(first)));
    _mm512_storeu_si512(out + 32, _mm512_cvtepi8_epi16(_mm512_extracti64x4_epi64(first, 1)));
    _mm512_storeu_si512(out + 64, _mm512_cvtepi8_epi16(_mm512_castsi512_si256(second)));
    _mm512_storeu_si512(out + 96, _mm512_cvtepi8_epi16(_mm512_extracti64x4_epi64(second, 1)));
}

// acc += a[2 i] * two[0] + a[2 i + 1] * two[1] in lane i. As an intrinsic gcc 12 copies 16 sums to other registers and
// back in every step, which costs as much as the products.
PERCARD_INLINE void add_pairs(I32& acc, I32 a, const int16_t* two) {
    __asm__("vpdpwssd %1, %2, %0" : "+v"(acc.v) : "v"(_mm512_set1_epi32(four(two))), "v"(a.v));
}

// The low and the high 16 bits of the lanes.
PERCARD_INLINE void split(I32 x, uint16_t* low, uint16_t* high) {
    store_i16(reinterpret_cast<int16_t*>(low), x);
    store_i16(reinterpret_cast<int16_t*>(high), shift_right<16>(x));
}

// Lane sums of 16 vectors: lane i of the result is that of a[i].
PERCARD_INLINE __m512i sums_of(const __m512i* a) {
    __m512i each[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const __m512i* x = a + 4 * i;
        const __m512i low = _mm512_add_epi32(_mm512_unpacklo_epi32(x[0], x[1]), _mm512_unpackhi_epi32(x[0], x[1]));
        const __m512i high = _mm512_add_epi32(_mm512_unpacklo_epi32(x[2], x[3]), _mm512_unpackhi_epi32(x[2], x[3]));
        each[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(low, high), _mm512_unpackhi_epi64(low, high));
    }
    const auto halves = [](__m512i x, __m512i y) {
        return _mm512_add_epi32(_mm512_shuffle_i32x4(x, y, 0x44), _mm512_shuffle_i32x4(x, y, 0xee));
    };
    const __m512i x = halves(each[0], each[1]), y = halves(each[2], each[3]);
    return _mm512_add_epi32(_mm512_shuffle_i32x4(x, y, 0x88), _mm512_shuffle_i32x4(x, y, 0xdd));
}

// sums[r * (kDots / kRows) + t] = q[r] . k[t]. w ^ 0x80 is w + 128, unsigned, as vpdpbusd wants it.
template <int kRows, bool kSigned>
PERCARD_INLINE void dots(const int8_t* q, int64_t wide, const uint8_t* const* k, const int32_t* q_sum, int32_t* sums) {
    constexpr int kKeys = kDots / kRows;
    __m512i acc[kDots];
#pragma GCC unroll 16
    for (int i = 0; i < kDots; ++i) acc[i] = _mm512_setzero_si512();
    for (int64_t d = 0; d < wide; d += 64) {
        __m512i rows[kRows];
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) rows[r] = _mm512_loadu_si512(q + r * wide + d);
#pragma GCC unroll 16
        for (int t = 0; t < kKeys; ++t) {
            __m512i key = _mm512_loadu_si512(k[t] + d);
            if (kSigned) key = _mm512_xor_si512(key, _mm512_set1_epi8(-128));
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r) {
                __asm__("vpdpbusd %1, %2, %0" : "+v"(acc[r * kKeys + t]) : "v"(rows[r]), "v"(key));
            }
        }
    }
    alignas(64) int32_t excess[kDots];
    for (int i = 0; i < kDots; ++i) excess[i] = kSigned ? 128 * q_sum[i / kKeys] : 0;
    _mm512_storeu_si512(sums, _mm512_sub_epi32(sums_of(acc), _mm512_load_si512(excess)));
}

#elif defined(PERCARD_ISA_avx2) || defined(PERCARD_ISA_avx_vnni)

constexpr int kPairSums = 4;
constexpr int kDots = 8;

PERCARD_INLINE void interleave(Bytes a, Bytes b, int16_t* out) {
    const auto half = [](__m256i x, __m256i y, int16_t* to) {
        const __m256i low = _mm256_unpacklo_epi8(x, y), high = _mm256_unpackhi_epi8(x, y);
        auto* at = reinterpret_cast<__m256i*>(to);
        _mm256_storeu_si256(at, _mm256_cvtepi8_epi16(_mm256_castsi256_si128(low)));
        _mm256_storeu_si256(at + 1, _mm256_cvtepi8_epi16(_mm256_castsi256_si128(high)));
        _mm256_storeu_si256(at + 2, _mm256_cvtepi8_epi16(_mm256_extracti128_si256(low, 1)));
        _mm256_storeu_si256(at + 3, _mm256_cvtepi8_epi16(_mm256_extracti128_si256(high, 1)));
    };
    half(a.a, b.a, out);
    half(a.b, b.b, out + 64);
}

// acc += x in lanes of 32 or 16 bits, in place: as an intrinsic gcc 12 gives the sum a second register.
template <bool kWide>
PERCARD_INLINE void add_to(__m256i& acc, __m256i x) {
    if constexpr (kWide)
        __asm__("vpaddd %1, %0, %0" : "+x"(acc) : "x"(x));
    else
        __asm__("vpaddw %1, %0, %0" : "+x"(acc) : "x"(x));
}

PERCARD_INLINE void add_pairs(I32& acc, I32 a, const int16_t* two) {
    const __m256i both = _mm256_set1_epi32(four(two));
#ifdef __AVXVNNI__
    acc.a = _mm256_dpwssd_avx_epi32(acc.a, a.a, both);
    acc.b = _mm256_dpwssd_avx_epi32(acc.b, a.b, both);
#else
    add_to<true>(acc.a, _mm256_madd_epi16(a.a, both));
    add_to<true>(acc.b, _mm256_madd_epi16(a.b, both));
#endif
}

PERCARD_INLINE void split(I32 x, uint16_t* low, uint16_t* high) {
    const auto put = [](I32 y, uint16_t* p) {
        const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(y.a, y.b), 0xd8);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), words);
    };
    put(bit_and(x, set_i32(0xffff)), low);
    put(shift_right<16>(x), high);
}

// Lane sums of 4 vectors.
PERCARD_INLINE __m128i sums_of(const __m256i* a) {
    const __m256i low = _mm256_hadd_epi32(a[0], a[1]), high = _mm256_hadd_epi32(a[2], a[3]);
    const __m256i four_sums = _mm256_hadd_epi32(low, high);
    return _mm_add_epi32(_mm256_castsi256_si128(four_sums), _mm256_extracti128_si256(four_sums, 1));
}

// maddubs takes |k| and q with the sign of k: two products are at most 2 * 128 * 127, within int16. Numbers of 0 .. 15
// give at most 2 * 15 * 127, of which eight are added before they widen.
template <int kRows, bool kSigned>
PERCARD_INLINE void dots(const int8_t* q, int64_t wide, const uint8_t* const* k, const int32_t* q_sum, int32_t* sums) {
    constexpr int kKeys = kDots / kRows;
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i acc[kDots];
#pragma GCC unroll 8
    for (int i = 0; i < kDots; ++i) acc[i] = _mm256_setzero_si256();
    for (int64_t d = 0; d < wide; d += 32) {
#pragma GCC unroll 8
        for (int t = 0; t < kKeys; ++t) {
            const __m256i key = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(k[t] + d));
            const __m256i size = kSigned ? _mm256_abs_epi8(key) : key;
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r) {
                const __m256i row = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q + r * wide + d));
                __m256i& sum = acc[r * kKeys + t];
#ifdef __AVXVNNI__
                sum = _mm256_dpbusd_avx_epi32(sum, size, kSigned ? _mm256_sign_epi8(row, key) : row);
#else
                if constexpr (kSigned) {
                    const __m256i two = _mm256_maddubs_epi16(size, _mm256_sign_epi8(row, key));
                    add_to<true>(sum, _mm256_madd_epi16(two, ones));
                } else {
                    add_to<false>(sum, _mm256_maddubs_epi16(size, row));
                }
#endif
            }
        }
    }
#ifndef __AVXVNNI__
    if constexpr (!kSigned)
        for (int i = 0; i < kDots; ++i) acc[i] = _mm256_madd_epi16(acc[i], ones);
#endif
    (void)ones;
    (void)q_sum;
    for (int i = 0; i < kDots; i += 4) _mm_storeu_si128(reinterpret_cast<__m128i*>(sums + i), sums_of(acc + i));
}

#else

constexpr int kPairSums = 4;
constexpr int kDots = 4;

PERCARD_INLINE void interleave(Bytes a, Bytes b, int16_t* out) {
    for (int d = 0; d < 64; ++d) {
        out[2 * d] = static_cast<int8_t>(a.v[d]);
        out[2 * d + 1] = static_cast<int8_t>(b.v[d]);
    }
}

PERCARD_INLINE void add_pairs(I32& acc, I32 a, const int16_t* two) {
    for (int i = 0; i < 16; ++i) {
        int16_t both[2];
        std::memcpy(both, &a.v[i], 4);
        acc.v[i] += both[0] * two[0] + both[1] * two[1];
    }
}

PERCARD_INLINE void split(I32 x, uint16_t* low, uint16_t* high) {
    for (int i = 0; i < 16; ++i) {
        low[i] = static_cast<uint16_t>(x.v[i]);
        high[i] = static_cast<uint16_t>(static_cast<uint32_t>(x.v[i]) >> 16);
    }
}

template <int kRows, bool kSigned>
PERCARD_INLINE void dots(const int8_t* q, int64_t wide, const uint8_t* const* k, const int32_t*, int32_t* sums) {
    constexpr int kKeys = kDots / kRows;
    for (int i = 0; i < kDots; ++i) {
        const int8_t* row = q + i / kKeys * wide;
        const uint8_t* key = k[i % kKeys];
        sums[i] = 0;
        for (int64_t d = 0; d < wide; ++d) sums[i] += row[d] * (kSigned ? static_cast<int8_t>(key[d]) : key[d]);
    }
}

#endif

// out[r * kTokens + t] = q[r] . k[t] for kRows rows of `wide` bytes and `count` keys; k names kTokens rows that may be
// read. ahead(t) is called once for each key.
template <int kRows, bool kSigned, typename Ahead>
PERCARD_INLINE void dots_of_rows(const int8_t* q, int64_t wide, const uint8_t* const* k, int64_t count,
                                 const int32_t* q_sum, int32_t* out, const Ahead& ahead) {
    constexpr int kKeys = kDots / kRows;
    for (int64_t t = 0; t < count; t += kKeys) {
        for (int i = 0; i < kKeys; ++i) ahead(t + i);
        alignas(64) int32_t sums[kDots];
        dots<kRows, kSigned>(q, wide, k + t, q_sum, sums);
        for (int r = 0; r < kRows; ++r) std::memcpy(out + r * kTokens + t, sums + r * kKeys, kKeys * sizeof(int32_t));
    }
}

template <bool kSigned, typename Ahead>
PERCARD_INLINE void dots_of_tile(const int8_t* q, int64_t rows, int64_t wide, const uint8_t* const* k, int64_t count,
                                 const int32_t* q_sum, int32_t* out, const Ahead& ahead) {
    int64_t r = 0;
    const auto once = [&](int64_t t) {
        if (r == 0) ahead(t);
    };
    for (; r + 4 <= rows; r += 4)
        dots_of_rows<4, kSigned>(q + r * wide, wide, k, count, q_sum + r, out + r * kTokens, once);
    for (; r + 2 <= rows; r += 2)
        dots_of_rows<2, kSigned>(q + r * wide, wide, k, count, q_sum + r, out + r * kTokens, once);
    for (; r < rows; ++r) dots_of_rows<1, kSigned>(q + r * wide, wide, k, count, q_sum + r, out + r * kTokens, once);
}

// o[r][d] = (sum_t p[r][t] v[t][d]) * by[r] + (o[r][d] + more[r]), staged values of `pairs` pairs of tokens.
template <int kRows>
PERCARD_INLINE void mix_rows(const int16_t* p, const int16_t* staged, int64_t pairs, int64_t wide, const float* by,
                             const float* more, float* o) {
    constexpr int kWide = kPairSums / kRows < 4 ? kPairSums / kRows : 4;
    for (int64_t d = 0; d < wide; d += 16 * kWide) {
        I32 sums[kRows][kWide];
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
            for (int j = 0; j < kWide; ++j) sums[r][j] = set_i32(0);
        const int16_t* v = staged + 2 * d;
        for (int64_t i = 0; i < pairs; ++i, v += 2 * wide) {
#pragma GCC unroll 4
            for (int j = 0; j < kWide; ++j) {
                const I32 here = load_i32(v + 32 * j);
#pragma GCC unroll 4
                for (int r = 0; r < kRows; ++r) add_pairs(sums[r][j], here, p + r * kTokens + 2 * i);
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
            for (int j = 0; j < kWide; ++j) {
                float* to = o + r * wide + d + 16 * j;
                const F32 before = add(load_f32(to), set_f32(more[r]));
                store_f32(to, fma(to_f32(sums[r][j]), set_f32(by[r]), before));
            }
    }
}

PERCARD_INLINE void mix(const int16_t* p, int64_t rows, const int16_t* staged, int64_t pairs, int64_t wide,
                        const float* by, const float* more, float* o) {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) mix_rows<4>(p + r * kTokens, staged, pairs, wide, by + r, more + r, o + r * wide);
    for (; r + 2 <= rows; r += 2) mix_rows<2>(p + r * kTokens, staged, pairs, wide, by + r, more + r, o + r * wide);
    for (; r < rows; ++r) mix_rows<1>(p + r * kTokens, staged, pairs, wide, by + r, more + r, o + r * wide);
}

}  // namespace attention
}  // namespace PERCARD_ISA
}  // namespace percard
