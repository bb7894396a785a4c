// One token of keys or values on its way into the buffers that attention reads; see tensor/states.py for where it lies.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace arrondi {

// One token of keys or values for every head of every text, rounded into their buffers.
struct Append {
    int rows, width;         // heads of all texts
    const float* x;          // (rows, width)
    int bits, block, groups; // as in PackedStates; scales follow tokens
    bool keys;               // whether lanes are tokens
    int64_t at;              // the token's place
    uint8_t* codes;
    int64_t codes_stride;
    void* scale;
    void* offset;            // or null: symmetric
    Type type;
    int64_t scale_stride;
    float divisor;           // of the largest magnitude, for symmetric codes
    float lowest, clip, unit;  // clip 0: none
};

// Null, or a sentence that says what is wrong.
// `fine` is false if a number is not finite or a scale does not fit its storage.
const char* append(const Append& a, bool& fine);

}  // namespace arrondi
