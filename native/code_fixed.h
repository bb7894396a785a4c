// Sums to codes by integers alone, as TFLite's reference kernels do (Jacob et al. 2018, arXiv:1712.05877, section 2.2): a sum times
// m · 2^(e - 31), in int64, with one rounding or with two. The twin in Python is graph/requantize.py.
#pragma once

#include <cstdint>

#include "codes.h"

namespace arrondi {
namespace ARRONDI_PATH {

// x / 2^31 by a high product and x / 2^-e by a shift, each rounded half away from zero.
inline int64_t times_twice(int64_t x, Fixed f) {
    const int64_t most = INT32_MAX, least = INT32_MIN, one = 1;
    if (f.exponent > 0) x *= one << f.exponent;
    x = x < least ? least : x > most ? most : x;
    const int64_t product = x * f.whole;
    x = (product + (product >= 0 ? one << 30 : 1 - (one << 30))) / (one << 31);
    x = x > most ? most : x;
    if (f.exponent >= 0) return x;
    const int64_t mask = (one << -f.exponent) - 1;
    return (x >> -f.exponent) + ((x & mask) > (mask >> 1) + (x < 0 ? 1 : 0) ? 1 : 0);
}

// Half a step added, then one shift.
inline int64_t times_once(int64_t x, Fixed f) {
    const int shift = 31 - f.exponent;
    return (x * f.whole + (int64_t{1} << (shift - 1))) >> shift;
}

inline int64_t times(int64_t x, Fixed f, Arithmetic how) { return how == Arithmetic::once ? times_once(x, f) : times_twice(x, f); }

inline int32_t fixed_code(int64_t x, int zero, int low, int high) {
    x += zero;
    return static_cast<int32_t>(x < low ? low : x > high ? high : x);
}

inline Ints fixed_codes(Ints sum, const Requantizer& r, const Fixed* fixed) {
    int32_t some[16];
    store_ints(some, sum);
    for (int i = 0; i < 16; i++) some[i] = fixed_code(times(some[i], fixed[i], r.how), r.zero, r.low, r.high);
    return load_ints(some);
}

}  // namespace ARRONDI_PATH
}  // namespace arrondi
