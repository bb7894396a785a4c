// Half-quadratic splitting, one group after another in cache, for one path; see arrondi.rounding.hqq.
#pragma once

#include "powers.h"
#include "search.h"

namespace arrondi {
namespace ARRONDI_PATH {

template <bool kScaleMoves, bool kNormalize>
struct Split {
    const Splitting& s;
    const Groups& g;

    bool group(const float* x, float* codes, int64_t count, Ends ends, int64_t entry) const {
        GridOf1 first;
        if (!fit_ends(g, ends, 1.0f, first)) return false;
        float scale = first.scale, zero = g.offset != nullptr ? -first.offset / scale : first.zero;
        float best_scale = scale, best_zero = zero, best = kInfinity, beta = s.beta;
        const int64_t width = padded(count);
        const Floats least = splat(static_cast<float>(g.qmin)), most = splat(static_cast<float>(g.qmax));
        const Floats none = zero_floats();
        const Floats sign_bit = as_floats(splat(INT32_MIN)), size_bits = as_floats(splat(INT32_MAX));
        // What fills up the last sixteen must not count.
        float mask[16];
        for (int j = 0; j < 16; j++) mask[j] = width - 16 + j < count ? 1.0f : 0.0f;
        for (int step = 0; step <= s.iterations; step++) {
            const Floats wide = splat(scale), from = splat(zero);
            Floats total = none;
            for (int64_t i = 0; i < width; i += 16) {
                const Floats v = load_floats(x + i);
                const Floats code = max(min(round_even(add(div(v, wide), from)), most), least);
                Floats error = absolute(sub(v, mul(sub(code, from), wide)), size_bits);
                if (i + 16 == width) error = mul(error, load_floats(mask));
                total = add(total, error);
                store_floats(codes + i, code);
            }
            const float mean = sum(total) / static_cast<float>(count);
            if (!(mean < best)) break;
            best = mean;
            best_scale = scale;
            best_zero = zero;
            const Floats unit = splat(kNormalize ? scale : 1.0f), exponent = splat(s.p - 1.0f), lowest = splat(1e-12f);
            const Floats strength = splat(beta);
            Floats above = none, below = none;
            for (int64_t i = 0; i < width; i += 16) {
                const Floats v = load_floats(x + i), code = load_floats(codes + i), steps = sub(code, from);
                const Floats residual = sub(v, mul(steps, wide));
                Floats size = absolute(residual, size_bits);
                if (kNormalize) size = div(size, unit);
                const Floats threshold = div(exp2_of(mul(log2_of(max(size, lowest)), exponent)), strength);
                Floats kept = max(sub(size, threshold), none);
                if (kNormalize) kept = mul(kept, unit);
                kept = as_floats(or_ints(as_ints(kept), and_ints(as_ints(residual), as_ints(sign_bit))));
                const Floats target = sub(v, kept);
                Floats part = kScaleMoves ? mul(target, steps) : sub(code, div(target, wide));
                Floats power = kScaleMoves ? mul(steps, steps) : none;
                if (i + 16 == width) {
                    part = mul(part, load_floats(mask));
                    power = mul(power, load_floats(mask));
                }
                above = add(above, part);
                below = add(below, power);
            }
            if (kScaleMoves) {
                const float power = sum(below), fitted = sum(above) / (power > 1.0f ? power : 1.0f);
                if (!round_scale(power > 0 && fitted > 0 ? fitted : scale, g.scale_type, scale)) return false;
            } else {
                zero = sum(above) / static_cast<float>(count);
            }
            beta *= s.kappa;
        }
        GridOf1 grid;
        grid.scale = best_scale;
        grid.zero = best_zero;
        grid.offset = -best_zero * best_scale;
        store_grid(g, entry, grid);
        return true;
    }

  private:
    static inline Floats absolute(Floats v, Floats size_bits) {
        return as_floats(and_ints(as_ints(v), as_ints(size_bits)));
    }
};

template <bool kScaleMoves, bool kNormalize>
inline bool split_rows(const Splitting& s, int64_t first, int64_t last, float* x) {
    const Groups& g = s.on;
    const Split<kScaleMoves, kNormalize> solver{s, g};
    for (int64_t row = first; row < last; row++)
        for (int64_t i = 0; i < g.groups; i++) {
            const int64_t start = i * g.group, count = start + g.group < g.columns ? g.group : g.columns - start;
            Ends ends;
            if (!load_group(g, row * g.columns + start, count, x, ends)) return false;
            if (!solver.group(x, x + padded(g.group), count, ends, row * g.groups + i)) return false;
        }
    return true;
}

// Scratch: a group and its codes, as float32.
bool split(const Splitting& s, int64_t first, int64_t last, uint8_t* scratch) {
    float* x = reinterpret_cast<float*>(scratch);
    if (s.on.offset != nullptr)
        return s.normalize ? split_rows<false, true>(s, first, last, x) : split_rows<false, false>(s, first, last, x);
    return s.normalize ? split_rows<true, true>(s, first, last, x) : split_rows<true, false>(s, first, last, x);
}

}  // namespace ARRONDI_PATH
}  // namespace arrondi
