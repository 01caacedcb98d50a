// Draws from rows of logits (ops/sampling.py), several blocks a row. The tokens are those of the reference.
//
// A block has a piece of a row, eight values for each of its threads. What blocks leave to the next launch is a
// largest number, a sum of integers, or a set: the same in any order. So neither the number of blocks nor the rows
// beside it change a token.
//
//     sample_draw_highest   the largest logit of each piece
//     sample_draw_bins      of rows with top-k or top-p: number and mass of the tokens in each bin of logits
//     sample_draw_collect   the logits in the bins in which those two may cut, as a list
//     sample_draw_cut       the smallest logit that the filters keep, from the list; one block a row
//     sample_draw_pieces    the best token of each piece
//     sample_draw_choose    the best token of the row; one warp a row
#include "sampling.cuh"

namespace {

constexpr u32 LIKELY_WORD = 0xfe000000u;  // one random word in 128 is as large
constexpr double LIKELY_NOISE = 4.85;     // more than any other word's
constexpr int NO_ID = 0x7fffffff;
constexpr int FOURS = 2, EACH = 4 * FOURS;  // values of a thread
constexpr int MOST_PIECE = 4096;
constexpr int GROUP = WARP, GROUPS = BINS / GROUP;
constexpr int LIST = 4096;     // logits that a row's list can have: where more are in its bins, one block walks the row
constexpr int LOW_BITS = 19;   // of a mass, in the first and second of a bin's three sums
constexpr u32 LOW = (1u << LOW_BITS) - 1;
// The third has the rest of the mass, up to 2^6 for each token, and above it the number of tokens.
static_assert(u64(MOST_PIECE) * LOW < 1ull << 32 && u64(MOST_PIECE) << (MASS_BITS - 2 * LOW_BITS) < 1u << LOW_BITS &&
                  u64(MOST_PIECE) << LOW_BITS < 1ull << 32,
              "sums of a piece fit in 32 bits: a shared atomic of 64 is a loop");

// --- memory between the launches: for each row a Row, and behind it its pieces ---

struct Row {
    u64 masses[BINS];
    u32 counts[BINS];
    u64 group_masses[GROUPS];  // of GROUP bins side by side
    u32 group_counts[GROUPS];
    float list[LIST];
    u32 listed;  // logits for the list, more than LIST where it has not all of them
    float low;   // the smallest logit that the filters keep
    i64 min_mass;
};
struct Piece {
    double best;
    int best_id;
    float highest, lowest;  // logits; the lowest that is not masked
    int unused;
};
static_assert(sizeof(Row) == 8 * 5218 && sizeof(Piece) == 8 * 3, "launch/sampling.py has these sizes");

__device__ __forceinline__ Row& row_of(i64* scratch, i64 words, i64 row) {
    return *reinterpret_cast<Row*>(scratch + row * words);
}
__device__ __forceinline__ Piece* pieces_of(Row& row) { return reinterpret_cast<Piece*>(&row + 1); }

// --- a row ---

struct Drawing {
    double temperature, peak;  // peak: the largest score
    float highest, low;        // tokens with a logit below `low` cannot be drawn, and have no mass

    __device__ __forceinline__ double score(float logit) const { return double(logit) / temperature; }
    __device__ __forceinline__ u64 mass(float logit) const { return u64(mass_of(score(logit), peak)); }

    // The smallest float whose score is at least `wanted`: scores grow with logits. Each warp searches, in 32 parts at
    // a time, one for each lane.
    __device__ __forceinline__ float logit_of(double wanted) const {
        const int lane = int(threadIdx.x) % WARP;
        i64 least = i64(key_of(-infinity())), most = i64(key_of(infinity()));
        while (least < most) {
            const i64 span = most - least, place = least + span * lane / WARP;
            const u32 votes = __ballot_sync(ALL_LANES, score(value_of(u32(place))) >= wanted);
            const int first = votes ? __ffs(int(votes)) - 1 : WARP;
            if (first < WARP) most = least + span * first / WARP;
            if (first > 0) least = least + span * (first - 1) / WARP + 1;
        }
        return value_of(u32(least));
    }
};

// A row of which the pieces' largest and lowest logits are known. Each warp takes the extremes of them.
__device__ __forceinline__ Drawing drawing_of(const Piece* pieces, int count, double temperature) {
    float highest = -infinity(), lowest = infinity();
    for (int i = int(threadIdx.x) % WARP; i < count; i += WARP) {
        highest = larger(highest, pieces[i].highest);
        lowest = smaller(lowest, pieces[i].lowest);
    }
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) {
        highest = larger(highest, __shfl_xor_sync(ALL_LANES, highest, step));
        lowest = smaller(lowest, __shfl_xor_sync(ALL_LANES, lowest, step));
    }
    Drawing found{temperature, 0, highest, 0};
    found.peak = found.score(highest);
    found.low = larger(highest - float((WINDOW + 1) * temperature), lowest);  // WINDOW, and what rounding takes of it
    return found;
}

__device__ __forceinline__ int num_pieces(int vocab) {
    const int piece = EACH * int(blockDim.x);
    return (vocab + piece - 1) / piece;
}

// This thread's values of the block's piece: take(first id, four values, how many of them there are).
template <class Take>
__device__ __forceinline__ void each_four(const float* logits, int vocab, Take take) {
    const bool aligned = (u64(logits) & 15) == 0;
    const int begin = 4 * (int(blockIdx.x) * FOURS * int(blockDim.x) + int(threadIdx.x));
    float4 found[FOURS];
#pragma unroll
    for (int i = 0; i < FOURS; ++i) found[i] = load4(logits, begin + 4 * i * int(blockDim.x), vocab, aligned);
#pragma unroll
    for (int i = 0; i < FOURS; ++i) {
        const int first = begin + 4 * i * int(blockDim.x);
        const float four[4] = {found[i].x, found[i].y, found[i].z, found[i].w};
        if (first < vocab) take(i, first, four, smaller(4, vocab - first));
    }
}

// Calls take(value) for as many values of the piece; a warp's are side by side.
template <class Take>
__device__ __forceinline__ void each_own(const float* logits, int vocab, Take take) {
    const int begin = int(blockIdx.x) * EACH * int(blockDim.x) + int(threadIdx.x);
    float own[EACH];
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        const int at = begin + i * int(blockDim.x);
        own[i] = at < vocab ? logits[at] : not_a_number();  // which no one takes
    }
#pragma unroll
    for (int i = 0; i < EACH; ++i) take(own[i]);
}

__device__ __forceinline__ bool is_filtered(i64 top_k, double top_p) { return top_k > 0 || top_p < 1; }

__device__ __forceinline__ u64 share_of(double top_p, u64 total) { return u64(ceil(top_p * double(i64(total)))); }

// --- filters ---

// The sum of the bins above one, or of all above -1. A warp adds.
template <class Number>
__device__ __forceinline__ u64 above(const Number* bins, const Number* groups, int bin) {
    const int lane = int(threadIdx.x) % WARP, group = bin < 0 ? -1 : bin / GROUP;
    u64 sum = 0;
    for (int i = lane; i < GROUPS; i += WARP) sum += i > group ? groups[i] : 0;
    if (group >= 0) sum += group * GROUP + lane > bin ? bins[group * GROUP + lane] : 0;
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, step);
    return sum;
}

// Sums of a lane's number and those of the lanes before it.
__device__ __forceinline__ u64 up_to(u64 own) {
#pragma unroll
    for (int step = 1; step < WARP; step *= 2) {
        const u64 before = __shfl_up_sync(ALL_LANES, own, step);
        if (int(threadIdx.x) % WARP >= step) own += before;
    }
    return own;
}

// The bin at which the sum of the bins, from the last one down, reaches `wanted`; -1 if all of them do not. A warp
// searches.
template <class Number>
__device__ __forceinline__ int reaching(const Number* bins, const Number* groups, u64 wanted) {
    const int lane = int(threadIdx.x) % WARP;
    wanted = wanted == 0 ? 1 : wanted;
    u64 before = 0;
    int group = -1;
    for (int top = GROUPS - 1; top >= 0 && group < 0; top -= WARP) {
        const u64 sum = before + up_to(groups[top - lane]);
        const u32 votes = __ballot_sync(ALL_LANES, sum >= wanted);
        const int first = votes ? __ffs(int(votes)) - 1 : WARP;
        const u64 last = __shfl_sync(ALL_LANES, sum, first > 0 ? first - 1 : 0);
        if (first > 0) before = last;
        if (first < WARP) group = top - first;
    }
    if (group < 0) return -1;
    const int top = group * GROUP + GROUP - 1;
    const u32 votes = __ballot_sync(ALL_LANES, before + up_to(bins[top - lane]) >= wanted);
    return votes ? top - (__ffs(int(votes)) - 1) : top;
}

// The smallest logit that top-k and top-p keep, from the row's bins and its list.
__device__ __forceinline__ float kept_from(Workspace& work, const Drawing& drawing, const Row& row, const float* logits,
                                           int vocab, i64 top_k, double top_p) {
    const Spread spread(drawing.low, drawing.highest);
    float low = drawing.low;
    bool listed = row.listed <= LIST;
    int cut = BINS;  // the bin in which top-k cuts
#pragma unroll 1
    for (int filter = 0; filter < 2; ++filter) {
        const bool by_mass = filter == 1;
        if (by_mass ? !(top_p < 1) : top_k <= 0) continue;
        const float* const values = listed ? row.list : logits;
        const int count = listed ? int(row.listed) : vocab;
        const auto weight = [&](float value) { return by_mass ? drawing.mass(value) : u64(1); };
        __syncthreads();
        for (int i = int(threadIdx.x); i < BINS; i += int(blockDim.x))
            work.bins[i] = !by_mass ? row.counts[i] : cut == BINS || i > cut ? row.masses[i] : 0;
        __syncthreads();
        if (by_mass && cut < BINS) {
            for (int i = int(threadIdx.x); i < count; i += int(blockDim.x)) {
                const int bin = spread(values[i]);
                if (values[i] >= low && bin <= cut) atomicAdd(&work.bins[bin], weight(values[i]));
            }
            __syncthreads();
        }
        const u64 wanted = by_mass ? share_of(top_p, total_of(work)) : u64(top_k);
        find_bin(work, wanted);
        const int bin = int(work.found[0]);
        if (bin == BINS && !by_mass) continue;  // there are not so many
        // Not reached by the mass: p is close to 1 and its product was rounded up. Then the largest stays, as in the
        // reference.
        u32 key = key_of(drawing.highest);
        if (bin < BINS) {
            const auto in = [&](int, float value) { return value >= low && spread(value) == bin; };
            const u64 rest = (wanted == 0 ? 1 : wanted) - work.found[1];
            const auto own_key = [](int, float value) { return key_of(value); };
            key = refine<false>(work, values, count, in, own_key, weight, rest).key;
        }
        low = drawing.logit_of(drawing.score(value_of(key)));  // unequal logits may have one score
        if (!by_mass) cut = bin, listed = listed && spread(low) == bin;
    }
    return low;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(512)
    sample_draw_highest(const float* logits, i64 stride, int vocab, i64* scratch, i64 words) {
    __shared__ Slots work;
    Row& row = row_of(scratch, words, blockIdx.y);
    const int first = int(blockIdx.x * blockDim.x + threadIdx.x);
    for (int i = first; i < BINS; i += int(gridDim.x * blockDim.x)) {
        row.masses[i] = row.counts[i] = 0;
        if (i < GROUPS) row.group_masses[i] = row.group_counts[i] = 0;
    }
    if (first == 0) row.listed = 0;
    float highest = -infinity(), lowest = infinity();
    each_own(logits + blockIdx.y * stride, vocab, [&](float value) {
        highest = value > highest ? value : highest;
        lowest = value < lowest && value > -infinity() ? value : lowest;
    });
    highest = largest(work, highest);
    lowest = smallest(work, lowest);
    if (threadIdx.x != 0) return;
    pieces_of(row)[blockIdx.x].highest = highest;
    pieces_of(row)[blockIdx.x].lowest = lowest;
}

extern "C" __global__ void __launch_bounds__(512, 2)
    sample_draw_bins(const float* logits, i64 stride, int vocab, const double* temperatures, const i64* top_ks,
                     const double* top_ps, i64* scratch, i64 words) {
    __shared__ u32 first[BINS], second[BINS], third[BINS];
    const i64 i = blockIdx.y;
    if (!is_filtered(top_ks[i], top_ps[i])) return;
    Row& row = row_of(scratch, words, i);
    const Drawing drawing = drawing_of(pieces_of(row), num_pieces(vocab), temperatures[i]);
    const Spread spread(drawing.low, drawing.highest);
    const bool weighed = top_ps[i] < 1;
    for (int j = int(threadIdx.x); j < BINS; j += int(blockDim.x)) first[j] = second[j] = third[j] = 0;
    __syncthreads();
    each_own(logits + i * stride, vocab, [&](float value) {
        if (!(value >= drawing.low)) return;
        const int bin = spread(value);
        const u64 mass = weighed ? drawing.mass(value) : 0;
        if (mass) {
            atomicAdd(&first[bin], u32(mass) & LOW);
            atomicAdd(&second[bin], u32(mass >> LOW_BITS) & LOW);
        }
        atomicAdd(&third[bin], u32(mass >> 2 * LOW_BITS) + (1u << LOW_BITS));
    });
    __syncthreads();
    for (int j = int(threadIdx.x); j < BINS; j += int(blockDim.x)) {  // a group of bins in each warp
        u64 mass = first[j] + (u64(second[j]) << LOW_BITS) + (u64(third[j] & LOW) << 2 * LOW_BITS);
        u32 count = third[j] >> LOW_BITS;
        if (!__any_sync(ALL_LANES, count)) continue;
        if (count) atomicAdd(&row.counts[j], count);
        if (mass) atomicAdd(&row.masses[j], mass);
#pragma unroll
        for (int step = WARP / 2; step > 0; step /= 2) {
            mass += __shfl_xor_sync(ALL_LANES, mass, step);
            count += __shfl_xor_sync(ALL_LANES, count, step);
        }
        if (j % GROUP != 0) continue;
        atomicAdd(&row.group_counts[j / GROUP], count);
        atomicAdd(&row.group_masses[j / GROUP], mass);
    }
}

extern "C" __global__ void __launch_bounds__(512, 2)
    sample_draw_collect(const float* logits, i64 stride, int vocab, const double* temperatures, const i64* top_ks,
                        const double* top_ps, i64* scratch, i64 words) {
    const i64 i = blockIdx.y, top_k = top_ks[i];
    const double top_p = top_ps[i];
    if (!is_filtered(top_k, top_p)) return;
    Row& row = row_of(scratch, words, i);
    const Drawing drawing = drawing_of(pieces_of(row), num_pieces(vocab), temperatures[i]);
    const Spread spread(drawing.low, drawing.highest);
    const int cut = top_k > 0 ? reaching(row.counts, row.group_counts, u64(top_k)) : -1;
    // Where top-k cuts within a bin, the mass that it leaves is known but for that bin's: top-p cuts in one of the bins
    // between those in which it would cut with none of it and with all of it.
    int most = -1, least = BINS;
    if (top_p < 1) {
        u64 mass = above(row.masses, row.group_masses, cut);
#pragma unroll 1
        for (int i = 0; i < 2; ++i) {
            const int bin = larger(reaching(row.masses, row.group_masses, share_of(top_p, mass)), cut);
            if (i == 0) most = bin, mass += cut < 0 ? 0 : row.masses[cut];
            least = bin;
        }
    }
    each_own(logits + i * stride, vocab, [&](float value) {
        const int bin = spread(value);
        if (!(value >= drawing.low) || (bin != cut && (bin < least || bin > most))) return;
        const u32 slot = atomicAdd(&row.listed, 1u);
        if (slot < LIST) row.list[slot] = value;
    });
}

extern "C" __global__ void __launch_bounds__(512, 1)
    sample_draw_cut(const float* logits, i64 stride, int vocab, const double* temperatures, const i64* top_ks,
                    const double* top_ps, const double* min_ps, i64* scratch, i64 words, int pieces) {
    __shared__ Workspace work;
    const i64 i = blockIdx.x;
    Row& row = row_of(scratch, words, i);
    const Drawing drawing = drawing_of(pieces_of(row), pieces, temperatures[i]);
    float low = drawing.low;
    if (is_filtered(top_ks[i], top_ps[i]))
        low = kept_from(work, drawing, row, logits + i * stride, vocab, top_ks[i], top_ps[i]);
    i64 min_mass = 0;
    if (min_ps[i] > 0) {
        min_mass = i64(ceil(min_ps[i] * 0x1p44));
        const double least = exact_log((double(min_mass) - 0.5) * 0x1p-44) - 1e-6;  // below it masses are too small
        low = larger(low, drawing.logit_of(drawing.peak + least));
    }
    if (threadIdx.x != 0) return;
    row.low = low;
    row.min_mass = min_mass;
}

// --- the draw ---

extern "C" __global__ void __launch_bounds__(512, 2)
    sample_draw_pieces(const float* logits, i64 stride, int vocab, const double* temperatures, const i64* seeds,
                       const i64* samples, const i64* positions, i64* scratch, i64 words) {
    __shared__ Slots work;
    const i64 i = blockIdx.y;
    Row& row = row_of(scratch, words, i);
    Piece* const pieces = pieces_of(row);
    const Drawing drawing = drawing_of(pieces, num_pieces(vocab), temperatures[i]);
    const i64 min_mass = row.min_mass;
    double best = -double(infinity());
    int best_id = NO_ID;
    float low = row.low;
    float own[EACH];
    u32 random[EACH];
#pragma unroll
    for (int j = 0; j < EACH; ++j) own[j] = not_a_number();
    each_four(logits + i * stride, vocab, [&](int load, int first, const float* four, int count) {
        const u64 seed = u64(seeds[i]);
        const Words words_of = philox(u32(first) / 4, u32(positions[i]), u32(samples[i]), u32(seed), u32(seed >> 32));
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            if (j < count) own[4 * load + j] = four[j];
            random[4 * load + j] = words_of.c[j];
        }
    });
    // Noise grows with the random word. Consider tokens with a large word first, then those that a smaller word can
    // still lift to the piece's best so far. The margin covers rounding; considering a token twice does no harm.
#pragma unroll 1
    for (int round = 0; round < 2; ++round) {
        u32 left = 0;
#pragma unroll
        for (int j = 0; j < EACH; ++j)
            left |= u32(own[j] >= low && (round == 1 || random[j] >= LIKELY_WORD)) << j;
#pragma unroll 1
        while (left) {
            const int at = __ffs(int(left)) - 1;
            left &= left - 1;
            float logit = own[0];
            u32 word = random[0];
#pragma unroll
            for (int j = 1; j < EACH; ++j) logit = j == at ? own[j] : logit, word = j == at ? random[j] : word;
            const double score = drawing.score(logit), sum = score + gumbel(word);
            const int id = 4 * ((int(blockIdx.x) * FOURS + at / 4) * int(blockDim.x) + int(threadIdx.x)) + at % 4;
            const bool better = sum > best || (sum == best && id < best_id);
            if (!better || (min_mass > 0 && mass_of(score, drawing.peak) < min_mass)) continue;
            best = sum;
            best_id = id;
        }
        const double reached = (largest(work, best) - LIKELY_NOISE) * drawing.temperature;
        low = larger(low, float(reached - (reached < 0 ? -reached : reached) * 1e-6));
    }
    const double highest = largest(work, best);
    best_id = smallest(work, best == highest ? best_id : NO_ID);
    if (threadIdx.x != 0) return;
    pieces[blockIdx.x].best = highest;
    pieces[blockIdx.x].best_id = best_id;
}

extern "C" __global__ void __launch_bounds__(32)
    sample_draw_choose(int vocab, i64* scratch, i64 words, int pieces, i64* token_ids) {
    __shared__ Slots work;
    const Piece* const found = pieces_of(row_of(scratch, words, blockIdx.x));
    double best = -double(infinity());
    int id = NO_ID;
    for (int i = int(threadIdx.x); i < pieces; i += WARP) {
        const Piece piece = found[i];
        if (piece.best > best || (piece.best == best && piece.best_id < id)) best = piece.best, id = piece.best_id;
    }
    const double highest = largest(work, best);
    id = smallest(work, best == highest ? id : NO_ID);
    if (threadIdx.x == 0) token_ids[blockIdx.x] = id < vocab ? id : 0;
}
