// What one token needs beside quantized products: rows of ordinary weights, and attention to what came before.
#pragma once

#include "powers.h"
#include "product.h"
#include "tokens.h"

namespace arrondi {
namespace ARRONDI_PATH {

// Rows first … last of the weight. Four sums for each token, so that one addition need not wait for the one before.
template <int kTokens>
inline void dense_tokens(const Dense& d, int first, int last) {
    constexpr int kSums = kTokens == 1 ? 4 : 2;
    const int whole = d.k / (16 * kSums) * (16 * kSums);
    const int64_t size = d.type == Type::f32 ? 4 : 2;
    for (int n = first; n < last; n++) {
        const char* row = static_cast<const char*>(d.weight) + n * d.ldw * size;
        Floats sum[kTokens][kSums];
        for (int t = 0; t < kTokens; t++)
            for (int s = 0; s < kSums; s++) sum[t][s] = zero_floats();
        for (int c = 0; c < whole; c += 16 * kSums) {
            for (int line = 0; line < 16 * kSums * size; line += 64) __builtin_prefetch(row + c * size + 4096 + line);
            for (int s = 0; s < kSums; s++) {
                const Floats w = load_type(row, d.type, c + 16 * s);
                for (int t = 0; t < kTokens; t++)
                    sum[t][s] = fma(w, load_floats(d.x + static_cast<int64_t>(t) * d.k + c + 16 * s), sum[t][s]);
            }
        }
        for (int t = 0; t < kTokens; t++) {
            for (int s = 1; s < kSums; s++) sum[t][0] = add(sum[t][0], sum[t][s]);
            float y = arrondi::ARRONDI_PATH::sum(sum[t][0]);
            for (int c = whole; c < d.k; c++) y += one_of(row, d.type, c) * d.x[static_cast<int64_t>(t) * d.k + c];
            d.y[static_cast<int64_t>(t) * d.n + n] = d.bias == nullptr ? y : y + d.bias[n];
        }
    }
}

inline void dense(const Dense& d, int first, int last) {
    switch (d.m) {
        case 1: return dense_tokens<1>(d, first, last);
        case 2: return dense_tokens<2>(d, first, last);
        case 3: return dense_tokens<3>(d, first, last);
        case 4: return dense_tokens<4>(d, first, last);
        default: return;
    }
}

inline void store_attended(const Attention& a, int at, Floats y) {
    if (a.type == Type::f32)
        store_floats(static_cast<float*>(a.y) + at, y);
    else
        store_low_halves(static_cast<uint16_t*>(a.y) + at, bf16_bits(y));
}

// One head of keys with the queries that share it. `scores` holds length numbers, rounded up to sixteen.
inline void attend(const Attention& a, int head, float* scores) {
    const int shared = a.heads / a.key_heads, width = a.width / 16;
    const int64_t size = a.type == Type::f32 ? 4 : 2;
    const char* keys = static_cast<const char*>(a.keys) + head * a.key_head_stride * size;
    const char* values = static_cast<const char*>(a.values) + head * a.value_head_stride * size;
    for (int q = head * shared; q < (head + 1) * shared; q++) {
        Floats query[16], sum[16];
        for (int i = 0; i < width; i++) query[i] = mul(load_type(a.query, a.type, q * a.width + 16 * i), splat(a.scale));
        float top = -__builtin_inff();
        for (int t = 0; t < a.length; t += 4) {
            Floats s[4];
            for (int j = 0; j < 4; j++) {
                s[j] = zero_floats();
                const int64_t key = (t + j < a.length ? t + j : t) * a.key_stride;
                for (int i = 0; i < width; i++) s[j] = fma(query[i], load_type(keys, a.type, key + 16 * i), s[j]);
            }
            store_sums(scores + t, s[0], s[1], s[2], s[3]);
        }
        for (int t = a.length; t % 16 != 0; t++) scores[t] = -__builtin_inff();
        bool unordered = false;
        for (int t = 0; t < a.length; t++) {
            top = scores[t] > top ? scores[t] : top;
            unordered |= scores[t] != scores[t];
        }
        if (unordered || top - top != 0.0f) {
            // A score that is NaN, or the largest one infinite: e^(s - top) has no value, nor has the sum of them.
            for (int i = 0; i < width; i++) store_attended(a, q * a.width + 16 * i, splat(__builtin_nanf("")));
            continue;
        }
        Floats all = zero_floats();
        for (int t = 0; t < a.length; t += 16) {
            // e^s as a power of two; below 2^-125 nothing is left of it.
            const Floats power = max(mul(sub(load_floats(scores + t), splat(top)), splat(1.44269504f)), splat(-125.0f));
            store_floats(scores + t, exp2_of(power));
        }
        for (int t = a.length; t % 16 != 0; t++) scores[t] = 0.0f;
        for (int t = 0; t < a.length; t += 16) all = add(all, load_floats(scores + t));
        for (int i = 0; i < width; i++) sum[i] = zero_floats();
        for (int t = 0; t < a.length; t++) {
            const Floats weight = splat(scores[t]);
            for (int i = 0; i < width; i++)
                sum[i] = fma(weight, load_type(values, a.type, t * a.value_stride + 16 * i), sum[i]);
        }
        const Floats share = splat(1.0f / arrondi::ARRONDI_PATH::sum(all));
        for (int i = 0; i < width; i++) store_attended(a, q * a.width + 16 * i, mul(sum[i], share));
    }
}

// All heads of one token.
inline void rotate(const Rotation& r, int row) {
    const int half = r.width / 2, parts = (half + 15) / 16;
    const int64_t angle = static_cast<int64_t>(row) * r.width;
    for (int head = 0; head < r.heads + r.key_heads; head++) {
        const int64_t at = row * r.ldx + static_cast<int64_t>(head) * r.width;
        const float* norm = head < r.heads ? r.norm : r.key_norm;
        Floats first[8], second[8];
        Floats squares = zero_floats();
        for (int i = 0; i < parts; i++) {
            first[i] = load_some(r.x, r.type, at + 16 * i, at + half);
            second[i] = load_some(r.x, r.type, at + half + 16 * i, at + r.width);
            squares = fma(first[i], first[i], fma(second[i], second[i], squares));
        }
        if (norm != nullptr) {
            const float mean = arrondi::ARRONDI_PATH::sum(squares) / static_cast<float>(r.width) + r.eps;
            const Floats unit = div(splat(1.0f), sqrt(splat(mean)));
            for (int i = 0; i < parts; i++) {
                first[i] = mul(mul(first[i], unit), load_some(norm, Type::f32, 16 * i, half));
                second[i] = mul(mul(second[i], unit), load_some(norm, Type::f32, half + 16 * i, r.width));
            }
        }
        for (int i = 0; i < parts; i++) {
            const int64_t low = angle + 16 * i, high = low + half, middle = angle + half, end = angle + r.width;
            const Floats turned = mul(second[i], load_some(r.sin, r.type, low, middle));
            const Floats a = sub(mul(first[i], load_some(r.cos, r.type, low, middle)), turned);
            const Floats b = fma(second[i], load_some(r.cos, r.type, high, end), mul(first[i], load_some(r.sin, r.type, high, end)));
            const int count = half - 16 * i < 16 ? half - 16 * i : 16;
            store_some(r.x, r.type, at + 16 * i, count, a);
            store_some(r.x, r.type, at + half + 16 * i, count, b);
        }
    }
}

}  // namespace ARRONDI_PATH
}  // namespace arrondi
