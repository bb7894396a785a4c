// Dense products and attention for few tokens.
#include "bind.h"
#include <nanobind/stl/tuple.h>

#include <tuple>

#include "append.h"
#include "tokens.h"

namespace arrondi {

void bind_tokens(nb::module_& m) {
    m.def("dense", [](int rows, int n, int k, uintptr_t x, uintptr_t weight, int type, int64_t ldw, uintptr_t bias, uintptr_t y,
                      int threads) {
        const char* wrong;
        {
            nb::gil_scoped_release free;
            wrong = dense({rows, n, k, at<float>(x), at<void>(weight), static_cast<Type>(type), ldw, at<float>(bias),
                           at<float>(y), threads});
        }
        if (wrong != nullptr) throw nb::value_error(wrong);
    });
    m.def("attend", [](int heads, int key_heads, int width, int length, uintptr_t query, uintptr_t keys, int64_t key_head_stride,
                       int64_t key_stride, uintptr_t values, int64_t value_head_stride, int64_t value_stride, uintptr_t y,
                       int type, float scale, int threads) {
        const char* wrong;
        {
            nb::gil_scoped_release free;
            wrong = attend({heads, key_heads, width, length, at<void>(query), at<void>(keys), key_head_stride, key_stride,
                            at<void>(values), value_head_stride, value_stride, at<void>(y), static_cast<Type>(type), scale,
                            threads});
        }
        if (wrong != nullptr) throw nb::value_error(wrong);
    });
    m.def("rotate", [](int rows, int heads, int key_heads, int width, uintptr_t x, int64_t ldx, uintptr_t cos, uintptr_t sin,
                       int type, uintptr_t norm, uintptr_t key_norm, float eps, int threads) {
        const char* wrong;
        {
            nb::gil_scoped_release free;
            wrong = rotate({rows, heads, key_heads, width, at<void>(x), ldx, at<void>(cos), at<void>(sin),
                            static_cast<Type>(type), at<float>(norm), at<float>(key_norm), eps, threads});
        }
        if (wrong != nullptr) throw nb::value_error(wrong);
    });
    m.def("append_token", [](int rows, int width, uintptr_t x, int bits, int block, int groups, bool keys, int64_t place,
                             uintptr_t codes, int64_t codes_stride, uintptr_t scale, uintptr_t offset, int type,
                             int64_t scale_stride, float divisor, float lowest, float clip, float unit) {
        bool fine = false;
        const char* wrong =
            append({rows, width, at<float>(x), bits, block, groups, keys, place, at<uint8_t>(codes), codes_stride, at<void>(scale),
                    at<void>(offset), static_cast<Type>(type), scale_stride, divisor, lowest, clip, unit}, fine);
        if (wrong != nullptr) throw nb::value_error(wrong);
        return fine;
    });
    // What a side of the cache is, in the order of PackedStates.
    using Side = std::tuple<int, int, int, int, int, uintptr_t, int64_t, uintptr_t, uintptr_t, int, int64_t, float, float>;
    const auto side = [](const Side& s) {
        return PackedStates{std::get<0>(s), std::get<1>(s), std::get<2>(s), std::get<3>(s), std::get<4>(s),
                            at<uint8_t>(std::get<5>(s)), std::get<6>(s), at<void>(std::get<7>(s)), at<void>(std::get<8>(s)),
                            static_cast<Type>(std::get<9>(s)), std::get<10>(s), std::get<11>(s), std::get<12>(s)};
    };
    m.def("attend_packed", [side](int heads, int key_heads, int width, int length, uintptr_t query, uintptr_t turned,
                                  const Side& keys, const Side& values, uintptr_t new_keys, int64_t new_key_head_stride,
                                  int64_t new_key_stride, uintptr_t new_values, int64_t new_value_head_stride,
                                  int64_t new_value_stride, uintptr_t y, int type, float scale, int threads) {
        const char* wrong;
        {
            nb::gil_scoped_release free;
            wrong = attend_packed({heads, key_heads, width, length, at<void>(query), at<float>(turned), side(keys), side(values),
                                   at<void>(new_keys), new_key_head_stride, new_key_stride, at<void>(new_values),
                                   new_value_head_stride, new_value_stride, at<void>(y), static_cast<Type>(type), scale, threads});
        }
        if (wrong != nullptr) throw nb::value_error(wrong);
    });
    // Codes, stride from head to head, and bytes of 8, 4 and 2 bits.
    using Packed = std::tuple<uintptr_t, int64_t, int, int, int>;
    const auto directions = [](const Packed& s) {
        return Directions{at<uint8_t>(std::get<0>(s)), std::get<1>(s), std::get<2>(s), std::get<3>(s), std::get<4>(s)};
    };
    m.def("attend_along", [directions](int heads, int key_heads, int half, int plain, int tokens, int parts, uintptr_t query,
                                       const Packed& keys, const Packed& values, int count, uintptr_t rows, uintptr_t places,
                                       uintptr_t base, int64_t first, uintptr_t starts, uintptr_t steps, uintptr_t sums,
                                       uintptr_t tops, uintptr_t totals, int threads) {
        const char* wrong;
        {
            nb::gil_scoped_release free;
            wrong = attend_along({heads, key_heads, half, plain, tokens, parts, at<float>(query), directions(keys),
                                  directions(values), count, at<float>(rows), at<int32_t>(places), at<float>(base), first,
                                  at<float>(starts), at<float>(steps), at<float>(sums), at<float>(tops), at<float>(totals),
                                  threads});
        }
        if (wrong != nullptr) throw nb::value_error(wrong);
    });
}

}  // namespace arrondi
