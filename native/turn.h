// Weights in another basis, for one path: x is turned before it is packed, and results are turned back; and what becomes of results at last.
#pragma once

#include "hadamard.h"
#include "powers.h"

namespace arrondi {
namespace ARRONDI_PATH {

// v H in place, in blocks of 1 << shift numbers.
inline void turn_blocks(float* v, int count, int shift) {
    if (shift == 0) return;
    Hadamard t{};
    t.rows = count >> shift;
    t.base = 1;
    t.shift = shift;
    t.scale = static_cast<float>(1.0 / __builtin_sqrt(static_cast<double>(int64_t{1} << shift)));
    t.x = t.y = v;
    t.ldx = t.ldy = int64_t{1} << shift;
    t.type = Type::f32;
    t.together = shift >= 4 ? 1 : 16 >> shift;
    // Every way through a block ends where it began, so a block is its own buffer.
    for (int64_t row = 0; row < t.rows; row += t.together) butterflies(t, row / t.together, v + (row << shift));
}

// x · signs · H, in memory of the tile.
inline Row turned(const Product& p, int tile, const Row& row) {
    const int k = p.weight.k, padded = (k + 15) / 16 * 16;
    float* out = p.changed + static_cast<int64_t>(tile) * padded;
    for (int c = 0; c < k; c += 16)
        store_floats(out + c, mul(load_some(row.x, row.type, row.at + c, row.at + k), load_some(p.weight.turn.columns, Type::f32, c, k)));
    turn_blocks(out, k, p.weight.turn.column_shift);
    return {out, Type::f32, 0};
}

// A matrix unit multiplies whole tiles: tokens that are not there have sums and scales of zero.
inline void blank_tokens(const Product& p, int tile, int count) {
    const int rows = rows_of_token(p), spans = by_token(p) ? 1 : p.spans;
    for (int s = 0; s < p.spans && p.digits > 0; s++) {
        const int64_t at = (static_cast<int64_t>(tile) * p.spans + s) * kRowsMost;
        for (int r = count * rows; r < kRowsMost; r++) p.tile_sum[at + r] = 0;
    }
    for (int s = 0; s < spans && p.digits > 0; s++)
        for (int t = count; t < kRowsMost; t++) p.tile_scale[(static_cast<int64_t>(tile) * spans + s) * kRowsMost + t] = 0.0f;
}

// One tile of activations in the form that p.digits asks for.
inline void pack_tile(const Product& p, int tile) {
    const int first = tile * p.tokens, count = p.m - first < p.tokens ? p.m - first : p.tokens;
    const Cells cells = {p.tiles + tile * p.tile_bytes, count * rows_of_token(p), p.chunk};
    for (int t = 0; t < count; t++) {
        Row row = {p.x, p.x_type, (first + t) * p.ldx};
        if (p.norm != nullptr) row = normed(p, tile, row);
        if (p.weight.turn.columns != nullptr) row = turned(p, tile, row);
        if (p.digits == 0)
            pack_floats(p, row, t, cells);
        else
            pack_digits(p, row, tile, t, cells);
    }
    if (p.chunk != 0) blank_tokens(p, tile, count);
}

// Both gates are g · sigmoid(z), and e^-z is a power of two.
inline Floats gated(Gate gate, Floats g, Floats u) {
    Floats z = g;
    if (gate == Gate::gelu_tanh) z = mul(fma(mul(mul(g, g), g), splat(0.044715f), g), splat(1.59576912f));
    const Floats power = min(max(mul(z, splat(-1.44269504f)), splat(-125.0f)), splat(125.0f));
    return mul(div(g, add(splat(1.0f), exp2_of(power))), u);
}

// results H · signs + bias, in place.
inline void turn_back(const Product& p, float* results) {
    const int n = p.weight.n;
    turn_blocks(results, n, p.weight.turn.row_shift);
    for (int c = 0; c < n; c += 16) {
        Floats v = mul(load_some(results, Type::f32, c, n), load_some(p.weight.turn.rows, Type::f32, c, n));
        if (p.bias != nullptr) v = add(v, load_some(p.bias, Type::f32, c, n));
        store_some(results, Type::f32, c, n - c < 16 ? n - c : 16, v);
    }
}

// y[token] of n results: turned back; then gate(first half) · second half, or what is to be added.
inline void finish_token(const Product& p, int token, float* results) {
    if (p.weight.turn.rows != nullptr) turn_back(p, results);
    const bool gate = p.gate != Gate::none;
    const int count = gate ? p.weight.n / 2 : p.weight.n;
    for (int c = 0; c < count; c += 16) {
        const int some = count - c < 16 ? count - c : 16;
        Floats v = load_some(results, Type::f32, c, count);
        if (gate) v = gated(p.gate, v, load_some(results + count, Type::f32, c, count));
        if (p.residual != nullptr) {
            const int64_t at = token * p.ldr + c;
            v = add(v, load_some(p.residual, p.y_type, at, at + some));
        }
        store_some(p.y, p.y_type, token * p.ldy + c, some, v);
    }
}

}  // namespace ARRONDI_PATH
}  // namespace arrondi
