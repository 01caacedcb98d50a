// Thresholds among many floats, found without sorting them: by bisection, over ever fewer of them.
#pragma once

#include "team.h"

namespace {

// Floats in order, as integers in order. Of two zeros the negative one comes first.
INLINE int32_t key_of(float value) {
    int32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits ^ ((bits >> 31) & 0x7fffffff);
}
INLINE float value_of(int64_t key) {
    const int32_t bits = int32_t(key) ^ ((int32_t(key) >> 31) & 0x7fffffff);
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// The largest of the values that are no NaN; -infinity without any.
INLINE float highest_of(const float* values, int64_t count) {
    constexpr int CHAINS = 4;
    F32 best[CHAINS];
    for (F32& chain : best) chain = set(-__builtin_inff());
    int64_t i = 0;
    for (; i + CHAINS * LANES <= count; i += CHAINS * LANES)
        for (int chain = 0; chain < CHAINS; ++chain) best[chain] = max(load(values + i + chain * LANES), best[chain]);
    float highest = peak(max(max(best[0], best[1]), max(best[2], best[3])));
    for (; i < count; ++i) highest = values[i] > highest ? values[i] : highest;
    return highest;
}

INLINE uint32_t valid(int64_t lanes) { return lanes >= LANES ? 0xffff : (1u << lanes) - 1; }

// take(i) for every i, ascending, with values[i] >= low. A NaN is never taken.
template <class Take>
INLINE void each_from(const float* values, int64_t count, float low, Take take) {
    for (int64_t i = 0; i < count; i += LANES) {
        const int64_t n = smaller(LANES, count - i);
        for (uint32_t found = at_least(load(values + i, int(n)), set(low)) & valid(n); found != 0; found &= found - 1)
            take(i + __builtin_ctz(found));
    }
}

INLINE int64_t count_from(const float* values, int64_t count, float low) {
    int64_t found = 0, i = 0;
    for (; i + LANES <= count; i += LANES) found += __builtin_popcount(at_least(load(values + i), set(low)));
    for (; i < count; ++i) found += values[i] >= low;
    return found;
}

INLINE int64_t mass_from(const float* values, const int64_t* masses, int64_t count, float low) {
    int64_t total = 0;
    for (int64_t i = 0; i < count; ++i) total += values[i] >= low ? masses[i] : 0;
    return total;
}

// Values with a weight each: their mass, or 1 where there is none.
struct Weighted {
    const float* values;
    const int64_t* masses;  // or null
    int64_t count;
};

// The largest t for which the weights of all values >= t add up to `wanted` or more. For t = `lowest` they do; no
// value exceeds `highest`. The two buffers (of `count`, the second with masses only) may be where the values lie.
float threshold(Weighted pool, int64_t wanted, float lowest, float highest, float* values, int64_t* masses) {
    constexpr int BY_VALUE = 16;  // steps that halve the distance; then those that halve the number of floats between
    int64_t low = key_of(lowest), high = int64_t(key_of(highest)) + 1;  // enough from low on, too little from high on
    int64_t from_low = pool.count, from_high = 0;                       // how many of the pool
    int64_t above = 0, weight_high = 0;                                 // weight of what left the pool; from high on
    for (int step = 0; high - low > 1; ++step) {
        if (pool.count == 1) return pool.values[0];
        int64_t middle = low + (high - low) / 2;
        if (step < BY_VALUE) {
            const int64_t halfway = key_of(float(0.5 * (double(value_of(low)) + double(value_of(high)))));
            if (low < halfway && halfway < high) middle = halfway;
        }
        const float t = value_of(middle);
        const int64_t found = count_from(pool.values, pool.count, t);
        const int64_t weight =
            above + (pool.masses == nullptr ? found : mass_from(pool.values, pool.masses, pool.count, t));
        if (weight >= wanted) {
            low = middle;
            from_low = found;
        } else {
            high = middle;
            from_high = found;
            weight_high = weight;
        }
        if (4 * (from_low - from_high) > pool.count) continue;
        int64_t kept = 0;
        const float end = value_of(high);
        each_from(pool.values, pool.count, value_of(low), [&](int64_t i) {
            if (pool.values[i] >= end) return;
            values[kept] = pool.values[i];
            if (pool.masses != nullptr) masses[kept] = pool.masses[i];
            ++kept;
        });
        pool = {values, pool.masses == nullptr ? nullptr : masses, kept};
        above = weight_high;
        from_low = kept;
        from_high = 0;
    }
    return value_of(low);
}

}  // namespace
