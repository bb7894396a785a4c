// Plans of networks on codes against their definition, every value in memory that ends with its slack.
#include <algorithm>

#include "codes.h"
#include "selftest.h"

namespace arrondi {
namespace {

using Codes8 = std::vector<uint8_t>;

Codes8 codes(int64_t count, Random& random) {
    Codes8 x(static_cast<size_t>(count + kSlack));
    for (uint8_t& v : x) v = static_cast<uint8_t>(random.below(8) == 0 ? 255 * random.below(2) : random.below(256));
    return x;
}

int64_t bytes(const Codes8& x) { return static_cast<int64_t>(x.size()); }

// The multiplication and the rounding of float32, once each.
int requantized(int32_t sum, const Requantizer& r, size_t lane) {
    const float product = static_cast<float>(sum) * static_cast<const float*>(r.multiplier)[lane];
    const double code = std::nearbyint(static_cast<double>(product)) + r.zero;
    return static_cast<int>(std::min<double>(std::max<double>(code, r.low), r.high));
}

// Weights (outputs, runs, inside) and where they go in blocks of sixteen.
struct Layer {
    int outputs, runs, inside, quads;
    std::vector<int8_t> plain, packed;
    std::vector<int32_t> bias, offset;
    std::vector<float> multiplier;

    Layer(int outputs, int runs, int inside, Random& random)
        : outputs(outputs), runs(runs), inside(inside), quads((inside + 3) / 4),
          plain(static_cast<size_t>(outputs * runs * inside)),
          packed(static_cast<size_t>((outputs + 15) / 16 * runs * quads * 64)), bias((static_cast<size_t>(outputs) + 15) / 16 * 16),
          offset(static_cast<size_t>(runs)), multiplier(bias.size()) {
        for (int8_t& v : plain) v = static_cast<int8_t>(random.below(4) == 0 ? -128 + 255 * random.below(2) : random.below(256) - 128);
        for (int o = 0; o < outputs; o++) {
            bias[static_cast<size_t>(o)] = random.below(20000) - 10000;
            multiplier[static_cast<size_t>(o)] = random.uniform() * 0.01f;
            for (int r = 0; r < runs; r++)
                for (int i = 0; i < inside; i++)
                    packed[static_cast<size_t>((((o / 16 * runs + r) * quads + i / 4) * 16 + o % 16) * 4 + i % 4)] = at(o, r, i);
        }
    }
    int8_t at(int o, int r, int i) const { return plain[static_cast<size_t>((o * runs + r) * inside + i)]; }
};

void try_convolution(Random& random) {
    const int kernel = 1 + random.below(3), stride = 1 + random.below(2), channels = 1 + random.below(20), groups = 1 + random.below(2);
    const int n = 1 + random.below(3), height = kernel + random.below(6), width = kernel + random.below(6);
    const int out_height = (height - kernel) / stride + 1, out_width = (width - kernel) / stride + 1;
    const bool alone = groups == 1;
    const int outputs = any_of({1, 5, 16, 33, 64, 100}, random), pixel = channels * groups, y_pixel = outputs * groups;
    Layer l(outputs, alone ? kernel : kernel * kernel, alone ? kernel * channels : channels, random);
    for (int r = 0; r < l.runs; r++)
        l.offset[static_cast<size_t>(r)] = alone ? r * width * pixel : (r / kernel * width + r % kernel) * pixel;
    Codes8 x = codes(static_cast<int64_t>(n) * height * width * pixel, random);
    const bool floats = random.below(4) == 0;
    const int64_t count = static_cast<int64_t>(n) * out_height * out_width * y_pixel;
    Codes8 y(static_cast<size_t>(count) * (floats ? 4 : 1));
    const Requantizer end{l.multiplier.data(), random.below(256), random.below(20), 255 - random.below(20), Arithmetic::floats, floats};
    CodePlan plan;
    const int from = plan.slot(x.data(), bytes(x)), to = plan.slot(y.data(), bytes(y));
    for (int g = 0; g < groups; g++)
        if (const char* wrong = plan.convolution(
                from, to, {n, height, width, pixel, out_height, out_width, stride, stride, g * channels, outputs, g * outputs, y_pixel,
                           l.runs, l.quads, l.offset.data(), l.packed.data(), l.bias.data(), end}))
            return fail("convolution of codes: %s", wrong);
    plan.run({}, 1, 0, plan.steps(), any_of(kThreads, random));
    for (int64_t i = 0; i < count; i++) {
        const int o = static_cast<int>(i % outputs), g = static_cast<int>(i / outputs % groups);
        const int64_t at = i / y_pixel, column = at % out_width, line = at / out_width % out_height, image = at / out_width / out_height;
        const int64_t place = ((image * height + line * stride) * width + column * stride) * pixel + g * channels;
        int32_t sum = l.bias[static_cast<size_t>(o)];
        for (int r = 0; r < l.runs; r++)
            for (int k = 0; k < l.inside; k++) sum += x[static_cast<size_t>(place + l.offset[static_cast<size_t>(r)] + k)] * l.at(o, r, k);
        float real;
        std::memcpy(&real, &y[static_cast<size_t>(floats ? 4 * i : 0)], floats ? 4 : 0);
        const bool same = floats ? real == static_cast<float>(sum) * l.multiplier[static_cast<size_t>(o)]
                                 : y[static_cast<size_t>(i)] == requantized(sum, end, static_cast<size_t>(o));
        if (!same) return fail("convolution of codes: %d × %d of %d channels to %d: another result at %d", kernel, kernel, channels, outputs, static_cast<int>(i));
    }
}

void try_depthwise(Random& random) {
    const int kernel = 1 + random.below(4), stride = 1 + random.below(2), channels = any_of({1, 16, 63, 64, 130}, random);
    const int n = 1 + random.below(2), height = kernel + random.below(5), width = kernel + random.below(5);
    const int out_height = (height - kernel) / stride + 1, out_width = (width - kernel) / stride + 1;
    const int taps = (kernel * kernel + 3) / 4 * 4, blocks = (channels + 63) / 64;
    const Layer l(channels, 1, kernel * kernel, random);
    std::vector<int8_t> packed(static_cast<size_t>(blocks * taps * 64));
    std::vector<int32_t> offset(static_cast<size_t>(taps)), bias(static_cast<size_t>(blocks * 64));
    std::vector<float> multiplier(bias.size());
    for (int t = 0; t < kernel * kernel; t++) offset[static_cast<size_t>(t)] = (t / kernel * width + t % kernel) * channels;
    for (int c = 0; c < channels; c++) {
        const int vector = c % 16 / 4, lane = c % 64 / 16 * 4 + c % 4;
        bias[static_cast<size_t>(c / 64 * 64 + vector * 16 + lane)] = l.bias[static_cast<size_t>(c)];
        multiplier[static_cast<size_t>(c / 64 * 64 + vector * 16 + lane)] = l.multiplier[static_cast<size_t>(c)];
        for (int t = 0; t < kernel * kernel; t++)
            packed[static_cast<size_t>((((c / 64 * (taps / 4) + t / 4) * 4 + vector) * 16 + lane) * 4 + t % 4)] = l.at(c, 0, t);
    }
    Codes8 x = codes(static_cast<int64_t>(n) * height * width * channels, random);
    Codes8 y(static_cast<size_t>(n * out_height * out_width * channels));
    const Requantizer end{multiplier.data(), random.below(256), random.below(20), 255, Arithmetic::floats, false};
    Requantizer plain = end;
    plain.multiplier = l.multiplier.data();
    CodePlan plan;
    const int from = plan.slot(x.data(), bytes(x)), to = plan.slot(y.data(), bytes(y));
    if (const char* wrong = plan.depthwise(from, to, {n, height, width, channels, out_height, out_width, stride, stride, taps,
                                                      offset.data(), packed.data(), bias.data(), end}))
        return fail("depthwise: %s", wrong);
    plan.run({}, 1, 0, 1, any_of(kThreads, random));
    for (size_t i = 0; i < y.size(); i++) {
        const int at = static_cast<int>(i), c = at % channels, column = at / channels % out_width;
        const int line = at / channels / out_width % out_height, image = at / channels / out_width / out_height;
        const int place = ((image * height + line * stride) * width + column * stride) * channels + c;
        int32_t sum = l.bias[static_cast<size_t>(c)];
        for (int t = 0; t < kernel * kernel; t++) sum += x[static_cast<size_t>(place + offset[static_cast<size_t>(t)])] * l.at(c, 0, t);
        if (y[i] != requantized(sum, plain, static_cast<size_t>(c)))
            return fail("depthwise: %d × %d of %d channels: another code at %d", kernel, kernel, channels, at);
    }
}

void try_pair(Random& random) {
    const int count = 1 + random.below(200);
    const bool product = random.below(2) == 0;
    Codes8 a = codes(count, random), b = codes(count, random), y(static_cast<size_t>(count));
    Pair p{count, product, random.below(256), random.below(256), 128 * random.below(2), random.uniform(), random.uniform(),
           random.normal() * 50.0f, 0, 255, Arithmetic::floats, {}};
    p.low -= p.up, p.high -= p.up;
    CodePlan plan;
    const int from = plan.slot(a.data(), bytes(a)), other = plan.slot(b.data(), bytes(b)), to = plan.slot(y.data(), bytes(y));
    if (const char* wrong = plan.pair(from, other, to, p)) return fail("pair: %s", wrong);
    plan.run({}, 1, 0, 1, any_of(kThreads, random));
    for (size_t i = 0; i < y.size(); i++) {
        const int u = a[i] - p.down_a, v = b[i] - p.down_b;
        const float inner = static_cast<float>(static_cast<double>(v) * p.of_b + p.fixed);
        const float sum = product ? static_cast<float>(u * v) * p.of_a + p.fixed : static_cast<float>(static_cast<double>(u) * p.of_a + inner);
        const double code = std::min(std::max(std::nearbyint(static_cast<double>(sum)), -1.0 * p.up), 255.0 - p.up) + p.up;
        if (y[i] != static_cast<int>(code)) return fail("pair: %d, expected %g at %d", y[i], code, static_cast<int>(i));
    }
}

void try_pools(Random& random) {
    const int n = 1 + random.below(3), height = 1 + random.below(8), width = 1 + random.below(8), channels = any_of({1, 6, 16, 64, 100}, random);
    const int kernel = 1 + random.below(3), stride = 1 + random.below(2), top = random.below(kernel), left = random.below(kernel);
    const int out_height = (height + top - 1) / stride + 1, out_width = (width + left - 1) / stride + 1;
    Codes8 x = codes(static_cast<int64_t>(n) * height * width * channels, random);
    Codes8 y(static_cast<size_t>(n * out_height * out_width * channels)), m(static_cast<size_t>(n * channels));
    const float multiplier = random.uniform();
    const Requantizer end{&multiplier, random.below(256), 3, 250, Arithmetic::floats, false};
    const Pool p{n, height, width, channels, out_height, out_width, kernel, kernel, stride, stride, 1, 1, top, left, random.below(256), end, 1.0f, 1.0f, 0, nullptr};
    CodePlan plan;
    const int from = plan.slot(x.data(), bytes(x)), to = plan.slot(y.data(), bytes(y)), mean = plan.slot(m.data(), bytes(m));
    if (const char* wrong = plan.largest(from, to, p)) return fail("largest: %s", wrong);
    if (const char* wrong = plan.mean(from, mean, p)) return fail("mean: %s", wrong);
    plan.run({}, 1, 0, 2, any_of(kThreads, random));
    const auto code = [&](int image, int line, int column, int c) {
        return static_cast<int>(x[static_cast<size_t>(((image * height + line) * width + column) * channels + c)]);
    };
    for (size_t i = 0; i < y.size(); i++) {
        const int at = static_cast<int>(i), column = at / channels % out_width * stride - left;
        const int line = at / channels / out_width % out_height * stride - top, image = at / channels / out_width / out_height;
        int found = 0;
        for (int u = std::max(line, 0); u < std::min(line + kernel, height); u++)
            for (int v = std::max(column, 0); v < std::min(column + kernel, width); v++) found = std::max(found, code(image, u, v, at % channels));
        if (y[i] != found) return fail("largest: %d, expected %d at %d", y[i], found, at);
    }
    for (size_t i = 0; i < m.size(); i++) {
        int sum = -height * width * p.zero;
        for (int u = 0; u < height; u++)
            for (int v = 0; v < width; v++) sum += code(static_cast<int>(i) / channels, u, v, static_cast<int>(i) % channels);
        if (m[i] != requantized(sum, end, 0)) return fail("mean: another code at %d", static_cast<int>(i));
    }
}

// float32 → codes → another order → a table → float32 again, over two samples in turn.
void try_ends(Random& random) {
    const int channels = 1 + random.below(5), space = 1 + random.below(40), size = channels * space;
    Numbers x(Type::f32, static_cast<size_t>(2 * size));
    for (size_t i = 0; i < x.floats.size(); i++) x.set(i, random.normal() * 40.0f);
    Codes8 last(static_cast<size_t>(size + kSlack)), plain(last), mixed(last), table = codes(256 - kSlack, random);
    std::vector<float> y(x.floats.size());
    std::vector<int32_t> index(static_cast<size_t>(size));
    for (int32_t& i : index) i = random.below(size + 1) - 1;
    CodePlan plan;
    const int from = plan.slot(nullptr, 4 * size), a = plan.slot(last.data(), bytes(last)), b = plan.slot(plain.data(), bytes(plain));
    const int c = plan.slot(mixed.data(), bytes(mixed)), to = plan.slot(nullptr, 4 * size);
    const char* wrong[] = {
        plan.round(from, a, {1, channels, space, 0.5f, 100, 2, 255}),
        plan.move(a, b, {1, {1, 1, 1, channels, space}, {0, 0, 0, 1, channels}, {0, 0, 0, space, 1}, 0, 0, size, 0}),
        plan.gather(b, c, 1, size, index.data(), 7), plan.table(c, b, size, table.data()), plan.restore(b, to, size, 100, 0.5f)};
    for (const char* one : wrong)
        if (one != nullptr) return fail("ends: %s", one);
    plan.run({reinterpret_cast<uint8_t*>(x.floats.data()), reinterpret_cast<uint8_t*>(y.data())}, 2, 0, plan.steps(), 1);
    for (size_t i = 0; i < y.size(); i++) {
        const size_t sample = i / static_cast<size_t>(size) * static_cast<size_t>(size), at = i - sample;
        int code = 7;
        if (index[at] >= 0) {
            const float v = x.floats[sample + static_cast<size_t>(index[at])] / 0.5f;
            code = static_cast<int>(std::min(std::max(std::nearbyint(static_cast<double>(v)) + 100.0, 2.0), 255.0));
        }
        if (y[i] != static_cast<float>(table[static_cast<size_t>(code)] - 100) * 0.5f) return fail("ends: another number at %d", static_cast<int>(i));
    }
}

// What does not fit is refused before it can run.
void try_refusals() {
    Codes8 x(128);
    const float multiplier[16] = {};
    const int32_t bias[16] = {}, offset[1] = {0}, far[1] = {1000};
    const int8_t weight[64] = {};
    CodePlan plan;
    const int from = plan.slot(x.data(), 128), to = plan.slot(x.data(), 16);
    const Requantizer end{multiplier, 0, 0, 255, Arithmetic::floats, false};
    const Convolution fine{1, 4, 4, 4, 4, 4, 1, 1, 0, 1, 0, 1, 1, 1, offset, weight, bias, end};
    if (plan.convolution(from, to, fine) != nullptr) fail("a convolution that fits is refused");
    Convolution wide = fine, reaching = fine, many = fine;
    wide.width = 5, reaching.offset = far, many.outputs = 2, many.y_channels = 2;
    for (const Convolution& c : {wide, reaching, many})
        if (plan.convolution(from, to, c) == nullptr) fail("a convolution that does not fit is taken");
    if (plan.table(from, to, 17, x.data()) == nullptr || plan.pair(from, from, to, {65, false, 0, 0, 0, 1, 1, 0, 0, 255, Arithmetic::floats, {}}) == nullptr)
        fail("a step that writes too far is taken");
    if (plan.move(from, to, {1, {1, 1, 1, 1, 4}, {0, 0, 0, 0, 50}, {0, 0, 0, 0, 1}, 0, 0, 0, 0}) == nullptr) fail("a move that reads too far is taken");
}

}  // namespace

void try_codes(uint64_t seed, bool quick) {
    Random random(seed + 2000);
    try_refusals();
    for (int turn = 0; turn < (quick ? 40 : 200); turn++) {
        try_convolution(random);
        try_depthwise(random);
        try_pair(random);
        try_pools(random);
        try_ends(random);
    }
}

}  // namespace arrondi
