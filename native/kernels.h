// What crosses from the module to the compiled paths: plain structs, and one table of functions for each path.
//
// The packed weight. Rows of the weight (outputs, N) are taken sixteen at a time: a block. Along K a block is a sequence of
// steps; a step holds `step_quads(kind)` quads of four columns for sixteen rows, as planes of bits: each vector of 64 bytes
// has a fixed number of bits of several quads in every byte. Planes of 4, 2 and 1 bits make up every width, so one shift and
// one mask give 64 codes, with no bits that cross a byte. Missing rows and columns have code 0 and meet activations of zero.
//
// Where every row has a table, sixteen columns of one row lie side by side, as a look-up of bytes wants them: of each sixteen
// columns, vector v has rows v, 4 + v, 8 + v and 12 + v. Decoded, they change places to lie like all others.
//
//   codes   [blocks][steps][step_bytes(kind)]
//   tables  [blocks][4][bytes of an entry][4][16]: vector, byte, rows of the vector, entry
//   scale   [blocks][groups][16] in its own type, and offset as well; zero [blocks][groups][16] uint8
//   unit, offset_unit  [blocks][runs][16], where scales and offsets are counted: codes of a byte, times what some groups share
//
// States of a trellis (Kind::ring) are kept otherwise, for a state reaches beyond sixteen rows: eight blocks are a slab, and a slab
// has one entry for every column, a little-endian stream in which the code of the last row comes first and those before it follow, then
// sixteen bits of the rows before the slab. So the state of a row is the field that begins with its code.
//
//   codes   [slabs][[columns][ring_entry()], kRingPad bytes that may be read]
//
// Rings of squares, sixteen rows of sixteen columns, column by column, end where a block does. The stream of one begins with its last
// column, and after its first column the sixteen bits with which it began follow once more.
//
//   codes   [slabs][[columns / 16][8 blocks][ring_square_bytes()], kRingPad]
#pragma once

#include <cstddef>
#include <cstdint>

#include "quantizers.h"

namespace arrondi {

enum class Kind : int {
    u8,       // unsigned codes of 8 bits (7 bits too)
    u6,       // planes 4 + 2
    u5,       // planes 4 + 1
    u4,
    u3,       // planes 2 + 1
    u2,
    u1,       // one bit, decoded to 0 or 2
    trit5,    // five ternary digits in a byte: 1.6 bits
    table4,   // 4 bits, decoded to bytes by a table of sixteen
    wide_table4,  // the same with bytes above 127
    rows4,    // 4, 3 or 2 bits, decoded to bytes by a table of sixteen for every row
    rows3,
    rows2,
    float4,   // 4 bits, decoded to float32 by a table of sixteen
    float_rows4,  // 4, 3 or 2 bits, decoded to float32 by a table of sixteen for every row
    float_rows3,
    float_rows2,
    e4m3,     // one byte
    e5m2,     // one byte
    e3m2,     // planes 4 + 2
    e2m3,     // planes 4 + 2
    ring,     // states of a bit-shift trellis, whose value is a sum of bytes
};
constexpr int kKinds = 21;  // that lie in blocks: all but ring

// Kinds that meet activations as integers.
constexpr bool integer(Kind kind) { return kind <= Kind::rows2 || kind == Kind::ring; }

// Bytes of an entry of the tables of rows; 0: the rows have none.
constexpr int row_entry(Kind kind) {
    if (kind >= Kind::rows4 && kind <= Kind::rows2) return 1;
    return kind >= Kind::float_rows4 && kind <= Kind::float_rows2 ? 4 : 0;
}

// Codes decoded to bytes above 127.
constexpr bool wide(Kind kind) { return kind == Kind::u8 || kind == Kind::ring || kind == Kind::wide_table4 || row_entry(kind) == 1; }

// Codes decoded to bytes by one table of sixteen.
constexpr bool one_table(Kind kind) { return kind == Kind::table4 || kind == Kind::wide_table4; }

enum class Type : int { f32, bf16, f16 };

constexpr int size_of(Type type) { return type == Type::f32 ? 4 : 2; }

// How scales and offsets are kept: as numbers of their type; as codes of a byte each, or of half a byte each, the offset's above
// the scale's in one byte.
enum class Counted : int { no, i8, u8, halves };

// g · sigmoid(g); the approximation of GELU by tanh.
enum class Gate : int { none, silu, gelu_tanh };

constexpr int kBlock = 16;  // rows of the weight in a block

constexpr int step_quads(Kind kind) { return kind == Kind::trit5 ? 5 : 8; }

constexpr int step_bytes(Kind kind) {
    switch (kind) {
        case Kind::u8:
        case Kind::e4m3:
        case Kind::e5m2: return 512;
        case Kind::u6:
        case Kind::e3m2:
        case Kind::e2m3: return 384;
        case Kind::u5: return 320;
        case Kind::u4:
        case Kind::table4:
        case Kind::wide_table4:
        case Kind::rows4:
        case Kind::float4:
        case Kind::float_rows4: return 256;
        case Kind::u3:
        case Kind::rows3:
        case Kind::float_rows3: return 192;
        case Kind::u2:
        case Kind::rows2:
        case Kind::float_rows2: return 128;
        case Kind::u1: return 64;
        case Kind::trit5: return 64;
        case Kind::ring: return 0;  // it has no steps
    }
    return 0;
}

constexpr int kSlab = 8;            // blocks of a slab
constexpr int kRingPad = 16;        // bytes behind the last entry of a slab
constexpr int kRingMiddle = 510;    // what a sum of bytes is less to be a value
constexpr uint32_t kRingFactor = 0x83DCD12D;

// Columns: x is multiplied by signs and by Hadamard matrices before the product; rows: y afterwards, by matrices and then signs.
struct Turn {
    const float* columns;  // (k,) or null: neither is done
    const float* rows;     // (n,)
    int column_shift, row_shift;  // the matrices have 1 << shift rows
};

struct Weight {
    Kind kind;
    int n, k;          // rows, columns
    int group;         // columns under one scale; at least k if there is one for the row
    int groups;        // scales in a row
    int steps;         // of a block
    const uint8_t* codes;
    const void* scale;
    Type scale_type;   // of the units, where scales are counted
    const uint8_t* zero;   // null: every zero point is zero_all
    int zero_all;
    const void* offset;    // null: none, or counted in halves
    Type offset_type;      // of the units, where offsets are counted
    Counted counted;
    int run, runs;         // groups under one unit, a power of two; units in a row
    const void* unit;
    const void* offset_unit;  // null: there are no offsets
    uint8_t bytes[16];     // of table4 and wide_table4
    float floats[16];      // of float4
    const uint8_t* tables;  // of rows4 … and float_rows4 …
    int ring_bits[2];       // of ring: of the codes of even and of odd rows
    int state_bits;
    bool squares;           // of ring
    Turn turn;
};

inline bool has_offset(const Weight& w) { return w.counted == Counted::no ? w.offset != nullptr : w.offset_unit != nullptr; }

// Bytes of sixteen rows of one column, of a slab of it, and of a square.
inline int ring_block_bytes(const Weight& w) { return w.ring_bits[0] + w.ring_bits[1]; }
inline int ring_entry(const Weight& w) { return kSlab * ring_block_bytes(w) + 2; }
inline int ring_square_bytes(const Weight& w) { return kBlock * ring_block_bytes(w) + 2; }
inline int64_t ring_slab_bytes(const Weight& w) {
    return (w.squares ? static_cast<int64_t>(w.k / kBlock) * kSlab * ring_square_bytes(w) : static_cast<int64_t>(w.k) * ring_entry(w)) + kRingPad;
}

// How activations meet the codes.
//   floats   as float32 (or pairs of bfloat16 where a path has that product)
//   digits   as integers in base 256: 2 or 3 digits hold bfloat16 or float32 activations to 15 or 23 bits of the largest in
//            each span, which is as good as the type they came in
//   rounded  to the codes of a scheme, with one scale a token or for every `x_group` columns of it: 1 digit; 2 where the
//            grid has a zero point, for then code - zero point has nine bits. Or with a scale that is given (static), the same
//            for every token
struct Product {
    Weight weight;
    const void* x;     // (m, k), rows ldx elements apart
    Type x_type;
    int64_t ldx;
    int m;
    int digits;        // 0: floats
    bool rounded;
    int lowest, highest;  // rounded: the codes of x
    Type step_type;       // rounded: what the scale is rounded to
    int x_group;          // rounded: columns under one scale; 0: by token
    const float* x_scale;   // rounded: the scale of every token (one number); null: it follows from the token
    const int32_t* x_zero;  // its zero point (one number), with two digits
    void* y;           // (m, n), rows ldy elements apart; int32 with `integers`
    Type y_type;
    int64_t ldy;
    const float* bias;  // (n,) or null
    bool integers;      // y is the exact int32 sum; by token and one group only
    int threads;
    // Beforehand x becomes x / rms(x) · norm with rms² = mean(x²) + eps. Null: x stays.
    const float* norm;  // (k,)
    float eps;
    // Afterwards the first half of the results is the gate of the second half: y (m, n / 2) = gate(first) · second.
    Gate gate;
    // Added to y, in its type, rows ldr elements apart; null: nothing is. Not with a gate.
    const void* residual;
    int64_t ldr;
    // Made by product():
    int span;           // columns between two additions to the float sum; divides group, or is shorter than a row
    int spans;
    int x_span;         // columns of a token under one scale: some spans; by token without meaning
    bool pairs;         // floats as pairs of bfloat16
    bool words;         // one or two digits in one number of 16 bits
    int chunk;          // bytes of a row that a matrix unit takes at once; 0: none is used
    int panels;         // that meet a part of the activations one after another, while it is in cache
    int tokens;         // of one tile
    uint8_t* tiles;     // activations [tile][unit][row of the tile][4 bytes]; [tile][chunk][kRowsMost][bytes of a chunk] for a matrix unit
    int64_t tile_bytes;
    float* tile_scale;  // by token: [tile][kRowsMost]; else [tile][spans][kRowsMost]
    float* changed;     // a row of each tile, where x is normed or turned
    int32_t* tile_sum;  // sums of the digits, [tile][spans][kRowsMost]
};
constexpr int kRowsMost = 16;
// Longer sums of nine bits times eight may not fit int32.
constexpr int kZeroPointColumns = 32768;

// Columns that x and panels are filled up to with zeros, for a matrix unit takes whole chunks.
inline int whole_columns(const Product& p, int columns) {
    const int unit = p.chunk != 0 && p.pairs ? p.chunk / 2 : 1;
    return (columns + unit - 1) / unit * unit;
}

inline bool by_token(const Product& p) { return p.rounded && p.x_group == 0; }

// Rows of a tile that one token takes: a digit is a row like others.
inline int rows_of_token(const Product& p) { return p.digits == 0 || p.words ? 1 : p.digits; }

// Rows of a weight of states as numbers: y[i] is row ids[i] with its scale, its side of rows turned back and that of columns not.
struct RingRows {
    Weight weight;
    int64_t count;
    const int64_t* ids;
    float* y;  // (count, k)
    int threads;
};

struct Transforms;  // transforms.h
struct Tokens;      // tokens.h
struct Codes;       // codes.h
struct Training;    // training.h

struct Path {
    const char* name;
    int rows;            // of a tile of activations
    int vectors;         // blocks of a panel
    bool fast_dot;       // integer products beat float ones even with three digits
    bool bf16_dot;
    bool words;          // codes above 127 meet activations of 16 bits
    void (*pack_tile)(const Product&, int tile);
    // y[:, blocks first … last) for few rows: the weight is decoded in registers.
    void (*stream)(const Product&, int first, int last);
    // The same for many rows, `panels` times `vectors` blocks at most: decoded to panels, which all tiles then use.
    void (*panel)(const Product&, int first, int last, uint8_t* scratch);
    size_t (*panel_scratch)(const Product&);
    // `panel` on a matrix unit (see matrix.h); null where there is none.
    void (*matrix_panel)(const Product&, int first, int last, uint8_t* scratch);
    // y[token] from its n results, which may be overwritten: turned back, then gated or added to.
    void (*finish)(const Product&, int token, float* results);
    // Row `i` of what is asked for.
    void (*ring_row)(const RingRows&, int64_t i);
    Quantizers quantizers;
    const Transforms* transforms;
    const Tokens* tokens;
    const Codes* codes;
    const Training* training;
};

// The path in use: the best one that this CPU can run, or the one that the environment variable ARRONDI_CPU names.
const Path& path();
// Null if it was compiled and runs here, else a sentence that says why not.
const char* path_missing(const char* name);
// Whether products of bfloat16 are as fast as two of bytes: on Intel's CPUs, which do two of these at once and one of those, they
// are not.
bool pairs_pay();
// Every name, best first, ended by null.
const char* const* path_names();
void use_path(const char* name);

// Runs one product. Null, or a sentence that says what is wrong with the arguments.
const char* product(Product& p);
const char* ring_rows(const RingRows& job);

}  // namespace arrondi
