// attention_prefill's weights: scores of a row and a block of keys to 2^(score - largest so far), and what they sum up
// to.
#pragma once

#include "prefill_pack.h"
#include "silu.h"

namespace percard {
namespace PERCARD_ISA {
namespace prefill {

constexpr int64_t kRows = 32;
constexpr float kLowest = -1.0e30f;  // below every score; -infinity would make NaN of a difference
constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;

// What a thread works on: up to kRows rows of one key head of one sequence.
struct Rows {
    int64_t count, b, h, first;  // row r is token (first + r) / group of the sequence
    char* q;                     // codes as the products want them, or fp32 [kRows, size]
    float* scores;               // tiles of 16 rows x 16 keys, int32 or fp32: `tile_at`
    char* weights;  // of int8 values: int16 [kRows, kBlock], or tiles of two planes; else fp32 [kRows, kBlock]
    float* o;       // [kRows, size], sums not yet divided
    float *q_scale, *q_sum, *shift, *largest, *sum, *offset, *kept;  // [kRows]
    float* line;                                                     // [kBlock]
};

PERCARD_INLINE int64_t tile_at(int64_t r, int64_t v) { return ((v / 2 * 2 + r / 16) * 2 + v % 2) * 256 + r % 16 * 16; }

// x with `other` in the lanes that are not begin .. end - 1.
PERCARD_INLINE F32 only(F32 x, int64_t begin, int64_t end, float other) {
    float lanes[16];
    store_f32(lanes, x);
    for (int64_t i = 0; i < 16; ++i)
        if (i < begin || i >= end) lanes[i] = other;
    return load_f32(lanes);
}

// softcap * tanh(x / softcap), with base 2 logarithms in and out
PERCARD_INLINE F32 capped(F32 x, float softcap) {
    const float cap = softcap * kLog2E;
    const F32 two = set_f32(2.0f), e = exp(div(mul(x, two), set_f32(cap)));
    return mul(set_f32(cap), sub(set_f32(1.0f), div(two, add(e, set_f32(1.0f)))));
}

// Weights of 64 keys, row r, whole numbers or fp32.
template <bool kIntValues>
PERCARD_INLINE void store_weights(const Rows& w, int64_t r, int64_t chunk, const F32* e) {
    if constexpr (!kIntValues) {
        for (int i = 0; i < 4; ++i)
            store_f32(reinterpret_cast<float*>(w.weights) + r * kBlock + chunk * 64 + i * 16, e[i]);
    } else {
#ifdef PERCARD_ISA_amx_int8
        // Two instructions that pack within 128 bits put four keys of each vector side by side: prefill_pack.h does so
        // with the values.
        const __m512i ab = _mm512_packus_epi32(to_i32(e[0]).v, to_i32(e[1]).v);
        const __m512i cd = _mm512_packus_epi32(to_i32(e[2]).v, to_i32(e[3]).v), low = _mm512_set1_epi16(255);
        char* to = w.weights + (r / 16 * 8 + chunk) * 1024 + r % 16 * 64;
        _mm512_storeu_si512(to, _mm512_packus_epi16(_mm512_srli_epi16(ab, 8), _mm512_srli_epi16(cd, 8)));
        _mm512_storeu_si512(to + 4096, _mm512_packus_epi16(_mm512_and_si512(ab, low), _mm512_and_si512(cd, low)));
#else
        auto* to = reinterpret_cast<int16_t*>(w.weights) + r * kBlock + chunk * 64;
        for (int i = 0; i < 4; ++i) store_i16(to + i * 16, to_i32(e[i]));
#endif
    }
}

// Row r, which sees keys lo .. hi - 1 of the block: its weights in the chunks of 64 keys first .. last - 1, what they
// sum up to, and by what the sums so far shrink.
// kWhole: it sees all of the block.
template <bool kIntKeys, bool kIntValues, bool kWhole>
PERCARD_INLINE void weigh(const AttentionPrefill& a, const Rows& w, const Block& block, int64_t r, int64_t lo,
                          int64_t hi, int64_t first, int64_t last) {
    const F32 none = set_f32(0.0f);
    w.kept[r] = 1.0f;
    if (!kWhole && lo >= hi) {
        const F32 zeros[4] = {none, none, none, none};
        for (int64_t c = first; c < last; ++c) store_weights<kIntValues>(w, r, c, zeros);
        return;
    }
    const F32 q_scale = set_f32(w.q_scale[r]), q_sum = set_f32(w.q_sum[r]), shift = set_f32(w.shift[r]);
    F32 most = set_f32(kLowest);
    const int64_t from = kWhole ? 0 : lo / 16, to = kWhole ? kBlock / 16 : (hi + 15) / 16;
    for (int64_t v = from; v < to; ++v) {
        const float* m = block.meta + v * kMeta;
        F32 x = load_f32(w.scores + tile_at(r, v));
        if (kIntKeys) {
            x = mul(to_f32(as_i32(x)), load_f32(m));
            if (block.key_offsets) x = fma(load_f32(m + 16), q_sum, x);
        }
        if (a.softcap == 0.0f)
            x = fma(x, q_scale, load_f32(m + 32));
        else
            x = add(capped(fma(x, q_scale, shift), a.softcap), load_f32(m + 32));
        if (!kWhole && (v * 16 < lo || v * 16 + 16 > hi)) x = only(x, lo - v * 16, hi - v * 16, kLowest);
        store_f32(w.line + v * 16, x);
        most = max(most, x);
    }
    const float old = w.largest[r], here = largest_of_lanes(most);
    const float largest = old > here ? old : here;
    if (largest != old) {
        float kept[16];
        store_f32(kept, power_of_two<true>(set_f32(old - largest)));
        w.kept[r] = kept[0];
        w.largest[r] = largest;
    }
    const F32 base = set_f32(kIntValues ? largest - kLogMost : largest);
    F32 sum = none, offset = none;
    for (int64_t c = first; c < last; ++c) {
        F32 e[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const int64_t v = c * 4 + i;
            e[i] = none;
            if (!kWhole && (v < from || v >= to)) continue;
            const float* m = block.meta + v * kMeta;
            const bool part = !kWhole && (v * 16 < lo || v * 16 + 16 > hi);
            e[i] = power_of_two<!kIntValues>(sub(load_f32(w.line + v * 16), base));
            if (part) e[i] = only(e[i], lo - v * 16, hi - v * 16, 0.0f);
            sum = kIntValues ? fma(e[i], load_f32(m + 48), sum) : add(sum, e[i]);
            if (kIntValues && block.value_offsets) {
                F32 more = load_f32(m + 64);
                if (part) more = only(more, lo - v * 16, hi - v * 16, 0.0f);
                offset = fma(e[i], more, offset);
            }
        }
        store_weights<kIntValues>(w, r, c, e);
    }
    w.sum[r] = w.sum[r] * w.kept[r] + sum_of_lanes(sum);
    if (kIntValues) w.offset[r] = w.offset[r] * w.kept[r] + sum_of_lanes(offset);
}

}  // namespace prefill
}  // namespace PERCARD_ISA
}  // namespace percard
