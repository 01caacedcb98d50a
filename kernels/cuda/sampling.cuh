// Helpers of the sampling kernels: exact arithmetic (that of ref/sampling.py, step by step), keys that order floats,
// and searches by a whole block. Sums that enter a result are sums of integers, exact in any order.
#pragma once

#include "common.cuh"

namespace {

constexpr double LN_2 = 0x1.62e42fefa39efp-1;
constexpr double LOG2_E = 1.0 / LN_2;
constexpr double WINDOW = 32;  // a score this far below the peak cannot win, its mass is 0
constexpr int MASS_BITS = 44;
constexpr int BINS = 2048;
constexpr int MOST_WARPS = 32;

// --- doubles, rounded one by one ---

// Conversions between doubles and whole numbers below 2^51, to nearest, ties to even.
constexpr double SHIFT = 0x1.8p52;
constexpr i64 SHIFT_BITS = 0x4338000000000000;
__device__ __forceinline__ double to_double(i64 whole) { return __longlong_as_double(whole + SHIFT_BITS) - SHIFT; }
__device__ __forceinline__ i64 to_whole(double value) {
    return i64(u64(__double_as_longlong(value + SHIFT)) - u64(SHIFT_BITS));
}

// ln x for a positive normal double: x = 2^e m, m in [sqrt(1/2), sqrt(2)), ln m = 2 artanh((m - 1) / (m + 1)).
__device__ __forceinline__ double exact_log(double x) {
    constexpr u64 SQRT_HALF = 0x3fe6a09e667f3bcd, BIAS = 1023;
    const u64 bits = u64(__double_as_longlong(x));
    const i64 e = i64((bits - SQRT_HALF + (BIAS << 52)) >> 52) - i64(BIAS);
    const double m = __longlong_as_double(i64(bits - (u64(e) << 52)));
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

__device__ __forceinline__ double gumbel(u32 word) {
    const double uniform = to_double(i64(word) * 2 + 1) * 0x1p-33;
    return -exact_log(-exact_log(uniform));
}

// exp(score - peak) in units of 2^-MASS_BITS.
__device__ __forceinline__ i64 mass_of(double score, double peak) {
    const double distance = score - peak;
    const double x = distance < -WINDOW ? -WINDOW : distance;
    const i64 e = to_whole(x * LOG2_E);
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
    return to_whole(series * __longlong_as_double(i64(u64(e + 1023 + MASS_BITS) << 52)));
}

// --- random words ---

struct Words {
    u32 c[4];
};

// Philox4x32-10: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
__device__ __forceinline__ Words philox(u32 c0, u32 c1, u32 c2, u32 k0, u32 k1) {
    u32 c3 = 0;
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const u64 p0 = u64(c0) * 0xD2511F53u, p1 = u64(c2) * 0xCD9E8D57u;
        c0 = u32(p1 >> 32) ^ c1 ^ k0;
        c1 = u32(p1);
        c2 = u32(p0 >> 32) ^ c3 ^ k1;
        c3 = u32(p0);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}

// --- keys: unsigned integers in the order of their floats; both zeros have one key, NaN the lowest ---

__device__ __forceinline__ u32 key_of(float value) {
    if (value != value) return 0;
    const u32 bits = u32(__float_as_int(value + 0.0f));
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float value_of(u32 key) {
    return __int_as_float(int(key & 0x80000000u ? key & 0x7fffffffu : ~key));
}

// --- functions that all threads of a block call together, with the same result for each ---

struct Slots {
    u64 slots[MOST_WARPS];
};

struct Workspace : Slots {
    u64 bins[BINS];
    u64 found[3];
};

// join is a maximum or a minimum: it may meet a value twice.
template <class T, class Join>
__device__ __forceinline__ T over_block(Slots& work, T value, Join join) {
    T* const slots = reinterpret_cast<T*>(work.slots);
    const int lane = int(threadIdx.x) % WARP, warps = int(blockDim.x) / WARP;
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) value = join(value, __shfl_xor_sync(ALL_LANES, value, step));
    if (lane == 0) slots[threadIdx.x / WARP] = value;
    __syncthreads();
    value = slots[lane < warps ? lane : 0];
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) value = join(value, __shfl_xor_sync(ALL_LANES, value, step));
    __syncthreads();
    return value;
}

template <class T>
__device__ __forceinline__ T largest(Slots& work, T value) {
    return over_block(work, value, [](T a, T b) { return b > a ? b : a; });
}
template <class T>
__device__ __forceinline__ T smallest(Slots& work, T value) {
    return over_block(work, value, [](T a, T b) { return b < a ? b : a; });
}
__device__ __forceinline__ i64 sum_of(Slots& work, i64 value) {
    const int lane = int(threadIdx.x) % WARP, warps = int(blockDim.x) / WARP;
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) value += __shfl_xor_sync(ALL_LANES, value, step);
    if (lane == 0) work.slots[threadIdx.x / WARP] = u64(value);
    __syncthreads();
    value = lane < warps ? i64(work.slots[lane]) : 0;
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) value += __shfl_xor_sync(ALL_LANES, value, step);
    __syncthreads();
    return value;
}

// Calls take(i, values[i]) for this thread's share, ascending, with loads of four values.
template <class Take>
__device__ __forceinline__ void each_value(const float* values, int count, Take take) {
    const bool aligned = (u64(values) & 15) == 0;
#pragma unroll 2
    for (int i = 4 * int(threadIdx.x); i < count; i += 4 * int(blockDim.x)) {
        const float4 found = load4(values, i, count, aligned);
        take(i, found.x);
        if (i + 1 < count) take(i + 1, found.y);
        if (i + 2 < count) take(i + 2, found.z);
        if (i + 3 < count) take(i + 3, found.w);
    }
}

// The largest value of a row, NaN left out; -infinity if there is none.
__device__ __forceinline__ float highest_of(Workspace& work, const float* values, int count) {
    float best = -infinity();
    each_value(values, count, [&](int, float value) { best = value > best ? value : best; });
    return largest(work, best);
}

// Finds the bin at which the weight of the bins, from the last one down, reaches `wanted`. found[0]: the bin, BINS if
// all of them do not reach it; found[1]: the weight of the bins above it; found[2]: of all bins.
__device__ __forceinline__ void find_bin(Workspace& work, u64 wanted) {
    const int threads = int(blockDim.x), each = (BINS + threads - 1) / threads;
    const int lane = int(threadIdx.x) % WARP, top = BINS - 1 - int(threadIdx.x) * each;
    wanted = wanted == 0 ? 1 : wanted;
    __syncthreads();
    u64 own = 0;
    for (int i = 0; i < each && i <= top; ++i) own += work.bins[top - i];
    u64 reached = own;
#pragma unroll
    for (int step = 1; step < WARP; step *= 2) {
        const u64 before = __shfl_up_sync(ALL_LANES, reached, step);
        if (lane >= step) reached += before;
    }
    if (lane == WARP - 1) work.slots[threadIdx.x / WARP] = reached;
    __syncthreads();
    for (int w = 0; w < int(threadIdx.x) / WARP; ++w) reached += work.slots[w];
    if (int(threadIdx.x) == threads - 1) {
        work.found[2] = reached;
        if (reached < wanted) work.found[0] = BINS;
    }
    u64 above = reached - own;
    if (above < wanted && wanted <= reached) {
        int bin = top;
        while (bin > 0 && above + work.bins[bin] < wanted) above += work.bins[bin--];
        work.found[0] = u64(bin);
        work.found[1] = above;
    }
    __syncthreads();
}

// The weight of all bins.
__device__ __forceinline__ u64 total_of(Workspace& work) {
    u64 own = 0;
    for (int i = int(threadIdx.x); i < BINS; i += int(blockDim.x)) own += work.bins[i];
    return u64(sum_of(work, i64(own)));
}

struct Least {
    u32 key;
    u64 above;  // weight of the larger keys
};

// The largest key for which the weights of it and of all larger keys add up to at least `rest`, which they all do.
//
// Elements are i = 0 .. count - 1 with their values, those for which in(i, value). weight(value): a whole number. Three
// passes find 11, 11 and 10 bits of the key. MANY: of a whole row, read four at a time.
template <bool MANY, class In, class Key, class Weight>
__device__ __forceinline__ Least refine(Workspace& work, const float* values, int count, In in, Key key, Weight weight,
                                        u64 rest) {
    u32 prefix = 0;
    u64 above = 0;
#pragma unroll 1
    for (int pass = 1; pass < 4; ++pass) {
        const int shift = pass == 1 ? 21 : pass == 2 ? 10 : 0, digits = pass == 3 ? 10 : 11;
        for (int i = int(threadIdx.x); i < BINS; i += int(blockDim.x)) work.bins[i] = 0;
        __syncthreads();
        const auto take = [&](int i, float value) {
            if (!in(i, value)) return;
            const u32 k = key(i, value);
            if (pass == 1 || k >> (shift + digits) == prefix)
                atomicAdd(&work.bins[(k >> shift) & ((1u << digits) - 1)], weight(value));
        };
        if (MANY)
            each_value(values, count, take);
        else
            for (int i = int(threadIdx.x); i < count; i += int(blockDim.x)) take(i, values[i]);
        find_bin(work, rest);
        const u64 past = work.found[1];
        prefix = prefix << digits | u32(work.found[0]);
        above += past;
        rest -= past;
        __syncthreads();
    }
    return {prefix, above};
}

struct Threshold {
    bool reached;
    u32 key;
    u64 above;  // weight of the larger keys
};

// `refine` for the values of a row whose bin is not -1, where `rest` is wanted(sum of their weights); not reached if
// they have less. bin(i, value) must not fall where key(i, value) grows. The first pass finds the bin, the others a
// key in it: bins spread elements whose keys begin with the same bits.
template <class Bin, class Key, class Weight, class Wanted>
__device__ __forceinline__ Threshold find_threshold(Workspace& work, const float* values, int count, Bin bin, Key key,
                                                    Weight weight, Wanted wanted) {
    for (int i = int(threadIdx.x); i < BINS; i += int(blockDim.x)) work.bins[i] = 0;
    __syncthreads();
    each_value(values, count, [&](int i, float value) {
        const int place = bin(i, value);
        if (place >= 0) atomicAdd(&work.bins[place], weight(value));
    });
    __syncthreads();
    const u64 rest = wanted(total_of(work));
    find_bin(work, rest);
    const u64 chosen = work.found[0], past = work.found[1];
    if (chosen >= BINS) return {false, 0, 0};
    __syncthreads();
    const auto in = [&](int i, float value) { return bin(i, value) == int(chosen); };
    const Least found = refine<true>(work, values, count, in, key, weight, rest - past);
    return {true, found.key, past + found.above};
}

// Evenly spaced bins for floats between `low` and `highest`; NaN and smaller values are in bin 0.
struct Spread {
    float highest, scale;

    __device__ __forceinline__ Spread(float low, float top) : highest(top) {
        const float span = top - low;
        scale = span > 1e-30f && span < 1e30f ? float(BINS - 1) / span : 1.0f;
    }
    __device__ __forceinline__ int operator()(float value) const {
        const float place = (highest - value) * scale;
        return BINS - 1 - (place < float(BINS - 1) ? int(place) : BINS - 1);  // NaN compares false
    }
};

}  // namespace
