// The sides of a training step's products.
#include <nanobind/stl/tuple.h>

#include <tuple>

#include "bind.h"
#include "training.h"

namespace arrondi {
namespace {

// What is given for a matrix: rows, columns, address, elements from row to row, type, factors of rows and of columns.
using Matrix = std::tuple<int64_t, int64_t, uintptr_t, int64_t, int, uintptr_t, uintptr_t>;

Sides sides(const Matrix& m, int threads) {
    const auto [rows, columns, x, ldx, type, row, column] = m;
    return {rows, columns, at<void>(x), ldx, static_cast<Type>(type), at<float>(row), at<float>(column), threads};
}

}  // namespace

void bind_training(nb::module_& m) {
    m.def("extremes", [](const Matrix& x, bool by_column, uintptr_t out, int threads) {
        run(extremes, Extremes{sides(x, threads), by_column, at<float>(out)});
    });
    m.def("round_codes", [](const Matrix& x, int lowest, int highest, bool stochastic, uint32_t seed, uintptr_t codes,
                            int threads) {
        run(round_codes, CodeRounding{sides(x, threads), lowest, highest, stochastic, seed, at<int8_t>(codes)});
    });
    m.def("scale_sums", [](int64_t rows, int64_t columns, uintptr_t sums, uintptr_t row, uintptr_t column, uintptr_t bias,
                           uintptr_t y, int type, int threads) {
        run(scale_sums, SumScaling{rows, columns, at<int32_t>(sums), at<float>(row), at<float>(column), at<float>(bias),
                                   at<void>(y), static_cast<Type>(type), threads});
    });
}

}  // namespace arrondi
