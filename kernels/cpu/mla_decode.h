// MLA in absorbed form: all heads share the cached rows, as keys and, up to the rank, as values.
#pragma once

#include "lanes.h"

namespace {
namespace decode {

constexpr int64_t MANY_GROUPS = 4;  // of 16 rows, that share one reading of the memory
constexpr int64_t SLICE = 64;       // values of the result that one claim adds up

template <class Steps, class T, class Query>
void mla_decode_with(Team& team, const MlaDecodeArgs& args) {
    const size_t mark = team.mark();
    const PagedArgs& paged = args.paged;
    const int64_t heads = args.heads, rank = args.rank;
    const Query* q = static_cast<const Query*>(args.q);
    Query* out = static_cast<Query*>(args.out);
    clear_spare_rows(team, paged, out, heads * rank);

    Plan plan(team, paged, 1, heads, MANY_GROUPS * LANES);
    if (plan.items() < 2 * team.size) plan = Plan(team, paged, 1, heads, LANES);
    const int64_t groups = divide_up(plan.most_rows, LANES);
    LaneAttention<Steps, T> lanes(team, rank, args.rope, groups);
    const int64_t apart = groups * lanes.floats;
    run_plan(
        team, plan, apart, divide_up(rank, SLICE),
        [&](const Work& work, int64_t split, float* partial) {
            const Rows rows(paged, work.segment, heads);
            const auto row_of = [&](int64_t row) {
                return q + rows.query_row(row) * args.q_stride + row % heads * args.q_head_stride;
            };
            lanes.attend(cached_rows(paged, work.segment, args.pages, latent_row_bytes<T>(rank, args.rope)), rows, work,
                         split, row_of, args.scale * LOG2_E, partial);
        },
        [&](const Work& work, int64_t slice, const float* partials) {
            const int64_t first_row = paged.query_starts[work.segment] * heads + work.first;
            for (int64_t row = 0; row < work.rows; row += LANES, partials += lanes.floats)
                add_partials(partials, apart, work.splits, smaller(LANES, work.rows - row), slice * SLICE,
                             smaller((slice + 1) * SLICE, rank), out + (first_row + row) * rank, rank);
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
