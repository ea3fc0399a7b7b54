// AMX: products of whole tiles. Included by the amx_int8 objects only.
//
//   A tile: 16 tokens x 64 bytes of x          (64 int8 or 32 bf16 along k)
//   B tile: 16 lines x 64 bytes of weight      a line of rows16_k4_w8 is a row of it: 16 output rows x 4 int8 (or 2 bf16)
//   C tile: 16 tokens x 16 output rows, int32 or fp32
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

// The tile registers of this thread, for as long as the object lives: tiles 0-3 are C, 4-5 are A, 6-7 are B.
// `tokens` are the rows of A and C, `bytes` the bytes of k in A (B has bytes / 4 lines).
class Registers {
  public:
    Registers(int64_t tokens, int64_t bytes) {
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {};
            uint8_t rows[16] = {};
        } config;
        for (int tile = 0; tile < 8; ++tile) {
            const bool a = tile == 4 || tile == 5, b = tile >= 6;
            config.rows[tile] = static_cast<uint8_t>(b ? bytes / 4 : tokens);
            config.row_bytes[tile] = static_cast<uint16_t>(a ? bytes : 64);
        }
        _tile_loadconfig(&config);
    }
    ~Registers() { _tile_release(); }
    Registers(const Registers&) = delete;
    Registers& operator=(const Registers&) = delete;
};

// c[32 tokens or 16][32 rows or 16] = sums over `steps` tiles along k, int8 x int8. a0, a1, b0, b1 advance by `a_step` and
// `b_step` bytes. c holds 4 (or 2, or 1) tiles: (a0, b0), (a0, b1), (a1, b0), (a1, b1).
template <bool kTwoA, bool kTwoB>
PERCARD_INLINE void block_s8(int32_t* c, const int8_t* a0, const int8_t* a1, const int8_t* b0, const int8_t* b1,
                             int64_t steps, int64_t a_step, int64_t b_step) {
    _tile_zero(0);
    if (kTwoB) _tile_zero(1);
    if (kTwoA) _tile_zero(2);
    if (kTwoA && kTwoB) _tile_zero(3);
    for (int64_t s = 0; s < steps; ++s) {
        _tile_loadd(6, b0 + s * b_step, 64);
        _tile_loadd(4, a0 + s * a_step, 64);
        _tile_dpbssd(0, 4, 6);
        if (kTwoB) {
            _tile_loadd(7, b1 + s * b_step, 64);
            _tile_dpbssd(1, 4, 7);
        }
        if (kTwoA) {
            _tile_loadd(5, a1 + s * a_step, 64);
            _tile_dpbssd(2, 5, 6);
            if (kTwoB) _tile_dpbssd(3, 5, 7);
        }
    }
    _tile_stored(0, c, 64);
    if (kTwoB) _tile_stored(1, c + 256, 64);
    if (kTwoA) _tile_stored(2, c + 512, 64);
    if (kTwoA && kTwoB) _tile_stored(3, c + 768, 64);
}

// Sums of one group along k: one tile of C from `steps` tiles of A and of B.
struct ProductS8 {
    using Sum = int32_t;
    static PERCARD_INLINE_MEMBER void run(Sum* c, const void* a, const void* b, int64_t steps, int64_t b_step, int64_t) {
        _tile_zero(0);
        for (int64_t s = 0; s < steps; ++s) {
            _tile_loadd(6, static_cast<const char*>(b) + s * b_step, 64);
            _tile_loadd(4, static_cast<const char*>(a) + s * kTile, 64);
            _tile_dpbssd(0, 4, 6);
        }
        _tile_stored(0, c, 64);
    }
    static PERCARD_INLINE_MEMBER F32 load(const Sum* c) { return to_f32(load_i32(c)); }
};

// The same in bf16. x may be the sum of `kPlanes` bf16 numbers: their tiles lie `plane` bytes apart.
template <int kPlanes>
struct ProductBf16 {
    using Sum = float;
    static PERCARD_INLINE_MEMBER void run(Sum* c, const void* a, const void* b, int64_t steps, int64_t b_step,
                                          int64_t plane) {
        _tile_zero(0);
        for (int64_t s = 0; s < steps; ++s) {
            _tile_loadd(6, static_cast<const char*>(b) + s * b_step, 64);
            const char* tile = static_cast<const char*>(a) + s * kTile;
            _tile_loadd(4, tile, 64);
            _tile_dpbf16ps(0, 4, 6);
            if constexpr (kPlanes > 1) {
                _tile_loadd(5, tile + plane, 64);
                _tile_dpbf16ps(0, 5, 6);
            }
            if constexpr (kPlanes > 2) {
                _tile_loadd(4, tile + 2 * plane, 64);
                _tile_dpbf16ps(0, 4, 6);
            }
        }
        _tile_stored(0, c, 64);
    }
    static PERCARD_INLINE_MEMBER F32 load(const Sum* c) { return load_f32(c); }
};

// sums[16 tokens][16 rows] += scale[g] * (product of group g), ascending, fused. The 16 sums stay in registers; the tiles of
// group g + 1 are on their way while group g is scaled.
template <typename Product>
static inline void add_groups(float* sums, const char* a, const char* b, const float* scale, int64_t np, int64_t groups,
                              int64_t steps, int64_t b_step, int64_t plane) {
    alignas(64) typename Product::Sum c[2][256];
    Product::run(c[0], a, b, steps, b_step, plane);
    F32 sum[16];
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) sum[r] = load_f32(sums + r * 16);
    for (int64_t g = 0; g < groups; ++g) {
        a += steps * kTile;
        b += steps * b_step;
        if (g + 1 < groups) Product::run(c[(g + 1) & 1], a, b, steps, b_step, plane);
        const F32 s = load_f32(scale + g * np);
        const typename Product::Sum* from = c[g & 1];
#pragma GCC unroll 16
        for (int r = 0; r < 16; ++r) sum[r] = fma(Product::load(from + r * 16), s, sum[r]);
    }
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) store_f32(sums + r * 16, sum[r]);
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
