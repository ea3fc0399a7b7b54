// attention_prefill: many fresh tokens of each sequence over its pages of keys and values.
//
// Keys are taken kBlock at a time, from a multiple of it on whatever a query sees first, rows kRows at a time: the
// query heads of one key head, of one token after another. A row's sums depend on its own query and the pages alone, so
// any cut of a prompt into calls, any batch and any number of threads give it the same bits.
//
//   once for a head of a sequence:   its rows as operands (prefill_pack.h)
//   for each block of rows, block of keys:
//       scores   int8 q . k, exact; or fp32
//       weights  w = score + log2(v_scale), largest so far, 2^(w - largest): 15 bits of the largest p * v_scale, or
//       fp32 values   weights . v, exact in int32; or fp32             o = o * 2^(old - largest) + them
//
// The scale of a value is folded into its weight as a logarithm: what is cut into 15 bits is then the weight of whole
// numbers, and the sum of weights takes it out again, sum_t 2^(w[t] - largest) / v_scale[t].
#include "parallel.h"
#include "prefill_weights.h"
#include "rows.h"
#ifdef PERCARD_ISA_amx_int8
#include "amx.h"
#endif

namespace percard {
namespace PERCARD_ISA {
namespace prefill {

#if defined(PERCARD_ISA_avx512_vnni) || defined(PERCARD_ISA_amx_int8)
constexpr int kHeld = 8, kWide = 2;  // rows and vectors of values whose sums stay in registers
#elif defined(PERCARD_ISA_avx2) || defined(PERCARD_ISA_avx_vnni)
constexpr int kHeld = 4, kWide = 1;
#else
constexpr int kHeld = 4, kWide = 1;
#endif

PERCARD_INLINE int64_t fresh_of(const AttentionPrefill& a, int64_t b) {
    return a.q_starts == nullptr ? a.max_q_len : a.q_starts[b + 1] - a.q_starts[b];
}
PERCARD_INLINE int64_t first_token(const AttentionPrefill& a, int64_t b) {
    return a.q_starts == nullptr ? b * a.max_q_len : a.q_starts[b];
}

// Keys begin .. end - 1 are what row r sees.
struct Seen {
    int64_t begin, end;
};
PERCARD_INLINE Seen seen_by(const AttentionPrefill& a, const Rows& w, int64_t r) {
    const int64_t token = (w.first + r) / (a.heads / a.pages.heads);
    const int64_t end = max_of(0, a.lengths[w.b] - fresh_of(a, w.b) + token + 1);
    return {a.window > 0 ? max_of(0, end - a.window) : 0, end};
}

// ---- queries --------------------------------------------------------------------------------------------------------

template <bool kIntKeys>
void load_queries(const AttentionPrefill& a, const Sizes& z, const Rows& w) {
    alignas(64) float row[kMostSize];
    alignas(64) int8_t codes[kMostSize];
    const int64_t group = a.heads / a.pages.heads;
    if (kIntKeys) std::memset(w.q, 0, kRows * z.q_bytes);
    const auto query_at = [&](int64_t r) {
        const int64_t token = first_token(a, w.b) + (w.first + r) / group, head = w.h * group + (w.first + r) % group;
        return token * a.stride_qt + head * a.stride_qh;
    };
    for (int64_t r = 0; r < w.count; ++r)  // rows of a token lie apart, and memory is far: all are asked for at once
        for (int64_t byte = 0; byte < a.pages.size * dtype_bytes(a.q_dtype); byte += 64)
            prefetch(static_cast<const char*>(a.q) + query_at(r) * dtype_bytes(a.q_dtype) + byte);
    for (int64_t r = 0; r < w.count; ++r) {
        const int64_t at = query_at(r);
        for (int64_t d = 0; d < a.pages.size; d += 16) store_f32(row + d, load_as_f32(a.q, at + d, a.q_dtype));
        F32 shift = set_f32(0.0f);
        if (a.pages.mu != nullptr)
            for (int64_t d = 0; d < a.pages.size; d += 16)
                shift = fma(load_f32(row + d), load_f32(a.pages.mu + w.h * a.pages.size + d), shift);
        w.shift[r] = a.pages.mu == nullptr ? 0.0f : sum_of_lanes(shift) * (a.scale * kLog2E);
        w.largest[r] = kLowest;
        w.sum[r] = w.offset[r] = 0.0f;
        if (!kIntKeys) {
            const F32 by = set_f32(a.scale * kLog2E);
            auto* q = reinterpret_cast<float*>(w.q) + r * a.pages.size;
            for (int64_t d = 0; d < a.pages.size; d += 16) store_f32(q + d, mul(load_f32(row + d), by));
            w.q_scale[r] = 1.0f;
            w.q_sum[r] = 0.0f;
            continue;
        }
        float scale;
        int32_t sum;
        const auto part = [&](int64_t k, int64_t left) { return left > 0 ? load_f32(row + k) : set_f32(0.0f); };
        quantize_row(a.pages.size, part, part, codes, &scale, &sum);
        w.q_scale[r] = scale * (a.scale * kLog2E);
        w.q_sum[r] = static_cast<float>(sum);
#ifdef PERCARD_ISA_amx_int8
        for (int64_t d = 0; d < a.pages.size; d += 64)  // a tile of 16 rows after another, each 64 numbers of its rows
            std::memcpy(w.q + ((r / 16) * z.steps + d / 64) * 1024 + r % 16 * 64, codes + d,
                        min_of(64, a.pages.size - d));
#else
        for (int64_t d = 0; d < a.pages.size; d += 4)
            DotS8::widen_x(w.q + r * z.q_bytes + d / 4 * DotS8::kXBytes, codes + d);
#endif
    }
}

// ---- scores ---------------------------------------------------------------------------------------------------------

// scores[r, t] = sum of codes of q times codes of k, for the vectors of keys first .. last - 1
PERCARD_INLINE void scores_of_codes(const AttentionPrefill& a, const Sizes& z, const Rows& w, const char* keys,
                                    int64_t first, int64_t last) {
    auto* scores = reinterpret_cast<int32_t*>(w.scores);
#ifdef PERCARD_ISA_amx_int8
    const auto* q = reinterpret_cast<const int8_t*>(w.q);
    const auto* k = reinterpret_cast<const int8_t*>(keys);
    const int64_t tile = z.steps * 1024;
    for (int64_t v = first / 2 * 2; v < last; v += 2) {
        int32_t* to = scores + tile_at(0, v);
        if (w.count > 16)
            amx::block_s8<true, true>(to, q, q + tile, k + v * tile, k + (v + 1) * tile, z.steps);
        else
            amx::block_s8<false, true>(to, q, q, k + v * tile, k + (v + 1) * tile, z.steps);
    }
    (void)a;
#else
    const int64_t lines = a.pages.size / 4;
    for (int64_t v = first; v < last; ++v) {
        const char* k = keys + v * lines * kKeyLine;
        for (int64_t r = 0; r < w.count; r += kHeld) {
            DotS8 sums[kHeld];
            for (int i = 0; i < kHeld; ++i)
                sums[i].start(set_i32(-static_cast<int32_t>(DotS8::kOffset * w.q_sum[r + i])));
            const char* q = w.q + r * z.q_bytes;
            for (int64_t l = 0; l < lines; ++l) {
                const DotS8::Wide line = DotS8::load(k + l * kKeyLine);
#pragma GCC unroll 8
                for (int i = 0; i < kHeld; ++i) sums[i].step(line, q + i * z.q_bytes + l * DotS8::kXBytes);
            }
            for (int i = 0; i < kHeld; ++i) store_i32(scores + tile_at(r + i, v), sums[i].sum());
        }
    }
#endif
}

PERCARD_INLINE void scores_of_floats(const AttentionPrefill& a, const Rows& w, const float* keys, int64_t first,
                                     int64_t last) {
    for (int64_t v = first; v < last; ++v) {
        const float* k = keys + v * a.pages.size * 16;
        for (int64_t r = 0; r < w.count; r += kHeld) {
            F32 sums[kHeld];
            for (int i = 0; i < kHeld; ++i) sums[i] = set_f32(0.0f);
            const float* q = reinterpret_cast<const float*>(w.q) + r * a.pages.size;
            for (int64_t d = 0; d < a.pages.size; ++d) {
                const F32 line = load_f32(k + d * 16);
#pragma GCC unroll 8
                for (int i = 0; i < kHeld; ++i) sums[i] = fma(set_f32(q[i * a.pages.size + d]), line, sums[i]);
            }
            for (int i = 0; i < kHeld; ++i) store_f32(w.scores + tile_at(r + i, v), sums[i]);
        }
    }
}

// ---- values ---------------------------------------------------------------------------------------------------------

PERCARD_INLINE void join(const Rows& w, int64_t size, int64_t r, int64_t d, F32 more) {
    float* o = w.o + r * size + d;
    store_f32(o, fma(load_f32(o), set_f32(w.kept[r]), more));
}

#ifdef PERCARD_ISA_amx_int8
template <int kC, int kA, int kB>
PERCARD_INLINE void dot_unsigned() {
    __asm__ volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
}

// Tiles of sums of 16 values: high and low plane of rows 0 .. 15, then of rows 16 .. 31.
template <bool kTwo>
PERCARD_INLINE void tiles_of_values(const char* weights, const char* v, int32_t* sums, int64_t first, int64_t last) {
    amx::zero<0>();
    amx::zero<1>();
    if (kTwo) amx::zero<2>();
    if (kTwo) amx::zero<3>();
    for (int64_t c = first; c < last; ++c) {
        const char* p = weights + c * 1024;
        amx::load<6>(v + c * 1024);
        amx::load<4>(p);
        dot_unsigned<0, 4, 6>();
        amx::load<5>(p + 4096);
        dot_unsigned<1, 5, 6>();
        if (!kTwo) continue;
        amx::load<4>(p + 8192);
        dot_unsigned<2, 4, 6>();
        amx::load<5>(p + 8192 + 4096);
        dot_unsigned<3, 5, 6>();
    }
    amx::store<0>(sums);
    amx::store<1>(sums + 256);
    if (kTwo) amx::store<2>(sums + 512);
    if (kTwo) amx::store<3>(sums + 768);
}
#endif

// o = o * kept + weights . codes of v, over the chunks of 64 keys first .. last - 1
PERCARD_INLINE void values_of_codes(const AttentionPrefill& a, const Rows& w, const char* values, int64_t first,
                                    int64_t last) {
#ifdef PERCARD_ISA_amx_int8
    alignas(64) int32_t sums[2][1024];
    const int64_t blocks = a.pages.size / 16;
    const auto joined = [&](int64_t j) {
        for (int64_t r = 0; r < w.count; ++r) {
            const int32_t* s = sums[j % 2] + r / 16 * 512 + r % 16 * 16;
            join(w, a.pages.size, r, j * 16, to_f32(add(shift_left<8>(load_i32(s)), load_i32(s + 256))));
        }
    };
    for (int64_t j = 0; j < blocks; ++j) {
        const char* v = values + j * 4096;
        if (w.count > 16)
            tiles_of_values<true>(w.weights, v, sums[j % 2], first, last);
        else
            tiles_of_values<false>(w.weights, v, sums[j % 2], first, last);
        if (j > 0) joined(j - 1);  // while the tiles work
    }
    joined(blocks - 1);
#else
    const auto* p = reinterpret_cast<const int16_t*>(w.weights);
    const auto some = [&](int64_t j, auto wide) {
        constexpr int kMany = decltype(wide)::kCount;
        for (int64_t r = 0; r < w.count; r += kHeld) {
            I32 sums[kHeld][kMany];
            for (int i = 0; i < kHeld; ++i)
                for (int x = 0; x < kMany; ++x) sums[i][x] = set_i32(0);
            for (int64_t t = first * 64; t < last * 64; t += 2) {
                I32 v[kMany];
                for (int x = 0; x < kMany; ++x) v[x] = load_i32(values + ((j + x) * kBlock + t) * 32);
#pragma GCC unroll 8
                for (int i = 0; i < kHeld; ++i)
#pragma GCC unroll 2
                    for (int x = 0; x < kMany; ++x) sums[i][x] = dot_pairs(sums[i][x], v[x], p + (r + i) * kBlock + t);
            }
            for (int i = 0; i < kHeld && r + i < w.count; ++i)
                for (int x = 0; x < kMany; ++x) join(w, a.pages.size, r + i, (j + x) * 16, to_f32(sums[i][x]));
        }
    };
    int64_t j = 0;
    for (; j + kWide <= a.pages.size / 16; j += kWide) some(j, Many<kWide>{});
    for (; j < a.pages.size / 16; ++j) some(j, Many<1>{});
#endif
}

// The same in fp32: rows r .. r + kCount - 1, keys begin .. end - 1.
template <int kCount>
PERCARD_INLINE void values_of_floats(const AttentionPrefill& a, const Rows& w, const float* values, int64_t r,
                                     int64_t begin, int64_t end) {
    const float* p = reinterpret_cast<const float*>(w.weights) + r * kBlock;
    for (int64_t d = 0; d < a.pages.size; d += 16) {
        F32 sums[kCount];
        for (int i = 0; i < kCount; ++i) sums[i] = set_f32(0.0f);
        for (int64_t t = begin; t < end; ++t) {
            const F32 v = load_f32(values + t * a.pages.size + d);
#pragma GCC unroll 8
            for (int i = 0; i < kCount; ++i) sums[i] = fma(set_f32(p[i * kBlock + t]), v, sums[i]);
        }
        for (int i = 0; i < kCount && r + i < w.count; ++i) join(w, a.pages.size, r + i, d, sums[i]);
    }
}

// ---- a block of rows ------------------------------------------------------------------------------------------------

// out and lse. A row that saw nothing is 0, and its lse -infinity, or its sink.
template <bool kIntValues>
void finish(const AttentionPrefill& a, const Rows& w) {
    const int64_t group = a.heads / a.pages.heads;
    for (int64_t r = 0; r < w.count; ++r) {
        const int64_t head = w.h * group + (w.first + r) % group;
        const int64_t to = (first_token(a, w.b) + (w.first + r) / group) * a.heads + head;
        const Seen seen = seen_by(a, w, r);
        const bool none = seen.begin >= seen.end;
        const float shift = a.softcap == 0.0f ? w.shift[r] : 0.0f, base = kIntValues ? kLogMost : 0.0f;
        float lse = -__builtin_inff(), by = none ? 0.0f : 1.0f / w.sum[r];
        if (!none) lse = (w.largest[r] - base + shift) * kLn2 + __builtin_logf(w.sum[r]);
        if (a.sinks != nullptr) {
            const float sink = a.sinks[head], apart = lse - sink;
            const float all =
                none ? sink : (apart > 0 ? lse : sink) + __builtin_log1pf(__builtin_expf(-__builtin_fabsf(apart)));
            if (!none) by *= __builtin_expf(lse - all);
            lse = all;
        }
        const F32 more = set_f32(none ? 0.0f : w.offset[r]);
        for (int64_t d = 0; d < a.pages.size; d += 16) {
            const F32 o = none ? set_f32(0.0f) : load_f32(w.o + r * a.pages.size + d);
            store_as(a.out, to * a.pages.size + d, a.q_dtype, mul(add(o, more), set_f32(by)));
        }
        if (a.lse != nullptr) a.lse[to] = lse;
    }
}

template <bool kIntKeys, bool kIntValues>
void rows_of(const AttentionPrefill& a, const Sizes& z, const Rows& w, const char* packed, int64_t first_block) {
    load_queries<kIntKeys>(a, z, w);
    std::memset(w.o, 0, kRows * a.pages.size * sizeof(float));
    const Seen lowest = seen_by(a, w, 0), highest = seen_by(a, w, w.count - 1);
    for (int64_t start = max_of(lowest.begin / kBlock, first_block) * kBlock; start < highest.end; start += kBlock) {
        const Block block = block_at(z, packed, start / kBlock - first_block);
        const int64_t from = max_of(0, lowest.begin - start), to = min_of(kBlock, highest.end - start);
        if constexpr (kIntKeys)
            scores_of_codes(a, z, w, block.keys, from / 16, (to + 15) / 16);
        else
            scores_of_floats(a, w, reinterpret_cast<const float*>(block.keys), from / 16, (to + 15) / 16);
        const int64_t first = from / 64, last = (to + 63) / 64;
        for (int64_t r = 0; r < w.count; ++r) {
            const Seen seen = seen_by(a, w, r);
            const int64_t lo = max_of(0, seen.begin - start), hi = min_of(kBlock, seen.end - start);
            if (lo == 0 && hi == kBlock)
                weigh<kIntKeys, kIntValues, true>(a, w, block, r, lo, hi, first, last);
            else
                weigh<kIntKeys, kIntValues, false>(a, w, block, r, lo, hi, first, last);
        }
        const auto* values = reinterpret_cast<const float*>(block.values);
        if constexpr (kIntValues)
            values_of_codes(a, w, block.values, first, last);
        else if (block.finite)
            for (int64_t r = 0; r < w.count; r += kHeld) values_of_floats<kHeld>(a, w, values, r, from, to);
        else  // 0 * NaN is NaN: each row by itself, over what it sees
            for (int64_t r = 0; r < w.count; ++r) {
                const Seen seen = seen_by(a, w, r);
                const int64_t begin = max_of(0, seen.begin - start), end = min_of(kBlock, seen.end - start);
                values_of_floats<1>(a, w, values, r, begin, max_of(begin, end));
            }
    }
    finish<kIntValues>(a, w);
}

PERCARD_INLINE Rows rows_in(const AttentionPrefill& a, const Sizes& z, char* memory) {
    Rows w = {};
    const auto take = [&](int64_t bytes) {
        char* from = memory;
        memory += round_up(bytes, 64);
        return from;
    };
    w.q = take(kRows * max_of(z.q_bytes, a.pages.size * 4));
    w.scores = reinterpret_cast<float*>(take(kRows * kBlock * 4));
    w.weights = take(kRows * kBlock * 4);
    w.o = reinterpret_cast<float*>(take(kRows * a.pages.size * 4));
    w.line = reinterpret_cast<float*>(take(kBlock * 4));
    float** each[] = {&w.q_scale, &w.q_sum, &w.shift, &w.largest, &w.sum, &w.offset, &w.kept};
    for (float** one : each) {
        *one = reinterpret_cast<float*>(take(kRows * 4));
        std::memset(*one, 0, kRows * 4);
    }
    return w;
}

// Heads of sequences one group after another: as many as have their operands in kHeldBytes, at least one.
template <bool kIntKeys, bool kIntValues>
void run(const AttentionPrefill& a) {
    constexpr int64_t kHeldBytes = 32 << 20, kMany = 64;
    const Sizes z = sizes_of(a, kIntKeys, kIntValues);
    const int64_t pairs = a.batch * a.pages.heads, group = a.heads / a.pages.heads;
    const auto first_block = [&](int64_t b) {
        return a.window > 0 ? max_of(0, a.lengths[b] - fresh_of(a, b) + 1 - a.window) / kBlock : 0;
    };
    const double ns_of_row = (kIntKeys && kIntValues ? 2.0 : 6.0) * a.pages.size / kIntMacsPerNs + 1.5;
    for (int64_t pair = 0; pair < pairs;) {
        int64_t count = 0, blocks[kMany + 1] = {}, tiles[kMany + 1] = {}, keys = 0;
        for (; count < kMany && pair + count < pairs; ++count) {
            const int64_t b = (pair + count) / a.pages.heads, fresh = fresh_of(a, b);
            const int64_t mine = fresh > 0 ? (a.lengths[b] + kBlock - 1) / kBlock - first_block(b) : 0;
            if (count > 0 && (blocks[count] + mine) * z.block_bytes > kHeldBytes) break;
            blocks[count + 1] = blocks[count] + mine;
            tiles[count + 1] = tiles[count] + (fresh * group + kRows - 1) / kRows;
            keys = max_of(keys, min_of(a.lengths[b], a.window > 0 ? a.window + kRows : a.lengths[b]));
        }
        const auto which = [&](const int64_t* ends, int64_t i) {
            int64_t p = 0;
            while (ends[p + 1] <= i) ++p;
            return p;
        };
        auto* packed = static_cast<char*>(allocate(max_of(blocks[count], 1) * z.block_bytes));
        parallel(blocks[count], kBlock * a.pages.size * 0.5, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                const int64_t p = which(blocks, i), b = (pair + p) / a.pages.heads;
                const int64_t block = i - blocks[p] + first_block(b);
                pack<kIntKeys, kIntValues>(a, z, b, (pair + p) % a.pages.heads, block, packed + i * z.block_bytes);
            }
        });
        parallel(tiles[count], ns_of_row * kRows * keys / 2, [&](int64_t begin, int64_t end) {
#ifdef PERCARD_ISA_amx_int8
            const amx::Registers registers(4, 16, 64);
#endif
            Rows w = rows_in(
                a, z, static_cast<char*>(scratch(kSlotX, kRows * (z.q_bytes + a.pages.size * 8 + kBlock * 9 + 512))));
            for (int64_t i = begin; i < end; ++i) {
                const int64_t p = which(tiles, i);
                w.b = (pair + p) / a.pages.heads;
                w.h = (pair + p) % a.pages.heads;
                w.first = (i - tiles[p]) * kRows;
                w.count = min_of(kRows, fresh_of(a, w.b) * group - w.first);
                rows_of<kIntKeys, kIntValues>(a, z, w, packed + blocks[p] * z.block_bytes, first_block(w.b));
            }
        });
        release(packed);
        pair += count;
    }
}

}  // namespace prefill

void attention_prefill(const AttentionPrefill& a) {
    const bool keys = a.pages.k_bits < 16 && a.q_bits == 8, values = a.pages.v_bits < 16 && a.v == nullptr;
    if (keys && values)
        prefill::run<true, true>(a);
    else if (keys)
        prefill::run<true, false>(a);
    else if (values)
        prefill::run<false, true>(a);
    else
        prefill::run<false, false>(a);
}

}  // namespace PERCARD_ISA
}  // namespace percard
