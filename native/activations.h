// Activations in tiles: as int8 digits with the scales and sums that go with them, as float32, or as pairs of bfloat16.
#pragma once

#include "kernels.h"

namespace arrondi {
namespace ARRONDI_PATH {

inline Floats load_type(const void* p, Type type, int64_t at) {
    switch (type) {
        case Type::f32: return load_floats(static_cast<const float*>(p) + at);
        case Type::bf16: return load_bf16(static_cast<const uint16_t*>(p) + at);
        default: return load_f16(static_cast<const uint16_t*>(p) + at);
    }
}

inline float one_of(const void* p, Type type, int64_t at) {
    uint16_t padded[16] = {0};
    if (type == Type::f32) return static_cast<const float*>(p)[at];
    padded[0] = static_cast<const uint16_t*>(p)[at];
    float out[16];
    store_floats(out, type == Type::bf16 ? load_bf16(padded) : load_f16(padded));
    return out[0];
}

// x[start … start + 16), zeros from `end` on.
inline Floats load_some(const void* p, Type type, int64_t start, int64_t end) {
    if (start + 16 <= end) return load_type(p, type, start);
    float some[16] = {0};
    for (int64_t i = start; i < end; i++) some[i - start] = one_of(p, type, i);
    return load_floats(some);
}

inline Ints bf16_bits(Floats v) {
    // To nearest, ties to even; a NaN keeps its top bits, the quiet one set by the value it came with.
    const Ints bits = as_ints(v);
    return shift_right<16>(add(bits, add(splat(int32_t{0x7fff}), and_ints(shift_right<16>(bits), splat(int32_t{1})))));
}

// y[at … at + count), at most sixteen numbers.
inline void store_some(void* y, Type type, int64_t at, int count, Floats value) {
    float lanes[16];
    uint16_t halves[16];
    if (type == Type::f32) {
        if (count == 16) return store_floats(static_cast<float*>(y) + at, value);
        store_floats(lanes, value);
        __builtin_memcpy(static_cast<float*>(y) + at, lanes, 4 * static_cast<size_t>(count));
        return;
    }
    // A NaN whose payload would round up to infinity's neighbour stays a NaN.
    store_floats(lanes, value);
    store_low_halves(halves, bf16_bits(value));
    for (int i = 0; i < count; i++)
        if (lanes[i] != lanes[i]) halves[i] = 0x7fc0;
    __builtin_memcpy(static_cast<uint16_t*>(y) + at, halves, 2 * static_cast<size_t>(count));
}

inline float rounded_to(float v, Type type) {
    if (type == Type::f32) return v;
    float out[16];
    if (type == Type::bf16) {
        store_floats(out, as_floats(shift_left<16>(bf16_bits(splat(v)))));
        return out[0];
    }
    return v;  // product() refuses float16
}

// One token's numbers, from `at` on.
struct Row {
    const void* x;
    Type type;
    int64_t at;
};

inline float absolute_largest(const Row& row, int start, int end) {
    Floats high = zero_floats();
    const Ints size = splat(int32_t{0x7fffffff});
    // Compared as integers, so that NaN counts as larger than everything.
    Ints most = as_ints(high);
    for (int c = start; c < end; c += 16)
        most = max(most, and_ints(as_ints(load_some(row.x, row.type, row.at + c, row.at + end)), size));
    int32_t lanes[16], best = 0;
    store_ints(lanes, most);
    for (int i = 0; i < 16; i++) best = lanes[i] > best ? lanes[i] : best;
    float value;
    __builtin_memcpy(&value, &best, 4);
    return value;
}

// The grid that numbers are rounded to: code - zero point = x / step, between low and high.
struct Grid {
    float step, low, high;
};

// As it is given, or as arrondi.tensor.ranges.fits finds it: symmetric, or from the smallest to the largest with zero between them.
inline Grid grid_of(const Product& p, const Row& row, int start, int end) {
    const float lowest = static_cast<float>(p.lowest), highest = static_cast<float>(p.highest), levels = highest - lowest;
    const float size = absolute_largest(row, start, end);
    if (!(size - size == 0.0f)) return {size - size, 0.0f, 0.0f};
    if (p.x_scale != nullptr) {
        const float zero = p.digits == 1 ? 0.0f : static_cast<float>(*p.x_zero);
        return {*p.x_scale, lowest - zero, highest - zero};
    }
    const auto stored = [&](float step) {
        if (step == 0.0f) return 1.0f;
        if (step >= 0x1p-126f || p.step_type == Type::f32) return rounded_to(step, p.step_type);
        // The instructions that round to bfloat16 take subnormal numbers for zero.
        uint32_t bits;
        __builtin_memcpy(&bits, &step, 4);
        bits = (bits + 0x7fffu + (bits >> 16 & 1)) & 0xffff0000u;
        bits = bits != 0 ? bits : 0x10000u;
        __builtin_memcpy(&step, &bits, 4);
        return step;
    };
    if (p.digits == 1) return {stored(size / (levels / 2.0f)), lowest, highest};
    Floats least = zero_floats(), most = zero_floats();
    for (int c = start; c < end; c += 16) {
        const Floats x = load_some(row.x, row.type, row.at + c, row.at + end);
        least = min(least, x);
        most = max(most, x);
    }
    const float low = smallest(least), step = stored(largest(most) / levels - low / levels);
    float lanes[16];
    store_floats(lanes, min(max(round_even(splat(lowest - low / step)), splat(lowest)), splat(highest)));
    return {step, lowest - lanes[0], highest - lanes[0]};
}

// Where bytes of a tile lie: rows take turns with every four of them, or with every chunk of a matrix unit.
struct Cells {
    uint8_t* out;
    int rows, chunk;

    // The byte `at` of a row; `at` and what is written there lie within four bytes, or a chunk.
    inline uint8_t* place(int64_t at, int row) const {
        if (chunk == 0) return out + at * rows + 4 * row;
        return out + at / chunk * chunk * kRowsMost + row * chunk + at % chunk;
    }
    // Sixteen bytes of a row, `at` a multiple of sixteen.
    inline void put(int64_t at, int row, const uint8_t* bytes) const {
        if (chunk != 0)
            __builtin_memcpy(place(at, row), bytes, 16);
        else
            for (int q = 0; q < 16; q += 4) __builtin_memcpy(place(at + q, row), bytes + q, 4);
    }
};

// One token's numbers [start, end) → integers → digits, `width` columns (padded with zeros); the digits of one number are rows from
// `first` on, the lowest last. `kDigits` 0: words, even_words() of all tokens, then odd_words().
template <int kDigits, class Integers>
inline void digits_of(const Row& row, int start, int end, int width, const Integers& integers, const Cells& cells, int first,
                      int32_t* sums) {
    constexpr int kSums = kDigits == 0 ? 1 : kDigits;
    Ints total[kSums];
    for (int d = 0; d < kSums; d++) total[d] = zero_ints();
    for (int c = 0; c < width; c += 16) {
        const Floats x = load_some(row.x, row.type, row.at + start + c, row.at + (end > start + c ? end : start + c));
        Ints digit[kSums], rest = integers(x);
        for (int d = kDigits - 1; d > 0; d--) {
            // The low byte as a signed number; what is left is a multiple of 256.
            const Ints low = and_ints(rest, splat(int32_t{255}));
            const Ints borrowed = shift_left<1>(and_ints(low, splat(int32_t{128})));
            digit[d] = sub(low, borrowed);
            rest = sub(rest, digit[d]);
            // An arithmetic shift by 8 of a multiple of 256, from logical ones.
            rest = sub(shift_right<8>(add(rest, splat(int32_t{1 << 30}))), splat(int32_t{1 << 22}));
        }
        digit[0] = rest;
        if constexpr (kDigits == 0) {
            total[0] = add(total[0], digit[0]);
            uint16_t words[16];
            store_low_halves(words, digit[0]);
            for (int q = 0; q < 4; q++) {
                const uint16_t* w = words + 4 * q;
                const uint16_t even[2] = {w[0], w[2]}, odd[2] = {w[1], w[3]};
                const int64_t at = 2 * (static_cast<int64_t>(start) + c + 4 * q);
                __builtin_memcpy(cells.place(at, first), even, 4);
                __builtin_memcpy(cells.place(at + 4, first), odd, 4);
            }
            continue;
        }
        uint8_t bytes[16];
        for (int d = 0; d < kDigits; d++) {
            total[d] = add(total[d], digit[d]);
            store_low_bytes(bytes, digit[d]);
            cells.put(start + c, first + d, bytes);
        }
    }
    for (int d = 0; d < kSums; d++) {
        int32_t lanes[16];
        store_ints(lanes, total[d]);
        int32_t all = 0;
        for (int i = 0; i < 16; i++) all += lanes[i];
        sums[d] = all;
    }
}

// x / rms(x) · norm, in memory of the tile.
inline Row normed(const Product& p, int tile, const Row& row) {
    const int k = p.weight.k, padded = (k + 15) / 16 * 16;
    float* out = p.changed + static_cast<int64_t>(tile) * padded;
    Floats squares = zero_floats();
    for (int c = 0; c < k; c += 16) {
        const Floats x = load_some(row.x, row.type, row.at + c, row.at + k);
        squares = fma(x, x, squares);
        store_floats(out + c, x);
    }
    const Floats mean = splat(sum(squares) / static_cast<float>(k) + p.eps), unit = div(splat(1.0f), sqrt(mean));
    for (int c = 0; c < k; c += 16)
        store_floats(out + c, mul(mul(load_floats(out + c), unit), load_some(p.norm, Type::f32, c, k)));
    return {out, Type::f32, 0};
}

// Token `t` of a tile of `count` as float32 or pairs of bfloat16.
inline void pack_floats(const Product& p, const Row& row, int t, const Cells& cells) {
    const int padded = whole_columns(p, p.weight.steps * 4 * step_quads(p.weight.kind)), k = p.weight.k;
    for (int c = 0; c < padded; c += 16) {
        const Floats x = load_some(row.x, row.type, row.at + c, row.at + (k > c ? k : c));
        if (p.pairs) {
            uint16_t halves[16];
            store_low_halves(halves, bf16_bits(x));
            for (int i = 0; i < 16; i += 8) cells.put(2 * (static_cast<int64_t>(c) + i), t, reinterpret_cast<const uint8_t*>(halves + i));
        } else {
            float lanes[16];
            store_floats(lanes, x);
            for (int i = 0; i < 16; i++) __builtin_memcpy(cells.place(4 * (static_cast<int64_t>(c) + i), t), lanes + i, 4);
        }
    }
}

// The same as digits, with their scales and sums.
inline void pack_digits(const Product& p, const Row& row, int tile, int t, const Cells& cells) {
    const int padded = p.weight.steps * 4 * step_quads(p.weight.kind), k = p.weight.k;
    const int rows = rows_of_token(p);
    Grid grid{};
    if (by_token(p)) {
        grid = grid_of(p, row, 0, k);
        p.tile_scale[static_cast<int64_t>(tile) * kRowsMost + t] = grid.step;
    }
    float largest = 0.0f, inverse = 0.0f;
    for (int s = 0; s < p.spans; s++) {
        const int start = s * p.span, end = start + p.span < k ? start + p.span : k;
        const int width = (start + p.span < padded && s + 1 < p.spans ? start + p.span : padded) - start;
        const int64_t at = (static_cast<int64_t>(tile) * p.spans + s) * kRowsMost;
        int32_t* sums = p.tile_sum + at + rows * t;
        const auto pack = [&](const auto& integers) {
            if (p.words) return digits_of<0>(row, start, end, width, integers, cells, t, sums);
            if (p.digits == 1) return digits_of<1>(row, start, end, width, integers, cells, t, sums);
            if (p.digits == 2) return digits_of<2>(row, start, end, width, integers, cells, 2 * t, sums);
            digits_of<3>(row, start, end, width, integers, cells, 3 * t, sums);
        };
        if (p.rounded) {
            // A group may have several spans, where those of the weight are shorter.
            if (p.x_group != 0) {
                if (start % p.x_group == 0) grid = grid_of(p, row, start, start + p.x_group < k ? start + p.x_group : k);
                p.tile_scale[at + t] = grid.step;
            }
            pack([&](Floats x) { return to_ints(min(max(div(x, splat(grid.step)), splat(grid.low)), splat(grid.high))); });
            continue;
        }
        // Numbers are kept as multiples of largest / range. Every digit fits int8 up to 127 · 257 and 127 · 65793; the
        // latter less what rounding the reciprocal may add.
        const float range = p.digits == 2 ? 32639.0f : 8355700.0f;
        if (start % p.x_span == 0) {
            largest = absolute_largest(row, start, start + p.x_span < k ? start + p.x_span : k);
            if (largest < 0x1p-100f) largest = 0x1p-100f;  // the reciprocal stays finite; what is lost is below any sum
            inverse = range / largest;
        }
        const bool finite = largest - largest == 0.0f;
        if (finite)
            pack([&](Floats x) { return to_ints(mul(x, splat(inverse))); });
        else
            pack([](Floats) { return zero_ints(); });  // what is no number has no digits
        p.tile_scale[at + t] = finite ? largest / range : largest - largest;
    }
}

}  // namespace ARRONDI_PATH
}  // namespace arrondi
