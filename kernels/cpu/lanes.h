// MLA decode's arithmetic: 16 rows, (query row, head) pairs that share keys and values, are the 16 lanes of a vector.
//
//     scores    lanes += q[cell] * key[token][cell]         q packed as [cell][16 rows], the key's cell repeated
//     weights   2^(score - largest so far), lane by lane
//     output    lanes += weight[token] * value[token][i]    a vector of rows for each value i, the value repeated
//
// So no step mixes rows and nothing is added up across lanes: a row's bits cannot depend on the others. For the output
// a cell is of two neighbouring tokens where the CPU multiplies pairs; they are interleaved once for all rows. Tokens
// are taken CHUNK at a time, with a running maximum.
#pragma once

#include "split.h"
#include "steps.h"
#include "transpose.h"

namespace {
namespace decode {

constexpr int CHUNK = 32;  // tokens; a split starts at a multiple

#if CIERZO_AVX512
constexpr int TILE = 16;  // sums held in registers
#else
constexpr int TILE = 4;
#endif

// What all heads attend to: the key is a cached row, the value is the latent that it starts with.
template <class T>
struct Latents {
    CachedRows rows;
    int64_t rank, rope;

    INLINE int64_t width() const { return rank + rope; }
    template <class Value>
    INLINE void copy(int64_t position, Value* target) const {
        const uint8_t* row = rows.at(position);
        copy_run(latent_of<T>(row, rank, rope), rank, target);
        copy_run(rope_key_of<T>(row, rank, rope), rope, target + rank);
    }
};

// A chunk of tokens as the steps want it. Keys are read where they lie, four at a time, if a block holds all four in
// the steps' own type; else they are copied. Values are interleaved.
template <class Steps, class T>
struct Chunk {
    using Value = typename Steps::Value;
    bool direct;
    int64_t tokens;
    int64_t key_stride;             // values from key to key
    int64_t value_cells;            // of a token, padded to what one vector of each token gives
    const Value* quads[CHUNK / 4];  // keys of tokens 4 i .. 4 i + 3
    const Value* found[CHUNK];      // values of each token
    Value* copies;                  // [CHUNK][key_stride]
    Value* values;                  // [CHUNK / PACK][value_cells][PACK]
    Value* zeros;                   // of a token that is not there

    Chunk(Team& team, int64_t rank, int64_t rope) {
        const int64_t width = rank + rope;
        direct = std::is_same<T, Value>::value && width % Steps::PACK == 0;
        key_stride = direct ? width : divide_up(width, LANES) * LANES;
        value_cells = divide_up(rank, LANES * Steps::PACK) * LANES * Steps::PACK;
        copies = team.own_scratch<Value>(CHUNK * key_stride);
        values = team.own_scratch<Value>(CHUNK * value_cells);
        zeros = team.own_scratch<Value>(rank);
        std::memset(zeros, 0, size_t(rank) * sizeof(Value));
    }

    // Tokens first .. first + count - 1. Not every row sees those from first + guarded on.
    INLINE void read(const Latents<T>& memory, int64_t first, int64_t count, int64_t guarded) {
        tokens = count;
        for (int64_t t = 0; t < count; t += 4) {
            if (direct && t + 4 <= smaller(count, guarded) && memory.rows.together(first + t) >= 4) {
                quads[t / 4] = reinterpret_cast<const Value*>(memory.rows.at(first + t));
                for (int i = 0; i < 4; ++i) found[t + i] = quads[t / 4] + i * key_stride;
                continue;
            }
            quads[t / 4] = copies + t * key_stride;
            for (int64_t i = t; i < t + 4; ++i)
                found[i] = i < count ? copy(memory, first + i, copies + i * key_stride, i >= guarded) : zeros;
        }
        for (int64_t quad = divide_up(count, 4); quad < divide_up(count, TILE) * (TILE / 4); ++quad)
            quads[quad] = quads[0];  // scores that nobody asks for
    }

    // Copies a key, and says where its value is. Where a row does not see a token, its weight of zero times a value
    // that is not finite would be NaN: such a value is taken for zero, and rows that see it get NaN from the key.
    INLINE const Value* copy(const Latents<T>& memory, int64_t position, Value* key, bool guarded) const {
        const int64_t width = memory.width();
        std::memset(key + width, 0, size_t(key_stride - width) * sizeof(Value));
        memory.copy(position, key);
        if (!guarded || finite(key, memory.rank)) return key;
        for (int64_t i = 0; i < width; ++i) narrow_to(key + i, __builtin_nanf(""));
        return zeros;
    }
    static INLINE bool finite(const Value* values, int64_t count) {
        F32 poison = zero();
        for (int64_t i = 0; i < count; i += LANES)
            poison = fma(load(values + i, int(smaller(LANES, count - i))), zero(), poison);
        return sum(poison) == 0;
    }

    // The values of TILE tokens from `first` on.
    INLINE void interleave(int64_t first, int64_t rank) {
        for (int64_t t = first; t < smaller(first + TILE, tokens); t += Steps::PACK) {
            float* cells = reinterpret_cast<float*>(values + t * value_cells);
            for (int64_t i = 0; i < rank; i += LANES * Steps::PACK) {
                F32 rows[Steps::PACK], vectors[Steps::VECTORS];
                for (int p = 0; p < Steps::PACK; ++p) rows[p] = Steps::cells(found[t + p] + i, rank - i);
                Steps::interleave(rows, vectors);
                for (int v = 0; v < Steps::VECTORS; ++v, cells += LANES) store(cells, vectors[v]);
            }
        }
    }
};

// 16 rows of queries, packed: [cells][16 rows]. Rows that are not there are zero.
template <class Steps, class RowOf>
INLINE void pack_queries(int64_t first, int64_t rows, int64_t width, RowOf row_of, F32* packed) {
    const int64_t cells = divide_up(width, Steps::PACK);
    for (int64_t cell = 0; cell < cells; cell += LANES) {
        F32 square[LANES];
        for (int r = 0; r < LANES; ++r)
            square[r] = r < rows ? Steps::cells(row_of(first + r) + cell * Steps::PACK, width - cell * Steps::PACK)
                                 : zero();
        transpose(square);
        for (int64_t i = 0; i < smaller(LANES, cells - cell); ++i) packed[cell + i] = square[i];
    }
}

// Scores of TILE tokens, [token][16 rows].
template <class Steps>
INLINE void score_tile(const F32* q, int64_t cells, const typename Steps::Value* const* quads, int64_t stride,
                       F32 scale, Coming coming, float* scores) {
    using Value = typename Steps::Value;
    F32 sums[TILE];
    const Value* keys[TILE / 4];
#pragma GCC unroll 4
    for (int i = 0; i < TILE / 4; ++i) keys[i] = quads[i];
#pragma GCC unroll 16
    for (int t = 0; t < TILE; ++t) sums[t] = zero();
    for (int64_t cell = 0; cell < cells; ++cell) {
        coming.line();
        const F32 rows = q[cell];
#pragma GCC unroll 16
        for (int t = 0; t < TILE; ++t)
            sums[t] = Steps::step(sums[t], rows, keys[t / 4] + t % 4 * stride + cell * Steps::PACK);
    }
#pragma GCC unroll 16
    for (int t = 0; t < TILE; ++t) store(scores + t * LANES, sums[t] * scale);
}

// The partial result of 16 rows: largest score, in powers of two; sum of weights; then [value][16 rows].
struct State {
    float* at;
    INLINE float* largest() const { return at; }
    INLINE float* total() const { return at + LANES; }
    INLINE float* out() const { return at + 2 * LANES; }
    static INLINE int64_t floats(int64_t values) { return (2 + divide_up(values, LANES) * LANES) * LANES; }

    INLINE void clear(int64_t floats) {  // of rows that see nothing; with 0 floats the output is left for later
        store(largest(), set(LOWEST));
        store(total(), zero());
        if (floats > 0) std::memset(out(), 0, size_t(floats - 2 * LANES) * sizeof(float));
    }
};

// Scores -> weights, cells [tokens / PACK][16 rows]. Returns what earlier output is to be multiplied with. A row sees
// the first `sees` tokens; with ALL every row sees every token.
template <class Steps, bool ALL>
INLINE F32 weigh(const float* scores, int64_t tokens, F32 sees, State state, typename Steps::Value* weights) {
    const F32 before = load(state.largest());
    F32 largest = before;
    for (int64_t t = 0; t < tokens; ++t) {
        const F32 score = load(scores + t * LANES);
        largest = max(largest, ALL ? score : where_less(set(float(t)), sees, score, set(LOWEST)));
    }
    const auto weight = [&](int64_t t) {
        const F32 w = exp2(load(scores + t * LANES) - largest);
        return ALL ? w : where_less(set(float(t)), sees, w, zero());
    };
    const F32 factor = exp2(before - largest);
    F32 total = load(state.total()) * factor;
    for (int64_t t = 0; t < tokens; t += Steps::PACK) {
        const F32 even = weight(t), odd = Steps::PACK == 2 && t + 1 < tokens ? weight(t + 1) : zero();
        total = total + even + odd;
        Steps::store_weights(weights + t * LANES, even, odd);
    }
    store(state.largest(), largest);
    store(state.total(), total);
    return factor;
}

// out = out * factor + weights * values, for TILE values of each token.
template <class Steps>
INLINE void output_tile(const typename Steps::Value* weights, const typename Steps::Value* values, int64_t steps,
                        int64_t value_cells, F32 factor, bool first, float* out) {
    F32 sums[TILE];
#pragma GCC unroll 16
    for (int i = 0; i < TILE; ++i) sums[i] = first ? zero() : load(out + i * LANES) * factor;
    for (int64_t step = 0; step < steps; ++step) {
        const F32 rows = load(reinterpret_cast<const float*>(weights + step * LANES * Steps::PACK));
        const typename Steps::Value* cells = values + step * value_cells * Steps::PACK;
#pragma GCC unroll 16
        for (int i = 0; i < TILE; ++i) sums[i] = Steps::step(sums[i], rows, cells + i * Steps::PACK);
    }
#pragma GCC unroll 16
    for (int i = 0; i < TILE; ++i) store(out + i * LANES, sums[i]);
}

// One thread's part: its scratch, and one split of some work at a time.
template <class Steps, class T>
struct LaneAttention {
    using Value = typename Steps::Value;
    int64_t rank, rope;
    int64_t cells, floats;  // of a packed query; of a group's partial result
    Chunk<Steps, T> chunk;
    F32* queries;    // [groups][cells]
    float* sees;     // [groups][16 rows]: positions
    float* scores;   // [CHUNK][16 rows]
    Value* weights;  // [CHUNK / PACK][16 rows][PACK]

    LaneAttention(Team& team, int64_t rank, int64_t rope, int64_t max_groups)
        : rank(rank),
          rope(rope),
          cells(divide_up(rank + rope, Steps::PACK)),
          floats(State::floats(rank)),
          chunk(team, rank, rope),
          queries(team.own_scratch<F32>(max_groups * cells)),
          sees(team.own_scratch<float>(max_groups * LANES)),
          scores(team.own_scratch<float>(CHUNK * LANES)),
          weights(team.own_scratch<Value>(CHUNK * LANES)) {}

    // row_of(row) is where a row's query lies. The scale is for scores in powers of two.
    template <class RowOf>
    void attend(const CachedRows& cached, const Rows& rows, const Work& work, int64_t split, RowOf row_of, float scale,
                float* partial) {
        const Latents<T> memory{cached, rank, rope};
        const int64_t begin = split_start(split), groups = divide_up(work.rows, LANES);
        const int64_t end = smaller(split_start(split + 1), rows.sees(work.first + work.rows - 1));
        for (int64_t t = begin; t < smaller(begin + CHUNK, end); t += 4)
            Coming{cached.at(t), 4 * cached.row_bytes}.lines();
        for (int64_t g = 0; g < groups; ++g) {
            const int64_t first = work.first + g * LANES, count = smaller(LANES, work.rows - g * LANES);
            pack_queries<Steps>(first, count, rank + rope, row_of, queries + g * cells);
            for (int r = 0; r < LANES; ++r) sees[g * LANES + r] = float(rows.sees(first + smaller(r, count - 1)));
            State{partial + g * floats}.clear(last_seen(g) > begin ? 0 : floats);
        }
        for (int64_t start = begin; start < end; start += CHUNK) {
            chunk.read(memory, start, smaller(CHUNK, end - start), int64_t(sees[0]) - start);
            bool first = true;  // of the groups: it prepares the values, and brings the next chunk nearer
            for (int64_t g = 0; g < groups; ++g) {
                if (last_seen(g) <= start) continue;
                score(cached, g, start, first, end, scale);
                add(g, start, start == begin, State{partial + g * floats});
                first = false;
            }
        }
    }

    INLINE int64_t last_seen(int64_t group) const { return int64_t(sees[group * LANES + LANES - 1]); }

    // Scores of the chunk's tokens for one group.
    INLINE void score(const CachedRows& cached, int64_t group, int64_t start, bool first, int64_t end, float scale) {
        for (int64_t t = 0; t < chunk.tokens; t += TILE) {
            Coming coming{reinterpret_cast<const uint8_t*>(queries), 0};
            if (first && start + CHUNK + t < end)
                coming = {cached.at(start + CHUNK + t), divide_up(TILE * cached.row_bytes, cells)};
            score_tile<Steps>(queries + group * cells, cells, chunk.quads + t / 4, chunk.key_stride, set(scale), coming,
                              scores + t * LANES);
            if (first) chunk.interleave(t, rank);
        }
    }

    // Adds the chunk, which starts at position `start`, to what the group has so far; or begins with it.
    INLINE void add(int64_t group, int64_t start, bool begins, State state) {
        const int64_t tokens = chunk.tokens;
        const F32 here = load(sees + group * LANES) - set(float(start));
        const F32 factor = sees[group * LANES] >= float(start + tokens)
                               ? weigh<Steps, true>(scores, tokens, here, state, weights)
                               : weigh<Steps, false>(scores, tokens, here, state, weights);
        for (int64_t i = 0; i < rank; i += TILE)
            output_tile<Steps>(weights, chunk.values + i * Steps::PACK, divide_up(tokens, Steps::PACK),
                               chunk.value_cells, factor, begins, state.out() + i * LANES);
    }
};

// Adds up the partials of one group, `apart` floats from split to split, and writes values [first, last) of its rows.
template <class T>
void add_partials(const float* partials, int64_t apart, int64_t splits, int64_t rows, int64_t first, int64_t last,
                  T* out, int64_t out_stride) {
    F32 largest = set(LOWEST), total = zero();
    for (int64_t s = 0; s < splits; ++s) largest = max(largest, load(partials + s * apart));
    for (int64_t s = 0; s < splits; ++s) {
        const float* partial = partials + s * apart;
        total = fma(load(partial + LANES), exp2(load(partial) - largest), total);
    }
    const F32 share = set(1) / total;
    for (int64_t i = first; i < last; i += LANES) {
        F32 sums[LANES];
        for (int j = 0; j < LANES; ++j) sums[j] = zero();
        for (int64_t s = 0; s < splits; ++s) {
            const float* partial = partials + s * apart;
            const F32 factor = exp2(load(partial) - largest);
            for (int j = 0; j < LANES; ++j) sums[j] = fma(load(partial + (2 + i + j) * LANES), factor, sums[j]);
        }
        for (int j = 0; j < LANES; ++j) sums[j] = sums[j] * share;
        transpose(sums);
        for (int r = 0; r < rows; ++r) store(out + r * out_stride + i, sums[r], int(smaller(LANES, last - i)));
    }
}

}  // namespace decode
}  // namespace
