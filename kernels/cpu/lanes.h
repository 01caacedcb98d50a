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
#include "transpose.h"

namespace {

constexpr int CHUNK = 64;  // tokens; a split starts at a multiple
constexpr float LOWEST = -3.402823466e38f;

#if CIERZO_AVX512
constexpr int TILE = 16;  // sums held in registers
#else
constexpr int TILE = 4;
#endif

struct FloatSteps {
    using Value = float;
    static constexpr int PACK = 1;  // values of a cell

    static INLINE F32 step(F32 sum, Bits rows, const Value* cell) { return fma(set(*cell), as_f32(rows), sum); }
    template <class T>
    static INLINE F32 load_cells(const T* p, int64_t values) {  // 16 cells, of which `values` values are there
        return load(p, int(smaller(LANES, values)));
    }
    static INLINE void store_weights(Value* cells, F32 even, F32) { store(cells, even); }
    static INLINE void interleave(const Value* const* tokens, int64_t width, Value* cells) {
        int64_t i = 0;
        for (; i + LANES <= width; i += LANES) store(cells + i, load(tokens[0] + i));
        if (i < width) store(cells + i, load(tokens[0] + i, int(width - i)));
    }
};

#if CIERZO_DOT
struct PairSteps {
    using Value = bf16;
    static constexpr int PACK = 2;

    static INLINE F32 step(F32 sum, Bits rows, const Value* cell) {
        int32_t pair;
        std::memcpy(&pair, cell, sizeof(pair));
        return {_mm512_dpbf16_ps(sum.v, (__m512bh)rows.v, (__m512bh)_mm512_set1_epi32(pair))};
    }
    static INLINE __m512i load_pairs(const Value* p, int64_t values) {
        if (values >= 32) return _mm512_loadu_si512(p);
        return _mm512_maskz_loadu_epi16((__mmask32(1) << values) - 1, p);
    }
    static INLINE F32 load_cells(const Value* p, int64_t values) {
        return {_mm512_castsi512_ps(load_pairs(p, values))};
    }
    static INLINE void store_weights(Value* cells, F32 even, F32 odd) {
        const __m512i low = _mm512_cvtepu16_epi32(round_to_bf16(even));
        const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(round_to_bf16(odd)), 16);
        _mm512_storeu_si512(cells, _mm512_or_si512(low, high));
    }
    static INLINE void interleave(const Value* const* tokens, int64_t width, Value* cells) {
        const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38,
                                             6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
        const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
        for (int64_t i = 0; i < width; i += 32) {
            const __m512i even = load_pairs(tokens[0] + i, width - i), odd = load_pairs(tokens[1] + i, width - i);
            _mm512_storeu_si512(cells + 2 * i, _mm512_permutex2var_epi16(even, low, odd));
            _mm512_storeu_si512(cells + 2 * i + 32, _mm512_permutex2var_epi16(even, high, odd));
        }
    }
};
#endif

// What rows attend to: keys, and values that are the first part of the key or a row of their own.
template <class T>
struct Latents {
    using Cached = T;
    CachedRows rows;
    int64_t rank, rope;

    INLINE int64_t key_width() const { return rank + rope; }
    INLINE int64_t value_width() const { return rank; }
    INLINE const uint8_t* key_at(int64_t position) const { return rows.at(position); }
    INLINE int64_t together(int64_t position) const { return rows.together(position); }
    INLINE int64_t stride_bytes() const { return rows.row_bytes; }
    template <class Value>
    INLINE void copy_key(int64_t position, Value* target) const {
        const uint8_t* row = rows.at(position);
        copy_run(latent_of<T>(row, rank, rope), rank, target);
        copy_run(rope_key_of<T>(row, rank, rope), rope, target + rank);
    }
};

// A chunk of tokens as the steps want it. Keys are read where they lie, four at a time, if a block holds all four in
// the steps' own type; else they are copied. Values are interleaved.
template <class Steps>
struct Chunk {
    using Value = typename Steps::Value;
    const Value* quads[CHUNK / 4];
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
        const Value* found[CHUNK];  // the values
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
        for (int64_t t = 0; t < count; t += Steps::PACK)
            Steps::interleave(found + t, memory.value_width(), values + t * value_cells);
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
            square[r] = r < rows ? Steps::load_cells(row_of(first + r) + cell * Steps::PACK, width - cell * Steps::PACK)
                                 : zero();
        transpose(square);
        for (int64_t i = 0; i < smaller(LANES, cells - cell); ++i) packed[cell + i] = square[i];
    }
}

// Scores of TILE tokens, [token][16 rows].
template <class Steps>
INLINE void score_tile(const F32* q, int64_t cells, const typename Steps::Value* const* quads, int64_t stride,
                       F32 scale, float* scores) {
    using Value = typename Steps::Value;
    F32 sums[TILE];
    const Value* keys[TILE / 4];
#pragma GCC unroll 4
    for (int i = 0; i < TILE / 4; ++i) keys[i] = quads[i];
#pragma GCC unroll 16
    for (int t = 0; t < TILE; ++t) sums[t] = zero();
    for (int64_t cell = 0; cell < cells; ++cell) {
        const Bits rows = load_bits(q + cell);
#pragma GCC unroll 16
        for (int t = 0; t < TILE; ++t)
            sums[t] = Steps::step(sums[t], rows, keys[t / 4] + t % 4 * stride + cell * Steps::PACK);
    }
#pragma GCC unroll 16
    for (int t = 0; t < TILE; ++t) store(scores + t * LANES, sums[t] * scale);
}

// The partial result of 16 rows: largest score, sum of weights, then [value][16 rows].
struct State {
    float* at;
    INLINE float* largest() const { return at; }
    INLINE float* total() const { return at + LANES; }
    INLINE float* out() const { return at + 2 * LANES; }
    static INLINE int64_t floats(int64_t value_width) { return (2 + divide_up(value_width, LANES) * LANES) * LANES; }
};

// Scores -> weights, cells [tokens / PACK][16 rows]. `sees`: how many tokens of the chunk each row sees. Returns what
// earlier output is to be multiplied with.
template <class Steps>
INLINE F32 weigh(float* scores, int64_t tokens, F32 sees, bool all_see_all, State state, typename Steps::Value* weights) {
    const F32 before = load(state.largest());
    F32 largest = before;
    for (int64_t t = 0; t < tokens; ++t) {
        F32 score = load(scores + t * LANES);
        if (!all_see_all) {
            score = where_less(set(float(t)), sees, score, set(LOWEST));
            store(scores + t * LANES, score);
        }
        largest = max(largest, score);
    }
    const F32 factor = exp(before - largest);
    F32 total = load(state.total()) * factor;
    for (int64_t t = 0; t < tokens; t += Steps::PACK) {
        F32 weight[2];
        for (int i = 0; i < Steps::PACK; ++i) {
            weight[i] = zero();
            if (t + i >= tokens) continue;
            weight[i] = exp(load(scores + (t + i) * LANES) - largest);
            if (!all_see_all) weight[i] = where_less(set(float(t + i)), sees, weight[i], zero());
            total = total + weight[i];
        }
        Steps::store_weights(weights + t * LANES, weight[0], weight[Steps::PACK - 1]);
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
        const Bits rows = load_bits(weights + step * LANES * Steps::PACK);
        const typename Steps::Value* cells = values + step * value_cells * Steps::PACK;
#pragma GCC unroll 16
        for (int i = 0; i < TILE; ++i) sums[i] = Steps::step(sums[i], rows, cells + i * Steps::PACK);
    }
#pragma GCC unroll 16
    for (int i = 0; i < TILE; ++i) store(out + i * LANES, sums[i]);
}

// Attention of lanes to memory, one thread's part: its scratch, and one split at a time.
template <class Steps, class Memory>
struct LaneAttention {
    using Value = typename Steps::Value;
    int64_t cells;
    Chunk<Steps> chunk;
    F32* queries;     // [groups][cells]
    float* scores;    // [CHUNK][16]
    Value* weights;   // [CHUNK][16]

    LaneAttention(Team& team, const Memory& memory, int64_t max_groups)
        : cells(divide_up(memory.key_width(), Steps::PACK)),
          chunk(team, memory),
          queries(team.own_scratch<F32>(max_groups * cells)),
          scores(team.own_scratch<float>(CHUNK * LANES)),
          weights(team.own_scratch<Value>(CHUNK * LANES)) {}

    static INLINE int64_t groups(const Work& work) { return divide_up(work.rows, LANES); }

    // One split of `work`; row_of(row) is where a row's query lies.
    template <class RowOf>
    void attend(const Memory& memory, const Rows& rows, const Work& work, int64_t split, RowOf row_of, float scale,
                float* partial) {
        const int64_t floats = State::floats(memory.value_width());
        const int64_t begin = split_start(split);
        const int64_t past = work.first + work.rows, end = smaller(split_start(split + 1), rows.sees(past - 1));
        for (int64_t first = work.first, g = 0; first < past; first += LANES, ++g) {
            const State state{partial + g * floats};
            store(state.largest(), set(LOWEST));
            store(state.total(), zero());
            if (rows.sees(smaller(first + LANES, past) - 1) <= begin)
                std::memset(state.out(), 0, size_t(floats - 2 * LANES) * sizeof(float));
            pack_queries<Steps>(first, smaller(LANES, past - first), memory.key_width(), row_of, queries + g * cells);
        }
        for (int64_t start = begin; start < end; start += CHUNK) {
            chunk.read(memory, start, smaller(CHUNK, end - start), rows.sees(work.first) - start);
            for (int64_t first = work.first, g = 0; first < past; first += LANES, ++g) {
                const int64_t last = smaller(first + LANES, past) - 1;
                if (rows.sees(last) <= start) continue;
                alignas(64) float sees[LANES];
                for (int r = 0; r < LANES; ++r) sees[r] = float(rows.sees(smaller(first + r, last)) - start);
                step(memory.value_width(), queries + g * cells, load(sees), rows.sees(first) - start >= chunk.tokens,
                     scale, start == begin, State{partial + g * floats});
            }
        }
    }

    INLINE void step(int64_t value_width, const F32* q, F32 sees, bool all_see_all, float scale, bool first, State state) {
        for (int64_t t = 0; t < chunk.tokens; t += TILE)
            score_tile<Steps>(q, cells, chunk.quads + t / 4, chunk.key_stride, set(scale), scores + t * LANES);
        const F32 factor = weigh<Steps>(scores, chunk.tokens, sees, all_see_all, state, weights);
        for (int64_t i = 0; i < value_width; i += TILE)
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
        total = fma(load(partial + LANES), exp(load(partial) - largest), total);
    }
    const F32 share = set(1) / total;
    for (int64_t i = first; i < last; i += LANES) {
        F32 sums[LANES];
        for (int j = 0; j < LANES; ++j) sums[j] = zero();
        for (int64_t s = 0; s < splits; ++s) {
            const float* partial = partials + s * apart;
            const F32 factor = exp(load(partial) - largest);
            for (int j = 0; j < LANES; ++j) sums[j] = fma(load(partial + (2 + i + j) * LANES), factor, sums[j]);
        }
        for (int j = 0; j < LANES; ++j) sums[j] = sums[j] * share;
        transpose(sums);
        for (int r = 0; r < rows; ++r) store(static_cast<T*>(out_of(r)) + i, sums[r], int(smaller(LANES, last - i)));
    }
}

}  // namespace
