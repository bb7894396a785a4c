// The sides of a training step's products, for one path. Included by path_*.cpp after hadamard.h.
#pragma once

#include "hadamard.h"
#include "training.h"

namespace arrondi {
namespace ARRONDI_PATH {

// Sixteen values of a row, zeros beyond its end.
inline Floats side(const Sides& s, int64_t row, int64_t column, Floats factor) {
    Floats v = mul(load_some(s.x, s.type, row * s.ldx + column, row * s.ldx + s.columns), factor);
    if (s.column != nullptr) v = mul(v, load_some(s.column, Type::f32, column, s.columns));
    return v;
}

inline Floats row_factor(const float* factors, int64_t row) { return splat(factors == nullptr ? 1.0f : factors[row]); }

// |v| as integers, which are in the order of the numbers, with NaN above all.
inline Ints size_of(Floats v) { return and_ints(as_ints(v), splat(int32_t{0x7fffffff})); }

inline void largest_of_rows(const Extremes& e, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
        const Floats factor = row_factor(e.of.row, row);
        Ints most = zero_ints();
        for (int64_t c = 0; c < e.of.columns; c += 16) most = max(most, size_of(side(e.of, row, c, factor)));
        int32_t lanes[16], found = 0;
        store_ints(lanes, most);
        for (int32_t lane : lanes) found = lane > found ? lane : found;
        __builtin_memcpy(e.out + row, &found, 4);
    }
}

inline void largest_of_columns(const Extremes& e, int64_t first, int64_t last) {
    constexpr int64_t kBand = 64;  // columns whose maxima stay in registers while all rows go by
    for (int64_t band = first; band < last; band += kBand) {
        Ints most[4] = {zero_ints(), zero_ints(), zero_ints(), zero_ints()};
        const int64_t end = band + kBand < last ? band + kBand : last;
        for (int64_t row = 0; row < e.of.rows; row++) {
            const Floats factor = row_factor(e.of.row, row);
            for (int64_t c = band, i = 0; c < end; c += 16, i++) most[i] = max(most[i], size_of(side(e.of, row, c, factor)));
        }
        int32_t lanes[64];
        for (int i = 0; i < 4; i++) store_ints(lanes + 16 * i, most[i]);
        __builtin_memcpy(e.out + band, lanes, static_cast<size_t>(end - band) * 4);
    }
}

// Every bit depends on every bit (the finalizer "lowbias32" of C. Wellons' search for such functions).
inline Ints mixed(Ints v) {
    v = mul(xor_ints(v, shift_right<16>(v)), splat(int32_t{0x7feb352d}));
    v = mul(xor_ints(v, shift_right<15>(v)), splat(static_cast<int32_t>(0x846ca68bu)));
    return xor_ints(v, shift_right<16>(v));
}

inline void round_codes(const CodeRounding& r, int64_t first, int64_t last) {
    alignas(64) static const int32_t kLanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const Floats lowest = splat(static_cast<float>(r.lowest)), highest = splat(static_cast<float>(r.highest));
    for (int64_t row = first; row < last; row++) {
        const Floats factor = row_factor(r.of.row, row);
        const Ints of_row = mixed(splat(static_cast<int32_t>(r.seed + static_cast<uint32_t>(row) * 0x9e3779b1u)));
        int8_t* out = r.codes + row * r.of.columns;
        for (int64_t c = 0; c < r.of.columns; c += 16) {
            Floats v = side(r.of, row, c, factor);
            if (r.stochastic) {
                const Ints place = add(load_ints(kLanes), splat(static_cast<int32_t>(c)));
                const Ints bits = shift_right<16>(mixed(add(of_row, mul(place, splat(static_cast<int32_t>(0x9e3779b1u))))));
                const Ints odd = sub(add(bits, bits), splat(int32_t{65535}));
                v = add(v, mul(to_floats(odd), splat(0x1p-17f)));  // within half a step, never half
            }
            const Ints codes = to_ints(min(max(v, lowest), highest));
            if (c + 16 <= r.of.columns) {
                store_low_bytes(reinterpret_cast<uint8_t*>(out + c), codes);
            } else {
                uint8_t lanes[16];
                store_low_bytes(lanes, codes);
                __builtin_memcpy(out + c, lanes, static_cast<size_t>(r.of.columns - c));
            }
        }
    }
}

inline void scale_sums(const SumScaling& s, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
        const Floats factor = row_factor(s.row, row);
        const int64_t at = row * s.columns;
        for (int64_t c = 0; c < s.columns; c += 16) {
            const int64_t count = s.columns - c < 16 ? s.columns - c : 16;
            Ints sums;
            if (count == 16) {
                sums = load_ints(s.sums + at + c);
            } else {
                int32_t lanes[16] = {};
                __builtin_memcpy(lanes, s.sums + at + c, static_cast<size_t>(count) * 4);
                sums = load_ints(lanes);
            }
            Floats v = mul(to_floats(sums), factor);
            if (s.column != nullptr) v = mul(v, load_some(s.column, Type::f32, c, s.columns));
            if (s.bias != nullptr) v = add(v, load_some(s.bias, Type::f32, c, s.columns));
            store_some(s.y, s.type, at + c, static_cast<int>(count), v);
        }
    }
}

}  // namespace ARRONDI_PATH
}  // namespace arrondi
