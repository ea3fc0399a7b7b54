// Bindings only. Addresses come as integers, 0 for none; kernels/op.py has checked what they point to.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/string.h>

#include <array>
#include <string>

#define PERCARD_ISA scalar
#include "dispatch.h"
#include "parallel.h"

namespace nb = nanobind;
using Address = uintptr_t;

namespace percard {
namespace {

template <typename T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

void quantize_rows(Address x, Address q, Address scale, Address row_sum, int64_t m, int64_t k, int64_t stride_xm,
                   int x_dtype) {
    ops().quantize_rows({at<void>(x), at<int8_t>(q), at<float>(scale), at<int32_t>(row_sum), m, k, stride_xm, x_dtype});
}

void rmsnorm_quantize(Address x, Address weight, Address residual, Address q, Address scale, Address row_sum, Address r,
                      int64_t m, int64_t k, int64_t stride_xm, int64_t stride_rm, int x_dtype, double eps) {
    ops().rmsnorm_quantize({at<void>(x), at<void>(weight), at<void>(residual), at<int8_t>(q), at<float>(scale),
                            at<int32_t>(row_sum), at<void>(r), m, k, stride_xm, stride_rm, x_dtype,
                            static_cast<float>(eps)});
}

void silu_mul_quantize(Address x, Address q, Address scale, Address row_sum, int64_t m, int64_t k, int64_t stride_xm,
                       int x_dtype) {
    ops().silu_mul_quantize(
        {at<void>(x), at<int8_t>(q), at<float>(scale), at<int32_t>(row_sum), m, k, stride_xm, x_dtype});
}

void matmul_w8a8(Address xq, Address sx, Address w, Address scale, Address bias, Address y, int64_t m, int64_t n,
                 int64_t k, int64_t stride_xm, int y_dtype) {
    ops().matmul_w8a8({at<int8_t>(xq), at<float>(sx), at<int8_t>(w), at<float>(scale), at<float>(bias), at<void>(y), m,
                       n, k, stride_xm, y_dtype});
}

void expect_group(int64_t group, int64_t k) {
    if (group < 1 || (group < k && group % 8 != 0)) throw nb::value_error("group must be a multiple of 8, or all of k");
}

// matmul_w4a16 and matmul_w8a16
template <void (*Ops::*op)(const MatmulA16&)>
void matmul_a16(Address x, Address w, Address scale, Address zero, Address bias, Address y, int64_t m, int64_t n,
                int64_t k, int64_t group, int64_t stride_xm, int x_dtype, int batch_invariant) {
    expect_group(group, k);
    (ops().*op)({at<void>(x), at<void>(w), at<float>(scale), at<int8_t>(zero), at<float>(bias), at<void>(y), m, n, k,
                 group, stride_xm, x_dtype, x_dtype, batch_invariant != 0});
}

void moe_matmul(Address x, Address sx, Address w, Address scale, Address zero, Address ids, Address weights, Address y,
                int64_t tokens, int64_t topk, int64_t experts, int64_t n, int64_t k, int64_t group, int64_t stride_xm,
                int64_t stride_se, int x_dtype, int y_dtype, int batch_invariant) {
    expect_group(group, k);
    ops().moe_matmul({at<void>(x), at<float>(sx), at<void>(w), at<float>(scale), at<int8_t>(zero), at<int32_t>(ids),
                      at<float>(weights), at<void>(y), tokens, topk, experts, n, k, group, stride_xm, stride_se,
                      x_dtype, y_dtype, batch_invariant != 0});
}

void matmul_w4a8(Address xq, Address sx, Address w, Address scale, Address bias, Address y, int64_t m, int64_t n,
                 int64_t k, int64_t group, int64_t stride_xm, int y_dtype, Address xsum, Address row_scale) {
    expect_group(group, k);
    ops().matmul_w4a8({at<int8_t>(xq), at<float>(sx), at<int32_t>(xsum), at<uint8_t>(w), at<float>(scale),
                       at<float>(bias), at<void>(y), m, n, k, group, stride_xm, y_dtype, at<float>(row_scale)});
}

void search_scale(Address w, Address out, int64_t n, int64_t k, int64_t stride_wn, int bits, int64_t group,
                  int symmetric, int scale_dtype, float norm) {
    ops().search_scale({at<float>(w), at<void>(out), n, k, stride_wn, bits, group, symmetric != 0, scale_dtype, norm});
}

void kv_append(Address k, Address v, Address k_pages, Address v_pages, Address scales, Address mu, Address slots,
               Address q, Address q_out, Address positions, Address cos_sin, Address q_weight, Address k_weight,
               int64_t tokens, int64_t heads, int64_t kv_heads, int64_t size, int64_t page, int64_t k_row,
               int64_t v_row, int64_t stride_kt, int64_t stride_kth, int64_t stride_vt, int64_t stride_vth,
               int64_t stride_qt, int64_t stride_qh, int64_t stride_kp, int64_t stride_kh, int64_t stride_kr,
               int64_t stride_vp, int64_t stride_vh, int64_t stride_vr, int64_t stride_sp, int64_t stride_sh,
               int64_t stride_sr, int64_t stride_sw, int dtype, int k_bits, int v_bits, int words, int symmetric,
               double eps) {
    KvAppend a{};
    a.k = at<void>(k), a.v = at<void>(v), a.k_pages = at<void>(k_pages), a.v_pages = at<void>(v_pages);
    a.scales = at<uint16_t>(scales), a.mu = at<float>(mu), a.slots = at<int64_t>(slots);
    a.q = at<void>(q), a.q_out = at<void>(q_out), a.positions = at<int64_t>(positions), a.cos_sin = at<float>(cos_sin);
    a.q_weight = at<void>(q_weight), a.k_weight = at<void>(k_weight);
    a.tokens = tokens, a.heads = heads, a.kv_heads = kv_heads, a.size = size, a.page = page;
    a.k_row = k_row, a.v_row = v_row;
    a.stride_kt = stride_kt, a.stride_kth = stride_kth, a.stride_vt = stride_vt, a.stride_vth = stride_vth;
    a.stride_qt = stride_qt, a.stride_qh = stride_qh;
    a.stride_kp = stride_kp, a.stride_kh = stride_kh, a.stride_kr = stride_kr;
    a.stride_vp = stride_vp, a.stride_vh = stride_vh, a.stride_vr = stride_vr;
    a.stride_sp = stride_sp, a.stride_sh = stride_sh, a.stride_sr = stride_sr, a.stride_sw = stride_sw;
    a.dtype = dtype, a.k_bits = k_bits, a.v_bits = v_bits, a.words = words, a.symmetric = symmetric != 0;
    a.eps = static_cast<float>(eps);
    ops().kv_append(a);
}

// The pages of an attention: addresses of k, v, their scales and mu; heads, size and page; strides; types and forms.
KvPages pages_of(const Address* from, const int64_t* sizes, const int64_t* strides, const int* form) {
    KvPages pages{at<void>(from[0]),
                  at<void>(from[1]),
                  at<void>(from[2]),
                  at<void>(from[3]),
                  at<float>(from[4]),
                  sizes[0],
                  sizes[1],
                  sizes[2],
                  {},
                  {},
                  {},
                  {},
                  form[0],
                  form[1],
                  form[2],
                  form[3],
                  form[4],
                  form[5],
                  form[6]};
    for (int i = 0; i < 3; ++i) {
        pages.k_strides[i] = strides[i];
        pages.v_strides[i] = strides[3 + i];
    }
    for (int i = 0; i < 4; ++i) {
        pages.k_scale_strides[i] = strides[6 + i];
        pages.v_scale_strides[i] = strides[10 + i];
    }
    return pages;
}

// In the order of contract.native: q, pages, table ..; batch ..; strides of q, of pages, of the table; types and forms.
void attention_decode(const std::array<Address, 13>& pointers, const std::array<int64_t, 8>& sizes,
                      const std::array<int64_t, 17>& strides, const std::array<int, 9>& form, double scale,
                      double softcap, int64_t splits) {
    ops().attention_decode({pages_of(&pointers[1], &sizes[3], &strides[2], &form[1]),
                            at<void>(pointers[0]),
                            at<int32_t>(pointers[6]),
                            at<int32_t>(pointers[7]),
                            at<int32_t>(pointers[8]),
                            at<int32_t>(pointers[9]),
                            at<float>(pointers[10]),
                            at<void>(pointers[11]),
                            at<float>(pointers[12]),
                            sizes[0],
                            sizes[1],
                            sizes[2],
                            sizes[6],
                            sizes[7],
                            strides[0],
                            strides[1],
                            strides[16],
                            form[0],
                            form[8],
                            static_cast<float>(scale),
                            static_cast<float>(softcap),
                            splits});
}

// In the order of contract.native: pages, table .. k_out, v_out; sizes of pages, batch, total; strides; types and
// forms.
void gather_dequantize(const std::array<Address, 11>& pointers, const std::array<int64_t, 5>& sizes,
                       const std::array<int64_t, 15>& strides, const std::array<int, 8>& form) {
    ops().gather_dequantize({pages_of(&pointers[0], &sizes[0], &strides[0], &form[0]), at<int32_t>(pointers[5]),
                             at<int32_t>(pointers[6]), at<int32_t>(pointers[7]), at<int32_t>(pointers[8]),
                             at<void>(pointers[9]), at<void>(pointers[10]), sizes[3], sizes[4], strides[14], form[7]});
}

// The same order; v and v_starts follow the sinks, the strides of v those of the pages.
void attention_prefill(const std::array<Address, 15>& pointers, const std::array<int64_t, 7>& sizes,
                       const std::array<int64_t, 19>& strides, const std::array<int, 9>& form, double scale,
                       double softcap) {
    ops().attention_prefill({pages_of(&pointers[1], &sizes[3], &strides[2], &form[1]),
                             at<void>(pointers[0]),
                             at<int32_t>(pointers[6]),
                             at<int32_t>(pointers[7]),
                             at<int32_t>(pointers[8]),
                             at<int32_t>(pointers[9]),
                             at<float>(pointers[10]),
                             at<void>(pointers[11]),
                             at<int32_t>(pointers[12]),
                             at<void>(pointers[13]),
                             at<float>(pointers[14]),
                             sizes[0],
                             sizes[1],
                             sizes[2],
                             sizes[6],
                             strides[0],
                             strides[1],
                             strides[16],
                             strides[17],
                             strides[18],
                             form[0],
                             form[8],
                             static_cast<float>(scale),
                             static_cast<float>(softcap)});
}

void distill_loss(Address z_s, Address weight, Address z_t, Address ids, Address logp, Address log_rest, Address labels,
                  Address loss, int64_t n, int64_t v, int64_t vocab, int64_t k, int64_t stride_s, int64_t stride_t,
                  int s_dtype, int t_dtype, int kind, float beta, float t, float hard) {
    ops().distill_loss({at<void>(z_s),
                        at<float>(weight),
                        at<void>(z_t),
                        at<int32_t>(ids),
                        at<float>(logp),
                        at<float>(log_rest),
                        at<int64_t>(labels),
                        at<float>(loss),
                        n,
                        v,
                        vocab,
                        k,
                        stride_s,
                        stride_t,
                        s_dtype,
                        t_dtype,
                        kind,
                        beta,
                        t,
                        hard});
}

int isa_of(const std::string& name) {
    std::string known;
    for (int isa = 0; isa < kIsaCount; ++isa) {
        if (name == isa_name(isa)) return isa;
        known += (isa ? ", " : "") + std::string(isa_name(isa));
    }
    throw nb::value_error(("ISA '" + name + "' is unknown; choose one of " + known).c_str());
}

void force(const std::string& name) {
    const int isa = isa_of(name);
    if (!isa_available(isa)) throw nb::value_error(("this CPU has no " + name + "; isas() lists what it has").c_str());
    force_isa(isa);
}

nb::list isas() {
    nb::list names;
    for (int isa = 0; isa < kIsaCount; ++isa)
        if (isa_available(isa)) names.append(isa_name(isa));
    return names;
}

}  // namespace
}  // namespace percard

NB_MODULE(_cpu, module) {
    using namespace nb::literals;
    using nogil = nb::call_guard<nb::gil_scoped_release>;
    module.doc() = "C++ bodies of percard's ops. kernels/op.py is the only caller.";
    module.def("quantize_rows", &percard::quantize_rows, "x"_a, "q"_a, "scale"_a, "row_sum"_a, "m"_a, "k"_a,
               "stride_xm"_a, "x_dtype"_a, nogil());
    module.def("rmsnorm_quantize", &percard::rmsnorm_quantize, "x"_a, "weight"_a, "residual"_a, "q"_a, "scale"_a,
               "row_sum"_a, "r"_a, "m"_a, "k"_a, "stride_xm"_a, "stride_rm"_a, "x_dtype"_a, "eps"_a, nogil());
    module.def("silu_mul_quantize", &percard::silu_mul_quantize, "x"_a, "q"_a, "scale"_a, "row_sum"_a, "m"_a, "k"_a,
               "stride_xm"_a, "x_dtype"_a, nogil());
    module.def("matmul_w8a8", &percard::matmul_w8a8, "xq"_a, "sx"_a, "w"_a, "scale"_a, "bias"_a, "y"_a, "m"_a, "n"_a,
               "k"_a, "stride_xm"_a, "y_dtype"_a, nogil());
    const auto matmul_a16 = [&module](const char* name, auto function) {
        module.def(name, function, "x"_a, "w"_a, "scale"_a, "zero"_a, "bias"_a, "y"_a, "m"_a, "n"_a, "k"_a, "group"_a,
                   "stride_xm"_a, "x_dtype"_a, "batch_invariant"_a = 0, nogil());
    };
    matmul_a16("matmul_w4a16", &percard::matmul_a16<&percard::Ops::matmul_w4a16>);
    matmul_a16("matmul_w8a16", &percard::matmul_a16<&percard::Ops::matmul_w8a16>);
    module.def("matmul_w4a8", &percard::matmul_w4a8, "xq"_a, "sx"_a, "w"_a, "scale"_a, "bias"_a, "y"_a, "m"_a, "n"_a,
               "k"_a, "group"_a, "stride_xm"_a, "y_dtype"_a, "xsum"_a, "row_scale"_a = 0, nogil());
    module.def("moe_matmul", &percard::moe_matmul, "x"_a, "sx"_a, "w"_a, "scale"_a, "zero"_a, "ids"_a, "weights"_a,
               "y"_a, "tokens"_a, "topk"_a, "experts"_a, "n"_a, "k"_a, "group"_a, "stride_xm"_a, "stride_se"_a,
               "x_dtype"_a, "y_dtype"_a, "batch_invariant"_a, nogil());
    module.def("kv_append", &percard::kv_append, "k"_a, "v"_a, "k_pages"_a, "v_pages"_a, "scales"_a, "mu"_a, "slots"_a,
               "q"_a, "q_out"_a, "positions"_a, "cos_sin"_a, "q_weight"_a, "k_weight"_a, "tokens"_a, "heads"_a,
               "kv_heads"_a, "size"_a, "page"_a, "k_row"_a, "v_row"_a, "stride_kt"_a, "stride_kth"_a, "stride_vt"_a,
               "stride_vth"_a, "stride_qt"_a, "stride_qh"_a, "stride_kp"_a, "stride_kh"_a, "stride_kr"_a, "stride_vp"_a,
               "stride_vh"_a, "stride_vr"_a, "stride_sp"_a, "stride_sh"_a, "stride_sr"_a, "stride_sw"_a, "dtype"_a,
               "k_bits"_a, "v_bits"_a, "words"_a, "symmetric"_a, "eps"_a, nogil());
    module.def("attention_decode", &percard::attention_decode, "pointers"_a, "sizes"_a, "strides"_a, "form"_a,
               "scale"_a, "softcap"_a, "splits"_a, nogil());
    module.def("gather_dequantize", &percard::gather_dequantize, "pointers"_a, "sizes"_a, "strides"_a, "form"_a,
               nogil());
    module.def("attention_prefill", &percard::attention_prefill, "pointers"_a, "sizes"_a, "strides"_a, "form"_a,
               "scale"_a, "softcap"_a, nogil());
    module.def("distill_loss", &percard::distill_loss, "z_s"_a, "weight"_a, "z_t"_a, "ids"_a, "logp"_a, "log_rest"_a,
               "labels"_a, "loss"_a, "n"_a, "v"_a, "vocab"_a, "k"_a, "stride_s"_a, "stride_t"_a, "s_dtype"_a,
               "t_dtype"_a, "kind"_a, "beta"_a, "t"_a, "hard"_a, nogil());
    module.def("search_scale", &percard::search_scale, "w"_a, "out"_a, "n"_a, "k"_a, "stride_wn"_a, "bits"_a, "group"_a,
               "symmetric"_a, "scale_dtype"_a, "norm"_a, nogil());
    module.def("isa", [] { return percard::isa_name(percard::current_isa()); }, "The ISA whose bodies run.");
    module.def("force_isa", &percard::force, "name"_a, "Run the bodies of another ISA of isas() from now on.");
    module.def("isas", &percard::isas, "The ISAs that this CPU and operating system can run, weakest first.");
    module.def("threads", &percard::threads, "Threads that a large op uses: torch.get_num_threads().");
}
