// Logarithms and powers of two in sixteen lanes, to some units in the last place. For one path.
#pragma once

#include "kernels.h"

namespace arrondi {
namespace ARRONDI_PATH {

// log2 of positive normal numbers, about 1e-7 relative: the mantissa is brought to √½ … √2 and the series of the inverse
// hyperbolic tangent summed.
inline Floats log2_of(Floats v) {
    const Ints bits = sub(as_ints(v), splat(int32_t{0x3f3504f3}));
    // Arithmetic shift by 23: the exponent of v/√½.
    const Ints exponent = sub(xor_ints(shift_right<23>(bits), splat(int32_t{256})), splat(int32_t{256}));
    const Floats mantissa = as_floats(sub(as_ints(v), shift_left<23>(exponent)));
    const Floats one = splat(1.0f), t = div(sub(mantissa, one), add(mantissa, one)), t2 = mul(t, t);
    Floats series = splat(0.32059889f);                     // 2/(9 ln 2)
    series = fma(series, t2, splat(0.41219858f));           // 2/(7 ln 2)
    series = fma(series, t2, splat(0.57707802f));           // 2/(5 ln 2)
    series = fma(series, t2, splat(0.96179669f));           // 2/(3 ln 2)
    series = fma(series, t2, splat(2.88539008f));           // 2/ln 2
    return fma(series, t, to_floats(exponent));
}

// 2^v for |v| < 126: the whole part goes to the exponent, the rest to the Taylor series.
inline Floats exp2_of(Floats v) {
    const Floats whole = round_even(v), rest = sub(v, whole);
    Floats series = splat(1.5252734e-5f);
    series = fma(series, rest, splat(1.5403530e-4f));
    series = fma(series, rest, splat(1.3333558e-3f));
    series = fma(series, rest, splat(9.6181291e-3f));
    series = fma(series, rest, splat(5.5504109e-2f));
    series = fma(series, rest, splat(2.4022651e-1f));
    series = fma(series, rest, splat(6.9314718e-1f));
    series = fma(series, rest, splat(1.0f));
    return as_floats(add(as_ints(series), shift_left<23>(to_ints(whole))));
}

}  // namespace ARRONDI_PATH
}  // namespace arrondi
