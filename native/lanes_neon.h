// Sixteen lanes of 32 bits on 64-bit Arm: four registers each, in order. The same names as in every lanes_*.h; see
// lanes_portable.h for what each means.
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

namespace arrondi {
namespace ARRONDI_PATH {

// Twenty-four of the thirty-two registers hold sums; the others four of weights and the activations.
constexpr int kRows = 6;
constexpr int kVectors = 1;
constexpr bool kFastDot = true;
constexpr bool kShortSums = false;  // nothing beats dot7 and dot8
constexpr bool kWords = false;
constexpr int kRingSums = 4;

struct Bytes {
    uint8x16_t v[4];
};
struct Ints {
    int32x4_t v[4];
};
struct Floats {
    float32x4_t v[4];
};

#define ARRONDI_EACH(type, expression)               \
    type r;                                          \
    for (int i = 0; i < 4; i++) r.v[i] = expression; \
    return r

inline Bytes load_bytes(const void* p) { ARRONDI_EACH(Bytes, vld1q_u8(static_cast<const uint8_t*>(p) + 16 * i)); }
inline void store_bytes(void* p, Bytes b) {
    for (int i = 0; i < 4; i++) vst1q_u8(static_cast<uint8_t*>(p) + 16 * i, b.v[i]);
}
inline Bytes repeat4(const void* p) {
    uint32_t four;
    std::memcpy(&four, p, 4);
    ARRONDI_EACH(Bytes, vreinterpretq_u8_u32(vdupq_n_u32(four)));
}
inline Bytes repeat16(const void* p) { ARRONDI_EACH(Bytes, vld1q_u8(static_cast<const uint8_t*>(p))); }
inline Bytes splat_byte(int v) { ARRONDI_EACH(Bytes, vdupq_n_u8(static_cast<uint8_t>(v))); }
// A shift down by nothing has no instruction.
template <int kBits>
inline Bytes shift_down(Bytes b) {
    if constexpr (kBits == 0) {
        return b;
    } else {
        ARRONDI_EACH(Bytes, vshrq_n_u8(b.v[i], kBits));
    }
}
template <int kBits>
inline Bytes shift_up(Bytes b) {
    ARRONDI_EACH(Bytes, vshlq_n_u8(b.v[i], kBits));
}
inline Bytes both(Bytes a, Bytes b) { ARRONDI_EACH(Bytes, vandq_u8(a.v[i], b.v[i])); }
inline Bytes either(Bytes a, Bytes b) { ARRONDI_EACH(Bytes, vorrq_u8(a.v[i], b.v[i])); }
inline Bytes add_bytes(Bytes a, Bytes b) { ARRONDI_EACH(Bytes, vaddq_u8(a.v[i], b.v[i])); }
inline Bytes subtract_to_zero(Bytes a, Bytes b) { ARRONDI_EACH(Bytes, vqsubq_u8(a.v[i], b.v[i])); }
inline Bytes average(Bytes a, Bytes b) { ARRONDI_EACH(Bytes, vrhaddq_u8(a.v[i], b.v[i])); }
inline Bytes look_up(Bytes table, Bytes index) { ARRONDI_EACH(Bytes, vqtbl1q_u8(table.v[i], index.v[i])); }
template <int kBytes>
inline Bytes zip_low(Bytes x, Bytes y) {
    if constexpr (kBytes == 1) {
        ARRONDI_EACH(Bytes, vzip1q_u8(x.v[i], y.v[i]));
    } else if constexpr (kBytes == 2) {
        ARRONDI_EACH(Bytes, vreinterpretq_u8_u16(vzip1q_u16(vreinterpretq_u16_u8(x.v[i]), vreinterpretq_u16_u8(y.v[i]))));
    } else if constexpr (kBytes == 4) {
        ARRONDI_EACH(Bytes, vreinterpretq_u8_u32(vzip1q_u32(vreinterpretq_u32_u8(x.v[i]), vreinterpretq_u32_u8(y.v[i]))));
    } else {
        ARRONDI_EACH(Bytes, vreinterpretq_u8_u64(vzip1q_u64(vreinterpretq_u64_u8(x.v[i]), vreinterpretq_u64_u8(y.v[i]))));
    }
}
template <int kBytes>
inline Bytes zip_high(Bytes x, Bytes y) {
    if constexpr (kBytes == 1) {
        ARRONDI_EACH(Bytes, vzip2q_u8(x.v[i], y.v[i]));
    } else if constexpr (kBytes == 2) {
        ARRONDI_EACH(Bytes, vreinterpretq_u8_u16(vzip2q_u16(vreinterpretq_u16_u8(x.v[i]), vreinterpretq_u16_u8(y.v[i]))));
    } else if constexpr (kBytes == 4) {
        ARRONDI_EACH(Bytes, vreinterpretq_u8_u32(vzip2q_u32(vreinterpretq_u32_u8(x.v[i]), vreinterpretq_u32_u8(y.v[i]))));
    } else {
        ARRONDI_EACH(Bytes, vreinterpretq_u8_u64(vzip2q_u64(vreinterpretq_u64_u8(x.v[i]), vreinterpretq_u64_u8(y.v[i]))));
    }
}

inline Ints lanes_of(Bytes b) { ARRONDI_EACH(Ints, vreinterpretq_s32_u8(b.v[i])); }
inline Bytes bytes_of(Ints v) { ARRONDI_EACH(Bytes, vreinterpretq_u8_s32(v.v[i])); }
inline Ints splat(int32_t v) { ARRONDI_EACH(Ints, vdupq_n_s32(v)); }
inline Ints zero_ints() { return splat(int32_t{0}); }
inline Ints load_ints(const int32_t* p) { ARRONDI_EACH(Ints, vld1q_s32(p + 4 * i)); }
inline void store_ints(int32_t* p, Ints v) {
    for (int i = 0; i < 4; i++) vst1q_s32(p + 4 * i, v.v[i]);
}
inline Ints widen_bytes(const uint8_t* p) {
    const uint8x16_t bytes = vld1q_u8(p);
    const uint16x8_t low = vmovl_u8(vget_low_u8(bytes)), high = vmovl_high_u8(bytes);
    return {{vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(low))), vreinterpretq_s32_u32(vmovl_high_u16(low)),
             vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(high))), vreinterpretq_s32_u32(vmovl_high_u16(high))}};
}
inline Ints add(Ints a, Ints b) { ARRONDI_EACH(Ints, vaddq_s32(a.v[i], b.v[i])); }
inline Ints sub(Ints a, Ints b) { ARRONDI_EACH(Ints, vsubq_s32(a.v[i], b.v[i])); }
inline Ints mul(Ints a, Ints b) { ARRONDI_EACH(Ints, vmulq_s32(a.v[i], b.v[i])); }
inline Ints min(Ints a, Ints b) { ARRONDI_EACH(Ints, vminq_s32(a.v[i], b.v[i])); }
inline Ints max(Ints a, Ints b) { ARRONDI_EACH(Ints, vmaxq_s32(a.v[i], b.v[i])); }
inline Ints and_ints(Ints a, Ints b) { ARRONDI_EACH(Ints, vandq_s32(a.v[i], b.v[i])); }
inline Ints or_ints(Ints a, Ints b) { ARRONDI_EACH(Ints, vorrq_s32(a.v[i], b.v[i])); }
inline Ints xor_ints(Ints a, Ints b) { ARRONDI_EACH(Ints, veorq_s32(a.v[i], b.v[i])); }
template <int kBits>
inline Ints shift_right(Ints v) {
    if constexpr (kBits == 0) {
        return v;
    } else {
        ARRONDI_EACH(Ints, vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(v.v[i]), kBits)));
    }
}
template <int kBits>
inline Ints shift_left(Ints v) {
    ARRONDI_EACH(Ints, vshlq_n_s32(v.v[i], kBits));
}
inline Ints shift_right_each(Ints v, Ints bits) {
    ARRONDI_EACH(Ints, vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(v.v[i]), vnegq_s32(bits.v[i]))));
}
constexpr bool kFields = false;
constexpr bool kFours = false;
inline Bytes add_fours(Bytes low, Bytes) { return low; }
inline Bytes fields(const void*, Bytes at) { return at; }
// A byte below 128 is the same number with a sign.
inline Ints dot7(Ints sum, Bytes u, Bytes s) {
    ARRONDI_EACH(Ints, vdotq_s32(sum.v[i], vreinterpretq_s8_u8(u.v[i]), vreinterpretq_s8_u8(s.v[i])));
}
#if defined(__ARM_FEATURE_MATMUL_INT8)
inline Ints dot8(Ints sum, Bytes u, Bytes s) {
    ARRONDI_EACH(Ints, vusdotq_s32(sum.v[i], u.v[i], vreinterpretq_s8_u8(s.v[i])));
}
#else
// u · s = (u - 128) · s - (-128) · s: both have signs, and the second is the same for every column of an activation.
inline Ints dot8(Ints sum, Bytes u, Bytes s) {
    const uint8x16_t top = vdupq_n_u8(128);
    ARRONDI_EACH(Ints, vsubq_s32(vdotq_s32(sum.v[i], vreinterpretq_s8_u8(veorq_u8(u.v[i], top)), vreinterpretq_s8_u8(s.v[i])),
                                 vdotq_s32(vdupq_n_s32(0), vreinterpretq_s8_u8(top), vreinterpretq_s8_u8(s.v[i]))));
}
#endif
using Shorts = Ints;
inline Shorts zero_shorts() { return zero_ints(); }
inline Shorts dot_short(Shorts sum, Bytes u, Bytes s) { return dot7(sum, u, s); }
inline Ints fold(Ints sum, Shorts part) { return add(sum, part); }
inline Bytes even_words(Bytes v) { return v; }
inline Bytes odd_words(Bytes v) { return v; }
inline Bytes repeat2(const void* p) {
    uint16_t two;
    std::memcpy(&two, p, 2);
    ARRONDI_EACH(Bytes, vreinterpretq_u8_u16(vdupq_n_u16(two)));
}
inline Bytes add_pairs(Bytes u) { ARRONDI_EACH(Bytes, vreinterpretq_u8_u16(vpaddlq_u8(u.v[i]))); }
inline int32x4_t dot_words_quarter(int32x4_t sum, int16x8_t w, int16x8_t x) {
    return vaddq_s32(sum, vpaddq_s32(vmull_s16(vget_low_s16(w), vget_low_s16(x)), vmull_high_s16(w, x)));
}
inline Ints dot_words(Ints sum, Bytes w, Bytes x) {
    ARRONDI_EACH(Ints, dot_words_quarter(sum.v[i], vreinterpretq_s16_u8(w.v[i]), vreinterpretq_s16_u8(x.v[i])));
}
inline Ints add_four(Ints sum, Bytes u) {
    ARRONDI_EACH(Ints, vreinterpretq_s32_u32(vdotq_u32(vreinterpretq_u32_s32(sum.v[i]), u.v[i], vdupq_n_u8(1))));
}
inline Ints count_ones(Ints v) {
    ARRONDI_EACH(Ints, vreinterpretq_s32_u32(vpaddlq_u16(vpaddlq_u8(vcntq_u8(vreinterpretq_u8_s32(v.v[i]))))));
}

inline Floats splat(float v) { ARRONDI_EACH(Floats, vdupq_n_f32(v)); }
inline Floats zero_floats() { return splat(0.0f); }
inline Floats load_floats(const float* p) { ARRONDI_EACH(Floats, vld1q_f32(p + 4 * i)); }
inline void store_floats(float* p, Floats v) {
    for (int i = 0; i < 4; i++) vst1q_f32(p + 4 * i, v.v[i]);
}
inline Floats as_floats(Ints v) { ARRONDI_EACH(Floats, vreinterpretq_f32_s32(v.v[i])); }
inline Ints as_ints(Floats v) { ARRONDI_EACH(Ints, vreinterpretq_s32_f32(v.v[i])); }
inline Floats load_bf16(const uint16_t* p) {
    ARRONDI_EACH(Floats, vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16)));
}
inline Floats load_f16(const uint16_t* p) {
    ARRONDI_EACH(Floats, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i))));
}
inline uint16x8_t low_halves(int32x4_t low, int32x4_t high) {
    return vuzp1q_u16(vreinterpretq_u16_s32(low), vreinterpretq_u16_s32(high));
}
inline void store_low_halves(uint16_t* p, Ints v) {
    vst1q_u16(p, low_halves(v.v[0], v.v[1]));
    vst1q_u16(p + 8, low_halves(v.v[2], v.v[3]));
}
inline void store_low_bytes(uint8_t* p, Ints v) {
    vst1q_u8(p, vuzp1q_u8(vreinterpretq_u8_u16(low_halves(v.v[0], v.v[1])), vreinterpretq_u8_u16(low_halves(v.v[2], v.v[3]))));
}
inline Floats to_floats(Ints v) { ARRONDI_EACH(Floats, vcvtq_f32_s32(v.v[i])); }
// The instruction gives the nearest int32 for what does not fit, and zero for NaN.
inline Ints to_ints(Floats v) {
    ARRONDI_EACH(Ints, vbslq_s32(vcltq_f32(vabsq_f32(v.v[i]), vdupq_n_f32(0x1p31f)), vcvtnq_s32_f32(v.v[i]),
                                 vdupq_n_s32(INT32_MIN)));
}
inline Floats add(Floats a, Floats b) { ARRONDI_EACH(Floats, vaddq_f32(a.v[i], b.v[i])); }
inline Floats sub(Floats a, Floats b) { ARRONDI_EACH(Floats, vsubq_f32(a.v[i], b.v[i])); }
inline Floats mul(Floats a, Floats b) { ARRONDI_EACH(Floats, vmulq_f32(a.v[i], b.v[i])); }
inline Floats div(Floats a, Floats b) { ARRONDI_EACH(Floats, vdivq_f32(a.v[i], b.v[i])); }
// Arm's own minimum and maximum are NaN if either is.
inline Floats min(Floats a, Floats b) { ARRONDI_EACH(Floats, vbslq_f32(vcltq_f32(a.v[i], b.v[i]), a.v[i], b.v[i])); }
inline Floats max(Floats a, Floats b) { ARRONDI_EACH(Floats, vbslq_f32(vcgtq_f32(a.v[i], b.v[i]), a.v[i], b.v[i])); }
inline Floats sqrt(Floats v) { ARRONDI_EACH(Floats, vsqrtq_f32(v.v[i])); }
inline Floats round_even(Floats v) { ARRONDI_EACH(Floats, vrndnq_f32(v.v[i])); }
inline Floats fma(Floats a, Floats b, Floats c) { ARRONDI_EACH(Floats, vfmaq_f32(c.v[i], a.v[i], b.v[i])); }
inline Floats fused(Floats a, Floats b, Floats c) { return fma(a, b, c); }
inline float sum(Floats v) { return vaddvq_f32(vaddq_f32(vaddq_f32(v.v[0], v.v[2]), vaddq_f32(v.v[1], v.v[3]))); }
// The sums of four at once.
inline void store_sums(float* p, Floats a, Floats b, Floats c, Floats d) {
    p[0] = sum(a), p[1] = sum(b), p[2] = sum(c), p[3] = sum(d);
}
inline float largest(Floats v) { return vmaxvq_f32(vmaxq_f32(vmaxq_f32(v.v[0], v.v[1]), vmaxq_f32(v.v[2], v.v[3]))); }
inline float smallest(Floats v) { return vminvq_f32(vminq_f32(vminq_f32(v.v[0], v.v[1]), vminq_f32(v.v[2], v.v[3]))); }

template <int kStep>
inline Floats swap_lanes(Floats v) {
    if constexpr (kStep == 1) {
        ARRONDI_EACH(Floats, vrev64q_f32(v.v[i]));
    } else if constexpr (kStep == 2) {
        ARRONDI_EACH(Floats, vextq_f32(v.v[i], v.v[i], 2));
    } else {
        ARRONDI_EACH(Floats, v.v[i ^ (kStep / 4)]);
    }
}
inline uint32_t positive(Floats v) {
    const uint32x4_t ones = {1, 2, 4, 8};
    uint32_t bits = 0;
    for (int i = 0; i < 4; i++) bits |= vaddvq_u32(vandq_u32(vcgtzq_f32(v.v[i]), ones)) << 4 * i;
    return bits;
}

// The table's 64 bytes are looked up byte by byte: lane index i asks for bytes 4i … 4i + 3.
struct Table16 {
    uint8x16x4_t bytes;
};
inline Table16 load_table(const float* p) {
    const Bytes b = load_bytes(p);
    return {{{b.v[0], b.v[1], b.v[2], b.v[3]}}};
}
inline Floats look_up(const Table16& table, Ints index) {
    const uint32x4_t low = vdupq_n_u32(15), each = vdupq_n_u32(0x04040404), which = vdupq_n_u32(0x03020100);
    ARRONDI_EACH(Floats, vreinterpretq_f32_u8(vqtbl4q_u8(
                             table.bytes, vreinterpretq_u8_u32(vmlaq_u32(
                                              which, vandq_u32(vreinterpretq_u32_s32(index.v[i]), low), each)))));
}

constexpr bool kHasBf16Dot = false;
inline Floats dot_bf16(Floats sum, Bytes, Bytes) { return sum; }

#undef ARRONDI_EACH

}  // namespace ARRONDI_PATH
}  // namespace arrondi
