// The grid of each group with the least error, for one path; see arrondi.tensor.ranges.search, whose tries these are, in its
// order. A group and the weights of its columns stay in the core's nearest cache for all of them.
#pragma once

#include "quantize.h"

namespace arrondi {
namespace ARRONDI_PATH {

constexpr float kCoarse[] = {1.0f, 0.93f, 0.86f, 0.79f, 0.72f, 0.65f, 0.58f, 0.51f, 0.44f};
constexpr float kFine[] = {-0.035f, -0.0175f, 0.0175f, 0.035f};

inline int64_t padded(int64_t count) { return (count + 15) / 16 * 16; }

// One group as float32, filled up with zeros to whole sixteens.
template <Type kType>
inline bool load_group_as(const void* x, int64_t at, int64_t count, float* to, Ends& ends) {
    Floats poison = zero_floats();
    ends = ends_of<kType>(x, at, count, poison);
    each16<kType>(x, at, count, [&](Floats v, int64_t place, int64_t) { store_floats(to + place, v); });
    for (int64_t i = count; i < padded(count); i++) to[i] = 0;
    return sum(poison) == 0;
}

inline bool load_group(const Groups& g, int64_t at, int64_t count, float* to, Ends& ends) {
    switch (g.x_type) {
        case Type::f32: return load_group_as<Type::f32>(g.x, at, count, to, ends);
        case Type::bf16: return load_group_as<Type::bf16>(g.x, at, count, to, ends);
        default: return load_group_as<Type::f16>(g.x, at, count, to, ends);
    }
}

inline Floats powered(Floats error, int twice_power) {
    const Floats square = mul(error, error);
    if (twice_power == 4) return square;
    if (twice_power == 8) return mul(square, square);
    return mul(square, sqrt(max(error, sub(zero_floats(), error))));
}

// Losses of a grid and of its mirror image. x / -s is -(x / s) to the last bit, so both need one division.
template <int kTwicePower, bool kMirrored, bool kOffset, bool kImportance>
inline void losses(const float* x, const float* importance, int64_t width, const GridOf1& grid, int qmin, int qmax,
                   float& loss, float& mirrored) {
    const Floats scale = splat(grid.scale), offset = splat(grid.offset);
    const Floats least = splat(static_cast<float>(qmin) - grid.zero), most = splat(static_cast<float>(qmax) - grid.zero);
    const Floats other_least = splat(static_cast<float>(-qmax)), other_most = splat(static_cast<float>(-qmin));
    Floats total = zero_floats(), other = zero_floats();
    for (int64_t i = 0; i < width; i += 16) {
        const Floats v = load_floats(x + i);
        const Floats rounded = round_even(div(kOffset ? sub(v, offset) : v, scale));
        Floats near = mul(max(min(rounded, most), least), scale);
        if constexpr (kOffset) near = add(near, offset);
        const Floats part = powered(sub(near, v), kTwicePower);
        const Floats weight = kImportance ? load_floats(importance + i) : zero_floats();
        total = kImportance ? fma(part, weight, total) : add(total, part);
        if constexpr (kMirrored) {
            const Floats there = mul(max(min(rounded, other_most), other_least), scale);
            const Floats part_there = powered(sub(there, v), kTwicePower);
            other = kImportance ? fma(part_there, weight, other) : add(other, part_there);
        }
    }
    loss = sum(total);
    mirrored = sum(other);
}

template <int kTwicePower, bool kMirrored, bool kOffset, bool kImportance>
struct Try {
    static bool group(const Groups& g, Ends ends, const float* x, const float* importance, int64_t width,
                      int64_t entry) {
        GridOf1 best;
        float least = kInfinity, factor = 1.0f;
        const auto attempt = [&](float shrink, bool first) {
            GridOf1 grid;
            if (!fit_ends(g, ends, shrink, grid)) return false;
            float loss, mirrored;
            losses<kTwicePower, kMirrored, kOffset, kImportance>(x, importance, width, grid, g.qmin, g.qmax, loss,
                                                                 mirrored);
            if (first || loss < least) {
                best = grid;
                factor = shrink;
                if (loss < least) least = loss;
            }
            if (kMirrored && mirrored < least) {
                best = grid;
                best.scale = -grid.scale;
                factor = shrink;
                least = mirrored;
            }
            return true;
        };
        for (int i = 0; i < 9; i++)
            if (!attempt(kCoarse[i], i == 0)) return false;
        const float middle = factor;
        for (float step : kFine)
            if (!attempt(middle + step < 1.0f ? middle + step : 1.0f, false)) return false;
        store_grid(g, entry, best);
        return true;
    }
};

using TryGroup = bool (*)(const Groups&, Ends, const float*, const float*, int64_t, int64_t);

template <int kTwicePower, bool kImportance>
inline TryGroup try_of(const Search& s) {
    if (s.mirrored) return Try<kTwicePower, true, false, kImportance>::group;
    if (s.on.offset != nullptr) return Try<kTwicePower, false, true, kImportance>::group;
    return Try<kTwicePower, false, false, kImportance>::group;
}

template <bool kImportance>
inline TryGroup try_of(const Search& s) {
    if (s.twice_power == 4) return try_of<4, kImportance>(s);
    if (s.twice_power == 5) return try_of<5, kImportance>(s);
    return try_of<8, kImportance>(s);
}

// Scratch: a group, and the importance of every column of a row with its groups filled up.
bool search(const Search& s, int64_t first, int64_t last, uint8_t* scratch) {
    const Groups& g = s.on;
    const int64_t width = padded(g.group);
    float* x = reinterpret_cast<float*>(scratch);
    float* importance = x + width;
    // Zeros that fill a group up cost nothing, except with an offset, which need not have a code for zero.
    const bool ragged = g.group % 16 != 0 || g.columns % g.group % 16 != 0;
    const bool weighs = s.importance != nullptr || (g.offset != nullptr && ragged);
    if (weighs)
        for (int64_t i = 0; i < g.groups * width; i++) {
            const int64_t column = i / width * g.group + i % width;
            const bool there = i % width < g.group && column < g.columns;
            importance[i] = !there ? 0.0f : s.importance == nullptr ? 1.0f : s.importance[column];
        }
    const TryGroup attempt = weighs ? try_of<true>(s) : try_of<false>(s);
    for (int64_t row = first; row < last; row++)
        for (int64_t i = 0; i < g.groups; i++) {
            const int64_t start = i * g.group, count = start + g.group < g.columns ? g.group : g.columns - start;
            Ends ends;
            if (!load_group(g, row * g.columns + start, count, x, ends)) return false;
            if (!attempt(g, ends, x, importance + i * width, padded(count), row * g.groups + i)) return false;
        }
    return true;
}

}  // namespace ARRONDI_PATH
}  // namespace arrondi
