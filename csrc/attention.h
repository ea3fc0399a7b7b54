// What the attentions over pages share: where keys lie, who sees them, sums that are joined, and who computes what.
//
// The query heads of one key head, times the fresh tokens, are rows. A sequence is cut into chunks, and a chunk into
// tiles of kTile keys that begin at multiples of kTile, whatever the batch, the threads and the pages: what a request
// gets depends on nothing but itself.
//
//   for each tile:                         scores -> largest so far -> e^(score - largest) -> sums, in fp32
//   for each row, chunks in order:         o = sum_i e^(m_i - m) o_i / sum_i e^(m_i - m) l_i
//
// While the keys of a tile are multiplied its values are asked for, and with the values the keys of the next tile: a
// page of a head lies in one piece, but where the next one lies no hardware can know.
#pragma once

#include "ops.h"
#include "parallel.h"
#include "silu.h"

namespace percard {
namespace PERCARD_ISA {
namespace attention {

constexpr int64_t kTile = 64, kChunk = 512, kLeastChunk = 256, kMostNumbers = 256;
constexpr float kLowest = -3.0e38f;  // below every score; -infinity would make NaN of a difference

// The fresh tokens of one sequence and key head, and what they found so far.
struct Rows {
    int64_t count;  // tokens * heads per key head; row r is token r / group, head r % group
    int64_t wide;   // floats of a row of o
    float* o;       // [count, wide], sums not yet divided
    float* largest;
    float* sum;
};

// One sequence and key head.
struct Place {
    int64_t b, h;
    int64_t length, tokens;
    int64_t first_token;  // its row of q
    int64_t group;        // query heads of a key head
};

PERCARD_INLINE Place place_of(const AttentionDecode& a, int64_t pair) {
    const int64_t b = pair / a.pages.heads, group = a.heads / a.pages.heads;
    const int64_t length = min_of(max_of(a.lengths[b], 0), a.max_kv_len);
    if (a.q_starts == nullptr) return {b, pair % a.pages.heads, length, a.max_q_len, b * a.max_q_len, group};
    const int64_t tokens = max_of(min_of(a.q_starts[b + 1] - a.q_starts[b], a.max_q_len), 0);
    return {b, pair % a.pages.heads, length, tokens, a.q_starts[b], group};
}

// Row r sees keys first .. last - 1.
struct Seen {
    int64_t first, last;
};

PERCARD_INLINE Seen seen_by(const AttentionDecode& a, const Place& at, int64_t r) {
    const int64_t last = at.length - at.tokens + r / at.group + 1;
    return {a.window > 0 ? max_of(last - a.window, 0) : 0, max_of(last, 0)};
}

// Keys of a chunk, and the chunks that hold a key that is seen.
struct Chunks {
    int64_t keys, first, last;
};

PERCARD_INLINE Chunks chunks_of(const AttentionDecode& a, const Place& at) {
    int64_t keys = kChunk;
    if (a.splits > 0) {
        const int64_t each = (at.length + a.splits - 1) / a.splits;
        keys = max_of(round_up(each, kTile), kLeastChunk);
    }
    const int64_t last = (at.length + keys - 1) / keys;
    return {keys, min_of(seen_by(a, at, 0).first / keys, max_of(last - 1, 0)), last};
}

// No sequence has more chunks than that.
PERCARD_INLINE int64_t most_chunks(const AttentionDecode& a) {
    const int64_t keys = a.splits > 0 ? kLeastChunk : kChunk, all = (a.max_kv_len + keys - 1) / keys;
    return max_of(a.splits > 0 ? min_of(all, a.splits) : all, 1);
}

// Keys first .. first + count - 1 of a sequence: offsets of their rows and words, in elements. Past them the last
// again.
struct Tile {
    int64_t first, count;
    int64_t k[kTile], v[kTile], k_word[kTile], v_word[kTile];
};

PERCARD_INLINE void tile_at(const AttentionDecode& a, const Place& at, int64_t first, int64_t last, Tile& tile) {
    const KvPages& p = a.pages;
    const int32_t* table = a.table + (a.table_starts ? a.table_starts[at.b] : at.b * a.stride_tb);
    tile.first = first;
    tile.count = min_of(kTile, last - first);
    for (int64_t t = 0; t < tile.count;) {
        const int64_t page = table[(first + t) / p.page], row = (first + t) % p.page;
        const int64_t end = min_of(t + p.page - row, tile.count);
        const int64_t k = page * p.k_strides[0] + at.h * p.k_strides[1] + (row - t) * p.k_strides[2];
        const int64_t v = page * p.v_strides[0] + at.h * p.v_strides[1] + (row - t) * p.v_strides[2];
        const int64_t *ks = p.k_scale_strides, *vs = p.v_scale_strides;
        const int64_t k_word = page * ks[0] + at.h * ks[1] + (row - t) * ks[2];
        const int64_t v_word = page * vs[0] + at.h * vs[1] + (row - t) * vs[2];
        for (; t < end; ++t) {
            tile.k[t] = k + t * p.k_strides[2];
            tile.v[t] = v + t * p.v_strides[2];
            tile.k_word[t] = k_word + t * ks[2];
            tile.v_word[t] = v_word + t * vs[2];
        }
    }
    for (int64_t t = tile.count; t < kTile; ++t) {
        tile.k[t] = tile.k[t - 1];
        tile.v[t] = tile.v[t - 1];
    }
}

PERCARD_INLINE void ask_for(const void* p, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) prefetch(static_cast<const char*>(p) + i);
}

// softcap * tanh((score + shift) / softcap) of kTile scores.
PERCARD_INLINE void cap(float* scores, float softcap, float shift) {
    for (int64_t i = 0; i < kTile; i += 16) {
        const F32 x = div(add(load_f32(scores + i), set_f32(shift)), set_f32(softcap));
        store_f32(scores + i, mul(set_f32(softcap), tanh(x)));
    }
}

// Scores of keys that a row does not see become -infinity.
PERCARD_INLINE void mask(float* scores, const Tile& tile, const Seen& seen) {
    const int64_t first = min_of(seen.first - tile.first, kTile), last = max_of(seen.last - tile.first, 0);
    for (int64_t t = 0; t < first; ++t) scores[t] = -__builtin_inff();
    for (int64_t t = min_of(last, tile.count); t < kTile; ++t) scores[t] = -__builtin_inff();
}

// Brings what was summed up of row r to the largest score so far.
PERCARD_INLINE void raise_to(const Rows& rows, int64_t r, float largest) {
    if (largest == rows.largest[r]) return;
    float old[16];
    store_f32(old, exp(set_f32(rows.largest[r] - largest)));
    rows.sum[r] *= old[0];
    float* o = rows.o + r * rows.wide;
    for (int64_t d = 0; d < rows.wide; d += 16) store_f32(o + d, mul(load_f32(o + d), set_f32(old[0])));
    rows.largest[r] = largest;
}

// The largest score of row r so far, these included; what was summed up before is brought to it.
PERCARD_INLINE float raise(const Rows& rows, int64_t r, const float* scores) {
    F32 most = set_f32(rows.largest[r]);
    for (int i = 0; i < kTile; i += 16) most = max(most, load_f32(scores + i));
    const float largest = largest_of_lanes(most);
    raise_to(rows, r, largest);
    return largest;
}

PERCARD_INLINE void clear(const Rows& rows) {
    for (int64_t r = 0; r < rows.count; ++r) {
        rows.largest[r] = kLowest;
        rows.sum[r] = 0.0f;
    }
    std::memset(rows.o, 0, rows.count * rows.wide * sizeof(float));
}

// Adds what one chunk found to what the chunks before it did.
PERCARD_INLINE void merge(const Rows& all, const Rows& more) {
    for (int64_t r = 0; r < all.count; ++r) {
        const F32 both = max(set_f32(all.largest[r]), set_f32(more.largest[r]));
        float largest[16], old[16], fresh[16];
        store_f32(largest, both);
        store_f32(old, exp(sub(set_f32(all.largest[r]), both)));
        store_f32(fresh, exp(sub(set_f32(more.largest[r]), both)));
        float* o = all.o + r * all.wide;
        const float* add_o = more.o + r * all.wide;
        for (int64_t d = 0; d < all.wide; d += 16)
            store_f32(o + d, add(mul(load_f32(o + d), set_f32(old[0])), mul(load_f32(add_o + d), set_f32(fresh[0]))));
        all.sum[r] = all.sum[r] * old[0] + more.sum[r] * fresh[0];
        all.largest[r] = largest[0];
    }
}

// out and lse of the rows of a place. `shift[r]` is to be added to its scores (null: nothing is), `from[d]` says where
// in a row of o number d lies (null: at d). A row that saw nothing is 0, and its lse -infinity, or its sink.
PERCARD_INLINE void finish(const AttentionDecode& a, const Rows& rows, const Place& at, const float* shift,
                           const int16_t* from) {
    for (int64_t r = 0; r < rows.count; ++r) {
        const int64_t head = at.h * at.group + r % at.group, to = (at.first_token + r / at.group) * a.heads + head;
        float* o = rows.o + r * rows.wide;
        float ordered[kMostNumbers];
        if (from != nullptr) {
            for (int64_t d = 0; d < a.pages.size; ++d) ordered[d] = o[from[d]];
            o = ordered;
        }
        const bool none = rows.sum[r] == 0.0f;
        float largest = none ? kLowest : rows.largest[r] + (shift ? shift[r] : 0.0f), sum = rows.sum[r];
        float by[16] = {1.0f};
        if (a.sinks != nullptr) {  // a key without a value
            const float sink = a.sinks[head], most = sink > largest ? sink : largest;
            float of_sink[16];
            store_f32(by, exp(set_f32(largest - most)));
            store_f32(of_sink, exp(set_f32(sink - most)));
            sum = sum * by[0] + of_sink[0];
            largest = most;
        }
        const F32 divisor = set_f32(sum == 0.0f ? 1.0f : sum);
        for (int64_t d = 0; d < a.pages.size; d += 16)
            store_as(a.out, to * a.pages.size + d, a.q_dtype, div(mul(load_f32(o + d), set_f32(by[0])), divisor));
        if (a.lse != nullptr) a.lse[to] = sum == 0.0f ? -__builtin_inff() : largest + __builtin_logf(sum);
    }
}

PERCARD_INLINE int64_t state_floats(int64_t count, int64_t wide) { return round_up(count * (wide + 2), 16); }

PERCARD_INLINE Rows rows_at(int64_t count, int64_t wide, float* state) {
    return {count, wide, state, state + count * wide, state + count * (wide + 1)};
}

// Runs a Kind, how one sort of pages is read, over all sequences:
//   Kind(a)                         wide() floats of a row of o, work_bytes() of a thread, ns_of_key() of a key head
//   load(work, at)                  the queries of a place
//   chunk(work, rows, at, first, last)     keys first .. last - 1
//   shift(work), from()             for `finish`
template <typename Kind>
void run(const AttentionDecode& a) {
    const Kind kind(a);
    const int64_t most = a.max_q_len * (a.heads / a.pages.heads), wide = kind.wide(), states = state_floats(most, wide);
    const int64_t chunks = most_chunks(a), pairs = a.batch * a.pages.heads;
    const int64_t keys = a.window > 0 ? min_of(a.max_kv_len, a.window + a.max_q_len) : a.max_kv_len;
    const auto memory = [&] {
        return static_cast<float*>(scratch(kSlotX, 2 * states * sizeof(float) + kind.work_bytes()));
    };
    const auto do_chunk = [&](char* work, const Rows& rows, const Place& at, const Chunks& own, int64_t c) {
        const int64_t seen = seen_by(a, at, 0).first / kTile * kTile;
        clear(rows);
        kind.chunk(work, rows, at, max_of(c * own.keys, seen), min_of(at.length, (c + 1) * own.keys));
    };
    if (chunks == 1 || pairs >= 2 * threads()) {  // the chunks of a pair one after another
        parallel(pairs, keys * kind.ns_of_key(), [&](int64_t begin, int64_t end) {
            float* state = memory();
            char* work = reinterpret_cast<char*>(state + 2 * states);
            for (int64_t i = begin; i < end; ++i) {
                const Place at = place_of(a, i);
                const Chunks own = chunks_of(a, at);
                const Rows all = rows_at(at.tokens * at.group, wide, state);
                const Rows more = rows_at(at.tokens * at.group, wide, state + states);
                kind.load(work, at);
                do_chunk(work, all, at, own, own.first);
                for (int64_t c = own.first + 1; c < own.last; ++c) {
                    do_chunk(work, more, at, own, c);
                    merge(all, more);
                }
                finish(a, all, at, kind.shift(work), kind.from());
            }
        });
        return;
    }
    auto* found = static_cast<float*>(scratch(kSlotSums, pairs * chunks * states * sizeof(float)));
    parallel(pairs * chunks, kChunk * kind.ns_of_key(), [&](int64_t begin, int64_t end) {
        char* work = reinterpret_cast<char*>(memory() + 2 * states);
        for (int64_t i = begin; i < end; ++i) {
            const Place at = place_of(a, i / chunks);
            const Chunks own = chunks_of(a, at);
            const int64_t c = i % chunks;
            if (c < own.first || c >= max_of(own.last, own.first + 1)) continue;
            kind.load(work, at);
            do_chunk(work, rows_at(at.tokens * at.group, wide, found + i * states), at, own, c);
        }
    });
    char* work = reinterpret_cast<char*>(memory() + 2 * states);
    for (int64_t pair = 0; pair < pairs; ++pair) {
        const Place at = place_of(a, pair);
        const Chunks own = chunks_of(a, at);
        float* mine = found + pair * chunks * states;
        const Rows all = rows_at(at.tokens * at.group, wide, mine + own.first * states);
        for (int64_t c = own.first + 1; c < own.last; ++c) merge(all, rows_at(all.count, wide, mine + c * states));
        kind.load(work, at);
        finish(a, all, at, kind.shift(work), kind.from());
    }
}

}  // namespace attention
}  // namespace PERCARD_ISA
}  // namespace percard
