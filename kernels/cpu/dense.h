// linear, lm_head and the gated MLP: all rows times one matrix.
#pragma once

#include "products.h"

namespace {

template <class Epilogue>
void multiply_all(Team& team, const Activations& x, int64_t rows, const Matrix& weight, Epilogue epilogue) {
    const size_t mark = team.mark();
    Products products{team.own_scratch<Product>(Products::blocks(weight, rows))};
    products.add(weight, 0, tile_scratch(team, weight, rows), rows, 0);
    products.pack(team, [&](const Product&) { return x; });
    products.multiply(team, [&](const Product&, int64_t row, int64_t panel, const float* values) {
        epilogue(row, panel, values);
    });
    team.reset(mark);
}

// out = x w^T, out.width = w.n
void product(Team& team, const Activations& x, int64_t rows, const Matrix& weight, const Output& out) {
    multiply_all(team, x, rows, weight,
                 [&](int64_t row, int64_t panel, const float* values) { out.put_panel(row, panel, values); });
}

// hidden = silu(x gate^T) * (x up^T), gate and up paired in one matrix, hidden.width = gate_up.n / 2
void gated_product(Team& team, const Activations& x, int64_t rows, const Matrix& gate_up, const Output& hidden) {
    multiply_all(team, x, rows, gate_up,
                 [&](int64_t row, int64_t panel, const float* values) { hidden.put_gated(row, panel, values); });
}

void linear(Team& team, const LinearArgs& args) {
    product(team, {args.x, args.x_stride, args.dtype, nullptr, 1}, args.rows, *args.weight,
            {args.out, args.out_stride, args.weight->n, args.out_dtype});
}

void gated_mlp(Team& team, const GatedMlpArgs& args) {
    const size_t mark = team.mark();
    const int64_t width = args.down->k;
    float* hidden = team.scratch<float>(args.rows * width);
    gated_product(team, {args.x, args.x_stride, args.dtype, nullptr, 1}, args.rows, *args.gate_up,
                  {hidden, width, width, args.dtype});
    product(team, {hidden, width, args.dtype, nullptr, 1}, args.rows, *args.down,
            {args.out, args.out_stride, args.down->n, args.dtype});
    team.reset(mark);
}

}  // namespace
