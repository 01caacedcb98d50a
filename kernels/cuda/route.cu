// Router of a mixture of experts, and grouping of tokens by expert (ops/moe.py).
#include "common.cuh"

namespace {

constexpr int ROWS = 8;          // rows of a warp's tile of logits
constexpr int WIDE = 4;          // experts of a warp's tile when there are many rows
constexpr int ACROSS = 4;        // warps of a block side by side, each with other experts
constexpr int MAX_VALUES = 8;    // experts of a lane, 256 of a warp
constexpr int CHOICE_WARPS = 4;  // rows of a block that chooses
constexpr int MAX_GROUPS = 256;
constexpr float TAKEN = -1.0f;  // less than any probability

// Computes the logits of EXPERTS experts for ROWS rows. Lane l adds the products of values 4 l .. 4 l + 3 of every 128,
// in order, and the lanes are added as a tree: a logit's bits depend on its row and expert alone, not on the tile.
template <int EXPERTS, class X, class W>
__device__ __forceinline__ void tile_of_logits(const X* x, i64 x_stride, bool x_aligned, const W* weight,
                                               i64 weight_stride, bool weight_aligned, float* logits, int rows,
                                               int experts, int width) {
    const int lane = int(threadIdx.x) % WARP, warp = int(threadIdx.x) / WARP;
    const int down = int(blockDim.x) / (ACROSS * WARP);  // rows of warps in a block
    const int expert = (int(blockIdx.y) * ACROSS + warp % ACROSS) * EXPERTS;
    const int first = (int(blockIdx.x) * down + warp / ACROSS) * ROWS;
    if (expert >= experts || first >= rows) return;  // the whole warp
    float sums[EXPERTS][ROWS];
#pragma unroll
    for (int e = 0; e < EXPERTS; ++e)
#pragma unroll
        for (int i = 0; i < ROWS; ++i) sums[e][i] = 0.0f;
#pragma unroll EXPERTS == 1 ? 2 : 1
    for (int k = 4 * lane; k < width; k += 4 * WARP) {
        float4 w[EXPERTS];
#pragma unroll
        for (int e = 0; e < EXPERTS; ++e)
            w[e] = load4(weight + smaller(expert + e, experts - 1) * weight_stride, k, width, weight_aligned);
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
            if (first + i >= rows) continue;
            const float4 v = load4(x + (first + i) * x_stride, k, width, x_aligned);
#pragma unroll
            for (int e = 0; e < EXPERTS; ++e)
                sums[e][i] =
                    fmaf(v.w, w[e].w, fmaf(v.z, w[e].z, fmaf(v.y, w[e].y, fmaf(v.x, w[e].x, sums[e][i]))));
        }
    }
#pragma unroll
    for (int e = 0; e < EXPERTS; ++e) {
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
            float sum = sums[e][i];
#pragma unroll
            for (int step = WARP / 2; step > 0; step /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, step);
            if (lane == 0 && first + i < rows && expert + e < experts)
                logits[i64(first + i) * experts + expert + e] = sum;
        }
    }
}

// wide: WIDE experts for each warp, so that many rows reuse each weight. With few rows there are more warps instead.
template <class X, class W>
__device__ __forceinline__ void logits_of(const X* x, i64 x_stride, bool x_aligned, const W* weight, i64 weight_stride,
                                          bool weight_aligned, float* logits, int rows, int experts, int width,
                                          bool wide) {
    if (wide)
        tile_of_logits<WIDE>(x, x_stride, x_aligned, weight, weight_stride, weight_aligned, logits, rows, experts,
                             width);
    else
        tile_of_logits<1>(x, x_stride, x_aligned, weight, weight_stride, weight_aligned, logits, rows, experts, width);
}

struct Best {
    float value;
    int index;
};

__device__ __forceinline__ Best better_of(Best a, Best b) {
    return b.value > a.value || (b.value == a.value && b.index < a.index) ? b : a;
}

// Returns the largest of a warp's values to every lane, ties to the lower index.
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

// Removes the largest of the warp's values and returns it; values[i] has the index lane + 32 i.
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

// Turns logits into probabilities, TAKEN past the last expert. Returns false if a logit is NaN or +infinity.
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

// Marks as TAKEN the experts outside the groups with the greatest sums of their two best. p, chosen: this warp's.
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

// How experts are chosen: ops/moe.py's route.
struct Rule {
    int experts, top_k, groups, top_groups, renormalise;
    float scale;
};

// logits [experts] of a row -> its ids and weights [top_k]. p, chosen: this warp's.
__device__ __forceinline__ void choose_for_row(const float* logits, Rule rule, i64* ids, float* weights, float* p,
                                               unsigned char* chosen) {
    const int lane = int(threadIdx.x) % WARP, experts = rule.experts, top_k = rule.top_k;
    float values[MAX_VALUES];
#pragma unroll
    for (int i = 0; i < MAX_VALUES; ++i)
        values[i] = lane + WARP * i < experts ? logits[lane + WARP * i] : -infinity();
    const bool finite = softmax_of_warp(values, lane, experts);
    if (!finite) {  // the row has no result, but its ids must still be experts
        if (lane < top_k) {
            ids[lane] = lane;
            weights[lane] = not_a_number();
        }
        return;
    }
    if (rule.groups != rule.top_groups)
        keep_best_groups(values, lane, experts, rule.groups, rule.top_groups, p, chosen);
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
    if (rule.renormalise) weight /= total + 1e-20f;
    ids[lane] = id;
    weights[lane] = weight * rule.scale;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(256)
    route_logits_f32_f32(const float* x, i64 x_stride, int x_aligned, const float* weight, i64 weight_stride,
                         int weight_aligned, float* logits, int rows, int experts, int width, int wide) {
    logits_of(x, x_stride, x_aligned, weight, weight_stride, weight_aligned, logits, rows, experts, width, wide);
}

extern "C" __global__ void __launch_bounds__(256)
    route_logits_bf16_f32(const bf16* x, i64 x_stride, int x_aligned, const float* weight, i64 weight_stride,
                          int weight_aligned, float* logits, int rows, int experts, int width, int wide) {
    logits_of(x, x_stride, x_aligned, weight, weight_stride, weight_aligned, logits, rows, experts, width, wide);
}

extern "C" __global__ void __launch_bounds__(256)
    route_logits_f32_bf16(const float* x, i64 x_stride, int x_aligned, const bf16* weight, i64 weight_stride,
                          int weight_aligned, float* logits, int rows, int experts, int width, int wide) {
    logits_of(x, x_stride, x_aligned, weight, weight_stride, weight_aligned, logits, rows, experts, width, wide);
}

extern "C" __global__ void __launch_bounds__(256)
    route_logits_bf16_bf16(const bf16* x, i64 x_stride, int x_aligned, const bf16* weight, i64 weight_stride,
                           int weight_aligned, float* logits, int rows, int experts, int width, int wide) {
    logits_of(x, x_stride, x_aligned, weight, weight_stride, weight_aligned, logits, rows, experts, width, wide);
}

// logits [rows, experts] -> ids, weights [rows, top_k], one warp for each row.
extern "C" __global__ void __launch_bounds__(128)
    route_choose(const float* logits, i64* ids, float* weights, int rows, int experts, int top_k, int groups,
                 int top_groups, int renormalise, float scale) {
    __shared__ float p[CHOICE_WARPS][WARP * MAX_VALUES];
    __shared__ unsigned char chosen[CHOICE_WARPS][MAX_GROUPS];
    const int warp = int(threadIdx.x) / WARP;
    const i64 row = i64(blockIdx.x) * CHOICE_WARPS + warp;
    if (row >= rows) return;  // the whole warp
    const Rule rule = {experts, top_k, groups, top_groups, renormalise, scale};
    choose_for_row(logits + row * experts, rule, ids + row * top_k, weights + row * top_k, p[warp], chosen[warp]);
}

// Sorts pairs by expert, keeping their order. A block has `each` tiles of 32 pairs, of which each warp takes a share.
//
//     counters [warps][experts]: number of the warp's pairs of an expert; then the place of its next one
//     firsts [experts]: place of the expert's first pair
//
// With several blocks, count_by_expert has written the numbers of each block, counts [blocks][experts]. Ids that are
// not an expert's are left out: then starts[experts] is less than the number of pairs, and the end of `order` is not
// written. No atomic operations: of the lanes with the same id, the first one raises the warp's counter.
namespace {

struct Share {
    int begin, end;  // tiles
};

__device__ __forceinline__ Share share_of_warp(int pairs, int each, int block) {
    const int warp = int(threadIdx.x) / WARP, warps = int(blockDim.x) / WARP;
    const int tiles = (pairs + WARP - 1) / WARP, first = block * each, last = smaller(first + each, tiles);
    const int of_warp = (each + warps - 1) / warps, begin = smaller(first + warp * of_warp, last);
    return {begin, smaller(begin + of_warp, last)};
}

// Raises the warp's counters by its pairs; PLACES: the counters are places, where the pairs are put.
template <bool PLACES>
__device__ __forceinline__ void walk(const i64* ids, Share share, int* own, const int* firsts, i64* order, int pairs,
                                     int experts) {
    const int lane = int(threadIdx.x) % WARP;
    for (int tile = share.begin; tile < share.end; ++tile) {
        const int i = tile * WARP + lane;
        const i64 found = i < pairs ? ids[i] : -1;
        const int id = u64(found) < u64(experts) ? int(found) : -1;
        const u32 peers = __match_any_sync(ALL_LANES, id);
        const int rank = __popc(peers & ((1u << lane) - 1));
        if (PLACES && id >= 0) order[firsts[id] + own[id] + rank] = i;
        __syncwarp();
        if (id >= 0 && rank == 0) own[id] += __popc(peers);
        __syncwarp();
    }
}

__device__ __forceinline__ void count_own(const i64* ids, Share share, int* own, int pairs, int experts) {
    for (int e = int(threadIdx.x) % WARP; e < experts; e += WARP) own[e] = 0;
    __syncwarp();
    walk<false>(ids, share, own, nullptr, nullptr, pairs, experts);
}

// Turns numbers of pairs into places of first pairs, 32 experts at a time, and returns the total. For the first warp.
__device__ __forceinline__ int laid_end_to_end(int* firsts, int experts) {
    const int lane = int(threadIdx.x) % WARP;
    int before = 0;
    for (int base = 0; base < experts; base += WARP) {
        const int e = base + lane, count = e < experts ? firsts[e] : 0;
        int sum = count;
#pragma unroll
        for (int step = 1; step < WARP; step *= 2) {
            const int below = __shfl_up_sync(ALL_LANES, sum, step);
            if (lane >= step) sum += below;
        }
        if (e < experts) firsts[e] = before + sum - count;
        before += __shfl_sync(ALL_LANES, sum, WARP - 1);
    }
    return before;
}

// Puts the pairs of block `block` of `blocks` in their places; block 0 writes the starts.
__device__ __forceinline__ void group_pairs(const i64* ids, const int* counts, i64* order, i64* starts, int pairs,
                                            int each, int experts, int* counters, int block, int blocks) {
    const int thread = int(threadIdx.x), threads = int(blockDim.x), warps = threads / WARP;
    int* const firsts = counters + warps * experts;
    int* const own = counters + thread / WARP * experts;
    const Share share = share_of_warp(pairs, each, block);
    count_own(ids, share, own, pairs, experts);
    __syncthreads();
    // A thread for each expert: its pairs in all blocks and in earlier blocks; then the first place for each warp.
    for (int e = thread; e < experts; e += threads) {
        int total = 0, next = 0;
#pragma unroll 8
        for (int other = 0; counts && other < blocks; ++other) {
            const int count = counts[i64(other) * experts + e];
            total += count;
            next += other < block ? count : 0;
        }
        for (int w = 0; w < warps; ++w) {
            const int here = counters[w * experts + e];
            counters[w * experts + e] = next;
            next += here;
        }
        firsts[e] = counts ? total : next;
    }
    __syncthreads();
    if (thread < WARP) {
        const int total = laid_end_to_end(firsts, experts);
        if (block == 0 && thread == 0) starts[experts] = total;
    }
    __syncthreads();
    for (int e = thread; block == 0 && e < experts; e += threads) starts[e] = firsts[e];
    walk<true>(ids, share, own, firsts, order, pairs, experts);
}

// Whether this block is the last of `blocks` to come here; it then sees what the others wrote before. The ticket is 0
// before the first and after the last. Which block is the last decides who goes on, and no result.
__device__ __forceinline__ bool is_last(int* ticket, int blocks, int* shared) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        *shared = atomicAdd(ticket, 1) == blocks - 1;
        if (*shared) *ticket = 0;
    }
    __syncthreads();
    __threadfence();
    return *shared != 0;
}

// All of a step of few rows in one launch: a block has ROWS rows and ACROSS experts; the last block of these rows
// chooses for them, and the last of all groups. tickets [gridDim.x + 1].
template <class X, class W>
__device__ __forceinline__ void route_and_group(const X* x, i64 x_stride, bool x_aligned, const W* weight,
                                                i64 weight_stride, bool weight_aligned, float* logits, i64* ids,
                                                float* weights, i64* order, i64* starts, int* tickets, int rows,
                                                int width, Rule rule) {
    __shared__ float p[CHOICE_WARPS * WARP * MAX_VALUES];
    __shared__ unsigned char chosen[CHOICE_WARPS * MAX_GROUPS];
    __shared__ int last;
    DYNAMIC_SHARED(counters);
    const int warp = int(threadIdx.x) / WARP, blocks = int(gridDim.x), pairs = rows * rule.top_k;
    tile_of_logits<1>(x, x_stride, x_aligned, weight, weight_stride, weight_aligned, logits, rows, rule.experts,
                      width);
    if (!is_last(tickets + blockIdx.x, int(gridDim.y), &last)) return;
    for (int i = warp; i < ROWS; i += CHOICE_WARPS) {
        const i64 row = i64(blockIdx.x) * ROWS + i;
        if (row < rows)
            choose_for_row(logits + row * rule.experts, rule, ids + row * rule.top_k, weights + row * rule.top_k,
                           p + warp * WARP * MAX_VALUES, chosen + warp * MAX_GROUPS);
    }
    if (!is_last(tickets + blocks, blocks, &last)) return;
    group_pairs(ids, nullptr, order, starts, pairs, (pairs + WARP - 1) / WARP, rule.experts,
                reinterpret_cast<int*>(counters), 0, 1);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(1024)
    count_by_expert(const i64* ids, int* counts, int pairs, int each, int experts) {
    DYNAMIC_SHARED(shared);
    int* const counters = reinterpret_cast<int*>(shared);
    const int thread = int(threadIdx.x), threads = int(blockDim.x);
    count_own(ids, share_of_warp(pairs, each, int(blockIdx.x)), counters + thread / WARP * experts, pairs, experts);
    __syncthreads();
    for (int e = thread; e < experts; e += threads) {
        int count = 0;
        for (int w = 0; w < threads / WARP; ++w) count += counters[w * experts + e];
        counts[i64(blockIdx.x) * experts + e] = count;
    }
}

extern "C" __global__ void __launch_bounds__(1024)
    group_by_expert(const i64* ids, const int* counts, i64* order, i64* starts, int pairs, int each, int experts) {
    DYNAMIC_SHARED(shared);
    group_pairs(ids, counts, order, starts, pairs, each, experts, reinterpret_cast<int*>(shared), int(blockIdx.x),
                int(gridDim.x));
}

extern "C" __global__ void __launch_bounds__(128)
    route_groups_f32_f32(const float* x, i64 x_stride, int x_aligned, const float* weight, i64 weight_stride,
                     int weight_aligned, float* logits, i64* ids, float* weights, i64* order, i64* starts,
                     int* tickets, int rows, int width, int experts, int top_k, int groups, int top_groups,
                     int renormalise, float scale) {
    route_and_group(x, x_stride, x_aligned, weight, weight_stride, weight_aligned, logits, ids, weights, order, starts,
                    tickets, rows, width, {experts, top_k, groups, top_groups, renormalise, scale});
}

extern "C" __global__ void __launch_bounds__(128)
    route_groups_f32_bf16(const float* x, i64 x_stride, int x_aligned, const bf16* weight, i64 weight_stride,
                     int weight_aligned, float* logits, i64* ids, float* weights, i64* order, i64* starts,
                     int* tickets, int rows, int width, int experts, int top_k, int groups, int top_groups,
                     int renormalise, float scale) {
    route_and_group(x, x_stride, x_aligned, weight, weight_stride, weight_aligned, logits, ids, weights, order, starts,
                    tickets, rows, width, {experts, top_k, groups, top_groups, renormalise, scale});
}

extern "C" __global__ void __launch_bounds__(128)
    route_groups_bf16_f32(const bf16* x, i64 x_stride, int x_aligned, const float* weight, i64 weight_stride,
                     int weight_aligned, float* logits, i64* ids, float* weights, i64* order, i64* starts,
                     int* tickets, int rows, int width, int experts, int top_k, int groups, int top_groups,
                     int renormalise, float scale) {
    route_and_group(x, x_stride, x_aligned, weight, weight_stride, weight_aligned, logits, ids, weights, order, starts,
                    tickets, rows, width, {experts, top_k, groups, top_groups, renormalise, scale});
}

extern "C" __global__ void __launch_bounds__(128)
    route_groups_bf16_bf16(const bf16* x, i64 x_stride, int x_aligned, const bf16* weight, i64 weight_stride,
                     int weight_aligned, float* logits, i64* ids, float* weights, i64* order, i64* starts,
                     int* tickets, int rows, int width, int experts, int top_k, int groups, int top_groups,
                     int renormalise, float scale) {
    route_and_group(x, x_stride, x_aligned, weight, weight_stride, weight_aligned, logits, ids, weights, order, starts,
                    tickets, rows, width, {experts, top_k, groups, top_groups, renormalise, scale});
}
