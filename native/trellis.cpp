// Rings of a trellis: checks, and pieces for the threads.
#include "trellis.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <new>

#include "kernels.h"
#include "parallel.h"

namespace arrondi {
namespace {

constexpr int kRingsAtOnce = 64;  // that one piece decodes
constexpr int kRingSquare = kBlock * kBlock;

const char* wrong(int64_t rings, int64_t length, const int* bits, int state_bits) {
    if (rings < 0 || length < 1 || length > 1 << 20) return "there are no rings of that size";
    for (int i = 0; i < 2; i++)
        if (bits[i] < 1 || bits[i] > 8 || bits[i] >= state_bits) return "codes of a ring have too few or too many bits";
    if (state_bits < 8 || state_bits > 16) return "states have 8 to 16 bits";
    return length * std::min(bits[0], bits[1]) < state_bits ? "a ring is shorter than a state" : nullptr;
}

const char* wrong(const RingPacking& job) {
    if (job.n < 1 || job.k < 1) return "a size is not positive";
    for (const int bits : job.bits)
        if (bits < 1 || bits > 4) return "codes of a ring that is multiplied have 1 to 4 bits";
    if (job.ring == 0) return job.n % kBlock != 0 || job.k % kBlock != 0 ? "squares have sixteen rows and sixteen columns" : nullptr;
    return job.ring < 1 || job.ring % (kSlab * kBlock) != 0 ? "rings are made of whole slabs" : nullptr;
}

int square_bytes(const RingPacking& job) { return kBlock * (job.bits[0] + job.bits[1]) + 2; }
int slabs_of(const RingPacking& job) { return (job.n + kSlab * kBlock - 1) / (kSlab * kBlock); }
uint8_t* square_at(const RingPacking& job, int slab, int across, int block) {
    const int64_t bytes = square_bytes(job);
    return job.packed + slab * (job.k / kBlock * kSlab * bytes + kRingPad) + (static_cast<int64_t>(across) * kSlab + block) * bytes;
}

// A code of a square counted from its last.
uint8_t& code_of_square(const RingPacking& job, int first, int across, int place) {
    const int from_start = kRingSquare - 1 - place, row = first + from_start % kBlock, column = across * kBlock + from_start / kBlock;
    return job.codes[static_cast<int64_t>(row) * job.k + column];
}

void pack_squares(const RingPacking& job) {
    parallel_for(slabs_of(job), job.threads, [&](int slab) {
        for (int across = 0; across < job.k / kBlock; across++)
            for (int block = 0; block < kSlab; block++) {
                uint8_t* out = square_at(job, slab, across, block);
                const int first = (slab * kSlab + block) * kBlock;
                if (first >= job.n) {
                    std::memset(out, 0, static_cast<size_t>(square_bytes(job)));
                    continue;
                }
                uint32_t held = 0;
                for (int place = 0, bits = 0, left = square_bytes(job); left > 0; place++) {
                    held |= uint32_t{code_of_square(job, first, across, place % kRingSquare)} << bits;
                    for (bits += job.bits[(place + 1) % 2]; bits >= 8 && left > 0; bits -= 8, held >>= 8, left--) *out++ = static_cast<uint8_t>(held);
                }
            }
        std::memset(square_at(job, slab, job.k / kBlock, 0), 0, kRingPad);
    });
}

void unpack_squares(const RingPacking& job) {
    parallel_for(slabs_of(job), job.threads, [&](int slab) {
        for (int across = 0; across < job.k / kBlock; across++)
            for (int block = 0; block < kSlab; block++) {
                const uint8_t* in = square_at(job, slab, across, block);
                const int first = (slab * kSlab + block) * kBlock;
                for (int place = 0, at = 0; place < kRingSquare && first < job.n; at += job.bits[(place + 1) % 2], place++) {
                    const uint32_t two = in[at / 8] | static_cast<uint32_t>(in[at / 8 + 1]) << 8;
                    code_of_square(job, first, across, place) = static_cast<uint8_t>(two >> at % 8 & ((1u << job.bits[(place + 1) % 2]) - 1u));
                }
            }
    });
}

}  // namespace

const char* search_rings(const Rings& job) {
    if (const char* why = wrong(job.rings, job.length, job.bits, job.state_bits)) return why;
    if (job.window < 1) return "a seam is searched on both sides";
    const auto search = path().quantizers.search_ring;
    const size_t states = (size_t{1} << job.state_bits) + kStatePad;
    const size_t stride = ((size_t{1} << job.state_bits) >> std::min(job.bits[0], job.bits[1])) + kStatePad;
    const size_t halves = 2 * states + static_cast<size_t>(job.length) + kStatePad;
    std::atomic<bool> failed{false};
    parallel_for(static_cast<int>(job.rings), job.threads, [&](int ring) {
        // Kept by each thread: memory of that size is given back to the system and cleared each time otherwise.
        thread_local std::unique_ptr<int16_t[]> numbers;
        thread_local std::unique_ptr<uint8_t[]> picks;
        thread_local size_t have_numbers = 0, have_picks = 0;
        const size_t wanted = stride * static_cast<size_t>(job.length);
        if (have_numbers < halves) {
            numbers.reset(new (std::nothrow) int16_t[halves]);
            have_numbers = numbers ? halves : 0;
        }
        if (have_picks < wanted) {
            picks.reset(new (std::nothrow) uint8_t[wanted]);
            have_picks = picks ? wanted : 0;
        }
        if (!numbers || !picks) {
            failed = true;
            return;
        }
        search(job, ring, RingScratch{numbers.get(), numbers.get() + states, numbers.get() + 2 * states, picks.get()});
    });
    return failed ? "there is no memory for the search" : nullptr;
}

const char* ring_values(const RingValues& job) {
    if (const char* why = wrong(job.rings, job.length, job.bits, job.state_bits)) return why;
    const uint32_t mask = (1u << job.state_bits) - 1u;
    const int pieces = static_cast<int>((job.rings + kRingsAtOnce - 1) / kRingsAtOnce);
    parallel_for(pieces, job.threads, [&](int piece) {
        const int64_t last = std::min<int64_t>(job.rings, (piece + int64_t{1}) * kRingsAtOnce);
        for (int64_t ring = int64_t{piece} * kRingsAtOnce; ring < last; ring++) {
            const uint8_t* codes = job.codes + ring * job.length;
            float* values = job.values + ring * job.length;
            uint32_t state = 0;
            const int64_t before = std::min<int64_t>(job.length, job.state_bits);
            for (int64_t i = job.length - before; i < job.length; i++) state = state << job.bits[i % 2] | codes[i];
            for (int64_t i = 0; i < job.length; i++) {
                state = (state << job.bits[i % 2] | codes[i]) & mask;
                values[i] = job.table[state];
            }
        }
    });
    return nullptr;
}

int64_t ring_bytes(int n, int k, int even, int odd, bool squares) {
    const int64_t slabs = (n + kSlab * kBlock - 1) / (kSlab * kBlock);
    if (squares) return slabs * (static_cast<int64_t>(k / kBlock) * kSlab * (kBlock * (even + odd) + 2) + kRingPad);
    return slabs * (static_cast<int64_t>(k) * (kSlab * (even + odd) + 2) + kRingPad);
}

const char* pack_rings(const RingPacking& job) {
    if (const char* why = wrong(job)) return why;
    if (job.ring == 0) {
        pack_squares(job);
        return nullptr;
    }
    const int rows = kSlab * kBlock, slabs = (job.n + rows - 1) / rows, entry = kSlab * (job.bits[0] + job.bits[1]) + 2;
    const int last = std::max(job.n / job.ring - (job.n % job.ring > 0), 0) * job.ring;  // where the last ring begins
    parallel_for(slabs, job.threads, [&](int slab) {
        const int first = slab * rows, start = first < last ? first / job.ring * job.ring : last;
        const int stop = start < last ? start + job.ring : job.n;
        uint8_t* out = job.packed + slab * (static_cast<int64_t>(job.k) * entry + kRingPad);
        for (int c = 0; c < job.k; c++) {
            uint32_t held = 0;
            int bits = 0, left = entry;
            const auto append = [&](int row) {
                const uint32_t code = row < job.n ? job.codes[static_cast<int64_t>(row) * job.k + c] : 0u;
                held |= code << bits;
                for (bits += job.bits[row % 2]; bits >= 8 && left > 0; bits -= 8, held >>= 8, left--) *out++ = static_cast<uint8_t>(held);
            };
            for (int row = first + rows - 1; row >= first; row--) append(row);
            for (int row = first; left > 0;) append(row = row == start ? stop - 1 : row - 1);
        }
        std::memset(out, 0, kRingPad);
    });
    return nullptr;
}

const char* unpack_rings(const RingPacking& job) {
    if (const char* why = wrong(job)) return why;
    if (job.ring == 0) {
        unpack_squares(job);
        return nullptr;
    }
    const int rows = kSlab * kBlock, slabs = (job.n + rows - 1) / rows, entry = kSlab * (job.bits[0] + job.bits[1]) + 2;
    parallel_for(slabs, job.threads, [&](int slab) {
        const uint8_t* in = job.packed + slab * (static_cast<int64_t>(job.k) * entry + kRingPad);
        for (int c = 0; c < job.k; c++, in += entry)
            for (int row = slab * rows + rows - 1, at = 0; row >= slab * rows; at += job.bits[row % 2], row--) {
                const uint32_t two = in[at / 8] | static_cast<uint32_t>(in[at / 8 + 1]) << 8;
                if (row < job.n)
                    job.codes[static_cast<int64_t>(row) * job.k + c] =
                        static_cast<uint8_t>(two >> at % 8 & ((1u << job.bits[row % 2]) - 1u));
            }
    });
    return nullptr;
}

}  // namespace arrondi
