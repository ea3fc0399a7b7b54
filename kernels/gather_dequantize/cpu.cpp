// gather_dequantize: tokens of paged sequences, of any form that formats/kvcache.py names, as rows one after another.
//
// A run of tokens that lie in one page is taken head by head: the rows of a page of a head are one piece of memory.
// While they are unpacked the same rows of the next head are asked for, and after the last head those of the next page.
//
//   8 bits  x = q * scale     4 bits  x = u * scale + offset | (u - 8) * scale | (u - zero) * scale     then + mu
//
// Products and sums are rounded one by one, as the reference has them, so all ISAs give the same bits.
#include "ops.h"
#include "parallel.h"
#include "simd.h"

namespace percard {
namespace PERCARD_ISA {
namespace gather {

enum Zeros : int { kOffset = 0, kZero = 1, kMantissa = 2 };

// Keys or values of a call.
struct Part {
    const void* pages;
    const void* words;
    const float* mu;
    void* out;
    const int64_t* steps;       // of pages: page, head, row
    const int64_t* word_steps;  // of words: page, head, row, word
    int bits;
};

// Where a run of tokens lies: rows row .. row + count - 1 of a page.
struct Run {
    int64_t page, row, count;
};

// The first `count` of 16 bytes; those behind them may belong to nobody.
PERCARD_INLINE I32 load_u8(const uint8_t* p, int64_t count) {
    if (count >= 16) return bit_and(load_i8(reinterpret_cast<const int8_t*>(p)), set_i32(255));
    int8_t bytes[16] = {};
    for (int64_t i = 0; i < count; ++i) bytes[i] = static_cast<int8_t>(p[i]);
    return bit_and(load_i8(bytes), set_i32(255));
}

PERCARD_INLINE F32 plus_mu(F32 x, const float* mu, int64_t d, int64_t count) {
    return mu == nullptr ? x : add(x, load_part(mu + d, count));
}

// What stands behind 4-bit codes: x = codes * scale + add, or (codes - minus) * scale.
struct Word {
    F32 scale, offset;
    bool before;  // the offset is subtracted before the product
    PERCARD_INLINE_MEMBER F32 of(F32 codes) const {
        return before ? mul(sub(codes, offset), scale) : add(mul(codes, scale), offset);
    }
};

PERCARD_INLINE Word word_at(const GatherDequantize& a, const Part& part, int64_t at) {
    const float scale = load_float(part.words, at, a.pages.words);
    if (a.pages.symmetric) return {set_f32(scale), set_f32(8.0f), true};
    if (a.pages.zeros == kMantissa) return {set_f32(scale), set_f32(static_cast<float>(bits_of(scale) & 15)), true};
    return {set_f32(scale), set_f32(load_float(part.words, at + part.word_steps[3], a.pages.words)),
            a.pages.zeros == kZero};
}

// Bytes j .. j + count - 1 of a 4-bit row; kWhole: 16 of them.
template <int kDtype, bool kWhole>
PERCARD_INLINE void nibbles(const GatherDequantize& a, const Part& part, const Word& word, const uint8_t* row,
                            const float* mu, int64_t to, int64_t j, int64_t left) {
    const int64_t half = a.pages.size / 2, count = kWhole ? 16 : left;
    const I32 bytes = load_u8(row + j, count);
    const F32 low = word.of(to_f32(bit_and(bytes, set_i32(15)))), high = word.of(to_f32(shift_right<4>(bytes)));
    if (a.pages.nibbles == 0) {
        store_part(part.out, to + j, kDtype, plus_mu(low, mu, j, count), count);
        store_part(part.out, to + half + j, kDtype, plus_mu(high, mu, half + j, count), count);
        return;
    }
    float even[16], odd[16], both[32];
    store_f32(even, low);
    store_f32(odd, high);
    for (int i = 0; i < 16; ++i) {
        both[2 * i] = even[i];
        both[2 * i + 1] = odd[i];
    }
    for (int64_t d = 0; d < 2 * count; d += 16)
        store_as(part.out, to + 2 * j + d, kDtype, plus_mu(load_f32(both + d), mu, 2 * j + d, 16));
}

PERCARD_INLINE void ask_for(const void* from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) prefetch(static_cast<const char*>(from) + i);
}

// Rows `run` of all heads of keys or values, to rows first .. of the output. `next`: the run behind, or null.
template <int kDtype>
void tokens(const GatherDequantize& a, const Part& part, const Run& run, const Run* next, int64_t first) {
    const int64_t element = part.bits == 16 ? dtype_bytes(a.pages.dtype) : 1;
    const int64_t bytes = part.bits == 4 ? a.pages.size / 2 : a.pages.size * element;
    const auto* pages = static_cast<const char*>(part.pages);
    for (int64_t h = 0; h < a.pages.heads; ++h) {
        const int64_t base = run.page * part.steps[0] + h * part.steps[1] + run.row * part.steps[2];
        const Run* after = h + 1 < a.pages.heads ? &run : next;
        const int64_t ahead = after == nullptr ? base
                                               : after->page * part.steps[0] + after->row * part.steps[2] +
                                                     (h + 1 < a.pages.heads ? (h + 1) * part.steps[1] : 0);
        const float* mu = part.mu == nullptr ? nullptr : part.mu + h * a.pages.size;
        for (int64_t t = 0; t < run.count; ++t) {
            const int64_t at = base + t * part.steps[2], to = ((first + t) * a.pages.heads + h) * a.pages.size;
            const char* row = pages + at * element;
            if (after != nullptr && t < after->count) ask_for(pages + (ahead + t * part.steps[2]) * element, bytes);
            if (part.bits == 16) {
                for (int64_t d = 0; d < a.pages.size; d += 16)
                    store_as(part.out, to + d, kDtype, load_as_f32(row, d, a.pages.dtype));
                continue;
            }
            const int64_t word =
                run.page * part.word_steps[0] + h * part.word_steps[1] + (run.row + t) * part.word_steps[2];
            if (part.bits == 8) {
                const F32 scale = set_f32(load_float(part.words, word, a.pages.words));
                for (int64_t d = 0; d < a.pages.size; d += 16) {
                    const F32 x = mul(to_f32(load_i8(reinterpret_cast<const int8_t*>(row) + d)), scale);
                    store_as(part.out, to + d, kDtype, plus_mu(x, mu, d, 16));
                }
            } else {
                const auto* from = reinterpret_cast<const uint8_t*>(row);
                const Word words = word_at(a, part, word);
                int64_t j = 0;
                for (; j + 16 <= a.pages.size / 2; j += 16) nibbles<kDtype, true>(a, part, words, from, mu, to, j, 16);
                if (j < a.pages.size / 2) nibbles<kDtype, false>(a, part, words, from, mu, to, j, a.pages.size / 2 - j);
            }
        }
    }
}

// The last sequence that starts at or before a row, -1 for none.
PERCARD_INLINE int64_t sequence_of(const GatherDequantize& a, int64_t row) {
    int64_t low = -1, high = a.batch;  // starts[low] <= row < starts[high]
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        (a.starts[middle] <= row ? low : high) = middle;
    }
    return low;
}

PERCARD_INLINE Run run_at(const GatherDequantize& a, int64_t b, int64_t token, int64_t last) {
    const int64_t first = a.table_starts != nullptr ? a.table_starts[b] : b * a.stride_tb;
    const int64_t row = token % a.pages.page;
    return {a.table[first + token / a.pages.page], row, min_of(a.pages.page - row, last - token)};
}

// Rows begin .. end - 1 of the outputs.
template <int kDtype>
void rows(const GatherDequantize& a, int64_t begin, int64_t end) {
    const KvPages& p = a.pages;
    const Part parts[2] = {{p.k, p.k_scales, p.mu, a.k_out, p.k_strides, p.k_scale_strides, p.k_bits},
                           {p.v, p.v_scales, nullptr, a.v_out, p.v_strides, p.v_scale_strides, p.v_bits}};
    const int64_t row_bytes = a.pages.heads * a.pages.size * dtype_bytes(kDtype);
    while (begin < end) {
        const int64_t b = sequence_of(a, begin);
        const int64_t room = b + 1 < a.batch ? min_of(a.starts[b + 1], end) : end;
        const int64_t from = b < 0 ? 0 : a.starts[b], last = b < 0 ? 0 : min_of(from + a.lengths[b], room);
        while (begin < last) {
            const Run run = run_at(a, b, begin - from, last - from);
            const int64_t behind = begin + run.count;
            const Run next = behind < last ? run_at(a, b, behind - from, last - from) : run;
            for (const Part& part : parts)
                if (part.out != nullptr) tokens<kDtype>(a, part, run, behind < last ? &next : nullptr, begin);
            begin = behind;
        }
        for (const Part& part : parts)
            if (part.out != nullptr && begin < room)
                std::memset(static_cast<char*>(part.out) + begin * row_bytes, 0, (room - begin) * row_bytes);
        begin = room;
    }
}

}  // namespace gather

void gather_dequantize(const GatherDequantize& a) {
    const auto rows = a.dtype == kFloat32    ? gather::rows<kFloat32>
                      : a.dtype == kBFloat16 ? gather::rows<kBFloat16>
                                             : gather::rows<kFloat16>;
    parallel(a.total, a.pages.heads * a.pages.size * 0.4, [&](int64_t begin, int64_t end) { rows(a, begin, end); });
}

}  // namespace PERCARD_ISA
}  // namespace percard
