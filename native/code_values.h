// Sums, products, pools and rounding of values that are codes.
#pragma once

#include "code_conv.h"

namespace arrondi {
namespace ARRONDI_PATH {

// Sixteen of the sum or product of two; numbers from 0 on.
template <bool kProduct>
inline Ints pair_codes(const Pair& p, Ints a, Ints b) {
    const Floats low = splat(static_cast<float>(p.low)), high = splat(static_cast<float>(p.high));
    a = sub(a, splat(int32_t{p.down_a}));
    b = sub(b, splat(int32_t{p.down_b}));
    Floats v;
    if constexpr (kProduct)
        v = add(mul(to_floats(mul(a, b)), splat(p.of_a)), splat(p.fixed));
    else
        v = fused(to_floats(a), splat(p.of_a), fused(to_floats(b), splat(p.of_b), splat(p.fixed)));
    return add(to_ints(min(max(v, low), high)), splat(int32_t{p.up}));
}

template <bool kProduct>
void pair_span(const Pair& p, const uint8_t* a, const uint8_t* b, uint8_t* y, int64_t first, int64_t last) {
    int64_t i = first;
    for (; i + 16 <= last; i += 16) store_low_bytes(y + i, pair_codes<kProduct>(p, widen_bytes(a + i), widen_bytes(b + i)));
    if (i < last) {
        uint8_t some[16];
        store_low_bytes(some, pair_codes<kProduct>(p, widen_bytes(a + i), widen_bytes(b + i)));
        store_some(y + i, some, last - i);
    }
}

// In fixed point, one after the other.
inline void pair_fixed(const Pair& p, const uint8_t* a, const uint8_t* b, uint8_t* y, int64_t first, int64_t last) {
    const int zero = static_cast<int>(p.fixed);
    for (int64_t i = first; i < last; i++) {
        const int64_t u = a[i] - p.down_a, v = b[i] - p.down_b, unit = 1 << 20;
        const int64_t found = p.product ? times(u * v, p.by[0], p.how)
                                        : times(times(u * unit, p.by[0], p.how) + times(v * unit, p.by[1], p.how), p.by[2], p.how);
        y[i] = static_cast<uint8_t>(fixed_code(found, zero, p.low, p.high) + p.up);
    }
}

inline void pair(const Pair& p, const uint8_t* a, const uint8_t* b, uint8_t* y, int64_t first, int64_t last) {
    if (p.how != Arithmetic::floats)
        pair_fixed(p, a, b, y, first, last);
    else if (p.product)
        pair_span<true>(p, a, b, y, first, last);
    else
        pair_span<false>(p, a, b, y, first, last);
}

inline Bytes larger(Bytes a, Bytes b) { return add_bytes(subtract_to_zero(a, b), b); }

// Channels `from` on of one window, 64 at most.
inline Bytes largest_of(const Pool& p, const uint8_t* x, int line, int column, int from) {
    Bytes found = splat_byte(0);
    for (int ky = 0; ky < p.kernel_height; ky++) {
        const int row = line + ky * p.dilation_height;
        if (row < 0 || row >= p.height) continue;
        for (int kx = 0; kx < p.kernel_width; kx++) {
            const int at = column + kx * p.dilation_width;
            if (at < 0 || at >= p.width) continue;
            found = larger(found, load_bytes(x + (static_cast<int64_t>(row) * p.width + at) * p.channels + from));
        }
    }
    return found;
}

inline void largest(const Pool& p, const uint8_t* x, uint8_t* y, int first, int last) {
    const int64_t image = static_cast<int64_t>(p.height) * p.width * p.channels;
    for (int row = first; row < last; row++) {
        const uint8_t* from = x + row / p.out_height * image;
        uint8_t* to = y + static_cast<int64_t>(row) * p.out_width * p.channels;
        const int line = row % p.out_height * p.stride_height - p.top;
        for (int column = 0; column < p.out_width; column++, to += p.channels)
            for (int c = 0; c < p.channels; c += 64) {
                const Bytes found = largest_of(p, from, line, column * p.stride_width - p.left, c);
                if (c + 64 <= p.channels) {
                    store_bytes(to + c, found);
                } else {
                    uint8_t some[64];
                    store_bytes(some, found);
                    store_some(to + c, some, p.channels - c);
                }
            }
    }
}

inline void mean(const Pool& p, const uint8_t* x, uint8_t* y, int image) {
    const Ends ends(p.end);
    const int pixels = p.height * p.width;
    const uint8_t* from = x + static_cast<int64_t>(image) * pixels * p.channels;
    for (int c = 0; c < p.channels; c += 16) {
        Ints sum = splat(int32_t{-pixels * p.zero});
        for (int i = 0; i < pixels; i++) sum = add(sum, widen_bytes(from + static_cast<int64_t>(i) * p.channels + c));
        uint8_t some[16];
        store_low_bytes(some, ends.codes(sum, 0));
        store_some(y + static_cast<int64_t>(image) * p.channels + c, some, p.channels - c < 16 ? p.channels - c : 16);
    }
}

// Sixteen channels of one window.
inline Ints average_of(const Pool& p, const uint8_t* x, int line, int column, float count) {
    const Floats scale = splat(p.scale);
    Floats sum = zero_floats();
    for (int ky = 0; ky < p.kernel_height; ky++) {
        const int row = line + ky;
        if (row < 0 || row >= p.height) continue;
        for (int kx = 0; kx < p.kernel_width; kx++) {
            const int at = column + kx;
            if (at < 0 || at >= p.width) continue;
            const Ints code = widen_bytes(x + (static_cast<int64_t>(row) * p.width + at) * p.channels);
            sum = add(sum, mul(to_floats(sub(code, splat(int32_t{p.zero}))), scale));
        }
    }
    const Floats mean = div(div(sum, splat(count)), splat(p.out_scale));
    const Floats code = add(mean, splat(static_cast<float>(p.end.zero - p.up)));
    const Floats low = splat(static_cast<float>(p.end.low - p.up)), high = splat(static_cast<float>(p.end.high - p.up));
    return add(to_ints(min(max(code, low), high)), splat(int32_t{p.up}));
}

inline void average(const Pool& p, const uint8_t* x, uint8_t* y, int first, int last) {
    const int64_t image = static_cast<int64_t>(p.height) * p.width * p.channels;
    for (int row = first; row < last; row++) {
        const uint8_t* from = x + row / p.out_height * image;
        uint8_t* to = y + static_cast<int64_t>(row) * p.out_width * p.channels;
        const int line = row % p.out_height;
        for (int column = 0; column < p.out_width; column++, to += p.channels) {
            const float count = p.counts[line * p.out_width + column];
            for (int c = 0; c < p.channels; c += 16) {
                uint8_t some[16];
                store_low_bytes(some, average_of(p, from + c, line * p.stride_height - p.top, column * p.stride_width - p.left, count));
                store_some(to + c, some, p.channels - c < 16 ? p.channels - c : 16);
            }
        }
    }
}

inline void round_codes(const Encoding& r, const float* x, uint8_t* y, int image) {
    const Requantizer end{nullptr, r.zero, r.low, r.high, Arithmetic::floats, false};
    const Ends ends(end);
    const Floats scale = splat(r.scale);
    const int64_t size = static_cast<int64_t>(r.channels) * r.space;
    x += image * size;
    y += image * size;
    for (int c = 0; c < r.channels; c++)
        for (int i = 0; i < r.space; i += 16) {
            const int count = r.space - i < 16 ? r.space - i : 16;
            const float* from = x + static_cast<int64_t>(c) * r.space + i;
            float numbers[16] = {};
            uint8_t some[16];
            if (count < 16) store_some(numbers, from, 4 * count);
            store_low_bytes(some, ends.code(div(load_floats(count < 16 ? numbers : from), scale)));
            if (r.channels == 1)
                store_some(y + i, some, count);
            else
                for (int j = 0; j < count; j++) y[static_cast<int64_t>(i + j) * r.channels + c] = some[j];
        }
}

}  // namespace ARRONDI_PATH
}  // namespace arrondi
