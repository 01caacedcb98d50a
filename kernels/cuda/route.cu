// The router of a mixture of experts, and the grouping of tokens by expert (ops/moe.py).
#include "common.cuh"

namespace {

constexpr int ROWS = 8;          // of a warp's tile of logits
constexpr int MAX_VALUES = 8;    // experts of a lane: 256 of a warp
constexpr int CHOICE_WARPS = 4;  // rows of a block that chooses
constexpr int MAX_GROUPS = 256;
constexpr float TAKEN = -1.0f;  // less than any probability

// The logits of one expert for ROWS rows. Lane l adds the products of the values 4 l .. 4 l + 3 of every 128, in
// order; the lanes are added as a tree. So a logit's bits depend on its row and its expert alone.
template <class X, class W>
__device__ __forceinline__ void logits_of(const X* x, i64 x_stride, bool x_aligned, const W* weight, i64 weight_stride,
                                          bool weight_aligned, float* logits, int rows, int experts, int width) {
    const int lane = int(threadIdx.x) % WARP;
    const int expert = int(blockIdx.y) * (int(blockDim.x) / WARP) + int(threadIdx.x) / WARP;
    const int first = int(blockIdx.x) * ROWS;
    if (expert >= experts) return;  // the whole warp
    const W* w_row = weight + expert * weight_stride;
    float sums[ROWS];
#pragma unroll
    for (int i = 0; i < ROWS; ++i) sums[i] = 0.0f;
#pragma unroll 2
    for (int k = 4 * lane; k < width; k += 4 * WARP) {
        const float4 w = load4(w_row, k, width, weight_aligned);
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
            if (first + i >= rows) continue;
            const float4 v = load4(x + (first + i) * x_stride, k, width, x_aligned);
            sums[i] = fmaf(v.w, w.w, fmaf(v.z, w.z, fmaf(v.y, w.y, fmaf(v.x, w.x, sums[i]))));
        }
    }
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        float sum = sums[i];
#pragma unroll
        for (int step = WARP / 2; step > 0; step /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, step);
        if (lane == 0 && first + i < rows) logits[i64(first + i) * experts + expert] = sum;
    }
}

struct Best {
    float value;
    int index;
};

__device__ __forceinline__ Best better_of(Best a, Best b) {
    return b.value > a.value || (b.value == a.value && b.index < a.index) ? b : a;
}

// The largest of a warp's values, ties to the lower index; every lane learns it.
__device__ __forceinline__ Best best_of_warp(Best best) {
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) {
        Best other;
        other.value = __shfl_xor_sync(ALL_LANES, best.value, step);
        other.index = __shfl_xor_sync(ALL_LANES, best.index, step);
        best = better_of(best, other);
    }
    return best;
}

// Takes the best of values[i], which has the index lane + 32 i, out of them.
__device__ __forceinline__ Best take_best(float* values, int lane, float taken) {
    Best best;
    best.value = values[0];
    best.index = lane;
#pragma unroll
    for (int i = 1; i < MAX_VALUES; ++i) {
        Best other;
        other.value = values[i];
        other.index = lane + WARP * i;
        best = better_of(best, other);
    }
    best = best_of_warp(best);
#pragma unroll
    for (int i = 0; i < MAX_VALUES; ++i)
        if (best.index == lane + WARP * i) values[i] = taken;
    return best;
}

// Logits become probabilities; TAKEN beyond the experts. False if a logit is NaN or infinite, but for -infinity.
__device__ __forceinline__ bool softmax_of_warp(float* values, int lane, int experts) {
    float most = -infinity();
#pragma unroll
    for (int i = 0; i < MAX_VALUES; ++i)
        if (lane + WARP * i < experts) most = fmaxf(most, values[i]);
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, step));
    float whole = 0.0f;
#pragma unroll
    for (int i = 0; i < MAX_VALUES; ++i) {
        if (lane + WARP * i >= experts) continue;
        values[i] = exp_of(values[i] - most);
        whole += values[i];
    }
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) whole += __shfl_xor_sync(ALL_LANES, whole, step);
#pragma unroll
    for (int i = 0; i < MAX_VALUES; ++i) values[i] = lane + WARP * i < experts ? values[i] / whole : TAKEN;
    return whole >= 1.0f;
}

// Every expert outside the groups with the greatest sum of their two best is TAKEN. p and chosen: this warp's.
__device__ __forceinline__ void keep_best_groups(float* values, int lane, int experts, int groups, int top_groups,
                                                 float* p, unsigned char* chosen) {
    const int size = experts / groups;
#pragma unroll
    for (int i = 0; i < MAX_VALUES; ++i)
        if (lane + WARP * i < experts) p[lane + WARP * i] = values[i];
    __syncwarp();
    float scores[MAX_VALUES];
#pragma unroll
    for (int i = 0; i < MAX_VALUES; ++i) {
        const int group = lane + WARP * i;
        float first = TAKEN, second = TAKEN;
        for (int e = group * size; group < groups && e < (group + 1) * size; ++e) {
            if (p[e] > first) {
                second = first;
                first = p[e];
            } else if (p[e] > second) {
                second = p[e];
            }
        }
        scores[i] = group < groups ? first + second : TAKEN;
        if (group < groups) chosen[group] = 0;
    }
    __syncwarp();
    for (int i = 0; i < top_groups; ++i) {
        const Best best = take_best(scores, lane, TAKEN);
        if (lane == 0) chosen[best.index] = 1;
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < MAX_VALUES; ++i) {
        const int e = lane + WARP * i;
        if (e < experts && !chosen[e / size]) values[i] = TAKEN;
    }
}

__device__ __forceinline__ void choose_for_row(float* values, int lane, int experts, int top_k, int groups,
                                               int top_groups, int renormalise, float scale, i64* ids, float* weights,
                                               float* p, unsigned char* chosen) {
    const bool finite = softmax_of_warp(values, lane, experts);
    if (!finite) {  // the row is lost; its ids must still be experts
        if (lane < top_k) {
            ids[lane] = lane;
            weights[lane] = not_a_number();
        }
        return;
    }
    if (groups != top_groups) keep_best_groups(values, lane, experts, groups, top_groups, p, chosen);
    float total = 0.0f, weight = 0.0f;
    int id = 0;
    for (int k = 0; k < top_k; ++k) {
        const Best best = take_best(values, lane, TAKEN);
        total += best.value;
        if (lane == k) {
            weight = best.value;
            id = best.index;
        }
    }
    if (lane >= top_k) return;
    if (renormalise) weight /= total + 1e-20f;
    ids[lane] = id;
    weights[lane] = weight * scale;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(128)
    route_logits_f32_f32(const float* x, i64 x_stride, int x_aligned, const float* weight, i64 weight_stride,
                         int weight_aligned, float* logits, int rows, int experts, int width) {
    logits_of(x, x_stride, x_aligned, weight, weight_stride, weight_aligned, logits, rows, experts, width);
}

extern "C" __global__ void __launch_bounds__(128)
    route_logits_bf16_f32(const bf16* x, i64 x_stride, int x_aligned, const float* weight, i64 weight_stride,
                          int weight_aligned, float* logits, int rows, int experts, int width) {
    logits_of(x, x_stride, x_aligned, weight, weight_stride, weight_aligned, logits, rows, experts, width);
}

extern "C" __global__ void __launch_bounds__(128)
    route_logits_f32_bf16(const float* x, i64 x_stride, int x_aligned, const bf16* weight, i64 weight_stride,
                          int weight_aligned, float* logits, int rows, int experts, int width) {
    logits_of(x, x_stride, x_aligned, weight, weight_stride, weight_aligned, logits, rows, experts, width);
}

extern "C" __global__ void __launch_bounds__(128)
    route_logits_bf16_bf16(const bf16* x, i64 x_stride, int x_aligned, const bf16* weight, i64 weight_stride,
                           int weight_aligned, float* logits, int rows, int experts, int width) {
    logits_of(x, x_stride, x_aligned, weight, weight_stride, weight_aligned, logits, rows, experts, width);
}

// logits [rows, experts] -> ids, weights [rows, top_k]: one warp a row.
extern "C" __global__ void __launch_bounds__(128)
    route_choose(const float* logits, i64* ids, float* weights, int rows, int experts, int top_k, int groups,
                 int top_groups, int renormalise, float scale) {
    __shared__ float p[CHOICE_WARPS][WARP * MAX_VALUES];
    __shared__ unsigned char chosen[CHOICE_WARPS][MAX_GROUPS];
    const int lane = int(threadIdx.x) % WARP, warp = int(threadIdx.x) / WARP;
    const i64 row = i64(blockIdx.x) * CHOICE_WARPS + warp;
    if (row >= rows) return;  // the whole warp
    float values[MAX_VALUES];
#pragma unroll
    for (int i = 0; i < MAX_VALUES; ++i)
        values[i] = lane + WARP * i < experts ? logits[row * experts + lane + WARP * i] : -infinity();
    choose_for_row(values, lane, experts, top_k, groups, top_groups, renormalise, scale, ids + row * top_k,
                   weights + row * top_k, p[warp], chosen[warp]);
}

// Pairs sorted by expert, in their order within one: one block, whose warps count a piece of the pairs each.
//
//     counters [warps][experts]: how many of the warp's pairs are the expert's; then where its next one goes
//
// Ids that are no expert's are left out: then starts[experts] is less than the number of pairs, and the end of
// `order` is not written. No atomic operations: a warp's counter is raised by the first lane of those with one id.
extern "C" __global__ void __launch_bounds__(1024)
    group_by_expert(const i64* ids, i64* order, i64* starts, int pairs, int experts) {
    DYNAMIC_SHARED(shared);
    int* const counters = reinterpret_cast<int*>(shared);
    const int lane = int(threadIdx.x) % WARP, warp = int(threadIdx.x) / WARP, warps = int(blockDim.x) / WARP;
    const int tiles = (pairs + WARP - 1) / WARP, each = (tiles + warps - 1) / warps;
    const int begin = smaller(warp * each, tiles), end = smaller(begin + each, tiles);
    int* const own = counters + warp * experts;
    for (int e = lane; e < experts; e += WARP) own[e] = 0;
    __syncwarp();
    for (int pass = 0; pass < 2; ++pass) {
        for (int tile = begin; tile < end; ++tile) {
            const int i = tile * WARP + lane;
            const i64 found = i < pairs ? ids[i] : -1;
            const int id = u64(found) < u64(experts) ? int(found) : -1;
            const u32 peers = __match_any_sync(ALL_LANES, id);
            const int rank = __popc(peers & ((1u << lane) - 1));
            if (id >= 0 && pass == 1) order[own[id] + rank] = i;
            __syncwarp();
            if (id >= 0 && rank == 0) own[id] += __popc(peers);
            __syncwarp();
        }
        if (pass == 1) break;
        __syncthreads();
        // Warp 0 lays the experts end to end, 32 at a time; a lane then walks over its expert's warps.
        int before = 0;
        for (int base = 0; warp == 0 && base < experts; base += WARP) {
            const int e = base + lane;
            int count = 0;
            for (int w = 0; e < experts && w < warps; ++w) count += counters[w * experts + e];
            int sum = count;
#pragma unroll
            for (int step = 1; step < WARP; step *= 2) {
                const int below = __shfl_up_sync(ALL_LANES, sum, step);
                if (lane >= step) sum += below;
            }
            int next = before + sum - count;
            if (e < experts) starts[e] = next;
            for (int w = 0; e < experts && w < warps; ++w) {
                const int here = counters[w * experts + e];
                counters[w * experts + e] = next;
                next += here;
            }
            before += __shfl_sync(ALL_LANES, sum, WARP - 1);
        }
        if (warp == 0 && lane == 0) starts[experts] = before;
        __syncthreads();
    }
}
