// Sixteen lanes of 32 bits on AVX-512: one register each. The same names as in every lanes_*.h; see lanes_portable.h for
// what each means.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace arrondi {
namespace ARRONDI_PATH {

constexpr int kRows = 6;     // rows of a tile of activations
constexpr int kVectors = 4;  // registers of sixteen columns in a tile of weights
constexpr bool kFastDot = true;
constexpr bool kShortSums = false;  // nothing beats dot7 and dot8
constexpr bool kWords = false;
constexpr int kRingSums = 16;

using Bytes = __m512i;
using Ints = __m512i;
using Floats = __m512;

inline Bytes load_bytes(const void* p) { return _mm512_loadu_si512(p); }
inline void store_bytes(void* p, Bytes b) { _mm512_storeu_si512(p, b); }
inline Bytes repeat4(const void* p) {
    int32_t four;
    std::memcpy(&four, p, 4);
    return _mm512_set1_epi32(four);
}
inline Bytes repeat16(const void* p) { return _mm512_broadcast_i32x4(_mm_loadu_si128(static_cast<const __m128i*>(p))); }
inline Bytes splat_byte(int v) { return _mm512_set1_epi8(static_cast<char>(v)); }
template <int kBits>
inline Bytes shift_down(Bytes b) {
    return kBits == 0 ? b : _mm512_srli_epi16(b, kBits);
}
template <int kBits>
inline Bytes shift_up(Bytes b) {
    return kBits == 0 ? b : _mm512_slli_epi16(b, kBits);
}
inline Bytes both(Bytes a, Bytes b) { return _mm512_and_si512(a, b); }
inline Bytes either(Bytes a, Bytes b) { return _mm512_or_si512(a, b); }
inline Bytes add_bytes(Bytes a, Bytes b) { return _mm512_add_epi8(a, b); }
inline Bytes subtract_to_zero(Bytes a, Bytes b) { return _mm512_subs_epu8(a, b); }
inline Bytes average(Bytes a, Bytes b) { return _mm512_avg_epu8(a, b); }
inline Bytes look_up(Bytes table, Bytes index) { return _mm512_shuffle_epi8(table, index); }
template <int kBytes>
inline Bytes zip_low(Bytes a, Bytes b) {
    if constexpr (kBytes == 1) return _mm512_unpacklo_epi8(a, b);
    if constexpr (kBytes == 2) return _mm512_unpacklo_epi16(a, b);
    if constexpr (kBytes == 4) return _mm512_unpacklo_epi32(a, b);
    return _mm512_unpacklo_epi64(a, b);
}
template <int kBytes>
inline Bytes zip_high(Bytes a, Bytes b) {
    if constexpr (kBytes == 1) return _mm512_unpackhi_epi8(a, b);
    if constexpr (kBytes == 2) return _mm512_unpackhi_epi16(a, b);
    if constexpr (kBytes == 4) return _mm512_unpackhi_epi32(a, b);
    return _mm512_unpackhi_epi64(a, b);
}

inline Ints lanes_of(Bytes b) { return b; }
inline Bytes bytes_of(Ints v) { return v; }
inline Ints zero_ints() { return _mm512_setzero_si512(); }
inline Ints splat(int32_t v) { return _mm512_set1_epi32(v); }
inline Ints load_ints(const int32_t* p) { return _mm512_loadu_si512(p); }
inline void store_ints(int32_t* p, Ints v) { _mm512_storeu_si512(p, v); }
inline Ints widen_bytes(const uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
inline Ints sub(Ints a, Ints b) { return _mm512_sub_epi32(a, b); }
inline Ints mul(Ints a, Ints b) { return _mm512_mullo_epi32(a, b); }
inline Ints min(Ints a, Ints b) { return _mm512_min_epi32(a, b); }
inline Ints max(Ints a, Ints b) { return _mm512_max_epi32(a, b); }
inline Ints and_ints(Ints a, Ints b) { return _mm512_and_si512(a, b); }
inline Ints or_ints(Ints a, Ints b) { return _mm512_or_si512(a, b); }
template <int kBits>
inline Ints shift_right(Ints v) {
    return _mm512_srli_epi32(v, kBits);
}
template <int kBits>
inline Ints shift_left(Ints v) {
    return _mm512_slli_epi32(v, kBits);
}
inline Ints shift_right_each(Ints v, Ints bits) { return _mm512_srlv_epi32(v, bits); }
#if defined(__AVX512VBMI__)
constexpr bool kFields = true;
inline Bytes fields(const void* p, Bytes at) {
    int64_t eight;
    std::memcpy(&eight, p, 8);
    return _mm512_multishift_epi64_epi8(at, _mm512_set1_epi64(eight));
}
#else
constexpr bool kFields = false;
inline Bytes fields(const void*, Bytes at) { return at; }
#endif
inline Ints dot7(Ints sum, Bytes u, Bytes s) { return _mm512_dpbusd_epi32(sum, u, s); }
inline Ints dot8(Ints sum, Bytes u, Bytes s) { return dot7(sum, u, s); }
using Shorts = Ints;
inline Shorts zero_shorts() { return zero_ints(); }
inline Shorts dot_short(Shorts sum, Bytes u, Bytes s) { return dot7(sum, u, s); }
inline Ints fold(Ints sum, Shorts part) { return add(sum, part); }
inline Bytes even_words(Bytes v) { return v; }
inline Bytes odd_words(Bytes v) { return v; }
inline Bytes repeat2(const void* p) {
    int16_t two;
    std::memcpy(&two, p, 2);
    return _mm512_set1_epi16(two);
}
constexpr bool kFours = true;
inline Bytes add_fours(Bytes low, Bytes high) {
    const Bytes none = _mm512_setzero_si512();
    return _mm512_mask_dbsad_epu8(_mm512_dbsad_epu8(low, none, 0), 0xaaaaaaaau, high, none, 0);
}
inline Bytes add_pairs(Bytes u) { return _mm512_maddubs_epi16(u, _mm512_set1_epi8(1)); }
inline Ints dot_words(Ints sum, Bytes w, Bytes x) { return _mm512_dpwssd_epi32(sum, w, x); }
inline Ints add_four(Ints sum, Bytes u) { return _mm512_dpbusd_epi32(sum, u, _mm512_set1_epi8(1)); }

inline Floats zero_floats() { return _mm512_setzero_ps(); }
inline Floats splat(float v) { return _mm512_set1_ps(v); }
inline Floats load_floats(const float* p) { return _mm512_loadu_ps(p); }
inline void store_floats(float* p, Floats v) { _mm512_storeu_ps(p, v); }
inline Floats load_bf16(const uint16_t* p) {
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
}
inline Floats load_f16(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void store_low_halves(uint16_t* p, Ints v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(v));
}
inline void store_low_bytes(uint8_t* p, Ints v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(v));
}
inline Floats to_floats(Ints v) { return _mm512_cvtepi32_ps(v); }
inline Ints to_ints(Floats v) { return _mm512_cvtps_epi32(v); }
inline Floats as_floats(Ints v) { return _mm512_castsi512_ps(v); }
inline Ints as_ints(Floats v) { return _mm512_castps_si512(v); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
inline Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
inline Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
inline Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats sqrt(Floats v) { return _mm512_sqrt_ps(v); }
inline Floats round_even(Floats v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats fused(Floats a, Floats b, Floats c) { return fma(a, b, c); }
inline float sum(Floats v) { return _mm512_reduce_add_ps(v); }
// The sums of four at once: halves first, then neighbours, twice.
inline __m256 half_sums(__m512 v) { return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)); }
inline void store_sums(float* p, Floats a, Floats b, Floats c, Floats d) {
    const __m256 ab = _mm256_hadd_ps(half_sums(a), half_sums(b)), cd = _mm256_hadd_ps(half_sums(c), half_sums(d));
    const __m256 all = _mm256_hadd_ps(ab, cd);
    _mm_storeu_ps(p, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
}
inline float largest(Floats v) { return _mm512_reduce_max_ps(v); }
inline float smallest(Floats v) { return _mm512_reduce_min_ps(v); }

template <int kStep>
inline Floats swap_lanes(Floats v) {
    if constexpr (kStep == 1) return _mm512_permute_ps(v, 0xb1);
    if constexpr (kStep == 2) return _mm512_permute_ps(v, 0x4e);
    if constexpr (kStep == 4) return _mm512_shuffle_f32x4(v, v, 0xb1);
    return _mm512_shuffle_f32x4(v, v, 0x4e);
}
inline uint32_t positive(Floats v) { return _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_GT_OQ); }

struct Table16 {
    __m512 values;
};
inline Table16 load_table(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Floats look_up(const Table16& table, Ints index) { return _mm512_permutexvar_ps(index, table.values); }

#if defined(__AVX512BF16__)
constexpr bool kHasBf16Dot = true;
inline Floats dot_bf16(Floats sum, Bytes w, Bytes x) { return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x); }
#else
constexpr bool kHasBf16Dot = false;
inline Floats dot_bf16(Floats sum, Bytes, Bytes) { return sum; }
#endif

#if defined(__AVX512VPOPCNTDQ__)
inline Ints count_ones(Ints v) { return _mm512_popcnt_epi32(v); }
#else
inline Ints count_ones(Ints v) {
    const __m512i table = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
    const __m512i low = _mm512_set1_epi8(15);
    __m512i bytes = _mm512_add_epi8(_mm512_shuffle_epi8(table, _mm512_and_si512(v, low)),
                                    _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(v, 4), low)));
    return _mm512_dpbusd_epi32(_mm512_setzero_si512(), bytes, _mm512_set1_epi8(1));
}
#endif
inline Ints xor_ints(Ints a, Ints b) { return _mm512_xor_si512(a, b); }

}  // namespace ARRONDI_PATH
}  // namespace arrondi
