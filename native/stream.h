// Products with few rows: every block of the weight is decoded in registers, once, and multiplied there.
#pragma once

#include "spans.h"

namespace arrondi {
namespace ARRONDI_PATH {

constexpr int kAhead = 2048;  // bytes of codes that are asked for before they are needed

// `kDigits` 0: words. `kHalf`: groups of 16, two in a step.
template <Kind kKind, int kRowsHere, int kDigits, bool kHalf>
inline void stream_block(const Product& p, int tile, int block) {
    using D = Decode<kKind>;
    constexpr bool kWord = kDigits == 0;
    constexpr int kOfToken = kWord ? 1 : kDigits;
    constexpr int kTokens = kRowsHere / kOfToken;
    constexpr bool kShort = kShortSums && !kWord && D::kFold > 1;
    // Sums of a row, so that one product need not wait for the one before.
    constexpr int kChains = kRowsHere < 3 && !kShort ? 2 : 1;
    const Weight& w = p.weight;
    const uint8_t* codes = w.codes + static_cast<int64_t>(block) * w.steps * step_bytes(kKind);
    const uint8_t* x = p.tiles + tile * p.tile_bytes;
    const bool whole = whole_row<kOfToken>(p), shifted = has_offset(w);
    Floats total[kTokens], part[kTokens];
    for (int t = 0; t < kTokens; t++) total[t] = part[t] = zero_floats();
    Ints sum[kChains][kRowsHere];
    typename D::State state;

    const auto begin = [&](int s) {
        Ints fresh[kRowsHere];
        start_sums<kRowsHere>(w, zero_at(w, block, group_of(w, s * p.span)), sums_of(p, tile, s), fresh);
        for (int r = 0; r < kRowsHere; r++) sum[0][r] = whole && s > 0 ? add(sum[0][r], fresh[r]) : fresh[r];
        for (int c = 1; c < kChains; c++)
            for (int r = 0; r < kRowsHere; r++) sum[c][r] = zero_ints();
    };
    // Quads from … to of the step at `codes`.
    const auto multiply_quads = [&](auto from, auto to) {
        Shorts part[kRowsHere];
        unrolled<from, to>([&](auto q) {
            constexpr int kQuad = q, kPlace = kQuad - from;
            const Bytes w = D::template quad<kQuad>(codes, state);
            for (int r = 0; r < kRowsHere; r++) {
                Ints& into = sum[kQuad % kChains][r];
                if constexpr (kWord) {
                    into = dot_words(into, even_words(w), repeat4(x + 4 * r));
                    into = dot_words(into, odd_words(w), repeat4(x + 4 * (kRowsHere + r)));
                } else if constexpr (kShort) {
                    part[r] = dot_short(kPlace % D::kFold == 0 ? zero_shorts() : part[r], w, repeat4(x + 4 * r));
                    if (kQuad + 1 == to || (kPlace + 1) % D::kFold == 0) into = fold(into, part[r]);
                } else {
                    into = D::kWide ? dot8(into, w, repeat4(x + 4 * r)) : dot7(into, w, repeat4(x + 4 * r));
                }
            }
            x += (kWord ? 8 : 4) * kRowsHere;
        });
    };
    const auto end = [&](int s) {
        for (int c = 1; c < kChains; c++)
            for (int r = 0; r < kRowsHere; r++) sum[0][r] = add(sum[0][r], sum[c][r]);
        if (p.integers || (whole && s + 1 < p.spans)) return;
        const GroupOf16 g = group_at(w, block, group_of(w, s * p.span));
        const float* token_scale = scales_of(p, tile, s);
        const int32_t* digit_sum = sums_of(p, tile, s);
        const bool last = token_scale != nullptr && (s + 1 == p.spans || (s + 1) * p.span % p.x_span == 0);
        for (int t = 0; t < kTokens; t++) {
            part[t] = fma(value_of<kOfToken>(sum[0] + t * kOfToken), g.scale, part[t]);
            if (shifted) part[t] = fma(splat(all_of<kOfToken>(digit_sum + t * kOfToken)), g.offset, part[t]);
            if (!last) continue;
            total[t] = fma(part[t], splat(token_scale[t]), total[t]);
            part[t] = zero_floats();
        }
    };
    const auto arrive = [&] {
        for (int line = 0; line < step_bytes(kKind); line += 64) __builtin_prefetch(codes + kAhead + line);
        state = D::begin(codes, w, block);
    };
    using Start = std::integral_constant<int, 0>;
    using Middle = std::integral_constant<int, 4>;
    using Stop = std::integral_constant<int, D::kQuads>;

    if constexpr (kHalf) {
        for (int s = 0; s < p.spans; s += 2, codes += step_bytes(kKind)) {
            arrive();
            begin(s);
            multiply_quads(Start{}, Middle{});
            end(s);
            if (s + 1 == p.spans) break;
            begin(s + 1);
            multiply_quads(Middle{}, Stop{});
            end(s + 1);
        }
    } else {
        const int steps_of_span = p.span / (4 * D::kQuads);
        for (int s = 0, step = 0; s < p.spans; s++) {
            begin(s);
            for (const int stop = s + 1 == p.spans ? w.steps : step + steps_of_span; step < stop; step++) {
                arrive();
                multiply_quads(Start{}, Stop{});
                codes += step_bytes(kKind);
            }
            end(s);
        }
    }
    for (int t = 0; t < kTokens; t++) {
        const int token = tile * p.tokens + t;
        if (p.integers) {
            store_integers(p, token, block, joined<kOfToken>(sum[0] + t * kOfToken));
            continue;
        }
        if (by_token(p)) total[t] = mul(part[t], splat(scales_of(p, tile)[t]));
        store_result(p, token, block, total[t]);
    }
}

template <Kind kKind, int kRowsHere>
inline void stream_block_floats(const Product& p, int tile, int block) {
    using D = Decode<kKind>;
    const Weight& w = p.weight;
    const uint8_t* codes = w.codes + static_cast<int64_t>(block) * w.steps * step_bytes(kKind);
    const float* x = reinterpret_cast<const float*>(p.tiles + tile * p.tile_bytes);
    Numbers<kKind> numbers(w);
    Floats total[kRowsHere], sum[kRowsHere], ones[kRowsHere];
    for (int r = 0; r < kRowsHere; r++) total[r] = zero_floats();
    const int of_span = p.span / 4;
    const bool shifted = has_offset(w);
    int quad = 0;
    const int quads = w.steps * D::kQuads;
    for (int s = 0; s < p.spans; s++) {
        const int group = group_of(w, s * p.span);
        const GroupOf16 g = group_at(w, block, group);
        const uint8_t* zeros = zero_at(w, block, group);
        for (int r = 0; r < kRowsHere; r++) sum[r] = ones[r] = zero_floats();
        const Floats zero = zeros == nullptr ? splat(static_cast<float>(w.zero_all)) : to_floats(widen_bytes(zeros));
        const int stop = s + 1 == p.spans ? quads : quad + of_span;
        for (; quad < stop; quad++, x += 4 * kRowsHere) {
            if (quad % D::kQuads == 0) {
                for (int line = 0; line < step_bytes(kKind); line += 64) __builtin_prefetch(codes + kAhead + line);
                numbers.step(codes, w, block);
                codes += step_bytes(kKind);
            }
            Floats v[4];
            numbers.quad(quad % D::kQuads, v);
            for (int j = 0; j < 4; j++)
                for (int r = 0; r < kRowsHere; r++) sum[r] = fma(sub(v[j], zero), splat(x[j * kRowsHere + r]), sum[r]);
            if (shifted)
                for (int j = 0; j < 4; j++)
                    for (int r = 0; r < kRowsHere; r++) ones[r] = add(ones[r], splat(x[j * kRowsHere + r]));
        }
        for (int r = 0; r < kRowsHere; r++) {
            total[r] = fma(sum[r], g.scale, total[r]);
            if (shifted) total[r] = fma(ones[r], g.offset, total[r]);
        }
    }
    for (int r = 0; r < kRowsHere; r++) store_result(p, tile * p.tokens + r, block, total[r]);
}

template <Kind kKind, int kRowsHere, int kDigits>
inline void stream_spans(const Product& p, int tile, int block) {
    if (p.span == 16) {
        if constexpr (Decode<kKind>::kQuads == 8) stream_block<kKind, kRowsHere, kDigits, true>(p, tile, block);
    } else {
        stream_block<kKind, kRowsHere, kDigits, false>(p, tile, block);
    }
}

template <Kind kKind>
inline void stream_kind(const Product& p, int tile, int block) {
    const int count = p.m - tile * p.tokens < p.tokens ? p.m - tile * p.tokens : p.tokens;
    if (p.digits == 0) switch (count) {
            case 1: return stream_block_floats<kKind, 1>(p, tile, block);
            case 2: return stream_block_floats<kKind, 2>(p, tile, block);
            case 3: return stream_block_floats<kKind, 3>(p, tile, block);
            default: return stream_block_floats<kKind, 4>(p, tile, block);
        }
    if constexpr (integer(kKind)) {
        if constexpr (kWords)
            if (p.words) switch (count) {
                    case 1: return stream_spans<kKind, 1, 0>(p, tile, block);
                    case 2: return stream_spans<kKind, 2, 0>(p, tile, block);
                    case 3: return stream_spans<kKind, 3, 0>(p, tile, block);
                    default: return stream_spans<kKind, 4, 0>(p, tile, block);
                }
        switch (p.digits * 8 + count) {
            case 9: return stream_spans<kKind, 1, 1>(p, tile, block);
            case 10: return stream_spans<kKind, 2, 1>(p, tile, block);
            case 11: return stream_spans<kKind, 3, 1>(p, tile, block);
            case 12: return stream_spans<kKind, 4, 1>(p, tile, block);
            case 17: return stream_spans<kKind, 2, 2>(p, tile, block);
            case 18: return stream_spans<kKind, 4, 2>(p, tile, block);
            case 25: return stream_spans<kKind, 3, 3>(p, tile, block);
            case 26: return stream_spans<kKind, 6, 3>(p, tile, block);
            default: break;
        }
    }
}

}  // namespace ARRONDI_PATH
}  // namespace arrondi
