// Codes of a byte with a clip.
#include "bind.h"
#include "clips.h"

namespace arrondi {

void bind_clips(nb::module_& m) {
    // type 3: x are sums, int32
    m.def("clip_codes", [](int64_t rows, int64_t columns, uintptr_t x, int64_t ldx, int type, float scale, float shift,
                           float low, float high, uintptr_t codes, uintptr_t beyond, int threads) {
        const bool sums = type == 3;
        run(clip_codes, Clipping{rows, columns, sums ? nullptr : at<void>(x), ldx, sums ? Type::f32 : static_cast<Type>(type),
                                 sums ? at<int32_t>(x) : nullptr, scale, shift, low, high, at<int8_t>(codes),
                                 at<uint8_t>(beyond), threads});
    });
    m.def("widen_codes", [](int64_t rows, int64_t columns, uintptr_t codes, uintptr_t row, uintptr_t bias, uintptr_t y,
                            int type, int threads) {
        run(widen_codes, Widening{rows, columns, at<int8_t>(codes), at<float>(row), at<float>(bias), at<void>(y),
                                  static_cast<Type>(type), threads});
    });
    m.def("mask_slopes", [](int64_t rows, int64_t columns, uintptr_t slope, uintptr_t beyond, uintptr_t codes, bool above,
                            uintptr_t y, uintptr_t ends, int threads) {
        run(mask_slopes, Masking{rows, columns, at<float>(slope), at<uint8_t>(beyond), at<int8_t>(codes), above,
                                 at<float>(y), at<float>(ends), threads});
    });
}

}  // namespace arrondi
