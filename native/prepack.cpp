#include "prepack.h"

#include <cstring>
#include <vector>

#include "parallel.h"

namespace arrondi {
namespace {

// One plane of bits in a step: `width` bits of every code, from bit `low` of the code; 8 / width quads share a vector.
struct Plane {
    int width, low;
};

struct Planes {
    int count;
    Plane plane[2];
};

Planes planes_of(Kind kind) {
    switch (kind) {
        case Kind::u8:
        case Kind::e4m3:
        case Kind::e5m2: return {1, {{8, 0}}};
        case Kind::u6:
        case Kind::e3m2:
        case Kind::e2m3: return {2, {{4, 0}, {2, 4}}};
        case Kind::u5: return {2, {{4, 0}, {1, 4}}};
        case Kind::u4:
        case Kind::table4:
        case Kind::wide_table4:
        case Kind::rows4:
        case Kind::float4:
        case Kind::float_rows4: return {1, {{4, 0}}};
        case Kind::u3:
        case Kind::rows3:
        case Kind::float_rows3: return {2, {{2, 0}, {1, 2}}};
        case Kind::u2:
        case Kind::rows2:
        case Kind::float_rows2: return {1, {{2, 0}}};
        case Kind::u1: return {1, {{1, 0}}};
        case Kind::trit5:
        case Kind::ring: break;
    }
    return {0, {}};
}

// [quad][row][4] → the order for tables of rows, or back: of every four quads, lane 4s + v of quad q changes places with part q
// of segment s of vector v. It is its own inverse.
void turn(uint8_t* quads) {
    for (int half = 0; half < 512; half += 256)
        for (int s = 0; s < 4; s++)
            for (int v = 0; v < 4; v++)
                for (int q = 0; q < v; q++) {
                    uint8_t lane[4], *one = quads + half + 64 * q + 16 * s + 4 * v, *other = quads + half + 64 * v + 16 * s + 4 * q;
                    std::memcpy(lane, one, 4);
                    std::memcpy(one, other, 4);
                    std::memcpy(other, lane, 4);
                }
}

// codes [16 rows][step columns] of one step, in memory as [quad][row][4], → the step's bytes.
void pack_step(Kind kind, uint8_t* quads, uint8_t* out) {
    if (row_entry(kind) > 0) turn(quads);
    if (kind == Kind::trit5) {
        // The byte is the fraction value/243, so that multiplying by 3 moves one digit after another over the top.
        for (int i = 0; i < 64; i++) {
            int value = 0;
            for (int q = 0; q < 5; q++) value = value * 3 + quads[64 * q + i];
            out[i] = static_cast<uint8_t>((value * 256 + 242) / 243);
        }
        return;
    }
    Planes planes = planes_of(kind);
    for (int p = 0; p < planes.count; p++) {
        const Plane plane = planes.plane[p];
        const int per = 8 / plane.width, mask = (1 << plane.width) - 1;
        for (int v = 0; v < 8 / per; v++, out += 64)
            for (int i = 0; i < 64; i++) {
                int byte = 0;
                for (int q = 0; q < per; q++)
                    byte |= ((quads[64 * (v * per + q) + i] >> plane.low) & mask) << (plane.width * q);
                out[i] = static_cast<uint8_t>(byte);
            }
    }
}

void unpack_step(Kind kind, const uint8_t* in, uint8_t* quads) {
    if (kind == Kind::trit5) {
        for (int i = 0; i < 64; i++) {
            int fraction = in[i];
            for (int q = 0; q < 5; q++) {
                quads[64 * q + i] = static_cast<uint8_t>(fraction * 3 >> 8);
                fraction = fraction * 3 & 255;
            }
        }
        return;
    }
    std::memset(quads, 0, 512);
    Planes planes = planes_of(kind);
    for (int p = 0; p < planes.count; p++) {
        const Plane plane = planes.plane[p];
        const int per = 8 / plane.width, mask = (1 << plane.width) - 1;
        for (int v = 0; v < 8 / per; v++, in += 64)
            for (int q = 0; q < per; q++)
                for (int i = 0; i < 64; i++)
                    quads[64 * (v * per + q) + i] |=
                        static_cast<uint8_t>(((in[i] >> (plane.width * q)) & mask) << plane.low);
    }
    if (row_entry(kind) > 0) turn(quads);
}

// Sixteen rows of bytes (`row(i)` gives one, or null beyond the matrix) → one block.
template <class Row>
void pack_block(Kind kind, const Row& row, int k, uint8_t* out) {
    const int columns = 4 * step_quads(kind), steps = steps_of(kind, k);
    const uint8_t* rows[kBlock];
    for (int r = 0; r < kBlock; r++) rows[r] = row(r);
    uint8_t quads[512];
    for (int s = 0; s < steps; s++, out += step_bytes(kind)) {
        const int start = s * columns, have = k - start < columns ? k - start : columns;
        if (have < columns) std::memset(quads, 0, sizeof quads);
        for (int r = 0; r < kBlock; r++) {
            if (rows[r] == nullptr) {
                for (int q = 0; q < columns / 4; q++) std::memset(quads + 64 * q + 4 * r, 0, 4);
            } else if (have == columns) {
                for (int q = 0; q < columns / 4; q++) std::memcpy(quads + 64 * q + 4 * r, rows[r] + start + 4 * q, 4);
            } else {
                for (int c = 0; c < have; c++) quads[64 * (c / 4) + 4 * r + c % 4] = rows[r][start + c];
            }
        }
        pack_step(kind, quads, out);
    }
}

// One row of a little-endian bit stream → bytes, `add` added to each.
void spread(const uint8_t* in, int64_t row_bytes, int bits, int add, int k, uint8_t* out) {
    const unsigned mask = (1u << bits) - 1;
    if (bits == 8) {
        for (int j = 0; j < k; j++) out[j] = static_cast<uint8_t>(in[j] + add);
    } else if (bits == 4) {
        int j = 0;
        for (; j + 1 < k; j += 2) {
            out[j] = static_cast<uint8_t>((in[j / 2] & 15) + add);
            out[j + 1] = static_cast<uint8_t>((in[j / 2] >> 4) + add);
        }
        if (j < k) out[j] = static_cast<uint8_t>((in[j / 2] & 15) + add);
    } else {
        for (int j = 0; j < k; j++) {
            const int64_t at = static_cast<int64_t>(j) * bits, byte = at >> 3;
            unsigned pair = in[byte];
            if (byte + 1 < row_bytes) pair |= static_cast<unsigned>(in[byte + 1]) << 8;
            out[j] = static_cast<uint8_t>((pair >> (at & 7) & mask) + static_cast<unsigned>(add));
        }
    }
}

}  // namespace

int steps_of(Kind kind, int k) {
    const int columns = 4 * step_quads(kind);
    return (k + columns - 1) / columns;
}

int64_t packed_bytes(Kind kind, int n, int k) {
    return static_cast<int64_t>((n + kBlock - 1) / kBlock) * steps_of(kind, k) * step_bytes(kind);
}

void prepack(Kind kind, const uint8_t* rows, int64_t row_bytes, int bits, int add, int n, int k, uint8_t* out, int threads) {
    const int64_t size = static_cast<int64_t>(steps_of(kind, k)) * step_bytes(kind);
    parallel_for((n + kBlock - 1) / kBlock, threads, [&](int block) {
        std::vector<uint8_t> bytes(static_cast<size_t>(kBlock) * k);
        const int count = n - block * kBlock < kBlock ? n - block * kBlock : kBlock;
        for (int r = 0; r < count; r++)
            spread(rows + (block * kBlock + r) * row_bytes, row_bytes, bits, add, k, bytes.data() + static_cast<size_t>(r) * k);
        pack_block(kind, [&](int r) { return r < count ? bytes.data() + static_cast<size_t>(r) * k : nullptr; }, k,
                   out + block * size);
    });
}

void unpack_stream(const uint8_t* rows, int64_t row_bytes, int bits, int add, int64_t n, int k, uint8_t* out, int threads) {
    const int64_t at_once = 65536 / (k + 1) + 1;
    parallel_for(static_cast<int>((n + at_once - 1) / at_once), threads, [&](int piece) {
        const int64_t first = piece * at_once, last = first + at_once < n ? first + at_once : n;
        for (int64_t r = first; r < last; r++) spread(rows + r * row_bytes, row_bytes, bits, add, k, out + r * k);
    });
}

void unpack_rows(Kind kind, const uint8_t* packed, int k, int first, int count, uint8_t* out) {
    const int columns = 4 * step_quads(kind), steps = steps_of(kind, k);
    uint8_t quads[512];
    for (int i = 0; i < count;) {
        const int block = (first + i) / kBlock, lane = (first + i) % kBlock;
        const int here = kBlock - lane < count - i ? kBlock - lane : count - i;
        const uint8_t* in = packed + static_cast<int64_t>(block) * steps * step_bytes(kind);
        for (int s = 0; s < steps; s++, in += step_bytes(kind)) {
            unpack_step(kind, in, quads);
            const int start = s * columns, have = k - start < columns ? k - start : columns;
            for (int r = 0; r < here; r++)
                for (int c = 0; c < have; c++)
                    out[static_cast<int64_t>(i + r) * k + start + c] = quads[64 * (c / 4) + 4 * (lane + r) + c % 4];
        }
        i += here;
    }
}

}  // namespace arrondi
