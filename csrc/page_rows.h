// Rows of pages of keys and values: the codes of one, and what they are multiplied with. formats/kvcache.py has the
// picture.
#pragma once

#include "scalar.h"

namespace percard {
namespace PERCARD_ISA {

// The rows of keys, or of values, of pages.
struct Held {
    const void *rows, *words;
    const int64_t *steps, *word_steps;  // of a page, a head, a row, a number of a word
    int bits, dtype, words_dtype, symmetric, nibbles, zeros;
};

PERCARD_INLINE Held keys_of(const KvPages& p) {
    return {p.k,     p.k_scales, p.k_strides, p.k_scale_strides, p.k_bits,
            p.dtype, p.words,    p.symmetric, p.nibbles,         p.zeros};
}
PERCARD_INLINE Held values_of(const KvPages& p) {
    return {p.v,     p.v_scales, p.v_strides, p.v_scale_strides, p.v_bits,
            p.dtype, p.words,    p.symmetric, p.nibbles,         p.zeros};
}
PERCARD_INLINE int64_t row_at(const int64_t* steps, int64_t page, int64_t head, int64_t row) {
    return page * steps[0] + head * steps[1] + row * steps[2];
}

// x = code * scale + offset
struct Affine {
    float scale, offset;
};

PERCARD_INLINE Affine affine_of(const Held& p, int64_t page, int64_t head, int64_t row) {
    const int64_t at = row_at(p.word_steps, page, head, row);
    const float scale = load_float(p.words, at, p.words_dtype);
    if (p.bits == 8 || p.symmetric) return {scale, 0.0f};
    if (p.zeros == 2) return {scale, -static_cast<float>(bits_of(scale) & 15) * scale};
    const float second = load_float(p.words, at + p.word_steps[3], p.words_dtype);
    return {scale, p.zeros == 1 ? -second * scale : second};
}

// The codes of a row of 8 or 4 bits: -8 .. 7 where 4 bits are symmetric.
PERCARD_INLINE void codes_of(const Held& p, int64_t page, int64_t head, int64_t row, int64_t size, int8_t* codes) {
    const auto* from = static_cast<const uint8_t*>(p.rows) + row_at(p.steps, page, head, row);
    if (p.bits == 8) {
        std::memcpy(codes, from, size);
        return;
    }
    const int64_t half = size / 2;
    const int less = p.symmetric ? 8 : 0;
    if (p.nibbles == 1) {
        for (int64_t i = 0; i < half; ++i) {
            codes[2 * i] = static_cast<int8_t>((from[i] & 15) - less);
            codes[2 * i + 1] = static_cast<int8_t>((from[i] >> 4) - less);
        }
        return;
    }
    for (int64_t i = 0; i < half; ++i) codes[i] = static_cast<int8_t>((from[i] & 15) - less);
    for (int64_t i = 0; i < half; ++i) codes[half + i] = static_cast<int8_t>((from[i] >> 4) - less);
}

}  // namespace PERCARD_ISA
}  // namespace percard
