// distill_loss: how far each row of a student's logits is from its teacher's, the row overwritten by its gradient.
//
//   pass 1   largest number and sum of exponentials of both rows, block by block: what the blocks before hold is scaled
//            when a block brings a larger one
//   pass 2   D; forward KL, whose gradient needs no D, writes it on the way
//   pass 3   (reverse KL, JSD) the gradient
//
// A row of 150,000 floats stays in the second cache meanwhile; rows of 16 bits are floats in memory of the thread. Sums
// of a block are fp32 by lanes, those of a row double; every step is rounded alone, so all ISAs give the same bits. An
// exponential below e^-60 counts as e^-60: it is less than 1e-21 of any sum, and its products are no subnormal numbers,
// which take a CPU a hundred times as long.
#include "ops.h"
#include "parallel.h"
#include "silu.h"
#include "simd.h"

namespace percard {
namespace PERCARD_ISA {
namespace distill {

constexpr int64_t kBlock = 1024;
constexpr float kLargest = 3.4028234663852886e38f;

// Numbers k .. k + count - 1 of a row; the first of them stands past the last.
PERCARD_INLINE F32 part_of(const float* x, int64_t k, int64_t count) {
    if (count >= 16) return load_f32(x + k);
    float lanes[16];
    for (int64_t i = 0; i < 16; ++i) lanes[i] = x[k + (i < count ? i : 0)];
    return load_f32(lanes);
}

// Largest number and sum of e^(x - most) of a row.
struct Sum {
    float most;
    double sum;
    bool finite;
    float inverse() const { return static_cast<float>(1.0 / sum); }
    double log() const { return __builtin_log(sum); }
};

PERCARD_INLINE F32 power(F32 x) { return exp(max(x, set_f32(-60.0f))); }

// e^x, 0 past the first `count`.
PERCARD_INLINE F32 power_part(F32 x, int64_t count) {
    const F32 e = power(x);
    if (count >= 16) return e;
    float lanes[16];
    store_f32(lanes, e);
    return load_part(lanes, count);
}

// body(k, count) for 16 numbers at a time of first .. last - 1
template <typename Body>
PERCARD_INLINE void each(int64_t first, int64_t last, const Body& body) {
    int64_t k = first;
    for (; k + 16 <= last; k += 16) body(k, int64_t{16});
    if (k < last) body(k, last - k);
}

Sum sum_of(const float* x, float scale, int64_t count) {
    const F32 times = set_f32(scale);
    Sum found{-__builtin_inff(), 0.0, true};
    for (int64_t first = 0; first < count; first += kBlock) {
        const int64_t last = min_of(first + kBlock, count);
        F32 most = mul(part_of(x, first, last - first), times);
        bool finite = true;
        each(first, last, [&](int64_t k, int64_t part) __attribute__((always_inline)) {
            const F32 here = mul(part_of(x, k, part), times);
            most = max(most, here);
            finite = finite && all_at_most(abs(here), kLargest);
        });
        if (!finite) return {0.0f, 1.0, false};
        const float here = largest_of_lanes(most);
        if (here > found.most) {
            found.sum *= __builtin_exp(static_cast<double>(found.most) - here);
            found.most = here;
        }
        const F32 top = set_f32(found.most);
        F32 sum = set_f32(0.0f);
        each(first, last, [&](int64_t k, int64_t part) __attribute__((always_inline)) {
            sum = add(sum, power_part(sub(mul(part_of(x, k, part), times), top), part));
        });
        found.sum += sum_of_lanes(sum);
    }
    return found;
}

// The cross-entropy of a label at T = 1, and what it adds to a gradient: `by` times softmax, less `by` at the label.
// Without `hard` it adds nothing, and is there for who wants to know it.
struct Hard {
    float t;
    Sum sum;
    int64_t label;  // -1: adds nothing
    float by;
    double loss;

    PERCARD_INLINE_MEMBER F32 gradient(F32 x, int64_t k) const {
        static const float unit[31] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1};
        const F32 q = mul(power(sub(mul(x, set_f32(t)), set_f32(sum.most))), set_f32(by * sum.inverse()));
        const bool here = label >= k && label < k + 16;
        return here ? sub(q, mul(load_f32(unit + 15 - (label - k)), set_f32(by))) : q;
    }
};

Hard hard_of(const DistillLoss& a, int64_t i, const float* x, const Sum& at_t) {
    Hard hard{a.t, at_t, -1, 0.0f, 0.0};
    if (a.labels == nullptr || a.labels[i] < 0 || a.labels[i] >= a.vocab) return hard;
    const int64_t label = a.labels[i];
    if (a.t != 1.0f) hard.sum = sum_of(x, a.t, a.vocab);
    hard.loss = hard.sum.log() - (static_cast<double>(x[label]) * a.t - hard.sum.most);
    if (a.hard == 0.0f) return hard;
    hard.label = label;
    hard.by = a.hard * a.weight[i];
    return hard;
}

// log(1 + u) of 0 <= u <= 1: with s = u / (2 + u) <= 1 / 3, 2 (s + s^3 / 3 + ... + s^15 / 15); what is left out is
// under 1e-9 of it.
PERCARD_INLINE F32 log1p(F32 u) {
    const F32 s = div(u, add(u, set_f32(2.0f))), s2 = mul(s, s);
    F32 p = set_f32(1.0f / 15.0f);
    for (int i = 13; i >= 1; i -= 2) p = add(mul(p, s2), set_f32(1.0f / static_cast<float>(i)));
    return mul(add(s, s), p);
}

// A row of student and teacher over T, where its gradient goes, and what follows from their sums.
struct Pair {
    const float* s;
    const float* t;
    float* out;
    Sum of_s, of_t;
    float log_q, log_p;      // JSD: ln(1 - beta) - log of the sum, ln beta - log of the sum
    float share_q, share_p;  // (1 - beta) / sum, beta / sum

    // Student's and teacher's numbers less their largest
    PERCARD_INLINE_MEMBER F32 x(int64_t k, int64_t count) const {
        return sub(part_of(s, k, count), set_f32(of_s.most));
    }
    PERCARD_INLINE_MEMBER F32 y(int64_t k, int64_t count) const {
        return sub(part_of(t, k, count), set_f32(of_t.most));
    }
    PERCARD_INLINE_MEMBER void write(const Hard& hard, int64_t k, int64_t count, F32 dz) const {
        if (hard.label >= 0) dz = add(dz, hard.gradient(part_of(s, k, count), k));
        store_part(out, k, kFloat32, dz, count);
    }
    // log((1 - beta) q / m) and log(beta p / m), of e^x and e^y as well
    PERCARD_INLINE_MEMBER void over_mean(F32 x, F32 y, F32 ex, F32 ey, F32* q, F32* p) const {
        const F32 lq = add(x, set_f32(log_q)), lp = add(y, set_f32(log_p));
        const F32 mq = mul(ex, set_f32(share_q)), mp = mul(ey, set_f32(share_p));
        const F32 ratio = div(min(mq, mp), max(max(mq, mp), set_f32(1e-37f)));
        const F32 mean = add(max(lq, lp), log1p(ratio));
        *q = sub(lq, mean);
        *p = sub(lp, mean);
    }
};

// Adds to two sums what `what(k, count, &one, &two)` adds to lanes for all numbers of begin .. end - 1.
template <typename What>
PERCARD_INLINE void sums(int64_t begin, int64_t end, double* first_sum, double* second_sum, const What& what) {
    for (int64_t first = begin; first < end; first += kBlock) {
        F32 one = set_f32(0.0f), two = set_f32(0.0f);
        each(first, min_of(first + kBlock, end),
             [&](int64_t k, int64_t part) __attribute__((always_inline)) { what(k, part, &one, &two); });
        *first_sum += sum_of_lanes(one);
        *second_sum += sum_of_lanes(two);
    }
}

template <int kKind>
double dense(const DistillLoss& a, const Pair& pair, const Hard& hard, float by) {
    const double apart = pair.of_s.log() - pair.of_t.log();  // log p - log q = y - x + apart
    const F32 by_q = set_f32(by * pair.of_s.inverse()), by_p = set_f32(by * pair.of_t.inverse());
    double first = 0.0, second = 0.0, d;
    if constexpr (kKind == 0) {
        const auto both = [&](int64_t k, int64_t count, F32* one, F32*) __attribute__((always_inline)) {
            const F32 x = pair.x(k, count), y = pair.y(k, count);
            const F32 ey = power_part(y, count);
            *one = add(*one, mul(ey, sub(y, x)));
            pair.write(hard, k, count, sub(mul(power(x), by_q), mul(ey, by_p)));
        };
        sums(0, a.vocab, &first, &second, both);
        return first / pair.of_t.sum + apart;
    } else if constexpr (kKind == 1) {
        const auto divergence = [&](int64_t k, int64_t count, F32* one, F32*) __attribute__((always_inline)) {
            const F32 x = pair.x(k, count), y = pair.y(k, count);
            *one = add(*one, mul(power_part(x, count), sub(x, y)));
        };
        sums(0, a.vocab, &first, &second, divergence);
        const double mean = first / pair.of_s.sum;
        const F32 less = set_f32(static_cast<float>(mean));
        each(0, a.vocab, [&](int64_t k, int64_t count) __attribute__((always_inline)) {
            const F32 x = pair.x(k, count), y = pair.y(k, count);
            pair.write(hard, k, count, mul(mul(power(x), by_q), sub(sub(x, y), less)));
        });
        d = mean - apart;
    } else {
        F32 q, p;
        const auto divergence = [&](int64_t k, int64_t count, F32* one, F32* two) __attribute__((always_inline)) {
            const F32 x = pair.x(k, count), y = pair.y(k, count);
            const F32 ex = power_part(x, count), ey = power_part(y, count);
            pair.over_mean(x, y, ex, ey, &q, &p);
            *one = add(*one, mul(ex, q));
            *two = add(*two, mul(ey, p));
        };
        sums(0, a.vocab, &first, &second, divergence);
        const double mean = first / pair.of_s.sum, beta = a.beta;
        const F32 less = set_f32(static_cast<float>(mean)), share = set_f32(1.0f - a.beta);
        each(0, a.vocab, [&](int64_t k, int64_t count) __attribute__((always_inline)) {
            const F32 x = pair.x(k, count), y = pair.y(k, count), ex = power(x);
            pair.over_mean(x, y, ex, power(y), &q, &p);
            pair.write(hard, k, count, mul(mul(mul(ex, by_q), share), sub(q, less)));
        });
        d = beta * (second / pair.of_t.sum - __builtin_log(beta)) + (1.0 - beta) * (mean - __builtin_log(1.0 - beta));
    }
    return d;
}

// Kept ids of a row in rising order, those outside of the vocabulary left out; returns how many.
int64_t sorted(const DistillLoss& a, const int32_t* ids, int32_t* out) {
    int64_t count = 0;
    for (int64_t j = 0; j < a.k; ++j) {
        if (ids[j] < 0 || ids[j] >= a.vocab) continue;
        int64_t to = count++;
        for (; to > 0 && out[to - 1] > ids[j]; --to) out[to] = out[to - 1];
        out[to] = ids[j];
    }
    return count;
}

// D of k kept ids and one bucket for the others: the stretches of the row between kept ids.
double kept(const DistillLoss& a, int64_t i, const Pair& pair, const Hard& hard, float by) {
    const float* x = pair.s;
    const Sum& all = pair.of_s;
    const int32_t* ids = a.ids + i * a.k;
    const float* logp = a.logp + i * a.k;
    auto* order = static_cast<int32_t*>(scratch(kSlotSums, a.k * sizeof(int32_t) + 64));
    auto* z = static_cast<float*>(scratch(kSlotOut, a.k * sizeof(float) + 64));
    const int64_t count = sorted(a, ids, order);
    const auto others = [&](const auto& stretch) __attribute__((always_inline)) {
        for (int64_t j = 0; j <= count; ++j)
            stretch(j == 0 ? int64_t{0} : order[j - 1] + int64_t{1}, j < count ? int64_t{order[j]} : a.vocab);
    };
    F32 highest = set_f32(-__builtin_inff());
    others([&](int64_t first, int64_t last) __attribute__((always_inline)) {
        each(first, last, [&](int64_t k, int64_t part) __attribute__((always_inline)) {
            highest = max(highest, part_of(x, k, part));
        });
    });
    const float most = largest_of_lanes(highest);
    const F32 top = set_f32(most);
    double left = 0.0, unused = 0.0;
    others([&](int64_t first, int64_t last) __attribute__((always_inline)) {
        sums(first, last, &left, &unused, [&](int64_t k, int64_t part, F32* sum, F32*) __attribute__((always_inline)) {
            *sum = add(*sum, power_part(sub(part_of(x, k, part), top), part));
        });
    });
    const bool rest = left > 0.0;
    const double p_rest = rest ? __builtin_exp(static_cast<double>(a.log_rest[i])) : 0.0;
    double total = p_rest, kept_sum = 0.0;  // of the teacher; of the student, in units of e^all.most
    const auto inside = [&](int64_t j) __attribute__((always_inline)) { return ids[j] >= 0 && ids[j] < a.vocab; };
    for (int64_t j = 0; j < a.k; ++j) {
        if (!inside(j)) continue;
        z[j] = x[ids[j]];
        kept_sum += __builtin_exp(static_cast<double>(z[j]) - all.most);
        total += __builtin_exp(static_cast<double>(logp[j]));
    }
    const double rest_sum = rest ? left * __builtin_exp(static_cast<double>(most) - all.most) : 0.0;
    const double log_sum = __builtin_log(kept_sum + rest_sum) + all.most, log_total = __builtin_log(total);
    double d = 0.0;
    if (p_rest > 0.0) d = p_rest / total * (a.log_rest[i] - log_total - (__builtin_log(left) + most - log_sum));
    // Of the others q is e^(x - most) * to_q, and the teacher's p_rest is handed out in its proportions.
    const double to_q = rest ? __builtin_exp(most - log_sum) : 0.0, to_p = rest ? p_rest / total / left : 0.0;
    const F32 share = set_f32(static_cast<float>(by * (to_q - to_p)));
    others([&](int64_t first, int64_t last) __attribute__((always_inline)) {
        each(first, last, [&](int64_t k, int64_t part) __attribute__((always_inline)) {
            pair.write(hard, k, part, mul(power(sub(part_of(x, k, part), top)), share));
        });
    });
    for (int64_t j = 0; j < a.k; ++j) {
        if (!inside(j)) continue;
        const double log_p = logp[j] - log_total, log_q = z[j] - log_sum, q = __builtin_exp(log_q);
        const double p = __builtin_exp(log_p);
        if (p > 0.0) d += p * (log_p - log_q);
        const double right = ids[j] == hard.label ? 1.0 : 0.0, also = hard.label >= 0 ? hard.by * (q - right) : 0.0;
        pair.out[ids[j]] = static_cast<float>(by * (q - p) + also);
    }
    return d;
}

// Numbers begin .. end - 1 of row i of the student become `value`.
void fill(const DistillLoss& a, int64_t i, int64_t begin, int64_t end, float value) {
    for (int64_t k = begin; k < end; k += 16) store_part(a.z_s, i * a.stride_s + k, a.s_dtype, set_f32(value), end - k);
}

// A row over T in fp32: as it lies, or in memory of this thread.
float* floats(const void* z, int64_t at, int dtype, const DistillLoss& a, Slot slot) {
    if (dtype == kFloat32 && a.t == 1.0f) return const_cast<float*>(static_cast<const float*>(z)) + at;
    auto* x = static_cast<float*>(scratch(slot, (a.vocab + 16) * sizeof(float)));
    const F32 scale = set_f32(1.0f / a.t);
    for (int64_t k = 0; k < a.vocab; k += 16) store_f32(x + k, mul(load_part_as(z, at + k, dtype, a.vocab - k), scale));
    return x;
}

void row(const DistillLoss& a, int64_t i) {
    const float weight = a.weight[i];
    float* loss = a.loss + 2 * i;
    fill(a, i, weight == 0.0f ? 0 : a.vocab, a.v, 0.0f);
    loss[0] = loss[1] = 0.0f;
    if (weight == 0.0f) return;
    Pair pair{};
    float* s = floats(a.z_s, i * a.stride_s, a.s_dtype, a, kSlotX);
    pair.s = pair.t = s;
    pair.out = a.s_dtype == kFloat32 ? static_cast<float*>(a.z_s) + i * a.stride_s : s;
    pair.of_s = pair.of_t = sum_of(s, 1.0f, a.vocab);
    if (a.z_t != nullptr) {
        pair.t = floats(a.z_t, i * a.stride_t, a.t_dtype, a, kSlotRows);
        pair.of_t = sum_of(pair.t, 1.0f, a.vocab);
    }
    if (!pair.of_s.finite || !pair.of_t.finite) {
        fill(a, i, 0, a.vocab, __builtin_nanf(""));
        loss[0] = loss[1] = __builtin_nanf("");
        return;
    }
    const double beta = a.beta;
    if (a.kind == 2) {
        pair.log_q = static_cast<float>(__builtin_log(1.0 - beta) - pair.of_s.log());
        pair.log_p = static_cast<float>(__builtin_log(beta) - pair.of_t.log());
        pair.share_q = static_cast<float>((1.0 - beta) / pair.of_s.sum);
        pair.share_p = static_cast<float>(beta / pair.of_t.sum);
    }
    const Hard hard = hard_of(a, i, s, pair.of_s);
    const float by = weight * a.t;
    const double d = a.kind == 0   ? dense<0>(a, pair, hard, by)
                     : a.kind == 1 ? dense<1>(a, pair, hard, by)
                     : a.kind == 2 ? dense<2>(a, pair, hard, by)
                                   : kept(a, i, pair, hard, by);
    if (a.s_dtype != kFloat32)
        for (int64_t k = 0; k < a.vocab; k += 16)
            store_part(a.z_s, i * a.stride_s + k, a.s_dtype, part_of(s, k, min_of(16, a.vocab - k)), a.vocab - k);
    loss[0] = static_cast<float>(weight * (static_cast<double>(a.t) * a.t * d));
    loss[1] = static_cast<float>(weight * hard.loss);
}

}  // namespace distill

void distill_loss(const DistillLoss& a) {
    parallel(a.n, a.vocab * 3.0 + 100, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) distill::row(a, i);
    });
}

}  // namespace PERCARD_ISA
}  // namespace percard
