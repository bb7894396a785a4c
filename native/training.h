// What surrounds the integer products of a training step, whose sides are both rounded anew at every step: extremes,
// codes, and sums back to floats. What crosses to the compiled paths, as in kernels.h.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace arrondi {

// A matrix of floats with a factor for each row and each column, 1 where there is none: v = x · row · column.
struct Sides {
    int64_t rows, columns;
    const void* x;  // rows ldx elements apart
    int64_t ldx;
    Type type;
    const float* row;     // (rows,) or null
    const float* column;  // (columns,) or null
    int threads;
};

// The largest |v| of each row, or of each column; NaN where there is one.
struct Extremes {
    Sides of;
    bool by_column;
    float* out;
};

// clip(round(v), lowest, highest), to nearest even; or up with the probability of what is left, by a noise of 16 bits that
// depends on nothing but the seed and the place, so that whole numbers never move.
struct CodeRounding {
    Sides of;
    int lowest, highest;
    bool stochastic;
    uint32_t seed;
    int8_t* codes;  // (rows, columns)
};

// y = sum · row · column + bias
struct SumScaling {
    int64_t rows, columns;
    const int32_t* sums;  // (rows, columns)
    const float* row;     // (rows,) or null
    const float* column;  // (columns,) or null
    const float* bias;    // (columns,) or null
    void* y;              // (rows, columns)
    Type type;            // of y: float32 or bfloat16
    int threads;
};

struct Training {
    void (*largest_of_rows)(const Extremes&, int64_t first, int64_t last);
    // Of a band of columns, a multiple of 16 wide but at the end.
    void (*largest_of_columns)(const Extremes&, int64_t first, int64_t last);
    void (*round_codes)(const CodeRounding&, int64_t first, int64_t last);
    void (*scale_sums)(const SumScaling&, int64_t first, int64_t last);
};

// Null, or a sentence that says what is wrong with the arguments.
const char* extremes(const Extremes& e);
const char* round_codes(const CodeRounding& r);
const char* scale_sums(const SumScaling& s);

}  // namespace arrondi
