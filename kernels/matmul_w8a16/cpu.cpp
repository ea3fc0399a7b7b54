// matmul_w8a16: 8-bit codes times floating-point activations; csrc/weight_only.h has the loops.
//
//   weights rows16_k4_w8, a line = 16 rows x 4 inputs: in a lane (row) the bytes are inputs 0..3, signed
#include "weight_only.h"

namespace percard {
namespace PERCARD_ISA {
namespace w8a16 {

// code - zero, at most 255 from 0: exact as a float, and as bf16.
template <bool kZero>
struct LineValues {
    F32 zero;
    explicit LineValues(const int8_t* p) : zero(kZero ? to_f32(load_i8(p)) : set_f32(0.0f)) {}
    template <int kByte>
    PERCARD_INLINE_MEMBER F32 at(I32 packed) const {
        const F32 code = to_f32(signed_byte<kByte>(packed));
        return kZero ? sub(code, zero) : code;
    }
    template <typename Step>
    PERCARD_INLINE_MEMBER void each(I32 packed, const Step& step) const {
        step(at<0>(packed), 0);
        step(at<1>(packed), 1);
        step(at<2>(packed), 2);
        step(at<3>(packed), 3);
    }
#ifdef PERCARD_ISA_amx_int8
    // A bf16 number is the upper half of the fp32 one whose lower half is 0.
    PERCARD_INLINE_MEMBER __m512i pair(F32 low, F32 high) const {
        return _mm512_or_si512(_mm512_srli_epi32(as_i32(low).v, 16), as_i32(high).v);
    }
    PERCARD_INLINE_MEMBER void unpack(char* to, I32 packed) const {
        _mm512_store_si512(to, pair(at<0>(packed), at<1>(packed)));
        _mm512_store_si512(to + 64, pair(at<2>(packed), at<3>(packed)));
    }
#endif
};

struct Weight {
    static constexpr int64_t kLine = 4;
    template <bool kZero>
    using Values = LineValues<kZero>;
#ifdef PERCARD_ISA_amx_int8
    template <bool kZero>
    using Pairs = LineValues<kZero>;
    static constexpr int input_at(int i) { return i; }
#endif
};

}  // namespace w8a16

void matmul_w8a16(const MatmulA16& a) { weight_only::run<w8a16::Weight>(a); }

}  // namespace PERCARD_ISA
}  // namespace percard
