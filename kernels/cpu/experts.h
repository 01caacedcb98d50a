// The experts of a layer: each one's gated MLP over the rows that chose it, then every token's weighted sum. The
// shared expert is one group more, of all rows.
#pragma once

#include "dense.h"

namespace {

// One expert's share of the sorted (token, slot) pairs.
struct Group {
    int64_t expert, start, rows;
};

// One of the two products of all experts with tokens, and of the shared expert: `routed` and `shared` with the rows
// that each meets. Packs all rows, then claims pieces: the shared expert's first, for they have the most rows.
struct GroupedProduct {
    const Matrix& routed;
    const Matrix* shared;  // or null
    const Group* groups;
    int64_t num_groups, shared_rows;
    uint8_t* tiles;
    uint8_t* shared_tiles;

    GroupedProduct(Team& team, const Matrix& routed, const Matrix* shared, const Group* groups, int64_t num_groups,
                   int64_t pairs, int64_t rows)
        : routed(routed),
          shared(shared),
          groups(groups),
          num_groups(num_groups),
          shared_rows(shared == nullptr ? 0 : rows),
          tiles(tile_scratch(team, routed, pairs)),
          shared_tiles(shared == nullptr ? nullptr : tile_scratch(team, *shared, rows)) {}

    Product of_group(const Group& group) const {
        const int64_t row_bytes = MICROKERNELS[routed.format].row_bytes(routed.k);
        return Product(routed, group.expert, group.rows, tiles + group.start * row_bytes);
    }
    Product of_shared() const {
        return Product(shared == nullptr ? routed : *shared, 0, shared_rows, shared_tiles);
    }

    void pack(Team& team, const Activations& x, const Activations& shared_x) const {
        const Product all = of_shared();
        team.each(all.tiling.count + num_groups, [&](int64_t item) {
            if (item < all.tiling.count) return all.pack(shared_x, 0, item);
            const Group& group = groups[item - all.tiling.count];
            const Product product = of_group(group);
            for (int64_t tile = 0; tile < product.tiling.count; ++tile) product.pack(x, group.start, tile);
        });
    }

    // epilogue(pair, panel, values), pairs as they are sorted; shared_epilogue(row, panel, values).
    template <class Epilogue, class SharedEpilogue>
    void multiply(Team& team, Epilogue epilogue, SharedEpilogue shared_epilogue) const {
        const Product all = of_shared(), one = of_group(groups[0]);
        const int64_t panels = panels_per_item(team, one, one.num_panels * num_groups);
        const int64_t shared_panels = panels_per_item(team, all, all.num_panels);
        const int64_t shared_items = shared == nullptr ? 0 : divide_up(all.num_panels, shared_panels);
        const int64_t items = divide_up(one.num_panels, panels);
        team.each(shared_items + num_groups * items, [&](int64_t item) {
            if (item < shared_items) return multiply_panels(all, item * shared_panels, shared_panels, shared_epilogue);
            const Group& group = groups[(item - shared_items) / items];
            multiply_panels(of_group(group), (item - shared_items) % items * panels, panels,
                            [&](int64_t row, int64_t panel, const float* values) {
                                epilogue(group.start + row, panel, values);
                            });
        });
    }

    template <class Epilogue>
    static void multiply_panels(const Product& product, int64_t panel, int64_t panels, Epilogue epilogue) {
        const int64_t end = smaller(panel + panels, product.num_panels), tiles = product.cached_tiles();
        for (int64_t tile = 0; tile < product.tiling.count; tile += tiles)
            product.multiply(panel, end, tile, smaller(tile + tiles, product.tiling.count), epilogue);
    }
};

// out[t] = ((terms[t,0] + terms[t,1]) + ...) + shared[t], in fp32 and in this order
void combine(Team& team, const float* terms, int64_t slots, const float* shared, int64_t rows, const Output& out) {
    const int64_t width = out.width;
    constexpr int64_t ROWS = 4;  // per claim
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
    if (args.rows == 0) return;
    const size_t mark = team.mark();
    const int64_t rows = args.rows, pairs = rows * args.slots, width = args.down->k;
    Group* groups = team.own_scratch<Group>(args.gate_up->experts);
    int64_t num_groups = 0;
    for (int64_t expert = 0; expert < args.gate_up->experts; ++expert) {
        const int64_t start = args.starts[expert], count = args.starts[expert + 1] - start;
        if (count > 0) groups[num_groups++] = {expert, start, count};
    }

    const bool has_shared = args.shared_gate_up != nullptr;
    const int64_t shared_width = has_shared ? args.shared_down->k : 0;
    const Output hidden{team.scratch<float>(pairs * width), width, width, args.dtype};
    const Output shared_hidden{team.scratch<float>(rows * shared_width), shared_width, shared_width, args.dtype};
    const GroupedProduct up(team, *args.gate_up, args.shared_gate_up, groups, num_groups, pairs, rows);
    up.pack(team, {args.x, args.x_stride, args.dtype, args.order, args.slots},
            {args.x, args.x_stride, args.dtype, nullptr, 1});
    up.multiply(
        team, [&](int64_t pair, int64_t panel, const float* values) { hidden.put_gated(pair, panel, values); },
        [&](int64_t row, int64_t panel, const float* values) { shared_hidden.put_gated(row, panel, values); });

    const int64_t out_width = args.down->n;
    const Output terms{team.scratch<float>(pairs * out_width), out_width, out_width, DTYPE_F32};
    const Output shared{has_shared ? team.scratch<float>(rows * out_width) : nullptr, out_width, out_width, DTYPE_F32};
    const GroupedProduct down(team, *args.down, args.shared_down, groups, num_groups, pairs, rows);
    down.pack(team, {hidden.data, width, args.dtype, nullptr, 1},
              {shared_hidden.data, shared_width, args.dtype, nullptr, 1});
    down.multiply(
        team,
        [&](int64_t pair, int64_t panel, const float* values) {
            const int64_t place = args.order[pair];
            const F32 weight = set(args.weights[place]);
            terms.put(place, panel * PANEL, weight * load(values));
            terms.put(place, panel * PANEL + LANES, weight * load(values + LANES));
        },
        [&](int64_t row, int64_t panel, const float* values) { shared.put_panel(row, panel, values); });
    combine(team, static_cast<const float*>(terms.data), args.slots, static_cast<const float*>(shared.data), rows,
            {args.out, args.out_stride, out_width, args.dtype});
    team.reset(mark);
}

}  // namespace
