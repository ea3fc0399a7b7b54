// attention_decode: 1 to 16 fresh tokens of each sequence over its pages of keys and values.
//
// The query heads of one key head are the rows of a tile, so a page is read once for all of them. A sequence is cut
// into chunks of kChunk keys, whatever the batch and the threads: what a request gets depends on nothing but itself.
//
//   for each tile of at most kTile keys:   scores -> largest so far -> e^(score - largest) -> sums, in fp32
//   for each row, chunks in order:         o = sum_i e^(m_i - m) o_i / sum_i e^(m_i - m) l_i
//
// While the keys of a tile are multiplied its values are asked for, and with the values the keys of the next tile: a
// page of a head lies in one piece, but where the next one lies no hardware can know.
#include "ops.h"
#include "parallel.h"
#include "silu.h"

namespace percard {
namespace PERCARD_ISA {
namespace attention {

constexpr int64_t kTile = 64, kChunk = 512;
constexpr float kLowest = -3.0e38f;  // below every score; -infinity would make NaN of a difference
#if defined(PERCARD_ISA_avx512_vnni) || defined(PERCARD_ISA_amx_int8)
constexpr int kSums = 16;  // vectors of sums that stay in registers
#else
constexpr int kSums = 4;
#endif

// The state of the rows of one key head of one sequence.
struct Rows {
    int64_t count;  // q_len * heads per key head
    float* q;       // [count, size], times the softmax scale
    float* scores;  // [count, kTile]
    float* o;       // [count, size], sums not yet divided
    float* largest;
    float* sum;
};

// One tile: keys first .. first + count - 1 of a sequence.
struct Tile {
    int64_t k, v;  // offsets of its first rows
    int64_t first, count;
};

PERCARD_INLINE Tile tile_at(const AttentionDecode& a, int64_t b, int64_t h, int64_t first, int64_t last) {
    const int64_t page = a.table[b * a.stride_tb + first / a.pages.page], r = first % a.pages.page;
    const int64_t count = min_of(min_of(a.pages.page - r, kTile), last - first);
    return {page * a.pages.k_strides[0] + h * a.pages.k_strides[1] + r * a.pages.k_strides[2],
            page * a.pages.v_strides[0] + h * a.pages.v_strides[1] + r * a.pages.v_strides[2], first, count};
}

PERCARD_INLINE void ask_for(const void* from, int64_t at, int64_t elements, int dtype) {
    const char* p = static_cast<const char*>(from) + at * dtype_bytes(dtype);
    for (int64_t i = 0; i < elements * dtype_bytes(dtype); i += 64) prefetch(p + i);
}

// scores[r, t] = q[r] . k[t]
template <int kDtype, int kVectors>
PERCARD_INLINE void score(const AttentionDecode& a, const Rows& rows, const Tile& tile) {
    const int64_t size = kVectors ? kVectors * 16 : a.pages.size;
    for (int64_t t = 0; t < tile.count; ++t) {
        const int64_t at = tile.k + t * a.pages.k_strides[2];
        ask_for(a.pages.v, tile.v + t * a.pages.v_strides[2], size, kDtype);
        if constexpr (kVectors != 0) {
            F32 k[kVectors];
#pragma GCC unroll 8
            for (int i = 0; i < kVectors; ++i) k[i] = load_as_f32(a.pages.k, at + i * 16, kDtype);
            for (int64_t r = 0; r < rows.count; ++r) {
                const float* q = rows.q + r * size;
                F32 even = mul(k[0], load_f32(q)), odd = mul(k[1], load_f32(q + 16));
#pragma GCC unroll 4
                for (int i = 2; i < kVectors; i += 2) {
                    even = fma(k[i], load_f32(q + i * 16), even);
                    odd = fma(k[i + 1], load_f32(q + i * 16 + 16), odd);
                }
                rows.scores[r * kTile + t] = sum_of_lanes(add(even, odd));
            }
        } else {
            for (int64_t r = 0; r < rows.count; ++r) {
                const float* q = rows.q + r * size;
                F32 sum = set_f32(0.0f);
                for (int64_t d = 0; d < size; d += 16)
                    sum = fma(load_as_f32(a.pages.k, at + d, kDtype), load_f32(q + d), sum);
                rows.scores[r * kTile + t] = sum_of_lanes(sum);
            }
        }
    }
}

// Scores of row r become e^(score - largest so far); keys that the row does not see become 0. What was summed up before
// is brought to the new largest.
PERCARD_INLINE void weigh(const AttentionDecode& a, const Rows& rows, int64_t r, int64_t seen) {
    float* p = rows.scores + r * kTile;
    for (int64_t t = max_of(seen, 0); t < kTile; ++t) p[t] = -__builtin_inff();
    F32 most = set_f32(rows.largest[r]);
    for (int i = 0; i < kTile; i += 16) most = max(most, load_f32(p + i));
    const float largest = largest_of_lanes(most);
    F32 sum = set_f32(0.0f);
    for (int i = 0; i < kTile; i += 16) {
        const F32 e = exp(sub(load_f32(p + i), set_f32(largest)));
        store_f32(p + i, e);
        sum = add(sum, e);
    }
    if (largest != rows.largest[r]) {
        float old[16];
        store_f32(old, exp(set_f32(rows.largest[r] - largest)));
        rows.sum[r] *= old[0];
        float* o = rows.o + r * a.pages.size;
        for (int64_t d = 0; d < a.pages.size; d += 16) store_f32(o + d, mul(load_f32(o + d), set_f32(old[0])));
        rows.largest[r] = largest;
    }
    rows.sum[r] += sum_of_lanes(sum);
}

// o[r .. r + kRows, d .. d + 16 kWide] += scores @ v
template <int kDtype, int kRows, int kWide>
PERCARD_INLINE void values(const AttentionDecode& a, const Rows& rows, const Tile& tile, int64_t r, int64_t d,
                           const Tile* next) {
    F32 o[kRows][kWide];
    float* to = rows.o + r * a.pages.size + d;
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 16
        for (int j = 0; j < kWide; ++j) o[i][j] = load_f32(to + i * a.pages.size + j * 16);
    const float* p = rows.scores + r * kTile;
    for (int64_t t = 0; t < tile.count; ++t) {
        const int64_t at = tile.v + t * a.pages.v_strides[2] + d;
        if (next != nullptr && t < next->count)
            ask_for(a.pages.k, next->k + t * a.pages.k_strides[2], a.pages.size, kDtype);
#pragma GCC unroll 16
        for (int j = 0; j < kWide; ++j) {
            const F32 v = load_as_f32(a.pages.v, at + j * 16, kDtype);
#pragma GCC unroll 4
            for (int i = 0; i < kRows; ++i) o[i][j] = fma(set_f32(p[i * kTile + t]), v, o[i][j]);
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 16
        for (int j = 0; j < kWide; ++j) store_f32(to + i * a.pages.size + j * 16, o[i][j]);
}

template <int kDtype, int kRows>
PERCARD_INLINE void values_of(const AttentionDecode& a, const Rows& rows, const Tile& tile, int64_t r,
                              const Tile* next) {
    constexpr int kWide = kSums / kRows < 8 ? kSums / kRows : 8;
    int64_t d = 0;
    for (; d + 16 * kWide <= a.pages.size; d += 16 * kWide) {
        values<kDtype, kRows, kWide>(a, rows, tile, r, d, next);
        next = nullptr;
    }
    for (; d < a.pages.size; d += 16) values<kDtype, kRows, 1>(a, rows, tile, r, d, nullptr);
}

// Keys first .. last - 1 of sequence b, of which row r sees those before `seen` of its token.
template <int kDtype, int kVectors>
void chunk(const AttentionDecode& a, const Rows& rows, int64_t b, int64_t h, int64_t first, int64_t last) {
    const int64_t length = a.lengths[b], group = a.heads / a.pages.heads;
    for (int64_t r = 0; r < rows.count; ++r) {
        rows.largest[r] = kLowest;
        rows.sum[r] = 0.0f;
    }
    std::memset(rows.o, 0, rows.count * a.pages.size * sizeof(float));
    Tile tile = first < last ? tile_at(a, b, h, first, last) : Tile{};
    while (first < last) {
        score<kDtype, kVectors>(a, rows, tile);
        for (int64_t r = 0; r < rows.count; ++r) {
            const int64_t seen = length - a.max_q_len + r / group + 1;  // the last token sees all
            weigh(a, rows, r, min_of(seen - first, tile.count));
        }
        first += tile.count;
        const Tile ahead = first < last ? tile_at(a, b, h, first, last) : Tile{};
        const Tile* next = &ahead;  // asked for once
        int64_t r = 0;
        for (; r + 4 <= rows.count; r += 4, next = nullptr) values_of<kDtype, 4>(a, rows, tile, r, next);
        for (; r + 2 <= rows.count; r += 2, next = nullptr) values_of<kDtype, 2>(a, rows, tile, r, next);
        for (; r < rows.count; r += 1, next = nullptr) values_of<kDtype, 1>(a, rows, tile, r, next);
        tile = ahead;
    }
}

// Adds what one chunk found, (more_o, more_largest, more_sum), to what the chunks before it did.
PERCARD_INLINE void merge(const AttentionDecode& a, const Rows& all, const Rows& more) {
    for (int64_t r = 0; r < all.count; ++r) {
        const F32 both = max(set_f32(all.largest[r]), set_f32(more.largest[r]));
        float largest[16], old[16], fresh[16];
        store_f32(largest, both);
        store_f32(old, exp(sub(set_f32(all.largest[r]), both)));
        store_f32(fresh, exp(sub(set_f32(more.largest[r]), both)));
        float* o = all.o + r * a.pages.size;
        const float* add_o = more.o + r * a.pages.size;
        for (int64_t d = 0; d < a.pages.size; d += 16)
            store_f32(o + d, add(mul(load_f32(o + d), set_f32(old[0])), mul(load_f32(add_o + d), set_f32(fresh[0]))));
        all.sum[r] = all.sum[r] * old[0] + more.sum[r] * fresh[0];
        all.largest[r] = largest[0];
    }
}

// out and lse of the rows of (b, h). A row that saw nothing is 0, and its lse -infinity.
PERCARD_INLINE void finish(const AttentionDecode& a, const Rows& rows, int64_t b, int64_t h) {
    const int64_t group = a.heads / a.pages.heads;
    for (int64_t r = 0; r < rows.count; ++r) {
        const int64_t to = (b * a.max_q_len + r / group) * a.heads + h * group + r % group;
        const bool none = rows.sum[r] == 0.0f;
        const F32 by = set_f32(none ? 1.0f : rows.sum[r]);
        for (int64_t d = 0; d < a.pages.size; d += 16)
            store_as(a.out, to * a.pages.size + d, a.q_dtype, div(load_f32(rows.o + r * a.pages.size + d), by));
        if (a.lse != nullptr) a.lse[to] = none ? -__builtin_inff() : rows.largest[r] + __builtin_logf(rows.sum[r]);
    }
}

PERCARD_INLINE int64_t state_floats(int64_t count, int64_t size) { return round_up(count * (size + 2), 16); }

// Rows whose sums lie at `state`; q and scores are put where `work` is.
PERCARD_INLINE Rows rows_at(const AttentionDecode& a, float* work, float* state) {
    const int64_t count = a.max_q_len * (a.heads / a.pages.heads);
    return {count,
            work,
            work + count * a.pages.size,
            state,
            state + count * a.pages.size,
            state + count * (a.pages.size + 1)};
}

template <int kDtype>
void load_queries(const AttentionDecode& a, const Rows& rows, int64_t b, int64_t h) {
    const int64_t group = a.heads / a.pages.heads;
    for (int64_t r = 0; r < rows.count; ++r) {
        const int64_t at = (b * a.max_q_len + r / group) * a.stride_qt + (h * group + r % group) * a.stride_qh;
        for (int64_t d = 0; d < a.pages.size; d += 16)
            store_f32(rows.q + r * a.pages.size + d, mul(load_as_f32(a.q, at + d, kDtype), set_f32(a.scale)));
    }
}

template <int kDtype, int kVectors>
void run(const AttentionDecode& a) {
    const int64_t count = a.max_q_len * (a.heads / a.pages.heads), states = state_floats(count, a.pages.size);
    const int64_t chunks = max_of((a.max_kv_len + kChunk - 1) / kChunk, 1), pairs = a.batch * a.pages.heads;
    const double ns_of_key = a.pages.size * dtype_bytes(kDtype) * 2 / 12.0 + count * a.pages.size * 0.05;
    const auto work = [&] {
        const int64_t floats = count * (a.pages.size + kTile) + 2 * states;
        return static_cast<float*>(scratch(kSlotX, floats * sizeof(float)));
    };
    const auto live = [&](int64_t b) { return max_of((a.lengths[b] + kChunk - 1) / kChunk, 1); };
    if (chunks == 1 || pairs >= 2 * threads()) {  // the chunks of a pair one after another
        parallel(pairs, min_of(a.max_kv_len, chunks * kChunk) * ns_of_key, [&](int64_t begin, int64_t end) {
            float* at = work();
            const Rows all = rows_at(a, at, at + count * (a.pages.size + kTile));
            const Rows more = rows_at(a, at, all.o + states);
            for (int64_t i = begin; i < end; ++i) {
                const int64_t b = i / a.pages.heads, h = i % a.pages.heads, length = a.lengths[b];
                load_queries<kDtype>(a, all, b, h);
                chunk<kDtype, kVectors>(a, all, b, h, 0, min_of(length, kChunk));
                for (int64_t c = 1; c < live(b); ++c) {
                    chunk<kDtype, kVectors>(a, more, b, h, c * kChunk, min_of(length, (c + 1) * kChunk));
                    merge(a, all, more);
                }
                finish(a, all, b, h);
            }
        });
        return;
    }
    auto* found = static_cast<float*>(scratch(kSlotSums, pairs * chunks * states * sizeof(float)));
    parallel(pairs * chunks, kChunk * ns_of_key, [&](int64_t begin, int64_t end) {
        float* at = work();
        for (int64_t i = begin; i < end; ++i) {
            const int64_t pair = i / chunks, c = i % chunks, b = pair / a.pages.heads, h = pair % a.pages.heads;
            if (c >= live(b)) continue;
            const Rows mine = rows_at(a, at, found + i * states);
            load_queries<kDtype>(a, mine, b, h);
            chunk<kDtype, kVectors>(a, mine, b, h, c * kChunk, min_of(a.lengths[b], (c + 1) * kChunk));
        }
    });
    for (int64_t pair = 0; pair < pairs; ++pair) {
        const int64_t b = pair / a.pages.heads;
        const Rows all = rows_at(a, nullptr, found + pair * chunks * states);
        for (int64_t c = 1; c < live(b); ++c) merge(a, all, rows_at(a, nullptr, found + (pair * chunks + c) * states));
        finish(a, all, b, pair % a.pages.heads);
    }
}

template <int kDtype>
void run_sized(const AttentionDecode& a) {
    if (a.pages.size == 128)
        run<kDtype, 8>(a);
    else if (a.pages.size == 64)
        run<kDtype, 4>(a);
    else
        run<kDtype, 0>(a);
}

}  // namespace attention

void attention_decode(const AttentionDecode& a) {
    if (a.q_dtype == kFloat32)
        attention::run_sized<kFloat32>(a);
    else if (a.q_dtype == kBFloat16)
        attention::run_sized<kBFloat16>(a);
    else
        attention::run_sized<kFloat16>(a);
}

}  // namespace PERCARD_ISA
}  // namespace percard
