// Grids of small groups by least squares, and scales that are small integers with a unit for some groups. For one path; the same
// operations in the same order as arrondi.tensor.ranges.squares and superblocks, which say why.
//
// Groups lie in the lanes, their elements one after another, so that a sum over a group is a tree of additions of registers. What is
// one number for each group is an array over the lanes, in loops that the compiler vectorizes.
#pragma once

#include <new>

#include "kernels.h"

namespace arrondi {
namespace ARRONDI_PATH {
namespace grids {

constexpr int kMost = kSuperLanes;  // groups at a time
constexpr float kTiny = 0x1p-126f;

struct Sums {
    alignas(64) float vv[kMost], vx[kMost], v[kMost];
};

struct Batch {
    const Superblocks& job;
    int lanes;  // groups, up to whole registers
    alignas(64) float x[32 * kMost], w[32 * kMost], wx[32 * kMost];
    alignas(64) float sum_wx[kMost], sum_w[kMost], power[kMost], low[kMost], high[kMost];
};

// The code of every number that is nearest, before scale and offset.
template <bool kTable>
inline Floats value_on(const Superblocks& job, Floats units) {
    if constexpr (!kTable) {
        return min(max(round_even(units), splat(static_cast<float>(job.qmin))), splat(static_cast<float>(job.qmax)));
    } else {
        float places[16], values[16];
        store_floats(places, mul(sub(units, splat(job.first)), splat(job.cells_per_one)));
        for (int i = 0; i < 16; i++) {
            // As a conversion does it: what does not fit an int32 becomes its smallest.
            const int at = places[i] > -0x1p31f && places[i] < 0x1p31f ? static_cast<int>(places[i]) : -1;
            values[i] = job.cells[at < 0 ? 0 : at >= job.cell_count ? job.cell_count - 1 : at];
        }
        return load_floats(values);
    }
}

struct Three {
    Floats vv, vx, v;
};

// Place kAt of a level of kLength places: the sums of halves, from the last level on.
template <int kElements, int kLength, int kAt, bool kOffset, bool kTable>
inline Three tree(const Batch& b, int lane, Floats scale, Floats offset) {
    if constexpr (kLength == kElements) {
        const int at = kAt * kMost + lane;
        const Floats x = load_floats(b.x + at);
        const Floats v = value_on<kTable>(b.job, div(kOffset ? sub(x, offset) : x, scale));
        const Floats wv = mul(load_floats(b.w + at), v);
        return {mul(wv, v), mul(load_floats(b.wx + at), v), wv};
    } else {
        const Three one = tree<kElements, 2 * kLength, kAt, kOffset, kTable>(b, lane, scale, offset);
        const Three two = tree<kElements, 2 * kLength, kAt + kLength, kOffset, kTable>(b, lane, scale, offset);
        return {add(one.vv, two.vv), add(one.vx, two.vx), add(one.v, two.v)};
    }
}

template <int kElements, bool kOffset, bool kTable>
inline void squares_of(const Batch& b, const float* scale, const float* offset, Sums& s) {
    for (int lane = 0; lane < b.lanes; lane += 16) {
        float safe[16];
        for (int i = 0; i < 16; i++) safe[i] = scale[lane + i] == 0.0f ? 1.0f : scale[lane + i];
        const Three t = tree<kElements, 1, 0, kOffset, kTable>(b, lane, load_floats(safe),
                                                              kOffset ? load_floats(offset + lane) : zero_floats());
        store_floats(s.vv + lane, t.vv);
        store_floats(s.vx + lane, t.vx);
        store_floats(s.v + lane, t.v);
    }
}

inline void squares(const Batch& b, const float* scale, const float* offset, Sums& s) {
    if (b.job.elements == 32) {
        if (b.job.cells != nullptr) return squares_of<32, false, true>(b, scale, offset, s);
        if (offset != nullptr) return squares_of<32, true, false>(b, scale, offset, s);
        return squares_of<32, false, false>(b, scale, offset, s);
    }
    if (b.job.cells != nullptr) return squares_of<16, false, true>(b, scale, offset, s);
    if (offset != nullptr) return squares_of<16, true, false>(b, scale, offset, s);
    return squares_of<16, false, false>(b, scale, offset, s);
}

// What stays the same: sums of weighted numbers, and extremes.
inline void prepare(Batch& b) {
    const int elements = b.job.elements;
    for (int lane = 0; lane < b.lanes; lane += 16) {
        Floats low = load_floats(b.x + lane), high = low;
        Floats all[3][32];
        for (int e = 0; e < elements; e++) {
            const int at = e * kMost + lane;
            const Floats x = load_floats(b.x + at), w = load_floats(b.w + at), wx = mul(w, x);
            store_floats(b.wx + at, wx);
            low = min(x, low);
            high = max(x, high);
            all[0][e] = wx;
            all[1][e] = w;
            all[2][e] = mul(wx, x);
        }
        for (int half = elements / 2; half > 0; half /= 2)
            for (int e = 0; e < half; e++)
                for (auto& sum : all) sum[e] = add(sum[e], sum[e + half]);
        store_floats(b.sum_wx + lane, all[0][0]);
        store_floats(b.sum_w + lane, all[1][0]);
        store_floats(b.power + lane, all[2][0]);
        store_floats(b.low + lane, low);
        store_floats(b.high + lane, high);
    }
}

// The error of every group on a grid, for the values of some sums.
inline void error_of(const Batch& b, const Sums& s, const float* scale, const float* offset, float* error) {
    for (int i = 0; i < b.lanes; i++) error[i] = b.power[i] + scale[i] * (scale[i] * s.vv[i] - 2.0f * s.vx[i]);
    if (offset == nullptr) return;
    for (int i = 0; i < b.lanes; i++)
        error[i] = error[i] + offset[i] * (offset[i] * b.sum_w[i] + 2.0f * (scale[i] * s.v[i] - b.sum_wx[i]));
}

// The best scale and offset for the values of some sums.
inline void solve(const Batch& b, const Sums& s, bool below, float* scale, float* offset) {
    for (int i = 0; i < b.lanes; i++) scale[i] = s.vx[i] / (s.vv[i] > 0.0f ? s.vv[i] : 1.0f);
    if (offset == nullptr) return;
    for (int i = 0; i < b.lanes; i++) {
        const float one = b.sum_w[i], alone = scale[i], determinant = one * s.vv[i] - s.v[i] * s.v[i];
        const bool solvable = determinant > 1e-6f * one * s.vv[i];
        const float safe = solvable ? determinant : 1.0f;
        const float found = (one * s.vx[i] - s.v[i] * b.sum_wx[i]) / safe, shift = (s.vv[i] * b.sum_wx[i] - s.v[i] * s.vx[i]) / safe;
        const bool both = solvable & !(below & (shift > 0.0f));
        scale[i] = both ? found : alone;
        offset[i] = both ? shift : 0.0f;
    }
}

// Takes the grid that fits the codes of another one, where its error is less; whether that was so anywhere.
inline bool better(const Batch& b, const float* from_scale, const float* from_offset, float* scale, float* offset, float* least) {
    Sums s;
    alignas(64) float found[kMost], shift[kMost], error[kMost];
    const Superblocks& job = b.job;
    squares(b, from_scale, from_offset, s);
    solve(b, s, job.below, found, job.offset ? shift : nullptr);
    error_of(b, s, found, job.offset ? shift : nullptr, error);
    int any = 0;
    const bool positive = job.offset || !job.is_signed;
    for (int i = 0; i < b.lanes; i++) {
        const bool wins = (!positive | (found[i] > 0.0f)) & (error[i] < least[i]);
        any |= wins;
        scale[i] = wins ? found[i] : scale[i];
        least[i] = wins ? error[i] : least[i];
        if (job.offset) offset[i] = wins ? shift[i] : offset[i];
    }
    return any != 0;
}

// Scale and offset of every group that the search over starts finds.
inline void best(const Batch& b, float* scale, float* offset) {
    const Superblocks& job = b.job;
    alignas(64) float least[kMost], start[kMost], bottom[kMost];
    for (int i = 0; i < b.lanes; i++) {
        scale[i] = 0.0f;
        least[i] = b.power[i];
        if (job.offset) offset[i] = 0.0f;
    }
    for (int t = 0; t < job.start_count; t++) {
        const float reach = job.starts[t];
        if (job.offset) {
            for (int i = 0; i < b.lanes; i++) {
                const float low = job.below && b.low[i] > 0.0f ? 0.0f : b.low[i];
                start[i] = (b.high[i] - low) / reach;
                bottom[i] = low - start[i] * job.first;
            }
        } else {
            for (int i = 0; i < b.lanes; i++) {
                const float extreme = b.high[i] > -b.low[i] ? b.high[i] : b.low[i];
                start[i] = (job.is_signed || extreme > 0.0f ? extreme : -extreme) / reach;
            }
        }
        better(b, start, job.offset ? bottom : nullptr, scale, offset, least);
    }
    for (int turn = 0; turn < job.turns; turn++) {
        alignas(64) float from[kMost], shift[kMost];
        for (int i = 0; i < b.lanes; i++) {
            from[i] = scale[i];
            if (job.offset) shift[i] = offset[i];
        }
        if (!better(b, from, job.offset ? shift : nullptr, scale, offset, least)) return;
    }
}

// ---- scales that are integers ------------------------------------------------------------------------------------

// To nearest, ties to even, as `type` stores it; false: it is too large. Zero and what vanishes become the smallest number.
inline bool stored(float& unit, Type type) {
    const float size = unit < 0.0f ? -unit : unit;
    uint32_t bits;
    if (type == Type::f32) return true;
    if (type == Type::bf16) {
        __builtin_memcpy(&bits, &size, 4);
        if (size > 0x1.fep127f) return false;
        bits = (bits + 0x7fffu + (bits >> 16 & 1)) & 0xffff0000u;
        bits = bits < 0x10000u ? 0x10000u : bits;
        float rounded;
        __builtin_memcpy(&rounded, &bits, 4);
        unit = unit < 0.0f ? -rounded : rounded;
        return true;
    }
    if (size > 65504.0f) return false;
    // Adding and taking away a number rounds to the step that its size leaves: 2^-10 of the power of two below, at least 2^-24.
    __builtin_memcpy(&bits, &size, 4);
    const int exponent = static_cast<int>(bits >> 23) - 127;
    const uint32_t power = static_cast<uint32_t>((exponent < -14 ? -14 : exponent) + 13 + 127) << 23;
    float large;
    __builtin_memcpy(&large, &power, 4);
    large *= 1.5f;
    float rounded = (size + large) - large;
    rounded = rounded < 0x1p-24f ? 0x1p-24f : rounded;
    unit = unit < 0.0f ? -rounded : rounded;
    return true;
}

// Sums over the groups of each super-block, in halves.
inline float over(const float* v, int count) {
    float part[kMost];
    for (int i = 0; i < count; i++) part[i] = v[i];
    while (count > 1) {
        const int half = count / 2;
        const bool rest = count % 2 != 0;
        const float last = part[count - 1];
        for (int i = 0; i < half; i++) part[i] = part[i] + part[half + i];
        if (rest) part[0] += last;
        count = half;
    }
    return part[0];
}

inline float rounded(float v) { return v >= -0x1p22f && v <= 0x1p22f ? (v + 0x1.8p23f) - 0x1.8p23f : v; }

inline float clamped(float v, float low, float high) { return v < low ? low : v > high ? high : v; }

struct Grids {
    alignas(64) float unit[kMost], code[kMost], below[kMost], depth[kMost];  // units repeated for every group
    alignas(64) float scale[kMost], offset[kMost];

    void spread(int lanes, bool offsets) {
        for (int i = 0; i < lanes; i++) scale[i] = unit[i] * code[i];
        if (offsets)
            for (int i = 0; i < lanes; i++) offset[i] = below[i] * depth[i];
    }
};

// Codes of scales: not zero where `zero` is false.
inline float code_of(float units, const Superblocks& job, bool is_signed, bool zero) {
    const float code = clamped(rounded(units), is_signed ? static_cast<float>(job.inner_low) : 0.0f, static_cast<float>(job.inner_high));
    return zero || code != 0.0f ? code : is_signed && units < 0.0f ? -1.0f : 1.0f;
}

// The unit and codes of one super-block with the least Σ bend (unit · code - wanted)².
inline bool units(const Superblocks& job, const float* wanted, const float* bend, bool is_signed, bool zero, float* unit,
                  float* code) {
    const int span = job.span;
    float extreme = wanted[0], least = 0.0f;
    for (int i = 1; i < span; i++) {
        const float one = wanted[i] < 0.0f ? -wanted[i] : wanted[i], most = extreme < 0.0f ? -extreme : extreme;
        if (one > most) extreme = wanted[i];
    }
    bool any = false;
    for (int end = is_signed ? 0 : 1; end < 2; end++)
        for (int t = 0; t < job.unit_count; t++) {
            const double far = end == 1 ? job.inner_high + job.unit_steps[t] : job.inner_low - job.unit_steps[t];
            if ((end == 1 ? far : -far) <= 0.0) continue;
            float tried[kMost], cost[kMost];
            float found = extreme / static_cast<float>(far);
            if (found == 0.0f) found = kTiny;
            if (!stored(found, job.unit_type)) return false;
            for (int i = 0; i < span; i++) {
                tried[i] = code_of(wanted[i] / found, job, is_signed, zero);
                const float off = found * tried[i] - wanted[i];
                cost[i] = bend[i] * (off * off);
            }
            const float all = over(cost, span);
            if (any && !(all < least)) continue;
            any = true;
            least = all;
            for (int i = 0; i < span; i++) {
                unit[i] = found;
                code[i] = tried[i];
            }
        }
    return true;
}

inline float at_least(float v) { return v < 1e-30f ? 1e-30f : v; }

// Units and codes that come nearest to free scales and offsets.
inline bool counted(const Batch& b, const Sums& s, const float* scale, Grids& g) {
    const Superblocks& job = b.job;
    alignas(64) float bend[kMost], wanted[kMost];
    for (int i = 0; i < b.lanes; i++) bend[i] = job.offset ? s.vv[i] - s.v[i] * s.v[i] / at_least(b.sum_w[i]) : s.vv[i];
    for (int i = 0; i + job.span <= b.lanes; i += job.span)
        if (!units(job, scale + i, bend + i, job.is_signed, job.zero_scales, g.unit + i, g.code + i)) return false;
    if (!job.offset) return true;
    for (int i = 0; i < b.lanes; i++) {
        const float best = (b.sum_wx[i] - g.unit[i] * g.code[i] * s.v[i]) / at_least(b.sum_w[i]);
        wanted[i] = -(best > 0.0f ? 0.0f : best);
    }
    for (int i = 0; i + job.span <= b.lanes; i += job.span) {
        if (!units(job, wanted + i, b.sum_w + i, false, true, g.below + i, g.depth + i)) return false;
        for (int j = i; j < i + job.span; j++) g.below[j] = -g.below[j];
    }
    return true;
}

// Other codes: those that fit the sums, or `move` beside.
inline void moved(const Batch& b, const Sums& s, const Grids& g, int move, Grids& to) {
    const Superblocks& job = b.job;
    const float high = static_cast<float>(job.inner_high);
    if (move == 0) {
        alignas(64) float scale[kMost], offset[kMost];
        solve(b, s, job.offset, scale, job.offset ? offset : nullptr);
        for (int i = 0; i < b.lanes; i++) to.code[i] = code_of(scale[i] / g.unit[i], job, job.is_signed, job.zero_scales);
    } else {
        const float low = job.is_signed ? static_cast<float>(job.inner_low) : job.zero_scales ? 0.0f : 1.0f;
        const float step = static_cast<float>(move);
        for (int i = 0; i < b.lanes; i++) {
            const float code = g.code[i] + step;
            to.code[i] = clamped(!job.zero_scales && code == 0.0f ? code + step : code, low, high);
        }
    }
    for (int i = 0; i < b.lanes; i++) to.unit[i] = g.unit[i];
    if (job.offset)
        for (int i = 0; i < b.lanes; i++) {
            const float best = (b.sum_wx[i] - g.unit[i] * to.code[i] * s.v[i]) / at_least(b.sum_w[i]);
            to.below[i] = g.below[i];
            to.depth[i] = clamped(rounded(best / g.below[i]), 0.0f, high);
        }
    to.spread(b.lanes, job.offset);
}

// The best units for codes that stay.
inline bool refitted(const Batch& b, const Sums& s, const Grids& g, Grids& to) {
    const Superblocks& job = b.job;
    const int span = job.span;
    for (int at = 0; at + span <= b.lanes; at += span) {
        float t[5][kMost];
        const float *code = g.code + at, *depth = g.depth + at, *wx = b.sum_wx + at, *one = b.sum_w + at;
        for (int i = 0; i < span; i++) {
            t[0][i] = code[i] * code[i] * s.vv[at + i];
            t[1][i] = code[i] * s.vx[at + i];
            if (!job.offset) continue;
            t[2][i] = code[i] * depth[i] * s.v[at + i];
            t[3][i] = depth[i] * depth[i] * one[i];
            t[4][i] = depth[i] * wx[i];
        }
        const float a = over(t[0], span), r = over(t[1], span);
        float unit = a > 0.0f ? r / a : g.unit[at], below = 0.0f;
        if (job.offset) {
            const float mixed = over(t[2], span), c = over(t[3], span), q = over(t[4], span);
            const float determinant = a * c - mixed * mixed;
            const bool solvable = determinant > 1e-6f * a * c;
            const float safe = solvable ? determinant : 1.0f;
            unit = solvable ? (c * r - mixed * q) / safe : g.unit[at];
            below = solvable ? (a * q - mixed * r) / safe : g.below[at];
            unit = unit > 0.0f ? unit : g.unit[at];
            below = below < 0.0f ? below : g.below[at];
            if (!(below - below == 0.0f) || below == 0.0f) below = g.below[at];
            if (!stored(below, job.unit_type)) return false;
        }
        if (!(unit - unit == 0.0f) || unit == 0.0f) unit = g.unit[at];
        if (!stored(unit, job.unit_type)) return false;
        for (int i = at; i < at + span; i++) {
            to.unit[i] = unit;
            to.code[i] = g.code[i];
            if (!job.offset) continue;
            to.below[i] = below;
            to.depth[i] = g.depth[i];
        }
    }
    to.spread(b.lanes, job.offset);
    return true;
}

inline bool superblock(const Batch& b, Grids& g) {
    const Superblocks& job = b.job;
    const bool offset = job.offset;
    Sums s, other;
    alignas(64) float scale[kMost], shift[kMost], errors[kMost], tried[kMost];
    best(b, scale, shift);
    squares(b, scale, offset ? shift : nullptr, s);
    if (!counted(b, s, scale, g)) return false;
    g.spread(b.lanes, offset);
    Grids to{};
    for (int turn = 0; turn < job.turns; turn++) {
        bool changed = false;
        squares(b, g.scale, offset ? g.offset : nullptr, s);
        error_of(b, s, g.scale, offset ? g.offset : nullptr, errors);
        for (int number = 0; number < 3; number++) {
            moved(b, s, g, number == 2 ? 1 : -number, to);
            squares(b, to.scale, offset ? to.offset : nullptr, other);
            error_of(b, other, to.scale, offset ? to.offset : nullptr, tried);
            for (int i = 0; i < b.lanes; i++) {
                if (!(tried[i] < errors[i])) continue;
                changed = true;
                g.code[i] = to.code[i];
                g.depth[i] = to.depth[i];
                errors[i] = tried[i];
                s.vv[i] = other.vv[i];
                s.vx[i] = other.vx[i];
                s.v[i] = other.v[i];
            }
        }
        if (!refitted(b, s, g, to)) return false;
        error_of(b, s, to.scale, offset ? to.offset : nullptr, tried);
        for (int at = 0; at + job.span <= b.lanes; at += job.span) {
            if (!(over(tried + at, job.span) < over(errors + at, job.span))) continue;
            for (int i = at; i < at + job.span; i++) {
                changed = changed || g.unit[i] != to.unit[i] || (offset && g.below[i] != to.below[i]);
                g.unit[i] = to.unit[i];
                if (offset) g.below[i] = to.below[i];
            }
        }
        g.spread(b.lanes, offset);
        if (!changed) break;  // another turn would do the same
    }
    return true;
}

}  // namespace grids

// The grids of batches [first, last); false: a unit does not fit its storage.
inline bool superblocks(const Superblocks& job, int64_t first, int64_t last, uint8_t* scratch) {
    using namespace grids;
    const int each = groups_at_once(job);
    Batch& b = *new (scratch) Batch{job, (each + 15) / 16 * 16, {}, {}, {}, {}, {}, {}, {}, {}};
    Grids g{};
    for (int64_t batch = first; batch < last; batch++) {
        const int64_t from = batch * each;
        const int count = static_cast<int>(job.groups - from < each ? job.groups - from : each);
        for (int i = 0; i < b.lanes; i++)
            for (int e = 0; e < job.elements; e++) {
                const bool there = i < count;
                b.x[e * kMost + i] = there ? job.x[e * job.x_element + (from + i) * job.x_group] : 0.0f;
                b.w[e * kMost + i] = !there ? 0.0f : job.w == nullptr ? 1.0f : job.w[e * job.w_element + (from + i) * job.w_group];
            }
        prepare(b);
        if (job.span == 0) {
            best(b, g.scale, g.offset);
            for (int i = 0; i < count; i++) {
                job.scale[from + i] = g.scale[i];
                if (job.offset) job.shift[from + i] = g.offset[i];
            }
            continue;
        }
        if (!superblock(b, g)) return false;
        for (int i = 0; i < count; i++) {
            job.scale[from + i] = g.code[i];
            if (job.offset) job.shift[from + i] = g.depth[i];
            if (i % job.span != 0) continue;
            job.unit[(from + i) / job.span] = g.unit[i];
            if (job.offset) job.shift_unit[(from + i) / job.span] = g.below[i];
        }
    }
    return true;
}

}  // namespace ARRONDI_PATH
}  // namespace arrondi
