// Products with states of a trellis against plain loops in double precision, and their packing against its inverse.
#include <cstdio>
#include <string>

#include "prepack.h"
#include "selftest.h"
#include "trellis.h"

namespace arrondi {
namespace {

constexpr int kRing = 256;

struct Case {
    int n, k, m, bits[2], state;
    bool squares, turned;
    Type x_type;
    int digits, threads;
    Gate gate;
    bool residual;

    std::string text() const {
        char text[200];
        std::snprintf(text, sizeof text, "ring n=%d k=%d m=%d bits=%d/%d state=%d squares=%d turned=%d x=%s digits=%d threads=%d gate=%d residual=%d", n, k, m,
                      bits[0], bits[1], state, squares, turned, kTypeNames[static_cast<int>(x_type)], digits, threads, static_cast<int>(gate), residual);
        return text;
    }
};

// Where the ring of a row begins and ends.
void ring_of(int n, int row, int& start, int& stop) {
    const int last = (n / kRing - (n % kRing > 0 ? 1 : 0)) * kRing, whole = last > 0 ? last : 0;
    start = row < whole ? row / kRing * kRing : whole;
    stop = row < whole ? start + kRing : n;
}

// The place before a place of a line, and its code.
void step_back(const Case& c, int& row, int& column) {
    if (c.squares) {
        if (row-- % kBlock != 0) return;
        row += kBlock;
        column = column % kBlock == 0 ? column + kBlock - 1 : column - 1;
        return;
    }
    int start, stop;
    ring_of(c.n, row, start, stop);
    row = row == start ? stop - 1 : row - 1;
}

// By the definition: the last bits of a closed line.
int value_of(const Case& c, const std::vector<uint8_t>& codes, int row, int column) {
    uint32_t state = 0;
    for (int have = 0; have < c.state; step_back(c, row, column)) {
        state |= static_cast<uint32_t>(codes[static_cast<size_t>(row) * c.k + column]) << have;
        have += c.bits[row % 2];
    }
    uint32_t product = (state & ((1u << c.state) - 1u)) * kRingFactor;
    int sum = -kRingMiddle;
    for (; product != 0; product >>= 8) sum += static_cast<int>(product & 255u);
    return sum;
}

// v H in blocks.
void turn(std::vector<double>& v, int shift) {
    for (int h = 1; h < 1 << shift; h *= 2)
        for (size_t i = 0; i < v.size(); i++)
            if ((i & static_cast<size_t>(h)) == 0) {
                const double a = v[i], b = v[i + static_cast<size_t>(h)];
                v[i] = a + b;
                v[i + static_cast<size_t>(h)] = a - b;
            }
    for (double& x : v) x /= std::sqrt(static_cast<double>(1 << shift));
}

int shift_of(int size) {
    int shift = 0;
    while (shift < 7 && size % (2 << shift) == 0) shift++;
    return shift;
}

double gate_of(Gate gate, double g) {
    return gate == Gate::silu ? g / (1 + std::exp(-g)) : 0.5 * g * (1 + std::tanh(0.7978845608 * (g + 0.044715 * g * g * g)));
}

void try_ring(const Case& c, Random& random) {
    const size_t weights = static_cast<size_t>(c.n) * c.k;
    std::vector<uint8_t> codes(weights), packed(static_cast<size_t>(ring_bytes(c.n, c.k, c.bits[0], c.bits[1], c.squares)), 0xee), back(weights, 0xee);
    for (size_t i = 0; i < weights; i++) codes[i] = static_cast<uint8_t>(random.below(1 << c.bits[i / static_cast<size_t>(c.k) % 2]));
    const int ring = c.squares ? 0 : kRing;
    const char* wrong = pack_rings({c.n, c.k, {c.bits[0], c.bits[1]}, ring, codes.data(), packed.data(), c.threads});
    if (wrong == nullptr) wrong = unpack_rings({c.n, c.k, {c.bits[0], c.bits[1]}, ring, back.data(), packed.data(), c.threads});
    if (wrong != nullptr) return fail("%s: %s", c.text().c_str(), wrong);
    if (back != codes) return fail("%s: unpacked, codes are others", c.text().c_str());

    const int blocks = (c.n + kBlock - 1) / kBlock;
    Numbers scale(Type::f16, static_cast<size_t>(blocks) * kBlock), x(c.x_type, static_cast<size_t>(c.m) * c.k);
    for (size_t i = 0; i < scale.floats.size(); i++) scale.set(i, 0.001f + 0.001f * random.uniform());
    for (size_t i = 0; i < x.floats.size(); i++) x.set(i, random.normal() * (random.below(40) == 0 ? 20.0f : 1.0f));
    std::vector<float> rows(static_cast<size_t>(c.n)), columns(static_cast<size_t>(c.k)), bias(static_cast<size_t>(c.n));
    for (float& v : rows) v = random.below(2) == 0 ? 1.0f : -1.0f;
    for (float& v : columns) v = random.below(2) == 0 ? 1.0f : -1.0f;
    for (float& v : bias) v = random.normal();
    const int width = c.gate == Gate::none ? c.n : c.n / 2, row_shift = c.turned ? shift_of(c.n) : 0, column_shift = c.turned ? shift_of(c.k) : 0;
    std::vector<float> y(static_cast<size_t>(c.m) * width, 12345.0f), residual(y.size());
    for (float& v : residual) v = random.normal();

    Product p{};
    Weight& w = p.weight;
    w.kind = Kind::ring;
    w.n = c.n;
    w.k = w.group = c.k;
    w.groups = 1;
    w.steps = steps_of(Kind::ring, c.k);
    w.codes = packed.data();
    w.scale = scale.data();
    w.scale_type = Type::f16;
    w.ring_bits[0] = c.bits[0];
    w.ring_bits[1] = c.bits[1];
    w.state_bits = c.state;
    w.squares = c.squares;
    if (c.turned) w.turn = {columns.data(), rows.data(), column_shift, row_shift};
    p.x = x.data();
    p.x_type = c.x_type;
    p.ldx = c.k;
    p.m = c.m;
    p.digits = c.digits;
    p.y = y.data();
    p.y_type = Type::f32;
    p.ldy = width;
    p.bias = bias.data();
    p.gate = c.gate;
    p.residual = c.residual ? residual.data() : nullptr;
    p.ldr = width;
    p.threads = c.threads;
    if ((wrong = product(p)) != nullptr) return fail("%s: %s", c.text().c_str(), wrong);

    std::vector<int> values(weights);
    for (int i = 0; i < c.n; i++)
        for (int j = 0; j < c.k; j++) values[static_cast<size_t>(i) * c.k + j] = value_of(c, codes, i, j);
    for (int t = 0; t < c.m; t++) {
        std::vector<double> in(static_cast<size_t>(c.k)), out(static_cast<size_t>(c.n));
        for (int j = 0; j < c.k; j++) in[j] = static_cast<double>(x.floats[static_cast<size_t>(t) * c.k + j]) * (c.turned ? columns[j] : 1.0f);
        turn(in, column_shift);
        double largest = 0, terms = 0;
        for (double v : in) largest = std::fmax(largest, std::fabs(v));
        for (int i = 0; i < c.n; i++) {
            double sum = 0, size = 0;
            for (int j = 0; j < c.k; j++) {
                sum += in[j] * values[static_cast<size_t>(i) * c.k + j];
                size += std::fabs(in[j]) * std::abs(values[static_cast<size_t>(i) * c.k + j]) + largest;
            }
            out[i] = sum * scale.floats[i];
            terms = std::fmax(terms, size * scale.floats[i]);
        }
        turn(out, row_shift);
        // Digits of 15 bits leave half a step of the largest to every value of up to 510; float sums a few units in the last place.
        const double step = c.digits == 2 ? largest / 32639 * 0.55 : largest * 1e-6;
        const double allowed = (terms * 4e-6 + step * 300 * c.k * 0.002 + 1e-5) * std::sqrt(static_cast<double>(1 << row_shift)) * (c.gate == Gate::none ? 1 : 8);
        for (int i = 0; i < c.n; i++) out[i] = out[i] * (c.turned ? rows[i] : 1.0f) + bias[i];
        for (int i = 0; i < width; i++) {
            double v = c.gate == Gate::none ? out[i] : gate_of(c.gate, out[i]) * out[i + width];
            if (c.residual) v += residual[static_cast<size_t>(t) * width + i];
            const double found = y[static_cast<size_t>(t) * width + i];
            if (!(std::fabs(found - v) <= allowed * (1 + std::fabs(v))))
                return fail("%s: y[%d][%d] is %.9g, not %.9g ± %.3g", c.text().c_str(), t, i, found, v, allowed);
        }
    }

    const std::vector<int64_t> ids = {0, c.n - 1, random.below(c.n)};
    std::vector<float> read(ids.size() * c.k, 12345.0f);
    if ((wrong = ring_rows({w, static_cast<int64_t>(ids.size()), ids.data(), read.data(), c.threads})) != nullptr)
        return fail("%s: %s", c.text().c_str(), wrong);
    for (size_t r = 0; r < ids.size(); r++)
        for (int j = 0; j < c.k; j++) {
            const int run = 1 << row_shift, first = static_cast<int>(ids[r]) / run * run;
            double v = 0;
            for (int i = 0; i < run; i++) {
                int odd = 0;
                for (int both = i & (static_cast<int>(ids[r]) - first); both != 0; both &= both - 1) odd ^= 1;
                v += (odd != 0 ? -1.0 : 1.0) * values[static_cast<size_t>(first + i) * c.k + j] * scale.floats[first + i];
            }
            v /= std::sqrt(static_cast<double>(run));
            if (!(std::fabs(read[r * c.k + j] - v) <= 1e-4 * (1 + std::fabs(v)))) return fail("%s: row %d has %.9g, not %.9g", c.text().c_str(), static_cast<int>(ids[r]), static_cast<double>(read[r * c.k + j]), v);
        }
}

}  // namespace

void try_rings(uint64_t seed, bool quick) {
    Random random(seed + 77);
    constexpr int kRows[] = {16, 100, 128, 300, 520}, kColumns[] = {1, 5, 130, 300}, kTokens[] = {1, 2, 3, 4, 5, 13};
    constexpr Gate kGates[] = {Gate::none, Gate::none, Gate::silu, Gate::gelu_tanh};
    constexpr int kBits[][2] = {{1, 1}, {1, 2}, {2, 2}, {2, 3}, {3, 3}, {3, 4}, {4, 4}};
    for (const auto& bits : kBits)
        for (int state = 8; state <= 16; state += quick ? 4 : 1)
            for (int turned = 0; turned < 2; turned++)
                for (int m : kTokens) {
                    Case c{any_of(kRows, random), any_of(kColumns, random), m, {bits[0], bits[1]}, state, random.below(2) == 0, turned != 0, any_of(kTypes, random), 0,
                           any_of(kThreads, random), any_of(kGates, random), false};
                    c.digits = c.x_type == Type::f32 ? 3 : 2;
                    c.residual = c.gate == Gate::none && random.below(2) == 0;
                    if (c.squares) {
                        c.n = (c.n + kBlock - 1) / kBlock * kBlock;
                        c.k = (c.k + kBlock - 1) / kBlock * kBlock;
                    }
                    if (c.n * bits[0] >= state) try_ring(c, random);
                }
}

}  // namespace arrondi
