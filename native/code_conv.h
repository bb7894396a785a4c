// Convolutions of codes: a tile is some pixels times some blocks of sixteen outputs, whose sums stay in registers.
#pragma once

#include <cstdint>
#include <cstring>

#include "code_fixed.h"

namespace arrondi {
namespace ARRONDI_PATH {

// Low and high relative to the zero point, as floats: the product is limited before it is rounded, which gives the same.
struct Ends {
    const Requantizer& r;
    Floats low, high;
    Ints zero;
    explicit Ends(const Requantizer& r)
        : r(r), low(splat(static_cast<float>(r.low - r.zero))), high(splat(static_cast<float>(r.high - r.zero))),
          zero(splat(int32_t{r.zero})) {}
    Ints code(Floats v) const { return add(to_ints(min(max(v, low), high)), zero); }
    // Sixteen sums whose multipliers begin at a lane.
    Floats product(Ints sum, int64_t lane) const {
        return mul(to_floats(sum), load_floats(static_cast<const float*>(r.multiplier) + lane));
    }
    Ints codes(Ints sum, int64_t lane) const {
        return r.how == Arithmetic::floats ? code(product(sum, lane))
                                           : fixed_codes(sum, r, static_cast<const Fixed*>(r.multiplier) + lane);
    }
};

inline void store_some(void* p, const void* from, int64_t bytes) { std::memcpy(p, from, static_cast<size_t>(bytes)); }

// Where the windows of some pixels in a row begin, and where their results go.
template <class Layer>
struct Walk {
    const Layer& c;
    int column, line, image;
    Walk(const Layer& c, int pixel) : c(c), column(pixel % c.out_width), line(pixel / c.out_width % c.out_height),
                                      image(pixel / c.out_width / c.out_height) {}
    int64_t place() const {
        return ((static_cast<int64_t>(image) * c.height + line * c.stride_height) * c.width + column * c.stride_width) * c.channels;
    }
    void next() {
        if (++column < c.out_width) return;
        column = 0;
        if (++line == c.out_height) line = 0, image++;
    }
};

template <int kPixels, int kWide>
void code_tile(const Convolution& c, const Ends& ends, const uint8_t* const* places, int block, uint8_t* y, int pixels) {
    const int steps = c.runs * c.quads;
    const int64_t apart = static_cast<int64_t>(steps) * 64;
    const int8_t* weight = c.weight + block * apart;
    Ints sum[kPixels][kWide];
    for (int v = 0; v < kWide; v++)
        for (int r = 0; r < kPixels; r++) sum[r][v] = load_ints(c.bias + 16 * (block + v));
    const uint8_t* place[kPixels];
    for (int r = 0; r < kPixels; r++) place[r] = places[r];
    for (int run = 0; run < c.runs; run++) {
        int64_t at = c.offset[run];
        for (int q = 0; q < c.quads; q++, at += 4, weight += 64) {
            Bytes w[kWide];
            for (int v = 0; v < kWide; v++) w[v] = load_bytes(weight + v * apart);
            for (int r = 0; r < kPixels; r++) {
                const Bytes x = repeat4(place[r] + at);
                for (int v = 0; v < kWide; v++) sum[r][v] = dot8(sum[r][v], x, w[v]);
            }
        }
    }
    for (int v = 0; v < kWide; v++) {
        const int from = 16 * (block + v), left = c.outputs - from < 16 ? c.outputs - from : 16;
        for (int r = 0; r < kPixels; r++) {
            if (r >= pixels) break;
            const int64_t to = static_cast<int64_t>(r) * c.y_channels + from;
            if (c.end.floats) {
                float some[16];
                store_floats(some, ends.product(sum[r][v], from));
                store_some(y + 4 * to, some, 4 * left);
            } else if (left == 16) {
                store_low_bytes(y + to, ends.codes(sum[r][v], from));
            } else {
                uint8_t some[16];
                store_low_bytes(some, ends.codes(sum[r][v], from));
                store_some(y + to, some, left);
            }
        }
    }
}

// Blocks block … block + kWide of pixels first … last.
template <int kPixels, int kWide>
void code_strip(const Convolution& c, const Ends& ends, const uint8_t* x, uint8_t* y, int first, int last, int block) {
    const int64_t size = c.end.floats ? 4 : 1;
    Walk<Convolution> walk(c, first);
    int pixel = first;
    while (pixel < last) {
        const uint8_t* places[kPixels];
        const int pixels = last - pixel < kPixels ? last - pixel : kPixels;
        for (int r = 0; r < kPixels; r++) {
            places[r] = r < pixels ? x + walk.place() + c.x_from : places[0];
            if (r < pixels) walk.next();
        }
        uint8_t* to = y + (static_cast<int64_t>(pixel) * c.y_channels + c.y_from) * size;
        if (pixels == 1)
            code_tile<1, kWide>(c, ends, places, block, to, 1);
        else
            code_tile<kPixels, kWide>(c, ends, places, block, to, pixels);
        pixel += pixels;
    }
}

// Pixels of a tile that leave registers for the weights and one activation.
constexpr int pixels_of(int wide) { return kVectors == 1 || wide == 4 ? kRows : 8; }

inline void convolve(const Convolution& c, const uint8_t* x, void* out, int first, int last) {
    const Ends ends(c.end);
    uint8_t* y = static_cast<uint8_t*>(out);
    const int blocks = (c.outputs + 15) / 16;
    int block = 0;
    if constexpr (kVectors == 4) {
        for (; block + 4 <= blocks; block += 4) code_strip<pixels_of(4), 4>(c, ends, x, y, first, last, block);
        if (block + 3 == blocks) code_strip<pixels_of(3), 3>(c, ends, x, y, first, last, block);
        if (block + 2 == blocks) code_strip<pixels_of(2), 2>(c, ends, x, y, first, last, block);
        if (block + 1 == blocks) code_strip<pixels_of(1), 1>(c, ends, x, y, first, last, block);
    } else {
        for (; block < blocks; block++) code_strip<pixels_of(1), 1>(c, ends, x, y, first, last, block);
    }
}

// Four taps of 64 channels become quads by two zips; vector v then has channels 4v … 4v+3 of each sixteen. The sums' low bytes, one
// of every vector in a lane, lie like that too: a look-up within sixteen bytes puts them in order.
inline void depthwise(const Depthwise& d, const uint8_t* x, uint8_t* y, int first, int last) {
    static const uint8_t kOrder[16] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
    const Bytes order = repeat16(kOrder);
    const Ends ends(d.end);
    for (int block = 0; block * 64 < d.channels; block++) {
        const int left = d.channels - block * 64;
        Walk<Depthwise> walk(d, first);
        for (int pixel = first; pixel < last; pixel++, walk.next()) {
            const uint8_t* place = x + walk.place() + block * 64;
            const int8_t* weight = d.weight + static_cast<int64_t>(block) * d.taps * 64;
            Ints sum[4];
            for (int v = 0; v < 4; v++) sum[v] = load_ints(d.bias + 64 * block + 16 * v);
            for (int tap = 0; tap < d.taps; tap += 4, weight += 256) {
                const Bytes a = load_bytes(place + d.offset[tap]), b = load_bytes(place + d.offset[tap + 1]);
                const Bytes e = load_bytes(place + d.offset[tap + 2]), f = load_bytes(place + d.offset[tap + 3]);
                const Bytes ab = zip_low<1>(a, b), ef = zip_low<1>(e, f);
                const Bytes ab2 = zip_high<1>(a, b), ef2 = zip_high<1>(e, f);
                sum[0] = dot8(sum[0], zip_low<2>(ab, ef), load_bytes(weight));
                sum[1] = dot8(sum[1], zip_high<2>(ab, ef), load_bytes(weight + 64));
                sum[2] = dot8(sum[2], zip_low<2>(ab2, ef2), load_bytes(weight + 128));
                sum[3] = dot8(sum[3], zip_high<2>(ab2, ef2), load_bytes(weight + 192));
            }
            Ints code[4];
            for (int v = 0; v < 4; v++) code[v] = ends.codes(sum[v], 64 * block + 16 * v);
            const Ints even = or_ints(code[0], shift_left<8>(code[1])), odd = or_ints(code[2], shift_left<8>(code[3]));
            const Bytes bytes = look_up(bytes_of(or_ints(even, shift_left<16>(odd))), order);
            uint8_t* to = y + static_cast<int64_t>(pixel) * d.channels + block * 64;
            if (left >= 64) {
                store_bytes(to, bytes);
            } else {
                uint8_t some[64];
                store_bytes(some, bytes);
                store_some(to, some, left);
            }
        }
    }
}

}  // namespace ARRONDI_PATH
}  // namespace arrondi
