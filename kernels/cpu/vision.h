// What an image's tower needs beside the operations of text: attention of patches that all see one another, and GELU.
#pragma once

#include <cmath>

#include "gqa_prefill.h"

namespace {

// Keys and values as the projections gave them, a row for each patch.
template <class T>
class PatchKeysValues {
   public:
    PatchKeysValues(Team& team, const ImageAttentionArgs& args) : args_(args), panels_(team, args.width) {}

    int64_t most_heads() const { return 1; }  // heads share nothing
    int64_t expansion() const { return 16; }

    void load(int64_t, int64_t first, int64_t) { first_ = first; }

    void expand(int64_t head, int64_t tokens, flash::Word* keys, flash::Word* values) const {
        const T* first_key = static_cast<const T*>(args_.keys) + first_ * args_.k_stride + head * args_.width;
        const T* first_value = static_cast<const T*>(args_.values) + first_ * args_.v_stride + head * args_.width;
        for (int64_t t = 0; t < flash::round_up(tokens, flash::PANEL); t += LANES) {
            const int64_t valid = larger(0, smaller(LANES, tokens - t));
            for (int64_t i = t + LANES; i < smaller(t + 2 * LANES, tokens); ++i) {
                fetch(first_key + i * args_.k_stride, args_.width * int64_t(sizeof(T)));
                fetch(first_value + i * args_.v_stride, args_.width * int64_t(sizeof(T)));
            }
            panels_.put_keys(keys, t, valid, [&](int64_t i) { return run_at(first_key + (t + i) * args_.k_stride); });
            panels_.put_values(values, t, valid,
                               [&](int64_t i) { return run_at(first_value + (t + i) * args_.v_stride); });
        }
    }

   private:
    const ImageAttentionArgs& args_;
    const RowPanels<T> panels_;
    int64_t first_ = 0;
};

template <class T>
void image_attention_in(Team& team, const ImageAttentionArgs& args) {
    const size_t mark = team.mark();
    const int32_t rows = int32_t(args.rows), starts[] = {0, rows};
    const PagedArgs whole{starts, &rows, nullptr, nullptr, 1, 0, 1, args.rows};  // one segment, without pages
    PatchKeysValues<T> source(team, args);
    flash::run<T>(team,
                  {args.q, args.q_stride, args.width, args.out, args.heads, 1, whole,
                   flash::Shape::of<T>(args.width, 0, args.width, args.scale), false},
                  source);
    team.reset(mark);
}

void image_attention(Team& team, const ImageAttentionArgs& args) {
    args.dtype == DTYPE_BF16 ? image_attention_in<bf16>(team, args) : image_attention_in<float>(team, args);
}

INLINE float as_float(float value) { return value; }
INLINE float as_float(bf16 value) { return widen(value); }
INLINE void put_float(float* target, float value) { *target = value; }
INLINE void put_float(bf16* target, float value) { *target = narrow(value); }

// x/2 (1 + erf(x / sqrt 2)), value by value.
template <class T>
void gelu_rows(Team& team, const GeluArgs& args) {
    team.each(args.rows, [&](int64_t row) {
        const T* x = static_cast<const T*>(args.x) + row * args.x_stride;
        T* out = static_cast<T*>(args.out) + row * args.width;
        for (int64_t i = 0; i < args.width; ++i) {
            const float value = as_float(x[i]);
            put_float(out + i, 0.5f * value * (1.0f + std::erf(value * 0.70710678f)));
        }
    });
}

void gelu(Team& team, const GeluArgs& args) {
    args.dtype == DTYPE_BF16 ? gelu_rows<bf16>(team, args) : gelu_rows<float>(team, args);
}

}  // namespace
