// Codes of a bit-shift trellis: the search for those whose values are nearest to a ring of numbers, and their values.
#pragma once

#include <cstdint>

namespace arrondi {

// Rings of `length` numbers each; the code at place i has bits[i % 2] bits, and a state the last `state_bits` of them.
struct Rings {
    int64_t rings, length;
    int bits[2];
    int state_bits;
    const float* targets;   // (rings, length), in units of which a value of 1 has `unit` steps
    float unit;
    const int16_t* steps;   // (2^state_bits,): value of every state in steps
    uint8_t* codes;         // (rings, length)
    int window;             // places on each side of the seam that are searched first, to close the ring
    int threads;
};

// values[i] = table[state at place i]
struct RingValues {
    int64_t rings, length;
    int bits[2];
    int state_bits;
    const uint8_t* codes;  // (rings, length)
    const float* table;    // (2^state_bits,)
    float* values;         // (rings, length)
    int threads;
};

constexpr int kStatePad = 64;  // numbers that may be read or written behind the last of 2^state_bits

// What one ring needs beside its numbers.
struct RingScratch {
    int16_t* costs;    // 2^state_bits and the pad
    int16_t* best;     // the same
    int16_t* targets;  // (length,)
    uint8_t* picks;    // for every place the best predecessor of 2^(state_bits - bits) states, and the pad
};

// Codes (n, k), a byte each, of rings of rows ↔ entries of slabs; see kernels.h. `packed` holds ring_bytes().
struct RingPacking {
    int n, k;
    int bits[2];
    int ring;  // rows of a ring; the last one has what is left over too; 0: squares of sixteen rows and columns
    uint8_t* codes;
    uint8_t* packed;
    int threads;
};
int64_t ring_bytes(int n, int k, int even, int odd, bool squares);

// Null, or a sentence that says what is wrong with the arguments.
const char* pack_rings(const RingPacking& job);
const char* unpack_rings(const RingPacking& job);
const char* search_rings(const Rings& job);
const char* ring_values(const RingValues& job);

}  // namespace arrondi
