// Products with packed weights, for one path: the kind of the weight picks the code. Included after a lanes_*.h.
#pragma once

#include "ring.h"
#include "stream.h"
#include "turn.h"

namespace arrondi {
namespace ARRONDI_PATH {

template <template <Kind> class Action, class... Arguments>
inline void by_kind(Kind kind, const Arguments&... arguments) {
    switch (kind) {
        case Kind::u8: return Action<Kind::u8>::run(arguments...);
        case Kind::u6: return Action<Kind::u6>::run(arguments...);
        case Kind::u5: return Action<Kind::u5>::run(arguments...);
        case Kind::u4: return Action<Kind::u4>::run(arguments...);
        case Kind::u3: return Action<Kind::u3>::run(arguments...);
        case Kind::u2: return Action<Kind::u2>::run(arguments...);
        case Kind::u1: return Action<Kind::u1>::run(arguments...);
        case Kind::trit5: return Action<Kind::trit5>::run(arguments...);
        case Kind::table4: return Action<Kind::table4>::run(arguments...);
        case Kind::wide_table4: return Action<Kind::wide_table4>::run(arguments...);
        case Kind::rows4: return Action<Kind::rows4>::run(arguments...);
        case Kind::rows3: return Action<Kind::rows3>::run(arguments...);
        case Kind::rows2: return Action<Kind::rows2>::run(arguments...);
        case Kind::float4: return Action<Kind::float4>::run(arguments...);
        case Kind::float_rows4: return Action<Kind::float_rows4>::run(arguments...);
        case Kind::float_rows3: return Action<Kind::float_rows3>::run(arguments...);
        case Kind::float_rows2: return Action<Kind::float_rows2>::run(arguments...);
        case Kind::e4m3: return Action<Kind::e4m3>::run(arguments...);
        case Kind::e5m2: return Action<Kind::e5m2>::run(arguments...);
        case Kind::e3m2: return Action<Kind::e3m2>::run(arguments...);
        case Kind::e2m3: return Action<Kind::e2m3>::run(arguments...);
        case Kind::ring: return Action<Kind::ring>::run(arguments...);
    }
}

template <Kind kKind>
struct StreamAction {
    static void run(const Product& p, int first, int last) {
        const int tiles = (p.m + p.tokens - 1) / p.tokens;
        for (int block = first; block < last; block++)
            for (int tile = 0; tile < tiles; tile++) stream_kind<kKind>(p, tile, block);
    }
};

template <>
struct StreamAction<Kind::ring> {
    static void run(const Product& p, int first, int last) { stream_ring(p, first, last); }
};

template <Kind kKind>
struct PanelAction {
    static void run(const Product& p, int first, int last, uint8_t* scratch) { panel_kind<kKind>(p, first, last, scratch, any_rows); }
};

inline void stream(const Product& p, int first, int last) { by_kind<StreamAction>(p.weight.kind, p, first, last); }

inline void panel(const Product& p, int first, int last, uint8_t* scratch) {
    by_kind<PanelAction>(p.weight.kind, p, first, last, scratch);
}

}  // namespace ARRONDI_PATH
}  // namespace arrondi
