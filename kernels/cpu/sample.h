// From logits towards tokens: peaks, log-probabilities, the largest few, and penalties.
#pragma once

#include "abi.h"
#include "draw.h"
#include "select.h"

namespace {

INLINE bool has_nan(const float* values, int64_t count) {
    uint32_t found = 0;
    int64_t i = 0;
    for (; i + 2 * LANES <= count; i += 2 * LANES) found |= unordered(load(values + i), load(values + i + LANES));
    for (; i < count; ++i) found |= values[i] != values[i];
    return found != 0;
}

INLINE int64_t first_from(const float* values, int64_t count, float low) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES)
        if (const uint32_t found = at_least(load(values + i), set(low))) return i + __builtin_ctz(found);
    for (; i < count; ++i)
        if (values[i] >= low) return i;
    return 0;
}

void peaks(Team& team, const PeaksArgs& args) {
    team.each(args.rows, [&](int64_t row) {
        const float* logits = args.logits + row * args.stride;
        const float highest = highest_of(logits, args.vocab);
        args.ids[row] = first_from(logits, args.vocab, highest);
        args.values[row] = has_nan(logits, args.vocab) ? __builtin_nanf("") : highest;
    });
}

// Sum of e^(x - shift): in four vectors, then over these and their lanes as a tree.
INLINE float sum_of_powers(const float* x, int64_t count, float shift) {
    constexpr int CHAINS = 4;
    F32 sums[CHAINS] = {zero(), zero(), zero(), zero()};
    int64_t i = 0;
    for (; i + CHAINS * LANES <= count; i += CHAINS * LANES)
        for (int chain = 0; chain < CHAINS; ++chain)
            sums[chain] = sums[chain] + exp(load(x + i + chain * LANES) - set(shift));
    for (; i < count; i += LANES) {
        const int n = int(smaller(LANES, count - i));
        sums[0] = sums[0] + keep(exp(load(x + i, n) - set(shift)), n, zero());
    }
    return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// x - ln(sum of e^x). Blocks are summed as floats and added as doubles, lest a long row lose digits.
void log_probabilities(Team& team, const LogProbabilitiesArgs& args) {
    constexpr int64_t SUMMED = 4096;
    team.each(args.rows, [&](int64_t row) {
        const float* logits = args.logits + row * args.stride;
        float* out = args.out + row * args.vocab;
        const float highest = highest_of(logits, args.vocab);
        double total = 0;
        for (int64_t i = 0; i < args.vocab; i += SUMMED)
            total += double(sum_of_powers(logits + i, smaller(SUMMED, args.vocab - i), highest));
        const double shift = double(highest) + exact_log(total);
        for (int64_t i = 0; i < args.vocab; ++i) out[i] = float(double(logits[i]) - shift);
    });
}

struct Scored {
    float value;
    int32_t id;
};

// By value, the largest first; what is equal keeps its order. Merges of ever longer runs, between the two buffers.
INLINE Scored* sort_descending(Scored* from, Scored* to, int64_t count) {
    for (int64_t run = 1; run < count; run *= 2) {
        for (int64_t start = 0; start < count; start += 2 * run) {
            int64_t a = start, b = smaller(start + run, count);
            const int64_t middle = b, end = smaller(start + 2 * run, count);
            for (int64_t i = start; i < end; ++i)
                to[i] = a < middle && (b == end || from[a].value >= from[b].value) ? from[a++] : from[b++];
        }
        Scored* swapped = from;
        from = to;
        to = swapped;
    }
    return from;
}

void top_tokens(Team& team, const TopTokensArgs& args) {
    const size_t mark = team.mark();
    float* values = team.own_scratch<float>(args.vocab);
    Scored* buffers = team.own_scratch<Scored>(2 * args.count);
    team.each(args.count == 0 ? 0 : args.rows, [&](int64_t row) {
        const float* scores = args.scores + row * args.stride;
        const float lowest = -__builtin_inff(), highest = highest_of(scores, args.vocab);
        float last = lowest;
        if (count_from(scores, args.vocab, lowest) > args.count)
            last = threshold({scores, nullptr, args.vocab}, args.count, lowest, highest, values, nullptr);
        int64_t found = 0;
        each_from(scores, args.vocab, last, [&](int64_t id) {
            if (scores[id] > last) buffers[found++] = {scores[id], int32_t(id)};
        });
        Scored* sorted = sort_descending(buffers, buffers + args.count, found);
        each_from(scores, args.vocab, last, [&](int64_t id) {
            if (scores[id] == last && found < args.count) sorted[found++] = {scores[id], int32_t(id)};
        });
        for (int64_t id = 0; found < args.count; ++id)
            if (scores[id] != scores[id]) sorted[found++] = {scores[id], int32_t(id)};
        for (int64_t i = 0; i < args.count; ++i) {
            args.values[row * args.count + i] = sorted[i].value;
            args.ids[row * args.count + i] = sorted[i].id;
        }
    });
    team.reset(mark);
}

// Entries that are outside the logits are left out, and counted.
void apply_penalties(Team& team, const PenaltiesArgs& args) {
    constexpr int64_t ENTRIES = 1024;  // per claim
    team.each(divide_up(args.entries, ENTRIES), [&](int64_t piece) {
        int64_t wrong = 0;
        for (int64_t j = piece * ENTRIES; j < smaller(args.entries, (piece + 1) * ENTRIES); ++j) {
            const int64_t row = args.at_rows[j], id = args.token_ids[j], count = args.output_counts[j];
            if (uint64_t(row) >= uint64_t(args.rows) || uint64_t(id) >= uint64_t(args.vocab)) {
                ++wrong;
                continue;
            }
            float& logit = args.logits[row * args.stride + id];
            const float scaled = logit > 0 ? logit / args.repetition[row] : logit * args.repetition[row];
            logit = scaled - args.frequency[row] * float(count) - args.presence[row] * float(count > 0);
        }
        if (wrong > 0) __atomic_fetch_add(args.wrong, wrong, __ATOMIC_RELAXED);
    });
}

}  // namespace
