// Products with ordinary weights and attention for few tokens: what crosses to the compiled paths, as in kernels.h.
#pragma once

#include <cstdint>

#include "directions.h"
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

constexpr int kTogether = 4;        // queries that use a code once it is decoded
constexpr int kLongestBlock = 128;  // tokens

// Keys or values in few bits: (code - lowest) · scale + offset. See tensor/states.py for where they lie.
struct PackedStates {
    int bits;              // 8, 4 or 2
    int tokens, skip;      // that are packed, and how many of them, less than a block, are not seen any more
    int block;             // tokens of a block, a multiple of 16
    int groups;            // scales of a token; 0: they follow the channels of a block; -1: `unit` is the only one
    const uint8_t* codes;
    int64_t codes_stride;  // bytes from head to head
    const void* scale;
    const void* offset;    // or null
    Type type;             // of both
    int64_t scale_stride;  // elements from head to head, of both
    float unit, lowest;
};

// softmax(scale · q Kᵀ) V for one token, where the older keys and values are packed and the newest are not.
struct PackedAttention {
    int heads, key_heads, width, length;  // tokens that are seen
    const void* query;     // (heads, width), for new keys
    const float* turned;   // the same for packed keys, which may have been rotated
    PackedStates keys, values;
    const void* new_keys;  // those that follow the packed ones
    int64_t new_key_head_stride, new_key_stride;
    const void* new_values;
    int64_t new_value_head_stride, new_value_stride;
    void* y;               // (heads, width)
    Type type;             // of query, new keys and values, and y: float32 or bfloat16
    float scale;
    int threads;
};

// Numbers for the scores of one query: room for a block at either end.
inline int64_t scores_apart(const PackedAttention& a) { return (a.length + 2 * kLongestBlock + 31) / 16 * 16; }

struct Tokens {
    void (*dense)(const Dense&, int first, int last);
    void (*attend)(const Attention&, int head, float* scores);
    void (*rotate)(const Rotation&, int row);
    void (*attend_packed)(const PackedAttention&, int head, float* memory);
    void (*attend_along)(const AlongDirections&, int head, int part, float* scores);
};

// Null, or a sentence that says what is wrong.
const char* dense(const Dense& d);
const char* attend(const Attention& a);
const char* rotate(const Rotation& r);
const char* attend_packed(const PackedAttention& a);

}  // namespace arrondi
