// Lanes of 16 bits for the costs of a search through a trellis, as many as a register has: unsigned, and sums stop at 65535.
// Differences of values are signed, and stop at ±32767 or so. The portable version says what each operation means.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace arrondi {
namespace ARRONDI_PATH {

#if defined(__AVX512BW__)

constexpr int kCosts = 32;
using Costs = __m512i;
using Picks = __m512i;  // which predecessor was the best, in the lane of its cost
inline Costs load_costs(const int16_t* p) { return _mm512_loadu_si512(p); }
inline void store_costs(int16_t* p, Costs v) { _mm512_storeu_si512(p, v); }
inline Costs splat_cost(int16_t v) { return _mm512_set1_epi16(v); }
inline Costs minimum(Costs a, Costs b) { return _mm512_min_epu16(a, b); }
inline Costs add_costs(Costs a, Costs b) { return _mm512_adds_epu16(a, b); }
inline Costs subtract_costs(Costs a, Costs b) { return _mm512_subs_epu16(a, b); }
inline Costs difference(Costs a, Costs b) { return _mm512_subs_epi16(a, b); }
inline Costs twice(Costs d) { return _mm512_adds_epi16(d, d); }
inline Costs square(Costs d) { return _mm512_mulhrs_epi16(d, d); }
inline Picks pick(Picks old, Costs best, Costs other, int16_t number) {
    return _mm512_mask_mov_epi16(old, _mm512_cmplt_epu16_mask(other, best), _mm512_set1_epi16(number));
}
inline void store_picks(uint8_t* p, Picks v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi16_epi8(v)); }
template <int kBits>
inline Costs spread(const int16_t* p) {
    alignas(64) static constexpr int16_t kIndex[32] = {
        0 >> kBits,  1 >> kBits,  2 >> kBits,  3 >> kBits,  4 >> kBits,  5 >> kBits,  6 >> kBits,  7 >> kBits,
        8 >> kBits,  9 >> kBits,  10 >> kBits, 11 >> kBits, 12 >> kBits, 13 >> kBits, 14 >> kBits, 15 >> kBits,
        16 >> kBits, 17 >> kBits, 18 >> kBits, 19 >> kBits, 20 >> kBits, 21 >> kBits, 22 >> kBits, 23 >> kBits,
        24 >> kBits, 25 >> kBits, 26 >> kBits, 27 >> kBits, 28 >> kBits, 29 >> kBits, 30 >> kBits, 31 >> kBits};
    const __m256i some = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_permutexvar_epi16(_mm512_load_si512(kIndex), _mm512_castsi256_si512(some));
}

#elif defined(__AVX2__)

constexpr int kCosts = 16;
using Costs = __m256i;
using Picks = __m256i;
inline Costs load_costs(const int16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline void store_costs(int16_t* p, Costs v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
inline Costs splat_cost(int16_t v) { return _mm256_set1_epi16(v); }
inline Costs minimum(Costs a, Costs b) { return _mm256_min_epu16(a, b); }
inline Costs add_costs(Costs a, Costs b) { return _mm256_adds_epu16(a, b); }
inline Costs subtract_costs(Costs a, Costs b) { return _mm256_subs_epu16(a, b); }
inline Costs difference(Costs a, Costs b) { return _mm256_subs_epi16(a, b); }
inline Costs twice(Costs d) { return _mm256_adds_epi16(d, d); }
inline Costs square(Costs d) { return _mm256_mulhrs_epi16(d, d); }
inline Picks pick(Picks old, Costs best, Costs other, int16_t number) {
    return _mm256_blendv_epi8(_mm256_set1_epi16(number), old, _mm256_cmpeq_epi16(_mm256_min_epu16(best, other), best));
}
inline void store_picks(uint8_t* p, Picks v) {
    const __m128i low = _mm256_castsi256_si128(v), high = _mm256_extracti128_si256(v, 1);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(low, high));
}
template <int kBits>
inline Costs spread(const int16_t* p) {
    alignas(32) static constexpr int8_t kIndex[32] = {
#define ARRONDI_AT(i) (i >> kBits) * 2, (i >> kBits) * 2 + 1
        ARRONDI_AT(0), ARRONDI_AT(1), ARRONDI_AT(2),  ARRONDI_AT(3),  ARRONDI_AT(4),  ARRONDI_AT(5),  ARRONDI_AT(6),  ARRONDI_AT(7),
        ARRONDI_AT(8), ARRONDI_AT(9), ARRONDI_AT(10), ARRONDI_AT(11), ARRONDI_AT(12), ARRONDI_AT(13), ARRONDI_AT(14), ARRONDI_AT(15)};
#undef ARRONDI_AT
    const __m256i some = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_shuffle_epi8(some, _mm256_load_si256(reinterpret_cast<const __m256i*>(kIndex)));
}
#elif defined(__ARM_NEON)

constexpr int kCosts = 8;
using Costs = uint16x8_t;
using Picks = uint16x8_t;
inline Costs load_costs(const int16_t* p) { return vreinterpretq_u16_s16(vld1q_s16(p)); }
inline void store_costs(int16_t* p, Costs v) { vst1q_s16(p, vreinterpretq_s16_u16(v)); }
inline Costs splat_cost(int16_t v) { return vreinterpretq_u16_s16(vdupq_n_s16(v)); }
inline Costs minimum(Costs a, Costs b) { return vminq_u16(a, b); }
inline Costs add_costs(Costs a, Costs b) { return vqaddq_u16(a, b); }
inline Costs subtract_costs(Costs a, Costs b) { return vqsubq_u16(a, b); }
inline Costs difference(Costs a, Costs b) {
    return vreinterpretq_u16_s16(vqsubq_s16(vreinterpretq_s16_u16(a), vreinterpretq_s16_u16(b)));
}
inline Costs twice(Costs d) {
    const int16x8_t v = vreinterpretq_s16_u16(d);
    return vreinterpretq_u16_s16(vqaddq_s16(v, v));
}
inline Costs square(Costs d) {
    const int16x8_t v = vreinterpretq_s16_u16(d);
    const int32x4_t low = vmull_s16(vget_low_s16(v), vget_low_s16(v)), high = vmull_s16(vget_high_s16(v), vget_high_s16(v));
    return vcombine_u16(vrshrn_n_u32(vreinterpretq_u32_s32(low), 15), vrshrn_n_u32(vreinterpretq_u32_s32(high), 15));
}
inline Picks pick(Picks old, Costs best, Costs other, int16_t number) {
    return vbslq_u16(vcltq_u16(other, best), splat_cost(number), old);
}
inline void store_picks(uint8_t* p, Picks v) { vst1_u8(p, vmovn_u16(v)); }
template <int kBits>
inline Costs spread(const int16_t* p) {
    int16_t lanes[kCosts];
    for (int i = 0; i < kCosts; i++) lanes[i] = p[i >> kBits];
    return load_costs(lanes);
}

#else

constexpr int kCosts = 8;
struct Costs {
    uint16_t lane[kCosts];
};
using Picks = Costs;
template <class Function>
inline Costs each(const Function& function) {
    Costs out;
    for (int i = 0; i < kCosts; i++) out.lane[i] = static_cast<uint16_t>(function(i));
    return out;
}
inline int as_signed(uint16_t v) { return static_cast<int16_t>(v); }
inline Costs load_costs(const int16_t* p) {
    Costs out;
    std::memcpy(&out, p, sizeof out);
    return out;
}
inline void store_costs(int16_t* p, const Costs& v) { std::memcpy(p, &v, sizeof v); }
inline Costs splat_cost(int16_t v) {
    return each([&](int) { return v; });
}
inline Costs minimum(const Costs& a, const Costs& b) {
    return each([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline Costs add_costs(const Costs& a, const Costs& b) {
    return each([&](int i) { return a.lane[i] + b.lane[i] > 65535 ? 65535 : a.lane[i] + b.lane[i]; });
}
inline Costs subtract_costs(const Costs& a, const Costs& b) {
    return each([&](int i) { return a.lane[i] < b.lane[i] ? 0 : a.lane[i] - b.lane[i]; });
}
// a - b of signed numbers, within -32768 … 32767
inline Costs difference(const Costs& a, const Costs& b) {
    return each([&](int i) {
        const int d = as_signed(a.lane[i]) - as_signed(b.lane[i]);
        return d < -32768 ? -32768 : d > 32767 ? 32767 : d;
    });
}
// 2 d of signed numbers, within the same
inline Costs twice(const Costs& d) {
    return each([&](int i) {
        const int v = 2 * as_signed(d.lane[i]);
        return v < -32768 ? -32768 : v > 32767 ? 32767 : v;
    });
}
// d² / 2^15, rounded
inline Costs square(const Costs& d) {
    return each([&](int i) { return (as_signed(d.lane[i]) * as_signed(d.lane[i]) + 16384) >> 15; });
}
// number where other < best, else old
inline Picks pick(const Picks& old, const Costs& best, const Costs& other, int16_t number) {
    return each([&](int i) { return other.lane[i] < best.lane[i] ? number : old.lane[i]; });
}
inline void store_picks(uint8_t* p, const Picks& v) {
    for (int i = 0; i < kCosts; i++) p[i] = static_cast<uint8_t>(v.lane[i]);
}
// Each of the numbers at p 2^kBits times, as many as fill a register; up to a register of them is read.
template <int kBits>
inline Costs spread(const int16_t* p) {
    return each([&](int i) { return p[i >> kBits]; });
}

#endif

}  // namespace ARRONDI_PATH
}  // namespace arrondi
