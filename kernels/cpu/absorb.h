// Per head: the key expansion moved to the query, and the value expansion of what attention mixed.
#pragma once

#include "products.h"

namespace {

// out[row][head] = x[row][head] w[head]^T, a tile of rows of one head per claim; then after(row, head).
template <class T, class After>
void multiply_heads(Team& team, const T* x, int64_t rows, int64_t row_stride, int64_t head_stride, const Matrix& w,
                    const Output& out, After after) {
    const size_t mark = team.mark();
    const Microkernel& kernel = MICROKERNELS[w.format];
    const Tiling tiling(rows, kernel.max_rows);
    uint8_t* tile = team.own_scratch<uint8_t>(kernel.max_rows * kernel.row_bytes(w.k));
    const int64_t panels = divide_up(w.n, PANEL), panel_bytes = w.expert_bytes / panels;
    team.each(w.experts * tiling.count, [&](int64_t item) {
        const int64_t head = item / tiling.count, first = tiling.start(item % tiling.count);
        const int height = tiling.height(item % tiling.count);
        alignas(64) float values[TALLEST_TILE * PANEL];
        kernel.pack(tile, {x + head * head_stride, row_stride, out.dtype, nullptr, 1}, first, height, w.k);
        for (int64_t panel = 0; panel < panels; ++panel) {
            kernel.multiply(height, w.data + head * w.expert_bytes + panel * panel_bytes, tile, w.k, values);
            for (int r = 0; r < height; ++r) out.put_panel((first + r) * w.experts + head, panel, values + r * PANEL);
        }
        for (int64_t row = first; row < first + height; ++row) after(row, head);
    });
    team.reset(mark);
}

template <class T>
void absorb_rows(Team& team, const MlaAbsorbArgs& args) {
    const Matrix& w = *args.w_uk;
    const T* q = static_cast<const T*>(args.q);
    T* out = static_cast<T*>(args.out);
    const int64_t width = args.nope + args.rope, wide = w.n + args.rope;
    multiply_heads(team, q, args.rows, args.q_stride, width, w, {out, wide, w.n, args.dtype},
                   [&](int64_t row, int64_t head) {
                       std::memcpy(out + (row * w.experts + head) * wide + w.n,
                                   q + row * args.q_stride + head * width + args.nope, size_t(args.rope) * sizeof(T));
                   });
}

void mla_absorb(Team& team, const MlaAbsorbArgs& args) {
    args.dtype == DTYPE_BF16 ? absorb_rows<bf16>(team, args) : absorb_rows<float>(team, args);
}

template <class T>
void unabsorb_rows(Team& team, const MlaUnabsorbArgs& args) {
    const Matrix& w = *args.w_uv;
    multiply_heads(team, static_cast<const T*>(args.latents), args.rows, args.row_stride, args.head_stride, w,
                   {args.out, w.n, w.n, args.dtype}, [](int64_t, int64_t) {});
}

void mla_unabsorb(Team& team, const MlaUnabsorbArgs& args) {
    args.dtype == DTYPE_BF16 ? unabsorb_rows<bf16>(team, args) : unabsorb_rows<float>(team, args);
}

}  // namespace
