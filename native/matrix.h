// Panels on the matrix unit of a CPU (Intel AMX): sixteen rows of activations times sixteen of the weight at once, in int8 with int32
// sums or in bfloat16 with float32 ones. The decoded panel of panel.h is what the unit wants already: sixteen units of four bytes are a
// tile. Activations lie in chunks, see Cells in activations.h.
#pragma once

#include "product.h"

namespace arrondi {
namespace ARRONDI_PATH {

constexpr int kWeightTile = 5;  // the first of two, behind four of sums and one of activations

template <int kTile>
inline void load_tile(const void* from, int64_t stride) {
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(kTile), "r"(from), "r"(stride) : "memory");
}
template <int kTile>
inline void store_tile(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c0, (%1,%2,1)" : : "i"(kTile), "r"(to), "r"(stride) : "memory");
}
// Sums of one tile += activations · weight.
template <class Op, int kSum, int kWeight>
inline void multiply_tile() {
    if constexpr (std::is_same_v<Op, PairOp>)
        asm volatile("tdpbf16ps %%tmm%c1, %%tmm4, %%tmm%c0" : : "i"(kSum), "i"(kWeight));
    else
        asm volatile("tdpbsud %%tmm%c1, %%tmm4, %%tmm%c0" : : "i"(kSum), "i"(kWeight));
}

// The shapes of the tiles of one product, in the place of those that somebody else may count on in this thread: all of sums and
// activations have kRowsMost rows.
class Shapes {
  public:
    explicit Shapes(int chunk) {
        asm volatile("sttilecfg %0" : "=m"(before_));
        Config config{};
        config.palette = 1;
        for (int t = 0; t < kWeightTile + 2; t++) {
            config.bytes[t] = static_cast<uint16_t>(t == kWeightTile - 1 ? chunk : 64);
            config.rows[t] = static_cast<uint8_t>(t < kWeightTile ? kRowsMost : chunk / 4);
        }
        asm volatile("ldtilecfg %0" : : "m"(config));
    }
    ~Shapes() { asm volatile("ldtilecfg %0" : : "m"(before_)); }
    Shapes(const Shapes&) = delete;
    Shapes& operator=(const Shapes&) = delete;

  private:
    struct alignas(64) Config {
        uint8_t palette, start_row, unused[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    };
    Config before_;
};

// Adds panel · activations to the four tiles of sums, which lie at `sums` in rows of kWidth numbers; with `fresh` they begin with zero.
template <class Op, int kChunk>
inline void add_tiles(const uint8_t* panel, int64_t stride, const uint8_t* x, int units, bool fresh, void* sums) {
    static_assert(kVectors == 4, "four tiles of sums");
    constexpr int64_t kRow = kWidth * 4;
    uint8_t* to = static_cast<uint8_t*>(sums);
    if (fresh) {
        asm volatile("tilezero %tmm0\n\ttilezero %tmm1\n\ttilezero %tmm2\n\ttilezero %tmm3");
    } else {
        load_tile<0>(to, kRow);
        load_tile<1>(to + 64, kRow);
        load_tile<2>(to + 128, kRow);
        load_tile<3>(to + 192, kRow);
    }
    for (; units > 0; units -= kChunk / 4, panel += kChunk * 16, x += kChunk * kRowsMost) {
        load_tile<kWeightTile - 1>(x, kChunk);
        for (int i = 0; i < kChunk * kRowsMost; i += 64) __builtin_prefetch(x + 2 * kChunk * kRowsMost + i);
        load_tile<kWeightTile>(panel, 64);
        multiply_tile<Op, 0, kWeightTile>();
        load_tile<kWeightTile + 1>(panel + stride, 64);
        multiply_tile<Op, 1, kWeightTile + 1>();
        load_tile<kWeightTile>(panel + 2 * stride, 64);
        multiply_tile<Op, 2, kWeightTile>();
        load_tile<kWeightTile + 1>(panel + 3 * stride, 64);
        multiply_tile<Op, 3, kWeightTile + 1>();
    }
    store_tile<0>(to, kRow);
    store_tile<1>(to + 64, kRow);
    store_tile<2>(to + 128, kRow);
    store_tile<3>(to + 192, kRow);
}

// Sums of integers of one span.
template <int kChunk>
struct Tiles {
    static constexpr int rows_apart(int) { return kRowsMost; }

    template <class Op, int kRowsHere, class Start, class Finish>
    static inline void multiply_integers(const uint8_t* panel, int64_t stride, const uint8_t* x, int units, int, const Start& start,
                                         const Finish& finish) {
        alignas(64) int32_t s[kRowsMost][kWidth];
        add_tiles<Op, kChunk>(panel, stride, x, units, true, s);
        finish([&](int r, int v) { return add(load_ints(s[r] + v * kBlock), start(r, v)); });
    }
};

// All columns of a panel, where their sums just go on.
template <class Op, int kChunk>
inline void add_panel(const Product& p, Panel& panel, int tile, bool fresh, float* totals) {
    prefetch_next(panel, panel.columns / 4);
    const uint8_t* x = p.tiles + tile * p.tile_bytes + static_cast<int64_t>(panel.column) / Op::kColumns * 4 * kRowsMost;
    add_tiles<Op, kChunk>(panel.from, panel.stride, x, whole_columns(p, panel.columns) / Op::kColumns, fresh, totals);
}

// Integers that go on to the row's end, in which totals become numbers.
template <int kChunk>
inline void whole_tile(const Product& p, Panel& panel, int tile, float* totals) {
    int32_t* sums = reinterpret_cast<int32_t*>(totals);
    if (panel.column == 0)
        for (int r = 0; r < kRowsMost; r++) {
            uint32_t all = 0;
            for (int s = 0; s < p.spans; s++) all -= static_cast<uint32_t>(sums_of(p, tile, s)[r]);
            const Ints less = splat(static_cast<int32_t>(all));
            for (int v = 0; v < kVectors; v++)
                store_ints(sums + r * kWidth + v * kBlock, mul(less, panel.zero == nullptr ? splat(p.weight.zero_all) : load_ints(panel.zero + v * kBlock)));
        }
    add_panel<IntegerOp, kChunk>(p, panel, tile, false, totals);
    if (p.integers || panel.column + panel.columns < p.weight.steps * 4 * step_quads(p.weight.kind)) return;
    for (int r = 0; r < kRowsMost; r++)
        for (int v = 0; v < kVectors; v++) {
            const int at = r * kWidth + v * kBlock;
            store_floats(totals + at, mul(to_floats(load_ints(sums + at)), load_floats(panel.scale + v * kBlock)));
        }
}

template <int kChunk>
inline void matrix_rows(const Product& p, Panel& panel, int tile, float* totals) {
    switch (p.digits) {
        case 0: return add_panel<PairOp, kChunk>(p, panel, tile, panel.column == 0, totals);
        case 1:
            if (whole_row<1>(p)) return whole_tile<kChunk>(p, panel, tile, totals);
            return integer_tile<Tiles<kChunk>, IntegerOp, kRowsMost, 1>(p, panel, tile, totals);
        case 2: return integer_tile<Tiles<kChunk>, IntegerOp, kRowsMost, 2>(p, panel, tile, totals);
        default: return integer_tile<Tiles<kChunk>, IntegerOp, kRowsMost / 3 * 3, 3>(p, panel, tile, totals);
    }
}

template <Kind kKind>
struct MatrixAction {
    static void run(const Product& p, int first, int last, uint8_t* scratch) {
        const Shapes shapes(p.chunk);
        switch (p.chunk) {
            case 64: return panel_kind<kKind>(p, first, last, scratch, matrix_rows<64>);
            case 32: return panel_kind<kKind>(p, first, last, scratch, matrix_rows<32>);
            default: return panel_kind<kKind>(p, first, last, scratch, matrix_rows<16>);
        }
    }
};

void matrix_panel(const Product& p, int first, int last, uint8_t* scratch) { by_kind<MatrixAction>(p.weight.kind, p, first, last, scratch); }

}  // namespace ARRONDI_PATH
}  // namespace arrondi
