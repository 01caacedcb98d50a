// Masks of whole rows of logits, as bit sets (ops/sampling.py: mask_bits).
#include "common.cuh"

// logits[at_rows[g], id] = -inf where bit id of set g is 0: the blocks (.., g) do that. Rows outside the logits are left
// out.
extern "C" __global__ void __launch_bounds__(256)
    sample_mask_bits(float* logits, i64 stride, i64 rows, i64 vocab, const i64* at_rows, const int* bits, i64 words) {
    const i64 row = at_rows[blockIdx.y], each = i64(gridDim.x) * blockDim.x;
    if (u64(row) >= u64(rows)) return;
    float* const target = logits + row * stride;
    const int* const set = bits + i64(blockIdx.y) * words;
    for (i64 id = i64(blockIdx.x) * blockDim.x + threadIdx.x; id < vocab; id += each)
        if ((set[id >> 5] >> (id & 31) & 1) == 0) target[id] = -infinity();
}
