// A tile of pages as they are, bf16, fp16 or fp32: a Kind of `attention::run`. Scores and sums are fp32.
#pragma once

#include "attention.h"

namespace percard {
namespace PERCARD_ISA {
namespace attention {

#if defined(PERCARD_ISA_avx512_vnni) || defined(PERCARD_ISA_amx_int8)
constexpr int kSums = 16;  // vectors of sums that stay in registers
#else
constexpr int kSums = 4;
#endif

template <int kDtype, int kVectors>
struct Floats {
    const AttentionDecode& a;
    const int64_t most;  // rows

    struct Work {
        float* q;       // [rows, size], times the softmax scale
        float* scores;  // [rows, kTile]
    };

    explicit Floats(const AttentionDecode& given) : a(given), most(a.max_q_len * (a.heads / a.pages.heads)) {}
    int64_t wide() const { return a.pages.size; }
    int64_t work_bytes() const { return most * (a.pages.size + kTile) * 4; }
    double ns_of_key() const { return a.pages.size * dtype_bytes(kDtype) * 2 / 12.0 + most * a.pages.size * 0.05; }
    const float* shift(char*) const { return nullptr; }
    const int16_t* from() const { return nullptr; }

    Work at(char* work) const {
        auto* q = reinterpret_cast<float*>(work);
        return {q, q + most * a.pages.size};
    }

    void load(char* work, const Place& place) const {
        const Work w = at(work);
        for (int64_t r = 0; r < place.tokens * place.group; ++r) {
            const int64_t head = place.h * place.group + r % place.group;
            const int64_t from = (place.first_token + r / place.group) * a.stride_qt + head * a.stride_qh;
            for (int64_t d = 0; d < a.pages.size; d += 16)
                store_f32(w.q + r * a.pages.size + d, mul(load_as_f32(a.q, from + d, kDtype), set_f32(a.scale)));
        }
    }

    // scores[r, t] = q[r] . k[t]
    PERCARD_INLINE_MEMBER void score(const Work& w, int64_t rows, const Tile& tile) const {
        const int64_t size = kVectors ? kVectors * 16 : a.pages.size;
        for (int64_t t = 0; t < tile.count; ++t) {
            ask(a.pages.v, tile.v[t], size);
            if constexpr (kVectors != 0) {
                F32 k[kVectors];
#pragma GCC unroll 8
                for (int i = 0; i < kVectors; ++i) k[i] = load_as_f32(a.pages.k, tile.k[t] + i * 16, kDtype);
                for (int64_t r = 0; r < rows; ++r) {
                    const float* q = w.q + r * size;
                    F32 even = mul(k[0], load_f32(q)), odd = mul(k[1], load_f32(q + 16));
#pragma GCC unroll 4
                    for (int i = 2; i < kVectors; i += 2) {
                        even = fma(k[i], load_f32(q + i * 16), even);
                        odd = fma(k[i + 1], load_f32(q + i * 16 + 16), odd);
                    }
                    w.scores[r * kTile + t] = sum_of_lanes(add(even, odd));
                }
            } else {
                for (int64_t r = 0; r < rows; ++r) {
                    const float* q = w.q + r * size;
                    F32 sum = set_f32(0.0f);
                    for (int64_t d = 0; d < size; d += 16)
                        sum = fma(load_as_f32(a.pages.k, tile.k[t] + d, kDtype), load_f32(q + d), sum);
                    w.scores[r * kTile + t] = sum_of_lanes(sum);
                }
            }
        }
    }

    PERCARD_INLINE_MEMBER static void ask(const void* from, int64_t at, int64_t numbers) {
        ask_for(static_cast<const char*>(from) + at * dtype_bytes(kDtype), numbers * dtype_bytes(kDtype));
    }

    // Scores of row r become e^(score - largest so far); keys that the row does not see become 0.
    PERCARD_INLINE_MEMBER void weigh(const Work& w, const Rows& rows, int64_t r, const Tile& tile,
                                     const Seen& seen) const {
        float* p = w.scores + r * kTile;
        if (a.softcap != 0.0f) cap(p, a.softcap, 0.0f);
        mask(p, tile, seen);
        const F32 largest = set_f32(raise(rows, r, p));
        F32 sum = set_f32(0.0f);
        for (int i = 0; i < kTile; i += 16) {
            const F32 e = exp(sub(load_f32(p + i), largest));
            store_f32(p + i, e);
            sum = add(sum, e);
        }
        rows.sum[r] += sum_of_lanes(sum);
    }

    // o[r .. r + kRows, d .. d + 16 kWide] += scores @ v of keys first .. last - 1 of the tile
    template <int kRows, int kWide>
    PERCARD_INLINE_MEMBER void values(const Work& w, const Rows& rows, const Tile& tile, int64_t r, int64_t d,
                                      const Seen& keys, const Tile* next) const {
        F32 o[kRows][kWide];
        float* to = rows.o + r * rows.wide + d;
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 16
            for (int j = 0; j < kWide; ++j) o[i][j] = load_f32(to + i * rows.wide + j * 16);
        const float* p = w.scores + r * kTile;
        for (int64_t t = keys.first; t < keys.last; ++t) {
            if (next != nullptr && t < next->count) ask(a.pages.k, next->k[t], a.pages.size);
#pragma GCC unroll 16
            for (int j = 0; j < kWide; ++j) {
                const F32 v = load_as_f32(a.pages.v, tile.v[t] + d + j * 16, kDtype);
#pragma GCC unroll 4
                for (int i = 0; i < kRows; ++i) o[i][j] = fma(set_f32(p[i * kTile + t]), v, o[i][j]);
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 16
            for (int j = 0; j < kWide; ++j) store_f32(to + i * rows.wide + j * 16, o[i][j]);
    }

    template <int kRows>
    PERCARD_INLINE_MEMBER void values_of(const Work& w, const Rows& rows, const Tile& tile, int64_t r, const Seen& keys,
                                         const Tile* next) const {
        constexpr int kWide = kSums / kRows < 8 ? kSums / kRows : 8;
        int64_t d = 0;
        for (; d + 16 * kWide <= a.pages.size; d += 16 * kWide) {
            values<kRows, kWide>(w, rows, tile, r, d, keys, next);
            next = nullptr;
        }
        for (; d < a.pages.size; d += 16) values<kRows, 1>(w, rows, tile, r, d, keys, nullptr);
    }

    // Keys of a tile that rows r .. r + count - 1 all see, and whether there are no others: a value that one row does
    // not see must not reach it through 0 * NaN.
    PERCARD_INLINE_MEMBER Seen common(const Place& at, const Tile& tile, int64_t r, int64_t count, bool* same) const {
        const auto here = [&](int64_t row) {
            const Seen seen = seen_by(a, at, row);
            const int64_t first = min_of(max_of(seen.first - tile.first, 0), tile.count);
            return Seen{first, max_of(first, min_of(seen.last - tile.first, tile.count))};
        };
        const Seen one = here(r), two = here(r + count - 1);
        *same = one.first == two.first && one.last == two.last;
        return one;
    }

    void chunk(char* work, const Rows& rows, const Place& place, int64_t first, int64_t last) const {
        const Work w = at(work);
        Tile tiles[2];
        int now = 0;
        if (first < last) tile_at(a, place, first, last, tiles[0]);
        while (first < last) {
            const Tile& tile = tiles[now];
            score(w, rows.count, tile);
            for (int64_t r = 0; r < rows.count; ++r) weigh(w, rows, r, tile, seen_by(a, place, r));
            first += tile.count;
            const Tile* next = nullptr;
            if (first < last) {
                tile_at(a, place, first, last, tiles[1 - now]);
                next = &tiles[1 - now];
            }
            for (int64_t r = 0; r < rows.count;) {
                const int64_t left = rows.count - r;
                bool same;
                Seen keys = left >= 4 ? common(place, tile, r, 4, &same) : Seen{};
                if (left >= 4 && same) {
                    values_of<4>(w, rows, tile, r, keys, next);
                    r += 4;
                } else if (left >= 2 && (keys = common(place, tile, r, 2, &same), same)) {
                    values_of<2>(w, rows, tile, r, keys, next);
                    r += 2;
                } else {
                    values_of<1>(w, rows, tile, r, common(place, tile, r, 1, &same), next);
                    r += 1;
                }
                next = nullptr;  // asked for once
            }
            now = 1 - now;
        }
    }
};

template <int kDtype>
void run_floats(const AttentionDecode& a) {
    if (a.pages.size == 128)
        run<Floats<kDtype, 8>>(a);
    else if (a.pages.size == 64)
        run<Floats<kDtype, 4>>(a);
    else
        run<Floats<kDtype, 0>>(a);
}

}  // namespace attention
}  // namespace PERCARD_ISA
}  // namespace percard
