// The quantizers over all rows: pieces of rows for the threads of the pool, and memory for each piece.
#include "quantizers.h"

#include <atomic>
#include <cstdlib>

#include "kernels.h"
#include "parallel.h"

namespace arrondi {
namespace {

constexpr int64_t kPiece = 1 << 16;  // elements that are worth a thread

// Calls run(first, last, scratch) for pieces of rows; false if one of them said so or had no memory.
template <class Run>
bool over_rows(int64_t rows, int64_t columns, int64_t scratch_bytes, int threads, const Run& run) {
    if (rows == 0 || columns == 0) return true;
    int64_t pieces = rows * columns / kPiece + 1;
    if (pieces > 8 * threads) pieces = 8 * threads;
    if (pieces > rows) pieces = rows;
    std::atomic<bool> fine{true};
    parallel_for(static_cast<int>(pieces), threads, [&](int piece) {
        if (!fine.load(std::memory_order_relaxed)) return;
        const size_t bytes = static_cast<size_t>(scratch_bytes + 127) / 64 * 64;
        uint8_t* scratch = scratch_bytes == 0 ? nullptr : static_cast<uint8_t*>(std::aligned_alloc(64, bytes));
        if ((scratch_bytes != 0 && scratch == nullptr) ||
            !run(rows * piece / pieces, rows * (piece + 1) / pieces, scratch))
            fine.store(false);
        std::free(scratch);
    });
    return fine.load();
}

int64_t padded(int64_t count) { return (count + 15) / 16 * 16; }

}  // namespace

bool round_groups(const Rounding& r, int threads) {
    const auto& run = path().quantizers.round;
    return over_rows(r.on.rows, r.on.columns, r.codes == nullptr ? r.on.columns : 0, threads,
                     [&](int64_t first, int64_t last, uint8_t* scratch) { return run(r, first, last, scratch); });
}

void pack_rows(const Packing& p, int threads) {
    over_rows(p.rows, p.columns, 0, threads, [&](int64_t first, int64_t last, uint8_t*) {
        path().quantizers.pack(p, first, last);
        return true;
    });
}

void restore(const Restoring& r, int threads) {
    over_rows(r.on.rows, r.on.columns, 0, threads, [&](int64_t first, int64_t last, uint8_t*) {
        path().quantizers.restore(r, first, last);
        return true;
    });
}

bool search_grids(const Search& s, int threads) {
    const auto& run = path().quantizers.search;
    return over_rows(s.on.rows, s.on.columns, 4 * (s.on.groups + 1) * padded(s.on.group), threads,
                     [&](int64_t first, int64_t last, uint8_t* scratch) { return run(s, first, last, scratch); });
}

bool split_groups(const Splitting& s, int threads) {
    const auto& run = path().quantizers.split;
    return over_rows(s.on.rows, s.on.columns, 8 * padded(s.on.group), threads,
                     [&](int64_t first, int64_t last, uint8_t* scratch) { return run(s, first, last, scratch); });
}

bool search_superblocks(const Superblocks& s, int threads) {
    const int each = groups_at_once(s);
    const auto& run = path().quantizers.superblocks;
    // Numbers, weights and their products, and some for each group.
    return over_rows((s.groups + each - 1) / each, static_cast<int64_t>(each) * s.elements * 16, 4 * kSuperLanes * (3 * 32 + 8), threads,
                     [&](int64_t first, int64_t last, uint8_t* scratch) { return run(s, first, last, scratch); });
}

bool sweep(const Sweep& s, int threads) {
    const int64_t pieces = (s.m + kSweepRows - 1) / kSweepRows;
    const auto& run = path().quantizers.sweep;
    return over_rows(pieces, kPiece, 4 * (s.stop - s.first) * kSweepRows, threads,
                     [&](int64_t first, int64_t last, uint8_t* scratch) {
                         for (int64_t i = first; i < last; i++) run(s, i * kSweepRows, scratch);
                         return true;
                     });
}

}  // namespace arrondi
