// Packed codes times floating-point activations: what matmul_w4a16 and matmul_w8a16 share.
//
//   y[m, n] = sum_g s[n, g] * (sum_{k in g} (q[n, k] - z[n, g]) * x[m, k]) + bias[n], in fp32
//
//   a line of a packed weight = 16 rows x W::kLine inputs           lanes = 16 output rows
//   W::kLine vectors of 16 codes, as floats   x   1 activation, broadcast   ->   16 sums
//
// Few tokens: the weights stream through once, the sum of a group is scaled at its end. More: kChunk inputs of 16 rows
// are made whole (scale included) in the L1 and meet all tokens. With AMX and more than a few tokens: bf16 tiles, where
// code - zero is exact and x is the sum of one (bf16), two (fp16) or three (fp32) bf16 numbers, so the products are
// exact too.
//
// Rows of x that are very small or very large are brought near 1 by a power of two first, so that the sum of a group
// can neither overflow before its scale nor vanish in tiles that flush subnormal numbers.
//
// What an op gives, as a struct W:
//   kLine                   inputs of a cache line
//   Values<kZero>(zero)     of a group: each(line, step) calls step(code - zero as floats, input) for each input
//   Pairs<kZero>(zero)      of a group, AMX: unpack(to, line) writes kLine / 2 lines of pairs of bf16 codes - zeros
//   input_at(i)             AMX: which of 32 inputs stands at place i of these pairs
#pragma once

#include "ops.h"
#include "parallel.h"
#include "simd.h"
#ifdef PERCARD_ISA_amx_int8
#include "amx.h"
#endif

namespace percard {
namespace PERCARD_ISA {
namespace weight_only {

constexpr int64_t kChunk = 256;  // inputs: 16 KB of panel
constexpr int64_t kFew = 4;      // tokens

struct Job {
    const MatmulA16& a;
    float* factor;  // [m], y = sum * factor
    int64_t groups, lines, block_bytes, np;
    const uint8_t* block(int64_t b) const { return static_cast<const uint8_t*>(a.w) + b * block_bytes; }
    const int8_t* zero(int64_t g, int64_t b) const { return a.zero + g * np + b * 16; }
    F32 scale(int64_t g, int64_t b) const { return load_f32(a.scale + g * np + b * 16); }
};

// What row m of x is multiplied by before the sums; factor[m] takes it back.
static float bring_near_one(const Job& j, int64_t m) {
    F32 most = set_f32(0.0f);
    for (int64_t k = 0; k < j.a.k; k += 16)
        most = max(abs(load_part_as(j.a.x, m * j.a.stride_xm + k, j.a.x_dtype, j.a.k - k)), most);
    const float absmax = largest(most);
    float up = 1.0f;
    if (absmax > 0.0f && absmax < 5.4e-20f) up = 1.8446744073709552e19f;  // 2^-64, 2^64
    if (absmax > 1.8446744073709552e19f && absmax <= 3.4028234663852886e38f) up = 5.421010862427522e-20f;  // 2^-64
    j.factor[m] = 1.0f / up;
    return up;
}

// sum * factor + bias for token m and the outputs from n on, `count` of them.
PERCARD_INLINE F32 scaled(const Job& j, int64_t m, int64_t n, F32 sum, int64_t count) {
    const F32 y = mul(sum, set_f32(j.factor[m]));
    return j.a.bias ? add(y, load_part(j.a.bias + n, count)) : y;
}

PERCARD_INLINE void finish(const Job& j, int64_t m, int64_t b, F32 sum) {
    const int64_t count = min_of(16, j.a.n - b * 16);
    store_part(j.a.y, m * j.a.n + b * 16, j.a.y_dtype, scaled(j, m, b * 16, sum, count), count);
}

// Few tokens. x: [m, lines * kLine], zero past k.
template <typename W, int T, bool kZero>
static void stream(const Job& j, const float* x, int64_t b) {
    constexpr int kChains = T == 1 ? 4 : T == 2 ? 2 : 1;  // sums that do not wait for each other
    const int64_t stride_x = j.lines * W::kLine, group_lines = j.groups == 1 ? j.lines : j.a.group / W::kLine;
    const uint8_t* w = j.block(b);
    F32 sum[T];
    for (int t = 0; t < T; ++t) sum[t] = set_f32(0.0f);
    for (int64_t g = 0, line = 0; g < j.groups; ++g) {
        const int64_t end = min_of(line + group_lines, j.lines);
        prefetch_scale(j.a.scale, j.np, j.groups, g, b);
        const typename W::template Values<kZero> values(kZero ? j.zero(g, b) : nullptr);
        F32 part[T][kChains];
        for (int t = 0; t < T; ++t)
            for (int c = 0; c < kChains; ++c) part[t][c] = set_f32(0.0f);
        for (; line < end; ++line, w += 64) {
            const I32 packed = load_i32(w);
            prefetch(w + 2048);
            const float* at = x + line * W::kLine;
            const auto step = [&](F32 code, int i) __attribute__((always_inline)) {
#pragma GCC unroll 4
                for (int t = 0; t < T; ++t)
                    part[t][i % kChains] = madd(code, set_f32(at[t * stride_x + i]), part[t][i % kChains]);
            };
            values.each(packed, step);
        }
        const F32 scale = j.scale(g, b);
        for (int t = 0; t < T; ++t) {
            F32 all = part[t][0];
            for (int c = 1; c < kChains; ++c) all = add(all, part[t][c]);
            sum[t] = madd(all, scale, sum[t]);
        }
    }
    for (int t = 0; t < T; ++t) finish(j, t, b, sum[t]);
}

template <typename W, int T>
PERCARD_INLINE void stream_all(const Job& j, const float* x, int64_t b) {
    if (j.a.m == T) return j.a.zero ? stream<W, T, true>(j, x, b) : stream<W, T, false>(j, x, b);
    if constexpr (T > 1) stream_all<W, T - 1>(j, x, b);
}

template <typename W>
static void few_tokens(const Job& j) {
    const int64_t stride_x = j.lines * W::kLine;
    auto* x = static_cast<float*>(scratch(kSlotX, j.a.m * stride_x * 4 + 64));
    for (int64_t m = 0; m < j.a.m; ++m) {
        const F32 up = set_f32(bring_near_one(j, m));
        for (int64_t k = 0; k < stride_x; k += 16) {
            const F32 v = mul(load_part_as(j.a.x, m * j.a.stride_xm + k, j.a.x_dtype, j.a.k - k), up);
            store_part(x, m * stride_x + k, kFloat32, v, stride_x - k);
        }
    }
    parallel(j.np / 16, j.block_bytes * 0.1 + j.a.m * j.a.k * 16 / kFloatMacsPerNs, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) stream_all<W, kFew>(j, x, b);
    });
}

// Weights of inputs k .. k + count as floats [count, 16], scaled. count is a multiple of kLine.
template <typename W, bool kZero>
static void make_whole(const Job& j, float* panel, int64_t b, int64_t k, int64_t count) {
    const uint8_t* w = j.block(b) + k / W::kLine * 64;
    for (int64_t end = k + count; k < end;) {
        const int64_t g = k / j.a.group, stop = j.groups == 1 ? end : min_of(end, (g + 1) * j.a.group);
        const typename W::template Values<kZero> values(kZero ? j.zero(g, b) : nullptr);
        const F32 scale = j.scale(g, b);
        for (; k < stop; k += W::kLine, w += 64, panel += 16 * W::kLine) {
            const auto store = [&](F32 code, int i)
                                   __attribute__((always_inline)) { store_f32(panel + 16 * i, mul(code, scale)); };
            values.each(load_i32(w), store);
        }
    }
}

// sums[kUsed][16] += x[count][T] times panel[count][16], where the first kUsed of T tokens count. Not inlined: alone it
// keeps all sums in registers.
template <int kUsed>
__attribute__((noinline)) static void multiply(float* sums, const float* x, const float* panel, int64_t count) {
    F32 sum[kUsed];
#pragma GCC unroll 16
    for (int t = 0; t < kUsed; ++t) sum[t] = load_f32(sums + t * 16);
    for (int64_t k = 0; k < count; ++k, x += kFloatTokens, panel += 16) {
        const F32 w = load_f32(panel);
#pragma GCC unroll 16
        for (int t = 0; t < kUsed; ++t) sum[t] = madd(w, set_f32(x[t]), sum[t]);
    }
#pragma GCC unroll 16
    for (int t = 0; t < kUsed; ++t) store_f32(sums + t * 16, sum[t]);
}

template <int kUsed>
PERCARD_INLINE void multiply_part(float* sums, const float* x, const float* panel, int64_t count, int64_t used) {
    if (used >= kUsed) return multiply<kUsed>(sums, x, panel, count);
    if constexpr (kUsed > 1) multiply_part<kUsed - 1>(sums, x, panel, count, used);
}

template <typename W>
static void many_tokens(const Job& j) {
    constexpr int64_t T = kFloatTokens;
    const int64_t tiles = (j.a.m + T - 1) / T, all_k = j.lines * W::kLine;
    auto* x = static_cast<float*>(scratch(kSlotX, tiles * T * all_k * 4));  // [tiles, all_k, T], zero past k and m
    parallel(tiles, T * all_k * 1.0, [&](int64_t begin, int64_t end) {
        for (int64_t m = begin * T; m < end * T; ++m) {
            float* to = x + m / T * T * all_k + m % T;
            const F32 up = set_f32(m < j.a.m ? bring_near_one(j, m) : 0.0f);
            for (int64_t k = 0; k < all_k; k += 16) {
                float lanes[16] = {};
                if (m < j.a.m)
                    store_f32(lanes, mul(load_part_as(j.a.x, m * j.a.stride_xm + k, j.a.x_dtype, j.a.k - k), up));
                for (int64_t i = 0; i < min_of(16, all_k - k); ++i) to[(k + i) * T] = lanes[i];
            }
        }
    });
    // A part of x of kTiles tiles and kChunk inputs stays in the L2 and meets kBlocks panels.
    constexpr int64_t kTiles = 32, kBlocks = 4;
    const int64_t blocks = j.np / 16;
    const double ns = j.block_bytes * 0.5 + j.a.m * j.a.k * 16 / kFloatMacsPerNs;
    parallel((blocks + kBlocks - 1) / kBlocks, ns * kBlocks, [&](int64_t begin, int64_t end) {
        auto* panel = static_cast<float*>(scratch(kSlotPanel, kChunk * 16 * 4));
        auto* sums = static_cast<float*>(scratch(kSlotOut, kBlocks * kTiles * T * 16 * 4));
        for (int64_t first = begin * kBlocks; first < min_of(end * kBlocks, blocks); first += kBlocks) {
            const int64_t count_b = min_of(kBlocks, blocks - first);
            for (int64_t tile = 0; tile < tiles; tile += kTiles) {
                const int64_t count_i = min_of(kTiles, tiles - tile);
                for (int64_t b = 0; b < count_b; ++b) std::memset(sums + b * kTiles * T * 16, 0, count_i * T * 64);
                for (int64_t k = 0; k < all_k; k += kChunk) {
                    const int64_t count = min_of(kChunk, all_k - k);
                    for (int64_t b = 0; b < count_b; ++b) {
                        if (j.a.zero)
                            make_whole<W, true>(j, panel, first + b, k, count);
                        else
                            make_whole<W, false>(j, panel, first + b, k, count);
                        for (int64_t i = 0; i < count_i; ++i)
                            multiply_part<T>(sums + (b * kTiles + i) * T * 16, x + ((tile + i) * all_k + k) * T, panel,
                                             count, j.a.m - (tile + i) * T);
                    }
                }
                for (int64_t m = tile * T; m < min_of(j.a.m, (tile + count_i) * T); ++m)
                    for (int64_t b = 0; b < count_b; ++b)
                        finish(j, m, first + b, load_f32(sums + (b * kTiles * T + m - tile * T) * 16));
            }
        }
    });
}

#ifdef PERCARD_ISA_amx_int8
// A mask of the first `left` of 32 lanes.
PERCARD_INLINE __mmask32 first_of(int64_t left) {
    return left >= 32 ? ~__mmask32{0} : (__mmask32{1} << max_of(0, left)) - 1;
}

// Inputs k .. k + count of block b as B tiles.
template <typename W, bool kZero>
static void unpack_bf16(const Job& j, char* to, int64_t b, int64_t k, int64_t count) {
    const uint8_t* w = j.block(b) + k / W::kLine * 64;
    for (int64_t end = k + count; k < end;) {
        const int64_t g = k / j.a.group, stop = j.groups == 1 ? end : min_of(end, (g + 1) * j.a.group);
        const typename W::template Pairs<kZero> pairs(kZero ? j.zero(g, b) : nullptr);
        for (; k < stop; k += W::kLine, w += 64, to += 32 * W::kLine) {
            prefetch(w + 2048);
            pairs.unpack(to, load_i32(w));
        }
    }
}

// Whether bring_near_one leaves row m of bf16 as it is: the largest number lies within 2^-64 .. 2^64, or all are 0.
static bool is_near_one(const Job& j, int64_t m) {
    const uint16_t* x = static_cast<const uint16_t*>(j.a.x) + m * j.a.stride_xm;
    __m512i most = _mm512_setzero_si512();
    for (int64_t k = 0; k < j.a.k; k += 32) {
        const __m512i part = _mm512_maskz_loadu_epi16(first_of(j.a.k - k), x + k);
        most = _mm512_max_epu16(most, _mm512_and_si512(part, _mm512_set1_epi16(0x7fff)));
    }
    alignas(64) uint16_t lanes[32];
    _mm512_store_si512(lanes, most);
    uint16_t largest = 0;
    for (uint16_t lane : lanes) largest = lane > largest ? lane : largest;
    if (largest != 0 && (largest < 0x1f80 || largest > 0x5f80)) return false;
    j.factor[m] = 1.0f;
    return true;
}

// Row m of bf16 as it lies in A tiles, without a detour through fp32: zero past k, and past m.
static void copy_row(const Job& j, char* to, int64_t m, int64_t steps, __m512i permute) {
    const uint16_t* x = static_cast<const uint16_t*>(j.a.x) + m * j.a.stride_xm;
    for (int64_t s = 0; s < steps; ++s, to += amx::kTile) {
        const __m512i part = _mm512_maskz_loadu_epi16(first_of(m < j.a.m ? j.a.k - s * 32 : 0), x + s * 32);
        _mm512_store_si512(to, _mm512_permutexvar_epi16(permute, part));
    }
}

// x as A tiles [planes, token tiles, steps][16 tokens][32 inputs] of bf16, each plane the leading 8 bits of what is
// left.
template <typename W, int kPlanes>
static void tiles_of_x(const Job& j, char* tiles, int64_t steps, int64_t plane) {
    alignas(64) uint16_t order[32];
    for (int i = 0; i < 32; ++i) order[i] = static_cast<uint16_t>(W::input_at(i));
    const __m512i permute = _mm512_load_si512(order);
    parallel((j.a.m + 15) / 16, 16 * j.a.k * 0.3 * kPlanes, [&](int64_t begin, int64_t end) {
        for (int64_t m = begin * 16; m < end * 16; ++m) {
            char* to = tiles + m / 16 * steps * amx::kTile + m % 16 * 64;
            if (kPlanes == 1 && (m >= j.a.m || is_near_one(j, m))) {
                copy_row(j, to, m, steps, permute);
                continue;
            }
            const F32 up = set_f32(m < j.a.m ? bring_near_one(j, m) : 0.0f);
            for (int64_t s = 0; s < steps; ++s, to += amx::kTile) {
                F32 rest[2] = {set_f32(0.0f), set_f32(0.0f)};
                for (int h = 0; h < 2 && m < j.a.m; ++h)
                    rest[h] = mul(
                        load_part_as(j.a.x, m * j.a.stride_xm + s * 32 + h * 16, j.a.x_dtype, j.a.k - s * 32 - h * 16),
                        up);
                for (int p = 0; p < kPlanes; ++p) {
                    __m256i half[2];
                    for (int h = 0; h < 2; ++h) {
                        const __m512i u = as_i32(rest[h]).v;
                        const __mmask16 nan = _mm512_cmp_ps_mask(rest[h].v, rest[h].v, _CMP_UNORD_Q);
                        const __m512i head = _mm512_mask_or_epi32(u, nan, u, _mm512_set1_epi32(0x400000));
                        half[h] = _mm512_cvtepi32_epi16(_mm512_srli_epi32(head, 16));
                        const F32 taken = as_f32(I32{_mm512_and_si512(head, _mm512_set1_epi32(-65536))});
                        const __mmask16 finite = _mm512_cmp_ps_mask(abs(taken).v, set_f32(3.4e38f).v, _CMP_LE_OQ);
                        rest[h].v = _mm512_maskz_sub_ps(finite, rest[h].v, taken.v);  // infinity leaves nothing
                    }
                    const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(half[0]), half[1], 1);
                    _mm512_store_si512(to + p * plane, _mm512_permutexvar_epi16(permute, both));
                }
            }
        }
    });
}

template <typename W, int kPlanes>
static void by_tiles(const Job& j) {
    const MatmulA16& a = j.a;
    const int64_t all_k = round_up(a.k, 32), steps = all_k / 32, token_tiles = (a.m + 15) / 16;
    const int64_t plane = token_tiles * steps * amx::kTile;
    auto* x = static_cast<char*>(scratch(kSlotX, kPlanes * plane));
    tiles_of_x<W, kPlanes>(j, x, steps, plane);
    const amx::Grouped job{a.m,
                           j.np / 16,
                           all_k,
                           32,
                           j.groups == 1 ? all_k : a.group,
                           plane,
                           32,
                           a.scale,
                           j.block_bytes * 0.3 + token_tiles * steps * kPlanes * 10};
    amx::multiply_grouped<amx::ProductBf16<kPlanes>>(
        job, x,
        [&](char* panel, int64_t b, int64_t k, int64_t count) {
            a.zero ? unpack_bf16<W, true>(j, panel, b, k, count) : unpack_bf16<W, false>(j, panel, b, k, count);
        },
        [&](int64_t i, int64_t first, int64_t count, const float* sums) {
            for (int64_t m = i * 16; m < min_of(a.m, i * 16 + 16); ++m)
                for (int64_t b = 0; b < count; b += 2) {
                    const float* from = sums + b * 256 + m % 16 * 16;
                    const int64_t at = (first + b) * 16, left = min_of(32, a.n - at);
                    const F32 y0 = scaled(j, m, at, load_f32(from), left);
                    const F32 y1 = left > 16 ? scaled(j, m, at + 16, load_f32(from + 256), left - 16) : y0;
                    amx::store_two(a.y, m * a.n + at, a.y_dtype, y0, y1, left);
                }
        });
}
#endif

template <typename W>
static void run(const MatmulA16& a) {
    if (a.m == 0) return;
    auto* factor = static_cast<float*>(scratch(kSlotSums, a.m * 4));
    const int64_t block_bytes = round_up(a.k, 128) / W::kLine * 64;
    const Job job{a,           factor,           (a.k + a.group - 1) / a.group, round_up(a.k, W::kLine) / W::kLine,
                  block_bytes, round_up(a.n, 16)};
    // Streaming adds in another order than the rest, so it is out when rows must not depend on their number.
    if (a.m <= kFew && !a.batch_invariant) return few_tokens<W>(job);
#ifdef PERCARD_ISA_amx_int8
    if (job.groups == 1 || a.group % 32 == 0) {
        if (a.x_dtype == kBFloat16) return by_tiles<W, 1>(job);
        if (a.x_dtype == kFloat16) return by_tiles<W, 2>(job);
        return by_tiles<W, 3>(job);
    }
#endif
    many_tokens<W>(job);
}

}  // namespace weight_only
}  // namespace PERCARD_ISA
}  // namespace percard
