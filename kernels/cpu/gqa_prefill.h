// Grouped-query attention of prompt tokens: cached keys are transposed and cached values joined in pairs, once for all
// rows of a segment and all query heads that share them.
#pragma once

#include "flash.h"
#include "kv.h"

namespace {

// Brings a row to the first-level cache: rows of one head lie too far apart for the hardware to see them coming.
INLINE void fetch(const void* row, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(static_cast<const char*>(row) + i, _MM_HINT_T0);
}

// Rows of keys and values of one head -> the panels that attention multiplies with.
template <class T>
class RowPanels {
   public:
    RowPanels(Team& team, int64_t width)
        : width_(width),
          row_words_(flash::round_up(flash::words<T>(width), LANES)),
          rows_(team.own_scratch<flash::Word>(LANES * row_words_)) {
        std::memset(rows_, 0, size_t(LANES * row_words_) * sizeof(flash::Word));  // padding stays zero
    }

    // The keys of tokens t .. t + 15 of a stretch, the first `valid` from row(i), the others zero.
    template <class Row>
    void put_keys(flash::Word* keys, int64_t t, int64_t valid, Row row) const {
        flash::Word* panel = keys + t / flash::PANEL * row_words_ * flash::PANEL + t % flash::PANEL;
        for (int64_t i = 0; i < valid; ++i) copy_run(row(i), width_, reinterpret_cast<T*>(rows_ + i * row_words_));
        std::memset(rows_ + valid * row_words_, 0, size_t((LANES - valid) * row_words_) * sizeof(flash::Word));
        for (int64_t column = 0; column < row_words_; column += LANES)
            flash::transpose(rows_ + column, row_words_, panel + column * flash::PANEL, flash::PANEL);
    }

    template <class Row>
    void put_values(flash::Word* values, int64_t t, int64_t valid, Row row) const {
        for (int64_t i = 0; i < LANES; i += 2)
            for (int64_t dim = 0; dim < width_; dim += LANES) {
                const int n = int(smaller(LANES, width_ - dim));
                flash::put<T>(values + dim / flash::PANEL * flash::Shape::values_stride<T>(), t + i,
                              dim % flash::PANEL / LANES, i < valid ? ::load(row(i), dim, n) : zero(),
                              i + 1 < valid ? ::load(row(i + 1), dim, n) : zero());
            }
    }

   private:
    const int64_t width_, row_words_;
    flash::Word* rows_;
};

template <class T>
class CachedKeysValues {
   public:
    CachedKeysValues(Team& team, const GqaArgs& args) : args_(args), panels_(team, args.width) {}

    int64_t most_heads() const { return args_.kv_heads; }
    int64_t expansion() const { return 16; }

    void load(int64_t segment, int64_t first, int64_t) {
        segment_ = segment;
        first_ = first;
    }

    void expand(int64_t head, int64_t tokens, flash::Word* keys, flash::Word* values) const {
        with_kv_type(args_.kv_format, [&](auto cached) { expand_from<decltype(cached)>(head, tokens, keys, values); });
    }

   private:
    template <class Cached>
    void expand_from(int64_t head, int64_t tokens, flash::Word* keys, flash::Word* values) const {
        const int64_t head_bytes = head_row_bytes<Cached>(args_.width), row_bytes = args_.kv_heads * head_bytes;
        const CachedRows key_rows = cached_rows(args_.paged, segment_, args_.key_pages, row_bytes);
        const CachedRows value_rows = cached_rows(args_.paged, segment_, args_.value_pages, row_bytes);
        for (int64_t t = 0; t < flash::round_up(tokens, flash::PANEL); t += LANES) {
            const int64_t valid = larger(0, smaller(LANES, tokens - t));
            for (int64_t i = LANES; i < smaller(2 * LANES, tokens - t); ++i) {
                fetch(key_rows.at(first_ + t + i) + head * head_bytes, head_bytes);
                fetch(value_rows.at(first_ + t + i) + head * head_bytes, head_bytes);
            }
            const auto row = [&](const CachedRows& rows, int64_t i) {
                return head_of<Cached>(rows.at(first_ + t + i) + head * head_bytes, args_.width);
            };
            panels_.put_keys(keys, t, valid, [&](int64_t i) { return row(key_rows, i); });
            panels_.put_values(values, t, valid, [&](int64_t i) { return row(value_rows, i); });
        }
    }

    const GqaArgs& args_;
    const RowPanels<T> panels_;
    int64_t segment_ = 0, first_ = 0;
};

template <class T>
void gqa_prefill_in(Team& team, const GqaArgs& args) {
    const size_t mark = team.mark();
    CachedKeysValues<T> source(team, args);
    flash::run<T>(team,
                  {args.q, args.q_stride, args.q_head_stride, args.out, args.kv_heads,
                   args.query_heads / args.kv_heads, args.paged,
                   flash::Shape::of<T>(args.width, 0, args.width, args.scale)},
                  source);
    team.reset(mark);
}

void gqa_prefill(Team& team, const GqaArgs& args) {
    args.dtype == DTYPE_BF16 ? gqa_prefill_in<bf16>(team, args) : gqa_prefill_in<float>(team, args);
}

}  // namespace
