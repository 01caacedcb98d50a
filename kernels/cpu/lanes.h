// Attention for many rows that share their keys and values: 16 rows are the 16 lanes of a vector.
//
//     scores    lanes += q[cell] * key[token][cell]           q packed as [cell][16 rows], the key's cell repeated
//     weights   exp(score - largest so far), lane by lane
//     output    lanes += weight[token] * value[token][i]      one vector for each i, the value repeated
//
// So no step mixes rows, and none needs its lanes transposed: a row's bits cannot depend on the others. A cell is
// the 4 bytes that are repeated: two bf16 where the CPU multiplies pairs, else a float; for the output the pair is of
// two neighbouring tokens, interleaved once for all rows. Tokens are taken CHUNK at a time with a running maximum.
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

// A chunk of tokens as the steps want it. Keys are read where they lie, four at a time, if a block holds all four in
// the steps' own type; else they are copied. Values are interleaved.
template <class Steps>
struct Chunk {
    using Value = typename Steps::Value;
    const Value* quads[CHUNK / 4];
    const Value* found[CHUNK + 1];  // values of each token
    int64_t key_stride;    // values from key to key
    int64_t value_cells;   // of a token, padded
    Value* copies;         // [CHUNK][key_stride]
    Value* values;         // [CHUNK / PACK][value_cells][PACK]
    Value* zeros;          // of a token that is not there
    int64_t tokens;

    template <class Memory>
    Chunk(Team& team, const Memory& memory) {
        key_stride = memory.stride_bytes() / int64_t(sizeof(Value));
        if (!direct(memory)) key_stride = divide_up(memory.key_width(), LANES) * LANES;
        value_cells = divide_up(memory.value_width(), 32) * 32;
        copies = team.own_scratch<Value>(CHUNK * key_stride);
        values = team.own_scratch<Value>(CHUNK * value_cells);
        zeros = team.own_scratch<Value>(memory.value_width());
        std::memset(zeros, 0, size_t(memory.value_width()) * sizeof(Value));
    }

    template <class Memory>
    static INLINE bool direct(const Memory& memory) {
        return std::is_same<typename Memory::Cached, Value>::value && memory.key_width() % Steps::PACK == 0;
    }

    // Tokens first .. first + count - 1. Not every row sees those from first + guarded on.
    template <class Memory>
    INLINE void read(const Memory& memory, int64_t first, int64_t count, int64_t guarded) {
        tokens = count;
        for (int64_t t = 0; t < count; t += 4) {
            const bool whole = t + 4 <= smaller(count, guarded);
            if (direct(memory) && whole && memory.together(first + t) >= 4) {
                const Value* keys = reinterpret_cast<const Value*>(memory.key_at(first + t));
                quads[t / 4] = keys;
                for (int i = 0; i < 4; ++i) found[t + i] = keys + i * key_stride;
                continue;
            }
            quads[t / 4] = copies + t * key_stride;
            for (int64_t i = t; i < t + 4; ++i)
                found[i] = i < count ? copy(memory, first + i, copies + i * key_stride, i >= guarded) : zeros;
        }
        for (int64_t quad = divide_up(count, 4); quad < divide_up(count, TILE) * (TILE / 4); ++quad)
            quads[quad] = quads[0];  // scores that nobody asks for
    }
    // Values of TILE tokens from `first` on.
    INLINE void interleave(int64_t first, int64_t width) {
        for (int64_t t = first; t < smaller(first + TILE, tokens); t += Steps::PACK)
            for (int64_t i = 0; i < width; i += LANES * Steps::PACK) {
                F32 rows[Steps::PACK], vectors[Steps::VECTORS];
                for (int token = 0; token < Steps::PACK; ++token) rows[token] = Steps::cells(found[t + token] + i, width - i);
                Steps::interleave(rows, vectors);
                for (int v = 0; v < Steps::VECTORS; ++v)
                    store(reinterpret_cast<float*>(values + t * value_cells + i * Steps::PACK) + v * LANES, vectors[v]);
            }
    }

    // Where a row does not see a token, weight zero times a value that is not finite would be NaN. Rows that see such
    // a token get their NaN from its key instead.
    template <class Memory>
    INLINE const Value* copy(const Memory& memory, int64_t position, Value* key, bool guarded) {
        const int64_t width = memory.key_width();
        for (int64_t i = width; i < divide_up(width, Steps::PACK) * Steps::PACK; ++i) narrow_to(key + i, 0);
        memory.copy_key(position, key);
        if (!guarded || finite(key, memory.value_width())) return key;
        for (int64_t i = 0; i < width; ++i) narrow_to(key + i, __builtin_nanf(""));
        return zeros;
    }
    static INLINE bool finite(const Value* values, int64_t width) {
        F32 poison = zero();
        for (int64_t i = 0; i < width; i += LANES)
            poison = fma(load(values + i, int(smaller(LANES, width - i))), zero(), poison);
        return sum(poison) == 0;
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
    static INLINE int64_t floats(int64_t value_width) { return (2 + divide_up(value_width, LANES) * LANES) * LANES; }
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
        const F32 w = power(load(scores + t * LANES) - largest);
        return ALL ? w : where_less(set(float(t)), sees, w, zero());
    };
    const F32 factor = power(before - largest);
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

// One thread's part of the attention of lanes to a memory: its scratch, and one split at a time.
template <class Steps, class Memory>
struct LaneAttention {
    using Value = typename Steps::Value;
    int64_t cells, floats;  // of a packed query; of a partial result
    Chunk<Steps> chunk;
    F32* queries;    // [groups][cells]
    float* sees;     // [groups][16 rows] positions
    float* scores;   // [CHUNK][16 rows]
    Value* weights;  // [CHUNK][16 rows]

    LaneAttention(Team& team, const Memory& memory, int64_t max_groups)
        : cells(divide_up(memory.key_width(), Steps::PACK)),
          floats(State::floats(memory.value_width())),
          chunk(team, memory),
          queries(team.own_scratch<F32>(max_groups * cells)),
          sees(team.own_scratch<float>(max_groups * LANES)),
          scores(team.own_scratch<float>(CHUNK * LANES)),
          weights(team.own_scratch<Value>(CHUNK * LANES)) {}

    // One split of `work`; row_of(row) is where a row's query lies. The scale is for scores in powers of two.
    template <class RowOf>
    void attend(const Memory& memory, const Rows& rows, const Work& work, int64_t split, RowOf row_of, float scale,
                float* partial) {
        const int64_t groups = divide_up(work.rows, LANES);
        const int64_t begin = split_start(split);
        const int64_t end = smaller(split_start(split + 1), rows.sees(work.first + work.rows - 1));
        for (int64_t t = begin; t < smaller(begin + CHUNK, end); t += 4)
            Coming{memory.key_at(t), 4 * memory.stride_bytes()}.lines();
        for (int64_t g = 0; g < groups; ++g) {
            const int64_t first = work.first + g * LANES, count = smaller(LANES, work.rows - g * LANES);
            pack_queries<Steps>(first, count, memory.key_width(), row_of, queries + g * cells);
            for (int r = 0; r < LANES; ++r) sees[g * LANES + r] = float(rows.sees(first + smaller(r, count - 1)));
            const State state{partial + g * floats};
            store(state.largest(), set(LOWEST));
            store(state.total(), zero());
            if (sees[g * LANES + LANES - 1] <= float(begin))  // the loop below will pass it by
                std::memset(state.out(), 0, size_t(floats - 2 * LANES) * sizeof(float));
        }
        for (int64_t start = begin; start < end; start += CHUNK) {
            chunk.read(memory, start, smaller(CHUNK, end - start), int64_t(sees[0]) - start);
            bool fresh = true;
            for (int64_t g = 0; g < groups; ++g) {
                if (sees[g * LANES + LANES - 1] <= float(start)) continue;
                step(memory, g, start, fresh ? end : 0, fresh, scale, start == begin, {partial + g * floats});
                fresh = false;
            }
        }
    }

    // One chunk for one group of 16 rows; meanwhile the next chunk comes nearer, up to position `coming_end`.
    INLINE void step(const Memory& memory, int64_t g, int64_t start, int64_t coming_end, bool fresh, float scale, bool first,
                     State state) {
        for (int64_t t = 0; t < chunk.tokens; t += TILE) {
            Coming coming{reinterpret_cast<const uint8_t*>(queries), 0};
            if (start + CHUNK + t < coming_end)
                coming = {memory.key_at(start + CHUNK + t), divide_up(TILE * memory.stride_bytes(), cells)};
            score_tile<Steps>(queries + g * cells, cells, chunk.quads + t / 4, chunk.key_stride, set(scale), coming,
                              scores + t * LANES);
            if (fresh) chunk.interleave(t, memory.value_width());
        }
        const F32 here = load(sees + g * LANES) - set(float(start));
        const bool all = sees[g * LANES] >= float(start + chunk.tokens);
        const F32 factor = all ? weigh<Steps, true>(scores, chunk.tokens, here, state, weights)
                               : weigh<Steps, false>(scores, chunk.tokens, here, state, weights);
        for (int64_t i = 0; i < memory.value_width(); i += TILE)
            output_tile<Steps>(weights, chunk.values + i * Steps::PACK, divide_up(chunk.tokens, Steps::PACK),
                               chunk.value_cells, factor, first, state.out() + i * LANES);
    }
};

constexpr int64_t SLICE = 64;  // values, of what is added up in one claim

// Adds up the partials of 16 rows, `apart` floats from split to split, and writes values [first, last) of each row:
// out_of(row) is where row `row` of the 16 goes.
template <class T, class OutOf>
INLINE void add_partials(const float* partials, int64_t apart, int64_t splits, int64_t rows, int64_t first, int64_t last,
                         OutOf out_of) {
    F32 largest = set(LOWEST), total = zero();
    for (int64_t s = 0; s < splits; ++s) largest = max(largest, load(partials + s * apart));
    for (int64_t s = 0; s < splits; ++s) {
        const float* partial = partials + s * apart;
        total = fma(load(partial + LANES), power(load(partial) - largest), total);
    }
    const F32 share = set(1) / total;
    for (int64_t i = first; i < last; i += LANES) {
        F32 sums[LANES];
        for (int j = 0; j < LANES; ++j) sums[j] = zero();
        for (int64_t s = 0; s < splits; ++s) {
            const float* partial = partials + s * apart;
            const F32 factor = power(load(partial) - largest);
            for (int j = 0; j < LANES; ++j) sums[j] = fma(load(partial + (2 + i + j) * LANES), factor, sums[j]);
        }
        for (int j = 0; j < LANES; ++j) sums[j] = sums[j] * share;
        transpose(sums);
        for (int r = 0; r < rows; ++r) store(static_cast<T*>(out_of(r)) + i, sums[r], int(smaller(LANES, last - i)));
    }
}

}  // namespace decode
}  // namespace
