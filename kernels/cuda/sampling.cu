// Sampling of tokens from logits (ops/sampling.py), one block for each row except for edits. The tokens are those of
// the reference.
#include "sampling.cuh"

namespace {

constexpr u32 LIKELY_WORD = 0xfe000000u;  // one random word in 128 is as large
constexpr int MOST_TOP = 1024;
constexpr int NO_ID = 0x7fffffff;

// --- drawing ---

// A row, and this thread's best token so far.
struct Drawing {
    const float* logits;
    int vocab;
    double temperature, peak;  // peak: the largest score
    i64 min_mass;
    u32 key_low, key_high, sample, position;
    double best;
    int best_id;

    __device__ __forceinline__ double score(float logit) const { return double(logit) / temperature; }

    // The smallest float whose score is at least `wanted`: scores grow with logits. Each warp searches, in 32 parts at
    // a time, one for each lane.
    __device__ __forceinline__ float logit_of(double wanted) const {
        const int lane = int(threadIdx.x) % WARP;
        i64 low = i64(key_of(-infinity())), high = i64(key_of(infinity()));
        while (low < high) {
            const i64 span = high - low, place = low + span * lane / WARP;
            const u32 votes = __ballot_sync(ALL_LANES, score(value_of(u32(place))) >= wanted);
            const int first = votes ? __ffs(int(votes)) - 1 : WARP;
            if (first < WARP) high = low + span * first / WARP;
            if (first > 0) low = low + span * (first - 1) / WARP + 1;
        }
        return value_of(u32(low));
    }

    __device__ __forceinline__ void consider(int id, u32 word) {
        const double own = score(logits[id]), sum = own + gumbel(word);
        const bool better = sum > best || (sum == best && id < best_id);
        if (!better || (min_mass > 0 && mass_of(own, peak) < min_mass)) return;
        best = sum;
        best_id = id;
    }

    // Considers the tokens with a logit of at least `low` whose random word is at least `least`.
    __device__ __forceinline__ void consider_from(float low, u32 least) {
        const bool aligned = (u64(logits) & 15) == 0;
        for (int group = int(threadIdx.x); 4 * group < vocab; group += int(blockDim.x)) {
            const float4 four = load4(logits, 4 * group, vocab, aligned);
            u32 found = (four.x >= low) | (four.y >= low) << 1 | (four.z >= low) << 2 | (four.w >= low) << 3;
            if (4 * group + 4 > vocab) found &= (1u << (vocab - 4 * group)) - 1;
            if (found == 0) continue;
            const Words words = philox(u32(group), position, sample, key_low, key_high);
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if ((found >> i & 1) && words.c[i] >= least) consider(4 * group + i, words.c[i]);
        }
    }
};

// The smallest logit that the filters keep.
__device__ __forceinline__ float filtered(Workspace& work, Drawing& row, float highest, i64 top_k, double top_p,
                                          double min_p) {
    float low = row.logit_of(row.peak - WINDOW);
    const auto key = [](int, float value) { return key_of(value); };
    if (top_k > 0) {
        const Spread spread(low, highest);
        const auto bin = [=](int, float value) { return value >= low ? spread(value) : -1; };
        const Threshold last = find_threshold(
            work, row.logits, row.vocab, bin, key, [](float) { return u64(1); }, [=](u64) { return u64(top_k); });
        if (last.reached) low = row.logit_of(row.score(value_of(last.key)));  // unequal logits may have one score
    }
    if (top_p < 1) {
        const Spread spread(low, highest);
        const auto bin = [=](int, float value) { return value >= low ? spread(value) : -1; };
        const auto mass = [&](float value) { return u64(mass_of(row.score(value), row.peak)); };
        const auto wanted = [=](u64 total) { return u64(ceil(top_p * double(i64(total)))); };
        const Threshold last = find_threshold(work, row.logits, row.vocab, bin, key, mass, wanted);
        // Not reached: p is close to 1 and its product was rounded up. All tokens stay, as in the reference.
        low = row.logit_of(row.score(last.reached ? value_of(last.key) : highest));
    }
    if (min_p > 0) {
        row.min_mass = i64(ceil(min_p * 0x1p44));
        const double least = exact_log((double(row.min_mass) - 0.5) * 0x1p-44) - 1e-6;  // below it masses are too small
        low = larger(low, row.logit_of(row.peak + least));
    }
    return low;
}

__device__ __forceinline__ int draw_row(Workspace& work, Drawing& row, i64 top_k, double top_p, double min_p) {
    const float highest = highest_of(work, row.logits, row.vocab);
    row.peak = row.score(highest);
    float low = filtered(work, row, highest, top_k, top_p, min_p);
    // Noise grows with the random word. Consider tokens with a large word first, then those that a smaller word can
    // still lift to the best score so far. The margin covers rounding; considering a token twice does no harm.
    row.consider_from(low, LIKELY_WORD);
    const double likely = largest(work, row.best);
    low = larger(low, row.logit_of(likely - gumbel(LIKELY_WORD) - 1e-6));
    row.consider_from(low, 0);
    const double best = largest(work, row.best);
    const int id = smallest(work, row.best == best ? row.best_id : NO_ID);
    return id < row.vocab ? id : 0;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(512, 1)
    sample_draw(const float* logits, i64 stride, int vocab, const double* temperatures, const i64* top_ks,
                const double* top_ps, const double* min_ps, const i64* seeds, const i64* samples, const i64* positions,
                i64* token_ids) {
    __shared__ Workspace work;
    const i64 i = blockIdx.x;
    Drawing row;
    row.logits = logits + i * stride;
    row.vocab = vocab;
    row.temperature = temperatures[i];
    row.peak = 0;
    row.min_mass = 0;
    row.key_low = u32(u64(seeds[i]));
    row.key_high = u32(u64(seeds[i]) >> 32);
    row.sample = u32(samples[i]);
    row.position = u32(positions[i]);
    row.best = -double(infinity());
    row.best_id = NO_ID;
    const int id = draw_row(work, row, top_ks[i], top_ps[i], min_ps[i]);
    if (threadIdx.x == 0) token_ids[i] = id;
}

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
