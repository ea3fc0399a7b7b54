// matmul_w8a8: y[m, n] = (sum_k w[n, k] * xq[m, k]) * sx[m] * sw[n] + bias[n], in this order.
//
//   weights rows16_k4_w8, one line = one step of 4 inputs           lanes = 16 output rows
//   line: 16 rows x 4 inputs   x   4 activations, broadcast   ->   16 int32 sums
//
// simd.h says how an ISA multiplies int8 by int8 exactly, and what that asks of both sides ("wide"). Few tokens: the
// weights stream through once. More: a block of 16 rows is widened once into a panel and meets all tokens. With AMX:
// amx.h.
#include "ops.h"
#include "parallel.h"
#include "simd.h"
#ifdef PERCARD_ISA_amx_int8
#include "amx.h"
#endif

namespace percard {
namespace PERCARD_ISA {
namespace w8a8 {

constexpr int64_t kWideBytes = sizeof(DotS8::Wide), kXBytes = DotS8::kXBytes;

struct Job {
    const MatmulW8A8& a;
    const char* x;        // [m, lines, kXBytes], as DotS8 wants it
    const int32_t* sums;  // [m], where a sum starts: minus what it comes out too large by
    int64_t lines, block_bytes;
};

template <int T, int kLines, bool kPacked>
PERCARD_INLINE void dot_lines(DotS8 (&dot)[T], const char* w, const char* x, int64_t stride_x) {
#pragma GCC unroll 4
    for (int i = 0; i < kLines; ++i) {
        if constexpr (kPacked) prefetch(w + 64 * i + 2048);
        const DotS8::Wide wide = kPacked ? DotS8::widen(w + 64 * i) : DotS8::load(w + kWideBytes * i);
#pragma GCC unroll 16
        for (int t = 0; t < T; ++t) dot[t].step(wide, x + t * stride_x + kXBytes * i);
    }
}

// T tokens from m on times the 16 rows of block b, whose lines (or panel) are at w.
template <int T, bool kPacked>
static void tile(const Job& j, const char* w, int64_t b, int64_t m) {
    constexpr int64_t kLineBytes = kPacked ? 64 : kWideBytes;
    const int64_t stride_x = j.lines * kXBytes;
    const char* x = j.x + m * stride_x;
    DotS8 dot[T];
    for (int t = 0; t < T; ++t) dot[t].start(set_i32(j.sums[m + t]));
    int64_t line = 0;
    for (; line + 4 <= j.lines; line += 4)
        dot_lines<T, 4, kPacked>(dot, w + line * kLineBytes, x + line * kXBytes, stride_x);
    for (; line < j.lines; ++line) dot_lines<T, 1, kPacked>(dot, w + line * kLineBytes, x + line * kXBytes, stride_x);
    const int64_t count = min_of(16, j.a.n - b * 16);
    const F32 scale = load_f32(j.a.scale + b * 16);
    for (int t = 0; t < T; ++t) {
        F32 y = mul(mul(to_f32(dot[t].sum()), set_f32(j.a.sx[m + t])), scale);
        if (j.a.bias) y = add(y, load_part(j.a.bias + b * 16, count));
        store_part(j.a.y, (m + t) * j.a.n + b * 16, j.a.y_dtype, y, count);
    }
}

template <int T, bool kPacked>
PERCARD_INLINE void last_tile(const Job& j, const char* w, int64_t b, int64_t m, int64_t count) {
    if (count == T) return tile<T, kPacked>(j, w, b, m);
    if constexpr (T > 1) last_tile<T - 1, kPacked>(j, w, b, m, count);
}

static void blocks(const Job& j, int64_t begin, int64_t end) {
    const bool few = j.a.m <= kIntTokens;
    auto* panel = few ? nullptr : static_cast<char*>(scratch(kSlotPanel, j.lines * kWideBytes));
    for (int64_t b = begin; b < end; ++b) {
        const char* w = reinterpret_cast<const char*>(j.a.w) + b * j.block_bytes;
        if (few) {
            last_tile<kIntTokens, true>(j, w, b, 0, j.a.m);
            continue;
        }
        for (int64_t line = 0; line < j.lines; ++line)
            DotS8::store(panel + line * kWideBytes, DotS8::widen(w + line * 64));
        int64_t m = 0;
        for (; m + kIntTokens <= j.a.m; m += kIntTokens) tile<kIntTokens, false>(j, panel, b, m);
        if (m < j.a.m) last_tile<kIntTokens, false>(j, panel, b, m, j.a.m - m);
    }
}

#ifdef PERCARD_ISA_amx_int8
// A packed weight is already a row of B tiles. 2 x 2 tiles of 32 tokens and 32 rows over all of k, then the epilogue; a
// few pairs of blocks follow each other on the same tokens, so that neighbouring outputs are stored soon after each
// other.
static void by_tiles(const MatmulW8A8& a) {
    using amx::kTile;
    constexpr int64_t kBlocks = 8;
    const int64_t steps = round_up(a.k, 64) / 64, token_tiles = (a.m + 15) / 16, blocks = (a.n + 15) / 16;
    const int64_t block_bytes = round_up(a.k, 128) * 16;
    auto* x = static_cast<int8_t*>(scratch(kSlotX, token_tiles * steps * kTile));
    amx::tiles_of_x(x, a.xq, a.stride_xm, a.m, a.k, steps, 64);
    const auto finish = [&](const int32_t* c, int64_t i, int64_t b) {
        const int64_t count = min_of(32, a.n - b * 16);
        const F32 scale0 = load_f32(a.scale + b * 16);
        const F32 scale1 = count > 16 ? load_f32(a.scale + b * 16 + 16) : scale0;
        F32 bias0 = set_f32(0.0f), bias1 = bias0;
        if (a.bias) bias0 = load_part(a.bias + b * 16, count);
        if (a.bias && count > 16) bias1 = load_part(a.bias + b * 16 + 16, count - 16);
        for (int64_t m = i * 16; m < min_of(a.m, i * 16 + 16); ++m, c += 16) {
            const F32 sx = set_f32(a.sx[m]);
            F32 y0 = mul(mul(to_f32(load_i32(c)), sx), scale0), y1 = mul(mul(to_f32(load_i32(c + 256)), sx), scale1);
            if (a.bias) y0 = add(y0, bias0), y1 = add(y1, bias1);
            amx::store_two(a.y, m * a.n + b * 16, a.y_dtype, y0, y1, count);
        }
    };
    const double ns = block_bytes * 0.1 + token_tiles * steps * 10;
    parallel((blocks + kBlocks - 1) / kBlocks, ns * kBlocks, [&](int64_t begin, int64_t end) {
        const amx::Registers registers(4, min_of(a.m, 16), 64);
        alignas(64) int32_t c[4 * 256] = {};
        for (int64_t first = begin * kBlocks; first < min_of(end * kBlocks, blocks); first += kBlocks) {
            for (int64_t i = 0; i < token_tiles; i += 2) {
                const int8_t *a0 = x + i * steps * kTile, *a1 = a0 + steps * kTile;
                const bool two_a = i + 1 < token_tiles;
                for (int64_t b = first; b < min_of(first + kBlocks, blocks); b += 2) {
                    const int8_t *b0 = a.w + b * block_bytes, *b1 = b0 + block_bytes;
                    const bool two_b = b + 1 < blocks;
                    if (two_a && two_b)
                        amx::block_s8<true, true>(c, a0, a1, b0, b1, steps);
                    else if (two_a)
                        amx::block_s8<true, false>(c, a0, a1, b0, b1, steps);
                    else if (two_b)
                        amx::block_s8<false, true>(c, a0, a1, b0, b1, steps);
                    else
                        amx::block_s8<false, false>(c, a0, a1, b0, b1, steps);
                    finish(c, i, b);
                    if (two_a) finish(c + 512, i + 1, b);
                }
            }
        }
    });
}
#endif

}  // namespace w8a8

void matmul_w8a8(const MatmulW8A8& a) {
    using w8a8::kXBytes;
#ifdef PERCARD_ISA_amx_int8
    if (a.m > 4) return w8a8::by_tiles(a);
#endif
    const int64_t lines = round_up(a.k, 4) / 4, stride_x = lines * kXBytes;
    auto* sums = static_cast<int32_t*>(scratch(kSlotSums, a.m * 4));
    auto* x = static_cast<char*>(scratch(kSlotX, a.m * stride_x));
    parallel(a.m, a.k * 0.3, [&](int64_t begin, int64_t end) {
        for (int64_t m = begin; m < end; ++m) {
            const int8_t* from = a.xq + m * a.stride_xm;
            int32_t sum = 0;
            for (int64_t k = 0; k < a.k; ++k) sum += from[k];
            sums[m] =
                static_cast<int32_t>(static_cast<uint32_t>(-DotS8::kOffset) * static_cast<uint32_t>(sum));  // may wrap
            char* to = x + m * stride_x;
            for (int64_t line = 0; line < a.k / 4; ++line) DotS8::widen_x(to + line * kXBytes, from + line * 4);
            if (a.k % 4 != 0) {
                int8_t last[4] = {};
                std::memcpy(last, from + a.k / 4 * 4, a.k % 4);
                DotS8::widen_x(to + (lines - 1) * kXBytes, last);
            }
        }
    });
    const w8a8::Job job{a, x, sums, lines, round_up(a.k, 128) * 16};
    parallel(round_up(a.n, 16) / 16, job.block_bytes * 0.1 + a.m * a.k * 16 / kIntMacsPerNs,
             [&](int64_t begin, int64_t end) { w8a8::blocks(job, begin, end); });
}

}  // namespace PERCARD_ISA
}  // namespace percard
