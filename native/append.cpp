// One new token of keys or values, rounded and put where attention reads it. A few hundred numbers: plain C++ for every path.
#define ARRONDI_PATH one_token
#include "append.h"
#include "lanes_portable.h"
#include "quantize.h"

namespace arrondi {
namespace ARRONDI_PATH {

// An offset as it reads back from storage; false if it does not fit.
inline bool round_offset(float& v, Type type) {
    const float size = std::fabs(v);
    if (type == Type::f32) return true;
    if (size > (type == Type::f16 ? 65504.0f : bits_to_float(0x7f7f0000u))) return false;
    if (type == Type::f16 && size < 0x1p-14f) {
        v = std::copysign(round_one_even(size * 0x1p24f) * 0x1p-24f, v);
        return true;
    }
    const int cut = type == Type::f16 ? 13 : 16;
    const uint32_t bits = float_to_bits(v);
    v = bits_to_float((bits + ((1u << (cut - 1)) - 1) + (bits >> cut & 1)) >> cut << cut);
    return true;
}

// A number that its storage holds exactly.
inline void put(void* place, Type type, int64_t at, float v) {
    const uint32_t bits = float_to_bits(v), sign = bits >> 16 & 0x8000;
    if (type == Type::f32) {
        static_cast<float*>(place)[at] = v;
    } else if (type == Type::bf16) {
        static_cast<uint16_t*>(place)[at] = static_cast<uint16_t>(bits >> 16);
    } else {
        const float size = std::fabs(v);
        const uint32_t half = size < 0x1p-14f ? static_cast<uint32_t>(size * 0x1p24f) : ((bits & 0x7fffffff) >> 13) - (112 << 10);
        static_cast<uint16_t*>(place)[at] = static_cast<uint16_t>(half | sign);
    }
}

inline bool append_row(const Append& a, int row, const float* x) {
    const int per = 8 / a.bits, groups = a.groups < 1 ? 1 : a.groups, size = a.width / groups;
    const int64_t block = a.at / a.block, lane = a.at % a.block;
    const float low_code = -a.lowest, high_code = static_cast<float>((1 << a.bits) - 1) - a.lowest;
    uint8_t* codes = a.codes + row * a.codes_stride;
    codes += a.keys ? block * (a.width / per) * a.block + lane : a.at / per * a.width;
    Groups how{};
    how.qmin = static_cast<int>(low_code), how.qmax = static_cast<int>(high_code);
    how.fit = a.offset != nullptr ? Fit::offset : Fit::symmetric;
    how.divisor = a.divisor, how.scale_type = a.type;
    for (int g = 0; g < groups; g++) {
        GridOf1 grid;
        Ends ends{x[g * size], x[g * size]};
        for (int c = g * size; c < (g + 1) * size; c++) {
            if (!is_finite(x[c])) return false;
            ends.low = x[c] < ends.low ? x[c] : ends.low;
            ends.high = x[c] > ends.high ? x[c] : ends.high;
        }
        grid.scale = a.unit;
        if (a.groups > 0) {
            if (!fit_ends(how, ends, 1.0f, grid) || !round_offset(grid.offset, a.type)) return false;
            const int64_t place = row * a.scale_stride + (block * groups + g) * a.block + lane;
            put(a.scale, a.type, place, grid.scale);
            if (a.offset != nullptr) put(a.offset, a.type, place, grid.offset);
        }
        for (int c = g * size; c < (g + 1) * size; c++) {
            float v = x[c];
            if (a.clip > 0.0f) v = v < -a.clip ? -a.clip : v > a.clip ? a.clip : v;
            v = (a.offset != nullptr ? v - grid.offset : v) / grid.scale;
            v = v < low_code ? low_code : v > high_code ? high_code : v;  // halves lie inside: the same code as clipping after it
            const int code = static_cast<int>(round_one_even(v) + a.lowest);
            const int shift = a.bits * static_cast<int>(a.keys ? c % per : a.at % per);
            uint8_t& byte = codes[a.keys ? static_cast<int64_t>(c / per) * a.block : c];
            const int mask = ((1 << a.bits) - 1) << shift;
            byte = static_cast<uint8_t>((byte & ~mask) | code << shift);
        }
    }
    return true;
}

}  // namespace ARRONDI_PATH

const char* append(const Append& a, bool& fine) {
    if (a.bits != 2 && a.bits != 4 && a.bits != 8) return "codes have 2, 4 or 8 bits";
    if (a.rows < 0 || a.width < 1 || a.block < 1 || a.at < 0 || a.groups == 0 || a.width % (8 / a.bits) != 0)
        return "there is no such place";
    if (a.groups > 0 && (a.width % a.groups != 0 || a.scale == nullptr)) return "groups do not fit the heads";
    if (a.x == nullptr || a.codes == nullptr) return "a buffer is null";
    fine = true;
    for (int row = 0; row < a.rows && fine; row++) fine = ARRONDI_PATH::append_row(a, row, a.x + static_cast<int64_t>(row) * a.width);
    return nullptr;
}

}  // namespace arrondi
