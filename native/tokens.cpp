// Few tokens over the threads: rows of the weight, or heads.
#include "tokens.h"

#include <cstdlib>

#include "parallel.h"

namespace arrondi {

const char* dense(const Dense& d) {
    if (d.m == 0 || d.n == 0) return nullptr;
    if (d.m < 0 || d.m > 4 || d.n < 0 || d.k < 0) return "from one to four tokens";
    if (d.x == nullptr || d.weight == nullptr || d.y == nullptr) return "a buffer is null";
    int pieces = static_cast<int>(static_cast<int64_t>(d.n) * d.k / 32768) + 1;
    if (pieces > 8 * d.threads) pieces = 8 * d.threads;
    if (pieces > d.n) pieces = d.n;
    parallel_for(pieces, d.threads, [&](int piece) {
        path().tokens->dense(d, static_cast<int>(static_cast<int64_t>(d.n) * piece / pieces),
                             static_cast<int>(static_cast<int64_t>(d.n) * (piece + 1) / pieces));
    });
    return nullptr;
}

const char* attend(const Attention& a) {
    if (a.heads < 1 || a.key_heads < 1 || a.heads % a.key_heads != 0 || a.length < 1 || a.width % 16 != 0 || a.width > 256)
        return "heads must share keys evenly and be up to 256 wide, in steps of 16";
    if (a.query == nullptr || a.keys == nullptr || a.values == nullptr || a.y == nullptr) return "a buffer is null";
    const size_t scores = (static_cast<size_t>(a.length) + 31) / 16 * 16;
    float* memory = static_cast<float*>(std::aligned_alloc(64, scores * a.key_heads * sizeof(float)));
    if (memory == nullptr) return "there is no memory for the scores";
    const bool small = static_cast<int64_t>(a.heads) * a.length * a.width < 32768;
    parallel_for(a.key_heads, small ? 1 : a.threads,
                 [&](int head) { path().tokens->attend(a, head, memory + head * scores); });
    std::free(memory);
    return nullptr;
}

const char* rotate(const Rotation& r) {
    if (r.rows < 0 || r.heads < 0 || r.key_heads < 0 || r.width < 2 || r.width % 2 != 0 || r.width > 256)
        return "heads must have an even width of up to 256";
    if (r.x == nullptr || r.cos == nullptr || r.sin == nullptr) return "a buffer is null";
    const bool small = static_cast<int64_t>(r.rows) * (r.heads + r.key_heads) * r.width < 16384;
    parallel_for(r.rows, small ? 1 : r.threads, [&](int row) { path().tokens->rotate(r, row); });
    return nullptr;
}

// Null, or what is wrong with keys or values.
static const char* wrong_states(const PackedStates& s, const PackedAttention& a, int step) {
    if (s.bits != 2 && s.bits != 4 && s.bits != 8) return "codes have 2, 4 or 8 bits";
    if (s.block < 16 || s.block > kLongestBlock || s.block % 16 != 0) return "blocks have 16 to 128 tokens in steps of 16";
    if (s.skip < 0 || s.skip >= s.block || s.tokens < s.skip || s.tokens - s.skip > a.length) return "there are other tokens";
    if (s.groups > 0 && (a.width % s.groups != 0 || a.width / s.groups % step != 0)) return "groups do not fit the heads";
    if (s.tokens > 0 && (s.codes == nullptr || (s.groups >= 0 && s.scale == nullptr))) return "a buffer is null";
    return nullptr;
}

const char* attend_packed(const PackedAttention& a) {
    if (a.heads < 1 || a.key_heads < 1 || a.heads % a.key_heads != 0 || a.length < 1 || a.width % 16 != 0 || a.width > 256)
        return "heads must share keys evenly and be up to 256 wide, in steps of 16";
    if (const char* wrong = wrong_states(a.keys, a, a.keys.bits == 2 ? 4 : a.keys.bits == 4 ? 2 : 1)) return wrong;
    if (const char* wrong = wrong_states(a.values, a, 16)) return wrong;
    if (a.values.groups == 0) return "scales of values follow tokens";
    if (a.query == nullptr || a.turned == nullptr || a.new_keys == nullptr || a.new_values == nullptr || a.y == nullptr)
        return "a buffer is null";
    const size_t memory = static_cast<size_t>(scores_apart(a)) * kTogether;
    float* scores = static_cast<float*>(std::aligned_alloc(64, memory * a.key_heads * sizeof(float)));
    if (scores == nullptr) return "there is no memory for the scores";
    const bool small = static_cast<int64_t>(a.heads) * a.length * a.width < 32768;
    parallel_for(a.key_heads, small ? 1 : a.threads,
                 [&](int head) { path().tokens->attend_packed(a, head, scores + head * memory); });
    std::free(scores);
    return nullptr;
}

}  // namespace arrondi
