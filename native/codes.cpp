// The plan of a network on codes: steps are checked when they are added, and cut into pieces for the threads when they run.
#include "codes.h"

#include <cstring>

#include "kernels.h"
#include "parallel.h"

namespace arrondi {
namespace {

constexpr const char* kSmall = "a value is smaller than what a step reads or writes";
constexpr const char* kShape = "a step has a shape that does not fit";
constexpr const char* kMissing = "a part of a layer is missing";
constexpr const char* kEnd = "multipliers or limits of codes make no sense";
constexpr int64_t kWork = 200000;  // products, or bytes four times as fast, that are worth another thread

// run(first, last) on parts of 0 … count - 1.
template <class Run>
void cut(int64_t count, int64_t work, int threads, const Run& run) {
    int64_t pieces = work / kWork + 1;
    if (pieces > 4 * threads) pieces = 4 * threads;
    if (pieces > count) pieces = count;
    if (threads < 2 || pieces < 2) return run(int64_t{0}, count);
    parallel_for(static_cast<int>(pieces), threads,
                 [&](int piece) { run(count * piece / pieces, count * (piece + 1) / pieces); });
}

int64_t pixels(int n, int height, int width) { return static_cast<int64_t>(n) * height * width; }

// Whether windows lie within an input to which edges were added.
template <class Layer>
bool fits(const Layer& c, int64_t reach) {
    if (c.n < 1 || c.height < 1 || c.width < 1 || c.channels < 1 || c.out_height < 1 || c.out_width < 1) return false;
    if (c.stride_height < 1 || c.stride_width < 1) return false;
    if (pixels(c.n, c.out_height, c.out_width) > INT32_MAX) return false;
    const int64_t line = static_cast<int64_t>(c.out_height - 1) * c.stride_height;
    const int64_t column = static_cast<int64_t>(c.out_width - 1) * c.stride_width;
    return line < c.height && column < c.width &&
           (line * c.width + column) * c.channels + reach <= pixels(1, c.height, c.width) * c.channels + kSlack;
}

int64_t furthest(const int32_t* offset, int count) {
    int64_t most = 0;
    for (int i = 0; i < count; i++) {
        if (offset[i] < 0) return INT64_MAX / 2;
        most = offset[i] > most ? offset[i] : most;
    }
    return most;
}

bool sensible(Fixed f) { return f.whole >= 0 && f.exponent >= -31 && f.exponent <= 30; }

// Whether `lanes` multipliers and the limits make sense.
bool sensible(const Requantizer& r, int lanes) {
    if (r.multiplier == nullptr || (r.floats && r.how != Arithmetic::floats)) return false;
    if (r.how != Arithmetic::floats)
        for (int i = 0; i < lanes; i++)
            if (!sensible(static_cast<const Fixed*>(r.multiplier)[i])) return false;
    return r.floats || (r.low >= 0 && r.low <= r.high && r.high <= 255 && r.zero >= 0 && r.zero <= 255);
}

bool sensible(const Pool& p) {
    if (p.n < 1 || p.height < 1 || p.width < 1 || p.channels < 1 || p.out_height < 1 || p.out_width < 1) return false;
    return p.kernel_height > 0 && p.kernel_width > 0 && static_cast<int64_t>(p.n) * p.out_height <= INT32_MAX;
}

}  // namespace

int CodePlan::slot(uint8_t* address, int64_t bytes) {
    slots_.push_back({address, bytes});
    const int number = static_cast<int>(slots_.size()) - 1;
    if (address == nullptr) given_.push_back(number);
    return number;
}

bool CodePlan::holds(int slot, int64_t bytes) const {
    return slot >= 0 && slot < static_cast<int>(slots_.size()) && slots_[static_cast<size_t>(slot)].bytes >= bytes;
}

const char* CodePlan::convolution(int x, int y, const Convolution& c) {
    if (c.runs < 1 || c.quads < 1 || c.outputs < 1 || c.x_from < 0 || c.y_from < 0 || c.y_from + c.outputs > c.y_channels)
        return kShape;
    if (c.offset == nullptr || c.weight == nullptr || c.bias == nullptr) return kMissing;
    if (!sensible(c.end, (c.outputs + 15) / 16 * 16)) return kEnd;
    if (!fits(c, c.x_from + furthest(c.offset, c.runs) + 4 * static_cast<int64_t>(c.quads))) return kShape;
    const int64_t count = pixels(c.n, c.out_height, c.out_width), made = count * c.y_channels * (c.end.floats ? 4 : 1);
    if (!holds(x, pixels(c.n, c.height, c.width) * c.channels + kSlack) || !holds(y, made)) return kSmall;
    steps_.push_back([=](uint8_t* const* slots, int threads) {
        cut(count, count * c.outputs * c.runs * c.quads * 4, threads, [&](int64_t first, int64_t last) {
            path().codes->convolve(c, slots[x], slots[y], static_cast<int>(first), static_cast<int>(last));
        });
    });
    return nullptr;
}

const char* CodePlan::depthwise(int x, int y, const Depthwise& d) {
    if (d.taps < 4 || d.taps % 4 != 0 || d.end.floats) return kShape;
    if (d.offset == nullptr || d.weight == nullptr || d.bias == nullptr) return kMissing;
    if (!sensible(d.end, (d.channels + 63) / 64 * 64)) return kEnd;
    if (!fits(d, furthest(d.offset, d.taps) + d.channels)) return kShape;
    const int64_t count = pixels(d.n, d.out_height, d.out_width);
    if (!holds(x, pixels(d.n, d.height, d.width) * d.channels + kSlack) || !holds(y, count * d.channels)) return kSmall;
    steps_.push_back([=](uint8_t* const* slots, int threads) {
        cut(count, count * d.channels * d.taps, threads, [&](int64_t first, int64_t last) {
            path().codes->depthwise(d, slots[x], slots[y], static_cast<int>(first), static_cast<int>(last));
        });
    });
    return nullptr;
}

const char* CodePlan::pair(int a, int b, int y, const Pair& p) {
    if (p.count < 0) return kShape;
    for (Fixed f : p.by)
        if (p.how != Arithmetic::floats && !sensible(f)) return kEnd;
    if (!holds(a, p.count + kSlack) || !holds(b, p.count + kSlack) || !holds(y, p.count)) return kSmall;
    steps_.push_back([=](uint8_t* const* slots, int threads) {
        cut(p.count, p.count, threads, [&](int64_t first, int64_t last) {
            path().codes->pair(p, slots[a], slots[b], slots[y], first, last);
        });
    });
    return nullptr;
}

const char* CodePlan::largest(int x, int y, const Pool& p) {
    if (!sensible(p)) return kShape;
    const int64_t rows = static_cast<int64_t>(p.n) * p.out_height, row = static_cast<int64_t>(p.out_width) * p.channels;
    if (!holds(x, pixels(p.n, p.height, p.width) * p.channels + kSlack) || !holds(y, rows * row)) return kSmall;
    steps_.push_back([=](uint8_t* const* slots, int threads) {
        cut(rows, rows * row * p.kernel_height * p.kernel_width, threads, [&](int64_t first, int64_t last) {
            path().codes->largest(p, slots[x], slots[y], static_cast<int>(first), static_cast<int>(last));
        });
    });
    return nullptr;
}

const char* CodePlan::mean(int x, int y, const Pool& p) {
    if (!sensible(p) || pixels(1, p.height, p.width) > (1 << 23)) return kShape;
    if (!sensible(p.end, 1)) return kEnd;
    const int64_t size = pixels(p.n, p.height, p.width) * p.channels;
    if (!holds(x, size + kSlack) || !holds(y, static_cast<int64_t>(p.n) * p.channels)) return kSmall;
    steps_.push_back([=](uint8_t* const* slots, int threads) {
        cut(p.n, size, threads, [&](int64_t first, int64_t last) {
            for (int64_t i = first; i < last; i++) path().codes->mean(p, slots[x], slots[y], static_cast<int>(i));
        });
    });
    return nullptr;
}

const char* CodePlan::average(int x, int y, const Pool& p) {
    if (!sensible(p) || p.counts == nullptr) return kShape;
    const int64_t rows = static_cast<int64_t>(p.n) * p.out_height, row = static_cast<int64_t>(p.out_width) * p.channels;
    if (!holds(x, pixels(p.n, p.height, p.width) * p.channels + kSlack) || !holds(y, rows * row)) return kSmall;
    steps_.push_back([=](uint8_t* const* slots, int threads) {
        cut(rows, rows * row * p.kernel_height * p.kernel_width, threads, [&](int64_t first, int64_t last) {
            path().codes->average(p, slots[x], slots[y], static_cast<int>(first), static_cast<int>(last));
        });
    });
    return nullptr;
}

const char* CodePlan::round(int x, int y, const Encoding& r) {
    if (r.n < 1 || r.channels < 1 || r.space < 1) return kShape;
    const int64_t size = pixels(r.n, r.channels, r.space);
    if (!holds(x, 4 * size) || !holds(y, size)) return kSmall;
    steps_.push_back([=](uint8_t* const* slots, int threads) {
        cut(r.n, size, threads, [&](int64_t first, int64_t last) {
            const float* from = reinterpret_cast<const float*>(slots[x]);
            for (int64_t i = first; i < last; i++) path().codes->round(r, from, slots[y], static_cast<int>(i));
        });
    });
    return nullptr;
}

const char* CodePlan::table(int x, int y, int64_t count, const uint8_t* table) {
    if (count < 0 || table == nullptr) return kShape;
    if (!holds(x, count) || !holds(y, count)) return kSmall;
    steps_.push_back([=](uint8_t* const* slots, int threads) {
        cut(count, count, threads, [&](int64_t first, int64_t last) {
            for (int64_t i = first; i < last; i++) slots[y][i] = table[slots[x][i]];
        });
    });
    return nullptr;
}

const char* CodePlan::restore(int x, int y, int64_t count, int zero, float scale) {
    if (count < 0) return kShape;
    if (!holds(x, count) || !holds(y, 4 * count)) return kSmall;
    steps_.push_back([=](uint8_t* const* slots, int threads) {
        cut(count, count, threads, [&](int64_t first, int64_t last) {
            float* to = reinterpret_cast<float*>(slots[y]);
            for (int64_t i = first; i < last; i++) to[i] = static_cast<float>(slots[x][i] - zero) * scale;
        });
    });
    return nullptr;
}

const char* CodePlan::leaky(int x, int y, int64_t count, float slope) {
    if (count < 0) return kShape;
    if (!holds(x, 4 * count) || !holds(y, 4 * count)) return kSmall;
    steps_.push_back([=](uint8_t* const* slots, int threads) {
        cut(count, count, threads, [&](int64_t first, int64_t last) {
            const float* from = reinterpret_cast<const float*>(slots[x]);
            float* to = reinterpret_cast<float*>(slots[y]);
            for (int64_t i = first; i < last; i++) to[i] = from[i] > 0.0f ? from[i] : from[i] * slope;
        });
    });
    return nullptr;
}

namespace {

// The last axis, and then the others around it.
template <class Number>
void move_numbers(const Number* x, Number* y, const Move& m) {
    for (int64_t i = 0; i < m.count[4]; i++) y[i * m.to[4]] = x[i * m.from[4]];
}

void move_axis(const uint8_t* x, uint8_t* y, const Move& m, int axis) {
    if (axis < 4) {
        for (int64_t i = 0; i < m.count[axis]; i++)
            move_axis(x + i * m.from[axis] * m.size, y + i * m.to[axis] * m.size, m, axis + 1);
    } else if (m.from[4] == 1 && m.to[4] == 1) {
        std::memcpy(y, x, static_cast<size_t>(m.count[4] * m.size));
    } else if (m.size == 1) {
        move_numbers(x, y, m);
    } else {
        move_numbers(reinterpret_cast<const float*>(x), reinterpret_cast<float*>(y), m);
    }
}

bool within(const int64_t* count, const int64_t* stride, int64_t start, int64_t numbers) {
    int64_t low = start, high = start;
    for (int i = 0; i < 5; i++) (stride[i] < 0 ? low : high) += (count[i] - 1) * stride[i];
    return low >= 0 && high < numbers;
}

}  // namespace

const char* CodePlan::move(int x, int y, const Move& m) {
    if ((m.size != 1 && m.size != 4) || !holds(x, 0) || !holds(y, m.filled)) return kShape;
    for (int64_t count : m.count)
        if (count < 1) return kShape;
    if (!within(m.count, m.from, m.x_start, slots_[static_cast<size_t>(x)].bytes / m.size)) return kSmall;
    if (!within(m.count, m.to, m.y_start, slots_[static_cast<size_t>(y)].bytes / m.size)) return kSmall;
    steps_.push_back([=](uint8_t* const* slots, int) {
        if (m.filled > 0) std::memset(slots[y], m.fill, static_cast<size_t>(m.filled));
        move_axis(slots[x] + m.x_start * m.size, slots[y] + m.y_start * m.size, m, 0);
    });
    return nullptr;
}

const char* CodePlan::gather(int x, int y, int size, int64_t count, const int32_t* index, int fill) {
    if ((size != 1 && size != 4) || count < 0 || index == nullptr || !holds(x, 0)) return kShape;
    for (int64_t i = 0; i < count; i++)
        if (!holds(x, (static_cast<int64_t>(index[i]) + 1) * size)) return kSmall;
    if (!holds(y, count * size)) return kSmall;
    steps_.push_back([=](uint8_t* const* slots, int) {
        for (int64_t i = 0; i < count; i++) {
            if (index[i] < 0)
                std::memset(slots[y] + i * size, fill, static_cast<size_t>(size));
            else if (size == 1)
                slots[y][i] = slots[x][index[i]];
            else
                std::memcpy(slots[y] + i * 4, slots[x] + static_cast<int64_t>(index[i]) * 4, 4);
        }
    });
    return nullptr;
}

const char* CodePlan::run(const std::vector<uint8_t*>& given, int times, int first, int last, int threads) const {
    if (given.size() != given_.size()) return "other values are given than the plan has";
    if (first < 0 || first > last || last > steps()) return "the plan has other steps";
    std::vector<uint8_t*> slots;
    for (const Slot& s : slots_) slots.push_back(s.address);
    for (int time = 0; time < times; time++) {
        for (size_t i = 0; i < given.size(); i++)
            slots[static_cast<size_t>(given_[i])] = given[i] + time * slots_[static_cast<size_t>(given_[i])].bytes;
        for (int i = first; i < last; i++) steps_[static_cast<size_t>(i)](slots.data(), threads);
    }
    return nullptr;
}

}  // namespace arrondi
