// Drawing a token. The arithmetic is that of ref/sampling.py, step by step: integers, and doubles that are added,
// multiplied, divided and rounded one by one. So the tokens are its tokens, in every instruction set.
#pragma once

#include "abi.h"
#include "select.h"

namespace {

constexpr double LN_2 = 0x1.62e42fefa39efp-1;
constexpr double LOG2_E = 1.0 / LN_2;
constexpr double WINDOW = 32;  // a score this far below the peak cannot win, its mass is 0
constexpr int MASS_BITS = 44;
constexpr uint32_t LIKELY_WORD = 0xfe000000u;  // one word in 128 is as large
constexpr int64_t BLOCK = 1024;                // tokens whose words are made together
constexpr int64_t BATCH = 256;                 // candidates whose noise is computed together

// Whole numbers below 2^51 as doubles and back, to nearest, ties to even: by an addition that every CPU has as a
// vector, and on which the compiler may not improve.
constexpr double SHIFT = 0x1.8p52;
constexpr int64_t SHIFT_BITS = 0x4338000000000000;
INLINE int64_t bits_of(double value) {
    int64_t bits;
    std::memcpy(&bits, &value, 8);
    return bits;
}
INLINE double double_of(int64_t bits) {
    double value;
    std::memcpy(&value, &bits, 8);
    return value;
}
INLINE double to_double(int64_t whole) { return double_of(whole + SHIFT_BITS) - SHIFT; }
INLINE int64_t to_whole(double value) { return bits_of(value + SHIFT) - SHIFT_BITS; }

// ln x of a positive normal double: x = 2^e m, m in [sqrt(1/2), sqrt(2)), ln m = 2 artanh((m - 1) / (m + 1)).
INLINE double exact_log(double x) {
    constexpr int64_t SQRT_HALF = 0x3fe6a09e667f3bcd, BIAS = 1023;
    const int64_t e = int64_t((uint64_t(bits_of(x)) - SQRT_HALF + (BIAS << 52)) >> 52) - BIAS;  // unsigned: of NaN too
    const double m = double_of(int64_t(uint64_t(bits_of(x)) - (uint64_t(e) << 52)));
    const double s = (m - 1) / (m + 1);
    const double z = s * s;
    double series = 1.0 / 13;
    series = series * z + 1.0 / 11;
    series = series * z + 1.0 / 9;
    series = series * z + 1.0 / 7;
    series = series * z + 1.0 / 5;
    series = series * z + 1.0 / 3;
    series = series * z + 1.0;
    return series * s * 2 + to_double(e) * LN_2;
}

INLINE double gumbel(uint32_t word) {
    const double uniform = to_double(int64_t(word) * 2 + 1) * 0x1p-33;
    return -exact_log(-exact_log(uniform));
}

// exp(score - peak) in units of 2^-MASS_BITS.
INLINE int64_t mass_of(double score, double peak) {
    const double distance = score - peak;
    const double x = distance < -WINDOW ? -WINDOW : distance;
    const int64_t e = to_whole(x * LOG2_E);
    const double r = x - to_double(e) * LN_2;
    double series = 1.0 / 362880;
    series = series * r + 1.0 / 40320;
    series = series * r + 1.0 / 5040;
    series = series * r + 1.0 / 720;
    series = series * r + 1.0 / 120;
    series = series * r + 1.0 / 24;
    series = series * r + 1.0 / 6;
    series = series * r + 1.0 / 2;
    series = series * r + 1.0;
    series = series * r + 1.0;
    return to_whole(series * double_of(int64_t(uint64_t(e + 1023 + MASS_BITS) << 52)));
}

struct Counter {
    uint32_t c0, c1, c2, c3;
};

// Philox4x32-10: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
INLINE Counter philox(Counter c, uint32_t k0, uint32_t k1) {
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
        const uint64_t p0 = uint64_t(c.c0) * 0xD2511F53u, p1 = uint64_t(c.c2) * 0xCD9E8D57u;
        c = {uint32_t(p1 >> 32) ^ c.c1 ^ k0, uint32_t(p1), uint32_t(p0 >> 32) ^ c.c3 ^ k1, uint32_t(p0)};
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return c;
}

// One row, and the best token so far.
struct Drawing {
    const float* logits;
    int64_t vocab;
    double temperature, peak;  // the peak of the scores
    int64_t min_mass;
    uint32_t key_low, key_high, sample, position;
    double best;
    int64_t best_id;
    int64_t waiting;  // candidates whose noise is still to come
    int32_t ids[BATCH];

    INLINE double score(float logit) const { return double(logit) / temperature; }

    // The smallest float whose score is `score` at least: scores grow with their logits.
    float logit_of(double wanted) const {
        int64_t low = key_of(-__builtin_inff()), high = key_of(__builtin_inff());
        while (low < high) {
            const int64_t middle = low + (high - low) / 2;
            score(value_of(middle)) >= wanted ? high = middle : low = middle + 1;
        }
        return value_of(low);
    }
};

// The waiting candidates against the best one. Looking at a token twice does no harm.
__attribute__((noinline)) void settle(Drawing& row) {
    uint32_t words[BATCH];
    double scores[BATCH], sums[BATCH];
    const int64_t count = row.waiting;
    for (int64_t i = 0; i < count; ++i) {
        const uint32_t id = uint32_t(row.ids[i]);
        const Counter c = philox({id >> 2, row.position, row.sample, 0}, row.key_low, row.key_high);
        const uint32_t low = id & 1 ? c.c1 : c.c0, high = id & 1 ? c.c3 : c.c2;
        words[i] = id & 2 ? high : low;
    }
    for (int64_t i = 0; i < count; ++i) scores[i] = row.score(row.logits[row.ids[i]]);
    for (int64_t i = 0; i < count; ++i) sums[i] = scores[i] + gumbel(words[i]);
    for (int64_t i = 0; i < count; ++i) {
        const bool better = sums[i] > row.best || (sums[i] == row.best && row.ids[i] < row.best_id);
        if (!better || (row.min_mass > 0 && mass_of(scores[i], row.peak) < row.min_mass)) continue;
        row.best = sums[i];
        row.best_id = row.ids[i];
    }
    row.waiting = 0;
}

INLINE void add_candidate(Drawing& row, int64_t id) {
    row.ids[row.waiting++] = int32_t(id);
    if (row.waiting == BATCH) settle(row);
}

// Of all tokens from `low` on, those with a large random word.
__attribute__((noinline)) void settle_likely(Drawing& row, float low) {
    alignas(64) uint32_t words[BLOCK];
    for (int64_t start = 0; start < row.vocab; start += BLOCK) {
        const uint32_t counter = uint32_t(start / 4);
        for (uint32_t i = 0; i < BLOCK / 4; ++i) {
            const Counter c = philox({counter + i, row.position, row.sample, 0}, row.key_low, row.key_high);
            words[4 * i] = c.c0;
            words[4 * i + 1] = c.c1;
            words[4 * i + 2] = c.c2;
            words[4 * i + 3] = c.c3;
        }
        const int64_t count = smaller(BLOCK, row.vocab - start);
        for (int64_t i = 0; i < count; i += LANES) {
            const int64_t n = smaller(LANES, count - i);
            const F32 word = to_f32(load_bits(words + i));  // as signed numbers: the largest are the negative ones
            uint32_t found = at_least(word, set(float(int32_t(LIKELY_WORD)))) & ~at_least(word, zero()) & valid(n);
            found &= at_least(load(row.logits + start + i, int(n)), set(low));
            for (; found != 0; found &= found - 1) add_candidate(row, start + i + __builtin_ctz(found));
        }
    }
    settle(row);
}

// The largest sum of score and noise among all tokens from `low` on, `count` of them.
INLINE void choose(Drawing& row, float low, int64_t count) {
    if (count * 16 > row.vocab) {
        settle_likely(row, low);
        // Noise grows with the word: what a small word can still lift to the best. The margin covers rounding.
        const float reach = row.logit_of(row.best - gumbel(LIKELY_WORD) - 1e-6);
        low = reach > low ? reach : low;
    }
    each_from(row.logits, row.vocab, low, [&](int64_t id) { add_candidate(row, id); });
    settle(row);
}

struct DrawScratch {
    float* values;    // [vocab]
    int64_t* masses;  // [vocab]
};

// The score from which on the mass of the tokens from `low` on first reaches `top_p` of theirs, as a logit.
INLINE float top_p_threshold(const Drawing& row, float low, float highest, int64_t count, double top_p,
                             const DrawScratch& scratch) {
    const float* values = row.logits;
    int64_t length = row.vocab;
    if (count * 2 < length) {
        length = 0;
        each_from(row.logits, row.vocab, low, [&](int64_t id) { scratch.values[length++] = row.logits[id]; });
        values = scratch.values;
    }
    int64_t total = 0;
    for (int64_t i = 0; i < length; ++i) {
        const int64_t mass = mass_of(row.score(values[i]), row.peak);
        scratch.masses[i] = values[i] >= low ? mass : 0;
        total += scratch.masses[i];
    }
    const int64_t wanted = int64_t(__builtin_ceil(top_p * double(total)));
    if (wanted > total) return highest;  // as the reference: a p next to 1 whose product was rounded up
    return threshold({values, scratch.masses, length}, wanted, low, highest, scratch.values, scratch.masses);
}

INLINE int64_t draw_row(Drawing& row, int64_t top_k, double top_p, double min_p, const DrawScratch& scratch) {
    const float highest = highest_of(row.logits, row.vocab);
    row.peak = row.score(highest);
    float low = row.logit_of(row.peak - WINDOW);
    int64_t count = count_from(row.logits, row.vocab, low);
    if (0 < top_k && top_k < count) {
        const float last = threshold({row.logits, nullptr, row.vocab}, top_k, low, highest, scratch.values, nullptr);
        low = row.logit_of(row.score(last));  // unequal logits may have one score
        count = count_from(row.logits, row.vocab, low);
    }
    if (top_p < 1) {
        const float last = top_p_threshold(row, low, highest, count, top_p, scratch);
        low = row.logit_of(row.score(last));
        count = count_from(row.logits, row.vocab, low);
    }
    if (min_p > 0) {
        row.min_mass = int64_t(__builtin_ceil(min_p * 0x1p44));
        const double least = exact_log((double(row.min_mass) - 0.5) * 0x1p-44) - 1e-6;  // below it a mass is too small
        const float likely = row.logit_of(row.peak + least);
        low = likely > low ? likely : low;
        count = count_from(row.logits, row.vocab, low);
    }
    choose(row, low, count);
    return row.best_id;
}

void draw(Team& team, const DrawArgs& args) {
    const size_t mark = team.mark();
    const DrawScratch scratch{team.own_scratch<float>(args.vocab), team.own_scratch<int64_t>(args.vocab)};
    team.each(args.rows, [&](int64_t i) {
        Drawing row;
        row.logits = args.logits + i * args.stride;
        row.vocab = args.vocab;
        row.temperature = args.temperatures[i];
        row.min_mass = 0;
        row.key_low = uint32_t(uint64_t(args.seeds[i]));
        row.key_high = uint32_t(uint64_t(args.seeds[i]) >> 32);
        row.sample = uint32_t(args.samples[i]);
        row.position = uint32_t(args.positions[i]);
        row.best = -__builtin_inf();
        row.best_id = 0;
        row.waiting = 0;
        args.token_ids[i] = draw_row(row, args.top_ks[i], args.top_ps[i], args.min_ps[i], scratch);
    });
    team.reset(mark);
}

}  // namespace
