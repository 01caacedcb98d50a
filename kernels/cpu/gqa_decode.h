// Grouped-query attention for few query rows: bound by memory, so that a key meets all heads that share it at once.
//
//     scores    lanes = values of a key:  products[token] += key * query; then 16 tokens' products are summed
//     weights   lanes = tokens
//     output    lanes = values:  out += weight[token] * value[token], in registers over a chunk of tokens
//
// A query row stops at the last token that it sees and shares no step with another one. All key-value heads of a
// chunk are done before the next chunk, in the order of memory; where that leaves too little to share between the
// threads, each head is work of its own.
#pragma once

#include "split.h"
#include "steps.h"
#include "transpose.h"

namespace {
namespace decode {

constexpr int64_t HEAD_CHUNK = 32;   // tokens; a split starts at a multiple
constexpr int64_t QUERIES_EACH = 8;  // query rows that share one reading of the memory
#if CIERZO_AVX512
constexpr int HEAD_TOKENS = 2;       // tokens whose keys meet a vector of the queries together
constexpr int HEAD_VECTORS = 4;      // vectors of output of a tile
#else
constexpr int HEAD_TOKENS = 1;
constexpr int HEAD_VECTORS = 2;
#endif

// body(integral constant): 1 .. 4 of the heads that are left.
template <class Body>
INLINE void with_heads(int64_t left, Body body) {
    switch (left) {
        case 1: return body(std::integral_constant<int, 1>{});
        case 2: return body(std::integral_constant<int, 2>{});
        case 3: return body(std::integral_constant<int, 3>{});
        default: return body(std::integral_constant<int, 4>{});
    }
}

// Scores of 16 tokens for ROWS heads -> scores [ROWS][HEAD_CHUNK].
template <class Steps, int ROWS, class T>
INLINE void score_heads(const T* const* keys, int64_t width, const typename Steps::Value* q, int64_t q_stride,
                        Coming& coming, float* scores) {
    F32 products[ROWS][LANES];
    for (int t = 0; t < LANES; t += HEAD_TOKENS) {
        F32 some[ROWS][HEAD_TOKENS];
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
            for (int u = 0; u < HEAD_TOKENS; ++u) some[r][u] = zero();
        for (int64_t i = 0; i < width; i += LANES * Steps::PACK) {
            coming.lines();
            F32 query[ROWS];
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; ++r) query[r] = Steps::cells(q + r * q_stride + i, LANES * Steps::PACK);
#pragma GCC unroll 4
            for (int u = 0; u < HEAD_TOKENS; ++u) {
                const F32 key = Steps::cells(keys[t + u] + i, width - i);
#pragma GCC unroll 4
                for (int r = 0; r < ROWS; ++r) some[r][u] = Steps::dot(some[r][u], key, query[r]);
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
            for (int u = 0; u < HEAD_TOKENS; ++u) products[r][t + u] = some[r][u];
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) store(scores + r * HEAD_CHUNK, sums(products[r]));
}

// out = out * factor + weights * values for ROWS heads, COUNT vectors of values from i on.
template <class Steps, int ROWS, int COUNT, class T>
INLINE void add_values(const T* const* values, int64_t tokens, int64_t width, int64_t i,
                       const typename Steps::Value* weights, const float* factors, Coming& coming, float* out,
                       int64_t out_stride) {
    F32 sums[ROWS][COUNT];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < COUNT; ++v) sums[r][v] = load(out + r * out_stride + i + v * LANES) * set(factors[r]);
    for (int64_t t = 0; t < tokens; t += Steps::PACK) {
        coming.lines();
        F32 vectors[COUNT];
#pragma GCC unroll 4
        for (int v = 0; v < COUNT; v += Steps::VECTORS) {
            const int64_t at = i + v * LANES;
            F32 rows[2] = {Steps::cells(values[t] + at, width - at), zero()};
            if (Steps::PACK == 2 && t + 1 < tokens) rows[1] = Steps::cells(values[t + 1] + at, width - at);
            Steps::interleave(rows, vectors + v);
        }
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < COUNT; ++v)
                sums[r][v] = Steps::step(sums[r][v], vectors[v], weights + r * HEAD_CHUNK + t);
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < COUNT; ++v) store(out + r * out_stride + i + v * LANES, sums[r][v]);
}

// One thread's part: its scratch, and one split at a time. A row's partial result is its largest score, 16 times; the
// sums of the weights of tokens t, t + 16, ...; and the weighted values. Rows of a partial: [heads][work.rows].
template <class Steps, class T>
struct HeadAttention {
    using Value = typename Steps::Value;
    int64_t heads, group, width;  // key-value heads of one work; query heads of each
    int64_t padded, floats;       // width of a packed query; of a row's partial result
    Value* queries;               // [heads][rows][padded]
    float* scores;                // [group][HEAD_CHUNK]
    Value* weights;               // [group][HEAD_CHUNK]
    float* factors;               // [group]
    const T* keys[HEAD_CHUNK];
    const T* values[HEAD_CHUNK];
    float key_scales[HEAD_CHUNK], value_scales[HEAD_CHUNK];  // INT8

    HeadAttention(Team& team, int64_t heads, int64_t group, int64_t width)
        : heads(heads),
          group(group),
          width(width),
          padded(divide_up(width, LANES * Steps::PACK) * LANES * Steps::PACK),
          floats(2 * LANES + padded),
          queries(team.own_scratch<Value>(heads * group * QUERIES_EACH * padded)),
          scores(team.own_scratch<float>(group * HEAD_CHUNK)),
          weights(team.own_scratch<Value>(group * HEAD_CHUNK)),
          factors(team.own_scratch<float>(group)) {}

    // One split of `work`; row_of(head, row) is where a row's query lies. The scale is for scores in powers of two.
    template <class RowOf>
    void attend(const CachedRows& k, const CachedRows& v, const Rows& rows, const Work& work, int64_t split,
                RowOf row_of, float scale, float* partial) {
        const int64_t begin = split_start(split);
        const int64_t end = smaller(split_start(split + 1), rows.sees(work.first + work.rows - 1));
        const int64_t head_bytes = head_row_bytes<T>(width);
        for (int64_t t = begin; t < smaller(begin + HEAD_CHUNK, end); ++t) {
            Coming{k.at(t), heads * head_bytes}.lines();
            Coming{v.at(t), heads * head_bytes}.lines();
        }
        for (int64_t i = 0; i < heads * work.rows; ++i) {
            Value* query = queries + i * padded;
            copy_run(run_at(row_of(i / work.rows, work.first + i % work.rows)), width, query);
            std::memset(query + width, 0, size_t(padded - width) * sizeof(Value));
            store(partial + i * floats, set(LOWEST));
            std::memset(partial + i * floats + LANES, 0, size_t(LANES + padded) * sizeof(float));
        }
        for (int64_t start = begin; start < end; start += HEAD_CHUNK)
            for (int64_t head = 0; head < heads; ++head) {
                find(k, v, head * head_bytes, start, smaller(HEAD_CHUNK, end - start));
                Coming keys_ahead{nullptr, 0}, values_ahead{nullptr, 0};
                const int64_t next = start + HEAD_CHUNK + head * HEAD_CHUNK / heads;  // this head's share of them
                if (next < end) {
                    keys_ahead = {k.at(next), head_bytes};
                    values_ahead = {v.at(next), head_bytes};
                }
                for (int64_t r = 0; r < work.rows; r += group) {
                    const int64_t tokens = smaller(smaller(HEAD_CHUNK, end - start), rows.sees(work.first + r) - start);
                    const int64_t i = head * work.rows + r;
                    if (tokens > 0)
                        step(queries + i * padded, tokens, scale, keys_ahead, values_ahead, partial + i * floats);
                    keys_ahead.bytes = values_ahead.bytes = 0;
                }
            }
    }

    // Where a chunk's keys and values of one head lie, `offset` bytes into their rows.
    INLINE void find(const CachedRows& k, const CachedRows& v, int64_t offset, int64_t start, int64_t count) {
        for (int64_t t = 0; t < count;) {
            const uint8_t* key = k.at(start + t) + offset;
            const uint8_t* value = v.at(start + t) + offset;
            for (const int64_t past = smaller(count, t + k.together(start + t)); t < past; ++t) {
                const Run<T> key_run = head_of<T>(key, width), value_run = head_of<T>(value, width);
                keys[t] = key_run.values;
                values[t] = value_run.values;
                if constexpr (HAS_SCALE<T>) {
                    key_scales[t] = key_run.scale;
                    value_scales[t] = value_run.scale;
                }
                key += k.row_bytes;
                value += v.row_bytes;
            }
        }
        for (int64_t t = count; t < divide_up(count, LANES) * LANES; ++t) keys[t] = keys[0];  // scores nobody asks for
    }

    // A chunk for the heads of one query row, which sees `tokens` of it.
    INLINE void step(const Value* q, int64_t tokens, float scale, Coming keys_ahead, Coming values_ahead,
                     float* partial) {
        keys_ahead.bytes = divide_up(keys_ahead.bytes * HEAD_TOKENS * LANES * Steps::PACK, padded);
        values_ahead.bytes = divide_up(values_ahead.bytes * Steps::PACK * HEAD_VECTORS * LANES, padded);
        for (int64_t r = 0; r < group; r += 4)
            with_heads(group - r, [&](auto count) {
                for (int64_t t = 0; t < tokens; t += LANES)
                    score_heads<Steps, count.value>(keys + t, width, q + r * padded, padded, keys_ahead,
                                                    scores + r * HEAD_CHUNK + t);
                keys_ahead.bytes = 0;
            });
        for (int64_t r = 0; r < group; ++r) factors[r] = weigh(r, tokens, scale, partial + r * floats);
        for (int64_t r = 0; r < group; r += 4)
            with_heads(group - r, [&](auto count) {
                constexpr int ROWS = count.value, FEW = Steps::VECTORS;
                float* out = partial + r * floats + 2 * LANES;
                const Value* row_weights = weights + r * HEAD_CHUNK;
                int64_t i = 0;
                for (; i + HEAD_VECTORS * LANES <= padded; i += HEAD_VECTORS * LANES)
                    add_values<Steps, ROWS, HEAD_VECTORS>(values, tokens, width, i, row_weights, factors + r,
                                                          values_ahead, out, floats);
                for (; i < padded; i += FEW * LANES)
                    add_values<Steps, ROWS, FEW>(values, tokens, width, i, row_weights, factors + r, values_ahead, out,
                                                 floats);
                values_ahead.bytes = 0;
            });
    }

    // One head's scores -> weights; returns what its earlier output is to be multiplied with.
    INLINE float weigh(int64_t r, int64_t tokens, float scale, float* state) {
        float* row = scores + r * HEAD_CHUNK;
        F32 peaks = set(LOWEST);
        for (int64_t t = 0; t < tokens; t += LANES) {
            F32 score = load(row + t) * set(scale);
            if constexpr (HAS_SCALE<T>) score = score * load(key_scales + t);
            store(row + t, score);
            peaks = max(peaks, keep(score, int(tokens - t), set(LOWEST)));
        }
        const F32 before = load(state), largest = max(before, peak_everywhere(peaks));
        const F32 factor = exp2(before - largest);
        F32 total = load(state + LANES) * factor;
        for (int64_t t = 0; t < tokens; t += LANES) {
            F32 weight = keep(exp2(load(row + t) - largest), int(tokens - t), zero());
            total = total + weight;
            if constexpr (HAS_SCALE<T>) weight = keep(weight * load(value_scales + t), int(tokens - t), zero());
            store(weights + r * HEAD_CHUNK + t, weight);
        }
        store(state, largest);
        store(state + LANES, total);
        float factors16[LANES];
        store(factors16, factor);
        return factors16[0];
    }
};

// Adds up one row's partials, `apart` floats from split to split, and writes the row.
template <class T>
void add_row(const float* partials, int64_t apart, int64_t splits, int64_t width, T* out) {
    F32 largest = set(LOWEST), totals = zero();
    for (int64_t s = 0; s < splits; ++s) largest = max(largest, load(partials + s * apart));
    for (int64_t s = 0; s < splits; ++s) {
        const float* partial = partials + s * apart;
        totals = fma(load(partial + LANES), exp2(load(partial) - largest), totals);
    }
    const F32 share = set(1.0f / sum(totals));
    for (int64_t i = 0; i < width; i += LANES) {
        F32 value = zero();
        for (int64_t s = 0; s < splits; ++s) {
            const float* partial = partials + s * apart;
            value = fma(load(partial + 2 * LANES + i), exp2(load(partial) - largest), value);
        }
        store(out + i, value * share, int(smaller(LANES, width - i)));
    }
}

template <class Steps, class T, class Query>
void gqa_decode_with(Team& team, const GqaArgs& args) {
    const size_t mark = team.mark();
    const PagedArgs& paged = args.paged;
    const int64_t group = args.query_heads / args.kv_heads, width = args.width;
    const int64_t head_bytes = head_row_bytes<T>(width), row_bytes = args.kv_heads * head_bytes;
    const Query* q = static_cast<const Query*>(args.q);
    Query* out = static_cast<Query*>(args.out);
    clear_spare_rows(team, paged, out, args.query_heads * width);

    int64_t together = args.kv_heads;  // key-value heads of one work
    Plan plan(team, paged, 1, group, QUERIES_EACH * group);
    if (plan.items() < 4 * team.size) {
        plan = Plan(team, paged, args.kv_heads, group, QUERIES_EACH * group);
        together = 1;
    }
    HeadAttention<Steps, T> attention(team, together, group, width);
    const int64_t apart = together * plan.most_rows * attention.floats;
    run_plan(
        team, plan, apart, together,
        [&](const Work& work, int64_t split, float* partial) {
            const Rows rows(paged, work.segment, group);
            const int64_t first_head = work.head * together;
            const auto row_of = [&](int64_t head, int64_t row) {
                const int64_t query_head = (first_head + head) * group + row % group;
                return q + rows.query_row(row) * args.q_stride + query_head * args.q_head_stride;
            };
            attention.attend(cached_rows(paged, work.segment, args.key_pages + first_head * head_bytes, row_bytes),
                             cached_rows(paged, work.segment, args.value_pages + first_head * head_bytes, row_bytes),
                             rows, work, split, row_of, args.scale * LOG2_E, partial);
        },
        [&](const Work& work, int64_t head, const float* partials) {
            const Rows rows(paged, work.segment, group);
            for (int64_t r = 0; r < work.rows; ++r) {
                const int64_t row = work.first + r;
                const int64_t query_head = (work.head * together + head) * group + row % group;
                add_row(partials + (head * work.rows + r) * attention.floats, apart, work.splits, width,
                        out + (rows.query_row(row) * args.query_heads + query_head) * width);
            }
        });
    team.reset(mark);
}

}  // namespace decode

void gqa_decode(Team& team, const GqaArgs& args) {
    decode::with_steps(args.dtype, args.kv_format, [&](auto steps, auto cached, auto query) {
        decode::gqa_decode_with<decltype(steps), decltype(cached), decltype(query)>(team, args);
    });
}

}  // namespace
