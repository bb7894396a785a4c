// Products with many rows: some columns of some blocks are decoded to a panel in cache, which all tiles of rows then use.
//
// Everything is a grid of units of four bytes: four int8 digits, two int16, two bfloat16 or one float32. A panel holds sixteen rows of
// the weight in a register of units, a tile one unit of each of its rows one after another; `Op` says what multiplying a
// register by a repeated unit means.
#pragma once

#include <algorithm>
#include <type_traits>

#include "spans.h"

namespace arrondi {
namespace ARRONDI_PATH {

struct IntegerOp {
    static constexpr int kColumns = 4;  // of K in a unit
    using Sum = Ints;
    static inline Sum step(Sum sum, Bytes w, Bytes x) { return dot7(sum, w, x); }
};
struct WideOp : IntegerOp {
    static inline Sum step(Sum sum, Bytes w, Bytes x) { return dot8(sum, w, x); }
};
struct WordOp : IntegerOp {
    static constexpr int kColumns = 2;
    static inline Sum step(Sum sum, Bytes w, Bytes x) { return dot_words(sum, w, x); }
};
// Part of a sum of integers, folded into it after a few units.
struct ShortOp : IntegerOp {
    using Sum = Shorts;
    static inline Sum step(Sum sum, Bytes w, Bytes x) { return dot_short(sum, w, x); }
};
struct FloatOp {
    static constexpr int kColumns = 1;
    using Sum = Floats;
    static inline Sum step(Sum sum, Bytes w, Bytes x) { return fma(as_floats(lanes_of(w)), as_floats(lanes_of(x)), sum); }
};
struct PairOp : FloatOp {
    static constexpr int kColumns = 2;
    static inline Sum step(Sum sum, Bytes w, Bytes x) { return dot_bf16(sum, w, x); }
};

// f(row, vector) for all, unrolled: GCC keeps sums that are several registers each out of memory only then.
template <int kRowsHere, class Function>
inline void each(const Function& f) {
#pragma GCC unroll 6
    for (int r = 0; r < kRowsHere; r++)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; v++) f(r, v);
}

// Sums in registers. A product with an `Op` over `units`: sums of every row and vector begin with start(row, vector), panel · tile is added,
// and finish(sums) asks for them by sums(row, vector); the vectors of a panel lie `stride` bytes apart.
struct Registers {
    static constexpr int rows_apart(int rows) { return rows; }

    template <class Op, int kRowsHere, class Start, class Finish>
    static inline void multiply(const uint8_t* panel, int64_t stride, const uint8_t* x, int units, const Start& start, const Finish& finish) {
        typename Op::Sum s[kRowsHere][kVectors];
        each<kRowsHere>([&](int r, int v) { s[r][v] = start(r, v); });
        for (int u = 0; u < units; u++, panel += 64, x += 4 * kRowsHere) {
            Bytes w[kVectors];
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; v++) w[v] = load_bytes(panel + stride * v);
#pragma GCC unroll 6
            for (int r = 0; r < kRowsHere; r++) {
                const Bytes one = repeat4(x + 4 * r);
#pragma GCC unroll 4
                for (int v = 0; v < kVectors; v++) s[r][v] = Op::step(s[r][v], w[v], one);
            }
        }
        finish([&](int r, int v) { return s[r][v]; });
    }

    // The same with sums of integers that are started, and taken, as 32 bits. `fold_units`: after which a sum of 16 bits must be folded.
    template <class Op, int kRowsHere, class Start, class Finish>
    static inline void multiply_integers(const uint8_t* panel, int64_t stride, const uint8_t* x, int units, int fold_units, const Start& start,
                                         const Finish& finish) {
        if constexpr (kShortSums && std::is_same_v<Op, ShortOp>) {
            Ints sum[kRowsHere][kVectors];
            each<kRowsHere>([&](int r, int v) { sum[r][v] = start(r, v); });
            for (; units > 0; units -= fold_units, panel += 64 * fold_units, x += 4 * kRowsHere * fold_units)
                multiply<Op, kRowsHere>(
                    panel, stride, x, units < fold_units ? units : fold_units, [](int, int) { return zero_shorts(); },
                    [&](const auto& s) { each<kRowsHere>([&](int r, int v) { sum[r][v] = fold(sum[r][v], s(r, v)); }); });
            finish([&](int r, int v) { return sum[r][v]; });
        } else {
            multiply<Op, kRowsHere>(panel, stride, x, units, start, finish);
        }
    }
};

// Columns of a panel that are decoded at once, and tokens between two decodings: panel and sums stay in the core's caches.
constexpr int kPanelColumns = 512;
constexpr int kPanelTokens = 384;
constexpr int kUnitTokens = 512;  // the same for a matrix unit
constexpr int kWidth = kBlock * kVectors;
constexpr int kStagger = 320;  // bytes between the vectors of a panel, so that they do not compete for the same cache sets

struct Panel {
    int first, blocks;    // blocks of the weight
    int column, columns;  // of K, padded
    uint8_t* units;       // memory for decoded codes, [vector][unit][64]
    const uint8_t* from;  // what is multiplied: that memory, or codes of 8 bits where they lie
    int64_t stride;       // bytes from one vector to the next
    float* scale;         // [span of the panel][kWidth], and the same of zero and offset where the weight has them
    int32_t* zero;
    float* offset;
    float* totals;        // [token][kWidth], float32 or int32
    // Codes of the next panel, which the products of this one ask for, some lines at a time.
    const uint8_t* next;
    int64_t next_stride, next_bytes;
    int next_vector;
    int64_t next_done;
};

// Asks for up to `lines` lines of the next panel.
inline void prefetch_next(Panel& panel, int lines) {
    if (panel.next_vector >= panel.blocks) return;
    const uint8_t* p = panel.next + panel.next_vector * panel.next_stride;
    for (; lines > 0 && panel.next_done < panel.next_bytes; lines--, panel.next_done += 64)
        __builtin_prefetch(p + panel.next_done, 0, 2);
    if (panel.next_done >= panel.next_bytes) {
        panel.next_done = 0;
        panel.next_vector++;
    }
}

template <class How, class Op, int kRowsHere, int kDigits>
inline void integer_tile(const Product& p, Panel& panel, int tile, float* totals) {
    constexpr int kTokens = kRowsHere / kDigits, kApart = How::rows_apart(kRowsHere);
    const Weight& w = p.weight;
    const bool whole = whole_row<kDigits>(p);
    int32_t* carried = reinterpret_cast<int32_t*>(totals);
    alignas(64) float part[kTokens * kWidth];
    // By token the sums of all spans are in units of the token's scale, and so are the totals; until a whole row ends, its carried
    // sums lie there.
    float* parts = by_token(p) && !whole ? totals : part;
    const int panel_end = panel.column + panel.columns, begin = panel.column / p.span;
    for (int s = begin; s < p.spans && s * p.span < panel_end; s++) {
        const int start = s * p.span, end = s + 1 < p.spans ? start + p.span : panel_end;
        const int32_t* digit_sum = sums_of(p, tile, s);
        const int64_t at = static_cast<int64_t>(s - begin) * kWidth;
        const bool goes_on = whole && (s + 1 < p.spans || p.integers);
        if (whole ? !goes_on : by_token(p) ? s == 0 : start == panel.column || start % p.x_span == 0)
            __builtin_memset(parts, 0, sizeof part);
        prefetch_next(panel, (end - start) / 4);
        How::template multiply_integers<Op, kRowsHere>(
            panel.from + static_cast<int64_t>(start - panel.column) / Op::kColumns * 64, panel.stride,
            p.tiles + tile * p.tile_bytes + static_cast<int64_t>(start) / Op::kColumns * 4 * kApart, (end - start) / Op::kColumns,
            fold_quads(w.kind),
            [&](int r, int v) {
                const Ints first = panel.zero == nullptr ? splat(-digit_sum[r] * w.zero_all)
                                                         : mul(load_ints(panel.zero + at + v * kBlock), splat(-digit_sum[r]));
                return whole && s > 0 && r % kDigits == kDigits - 1 ? add(first, load_ints(carried + r / kDigits * kWidth + v * kBlock)) : first;
            },
            [&](const auto& sums) {
                const auto of_token = [&](int t, int v, Ints* mine) {
                    for (int d = 0; d < kDigits; d++) mine[d] = sums(t * kDigits + d, v);
                };
                if (goes_on)
                    return each<kTokens>([&](int t, int v) {
                        Ints mine[kDigits];
                        of_token(t, v, mine);
                        store_ints(carried + t * kWidth + v * kBlock, joined<kDigits>(mine));
                    });
                const auto add_up = [&](auto shifted) {
                    each<kTokens>([&](int t, int v) {
                        Ints mine[kDigits];
                        of_token(t, v, mine);
                        float* place = parts + t * kWidth + v * kBlock;
                        Floats value = fma(value_of<kDigits>(mine), load_floats(panel.scale + at + v * kBlock), load_floats(place));
                        if constexpr (shifted) {
                            const Floats all = splat(all_of<kDigits>(digit_sum + t * kDigits));
                            value = fma(all, load_floats(panel.offset + at + v * kBlock), value);
                        }
                        store_floats(place, value);
                    });
                };
                if (panel.offset == nullptr)
                    add_up(std::false_type{});
                else
                    add_up(std::true_type{});
            });
        if (goes_on || (!whole && (by_token(p) || (end < panel_end && end % p.x_span != 0)))) continue;
        const bool first = whole || (start < p.x_span && panel.column == 0);
        const float* token_scale = scales_of(p, tile, s);
        each<kTokens>([&](int t, int v) {
            float* place = totals + t * kWidth + v * kBlock;
            const Floats value = mul(load_floats(part + t * kWidth + v * kBlock), splat(whole ? 1.0f : token_scale[t]));
            store_floats(place, first ? value : add(load_floats(place), value));
        });
    }
}

// Float sums over K are broken at every 64 units and at every panel, or their error would grow with the length of the chain.
constexpr int kChain = 64;

template <class Op, int kRowsHere>
inline void float_tile(const Product& p, Panel& panel, int tile, float* totals) {
    const int units = panel.columns / Op::kColumns;
    const uint8_t* x = p.tiles + tile * p.tile_bytes + static_cast<int64_t>(panel.column) / Op::kColumns * kRowsHere * 4;
    float part[kRowsHere * kWidth];
    for (int unit = 0; unit < units; unit += kChain) {
        prefetch_next(panel, kChain / 2);
        const bool last = unit + kChain >= units;
        Registers::multiply<Op, kRowsHere>(
            panel.from + static_cast<int64_t>(unit) * 64, panel.stride, x + static_cast<int64_t>(unit) * kRowsHere * 4,
            last ? units - unit : kChain, [](int, int) { return zero_floats(); },
            [&](const auto& sums) {
                each<kRowsHere>([&](int r, int v) {
                    const int at = r * kWidth + v * kBlock;
                    Floats sum = sums(r, v);
                    if (unit > 0) sum = add(load_floats(part + at), sum);
                    if (last && panel.column > 0) sum = add(load_floats(totals + at), sum);
                    store_floats((last ? totals : part) + at, sum);
                });
            });
    }
}

template <class Op, int kRowsHere>
inline void integer_rows(const Product& p, Panel& panel, int tile, float* totals) {
    if (p.digits == 1) return integer_tile<Registers, Op, kRowsHere, 1>(p, panel, tile, totals);
    if constexpr (kRowsHere % 2 == 0)
        if (p.digits == 2) return integer_tile<Registers, Op, kRowsHere, 2>(p, panel, tile, totals);
    if constexpr (kRowsHere % 3 == 0) return integer_tile<Registers, Op, kRowsHere, 3>(p, panel, tile, totals);
}

template <int kRowsHere>
inline void any_tile(const Product& p, Panel& panel, int tile, float* totals) {
    if (p.digits == 0) {
        if constexpr (kHasBf16Dot)
            if (p.pairs) return float_tile<PairOp, kRowsHere>(p, panel, tile, totals);
        return float_tile<FloatOp, kRowsHere>(p, panel, tile, totals);
    }
    if (p.words) return integer_tile<Registers, WordOp, kRowsHere, 1>(p, panel, tile, totals);
    if (wide(p.weight.kind)) return integer_rows<WideOp, kRowsHere>(p, panel, tile, totals);
    if constexpr (kShortSums)
        if (fold_quads(p.weight.kind) > 1) return integer_rows<ShortOp, kRowsHere>(p, panel, tile, totals);
    return integer_rows<IntegerOp, kRowsHere>(p, panel, tile, totals);
}

inline void any_rows(const Product& p, Panel& panel, int tile, float* totals) {
    const int tokens = p.m - tile * p.tokens < p.tokens ? p.m - tile * p.tokens : p.tokens;
    switch (tokens * rows_of_token(p)) {
        case 1: return any_tile<1>(p, panel, tile, totals);
        case 2: return any_tile<2>(p, panel, tile, totals);
        case 3: return any_tile<3>(p, panel, tile, totals);
        case 4: return any_tile<4>(p, panel, tile, totals);
        case 5:
            if constexpr (kRows >= 5) return any_tile<5>(p, panel, tile, totals);
            break;
        case 6:
            if constexpr (kRows >= 6) return any_tile<6>(p, panel, tile, totals);
            break;
        default: break;
    }
}

// One step of one block as units of float32, or of pairs of bfloat16, with the scale and zero point in them.
template <Kind kKind>
inline void decode_floats(const Product& p, const Numbers<kKind>& numbers, int block, int column, uint8_t* out) {
    const Weight& w = p.weight;
    for (int q = 0; q < Decode<kKind>::kQuads; q++, column += 4) {
        const int group = group_of(w, column < w.k ? column : w.k - 1);
        const GroupOf16 g = group_at(w, block, group);
        const uint8_t* zeros = zero_at(w, block, group);
        const Floats zero = zeros == nullptr ? splat(static_cast<float>(w.zero_all)) : to_floats(widen_bytes(zeros));
        Floats v[4];
        numbers.quad(q, v);
        for (int j = 0; j < 4; j++) v[j] = add(mul(sub(v[j], zero), g.scale), g.offset);
        if (p.pairs) {
            for (int j = 0; j < 4; j += 2, out += 64)
                store_bytes(out, bytes_of(or_ints(bf16_bits(v[j]), shift_left<16>(bf16_bits(v[j + 1])))));
        } else {
            for (int j = 0; j < 4; j++, out += 64) store_bytes(out, bytes_of(as_ints(v[j])));
        }
    }
}

template <Kind kKind>
inline void decode_steps(const Product& p, Panel& panel) {
    using D = Decode<kKind>;
    const Weight& w = p.weight;
    constexpr int kColumns = 4 * D::kQuads;
    const int64_t of_block = static_cast<int64_t>(w.steps) * step_bytes(kKind);
    const uint8_t* start = w.codes + panel.first * of_block + static_cast<int64_t>(panel.column / kColumns) * step_bytes(kKind);
    if (kKind == Kind::u8 && p.digits > 0 && !p.words && panel.blocks == kVectors) {
        panel.from = start;
        panel.stride = of_block;
        return;
    }
    const int units = p.words || p.pairs ? kColumns / 2 : p.digits > 0 ? D::kQuads : kColumns;
    Numbers<kKind> numbers(w);
    Bytes decoded[D::kQuads];
    panel.from = panel.units;
    const int64_t of_column = units * 64 / kColumns, rest = of_column * (whole_columns(p, panel.columns) - panel.columns);
    panel.stride = of_column * panel.columns + rest + kStagger;
    for (int v = 0; v < kVectors; v++) {
        uint8_t* out = panel.units + v * panel.stride;
        if (v >= panel.blocks) {
            __builtin_memset(out, 0, static_cast<size_t>(panel.stride - kStagger));
            continue;
        }
        const uint8_t* codes = start + v * of_block;
        for (int column = panel.column; column < panel.column + panel.columns; column += kColumns) {
            if (p.digits == 0) {
                numbers.step(codes, w, panel.first + v);
                decode_floats<kKind>(p, numbers, panel.first + v, column, out);
            } else {
                D::step(codes, w, panel.first + v, decoded);
            }
            codes += step_bytes(kKind);
            if (p.words) {
                for (int q = 0; q < D::kQuads; q++) {
                    store_bytes(out + 128 * q, even_words(decoded[q]));
                    store_bytes(out + 128 * q + 64, odd_words(decoded[q]));
                }
            } else if (p.digits > 0) {
                for (int q = 0; q < D::kQuads; q++) store_bytes(out + 64 * q, decoded[q]);
            }
            out += static_cast<int64_t>(units) * 64;
        }
        __builtin_memset(out, 0, static_cast<size_t>(rest));
    }
}

inline void decode_ring(const Product& p, Panel& panel);  // ring.h

template <Kind kKind>
inline void decode_panel(const Product& p, Panel& panel) {
    if constexpr (kKind == Kind::ring)
        decode_ring(p, panel);
    else
        decode_steps<kKind>(p, panel);
}

inline int panel_tokens(const Product& p) { return p.chunk == 0 ? kPanelTokens : kUnitTokens; }

inline int panel_columns(const Product& p) {
    const int step = 4 * step_quads(p.weight.kind);
    const int unit = p.span % step == 0 ? p.span : 2 * p.span;  // spans of half a step
    const int most = p.digits == 0 && (!p.pairs || p.chunk != 0) ? kPanelColumns / 2 : kPanelColumns;  // a matrix unit is faster than any cache but the first
    return unit >= most ? unit : most / unit * unit;
}

// Where the parts of a panel lie in its scratch memory, in bytes.
struct PanelSizes {
    size_t units, groups, totals;
};

inline PanelSizes panel_sizes(const Product& p) {
    const size_t columns = static_cast<size_t>(panel_columns(p));
    const int tokens = std::min(p.m, panel_tokens(p));
    return {columns * kWidth * (p.words || p.pairs ? 2 : p.digits > 0 ? 1 : 4) + kVectors * kStagger, (columns / p.span + 1) * kWidth * 4,
            static_cast<size_t>(tokens + kRowsMost) * kWidth * 4};  // of each panel
}

inline size_t panel_scratch(const Product& p) {
    const PanelSizes sizes = panel_sizes(p);
    return sizes.units + 3 * sizes.groups + static_cast<size_t>(p.panels) * sizes.totals;
}

// Scales, zero points and offsets of a panel as float32 and int32, so that tiles only load them.
inline void decode_groups(const Product& p, const Panel& panel) {
    const Weight& w = p.weight;
    int64_t at = 0;
    for (int s = panel.column / p.span; s < p.spans && s * p.span < panel.column + panel.columns; s++)
        for (int v = 0; v < kVectors; v++, at += kBlock) {
            if (v >= panel.blocks) {
                store_floats(panel.scale + at, zero_floats());
                if (panel.zero != nullptr) store_ints(panel.zero + at, zero_ints());
                if (panel.offset != nullptr) store_floats(panel.offset + at, zero_floats());
                continue;
            }
            const int group = group_of(w, s * p.span);
            const GroupOf16 g = group_at(w, panel.first + v, group);
            store_floats(panel.scale + at, g.scale);
            if (panel.zero != nullptr) store_ints(panel.zero + at, widen_bytes(zero_at(w, panel.first + v, group)));
            if (panel.offset != nullptr) store_floats(panel.offset + at, g.offset);
        }
}

// What a tile's tokens have added up to, as results.
inline void store_totals(const Product& p, const Panel& panel, int tile, const float* totals) {
    const int count = p.m - tile * p.tokens < p.tokens ? p.m - tile * p.tokens : p.tokens;
    for (int t = 0; t < count; t++, totals += kWidth) {
        const int token = tile * p.tokens + t;
        const float scale = by_token(p) ? scales_of(p, tile)[t] : 1.0f;
        for (int v = 0; v < panel.blocks; v++) {
            if (p.integers)
                store_integers(p, token, panel.first + v, load_ints(reinterpret_cast<const int32_t*>(totals) + v * kBlock));
            else
                store_result(p, token, panel.first + v, mul(load_floats(totals + v * kBlock), splat(scale)));
        }
    }
}

// `rows` multiplies a panel by one tile: any_rows(), or that of matrix.h.
template <Kind kKind, class Rows>
inline void panel_kind(const Product& p, int first, int last, uint8_t* scratch, const Rows& rows) {
    const Weight& w = p.weight;
    constexpr int kColumns = 4 * Decode<kKind>::kQuads;
    const int padded = w.steps * kColumns, width = panel_columns(p);
    const int tiles = (p.m + p.tokens - 1) / p.tokens, tiles_at_once = panel_tokens(p) / p.tokens;
    const PanelSizes sizes = panel_sizes(p);
    Panel panel{};
    panel.units = scratch;
    panel.scale = reinterpret_cast<float*>(scratch + sizes.units);
    panel.zero = w.zero == nullptr ? nullptr : reinterpret_cast<int32_t*>(scratch + sizes.units + sizes.groups);
    panel.offset = !has_offset(w) ? nullptr : reinterpret_cast<float*>(scratch + sizes.units + 2 * sizes.groups);
    panel.next_stride = static_cast<int64_t>(w.steps) * step_bytes(kKind);
    // Takes the panel of some blocks; where its totals are.
    const auto turn_to = [&](int block) {
        panel.first = block;
        panel.blocks = last - block < kVectors ? last - block : kVectors;
        panel.totals = reinterpret_cast<float*>(scratch + sizes.units + 3 * sizes.groups + (block - first) / kVectors * sizes.totals);
    };
    for (int from = 0; from < tiles; from += tiles_at_once) {
        const int to = from + tiles_at_once < tiles ? from + tiles_at_once : tiles;
        for (panel.column = 0; panel.column < padded; panel.column += width) {
            panel.columns = panel.column + width < padded ? width : padded - panel.column;
            for (int block = first; block < last; block += kVectors) {
                turn_to(block);
                decode_panel<kKind>(p, panel);
                if (p.digits > 0) decode_groups(p, panel);
                const int after = panel.column + panel.columns;
                panel.next = w.codes + block * panel.next_stride + static_cast<int64_t>(after / kColumns) * step_bytes(kKind);
                panel.next_bytes = static_cast<int64_t>((after + width < padded ? width : padded - after) / kColumns) * step_bytes(kKind);
                panel.next_done = 0;
                panel.next_vector = after < padded ? 0 : panel.blocks;
                for (int tile = from; tile < to; tile++)
                    rows(p, panel, tile, panel.totals + static_cast<size_t>(tile - from) * p.tokens * kWidth);
            }
        }
        for (int block = first; block < last; block += kVectors) {
            turn_to(block);
            for (int tile = from; tile < to; tile++) store_totals(p, panel, tile, panel.totals + static_cast<size_t>(tile - from) * p.tokens * kWidth);
        }
    }
}

}  // namespace ARRONDI_PATH
}  // namespace arrondi
