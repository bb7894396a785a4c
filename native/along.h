// Attention of one token to keys and values along principal directions. Keys of four tokens at a time become numbers in the core's own
// cache, are turned to their positions and meet every query that shares the head; values stay sums of codes.
#pragma once

#include "cached.h"
#include "directions.h"

namespace arrondi {
namespace ARRONDI_PATH {

constexpr int kKeys = 4;                            // tokens whose keys are made at once
constexpr int kLines = kVectors >= 4 ? 4 : 1;       // registers of channels of each
constexpr int kSharing = kVectors >= 4 ? 4 : 2;     // queries that use a code of a value once it is decoded

// The codes of a token as numbers, in the order that `Directions::unpacked` says.
inline void unpack_token(const uint8_t* p, const Directions& s, float* to) {
    for (int c = 0; c < s.eights; c += 16, to += 16) store_floats(to, to_floats(widen_bytes(p + c)));
    p += s.eights;
    for (int c = 0; c < s.fours; c += 16, to += 32) {
        const Ints bytes = widen_bytes(p + c);
        store_floats(to, code_of<4, 0>(bytes));
        store_floats(to + 16, code_of<4, 1>(bytes));
    }
    p += s.fours;
    for (int c = 0; c < s.twos; c += 16, to += 64) {
        const Ints bytes = widen_bytes(p + c);
        store_floats(to, code_of<2, 0>(bytes));
        store_floats(to + 16, code_of<2, 1>(bytes));
        store_floats(to + 32, code_of<2, 2>(bytes));
        store_floats(to + 48, code_of<2, 3>(bytes));
    }
}

// Channels c … c + 16 kWide of the keys of four tokens, not turned yet.
template <int kWide>
inline void make_keys(const AlongDirections& a, const float* rows, const float* base, const float (*codes)[kWidestDirections], int c,
                      float (*keys)[kWidestDirections]) {
    Floats sum[kKeys][kWide];
    for (int t = 0; t < kKeys; t++)
        for (int v = 0; v < kWide; v++) sum[t][v] = load_floats(base + c + 16 * v);
    const int64_t width = a.width();
    for (int i = 0; i < a.count; i++) {
        Floats row[kWide];
        for (int v = 0; v < kWide; v++) row[v] = load_floats(rows + i * width + c + 16 * v);
        for (int t = 0; t < kKeys; t++) {
            const Floats code = splat(codes[t][a.places[i]]);
            for (int v = 0; v < kWide; v++) sum[t][v] = fma(code, row[v], sum[t][v]);
        }
    }
    for (int t = 0; t < kKeys; t++)
        for (int v = 0; v < kWide; v++) store_floats(keys[t] + c + 16 * v, sum[t][v]);
}

// A key to its position: the angle is that of the block's first position and the rest, so no table is longer than the text / 32.
inline void turn_key(const AlongDirections& a, int64_t position, float* key) {
    const float* start = a.starts + position / kTurnBlock * 2 * a.half;
    const float* step = a.steps + position % kTurnBlock * 2 * a.half;
    for (int c = 0; c < a.half; c += 16) {
        const Floats cos0 = load_floats(start + c), sin0 = load_floats(start + a.half + c);
        const Floats cos1 = load_floats(step + c), sin1 = load_floats(step + a.half + c);
        const Floats cosine = sub(mul(cos0, cos1), mul(sin0, sin1)), sine = fma(sin0, cos1, mul(cos0, sin1));
        const Floats one = load_floats(key + c), two = load_floats(key + a.half + c);
        store_floats(key + c, sub(mul(one, cosine), mul(two, sine)));
        store_floats(key + a.half + c, fma(two, cosine, mul(one, sine)));
    }
}

inline void scores_along(const AlongDirections& a, int head, int begin, int end, float* scores) {
    const int shared = a.heads / a.key_heads, width = a.width(), bytes = a.keys.bytes();
    const uint8_t* packed = a.keys.codes + head * a.keys.head_stride;
    const float* rows = a.rows + static_cast<int64_t>(head) * a.count * width;
    const float* base = a.base + static_cast<int64_t>(head) * width;
    alignas(64) float codes[kKeys][kWidestDirections], keys[kKeys][kWidestDirections];
    for (int t = begin; t < end; t += kKeys) {
        const int last = end - 1;
        for (int j = 0; j < kKeys; j++)
            unpack_token(packed + static_cast<int64_t>(t + j < last ? t + j : last) * bytes, a.keys, codes[j]);
        int c = 0;
        for (; c + 16 * kLines <= width; c += 16 * kLines) make_keys<kLines>(a, rows, base, codes, c, keys);
        for (; c < width; c += 16) make_keys<1>(a, rows, base, codes, c, keys);
        if (a.half > 0)
            for (int j = 0; j < kKeys; j++) turn_key(a, a.first + (t + j < last ? t + j : last), keys[j]);
        for (int q = 0; q < shared; q++) {
            const float* query = a.query + static_cast<int64_t>(head * shared + q) * width;
            Floats sum[kKeys];
            for (int j = 0; j < kKeys; j++) sum[j] = zero_floats();
            for (c = 0; c < width; c += 16) {
                const Floats x = load_floats(query + c);
                for (int j = 0; j < kKeys; j++) sum[j] = fma(x, load_floats(keys[j] + c), sum[j]);
            }
            store_sums(scores + q * a.apart() + (t - begin), sum[0], sum[1], sum[2], sum[3]);  // what is behind the end is written over
        }
    }
}

// sum[q] += Σ share · code of sixteen bytes of every token, for queries in a row.
template <int kBits, int kQueries>
inline void add_values(const uint8_t* p, int bytes, int count, const float* share, int64_t apart, float* sums, int64_t size) {
    constexpr int kPer = 8 / kBits;
    Floats sum[kQueries][kPer];
    for (int q = 0; q < kQueries; q++)
        for (int i = 0; i < kPer; i++) sum[q][i] = zero_floats();
    for (int t = 0; t < count; t++, p += bytes) {
        const Ints row = widen_bytes(p);
        Floats code[kPer];
        code[0] = code_of<kBits, 0>(row);
        if constexpr (kPer > 1) code[1] = code_of<kBits, 1 % kPer>(row);
        if constexpr (kPer > 2) code[2] = code_of<kBits, 2 % kPer>(row), code[3] = code_of<kBits, 3 % kPer>(row);
        for (int q = 0; q < kQueries; q++) {
            const Floats weight = splat(share[q * apart + t]);
            for (int i = 0; i < kPer; i++) sum[q][i] = fma(weight, code[i], sum[q][i]);
        }
    }
    for (int q = 0; q < kQueries; q++)
        for (int i = 0; i < kPer; i++) store_floats(sums + q * size + 16 * i, sum[q][i]);
}

template <int kQueries>
inline void values_along(const Directions& s, const uint8_t* p, int count, const float* share, int64_t apart, float* sums) {
    const int bytes = s.bytes();
    const int64_t size = s.unpacked();
    for (int c = 0; c < s.eights; c += 16, sums += 16) add_values<8, kQueries>(p + c, bytes, count, share, apart, sums, size);
    p += s.eights;
    for (int c = 0; c < s.fours; c += 16, sums += 32) add_values<4, kQueries>(p + c, bytes, count, share, apart, sums, size);
    p += s.fours;
    for (int c = 0; c < s.twos; c += 16, sums += 64) add_values<2, kQueries>(p + c, bytes, count, share, apart, sums, size);
}

// One part of the text for a head of keys, with the queries that share it.
inline void attend_along(const AlongDirections& a, int head, int part, float* scores) {
    const int shared = a.heads / a.key_heads, first = head * shared, begin = part * a.each();
    const int end = begin + a.each() < a.tokens ? begin + a.each() : a.tokens;
    const int64_t apart = a.apart(), size = a.values.unpacked(), at = static_cast<int64_t>(part) * a.heads + first;
    float* sums = a.sums + at * size;
    if (begin >= end) {  // what divides unevenly
        for (int q = 0; q < shared; q++) a.tops[at + q] = -__builtin_inff(), a.totals[at + q] = 0.0f;
        for (int64_t i = 0; i < shared * size; i++) sums[i] = 0.0f;
        return;
    }
    scores_along(a, head, begin, end, scores);
    for (int q = 0; q < shared; q++) {
        a.tops[at + q] = top_of(scores + q * apart, end - begin);
        a.totals[at + q] = shares_of(scores + q * apart, end - begin);
    }
    const uint8_t* values = a.values.codes + head * a.values.head_stride + static_cast<int64_t>(begin) * a.values.bytes();
    int q = 0;
    for (; q + kSharing <= shared; q += kSharing)
        values_along<kSharing>(a.values, values, end - begin, scores + q * apart, apart, sums + q * size);
    for (; q < shared; q++) values_along<1>(a.values, values, end - begin, scores + q * apart, apart, sums + q * size);
}

}  // namespace ARRONDI_PATH
}  // namespace arrondi
