// The router of a mixture of experts, and the grouping of tokens by expert.
#pragma once

#include "abi.h"
#include "dense.h"

namespace {

constexpr float TAKEN = -1;  // less than any probability

// The first of the largest of values[0 .. count), count a multiple of LANES, no NaN.
INLINE int64_t first_peak(const float* values, int64_t count) {
    F32 best = load(values);
    for (int64_t i = LANES; i < count; i += LANES) best = max(best, load(values + i));
    const F32 wanted = set(peak(best));
    for (int64_t i = 0; i < count; i += LANES)
        if (const uint32_t found = at_least(load(values + i), wanted)) return i + __builtin_ctz(found);
    return 0;
}

// Logits [experts] become probabilities, what pads them to whole vectors TAKEN. False if a logit is NaN or infinite.
INLINE bool softmax_row(float* values, int64_t experts) {
    F32 best = set(-__builtin_inff());
    for (int64_t i = 0; i < experts; i += LANES)
        best = max(best, keep(load(values + i), int(smaller(LANES, experts - i)), best));
    const F32 most = set(peak(best));
    F32 total = zero();
    for (int64_t i = 0; i < experts; i += LANES) {
        const F32 p = exp(load(values + i) - most);
        store(values + i, p);
        total = total + keep(p, int(smaller(LANES, experts - i)), zero());
    }
    const float whole = sum(total);
    if (!(whole >= 1)) return false;
    for (int64_t i = 0; i < experts; i += LANES) {
        const F32 p = load(values + i) / set(whole);
        store(values + i, keep(p, int(smaller(LANES, experts - i)), set(TAKEN)));
    }
    return true;
}

// Every expert outside the `top_groups` groups with the greatest sum of their two best is TAKEN.
INLINE void keep_best_groups(float* p, int64_t experts, int64_t groups, int64_t top_groups, float* scores) {
    const int64_t size = experts / groups, padded = divide_up(groups, LANES) * LANES;
    for (int64_t group = 0; group < padded; ++group) {
        float first = TAKEN, second = TAKEN;
        for (int64_t e = group * size; group < groups && e < (group + 1) * size; ++e) {
            if (p[e] > first) {
                second = first;
                first = p[e];
            } else if (p[e] > second) {
                second = p[e];
            }
        }
        scores[group] = group < groups ? first + second : TAKEN;
    }
    constexpr float CHOSEN = -3;  // less than TAKEN + TAKEN
    for (int64_t i = 0; i < top_groups; ++i) scores[first_peak(scores, padded)] = CHOSEN;
    for (int64_t e = 0; e < experts; ++e)
        if (scores[e / size] != CHOSEN) p[e] = TAKEN;
}

// One row's logits, which are overwritten, to its experts, best first, ties to the lower id.
INLINE void choose_experts(const RouteArgs& args, float* p, float* group_scores, int64_t* ids, float* weights) {
    const int64_t experts = args.weight->n, padded = divide_up(experts, LANES) * LANES;
    if (!softmax_row(p, experts)) {  // the row is lost; its ids must still be experts
        for (int64_t k = 0; k < args.top_k; ++k) {
            ids[k] = k;
            weights[k] = __builtin_nanf("");
        }
        return;
    }
    if (args.groups != args.top_groups) keep_best_groups(p, experts, args.groups, args.top_groups, group_scores);
    float total = 0;
    for (int64_t k = 0; k < args.top_k; ++k) {
        ids[k] = first_peak(p, padded);
        weights[k] = p[ids[k]];
        total += weights[k];
        p[ids[k]] = TAKEN;
    }
    for (int64_t k = 0; k < args.top_k; ++k) {
        if (args.renormalise) weights[k] /= total + 1e-20f;
        weights[k] *= args.scale;
    }
}

void route(Team& team, const RouteArgs& args) {
    constexpr int64_t ROWS = 8;  // per claim
    const size_t mark = team.mark();
    const int64_t padded = divide_up(args.weight->n, LANES) * LANES;
    float* logits = team.scratch<float>(args.rows * padded);
    float* group_scores = team.own_scratch<float>(divide_up(args.groups, LANES) * LANES);
    product(team, {args.x, args.x_stride, args.dtype, nullptr, 1}, args.rows, *args.weight,
            {logits, padded, args.weight->n, DTYPE_F32});
    team.each(divide_up(args.rows, ROWS), [&](int64_t piece) {
        for (int64_t row = piece * ROWS; row < smaller(args.rows, (piece + 1) * ROWS); ++row)
            choose_experts(args, logits + row * padded, group_scores, args.ids + row * args.top_k,
                           args.weights + row * args.top_k);
    });
    team.reset(mark);
}

// Pairs sorted by expert, in their order within one: by counting, on one thread, as thousands take microseconds. Ids
// that are no expert's are left out: then starts[experts] is less than the number of pairs.
void group_by_expert(Team& team, const GroupArgs& args) {
    const size_t mark = team.mark();
    int64_t* next = team.scratch<int64_t>(args.experts);
    team.each(1, [&](int64_t) {
        for (int64_t e = 0; e < args.experts; ++e) next[e] = 0;
        for (int64_t i = 0; i < args.pairs; ++i)
            if (uint64_t(args.ids[i]) < uint64_t(args.experts)) ++next[args.ids[i]];
        int64_t start = 0;
        for (int64_t e = 0; e < args.experts; ++e) {
            args.starts[e] = start;
            start += next[e];
            next[e] = args.starts[e];
        }
        args.starts[args.experts] = start;
        for (int64_t i = 0; i < args.pairs; ++i)
            if (uint64_t(args.ids[i]) < uint64_t(args.experts)) args.order[next[args.ids[i]]++] = i;
    });
    team.reset(mark);
}

}  // namespace
