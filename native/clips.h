// Codes of a byte with a clip: numbers and sums become codes, codes become numbers, and what lay beyond the clip is marked by bits.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace arrondi {

// codes = clip(⌊x · scale - shift + ½⌋, -127, 127); bit i of a row's byte b: whether column 8 b + i is marked.
struct Clipping {
    int64_t rows, columns;
    const void* x;  // (rows, columns), or rows ldx elements apart
    int64_t ldx;
    Type type;  // float32 or bfloat16; sums are int32 and have `sums` instead of x
    const int32_t* sums;
    float scale, shift;
    float low, high;  // marked is what is at most low or at least high: of x, or of sum · scale
    int8_t* codes;    // (rows, columns)
    uint8_t* beyond;  // (rows, ⌈columns / 8⌉) or null
    int threads;
};

// y = code · row + bias
struct Widening {
    int64_t rows, columns;
    const int8_t* codes;  // (rows, columns)
    const float* row;     // (rows,)
    const float* bias;    // (columns,) or null
    void* y;
    Type type;  // float32 or bfloat16
    int threads;
};

// y = slope where nothing is marked, slope · 0 elsewhere; ends: of each row the sum of marked slopes by the sign of their codes.
struct Masking {
    int64_t rows, columns;
    const float* slope;     // (rows, columns)
    const uint8_t* beyond;  // as above
    const int8_t* codes;    // (rows, columns), or null: no ends
    bool above;             // ends count positive codes alone
    float* y;               // may be slope
    float* ends;            // (rows,) or null
    int threads;
};

// Null, or a sentence that says what is wrong with the arguments.
const char* clip_codes(const Clipping& c);
const char* widen_codes(const Widening& w);
const char* mask_slopes(const Masking& m);

}  // namespace arrondi
