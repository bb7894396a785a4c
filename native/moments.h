// Optimizers whose states take 8 bits (arrondi.optim): one step on flat float32 numbers.
#pragma once

#include <cstdint>

namespace arrondi {

// A log-spaced map of 256 values, and its nearest code by the upper half of a float's bits: of every such cell the code of its
// lowest number, and the one threshold that may lie inside. Cells of negative numbers follow those of the others.
struct Map {
    const float* values;      // (256,), ascending
    const int32_t* codes;     // (2 · cells,)
    const float* thresholds;  // (2 · cells,), infinity where there is none; above it the code is one more
    int32_t first, cells;     // upper half of the bits of the first cell, which also stands for all smaller numbers
};

// A state in blocks: x ≈ values[code] · scale of its block.
struct State {
    uint8_t* codes;  // (n,)
    float* scale;    // (⌈n / block⌉,)
    Map map;
};

// p and g are (n,) float32; g is not changed.
struct Moments {
    int64_t n, block;
    float* p;
    const float* g;
    State m, v;        // v of Adam alone
    bool adam;         // else SGD with momentum
    float keep;        // p is multiplied by this before (decoupled decay)
    float decay;       // p times this is added to the gradient
    float towards;     // 1 - beta1: m goes this share of the way to g
    float beta, share; // v becomes beta · v + share · g · g
    float root, eps;   // p += size · m / (sqrt(v) / root + eps)
    float size;
    float momentum, fresh;  // m becomes momentum · m + fresh · g
    bool first, nesterov;   // m becomes g; p moves by g + momentum · m
    int threads;
};

// Null, or a sentence that says what is wrong with the arguments.
const char* step_moments(const Moments& job);

}  // namespace arrondi
