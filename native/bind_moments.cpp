// Optimizers whose states take 8 bits.
#include <nanobind/stl/tuple.h>

#include "bind.h"
#include "moments.h"

namespace arrondi {
namespace {

using Places = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, int, int>;

// Codes, scales; values, codes and thresholds of the map's cells, the first cell, how many.
State state(const Places& s) {
    return {at<uint8_t>(std::get<0>(s)),
            at<float>(std::get<1>(s)),
            {at<float>(std::get<2>(s)), at<int32_t>(std::get<3>(s)), at<float>(std::get<4>(s)), std::get<5>(s),
             std::get<6>(s)}};
}

}  // namespace

void bind_moments(nb::module_& m) {
    m.def("step_adam", [](int64_t n, int64_t block, uintptr_t p, uintptr_t g, Places first, Places second, float keep,
                          float decay, float towards, float beta, float share, float root, float eps, float size,
                          int threads) {
        Moments j{};
        j.n = n, j.block = block, j.p = at<float>(p), j.g = at<float>(g), j.m = state(first), j.v = state(second);
        j.adam = true, j.keep = keep, j.decay = decay, j.towards = towards, j.beta = beta, j.share = share, j.root = root;
        j.eps = eps, j.size = size, j.threads = threads;
        run(step_moments, j);
    });
    m.def("step_momentum", [](int64_t n, int64_t block, uintptr_t p, uintptr_t g, Places first, float decay, float momentum,
                              float fresh, float size, bool begins, bool nesterov, int threads) {
        Moments j{};
        j.n = n, j.block = block, j.p = at<float>(p), j.g = at<float>(g), j.m = state(first), j.decay = decay;
        j.momentum = momentum, j.fresh = fresh, j.size = size, j.first = begins, j.nesterov = nesterov, j.threads = threads;
        run(step_moments, j);
    });
}

}  // namespace arrondi
