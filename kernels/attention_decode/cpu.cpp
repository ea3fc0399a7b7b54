// attention_decode: 1 to 16 fresh tokens of each sequence over its pages of keys and values. csrc/attention.h has the
// walk over chunks and tiles; here is what a tile costs: Floats for pages as they are, Codes for int8 and 4 bits.
#include "attention.h"
#include "attention_codes.h"
#include "attention_floats.h"
#include "rows.h"

namespace percard {
namespace PERCARD_ISA {
namespace attention {

static_assert(kTokens == kTile);
// What stands behind the codes of a tile: x = code * scale + offset. 0 for tokens that are not there.
struct Words {
    float k[kTile], k_offset[kTile], v[kTile], v_offset[kTile];
    bool bad;  // a word of V is NaN or infinite
};

template <int kKBits, int kVBits>
struct Codes {
    static constexpr bool kSigned = kKBits == 8;
    const AttentionDecode& a;
    const KvPages& p;
    const int64_t most;              // rows
    const int64_t wide_;             // bytes of a row of codes once they are apart, and floats of one of o
    int16_t order[2][kMostNumbers];  // where number d of a key, of a value, lies in it
    bool plain_values;
    bool plain_words;  // those of a tile lie one behind another, as in our own pages

    struct Work {
        int8_t* q;         // [rows, wide], codes
        float* q_float;    // [rows, wide], queries that are not rounded
        float* q_step;     // [rows]: scale of the codes times the softmax scale
        float* q_total;    // [rows]: sum of the codes
        float* shift;      // [rows]: scale * q . mu
        float *by, *more;  // [rows], of `mix`
        int32_t* q_sum;    // [rows]
        float* scores;     // [rows, kTile], or int32
        int16_t* p;        // [rows, kTile]
        uint8_t* keys;     // [kTile, wide]
        int16_t* values;   // [kTile / 2, wide, 2]
        char* end;
    };

    explicit Codes(const AttentionDecode& given)
        : a(given), p(a.pages), most(a.max_q_len * (a.heads / p.heads)), wide_(round_up(p.size, 64)) {
        for (int i = 0; i < 2; ++i)
            for (int64_t d = 0; d < p.size; ++d) {
                const int64_t half = p.nibbles ? d / 2 : d % (p.size / 2);
                const bool high = p.nibbles ? d % 2 : d >= p.size / 2;
                order[i][d] = static_cast<int16_t>((i ? kVBits : kKBits) == 8 ? d : half + (high ? wide_ / 2 : 0));
            }
        plain_values = true;
        for (int64_t d = 0; d < p.size; ++d) plain_values = plain_values && order[1][d] == d;
        const int64_t channels = kVBits == 4 && !p.symmetric ? 4 : 2;
        const auto *k = static_cast<const uint16_t*>(p.k_scales), *v = static_cast<const uint16_t*>(p.v_scales);
        plain_words = p.words == kFloat16 && p.zeros == 0 && p.page >= kTile && v == k + 1 &&
                      p.k_scale_strides[2] == channels && p.v_scale_strides[2] == channels &&
                      (channels == 2 || (p.k_scale_strides[3] == 2 && p.v_scale_strides[3] == 2));
    }
    int64_t wide() const { return wide_; }
    int64_t work_bytes() const { return reinterpret_cast<int64_t>(at(nullptr).end); }
    double ns_of_key() const { return p.size * (kKBits + kVBits) / 8 / 12.0 + most * p.size * 0.015; }
    const int16_t* from() const { return plain_values ? nullptr : order[1]; }
    const float* shift(char* work) const { return a.softcap == 0.0f && p.mu != nullptr ? at(work).shift : nullptr; }

    Work at(char* work) const {
        const auto take = [&](int64_t bytes) {
            char* here = work;
            work += round_up(bytes, 64);
            return here;
        };
        const auto floats = [&](int64_t count) { return reinterpret_cast<float*>(take(count * 4)); };
        Work w;
        w.q = reinterpret_cast<int8_t*>(take(most * wide_));
        w.q_float = floats(a.q_bits == 16 ? most * wide_ : 0);
        w.q_step = floats(most);
        w.q_total = floats(most);
        w.shift = floats(most);
        w.by = floats(most);
        w.more = floats(most);
        w.q_sum = reinterpret_cast<int32_t*>(take(most * 4));
        w.scores = floats(most * kTile);
        w.p = reinterpret_cast<int16_t*>(take(most * kTile * 2));
        w.keys = reinterpret_cast<uint8_t*>(take(kTile * wide_));
        w.values = reinterpret_cast<int16_t*>(take(kTile * wide_ * 2));
        w.end = work;
        return w;
    }

    void load(char* work, const Place& place) const {
        const Work w = at(work);
        std::memset(w.q, 0, most * wide_);
        if (a.q_bits == 16) std::memset(w.q_float, 0, most * wide_ * 4);
        for (int64_t r = 0; r < place.tokens * place.group; ++r) {
            const int64_t head = place.h * place.group + r % place.group;
            const int64_t from = (place.first_token + r / place.group) * a.stride_qt + head * a.stride_qh;
            const auto number = [&](int64_t d, int64_t count) {
                return count > 0 ? load_as_f32(a.q, from + d, a.q_dtype) : set_f32(0.0f);
            };
            int8_t codes[kMostNumbers];
            float step;
            quantize_row(p.size, number, number, codes, &step, &w.q_sum[r]);
            F32 shift = set_f32(0.0f), total_ = set_f32(0.0f);
            for (int64_t d = 0; d < p.size; d += 16) {
                const F32 x = number(d, 16);
                total_ = add(total_, x);
                if (p.mu != nullptr) shift = fma(x, load_f32(p.mu + place.h * p.size + d), shift);
            }
            w.shift[r] = a.scale * sum_of_lanes(shift);
            if (a.q_bits == 16) {
                w.q_step[r] = a.scale;
                w.q_total[r] = sum_of_lanes(total_);
                for (int64_t d = 0; d < p.size; ++d)
                    w.q_float[r * wide_ + order[0][d]] = load_float(a.q, from + d, a.q_dtype);
                continue;
            }
            w.q_step[r] = step * a.scale;
            w.q_total[r] = static_cast<float>(w.q_sum[r]);
            for (int64_t d = 0; d < p.size; ++d) w.q[r * wide_ + order[0][d]] = codes[d];
        }
    }

    // 64 tokens' words, of K or of V, as scale and offset.
    PERCARD_INLINE_MEMBER void read_words(const void* words, const int64_t* at, int64_t count, int64_t step, bool coded,
                                          float* scale, float* offset) const {
        const bool two = coded && !p.symmetric && p.zeros != 2;
        if (p.words != kFloat32) {
            uint16_t s[kTile] = {}, o[kTile] = {};
            const auto* from = static_cast<const uint16_t*>(words);
            for (int64_t t = 0; t < count; ++t) s[t] = from[at[t]];
            if (two)
                for (int64_t t = 0; t < count; ++t) o[t] = from[at[t] + step];
            for (int64_t t = 0; t < kTile; t += 16) {
                store_f32(scale + t, load_as_f32(s, t, p.words));
                store_f32(offset + t, load_as_f32(o, t, p.words));
            }
        } else {
            const auto* from = static_cast<const char*>(words);
            for (int64_t t = 0; t < kTile; ++t) {
                scale[t] = offset[t] = 0.0f;
                if (t < count) std::memcpy(&scale[t], from + 4 * at[t], 4);
                if (t < count && two) std::memcpy(&offset[t], from + 4 * (at[t] + step), 4);
            }
        }
        if (!coded || (two && p.zeros == 0)) return;
        for (int64_t t = 0; t < kTile; ++t) {  // another engine's zero, or the 8 of symmetric codes
            const float zero = p.symmetric    ? 8.0f
                               : p.zeros == 1 ? offset[t]
                                              : static_cast<float>(bits_of(scale[t]) & 15);
            offset[t] = -(zero * scale[t]);
        }
    }

    // The same of 64 tokens whose words lie one behind another: k_scale v_scale (k_offset v_offset).
    PERCARD_INLINE_MEMBER void read_plain_words(const uint16_t* from, Words& words) const {
        uint16_t k[2 * kTile], v[2 * kTile], k_word[2][kTile], v_word[2][kTile];
        const bool four_words = kVBits == 4 && !p.symmetric;
        for (int64_t i = 0; i < (four_words ? 2 : 1) * kTile; i += 16) split(load_i32(from + 2 * i), k + i, v + i);
        if (four_words)
            for (int64_t i = 0; i < kTile; i += 16) {
                split(load_i32(k + 2 * i), k_word[0] + i, k_word[1] + i);
                split(load_i32(v + 2 * i), v_word[0] + i, v_word[1] + i);
            }
        const auto write = [&](const uint16_t* scale, const uint16_t* offset, bool coded, float* s, float* o) {
            for (int64_t t = 0; t < kTile; t += 16) {
                const F32 x = load_as_f32(scale, t, kFloat16);
                store_f32(s + t, x);
                if (coded)
                    store_f32(o + t, p.symmetric ? mul(set_f32(-8.0f), x) : load_as_f32(offset, t, kFloat16));
                else
                    store_f32(o + t, set_f32(0.0f));
            }
        };
        write(four_words ? k_word[0] : k, k_word[1], kKBits == 4, words.k, words.k_offset);
        write(four_words ? v_word[0] : v, v_word[1], kVBits == 4, words.v, words.v_offset);
    }

    PERCARD_INLINE_MEMBER void read_words(const Tile& tile, Words& words) const {
        if (plain_words && tile.count == kTile) {
            read_plain_words(static_cast<const uint16_t*>(p.k_scales) + tile.k_word[0], words);
        } else {
            read_words(p.k_scales, tile.k_word, tile.count, p.k_scale_strides[3], kKBits == 4, words.k, words.k_offset);
            read_words(p.v_scales, tile.v_word, tile.count, p.v_scale_strides[3], kVBits == 4, words.v, words.v_offset);
        }
        bool good = true;
        for (int64_t t = 0; t < kTile; t += 16) {
            good = good && all_at_most(abs(load_f32(words.v + t)), kLargest);
            good = good && all_at_most(abs(load_f32(words.v_offset + t)), kLargest);
        }
        words.bad = !good;
    }

    // 64 bytes from `d` on of a row of `bytes` bytes, what is past it undefined.
    PERCARD_INLINE_MEMBER static Bytes part(const uint8_t* row, int64_t d, int64_t bytes) {
        if (d + 64 <= bytes) return load_bytes(row + d);
        uint8_t line[64];
        std::memcpy(line, row + d, max_of(bytes - d, 0));
        return load_bytes(line);
    }

    // Rows of codes of kTile keys: in the pages where that is how they lie, else one number a byte in `w.keys`.
    PERCARD_INLINE_MEMBER void keys_of(const Work& w, const Tile& tile, const uint8_t** rows) const {
        const auto* from = static_cast<const uint8_t*>(p.k);
        if (kKBits == 8 && p.size == wide_) {
            for (int64_t t = 0; t < kTile; ++t) rows[t] = from + tile.k[t];
            return;
        }
        for (int64_t t = 0; t < kTile; ++t) {
            uint8_t* to = w.keys + min_of(t, tile.count - 1) * wide_;
            rows[t] = to;
            if (t >= tile.count) continue;
            const uint8_t* row = from + tile.k[t];
            if (kKBits == 8) {
                std::memcpy(to, row, p.size);
                continue;
            }
            uint8_t last[128];
            for (int64_t d = 0; d < wide_ / 2; d += 64) {
                const Bytes both = part(row, d, p.size / 2);
                if (d + 64 <= wide_ / 2) {
                    store_bytes(to + d, low_nibbles(both));
                    store_bytes(to + wide_ / 2 + d, high_nibbles(both));
                    continue;
                }
                store_bytes(last, low_nibbles(both));
                store_bytes(last + 64, high_nibbles(both));
                std::memcpy(to + d, last, 32);
                std::memcpy(to + wide_ / 2 + d, last + 64, 32);
            }
        }
    }

    // Values as `mix` reads them; while they are made the keys and words of the next tile are asked for.
    PERCARD_INLINE_MEMBER void values_of(const Work& w, const Tile& tile, const Tile* next) const {
        const auto* from = static_cast<const uint8_t*>(p.v);
        for (int64_t t = 0; t < tile.count; t += 2) {
            if (next != nullptr) ask_for_keys(*next, t);
            const uint8_t *one = from + tile.v[t], *two = from + tile.v[min_of(t + 1, tile.count - 1)];
            int16_t* to = w.values + t * wide_;
            if (kVBits == 8) {
                for (int64_t d = 0; d < wide_; d += 64)
                    interleave(part(one, d, p.size), part(two, d, p.size), to + 2 * d);
                continue;
            }
            int16_t last[128];
            for (int64_t d = 0; d < wide_ / 2; d += 64) {
                const Bytes x = part(one, d, p.size / 2), y = part(two, d, p.size / 2);
                if (d + 64 <= wide_ / 2) {
                    interleave(low_nibbles(x), low_nibbles(y), to + 2 * d);
                    interleave(high_nibbles(x), high_nibbles(y), to + wide_ + 2 * d);
                    continue;
                }
                interleave(low_nibbles(x), low_nibbles(y), last);
                std::memcpy(to + 2 * d, last, 128);
                interleave(high_nibbles(x), high_nibbles(y), last);
                std::memcpy(to + wide_ + 2 * d, last, 128);
            }
        }
    }

    PERCARD_INLINE_MEMBER void ask_for_keys(const Tile& next, int64_t t) const {
        const int64_t word = dtype_bytes(p.words);
        for (int64_t i = t; i < min_of(t + 2, next.count); ++i)
            ask_for(static_cast<const uint8_t*>(p.k) + next.k[i], kKBits == 8 ? p.size : p.size / 2);
        if (t % 4 != 0 || t >= next.count) return;
        prefetch(static_cast<const char*>(p.k_scales) + next.k_word[t] * word);
        prefetch(static_cast<const char*>(p.v_scales) + next.v_word[t] * word);
    }

    // Float products with queries that are not rounded: scores[r, t] = q[r] . codes[t].
    PERCARD_INLINE_MEMBER void float_dots(const Work& w, int64_t rows, const Tile& tile,
                                          const uint8_t* const* k) const {
        for (int64_t t = 0; t < tile.count; ++t)
            for (int64_t r = 0; r < rows; ++r) {
                F32 sum = set_f32(0.0f);
                for (int64_t d = 0; d < wide_; d += 16) {
                    const F32 code = to_f32(load_i8(reinterpret_cast<const int8_t*>(k[t]) + d));
                    sum = fma(code, load_f32(w.q_float + r * wide_ + d), sum);
                }
                w.scores[r * kTile + t] = sum_of_lanes(sum);
            }
    }

    // Products of row r become weights e^(score - largest so far) times the scales of the values: whole numbers of 15
    // bits, times by[r]. What weights times offsets give is the same for every number of a row of o: more[r].
    PERCARD_INLINE_MEMBER void weigh(const Work& w, const Rows& rows, int64_t r, const Tile& tile, const Seen& seen,
                                     const Words& words) const {
        const F32 step = set_f32(w.q_step[r]), total_ = set_f32(w.q_total[r]);
        F32 x[kTile / 16];
        for (int i = 0; i < kTile / 16; ++i) {
            const float* from = w.scores + r * kTile + 16 * i;
            x[i] = mul(a.q_bits == 16 ? load_f32(from) : to_f32(load_i32(from)), load_f32(words.k + 16 * i));
            if (kKBits == 4) x[i] = fma(total_, load_f32(words.k_offset + 16 * i), x[i]);
            x[i] = mul(x[i], step);
        }
        if (a.softcap != 0.0f || seen.first > tile.first || seen.last < tile.first + kTile || tile.count < kTile) {
            float s[kTile];
            for (int i = 0; i < kTile / 16; ++i) store_f32(s + 16 * i, x[i]);
            if (a.softcap != 0.0f) cap(s, a.softcap, p.mu != nullptr ? w.shift[r] : 0.0f);
            mask(s, tile, seen);
            for (int i = 0; i < kTile / 16; ++i) x[i] = load_f32(s + 16 * i);
        }
        F32 best = set_f32(rows.largest[r]);
        for (const F32& score : x) best = max(best, score);
        const float most_ever = largest_of_lanes(best);
        raise_to(rows, r, most_ever);
        const F32 largest = set_f32(most_ever), log2_e = set_f32(1.44269504f);
        const float *scale = words.v, *offset = words.v_offset;
        float clean[2 * kTile];
        bool nan = false;
        if (words.bad) {
            for (int64_t t = 0; t < kTile; ++t) {
                const bool bad = !(words.v[t] - words.v[t] == 0.0f && words.v_offset[t] - words.v_offset[t] == 0.0f);
                const bool mine = tile.first + t >= seen.first && tile.first + t < seen.last;
                clean[t] = bad ? 0.0f : words.v[t];
                clean[kTile + t] = bad ? 0.0f : words.v_offset[t];
                nan = nan || (bad && mine);
            }
            scale = clean;
            offset = clean + kTile;
        }
        F32 sum = set_f32(0.0f), more = set_f32(0.0f), most_ = set_f32(0.0f);
        for (int i = 0; i < kTile / 16; ++i) {
            // The product is off by 2^-24 of it, so e by |score - largest| 2^-24 of e, less than 2^-25 of the largest.
            const F32 e = power_of_two<true, -127>(mul(sub(x[i], largest), log2_e));
            sum = add(sum, e);
            if (kVBits == 4) more = fma(e, load_f32(offset + 16 * i), more);
            x[i] = mul(e, load_f32(scale + 16 * i));
            most_ = max(most_, abs(x[i]));
        }
        const float found = sum_of_lanes(sum), heaviest = largest_of_lanes(most_);
        rows.sum[r] += found;
        nan = nan || found != found;
        int16_t* to = w.p + r * kTile;
        w.more[r] = nan ? __builtin_nanf("") : kVBits == 4 ? sum_of_lanes(more) : 0.0f;
        w.by[r] = heaviest * (1.0f / 32767.0f);
        if (nan || heaviest < kTiny) {
            w.by[r] = 0.0f;
            std::memset(to, 0, kTile * sizeof(int16_t));
            return;
        }
        const F32 up = set_f32(32767.0f / heaviest), high = set_f32(32767.0f), low = set_f32(-32767.0f);
        for (int i = 0; i < kTile; i += 16) store_i16(to + i, to_i32(max(min(mul(x[i / 16], up), high), low)));
    }

    void chunk(char* work, const Rows& rows, const Place& place, int64_t first, int64_t last) const {
        const Work w = at(work);
        Tile tiles[2];
        Words words;
        const uint8_t* keys[kTile];
        int now = 0;
        if (first < last) tile_at(a, place, first, last, tiles[0]);
        while (first < last) {
            const Tile& tile = tiles[now];
            keys_of(w, tile, keys);
            const auto ask_for_value = [&](int64_t t) {
                ask_for(static_cast<const uint8_t*>(p.v) + tile.v[t], kVBits == 8 ? p.size : p.size / 2);
            };
            if (a.q_bits == 16)
                float_dots(w, rows.count, tile, keys);
            else
                dots_of_tile<kSigned>(w.q, rows.count, wide_, keys, tile.count, w.q_sum,
                                      reinterpret_cast<int32_t*>(w.scores), ask_for_value);
            read_words(tile, words);
            for (int64_t r = 0; r < rows.count; ++r) weigh(w, rows, r, tile, seen_by(a, place, r), words);
            first += tile.count;
            const Tile* next = nullptr;
            if (first < last) {
                tile_at(a, place, first, last, tiles[1 - now]);
                next = &tiles[1 - now];
            }
            values_of(w, tile, next);
            mix(w.p, rows.count, w.values, (tile.count + 1) / 2, wide_, w.by, w.more, rows.o);
            now = 1 - now;
        }
    }
};

}  // namespace attention

void attention_decode(const AttentionDecode& a) {
    using namespace attention;
    if (a.pages.k_bits == 4)
        run<attention::Codes<4, 4>>(a);
    else if (a.pages.k_bits == 8 && a.pages.v_bits == 8)
        run<attention::Codes<8, 8>>(a);
    else if (a.pages.k_bits == 8)
        run<attention::Codes<8, 4>>(a);
    else if (a.q_dtype == kFloat32)
        run_floats<kFloat32>(a);
    else if (a.q_dtype == kBFloat16)
        run_floats<kBFloat16>(a);
    else
        run_floats<kFloat16>(a);
}

}  // namespace PERCARD_ISA
}  // namespace percard
