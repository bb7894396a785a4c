// The sides of a training step's products: checks, and pieces over the threads.
#include "training.h"

#include "parallel.h"

namespace arrondi {
namespace {

constexpr int64_t kSmall = 1 << 15;  // numbers that are not worth waking a thread for

// function(first, last) over all items, in pieces of whole `unit`s that are worth a thread.
template <class Function>
void share(int64_t items, int64_t unit, int64_t numbers, int threads, const Function& function) {
    const int64_t units = (items + unit - 1) / unit, worth = numbers / kSmall + 1;
    int64_t pieces = worth < 4 * threads ? worth : 4 * threads;
    if (pieces > units) pieces = units;
    parallel_for(static_cast<int>(pieces), threads, [&](int piece) {
        const int64_t last = units * (piece + 1) / pieces * unit;
        function(units * piece / pieces * unit, last < items ? last : items);
    });
}

const char* wrong(const Sides& s) {
    if (s.rows < 0 || s.columns < 0 || (s.rows > 1 && s.ldx < s.columns)) return "a size is negative, or rows overlap";
    if (s.rows > 0 && s.columns > 0 && s.x == nullptr) return "a buffer is null";
    return nullptr;
}

}  // namespace

const char* extremes(const Extremes& e) {
    if (const char* why = wrong(e.of)) return why;
    const int64_t items = e.by_column ? e.of.columns : e.of.rows;
    if (items == 0) return nullptr;
    if (e.out == nullptr) return "a buffer is null";
    const Training& path = *arrondi::path().training;
    const auto run = e.by_column ? path.largest_of_columns : path.largest_of_rows;
    share(items, e.by_column ? 64 : 1, e.of.rows * e.of.columns, e.of.threads,
          [&](int64_t first, int64_t last) { run(e, first, last); });
    return nullptr;
}

const char* round_codes(const CodeRounding& r) {
    if (const char* why = wrong(r.of)) return why;
    if (r.lowest < -128 || r.highest > 127 || r.lowest > r.highest) return "codes are no int8";
    if (r.of.rows == 0 || r.of.columns == 0) return nullptr;
    if (r.codes == nullptr) return "a buffer is null";
    const Training& path = *arrondi::path().training;
    share(r.of.rows, 1, r.of.rows * r.of.columns, r.of.threads,
          [&](int64_t first, int64_t last) { path.round_codes(r, first, last); });
    return nullptr;
}

const char* scale_sums(const SumScaling& s) {
    if (s.rows < 0 || s.columns < 0) return "a size is negative";
    if (s.type == Type::f16) return "results are float32 or bfloat16";
    if (s.rows == 0 || s.columns == 0) return nullptr;
    if (s.sums == nullptr || s.y == nullptr) return "a buffer is null";
    const Training& path = *arrondi::path().training;
    share(s.rows, 1, s.rows * s.columns, s.threads, [&](int64_t first, int64_t last) { path.scale_sums(s, first, last); });
    return nullptr;
}

}  // namespace arrondi
