// Products of every kind against plain loops in double precision.
#include <algorithm>
#include <limits>
#include <string>
#include <thread>

#include "prepack.h"
#include "selftest.h"

namespace arrondi {
namespace {

// Formats without infinities and NaN: the codes that other rules give to those are numbers here.
double value_of(const Weight& w, int row, int code) {
    if (const int size = row_entry(w.kind); size > 0) {
        // Byte i of an entry lies i vectors of four rows on; which vector and which part of it follow from the row.
        const uint8_t* first = w.tables + (row / kBlock * 4 + row % 4) * 64 * size + row % kBlock / 4 * 16 + code;
        if (size == 1) return *first;
        uint8_t bytes[4];
        for (int i = 0; i < 4; i++) bytes[i] = first[64 * i];
        float value;
        std::memcpy(&value, bytes, 4);
        return value;
    }
    switch (w.kind) {
        case Kind::u1: return 2 * code;
        case Kind::table4:
        case Kind::wide_table4: return w.bytes[code];
        case Kind::float4: return w.floats[code];
        case Kind::e4m3: return small_float(code, 4, 3, 7);
        case Kind::e5m2: return small_float(code, 5, 2, 15);
        case Kind::e3m2: return small_float(code, 3, 2, 3);
        case Kind::e2m3: return small_float(code, 2, 3, 1);
        default: return code;
    }
}

enum class Zero { none, constant, each };

struct Case {
    Kind kind;
    int n, k, m, group;
    Zero zero;
    bool offset, bias;
    Type scale_type, offset_type, x_type, y_type;
    Counted counted;
    int run;
    int digits;
    int lowest, highest;  // the codes of rounded activations; equal: x keeps its own numbers
    int x_group;
    bool given;  // rounded: by a scale that does not follow from x
    bool integers;
    int threads;
    uint64_t seed;
    float eps;  // of the norm beforehand; 0: there is none
    Gate gate;
    bool residual;

    bool rounded() const { return lowest < highest; }
    int groups() const { return (k + group - 1) / group; }
    std::string text() const {
        static const char* const zeros[3] = {"none", "constant", "each"};
        static const char* const gates[3] = {"none", "silu", "gelu"};
        char text[320];
        std::snprintf(text, sizeof text,
                      "%s n=%d k=%d m=%d group=%d zero=%s offset=%d bias=%d scale=%s offset=%s counted=%d run=%d x=%s y=%s digits=%d codes=%d…%d x_group=%d given=%d integers=%d threads=%d "
                      "eps=%g gate=%s residual=%d seed=%llu",
                      kKindNames[static_cast<int>(kind)], n, k, m, group, zeros[static_cast<int>(zero)], offset, bias,
                      kTypeNames[static_cast<int>(scale_type)], kTypeNames[static_cast<int>(offset_type)], static_cast<int>(counted), run,
                      kTypeNames[static_cast<int>(x_type)],
                      kTypeNames[static_cast<int>(y_type)], digits, lowest, highest, x_group, given, integers, threads, static_cast<double>(eps),
                      gates[static_cast<int>(gate)], residual, static_cast<unsigned long long>(seed));
        return text;
    }
};

// A weight with its buffers, exactly as long as kernels.h says, so that a sanitizer sees what reads beyond them.
struct Made {
    Weight weight{};
    std::vector<uint8_t> codes;  // (n, k), unpacked
    std::vector<uint8_t> packed, zero, tables, counts, depths;
    Numbers scale{Type::f32, 0}, offset{Type::f32, 0}, unit{Type::f32, 0}, offset_unit{Type::f32, 0};

    int code(int row, int column) const { return codes[static_cast<size_t>(row) * weight.k + column]; }
    size_t at(int row, int group) const {
        return (static_cast<size_t>(row / kBlock) * weight.groups + group) * kBlock + row % kBlock;
    }
    int group_of(int column) const { return weight.groups == 1 ? 0 : column / weight.group; }
    int zero_of(int row, int group) const { return zero.empty() ? weight.zero_all : zero[at(row, group)]; }
    float offset_of(int row, int group) const { return offset.floats.empty() ? 0.0f : offset.floats[at(row, group)]; }

    void pack(int threads) {
        packed.resize(static_cast<size_t>(packed_bytes(weight.kind, weight.n, weight.k)));
        prepack(weight.kind, codes.data(), weight.k, 8, 0, weight.n, weight.k, packed.data(), threads);
        weight.codes = packed.data();
    }
};

// Codes for scales and offsets; what they come to takes the place of the numbers.
void count(const Case& c, Made& made, Random& random) {
    Weight& w = made.weight;
    w.counted = c.counted;
    w.run = c.run;
    w.runs = (w.groups + w.run - 1) / w.run;
    const size_t facts = made.scale.floats.size(), blocks = facts / kBlock / static_cast<size_t>(w.groups);
    const int levels = c.counted == Counted::halves ? 16 : 256;
    made.counts.resize(facts);
    made.depths.resize(facts);
    made.unit = Numbers(c.scale_type, blocks * w.runs * kBlock);
    made.offset_unit = Numbers(c.offset_type, c.offset ? made.unit.floats.size() : 0);
    for (size_t i = 0; i < made.unit.floats.size(); i++) made.unit.set(i, (0.1f + random.uniform()) / 128.0f);
    for (size_t i = 0; i < made.offset_unit.floats.size(); i++) made.offset_unit.set(i, random.normal() / 64.0f);
    made.scale = Numbers(Type::f32, facts);
    made.offset = Numbers(Type::f32, c.offset ? facts : 0);
    for (size_t i = 0; i < facts; i++) {
        const int code = random.below(levels), depth = random.below(levels);
        const size_t group = i / kBlock % static_cast<size_t>(w.groups), block = i / kBlock / static_cast<size_t>(w.groups);
        const size_t unit = (block * w.runs + group / w.run) * kBlock + i % kBlock;
        made.counts[i] = static_cast<uint8_t>(c.counted == Counted::halves && c.offset ? code | depth << 4 : code);
        made.depths[i] = static_cast<uint8_t>(depth);
        const int value = c.counted == Counted::i8 ? static_cast<int8_t>(code) : code;
        made.scale.set(i, static_cast<float>(value) * made.unit.floats[unit]);
        if (c.offset) made.offset.set(i, static_cast<float>(depth) * made.offset_unit.floats[unit]);
    }
    w.scale = made.counts.data();
    w.unit = made.unit.data();
    w.offset = c.offset && c.counted != Counted::halves ? made.depths.data() : nullptr;
    w.offset_unit = c.offset ? made.offset_unit.data() : nullptr;
}

Made make_weight(const Case& c, Random& random) {
    Made made;
    Weight& w = made.weight;
    w.kind = c.kind;
    w.n = c.n;
    w.k = c.k;
    w.group = c.group;
    w.groups = c.groups();
    w.steps = steps_of(c.kind, c.k);
    for (int i = 0; i < 16; i++) {
        w.bytes[i] = static_cast<uint8_t>(random.below(wide(c.kind) ? 256 : 128));
        w.floats[i] = random.normal();
    }
    const int size = row_entry(c.kind);
    made.tables.resize(static_cast<size_t>((c.n + kBlock - 1) / kBlock) * 256 * size);
    for (size_t i = 0; i < made.tables.size(); i++) {
        const float number = random.normal();
        uint8_t bytes[4];
        std::memcpy(bytes, &number, 4);
        made.tables[i] = size == 1 ? static_cast<uint8_t>(random.below(256)) : bytes[i / 64 % 4];
    }
    w.tables = size == 0 ? nullptr : made.tables.data();
    made.codes.resize(static_cast<size_t>(c.n) * c.k);
    const int most = codes_of(c.kind);
    for (uint8_t& code : made.codes) code = static_cast<uint8_t>(random.below(most));
    made.pack(c.threads);
    const size_t facts = static_cast<size_t>((c.n + kBlock - 1) / kBlock) * w.groups * kBlock;
    made.scale = Numbers(c.scale_type, facts);
    for (size_t i = 0; i < facts; i++) made.scale.set(i, 0.01f + random.uniform());
    w.scale = made.scale.data();
    w.scale_type = c.scale_type;
    if (c.zero == Zero::constant) w.zero_all = random.below(most);
    if (c.zero == Zero::each) {
        made.zero.resize(facts);
        for (uint8_t& zero : made.zero) zero = static_cast<uint8_t>(random.below(most));
        w.zero = made.zero.data();
    }
    if (c.offset) {
        made.offset = Numbers(c.offset_type, facts);
        for (size_t i = 0; i < facts; i++) made.offset.set(i, random.normal());
        w.offset = made.offset.data();
        w.offset_type = c.offset_type;
    }
    if (c.counted != Counted::no) count(c, made, random);
    return made;
}

// Activations with what real ones have: outliers, tokens of zeros, zeros and tiny numbers in between.
void fill(Numbers& x, int m, int k, int64_t ld, Random& random) {
    for (int t = 0; t < m; t++) {
        const bool empty = m > 2 && random.below(8) == 0;
        const float size = random.below(4) == 0 ? 100.0f : 1.0f;
        for (int64_t j = 0; j < ld && t * ld + j < static_cast<int64_t>(x.floats.size()); j++) {
            float v = empty ? 0.0f : size * random.normal();
            if (random.below(32) == 0) v *= random.below(2) == 0 ? 30.0f : 1e-6f;
            // Between the rows is something that must not be read.
            x.set(static_cast<size_t>(t * ld + j), j < k ? v : std::numeric_limits<float>::quiet_NaN());
        }
    }
}

struct Output {
    std::vector<float> floats;
    std::vector<uint16_t> halves;
    std::vector<int32_t> ints;
    void* data = nullptr;

    Output(const Case& c, size_t count) {
        // Marks, to see what is written where nothing belongs.
        if (c.integers) {
            ints.assign(count, 0x5a5a5a5a);
            data = ints.data();
        } else if (c.y_type == Type::f32) {
            floats.assign(count, 12345.0f);
            data = floats.data();
        } else {
            halves.assign(count, 0x4640);
            data = halves.data();
        }
    }
    double get(size_t i) const {
        return !ints.empty() ? ints[i] : !floats.empty() ? static_cast<double>(floats[i]) : from_bf16(halves[i]);
    }
    double mark() const { return !ints.empty() ? 0x5a5a5a5a : !floats.empty() ? 12345.0 : from_bf16(0x4640); }
    bool same(const Output& other) const {
        return ints == other.ints && halves == other.halves && floats.size() == other.floats.size() &&
               (floats.empty() || std::memcmp(floats.data(), other.floats.data(), 4 * floats.size()) == 0);
    }
};

// What comes before and after a product.
struct Around {
    std::vector<float> bias, norm;
    Numbers residual{Type::f32, 0};
    int64_t ldr = 0;
    float x_scale = 1.0f;
    int32_t x_zero = 0;

    Around() = default;
    Around(const Case& c, Random& random) {
        bias.resize(c.bias ? static_cast<size_t>(c.n) : 0);
        norm.resize(c.eps > 0 ? static_cast<size_t>(c.k) : 0);
        for (float& v : bias) v = 10.0f * random.normal();
        for (float& v : norm) v = 1.0f + 0.5f * random.normal();
        // From one that no code is far from to one that most are beyond.
        x_scale = (0.2f + random.uniform()) * 8.0f / static_cast<float>(c.highest - c.lowest + 1);
        x_zero = c.lowest + random.below(c.highest - c.lowest + 1);
        if (!c.residual) return;
        ldr = c.n + random.below(3) * 7;
        residual = Numbers(c.y_type, static_cast<size_t>((c.m - 1) * ldr + c.n));
        for (size_t i = 0; i < residual.floats.size(); i++) residual.set(i, 10.0f * random.normal());
    }
};

Product product_of(const Case& c, const Made& made, const Numbers& x, int64_t ldx, Output& y, int64_t ldy, const Around& around) {
    Product p{};
    p.weight = made.weight;
    p.x = x.data();
    p.x_type = c.x_type;
    p.ldx = ldx;
    p.m = c.m;
    p.digits = c.digits;
    p.rounded = c.rounded();
    p.x_group = c.x_group;
    p.lowest = c.lowest;
    p.highest = c.highest;
    p.step_type = c.x_type == Type::bf16 ? Type::bf16 : Type::f32;
    p.x_scale = c.given ? &around.x_scale : nullptr;
    p.x_zero = c.given && c.digits == 2 ? &around.x_zero : nullptr;
    p.y = y.data;
    p.y_type = c.y_type;
    p.ldy = ldy;
    p.bias = around.bias.empty() ? nullptr : around.bias.data();
    p.integers = c.integers;
    p.threads = c.threads;
    p.norm = around.norm.empty() ? nullptr : around.norm.data();
    p.eps = c.eps;
    p.gate = c.gate;
    p.residual = around.residual.floats.empty() ? nullptr : around.residual.data();
    p.ldr = around.ldr;
    return p;
}

// One token by the definition, and how far from it a product may be: the sum of the sizes of all terms in units in the last
// place, as many as a sum of so many terms may cost, and the steps of the digits.
struct Expected {
    double y, allowed;
};

struct Reference {
    const Case& c;
    const Made& made;
    const Product& p;
    std::vector<double> real, size;  // (n, k): the weights that x meets, and the sum of the sizes of their parts

    Reference(const Case& c, const Made& made, const Product& p) : c(c), made(made), p(p) {
        const size_t count = static_cast<size_t>(c.n) * c.k;
        real.resize(count);
        size.resize(count);
        for (int i = 0; i < c.n; i++)
            for (int j = 0; j < c.k; j++) {
                const int g = made.group_of(j);
                const double code = value_of(made.weight, i, made.code(i, j)) - made.zero_of(i, g);
                const float scale = made.scale.floats[made.at(i, g)], offset = made.offset_of(i, g);
                const size_t at = static_cast<size_t>(i) * c.k + j;
                real[at] = c.integers ? code : code * scale + offset;
                // Pairs of bfloat16 round the weight, and there is only one way to do it.
                if (p.pairs) real[at] = from_bf16(to_bf16(static_cast<float>(code) * scale + offset));
                size[at] = std::fabs(code * scale) + std::fabs(static_cast<double>(offset));
            }
    }

    struct Grid {
        float step, zero;
    };

    Grid grid_of(double smallest, double largest) const {
        if (p.x_scale != nullptr) return {*p.x_scale, p.x_zero == nullptr ? 0.0f : static_cast<float>(*p.x_zero)};
        const float low = static_cast<float>(smallest), high = static_cast<float>(largest);
        const float levels = static_cast<float>(c.highest - c.lowest);
        const auto stored = [&](float step) {
            if (step == 0.0f) return 1.0f;
            step = std::max(step, std::numeric_limits<float>::min());
            return p.step_type == Type::bf16 ? from_bf16(to_bf16(step)) : step;
        };
        if (c.digits == 1) return {stored(std::max(-low, high) / (levels / 2)), 0.0f};
        const float step = stored(high / levels - low / levels), first = static_cast<float>(c.lowest);
        return {step, std::min(std::max(std::nearbyint(first - low / step), first), first + levels)};
    }

    // x of one token as the product sees it, and what is added to its size.
    struct Token {
        std::vector<double> x, doubt;
    };

    void round(Token& t, int start, int end, double inexact) const {
        double low = 0.0, high = 0.0;
        for (int j = start; j < end; j++) low = std::min(low, t.x[j]), high = std::max(high, t.x[j]);
        const Grid grid = grid_of(low, high);
        // Near the edge between two codes either is right, and between two grids all codes may be others.
        const Grid less = grid_of(low * (1 - inexact), high * (1 - inexact)),
                   more = grid_of(low * (1 + inexact), high * (1 + inexact)),
                   left = grid_of(low * (1 + inexact), high * (1 - inexact)),
                   right = grid_of(low * (1 - inexact), high * (1 + inexact));
        const bool same_zero = less.zero == more.zero && left.zero == right.zero && less.zero == left.zero;
        const bool sure = same_zero && (p.step_type == Type::f32 || (less.step == more.step && left.step == right.step));
        const double step = c.integers ? 1.0 : grid.step;
        for (int j = start; j < end; j++) {
            const float code = static_cast<float>(t.x[j]) / grid.step;
            const double off = inexact * std::fabs(code), edge = std::fabs(code - std::floor(code) - 0.5f);
            t.x[j] = step * std::min(std::max(std::nearbyint(code), c.lowest - grid.zero), c.highest - grid.zero);
            t.doubt[j] = step * (inexact == 0.0 ? 0.0 : !sure ? 1e9 : edge <= 4 * off ? 1.0 : off);
        }
    }

    Token token(const float* x) const {
        Token t;
        t.x.assign(x, x + c.k);
        t.doubt.assign(static_cast<size_t>(c.k), 0.0);
        double inexact = 0.0;  // relative, of what the norm gives
        if (p.norm != nullptr) {
            double mean = 0.0;
            for (double v : t.x) mean += v * v / c.k;
            const double unit = 1.0 / std::sqrt(mean + static_cast<double>(c.eps));
            for (int j = 0; j < c.k; j++) t.x[j] *= unit * p.norm[j];
            // A sum of squares in sixteen lanes loses up to half a unit a step, of which the root leaves a half.
            inexact = c.k / 16 * 0x1p-25 + 0x1p-22;
            for (int j = 0; j < c.k; j++) t.doubt[j] = std::fabs(t.x[j]) * (p.pairs ? 0x1.02p-8 : inexact);
        }
        if (c.rounded()) {
            const int group = c.x_group == 0 ? c.k : c.x_group;
            for (int start = 0; start < c.k; start += group) round(t, start, std::min(start + group, c.k), inexact);
        } else if (p.digits > 1) {
            // In each span numbers are multiples of a 32 000th or an 8 000 000th of the largest.
            const double steps = p.digits == 2 ? 32000.0 : 4000000.0;
            for (int start = 0; start < c.k; start += p.x_span) {
                const int end = std::min(start + p.x_span, c.k);
                double largest = 0.0;
                for (int j = start; j < end; j++) largest = std::max(largest, std::fabs(t.x[j]));
                for (int j = start; j < end; j++) t.doubt[j] += 0.55 * largest / steps;
            }
        }
        return t;
    }

    Expected expected(const Token& t, int column) const {
        const double* w = real.data() + static_cast<size_t>(column) * c.k;
        const double* s = size.data() + static_cast<size_t>(column) * c.k;
        double sum = 0.0, terms = 0.0, doubt = 0.0;
        for (int j = 0; j < c.k; j++) {
            sum += t.x[j] * w[j];
            terms += std::fabs(t.x[j]) * s[j];
            doubt += t.doubt[j] * s[j];
        }
        const double places = 16.0 + 4.0 * std::sqrt(static_cast<double>(c.k));
        return {sum, c.integers ? 0.0 : (terms + 256.0 * doubt) * places * 0x1p-24 + doubt};
    }
};

void compare(const Case& c, const Made& made, const Product& p, const float* x, int64_t ldx, const Output& y, int64_t ldy,
             const Around& around) {
    const Reference reference(c, made, p);
    for (int t = 0; t < c.m; t++) {
        const Reference::Token token = reference.token(x + t * ldx);
        for (int i = 0; i < c.n; i++) {
            Expected e = reference.expected(token, i);
            const auto added = [&](double v) {
                e.y += v;
                e.allowed += (std::fabs(e.y) + std::fabs(v)) * 0x1p-23;
            };
            if (c.bias) added(around.bias[static_cast<size_t>(i)]);
            if (c.residual) added(around.residual.floats[static_cast<size_t>(t * around.ldr + i)]);
            const double got = y.get(static_cast<size_t>(t * ldy + i)), size = std::max(std::fabs(e.y), std::fabs(got));
            if (!c.integers) e.allowed += size * (c.y_type == Type::bf16 ? 0x1.02p-8 : 0x1p-23) + 0x1p-100;
            if (!(std::fabs(got - e.y) <= e.allowed))
                return fail("%s: y[%d][%d] is %.9g, expected %.9g ± %.3g", c.text().c_str(), t, i, got, e.y, e.allowed);
        }
        for (int64_t i = c.n; i < ldy && t + 1 < c.m; i++)
            if (y.get(static_cast<size_t>(t * ldy + i)) != y.mark())
                return fail("%s: wrote y[%d][%d], beyond the row", c.text().c_str(), t, static_cast<int>(i));
    }
}

// y must be the gate of what the same product gives without one, which is compared as every product is. The tokens are
// taken in the portions that product() takes them in, because how a product is computed depends on their number.
void compare_gated(const Case& c, const Made& made, const Numbers& x, int64_t ldx, const Output& y, int64_t ldy,
                   const Around& around) {
    constexpr int kPortion = 384;
    const int half = c.n / 2;
    for (int first = 0; first < c.m; first += kPortion) {
        Case part = c;
        part.m = std::min(c.m - first, kPortion);
        part.gate = Gate::none;
        part.y_type = Type::f32;
        Output results(part, static_cast<size_t>(part.m) * c.n);
        Product p = product_of(part, made, x, ldx, results, c.n, around);
        p.x = static_cast<const uint8_t*>(x.data()) + first * ldx * size_of(c.x_type);
        if (const char* wrong = product(p)) return fail("%s: refused: %s", part.text().c_str(), wrong);
        compare(part, made, p, x.floats.data() + first * ldx, ldx, results, c.n, around);
        for (int t = 0; t < part.m; t++) {
            for (int i = 0; i < half; i++) {
                const size_t at = static_cast<size_t>(t * c.n + i);
                const double g = results.get(at), u = results.get(at + static_cast<size_t>(half));
                const double z = c.gate == Gate::silu ? g : 2.0 * std::sqrt(2.0 / 3.14159265358979) * (g + 0.044715 * g * g * g);
                const double share = 1.0 / (1.0 + std::exp(-z)), expected = g * share * u;
                // e^-z is as good as z is, and no larger than 2^125.
                const double relative = 0x1p-21 + 0x1p-22 * std::fabs(z) * (1.0 - share);
                const double stored = c.y_type == Type::bf16 ? 0x1.02p-8 : 0x1p-23;
                const double allowed = std::fabs(expected) * (relative + stored) + std::fabs(g * u) * 0x1p-124 + 0x1p-100;
                const double got = y.get(static_cast<size_t>((first + t) * ldy + i));
                if (!(std::fabs(got - expected) <= allowed))
                    return fail("%s: y[%d][%d] is %.9g, expected %.9g of %g and %g", c.text().c_str(), first + t, i, got,
                                expected, g, u);
            }
            for (int64_t i = half; i < ldy && first + t + 1 < c.m; i++)
                if (y.get(static_cast<size_t>((first + t) * ldy + i)) != y.mark())
                    return fail("%s: wrote y[%d][%d], beyond the row", c.text().c_str(), first + t, static_cast<int>(i));
        }
    }
}

void try_product(const Case& c) {
    Random random(c.seed);
    const Made made = make_weight(c, random);
    const int width = c.gate == Gate::none ? c.n : c.n / 2;
    const int64_t ldx = c.k + random.below(3) * 8, ldy = width + random.below(3) * 5;
    Numbers x(c.x_type, static_cast<size_t>((c.m - 1) * ldx + c.k));
    fill(x, c.m, c.k, ldx, random);
    const Around around(c, random);
    const size_t count = static_cast<size_t>((c.m - 1) * ldy + width);
    Output y(c, count), again(c, count);
    Product p = product_of(c, made, x, ldx, y, ldy, around);
    if (const char* wrong = product(p)) return fail("%s: refused: %s", c.text().c_str(), wrong);
    if (c.gate == Gate::none)
        compare(c, made, p, x.floats.data(), ldx, y, ldy, around);
    else
        compare_gated(c, made, x, ldx, y, ldy, around);
    // How the work is shared must not show.
    Product other = product_of(c, made, x, ldx, again, ldy, around);
    other.threads = c.threads == 1 ? 3 : 1;
    if (const char* wrong = product(other)) return fail("%s: refused: %s", c.text().c_str(), wrong);
    if (!y.same(again)) fail("%s: the result depends on the number of threads", c.text().c_str());
}

constexpr int kGroups[] = {16, 32, 64, 128, 0};  // 0: the row
constexpr int kColumns[] = {32, 64, 128};  // of x under one scale
constexpr float kEps[] = {0.0f, 0.0f, 1e-6f, 1.0f};  // 0: no norm
constexpr Gate kGates[] = {Gate::none, Gate::none, Gate::silu, Gate::gelu_tanh};

// Everything that `kind`, `k`, `m` and `digits` leave open, by lot.
Case drawn(Kind kind, int k, int m, int digits, uint64_t seed) {
    Random random(seed);
    Case c{};
    c.kind = kind;
    c.k = k;
    c.m = m;
    c.digits = digits;
    c.seed = seed;
    c.n = any_of(kN, random);
    const int group = kind == Kind::trit5 ? 0 : any_of(kGroups, random);
    c.group = group == 0 ? k : group;
    c.zero = static_cast<Zero>(random.below(3));
    c.offset = random.below(3) == 0;
    c.bias = random.below(2) == 0;
    c.scale_type = any_of(kTypes, random);
    c.offset_type = any_of(kTypes, random);
    c.counted = static_cast<Counted>(random.below(6) > 3 ? 1 + random.below(3) : 0);
    c.run = 1 << random.below(5);
    c.x_type = any_of(kTypes, random);
    c.y_type = kTypes[random.below(2)];
    c.threads = any_of(kThreads, random);
    if (digits == 1 || (digits == 2 && random.below(3) == 0)) {
        // Signed or unsigned, of eight bits or four.
        const int bits = random.below(2) == 0 ? 8 : 4;
        c.lowest = digits == 1 || random.below(2) == 0 ? -(1 << (bits - 1)) : 0;
        c.highest = c.lowest + (1 << bits) - 1;
    }
    c.given = c.rounded() && random.below(3) == 0;
    if (c.rounded() && random.below(3) == 0) {
        c.integers = true;
        c.group = k;
        c.counted = Counted::no;
        c.offset = c.bias = false;
        return c;
    }
    if (c.rounded() && !c.given && kind != Kind::trit5 && random.below(2) == 0) {
        const int columns = any_of(kColumns, random);
        if (group == 0 || group % columns == 0 || columns % group == 0) c.x_group = columns;
    }
    c.eps = any_of(kEps, random);
    c.gate = any_of(kGates, random);
    if (c.gate == Gate::none)
        c.residual = random.below(3) == 0;
    else
        c.n *= 2;
    return c;
}

int try_products(uint64_t seed, int one_in) {
    int count = 0, number = 0;
    for (int kind = 0; kind < kKinds; kind++)
        for (int k : kK)
            for (int m : kM)
                for (int digits = 0; digits <= (integer(static_cast<Kind>(kind)) ? 3 : 0); digits++) {
                    // One in three of a quick run, but a different one for every kind, k and m.
                    if (++number % one_in != 0) continue;
                    try_product(drawn(static_cast<Kind>(kind), k, m, digits, seed * 100000 + static_cast<uint64_t>(number)));
                    count++;
                }
    return count;
}

// Every code, alone: columns of one number each, products with ones and zeros.
void try_codes(Kind kind) {
    const int codes = codes_of(kind);
    for (int m : {1, 20}) {
        Case c{};
        c.kind = kind;
        c.n = 256;
        c.k = 20;
        c.m = m;
        c.group = c.k;
        c.threads = 1;
        c.x_type = c.m == 1 ? Type::f32 : Type::bf16;
        Random random(1);
        Made made = make_weight(c, random);
        std::fill(made.scale.floats.begin(), made.scale.floats.end(), 1.0f);
        // Five digits of three that share a byte lie four columns apart: 256 rows have all their combinations.
        const int powers[5] = {1, 3, 9, 27, 81};
        for (int i = 0; i < c.n; i++)
            for (int j = 0; j < c.k; j++)
                made.codes[static_cast<size_t>(i * c.k + j)] =
                    static_cast<uint8_t>(kind == Kind::trit5 ? i / powers[j / 4] % 3 : (i + j) % codes);
        made.pack(1);
        for (int from = 0; from < c.k; from += m) {
            Numbers x(c.x_type, static_cast<size_t>(c.m) * c.k);
            for (int t = 0; t < m; t++)
                for (int j = 0; j < c.k; j++) x.set(static_cast<size_t>(t * c.k + j), j == from + t ? 1.0f : 0.0f);
            Output y(c, static_cast<size_t>(c.m) * c.n);
            Product p = product_of(c, made, x, c.k, y, c.n, {});
            product(p);
            for (int t = 0; t < m; t++)
                for (int i = 0; i < c.n; i++) {
                    double expected = value_of(made.weight, i, made.code(i, from + t));
                    if (p.pairs) expected = from_bf16(to_bf16(static_cast<float>(expected)));
                    const double got = y.get(static_cast<size_t>(t * c.n + i));
                    if (got != expected)
                        return fail("%s: code %d is %.9g, expected %.9g", c.text().c_str(), made.code(i, from + t), got, expected);
                }
        }
    }
}

// The largest sums there can be: rows of the largest code and activations at the ends of int8.
void try_extremes() {
    struct Extreme {
        Kind kind;
        int k, code, zero, digits;
        bool alternating;
    };
    // Where int32 holds it: 255 · 128 · 65536 and 255 · 255 · 32768 fit, but only just.
    const Extreme extremes[] = {
        {Kind::u8, 65536, 255, 0, 1, false},  {Kind::u8, 65536, 0, 255, 1, false},   {Kind::u8, 640, 255, 0, 1, true},
        {Kind::u8, 640, 128, 1, 1, false},    {Kind::table4, 640, 15, 0, 1, false},  {Kind::table4, 640, 15, 0, 1, true},
        {Kind::table4, 640, 0, 127, 1, true}, {Kind::u8, 32768, 255, 0, 2, false},   {Kind::u8, 32768, 0, 255, 2, false},
        {Kind::u8, 640, 255, 0, 2, true},     {Kind::table4, 640, 0, 127, 2, false}, {Kind::u4, 32768, 15, 0, 2, true},
        {Kind::wide_table4, 65536, 15, 0, 1, false}, {Kind::wide_table4, 640, 0, 255, 1, true},
        {Kind::rows4, 65536, 15, 0, 1, false}, {Kind::rows2, 640, 3, 128, 1, true}, {Kind::rows3, 32768, 7, 0, 2, false}};
    for (const Extreme& e : extremes)
        for (int m : {1, 2, 7})
            for (int sign : {1, -1}) {
                Case c{};
                c.kind = e.kind;
                c.n = 17;
                c.k = e.k;
                c.m = m;
                c.group = e.k;
                c.threads = 2;
                c.digits = e.digits;
                c.lowest = e.digits == 1 ? -128 : 0;
                c.highest = c.lowest + 255;
                c.integers = true;
                Random random(2);
                Made made = make_weight(c, random);
                made.weight.zero_all = e.zero;
                made.weight.bytes[0] = 0;
                made.weight.bytes[15] = wide(e.kind) ? 255 : 127;
                std::fill(made.tables.begin(), made.tables.end(), static_cast<uint8_t>(255));
                std::fill(made.codes.begin(), made.codes.end(), static_cast<uint8_t>(e.code));
                made.pack(2);
                Numbers x(Type::f32, static_cast<size_t>(m) * e.k);
                // Steps of one: -127.5 becomes -128, and 127.5 as much as there is, 127. With a zero point ±255 are codes of
                // their own where all are alike, and else 255 is the length of the whole grid.
                const float most = e.digits == 1 || e.alternating ? 127.5f : 255.0f;
                for (size_t i = 0; i < x.floats.size(); i++) x.floats[i] = e.alternating && i % 2 ? -sign * most : sign * most;
                Output y(c, static_cast<size_t>(m) * c.n);
                Product p = product_of(c, made, x, e.k, y, c.n, {});
                product(p);
                const int64_t value = static_cast<int64_t>(value_of(made.weight, 0, e.code)) - e.zero;
                const int64_t plus = e.alternating ? e.k / 2 : sign > 0 ? e.k : 0;
                const bool longer = e.digits == 2 && !e.alternating;
                const int64_t expected = value * ((longer ? 255 : 127) * plus - (longer ? 255 : 128) * (e.k - plus));
                for (double got : {y.get(0), y.get(y.ints.size() - 1)})
                    if (got != static_cast<double>(expected))
                        return fail("%s code=%d zero=%d: the sum is %.0f, expected %lld", c.text().c_str(), e.code, e.zero, got,
                                    static_cast<long long>(expected));
            }
}

// A token with NaN or infinity has no finite result, and its neighbours are as they were.
void try_not_finite() {
    for (Kind kind : {Kind::u4, Kind::u8, Kind::wide_table4, Kind::rows4, Kind::float_rows3, Kind::e4m3})
        for (int digits = 0; digits <= (integer(kind) ? 3 : 0); digits++)
            for (int m : {1, 4, 13})
                for (Type type : kTypes)
                    for (uint32_t bits : {0x7fc00000u, 0xffc00000u, 0x7fffffffu, 0xffffffffu, 0x7f800000u, 0xff800000u}) {
                        float odd;
                        std::memcpy(&odd, &bits, 4);
                        Case c = drawn(kind, 100, m, digits, 77 + static_cast<uint64_t>(m));
                        c.n = 34;
                        c.group = m == 4 ? 100 : 32;
                        c.integers = false;
                        c.x_type = type;
                        c.residual = c.bias = false;
                        c.eps = bits % 2 == 0 ? 0.0f : 1e-6f;
                        c.gate = kGates[1 + digits % 3];
                        Random random(c.seed);
                        const Made made = make_weight(c, random);
                        Numbers x(type, static_cast<size_t>(m) * c.k);
                        fill(x, m, c.k, c.k, random);
                        const Around around(c, random);
                        const int width = c.gate == Gate::none ? c.n : c.n / 2;
                        const size_t count = static_cast<size_t>(m) * width;
                        Output y(c, count), before(c, count);
                        Product clean = product_of(c, made, x, c.k, before, width, around);
                        product(clean);
                        const int token = m / 2;
                        x.set(static_cast<size_t>(token) * c.k + 70, odd);
                        Product p = product_of(c, made, x, c.k, y, width, around);
                        product(p);
                        for (int t = 0; t < m; t++)
                            for (int i = 0; i < width; i++) {
                                const double got = y.get(static_cast<size_t>(t * width + i));
                                const bool good = t == token ? !std::isfinite(got)
                                                             : got == before.get(static_cast<size_t>(t * width + i));
                                if (!good)
                                    return fail("%s: with x[%d][70] = %g, y[%d][%d] is %g", c.text().c_str(), token, odd, t, i, got);
                            }
                    }
}

// Digits must hold whatever number is the largest of its span.
void try_largest(int count) {
    Case c{};
    c.kind = Kind::u4;
    c.n = c.m = 1;
    c.k = c.group = 32;
    c.threads = 1;
    Random random(3);
    Made made = make_weight(c, random);
    for (int i = 0; i < count; i++)
        for (c.digits = 2; c.digits <= 3; c.digits++) {
            Numbers x(Type::f32, 32);
            const float largest = std::ldexp(1.0f + random.uniform(), random.below(220) - 120);
            for (int j = 0; j < 32; j++) x.set(static_cast<size_t>(j), j == 20 ? largest : -random.uniform() * largest);
            Output y(c, 1);
            Product p = product_of(c, made, x, 32, y, 1, {});
            product(p);
            const int before = failures.load();
            compare(c, made, p, x.floats.data(), 32, y, 1, {});
            if (failures.load() != before) return fail("… where the largest number is %.9g", static_cast<double>(largest));
        }
}

// More tokens than a gated product takes at once.
void try_portions(uint64_t seed) {
    int number = 0;
    for (Kind kind : {Kind::u4, Kind::u8, Kind::float4})
        for (int digits = 0; digits <= (integer(kind) ? 3 : 0); digits++) {
            Case c = drawn(kind, 100, 385 + 15 * (number % 2), digits, seed * 100 + static_cast<uint64_t>(number));
            c.n = 34;
            c.integers = c.residual = false;
            c.gate = kGates[2 + number++ % 2];
            try_product(c);
        }
}

// What is nothing, and what must be refused.
void try_refusals() {
    Case c{};
    c.kind = Kind::u4;
    c.n = c.m = 2;
    c.k = c.group = 64;
    c.threads = 1;
    Random random(4);
    const Made made = make_weight(c, random);
    Numbers x(Type::f32, 128);
    Output y(c, 4);
    const Product good = product_of(c, made, x, 64, y, 2, {});
    Product p = good;
    p.m = 0;
    if (product(p) != nullptr) fail("a product of no tokens is refused");
    p = good;
    p.weight.n = 0;
    if (product(p) != nullptr) fail("a product with no rows is refused");
    const auto refused = [](Product p, const char* what) {
        if (product(p) == nullptr) fail("%s is not refused", what);
    };
    p = good;
    p.x = nullptr;
    refused(p, "a missing x");
    p = good;
    p.weight.kind = Kind::rows4;
    refused(p, "a weight without the tables of its rows");
    p = good;
    p.weight.group = 24;
    p.weight.groups = 3;
    refused(p, "a group of 24");
    p = good;
    p.weight.counted = Counted::u8;
    p.weight.run = p.weight.runs = 1;
    refused(p, "counted scales without a unit");
    p.weight.unit = x.data();
    p.weight.run = 3;
    refused(p, "a run of three groups");
    p = good;
    p.digits = 4;
    refused(p, "a fourth digit");
    p.digits = 1;
    refused(p, "a digit that nothing is rounded to");
    Product rounded = good;
    rounded.digits = 1;
    rounded.rounded = true;
    rounded.lowest = -128;
    rounded.highest = 127;
    if (product(rounded) != nullptr) fail("a product of rounded activations is refused");
    p = rounded;
    p.highest = 128;
    refused(p, "a code that is no int8");
    p = rounded;
    const float scale = 0.5f, none = 0.0f;
    const int32_t zero = 300;
    p.x_scale = &scale;
    if (product(p) != nullptr) fail("a product of activations with a given scale is refused");
    p.x_scale = &none;
    refused(p, "a given scale of zero");
    p.x_scale = &scale;
    p.x_group = 32;
    refused(p, "a given scale of groups");
    p.x_group = 0;
    p.digits = 2;
    refused(p, "two digits without a zero point");
    p.x_zero = &zero;
    refused(p, "a zero point that is no code");
    p = rounded;
    p.x_group = 48;
    refused(p, "activations in groups of no whole step");
    p = rounded;
    p.x_group = 32;
    p.integers = true;
    refused(p, "an integer result of activations in groups");
    p = rounded;
    p.integers = true;
    p.weight.group = 32;
    p.weight.groups = 2;
    refused(p, "an integer result of two groups");
    p = rounded;
    p.weight.kind = Kind::e4m3;
    refused(p, "an integer product of floating codes");
    p = good;
    p.gate = Gate::silu;
    p.residual = x.data();
    refused(p, "a residual after a gate");
    p = rounded;
    p.gate = Gate::silu;
    p.integers = true;
    refused(p, "a gate of integers");
    p = good;
    p.gate = Gate::gelu_tanh;
    p.weight.n = 1;
    refused(p, "a gate of one row");
}

}  // namespace

// Products from two threads at once, each with memory of its own.
void try_callers(uint64_t seed) {
    const auto some = [seed](int caller) {
        for (int i = 0; i < 40; i++) {
            const Kind kind = static_cast<Kind>(i % kKinds);
            Case c = drawn(kind, 300, kM[i % 8], integer(kind) ? i % 4 : 0, seed * 1000 + static_cast<uint64_t>(i + 100 * caller));
            c.n = 130;
            c.threads = 3;
            try_product(c);
        }
    };
    std::thread first(some, 1), second(some, 2);
    first.join();
    second.join();
}

int try_all_products(uint64_t seed, bool quick) {
    for (int kind = 0; kind < kKinds; kind++) try_codes(static_cast<Kind>(kind));
    try_extremes();
    try_not_finite();
    try_largest(quick ? 300 : 3000);
    try_refusals();
    try_portions(seed);
    return try_products(seed, quick ? 7 : 1);
}

}  // namespace arrondi
