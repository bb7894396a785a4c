// Packed codes in registers: as bytes for the integer products, as float32 for the others. For one path.
#pragma once

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

// One step of codes as bytes, w[quad].
template <Kind kKind>
struct Decode {
    static constexpr int kQuads = step_quads(kKind);
    static constexpr bool kWide = kKind == Kind::u8;  // codes above 127
    static constexpr int kFold = fold_quads(kKind);

    static inline void step(const uint8_t* p, const Weight& weight, Bytes* w) {
        if constexpr (kKind == Kind::u8 || kKind == Kind::e4m3 || kKind == Kind::e5m2) {
            for (int q = 0; q < 8; q++) w[q] = load_bytes(p + 64 * q);
        } else if constexpr (kKind == Kind::u4 || kKind == Kind::table4 || kKind == Kind::float4) {
            fours(p, w);
            if constexpr (kKind == Kind::table4) {
                const Bytes table = repeat16(weight.bytes);
                for (int q = 0; q < 8; q++) w[q] = look_up(table, w[q]);
            }
        } else if constexpr (kKind == Kind::u2) {
            twos(p, w);
        } else if constexpr (kKind == Kind::u1) {
            ones<1>(p, w);
        } else if constexpr (kKind == Kind::u3) {
            Bytes high[8];
            twos(p, w);
            ones<2>(p + 128, high);
            for (int q = 0; q < 8; q++) w[q] = either(w[q], high[q]);
        } else if constexpr (kKind == Kind::u5) {
            Bytes high[8];
            fours(p, w);
            ones<4>(p + 256, high);
            for (int q = 0; q < 8; q++) w[q] = either(w[q], high[q]);
        } else if constexpr (kKind == Kind::u6 || kKind == Kind::e3m2 || kKind == Kind::e2m3) {
            const Bytes mask = splat_byte(0x30);
            fours(p, w);
            for (int v = 0; v < 2; v++) {
                const Bytes b = load_bytes(p + 256 + 64 * v);
                w[4 * v] = either(w[4 * v], both(shift_up<4>(b), mask));
                w[4 * v + 1] = either(w[4 * v + 1], both(shift_up<2>(b), mask));
                w[4 * v + 2] = either(w[4 * v + 2], both(b, mask));
                w[4 * v + 3] = either(w[4 * v + 3], both(shift_down<2>(b), mask));
            }
        } else if constexpr (kKind == Kind::trit5) {
            // The fraction f/256 times 3: its whole part is the digit. 3f/4 - 1 is two averages, and its top bits the digit.
            const Bytes mask = splat_byte(3), one = splat_byte(1), zero = splat_byte(0);
            Bytes f = load_bytes(p);
            for (int q = 0; q < 5; q++) {
                const Bytes less = subtract_to_zero(f, one);
                w[q] = both(shift_down<6>(average(less, average(less, zero))), mask);
                if (q < 4) f = add_bytes(f, add_bytes(f, f));
            }
        }
        (void)weight;
    }

  private:
    static inline void fours(const uint8_t* p, Bytes* w) {
        const Bytes mask = splat_byte(0x0f);
        for (int v = 0; v < 4; v++) {
            const Bytes b = load_bytes(p + 64 * v);
            w[2 * v] = both(b, mask);
            w[2 * v + 1] = both(shift_down<4>(b), mask);
        }
    }
    static inline void twos(const uint8_t* p, Bytes* w) {
        const Bytes mask = splat_byte(0x03);
        for (int v = 0; v < 2; v++) {
            const Bytes b = load_bytes(p + 64 * v);
            w[4 * v] = both(b, mask);
            w[4 * v + 1] = both(shift_down<2>(b), mask);
            w[4 * v + 2] = both(shift_down<4>(b), mask);
            w[4 * v + 3] = both(shift_down<6>(b), mask);
        }
    }
    // Bit q of every byte, moved to bit `kTo`.
    template <int kTo>
    static inline void ones(const uint8_t* p, Bytes* w) {
        const Bytes mask = splat_byte(1 << kTo), b = load_bytes(p);
        w[0] = both(moved<0, kTo>(b), mask);
        w[1] = both(moved<1, kTo>(b), mask);
        w[2] = both(moved<2, kTo>(b), mask);
        w[3] = both(moved<3, kTo>(b), mask);
        w[4] = both(moved<4, kTo>(b), mask);
        w[5] = both(moved<5, kTo>(b), mask);
        w[6] = both(moved<6, kTo>(b), mask);
        w[7] = both(moved<7, kTo>(b), mask);
    }
    template <int kFrom, int kTo>
    static inline Bytes moved(Bytes b) {
        if constexpr (kFrom > kTo) return shift_down<kFrom - kTo>(b);
        return shift_up<(kFrom > kTo ? 0 : kTo - kFrom)>(b);
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
