// Codes of a byte with a clip. The loops are plain C++ that compilers turn into vectors; on x86 they are compiled once more for AVX2
// and AVX-512, and all do the same operations in the same order.
#include "clips.h"

#include <cstring>

#include "parallel.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define ARRONDI_INLINE __attribute__((always_inline)) inline
#else
#define ARRONDI_INLINE inline
#endif

namespace arrondi {
namespace {

constexpr int64_t kSmall = 1 << 15;  // numbers that are not worth waking a thread for
constexpr int64_t kRun = 256;        // columns whose flags wait to be packed; a multiple of 16

ARRONDI_INLINE float from_bf16(uint16_t half) {
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}

ARRONDI_INLINE uint16_t to_bf16(float f) {
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    const uint32_t nan = static_cast<uint32_t>((bits & 0x7fffffffu) > 0x7f800000u);
    const uint32_t rounded = bits + 0x7fffu + (bits >> 16 & 1u);
    return static_cast<uint16_t>(nan != 0 ? 0x7fc0u : rounded >> 16);
}

// ⌊v + ½⌋ within the codes, without rounding v + ½; NaN is the lowest.
ARRONDI_INLINE int32_t half_up(float v) {
    v = v > -127.0f ? v : -127.0f;
    v = v < 127.0f ? v : 127.0f;
    const int32_t cut = static_cast<int32_t>(v);
    const int32_t floor = cut - static_cast<int32_t>(v < static_cast<float>(cut));
    return floor + static_cast<int32_t>(v - static_cast<float>(floor) >= 0.5f);
}

// Eight flags, a byte each, as the bits of one.
ARRONDI_INLINE uint8_t packed(const uint8_t* flags) {
    uint64_t word;
    std::memcpy(&word, flags, 8);
    return static_cast<uint8_t>(word * 0x0102040810204080ull >> 56);
}

ARRONDI_INLINE void clip_rows(const Clipping& c, int64_t first, int64_t last) {
    const int64_t bytes = (c.columns + 7) / 8;
    const float scale = c.scale, shift = c.shift, low = c.low, high = c.high;
    float values[kRun];
    uint8_t flags[kRun];
    for (int64_t row = first; row < last; row++)
        for (int64_t at = 0; at < c.columns; at += kRun) {
            const int32_t count = static_cast<int32_t>(c.columns - at < kRun ? c.columns - at : kRun);
            const float* __restrict from = values;
            if (c.sums != nullptr) {
                const int32_t* __restrict sums = c.sums + row * c.columns + at;
                for (int32_t i = 0; i < count; i++) values[i] = static_cast<float>(sums[i]) * scale;
            } else if (c.type == Type::bf16) {
                const uint16_t* __restrict halves = static_cast<const uint16_t*>(c.x) + row * c.ldx + at;
                for (int32_t i = 0; i < count; i++) values[i] = from_bf16(halves[i]);
            } else {
                from = static_cast<const float*>(c.x) + row * c.ldx + at;
            }
            const float by = c.sums != nullptr ? 1.0f : scale;
            int8_t* __restrict codes = c.codes + row * c.columns + at;
            for (int32_t i = 0; i < count; i++) codes[i] = static_cast<int8_t>(half_up(from[i] * by - shift));
            if (c.beyond == nullptr) continue;
            for (int32_t i = 0; i < count; i++)
                flags[i] = static_cast<uint8_t>(static_cast<int32_t>(from[i] <= low) | static_cast<int32_t>(from[i] >= high));
            for (int32_t i = count; i < (count + 7) / 8 * 8; i++) flags[i] = 0;
            uint8_t* __restrict beyond = c.beyond + row * bytes + at / 8;
            for (int32_t i = 0; i < (count + 7) / 8; i++) beyond[i] = packed(flags + 8 * i);
        }
}

ARRONDI_INLINE void widen_rows(const Widening& w, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
        const float by = w.row[row];
        const int8_t* __restrict codes = w.codes + row * w.columns;
        const float* __restrict bias = w.bias;
        if (w.type == Type::bf16) {
            uint16_t* __restrict y = static_cast<uint16_t*>(w.y) + row * w.columns;
            for (int64_t i = 0; i < w.columns; i++) {
                const float v = static_cast<float>(codes[i]) * by;
                y[i] = to_bf16(bias == nullptr ? v : v + bias[i]);
            }
        } else if (bias == nullptr) {
            float* __restrict y = static_cast<float*>(w.y) + row * w.columns;
            for (int64_t i = 0; i < w.columns; i++) y[i] = static_cast<float>(codes[i]) * by;
        } else {
            float* __restrict y = static_cast<float*>(w.y) + row * w.columns;
            for (int64_t i = 0; i < w.columns; i++) y[i] = static_cast<float>(codes[i]) * by + bias[i];
        }
    }
}

ARRONDI_INLINE void mask_rows(const Masking& m, int64_t first, int64_t last) {
    const int64_t bytes = (m.columns + 7) / 8;
    int32_t flags[kRun];
    for (int64_t row = first; row < last; row++) {
        float sums[16] = {};
        for (int64_t at = 0; at < m.columns; at += kRun) {
            const int32_t count = static_cast<int32_t>(m.columns - at < kRun ? m.columns - at : kRun);
            const uint8_t* __restrict beyond = m.beyond + row * bytes + at / 8;
            for (int32_t i = 0; i < (count + 7) / 8; i++)
                for (int32_t bit = 0; bit < 8; bit++) flags[8 * i + bit] = beyond[i] >> bit & 1;
            const float* slope = m.slope + row * m.columns + at;
            if (m.codes != nullptr) {
                const int8_t* __restrict codes = m.codes + row * m.columns + at;
                const int32_t below = m.above ? 0 : -1;
                const auto end = [&](int32_t i) {
                    const int32_t sign = codes[i] < 0 ? below : static_cast<int32_t>(codes[i] > 0);
                    return slope[i] * static_cast<float>(flags[i] * sign);
                };
                int32_t i = 0;
                for (; i + 16 <= count; i += 16)
                    for (int32_t lane = 0; lane < 16; lane++) sums[lane] += end(i + lane);
                for (; i < count; i++) sums[i % 16] += end(i);
            }
            float* y = m.y + row * m.columns + at;
            for (int32_t i = 0; i < count; i++) y[i] = slope[i] * static_cast<float>(1 - flags[i]);
        }
        if (m.ends != nullptr) {
            float sum = 0.0f;
            for (float s : sums) sum += s;
            m.ends[row] = sum;
        }
    }
}

template <class Job>
using Rows = void (*)(const Job&, int64_t first, int64_t last);

#if defined(__x86_64__) && defined(__GNUC__)
#define ARRONDI_AVX2 __attribute__((target("avx2")))
#define ARRONDI_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")))
#define ARRONDI_LOOPS(loop, Job)                                                                           \
    void loop##_plain(const Job& j, int64_t first, int64_t last) { loop(j, first, last); }                 \
    ARRONDI_AVX2 void loop##_avx2(const Job& j, int64_t first, int64_t last) { loop(j, first, last); }     \
    ARRONDI_AVX512 void loop##_avx512(const Job& j, int64_t first, int64_t last) { loop(j, first, last); } \
    Rows<Job> loop##_of() {                                                                                \
        if (std::strncmp(path().name, "avx512", 6) == 0) return loop##_avx512;                             \
        return std::strncmp(path().name, "avx", 3) == 0 ? loop##_avx2 : loop##_plain;                      \
    }
#else
#define ARRONDI_LOOPS(loop, Job)                                                           \
    void loop##_plain(const Job& j, int64_t first, int64_t last) { loop(j, first, last); } \
    Rows<Job> loop##_of() { return loop##_plain; }
#endif

ARRONDI_LOOPS(clip_rows, Clipping)
ARRONDI_LOOPS(widen_rows, Widening)
ARRONDI_LOOPS(mask_rows, Masking)

template <class Job>
const char* share(const Job& job, Rows<Job> run) {
    const int64_t worth = job.rows * job.columns / kSmall + 1, most = 4 * job.threads;
    int64_t pieces = worth < most ? worth : most;
    if (pieces > job.rows) pieces = job.rows;
    parallel_for(static_cast<int>(pieces), job.threads,
                 [&](int piece) { run(job, job.rows * piece / pieces, job.rows * (piece + 1) / pieces); });
    return nullptr;
}

}  // namespace

const char* clip_codes(const Clipping& c) {
    if (c.rows < 0 || c.columns < 0 || (c.sums == nullptr && c.rows > 1 && c.ldx < c.columns)) return "a size is negative, or rows overlap";
    if (c.sums == nullptr && c.type == Type::f16) return "numbers are float32 or bfloat16";
    if (c.rows == 0 || c.columns == 0) return nullptr;
    if ((c.x == nullptr && c.sums == nullptr) || c.codes == nullptr) return "a buffer is null";
    return share(c, clip_rows_of());
}

const char* widen_codes(const Widening& w) {
    if (w.rows < 0 || w.columns < 0) return "a size is negative";
    if (w.type == Type::f16) return "results are float32 or bfloat16";
    if (w.rows == 0 || w.columns == 0) return nullptr;
    if (w.codes == nullptr || w.row == nullptr || w.y == nullptr) return "a buffer is null";
    return share(w, widen_rows_of());
}

const char* mask_slopes(const Masking& m) {
    if (m.rows < 0 || m.columns < 0) return "a size is negative";
    if (m.rows == 0) return nullptr;
    if (m.columns > 0 && (m.slope == nullptr || m.beyond == nullptr || m.y == nullptr)) return "a buffer is null";
    if ((m.codes == nullptr) != (m.ends == nullptr)) return "codes and ends go together";
    return share(m, mask_rows_of());
}

}  // namespace arrondi
