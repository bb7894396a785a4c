// What crosses from the module to the compiled quantizers: one plain struct for each job, a table of functions for each path.
//
// A job works on rows whose elements lie next to each other, in groups along the row; the last group may be short. Every
// function takes rows [first, last) and memory of its own, and says false where a value is NaN or infinite or a scale does
// not fit its storage: the caller then asks the twin in Python, which knows the sentence.
#pragma once

#include <cstddef>
#include <cstdint>

namespace arrondi {

struct Rings;        // of trellis.h
struct RingScratch;

enum class Type : int;  // of kernels.h

// How the grid of a group follows from its elements; see arrondi.tensor.ranges.fits.
enum class Fit : int {
    given,      // it does not: the grid is read
    symmetric,  // the largest magnitude over `divisor`
    extreme,    // the element farthest from zero over qmin
    affine,     // min … max with zero, integer zero point
    offset,     // min … max, float offset
};

struct Groups {
    int64_t rows, columns, group, groups;  // groups of a row
    int qmin, qmax;
    Fit fit;
    float divisor;
    Type scale_type;   // what scales are rounded to
    const void* x;
    Type x_type;
    float* scale;      // (rows, groups)
    int32_t* zero;     // (rows, groups) or null
    float* offset;     // (rows, groups) or null
};

// Round to nearest. Codes go to `codes` (rows, columns) or, if that is null, as a stream of `bits` bits to `packed`.
struct Rounding {
    Groups on;
    uint8_t* codes;
    uint8_t* packed;
    int64_t row_bytes;
    int bits;
};

// Bits from codes of one byte each: `lowest` becomes zero.
struct Packing {
    int64_t rows, columns, row_bytes;
    int bits, lowest;
    const uint8_t* codes;
    uint8_t* packed;
};

// Back to numbers: in `y` if that is not null; squares of what was lost and of what there was, for each row, in `sums`.
struct Restoring {
    Groups on;
    const uint8_t* codes;
    bool is_signed;
    void* y;
    Type y_type;
    double* sums;  // (rows, 2) or null
};

// The grid of each group with the least Σ importance · |error|^power, for power 2, 2.5 and 4.
struct Search {
    Groups on;
    const float* importance;  // (columns,) or null
    int twice_power;
    bool mirrored;
};

// Grids of groups of 16 or 32 by least squares: free ones (`span` 0), or codes times a unit for every `span` groups. See
// superblocks.h. A group's elements are `…_element` numbers apart, groups `…_group`.
struct Superblocks {
    int64_t groups;
    int elements, span;
    int qmin, qmax;
    const float* cells;  // null: integers; else the nearest value for each cell of the range from `first` on
    int cell_count;
    float first, cells_per_one;
    bool offset, below, is_signed;  // below: offsets are at most zero
    const float* starts;            // what the range of a group is divided by, at first
    int start_count, turns;
    int inner_low, inner_high;      // codes of scales; from 0 on for those of offsets and of scales without a sign
    bool zero_scales;               // a scale's code may be zero
    Type unit_type;
    const double* unit_steps;
    int unit_count;
    const float* x;
    const float* w;  // null: all weigh the same
    int64_t x_element, x_group, w_element, w_group;
    float* scale;       // (groups,): scales, or their codes
    float* shift;       // the same of offsets, or null
    float* unit;        // (groups / span,)
    float* shift_unit;
};
constexpr int kSuperLanes = 64;  // groups at a time, and in a super-block at most

// Groups that are searched together: whole super-blocks, in one register if they fit.
inline int groups_at_once(const Superblocks& s) { return s.span == 0 ? 16 : s.span < 16 ? 16 / s.span * s.span : s.span; }

// Half-quadratic splitting for each group.
struct Splitting {
    Groups on;
    float p, beta, kappa;
    int iterations;
    bool normalize;
};

// GPTQ's loop over the columns first … last of a block that ends at `stop`; see arrondi.rounding.gptq. A "row" here is one
// column of the weight, `m` numbers long: the weight before the visit, the difference to the rounded one after.
struct Sweep {
    int64_t m, first, last, stop;
    int qmin, qmax;
    float* rows;              // (n, m)
    float* owed;              // of column `first` and on, (…, m); becomes the residual
    const float* factor;      // (n, n)
    int64_t ld;
    uint8_t* codes;           // (n, m)
    const int64_t* places;    // row of `codes` for each column
    const int64_t* groups;    // group of each column
    const float* scale;       // (groups, m)
    const float* zero;        // the same or null
    const float* offset;      // the same or null
};
constexpr int64_t kSweepRows = 64;  // of the weight at a time

struct Quantizers {
    bool (*round)(const Rounding&, int64_t first, int64_t last, uint8_t* scratch);
    void (*pack)(const Packing&, int64_t first, int64_t last);
    void (*restore)(const Restoring&, int64_t first, int64_t last);
    bool (*search)(const Search&, int64_t first, int64_t last, uint8_t* scratch);
    bool (*split)(const Splitting&, int64_t first, int64_t last, uint8_t* scratch);
    bool (*superblocks)(const Superblocks&, int64_t first, int64_t last, uint8_t* scratch);  // batches of groups
    // Rows of the weight from `row` on, `kSweepRows` at most.
    void (*sweep)(const Sweep&, int64_t row, uint8_t* scratch);
    void (*search_ring)(const Rings&, int64_t ring, const RingScratch&);
};

// The drivers: the same over all rows, on at most `threads` threads.
bool round_groups(const Rounding& r, int threads);
void pack_rows(const Packing& p, int threads);
void restore(const Restoring& r, int threads);
bool search_grids(const Search& s, int threads);
bool split_groups(const Splitting& s, int threads);
bool search_superblocks(const Superblocks& s, int threads);
bool sweep(const Sweep& s, int threads);  // false: no memory, and some rows are done

}  // namespace arrondi
