// Codes → the packed weight of kernels.h.
#pragma once

#include "kernels.h"

namespace arrondi {

// Rows of a little-endian stream of `bits`-bit codes, `row_bytes` apart → [blocks][steps][step_bytes]. `add` is added to every
// code: it turns signed codes, which come as bytes, into unsigned ones. `out` must hold packed_bytes().
void prepack(Kind kind, const uint8_t* rows, int64_t row_bytes, int bits, int add, int n, int k, uint8_t* out, int threads);

// The same rows → one byte for each code, (n, k).
void unpack_stream(const uint8_t* rows, int64_t row_bytes, int bits, int add, int64_t n, int k, uint8_t* out, int threads);

int steps_of(Kind kind, int k);
int64_t packed_bytes(Kind kind, int n, int k);

// The inverse of prepack for some rows: codes (count, k), one byte each.
void unpack_rows(Kind kind, const uint8_t* packed, int k, int first, int count, uint8_t* out);

}  // namespace arrondi
