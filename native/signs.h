// Signs of sixteen rows against signs of a token, and reading memory, for one path. Included by path_*.cpp after
// hadamard.h.
#pragma once

#include "hadamard.h"
#include "transforms.h"

namespace arrondi {
namespace ARRONDI_PATH {

inline void pack_signs(const SignPacking& p, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++)
        for (int word = 0; word < p.words; word++) {
            const int64_t at = row * p.ldx + static_cast<int64_t>(word) * 32, end = row * p.ldx + p.k;
            const uint32_t low = positive(load_some(p.x, p.type, at, end));
            const uint32_t high = at + 16 < end ? positive(load_some(p.x, p.type, at + 16, end)) : 0;
            p.out[row * p.words + word] = static_cast<int32_t>(low | high << 16);
        }
}

inline void store_dots(const Signs& p, int token, int block, Ints dots) {
    const int column = block * kBlock, count = p.n - column < kBlock ? p.n - column : kBlock;
    const int64_t at = static_cast<int64_t>(token) * p.n + column;
    alignas(64) uint8_t lanes[64];
    size_t size = 4;
    if (p.integers) {
        store_ints(reinterpret_cast<int32_t*>(lanes), dots);
    } else {
        Floats v = to_floats(dots);
        if (p.token_scale != nullptr) v = mul(v, splat(p.token_scale[token]));
        if (p.scale != nullptr) v = mul(v, load_some(p.scale, Type::f32, column, p.n));
        if (p.y_type == Type::bf16) {
            store_as<Type::bf16>(lanes, 0, v);
            size = 2;
        } else {
            store_as<Type::f32>(lanes, 0, v);
        }
    }
    __builtin_memcpy(static_cast<uint8_t*>(p.y) + at * size, lanes, count * size);
}

template <int kTokens>
inline void sign_tile(const Signs& p, int token, int block) {
    const int32_t* x = p.x + static_cast<int64_t>(token) * p.words;
    const int32_t* w = p.w + static_cast<int64_t>(block) * p.words * kBlock;
    Ints different[kTokens];
    for (int i = 0; i < kTokens; i++) different[i] = zero_ints();
    for (int word = 0; word < p.words; word++) {
        const Ints rows = load_ints(w + static_cast<int64_t>(word) * kBlock);
        for (int i = 0; i < kTokens; i++) {
            const Ints token_signs = splat(x[static_cast<int64_t>(i) * p.words + word]);
            different[i] = add(different[i], count_ones(xor_ints(rows, token_signs)));
        }
    }
    for (int i = 0; i < kTokens; i++)
        store_dots(p, token + i, block, sub(splat(int32_t{p.k}), shift_left<1>(different[i])));
}

inline void multiply_signs(const Signs& p, int first, int last) {
    for (int block = first; block < last; block++) {
        int token = 0;
        for (; token + 6 <= p.m; token += 6) sign_tile<6>(p, token, block);
        for (; token + 2 <= p.m; token += 2) sign_tile<2>(p, token, block);
        if (token < p.m) sign_tile<1>(p, token, block);
    }
}

inline int32_t read(const uint8_t* p, int64_t vectors) {
    Ints a = zero_ints(), b = a, c = a, d = a;
    int64_t i = 0;
    for (; i + 4 <= vectors; i += 4, p += 256) {
        a = xor_ints(a, lanes_of(load_bytes(p)));
        b = xor_ints(b, lanes_of(load_bytes(p + 64)));
        c = xor_ints(c, lanes_of(load_bytes(p + 128)));
        d = xor_ints(d, lanes_of(load_bytes(p + 192)));
    }
    for (; i < vectors; i++, p += 64) a = xor_ints(a, lanes_of(load_bytes(p)));
    int32_t lanes[16], all = 0;
    store_ints(lanes, xor_ints(xor_ints(a, b), xor_ints(c, d)));
    for (int lane : lanes) all ^= lane;
    return all;
}

}  // namespace ARRONDI_PATH
}  // namespace arrondi
