// What the paths do besides products: quantizers against the portable path, transforms and tokens against their definition.
#include <algorithm>
#include <cstdio>
#include <limits>

#include "quantizers.h"
#include "selftest.h"
#include "tokens.h"
#include "transforms.h"

namespace arrondi {
namespace {

// Memory for numbers of a type that a job writes.
struct Written {
    Type type;
    std::vector<float> floats;
    std::vector<uint16_t> halves;

    Written(Type type, size_t count) : type(type) {
        if (type == Type::f32)
            floats.assign(count, -1.0f);
        else
            halves.assign(count, 0xbf80);
    }
    void* data() { return type == Type::f32 ? static_cast<void*>(floats.data()) : halves.data(); }
    double get(int64_t i) const {
        const size_t at = static_cast<size_t>(i);
        return type == Type::f32 ? static_cast<double>(floats[at]) : from_bf16(halves[at]);
    }
};

Numbers normal(Type type, int64_t count, Random& random) {
    Numbers x(type, static_cast<size_t>(count));
    for (size_t i = 0; i < x.floats.size(); i++) x.set(i, random.normal());
    return x;
}

double places(Type type) { return type == Type::f32 ? 0x1p-22 : 0x1.02p-8; }

// ---- quantizers --------------------------------------------------------------------------------------------------

struct Grid {
    const char* name;
    Fit fit;
    int qmin, qmax, bits;
    float divisor;
};
constexpr Grid kGrids[] = {
    {"symmetric", Fit::symmetric, -8, 7, 4, 7.5f},  {"symmetric8", Fit::symmetric, -127, 127, 8, 127.0f},
    {"extreme", Fit::extreme, -4, 3, 3, 1.0f},      {"affine", Fit::affine, 0, 15, 4, 1.0f},
    {"affine8", Fit::affine, -128, 127, 8, 1.0f},   {"offset", Fit::offset, 0, 3, 2, 1.0f},
    {"offset5", Fit::offset, 0, 31, 5, 1.0f},
};

// The grids and codes of one weight, and what became of them again.
struct Quantized {
    std::vector<float> scale, offset;
    std::vector<int32_t> zero;
    std::vector<uint8_t> codes, packed, repacked;
    std::vector<double> sums;
    bool fine = true;

    Quantized(const Groups& g) : scale(static_cast<size_t>(g.rows * g.groups)), offset(scale), zero(scale.size()) {}

    Groups bound(Groups g) {
        g.scale = scale.data();
        g.zero = g.fit == Fit::affine ? zero.data() : nullptr;
        g.offset = g.fit == Fit::offset ? offset.data() : nullptr;
        return g;
    }
    bool same_grid(const Quantized& other, size_t i) const {
        return scale[i] == other.scale[i] && offset[i] == other.offset[i] && zero[i] == other.zero[i];
    }
};

Quantized rounded(const Groups& on, int bits, int threads, Written& y) {
    Quantized q(on);
    const Groups g = q.bound(on);
    const size_t count = static_cast<size_t>(g.rows * g.columns);
    const int64_t row_bytes = (g.columns * bits + 7) / 8 + 1;
    q.codes.assign(count, 0xee);
    q.packed.assign(static_cast<size_t>(g.rows * row_bytes), 0xee);
    q.repacked = q.packed;
    q.sums.assign(static_cast<size_t>(2 * g.rows), -1.0);
    q.fine = round_groups({g, q.codes.data(), nullptr, 0, 0}, threads);
    Groups given = g;
    given.fit = Fit::given;
    q.fine = round_groups({given, nullptr, q.packed.data(), row_bytes, bits}, threads) && q.fine;
    pack_rows({g.rows, g.columns, row_bytes, bits, g.qmin, q.codes.data(), q.repacked.data()}, threads);
    restore({given, q.codes.data(), g.qmin < 0, y.data(), y.type, q.sums.data()}, threads);
    return q;
}

// Σ |error| of the nearest codes.
double lost_by(const Quantized& q, const Groups& g, const Numbers& x) {
    double lost = 0.0;
    for (int64_t row = 0; row < g.rows; row++)
        for (int64_t j = 0; j < g.columns; j++) {
            const size_t at = static_cast<size_t>(row * g.groups + j / g.group);
            const double v = x.floats[static_cast<size_t>(row * g.columns + j)], scale = q.scale[at];
            const double from = q.offset[at] - q.zero[at] * scale, code = std::nearbyint((v - from) / scale);
            const double near = std::min<double>(std::max<double>(code, g.qmin), g.qmax) * scale + from;
            lost += std::fabs(near - v);
        }
    return lost;
}

void try_quantizers(const Grid& grid, int64_t rows, int64_t columns, int64_t group, Random& random) {
    const Type x_type = any_of(kTypes, random), y_type = kTypes[random.below(2)];
    const int threads = any_of(kThreads, random);
    const Numbers x = normal(x_type, rows * columns, random);
    Groups g{};
    g.rows = rows;
    g.columns = columns;
    g.group = group;
    g.groups = (columns + group - 1) / group;
    g.qmin = grid.qmin;
    g.qmax = grid.qmax;
    g.fit = grid.fit;
    g.divisor = grid.divisor;
    g.scale_type = any_of(kTypes, random);
    g.x = x.data();
    g.x_type = x_type;
    char text[120];
    std::snprintf(text, sizeof text, "%s rows=%d columns=%d group=%d x=%s scale=%s", grid.name, static_cast<int>(rows),
                  static_cast<int>(columns), static_cast<int>(group), kTypeNames[static_cast<int>(x_type)],
                  kTypeNames[static_cast<int>(g.scale_type)]);
    Written y(y_type, static_cast<size_t>(rows * columns)), other_y = y;
    const Quantized here = rounded(g, grid.bits, threads, y);
    Quantized searched(g), split(g);
    std::vector<float> importance(static_cast<size_t>(columns));
    for (float& v : importance) v = random.uniform();
    const int power = random.below(3), twice_power = power == 0 ? 4 : power == 1 ? 5 : 8;
    const float* weights = random.below(2) == 0 ? importance.data() : nullptr;
    const bool mirrored = grid.fit == Fit::symmetric && random.below(2) == 0, normalize = random.below(2) == 0;
    const auto search = [&](Quantized& q) { q.fine = search_grids({q.bound(g), weights, twice_power, mirrored}, threads); };
    const auto halve = [&](Quantized& q) {
        q.fine = split_groups({q.bound(g), 0.7f, 10.0f, 1.01f, 10, normalize}, threads);
    };
    search(searched);
    halve(split);

    const char* name = path().name;
    use_path("portable");
    const Quantized there = rounded(g, grid.bits, threads, other_y);
    Quantized other_searched(g), other_split(g);
    search(other_searched);
    halve(other_split);
    use_path(name);

    if (!here.fine || !there.fine || !searched.fine || !split.fine) return fail("%s: refused", text);
    if (here.packed != here.repacked) return fail("%s: codes packed at once and afterwards differ", text);
    for (size_t i = 0; i < here.scale.size(); i++)
        if (!here.same_grid(there, i)) return fail("%s: another grid than the portable path", text);
    if (here.codes != there.codes) return fail("%s: other codes than the portable path", text);
    if (y.floats != other_y.floats || y.halves != other_y.halves) return fail("%s: restored to other numbers", text);
    for (size_t i = 0; i < here.sums.size(); i++)
        if (!(std::fabs(here.sums[i] - there.sums[i]) <= 1e-5 * std::fabs(there.sums[i])))
            return fail("%s: the sum of squares is %g, not %g", text, here.sums[i], there.sums[i]);
    // The order of a sum may turn the choice between grids that are as good; splitting may stop at another step.
    size_t apart = 0;
    for (size_t i = 0; i < here.scale.size(); i++) apart += !searched.same_grid(other_searched, i);
    if (apart > 1 + here.scale.size() / 20) fail("%s: a search finds %zu other grids", text, apart);
    const double lost = lost_by(split, g, x), other_lost = lost_by(other_split, g, x);
    if (!(std::fabs(lost - other_lost) <= 0.1 * other_lost + 1e-6))
        fail("%s: splitting loses %g, not %g", text, lost, other_lost);

    // A NaN and an infinity anywhere must be noticed.
    for (float odd : {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity()}) {
        Numbers bad = x;
        bad.set(static_cast<size_t>(random.below(static_cast<int>(rows * columns))), odd);
        Quantized q(g);
        Groups on = q.bound(g);
        on.x = bad.data();
        q.codes.resize(here.codes.size());
        if (round_groups({on, q.codes.data(), nullptr, 0, 0}, threads)) fail("%s: rounds %g without a word", text, odd);
        if (search_grids({on, weights, twice_power, mirrored}, threads)) fail("%s: searches %g without a word", text, odd);
    }
}

// Grids of super-blocks and of single groups are the same on every path, and what they leave out is less than what the widest grid does.
void try_superblocks(int elements, int span, bool table, bool offset, Random& random) {
    const int64_t groups = (span == 0 ? 1 : span) * (1 + random.below(40));
    const float starts[] = {15.0f, 14.0f, 17.0f, -16.0f};
    const double steps[] = {0.0, -0.5, 1.0};
    float cells[64];
    for (int i = 0; i < 64; i++) cells[i] = static_cast<float>(i / 4 * i / 4) - 100.0f;
    const Numbers x = normal(Type::f32, groups * elements, random);
    std::vector<float> w(x.floats.size());
    for (float& v : w) v = random.uniform();
    Superblocks s{};
    s.groups = groups;
    s.elements = elements;
    s.span = span;
    s.qmin = offset ? 0 : -16;
    s.qmax = offset ? 31 : 15;
    s.first = table ? -100.0f : static_cast<float>(s.qmin);
    s.cells = table ? cells : nullptr;
    s.cell_count = 64;
    s.cells_per_one = 64.0f / 256.0f;
    s.offset = s.below = offset;
    s.is_signed = !offset && random.below(2) == 0;
    s.starts = starts;
    s.start_count = s.is_signed ? 4 : 3;
    s.turns = 3;
    s.inner_low = s.is_signed ? -32 : 0;
    s.inner_high = 31;
    s.zero_scales = random.below(2) == 0;
    s.unit_type = any_of(kTypes, random);
    s.unit_steps = steps;
    s.unit_count = 3;
    s.x = x.floats.data();
    s.w = random.below(2) == 0 ? w.data() : nullptr;
    // Either axis may be the inner one.
    const bool elements_inside = random.below(2) == 0;
    s.x_element = s.w_element = elements_inside ? 1 : groups;
    s.x_group = s.w_group = elements_inside ? elements : 1;
    struct Found {
        std::vector<float> scale, shift, unit, shift_unit;
        bool fine;
    };
    const auto run = [&](int threads) {
        const size_t count = static_cast<size_t>(groups), runs = span == 0 ? 0 : count / static_cast<size_t>(span);
        Found f{std::vector<float>(count, 7.0f), std::vector<float>(offset ? count : 0, 7.0f), std::vector<float>(runs, 7.0f),
                std::vector<float>(offset ? runs : 0, 7.0f), false};
        Superblocks on = s;
        on.scale = f.scale.data();
        on.shift = f.shift.data();
        on.unit = f.unit.data();
        on.shift_unit = f.shift_unit.data();
        f.fine = search_superblocks(on, threads);
        return f;
    };
    const Found here = run(3);
    const char* name = path().name;
    use_path("portable");
    const Found there = run(1);
    use_path(name);
    if (!here.fine || !there.fine) return fail("grids of %d groups of %d are refused", static_cast<int>(groups), elements);
    if (here.scale != there.scale || here.shift != there.shift || here.unit != there.unit || here.shift_unit != there.shift_unit)
        fail("grids of %d groups of %d in runs of %d differ from the portable path", static_cast<int>(groups), elements, span);
    double lost = 0.0, all = 0.0;
    for (int64_t g = 0; g < groups && !table; g++) {
        const size_t at = static_cast<size_t>(g), run = span == 0 ? 0 : at / static_cast<size_t>(span);
        const double scale = here.scale[at] * (span == 0 ? 1.0 : here.unit[run]);
        const double shift = offset ? here.shift[at] * (span == 0 ? 1.0 : here.shift_unit[run]) : 0.0;
        for (int e = 0; e < elements; e++) {
            const size_t from = static_cast<size_t>(e * s.x_element + g * s.x_group);
            const double v = x.floats[from], code = scale == 0.0 ? 0.0 : std::nearbyint((v - shift) / scale);
            const double off = std::min<double>(std::max<double>(code, s.qmin), s.qmax) * scale + shift - v, weight = s.w == nullptr ? 1.0 : w[from];
            lost += weight * off * off;
            all += weight * v * v;
        }
    }
    // Thirty-two levels for some numbers of a bell curve.
    if (lost > 0.01 * all) fail("grids of %d groups of %d in runs of %d lose %g of %g", static_cast<int>(groups), elements, span, lost, all);
}

// GPTQ's column loop is the same arithmetic on every path.
void try_sweep(int64_t rows, Random& random) {
    const int64_t columns = 20, first = 3, last = 15, stop = 18, groups = 4;
    const auto make = [&](int64_t count, float low, float high) {
        std::vector<float> v(static_cast<size_t>(count));
        for (float& f : v) f = low + (high - low) * random.uniform();
        return v;
    };
    const std::vector<float> weight = make(columns * rows, -1, 1), owed = make((stop - first) * rows, -1, 1);
    const std::vector<float> factor = make(columns * columns, 0.2f, 1), scale = make(groups * rows, 0.1f, 0.2f);
    const std::vector<float> zero = make(groups * rows, 0, 4), offset = make(groups * rows, -1, 1);
    std::vector<int64_t> places(static_cast<size_t>(columns)), group(places);
    for (int64_t i = 0; i < columns; i++) {
        places[static_cast<size_t>(i)] = columns - 1 - i;
        group[static_cast<size_t>(i)] = i / 5;
    }
    struct Result {
        std::vector<float> rows, owed;
        std::vector<uint8_t> codes;
    };
    const int kind = random.below(3);
    const auto run = [&](int threads) {
        Result r{weight, owed, std::vector<uint8_t>(weight.size(), 0xee)};
        sweep({rows, first, last, stop, 0, 15, r.rows.data(), r.owed.data(), factor.data(), columns, r.codes.data(),
               places.data(), group.data(), scale.data(), kind == 1 ? zero.data() : nullptr,
               kind == 2 ? offset.data() : nullptr},
              threads);
        return r;
    };
    const Result here = run(3);
    const char* name = path().name;
    use_path("portable");
    const Result there = run(1);
    use_path(name);
    if (here.rows != there.rows || here.owed != there.owed || here.codes != there.codes)
        fail("the column loop of %d rows differs from the portable path", static_cast<int>(rows));
}

// ---- transforms --------------------------------------------------------------------------------------------------

void try_hadamard(int base, int shift, int rows, Type type, Random& random) {
    const int run = 1 << shift, n = base * run;
    const int64_t ldx = n + random.below(2) * 3, ldy = n + random.below(2) * 5;
    const Numbers x = normal(type, (rows - 1) * ldx + n, random);
    std::vector<float> matrix(static_cast<size_t>(base) * base);
    for (float& v : matrix) v = random.below(2) == 0 ? 1.0f : -1.0f;
    Written y(type, static_cast<size_t>((rows - 1) * ldy + n));
    Hadamard t{};
    t.rows = rows;
    t.base = base;
    t.shift = shift;
    t.matrix = base == 1 ? nullptr : matrix.data();
    t.scale = 0.25f;
    t.x = x.data();
    t.ldx = ldx;
    t.y = y.data();
    t.ldy = ldy;
    t.type = type;
    t.threads = any_of(kThreads, random);
    const char* kind = kTypeNames[static_cast<int>(type)];
    if (const char* wrong = hadamard(t)) return fail("hadamard base=%d run=%d %s: %s", base, run, kind, wrong);
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < n; c++) {
            const int column = c / run, lane = c % run;
            double sum = 0.0, size = 0.0;
            for (int b = 0; b < base; b++)
                for (int i = 0; i < run; i++) {
                    const double v = x.floats[static_cast<size_t>(r * ldx + b * run + i)];
                    const size_t at = (static_cast<size_t>(column / 4) * base + b) * 4 + column % 4;
                    const bool odd = __builtin_parity(static_cast<unsigned>(i & lane));
                    sum += v * (base == 1 ? 1.0f : matrix[at]) * (odd ? -1 : 1);
                    size += std::fabs(v);
                }
            sum *= 0.25;
            const double got = y.get(r * ldy + c), allowed = size * 0x1p-21 + std::fabs(sum) * places(type);
            if (!(std::fabs(got - sum) <= allowed))
                return fail("hadamard base=%d run=%d rows=%d %s: y[%d][%d] is %g, expected %g", base, run, rows, kind, r, c, got,
                            sum);
        }
    for (int r = 0; r + 1 < rows; r++)
        for (int64_t c = n; c < ldy; c++)
            if (y.get(r * ldy + c) != -1.0) return fail("hadamard base=%d run=%d: wrote beyond a row", base, run);
}

void try_signs(int m, int n, int k, Random& random) {
    const int words = (k + 31) / 32, threads = any_of(kThreads, random);
    const Type type = any_of(kTypes, random);
    Numbers x = normal(type, static_cast<int64_t>(m) * k, random);
    const float odd[] = {0.0f, -0.0f, std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()};
    for (float v : odd) x.set(static_cast<size_t>(random.below(m * k)), v);
    std::vector<int32_t> packed(static_cast<size_t>(m) * words, -1);
    if (const char* wrong = pack_signs({m, k, words, x.data(), k, type, packed.data(), threads})) return fail("signs: %s", wrong);
    for (int t = 0; t < m; t++)
        for (int j = 0; j < 32 * words; j++)
            if ((packed[static_cast<size_t>(t * words + j / 32)] >> j % 32 & 1) !=
                (j < k && x.floats[static_cast<size_t>(t * k + j)] > 0))
                return fail("signs of %g in %s: bit %d is wrong", j < k ? x.floats[static_cast<size_t>(t * k + j)] : 0.0f,
                            kTypeNames[static_cast<int>(type)], j);
    const int blocks = (n + kBlock - 1) / kBlock;
    std::vector<int32_t> w(static_cast<size_t>(blocks) * words * kBlock);
    const auto bit = [&](int row, int j) -> int32_t& {
        return w[(static_cast<size_t>(row / kBlock) * words + j / 32) * kBlock + row % kBlock];
    };
    for (int i = 0; i < n; i++)
        for (int j = 0; j < k; j++)
            if (random.below(2) != 0) bit(i, j) |= static_cast<int32_t>(1u << j % 32);
    const Numbers token_scale = normal(Type::f32, m, random), scale = normal(Type::f32, n, random);
    std::vector<int32_t> dots(static_cast<size_t>(m) * n);
    Written y(kTypes[random.below(2)], dots.size());
    Signs s{m, n, k, words, packed.data(), w.data(), dots.data(), true, Type::f32, nullptr, nullptr, threads};
    if (const char* wrong = multiply_signs(s)) return fail("signs: %s", wrong);
    s.integers = false;
    s.y = y.data();
    s.y_type = y.type;
    s.token_scale = token_scale.floats.data();
    s.scale = scale.floats.data();
    multiply_signs(s);
    for (int t = 0; t < m; t++)
        for (int i = 0; i < n; i++) {
            int sum = 0;
            for (int j = 0; j < k; j++)
                sum += (packed[static_cast<size_t>(t * words + j / 32)] ^ bit(i, j)) >> j % 32 & 1 ? -1 : 1;
            const size_t at = static_cast<size_t>(t * n + i);
            if (dots[at] != sum) return fail("signs m=%d n=%d k=%d: [%d][%d] is %d, expected %d", m, n, k, t, i, dots[at], sum);
            const double real = static_cast<double>(sum) * token_scale.floats[static_cast<size_t>(t)] *
                                scale.floats[static_cast<size_t>(i)];
            if (!(std::fabs(y.get(static_cast<int64_t>(at)) - real) <= std::fabs(real) * places(y.type)))
                return fail("signs m=%d n=%d k=%d: [%d][%d] is %g, expected %g", m, n, k, t, i, y.get(static_cast<int64_t>(at)), real);
        }
}

void try_reading(Random& random) {
    for (int vectors : {0, 1, 7, 4096}) {
        std::vector<int32_t> words(static_cast<size_t>(vectors) * 16);
        int32_t all = 0;
        for (int32_t& v : words) all ^= v = static_cast<int32_t>(random.next());
        const int32_t got = read_memory(reinterpret_cast<const uint8_t*>(words.data()), vectors * 64, 3);
        if (got != all) return fail("%d vectors were not all read", vectors);
    }
}

// ---- tokens ------------------------------------------------------------------------------------------------------

void try_dense(int m, int n, int k, Random& random) {
    const Type type = any_of(kTypes, random);
    const int64_t ldw = k + random.below(2) * 8;
    const Numbers w = normal(type, (n - 1) * ldw + k, random), x = normal(Type::f32, static_cast<int64_t>(m) * k, random);
    const Numbers bias = normal(Type::f32, n, random);
    const bool added = random.below(2) == 0;
    std::vector<float> y(static_cast<size_t>(m) * n);
    if (const char* wrong = dense({m, n, k, x.floats.data(), w.data(), type, ldw, added ? bias.floats.data() : nullptr, y.data(),
                                   any_of(kThreads, random)}))
        return fail("dense: %s", wrong);
    for (int t = 0; t < m; t++)
        for (int i = 0; i < n; i++) {
            double sum = added ? bias.floats[static_cast<size_t>(i)] : 0.0, size = std::fabs(sum);
            for (int j = 0; j < k; j++) {
                const double part = static_cast<double>(w.floats[static_cast<size_t>(i * ldw + j)]) *
                                    x.floats[static_cast<size_t>(t * k + j)];
                sum += part;
                size += std::fabs(part);
            }
            const double got = y[static_cast<size_t>(t * n + i)];
            if (!(std::fabs(got - sum) <= size * 0x1p-20))
                return fail("dense m=%d n=%d k=%d %s: [%d][%d] is %g, expected %g", m, n, k, kTypeNames[static_cast<int>(type)], t,
                            i, got, sum);
        }
}

void try_attention(int shared, int width, int length, Type type, Random& random) {
    const int key_heads = 2, heads = key_heads * shared;
    const int64_t stride = width + 16, head_stride = length * stride;
    const Numbers query = normal(type, static_cast<int64_t>(heads) * width, random);
    const Numbers keys = normal(type, key_heads * head_stride, random), values = normal(type, key_heads * head_stride, random);
    Written y(type, static_cast<size_t>(heads) * width);
    const float scale = 1.0f / std::sqrt(static_cast<float>(width));
    if (const char* wrong = attend({heads, key_heads, width, length, query.data(), keys.data(), head_stride, stride, values.data(),
                                    head_stride, stride, y.data(), type, scale, any_of(kThreads, random)}))
        return fail("attention: %s", wrong);
    std::vector<double> share(static_cast<size_t>(length));
    for (int q = 0; q < heads; q++) {
        const int64_t from = q / shared * head_stride;
        double top = -1e30, all = 0.0;
        for (int t = 0; t < length; t++) {
            double& s = share[static_cast<size_t>(t)] = 0.0;
            for (int i = 0; i < width; i++)
                s += static_cast<double>(query.floats[static_cast<size_t>(q * width + i)]) *
                     keys.floats[static_cast<size_t>(from + t * stride + i)] * scale;
            top = std::max(top, s);
        }
        for (double& s : share) all += s = std::exp(s - top);
        for (int i = 0; i < width; i++) {
            double sum = 0.0;
            for (int t = 0; t < length; t++)
                sum += share[static_cast<size_t>(t)] / all * values.floats[static_cast<size_t>(from + t * stride + i)];
            const double got = y.get(static_cast<int64_t>(q) * width + i);
            if (!(std::fabs(got - sum) <= 2e-5 + std::fabs(sum) * places(type)))
                return fail("attention width=%d length=%d %s: [%d][%d] is %g, expected %g", width, length,
                            kTypeNames[static_cast<int>(type)], q, i, got, sum);
        }
    }
}

// A key that is no number spoils what its queries see, a value only its own column; an infinite score as well, but for one that
// is infinitely small among others.
void try_attention_not_finite(int length, Type type, Random& random) {
    const float nan = std::numeric_limits<float>::quiet_NaN(), infinity = std::numeric_limits<float>::infinity();
    const int width = 32, heads = 4;
    for (const float bad : {nan, infinity, -infinity}) {
        for (int where = std::isnan(bad) ? 0 : 1; where < 3; where++) {  // an infinite query meets keys of either sign
            Numbers given[3] = {normal(type, heads * width, random), normal(type, 2 * length * width, random),
                                normal(type, 2 * length * width, random)};
            for (int i = 0; i < heads; i++) given[0].set(static_cast<size_t>(i * width), 1.0f);
            const int at = random.below(length);
            given[where].set(static_cast<size_t>(where == 0 ? 0 : at * width), bad);
            Written y(type, static_cast<size_t>(heads) * width);
            if (attend({heads, 2, width, length, given[0].data(), given[1].data(), length * width, width, given[2].data(),
                        length * width, width, y.data(), type, 0.2f, any_of(kThreads, random)}) != nullptr)
                return fail("attention of what is not finite is refused");
            for (int q = 0; q < heads; q++)
                for (int i = 0; i < width; i++) {
                    const double got = y.get(static_cast<int64_t>(q) * width + i);
                    // The first key head serves two queries.
                    const bool touched = where == 0 ? q == 0 : where == 1 ? q < 2 : q < 2 && i == 0;
                    const bool fades = where == 1 && bad == -infinity && length > 1;
                    if (!touched || fades ? !std::isfinite(got) : where == 2 ? std::isfinite(got) : !std::isnan(got))
                        return fail("attention length=%d %s of %g in operand %d: [%d][%d] is %g", length,
                                    kTypeNames[static_cast<int>(type)], static_cast<double>(bad), where, q, i, got);
                }
        }
    }
}

void try_rotation(int width, Type type, Random& random) {
    const int rows = random.below(4) == 0 ? 70 : 1 + random.below(5), heads = 1 + random.below(3), key_heads = random.below(3);
    const int turned = (heads + key_heads) * width, half = width / 2;
    const int64_t ldx = turned + random.below(2) * 24;
    const Numbers before = normal(type, rows * ldx, random);
    const int64_t angles = static_cast<int64_t>(rows) * width;
    const Numbers cos = normal(type, angles, random), sin = normal(type, angles, random);
    const Numbers norm = normal(Type::f32, width, random), key_norm = normal(Type::f32, width, random);
    const bool normed = random.below(2) == 0;
    const float eps = random.below(2) == 0 ? 1.0f : 1e-6f;
    Numbers x = before;
    void* data = type == Type::f32 ? static_cast<void*>(x.floats.data()) : x.halves.data();
    Rotation r{rows, heads, key_heads, width, data, ldx, cos.data(), sin.data(), type, normed ? norm.floats.data() : nullptr,
               normed ? key_norm.floats.data() : nullptr, eps, any_of(kThreads, random)};
    const char* kind = kTypeNames[static_cast<int>(type)];
    if (const char* wrong = rotate(r)) return fail("rotate width=%d %s: %s", width, kind, wrong);
    std::vector<double> a(static_cast<size_t>(width));
    for (int row = 0; row < rows; row++) {
        for (int head = 0; head < heads + key_heads; head++) {
            const size_t at = static_cast<size_t>(row * ldx + head * width), angle = static_cast<size_t>(row * width);
            double mean = 0.0;
            for (int i = 0; i < width; i++) {
                a[static_cast<size_t>(i)] = before.floats[at + static_cast<size_t>(i)];
                mean += a[static_cast<size_t>(i)] * a[static_cast<size_t>(i)] / width;
            }
            const float* factor = head < heads ? norm.floats.data() : key_norm.floats.data();
            for (int i = 0; normed && i < width; i++)
                a[static_cast<size_t>(i)] *= factor[i] / std::sqrt(mean + static_cast<double>(eps));
            for (int i = 0; i < width; i++) {
                const size_t j = static_cast<size_t>(i);
                const double one = a[j] * cos.floats[angle + j];
                const double two = (i < half ? -a[j + half] : a[j - half]) * sin.floats[angle + j];
                const double got = type == Type::f32 ? x.floats[at + j] : from_bf16(x.halves[at + j]);
                const double relative = width / 16 * 0x1p-25 + 0x1p-21;
                const double allowed = (std::fabs(one) + std::fabs(two)) * relative + std::fabs(one + two) * places(type);
                if (!(std::fabs(got - one - two) <= allowed))
                    return fail("rotate rows=%d heads=%d+%d width=%d %s norm=%d eps=%g: [%d][%d][%d] is %g, expected %g", rows, heads,
                                key_heads, width, kind, normed, static_cast<double>(eps), row, head, i, got, one + two);
            }
        }
        for (size_t i = static_cast<size_t>(row * ldx + turned); i < static_cast<size_t>((row + 1) * ldx); i++)
            if (type == Type::f32 ? x.floats[i] != before.floats[i] : x.halves[i] != before.halves[i])
                return fail("rotate width=%d %s: wrote beyond the heads", width, kind);
    }
    r.rows = 0;
    for (int odd : {0, 15, 258}) {
        r.width = odd;
        if (rotate(r) == nullptr) fail("rotate takes heads of width %d", odd);
    }
}

}  // namespace

void try_jobs(uint64_t seed, bool quick) {
    Random random(seed + 1000);
    for (int turn = 0; turn < (quick ? 1 : 4); turn++) {
        for (const Grid& grid : kGrids)
            for (int64_t columns : {1, 16, 40, 300})
                for (int64_t group : {16, 32, 100})
                    try_quantizers(grid, 1 + random.below(20), columns, std::min(group, columns), random);
        for (int64_t rows : {1, 16, 50, 64, 130}) try_sweep(rows, random);
        for (int elements : {16, 32})
            for (int span : {0, 1, 5, 8, 16, 24})
                for (int kind = 0; kind < 3; kind++) try_superblocks(elements, span, kind == 1, kind == 2, random);
        for (Type type : {Type::f32, Type::bf16})
            for (int rows : {1, 3, 20}) {
                for (int shift = 0; shift <= 10; shift++) try_hadamard(1, shift, rows, type, random);
                for (int shift = 0; shift <= 6; shift++) try_hadamard(shift % 2 == 0 ? 12 : 20, shift, rows, type, random);
            }
        for (int m : {1, 2, 3, 13})
            for (int k : {1, 31, 33, 200, 1030}) try_signs(m, any_of(kN, random), k, random);
        try_reading(random);
        for (int m = 1; m <= 4; m++)
            for (int k : kK) try_dense(m, any_of(kN, random), k, random);
        for (Type type : {Type::f32, Type::bf16})
            for (int length : {1, 15, 16, 100}) try_attention(1 + random.below(3), 16 << random.below(4), length, type, random);
        for (Type type : {Type::f32, Type::bf16})
            for (int length : {1, 4, 5, 17}) try_attention_not_finite(length, type, random);
        for (Type type : {Type::f32, Type::bf16})
            for (int width : {2, 16, 20, 34, 64, 80, 96, 128, 250, 256}) try_rotation(width, type, random);
    }
}

}  // namespace arrondi
