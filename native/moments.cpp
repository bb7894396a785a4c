// A step of Adam or of momentum on states in 8 bits. The loops are plain C++ that compilers turn into vectors; on x86 they are compiled
// once more for AVX2 and AVX-512, whose gathers read the maps, and all do the same operations in the same order.
#include "moments.h"

#include <cmath>
#include <cstring>
#include <vector>

#include "kernels.h"
#include "parallel.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define ARRONDI_INLINE __attribute__((always_inline)) inline
#else
#define ARRONDI_INLINE inline
#endif

namespace arrondi {
namespace {

constexpr int64_t kPiece = 1 << 14;  // numbers of a piece, about
constexpr int64_t kRun = 256;        // numbers whose codes wait to be narrowed

ARRONDI_INLINE uint32_t bits_of(float f) {
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    return bits;
}

ARRONDI_INLINE void decode(const State& s, int64_t at, int64_t count, float scale, float* __restrict out) {
    const uint8_t* __restrict codes = s.codes + at;
    const float* __restrict values = s.map.values;
    for (int64_t i = 0; i < count; i++) out[i] = values[static_cast<int32_t>(codes[i])] * scale;
}

ARRONDI_INLINE void encode(const State& s, int64_t at, int64_t count, int64_t block, const float* __restrict x) {
    uint32_t most = 0;  // as integers, so that NaN is above infinity
    for (int64_t i = 0; i < count; i++) {
        const uint32_t size = bits_of(x[i]) & 0x7fffffffu;
        most = size > most ? size : most;
    }
    float scale;
    std::memcpy(&scale, &most, 4);
    s.scale[block] = scale;
    const float by = most == 0 ? 1.0f : scale;
    uint8_t* __restrict codes = s.codes + at;
    const uint32_t first = static_cast<uint32_t>(s.map.first), last = static_cast<uint32_t>(s.map.cells - 1);
    const int32_t cells = s.map.cells;
    const int32_t* __restrict low = s.map.codes;
    const float* __restrict thresholds = s.map.thresholds;
    int32_t found[kRun];  // in between, so that each loop has numbers of one size
    for (int64_t begin = 0; begin < count; begin += kRun) {
        const int32_t some = static_cast<int32_t>(count - begin < kRun ? count - begin : kRun);
        const float* __restrict from = x + begin;
        for (int32_t i = 0; i < some; i++) {
            const float y = from[i] / by;
            const uint32_t bits = bits_of(y);
            uint32_t cell = (bits & 0x7fffffffu) >> 16;
            cell = cell < first ? first : cell;
            cell = cell - first;
            cell = cell > last ? last : cell;
            const int32_t place = static_cast<int32_t>(cell) + static_cast<int32_t>(bits >> 31) * cells;
            const float threshold = thresholds[place];
            found[i] = low[place] + static_cast<int32_t>(y > threshold);
        }
        for (int32_t i = 0; i < some; i++) codes[begin + i] = static_cast<uint8_t>(found[i]);
    }
}

ARRONDI_INLINE void adam_block(const Moments& j, int64_t block, float* __restrict m, float* __restrict v) {
    const int64_t at = block * j.block, count = j.n - at < j.block ? j.n - at : j.block;
    decode(j.m, at, count, j.m.scale[block], m);
    decode(j.v, at, count, j.v.scale[block], v);
    float* __restrict p = j.p + at;
    const float* __restrict g = j.g + at;
    const float keep = j.keep, decay = j.decay, towards = j.towards, beta = j.beta, share = j.share, root = j.root,
                eps = j.eps, size = j.size;
    for (int64_t i = 0; i < count; i++) {
        const float before = p[i] * keep, grad = g[i] + before * decay;
        m[i] = m[i] + towards * (grad - m[i]);
        v[i] = v[i] * beta + share * grad * grad;
        p[i] = before + size * m[i] / (std::sqrt(v[i]) / root + eps);
    }
    encode(j.m, at, count, block, m);
    encode(j.v, at, count, block, v);
}

ARRONDI_INLINE void momentum_block(const Moments& j, int64_t block, float* __restrict m) {
    const int64_t at = block * j.block, count = j.n - at < j.block ? j.n - at : j.block;
    decode(j.m, at, count, j.m.scale[block], m);
    float* __restrict p = j.p + at;
    const float* __restrict g = j.g + at;
    const float decay = j.decay, momentum = j.first ? 0.0f : j.momentum, fresh = j.first ? 1.0f : j.fresh, size = j.size;
    const float ahead = j.nesterov ? j.momentum : 1.0f, direct = j.nesterov ? 1.0f : 0.0f;
    for (int64_t i = 0; i < count; i++) {
        const float grad = g[i] + p[i] * decay;
        m[i] = (j.first ? 0.0f : m[i] * momentum) + fresh * grad;
        p[i] = p[i] + size * (direct * grad + ahead * m[i]);
    }
    encode(j.m, at, count, block, m);
}

using Run = void (*)(const Moments&, int64_t first, int64_t last, float* memory);

ARRONDI_INLINE void blocks(const Moments& j, int64_t first, int64_t last, float* memory) {
    for (int64_t block = first; block < last; block++) {
        if (j.adam) {
            adam_block(j, block, memory, memory + j.block);
        } else {
            momentum_block(j, block, memory);
        }
    }
}

void run_plain(const Moments& j, int64_t first, int64_t last, float* memory) { blocks(j, first, last, memory); }

#if defined(__x86_64__) && defined(__GNUC__)
__attribute__((target("avx2"))) void run_avx2(const Moments& j, int64_t first, int64_t last, float* memory) {
    blocks(j, first, last, memory);
}
__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512"))) void run_avx512(
    const Moments& j, int64_t first, int64_t last, float* memory) {
    blocks(j, first, last, memory);
}
#endif

Run run_of() {
#if defined(__x86_64__) && defined(__GNUC__)
    if (std::strncmp(path().name, "avx512", 6) == 0) return run_avx512;
    if (std::strncmp(path().name, "avx", 3) == 0) return run_avx2;
#endif
    return run_plain;
}

bool good(const State& s) {
    return s.codes != nullptr && s.scale != nullptr && s.map.values != nullptr && s.map.codes != nullptr &&
           s.map.thresholds != nullptr && s.map.cells > 0;
}

}  // namespace

const char* step_moments(const Moments& j) {
    if (j.n < 0 || j.block < 1) return "a size is not positive";
    if (j.n == 0) return nullptr;
    if (j.p == nullptr || j.g == nullptr || !good(j.m) || (j.adam && !good(j.v))) return "a buffer is null";
    const int64_t whole = (j.n + j.block - 1) / j.block, each = j.block < kPiece ? kPiece / j.block : 1;
    const int pieces = static_cast<int>((whole + each - 1) / each);
    const Run run = run_of();
    parallel_for(pieces, j.n < 2 * kPiece ? 1 : j.threads, [&](int piece) {
        thread_local std::vector<float> memory;
        if (memory.size() < static_cast<size_t>(2 * j.block)) memory.resize(2 * j.block);
        const int64_t first = piece * each, last = first + each < whole ? first + each : whole;
        run(j, first, last, memory.data());
    });
    return nullptr;
}

}  // namespace arrondi
