// Conversions of single numbers, the same on every ISA. simd.h includes it.
#pragma once

#include <cstdint>
#include <cstring>

#include "ops.h"

#define PERCARD_INLINE static inline __attribute__((always_inline))
#define PERCARD_INLINE_MEMBER inline __attribute__((always_inline))

namespace percard {
namespace PERCARD_ISA {

PERCARD_INLINE uint32_t bits_of(float f) {
    uint32_t u;
    std::memcpy(&u, &f, 4);
    return u;
}

PERCARD_INLINE float float_of(uint32_t u) {
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}

// Half to even; NaN stays NaN.
PERCARD_INLINE uint16_t to_bf16(float f) {
    const uint32_t u = bits_of(f);
    if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((u >> 16) | 0x40);
    return static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

PERCARD_INLINE float from_bf16(uint16_t h) { return float_of(static_cast<uint32_t>(h) << 16); }

PERCARD_INLINE float from_f16(uint16_t h) {
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, rest = h & 0x7fff;
    if (rest >= 0x7c00) return float_of(sign | 0x7f800000u | (rest << 13));
    // As fp32 with the exponent 112 too low; a multiplication by 2^112 mends it, subnormals too.
    return float_of(sign | bits_of(float_of(rest << 13) * float_of((127u + 112u) << 23)));
}

// Half to even, overflow to infinity, NaN stays NaN.
PERCARD_INLINE uint16_t to_f16(float f) {
    const uint32_t u = bits_of(f), sign = (u >> 16) & 0x8000, rest = u & 0x7fffffff;
    if (rest > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00);
    if (rest >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00);
    if (rest < 0x38800000u) {  // subnormal: adding 0.5 leaves the result, rounded, in the low bits
        return static_cast<uint16_t>(sign | (bits_of(float_of(rest) + 0.5f) - 0x3f000000u));
    }
    return static_cast<uint16_t>(sign | ((rest - 0x38000000u + 0xfff + ((rest >> 13) & 1)) >> 13));
}

PERCARD_INLINE float load_float(const void* p, int64_t i, int dtype) {
    if (dtype == kFloat32) return static_cast<const float*>(p)[i];
    const uint16_t h = static_cast<const uint16_t*>(p)[i];
    return dtype == kBFloat16 ? from_bf16(h) : from_f16(h);
}

PERCARD_INLINE void store_float(void* p, int64_t i, int dtype, float value) {
    if (dtype == kFloat32)
        static_cast<float*>(p)[i] = value;
    else
        static_cast<uint16_t*>(p)[i] = dtype == kBFloat16 ? to_bf16(value) : to_f16(value);
}

PERCARD_INLINE int64_t dtype_bytes(int dtype) { return dtype == kFloat32 ? 4 : 2; }
PERCARD_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
PERCARD_INLINE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
PERCARD_INLINE int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

PERCARD_INLINE int32_t four(const void* p) {  // four int8 as one word
    int32_t word;
    std::memcpy(&word, p, 4);
    return word;
}

}  // namespace PERCARD_ISA
}  // namespace percard
