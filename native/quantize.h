// Round to nearest, packing and restoring, for one path. Included by path.h after a lanes_*.h.
//
// Bit for bit what arrondi.tensor.ranges, .encoding and .packing compute: float32, divisions with the stored scale,
// no fused operation where the twin has two.
#pragma once

#include "kernels.h"
#include "product.h"
#include "quantizers.h"

namespace arrondi {
namespace ARRONDI_PATH {

constexpr float kInfinity = __builtin_inff();

// ---- elements ----------------------------------------------------------------------------------------------------

template <Type kType>
struct Element {
    using type = uint16_t;
};
template <>
struct Element<Type::f32> {
    using type = float;
};

template <Type kType>
inline Floats load_elements(const void* x, int64_t at) {
    if constexpr (kType == Type::f32) return load_floats(static_cast<const float*>(x) + at);
    if constexpr (kType == Type::bf16) return load_bf16(static_cast<const uint16_t*>(x) + at);
    return load_f16(static_cast<const uint16_t*>(x) + at);
}

// Fewer than sixteen: the first one fills up, which moves no extreme.
template <Type kType>
inline Floats load_last(const void* x, int64_t at, int64_t count) {
    using T = typename Element<kType>::type;
    const T* from = static_cast<const T*>(x) + at;
    T some[16];
    for (int64_t i = 0; i < 16; i++) some[i] = from[i < count ? i : 0];
    return load_elements<kType>(some, 0);
}

// Calls with(lanes, place, count) for every sixteen elements.
template <Type kType, class With>
inline void each16(const void* x, int64_t at, int64_t count, const With& with) {
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) with(load_elements<kType>(x, at + i), i, int64_t{16});
    if (i < count) with(load_last<kType>(x, at + i, count - i), i, count - i);
}

inline float bits_to_float(uint32_t bits) {
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}
inline uint32_t float_to_bits(float f) {
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    return bits;
}
inline bool is_finite(float f) { return (float_to_bits(f) & 0x7f800000u) != 0x7f800000u; }
// The library's rounding functions would not be inlined; sizes below 2^22, ties to even.
inline float round_one_even(float f) { return (f + 0x1.8p23f) - 0x1.8p23f; }

// ---- grids -------------------------------------------------------------------------------------------------------

// arrondi.tensor.ranges.grid.round_scale: false where the storage overflows.
inline bool round_scale(float scale, Type type, float& stored) {
    const uint32_t sign = float_to_bits(scale) & 0x80000000u;
    float size = bits_to_float(float_to_bits(scale) & 0x7fffffffu);
    if (!is_finite(size)) return false;
    if (size == 0) {
        stored = 1.0f;
        return true;
    }
    const float least = type == Type::f16 ? 0x1p-24f : type == Type::bf16 ? 0x1p-133f : 0x1p-149f;
    if (size < least) size = least;
    uint32_t bits = float_to_bits(size);
    if (type == Type::f16 && size < 0x1p-14f) {
        bits = float_to_bits(round_one_even(size * 0x1p24f) * 0x1p-24f);
    } else if (type != Type::f32) {
        // Rounding is cutting bits (the subnormal numbers of bfloat16 too); what rounds up past the largest was refused.
        const int cut = type == Type::f16 ? 13 : 16;
        if (size > (type == Type::f16 ? 65504.0f : bits_to_float(0x7f7f0000u))) return false;
        bits = (bits + ((1u << (cut - 1)) - 1) + (bits >> cut & 1)) >> cut << cut;
    }
    stored = bits_to_float(bits | sign);
    return true;
}

struct Ends {
    float low, high;
};

struct GridOf1 {
    float scale = 1, zero = 0, offset = 0;
};

// The grid that spans a group's ends times `shrink`.
inline bool fit_ends(const Groups& g, Ends e, float shrink, GridOf1& grid) {
    switch (g.fit) {
        case Fit::symmetric: {
            const float size = -e.low > e.high ? -e.low : e.high;
            return round_scale(size / g.divisor * shrink, g.scale_type, grid.scale);
        }
        case Fit::extreme: {
            const float end = e.high > -e.low ? e.high : e.low;
            return round_scale(end / static_cast<float>(g.qmin) * shrink, g.scale_type, grid.scale);
        }
        case Fit::affine: {
            const float low = (e.low < 0 ? e.low : 0.0f) * shrink, high = (e.high > 0 ? e.high : 0.0f) * shrink;
            const float levels = static_cast<float>(g.qmax - g.qmin);
            if (!round_scale(high / levels - low / levels, g.scale_type, grid.scale)) return false;
            const float zero = static_cast<float>(g.qmin) - low / grid.scale;
            const float most = static_cast<float>(g.qmax), least = static_cast<float>(g.qmin);
            grid.zero = round_one_even(zero < least ? least : zero > most ? most : zero);
            return true;
        }
        case Fit::offset: {
            const float half = e.high / 2 - e.low / 2, middle = e.low + half, shrunk = half * shrink;
            const float step = static_cast<float>(2.0 / (g.qmax - g.qmin));
            if (!round_scale(shrunk * step, g.scale_type, grid.scale)) return false;
            grid.offset = shrunk == 0 ? middle : middle - grid.scale * (static_cast<float>(g.qmax + g.qmin) / 2);
            return true;
        }
        case Fit::given: break;
    }
    return true;
}

inline GridOf1 stored_grid(const Groups& g, int64_t at) {
    GridOf1 grid;
    grid.scale = g.scale[at];
    if (g.zero != nullptr) grid.zero = static_cast<float>(g.zero[at]);
    if (g.offset != nullptr) grid.offset = g.offset[at];
    return grid;
}

inline void store_grid(const Groups& g, int64_t at, const GridOf1& grid) {
    g.scale[at] = grid.scale;
    if (g.zero != nullptr) g.zero[at] = static_cast<int32_t>(grid.zero);
    if (g.offset != nullptr) g.offset[at] = grid.offset;
}

// Smallest and largest; `poison` becomes NaN when an element is NaN or infinite.
template <Type kType>
inline Ends ends_of(const void* x, int64_t at, int64_t count, Floats& poison) {
    const Floats first = count < 16 ? load_last<kType>(x, at, count) : load_elements<kType>(x, at);
    const Floats none = zero_floats();
    Floats low = first, high = first, bad = poison;
    each16<kType>(x, at, count, [&](Floats v, int64_t, int64_t) {
        low = min(low, v);
        high = max(high, v);
        bad = add(bad, mul(v, none));
    });
    poison = bad;
    return {smallest(low), largest(high)};
}

// ---- rounding ----------------------------------------------------------------------------------------------------

template <Type kType, bool kOffset>
inline void round_group(const Groups& g, int64_t at, int64_t count, const GridOf1& grid, int lowest, uint8_t* out) {
    const Floats scale = splat(grid.scale), offset = splat(grid.offset);
    const Floats least = splat(static_cast<float>(g.qmin) - grid.zero);
    const Floats most = splat(static_cast<float>(g.qmax) - grid.zero);
    const Ints zero = splat(static_cast<int32_t>(grid.zero) - lowest);
    each16<kType>(g.x, at, count, [&](Floats v, int64_t place, int64_t some) {
        if constexpr (kOffset) v = sub(v, offset);
        // Limits are whole numbers, so limiting first gives the same and fits an int32.
        const Ints code = add(to_ints(max(min(div(v, scale), most), least)), zero);
        if (some == 16) {
            store_low_bytes(out + place, code);
        } else {
            uint8_t last[16];
            store_low_bytes(last, code);
            std::memcpy(out + place, last, static_cast<size_t>(some));
        }
    });
}

template <Type kType>
inline bool round_row(const Groups& g, int64_t row, int lowest, uint8_t* out) {
    Floats poison = zero_floats();
    for (int64_t i = 0; i < g.groups; i++) {
        const int64_t start = i * g.group, at = row * g.columns + start, entry = row * g.groups + i;
        const int64_t count = start + g.group < g.columns ? g.group : g.columns - start;
        GridOf1 grid;
        const Ends ends = ends_of<kType>(g.x, at, count, poison);
        if (g.fit == Fit::given) {
            grid = stored_grid(g, entry);
        } else {
            if (!fit_ends(g, ends, 1.0f, grid)) return false;
            store_grid(g, entry, grid);
        }
        if (g.offset != nullptr)
            round_group<kType, true>(g, at, count, grid, lowest, out + start);
        else
            round_group<kType, false>(g, at, count, grid, lowest, out + start);
    }
    return sum(poison) == 0;
}

// ---- packing -----------------------------------------------------------------------------------------------------

// Eight codes of a byte each → kBits bytes in the low end, in three steps that each halve the number of pieces.
template <int kBits>
inline uint64_t squeeze(uint64_t w) {
    w = (w & 0x00ff00ff00ff00ffu) | (w & 0xff00ff00ff00ff00u) >> (8 - kBits);
    w = (w & 0x0000ffff0000ffffu) | (w & 0xffff0000ffff0000u) >> (16 - 2 * kBits);
    return (w & 0x00000000ffffffffu) | (w & 0xffffffff00000000u) >> (32 - 4 * kBits);
}

template <int kBits>
inline void pack_row(const uint8_t* codes, int64_t columns, int lowest, uint8_t* out, int64_t row_bytes) {
    constexpr int kSome = 512;
    uint8_t plain[kSome], bytes[kSome + 8];
    uint64_t words[kSome / 8];
    const uint8_t less = static_cast<uint8_t>(lowest);
    for (int64_t start = 0; start < columns; start += kSome) {
        const int count = columns - start < kSome ? static_cast<int>(columns - start) : kSome;
        if (count < kSome) std::memset(plain, 0, kSome);
        for (int i = 0; i < count; i++) plain[i] = static_cast<uint8_t>(codes[start + i] - less);
        const size_t used = static_cast<size_t>((count * kBits + 7) / 8);
        uint8_t* to = out + start / 8 * kBits;
        if constexpr (kBits == 8) {
            std::memcpy(to, plain, used);
            continue;
        }
        std::memcpy(words, plain, kSome);
        for (int i = 0; i < kSome / 8; i++) words[i] = squeeze<kBits>(words[i]);
        if constexpr (kBits == 4) {
            uint32_t halves[kSome / 8];
            for (int i = 0; i < kSome / 8; i++) halves[i] = static_cast<uint32_t>(words[i]);
            std::memcpy(to, halves, used);
        } else {
            for (int i = 0; i < kSome / 8; i++) std::memcpy(bytes + i * kBits, words + i, 8);
            std::memcpy(to, bytes, used);
        }
    }
    const int64_t used = (columns * kBits + 7) / 8;
    if (used < row_bytes) std::memset(out + used, 0, static_cast<size_t>(row_bytes - used));
}

inline void pack_any(const uint8_t* codes, int64_t columns, int bits, int lowest, uint8_t* out, int64_t row_bytes) {
    switch (bits) {
        case 1: return pack_row<1>(codes, columns, lowest, out, row_bytes);
        case 2: return pack_row<2>(codes, columns, lowest, out, row_bytes);
        case 3: return pack_row<3>(codes, columns, lowest, out, row_bytes);
        case 4: return pack_row<4>(codes, columns, lowest, out, row_bytes);
        case 5: return pack_row<5>(codes, columns, lowest, out, row_bytes);
        case 6: return pack_row<6>(codes, columns, lowest, out, row_bytes);
        case 7: return pack_row<7>(codes, columns, lowest, out, row_bytes);
        default: return pack_row<8>(codes, columns, lowest, out, row_bytes);
    }
}

void pack(const Packing& p, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++)
        pack_any(p.codes + row * p.columns, p.columns, p.bits, p.lowest, p.packed + row * p.row_bytes, p.row_bytes);
}

template <Type kType>
inline bool round_some(const Rounding& r, int64_t first, int64_t last, uint8_t* scratch) {
    for (int64_t row = first; row < last; row++) {
        if (r.codes != nullptr) {
            if (!round_row<kType>(r.on, row, 0, r.codes + row * r.on.columns)) return false;
            continue;
        }
        if (!round_row<kType>(r.on, row, r.on.qmin, scratch)) return false;
        pack_any(scratch, r.on.columns, r.bits, 0, r.packed + row * r.row_bytes, r.row_bytes);
    }
    return true;
}

bool round(const Rounding& r, int64_t first, int64_t last, uint8_t* scratch) {
    switch (r.on.x_type) {
        case Type::f32: return round_some<Type::f32>(r, first, last, scratch);
        case Type::bf16: return round_some<Type::bf16>(r, first, last, scratch);
        default: return round_some<Type::f16>(r, first, last, scratch);
    }
}

// ---- restoring ---------------------------------------------------------------------------------------------------

inline Floats load_codes(const uint8_t* p, int64_t count, Ints sign) {
    uint8_t some[16] = {0};
    if (count < 16) {
        std::memcpy(some, p, static_cast<size_t>(count));
        p = some;
    }
    return to_floats(sub(xor_ints(widen_bytes(p), sign), sign));
}

inline void store_some(void* y, Type type, int64_t at, Floats v, int64_t count) {
    if (type == Type::f32) {
        float* to = static_cast<float*>(y) + at;
        if (count == 16) return store_floats(to, v);
        float last[16];
        store_floats(last, v);
        std::memcpy(to, last, static_cast<size_t>(count) * 4);
        return;
    }
    uint16_t* to = static_cast<uint16_t*>(y) + at;
    if (count == 16) return store_low_halves(to, bf16_bits(v));
    uint16_t last[16];
    store_low_halves(last, bf16_bits(v));
    std::memcpy(to, last, static_cast<size_t>(count) * 2);
}

template <Type kType, bool kSums>
inline void restore_row(const Restoring& r, int64_t row) {
    const Groups& g = r.on;
    const Ints sign = splat(int32_t{r.is_signed ? 128 : 0});
    double noise = 0, signal = 0;
    for (int64_t i = 0; i < g.groups; i++) {
        const int64_t start = i * g.group, at = row * g.columns + start;
        const int64_t count = start + g.group < g.columns ? g.group : g.columns - start;
        const GridOf1 grid = stored_grid(g, row * g.groups + i);
        const Floats scale = splat(grid.scale), zero = splat(grid.zero), offset = splat(grid.offset);
        Floats lost = zero_floats(), had = zero_floats();
        for (int64_t place = 0; place < count; place += 16) {
            const int64_t some = count - place < 16 ? count - place : 16;
            Floats v = mul(sub(load_codes(r.codes + at + place, some, sign), zero), scale);
            if (g.offset != nullptr) v = add(v, offset);
            if (r.y != nullptr) store_some(r.y, r.y_type, at + place, v, some);
            if constexpr (kSums) {
                Floats x = some == 16 ? load_elements<kType>(g.x, at + place) : load_last<kType>(g.x, at + place, some);
                if (some < 16) {
                    float mask[16];
                    for (int j = 0; j < 16; j++) mask[j] = j < some ? 1.0f : 0.0f;
                    const Floats there = load_floats(mask);
                    x = mul(x, there);
                    v = mul(v, there);
                }
                const Floats error = sub(v, x);
                lost = fma(error, error, lost);
                had = fma(x, x, had);
            }
        }
        if constexpr (kSums) {
            noise += static_cast<double>(sum(lost));
            signal += static_cast<double>(sum(had));
        }
    }
    if constexpr (kSums) {
        r.sums[2 * row] = noise;
        r.sums[2 * row + 1] = signal;
    }
}

void restore(const Restoring& r, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
        if (r.sums == nullptr)
            restore_row<Type::f32, false>(r, row);
        else if (r.on.x_type == Type::f32)
            restore_row<Type::f32, true>(r, row);
        else if (r.on.x_type == Type::bf16)
            restore_row<Type::bf16, true>(r, row);
        else
            restore_row<Type::f16, true>(r, row);
    }
}

}  // namespace ARRONDI_PATH
}  // namespace arrondi
