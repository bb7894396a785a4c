// Products with states of a trellis, for one path: sixteen states at a time become four bytes each, whose sum is the value. See kernels.h.
//
// With x as words of 16 bits, bytes are added by twos and multiplied by twos, or where an instruction adds four of them, those of two
// columns are multiplied at once; with digits of eight bits one instruction does both.
#pragma once

#include "panel.h"

namespace arrondi {
namespace ARRONDI_PATH {

constexpr int kRingAhead = 2048;  // bytes of entries that are asked for before they are needed

// Vectors of sums of one row of a tile.
constexpr int ring_group(int rows) {
    const int most = kRingSums / rows;
    return most >= 4 ? 4 : most >= 2 ? 2 : 1;
}

// Where sixteen rows have their states, in the bytes of a block and the two that follow.
struct Window {
    Bytes order;
    Ints bits, mask, factor;

    explicit Window(const Weight& w) {
        const int each[2] = {w.ring_bits[0], w.ring_bits[1]};
        alignas(64) uint8_t bytes[64];
        alignas(64) int32_t shift[16];
        for (int row = kBlock - 1, at = 0; row >= 0; at += each[row % 2], row--) {
            shift[row] = at % 8;
            for (int i = 0; i < 4; i++)
                bytes[4 * row + i] = static_cast<uint8_t>(narrow(w) ? at + (i < 2 ? 8 * i : 0) : at / 8 + i);
        }
        order = load_bytes(bytes);
        bits = load_ints(shift);
        mask = splat(int32_t{(1 << w.state_bits) - 1});
        factor = splat(static_cast<int32_t>(kRingFactor));
    }

    // A block and what follows it are eight bytes at most, of which one instruction takes what every row needs.
    static bool narrow(const Weight& w) { return kFields && ring_block_bytes(w) <= 6; }

    template <bool kNarrow>
    inline Bytes products(const uint8_t* p) const {
        Ints states;
        if constexpr (kNarrow)
            states = lanes_of(fields(p, order));
        else
            states = shift_right_each(lanes_of(look_up(repeat16(p), order)), bits);
        return bytes_of(mul(and_ints(states, mask), factor));
    }
};

// Sixteen rows of a column.
inline const uint8_t* ring_at(const Weight& w, int block, int column) {
    const uint8_t* slab = w.codes + block / kSlab * ring_slab_bytes(w);
    if (w.squares)
        return slab + static_cast<int64_t>(column / kBlock * kSlab + block % kSlab) * ring_square_bytes(w) +
               (kBlock - 1 - column % kBlock) * ring_block_bytes(w);
    return slab + static_cast<int64_t>(column) * ring_entry(w) + (kSlab - 1 - block % kSlab) * ring_block_bytes(w);
}

// How far it is from there to the next column, to that behind sixteen of them beside this step, to the block below; and how far
// what is asked for from memory moves with each column.
struct RingSteps {
    int64_t column, turn, block, ahead;

    explicit RingSteps(const Weight& w) {
        const int64_t bytes = ring_block_bytes(w), square = ring_square_bytes(w);
        column = w.squares ? -bytes : ring_entry(w);
        turn = w.squares ? kBlock * bytes + kSlab * square : 0;
        block = w.squares ? square : -bytes;
        ahead = w.squares ? kSlab * square / kBlock : column;
    }
};

// sum[row][block] += states · digits over some columns, the first at a multiple of sixteen. `kDigits` 0: words. `kAsk`: whether entries come from memory.
template <int kRowsHere, int kDigits, int kGroup, bool kNarrow, bool kAsk>
inline void ring_columns(const Weight& w, const Window& window, const uint8_t* entry, const uint8_t* x, int columns,
                         Ints (*sums)[kGroup]) {
    const RingSteps steps(w);
    const uint8_t* ahead = entry + kRingAhead;
    Ints sum[kRowsHere][kGroup];
#pragma GCC unroll 8
    for (int r = 0; r < kRowsHere; r++)
#pragma GCC unroll 4
        for (int g = 0; g < kGroup; g++) sum[r][g] = sums[r][g];
    const auto column = [&](int j) {
        Bytes digit[kRowsHere];
#pragma GCC unroll 8
        for (int r = 0; r < kRowsHere; r++) {
            // Words of the columns 0 and 2 of four lie side by side, and before those of 1 and 3.
            if constexpr (kDigits == 0)
                digit[r] = repeat2(x + 4 * (r + j % 2 * kRowsHere) + j / 2 * 2);
            else
                digit[r] = splat_byte(static_cast<int8_t>(x[4 * r + j]));
        }
#pragma GCC unroll 4
        for (int g = 0; g < kGroup; g++) {
            Bytes u = window.template products<kNarrow>(entry + g * steps.block);
            if constexpr (kDigits == 0) u = add_pairs(u);
#pragma GCC unroll 8
            for (int r = 0; r < kRowsHere; r++)
                sum[r][g] = kDigits == 0 ? dot_words(sum[r][g], u, digit[r]) : dot8(sum[r][g], u, digit[r]);
        }
        if constexpr (kAsk) {
            __builtin_prefetch(ahead);
            ahead += steps.ahead;
        }
        entry += steps.column;
    };
    // Two columns whose words lie side by side, at once: their sums share a multiplication.
    const auto columns_of_pair = [&](const uint8_t* low, int pair) {
        const uint8_t* high = low + 2 * steps.column;
        Bytes digit[kRowsHere];
#pragma GCC unroll 8
        for (int r = 0; r < kRowsHere; r++) digit[r] = repeat4(x + 4 * (r + pair * kRowsHere));
#pragma GCC unroll 4
        for (int g = 0; g < kGroup; g++) {
            const int64_t at = g * steps.block;
            const Bytes u = add_fours(window.template products<kNarrow>(low + at), window.template products<kNarrow>(high + at));
#pragma GCC unroll 8
            for (int r = 0; r < kRowsHere; r++) sum[r][g] = dot_words(sum[r][g], u, digit[r]);
        }
    };
    int c = 0;
    for (; c + 4 <= columns; c += 4, x += (kDigits == 0 ? 8 : 4) * kRowsHere) {
        if constexpr (kDigits == 0 && kFours) {
            columns_of_pair(entry, 0);
            columns_of_pair(entry + steps.column, 1);
            if constexpr (kAsk)
                for (int j = 0; j < 4; j++, ahead += steps.ahead) __builtin_prefetch(ahead);
            entry += 4 * steps.column;
        } else {
            column(0);
            column(1);
            column(2);
            column(3);
        }
        if (c % kBlock == kBlock - 4) entry += steps.turn;
    }
    for (int j = 0; c < columns; c++, j++) column(j);
#pragma GCC unroll 8
    for (int r = 0; r < kRowsHere; r++)
#pragma GCC unroll 4
        for (int g = 0; g < kGroup; g++) sums[r][g] = sum[r][g];
}

template <int kRowsHere, int kDigits, bool kNarrow>
inline void ring_blocks(const Product& p, int tile, int first, int last) {
    constexpr bool kWord = kDigits == 0;
    constexpr int kOfToken = kWord ? 1 : kDigits, kTokens = kRowsHere / kOfToken, kGroup = ring_group(kRowsHere);
    const Weight& w = p.weight;
    const Window window(w);
    const bool whole = whole_row<kOfToken>(p);
    Floats total[kSlab][kTokens];
    Ints sum[kSlab / kGroup][kRowsHere][kGroup];
    for (int b = 0; b < kSlab; b++)
        for (int t = 0; t < kTokens; t++) total[b][t] = zero_floats();
    for (int s = 0; s < p.spans; s++) {
        const int start = s * p.span, end = start + p.span < w.k ? start + p.span : w.k;
        const uint8_t* x = p.tiles + tile * p.tile_bytes + static_cast<int64_t>(start) / 4 * (kWord ? 8 : 4) * kRowsHere;
        const int32_t* digit_sum = sums_of(p, tile, s);
        for (int block = first; block < last; block += kGroup) {
            auto& mine = sum[(block - first) / kGroup];
            for (int r = 0; r < kRowsHere; r++) {
                const Ints fresh = splat(-digit_sum[r] * w.zero_all);
                for (int g = 0; g < kGroup; g++) mine[r][g] = whole && s > 0 ? add(mine[r][g], fresh) : fresh;
            }
            const auto columns = block == first ? ring_columns<kRowsHere, kDigits, kGroup, kNarrow, true>
                                                : ring_columns<kRowsHere, kDigits, kGroup, kNarrow, false>;
            columns(w, window, ring_at(w, block, start), x, end - start, mine);
            if (p.integers || (whole && s + 1 < p.spans)) continue;
            for (int g = 0; g < kGroup && block + g < last; g++) {
                Ints of_block[kRowsHere];
                for (int r = 0; r < kRowsHere; r++) of_block[r] = mine[r][g];
                const Floats scale = group_at(w, block + g, 0).scale;
                const float* token_scale = scales_of(p, tile, s);
                for (int t = 0; t < kTokens; t++) {
                    const Floats by = token_scale == nullptr ? scale : mul(scale, splat(token_scale[t]));
                    Floats& all = total[block - first + g][t];
                    all = fma(value_of<kOfToken>(of_block + t * kOfToken), by, all);
                }
            }
        }
    }
    for (int block = first; block < last; block++)
        for (int t = 0; t < kTokens; t++) {
            const int token = tile * p.tokens + t, at = block - first;
            if (p.integers) {
                store_integers(p, token, block, sum[at / kGroup][t][at % kGroup]);
                continue;
            }
            if (by_token(p)) total[at][t] = mul(total[at][t], splat(scales_of(p, tile)[t]));
            store_result(p, token, block, total[at][t]);
        }
}

// The values of sixteen rows of one column.
template <bool kNarrow>
inline Ints ring_numbers(const Window& window, const uint8_t* p) {
    return add_four(splat(-kRingMiddle), window.template products<kNarrow>(p));
}

// The same with x as float32, a block at a time.
template <int kRowsHere, bool kNarrow>
inline void ring_blocks_floats(const Product& p, int tile, int first, int last) {
    const Weight& w = p.weight;
    const Window window(w);
    const RingSteps steps(w);
    Floats total[kSlab][kRowsHere];
    for (int b = 0; b < kSlab; b++)
        for (int r = 0; r < kRowsHere; r++) total[b][r] = zero_floats();
    for (int start = 0; start < w.k; start += p.span) {
        const int end = start + p.span < w.k ? start + p.span : w.k;
        for (int block = first; block < last; block++) {
            const uint8_t* entry = ring_at(w, block, start);
            const float* x = reinterpret_cast<const float*>(p.tiles + tile * p.tile_bytes) + static_cast<int64_t>(start) * kRowsHere;
            Floats sum[kRowsHere];
            for (int r = 0; r < kRowsHere; r++) sum[r] = zero_floats();
            for (int c = start; c < end; c++, entry += steps.column, x += kRowsHere) {
                if (block == first) __builtin_prefetch(entry + kRingAhead);
                const Floats v = to_floats(ring_numbers<kNarrow>(window, entry));
                for (int r = 0; r < kRowsHere; r++) sum[r] = fma(v, splat(x[r]), sum[r]);
                if (c % kBlock == kBlock - 1) entry += steps.turn;
            }
            for (int r = 0; r < kRowsHere; r++) total[block - first][r] = add(total[block - first][r], sum[r]);
        }
    }
    for (int block = first; block < last; block++) {
        const Floats scale = group_at(w, block, 0).scale;
        for (int r = 0; r < kRowsHere; r++) store_result(p, tile * p.tokens + r, block, mul(total[block - first][r], scale));
    }
}

template <bool kNarrow>
inline void ring_tile(const Product& p, int tile, int first, int last) {
    const int count = p.m - tile * p.tokens < p.tokens ? p.m - tile * p.tokens : p.tokens;
    if (p.words) switch (count) {
            case 1: return ring_blocks<1, 0, kNarrow>(p, tile, first, last);
            case 2: return ring_blocks<2, 0, kNarrow>(p, tile, first, last);
            case 3: return ring_blocks<3, 0, kNarrow>(p, tile, first, last);
            default: return ring_blocks<4, 0, kNarrow>(p, tile, first, last);
        }
    if (p.digits == 3) return ring_blocks<3, 3, kNarrow>(p, tile, first, last);
    switch (count) {
        case 1: return ring_blocks_floats<1, kNarrow>(p, tile, first, last);
        case 2: return ring_blocks_floats<2, kNarrow>(p, tile, first, last);
        case 3: return ring_blocks_floats<3, kNarrow>(p, tile, first, last);
        default: return ring_blocks_floats<4, kNarrow>(p, tile, first, last);
    }
}

// Blocks first … last, `first` a multiple of four; as many of a slab as there are at once, so that its entries come from memory once.
inline void stream_ring(const Product& p, int first, int last) {
    const int tiles = (p.m + p.tokens - 1) / p.tokens;
    for (int block = first, stop; block < last; block = stop) {
        stop = (block / kSlab + 1) * kSlab < last ? (block / kSlab + 1) * kSlab : last;
        for (int tile = 0; tile < tiles; tile++)
            Window::narrow(p.weight) ? ring_tile<kFields>(p, tile, block, stop) : ring_tile<false>(p, tile, block, stop);
    }
}

// Columns of one block of a panel: words of columns 0 and 2, 1 and 3 of every four, or float32 or pairs of bfloat16 with the scale in them.
template <bool kNarrow>
inline void decode_ring_block(const Product& p, const Window& window, const Panel& panel, int block, uint8_t* out) {
    const Weight& w = p.weight;
    const int64_t stride = RingSteps(w).column;
    const Floats scale = group_at(w, block, 0).scale;
    const Ints low = splat(int32_t{0xffff});
    for (int c = 0; c < panel.columns; c += 4) {
        const uint8_t* entry = ring_at(w, block, panel.column + c);
        Ints v[4];
        for (int j = 0; j < 4; j++)
            v[j] = panel.column + c + j < w.k ? ring_numbers<kNarrow>(window, entry + j * stride) : zero_ints();
        if (p.words) {
            for (int j = 0; j < 2; j++, out += 64) store_bytes(out, bytes_of(or_ints(and_ints(v[j], low), shift_left<16>(v[j + 2]))));
        } else if (p.pairs) {
            for (int j = 0; j < 4; j += 2, out += 64)
                store_bytes(out, bytes_of(or_ints(bf16_bits(mul(to_floats(v[j]), scale)), shift_left<16>(bf16_bits(mul(to_floats(v[j + 1]), scale))))));
        } else {
            for (int j = 0; j < 4; j++, out += 64) store_bytes(out, bytes_of(as_ints(mul(to_floats(v[j]), scale))));
        }
    }
}

inline void decode_ring(const Product& p, Panel& panel) {
    const Window window(p.weight);
    panel.from = panel.units;
    panel.stride = static_cast<int64_t>(panel.columns) * (p.words || p.pairs ? 32 : 64) + kStagger;
    for (int v = 0; v < kVectors; v++) {
        uint8_t* out = panel.units + v * panel.stride;
        if (v >= panel.blocks)
            __builtin_memset(out, 0, static_cast<size_t>(panel.stride - kStagger));
        else if (Window::narrow(p.weight))
            decode_ring_block<kFields>(p, window, panel, panel.first + v, out);
        else
            decode_ring_block<false>(p, window, panel, panel.first + v, out);
    }
}

inline int ones_of_row(uint32_t bits) {
    int ones = 0;
    for (; bits != 0; bits &= bits - 1) ones++;
    return ones;
}

// A row is turned back by the signs of a row of its Hadamard matrix: the sum over the matrix's rows of the weight, each with its scale.
template <bool kNarrow>
inline void ring_row_of(const RingRows& job, int64_t i) {
    const Weight& w = job.weight;
    const Window window(w);
    const int run = 1 << w.turn.row_shift, id = static_cast<int>(job.ids[i]), first = id / run * run;
    const int from = first / kBlock, to = (first + run - 1) / kBlock + 1;
    const float unit = static_cast<float>(1.0 / __builtin_sqrt(static_cast<double>(run)));
    Floats factors[kSlab];
    for (int block = from; block < to; block++) {
        float each[kBlock];
        store_floats(each, group_at(w, block, 0).scale);
        for (int lane = 0; lane < kBlock; lane++) {
            const int row = block * kBlock + lane - first;
            const bool there = row >= 0 && row < run;
            each[lane] = !there ? 0.0f : each[lane] * (ones_of_row(static_cast<uint32_t>(row & (id - first))) % 2 == 0 ? unit : -unit);
        }
        factors[block - from] = load_floats(each);
    }
    float* y = job.y + i * w.k;
    const auto column = [&](int c) {
        Floats sum = zero_floats();
        for (int block = from; block < to; block++)
            sum = fma(to_floats(ring_numbers<kNarrow>(window, ring_at(w, block, c))), factors[block - from], sum);
        return sum;
    };
    int c = 0;
    for (; c + 4 <= w.k; c += 4) store_sums(y + c, column(c), column(c + 1), column(c + 2), column(c + 3));
    for (; c < w.k; c++) y[c] = sum(column(c));
}

inline void ring_row(const RingRows& job, int64_t i) {
    Window::narrow(job.weight) ? ring_row_of<kFields>(job, i) : ring_row_of<false>(job, i);
}

}  // namespace ARRONDI_PATH
}  // namespace arrondi
