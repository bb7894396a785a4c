// Codes of a bit-shift trellis.
#include "bind.h"
#include "trellis.h"

namespace arrondi {

void bind_trellis(nb::module_& m) {
    m.def("search_rings", [](int64_t rings, int64_t length, int even, int odd, int state_bits, uintptr_t targets, float unit,
                             uintptr_t steps, uintptr_t codes, int window, int threads) {
        run(search_rings, Rings{rings, length, {even, odd}, state_bits, at<float>(targets), unit, at<int16_t>(steps),
                                at<uint8_t>(codes), window, threads});
    });
    m.def("ring_values", [](int64_t rings, int64_t length, int even, int odd, int state_bits, uintptr_t codes, uintptr_t table,
                            uintptr_t values, int threads) {
        run(ring_values, RingValues{rings, length, {even, odd}, state_bits, at<uint8_t>(codes), at<float>(table),
                                    at<float>(values), threads});
    });
    m.def("ring_bytes", ring_bytes);
    const auto packing = [](const char* (*function)(const RingPacking&)) {
        return [function](int n, int k, int even, int odd, int ring, uintptr_t codes, uintptr_t packed, int threads) {
            run(function, RingPacking{n, k, {even, odd}, ring, at<uint8_t>(codes), at<uint8_t>(packed), threads});
        };
    };
    m.def("pack_rings", packing(pack_rings));
    m.def("unpack_rings", packing(unpack_rings));
}

}  // namespace arrondi
