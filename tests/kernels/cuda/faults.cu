// What the header that runs kernels on the CPU must find, and what it must get right (test_cuda_shim.py).
#include "common.cuh"

// Sums of each warp, then of the block.
extern "C" __global__ void block_sum(const float* values, float* total, int count) {
    __shared__ float sums[WARP];
    const int lane = int(threadIdx.x) % WARP, warp = int(threadIdx.x) / WARP;
    float sum = int(threadIdx.x) < count ? values[threadIdx.x] : 0.0f;
    for (int step = WARP / 2; step > 0; step /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, step);
    if (lane == 0) sums[warp] = sum;
    __syncthreads();
    if (threadIdx.x != 0) return;
    float whole = 0.0f;
    for (int w = 0; w < int(blockDim.x) / WARP; ++w) whole += sums[w];
    *total = whole;
}

// A thread reads what its neighbour writes, without waiting for it.
extern "C" __global__ void race(i64* out) {
    __shared__ int shared[128];
    shared[threadIdx.x] = int(threadIdx.x);
    out[threadIdx.x] = shared[(threadIdx.x + 1) % blockDim.x];
}

extern "C" __global__ void atomic_order(i64* out, i64* next) {
    const i64 place = atomicAdd(next, 1);
    out[place] = threadIdx.x;
}

extern "C" __global__ void divergent_barrier(i64* out) {
    if (threadIdx.x < 40) __syncthreads();
    out[threadIdx.x] = 1;
}

extern "C" __global__ void two_barriers(i64* out) {
    if (threadIdx.x < 40)
        __syncthreads();
    else
        __syncthreads();
    out[threadIdx.x] = 1;
}

extern "C" __global__ void divergent_shuffle(i64* out) {
    i64 value = threadIdx.x;
    if (threadIdx.x % 2 == 0) value = __shfl_sync(ALL_LANES, value, 0);
    __syncthreads();
    out[threadIdx.x] = value;
}

extern "C" __global__ void returned_lane(i64* out) {
    if (threadIdx.x == 5) return;
    out[threadIdx.x] = __shfl_sync(ALL_LANES, i64(threadIdx.x), 0);
}

// mask: of a shuffle by the lower half of a warp. from: the lane that is read.
extern "C" __global__ void masked_shuffle(i64* out, i64 mask, int from) {
    if (threadIdx.x < 16) out[threadIdx.x] = __shfl_sync(u32(mask), i64(threadIdx.x) * 3, from);
}

extern "C" __global__ void votes(i64* out) {
    const int lane = int(threadIdx.x) % WARP;
    out[4 * threadIdx.x] = __ballot_sync(ALL_LANES, lane % 3 == 0);
    out[4 * threadIdx.x + 1] = __match_any_sync(ALL_LANES, lane / 8);
    out[4 * threadIdx.x + 2] = __shfl_up_sync(ALL_LANES, lane, 3, 8);
    out[4 * threadIdx.x + 3] = __shfl_down_sync(ALL_LANES, lane, 3, 8);
}

extern "C" __global__ void write_shared(i64* out, int bytes) {
    DYNAMIC_SHARED(shared);
    for (int i = 0; i < bytes; ++i) shared[i] = (unsigned char)(i);
    *out = shared[0];
}

extern "C" __global__ void uninitialised(float* out) {
    DYNAMIC_SHARED(shared);
    __shared__ float fixed[1];
    const float* dynamic = reinterpret_cast<const float*>(shared);
    out[blockIdx.x] = fixed[0] + dynamic[0];
    fixed[0] = 0.0f;
    reinterpret_cast<float*>(shared)[0] = 0.0f;
}
