// Packed codes in registers: as bytes for the integer products, as float32 for the others. For one path.
#pragma once

#include <type_traits>

#include "kernels.h"

namespace arrondi {
namespace ARRONDI_PATH {

// Products with so many quads fit a sum of 16 bits: two codes times 128 each. 1: none is safe beyond two neighbours.
constexpr int fold_quads(Kind kind) {
    switch (kind) {
        case Kind::u6: return 2;
        case Kind::u5: return 4;
        case Kind::u4: return 8;
        case Kind::u3: return 16;
        case Kind::u2:
        case Kind::u1:
        case Kind::trit5: return 32;
        default: return 1;
    }
}

// f(0), f(1) … as constants of the compiler.
template <int kFrom, int kTo, class Function>
inline void unrolled(const Function& f) {
    if constexpr (kFrom < kTo) {
        f(std::integral_constant<int, kFrom>{});
        unrolled<kFrom + 1, kTo>(f);
    }
}

// One step of codes as bytes, quad after quad: each comes from memory anew, for registers are scarcer than loads.
template <Kind kKind>
struct Decode {
    static constexpr int kQuads = step_quads(kKind);
    static constexpr bool kWide = kKind == Kind::u8;  // codes above 127
    static constexpr int kFold = fold_quads(kKind);

    // What goes on from one quad to the next: the table, or what is left of the ternary fractions.
    static inline Bytes begin(const uint8_t* p, const Weight& weight) {
        if constexpr (kKind == Kind::table4) return repeat16(weight.bytes);
        if constexpr (kKind == Kind::trit5) return load_bytes(p);
        (void)p, (void)weight;
        return splat_byte(0);
    }

    template <int kQuad>
    static inline Bytes quad(const uint8_t* p, Bytes& state) {
        if constexpr (kKind == Kind::u8 || kKind == Kind::e4m3 || kKind == Kind::e5m2) return load_bytes(p + 64 * kQuad);
        if constexpr (kKind == Kind::u4 || kKind == Kind::float4) return plane<4, kQuad, 0>(p);
        if constexpr (kKind == Kind::table4) return look_up(state, plane<4, kQuad, 0>(p));
        if constexpr (kKind == Kind::u2) return plane<2, kQuad, 0>(p);
        if constexpr (kKind == Kind::u1) return plane<1, kQuad, 1>(p);
        if constexpr (kKind == Kind::u3) return either(plane<2, kQuad, 0>(p), plane<1, kQuad, 2>(p + 128));
        if constexpr (kKind == Kind::u5) return either(plane<4, kQuad, 0>(p), plane<1, kQuad, 4>(p + 256));
        if constexpr (kKind == Kind::u6 || kKind == Kind::e3m2 || kKind == Kind::e2m3)
            return either(plane<4, kQuad, 0>(p), plane<2, kQuad, 4>(p + 256));
        if constexpr (kKind == Kind::trit5) {
            // The fraction f/256 times 3: its whole part is the digit. 3f/4 - 1 is two averages, and its top bits the digit.
            const Bytes less = subtract_to_zero(state, splat_byte(1)), zero = splat_byte(0);
            const Bytes digit = both(shift_down<6>(average(less, average(less, zero))), splat_byte(3));
            if constexpr (kQuad < 4) state = add_bytes(state, add_bytes(state, state));
            return digit;
        }
    }

    static inline void step(const uint8_t* p, const Weight& weight, Bytes* w) {
        Bytes state = begin(p, weight);
        unrolled<0, kQuads>([&](auto q) { w[q] = quad<q>(p, state); });
    }

  private:
    // `kWidth` bits of the codes of a quad, moved to bit `kTo`; see kernels.h.
    template <int kWidth, int kQuad, int kTo>
    static inline Bytes plane(const uint8_t* p) {
        constexpr int kPer = 8 / kWidth, kFrom = kWidth * (kQuad % kPer);
        const Bytes b = load_bytes(p + 64 * (kQuad / kPer)), mask = splat_byte(((1 << kWidth) - 1) << kTo);
        if constexpr (kFrom > kTo) return both(shift_down<kFrom - kTo>(b), mask);
        if constexpr (kFrom < kTo) return both(shift_up<kTo - kFrom>(b), mask);
        return both(b, mask);
    }
};

// A small float of `kBits` bits with `kMantissa` of them for the mantissa, as float32 · 2^(bias - 127).
template <int kBits, int kMantissa>
inline Floats small_float(Ints code) {
    const Ints size = and_ints(code, splat(int32_t{(1 << (kBits - 1)) - 1}));
    const Ints sign = and_ints(code, splat(int32_t{1 << (kBits - 1)}));
    return as_floats(or_ints(shift_left<23 - kMantissa>(size), shift_left<32 - kBits>(sign)));
}

// Byte `kByte` of every lane as the number that it means, before zero point and scale.
template <Kind kKind, int kByte>
inline Floats value(Ints lanes, const Table16& table) {
    const Ints code = shift_right<8 * kByte>(lanes);
    if constexpr (kKind == Kind::float4) return look_up(table, code);
    if constexpr (kKind == Kind::e4m3) return mul(small_float<8, 3>(code), splat(0x1p120f));
    if constexpr (kKind == Kind::e5m2) return mul(small_float<8, 2>(code), splat(0x1p112f));
    if constexpr (kKind == Kind::e3m2) return mul(small_float<6, 2>(code), splat(0x1p124f));
    if constexpr (kKind == Kind::e2m3) return mul(small_float<6, 3>(code), splat(0x1p126f));
    (void)table;
    return to_floats(and_ints(code, splat(int32_t{255})));
}

// Scale, zero point and offset of sixteen rows in one group.
struct GroupOf16 {
    Floats scale;
    const uint8_t* zero;
    const float* offset;
};

inline GroupOf16 group_at(const Weight& w, int block, int group) {
    const int64_t at = (static_cast<int64_t>(block) * w.groups + group) * kBlock;
    GroupOf16 g;
    switch (w.scale_type) {
        case Type::f32: g.scale = load_floats(static_cast<const float*>(w.scale) + at); break;
        case Type::bf16: g.scale = load_bf16(static_cast<const uint16_t*>(w.scale) + at); break;
        default: g.scale = load_f16(static_cast<const uint16_t*>(w.scale) + at); break;
    }
    g.zero = w.zero == nullptr ? nullptr : w.zero + at;
    g.offset = w.offset == nullptr ? nullptr : w.offset + at;
    return g;
}

inline int group_of(const Weight& w, int column) { return w.groups == 1 ? 0 : column / w.group; }

}  // namespace ARRONDI_PATH
}  // namespace arrondi
