// Keys and values along their directions over the threads: heads, and parts of the text.
#include "directions.h"

#include <cstdlib>

#include "parallel.h"
#include "tokens.h"

namespace arrondi {

static const char* wrong_side(const Directions& s) {
    if (s.eights < 0 || s.fours < 0 || s.twos < 0) return "there is no such number of bytes";
    if (s.unpacked() > kWidestDirections) return "a token has too many directions";
    return s.codes == nullptr ? "a buffer is null" : nullptr;
}

const char* attend_along(const AlongDirections& a) {
    if (a.heads < 1 || a.key_heads < 1 || a.heads % a.key_heads != 0) return "heads must share keys evenly";
    if (a.half < 0 || a.plain < 0 || a.half % 16 != 0 || a.plain % 16 != 0 || a.width() > kWidestDirections)
        return "heads are up to 512 wide, in steps of 16";
    if (a.tokens < 1 || a.parts < 1 || a.parts > a.tokens || a.first < 0) return "there is a token in every part";
    if (const char* wrong = wrong_side(a.keys)) return wrong;
    if (const char* wrong = wrong_side(a.values)) return wrong;
    if (a.count < 0 || a.count > a.keys.unpacked()) return "there are as many directions as codes";
    for (int i = 0; i < a.count; i++)
        if (a.places == nullptr || a.places[i] < 0 || a.places[i] >= a.keys.unpacked()) return "a direction has no code";
    if (a.query == nullptr || a.base == nullptr || (a.count > 0 && a.rows == nullptr) || a.sums == nullptr || a.tops == nullptr ||
        a.totals == nullptr || (a.half > 0 && (a.starts == nullptr || a.steps == nullptr)))
        return "a buffer is null";
    const int jobs = a.key_heads * a.parts;
    const size_t memory = static_cast<size_t>(a.apart()) * (a.heads / a.key_heads);
    float* scores = static_cast<float*>(std::aligned_alloc(64, memory * jobs * sizeof(float)));
    if (scores == nullptr) return "there is no memory for the scores";
    parallel_for(jobs, a.threads, [&](int job) {
        path().tokens->attend_along(a, job / a.parts, job % a.parts, scores + job * memory);
    });
    std::free(scores);
    return nullptr;
}

}  // namespace arrondi
