// From the integer sums of a span of columns to float results: zero points, scales, offsets, bias, type.
#pragma once

#include "activations.h"
#include "decode.h"

namespace arrondi {
namespace ARRONDI_PATH {

inline const int32_t* sums_of(const Product& p, int tile, int span) {
    return p.tile_sum + (static_cast<int64_t>(tile) * p.spans + span) * kRowsMost;
}
// One scale for the row and one for the token: the integer sum goes on, exact, to the row's end. An offset needs what each
// span's digits add up to, so with it every span is added for itself.
template <int kDigits>
inline bool whole_row(const Product& p) {
    return kDigits < 3 && by_token(p) && p.weight.groups == 1 && (!has_offset(p.weight) || p.integers) &&
           (p.digits == 1 || p.weight.k <= kZeroPointColumns);
}
// By token, the results are multiplied with the scale at the end.
inline const float* scales_of(const Product& p, int tile) { return p.tile_scale + static_cast<int64_t>(tile) * kRowsMost; }
// Otherwise there is one for every span; null by token.
inline const float* scales_of(const Product& p, int tile, int span) {
    return by_token(p) ? nullptr : p.tile_scale + (static_cast<int64_t>(tile) * p.spans + span) * kRowsMost;
}

// The digits of one token's sum as one number.
template <int kDigits>
inline Ints joined(const Ints* sum) {
    if constexpr (kDigits == 2) return add(shift_left<8>(sum[0]), sum[1]);
    return sum[0];
}

// The sums of one span and sixteen columns as a float: `sum` holds the digits of one token, from the highest on.
template <int kDigits>
inline Floats value_of(const Ints* sum) {
    Floats value = to_floats(sum[0]);
    for (int i = 1; i < kDigits; i++) value = fma(value, splat(256.0f), to_floats(sum[i]));
    return value;
}

// What the digits of one token add up to.
template <int kDigits>
inline float all_of(const int32_t* digit_sum) {
    float all = static_cast<float>(digit_sum[0]);
    for (int i = 1; i < kDigits; i++) all = all * 256.0f + static_cast<float>(digit_sum[i]);
    return all;
}

// -zero · (sum of the digits): where the integer sum of a row starts, so that zero points cost nothing and are exact.
template <int kRowsHere>
inline void start_sums(const Weight& w, const uint8_t* zeros, const int32_t* digit_sum, Ints* sum) {
    if (zeros != nullptr) {
        const Ints zero = widen_bytes(zeros);
        for (int r = 0; r < kRowsHere; r++) sum[r] = mul(zero, splat(-digit_sum[r]));
    } else {
        for (int r = 0; r < kRowsHere; r++) sum[r] = splat(-digit_sum[r] * w.zero_all);
    }
}

// Sixteen results of one token.
inline void store_result(const Product& p, int token, int block, Floats value) {
    const int column = block * kBlock, count = p.weight.n - column < kBlock ? p.weight.n - column : kBlock;
    const int64_t at = token * p.ldy + column;
    if (p.bias != nullptr) {
        float some[16] = {0};
        if (count == kBlock)
            value = add(value, load_floats(p.bias + column));
        else {
            for (int i = 0; i < count; i++) some[i] = p.bias[column + i];
            value = add(value, load_floats(some));
        }
    }
    if (p.residual != nullptr) {
        const int64_t start = token * p.ldr + column;
        value = add(value, load_some(p.residual, p.y_type, start, start + count));
    }
    store_some(p.y, p.y_type, at, count, value);
}

inline void store_integers(const Product& p, int token, int block, Ints value) {
    const int column = block * kBlock, count = p.weight.n - column < kBlock ? p.weight.n - column : kBlock;
    int32_t lanes[16];
    store_ints(lanes, value);
    __builtin_memcpy(static_cast<int32_t*>(p.y) + token * p.ldy + column, lanes, 4 * static_cast<size_t>(count));
}

}  // namespace ARRONDI_PATH
}  // namespace arrondi
