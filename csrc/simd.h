// Vectors of 16 lanes over the registers of the ISA that a file is compiled for. A lane is an output row: the packings
// rows16_* (formats/layout.py) hold 16 rows side by side, so sums need no step across lanes.
//
// Everything here is static or lives in the namespace of the ISA, and nothing of the standard library with a body is
// used: the linker keeps one copy of an inline function for all, and it must not be one that only the newest CPU can
// run.
#pragma once

#include "scalar.h"

#if defined(PERCARD_ISA_avx512_vnni) || defined(PERCARD_ISA_amx_int8)
#include "simd_avx512.h"
#elif defined(PERCARD_ISA_avx2) || defined(PERCARD_ISA_avx_vnni)
#include "simd_avx2.h"
#else
#include "simd_scalar.h"
#endif

namespace percard {
namespace PERCARD_ISA {

// Stores the first `count` of 16 lanes as `dtype`.
PERCARD_INLINE void store_part(void* p, int64_t at, int dtype, F32 x, int64_t count) {
    if (count >= 16) return store_as(p, at, dtype, x);
    float lanes[16];
    store_f32(lanes, x);
    for (int64_t i = 0; i < count; ++i) store_float(p, at + i, dtype, lanes[i]);
}

// 16 numbers of type `dtype` from index `at` on, 0 past the first `count`.
PERCARD_INLINE F32 load_part_as(const void* p, int64_t at, int dtype, int64_t count) {
    if (count >= 16) return load_as_f32(p, at, dtype);
    float lanes[16] = {};
    for (int64_t i = 0; i < count; ++i) lanes[i] = load_float(p, at + i, dtype);
    return load_f32(lanes);
}

// The largest of 16 lanes, and 0.
PERCARD_INLINE float largest(F32 x) {
    float lanes[16], most = 0.0f;
    store_f32(lanes, x);
    for (float lane : lanes) most = lane > most ? lane : most;
    return most;
}

// Loads the first `count` of 16 floats, 0 for the rest.
PERCARD_INLINE F32 load_part(const float* p, int64_t count) {
    if (count >= 16) return load_f32(p);
    float lanes[16] = {};
    for (int64_t i = 0; i < count; ++i) lanes[i] = p[i];
    return load_f32(lanes);
}

// While the codes of group g of block b stream by: asks for the scales [groups, np] of a few groups later. They lie np
// floats apart, each in a line and a page of its own, where no hardware looks ahead.
PERCARD_INLINE void prefetch_scale(const float* scale, int64_t np, int64_t groups, int64_t g, int64_t b) {
    constexpr int64_t kAhead = 8;
    const int64_t next = g + kAhead;
    prefetch(scale + (next < groups ? next * np + b * 16 : (next - groups) * np + (b + 1) * 16));
}

}  // namespace PERCARD_ISA
}  // namespace percard
