// Fast Hadamard transforms, for one path.
//
// A row is a matrix of `base` × `run`: butterflies along its rows, then the small matrix K from the left. Four
// butterflies are within a register; the others take up to eight registers at a time, three stages for each way through
// the cache.
#pragma once

#include "activations.h"
#include "transforms.h"

namespace arrondi {
namespace ARRONDI_PATH {

inline const float* signs_of(int stage) {
    alignas(64) static const float kSigns[4][16] = {
        {1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1},
        {1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1},
        {1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1},
        {1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1, -1},
    };
    return kSigns[stage];
}

template <int kStep>
inline Floats lane_stage(Floats v, Floats signs) {
    return fma(v, signs, swap_lanes<kStep>(v));
}

// Butterflies between kWidth registers, `h` floats apart at first.
template <int kWidth>
inline void register_stages(Floats* v) {
#pragma GCC unroll 3
    for (int h = 1; h < kWidth; h *= 2)
#pragma GCC unroll 8
        for (int i = 0; i < kWidth; i++)
            if ((i & h) == 0) {
                const Floats sum = add(v[i], v[i + h]);
                v[i + h] = sub(v[i], v[i + h]);
                v[i] = sum;
            }
}

// bfloat16 in the low half of every lane, to nearest even. Rounding must not carry a NaN's payload into its exponent.
inline Ints safe_bf16_bits(Floats v) {
    const Ints bits = as_ints(v), size = and_ints(bits, splat(int32_t{0x7fffffff}));
    return bf16_bits(as_floats(or_ints(min(size, splat(int32_t{0x7fc00000})), and_ints(bits, splat(INT32_MIN)))));
}

template <Type kType>
inline Floats load_as(const void* p, int64_t at) {
    if constexpr (kType == Type::f32) return load_floats(static_cast<const float*>(p) + at);
    return load_bf16(static_cast<const uint16_t*>(p) + at);
}

template <Type kType>
inline void store_as(void* p, int64_t at, Floats v) {
    if constexpr (kType == Type::f32) return store_floats(static_cast<float*>(p) + at, v);
    store_low_halves(static_cast<uint16_t*>(p) + at, safe_bf16_bits(v));
}

// Runs shorter than a register: sixteen columns of a group's buffer are several whole runs, column c of row c / run.
// Rows that are not there are zeros, and are not stored.
template <Type kType>
inline Floats load_runs(const Hadamard& t, int64_t row, int b) {
    constexpr size_t kSize = kType == Type::f32 ? 4 : 2;
    alignas(64) uint8_t lanes[64] = {0};
    for (int i = 0; i < 16 >> t.shift && row + i < t.rows; i++)
        __builtin_memcpy(lanes + (i * kSize << t.shift),
                         static_cast<const uint8_t*>(t.x) + ((row + i) * t.ldx + (int64_t{b} << t.shift)) * kSize,
                         kSize << t.shift);
    return load_as<kType>(lanes, 0);
}

template <Type kType>
inline void store_runs(const Hadamard& t, int64_t row, int b, Floats v) {
    constexpr size_t kSize = kType == Type::f32 ? 4 : 2;
    alignas(64) uint8_t lanes[64];
    store_as<kType>(lanes, 0, v);
    for (int i = 0; i < 16 >> t.shift && row + i < t.rows; i++)
        __builtin_memcpy(static_cast<uint8_t*>(t.y) + ((row + i) * t.ldy + (int64_t{b} << t.shift)) * kSize,
                         lanes + (i * kSize << t.shift), kSize << t.shift);
}

// One way through `floats` numbers: stages h, 2h, … kWidth/2 · h. Unrolled, for GCC keeps an array in registers only
// then.
template <int kWidth, class Load, class Store>
inline void pass(int floats, int h, const Load& load, const Store& store) {
    for (int start = 0; start < floats; start += kWidth * h)
        for (int c = start; c < start + h; c += 16) {
            Floats v[kWidth];
#pragma GCC unroll 8
            for (int i = 0; i < kWidth; i++) v[i] = load(c + i * h);
            register_stages<kWidth>(v);
#pragma GCC unroll 8
            for (int i = 0; i < kWidth; i++) store(c + i * h, v[i]);
        }
}

template <class Load, class Store>
inline void pass_of(int stages, int floats, int h, const Load& load, const Store& store) {
    switch (stages) {
        case 0: return pass<1>(floats, h, load, store);
        case 1: return pass<2>(floats, h, load, store);
        case 2: return pass<4>(floats, h, load, store);
        default: return pass<8>(floats, h, load, store);
    }
}

// All stages of one run of at least sixteen, from x into `work` or, where that is all, into y.
template <Type kType>
inline void long_run(const Hadamard& t, int64_t row, int b, float* work) {
    const Floats s0 = load_floats(signs_of(0)), s1 = load_floats(signs_of(1)), s2 = load_floats(signs_of(2)),
                 s3 = load_floats(signs_of(3)), scale = splat(t.scale);
    const int64_t x = row * t.ldx + (int64_t{b} << t.shift), y = row * t.ldy + (int64_t{b} << t.shift);
    const auto first = [&](int c) {
        Floats v = load_as<kType>(t.x, x + c);
        v = lane_stage<2>(lane_stage<1>(v, s0), s1);
        return lane_stage<8>(lane_stage<4>(v, s2), s3);
    };
    const auto last = [&](int c, Floats v) { store_as<kType>(t.y, y + c, mul(v, scale)); };
    const auto load = [&](int c) { return load_floats(work + c); };
    const auto store = [&](int c, Floats v) { store_floats(work + c, v); };
    int stages = t.shift - 4, h = 16;
    for (bool from_x = true; from_x || stages > 0; from_x = false) {
        const int now = stages < 3 ? stages : 3;
        stages -= now;
        const bool to_y = stages == 0 && t.base == 1;
        if (from_x)
            to_y ? pass_of(now, 1 << t.shift, h, first, last) : pass_of(now, 1 << t.shift, h, first, store);
        else
            to_y ? pass_of(now, 1 << t.shift, h, load, last) : pass_of(now, 1 << t.shift, h, load, store);
        h <<= now;
    }
}

template <Type kType>
inline void short_runs(const Hadamard& t, int64_t row, int b, float* work) {
    Floats v = load_runs<kType>(t, row, b);
    if (t.shift > 0) v = lane_stage<1>(v, load_floats(signs_of(0)));
    if (t.shift > 1) v = lane_stage<2>(v, load_floats(signs_of(1)));
    if (t.shift > 2) v = lane_stage<4>(v, load_floats(signs_of(2)));
    if (t.base == 1) return store_runs<kType>(t, row, b, mul(v, splat(t.scale)));
    store_floats(work, v);
}

template <Type kType>
inline void butterflies_of(const Hadamard& t, int64_t group, float* work) {
    const int64_t row = group * t.together;
    const int at_once = t.shift >= 4 ? 1 : 16 >> t.shift;
    for (int b = 0; b < t.base; b++, work += t.stride)
        for (int r = 0; r < t.together; r += at_once) {
            float* part = work + (r << t.shift);
            if (t.shift < 4)
                short_runs<kType>(t, row + r, b, part);
            else if (row + r < t.rows)
                long_run<kType>(t, row + r, b, part);
            else
                for (int c = 0; c < 1 << t.shift; c += 16) store_floats(part + c, zero_floats());
        }
}

inline void butterflies(const Hadamard& t, int64_t group, float* work) {
    t.type == Type::f32 ? butterflies_of<Type::f32>(t, group, work) : butterflies_of<Type::bf16>(t, group, work);
}

inline void store_columns(const Hadamard& t, int64_t group, int b, int c, Floats v) {
    const int64_t row = group * t.together + (c >> t.shift);
    v = mul(v, splat(t.scale));
    if (t.shift < 4)
        return t.type == Type::f32 ? store_runs<Type::f32>(t, row, b, v) : store_runs<Type::bf16>(t, row, b, v);
    if (row >= t.rows) return;
    const int64_t at = row * t.ldy + (int64_t{b} << t.shift) + (c & ((1 << t.shift) - 1));
    t.type == Type::f32 ? store_as<Type::f32>(t.y, at, v) : store_as<Type::bf16>(t.y, at, v);
}

// Four columns of K against kWide registers of the buffer.
template <int kWide>
inline void base_tile(const Hadamard& t, int64_t group, const float* work, int tile, int c) {
    const float* k = t.matrix + static_cast<int64_t>(tile) * t.base * 4;
    Floats sum[4][kWide];
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++)
#pragma GCC unroll 4
        for (int i = 0; i < kWide; i++) sum[j][i] = zero_floats();
    work += c;
    for (int b = 0; b < t.base; b++, k += 4, work += t.stride) {
        Floats v[kWide];
#pragma GCC unroll 4
        for (int i = 0; i < kWide; i++) v[i] = load_floats(work + 16 * i);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++)
#pragma GCC unroll 4
            for (int i = 0; i < kWide; i++) sum[j][i] = fma(splat(k[j]), v[i], sum[j][i]);
    }
    // By way of memory: what store_columns needs must not push the sums out of their registers.
    alignas(64) float result[4][16 * kWide];
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++)
#pragma GCC unroll 4
        for (int i = 0; i < kWide; i++) store_floats(result[j] + 16 * i, sum[j][i]);
    for (int j = 0; j < 4; j++)
        for (int i = 0; i < kWide; i++)
            store_columns(t, group, 4 * tile + j, c + 16 * i, load_floats(result[j] + 16 * i));
}

inline void base_product(const Hadamard& t, int64_t group, const float* work, int first, int last) {
    const int floats = t.together << t.shift;
    for (int tile = first; tile < last; tile++) {
        int c = 0;
        if constexpr (kVectors > 1) {  // lanes in one register each: there is room for sixteen sums
            for (; c + 64 <= floats; c += 64) base_tile<4>(t, group, work, tile, c);
            for (; c + 32 <= floats; c += 32) base_tile<2>(t, group, work, tile, c);
        }
        for (; c < floats; c += 16) base_tile<1>(t, group, work, tile, c);
    }
}

}  // namespace ARRONDI_PATH
}  // namespace arrondi
