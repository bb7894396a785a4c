// The self-test of what surrounds the products of a training step, against the same in plain C++.
#include <limits>

#include "clips.h"
#include "moments.h"
#include "selftest.h"
#include "training.h"

namespace arrondi {

namespace {

uint32_t mixed(uint32_t v) {
    v = (v ^ v >> 16) * 0x7feb352du;
    v = (v ^ v >> 15) * 0x846ca68bu;
    return v ^ v >> 16;
}

struct Case {
    Numbers x;
    std::vector<float> row, column;
    Sides sides;
    Case(int rows, int columns, Type type, Random& random)
        : x(type, static_cast<size_t>(rows) * static_cast<size_t>(columns + 3)), row(static_cast<size_t>(rows)),
          column(static_cast<size_t>(columns)) {
        for (size_t i = 0; i < x.floats.size(); i++) x.set(i, 40.0f * random.normal());
        for (float& v : row) v = 0.5f + random.uniform();
        for (float& v : column) v = 0.5f + random.uniform();
        sides = {rows, columns, x.data(), columns + 3, type, random.below(2) != 0 ? row.data() : nullptr,
                 random.below(2) != 0 ? column.data() : nullptr, any_of(kThreads, random)};
    }
    float at(int64_t r, int64_t c) const {
        const float v = x.floats[static_cast<size_t>(r * sides.ldx + c)] * (sides.row == nullptr ? 1.0f : sides.row[r]);
        return sides.column == nullptr ? v : v * sides.column[c];
    }
};

void try_extremes(const Case& k, bool by_column) {
    const int64_t count = by_column ? k.sides.columns : k.sides.rows, others = by_column ? k.sides.rows : k.sides.columns;
    std::vector<float> out(static_cast<size_t>(count));
    if (const char* wrong = extremes({k.sides, by_column, out.data()})) return fail("extremes: %s", wrong);
    for (int64_t i = 0; i < count; i++) {
        float most = 0.0f;
        for (int64_t j = 0; j < others; j++) most = std::fmax(most, std::fabs(by_column ? k.at(j, i) : k.at(i, j)));
        if (out[static_cast<size_t>(i)] != most) return fail("extremes: %g, expected %g", out[static_cast<size_t>(i)], most);
    }
}

void try_codes_of(const Case& k, bool stochastic, uint32_t seed) {
    std::vector<int8_t> codes(static_cast<size_t>(k.sides.rows * k.sides.columns));
    if (const char* wrong = round_codes({k.sides, -127, 100, stochastic, seed, codes.data()})) return fail("codes: %s", wrong);
    for (int64_t r = 0; r < k.sides.rows; r++)
        for (int64_t c = 0; c < k.sides.columns; c++) {
            float v = k.at(r, c);
            if (stochastic) {
                const uint32_t of_row = mixed(seed + static_cast<uint32_t>(r) * 0x9e3779b1u);
                const int32_t bits = static_cast<int32_t>(mixed(of_row + static_cast<uint32_t>(c) * 0x9e3779b1u) >> 16);
                v += static_cast<float>(2 * bits - 65535) * 0x1p-17f;
            }
            const float expected = std::nearbyint(std::fmin(std::fmax(v, -127.0f), 100.0f));
            const int got = codes[static_cast<size_t>(r * k.sides.columns + c)];
            if (got != static_cast<int>(expected)) return fail("codes: %d for %g, expected %g", got, v, expected);
        }
}

void try_sums(int rows, int columns, Type type, Random& random) {
    const size_t count = static_cast<size_t>(rows) * static_cast<size_t>(columns);
    std::vector<int32_t> sums(count);
    for (int32_t& v : sums) v = random.below(1 << 20) - (1 << 19);
    const Case k(rows, columns, Type::f32, random);
    const float* bias = random.below(2) != 0 ? k.column.data() : nullptr;
    Numbers y(type, count);
    void* out = type == Type::f32 ? static_cast<void*>(y.floats.data()) : y.halves.data();
    const SumScaling job{rows, columns, sums.data(), k.sides.row, k.sides.column, bias, out, type, k.sides.threads};
    if (const char* wrong = scale_sums(job)) return fail("sums: %s", wrong);
    for (size_t i = 0; i < count; i++) {
        const size_t r = i / static_cast<size_t>(columns), c = i % static_cast<size_t>(columns);
        float v = static_cast<float>(sums[i]) * (k.sides.row == nullptr ? 1.0f : k.row[r]);
        if (k.sides.column != nullptr) v *= k.column[c];
        if (bias != nullptr) v += bias[c];
        Numbers expected(type, 1);
        expected.set(0, v);
        const float got = type == Type::f32 ? y.floats[i] : from_bf16(y.halves[i]);
        if (got != expected.floats[0]) return fail("sums: %g, expected %g", got, expected.floats[0]);
    }
}

// Codes with a clip, the bits of what lay beyond it, and slopes through those bits.
void try_clips(int rows, int columns, Type type, Random& random) {
    const size_t count = static_cast<size_t>(rows) * static_cast<size_t>(columns), bytes = static_cast<size_t>(columns + 7) / 8;
    const Case k(rows, columns, type, random);
    std::vector<int8_t> codes(count);
    std::vector<uint8_t> beyond(static_cast<size_t>(rows) * bytes);
    const float scale = 2.0f + random.uniform(), low = -50.0f, high = 45.0f;
    Clipping c{};
    c.rows = rows;
    c.columns = columns;
    c.x = k.x.data();
    c.ldx = k.sides.ldx;
    c.type = type;
    c.scale = scale;
    c.low = low;
    c.high = high;
    c.codes = codes.data();
    c.beyond = beyond.data();
    c.threads = k.sides.threads;
    if (const char* wrong = clip_codes(c)) return fail("clips: %s", wrong);
    std::vector<float> slope(count), y(count), ends(static_cast<size_t>(rows)), expected_ends(ends.size());
    for (float& v : slope) v = random.normal();
    for (size_t r = 0; r < static_cast<size_t>(rows); r++)
        for (size_t i = 0; i < static_cast<size_t>(columns); i++) {
            const float x = k.x.floats[r * static_cast<size_t>(k.sides.ldx) + i];
            const double code = std::fmin(std::fmax(std::floor(static_cast<double>(x * scale) + 0.5), -127.0), 127.0);
            const size_t at = r * static_cast<size_t>(columns) + i;
            if (codes[at] != static_cast<int>(code)) return fail("clips: %d for %g, expected %g", codes[at], x, code);
            const bool marked = (beyond[r * bytes + i / 8] >> i % 8 & 1) != 0;
            if (marked != (x <= low || x >= high)) return fail("clips: %g is marked %d", x, marked);
            if (marked) expected_ends[r] += codes[at] > 0 ? slope[at] : -slope[at];
        }
    Masking m{rows, columns, slope.data(), beyond.data(), codes.data(), false, y.data(), ends.data(), k.sides.threads};
    if (const char* wrong = mask_slopes(m)) return fail("masks: %s", wrong);
    for (size_t at = 0; at < count; at++) {
        const size_t r = at / static_cast<size_t>(columns), i = at % static_cast<size_t>(columns);
        const bool marked = (beyond[r * bytes + i / 8] >> i % 8 & 1) != 0;
        if (y[at] != (marked ? 0.0f : slope[at])) return fail("masks: %g for %g", y[at], slope[at]);
    }
    for (size_t r = 0; r < ends.size(); r++)
        if (!(std::fabs(ends[r] - expected_ends[r]) < 1e-3f)) return fail("masks: an end is %g, expected %g", ends[r], expected_ends[r]);
    Numbers wide(type, count);
    void* out = type == Type::f32 ? static_cast<void*>(wide.floats.data()) : wide.halves.data();
    const Widening w{rows, columns, codes.data(), k.row.data(), k.column.data(), out, type, k.sides.threads};
    if (const char* wrong = widen_codes(w)) return fail("widening: %s", wrong);
    for (size_t at = 0; at < count; at++) {
        Numbers expected(type, 1);
        const size_t r = at / static_cast<size_t>(columns), i = at % static_cast<size_t>(columns);
        expected.set(0, static_cast<float>(codes[at]) * k.row[r] + k.column[i]);
        const float got = type == Type::f32 ? wide.floats[at] : from_bf16(wide.halves[at]);
        if (got != expected.floats[0]) return fail("widening: %g, expected %g", got, expected.floats[0]);
    }
}

// A step of an optimizer on states of one code, which no threshold divides: the arithmetic, and that nothing else is touched.
void try_moments(int n, int block, bool adam, Random& random) {
    const size_t count = static_cast<size_t>(n), blocks = static_cast<size_t>((n + block - 1) / block);
    std::vector<float> values(256, 0.5f), p(count), g(count), before, scale_m(blocks, 2.0f), scale_v(blocks, 3.0f);
    std::vector<int32_t> lows(16, 7);
    std::vector<float> thresholds(16, std::numeric_limits<float>::infinity());
    std::vector<uint8_t> codes_m(count, 1), codes_v(count, 2);
    for (float& v : p) v = random.normal();
    for (float& v : g) v = random.normal();
    before = p;
    const Map map{values.data(), lows.data(), thresholds.data(), 0x3f00, 8};
    Moments j{};
    j.n = n;
    j.block = block;
    j.p = p.data();
    j.g = g.data();
    j.m = {codes_m.data(), scale_m.data(), map};
    j.v = {codes_v.data(), scale_v.data(), map};
    j.adam = adam;
    j.keep = 0.99f;
    j.towards = 0.1f;
    j.beta = 0.9f;
    j.share = 0.1f;
    j.root = 1.0f;
    j.eps = 1e-3f;
    j.size = -0.1f;
    j.momentum = 0.9f;
    j.fresh = 1.0f;
    j.threads = any_of(kThreads, random);
    if (const char* wrong = step_moments(j)) return fail("moments: %s", wrong);
    for (size_t i = 0; i < count; i++) {
        const double m = adam ? 1.0 + 0.1 * (g[i] - 1.0) : 0.9 + g[i], v = 1.5 * 0.9 + 0.1 * g[i] * g[i];
        const double expected = adam ? before[i] * 0.99 - 0.1 * m / (std::sqrt(v) + 1e-3) : before[i] - 0.1 * m;
        if (!(std::fabs(p[i] - expected) < 1e-5)) return fail("moments: %g, expected %g", p[i], expected);
        if (codes_m[i] != 7 || codes_v[i] != (adam ? 7 : 2)) return fail("moments: a code is %d", codes_m[i]);
    }
}

}  // namespace

void try_training(uint64_t seed, bool quick) {
    Random random(seed + 3000);
    for (int turn = 0; turn < (quick ? 1 : 4); turn++)
        for (int rows : {1, 3, 40})
            for (int columns : {1, 15, 16, 65, 200, 1030})
                for (Type type : kTypes) {
                    const Case k(rows, columns, type, random);
                    try_extremes(k, false);
                    try_extremes(k, true);
                    try_codes_of(k, false, 0);
                    try_codes_of(k, true, random.next());
                    if (type == Type::f16) continue;
                    try_sums(rows, columns, type, random);
                    try_clips(rows, columns, type, random);
                }
    for (int n : {1, 255, 257, 40000})
        for (bool adam : {true, false}) try_moments(n, 256, adam, random);
}

}  // namespace arrondi
