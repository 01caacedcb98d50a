// MLA in absorbed form: every head shares the key, a cached row, and the value, the latent in it.
#pragma once

#include "lanes.h"

namespace {
namespace decode {

// What all heads attend to: the key is a cached row, the value is the latent that it starts with.
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

constexpr int64_t MANY_GROUPS = 4;  // of 16 rows, that share one reading of the memory

template <class Steps, class T, class Query>
void mla_decode_with(Team& team, const MlaDecodeArgs& args) {
    const size_t mark = team.mark();
    const PagedArgs& paged = args.paged;
    const int64_t row_bytes = latent_row_bytes<T>(args.rank, args.rope);
    const Query* q = static_cast<const Query*>(args.q);
    Query* out = static_cast<Query*>(args.out);
    clear_spare_rows(team, paged, out, args.heads * args.rank);

    Plan plan(team, paged, 1, args.heads, MANY_GROUPS * LANES);
    if (plan.items() < 2 * team.size) plan = Plan(team, paged, 1, args.heads, LANES);
    const auto memory_of = [&](int64_t segment) {
        return Latents<T>{cached_rows(paged, segment, args.pages, row_bytes), args.rank, args.rope};
    };
    LaneAttention<Steps, Latents<T>> lanes(team, Latents<T>{{args.pages, nullptr, paged.block_tokens, row_bytes}, args.rank, args.rope}, MANY_GROUPS);
    const int64_t floats = State::floats(args.rank);
    const int64_t all = MANY_GROUPS * floats;
    run_plan(
        team, plan, all, divide_up(args.rank, SLICE),
        [&](const Work& work, int64_t split, float* partial) {
            const Rows rows(paged, work.segment, args.heads);
            const auto row_of = [&](int64_t row) {
                return q + rows.query_row(row) * args.q_stride + row % args.heads * args.q_head_stride;
            };
            lanes.attend(memory_of(work.segment), rows, work, split, row_of, args.scale * LOG2_E, partial);
        },
        [&](const Work& work, int64_t slice, const float* partials) {
            const Rows rows(paged, work.segment, args.heads);
            for (int64_t g = 0; g * LANES < work.rows; ++g) {
                const int64_t first = work.first + g * LANES;
                add_partials<Query>(partials + g * floats, all, work.splits, smaller(LANES, work.rows - g * LANES),
                                    slice * SLICE, smaller((slice + 1) * SLICE, args.rank), [&](int64_t row) {
                    return out + (rows.query * args.heads + first + row) * args.rank;
                });
            }
        });
    team.reset(mark);
}

}  // namespace decode

void mla_decode(Team& team, const MlaDecodeArgs& args) {
    decode::with_steps(args.dtype, args.kv_format, [&](auto steps, auto cached, auto query) {
        decode::mla_decode_with<decltype(steps), decltype(cached), decltype(query)>(team, args);
    });
}

}  // namespace
