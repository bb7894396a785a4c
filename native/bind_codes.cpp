// Plans of networks on codes.
#include "bind.h"
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "codes.h"

namespace arrondi {
namespace {

using Numbers = std::vector<int>;

void check(const char* wrong) {
    if (wrong != nullptr) throw nb::value_error(wrong);
}

const int* need(const Numbers& numbers, size_t count) {
    if (numbers.size() != count) throw nb::value_error("a step takes another number of numbers");
    return numbers.data();
}

Requantizer ends(uintptr_t multiplier, const Numbers& end, bool floats) {
    const int* e = need(end, 4);
    if (e[3] < 0 || e[3] > 2) throw nb::value_error("there is no such arithmetic");
    return {at<void>(multiplier), e[0], e[1], e[2], static_cast<Arithmetic>(e[3]), floats};
}

Pool pool(const Numbers& shape) {
    const int* s = need(shape, 14);
    return {s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8], s[9], s[10], s[11], s[12], s[13], 0, {}, 1.0f, 1.0f, 0, nullptr};
}

}  // namespace

void bind_codes(nb::module_& m) {
    nb::class_<CodePlan>(m, "CodePlan")
        .def(nb::init<>())
        .def("slot", [](CodePlan& p, uintptr_t address, int64_t bytes) { return p.slot(at<uint8_t>(address), bytes); })
        // Shapes as in the structures; end: zero, low, high and how of a Requantizer.
        .def("convolution", [](CodePlan& p, int x, int y, const Numbers& shape, uintptr_t offset, uintptr_t weight, uintptr_t bias,
                               uintptr_t multiplier, const Numbers& end, bool floats) {
            const int* s = need(shape, 14);
            check(p.convolution(x, y, {s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8], s[9], s[10], s[11], s[12], s[13],
                                       at<int32_t>(offset), at<int8_t>(weight), at<int32_t>(bias), ends(multiplier, end, floats)}));
        })
        .def("depthwise", [](CodePlan& p, int x, int y, const Numbers& shape, uintptr_t offset, uintptr_t weight, uintptr_t bias,
                             uintptr_t multiplier, const Numbers& end) {
            const int* s = need(shape, 9);
            check(p.depthwise(x, y, {s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8], at<int32_t>(offset), at<int8_t>(weight),
                                     at<int32_t>(bias), ends(multiplier, end, false)}));
        })
        // Downs, up, low, high; multipliers in float32 and the constant; how, and three pairs of whole and exponent.
        .def("pair", [](CodePlan& p, int a, int b, int y, int64_t count, bool product, const Numbers& codes,
                        const std::vector<float>& of, const Numbers& fixed) {
            const int *c = need(codes, 5), *f = need(fixed, 7);
            if (of.size() != 3) throw nb::value_error("a step takes another number of numbers");
            check(p.pair(a, b, y, {count, product, c[0], c[1], c[2], of[0], of[1], of[2], c[3], c[4], static_cast<Arithmetic>(f[0]),
                                   {{f[1], f[2]}, {f[3], f[4]}, {f[5], f[6]}}}));
        })
        .def("largest", [](CodePlan& p, int x, int y, const Numbers& shape) { check(p.largest(x, y, pool(shape))); })
        .def("mean", [](CodePlan& p, int x, int y, const Numbers& shape, int zero, uintptr_t multiplier, const Numbers& end) {
            Pool made = pool(shape);
            made.zero = zero;
            made.end = ends(multiplier, end, false);
            check(p.mean(x, y, made));
        })
        .def("average", [](CodePlan& p, int x, int y, const Numbers& shape, int zero, float scale, float out_scale, int up,
                           uintptr_t counts, const Numbers& end) {
            Pool made = pool(shape);
            made.zero = zero, made.scale = scale, made.out_scale = out_scale, made.up = up;
            made.counts = at<float>(counts);
            made.end = ends(0, end, false);
            check(p.average(x, y, made));
        })
        .def("leaky", [](CodePlan& p, int x, int y, int64_t count, float slope) { check(p.leaky(x, y, count, slope)); })
        .def("round", [](CodePlan& p, int x, int y, int n, int channels, int space, float scale, int zero, int low, int high) {
            check(p.round(x, y, {n, channels, space, scale, zero, low, high}));
        })
        .def("table", [](CodePlan& p, int x, int y, int64_t count, uintptr_t table) {
            check(p.table(x, y, count, at<uint8_t>(table)));
        })
        .def("restore", [](CodePlan& p, int x, int y, int64_t count, int zero, float scale) {
            check(p.restore(x, y, count, zero, scale));
        })
        .def("move", [](CodePlan& p, int x, int y, int size, const std::vector<int64_t>& axes, int64_t x_start, int64_t y_start,
                        int64_t filled, int fill) {
            if (axes.size() != 15) throw nb::value_error("five axes are moved");
            Move move{size, {}, {}, {}, x_start, y_start, filled, fill};
            for (size_t i = 0; i < 5; i++) move.count[i] = axes[i], move.from[i] = axes[5 + i], move.to[i] = axes[10 + i];
            check(p.move(x, y, move));
        })
        .def("gather", [](CodePlan& p, int x, int y, int size, int64_t count, uintptr_t index, int fill) {
            check(p.gather(x, y, size, count, at<int32_t>(index), fill));
        })
        .def("steps", &CodePlan::steps)
        .def("run", [](const CodePlan& p, const std::vector<uintptr_t>& given, int times, int first, int last, int threads) {
            std::vector<uint8_t*> places;
            for (uintptr_t address : given) places.push_back(at<uint8_t>(address));
            const char* wrong;
            {
                nb::gil_scoped_release free;
                wrong = p.run(places, times, first, last, threads);
            }
            check(wrong);
        });
}

}  // namespace arrondi
