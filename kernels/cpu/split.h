// How attention over a paged context is cut into work, the same whatever stands beside it.
//
// A context is cut at fixed positions. A split of it, for rows that share a key-value head, is one claim of a thread
// and gives a partial result: for each row the largest score, the sum of weights, the sum of weighted values. The
// partials of a row are then added in order of position. Which rows a claim takes together changes no row's bits.
//
//     position   0    256   512  ..  4096       5120       6144   ..
//                |  0  |  1  |  ..    |   16     |   17     |     short splits first, so that the threads share a
//                                                                 context of a thousand tokens
#pragma once

#include "kv.h"

namespace {
namespace decode {

constexpr int64_t SHORT_SPLIT = 256, SHORT_SPLITS = 16, LONG_SPLIT = 1024;  // tokens, but for the number
constexpr int64_t SHORT_END = SHORT_SPLIT * SHORT_SPLITS;
constexpr int64_t PARTIALS_BYTES = 64 << 20;  // what is kept of partial results at a time

INLINE int64_t split_start(int64_t split) {
    return split <= SHORT_SPLITS ? split * SHORT_SPLIT : SHORT_END + (split - SHORT_SPLITS) * LONG_SPLIT;
}
INLINE int64_t split_count(int64_t context) {
    return context <= SHORT_END ? divide_up(context, SHORT_SPLIT)
                                : SHORT_SPLITS + divide_up(context - SHORT_END, LONG_SPLIT);
}

// Rows are (query row, head) pairs of one segment and one key-value head, by query row, then by head.
struct Work {
    int64_t segment, head;  // of keys and values
    int64_t first, rows;
    int64_t splits;
    int64_t item, partial;  // claims and partials before this one
};

// Which query and which positions a row is about.
struct Rows {
    int64_t query, context, length, group;  // first query row; heads that share a key-value head

    Rows(const PagedArgs& paged, int64_t segment, int64_t group)
        : query(paged.query_starts[segment]),
          context(paged.context_lengths[segment]),
          length(paged.query_starts[segment + 1] - paged.query_starts[segment]),
          group(group) {}
    INLINE int64_t count() const { return length * group; }
    INLINE int64_t query_row(int64_t row) const { return query + row / group; }
    INLINE int64_t sees(int64_t row) const { return context - length + row / group + 1; }  // positions
};

// All work of a step in the order of its segments, in every thread's own scratch; one entry more ends it.
struct Plan {
    Work* works;
    int64_t count = 0, most_rows = 0;

    // `heads` are key-value heads, `group` the query heads of each. A work has at most `rows_each` rows.
    Plan(Team& team, const PagedArgs& paged, int64_t heads, int64_t group, int64_t rows_each) {
        for (int64_t s = 0; s < paged.segments; ++s) {
            const int64_t rows = Rows(paged, s, group).count();
            count += heads * divide_up(rows, rows_each);
            most_rows = larger(most_rows, smaller(rows, rows_each));
        }
        works = team.own_scratch<Work>(count + 1);
        Work* next = works;
        int64_t item = 0, partial = 0;
        for (int64_t s = 0; s < paged.segments; ++s) {
            const Rows rows(paged, s, group);
            for (int64_t first = 0; first < rows.count(); first += rows_each) {
                const int64_t some = smaller(rows_each, rows.count() - first);
                const int64_t splits = split_count(rows.sees(first + some - 1));
                for (int64_t head = 0; head < heads; ++head) {
                    *next++ = {s, head, first, some, splits, item, partial};
                    item += splits;
                    partial += splits > 1 ? splits : 0;
                }
            }
        }
        *next = {0, 0, 0, 0, 0, item, partial};
    }

    INLINE int64_t items() const { return works[count].item; }
    INLINE const Work& of_item(int64_t item) const {
        int64_t low = 0, high = count;
        while (high - low > 1) {
            const int64_t middle = (low + high) / 2;
            (works[middle].item <= item ? low : high) = middle;
        }
        return works[low];
    }
};

// attend(work, split, partial) writes one partial of `floats` floats; finish(work, slice, partials) adds up those of
// one of `slices` slices of the result, and writes it.
template <class Attend, class Finish>
void run_plan(Team& team, const Plan& plan, int64_t floats, int64_t slices, Attend attend, Finish finish) {
    if (plan.count == 0) return team.barrier();
    float* own = team.own_scratch<float>(floats);
    const int64_t most = larger(1, PARTIALS_BYTES / (floats * int64_t(sizeof(float))));
    const size_t mark = team.mark();
    for (int64_t start = 0, end; start < plan.count; start = end) {
        const Work* works = plan.works;
        for (end = start + 1; end < plan.count && works[end + 1].partial - works[start].partial <= most;) ++end;
        const int64_t count = works[end].partial - works[start].partial;
        team.reset(mark);
        float* partials = team.scratch<float>(count * floats);
        const auto partials_of = [&](const Work& work) {
            return partials + (work.partial - works[start].partial) * floats;
        };
        team.each(works[end].item - works[start].item, [&](int64_t i) {
            const Work& work = plan.of_item(works[start].item + i);
            const int64_t split = work.splits - 1 - (works[start].item + i - work.item);  // the long ones first
            if (work.splits > 1) return attend(work, split, partials_of(work) + split * floats);
            attend(work, split, own);
            for (int64_t slice = 0; slice < slices; ++slice) finish(work, slice, own);
        });
        if (count == 0) continue;
        team.each((end - start) * slices, [&](int64_t i) {
            const Work& work = works[start + i / slices];
            if (work.splits > 1) finish(work, i % slices, partials_of(work));
        });
    }
}

// Rows past the last segment; visible to all after the next barrier.
template <class T>
INLINE void clear_spare_rows(Team& team, const PagedArgs& paged, T* out, int64_t width) {
    const int64_t used = paged.query_starts[paged.segments];
    if (team.rank == 0 && used < paged.rows)
        std::memset(out + used * width, 0, size_t((paged.rows - used) * width) * sizeof(T));
}

}  // namespace decode
}  // namespace
