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

struct Tokens {
    void (*dense)(const Dense&, int first, int last);
    void (*attend)(const Attention&, int head, float* scores);
};

// Null, or a sentence that says what is wrong.
const char* dense(const Dense& d);
const char* attend(const Attention& a);

}  // namespace arrondi
