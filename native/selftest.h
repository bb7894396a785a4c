// Shared by the files of the self-test: failures, random numbers, and numbers of each type.
#pragma once

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "kernels.h"

namespace arrondi {

extern std::atomic<int> failures;
__attribute__((format(printf, 1, 2))) void fail(const char* format, ...);

// Small, and the same on every machine.
struct Random {
    uint64_t state;
    explicit Random(uint64_t seed) : state(seed * 2 + 1) {}
    uint32_t next() {
        state = state * 6364136223846793005u + 1442695040888963407u;
        return static_cast<uint32_t>((state ^ (state >> 27)) >> 29);
    }
    int below(int count) { return static_cast<int>(next() % static_cast<uint32_t>(count)); }
    float uniform() { return static_cast<float>(next() >> 8) * 0x1p-24f; }
    float normal() {
        float sum = -6.0f;
        for (int i = 0; i < 12; i++) sum += uniform();
        return sum;
    }
};

template <class T, size_t kCount>
T any_of(const T (&choices)[kCount], Random& random) {
    return choices[random.below(static_cast<int>(kCount))];
}

constexpr int kN[] = {1, 7, 16, 33, 130};
constexpr int kK[] = {1, 5, 16, 32, 100, 128, 300, 1030};
constexpr int kM[] = {1, 2, 3, 4, 5, 7, 13, 65};
constexpr int kThreads[] = {1, 2, 5};

// ---- numbers -----------------------------------------------------------------------------------------------------

constexpr const char* kKindNames[kKinds] = {
    "u8",     "u6",          "u5",          "u4",          "u3",   "u2",   "u1",   "trit5", "table4", "wide_table4", "rows4", "rows3", "rows2",
    "float4", "float_rows4", "float_rows3", "float_rows2", "e4m3", "e5m2", "e3m2", "e2m3"};
constexpr const char* kTypeNames[3] = {"f32", "bf16", "f16"};
constexpr Type kTypes[3] = {Type::f32, Type::bf16, Type::f16};

// How many codes a kind has.
inline int codes_of(Kind kind) {
    switch (kind) {
        case Kind::u8:
        case Kind::e4m3:
        case Kind::e5m2: return 256;
        case Kind::u6:
        case Kind::e3m2:
        case Kind::e2m3: return 64;
        case Kind::u5: return 32;
        case Kind::u3:
        case Kind::rows3:
        case Kind::float_rows3: return 8;
        case Kind::u2:
        case Kind::rows2:
        case Kind::float_rows2: return 4;
        case Kind::u1: return 2;
        case Kind::trit5: return 3;
        default: return 16;
    }
}

inline int bits_of(Kind kind) {
    int bits = 1;
    while (1 << bits < codes_of(kind)) bits++;
    return bits;
}

inline double small_float(int code, int exponent_bits, int mantissa_bits, int bias) {
    const int mantissa = code & ((1 << mantissa_bits) - 1);
    const int exponent = code >> mantissa_bits & ((1 << exponent_bits) - 1);
    const double size = exponent == 0 ? std::ldexp(mantissa, 1 - bias - mantissa_bits)
                                      : std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
    return code >> (exponent_bits + mantissa_bits) & 1 ? -size : size;
}

inline uint16_t to_bf16(float v) {
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    if (v != v) return static_cast<uint16_t>(bits >> 16 | 0x40);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float from_bf16(uint16_t half) {
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float v;
    std::memcpy(&v, &bits, 4);
    return v;
}

// Numbers of a type, as it stores them and as float32.
struct Numbers {
    Type type = Type::f32;
    std::vector<float> floats;
    std::vector<uint16_t> halves;

    Numbers(Type type, size_t count) : type(type), floats(count), halves(type == Type::f32 ? 0 : count) {}

    // A float16 is cut, not rounded; very small ones become zero.
    void set(size_t i, float v) {
        if (type == Type::bf16) halves[i] = to_bf16(v);
        if (type == Type::f16) {
            int exponent;
            const float fraction = std::frexp(std::fabs(v), &exponent);
            int bits = 0;
            if (v != v) {
                bits = 0x7e00;
            } else if (std::isinf(v) || exponent > 16) {
                bits = 0x7c00;
            } else if (exponent >= -13) {
                bits = ((exponent + 14) << 10) + static_cast<int>(fraction * 2048.0f) - 1024;
            } else {
                bits = static_cast<int>(std::ldexp(fraction, exponent + 24));
            }
            halves[i] = static_cast<uint16_t>(bits | (std::signbit(v) ? 0x8000 : 0));
            const double size = small_float(halves[i], 5, 10, 15);
            v = bits >= 0x7c00 ? v : static_cast<float>(size);
        }
        floats[i] = type == Type::bf16 ? from_bf16(halves[i]) : v;
    }
    const void* data() const { return type == Type::f32 ? static_cast<const void*>(floats.data()) : halves.data(); }
};

// Products of every kind on the path in use; how many there were.
int try_all_products(uint64_t seed, bool quick);
// Two threads with products of their own.
void try_callers(uint64_t seed);
// Attention along principal directions.
void try_directions(uint64_t seed, bool quick);
// Products with states of a trellis, and their packing.
void try_rings(uint64_t seed, bool quick);
// What the path in use does besides: quantizers, transforms, tokens.
void try_jobs(uint64_t seed, bool quick);
// Networks on codes.
void try_codes(uint64_t seed, bool quick);
// What surrounds the products of a training step.
void try_training(uint64_t seed, bool quick);

}  // namespace arrondi
