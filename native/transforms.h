// Fast Hadamard transforms, products of signs, and reading memory: what crosses to the compiled paths, as in kernels.h.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace arrondi {

// y = scale · x H along rows, H = K ⊗ S: K of order `base`, S Sylvester's matrix of order `run`.
struct Hadamard {
    int64_t rows;
    int base, shift;      // n = base · run, run = 1 << shift; base is 1 or a multiple of four
    const float* matrix;  // K, four of its columns at a time: [base / 4][base][4]; null if base is 1
    float scale;
    const void* x;  // (rows, n), rows ldx elements apart
    int64_t ldx;
    void* y;  // (rows, n), float32 or bfloat16
    int64_t ldy;
    Type type;  // of x and y
    int threads;
    // Made by hadamard():
    int together;    // rows that lie side by side in one buffer, a power of two: a group
    int64_t stride;  // of a buffer [base][together · run], longer than that so that its rows do not share a cache set
};

// y = k - 2 · popcount(x ^ w), exact; as float32 or bfloat16 times the scales, the token's first.
struct Signs {
    int m, n, k, words;  // words of 32 signs in a row; signs beyond k are 0 in x and in w
    const int32_t* x;    // (m, words)
    const int32_t* w;    // [ceil(n / 16)][words][16]
    void* y;             // (m, n)
    bool integers;       // y is int32
    Type y_type;
    const float* token_scale;  // (m,) or null
    const float* scale;        // (n,) or null
    int threads;
};

// Bit j of word i is 1 where x[32 i + j] > 0.
struct SignPacking {
    int64_t rows;
    int k, words;
    const void* x;  // (rows, k), rows ldx elements apart
    int64_t ldx;
    Type type;
    int32_t* out;  // (rows, words)
    int threads;
};

struct Transforms {
    // The butterflies of one group; into `work`, or finished into y where base is 1.
    void (*butterflies)(const Hadamard&, int64_t group, float* work);
    // Columns 4 · first … 4 · last of K: the rest of the way from `work` to y.
    void (*base_product)(const Hadamard&, int64_t group, const float* work, int first, int last);
    void (*pack_signs)(const SignPacking&, int64_t first, int64_t last);
    void (*multiply_signs)(const Signs&, int first, int last);
    // Reads every byte; the answer only keeps the compiler from leaving that out.
    int32_t (*read)(const uint8_t* p, int64_t vectors);
};

// Null, or a sentence that says what is wrong with the arguments.
const char* hadamard(Hadamard& t);
const char* multiply_signs(const Signs& p);
const char* pack_signs(const SignPacking& p);
// Reads `bytes` (whole vectors of 64) with all threads.
int32_t read_memory(const uint8_t* p, int64_t bytes, int threads);

}  // namespace arrondi
