// One product: checks, activations into tiles, then blocks of the weight over the threads.
#include <algorithm>
#include <cstdlib>
#include <memory>

#include "kernels.h"
#include "parallel.h"

namespace arrondi {
namespace {

// Memory of one thread that is kept for the next product.
class Scratch {
  public:
    uint8_t* of(size_t bytes) {
        bytes = (bytes + 127) / 64 * 64;
        if (bytes > size_) {
            std::free(memory_);
            size_ = 0;
            memory_ = static_cast<uint8_t*>(std::aligned_alloc(64, bytes));
            if (memory_ != nullptr) size_ = bytes;
        }
        return memory_;
    }
    ~Scratch() { std::free(memory_); }

  private:
    uint8_t* memory_ = nullptr;
    size_t size_ = 0;
};

thread_local Scratch tiles_memory, panel_memory, results_memory;

// Tokens that are computed before their results are turned back or gated.
constexpr int kResultTokens = 384;

constexpr int kRingUnit = 4;  // blocks of a ring that a thread takes at least: half a slab

// The longest run of whole steps that divides a group and is at most `most`.
int span_of(const Weight& w, int most) {
    const int step = 4 * step_quads(w.kind);
    if (w.groups == 1) return most / step * step;
    if (w.group <= most) return w.group;
    for (int span = most / step * step; span > step; span -= step)
        if (w.group % span == 0) return span;
    return step;
}

// Tokens from which on a matrix unit takes bfloat16 as it is: decoding the weight to it costs more than integers of a few.
constexpr int kMatrixTokens = 64;

constexpr int kChunkOfFifths = 160;  // columns that are whole steps of twenty and whole chunks

constexpr int kPanelsTogether = 4;  // their totals fill half a megabyte

// The largest chunk of a matrix unit that divides what has these bits.
int chunk_of(int sizes) { return sizes % 64 == 0 ? 64 : sizes % 32 == 0 ? 32 : 16; }

const char* check(const Product& p) {
    const Weight& w = p.weight;
    const int step = 4 * step_quads(w.kind);
    if (p.m < 0 || w.n < 0 || w.k < 1) return "a size is negative, or there are no columns";
    if (w.codes == nullptr || w.scale == nullptr || p.x == nullptr || p.y == nullptr ||
        (row_entry(w.kind) > 0 && w.tables == nullptr))
        return "a buffer is null";
    if (w.groups > 1 && (w.kind == Kind::trit5 || (w.group % step != 0 && w.group != 16)))
        return "groups must be of 16 columns or of whole steps";
    if (w.counted != Counted::no &&
        (w.unit == nullptr || w.run < 1 || (w.run & (w.run - 1)) != 0 || w.runs != (w.groups + w.run - 1) / w.run ||
         (w.counted != Counted::halves && w.offset_unit != nullptr && w.offset == nullptr)))
        return "counted scales need the units of their runs";
    if (p.digits < 0 || p.digits > 3 || (p.digits > 0 && !integer(w.kind))) return "this format has no integer products";
    if (p.digits == 1 && !p.rounded) return "one digit is for activations that are rounded";
    if (p.rounded && (p.digits < 1 || p.digits > 2 || p.lowest < -128 || p.lowest > 0 || p.highest > 255 ||
                      p.highest <= p.lowest || p.highest - p.lowest > 255 || (p.digits == 1 && p.highest > 127)))
        return "codes of activations must be those of an integer of up to eight bits";
    if (p.rounded && p.step_type == Type::f16) return "scales of activations are float32 or bfloat16";
    if (p.x_group != 0 && (p.x_group < 32 || p.x_group > 512 || p.x_group % step != 0 ||
                           (w.groups > 1 && w.group % p.x_group != 0 && p.x_group % w.group != 0)))
        return "activations must be rounded by token, or in groups of 32 to 512 that go with those of the weight";
    if (p.x_scale != nullptr && (!by_token(p) || (p.digits == 2 && p.x_zero == nullptr)))
        return "a given scale of activations is one for all of them, with a zero point where there are two digits";
    if (p.x_scale != nullptr && !(*p.x_scale > 0.0f)) return "a given scale of activations must be positive";
    if (p.x_scale != nullptr && p.digits == 2 && (*p.x_zero < p.lowest || *p.x_zero > p.highest))
        return "the zero point of activations must be one of their codes";
    if (by_token(p) && w.groups == 1 && w.k > 65536) return "int32 sums of more than 65536 columns may overflow";
    if (p.gate != Gate::none && (w.n % 2 != 0 || p.residual != nullptr || p.integers))
        return "a gate needs as many rows before as behind it, and nothing that is added";
    if (p.integers && (!by_token(p) || w.groups != 1)) return "integer results need activations rounded by token and one scale a row";
    const bool turned = w.turn.columns != nullptr;
    if (turned != (w.turn.rows != nullptr)) return "a weight is turned on both sides or on none";
    if (turned && ((w.k & ((1 << w.turn.column_shift) - 1)) != 0 || (w.n & ((1 << w.turn.row_shift) - 1)) != 0))
        return "a side is turned in blocks that divide it";
    if (turned && (p.rounded || p.integers)) return "activations of a turned weight are not rounded";
    if (w.kind == Kind::ring && (w.groups != 1 || w.zero != nullptr || w.offset != nullptr))
        return "states of a trellis have one scale a row and nothing else";
    if (w.kind == Kind::ring && p.rounded && (p.digits != 1 || p.x_group != 0 || w.k > kZeroPointColumns))
        return "states of a trellis meet activations of one digit a token, and up to 32768 of them";
    if (p.integers && p.digits == 2 && w.k > kZeroPointColumns)
        return "int32 sums of more than 32768 columns may overflow where activations have a zero point";
    return nullptr;
}

// Results as they are before they are turned back or gated.
const char* compute(Product& p) {
    const Path& path = arrondi::path();
    Weight& w = p.weight;
    // Pairs of bfloat16 need as many products as two digits, and no work at the end of a group.
    const bool ring = w.kind == Kind::ring;
    const bool matrix = path.matrix_panel != nullptr;
    const bool many = matrix ? p.m >= kMatrixTokens : !ring && pairs_pay() && p.m >= (w.group < 64 ? 32 : 128);
    const bool pairs = p.x_type == Type::bf16 && path.bf16_dot, for_pairs = p.digits == 2 && !p.rounded && pairs && many;
    if (for_pairs) p.digits = 0;
    // Products in 16 bits: one instruction where two digits take four, and codes that would overflow sums of 16 bits fit. For
    // one or two tokens taking the codes apart costs more than that saves.
    const bool apart = wide(w.kind) || one_table(w.kind);
    if (p.digits == 3 && (!path.fast_dot || (path.words && (apart || p.m > 2)) || (ring && p.m > 1))) p.digits = 0;
    p.words = ring ? p.digits == 1 || p.digits == 2
                   : path.words && (apart ? p.digits == 1 || p.digits == 2 : p.digits == 2 && p.m > 2);
    const int padded = w.steps * 4 * step_quads(w.kind), blocks = (w.n + kBlock - 1) / kBlock;
    // Rows of a tile when the weight is decoded in registers: as many as there are variants of (see stream_kind).
    const int rows = p.m * rows_of_token(p), together = rows_of_token(p) > 1 ? 2 : 4;
    const bool few = ring || p.digits == 0 ? p.m <= 4 : rows <= 12 && p.m <= 2 * together;
    if (ring) w.zero_all = few ? kRingMiddle : 0;  // panels hold values, and not sums of bytes
    p.pairs = !few && p.digits == 0 && pairs && (!ring || for_pairs);
    const bool fifths = w.kind == Kind::trit5;  // steps of twenty columns, of which chunks of integers would have a part
    const bool tiles_of_unit = matrix && !few && !p.words && (p.pairs || (p.digits > 0 && !fifths));
    p.tokens = few ? (p.m < together ? p.m : together) : (tiles_of_unit ? kRowsMost : path.rows) / rows_of_token(p);
    // Chains of float sums lose a bit at every doubling; words fill int32.
    p.span = fifths && tiles_of_unit ? kChunkOfFifths
                                     : span_of(w, p.x_group != 0 ? p.x_group : p.rounded ? 512 : p.digits == 0 ? 64 : p.words ? 128 : 256);
    // Digits are shares of the largest of 256 columns, also where groups are shorter.
    p.x_span = p.x_group != 0 ? p.x_group : p.span < 256 && 256 % p.span == 0 ? 256 : p.span;
    p.spans = w.groups == 1 ? (w.k + p.span - 1) / p.span : w.groups * (w.group / p.span);
    // The last group may be short: spans that start beyond the row are not there.
    while (p.spans > 1 && (p.spans - 1) * p.span >= padded) p.spans--;
    p.chunk = !tiles_of_unit ? 0 : p.pairs ? 64 : chunk_of(p.span | padded);
    const int tiles = (p.m + p.tokens - 1) / p.tokens;
    // Columns are packed sixteen at a time: the last sixteen of steps that are no multiple of it reach beyond the row.
    const int64_t columns = whole_columns(p, padded) + (step_quads(w.kind) % 4 == 0 ? 0 : 16);
    const int64_t units = p.digits > 0 ? columns / 4 : p.pairs ? columns / 2 : columns;
    p.tile_bytes = (units * (p.words ? 8 : 4) * (p.chunk != 0 ? kRowsMost : p.tokens * rows_of_token(p)) + 63) / 64 * 64;
    const size_t sums = static_cast<size_t>(tiles) * p.spans * kRowsMost * 4;
    const size_t row = p.norm == nullptr && w.turn.columns == nullptr ? 0 : static_cast<size_t>(w.k + 15) / 16 * 64;
    uint8_t* memory = tiles_memory.of(static_cast<size_t>(tiles) * (p.tile_bytes + row + kRowsMost * 4) + 2 * sums);
    if (memory == nullptr) return "there is no memory for the activations";
    p.tiles = memory;
    memory += tiles * p.tile_bytes;
    p.changed = reinterpret_cast<float*>(memory);
    memory += tiles * row;
    p.tile_scale = reinterpret_cast<float*>(memory);
    p.tile_sum = reinterpret_cast<int32_t*>(memory + sums + static_cast<size_t>(tiles) * kRowsMost * 4);

    const bool small = static_cast<int64_t>(p.m) * padded < 65536;
    parallel_for(tiles, small ? 1 : p.threads, [&](int tile) { path.pack_tile(p, tile); });

    const int64_t work = ring ? static_cast<int64_t>(blocks) * w.k * ring_block_bytes(w)
                              : static_cast<int64_t>(blocks) * w.steps * step_bytes(w.kind);
    if (few) {
        // Pieces of about 64 KB of codes, so that a thread that comes late still finds some.
        int pieces = static_cast<int>(work / 65536) + 1;
        if (pieces > p.threads * 8) pieces = p.threads * 8;
        const int unit = !ring ? 1 : blocks < 4 * kSlab * p.threads ? kRingUnit : kSlab, units = (blocks + unit - 1) / unit;
        if (pieces > units) pieces = units;
        if (work < 16384) pieces = 1;
        parallel_for(pieces, p.threads, [&](int piece) {
            const int64_t first = static_cast<int64_t>(units) * piece / pieces * unit;
            const int64_t last = static_cast<int64_t>(units) * (piece + 1) / pieces * unit;
            path.stream(p, static_cast<int>(first), static_cast<int>(last < blocks ? last : blocks));
        });
        return nullptr;
    }
    bool failed = false;
    const int panels = (blocks + path.vectors - 1) / path.vectors;
    // A matrix unit is fed from cache alone: several panels meet a part of x, as long as every thread has some pieces.
    p.panels = p.chunk == 0 ? 1 : std::min(std::max(panels / (4 * p.threads), 1), kPanelsTogether);
    const int pieces = (panels + p.panels - 1) / p.panels, of_piece = p.panels * path.vectors;
    parallel_for(pieces, work < 16384 ? 1 : p.threads, [&](int piece) {
        uint8_t* scratch = panel_memory.of(path.panel_scratch(p));
        if (scratch == nullptr) {
            failed = true;
            return;
        }
        const int first = piece * of_piece, last = first + of_piece;
        (p.chunk != 0 ? path.matrix_panel : path.panel)(p, first, last < blocks ? last : blocks, scratch);
    });
    return failed ? "there is no memory for a panel" : nullptr;
}

}  // namespace

const char* product(Product& p) {
    if (p.m == 0 || p.weight.n == 0) return nullptr;
    if (const char* wrong = check(p)) return wrong;
    if (p.gate == Gate::none && p.weight.turn.rows == nullptr) return compute(p);
    const int most = p.m < kResultTokens ? p.m : kResultTokens, n = p.weight.n;
    float* results = reinterpret_cast<float*>(results_memory.of(static_cast<size_t>(most) * n * sizeof(float)));
    if (results == nullptr) return "there is no memory for the results before they are finished";
    for (int first = 0; first < p.m; first += most) {
        Product part = p;
        part.x = static_cast<const uint8_t*>(p.x) + first * p.ldx * size_of(p.x_type);
        part.m = p.m - first < most ? p.m - first : most;
        part.y = results;
        part.y_type = Type::f32;
        part.ldy = n;
        part.residual = nullptr;
        if (p.weight.turn.rows != nullptr) part.bias = nullptr;
        if (const char* wrong = compute(part)) return wrong;
        parallel_for(part.m, part.m < 4 ? 1 : p.threads,
                     [&](int token) { path().finish(p, first + token, results + static_cast<int64_t>(token) * n); });
    }
    return nullptr;
}

const char* ring_rows(const RingRows& job) {
    const Weight& w = job.weight;
    if (w.kind != Kind::ring || w.groups != 1) return "rows are read of states with one scale a row";
    if (w.turn.row_shift > 7) return "rows are read where their side is turned in blocks of up to 128";
    if (job.count < 0 || w.codes == nullptr || w.scale == nullptr || (job.count > 0 && (job.ids == nullptr || job.y == nullptr)))
        return "a buffer is null";
    for (int64_t i = 0; i < job.count; i++)
        if (job.ids[i] < 0 || job.ids[i] >= w.n) return "a row lies beyond the weight";
    parallel_for(static_cast<int>(job.count), job.threads, [&](int i) { path().ring_row(job, i); });
    return nullptr;
}

}  // namespace arrondi
