// Hadamard transforms, products of signs, reading memory.
#include "bind.h"
#include "transforms.h"

namespace arrondi {
namespace {

void refuse(const char* wrong) {
    if (wrong != nullptr) throw nb::value_error(wrong);
}

}  // namespace

void bind_transforms(nb::module_& m) {
    m.def("hadamard", [](int64_t rows, int base, int shift, uintptr_t matrix, float scale, uintptr_t x, int64_t ldx,
                         uintptr_t y, int64_t ldy, int type, int threads) {
        Hadamard t{};
        t.rows = rows;
        t.base = base;
        t.shift = shift;
        t.matrix = at<float>(matrix);
        t.scale = scale;
        t.x = at<void>(x);
        t.ldx = ldx;
        t.y = at<void>(y);
        t.ldy = ldy;
        t.type = static_cast<Type>(type);
        t.threads = threads;
        const char* wrong;
        {
            nb::gil_scoped_release free;
            wrong = hadamard(t);
        }
        refuse(wrong);
    });
    m.def("pack_signs", [](int64_t rows, int k, uintptr_t x, int64_t ldx, int type, uintptr_t out, int threads) {
        const int words = (k + 31) / 32;
        const SignPacking p{rows, k, words, at<void>(x), ldx, static_cast<Type>(type), at<int32_t>(out), threads};
        const char* wrong;
        {
            nb::gil_scoped_release free;
            wrong = pack_signs(p);
        }
        refuse(wrong);
    });
    m.def("multiply_signs", [](int rows, int n, int k, uintptr_t x, uintptr_t w, uintptr_t y, int y_type, bool integers,
                               uintptr_t token_scale, uintptr_t scale, int threads) {
        const Signs p{rows, n, k, (k + 31) / 32, at<int32_t>(x), at<int32_t>(w), at<void>(y), integers,
                      static_cast<Type>(y_type), at<float>(token_scale), at<float>(scale), threads};
        const char* wrong;
        {
            nb::gil_scoped_release free;
            wrong = multiply_signs(p);
        }
        refuse(wrong);
    });
    m.def("read_memory", [](uintptr_t p, int64_t bytes, int threads) {
        nb::gil_scoped_release free;
        return read_memory(at<uint8_t>(p), bytes, threads);
    });
}

}  // namespace arrondi
