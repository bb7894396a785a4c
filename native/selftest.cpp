// A program without Python that tries every path that runs on this machine: products of every kind against plain loops in
// double precision, packing against its inverse, everything else against the portable path or the definition, and the thread
// pool. It ends with 0 if all is well; a line tells of each failure. `make sanitize` and `make arm` run it too.
//
//   arrondi_selftest [--quick] [--no-fork] [--path NAME] [--seed N]
#include "selftest.h"

#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <thread>

#include "parallel.h"
#include "prepack.h"

#if defined(__has_feature)
#define ARRONDI_HAS_FEATURE(name) __has_feature(name)
#else
#define ARRONDI_HAS_FEATURE(name) 0
#endif

namespace arrondi {

std::atomic<int> failures{0};

void fail(const char* format, ...) {
    const int number = failures.fetch_add(1);
    if (number == 40) std::printf("FAILED … and more, which are only counted\n");
    if (number >= 40) return;
    char text[512];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    std::printf("FAILED %s: %s\n", path().name, text);
}

namespace {

// ---- packing -----------------------------------------------------------------------------------------------------

void try_packing(Kind kind, int n, int k, Random& random) {
    const char* name = kKindNames[static_cast<int>(kind)];
    const int ld = k + random.below(5), threads = any_of(kThreads, random), most = codes_of(kind);
    std::vector<uint8_t> codes(static_cast<size_t>((n - 1) * ld + k));
    for (uint8_t& code : codes) code = static_cast<uint8_t>(random.below(most));
    const size_t bytes = static_cast<size_t>(packed_bytes(kind, n, k));
    std::vector<uint8_t> packed(bytes, 0xee), streamed(bytes, 0xee);
    prepack(kind, codes.data(), ld, 8, 0, n, k, packed.data(), threads);
    for (int part = 0; part < 3; part++) {
        const int first = part == 0 ? 0 : random.below(n), count = part == 0 ? n : 1 + random.below(n - first);
        std::vector<uint8_t> back(static_cast<size_t>(count) * k, 0xee);
        unpack_rows(kind, packed.data(), k, first, count, back.data());
        for (int i = 0; i < count; i++)
            for (int j = 0; j < k; j++)
                if (back[static_cast<size_t>(i) * k + j] != codes[static_cast<size_t>(first + i) * ld + j])
                    return fail("%s n=%d k=%d: unpack_rows(%d, %d) gives code %d at [%d][%d], not %d", name, n, k, first, count,
                                back[static_cast<size_t>(i) * k + j], i, j, codes[static_cast<size_t>(first + i) * ld + j]);
    }
    // What is missing has code 0.
    const int columns = steps_of(kind, k) * 4 * step_quads(kind), rows = (n + kBlock - 1) / kBlock * kBlock;
    std::vector<uint8_t> padded(static_cast<size_t>(rows) * columns);
    unpack_rows(kind, packed.data(), columns, 0, rows, padded.data());
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < columns; j++)
            if ((i >= n || j >= k) && padded[static_cast<size_t>(i) * columns + j] != 0)
                return fail("%s n=%d k=%d: the code beyond the matrix at [%d][%d] is not 0", name, n, k, i, j);
    // The same codes from a stream of bits, and from signed bytes.
    const int bits = bits_of(kind);
    const int64_t row_bytes = (static_cast<int64_t>(k) * bits + 7) / 8 + random.below(2);
    std::vector<uint8_t> stream(static_cast<size_t>(n * row_bytes)), signed_codes(codes);
    for (uint8_t& code : signed_codes) code = static_cast<uint8_t>(code - most / 2);
    for (int i = 0; i < n; i++)
        for (int j = 0; j < k; j++)
            for (int b = 0; b < bits; b++) {
                const int64_t at = static_cast<int64_t>(j) * bits + b;
                if (codes[static_cast<size_t>(i) * ld + j] >> b & 1)
                    stream[static_cast<size_t>(i * row_bytes + at / 8)] |= static_cast<uint8_t>(1 << at % 8);
            }
    prepack(kind, stream.data(), row_bytes, bits, 0, n, k, streamed.data(), threads);
    if (streamed != packed) return fail("%s n=%d k=%d: prepack of a stream differs from prepack of bytes", name, n, k);
    prepack(kind, signed_codes.data(), ld, 8, most / 2, n, k, streamed.data(), threads);
    if (streamed != packed) return fail("%s n=%d k=%d: prepack of signed bytes differs", name, n, k);
    std::vector<uint8_t> bytes_out(static_cast<size_t>(n) * k, 0xee);
    unpack_stream(stream.data(), row_bytes, bits, -most / 2, n, k, bytes_out.data(), threads);
    for (int i = 0; i < n; i++)
        for (int j = 0; j < k; j++)
            if (bytes_out[static_cast<size_t>(i) * k + j] != signed_codes[static_cast<size_t>(i) * ld + j])
                return fail("%s n=%d k=%d: unpack_stream gives another code at [%d][%d]", name, n, k, i, j);
}

// ---- threads -----------------------------------------------------------------------------------------------------

void try_pool(int jobs) {
    Random random(5);
    // Many jobs of few pieces: every piece once, on whatever thread.
    for (int job = 0; job < jobs; job++) {
        const int pieces = random.below(9), threads = 1 + random.below(6);
        std::atomic<int> done[8] = {};
        parallel_for(pieces, threads, [&](int piece) { done[piece].fetch_add(1); });
        for (int piece = 0; piece < 8; piece++)
            if (done[piece].load() != (piece < pieces)) return fail("piece %d of %d ran %d times", piece, pieces, done[piece].load());
    }
    // What pieces wrote is there when the job is done, without a lock.
    for (int job = 0; job < jobs / 10; job++) {
        std::vector<int> written(256);
        parallel_for(256, 3, [&](int piece) { written[static_cast<size_t>(piece)] = job + piece; });
        for (int piece = 0; piece < 256; piece++)
            if (written[static_cast<size_t>(piece)] != job + piece) return fail("piece %d of a job was not seen", piece);
    }
    // Jobs inside pieces, and jobs from threads of the caller's own.
    std::atomic<int> inner{0};
    const auto nested = [&] {
        for (int job = 0; job < jobs / 100; job++)
            parallel_for(4, 3, [&](int) { parallel_for(5, 3, [&](int) { inner.fetch_add(1); }); });
    };
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 3; caller++) callers.emplace_back(nested);
    for (std::thread& caller : callers) caller.join();
    if (inner.load() != jobs / 100 * 60) fail("nested jobs ran %d pieces of %d", inner.load(), jobs / 100 * 60);
}

// The child of a fork has none of its parent's threads.
void try_fork() {
#if defined(__SANITIZE_THREAD__) || ARRONDI_HAS_FEATURE(thread_sanitizer)
    std::printf("fork: not tried, the thread sanitizer does not let a child start threads\n");
#else
    std::fflush(stdout);
    const pid_t child = fork();
    if (child == 0) {
        alarm(60);
        const int before = failures.load();
        try_pool(200);
        try_callers(9);
        std::fflush(stdout);
        _exit(failures.load() == before ? 0 : 1);
    }
    int status = 0;
    if (child < 0 || waitpid(child, &status, 0) != child || status != 0) fail("after fork the child ends with status %d", status);
#endif
}

int run(int argc, char** argv) {
    bool quick = false, forks = true;
    const char* only = nullptr;
    uint64_t seed = 1;
    for (int i = 1; i < argc; i++) {
        const bool more = i + 1 < argc;
        if (std::strcmp(argv[i], "--quick") == 0) {
            quick = true;
        } else if (std::strcmp(argv[i], "--no-fork") == 0) {
            forks = false;  // an emulator may not survive the fork of a process with threads
        } else if (std::strcmp(argv[i], "--path") == 0 && more) {
            only = argv[++i];
        } else if (std::strcmp(argv[i], "--seed") == 0 && more) {
            seed = std::strtoull(argv[++i], nullptr, 10);
        } else {
            std::printf("usage: %s [--quick] [--no-fork] [--path NAME] [--seed N]\n", argv[0]);
            return 2;
        }
    }
    if (only != nullptr)
        if (const char* why = path_missing(only)) {
            std::printf("%s: %s\n", only, why);
            return 2;
        }
    std::setvbuf(stdout, nullptr, _IOLBF, 0);
    Random random(seed);
    for (int kind = 0; kind < kKinds; kind++)
        for (int n : kN)
            for (int k : kK) try_packing(static_cast<Kind>(kind), n, k, random);
    try_pool(quick ? 1000 : 20000);
    std::printf("packing and threads: %d failures\n", failures.load());
    for (const char* const* name = path_names(); *name != nullptr; name++) {
        if (only != nullptr && std::strcmp(only, *name) != 0) continue;
        if (const char* why = path_missing(*name)) {
            std::printf("%-12s not tried: %s\n", *name, why);
            continue;
        }
        use_path(*name);
        const auto start = std::chrono::steady_clock::now();
        const int before = failures.load();
        const int products = try_all_products(seed, quick);
        try_callers(seed);
        try_rings(seed, quick);
        try_jobs(seed, quick);
        try_directions(seed, quick);
        try_codes(seed, quick);
        try_training(seed, quick);
        std::printf("%-12s %d products, %d failures, %.1f s\n", *name, products, failures.load() - before,
                    std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
    if (forks) try_fork();
    std::printf(failures.load() == 0 ? "all is well\n" : "%d failures\n", failures.load());
    return failures.load() == 0 ? 0 : 1;
}

}  // namespace
}  // namespace arrondi

int main(int argc, char** argv) { return arrondi::run(argc, argv); }
