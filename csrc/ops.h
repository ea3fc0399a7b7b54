// The ops of the C++ module: one struct of arguments per op, and the table of bodies of one instruction set (ISA).
//
// Every cpu.cpp is compiled once per ISA, in a namespace of that name; dispatch.cpp picks a table at load.
// Sizes are in elements. Packings are those of formats/layout.py: rows16_k4_w4 and rows16_k4_w8.
#pragma once

#include <cstdint>

namespace percard {

enum Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// scale[m] = absmax(x[m, :]) / 127, q = round_half_even(x * (127 / absmax)), row_sum[m] = sum of q[m, :]
struct QuantizeRows {
    const void* x;     // x_dtype [m, k], rows stride_xm apart
    int8_t* q;         // [m, k]
    float* scale;      // [m]
    int32_t* row_sum;  // [m]
    int64_t m, k, stride_xm;
    int x_dtype;
};

// r = x + residual; quantize_rows of (r / sqrt(mean(r^2) + eps)) * weight; r and the product are rounded to x_dtype
struct RmsnormQuantize {
    const void* x;         // x_dtype [m, k], rows stride_xm apart
    const void* weight;    // x_dtype [k]
    const void* residual;  // x_dtype [m, k], rows stride_rm apart, or null
    int8_t* q;             // [m, k]
    float* scale;          // [m]
    int32_t* row_sum;      // [m]
    void* r;               // x_dtype [m, k], null without a residual
    int64_t m, k, stride_xm, stride_rm;
    int x_dtype;
    float eps;
};

// quantize_rows of silu(x[m, :k]) * x[m, k:]; silu and the product are rounded to x_dtype
struct SiluMulQuantize {
    const void* x;     // x_dtype [m, 2 k], rows stride_xm apart
    int8_t* q;         // [m, k]
    float* scale;      // [m]
    int32_t* row_sum;  // [m]
    int64_t m, k, stride_xm;
    int x_dtype;
};

// y = (int32 sum of xq * w) * sx * scale + bias, in this order, each step rounded to fp32
struct MatmulW8A8 {
    const int8_t* xq;    // [m, k], rows stride_xm apart
    const float* sx;     // [m]
    const int8_t* w;     // rows16_k4_w8
    const float* scale;  // [1, n rounded up to 16]
    const float* bias;   // [n] or null
    void* y;             // y_dtype [m, n]
    int64_t m, n, k, stride_xm;
    int y_dtype;
};

// y = sum over groups of scale * (fp32 sum of (q - zero) * x) + bias, for 4-bit and 8-bit codes
struct MatmulA16 {
    const void* x;       // x_dtype [m, k], rows stride_xm apart
    const void* w;       // rows16_k4_w4 or rows16_k4_w8
    const float* scale;  // [groups, n rounded up to 16]
    const int8_t* zero;  // the same shape, signed, or null for 0
    const float* bias;   // [n] or null
    void* y;             // y_dtype [m, n]
    int64_t m, n, k, group, stride_xm;
    int x_dtype, y_dtype;
    bool batch_invariant;  // the bits of a row do not depend on m
};

// y = (sum over groups, ascending, by fused multiply-add, of scale * (int32 sum of q * xq)) * sx + bias, or, with
// scale = row_scale * m, m = 0..16: y = (int32 sum of q * m * xq) * row_scale * sx + bias
struct MatmulW4A8 {
    const int8_t* xq;     // [m, k], rows stride_xm apart
    const float* sx;      // [m]
    const int32_t* xsum;  // [m], sums of the rows of xq
    const uint8_t* w;     // rows16_k4_w4
    const float* scale;   // [groups, n rounded up to 16]
    const float* bias;    // [n] or null
    void* y;              // y_dtype [m, n]
    int64_t m, n, k, group, stride_xm;
    int y_dtype;
    const float* row_scale;  // [n rounded up to 16] or null
};

// up (weights null): y[t * topk + j] = silu(gate) * up, the halves of x[t] @ w[ids[t, j]]^T
// down: y[t] = sum over j, ascending, of weights[t, j] * (x[t * topk + j] @ w[ids[t, j]]^T)
// An id outside of 0 .. experts - 1 gives zero. Products as in matmul_w4a16, or with sx as in matmul_w8a8.
struct MoeMatmul {
    const void* x;         // x_dtype [tokens, k] (up) or [tokens * topk, k], rows stride_xm apart; int8 with sx
    const float* sx;       // one per row of x, or null
    const void* w;         // [experts], rows16_k4_w4, or rows16_k4_w8 with sx
    const float* scale;    // [experts, groups, n rounded up to 16], experts stride_se apart
    const int8_t* zero;    // the same shape, or null
    const int32_t* ids;    // [tokens, topk]
    const float* weights;  // [tokens, topk] or null
    void* y;               // y_dtype [tokens * topk, n / 2] (up) or [tokens, n]
    int64_t tokens, topk, experts, n, k, group, stride_xm, stride_se;
    int x_dtype, y_dtype;
    bool batch_invariant;  // the bits of a token do not depend on the others
};

// out[n, g] = the best of 80 scales of a group of weights: kernels/search_scale/__init__.py has the formula
struct SearchScale {
    const float* w;  // [n, k], rows stride_wn apart
    void* out;       // scale_dtype [n, k / group]
    int64_t n, k, stride_wn;
    int bits;
    int64_t group;
    bool symmetric;
    int scale_dtype;
    float norm;
};

// pages[slots[t]] = turn(norm(k[t])), v[t], as they are or quantised; q_out[t] = turn(norm(q[t])). A negative slot is
// skipped. formats/kvcache.py says what lies in a page.
struct KvAppend {
    const void* k;  // dtype [tokens, kv_heads, size], as v
    const void* v;
    void* k_pages;  // [pages, kv_heads, page, row]: dtype (k_bits 16), int8, or bytes of two 4-bit numbers; as v_pages
    void* v_pages;
    uint16_t* scales;          // fp16 [pages, kv_heads, page, words] or null
    const float* mu;           // [kv_heads, size] or null: taken from keys before they are quantised
    const int64_t* slots;      // [tokens], page * page size + row
    const void* q;             // dtype [tokens, heads, size] or null
    void* q_out;               // the same, contiguous
    const int64_t* positions;  // [tokens] or null: not turned
    const float* cos_sin;      // [positions, size]: cosines, then sines; or null
    const void* q_weight;      // dtype [size] or null: not normed
    const void* k_weight;
    int64_t tokens, heads, kv_heads, size, page;
    int64_t k_row, v_row;  // elements of a row of pages that are written, bytes past the numbers included
    int64_t stride_kt, stride_kth, stride_vt, stride_vth, stride_qt, stride_qh;  // of a token, of a head
    int64_t stride_kp, stride_kh, stride_kr, stride_vp, stride_vh, stride_vr;    // of a page, of a head, of a row
    int64_t stride_sp, stride_sh, stride_sr, stride_sw;                          // of scales: and of a number of a word
    int dtype, k_bits, v_bits, words;
    bool symmetric;
    float eps;
};

// Pages of one layer, as formats/kvcache.py has them. Strides: of a page, a head, a row, and of a number of a scale
// word.
struct KvPages {
    const void* k;         // dtype, int8, or uint8 with two 4-bit numbers, by k_bits
    const void* v;         // the same, by v_bits
    const void* k_scales;  // words [pages, heads, page, 1 or 2]: scale, offset; null for 16 bits
    const void* v_scales;  // the same
    const float* mu;       // [heads, size] or null
    int64_t heads, size, page;
    int64_t k_strides[3], v_strides[3], k_scale_strides[4], v_scale_strides[4];
    int dtype, k_bits, v_bits;
    int symmetric;  // 4-bit numbers are u - 8
    int nibbles;    // 0: byte j = x[j] | x[j + size / 2] << 4, 1: x[2 j] | x[2 j + 1] << 4
    int zeros;      // x = u * scale + offset (0), (u - offset) * scale (1), (u - low 4 bits of the scale) * scale (2)
    int words;      // dtype of scale words
};

// kernels/attention.py has the formula. Token i of n of a sequence of S keys sees the last `window` of keys 0 .. S - n
// + i.
struct AttentionDecode {
    KvPages pages;
    const void* q;                // q_dtype [tokens, heads, size], of a token and a head stride_qt and stride_qh apart
    const int32_t* table;         // [batch, >= max_kv_len / page], rows stride_tb apart
    const int32_t* table_starts;  // [batch + 1]: row b of the table starts there; or null
    const int32_t* lengths;       // [batch], the fresh tokens included
    const int32_t* q_starts;      // [batch + 1]: tokens of sequence b; or null: max_q_len of each
    const float* sinks;           // [heads] or null
    void* out;                    // q_dtype [tokens, heads, size]
    float* lse;                   // [tokens, heads] or null
    int64_t batch, max_q_len, heads, max_kv_len, window;  // window -1: none
    int64_t stride_qt, stride_qh, stride_tb;
    int q_dtype, q_bits;  // 8: queries are rounded over quantised pages
    float scale, softcap;
    int64_t splits;  // of a sequence; 0: chunks of one length, whatever the sequence
};

// Rows starts[b] + t of k_out and v_out = what token t of sequence b holds in its pages, mu added to keys; others are 0
struct GatherDequantize {
    KvPages pages;
    const int32_t* table;         // rows stride_tb apart, or at table_starts
    const int32_t* table_starts;  // [batch + 1] or null
    const int32_t* lengths;       // [batch]
    const int32_t* starts;        // [batch + 1], rising
    void* k_out;                  // dtype [total, heads, size] or null, as v_out
    void* v_out;
    int64_t batch, total, stride_tb;
    int dtype;
};

// The same for many fresh tokens of each sequence: rows q_starts[b] .. q_starts[b + 1] - 1.
struct AttentionPrefill {
    KvPages pages;
    const void* q;                // q_dtype [tokens, heads, size], of a token and a head stride_qt and stride_qh apart
    const int32_t* table;         // [batch, pages], rows stride_tb apart
    const int32_t* table_starts;  // [batch + 1]: row b of the table starts there; or null
    const int32_t* lengths;       // [batch], the fresh tokens included
    const int32_t* q_starts;      // [batch + 1], or null: max_q_len of each
    const float* sinks;           // [heads] or null
    const void* v;                // q_dtype [keys of all, kv heads, size] in place of the pages' values, or null
    const int32_t* v_starts;      // [batch + 1]: where the values of a sequence begin
    void* out;                    // q_dtype [tokens, heads, size]
    float* lse;                   // [tokens, heads] or null
    int64_t batch, max_q_len, heads, window;  // window -1: none
    int64_t stride_qt, stride_qh, stride_vt, stride_vh, stride_tb;
    int q_dtype, q_bits;  // 8: queries are rounded over quantised pages
    float scale, softcap;
};

// loss[i] = weight[i] * (t^2 * divergence of z_s[i] from the teacher, cross-entropy of labels[i]); z_s[i] becomes the
// gradient of the first plus hard times the second. kernels/distill_loss/__init__.py has the formulas.
struct DistillLoss {
    void* z_s;              // s_dtype [n, v], rows stride_s apart
    const float* weight;    // [n]; 0: the row counts nothing
    const void* z_t;        // t_dtype [n, >= vocab], rows stride_t apart, or null: ids
    const int32_t* ids;     // [n, k], distinct; those outside of 0 .. vocab - 1 are left out
    const float* logp;      // [n, k]
    const float* log_rest;  // [n]
    const int64_t* labels;  // [n] or null; outside of 0 .. vocab - 1: none
    float* loss;            // [n, 2]
    int64_t n, v, vocab, k, stride_s, stride_t;
    int s_dtype, t_dtype;
    int kind;  // 0 forward KL, 1 reverse KL, 2 generalised JSD, 3 kept ids
    float beta, t, hard;
};

// The bodies of one ISA.
struct Ops {
    void (*quantize_rows)(const QuantizeRows&);
    void (*matmul_w8a8)(const MatmulW8A8&);
    void (*matmul_w4a16)(const MatmulA16&);
    void (*matmul_w8a16)(const MatmulA16&);
    void (*matmul_w4a8)(const MatmulW4A8&);
    void (*moe_matmul)(const MoeMatmul&);
    void (*search_scale)(const SearchScale&);
    void (*rmsnorm_quantize)(const RmsnormQuantize&);
    void (*silu_mul_quantize)(const SiluMulQuantize&);
    void (*kv_append)(const KvAppend&);
    void (*attention_decode)(const AttentionDecode&);
    void (*gather_dequantize)(const GatherDequantize&);
    void (*attention_prefill)(const AttentionPrefill&);
    void (*distill_loss)(const DistillLoss&);
};

#define PERCARD_DECLARE(isa)                         \
    namespace isa {                                  \
    void quantize_rows(const QuantizeRows&);         \
    void matmul_w8a8(const MatmulW8A8&);             \
    void matmul_w4a16(const MatmulA16&);             \
    void matmul_w8a16(const MatmulA16&);             \
    void matmul_w4a8(const MatmulW4A8&);             \
    void moe_matmul(const MoeMatmul&);               \
    void search_scale(const SearchScale&);           \
    void rmsnorm_quantize(const RmsnormQuantize&);   \
    void silu_mul_quantize(const SiluMulQuantize&);  \
    void kv_append(const KvAppend&);                 \
    void attention_decode(const AttentionDecode&);   \
    void gather_dequantize(const GatherDequantize&); \
    void attention_prefill(const AttentionPrefill&); \
    void distill_loss(const DistillLoss&);           \
    }
PERCARD_DECLARE(scalar)
PERCARD_DECLARE(avx2)
PERCARD_DECLARE(avx_vnni)
PERCARD_DECLARE(avx512_vnni)
PERCARD_DECLARE(amx_int8)
#undef PERCARD_DECLARE

}  // namespace percard
