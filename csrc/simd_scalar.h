// 16 lanes as plain arrays: what every other ISA must equal bit for bit. simd.h includes it.
#pragma once

#include "scalar.h"

namespace percard {
namespace PERCARD_ISA {

struct F32 {
    float v[16];
};
struct I32 {
    int32_t v[16];
};
struct Bytes {
    uint8_t v[64];
};

#define PERCARD_LANES(type, value)                   \
    type out;                                        \
    for (int i = 0; i < 16; ++i) out.v[i] = (value); \
    return out

PERCARD_INLINE F32 set_f32(float a) { PERCARD_LANES(F32, a); }
PERCARD_INLINE I32 set_i32(int32_t a) { PERCARD_LANES(I32, a); }
PERCARD_INLINE F32 load_f32(const float* p) { PERCARD_LANES(F32, p[i]); }
PERCARD_INLINE I32 load_i32(const void* p) {
    I32 out;
    std::memcpy(out.v, p, 64);
    return out;
}
PERCARD_INLINE void store_f32(float* p, F32 a) { std::memcpy(p, a.v, 64); }
PERCARD_INLINE void store_i32(int32_t* p, I32 a) { std::memcpy(p, a.v, 64); }
PERCARD_INLINE F32 add(F32 a, F32 b) { PERCARD_LANES(F32, a.v[i] + b.v[i]); }
PERCARD_INLINE F32 sub(F32 a, F32 b) { PERCARD_LANES(F32, a.v[i] - b.v[i]); }
PERCARD_INLINE F32 mul(F32 a, F32 b) { PERCARD_LANES(F32, a.v[i] * b.v[i]); }
PERCARD_INLINE F32 div(F32 a, F32 b) { PERCARD_LANES(F32, a.v[i] / b.v[i]); }
PERCARD_INLINE F32 min(F32 a, F32 b) { PERCARD_LANES(F32, a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
PERCARD_INLINE F32 max(F32 a, F32 b) { PERCARD_LANES(F32, a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
PERCARD_INLINE F32 abs(F32 a) { PERCARD_LANES(F32, __builtin_fabsf(a.v[i])); }
PERCARD_INLINE F32 round(F32 a) { PERCARD_LANES(F32, __builtin_rintf(a.v[i])); }
// a * b + c, rounded once.
PERCARD_INLINE F32 fma(F32 a, F32 b, F32 c) { PERCARD_LANES(F32, __builtin_fmaf(a.v[i], b.v[i], c.v[i])); }
// a * b + c, rounded once or twice, whichever is faster.
PERCARD_INLINE F32 madd(F32 a, F32 b, F32 c) { PERCARD_LANES(F32, a.v[i] * b.v[i] + c.v[i]); }
PERCARD_INLINE I32 add(I32 a, I32 b) {
    PERCARD_LANES(I32, static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) + b.v[i]));
}
PERCARD_INLINE I32 sub(I32 a, I32 b) {
    PERCARD_LANES(I32, static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) - b.v[i]));
}
PERCARD_INLINE I32 mul(I32 a, I32 b) {
    PERCARD_LANES(I32, static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) * b.v[i]));
}
PERCARD_INLINE I32 bit_and(I32 a, I32 b) { PERCARD_LANES(I32, a.v[i] & b.v[i]); }
template <int kBits>
PERCARD_INLINE I32 shift_right(I32 a) {  // logical
    PERCARD_LANES(I32, static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) >> kBits));
}
template <int kByte>
PERCARD_INLINE I32 signed_byte(I32 a) {  // byte kByte of each lane, 0 is the lowest
    PERCARD_LANES(I32, static_cast<int8_t>(static_cast<uint32_t>(a.v[i]) >> (8 * kByte)));
}
template <int kBits>
PERCARD_INLINE I32 shift_left(I32 a) {
    PERCARD_LANES(I32, static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) << kBits));
}
PERCARD_INLINE F32 to_f32(I32 a) { PERCARD_LANES(F32, static_cast<float>(a.v[i])); }
PERCARD_INLINE I32 to_i32(F32 a) { PERCARD_LANES(I32, static_cast<int32_t>(__builtin_rintf(a.v[i]))); }  // half to even
PERCARD_INLINE F32 as_f32(I32 a) {
    F32 out;
    std::memcpy(out.v, a.v, 64);
    return out;
}
PERCARD_INLINE I32 as_i32(F32 a) {
    I32 out;
    std::memcpy(out.v, a.v, 64);
    return out;
}
// Of 16 lanes, by halves: lane i and i + 8, then i + 4, i + 2, i + 1.
PERCARD_INLINE float sum_of_lanes(F32 a) {
    for (int half = 8; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) a.v[i] += a.v[i + half];
    return a.v[0];
}
PERCARD_INLINE float largest_of_lanes(F32 a) {
    for (int half = 8; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) a.v[i] = a.v[i] > a.v[i + half] ? a.v[i] : a.v[i + half];
    return a.v[0];
}
PERCARD_INLINE bool all_at_most(F32 a, float bound) {  // false for NaN
    bool all = true;
    for (int i = 0; i < 16; ++i) all = all && a.v[i] <= bound;
    return all;
}
PERCARD_INLINE F32 load_as_f32(const void* p, int64_t at, int dtype) {
    PERCARD_LANES(F32, load_float(p, at + i, dtype));
}
PERCARD_INLINE void store_as(void* p, int64_t at, int dtype, F32 a) {
    for (int i = 0; i < 16; ++i) store_float(p, at + i, dtype, a.v[i]);
}
PERCARD_INLINE void store_i8(int8_t* p, I32 a) {  // lanes within int8
    for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(a.v[i]);
}
PERCARD_INLINE I32 load_i8(const int8_t* p) { PERCARD_LANES(I32, p[i]); }  // 16 int8
PERCARD_INLINE void prefetch(const void*) {}

// 4-bit codes of a line as floats, minus 8 and their zero points: exact. `at<kShift>` takes the nibble at that bit of
// each 32-bit lane.
template <bool kZero>
struct Codes {
    I32 from = set_i32(8);
    explicit Codes(const int8_t* zero) {
        if (kZero) from = add(from, load_i8(zero));
    }
    template <int kShift>
    F32 at(I32 line) const {
        return to_f32(sub(bit_and(shift_right<kShift>(line), set_i32(15)), from));
    }
};

// A cache line of a packed weight: 16 rows x 4 bytes.
PERCARD_INLINE Bytes load_bytes(const void* p) {
    Bytes out;
    std::memcpy(out.v, p, 64);
    return out;
}
PERCARD_INLINE void store_bytes(void* p, Bytes a) { std::memcpy(p, a.v, 64); }
PERCARD_INLINE Bytes low_nibbles(Bytes a) {
    Bytes out;
    for (int i = 0; i < 64; ++i) out.v[i] = a.v[i] & 15;
    return out;
}
PERCARD_INLINE Bytes high_nibbles(Bytes a) {
    Bytes out;
    for (int i = 0; i < 64; ++i) out.v[i] = a.v[i] >> 4;
    return out;
}

// int32 sums of codes 0..15 times int8: 16 rows, 4 inputs a step, at most 8 steps from start to sum.
struct DotU4 {
    I32 acc;
    PERCARD_INLINE_MEMBER void start(I32 from) { acc = from; }
    void step(Bytes w, const int8_t* x) {
        for (int r = 0; r < 16; ++r)
            for (int j = 0; j < 4; ++j) acc.v[r] += w.v[r * 4 + j] * x[j];
    }
    I32 sum() const { return acc; }
};

// int32 sums of int8 times int8: 16 rows, 4 inputs a step. Wide is a line as the multiplication wants it; kXBytes are
// the bytes of 4 inputs as `widen_x` writes them; the sum comes out too large by kOffset times the sum of the inputs.
struct DotS8 {
    using Wide = Bytes;
    static constexpr int64_t kXBytes = 4, kOffset = 0;
    I32 acc;
    PERCARD_INLINE_MEMBER void start(I32 from) { acc = from; }
    static Wide widen(const void* line) { return load_bytes(line); }
    static Wide load(const void* wide) { return load_bytes(wide); }
    static void store(void* p, Wide w) { store_bytes(p, w); }
    static void widen_x(void* out, const int8_t* x) { std::memcpy(out, x, 4); }
    void step(const Wide& w, const void* x) {
        const auto* four_x = static_cast<const int8_t*>(x);
        for (int r = 0; r < 16; ++r)
            for (int j = 0; j < 4; ++j) acc.v[r] += static_cast<int8_t>(w.v[r * 4 + j]) * four_x[j];
    }
    I32 sum() const { return acc; }
};

#undef PERCARD_LANES

constexpr int kIntTokens = 4;        // tokens that an integer kernel holds in registers
constexpr int kFloatTokens = 4;      // tokens that a float kernel holds in registers
constexpr double kIntMacsPerNs = 1;  // rough rates, to decide whether a second thread pays
constexpr double kFloatMacsPerNs = 1;

}  // namespace PERCARD_ISA
}  // namespace percard
