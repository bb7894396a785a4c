// The column loop of GPTQ inside one block, for one path; see arrondi.rounding.gptq, whose arithmetic this is, step by step.
// Rows of the weight do not depend on each other: some of them at a time go through all columns of the block in cache.
#pragma once

#include "quantize.h"

namespace arrondi {
namespace ARRONDI_PATH {

// work[j] += factor[j] · difference for `count` columns: two roundings, as the twin has.
template <int kLanes>
inline void spread(const Floats* difference, const float* factor, int64_t count, float* work) {
    Floats d[kLanes];  // a copy of its own stays in registers
    for (int v = 0; v < kLanes; v++) d[v] = difference[v];
    for (int64_t j = 0; j < count; j++, work += 16 * kLanes) {
        const Floats u = splat(factor[j]);
        for (int v = 0; v < kLanes; v++)
            store_floats(work + 16 * v, add(load_floats(work + 16 * v), mul(u, d[v])));
    }
}

// kLanes registers of sixteen rows, of which `count` rows are there. The block's columns lie in `work` one after another.
template <int kLanes>
inline void sweep_rows(const Sweep& s, int64_t row, int64_t count, float* work) {
    constexpr int64_t kWide = 16 * kLanes;
    const bool whole = count == kWide;
    const auto load = [&](const float* from, Floats* to, float fill) {
        float some[kWide];
        if (!whole) {
            for (int64_t i = 0; i < kWide; i++) some[i] = i < count ? from[i] : fill;
            from = some;
        }
        for (int v = 0; v < kLanes; v++) to[v] = load_floats(from + 16 * v);
    };
    const auto store = [&](float* to, const Floats* from) {
        float some[kWide];
        float* at = whole ? to : some;
        for (int v = 0; v < kLanes; v++) store_floats(at + 16 * v, from[v]);
        if (!whole) std::memcpy(to, some, static_cast<size_t>(count) * 4);
    };
    Floats w[kLanes], scale[kLanes], zero[kLanes], offset[kLanes], residual[kLanes];
    for (int64_t c = s.first; c < s.stop; c++) {
        load(s.owed + (c - s.first) * s.m + row, w, 0.0f);
        for (int v = 0; v < kLanes; v++) store_floats(work + (c - s.first) * kWide + 16 * v, w[v]);
    }
    const Floats least = splat(static_cast<float>(s.qmin)), most = splat(static_cast<float>(s.qmax));
    for (int v = 0; v < kLanes; v++) zero[v] = offset[v] = zero_floats();
    for (int64_t c = s.first; c < s.last; c++) {
        const int64_t at = s.groups[c] * s.m + row;
        const float* factor = s.factor + c * s.ld;
        const Floats diagonal = splat(factor[c]);
        load(s.rows + c * s.m + row, w, 0.0f);
        load(s.scale + at, scale, 1.0f);
        if (s.zero != nullptr) load(s.zero + at, zero, 0.0f);
        if (s.offset != nullptr) load(s.offset + at, offset, 0.0f);
        uint8_t codes[kWide];
        for (int v = 0; v < kLanes; v++) {
            const Floats due = add(w[v], div(load_floats(work + (c - s.first) * kWide + 16 * v), diagonal));
            const Floats from_zero = s.offset != nullptr ? sub(due, offset[v]) : due;
            const Floats code = max(min(add(round_even(div(from_zero, scale[v])), zero[v]), most), least);
            store_low_bytes(codes + 16 * v, to_ints(code));
            Floats value = mul(sub(code, zero[v]), scale[v]);
            if (s.offset != nullptr) value = add(value, offset[v]);
            residual[v] = sub(due, value);
            w[v] = sub(w[v], value);
        }
        std::memcpy(s.codes + s.places[c] * s.m + row, codes, static_cast<size_t>(count));
        store(s.owed + (c - s.first) * s.m + row, residual);
        store(s.rows + c * s.m + row, w);
        spread<kLanes>(w, factor + c + 1, s.stop - c - 1, work + (c + 1 - s.first) * kWide);
    }
    for (int64_t c = s.last; c < s.stop; c++) {
        for (int v = 0; v < kLanes; v++) w[v] = load_floats(work + (c - s.first) * kWide + 16 * v);
        store(s.owed + (c - s.first) * s.m + row, w);
    }
}

void sweep(const Sweep& s, int64_t row, uint8_t* scratch) {
    float* work = reinterpret_cast<float*>(scratch);
    const int64_t end = row + kSweepRows < s.m ? row + kSweepRows : s.m;
    if (end - row == kSweepRows) return sweep_rows<kSweepRows / 16>(s, row, kSweepRows, work);
    for (; row < end; row += 16) sweep_rows<1>(s, row, end - row < 16 ? end - row : 16, work);
}

}  // namespace ARRONDI_PATH
}  // namespace arrondi
