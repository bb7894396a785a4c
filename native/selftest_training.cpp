// The self-test of what surrounds the products of a training step, against the same in plain C++.
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
                    if (type != Type::f16) try_sums(rows, columns, type, random);
                }
}

}  // namespace arrondi
