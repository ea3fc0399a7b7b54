// attention_prefill's operands: kBlock keys and values of one head of a sequence, as its products want them.
//
//   meta     fp32 [kBlock / 16][5][16]      k_scale, k_offset, log2 v_scale, 1 / v_scale, v_offset / v_scale
//   keys     int8: tiles of 16 keys, each lines of 16 keys x 4 numbers        fp32: [kBlock / 16][size][16 keys]
//   values   int8: 16 numbers after another, each lines of 16 numbers x 2     fp32: [kBlock][size]
//            keys as int16, or for AMX x 4 keys as bytes
//
// What lies past the length of the sequence is 0.
#pragma once

#include "fixed_point.h"
#include "page_rows.h"

namespace percard {
namespace PERCARD_ISA {
namespace prefill {

constexpr int64_t kBlock = kWeights, kMostSize = 256, kMeta = 80;
#ifdef PERCARD_ISA_amx_int8
constexpr int64_t kKeyLine = 64, kPairBytes = 1;
#else
constexpr int64_t kKeyLine = sizeof(DotS8::Wide), kPairBytes = 2;
#endif

template <int count>
struct Many {
    static constexpr int kCount = count;
};

struct Sizes {
    int64_t steps;    // of 64 numbers of a head
    int64_t q_bytes;  // of a row of codes
    int64_t key_bytes, value_bytes, block_bytes;
};

struct Flags {
    bool key_offsets, value_offsets, finite;
};

struct Block {
    const float* meta;
    const char *keys, *values;
    bool key_offsets, value_offsets;  // whether any is not 0
    bool finite;                      // fp32 values have neither NaN nor infinity
};

constexpr int64_t kMetaBytes = kBlock / 16 * kMeta * 4;

static inline Sizes sizes_of(const AttentionPrefill& a, bool int_keys, bool int_values) {
    Sizes z;
    z.steps = (a.pages.size + 63) / 64;
#ifdef PERCARD_ISA_amx_int8
    z.q_bytes = z.steps * 64;
    z.key_bytes = int_keys ? kBlock / 16 * z.steps * 1024 : kBlock * a.pages.size * 4;
#else
    z.q_bytes = a.pages.size / 4 * DotS8::kXBytes;
    z.key_bytes = int_keys ? kBlock / 16 * (a.pages.size / 4) * kKeyLine : kBlock * a.pages.size * 4;
#endif
    z.value_bytes = kBlock * a.pages.size * (int_values ? kPairBytes : 4);
    z.block_bytes = 64 + kMetaBytes + z.key_bytes + z.value_bytes;
    return z;
}

PERCARD_INLINE Block block_at(const Sizes& z, const char* packed, int64_t index) {
    const char* from = packed + index * z.block_bytes;
    const auto* flags = reinterpret_cast<const Flags*>(from);
    const char* keys = from + 64 + kMetaBytes;
    return {reinterpret_cast<const float*>(from + 64),
            keys,
            keys + z.key_bytes,
            flags->key_offsets,
            flags->value_offsets,
            flags->finite};
}

// A row in fp32, whatever it is held in.
PERCARD_INLINE void floats_of(const Held& p, int64_t page, int64_t h, int64_t row, int64_t size, float* to) {
    if (p.words == nullptr) {
        const int64_t at = row_at(p.steps, page, h, row);
        for (int64_t d = 0; d < size; d += 16) store_f32(to + d, load_as_f32(p.rows, at + d, p.dtype));
        return;
    }
    int8_t codes[kMostSize];
    codes_of(p, page, h, row, size, codes);
    const Affine is = affine_of(p, page, h, row);
    for (int64_t d = 0; d < size; d += 16)
        store_f32(to + d, add(mul(to_f32(load_i8(codes + d)), set_f32(is.scale)), set_f32(is.offset)));
}

// Codes [16][kMostSize] of 16 keys as one tile.
PERCARD_INLINE void pack_keys(const AttentionPrefill& a, const Sizes& z, const int8_t* codes, char* to) {
    alignas(64) int8_t line[64];
#ifdef PERCARD_ISA_amx_int8
    const int64_t lines = z.steps * 16;
    (void)a;
#else
    const int64_t lines = a.pages.size / 4;
    (void)z;
#endif
    for (int64_t l = 0; l < lines; ++l, to += kKeyLine) {
        for (int64_t t = 0; t < 16; ++t) std::memcpy(line + t * 4, codes + t * kMostSize + l * 4, 4);
#ifdef PERCARD_ISA_amx_int8
        std::memcpy(to, line, 64);
#else
        DotS8::store(to, DotS8::widen(line));
#endif
    }
}

// Codes [4][kMostSize] of the values of keys t .. t + 3 of a block.
PERCARD_INLINE void pack_values(const AttentionPrefill& a, const int8_t* codes, int64_t t, char* to) {
    for (int64_t d = 0; d < a.pages.size; d += 16) {
        I32 v[4];
        for (int i = 0; i < 4; ++i) v[i] = load_i8(codes + i * kMostSize + d);
#ifdef PERCARD_ISA_amx_int8
        // Fours of keys of 64 in the order of store_weights: 0 4 8 12 1 5 9 13 ...
        const int64_t four = t % 64 / 4, line = t / 64 * 16 + four % 4 * 4 + four / 4;
        const I32 byte = set_i32(255);
        const I32 low = add(bit_and(v[0], byte), shift_left<8>(bit_and(v[1], byte)));
        const I32 high = add(bit_and(v[2], byte), shift_left<8>(v[3]));
        store_i32(reinterpret_cast<int32_t*>(to + d / 16 * (kBlock * 16) + line * 64), pairs_of(low, high));
#else
        auto* line = reinterpret_cast<int32_t*>(to + (d / 16 * kBlock + t) * 32);
        store_i32(line, pairs_of(v[0], v[1]));
        store_i32(line + 16, pairs_of(v[2], v[3]));
#endif
    }
}

// Block `index` of head h of sequence b.
template <bool kIntKeys, bool kIntValues>
void pack(const AttentionPrefill& a, const Sizes& z, int64_t b, int64_t h, int64_t index, char* to) {
    alignas(64) int8_t keys[16 * kMostSize], values[16 * kMostSize];
    alignas(64) float row[kMostSize];
    auto* meta = reinterpret_cast<float*>(to + 64);
    char *packed_keys = to + 64 + kMetaBytes, *packed_values = packed_keys + z.key_bytes;
    const Held k = keys_of(a.pages), v = values_of(a.pages);
    const int32_t* table = a.table_starts == nullptr ? a.table + b * a.stride_tb : a.table + a.table_starts[b];
    Flags flags = {false, false, true};
    for (int64_t tile = 0; tile < kBlock / 16; ++tile, meta += kMeta) {
        std::memset(meta, 0, kMeta * 4);
        std::memset(keys, 0, sizeof(keys));
        std::memset(values, 0, sizeof(values));
        auto* fresh_keys = reinterpret_cast<float*>(packed_keys) + tile * a.pages.size * 16;
        auto* fresh_values = reinterpret_cast<float*>(packed_values) + tile * 16 * a.pages.size;
        if (!kIntKeys) std::memset(fresh_keys, 0, a.pages.size * 16 * 4);
        if (!kIntValues) std::memset(fresh_values, 0, a.pages.size * 16 * 4);
        const int64_t first = index * kBlock + tile * 16, count = min_of(16, a.lengths[b] - first);
        for (int64_t i = 0; i < count; ++i) {
            const int64_t page = table[(first + i) / a.pages.page], r = (first + i) % a.pages.page;
            meta[i] = meta[48 + i] = 1.0f;
            if (kIntKeys) {
                codes_of(k, page, h, r, a.pages.size, keys + i * kMostSize);
                const Affine is = affine_of(k, page, h, r);
                meta[i] = is.scale;
                meta[16 + i] = is.offset;
                flags.key_offsets = flags.key_offsets || is.offset != 0.0f;
            } else {
                floats_of(k, page, h, r, a.pages.size, row);
                for (int64_t d = 0; d < a.pages.size; ++d) fresh_keys[d * 16 + i] = row[d];
            }
            if (kIntValues) {
                Affine is = affine_of(v, page, h, r);
                const bool bad = !(is.scale >= 0.0f && __builtin_isfinite(is.scale) && __builtin_isfinite(is.offset));
                if (!bad && is.scale >= 1e-12f)
                    codes_of(v, page, h, r, a.pages.size, values + i * kMostSize);
                else
                    is.scale = 1e-6f;  // its codes stay 0; NaN comes in by the offset
                meta[32 + i] = __builtin_log2f(is.scale);
                meta[48 + i] = 1.0f / is.scale;
                meta[64 + i] = bad ? __builtin_nanf("") : is.offset / is.scale;
                flags.value_offsets = flags.value_offsets || bad || is.offset != 0.0f;
                continue;
            }
            float* at = fresh_values + i * a.pages.size;
            if (a.v == nullptr)
                floats_of(v, page, h, r, a.pages.size, at);
            else
                for (int64_t d = 0; d < a.pages.size; d += 16)
                    store_f32(at + d, load_as_f32(a.v, (a.v_starts[b] + first + i) * a.stride_vt + h * a.stride_vh + d,
                                                  a.q_dtype));
            for (int64_t d = 0; d < a.pages.size; d += 16)
                flags.finite = flags.finite && all_at_most(abs(load_f32(at + d)), 3.4028234663852886e38f);
        }
        if (kIntKeys) pack_keys(a, z, keys, packed_keys + tile * (z.key_bytes / (kBlock / 16)));
        if (kIntValues)
            for (int64_t i = 0; i < 16; i += 4) pack_values(a, values + i * kMostSize, tile * 16 + i, packed_values);
    }
    std::memcpy(to, &flags, sizeof(flags));
}

}  // namespace prefill
}  // namespace PERCARD_ISA
}  // namespace percard
