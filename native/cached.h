// Attention of one token to keys and values of 8, 4 or 2 bits. Where codes and scales lie is said in tensor/states.py: sixteen bytes in
// a row belong to sixteen lanes, which are tokens of keys and channels of values, and a byte holds the codes of the next channels or
// tokens. So a shift, a mask and a conversion give sixteen codes, which serve every query that shares the head.
#pragma once

#include "token.h"

namespace arrondi {
namespace ARRONDI_PATH {

constexpr int kWidest = 256;  // of a head

template <int kBits, int kNext>
inline Floats code_of(Ints bytes) {
    if (kBits == 8) return to_floats(bytes);
    return to_floats(and_ints(shift_right<kBits * kNext>(bytes), splat(int32_t{(1 << kBits) - 1})));
}

// sum[q][·] += weight[q][next] · code for the codes of one row of bytes. Two sums, so that one product need not wait for another.
template <int kBits, int kQueries, int kNext>
inline void add_codes(Ints bytes, const float* const* weight, int at, Floats (*sum)[2]) {
    if constexpr (kNext < 8 / kBits) {
        const Floats code = code_of<kBits, kNext>(bytes);
        for (int q = 0; q < kQueries; q++)
            sum[q][kNext & 1] = fma(splat(weight[q][at + kNext]), code, sum[q][kNext & 1]);
        add_codes<kBits, kQueries, kNext + 1>(bytes, weight, at, sum);
    }
}

// Rows of bytes, `step` apart, each with the codes of 8 / bits weights. An even number of rows.
template <int kBits, int kQueries>
inline void add_rows(const uint8_t* bytes, int64_t step, int rows, const float* const* weight, int at, Floats (*sum)[2]) {
    constexpr int kPer = 8 / kBits;
    for (int r = 0; r < rows; r++) {
        const Ints row = widen_bytes(bytes + r * step);
        if (kPer > 1) {
            add_codes<kBits, kQueries, 0>(row, weight, at + r * kPer, sum);
        } else {
            const Floats code = to_floats(row);
            for (int q = 0; q < kQueries; q++) {
                const Floats more = fma(splat(weight[q][at + r]), code, sum[q][0]);
                sum[q][0] = sum[q][1];
                sum[q][1] = more;
            }
        }
    }
}

// Scores of the packed keys of a head for queries that share it; `scores` are of the first token of the first block.
template <int kBits, int kQueries>
inline void packed_scores(const PackedStates& k, int width, int head, const float* query, float* scores, int64_t apart) {
    constexpr int kPer = 8 / kBits;
    const uint8_t* codes = k.codes + head * k.codes_stride;
    const int64_t scale_at = head * k.scale_stride, bytes = static_cast<int64_t>(width) / kPer * k.block;
    const int groups = k.groups < 1 ? 1 : k.groups, size = width / groups;
    alignas(64) float scaled[kQueries][kWidest];
    float whole[kQueries][kWidest];  // of each group: Σ query
    const float* weight[kQueries];
    for (int q = 0; q < kQueries; q++) {
        weight[q] = k.groups == 0 ? scaled[q] : query + static_cast<int64_t>(q) * width;
        for (int g = 0; g < groups; g++) {
            whole[q][g] = 0.0f;
            for (int c = g * size; c < (g + 1) * size; c++) whole[q][g] += query[static_cast<int64_t>(q) * width + c];
        }
    }
    for (int64_t block = 0; block * k.block < k.tokens; block++, codes += bytes) {
        float base[kQueries] = {0};
        if (k.groups == 0) {  // scales follow channels: the query takes them up
            const int64_t at = scale_at + block * width;
            for (int q = 0; q < kQueries; q++) {
                Floats rest = zero_floats();
                for (int c = 0; c < width; c += 16) {
                    const Floats x = load_floats(query + static_cast<int64_t>(q) * width + c);
                    const Floats y = mul(x, load_type(k.scale, k.type, at + c));
                    store_floats(scaled[q] + c, y);
                    if (k.offset != nullptr) rest = fma(x, load_type(k.offset, k.type, at + c), rest);
                    rest = fma(y, splat(-k.lowest), rest);
                }
                base[q] = sum(rest);
            }
        }
        for (int lane = 0; lane < k.block; lane += 16) {
            Floats total[kQueries];
            for (int q = 0; q < kQueries; q++) total[q] = splat(base[q]);
            for (int g = 0; g < groups; g++) {
                Floats part[kQueries][2];
                for (int q = 0; q < kQueries; q++) part[q][0] = part[q][1] = zero_floats();
                add_rows<kBits, kQueries>(codes + lane + static_cast<int64_t>(g) * size / kPer * k.block, k.block, size / kPer,
                                          weight, g * size, part);
                const int64_t at = scale_at + (block * groups + g) * k.block + lane;
                const Floats scale = k.groups > 0 ? load_type(k.scale, k.type, at) : splat(k.unit);
                for (int q = 0; q < kQueries; q++) {
                    const Floats codes_of_group = add(part[q][0], part[q][1]);
                    if (k.groups == 0) {
                        total[q] = add(total[q], codes_of_group);
                        continue;
                    }
                    total[q] = fma(sub(codes_of_group, splat(k.lowest * whole[q][g])), scale, total[q]);
                    if (k.offset != nullptr) total[q] = fma(splat(whole[q][g]), load_type(k.offset, k.type, at), total[q]);
                }
            }
            for (int q = 0; q < kQueries; q++) store_floats(scores + q * apart + block * k.block + lane, total[q]);
        }
    }
}

// y[q] += Σ share · value over the packed values of a head; `share` is of the first token of the first block.
template <int kBits, int kQueries>
inline void packed_values(const PackedStates& v, int width, int head, const float* share, int64_t apart, float* y) {
    constexpr int kPer = 8 / kBits;
    const int groups = v.groups < 1 ? 1 : v.groups, size = width / groups, rows = v.block / kPer;
    const uint8_t* codes = v.codes + head * v.codes_stride;
    alignas(64) float scaled[kQueries][kLongestBlock];
    const float* weight[kQueries];
    for (int q = 0; q < kQueries; q++) weight[q] = scaled[q];
    for (int64_t block = 0; block * v.block < v.tokens; block++, codes += static_cast<int64_t>(rows) * width) {
        for (int g = 0; g < groups; g++) {
            const int64_t at = head * v.scale_stride + (block * groups + g) * v.block;
            Floats base[kQueries];
            for (int q = 0; q < kQueries; q++) {
                Floats rest = zero_floats();
                for (int t = 0; t < v.block; t += 16) {
                    // Tokens behind the last packed one are others' business.
                    const Floats p = load_some(share + q * apart, Type::f32, block * v.block + t, v.tokens);
                    const Floats w = mul(p, v.groups > 0 ? load_type(v.scale, v.type, at + t) : splat(v.unit));
                    store_floats(scaled[q] + t, w);
                    if (v.offset != nullptr) rest = fma(p, load_type(v.offset, v.type, at + t), rest);
                    rest = fma(w, splat(-v.lowest), rest);
                }
                base[q] = splat(sum(rest));
            }
            for (int c = g * size; c < (g + 1) * size; c += 16) {
                Floats part[kQueries][2];
                for (int q = 0; q < kQueries; q++) part[q][0] = base[q], part[q][1] = load_floats(y + q * width + c);
                add_rows<kBits, kQueries>(codes + c, width, rows, weight, 0, part);
                for (int q = 0; q < kQueries; q++) store_floats(y + q * width + c, add(part[q][0], part[q][1]));
            }
        }
    }
}

// The largest of some scores; NaN where one is, or the largest is infinite.
inline float top_of(const float* scores, int count) {
    float top = -__builtin_inff();
    bool unordered = false;
    for (int t = 0; t < count; t++) {
        top = scores[t] > top ? scores[t] : top;
        unordered |= scores[t] != scores[t];
    }
    return unordered || top - top != 0.0f ? __builtin_nanf("") : top;
}

// Scores become exp(score - top); their sum. NaN where the top is.
inline float shares_of(float* scores, int count) {
    const float top = top_of(scores, count);
    if (top != top) return top;
    Floats all = zero_floats();
    for (int t = 0; t < count; t += 16) {
        const Floats power = max(mul(sub(load_some(scores, Type::f32, t, count), splat(top)), splat(1.44269504f)), splat(-125.0f));
        float e[16];
        store_floats(e, exp2_of(power));
        for (int i = count - t; i < 16; i++) e[i] = 0.0f;
        const int some = count - t < 16 ? count - t : 16;
        __builtin_memcpy(scores + t, e, 4 * static_cast<size_t>(some));
        all = add(all, load_floats(e));
    }
    return sum(all);
}

template <int kQueries>
inline void any_scores(const PackedStates& k, int width, int head, const float* query, float* scores, int64_t apart) {
    switch (k.bits) {
        case 2: return packed_scores<2, kQueries>(k, width, head, query, scores, apart);
        case 4: return packed_scores<4, kQueries>(k, width, head, query, scores, apart);
        default: return packed_scores<8, kQueries>(k, width, head, query, scores, apart);
    }
}

template <int kQueries>
inline void any_values(const PackedStates& v, int width, int head, const float* share, int64_t apart, float* y) {
    switch (v.bits) {
        case 2: return packed_values<2, kQueries>(v, width, head, share, apart, y);
        case 4: return packed_values<4, kQueries>(v, width, head, share, apart, y);
        default: return packed_values<8, kQueries>(v, width, head, share, apart, y);
    }
}

// Some queries of a head.
template <int kQueries>
inline void attend_queries(const PackedAttention& a, int head, int first, float* memory) {
    const int width = a.width, new_keys = a.length - (a.keys.tokens - a.keys.skip), seen = a.length;
    const int new_values = a.length - (a.values.tokens - a.values.skip);
    const int64_t apart = scores_apart(a), size = a.type == Type::f32 ? 4 : 2;
    float* scores = memory + kLongestBlock;  // of the first seen token
    alignas(64) float query[kQueries * kWidest], y[kQueries * kWidest] = {0};
    for (int c = 0; c < kQueries * width; c += 16)
        store_floats(query + c, mul(load_floats(a.turned + first * width + c), splat(a.scale)));
    if (a.keys.tokens > a.keys.skip)
        any_scores<kQueries>(a.keys, width, head, query, scores - a.keys.skip, apart);
    const char* keys = static_cast<const char*>(a.new_keys) + head * a.new_key_head_stride * size;
    const char* values = static_cast<const char*>(a.new_values) + head * a.new_value_head_stride * size;
    float all[kQueries];
    for (int q = 0; q < kQueries; q++) {
        float* of = scores + q * apart;
        for (int t = 0; t < new_keys; t++) {
            Floats s = zero_floats();
            for (int c = 0; c < width; c += 16)
                s = fma(load_type(a.query, a.type, (first + q) * width + c), load_type(keys, a.type, t * a.new_key_stride + c), s);
            of[seen - new_keys + t] = sum(s) * a.scale;
        }
        all[q] = shares_of(of, seen);
        for (int t = -kLongestBlock; t < 0; t++) of[t] = 0.0f;  // tokens of the first block that are not seen
    }
    if (a.values.tokens > a.values.skip)
        any_values<kQueries>(a.values, width, head, scores - a.values.skip, apart, y);
    for (int q = 0; q < kQueries; q++) {
        const float* of = scores + q * apart + seen - new_values;
        const Floats share = splat(1.0f / all[q]);
        for (int c = 0; c < width; c += 16) {
            Floats total = load_floats(y + q * width + c);
            for (int t = 0; t < new_values; t++)
                total = fma(splat(of[t]), load_type(values, a.type, t * a.new_value_stride + c), total);
            total = mul(total, share);
            const int at = (first + q) * width + c;
            if (a.type == Type::f32)
                store_floats(static_cast<float*>(a.y) + at, total);
            else
                store_low_halves(static_cast<uint16_t*>(a.y) + at, bf16_bits(total));
        }
    }
}

inline void attend_packed(const PackedAttention& a, int head, float* memory) {
    const int shared = a.heads / a.key_heads;
    int q = head * shared;
    const int end = q + shared;
    for (; q + kTogether <= end; q += kTogether) attend_queries<kTogether>(a, head, q, memory);
    for (; q + 2 <= end; q += 2) attend_queries<2>(a, head, q, memory);
    for (; q < end; q++) attend_queries<1>(a, head, q, memory);
}

}  // namespace ARRONDI_PATH
}  // namespace arrondi
