// MLA attention of prompt tokens, in expanded form: each head's keys and values are made from the latents, a stretch
// of the context at a time, and forgotten once all rows of the segment have met them.
#pragma once

#include "flash.h"
#include "kv.h"

namespace {

template <class T>
class ExpandedLatents {
   public:
    ExpandedLatents(Team& team, const MlaPrefillArgs& args)
        : args_(args),
          latent_words_(flash::words<T>(args.rank)),
          nope_words_(flash::words<T>(args.nope)),
          rope_words_(flash::words<T>(args.rope)),
          row_words_(flash::round_up(latent_words_ + rope_words_, LANES)),
          key_rows_(flash::round_up(nope_words_ + rope_words_, LANES)),
          rows_(team.own_scratch<flash::Word>(LANES * row_words_)),
          latents_(team.own_scratch<flash::Word>(flash::STRETCH * row_words_)) {
        std::memset(rows_, 0, size_t(LANES * row_words_) * sizeof(flash::Word));  // padding stays zero
    }

    int64_t most_heads() const { return args_.heads; }
    int64_t expansion() const {
        return args_.rank * (args_.nope + args_.value_width) / (args_.nope + args_.rope + args_.value_width);
    }

    // Panels [tokens / 32][words of latent, of rope key][32]; tokens that fill the last panel up are zero.
    void load(int64_t segment, int64_t first, int64_t tokens) {
        with_kv_type(args_.kv_format, [&](auto cached) {
            using Cached = decltype(cached);
            const int64_t row_bytes = latent_row_bytes<Cached>(args_.rank, args_.rope);
            const CachedRows context = cached_rows(args_.paged, segment, args_.pages, row_bytes);
            for (int64_t t = 0; t < flash::round_up(tokens, flash::PANEL); t += LANES) {
                for (int64_t i = 0; i < LANES; ++i) {
                    flash::Word* row = rows_ + i * row_words_;
                    if (t + i >= tokens) {
                        std::memset(row, 0, size_t(row_words_) * sizeof(flash::Word));
                        continue;
                    }
                    const uint8_t* source = context.at(first + t + i);
                    copy_run(latent_of<Cached>(source, args_.rank, args_.rope), args_.rank,
                             reinterpret_cast<T*>(row));
                    copy_run(rope_key_of<Cached>(source, args_.rank, args_.rope), args_.rope,
                             reinterpret_cast<T*>(row + latent_words_));
                }
                flash::Word* panel = latents_ + t / flash::PANEL * row_words_ * flash::PANEL + t % flash::PANEL;
                for (int64_t column = 0; column < row_words_; column += LANES)
                    flash::transpose(rows_ + column, row_words_, panel + column * flash::PANEL, flash::PANEL);
            }
        });
    }

    void expand(int64_t head, int64_t tokens, flash::Word* keys, flash::Word* values) const {
        for (int64_t t = 0; t < tokens; t += flash::PANEL) {
            const flash::Word* latents = latents_ + t * row_words_;
            expand_keys(head, latents, keys + t * key_rows_);
            expand_values(head, latents, values + t / flash::PER_WORD<T> * flash::PANEL);
        }
    }

   private:
    // The panel of a packed matrix that holds output n, from its column on.
    const flash::Word* weight(const Matrix& matrix, int64_t head, int64_t n) const {
        const flash::Word* panels = reinterpret_cast<const flash::Word*>(matrix.data + head * matrix.expert_bytes);
        return panels + n / flash::PANEL * latent_words_ * flash::PANEL + n % flash::PANEL;
    }

    void expand_keys(int64_t head, const flash::Word* latents, flash::Word* keys) const {
        for (int64_t n = 0; n < args_.nope; n += flash::TILE)
            flash::multiply<T, 2>(weight(*args_.w_uk, head, n), latents, latent_words_,
                                  [&](int row, int v, F32 even, F32 odd) {
                                      flash::put<T>(keys, n + row, v, even, odd);
                                  });
        std::memcpy(keys + nope_words_ * flash::PANEL, latents + latent_words_ * flash::PANEL,
                    size_t(rope_words_ * flash::PANEL) * sizeof(flash::Word));
    }

    void expand_values(int64_t head, const flash::Word* latents, flash::Word* values) const {
        for (int64_t v0 = 0; v0 < args_.value_width; v0 += flash::PANEL) {
            flash::Word* panel = values + v0 / flash::PANEL * flash::Shape::values_stride<T>();
            for (int64_t t = 0; t < flash::PANEL; t += flash::TILE)
                flash::multiply<T, 2>(latents + t, weight(*args_.w_uv, head, v0), latent_words_,
                                      [&](int row, int v, F32 even, F32 odd) {
                                          flash::put<T>(panel, t + row, v, even, odd);
                                      });
        }
    }

    const MlaPrefillArgs& args_;
    const int64_t latent_words_, nope_words_, rope_words_, row_words_, key_rows_;
    flash::Word* rows_;
    flash::Word* latents_;
};

template <class T>
void mla_prefill_in(Team& team, const MlaPrefillArgs& args) {
    const size_t mark = team.mark();
    ExpandedLatents<T> source(team, args);
    flash::run<T>(team,
                  {args.q, args.q_stride, args.q_head_stride, args.out, args.heads, 1, args.paged,
                   flash::Shape::of<T>(args.nope, args.rope, args.value_width, args.scale)},
                  source);
    team.reset(mark);
}

void mla_prefill(Team& team, const MlaPrefillArgs& args) {
    args.dtype == DTYPE_BF16 ? mla_prefill_in<bf16>(team, args) : mla_prefill_in<float>(team, args);
}

}  // namespace
