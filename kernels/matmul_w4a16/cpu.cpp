// matmul_w4a16: 4-bit codes times floating-point activations; csrc/weight_only.h has the loops.
//
//   weights rows16_k4_w4, a line = 16 rows x 8 inputs: in a lane (row) the low nibbles are inputs 0..3, the high ones
//   4..7
#include "weight_only.h"

namespace percard {
namespace PERCARD_ISA {
namespace w4a16 {

template <bool kZero>
struct LineValues {
    Codes<kZero> codes;
    explicit LineValues(const int8_t* zero) : codes(zero) {}
    template <typename Step>
    PERCARD_INLINE_MEMBER void each(I32 packed, const Step& step) const {
        step(codes.template at<0>(packed), 0);
        step(codes.template at<8>(packed), 1);
        step(codes.template at<16>(packed), 2);
        step(codes.template at<24>(packed), 3);
        step(codes.template at<4>(packed), 4);
        step(codes.template at<12>(packed), 5);
        step(codes.template at<20>(packed), 6);
        step(codes.template at<28>(packed), 7);
    }
};

#ifdef PERCARD_ISA_amx_int8
// The bf16 number of code - 8 - zero, by a look-up of 16-bit words: a shift brings the nibble of both inputs of a pair
// to the low bits. In a lane (row) the nibbles of a line stand as inputs 0 4 1 5 | 2 6 3 7, lowest first, so the pairs
// are
//     shift 0: (0, 2)    shift 4: (4, 6)    shift 8: (1, 3)    shift 12: (5, 7)
// which is what `input_at` says. The look-up reads 5 bits: without zero points the fifth
// belongs to the next nibble and does not matter, with them it is the sign.
template <bool kZero>
struct BFloatPairs {
    __m512i table, from;
    explicit BFloatPairs(const int8_t* zero) {
        alignas(64) uint16_t words[32];
        for (int i = 0; i < 32; ++i) words[i] = to_bf16(static_cast<float>(kZero ? (i ^ 16) - 16 : (i & 15) - 8));
        table = _mm512_load_si512(words);
        from = _mm512_setzero_si512();
        if (kZero) {
            const __m512i z = add(load_i8(zero), set_i32(8)).v;  // one lane per row, two words per lane
            from = _mm512_or_si512(_mm512_and_si512(z, _mm512_set1_epi32(0xffff)), _mm512_slli_epi32(z, 16));
        }
    }
    PERCARD_INLINE_MEMBER __m512i get(__m512i line) const {
        if (kZero) line = _mm512_sub_epi16(_mm512_and_si512(line, _mm512_set1_epi16(15)), from);
        return _mm512_permutexvar_epi16(line, table);
    }
    PERCARD_INLINE_MEMBER void unpack(char* to, I32 packed) const {
        _mm512_store_si512(to, get(packed.v));
        _mm512_store_si512(to + 64, get(_mm512_srli_epi16(packed.v, 4)));
        _mm512_store_si512(to + 128, get(_mm512_srli_epi16(packed.v, 8)));
        _mm512_store_si512(to + 192, get(_mm512_srli_epi16(packed.v, 12)));
    }
};
#endif

struct Weight {
    static constexpr int64_t kLine = 8;
    template <bool kZero>
    using Values = LineValues<kZero>;
#ifdef PERCARD_ISA_amx_int8
    template <bool kZero>
    using Pairs = BFloatPairs<kZero>;
    static constexpr int input_at(int i) { return i / 8 * 8 + (i % 8 < 4 ? i % 4 * 2 : i % 4 * 2 + 1); }
#endif
};

}  // namespace w4a16

void matmul_w4a16(const MatmulA16& a) { weight_only::run<w4a16::Weight>(a); }

}  // namespace PERCARD_ISA
}  // namespace percard
