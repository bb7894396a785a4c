// The self-test of attention along principal directions: against sums in double precision, with nothing to read beyond what may be.
#include <algorithm>

#include "selftest.h"
#include "tokens.h"

namespace arrondi {

namespace {

// The codes of a token, in the order of its directions, and where each is in what it unpacks to.
struct Reading {
    std::vector<int> codes, places;
    Reading(const uint8_t* p, const Directions& s) {
        int begin = 0;
        for (const auto& [bytes, per] : {std::pair{s.eights, 1}, std::pair{s.fours, 2}, std::pair{s.twos, 4}}) {
            for (int i = 0; i < bytes * per; i++) {
                codes.push_back(p[i / per] >> (i % per * 8 / per) & ((1 << 8 / per) - 1));
                places.push_back(begin + i / per / 16 * 16 * per + i % per * 16 + i / per % 16);
            }
            p += bytes;
            begin += (bytes + 15) / 16 * 16 * per;
        }
    }
};

void try_along(int half, int plain, int tokens, int parts, Random& random) {
    const int key_heads = 1 + random.below(2), shared = 1 + random.below(6), heads = key_heads * shared, width = 2 * half + plain;
    const int64_t first = random.below(200);
    std::vector<uint8_t> memory[2];
    Directions sides[2];
    for (int i = 0; i < 2; i++) {
        Directions& s = sides[i];
        s = {nullptr, 0, random.below(3), random.below(20), 1 + random.below(24)};
        s.head_stride = static_cast<int64_t>(tokens) * s.bytes() + random.below(7);
        memory[i].resize(static_cast<size_t>(key_heads * s.head_stride + 16));
        for (uint8_t& b : memory[i]) b = static_cast<uint8_t>(random.next());
        s.codes = memory[i].data();
    }
    const Reading keys(sides[0].codes, sides[0]);
    const int count = static_cast<int>(keys.places.size());
    const auto numbers = [&](size_t size, float scale) {
        std::vector<float> x(size);
        for (float& v : x) v = random.normal() * scale;
        return x;
    };
    const auto at = [](int64_t a, int64_t b) { return static_cast<size_t>(a) * static_cast<size_t>(b); };
    const std::vector<float> query = numbers(at(heads, width), 0.1f), rows = numbers(at(key_heads * count, width), 0.02f);
    const std::vector<float> base = numbers(at(key_heads, width), 1.0f), speeds = numbers(static_cast<size_t>(half), 0.3f);
    const int blocks = static_cast<int>(first + tokens) / kTurnBlock + 1;
    std::vector<float> starts(at(blocks, 2 * half)), steps(at(kTurnBlock, 2 * half));
    const auto fill = [&](std::vector<float>& table, int each) {
        for (size_t i = 0; i < table.size(); i++) {
            const size_t row = i / static_cast<size_t>(2 * half), c = i % static_cast<size_t>(2 * half), h = static_cast<size_t>(half);
            const double angle = static_cast<double>(row) * each * static_cast<double>(speeds[c % h]);
            table[i] = static_cast<float>(c < h ? std::cos(angle) : std::sin(angle));
        }
    };
    fill(starts, kTurnBlock);
    fill(steps, 1);
    const int size = sides[1].unpacked();
    std::vector<float> sums(at(parts * heads, size)), tops(at(parts, heads)), totals(at(parts, heads));
    const AlongDirections a{heads, key_heads, half, plain, tokens, parts, query.data(), sides[0], sides[1], count, rows.data(),
                            keys.places.data(), base.data(), first, starts.data(), steps.data(), sums.data(), tops.data(),
                            totals.data(), any_of(kThreads, random)};
    if (const char* wrong = attend_along(a)) return fail("along: %s", wrong);
    for (int head = 0; head < heads; head++) {
        const int key_head = head / shared;
        std::vector<double> scores(static_cast<size_t>(tokens));
        for (int t = 0; t < tokens; t++) {
            const Reading token(sides[0].codes + key_head * sides[0].head_stride + static_cast<int64_t>(t) * sides[0].bytes(), sides[0]);
            std::vector<double> key(static_cast<size_t>(width));
            for (size_t c = 0; c < key.size(); c++) {
                key[c] = static_cast<double>(base[at(key_head, width) + c]);
                for (size_t i = 0; i < token.codes.size(); i++)
                    key[c] += token.codes[i] * static_cast<double>(rows[(at(key_head, count) + i) * static_cast<size_t>(width) + c]);
            }
            for (size_t c = 0; c < static_cast<size_t>(half); c++) {
                const double angle = static_cast<double>(first + t) * static_cast<double>(speeds[c]);
                const double one = key[c], two = key[c + static_cast<size_t>(half)];
                key[c] = one * std::cos(angle) - two * std::sin(angle);
                key[c + static_cast<size_t>(half)] = two * std::cos(angle) + one * std::sin(angle);
            }
            for (size_t c = 0; c < key.size(); c++)
                scores[static_cast<size_t>(t)] += key[c] * static_cast<double>(query[at(head, width) + c]);
        }
        const double top = *std::max_element(scores.begin(), scores.end());
        std::vector<double> wanted(static_cast<size_t>(size));
        double total = 0;
        for (int t = 0; t < tokens; t++) {
            const Reading token(sides[1].codes + key_head * sides[1].head_stride + static_cast<int64_t>(t) * sides[1].bytes(), sides[1]);
            const double share = std::exp(scores[static_cast<size_t>(t)] - top);
            total += share;
            for (size_t i = 0; i < token.codes.size(); i++) wanted[static_cast<size_t>(token.places[i])] += share * token.codes[i];
        }
        double all = 0;
        std::vector<double> got(static_cast<size_t>(size));
        for (int part = 0; part < parts; part++) {
            const size_t from = at(part, heads) + static_cast<size_t>(head);
            const double weight = std::exp(static_cast<double>(tops[from]) - top);
            all += weight * static_cast<double>(totals[from]);
            for (size_t i = 0; i < got.size(); i++) got[i] += weight * static_cast<double>(sums[from * got.size() + i]);
        }
        if (!(std::fabs(all - total) <= 1e-4 * total)) return fail("along half=%d plain=%d tokens=%d: %g, expected %g", half, plain, tokens, all, total);
        for (size_t i = 0; i < Reading(sides[1].codes, sides[1]).places.size(); i++) {
            const size_t place = static_cast<size_t>(Reading(sides[1].codes, sides[1]).places[i]);
            if (!(std::fabs(got[place] - wanted[place]) <= 1e-4 * (std::fabs(wanted[place]) + total)))
                return fail("along half=%d plain=%d tokens=%d parts=%d: sum %zu is %g, expected %g", half, plain, tokens, parts, i, got[place],
                            wanted[place]);
        }
    }
}

}  // namespace

void try_directions(uint64_t seed, bool quick) {
    Random random(seed + 2000);
    for (int turn = 0; turn < (quick ? 1 : 4); turn++)
        for (int tokens : {1, 3, 4, 17, 70})
            for (int half : {0, 16, 48}) try_along(half, half == 0 ? 32 : 16 * random.below(3), tokens, 1 + random.below(tokens > 3 ? 3 : 1), random);
}

}  // namespace arrondi
