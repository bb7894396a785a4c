// The best codes for a ring of numbers, by Viterbi's search over all states of a trellis at every place.
//
// A state's predecessors are those whose lowest bits are its highest: with `count` = states / 2^bits, the state s follows
// p · count + (s >> bits) for every p. So their cheapest is found once for all s that differ in the new code alone. Costs
// are 16 bits wide; what is far above the cheapest stops at the top, and the cheapest is taken off all of them now and then.
// A ring is closed in two searches: a first one across its seam, with free ends, gives the state there; the second begins and ends in it.
//
// Errors of codes of more than four bits are a few steps, whose squares would vanish in a cost: they are doubled first, once for each bit
// more. What that takes to the end of 16 bits lies so far off that it is not chosen, as long as targets are within the values.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "costs.h"
#include "trellis.h"

namespace arrondi {
namespace ARRONDI_PATH {

constexpr int kRenew = 16;  // places between two times that the cheapest is taken off
constexpr int kWhole = 4;  // most bits of a code whose error is squared as it is

template <int kBits>
inline void best_before(const int16_t* costs, int16_t* best, uint8_t* picks, int states) {
    const int count = states >> kBits;
    for (int u = 0; u < count; u += kCosts) {
        Costs least = load_costs(costs + u);
        Picks found = splat_cost(0);
        for (int p = 1; p < 1 << kBits; p++) {
            const Costs other = load_costs(costs + p * count + u);
            found = pick(found, least, other, static_cast<int16_t>(p));
            least = minimum(least, other);
        }
        store_costs(best + u, least);
        store_picks(picks + u, found);
    }
}

template <int kBits>
void ring_step(const RingScratch& s, uint8_t* picks, const int16_t* steps, int16_t target, int states) {
    best_before<kBits>(s.costs, s.best, picks, states);
    const Costs t = splat_cost(target);
    for (int i = 0; i < states; i += kCosts) {
        Costs error = difference(t, load_costs(steps + i));
        for (int bits = kWhole; bits < kBits; bits++) error = twice(error);
        store_costs(s.costs + i, add_costs(spread<kBits>(s.best + (i >> kBits)), square(error)));
    }
}

inline uint16_t cheapest(const int16_t* costs, int count) {
    uint16_t least = 65535;
    for (int i = 0; i < count; i++) least = std::min(least, static_cast<uint16_t>(costs[i]));
    return least;
}

inline void take_off(int16_t* costs, int states) {
    Costs least = load_costs(costs);
    for (int i = kCosts; i < states; i += kCosts) least = minimum(least, load_costs(costs + i));
    int16_t lanes[kCosts];
    store_costs(lanes, least);
    const Costs by = splat_cost(static_cast<int16_t>(cheapest(lanes, kCosts)));
    for (int i = 0; i < states; i += kCosts) store_costs(costs + i, subtract_costs(load_costs(costs + i), by));
}

// One search over places first … last - 1 of the ring, counted on past its end, from the costs as they are.
class RingSearch {
  public:
    RingSearch(const Rings& job, const RingScratch& scratch)
        : job_(job), s_(scratch), states_(1 << job.state_bits), stride_((states_ >> std::min(job.bits[0], job.bits[1])) + kStatePad) {}

    void forward(int64_t first, int64_t last) {
        using Step = void (*)(const RingScratch&, uint8_t*, const int16_t*, int16_t, int);
        static constexpr Step kSteps[] = {ring_step<1>, ring_step<2>, ring_step<3>, ring_step<4>,
                                          ring_step<5>, ring_step<6>, ring_step<7>, ring_step<8>};
        for (int64_t j = first; j < last; j++) {
            const int64_t i = j % job_.length;
            if ((j - first) % kRenew == kRenew - 1) take_off(s_.costs, states_);
            kSteps[bits(i) - 1](s_, s_.picks + (j - first) * stride_, job_.steps, s_.targets[i], states_);
        }
    }

    // The state before place `stop` of a search that began at `first` and ended before `last` in `state`; codes on the way, if asked for.
    uint32_t back(uint32_t state, int64_t first, int64_t last, int64_t stop, uint8_t* codes) const {
        for (int64_t j = last - 1; j >= stop; j--) {
            const int64_t i = j % job_.length;
            if (codes != nullptr) codes[i] = static_cast<uint8_t>(state & ((1u << bits(i)) - 1u));
            const uint32_t u = state >> bits(i);
            state = static_cast<uint32_t>(s_.picks[(j - first) * stride_ + u]) << (job_.state_bits - bits(i)) | u;
        }
        return state;
    }

    uint32_t best_end() const {
        const uint16_t least = cheapest(s_.costs, states_);
        uint32_t at = 0;
        while (static_cast<uint16_t>(s_.costs[at]) != least) at++;
        return at;
    }

  private:
    int bits(int64_t place) const { return job_.bits[place % 2]; }

    const Rings& job_;
    const RingScratch& s_;
    int states_;
    int64_t stride_;
};

inline void search_ring(const Rings& job, int64_t ring, const RingScratch& s) {
    const float* x = job.targets + ring * job.length;
    for (int64_t i = 0; i < job.length; i++) {
        const float steps = std::min(std::max(std::nearbyintf(x[i] * job.unit), -32768.0f), 32767.0f);
        s.targets[i] = static_cast<int16_t>(steps);
    }
    RingSearch search(job, s);
    const int states = 1 << job.state_bits;
    const int64_t n = job.length, side = std::min<int64_t>(job.window, n / 2);
    std::memset(s.costs, 0, states * sizeof(int16_t));
    search.forward(n - side, n + side);
    const uint32_t seam = search.back(search.best_end(), n - side, n + side, n, nullptr);
    std::fill(s.costs, s.costs + states, static_cast<int16_t>(-1));
    s.costs[seam] = 0;
    search.forward(0, n);
    search.back(seam, 0, n, 0, job.codes + ring * n);
}

}  // namespace ARRONDI_PATH
}  // namespace arrondi
