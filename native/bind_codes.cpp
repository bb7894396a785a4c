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

}  // namespace

void bind_codes(nb::module_& m) {
    nb::class_<CodePlan>(m, "CodePlan")
        .def(nb::init<>())
        .def("slot", [](CodePlan& p, uintptr_t address, int64_t bytes) { return p.slot(at<uint8_t>(address), bytes); })
        // Shape as in Convolution, then offsets, weights, bias, multiplier, and zero, low, high.
        .def("convolution", [](CodePlan& p, int x, int y, const Numbers& shape, uintptr_t offset, uintptr_t weight, uintptr_t bias,
                               uintptr_t multiplier, int zero, int low, int high, bool floats) {
            const int* s = need(shape, 14);
            check(p.convolution(x, y, {s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8], s[9], s[10], s[11], s[12], s[13],
                                       at<int32_t>(offset), at<int8_t>(weight), at<int32_t>(bias),
                                       {at<float>(multiplier), zero, low, high, floats}}));
        })
        .def("depthwise", [](CodePlan& p, int x, int y, const Numbers& shape, uintptr_t offset, uintptr_t weight, uintptr_t bias,
                             uintptr_t multiplier, int zero, int low, int high) {
            const int* s = need(shape, 9);
            check(p.depthwise(x, y, {s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8], at<int32_t>(offset), at<int8_t>(weight),
                                     at<int32_t>(bias), {at<float>(multiplier), zero, low, high, false}}));
        })
        .def("pair", [](CodePlan& p, int a, int b, int y, int64_t count, bool product, int down_a, int down_b, int up, float of_a,
                        float of_b, float fixed, int low, int high) {
            check(p.pair(a, b, y, {count, product, down_a, down_b, up, of_a, of_b, fixed, low, high}));
        })
        .def("largest", [](CodePlan& p, int x, int y, const Numbers& shape) {
            const int* s = need(shape, 14);
            check(p.largest(x, y, {s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8], s[9], s[10], s[11], s[12], s[13], 0, {}}));
        })
        .def("mean", [](CodePlan& p, int x, int y, const Numbers& shape, int zero_x, uintptr_t multiplier, int zero, int low,
                        int high) {
            const int* s = need(shape, 4);
            check(p.mean(x, y, {s[0], s[1], s[2], s[3], 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, zero_x,
                                {at<float>(multiplier), zero, low, high, false}}));
        })
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
