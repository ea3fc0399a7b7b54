// moe_matmul: each token times the weights of the experts that it was routed to.
//
//   up     y[t * topk + j]    = silu(gate) * up, (gate, up) = x[t] @ W[e]^T, e = ids[t, j]
//   down   y[t]               = sum_j weights[t, j] * (x[t * topk + j] @ W[e]^T), j ascending
//
//   ids -> pairs (t, j) in order of experts      one job = up to kMost pairs of one expert:
//   [ expert 0 | expert 1 | ... | none ]            rows of x side by side -> matmul_w4a16 / matmul_w8a8 -> fp32
//   products
//
// The products are those of the dense ops, so a weight is packed and streamed as there: once per expert for up to kMost
// tokens. A job of an expert is cut evenly, so that which tokens stand together does not change how they are
// multiplied.
#include <cstring>

#include "ops.h"
#include "parallel.h"
#include "silu.h"
#include "simd.h"

namespace percard {
namespace PERCARD_ISA {
namespace moe {

constexpr int64_t kMost = 256;  // pairs of a job: bounds the memory of gathered rows and of products

struct Part {
    int64_t expert, begin, end;  // places in `pairs`
};

struct Route {
    int32_t* pairs;  // [tokens * topk], by expert, those of no expert of ours last
    Part* parts;
    int64_t many_parts, ours;  // `ours`: pairs that have an expert
};

static bool is_ours(const MoeMatmul& a, int64_t pair) { return a.ids[pair] >= 0 && a.ids[pair] < a.experts; }

static Route sort_pairs(const MoeMatmul& a) {
    const int64_t all = a.tokens * a.topk, most_parts = a.experts + all / kMost + 1;
    const int64_t bytes_of_parts = most_parts * static_cast<int64_t>(sizeof(Part)), bins = a.experts + 1;
    auto* memory = static_cast<char*>(scratch(kSlotRoute, bytes_of_parts + bins * 8 + all * 4));
    auto* parts = reinterpret_cast<Part*>(memory);
    auto* next = reinterpret_cast<int64_t*>(memory + bytes_of_parts);
    auto* pairs = reinterpret_cast<int32_t*>(memory + bytes_of_parts + bins * 8);
    std::memset(next, 0, bins * 8);
    for (int64_t i = 0; i < all; ++i) ++next[is_ours(a, i) ? a.ids[i] : a.experts];
    Route route{pairs, parts, 0, all - next[a.experts]};
    int64_t place = 0;
    for (int64_t e = 0; e < bins; ++e) {
        const int64_t count = next[e], cuts = (count + kMost - 1) / kMost;
        next[e] = place;
        for (int64_t c = 0; c < cuts && e < a.experts; ++c)
            parts[route.many_parts++] = {e, place + count * c / cuts, place + count * (c + 1) / cuts};
        place += count;
    }
    for (int64_t i = 0; i < all; ++i) pairs[next[is_ours(a, i) ? a.ids[i] : a.experts]++] = static_cast<int32_t>(i);
    return route;
}

// y[pair] = silu(gate) * up of a row of products.
static void gated(const MoeMatmul& a, int64_t pair, const float* products) {
    const int64_t inner = a.n / 2;
    for (int64_t i = 0; i < inner; i += 16) {
        const F32 gate = load_part(products + i, inner - i), up = load_part(products + inner + i, inner - i);
        store_part(a.y, pair * inner + i, a.y_dtype, mul(silu(gate), up), inner - i);
    }
}

// The products of one part: to y (up) or to rows `pair` of `all_products` (down).
static void multiply(const MoeMatmul& a, const Route& route, const Part& part, float* all_products) {
    const int64_t count = part.end - part.begin, element = a.sx ? 1 : dtype_bytes(a.x_dtype), row = a.k * element;
    const int64_t np = round_up(a.n, 16), kp = round_up(a.k, 128);
    auto* rows = static_cast<char*>(scratch(kSlotRows, count * (row + 4) + 64));
    auto* products = static_cast<float*>(scratch(kSlotProducts, count * a.n * 4));
    auto* sx = reinterpret_cast<float*>(rows + round_up(count * row, 64));
    const int32_t* pairs = route.pairs + part.begin;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t from = a.weights ? pairs[i] : pairs[i] / a.topk;
        std::memcpy(rows + i * row, static_cast<const char*>(a.x) + from * a.stride_xm * element, row);
        if (a.sx) sx[i] = a.sx[from];
    }
    const char* w = static_cast<const char*>(a.w) + part.expert * (a.sx ? np * kp : np * kp / 2);
    const float* scale = a.scale + part.expert * a.stride_se;
    if (a.sx) {
        const auto* x = reinterpret_cast<const int8_t*>(rows);
        matmul_w8a8(
            {x, sx, reinterpret_cast<const int8_t*>(w), scale, nullptr, products, count, a.n, a.k, a.k, kFloat32});
    } else {
        const int8_t* zero = a.zero ? a.zero + part.expert * a.stride_se : nullptr;
        matmul_w4a16({rows, w, scale, zero, nullptr, products, count, a.n, a.k, a.group, a.k, a.x_dtype, kFloat32,
                      a.batch_invariant});
    }
    for (int64_t i = 0; i < count; ++i) {
        if (a.weights)
            std::memcpy(all_products + pairs[i] * a.n, products + i * a.n, a.n * 4);
        else
            gated(a, pairs[i], products + i * a.n);
    }
}

// y[t] = the weighted products of a token, first to last.
static void add_up(const MoeMatmul& a, int64_t token, const float* products) {
    for (int64_t n = 0; n < a.n; n += 16) {
        F32 sum = set_f32(0.0f);
        for (int64_t pair = token * a.topk; pair < (token + 1) * a.topk; ++pair) {
            if (!is_ours(a, pair)) continue;
            sum = add(sum, mul(load_part(products + pair * a.n + n, a.n - n), set_f32(a.weights[pair])));
        }
        store_part(a.y, token * a.n + n, a.y_dtype, sum, a.n - n);
    }
}

}  // namespace moe

void moe_matmul(const MoeMatmul& a) {
    const int64_t all = a.tokens * a.topk;
    if (all == 0) return;
    const moe::Route route = moe::sort_pairs(a);
    auto* products = a.weights ? static_cast<float*>(allocate(all * a.n * 4)) : nullptr;
    const auto each = [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) moe::multiply(a, route, route.parts[i], products);
    };
    // Whole parts to threads when there are enough for all; else a part at a time, its rows shared out.
    const double ns = a.n * a.k * 0.05 * route.ours / (route.many_parts > 0 ? route.many_parts : 1);
    if (route.many_parts >= 2 * threads())
        parallel(route.many_parts, ns, each);
    else
        each(0, route.many_parts);
    if (a.weights) {
        parallel(a.tokens, a.topk * a.n * 0.3, [&](int64_t begin, int64_t end) {
            for (int64_t t = begin; t < end; ++t) moe::add_up(a, t, products);
        });
        release(products);
        return;
    }
    const int64_t row = a.n / 2 * dtype_bytes(a.y_dtype);
    for (int64_t i = route.ours; i < all; ++i)  // zeros of any float type are zero bytes
        std::memset(static_cast<char*>(a.y) + route.pairs[i] * row, 0, row);
}

}  // namespace PERCARD_ISA
}  // namespace percard
