// Packed codes in registers: as bytes for the integer products, as float32 for the others. For one path.
#pragma once

#include <type_traits>

#include "activations.h"

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
// A table for every row: codes of sixteen columns, looked up and back in the common order.

// Four vectors with segments of four lanes each: lane v of segment s of result q is lane q of segment s of v.
inline void turn(const Bytes* v, Bytes* out) {
    const Bytes a = zip_low<4>(v[0], v[1]), b = zip_low<4>(v[2], v[3]), c = zip_high<4>(v[0], v[1]), d = zip_high<4>(v[2], v[3]);
    out[0] = zip_low<8>(a, b);
    out[1] = zip_high<8>(a, b);
    out[2] = zip_low<8>(c, d);
    out[3] = zip_high<8>(c, d);
}

inline const uint8_t* tables_of(const Weight& w, int block) {
    return w.tables + static_cast<int64_t>(block) * 256 * row_entry(w.kind);
}

// Four quads of bytes.
inline void look_up_rows(const uint8_t* tables, const Bytes* codes, Bytes* quads) {
    Bytes found[4];
    for (int v = 0; v < 4; v++) found[v] = look_up(load_bytes(tables + 64 * v), codes[v]);
    turn(found, quads);
}

// Sixteen columns of float32. Bytes become words, words become numbers, and then rows become lanes.
inline void look_up_rows(const uint8_t* tables, const Bytes* codes, float* columns) {
    Bytes four[4][4];  // [columns / 4][vector]
    for (int v = 0; v < 4; v++, tables += 256) {
        Bytes b[4];
        for (int i = 0; i < 4; i++) b[i] = look_up(load_bytes(tables + 64 * i), codes[v]);
        const Bytes first = zip_low<1>(b[0], b[1]), second = zip_low<1>(b[2], b[3]);
        const Bytes third = zip_high<1>(b[0], b[1]), fourth = zip_high<1>(b[2], b[3]);
        four[0][v] = zip_low<2>(first, second);
        four[1][v] = zip_high<2>(first, second);
        four[2][v] = zip_low<2>(third, fourth);
        four[3][v] = zip_high<2>(third, fourth);
    }
    for (int q = 0; q < 4; q++) {
        Bytes lanes[4];
        turn(four[q], lanes);
        for (int j = 0; j < 4; j++) store_bytes(columns + 16 * (4 * q + j), lanes[j]);
    }
}

// What goes on from one quad to the next: a table, or what is left of the ternary fractions; with tables of rows, theirs and
// the four quads that were looked up last.
template <bool kOfRows>
struct Going {
    Bytes bytes;
};
template <>
struct Going<true> {
    const uint8_t* tables;
    Bytes quads[4];
};

template <Kind kKind>
struct Decode {
    static constexpr int kQuads = step_quads(kKind);
    static constexpr bool kWide = wide(kKind);
    static constexpr bool kOfRows = row_entry(kKind) == 1;
    using State = Going<kOfRows>;
    static constexpr int kFold = fold_quads(kKind);

    static inline State begin(const uint8_t* p, const Weight& weight, int block) {
        (void)p, (void)weight, (void)block;
        State state{};
        if constexpr (kOfRows) state.tables = tables_of(weight, block);
        if constexpr (one_table(kKind)) state.bytes = repeat16(weight.bytes);
        if constexpr (kKind == Kind::trit5) state.bytes = load_bytes(p);
        return state;
    }

    template <int kQuad>
    static inline Bytes quad(const uint8_t* p, State& state) {
        (void)state;
        if constexpr (kOfRows) {
            if constexpr (kQuad % 4 == 0) {
                const Bytes codes[4] = {code<kQuad>(p), code<kQuad + 1>(p), code<kQuad + 2>(p), code<kQuad + 3>(p)};
                look_up_rows(state.tables, codes, state.quads);
            }
            return state.quads[kQuad % 4];
        } else if constexpr (one_table(kKind)) {
            return look_up(state.bytes, code<kQuad>(p));
        } else if constexpr (kKind == Kind::u1) {
            return plane<1, kQuad, 1>(p);
        } else if constexpr (kKind == Kind::trit5) {
            // The fraction f/256 times 3: its whole part is the digit. 3f/4 - 1 is two averages, and its top bits the digit.
            const Bytes f = state.bytes, less = subtract_to_zero(f, splat_byte(1)), zero = splat_byte(0);
            const Bytes digit = both(shift_down<6>(average(less, average(less, zero))), splat_byte(3));
            if constexpr (kQuad < 4) state.bytes = add_bytes(f, add_bytes(f, f));
            return digit;
        } else {
            return code<kQuad>(p);
        }
    }

    // Codes as bytes, or with a table of bytes its numbers.
    static inline void step(const uint8_t* p, const Weight& weight, int block, Bytes* w) {
        State state = begin(p, weight, block);
        unrolled<0, kQuads>([&](auto q) { w[q] = quad<q>(p, state); });
    }

    // A quad as it is stored.
    template <int kQuad>
    static inline Bytes code(const uint8_t* p) {
        constexpr int kBits = step_bytes(kKind) / 64;
        if constexpr (kBits == 8) return load_bytes(p + 64 * kQuad);
        if constexpr (kBits == 4) return plane<4, kQuad, 0>(p);
        if constexpr (kBits == 2) return plane<2, kQuad, 0>(p);
        if constexpr (kBits == 3) return either(plane<2, kQuad, 0>(p), plane<1, kQuad, 2>(p + 128));
        if constexpr (kBits == 5) return either(plane<4, kQuad, 0>(p), plane<1, kQuad, 4>(p + 256));
        if constexpr (kBits == 6) return either(plane<4, kQuad, 0>(p), plane<2, kQuad, 4>(p + 256));
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

// The numbers of one step, before zero point and scale.
template <Kind kKind, int kEntry = row_entry(kKind)>
struct Numbers {
    using D = Decode<kKind>;
    const Table16 table;
    Bytes decoded[D::kQuads];

    Numbers(const Weight& w) : table(load_table(w.floats)) {}
    inline void step(const uint8_t* p, const Weight& w, int block) { D::step(p, w, block, decoded); }
    inline void quad(int q, Floats* v) const {
        const Ints lanes = lanes_of(decoded[q]);
        unrolled<0, 4>([&](auto j) { v[j] = value<kKind, j>(lanes, table); });
    }
};

// Thirty-two columns of float32 from the tables of rows.
template <Kind kKind>
struct Numbers<kKind, 4> {
    using D = Decode<kKind>;
    alignas(64) float columns[32 * kBlock];

    Numbers(const Weight&) {}
    inline void step(const uint8_t* p, const Weight& w, int block) {
        unrolled<0, 2>([&](auto half) {
            constexpr int kFirst = 4 * half;
            const Bytes codes[4] = {D::template code<kFirst>(p), D::template code<kFirst + 1>(p), D::template code<kFirst + 2>(p),
                                    D::template code<kFirst + 3>(p)};
            look_up_rows(tables_of(w, block), codes, columns + 16 * kBlock * half);
        });
    }
    inline void quad(int q, Floats* v) const {
        for (int j = 0; j < 4; j++) v[j] = load_floats(columns + kBlock * (4 * q + j));
    }
};

// Scale and offset of sixteen rows in one group.
struct GroupOf16 {
    Floats scale, offset;
};

inline int64_t place_of(const Weight& w, int block, int group) {
    return (static_cast<int64_t>(block) * w.groups + group) * kBlock;
}

// The zero points of sixteen rows in one group; null: all are zero_all.
inline const uint8_t* zero_at(const Weight& w, int block, int group) {
    return w.zero == nullptr ? nullptr : w.zero + place_of(w, block, group);
}

// The offset is zero where there are none; a code times its unit is exact, or rounded as the product of two numbers is.
inline GroupOf16 group_at(const Weight& w, int block, int group) {
    const int64_t at = place_of(w, block, group);
    if (w.counted == Counted::no)
        return {load_type(w.scale, w.scale_type, at), w.offset == nullptr ? zero_floats() : load_type(w.offset, w.offset_type, at)};
    const int64_t unit_at = (static_cast<int64_t>(block) * w.runs + group / w.run) * kBlock;
    Ints code = widen_bytes(static_cast<const uint8_t*>(w.scale) + at), depth = zero_ints();
    if (w.counted == Counted::i8) {
        code = sub(xor_ints(code, splat(int32_t{128})), splat(int32_t{128}));
    } else if (w.counted == Counted::halves) {
        depth = shift_right<4>(code);
        code = and_ints(code, splat(int32_t{15}));
    }
    const Floats scale = mul(to_floats(code), load_type(w.unit, w.scale_type, unit_at));
    if (w.offset_unit == nullptr) return {scale, zero_floats()};
    if (w.counted != Counted::halves) depth = widen_bytes(static_cast<const uint8_t*>(w.offset) + at);
    return {scale, mul(to_floats(depth), load_type(w.offset_unit, w.offset_type, unit_at))};
}

inline int group_of(const Weight& w, int column) { return w.groups == 1 ? 0 : column / w.group; }

}  // namespace ARRONDI_PATH
}  // namespace arrondi
