// matmul_w4a8: y[m, n] = sx[m] * sum_g s[n, g] * (sum_{k in g} (u[n, k] - 8) * xq[m, k]) + bias[n], u = 0..15.
//
//   weights rows16_k4_w4            one step of 4 inputs             lanes = 16 output rows
//   line: 16 rows x 8 inputs  ->    low or high nibbles, 0..15   x   4 activations, broadcast   ->   16 int32 sums
//
// -8 comes back as 8 times the sum of the activations of the group. Few tokens: the weights stream through once and
// their nibbles are split on the way. More: a block of 16 rows is split once into a panel and meets all tokens. With
// AMX and more than a few tokens: amx.h. Sums of a group are exact int32 on every ISA, so all give the same bits.
//
// Two-level scales, s = row_scale * m with m = 1..16: the sum of a group is multiplied by the integer m (with AMX: its
// codes are, while they are unpacked), and sums are int32 over all of k.
#include "ops.h"
#include "parallel.h"
#include "simd.h"
#ifdef PERCARD_ISA_amx_int8
#include "amx.h"
#endif

namespace percard {
namespace PERCARD_ISA {
namespace w4a8 {

struct Job {
    const MatmulW4A8& a;
    const int8_t* x;  // [m, stride_x], zero from k to a multiple of 8
    int64_t stride_x;
    const int32_t* sums;  // [m, groups], 8 times the sum of a group
    int64_t groups, group_lines, lines, block_bytes, np;
};

// The integers of group g of two-level scales for the 16 rows of block b; `over` is 1 / row_scale.
PERCARD_INLINE I32 integers(const MatmulW4A8& a, int64_t np, int64_t g, int64_t b, F32 over) {
    return to_i32(mul(load_f32(a.scale + g * np + b * 16), over));
}
PERCARD_INLINE F32 one_over_rows(const MatmulW4A8& a, int64_t b) {
    return div(set_f32(1.0f), load_f32(a.row_scale + b * 16));
}

// sum * sx + bias for token m and the outputs from n on, `count` of them.
PERCARD_INLINE F32 scaled(const MatmulW4A8& a, int64_t m, int64_t n, F32 sum, int64_t count) {
    const F32 y = mul(sum, set_f32(a.sx[m]));
    return a.bias ? add(y, load_part(a.bias + n, count)) : y;
}

template <int T, int kLines, bool kPacked>
PERCARD_INLINE void dot_lines(I32 (&acc)[T], const uint8_t* w, const int8_t* x, int64_t stride_x) {
    DotU4 low_dot[T], high_dot[T];  // one token alone takes two chains of sums, since one would wait for itself
    constexpr bool kTwo = T == 1;
    for (int t = 0; t < T; ++t) {
        low_dot[t].start(acc[t]);
        if (kTwo) high_dot[t].start(set_i32(0));
    }
#pragma GCC unroll 4
    for (int i = 0; i < kLines; ++i) {
        Bytes low, high;
        if constexpr (kPacked) {
            const Bytes line = load_bytes(w + 64 * i);
            prefetch(w + 64 * i + 2048);
            low = low_nibbles(line);
            high = high_nibbles(line);
        } else {
            low = load_bytes(w + 128 * i);
            high = load_bytes(w + 128 * i + 64);
        }
#pragma GCC unroll 16
        for (int t = 0; t < T; ++t) {
            low_dot[t].step(low, x + t * stride_x + 8 * i);
            (kTwo ? high_dot : low_dot)[t].step(high, x + t * stride_x + 8 * i + 4);
        }
    }
    for (int t = 0; t < T; ++t) acc[t] = kTwo ? add(low_dot[t].sum(), high_dot[t].sum()) : low_dot[t].sum();
}

// T tokens from m on times the 16 rows of block b, whose lines (or panel) are at w.
template <int T, bool kPacked, bool kTwoLevel>
static void tile(const Job& j, const uint8_t* w, int64_t b, int64_t m) {
    constexpr int64_t kLineBytes = kPacked ? 64 : 128;
    F32 sum[T];
    I32 whole[T];
    for (int t = 0; t < T; ++t) sum[t] = set_f32(0.0f), whole[t] = set_i32(0);
    F32 over = set_f32(0.0f);
    if constexpr (kTwoLevel) over = one_over_rows(j.a, b);
    const int8_t* x = j.x + m * j.stride_x;
    int64_t line = 0;
    for (int64_t g = 0; g < j.groups; ++g) {
        const int64_t end = min_of(line + j.group_lines, j.lines);
        if constexpr (kPacked) prefetch_scale(j.a.scale, j.np, j.groups, g, b);
        I32 acc[T];
        for (int t = 0; t < T; ++t) acc[t] = set_i32(-j.sums[(m + t) * j.groups + g]);
        for (; line + 4 <= end; line += 4)
            dot_lines<T, 4, kPacked>(acc, w + line * kLineBytes, x + line * 8, j.stride_x);
        for (; line < end; ++line) dot_lines<T, 1, kPacked>(acc, w + line * kLineBytes, x + line * 8, j.stride_x);
        if constexpr (kTwoLevel) {
            const I32 times = integers(j.a, j.np, g, b, over);
            for (int t = 0; t < T; ++t) whole[t] = add(whole[t], mul(acc[t], times));
            continue;
        }
        const F32 scale = load_f32(j.a.scale + g * j.np + b * 16);
        for (int t = 0; t < T; ++t) sum[t] = fma(to_f32(acc[t]), scale, sum[t]);
    }
    if constexpr (kTwoLevel)
        for (int t = 0; t < T; ++t) sum[t] = mul(to_f32(whole[t]), load_f32(j.a.row_scale + b * 16));
    const int64_t count = min_of(16, j.a.n - b * 16);
    for (int t = 0; t < T; ++t)
        store_part(j.a.y, (m + t) * j.a.n + b * 16, j.a.y_dtype, scaled(j.a, m + t, b * 16, sum[t], count), count);
}

template <int T, bool kPacked, bool kTwoLevel>
PERCARD_INLINE void last_tile(const Job& j, const uint8_t* w, int64_t b, int64_t m, int64_t count) {
    if (count == T) return tile<T, kPacked, kTwoLevel>(j, w, b, m);
    if constexpr (T > 1) last_tile<T - 1, kPacked, kTwoLevel>(j, w, b, m, count);
}

template <bool kTwoLevel>
static void blocks(const Job& j, int64_t begin, int64_t end) {
    const bool few = j.a.m <= kIntTokens;
    auto* panel = few ? nullptr : static_cast<uint8_t*>(scratch(kSlotPanel, j.lines * 128));
    for (int64_t b = begin; b < end; ++b) {
        const uint8_t* w = j.a.w + b * j.block_bytes;
        if (few) {
            last_tile<kIntTokens, true, kTwoLevel>(j, w, b, 0, j.a.m);
            continue;
        }
        for (int64_t line = 0; line < j.lines; ++line) {
            const Bytes packed = load_bytes(w + line * 64);
            store_bytes(panel + line * 128, low_nibbles(packed));
            store_bytes(panel + line * 128 + 64, high_nibbles(packed));
        }
        int64_t m = 0;
        for (; m + kIntTokens <= j.a.m; m += kIntTokens) tile<kIntTokens, false, kTwoLevel>(j, panel, b, m);
        if (m < j.a.m) last_tile<kIntTokens, false, kTwoLevel>(j, panel, b, m, j.a.m - m);
    }
}

static int32_t sum_of(const int8_t* x, int64_t count) {
    int32_t sum = 0;
    for (int64_t k = 0; k < count; ++k) sum += x[k];
    return sum;
}

#ifdef PERCARD_ISA_amx_int8
// Lines of 4-bit codes as signed bytes: a line becomes two lines of a B tile.
static void unpack_s8(int8_t* to, const uint8_t* w, int64_t lines) {
    const __m512i eight = _mm512_set1_epi8(8);
    for (int64_t line = 0; line < lines; ++line, w += 64, to += 128) {
        const Bytes packed = load_bytes(w);
        prefetch(w + 2048);
        _mm512_store_si512(to, _mm512_sub_epi8(low_nibbles(packed).v, eight));
        _mm512_store_si512(to + 64, _mm512_sub_epi8(high_nibbles(packed).v, eight));
    }
}

// The same for inputs k .. k + count of block b, times the integers of two-level scales. u * m is at most 240, so two
// bytes of a word are multiplied at once, and 8 m is taken back byte by byte: q * m, -128..112.
static void unpack_times(const MatmulW4A8& a, int8_t* to, const uint8_t* w, int64_t np, int64_t b, int64_t k,
                         int64_t count) {
    const F32 over = one_over_rows(a, b);
    for (const int64_t end = k + count; k < end;) {
        const int64_t g = k / a.group, stop = min_of(end, (g + 1) * a.group);
        const __m512i m = integers(a, np, g, b, over).v, words = _mm512_or_si512(m, _mm512_slli_epi32(m, 16));
        const __m512i eights = _mm512_slli_epi16(words, 3),
                      eight = _mm512_or_si512(eights, _mm512_slli_epi16(eights, 8));
        for (; k < stop; k += 8, w += 64, to += 128) {
            const Bytes packed = load_bytes(w);
            prefetch(w + 2048);
            _mm512_store_si512(to, _mm512_sub_epi8(_mm512_mullo_epi16(low_nibbles(packed).v, words), eight));
            _mm512_store_si512(to + 64, _mm512_sub_epi8(_mm512_mullo_epi16(high_nibbles(packed).v, words), eight));
        }
    }
}

// A tile ends where a group ends, so that its int32 sums are scaled before the next group comes; two-level scales make
// one group of all.
static void by_tiles(const MatmulW4A8& a) {
    using amx::kTile;
    const bool one = a.group >= a.k || a.row_scale;
    const int64_t tile_k = one || a.group % 64 == 0 ? 64 : 32, all_k = round_up(a.k, tile_k), steps = all_k / tile_k;
    const int64_t token_tiles = (a.m + 15) / 16, blocks = (a.n + 15) / 16, block_bytes = round_up(a.k, 128) * 8;
    auto* x = static_cast<int8_t*>(scratch(kSlotX, token_tiles * steps * kTile));
    amx::tiles_of_x(x, a.xq, a.stride_xm, a.m, a.k, steps, tile_k);
    const amx::Grouped job{a.m,
                           blocks,
                           all_k,
                           tile_k,
                           one ? all_k : a.group,
                           0,
                           16,
                           a.row_scale ? a.row_scale : a.scale,
                           block_bytes * 0.3 + token_tiles * steps * 12};
    amx::multiply_grouped<amx::ProductS8>(
        job, reinterpret_cast<const char*>(x),
        [&](char* panel, int64_t b, int64_t k, int64_t count) {
            auto* to = reinterpret_cast<int8_t*>(panel);
            const uint8_t* w = a.w + b * block_bytes + k * 8;
            a.row_scale ? unpack_times(a, to, w, blocks * 16, b, k, count) : unpack_s8(to, w, count / 8);
        },
        [&](int64_t i, int64_t first, int64_t count, const float* sums) {
            for (int64_t m = i * 16; m < min_of(a.m, i * 16 + 16); ++m)
                for (int64_t b = 0; b < count; b += 2) {
                    const float* from = sums + b * 256 + m % 16 * 16;
                    const int64_t at = (first + b) * 16, left = min_of(32, a.n - at);
                    const F32 y0 = scaled(a, m, at, load_f32(from), left);
                    const F32 y1 = left > 16 ? scaled(a, m, at + 16, load_f32(from + 256), left - 16) : y0;
                    amx::store_two(a.y, m * a.n + at, a.y_dtype, y0, y1, left);
                }
        });
}
#endif

}  // namespace w4a8

void matmul_w4a8(const MatmulW4A8& a) {
#ifdef PERCARD_ISA_amx_int8
    if (a.m > 4 && (a.group % 32 == 0 || a.group >= a.k)) return w4a8::by_tiles(a);
#endif
    const int64_t groups = (a.k + a.group - 1) / a.group, lines = round_up(a.k, 8) / 8;
    const bool whole = a.k % 8 == 0;
    const int64_t stride_x = whole ? a.stride_xm : lines * 8;
    auto* sums = static_cast<int32_t*>(scratch(kSlotSums, a.m * groups * 4));
    auto* padded = whole ? nullptr : static_cast<int8_t*>(scratch(kSlotX, a.m * stride_x));
    parallel(a.m, a.k * 0.1, [&](int64_t begin, int64_t end) {
        for (int64_t m = begin; m < end; ++m) {
            const int8_t* x = a.xq + m * a.stride_xm;
            for (int64_t g = 0; g < groups; ++g)
                sums[m * groups + g] =
                    8 * (groups == 1 ? a.xsum[m] : w4a8::sum_of(x + g * a.group, min_of(a.group, a.k - g * a.group)));
            if (whole) continue;
            std::memcpy(padded + m * stride_x, x, a.k);
            std::memset(padded + m * stride_x + a.k, 0, stride_x - a.k);
        }
    });
    const w4a8::Job job{
        a,     whole ? a.xq : padded,  stride_x,         sums, groups, groups == 1 ? lines : a.group / 8,
        lines, round_up(a.k, 128) * 8, round_up(a.n, 16)};
    const int64_t blocks = job.np / 16;
    parallel(blocks, job.block_bytes * 0.1 + a.m * a.k * 16 / kIntMacsPerNs, [&](int64_t begin, int64_t end) {
        a.row_scale ? w4a8::blocks<true>(job, begin, end) : w4a8::blocks<false>(job, begin, end);
    });
}

}  // namespace PERCARD_ISA
}  // namespace percard
