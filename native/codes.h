// Networks on codes of eight bits: what crosses from the module to the compiled paths, and the plan that runs them in order.
//
// Codes are unsigned in memory: signed ones are kept 128 higher, and so are their zero points. Values with space lie channels
// last, (n, height, width, channels). Behind every value of codes there are kSlack bytes that may be read.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

namespace arrondi {

constexpr int64_t kSlack = 64;

// How sums become codes: by float32 multipliers, or by fixed-point ones that round once or twice (code_fixed.h).
enum class Arithmetic : int { floats, once, twice };

// whole · 2^(exponent - 31)
struct Fixed {
    int32_t whole, exponent;
};

// From int32 sums to codes: the sum as float32 times a multiplier, rounded half to even, plus zero, within low … high. Or to
// float32: the product alone.
struct Requantizer {
    const void* multiplier;  // float32, or Fixed
    int zero, low, high;
    Arithmetic how;
    bool floats;
};

// A convolution without edges (they were added before), or a product of matrices: one pixel a row.
//
// What a window covers is `runs` pieces of the input, each of `quads` times four bytes in a row; weights of what a run has
// too much are 0. Zero points are in the bias. For groups one by one, x_from and y_from say where their channels begin.
struct Convolution {
    int n, height, width, channels;     // of the input
    int out_height, out_width;
    int stride_height, stride_width;    // pixels
    int x_from;                         // first channel
    int outputs, y_from, y_channels;    // made, where the first goes, of a pixel of y
    int runs, quads;
    const int32_t* offset;  // (runs,) bytes from the first pixel of a window
    const int8_t* weight;   // [blocks of 16 outputs][runs · quads][16][4]
    const int32_t* bias;    // [blocks][16]
    Requantizer end;        // multiplier [blocks][16]
};

// One filter a channel, 64 channels at a time. Lanes: vector v has channels 4v … 4v+3 of each 16, see code_conv.h.
struct Depthwise {
    int n, height, width, channels;
    int out_height, out_width;
    int stride_height, stride_width;
    int taps;               // a multiple of four; weights of those that are too many are 0
    const int32_t* offset;  // (taps,)
    const int8_t* weight;   // [blocks of 64 channels][taps / 4][4 vectors][16][4]
    const int32_t* bias;    // [blocks][4][16]
    Requantizer end;        // multiplier [blocks][4][16]
};

// y = a · of_a + (b · of_b + fixed), each rounded once to float32, or (a - zero_a)(b - zero_b) · of_a + fixed, rounded twice;
// then to the nearest integer. Signed codes take `down` off before and `up` is added after.
// In fixed point the sum is (a - down_a) · 2^20 · by[0] + (b - down_b) · 2^20 · by[1], times by[2], and the product is times by[0];
// `fixed` is the zero point.
struct Pair {
    int64_t count;
    bool product;
    int down_a, down_b, up;
    float of_a, of_b, fixed;
    int low, high;
    Arithmetic how;
    Fixed by[3];
};

// The largest code or the mean of a window, or the mean of all pixels.
struct Pool {
    int n, height, width, channels;
    int out_height, out_width;
    int kernel_height, kernel_width, stride_height, stride_width, dilation_height, dilation_width;
    int top, left;   // pixels of a window before the first of the input
    int zero;        // of a mean: what one pixel counts too much
    Requantizer end; // of a mean: sixteen times its multiplier
    // Of the mean of every window: the mean of (code - zero) · scale, in float32, one number after another, as float32 over
    // out_scale plus the zero point of `end`.
    float scale, out_scale;
    int up;               // by how much codes are higher in memory than they are
    const float* counts;  // (out_height, out_width)
};

// float32 (n, channels, space) → codes (n, space, channels).
struct Encoding {
    int n, channels, space;
    float scale;
    int zero, low, high;
};

struct Codes {
    // Outputs of pixels first … last of all n images.
    void (*convolve)(const Convolution&, const uint8_t* x, void* y, int first, int last);
    void (*depthwise)(const Depthwise&, const uint8_t* x, uint8_t* y, int first, int last);
    void (*pair)(const Pair&, const uint8_t* a, const uint8_t* b, uint8_t* y, int64_t first, int64_t last);
    void (*largest)(const Pool&, const uint8_t* x, uint8_t* y, int first, int last);  // rows of all n results
    void (*mean)(const Pool&, const uint8_t* x, uint8_t* y, int image);
    void (*average)(const Pool&, const uint8_t* x, uint8_t* y, int first, int last);  // rows, too
    void (*round)(const Encoding&, const float* x, uint8_t* y, int image);
};

// Numbers moved from one place to another, five axes at most; where y is larger than what comes, it is filled first.
struct Move {
    int size;         // bytes of a number
    int64_t count[5];
    int64_t from[5], to[5];  // numbers from one to the next
    int64_t x_start, y_start;
    int64_t filled;   // bytes of y that get `fill` first
    int fill;
};

// Steps in order. Values are slots: a buffer that stays where it is, or one that is given at every run.
class CodePlan {
public:
    // Adds a slot of so many bytes; address null: given at every run, in the order in which they were added.
    int slot(uint8_t* address, int64_t bytes);

    // Null, or what is wrong. Weights and what goes with them must outlive the plan.
    const char* convolution(int x, int y, const Convolution& c);
    const char* depthwise(int x, int y, const Depthwise& d);
    const char* pair(int a, int b, int y, const Pair& p);
    const char* largest(int x, int y, const Pool& p);
    const char* mean(int x, int y, const Pool& p);
    const char* average(int x, int y, const Pool& p);
    const char* round(int x, int y, const Encoding& e);
    const char* table(int x, int y, int64_t count, const uint8_t* table);                 // 256 bytes
    const char* restore(int x, int y, int64_t count, int zero, float scale);              // to float32
    const char* leaky(int x, int y, int64_t count, float slope);  // of float32: x, or x · slope below zero
    const char* move(int x, int y, const Move& m);
    // y[i] = x[index[i]] for numbers of `size` bytes; bytes of value `fill` where the index is negative.
    const char* gather(int x, int y, int size, int64_t count, const int32_t* index, int fill);

    int steps() const { return static_cast<int>(steps_.size()); }
    // Runs steps first … last - 1 `times` over, each time on the next part of the given values.
    const char* run(const std::vector<uint8_t*>& given, int times, int first, int last, int threads) const;

private:
    struct Slot {
        uint8_t* address;
        int64_t bytes;
    };
    bool holds(int slot, int64_t bytes) const;

    std::vector<Slot> slots_;
    std::vector<int> given_;
    std::vector<std::function<void(uint8_t* const* slots, int threads)>> steps_;
};

}  // namespace arrondi
