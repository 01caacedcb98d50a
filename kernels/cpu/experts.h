// The experts of a layer: each one's gated MLP over the rows that chose it, then every token's weighted sum. The
// shared expert is one more, of all rows.
#pragma once

#include "products.h"

namespace {

// One of the two products of every expert that has rows; the shared expert's first, for they have the most rows.
Products expert_products(Team& team, const ExpertMlpArgs& args, const Matrix& routed, const Matrix* shared) {
    const int64_t pairs = args.rows * args.slots;
    const int64_t shared_blocks = shared == nullptr ? 0 : Products::blocks(*shared, args.rows);
    Products products{team.own_scratch<Product>(shared_blocks + routed.experts + Products::blocks(routed, pairs))};
    if (shared != nullptr) products.add(*shared, 0, tile_scratch(team, *shared, args.rows), args.rows, 0, true);
    uint8_t* tiles = tile_scratch(team, routed, pairs);
    for (int64_t expert = 0; expert < routed.experts; ++expert) {
        const int64_t start = args.starts[expert], rows = args.starts[expert + 1] - start;
        if (rows > 0) products.add(routed, expert, tiles, rows, start);
    }
    return products;
}

// out[t] = ((terms[t,0] + terms[t,1]) + ...) + shared[t], in fp32 and in this order
void combine(Team& team, const float* terms, int64_t slots, const float* shared, int64_t rows, const Output& out) {
    constexpr int64_t ROWS = 4;  // per claim
    const int64_t width = out.width;
    team.each(divide_up(rows, ROWS), [&](int64_t piece) {
        for (int64_t row = piece * ROWS; row < smaller(rows, (piece + 1) * ROWS); ++row)
            for (int64_t i = 0; i < width; i += LANES) {
                const int n = int(smaller(LANES, width - i));
                const float* term = terms + row * slots * width + i;
                F32 total = load(term, n);
                for (int64_t slot = 1; slot < slots; ++slot) total = total + load(term + slot * width, n);
                if (shared != nullptr) total = total + load(shared + row * width + i, n);
                out.put(row, i, total);
            }
    });
}

void expert_mlp(Team& team, const ExpertMlpArgs& args) {
    const size_t mark = team.mark();
    const bool has_shared = args.shared_gate_up != nullptr;
    const int64_t width = args.down->k, shared_width = has_shared ? args.shared_down->k : 0, out_width = args.down->n;
    const int64_t pairs = args.rows * args.slots, shared_rows = has_shared ? args.rows : 0;

    // Rows of routed experts are pairs in the order in which they are sorted.
    const Activations x{args.x, args.x_stride, args.dtype, nullptr, 1};
    const Activations sorted_x{args.x, args.x_stride, args.dtype, args.order, args.slots};
    const Output hidden{team.scratch<float>(pairs * width), width, width, args.dtype};
    const Output shared_hidden{team.scratch<float>(shared_rows * shared_width), shared_width, shared_width,
                               args.dtype};
    const Products up = expert_products(team, args, *args.gate_up, args.shared_gate_up);
    up.pack(team, [&](const Product& product) { return product.shared ? x : sorted_x; });
    up.multiply(team, [&](const Product& product, int64_t row, int64_t panel, const float* values) {
        (product.shared ? shared_hidden : hidden).put_gated(row, panel, values);
    });

    const Activations hidden_rows{hidden.data, width, args.dtype, nullptr, 1};
    const Activations shared_hidden_rows{shared_hidden.data, shared_width, args.dtype, nullptr, 1};
    const Output terms{team.scratch<float>(pairs * out_width), out_width, out_width, DTYPE_F32};
    const Output shared{team.scratch<float>(shared_rows * out_width), out_width, out_width, DTYPE_F32};
    const Products down = expert_products(team, args, *args.down, args.shared_down);
    down.pack(team, [&](const Product& product) { return product.shared ? shared_hidden_rows : hidden_rows; });
    down.multiply(team, [&](const Product& product, int64_t row, int64_t panel, const float* values) {
        if (product.shared) return shared.put_panel(row, panel, values);
        const int64_t place = args.order[row];
        const F32 weight = set(args.weights[place]);
        terms.put(place, panel * PANEL, weight * load(values));
        terms.put(place, panel * PANEL + LANES, weight * load(values + LANES));
    });
    combine(team, static_cast<const float*>(terms.data), args.slots,
            has_shared ? static_cast<const float*>(shared.data) : nullptr, args.rows,
            {args.out, args.out_stride, out_width, args.dtype});
    team.reset(mark);
}

}  // namespace
