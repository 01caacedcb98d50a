// linear, lm_head and the gated MLP: rows times one matrix, shared among the team.
#pragma once

#include "gemm.h"

namespace {

constexpr int64_t TILE_CACHE_BYTES = 256 << 10;  // of the second-level cache: tiles that a panel meets in turn
constexpr int64_t ITEM_BYTES = 256 << 10;        // of weights in one claim: a dozen microseconds of memory,
constexpr int64_t ITEMS_PER_THREAD = 16;         // or less, where that makes fewer claims than these

// Rows of activations and the matrix that they meet: one expert's, or the only one's.
struct Product {
    const Microkernel* kernel;
    const uint8_t* panels;
    int64_t num_panels, panel_bytes, k;
    uint8_t* tiles;
    Tiling tiling;

    // `tiles` has room for the packed rows.
    Product(const Matrix& w, int64_t expert, int64_t rows, uint8_t* tiles)
        : kernel(&MICROKERNELS[w.format]),
          panels(w.data + expert * w.expert_bytes),
          num_panels(w.paired ? divide_up(w.n / 2, PANEL / 2) : divide_up(w.n, PANEL)),
          panel_bytes(w.expert_bytes / num_panels),
          k(w.k),
          tiles(tiles),
          tiling(rows, kernel->max_rows) {}

    int64_t row_bytes() const { return kernel->row_bytes(k); }
    // How many tiles stay in the cache while a panel meets them.
    int64_t cached_tiles() const { return larger(1, TILE_CACHE_BYTES / (row_bytes() * kernel->max_rows)); }

    // Row i of the tiles is row first_row + i of x.
    void pack(const Activations& x, int64_t first_row, int64_t tile) const {
        const int64_t start = tiling.start(tile);
        kernel->pack(tiles + start * row_bytes(), x, first_row + start, tiling.height(tile), k);
    }

    // Panels [first_panel, end_panel) times tiles [first_tile, end_tile). epilogue(row, panel, values) takes float [32].
    template <class Epilogue>
    void multiply(int64_t first_panel, int64_t end_panel, int64_t first_tile, int64_t end_tile,
                  Epilogue epilogue) const {
        alignas(64) float values[TALLEST_TILE * PANEL];
        for (int64_t panel = first_panel; panel < end_panel; ++panel)
            for (int64_t tile = first_tile; tile < end_tile; ++tile) {
                const int64_t row = tiling.start(tile);
                const int rows = tiling.height(tile);
                kernel->multiply(rows, panels + panel * panel_bytes, tiles + row * row_bytes(), k, values);
                for (int r = 0; r < rows; ++r) epilogue(row + r, panel, values + r * PANEL);
            }
    }
};

// Space for the tiles of `rows` rows, whatever they are grouped by.
uint8_t* tile_scratch(Team& team, const Matrix& w, int64_t rows) {
    return team.scratch<uint8_t>(rows * MICROKERNELS[w.format].row_bytes(w.k));
}

// Panels in one claim, of `total_panels` that the team has to do.
int64_t panels_per_item(const Team& team, const Product& product, int64_t total_panels) {
    const int64_t fair = total_panels / (team.size * ITEMS_PER_THREAD);
    return larger(1, smaller(fair, ITEM_BYTES / product.panel_bytes));
}

// Where values go, in either dtype.
struct Output {
    void* data;
    int64_t stride, width;
    int32_t dtype;

    INLINE void put(int64_t row, int64_t column, F32 values) const {
        const int n = int(smaller(LANES, width - column));
        if (n <= 0) return;
        const int64_t at = row * stride + column;
        dtype == DTYPE_BF16 ? store(static_cast<bf16*>(data) + at, values, n)
                            : store(static_cast<float*>(data) + at, values, n);
    }
    INLINE void put_panel(int64_t row, int64_t panel, const float* values) const {
        put(row, panel * PANEL, load(values));
        put(row, panel * PANEL + LANES, load(values + LANES));
    }
    // silu(gate) * up, of a panel of 16 outputs of each.
    INLINE void put_gated(int64_t row, int64_t panel, const float* values) const {
        put(row, panel * LANES, silu(load(values)) * load(values + LANES));
    }
};

template <class Epilogue>
void multiply_all(Team& team, const Activations& x, int64_t rows, const Matrix& weight, Epilogue epilogue) {
    const Product product(weight, 0, rows, tile_scratch(team, weight, rows));
    team.each(product.tiling.count, [&](int64_t tile) { product.pack(x, 0, tile); });
    const int64_t tiles = product.cached_tiles(), panels = panels_per_item(team, product, product.num_panels);
    const int64_t columns = divide_up(product.num_panels, panels);
    team.each(columns * divide_up(product.tiling.count, tiles), [&](int64_t item) {
        const int64_t panel = item % columns * panels, tile = item / columns * tiles;
        product.multiply(panel, smaller(panel + panels, product.num_panels), tile,
                         smaller(tile + tiles, product.tiling.count), epilogue);
    });
}

// out = x w^T, out.width = w.n
void product(Team& team, const Activations& x, int64_t rows, const Matrix& weight, const Output& out) {
    const size_t mark = team.mark();
    multiply_all(team, x, rows, weight,
                 [&](int64_t row, int64_t panel, const float* values) { out.put_panel(row, panel, values); });
    team.reset(mark);
}

// hidden = silu(x gate^T) * (x up^T), gate and up paired in one matrix, hidden.width = gate_up.n / 2
void gated_product(Team& team, const Activations& x, int64_t rows, const Matrix& gate_up, const Output& hidden) {
    const size_t mark = team.mark();
    multiply_all(team, x, rows, gate_up,
                 [&](int64_t row, int64_t panel, const float* values) { hidden.put_gated(row, panel, values); });
    team.reset(mark);
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
