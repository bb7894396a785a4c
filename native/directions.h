// Attention of one token to keys and values along principal directions: what crosses to the compiled paths, as in kernels.h.
#pragma once

#include <cstdint>

namespace arrondi {

constexpr int kTurnBlock = 32;          // positions between two rows of `starts`
constexpr int kWidestDirections = 512;  // of a head, padding counted; and of what a token unpacks to

// Keys or values of tokens in a row: `eights` bytes of a code each, `fours` of two, `twos` of four, the first one lowest. See
// tensor/spectrum.py. Sixteen bytes behind the last token must be readable.
struct Directions {
    const uint8_t* codes;
    int64_t head_stride;
    int eights, fours, twos;
    int bytes() const { return eights + fours + twos; }
    // Numbers that a token unpacks to: sixteen bytes at a time, those of a kind by their place in the byte. The rest of the last sixteen is noise.
    int unpacked() const { return (eights + 15) / 16 * 16 + (fours + 15) / 16 * 32 + (twos + 15) / 16 * 64; }
};

// Σ share · code over packed tokens, and what is needed to make it a softmax with others. Channels of keys are in the order: the first of
// every pair that is turned, the second, the rest; each of the three padded by zeros to a multiple of sixteen.
struct AlongDirections {
    int heads, key_heads, half, plain, tokens, parts;  // tokens are looked at in so many parts
    const float* query;     // (heads, width), scaled; width is 2 · half + plain
    Directions keys, values;
    int count;              // directions of keys
    const float* rows;      // (key_heads, count, width): what a code of each is worth
    const int32_t* places;  // (count,) of each, in what a token unpacks to
    const float* base;      // (key_heads, width): what zeros mean
    int64_t first;          // position of token 0
    const float* starts;    // (positions / 32, 2, half): cosines and sines of the angles at every 32nd position
    const float* steps;     // (32, 2, half): of those in between
    float* sums;            // (parts, heads, values.unpacked())
    float* tops;            // (parts, heads): the largest score
    float* totals;          // (parts, heads): Σ exp(score - top)
    int threads;
    int width() const { return 2 * half + plain; }
    int each() const { return (tokens + parts - 1) / parts; }
    int64_t apart() const { return (each() + 31) / 16 * 16; }  // numbers for the scores of one query
};

// Null, or a sentence that says what is wrong.
const char* attend_along(const AlongDirections& a);

}  // namespace arrondi
