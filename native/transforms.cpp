// Hadamard transforms, products of signs and reading memory: checks, and pieces over the threads.
#include "transforms.h"

#include <atomic>
#include <new>
#include <vector>

#include "parallel.h"

namespace arrondi {
namespace {

constexpr int64_t kSmall = 1 << 14;  // numbers that are not worth waking a thread for
constexpr int kPadding = 64;         // floats between the rows of a buffer

// Memory of one thread that is kept for the next call, on a cache line.
float* memory_of(size_t floats) {
    thread_local std::vector<float> memory;
    if (memory.size() < floats + 16) memory.resize(floats + 16);
    const auto address = reinterpret_cast<uintptr_t>(memory.data());
    return memory.data() + (64 - address % 64) % 64 / 4;
}

template <class Function>
void share(int64_t items, int pieces, int threads, const Function& function) {
    if (pieces > items) pieces = static_cast<int>(items);
    parallel_for(pieces, threads, [&](int piece) { function(items * piece / pieces, items * (piece + 1) / pieces); });
}

// Pieces of about kSmall numbers, several for each thread so that one that comes late still finds some.
int pieces_of(int64_t numbers, int threads) {
    const int64_t pieces = numbers / kSmall;
    return pieces < 1 ? 1 : pieces > 8 * threads ? 8 * threads : static_cast<int>(pieces);
}

}  // namespace

const char* hadamard(Hadamard& t) {
    if (t.rows < 0 || t.base < 1 || t.shift < 0 || t.shift > 26) return "an order is not positive, or too large";
    if (t.base > 1 && (t.base % 4 != 0 || t.matrix == nullptr)) return "the order of the base is no multiple of four";
    if (t.type == Type::f16) return "transforms are of float32 or bfloat16";
    if (t.rows == 0) return nullptr;
    if (t.x == nullptr || t.y == nullptr) return "a buffer is null";
    const Transforms& path = *arrondi::path().transforms;
    // A group fills a register; before the product with a base, four of them if there are the rows.
    t.together = t.shift >= 4 ? 1 : 16 >> t.shift;
    while (t.base > 1 && t.together << t.shift < 64 && t.together < t.rows) t.together *= 2;
    t.stride = (t.together << t.shift) + kPadding;
    const int64_t groups = (t.rows + t.together - 1) / t.together, numbers = t.rows * t.base << t.shift;
    const size_t floats = static_cast<size_t>(t.base) * t.stride;
    const int tiles = t.base / 4, threads = numbers * (t.base > 16 ? t.base / 16 : 1) < 2 * kSmall ? 1 : t.threads;
    try {
        if (tiles > 0 && groups < threads) {
            // Fewer rows than threads: these share the columns of the base.
            float* work = memory_of(groups * floats);
            parallel_for(static_cast<int>(groups), threads,
                         [&](int group) { path.butterflies(t, group, work + group * floats); });
            const int parts = tiles < 2 * threads ? tiles : 2 * threads;
            parallel_for(static_cast<int>(groups) * parts, threads, [&](int piece) {
                const int group = piece / parts, part = piece % parts;
                path.base_product(t, group, work + group * floats, tiles * part / parts, tiles * (part + 1) / parts);
            });
            return nullptr;
        }
        std::atomic<bool> failed{false};
        share(groups, pieces_of(numbers, threads), threads, [&](int64_t first, int64_t last) {
            float* work;
            try {
                work = memory_of(floats);
            } catch (const std::bad_alloc&) {
                failed = true;
                return;
            }
            for (int64_t group = first; group < last; group++) {
                path.butterflies(t, group, work);
                if (tiles > 0) path.base_product(t, group, work, 0, tiles);
            }
        });
        return failed ? "there is no memory for a buffer" : nullptr;
    } catch (const std::bad_alloc&) {
        return "there is no memory for a buffer";
    }
}

const char* multiply_signs(const Signs& p) {
    if (p.m < 0 || p.n < 0 || p.k < 1 || p.words != (p.k + 31) / 32)
        return "a size is negative, or the words do not fit it";
    if (!p.integers && p.y_type == Type::f16) return "results are int32, float32 or bfloat16";
    if (p.m == 0 || p.n == 0) return nullptr;
    if (p.x == nullptr || p.w == nullptr || p.y == nullptr) return "a buffer is null";
    const Transforms& path = *arrondi::path().transforms;
    const int64_t blocks = (p.n + kBlock - 1) / kBlock, work = blocks * p.words * kBlock * (p.m < 4 ? 1 : p.m / 4);
    share(blocks, pieces_of(work, p.threads), p.threads, [&](int64_t first, int64_t last) {
        path.multiply_signs(p, static_cast<int>(first), static_cast<int>(last));
    });
    return nullptr;
}

const char* pack_signs(const SignPacking& p) {
    if (p.rows < 0 || p.k < 1 || p.words != (p.k + 31) / 32) return "a size is negative, or the words do not fit it";
    if (p.rows == 0) return nullptr;
    if (p.x == nullptr || p.out == nullptr) return "a buffer is null";
    const Transforms& path = *arrondi::path().transforms;
    share(p.rows, pieces_of(p.rows * p.k, p.threads), p.threads,
          [&](int64_t first, int64_t last) { path.pack_signs(p, first, last); });
    return nullptr;
}

int32_t read_memory(const uint8_t* p, int64_t bytes, int threads) {
    const Transforms& path = *arrondi::path().transforms;
    std::atomic<int32_t> all{0};
    share(bytes / 64, 8 * threads, threads,
          [&](int64_t first, int64_t last) { all.fetch_xor(path.read(p + 64 * first, last - first)); });
    return all;
}

}  // namespace arrondi
