// Edits of logits and reports of them (ops/sampling.py; draws are in draw.cu), one block for each row except for edits.
// The tokens are those of the reference.
#include "sampling.cuh"

namespace {

constexpr int MOST_TOP = 1024;
constexpr int NO_ID = 0x7fffffff;

}  // namespace

// --- reports ---

extern "C" __global__ void __launch_bounds__(1024)
    sample_peaks(const float* logits, i64 stride, int vocab, float* values, i64* ids) {
    __shared__ Workspace work;
    const float* row = logits + i64(blockIdx.x) * stride;
    float best = -infinity();
    int id = NO_ID, unordered = 0;
    each_value(row, vocab, [&](int i, float value) {
        unordered |= value != value;
        if (value > best || id == NO_ID) {
            best = value > best ? value : best;
            id = i;
        }
    });
    const float highest = largest(work, best);
    unordered = largest(work, unordered);
    id = smallest(work, best == highest ? id : NO_ID);
    if (threadIdx.x != 0) return;
    values[blockIdx.x] = unordered ? not_a_number() : highest;
    ids[blockIdx.x] = id;
}

// out = x - ln(sum of e^x). The sum is one of integer masses, exact in any order. A meaningless row becomes all NaN.
extern "C" __global__ void __launch_bounds__(1024)
    sample_log_probabilities(const float* logits, i64 stride, int vocab, float* out) {
    __shared__ Workspace work;
    const float* row = logits + i64(blockIdx.x) * stride;
    float* const written = out + i64(blockIdx.x) * vocab;
    const float highest = highest_of(work, row, vocab);
    i64 mass = 0;
    int unordered = 0;
    each_value(row, vocab, [&](int, float value) {
        unordered |= value != value;
        mass += value == value ? mass_of(double(value), double(highest)) : 0;
    });
    mass = sum_of(work, mass);
    unordered = largest(work, unordered);
    const bool finite = !unordered && highest > -infinity() && highest < infinity();
    const double shift = double(highest) + exact_log(double(mass) * 0x1p-44);
    each_value(row, vocab, [&](int i, float value) {
        written[i] = finite ? float(double(value) - shift) : not_a_number();
    });
}

// Writes the `count` largest values, largest first, ties to the lower id, NaN last. Found are all keys above the
// count-th, and of the keys equal to it those with the lowest ids; a token's place is the number of tokens before it.
extern "C" __global__ void __launch_bounds__(1024)
    sample_top_tokens(const float* scores, i64 stride, int vocab, int count, float* values, i64* ids) {
    __shared__ Workspace work;
    __shared__ u32 keys[MOST_TOP];
    __shared__ int found_ids[MOST_TOP];
    __shared__ int found;
    const float* row = scores + i64(blockIdx.x) * stride;
    const int thread = int(threadIdx.x), threads = int(blockDim.x);
    const float highest = highest_of(work, row, vocab);
    const Spread spread(highest - 32.0f, highest);
    const auto one = [](float) { return u64(1); };
    const Threshold last = find_threshold(
        work, row, vocab, [=](int, float value) { return spread(value); },
        [](int, float value) { return key_of(value); }, one, [=](u64) { return u64(count); });
    const u64 ties = u64(count) - last.above;
    // The ties-th lowest id among equal keys: here a large key is a low id.
    const int each = (vocab + BINS - 1) / BINS;
    const Threshold lowest = find_threshold(
        work, row, vocab, [=](int i, float value) { return key_of(value) == last.key ? BINS - 1 - i / each : -1; },
        [](int i, float) { return ~u32(i); }, one, [=](u64) { return ties; });
    const int last_id = int(~lowest.key);
    if (thread == 0) found = 0;
    __syncthreads();
    each_value(row, vocab, [&](int i, float value) {
        const u32 own = key_of(value);
        if (own < last.key || (own == last.key && i > last_id)) return;
        const int slot = atomicAdd(&found, 1);  // any order: places are computed below
        keys[slot] = own;
        found_ids[slot] = i;
    });
    __syncthreads();
    for (int slot = thread; slot < count; slot += threads) {
        const u32 own = keys[slot];
        const int id = found_ids[slot];
        int place = 0;
        for (int other = 0; other < count; ++other)
            place += keys[other] > own || (keys[other] == own && found_ids[other] < id);
        values[i64(blockIdx.x) * count + place] = row[id];
        ids[i64(blockIdx.x) * count + place] = id;
    }
}

// --- edits: one thread for each entry; entries outside the logits are left out ---

namespace {

struct Place {
    i64 row, id;
    float* logit;  // null for an entry outside the logits
};

__device__ __forceinline__ Place place_of(float* logits, i64 stride, i64 width, i64 rows, i64 vocab,
                                          const i64* at_rows, const i64* token_ids, i64 entries) {
    const i64 j = i64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (j >= entries) return {0, 0, nullptr};
    const i64 row = at_rows[j], id = token_ids[j];
    if (u64(row) >= u64(rows) || u64(id) >= u64(vocab)) return {0, 0, nullptr};
    return {row, id, logits + row * stride + id * width};
}

}  // namespace

extern "C" __global__ void __launch_bounds__(256)
    sample_add_bias(float* logits, i64 stride, i64 width, i64 rows, i64 vocab, const i64* at_rows, const i64* token_ids,
                    i64 entries, const float* bias) {
    const Place place = place_of(logits, stride, width, rows, vocab, at_rows, token_ids, entries);
    if (place.logit) *place.logit += bias[i64(blockIdx.x) * blockDim.x + threadIdx.x];
}

extern "C" __global__ void __launch_bounds__(256)
    sample_mask_tokens(float* logits, i64 stride, i64 width, i64 rows, i64 vocab, const i64* at_rows,
                       const i64* token_ids, i64 entries) {
    const Place place = place_of(logits, stride, width, rows, vocab, at_rows, token_ids, entries);
    if (place.logit) *place.logit = -infinity();
}

extern "C" __global__ void __launch_bounds__(256)
    sample_apply_penalties(float* logits, i64 stride, i64 width, i64 rows, i64 vocab, const i64* at_rows,
                           const i64* token_ids, i64 entries, const i64* output_counts, const float* repetition,
                           const float* presence, const float* frequency) {
    const Place place = place_of(logits, stride, width, rows, vocab, at_rows, token_ids, entries);
    if (!place.logit) return;
    const i64 count = output_counts[i64(blockIdx.x) * blockDim.x + threadIdx.x];
    const float logit = *place.logit, factor = repetition[place.row];
    const float scaled = logit > 0.0f ? logit / factor : logit * factor;
    const float counted = scaled - frequency[place.row] * float(count);
    *place.logit = counted - presence[place.row] * float(count > 0);
}
