// Attention of many query rows over one sequence's context: what MLA and GQA prefill have in common.
//
// Every product is C[m][lane] = sum over k of A[k][m] B[k][lane], and both operands are panels of 32 columns that hold
// a word for each k: a pair of bf16, or one float. What a product yields is rounded and is at once a panel for the
// next one, so that nothing is transposed on the way from latents to output:
//
//     keys     W_UK (its rows)    x  latents (tokens)     -> [words of a key][32 tokens]       GQA transposes instead
//     values   latents (tokens)   x  W_UV (its rows)      -> [words of tokens][32 value dims]  GQA joins rows instead
//     scores   keys (tokens)      x  queries (lanes)      -> weights [words of tokens][32 lanes]
//     out      values (dims)      x  weights (lanes)      -> [value dims][32 lanes], floats
//
// Prompts see what stands before them; an image's patches see one another, each all of them (Problem::causal).
// A lane is one query row of one query head; heads that share keys stand side by side. Softmax runs down the tokens,
// lane by lane, in blocks at multiples of BLOCK tokens of the sequence. Each lane is a chain of its own: which lanes
// stand beside it, in which panel it stands, and where its chunk began do not reach its bits. A token that a lane must
// not see gets the score -inf and the weight 0, which adds exactly nothing as long as its value is finite.
#pragma once

#include "abi.h"
#include "team.h"
#include "transpose.h"

namespace {
namespace flash {

using Word = uint32_t;

constexpr int64_t PANEL = 32;      // words side by side: two vectors
constexpr int64_t TILE = 8;        // rows of a product that are computed together
constexpr int64_t BLOCK = 128;     // tokens of a softmax step
constexpr int64_t STRETCH = 256;   // tokens whose keys and values are made at a time, a multiple of BLOCK
constexpr float INFINITE = __builtin_inff();

template <class T>
constexpr int64_t PER_WORD = int64_t(sizeof(Word) / sizeof(T));
template <class T>
INLINE int64_t words(int64_t values) {
    return divide_up(values, PER_WORD<T>);
}
INLINE int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

// ---- words -----------------------------------------------------------------------------------------------------

// sum += a b; of bf16 pairs the sum of both products.
template <class T>
INLINE F32 dot(F32 sum, Bits a, Bits b) {
    if constexpr (PER_WORD<T> == 1) return fma(as_f32(a), as_f32(b), sum);
#if CIERZO_DOT
    return {_mm512_dpbf16_ps(sum.v, (__m512bh)a.v, (__m512bh)b.v)};
#else
    return fma(high_bf16(a), high_bf16(b), fma(low_bf16(a), low_bf16(b), sum));
#endif
}

INLINE Bits join(F32 even, F32 odd) {  // -> 16 pairs of bf16
#if CIERZO_DOT
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return {_mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(odd.v, even.v))};
#elif CIERZO_AVX512
    const __m512i low = _mm512_cvtepu16_epi32(round_to_bf16(even)), high = _mm512_cvtepu16_epi32(round_to_bf16(odd));
    return {_mm512_or_si512(low, _mm512_slli_epi32(high, 16))};
#else
    const auto join8 = [](__m256 low, __m256 high) {
        const __m256i wide = _mm256_cvtepu16_epi32(round8(high));
        return _mm256_or_si256(_mm256_cvtepu16_epi32(round8(low)), _mm256_slli_epi32(wide, 16));
    };
    return {join8(even.lo, odd.lo), join8(even.hi, odd.hi)};
#endif
}

// Rows `row` (even) and row + 1 of a product -> vector `vector` of a panel in which they are k.
template <class T>
INLINE void put(Word* panel, int64_t row, int64_t vector, F32 even, F32 odd) {
    Word* target = panel + row / PER_WORD<T> * PANEL + vector * LANES;
    if constexpr (PER_WORD<T> == 2) {
        store_bits(target, join(even, odd));
    } else {
        store(reinterpret_cast<float*>(target), even);
        store(reinterpret_cast<float*>(target) + PANEL, odd);
    }
}

// to[column][row] = from[row][column], 16 x 16.
INLINE void transpose(const Word* from, int64_t from_stride, Word* to, int64_t to_stride) {
    F32 rows[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) rows[i] = as_f32(load_bits(from + i * from_stride));
    ::transpose(rows);
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) store(reinterpret_cast<float*>(to + i * to_stride), rows[i]);
}

// ---- products and softmax --------------------------------------------------------------------------------------

// TILE rows (columns of panel a) times 16 or 32 lanes (of panel b); take(row, vector, row's sums, next row's sums).
template <class T, int VECTORS, class Take>
INLINE void multiply(const Word* a, const Word* b, int64_t steps, Take take) {
#if CIERZO_AVX512
    constexpr int ROWS = TILE, WIDTH = VECTORS;
#else
    constexpr int ROWS = 4, WIDTH = 1;  // what 16 registers of 8 lanes hold
#endif
#pragma GCC unroll 2
    for (int first = 0; first < VECTORS; first += WIDTH)
#pragma GCC unroll 2
        for (int top = 0; top < TILE; top += ROWS) {
            F32 sums[ROWS][WIDTH];
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
                for (int v = 0; v < WIDTH; ++v) sums[r][v] = zero();
            for (int64_t k = 0; k < steps; ++k) {
                Bits right[WIDTH];
#pragma GCC unroll 2
                for (int v = 0; v < WIDTH; ++v) right[v] = load_bits(b + k * PANEL + (first + v) * LANES);
#pragma GCC unroll 8
                for (int r = 0; r < ROWS; ++r) {
                    const Bits left = repeat(int32_t(a[k * PANEL + top + r]));
#pragma GCC unroll 2
                    for (int v = 0; v < WIDTH; ++v) sums[r][v] = dot<T>(sums[r][v], left, right[v]);
                }
            }
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r += 2)
#pragma GCC unroll 2
                for (int v = 0; v < WIDTH; ++v) take(top + r, first + v, sums[r][v], sums[r + 1][v]);
        }
}

// The state of 32 lanes between blocks. Scores, hence peaks, are in units of log2.
struct Lanes {
    Word* queries;     // [key words][32]
    float* sums;       // [value dims][32], not yet divided by the totals
    float* peaks;      // [32]
    float* totals;     // [32]
    float* positions;  // [32], the last token that the lane sees
};

struct Shape {
    int64_t first_width, second_width, value_width;  // a query or key row: [first | second], each padded to words
    int64_t key_words, key_rows, value_rows;         // rows: of a panel, padded for transpose
    float factor;                                    // scale * log2 e

    template <class T>
    static Shape of(int64_t first_width, int64_t second_width, int64_t value_width, float scale) {
        const int64_t key_words = words<T>(first_width) + words<T>(second_width);
        return {first_width,
                second_width,
                value_width,
                key_words,
                round_up(key_words, LANES),
                round_up(value_width, LANES),
                scale * 1.44269504f};
    }
    INLINE int64_t lanes_words() const { return (key_rows + value_rows + 3) * PANEL; }
    INLINE Lanes lanes(Word* memory) const {
        float* sums = reinterpret_cast<float*>(memory + key_rows * PANEL);
        float* rest = sums + value_rows * PANEL;
        return {memory, sums, rest, rest + PANEL, rest + 2 * PANEL};
    }
    // Panels of a stretch: keys [tokens / 32][key_rows][32], values [dims / 32][STRETCH / words][32].
    INLINE int64_t keys_words() const { return STRETCH / PANEL * key_rows * PANEL; }
    template <class T>
    static INLINE int64_t values_stride() {
        return STRETCH / PER_WORD<T> * PANEL;
    }
    template <class T>
    INLINE int64_t values_words() const {
        return divide_up(value_width, PANEL) * values_stride<T>();
    }
};

// The lanes meet the tokens first .. first + tokens - 1 of the sequence, at most a block; keys and values start at the
// block. `scores` is scratch [BLOCK][32]; the weights overwrite them.
template <class T, int VECTORS>
__attribute__((noinline)) void attend(const Shape& shape, const Lanes& lanes, const Word* keys, const Word* values,
                                      int64_t first, int64_t tokens, float earliest, float* scores) {
    tokens = round_up(tokens, TILE);
    const F32 factor = set(shape.factor), hidden = set(-INFINITE);
    F32 old_peaks[VECTORS], peaks[VECTORS], scaling[VECTORS], totals[VECTORS], positions[VECTORS];
    for (int v = 0; v < VECTORS; ++v) {
        old_peaks[v] = peaks[v] = load(lanes.peaks + v * LANES);
        positions[v] = load(lanes.positions + v * LANES);
    }
    for (int64_t t = 0; t < tokens; t += TILE) {
        const bool masked = float(first + t + TILE - 1) > earliest;
        multiply<T, VECTORS>(keys + t / PANEL * shape.key_rows * PANEL + t % PANEL, lanes.queries, shape.key_words,
                             [&](int row, int v, F32 even, F32 odd) {
                                 even = even * factor;
                                 odd = odd * factor;
                                 if (masked) {
                                     const float token = float(first + t + row);
                                     even = where_less(positions[v], set(token), hidden, even);
                                     odd = where_less(positions[v], set(token + 1), hidden, odd);
                                 }
                                 peaks[v] = max(peaks[v], max(even, odd));
                                 store(scores + (t + row) * PANEL + v * LANES, even);
                                 store(scores + (t + row + 1) * PANEL + v * LANES, odd);
                             });
    }
    for (int v = 0; v < VECTORS; ++v) {
        scaling[v] = exp2(old_peaks[v] - peaks[v]);
        totals[v] = load(lanes.totals + v * LANES) * scaling[v];
    }
    Word* weights = reinterpret_cast<Word*>(scores);
    for (int64_t t = 0; t < tokens; t += 2)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) {
            const float* score = scores + t * PANEL + v * LANES;
            const F32 even = exp2(load(score) - peaks[v]), odd = exp2(load(score + PANEL) - peaks[v]);
            totals[v] = totals[v] + even + odd;
            put<T>(weights, t, v, even, odd);
        }
    for (int v = 0; v < VECTORS; ++v) {
        store(lanes.peaks + v * LANES, peaks[v]);
        store(lanes.totals + v * LANES, totals[v]);
    }
    for (int64_t dim = 0; dim < shape.value_width; dim += TILE)
        multiply<T, VECTORS>(values + dim / PANEL * Shape::values_stride<T>() + dim % PANEL, weights,
                             tokens / PER_WORD<T>, [&](int row, int v, F32 even, F32 odd) {
                                 float* sums = lanes.sums + (dim + row) * PANEL + v * LANES;
                                 store(sums, fma(load(sums), scaling[v], even));
                                 store(sums + PANEL, fma(load(sums + PANEL), scaling[v], odd));
                             });
}

// ---- segments --------------------------------------------------------------------------------------------------

// Queries and output. Heads share keys in groups: query head h uses those of head h / group.
struct Problem {
    const void* q;
    int64_t q_stride, q_head_stride;
    void* out;  // [rows][heads * group][value_width]
    int64_t heads, group;
    PagedArgs paged;
    Shape shape;
    bool causal = true;  // whether a row sees nothing of what follows it
};

// The lanes first_lane .. of some heads of a segment; lane = row of the segment * group + head within its group.
struct Item {
    int64_t segment, first_head, heads, first_lane, lanes;
};

INLINE int64_t segment_rows(const PagedArgs& paged, int64_t segment) {
    return paged.query_starts[segment + 1] - paged.query_starts[segment];
}

// What one thread needs beside the item: lanes of the item, keys, values, scores, 16 rows on their way into a panel.
struct Workspace {
    Word* lanes;
    Word* keys;
    Word* values;
    float* scores;
    Word* rows;  // [16][key_rows]
};

template <class T>
struct Runner {
    const Problem& problem;
    const Item item;
    const Workspace& work;

    INLINE const Shape& shape() const { return problem.shape; }
    INLINE int64_t panels() const { return divide_up(item.lanes, PANEL); }
    INLINE Word* memory(int64_t head, int64_t panel) const {
        return work.lanes + (head * panels() + panel) * shape().lanes_words();
    }
    INLINE int64_t row_of(int64_t lane) const { return (item.first_lane + lane) / problem.group; }
    INLINE int64_t position(int64_t lane) const {  // the last token that it sees
        const PagedArgs& paged = problem.paged;
        const int64_t context = paged.context_lengths[item.segment];
        return problem.causal ? context - segment_rows(paged, item.segment) + row_of(lane) : context - 1;
    }
    INLINE int64_t last_lane(int64_t panel) const { return smaller(item.lanes, (panel + 1) * PANEL) - 1; }

    // Where a lane's query or result lies: row of the whole batch, head of all query heads.
    INLINE int64_t batch_row(int64_t lane) const { return problem.paged.query_starts[item.segment] + row_of(lane); }
    INLINE int64_t query_head(int64_t head, int64_t lane) const {
        return (item.first_head + head) * problem.group + (item.first_lane + lane) % problem.group;
    }

    void start(int64_t head, int64_t panel) const {
        const Lanes lanes = shape().lanes(memory(head, panel));
        std::memset(work.rows, 0, size_t(LANES * shape().key_rows) * sizeof(Word));
        for (int64_t half = 0; half < PANEL; half += LANES) {
            for (int64_t i = 0; i < LANES; ++i) {
                const int64_t lane = panel * PANEL + half + i;  // past the last one: its copy, never written out
                const int64_t source = smaller(lane, item.lanes - 1);
                const T* query = static_cast<const T*>(problem.q) + batch_row(source) * problem.q_stride +
                                 query_head(head, source) * problem.q_head_stride;
                Word* row = work.rows + i * shape().key_rows;
                std::memcpy(row, query, size_t(shape().first_width) * sizeof(T));
                std::memcpy(row + words<T>(shape().first_width), query + shape().first_width,
                            size_t(shape().second_width) * sizeof(T));
                lanes.positions[half + i] = float(position(source));
            }
            for (int64_t column = 0; column < shape().key_rows; column += LANES)
                transpose(work.rows + column, shape().key_rows, lanes.queries + column * PANEL + half, PANEL);
        }
        for (int64_t i = 0; i < shape().value_rows * PANEL; i += LANES) store(lanes.sums + i, zero());
        for (int64_t i = 0; i < PANEL; i += LANES) {
            store(lanes.peaks + i, set(-INFINITE));
            store(lanes.totals + i, zero());
        }
    }

    // One panel of lanes meets the stretch from token `first` on.
    void pass(int64_t head, int64_t panel, int64_t first, int64_t tokens) const {
        const Lanes lanes = shape().lanes(memory(head, panel));
        const int64_t seen = smaller(tokens, position(last_lane(panel)) + 1 - first);
        const float earliest = lanes.positions[0];
        const bool narrow_panel = item.lanes - panel * PANEL <= LANES;
        for (int64_t block = 0; block < seen; block += BLOCK)
            (narrow_panel ? attend<T, 1> : attend<T, 2>)(
                shape(), lanes, work.keys + block * shape().key_rows, work.values + words<T>(block) * PANEL,
                first + block, smaller(BLOCK, seen - block), earliest, work.scores);
    }

    void finish(int64_t head, int64_t panel) const {
        const Lanes lanes = shape().lanes(memory(head, panel));
        for (int64_t half = 0; half <= last_lane(panel) % PANEL; half += LANES) {
            const F32 inverse = set(1.0f) / load(lanes.totals + half);
            for (int64_t dim = 0; dim < shape().value_width; dim += LANES) {
                F32 block[LANES];
                for (int64_t i = 0; i < LANES; ++i) block[i] = load(lanes.sums + (dim + i) * PANEL + half) * inverse;
                ::transpose(block);
                const int width = int(smaller(LANES, shape().value_width - dim));
                for (int64_t i = 0; i < smaller(LANES, item.lanes - panel * PANEL - half); ++i) {
                    const int64_t lane = panel * PANEL + half + i;
                    const int64_t row = batch_row(lane) * problem.heads * problem.group + query_head(head, lane);
                    store(static_cast<T*>(problem.out) + row * shape().value_width + dim, block[i], width);
                }
            }
        }
    }

    template <class Source>
    void run(Source& source) const {
        for (int64_t head = 0; head < item.heads; ++head)
            for (int64_t panel = 0; panel < panels(); ++panel) start(head, panel);
        const int64_t end = position(item.lanes - 1) + 1;
        int64_t reached = 0;  // panels that end before the stretch have seen all they may
        for (int64_t first = 0; first < end; first += STRETCH) {
            const int64_t tokens = smaller(STRETCH, end - first);
            while (position(last_lane(reached)) < first) ++reached;
            source.load(item.segment, first, tokens);
            for (int64_t head = 0; head < item.heads; ++head) {
                source.expand(item.first_head + head, tokens, work.keys, work.values);
                for (int64_t panel = reached; panel < panels(); ++panel) pass(head, panel, first, tokens);
            }
        }
        for (int64_t head = 0; head < item.heads; ++head)
            for (int64_t panel = 0; panel < panels(); ++panel) finish(head, panel);
    }
};

// ---- work ------------------------------------------------------------------------------------------------------

// How the work is cut into items: heads together, which share what a source loads, and pieces of a segment's rows.
// Bits do not depend on it.
struct Cut {
    int64_t heads, pieces;

    INLINE int64_t piece_lanes(int64_t lanes) const { return round_up(divide_up(lanes, pieces), PANEL); }
};

// expansion: what making keys and values costs, in lanes that attend to them. Rows are cut only where the threads
// would otherwise wait for each other longer than it takes to make keys and values twice.
INLINE Cut cut(const Problem& problem, int threads, int64_t most_heads, int64_t expansion) {
    int64_t all_lanes = 0, lanes = 1;  // of the longest segment
    for (int64_t s = 0; s < problem.paged.segments; ++s) {
        const int64_t rows = segment_rows(problem.paged, s);
        all_lanes += rows * problem.group;
        lanes = larger(lanes, rows * problem.group);
    }
    const int64_t units = divide_up(all_lanes * problem.heads, lanes);  // as many as if all were as long
    Cut best{larger(1, smaller(most_heads, units / (4 * threads))), 1};
    int64_t best_cost = divide_up(units, threads) * (lanes + expansion);
    for (int64_t pieces = 2; pieces <= smaller(16, lanes / (4 * PANEL)); ++pieces) {
        const int64_t cost = divide_up(units * pieces, threads) * (divide_up(lanes, pieces) + expansion);
        if (cost < best_cost) {
            best.pieces = pieces;
            best_cost = cost;
        }
    }
    return best;
}

// body(item) for all items, the later rows of a segment, which see more, first.
template <class Body>
INLINE void each_item(const Problem& problem, const Cut& cut, Body body) {
    for (int64_t s = 0; s < problem.paged.segments; ++s) {
        const int64_t lanes = segment_rows(problem.paged, s) * problem.group;
        const int64_t piece = cut.piece_lanes(lanes);
        for (int64_t first = lanes == 0 ? -1 : (lanes - 1) / piece * piece; first >= 0; first -= piece)
            for (int64_t head = 0; head < problem.heads; head += cut.heads)
                body(Item{s, head, smaller(cut.heads, problem.heads - head), first, smaller(piece, lanes - first)});
    }
}

template <class T, class Source>
void run(Team& team, const Problem& problem, Source& source) {
    const Shape& shape = problem.shape;
    const Cut cut = flash::cut(problem, team.size, source.most_heads(), source.expansion());
    int64_t count = 0, memory = 0;
    each_item(problem, cut, [&](const Item& item) {
        ++count;
        memory = larger(memory, item.heads * divide_up(item.lanes, PANEL) * shape.lanes_words());
    });
    Item* items = team.scratch<Item>(count);
    if (team.rank == 0) each_item(problem, cut, [&](const Item& item) { *items++ = item; });
    if (team.rank == 0) items -= count;
    const Workspace work{team.own_scratch<Word>(memory),
                         team.own_scratch<Word>(shape.keys_words()),
                         team.own_scratch<Word>(shape.values_words<T>()),
                         team.own_scratch<float>(BLOCK * PANEL),
                         team.own_scratch<Word>(LANES * shape.key_rows)};
    team.barrier();
    team.each(count + 1, [&](int64_t i) {
        if (i < count) return Runner<T>{problem, items[i], work}.run(source);
        const int64_t row_values = problem.heads * problem.group * shape.value_width;
        const int64_t used = problem.paged.query_starts[problem.paged.segments];
        std::memset(static_cast<T*>(problem.out) + used * row_values, 0,
                    size_t((problem.paged.rows - used) * row_values) * sizeof(T));
    });
}

}  // namespace flash
}  // namespace
