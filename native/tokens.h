// Products with ordinary weights and attention for few tokens: what crosses to the compiled paths, as in kernels.h.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace arrondi {

// y = x Wᵀ + bias for up to four tokens; W (n, k) in rows as PyTorch keeps it.
struct Dense {
    int m, n, k;
    const float* x;      // (m, k)
    const void* weight;  // float32, bfloat16 or float16, rows ldw elements apart
    Type type;
    int64_t ldw;
    const float* bias;  // (n,) or null
    float* y;           // (m, n)
    int threads;
};

// softmax(scale · q Kᵀ) V for one token. Strides in elements; a row of `width` numbers is contiguous.
struct Attention {
    int heads, key_heads, width, length;
    const void* query;   // (heads, width)
    const void* keys;    // (key_heads, length, width)
    int64_t key_head_stride, key_stride;
    const void* values;  // the same shape
    int64_t value_head_stride, value_stride;
    void* y;             // (heads, width)
    Type type;           // of all of them: float32 or bfloat16
    float scale;
    int threads;
};

// Rotary positions (Su et al., 2021, arXiv:2104.09864, in halves), in place: the heads of a token, a, become
// a · cos + (-second half, first half) · sin; before that a / rms(a) · norm where there is a norm.
struct Rotation {
    int rows, heads, key_heads, width;
    void* x;             // (rows, heads + key heads, width), rows ldx elements apart
    int64_t ldx;
    const void* cos;     // (rows, width)
    const void* sin;
    Type type;           // of all of them: float32 or bfloat16
    const float* norm;   // (width,) of the heads, or null
    const float* key_norm;
    float eps;
    int threads;
};

struct Tokens {
    void (*dense)(const Dense&, int first, int last);
    void (*attend)(const Attention&, int head, float* scores);
    void (*rotate)(const Rotation&, int row);
};

// Null, or a sentence that says what is wrong.
const char* dense(const Dense& d);
const char* attend(const Attention& a);
const char* rotate(const Rotation& r);

}  // namespace arrondi
