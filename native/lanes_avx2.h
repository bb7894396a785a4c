// Sixteen lanes of 32 bits on AVX2, and on AVX-VNNI: two registers each, the first has lanes 0 … 7. The same names as in
// every lanes_*.h; see lanes_portable.h for what each means.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace arrondi {
namespace ARRONDI_PATH {

// Twelve of the sixteen registers hold sums; the others the weights, the activation and one step of a product.
constexpr int kRows = 6;
constexpr int kVectors = 1;
#if defined(__AVXVNNI__)
constexpr bool kShortSums = false;
constexpr bool kWords = false;
#else
constexpr bool kShortSums = true;
constexpr bool kWords = true;
#endif
constexpr bool kFastDot = true;
constexpr int kRingSums = 2;

struct Bytes {
    __m256i a, b;
};
// Eight int32, by its type: GCC keeps a sum that is __m256i here and int32 there in two places, and copies it at every step.
struct Half {
    __v8si lanes;
    Half() = default;
    Half(__m256i v) : lanes(reinterpret_cast<__v8si>(v)) {}
    operator __m256i() const { return reinterpret_cast<__m256i>(lanes); }
};
struct Ints {
    Half a, b;
};
// The same for sixteen int16.
struct ShortHalf {
    __v16hi lanes;
    ShortHalf() = default;
    ShortHalf(__m256i v) : lanes(reinterpret_cast<__v16hi>(v)) {}
    operator __m256i() const { return reinterpret_cast<__m256i>(lanes); }
};
struct Floats {
    __m256 a, b;
};

inline const __m256i* in(const void* p) { return static_cast<const __m256i*>(p); }
inline __m256i* out(void* p) { return static_cast<__m256i*>(p); }

inline Bytes load_bytes(const void* p) { return {_mm256_loadu_si256(in(p)), _mm256_loadu_si256(in(p) + 1)}; }
inline void store_bytes(void* p, Bytes v) {
    _mm256_storeu_si256(out(p), v.a);
    _mm256_storeu_si256(out(p) + 1, v.b);
}
inline Bytes repeat4(const void* p) {
    int32_t four;
    std::memcpy(&four, p, 4);
    const __m256i v = _mm256_set1_epi32(four);
    return {v, v};
}
inline Bytes repeat16(const void* p) {
    const __m256i v = _mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(p)));
    return {v, v};
}
inline Bytes splat_byte(int v) { return {_mm256_set1_epi8(static_cast<char>(v)), _mm256_set1_epi8(static_cast<char>(v))}; }
template <int kBits>
inline Bytes shift_down(Bytes v) {
    return {_mm256_srli_epi16(v.a, kBits), _mm256_srli_epi16(v.b, kBits)};
}
template <int kBits>
inline Bytes shift_up(Bytes v) {
    return {_mm256_slli_epi16(v.a, kBits), _mm256_slli_epi16(v.b, kBits)};
}
inline Bytes both(Bytes x, Bytes y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
inline Bytes either(Bytes x, Bytes y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
inline Bytes add_bytes(Bytes x, Bytes y) { return {_mm256_add_epi8(x.a, y.a), _mm256_add_epi8(x.b, y.b)}; }
inline Bytes subtract_to_zero(Bytes x, Bytes y) { return {_mm256_subs_epu8(x.a, y.a), _mm256_subs_epu8(x.b, y.b)}; }
inline Bytes average(Bytes x, Bytes y) { return {_mm256_avg_epu8(x.a, y.a), _mm256_avg_epu8(x.b, y.b)}; }
inline Bytes look_up(Bytes table, Bytes index) {
    return {_mm256_shuffle_epi8(table.a, index.a), _mm256_shuffle_epi8(table.b, index.b)};
}
template <int kBytes>
inline Bytes zip_low(Bytes x, Bytes y) {
    if constexpr (kBytes == 1) return {_mm256_unpacklo_epi8(x.a, y.a), _mm256_unpacklo_epi8(x.b, y.b)};
    if constexpr (kBytes == 2) return {_mm256_unpacklo_epi16(x.a, y.a), _mm256_unpacklo_epi16(x.b, y.b)};
    if constexpr (kBytes == 4) return {_mm256_unpacklo_epi32(x.a, y.a), _mm256_unpacklo_epi32(x.b, y.b)};
    return {_mm256_unpacklo_epi64(x.a, y.a), _mm256_unpacklo_epi64(x.b, y.b)};
}
template <int kBytes>
inline Bytes zip_high(Bytes x, Bytes y) {
    if constexpr (kBytes == 1) return {_mm256_unpackhi_epi8(x.a, y.a), _mm256_unpackhi_epi8(x.b, y.b)};
    if constexpr (kBytes == 2) return {_mm256_unpackhi_epi16(x.a, y.a), _mm256_unpackhi_epi16(x.b, y.b)};
    if constexpr (kBytes == 4) return {_mm256_unpackhi_epi32(x.a, y.a), _mm256_unpackhi_epi32(x.b, y.b)};
    return {_mm256_unpackhi_epi64(x.a, y.a), _mm256_unpackhi_epi64(x.b, y.b)};
}

inline Ints lanes_of(Bytes v) { return {v.a, v.b}; }
inline Bytes bytes_of(Ints v) { return {v.a, v.b}; }
inline Ints zero_ints() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline Ints splat(int32_t v) { return {_mm256_set1_epi32(v), _mm256_set1_epi32(v)}; }
inline Ints load_ints(const int32_t* p) { return lanes_of(load_bytes(p)); }
inline void store_ints(int32_t* p, Ints v) { store_bytes(p, bytes_of(v)); }
inline Ints widen_bytes(const uint8_t* p) {
    const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_cvtepu8_epi32(v), _mm256_cvtepu8_epi32(_mm_srli_si128(v, 8))};
}
inline Ints add(Ints x, Ints y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
inline Ints sub(Ints x, Ints y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
inline Ints mul(Ints x, Ints y) { return {_mm256_mullo_epi32(x.a, y.a), _mm256_mullo_epi32(x.b, y.b)}; }
inline Ints min(Ints x, Ints y) { return {_mm256_min_epi32(x.a, y.a), _mm256_min_epi32(x.b, y.b)}; }
inline Ints max(Ints x, Ints y) { return {_mm256_max_epi32(x.a, y.a), _mm256_max_epi32(x.b, y.b)}; }
inline Ints and_ints(Ints x, Ints y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
inline Ints or_ints(Ints x, Ints y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
inline Ints xor_ints(Ints x, Ints y) { return {_mm256_xor_si256(x.a, y.a), _mm256_xor_si256(x.b, y.b)}; }
template <int kBits>
inline Ints shift_right(Ints v) {
    return {_mm256_srli_epi32(v.a, kBits), _mm256_srli_epi32(v.b, kBits)};
}
template <int kBits>
inline Ints shift_left(Ints v) {
    return {_mm256_slli_epi32(v.a, kBits), _mm256_slli_epi32(v.b, kBits)};
}
inline Ints shift_right_each(Ints v, Ints bits) { return {_mm256_srlv_epi32(v.a, bits.a), _mm256_srlv_epi32(v.b, bits.b)}; }
constexpr bool kFields = false;
constexpr bool kFours = false;
inline Bytes add_fours(Bytes low, Bytes) { return low; }
inline Bytes fields(const void*, Bytes at) { return at; }
#if defined(__AVXVNNI__)
inline Ints dot7(Ints sum, Bytes u, Bytes s) {
    return {_mm256_dpbusd_avx_epi32(sum.a, u.a, s.a), _mm256_dpbusd_avx_epi32(sum.b, u.b, s.b)};
}
inline Ints dot8(Ints sum, Bytes u, Bytes s) { return dot7(sum, u, s); }
using Shorts = Ints;
inline Shorts zero_shorts() { return zero_ints(); }
inline Shorts dot_short(Shorts sum, Bytes u, Bytes s) { return dot7(sum, u, s); }
inline Ints fold(Ints sum, Shorts part) { return add(sum, part); }
#else
struct Shorts {
    ShortHalf a, b;
};
inline Shorts zero_shorts() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline Shorts dot_short(Shorts sum, Bytes u, Bytes s) {
    return {_mm256_add_epi16(sum.a, _mm256_maddubs_epi16(u.a, s.a)), _mm256_add_epi16(sum.b, _mm256_maddubs_epi16(u.b, s.b))};
}
inline Ints fold(Ints sum, Shorts part) {
    const __m256i one = _mm256_set1_epi16(1);
    return {_mm256_add_epi32(sum.a, _mm256_madd_epi16(part.a, one)), _mm256_add_epi32(sum.b, _mm256_madd_epi16(part.b, one))};
}
// Two products of at most 127 · 128 fit the 16 bits that they are added in.
inline Ints dot7(Ints sum, Bytes u, Bytes s) {
    return fold(sum, {_mm256_maddubs_epi16(u.a, s.a), _mm256_maddubs_epi16(u.b, s.b)});
}
// Bytes 0 and 2, 1 and 3 of every lane as numbers of 16 bits: two products of bytes above 127 would not fit there.
inline __m256i dot8_half(__m256i sum, __m256i u, __m256i s) {
    const __m256i low = _mm256_and_si256(u, _mm256_set1_epi16(255));
    const __m256i even = _mm256_madd_epi16(low, _mm256_srai_epi16(_mm256_slli_epi16(s, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(u, 8), _mm256_srai_epi16(s, 8));
    return _mm256_add_epi32(sum, _mm256_add_epi32(even, odd));
}
inline Ints dot8(Ints sum, Bytes u, Bytes s) { return {dot8_half(sum.a, u.a, s.a), dot8_half(sum.b, u.b, s.b)}; }
#endif
inline Bytes even_words(Bytes v) { return both(v, {_mm256_set1_epi16(255), _mm256_set1_epi16(255)}); }
inline Bytes odd_words(Bytes v) { return shift_down<8>(v); }
inline Bytes repeat2(const void* p) {
    int16_t two;
    std::memcpy(&two, p, 2);
    const __m256i v = _mm256_set1_epi16(two);
    return {v, v};
}
#if defined(__AVXVNNI__)
inline Ints dot_words(Ints sum, Bytes w, Bytes x) {
    return {_mm256_dpwssd_avx_epi32(sum.a, w.a, x.a), _mm256_dpwssd_avx_epi32(sum.b, w.b, x.b)};
}
#else
inline Ints dot_words(Ints sum, Bytes w, Bytes x) {
    return {_mm256_add_epi32(sum.a, _mm256_madd_epi16(w.a, x.a)), _mm256_add_epi32(sum.b, _mm256_madd_epi16(w.b, x.b))};
}
#endif
// Sums of two bytes are below 511, whatever the bytes.
inline Ints add_four(Ints sum, Bytes u) { return dot7(sum, u, splat_byte(1)); }
inline Bytes add_pairs(Bytes u) {
    const __m256i one = _mm256_set1_epi8(1);
    return {_mm256_maddubs_epi16(u.a, one), _mm256_maddubs_epi16(u.b, one)};
}
inline __m256i count_ones_half(__m256i v) {
    const __m256i table = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4,  //
                                           0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
    const __m256i low = _mm256_set1_epi8(15);
    const __m256i bytes = _mm256_add_epi8(_mm256_shuffle_epi8(table, _mm256_and_si256(v, low)),
                                          _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(v, 4), low)));
    return _mm256_madd_epi16(_mm256_maddubs_epi16(bytes, _mm256_set1_epi8(1)), _mm256_set1_epi16(1));
}
inline Ints count_ones(Ints v) { return {count_ones_half(v.a), count_ones_half(v.b)}; }

inline Floats zero_floats() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Floats splat(float v) { return {_mm256_set1_ps(v), _mm256_set1_ps(v)}; }
inline Floats load_floats(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store_floats(float* p, Floats v) {
    _mm256_storeu_ps(p, v.a);
    _mm256_storeu_ps(p + 8, v.b);
}
inline __m128i load_halves(const uint16_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
inline __m256 load_bf16_half(const uint16_t* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_halves(p)), 16));
}
inline Floats load_bf16(const uint16_t* p) { return {load_bf16_half(p), load_bf16_half(p + 8)}; }
inline Floats load_f16(const uint16_t* p) { return {_mm256_cvtph_ps(load_halves(p)), _mm256_cvtph_ps(load_halves(p + 8))}; }
// The packing instruction saturates, hence the mask, and works within 128 bits, hence the permutation.
inline __m256i low_halves(Ints v) {
    const __m256i mask = _mm256_set1_epi32(0xffff);
    return _mm256_permute4x64_epi64(_mm256_packus_epi32(_mm256_and_si256(v.a, mask), _mm256_and_si256(v.b, mask)), 0xd8);
}
inline void store_low_halves(uint16_t* p, Ints v) { _mm256_storeu_si256(out(p), low_halves(v)); }
inline void store_low_bytes(uint8_t* p, Ints v) {
    const __m256i halves = low_halves(and_ints(v, splat(int32_t{255})));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm_packus_epi16(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1)));
}
inline Floats to_floats(Ints v) { return {_mm256_cvtepi32_ps(v.a), _mm256_cvtepi32_ps(v.b)}; }
inline Ints to_ints(Floats v) { return {_mm256_cvtps_epi32(v.a), _mm256_cvtps_epi32(v.b)}; }
inline Floats as_floats(Ints v) { return {_mm256_castsi256_ps(v.a), _mm256_castsi256_ps(v.b)}; }
inline Ints as_ints(Floats v) { return {_mm256_castps_si256(v.a), _mm256_castps_si256(v.b)}; }
inline Floats add(Floats x, Floats y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline Floats sub(Floats x, Floats y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline Floats mul(Floats x, Floats y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline Floats div(Floats x, Floats y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline Floats min(Floats x, Floats y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline Floats max(Floats x, Floats y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline Floats sqrt(Floats v) { return {_mm256_sqrt_ps(v.a), _mm256_sqrt_ps(v.b)}; }
inline Floats round_even(Floats v) {
    constexpr int kEven = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(v.a, kEven), _mm256_round_ps(v.b, kEven)};
}
inline Floats fma(Floats x, Floats y, Floats z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline Floats fused(Floats x, Floats y, Floats z) { return fma(x, y, z); }
inline float sum(Floats v) {
    const __m256 eight = _mm256_add_ps(v.a, v.b);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
// The sums of four at once: additions of neighbours, twice, then of halves.
inline void store_sums(float* p, Floats a, Floats b, Floats c, Floats d) {
    const __m256 ab = _mm256_hadd_ps(_mm256_add_ps(a.a, a.b), _mm256_add_ps(b.a, b.b));
    const __m256 cd = _mm256_hadd_ps(_mm256_add_ps(c.a, c.b), _mm256_add_ps(d.a, d.b));
    const __m256 all = _mm256_hadd_ps(ab, cd);
    _mm_storeu_ps(p, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
}
inline float largest(Floats v) {
    const __m256 eight = _mm256_max_ps(v.a, v.b);
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}
inline float smallest(Floats v) {
    const __m256 eight = _mm256_min_ps(v.a, v.b);
    __m128 four = _mm_min_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_min_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_min_ss(four, _mm_movehdup_ps(four)));
}

template <int kStep>
inline Floats swap_lanes(Floats v) {
    if constexpr (kStep == 1) return {_mm256_permute_ps(v.a, 0xb1), _mm256_permute_ps(v.b, 0xb1)};
    if constexpr (kStep == 2) return {_mm256_permute_ps(v.a, 0x4e), _mm256_permute_ps(v.b, 0x4e)};
    if constexpr (kStep == 4) return {_mm256_permute2f128_ps(v.a, v.a, 1), _mm256_permute2f128_ps(v.b, v.b, 1)};
    return {v.b, v.a};
}
inline uint32_t positive_half(__m256 v) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_GT_OQ)));
}
inline uint32_t positive(Floats v) { return positive_half(v.a) | positive_half(v.b) << 8; }

// The permutation takes three bits of the index; the fourth chooses between the two halves of the table.
struct Table16 {
    __m256 low, high;
};
inline Table16 load_table(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline __m256 look_up_half(const Table16& table, __m256i index) {
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.low, index), _mm256_permutevar8x32_ps(table.high, index),
                            _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}
inline Floats look_up(const Table16& table, Ints index) {
    return {look_up_half(table, index.a), look_up_half(table, index.b)};
}

constexpr bool kHasBf16Dot = false;
inline Floats dot_bf16(Floats sum, Bytes, Bytes) { return sum; }

}  // namespace ARRONDI_PATH
}  // namespace arrondi
