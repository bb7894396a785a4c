// Sixteen lanes of 32 bits in plain C++: the meaning of every operation that the kernels use, and the path of every CPU that
// has no lanes_*.h of its own. A file path_NAME.cpp defines ARRONDI_PATH, includes one lanes_*.h and then the kernels.
//
//   Bytes   64 bytes; lane i is bytes 4i … 4i+3. In a tile of weights, lane i is column i and its bytes are four
//           consecutive rows of K ("a quad").
//   Ints    sixteen int32.   Floats  sixteen float32.
//
// No standard library containers in files that are compiled for an instruction set: the linker may keep their copy for all.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace arrondi {
namespace ARRONDI_PATH {

constexpr int kRows = 4;         // rows of a tile of activations
constexpr int kVectors = 1;      // groups of sixteen columns in a tile of weights
constexpr bool kFastDot = false;    // whether integer products of three digits beat float ones
constexpr bool kShortSums = false;  // whether sums that stay in 16 bits for a while (Shorts) are faster than dot7
constexpr bool kWords = false;      // whether two digits, and codes above 127, are multiplied in 16 bits (dot_words)
constexpr int kRingSums = 1;        // vectors of sums that stay in registers beside what decodes states

struct Bytes {
    uint8_t v[64];
};
struct Ints {
    int32_t v[16];
};
struct Floats {
    float v[16];
};

#define ARRONDI_EACH(type, count, expression) \
    type r;                                   \
    for (int i = 0; i < count; i++) r.v[i] = expression; \
    return r

inline Bytes load_bytes(const void* p) {
    Bytes r;
    std::memcpy(r.v, p, 64);
    return r;
}
inline void store_bytes(void* p, Bytes b) { std::memcpy(p, b.v, 64); }
// Four bytes in every lane.
inline Bytes repeat4(const void* p) {
    const uint8_t* q = static_cast<const uint8_t*>(p);
    ARRONDI_EACH(Bytes, 64, q[i & 3]);
}
// Sixteen bytes four times: a table for look_up.
inline Bytes repeat16(const void* p) {
    const uint8_t* q = static_cast<const uint8_t*>(p);
    ARRONDI_EACH(Bytes, 64, q[i & 15]);
}
inline Bytes splat_byte(int v) { ARRONDI_EACH(Bytes, 64, static_cast<uint8_t>(v)); }
// Shifts may carry bits in from a neighbouring byte: the caller masks.
template <int kBits>
inline Bytes shift_down(Bytes b) {
    ARRONDI_EACH(Bytes, 64, static_cast<uint8_t>(b.v[i] >> kBits));
}
template <int kBits>
inline Bytes shift_up(Bytes b) {
    ARRONDI_EACH(Bytes, 64, static_cast<uint8_t>(b.v[i] << kBits));
}
inline Bytes both(Bytes a, Bytes b) { ARRONDI_EACH(Bytes, 64, a.v[i] & b.v[i]); }
inline Bytes either(Bytes a, Bytes b) { ARRONDI_EACH(Bytes, 64, a.v[i] | b.v[i]); }
inline Bytes add_bytes(Bytes a, Bytes b) { ARRONDI_EACH(Bytes, 64, static_cast<uint8_t>(a.v[i] + b.v[i])); }
// a - b, zero where that would be negative.
inline Bytes subtract_to_zero(Bytes a, Bytes b) {
    ARRONDI_EACH(Bytes, 64, static_cast<uint8_t>(a.v[i] > b.v[i] ? a.v[i] - b.v[i] : 0));
}
// (a + b + 1) / 2 without overflow.
inline Bytes average(Bytes a, Bytes b) { ARRONDI_EACH(Bytes, 64, static_cast<uint8_t>((a.v[i] + b.v[i] + 1) >> 1)); }
// table[index] in each sixteen bytes, index 0 … 15.
inline Bytes look_up(Bytes table, Bytes index) { ARRONDI_EACH(Bytes, 64, table.v[i / 16 * 16 + (index.v[i] & 15)]); }

// The first halves of each sixteen bytes of a and of b, `kBytes` of one and of the other in turn; the second halves.
template <int kBytes, int kFrom>
inline Bytes zip(const Bytes& a, const Bytes& b) {
    ARRONDI_EACH(Bytes, 64, (i / kBytes % 2 == 0 ? a : b).v[i / 16 * 16 + kFrom + i % 16 / (2 * kBytes) * kBytes + i % kBytes]);
}
template <int kBytes>
inline Bytes zip_low(const Bytes& a, const Bytes& b) {
    return zip<kBytes, 0>(a, b);
}
template <int kBytes>
inline Bytes zip_high(const Bytes& a, const Bytes& b) {
    return zip<kBytes, 8>(a, b);
}

inline Ints splat(int32_t v) { ARRONDI_EACH(Ints, 16, v); }
inline Ints zero_ints() { return splat(int32_t{0}); }
// The bytes as lanes.
inline Ints lanes_of(Bytes b) {
    Ints r;
    std::memcpy(r.v, b.v, 64);
    return r;
}
inline Bytes bytes_of(Ints v) {
    Bytes r;
    std::memcpy(r.v, v.v, 64);
    return r;
}
inline Ints load_ints(const int32_t* p) {
    Ints r;
    std::memcpy(r.v, p, 64);
    return r;
}
inline void store_ints(int32_t* p, Ints v) { std::memcpy(p, v.v, 64); }
// Sixteen bytes, each its own lane.
inline Ints widen_bytes(const uint8_t* p) { ARRONDI_EACH(Ints, 16, p[i]); }
// Sums and products wrap around, as they do in registers.
inline int32_t wrapped(uint32_t v) { return static_cast<int32_t>(v); }
inline Ints add(Ints a, Ints b) { ARRONDI_EACH(Ints, 16, wrapped(static_cast<uint32_t>(a.v[i]) + static_cast<uint32_t>(b.v[i]))); }
inline Ints sub(Ints a, Ints b) { ARRONDI_EACH(Ints, 16, wrapped(static_cast<uint32_t>(a.v[i]) - static_cast<uint32_t>(b.v[i]))); }
inline Ints mul(Ints a, Ints b) { ARRONDI_EACH(Ints, 16, wrapped(static_cast<uint32_t>(a.v[i]) * static_cast<uint32_t>(b.v[i]))); }
inline Ints min(Ints a, Ints b) { ARRONDI_EACH(Ints, 16, a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
inline Ints max(Ints a, Ints b) { ARRONDI_EACH(Ints, 16, a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
inline Ints and_ints(Ints a, Ints b) { ARRONDI_EACH(Ints, 16, a.v[i] & b.v[i]); }
inline Ints or_ints(Ints a, Ints b) { ARRONDI_EACH(Ints, 16, a.v[i] | b.v[i]); }
inline Ints xor_ints(Ints a, Ints b) { ARRONDI_EACH(Ints, 16, a.v[i] ^ b.v[i]); }
// Logical shifts.
template <int kBits>
inline Ints shift_right(Ints v) {
    ARRONDI_EACH(Ints, 16, wrapped(static_cast<uint32_t>(v.v[i]) >> kBits));
}
template <int kBits>
inline Ints shift_left(Ints v) {
    ARRONDI_EACH(Ints, 16, wrapped(static_cast<uint32_t>(v.v[i]) << kBits));
}
// Each lane by a number of bits of its own, below 32.
inline Ints shift_right_each(Ints v, Ints bits) {
    ARRONDI_EACH(Ints, 16, wrapped(static_cast<uint32_t>(v.v[i]) >> bits.v[i]));
}
// With kFields: eight bits from each of 64 places of eight bytes; every eight results have the same eight bytes.
constexpr bool kFields = false;
inline Bytes fields(const void*, Bytes) { return {}; }
// sum + u · s over the four bytes of each lane, u unsigned and s signed, exact. dot7: u below 128, which some CPUs do faster.
inline Ints dot8(Ints sum, Bytes u, Bytes s) {
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 4; j++) sum.v[i] += u.v[4 * i + j] * static_cast<int8_t>(s.v[4 * i + j]);
    return sum;
}
inline Ints dot7(Ints sum, Bytes u, Bytes s) { return dot8(sum, u, s); }
// With kShortSums: sums of two neighbouring products, 16 bits each, and how they are folded into a sum of 32 before they overflow.
using Shorts = Ints;
inline Shorts zero_shorts() { return zero_ints(); }
inline Shorts dot_short(Shorts sum, Bytes u, Bytes s) { return dot7(sum, u, s); }
inline Ints fold(Ints sum, Shorts part) { ARRONDI_EACH(Ints, 16, sum.v[i] + part.v[i]); }
// With kWords: bytes 0 and 2, 1 and 3 of every lane as two numbers of 16 bits.
inline Bytes even_words(Bytes b) { return b; }
inline Bytes odd_words(Bytes b) { return b; }
// Two bytes in both halves of every lane.
inline Bytes repeat2(const void* p) {
    const uint8_t* q = static_cast<const uint8_t*>(p);
    ARRONDI_EACH(Bytes, 64, q[i & 1]);
}
// With kFours: sums of every four bytes as words of 16 bits, those of `low` in the lower half of each lane and of `high` in the upper.
constexpr bool kFours = true;
inline Bytes add_fours(Bytes low, Bytes high) {
    Bytes r;
    for (int i = 0; i < 16; i++) {
        uint16_t sum[2] = {0, 0};
        for (int j = 0; j < 4; j++) {
            sum[0] = static_cast<uint16_t>(sum[0] + low.v[4 * i + j]);
            sum[1] = static_cast<uint16_t>(sum[1] + high.v[4 * i + j]);
        }
        std::memcpy(r.v + 4 * i, sum, 4);
    }
    return r;
}
// Sums of two neighbouring bytes, 16 bits each.
inline Bytes add_pairs(Bytes u) {
    Bytes r;
    for (int i = 0; i < 64; i += 2) {
        const uint16_t sum = static_cast<uint16_t>(u.v[i] + u.v[i + 1]);
        std::memcpy(r.v + i, &sum, 2);
    }
    return r;
}
// sum + w · x over the two int16 of each lane.
inline Ints dot_words(Ints sum, Bytes w, Bytes x) {
    for (int i = 0; i < 32; i++) {
        int16_t a, b;
        std::memcpy(&a, w.v + 2 * i, 2);
        std::memcpy(&b, x.v + 2 * i, 2);
        sum.v[i / 2] += a * b;
    }
    return sum;
}
// sum + the four bytes of each lane.
inline Ints add_four(Ints sum, Bytes u) {
    for (int i = 0; i < 64; i++) sum.v[i / 4] += u.v[i];
    return sum;
}
// In twos, fours and bytes, the library's function would not be inlined.
inline int32_t ones_of(uint32_t v) {
    v = v - (v >> 1 & 0x55555555u);
    v = (v & 0x33333333u) + (v >> 2 & 0x33333333u);
    v = (v + (v >> 4)) & 0x0f0f0f0fu;
    v = v + (v >> 8);
    return static_cast<int32_t>((v + (v >> 16)) & 0x3fu);
}
inline Ints count_ones(Ints v) { ARRONDI_EACH(Ints, 16, ones_of(static_cast<uint32_t>(v.v[i]))); }

inline Floats splat(float v) { ARRONDI_EACH(Floats, 16, v); }
inline Floats zero_floats() { return splat(0.0f); }
inline Floats load_floats(const float* p) {
    Floats r;
    std::memcpy(r.v, p, 64);
    return r;
}
inline void store_floats(float* p, Floats v) { std::memcpy(p, v.v, 64); }
inline Floats as_floats(Ints v) {
    Floats r;
    std::memcpy(r.v, v.v, 64);
    return r;
}
inline Ints as_ints(Floats v) {
    Ints r;
    std::memcpy(r.v, v.v, 64);
    return r;
}
inline Floats load_bf16(const uint16_t* p) {
    Ints bits;
    for (int i = 0; i < 16; i++) bits.v[i] = static_cast<int32_t>(static_cast<uint32_t>(p[i]) << 16);
    return as_floats(bits);
}
inline float half_to_float(uint16_t h) {
    uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, rest = h & 0x7fff, bits;
    if (rest >= 0x7c00) {
        bits = 0x7f800000 | (rest & 0x3ff) << 13;
    } else {
        bits = rest << 13;
        float f;
        std::memcpy(&f, &bits, 4);
        f *= 0x1p112f;
        std::memcpy(&bits, &f, 4);
    }
    bits |= sign;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}
inline Floats load_f16(const uint16_t* p) { ARRONDI_EACH(Floats, 16, half_to_float(p[i])); }
// The low 16 (8) bits of every lane, sixteen numbers in a row.
inline void store_low_halves(uint16_t* p, Ints v) {
    for (int i = 0; i < 16; i++) p[i] = static_cast<uint16_t>(v.v[i]);
}
inline void store_low_bytes(uint8_t* p, Ints v) {
    for (int i = 0; i < 16; i++) p[i] = static_cast<uint8_t>(v.v[i]);
}
inline Floats to_floats(Ints v) { ARRONDI_EACH(Floats, 16, static_cast<float>(v.v[i])); }
inline Floats add(Floats a, Floats b) { ARRONDI_EACH(Floats, 16, a.v[i] + b.v[i]); }
inline Floats sub(Floats a, Floats b) { ARRONDI_EACH(Floats, 16, a.v[i] - b.v[i]); }
inline Floats mul(Floats a, Floats b) { ARRONDI_EACH(Floats, 16, a.v[i] * b.v[i]); }
inline Floats div(Floats a, Floats b) { ARRONDI_EACH(Floats, 16, a.v[i] / b.v[i]); }
// x86's rule: the second operand if either is NaN.
inline Floats min(Floats a, Floats b) { ARRONDI_EACH(Floats, 16, a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
inline Floats max(Floats a, Floats b) { ARRONDI_EACH(Floats, 16, a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
inline Floats sqrt(Floats v) { ARRONDI_EACH(Floats, 16, std::sqrt(v.v[i])); }
// To nearest, ties to even. Adding 2^23 leaves no bits for the fraction; the library's function would not be inlined.
inline float round_one(float v) {
    float size = std::fabs(v);
    return size < 0x1p23f ? std::copysign((size + 0x1p23f) - 0x1p23f, v) : v;
}
// The same as int32; lanes that do not fit (NaN too) become the smallest int32.
inline Ints to_ints(Floats v) {
    ARRONDI_EACH(Ints, 16, !(std::fabs(v.v[i]) < 0x1p31f) ? INT32_MIN : static_cast<int32_t>(round_one(v.v[i])));
}
inline Floats round_even(Floats v) { ARRONDI_EACH(Floats, 16, round_one(v.v[i])); }
// a · b + c, rounded once where the CPU can, else twice: not for results that must equal a twin's.
inline Floats fma(Floats a, Floats b, Floats c) { ARRONDI_EACH(Floats, 16, a.v[i] * b.v[i] + c.v[i]); }
// The same rounded once everywhere, for numbers a of few bits: float64 holds their products.
inline Floats fused(Floats a, Floats b, Floats c) {
    ARRONDI_EACH(Floats, 16, static_cast<float>(static_cast<double>(a.v[i]) * b.v[i] + c.v[i]));
}
inline float sum(Floats v) {
    float r = 0;
    for (int i = 0; i < 16; i++) r += v.v[i];
    return r;
}
// The sums of four at once.
inline void store_sums(float* p, Floats a, Floats b, Floats c, Floats d) {
    p[0] = sum(a), p[1] = sum(b), p[2] = sum(c), p[3] = sum(d);
}
inline float largest(Floats v) {
    float r = v.v[0];
    for (int i = 1; i < 16; i++) r = v.v[i] > r ? v.v[i] : r;
    return r;
}
inline float smallest(Floats v) {
    float r = v.v[0];
    for (int i = 1; i < 16; i++) r = v.v[i] < r ? v.v[i] : r;
    return r;
}

// Lane i is lane i ^ kStep of v; kStep 1, 2, 4 or 8.
template <int kStep>
inline Floats swap_lanes(Floats v) {
    ARRONDI_EACH(Floats, 16, v.v[i ^ kStep]);
}
// Bit i is 1 where lane i is above zero.
inline uint32_t positive(Floats v) {
    uint32_t bits = 0;
    for (int i = 0; i < 16; i++) bits |= static_cast<uint32_t>(v.v[i] > 0.0f) << i;
    return bits;
}

// Sixteen floats to be looked up by the low four bits of each lane; higher bits of the index are ignored.
struct Table16 {
    float v[16];
};
inline Table16 load_table(const float* p) {
    Table16 t;
    std::memcpy(t.v, p, 64);
    return t;
}
inline Floats look_up(const Table16& table, Ints index) { ARRONDI_EACH(Floats, 16, table.v[index.v[i] & 15]); }

// sum + w · x over the two bfloat16 of each lane; only where kHasBf16Dot.
constexpr bool kHasBf16Dot = false;
inline Floats dot_bf16(Floats sum, Bytes, Bytes) { return sum; }

#undef ARRONDI_EACH

}  // namespace ARRONDI_PATH
}  // namespace arrondi
