// AMX: products of whole tiles. Included by the amx_int8 objects only.
//
//   A tile: 16 tokens x 64 bytes of x          (64 int8 or 32 bf16 along k)
//   B tile: 16 lines x 64 bytes of weight      a line of rows16_k4_w8 is a row of it: 16 output rows x 4 int8 (or 2
//   bf16) C tile: 16 tokens x 16 output rows, int32 or fp32
//
// A tile costs 16 cycles and its two operands 8 each to load, so a 2 x 2 block of C keeps the unit busy from the L1.
#pragma once

#include "parallel.h"
#include "simd.h"

namespace percard {
namespace PERCARD_ISA {
namespace amx {

constexpr int64_t kTile = 1024;  // bytes
constexpr int64_t kTokens = 16;  // of a tile

// The tile registers of this thread, for as long as the object lives: the first `sums` are C, then come A, 6 and 7 are
// B. `tokens` are the rows of A and C, `bytes` the bytes of k in A (B has bytes / 4 lines).
class Registers {
  public:
    Registers(int sums, int64_t tokens, int64_t bytes) {
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {};
            uint8_t rows[16] = {};
        } config;
        for (int tile = 0; tile < 8; ++tile) {
            const bool a = tile >= sums && tile < 6, b = tile >= 6;
            config.rows[tile] = static_cast<uint8_t>(b ? bytes / 4 : tokens);
            config.row_bytes[tile] = static_cast<uint16_t>(a ? bytes : 64);
        }
        // gcc's own intrinsic names 8 of the 64 bytes as read, and then the rest may never be written.
        __asm__ volatile("ldtilecfg %0" ::"m"(config));
    }
    ~Registers() { __asm__ volatile("tilerelease"); }
    Registers(const Registers&) = delete;
    Registers& operator=(const Registers&) = delete;
};

// The instructions, with the numbers of tile registers as template arguments, which the compilers' own intrinsics do
// not take.
template <int kT>
PERCARD_INLINE void zero() {
    __asm__ volatile("tilezero %%tmm%c0" ::"i"(kT));
}
template <int kT>
PERCARD_INLINE void load(const void* tile) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(tile), "r"(int64_t{64}), "i"(kT) : "memory");
}
template <int kT>
PERCARD_INLINE void store(void* tile) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(tile), "r"(int64_t{64}), "i"(kT) : "memory");
}

// Stores the first `count` of 32 neighbouring outputs: a whole cache line of bf16 or fp16 at once.
PERCARD_INLINE void store_two(void* y, int64_t at, int dtype, F32 x0, F32 x1, int64_t count) {
    if (count >= 32 && dtype == kBFloat16) {
        alignas(64) static constexpr uint16_t kHigh[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                                                           23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43,
                                                           45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
        const __m512i both = _mm512_permutex2var_epi16(bf16_bits(x0), _mm512_load_si512(kHigh), bf16_bits(x1));
        return _mm512_storeu_si512(static_cast<uint16_t*>(y) + at, both);
    }
    store_part(y, at, dtype, x0, min_of(16, count));
    if (count > 16) store_part(y, at + 16, dtype, x1, count - 16);
}

// int8 x int8 to int32
struct ProductS8 {
    using Sum = int32_t;
    static constexpr int kPlanes = 1;
    template <int kC, int kA, int kB>
    static PERCARD_INLINE_MEMBER void dot() {
        __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
    }
    static PERCARD_INLINE_MEMBER F32 sum(const Sum* c) { return to_f32(load_i32(c)); }
};

// bf16 x bf16 to fp32. x may be the sum of `planes` bf16 numbers.
template <int planes>
struct ProductBf16 {
    using Sum = float;
    static constexpr int kPlanes = planes;
    template <int kC, int kA, int kB>
    static PERCARD_INLINE_MEMBER void dot() {
        __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
    }
    static PERCARD_INLINE_MEMBER F32 sum(const Sum* c) { return load_f32(c); }
};

// c[kTwoA + 1][kTwoB + 1] tiles = sums over `steps` tiles along k. All tiles of one operand follow each other.
template <bool kTwoA, bool kTwoB>
PERCARD_INLINE void block_s8(int32_t* c, const int8_t* a0, const int8_t* a1, const int8_t* b0, const int8_t* b1,
                             int64_t steps) {
    zero<0>();
    if (kTwoB) zero<1>();
    if (kTwoA) zero<2>();
    if (kTwoA && kTwoB) zero<3>();
    for (int64_t at = 0; at < steps * kTile; at += kTile) {
        load<6>(b0 + at);
        load<4>(a0 + at);
        ProductS8::dot<0, 4, 6>();
        if (kTwoB) {
            load<7>(b1 + at);
            ProductS8::dot<1, 4, 7>();
        }
        if (kTwoA) {
            load<5>(a1 + at);
            ProductS8::dot<2, 5, 6>();
            if (kTwoB) ProductS8::dot<3, 5, 7>();
        }
    }
    store<0>(c);
    if (kTwoB) store<1>(c + 256);
    if (kTwoA) store<2>(c + 512);
    if (kTwoA && kTwoB) store<3>(c + 768);
}

// Where a product of groups reads: tiles of one or two token tiles, of one block. What lies between neighbours is the
// same for all blocks: bytes from a B tile to the next, from a plane of x to the next.
struct Operands {
    const char *a0, *a1, *b;
    int64_t b_step, plane;
    Operands at(int64_t s) const { return {a0 + s * kTile, a1 + s * kTile, b + s * b_step, b_step, plane}; }
};

// The tiles of one plane of one step, to registers kA (and kA + 1) and, with the first plane, kB.
template <bool kTwo, int kA, int kB, int kPlane>
PERCARD_INLINE void load_step(const Operands& o) {
    if constexpr (kPlane == 0) load<kB>(o.b);
    load<kA>(o.a0 + kPlane * o.plane);
    if constexpr (kTwo) load<kA + 1>(o.a1 + kPlane * o.plane);
}

// The products of one step. Its tiles lie in registers 2 (3) and 6, those of an odd step (and of the second plane) in 4
// (5) and 7. Those of `next` are asked for before, so that they come from the L2 while the unit is busy, and not after
// the vectors that scale a group.
template <typename Product, bool kTwo, int kOdd, int kPlane = 0>
PERCARD_INLINE void step(const Operands& o, const Operands& next) {
    constexpr int kA = (kOdd * Product::kPlanes + kPlane) % 2 ? 4 : 2, kB = kOdd ? 7 : 6;
    if constexpr (kPlane + 1 < Product::kPlanes)
        load_step<kTwo, 6 - kA, kB, kPlane + 1>(o);
    else
        load_step<kTwo, 6 - kA, 13 - kB, 0>(next);
    Product::template dot<0, kA, kB>();
    if constexpr (kTwo) Product::template dot<1, kA + 1, kB>();
    if constexpr (kPlane + 1 < Product::kPlanes) step<Product, kTwo, kOdd, kPlane + 1>(o, next);
}

template <typename Product, bool kTwo>
PERCARD_INLINE void step_of(bool odd, const Operands& o, const Operands& next) {
    odd ? step<Product, kTwo, 1>(o, next) : step<Product, kTwo, 0>(o, next);
}

// What one block does with one chunk of k: `steps` in all, in groups of `group_steps`, from `o` on. Afterwards the
// tiles of `next`, the first of another block, lie in the registers, if the steps are even.
struct Stretch {
    Operands o, next;
    int64_t steps, group_steps;
    bool fresh;
    const Operands after(int64_t s) const { return s + 1 < steps ? o.at(s + 1) : next; }
};

// sums0 and sums1 [16 tokens][16 rows] (0 if `fresh`) += scale[g] * (sums of group g), ascending, fused. As many sums
// as there are vector registers stay in them. The products of a group run while the one before is scaled.
template <typename Product, bool kTwo, int kSteps>
static inline void add_groups(const Stretch& t, float* sums0, float* sums1, const float* scale, int64_t np) {
    constexpr int kHeld = kTwo ? 30 : 16, kRows = kTwo ? 32 : 16;
    const int64_t each = kSteps ? kSteps : t.group_steps, groups = t.steps / each;
    alignas(64) typename Product::Sum c[4][256];
    F32 sum[kHeld];
    const auto row = [&](int r)
                         __attribute__((always_inline)) { return r < 16 ? sums0 + r * 16 : sums1 + r * 16 - 256; };
#pragma GCC unroll 32
    for (int r = 0; r < kHeld; ++r) sum[r] = t.fresh ? set_f32(0.0f) : load_f32(row(r));
#pragma GCC unroll 2
    for (int r = kHeld; r < kRows; ++r)
        if (t.fresh) store_f32(row(r), set_f32(0.0f));
    for (int64_t g = 0; g <= groups; ++g) {
        if (g < groups) {
            zero<0>();
            if constexpr (kTwo) zero<1>();
#pragma GCC unroll 4
            for (int64_t s = 0; s < each; ++s)
                step_of<Product, kTwo>((kSteps == 1 ? g : s) % 2, t.o.at(g * each + s), t.after(g * each + s));
            store<0>(c[g % 2 * 2]);
            if constexpr (kTwo) store<1>(c[g % 2 * 2 + 1]);
        }
        if (g == 0) continue;
        const auto* from = c[(g + 1) % 2 * 2];
        const F32 s = load_f32(scale + (g - 1) * np);
#pragma GCC unroll 32
        for (int r = 0; r < kHeld; ++r) sum[r] = fma(Product::sum(from + r * 16), s, sum[r]);
#pragma GCC unroll 2
        for (int r = kHeld; r < kRows; ++r) store_f32(row(r), fma(Product::sum(from + r * 16), s, load_f32(row(r))));
    }
#pragma GCC unroll 32
    for (int r = 0; r < kHeld; ++r) store_f32(row(r), sum[r]);
}

// The same where all of k is one group: the sums wait unscaled in memory until the `last` stretch.
template <typename Product, bool kTwo>
static inline void add_whole(const Stretch& t, bool last, float* sums0, float* sums1, const float* scale) {
    t.fresh ? zero<0>() : load<0>(sums0);
    if constexpr (kTwo) t.fresh ? zero<1>() : load<1>(sums1);
#pragma GCC unroll 2
    for (int64_t s = 0; s < t.steps; ++s) step_of<Product, kTwo>(s % 2, t.o.at(s), t.after(s));
    store<0>(sums0);
    if constexpr (kTwo) store<1>(sums1);
    if (!last) return;
    const F32 s = load_f32(scale);
    const auto scaled = [&](float* sums) {
        for (int r = 0; r < 16; ++r, sums += 16)
            store_f32(sums, mul(Product::sum(reinterpret_cast<const typename Product::Sum*>(sums)), s));
    };
    scaled(sums0);
    if constexpr (kTwo) scaled(sums1);
}

template <typename Product, bool kTwo>
PERCARD_INLINE void add(const Stretch& t, bool whole, bool last, float* sums0, float* sums1, const float* scale,
                        int64_t np) {
    if (t.steps % 2) load_step<kTwo, 2, 6, 0>(t.o);
    if (whole) return add_whole<Product, kTwo>(t, last, sums0, sums1, scale);
    if (t.group_steps == 1) return add_groups<Product, kTwo, 1>(t, sums0, sums1, scale, np);
    if (t.group_steps == 2) return add_groups<Product, kTwo, 2>(t, sums0, sums1, scale, np);
    if (t.group_steps == 4) return add_groups<Product, kTwo, 4>(t, sums0, sums1, scale, np);
    add_groups<Product, kTwo, 0>(t, sums0, sums1, scale, np);
}

// A product with group scales. x lies in tiles [token tiles, all_k / tile_k] (and `plane` bytes further for each
// further plane), weights come by unpack(panel, block, k, count) as `line_bytes` bytes for each input of 16 rows.
struct Grouped {
    int64_t m, blocks, all_k, tile_k, group, plane, line_bytes;
    const float* scale;  // [groups, blocks * 16]
    double ns_per_block;
};

// Some blocks of 16 rows meet the same pair of token tiles, whose part of x stays in the L1; sums wait in memory from
// chunk to chunk of k. finish(token tile, first block, blocks, sums [blocks][16][16]) then stores neighbouring outputs
// together.
template <typename Product, typename Unpack, typename Finish>
static inline void multiply_grouped(const Grouped& job, const char* x, const Unpack& unpack, const Finish& finish) {
    constexpr int64_t kBlocks = 16, kPanel = 8192;  // bytes of one block's panel
    const int64_t token_tiles = (job.m + kTokens - 1) / kTokens, steps = job.all_k / job.tile_k;
    const bool whole = job.group == job.all_k;
    const int64_t chunk = whole ? kPanel / job.line_bytes : kPanel / job.line_bytes / job.group * job.group;
    const int64_t np = job.blocks * 16;
    parallel((job.blocks + kBlocks - 1) / kBlocks, job.ns_per_block * kBlocks, [&](int64_t begin, int64_t end) {
        const Registers registers(2, min_of(job.m, kTokens), job.tile_k == 32 && job.line_bytes == 16 ? 32 : 64);
        auto* panel = static_cast<char*>(scratch(kSlotPanel, kBlocks * kPanel));
        auto* sums = static_cast<float*>(scratch(kSlotOut, (token_tiles + 1) * kBlocks * kTile));
        for (int64_t first = begin * kBlocks; first < min_of(end * kBlocks, job.blocks); first += kBlocks) {
            const int64_t blocks = min_of(kBlocks, job.blocks - first);
            for (int64_t k = 0; k < job.all_k; k += chunk) {
                const int64_t count = min_of(chunk, job.all_k - k);
                const bool last = k + count == job.all_k;
                const float* scale = job.scale + (whole ? 0 : k / job.group * np) + first * 16;
                for (int64_t b = 0; b < blocks; ++b) unpack(panel + b * kPanel, first + b, k, count);
                for (int64_t i = 0; i < token_tiles; i += 2) {
                    const bool two = i + 1 < token_tiles;
                    float *sums0 = sums + i * kBlocks * 256, *sums1 = sums0 + kBlocks * 256;
                    const char* a = x + (i * steps + k / job.tile_k) * kTile;
                    const Operands o{a, a + steps * kTile, panel, job.tile_k * job.line_bytes, job.plane};
                    two ? load_step<true, 2, 6, 0>(o) : load_step<false, 2, 6, 0>(o);
                    for (int64_t b = 0; b < blocks; ++b) {
                        // Made anew: a copy of what was just changed would wait for all stores of the block before.
                        Stretch t{o, o, count / job.tile_k, job.group / job.tile_k, k == 0};
                        t.o.b = panel + b * kPanel;
                        t.next.b = panel + min_of(b + 1, blocks - 1) * kPanel;
                        if (two)
                            add<Product, true>(t, whole, last, sums0 + b * 256, sums1 + b * 256, scale + b * 16, np);
                        else
                            add<Product, false>(t, whole, last, sums0 + b * 256, nullptr, scale + b * 16, np);
                    }
                    if (!last) continue;
                    finish(i, first, blocks, sums0);
                    if (two) finish(i + 1, first, blocks, sums1);
                }
            }
        }
    });
}

// Rows of int8 [m, k] as A tiles [token tiles, steps][16][bytes]: zero past k and past m. `bytes` is 64 or 32.
static inline void tiles_of_x(int8_t* tiles, const int8_t* x, int64_t stride_xm, int64_t m, int64_t k, int64_t steps,
                              int64_t bytes) {
    const int64_t token_tiles = (m + kTokens - 1) / kTokens;
    parallel(token_tiles, kTokens * k * 0.1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin * kTokens; i < end * kTokens; ++i) {
            int8_t* to = tiles + i / kTokens * steps * kTile + i % kTokens * 64;
            const int8_t* from = x + i * stride_xm;
            for (int64_t s = 0; s < steps; ++s, to += kTile) {
                const int64_t left = i < m ? max_of(0, min_of(bytes, k - s * bytes)) : 0;
                if (left > 0) std::memcpy(to, from + s * bytes, left);
                if (left < 64) std::memset(to + left, 0, 64 - left);
            }
        }
    });
}

}  // namespace amx
}  // namespace PERCARD_ISA
}  // namespace percard
