// linear, lm_head and the gated MLP: one matrix, all rows.
#pragma once

#include "gemm.h"

namespace {

constexpr int64_t TILE_CACHE_BYTES = 256 << 10;   // of the second-level cache, for tiles that a panel meets in turn
constexpr int64_t ITEM_BYTES = 256 << 10;         // of weights, in one claim: a dozen microseconds of memory
constexpr int64_t ITEMS_PER_THREAD = 8;           // or fewer bytes, where a matrix has fewer than that many claims

// One expert's panels.
struct Panels {
    const uint8_t* data;
    int64_t count, bytes, k;

    explicit Panels(const Matrix& w, int64_t expert = 0)
        : data(w.data + expert * w.expert_bytes),
          count(w.paired ? divide_up(w.n / 2, PANEL / 2) : divide_up(w.n, PANEL)),
          bytes(count == 0 ? 0 : w.expert_bytes / count),
          k(w.k) {}
};

// Rows packed for one matrix.
struct Tiles {
    const uint8_t* data;
    Tiling tiling;
};

// out = panels [first_panel, last_panel) times tiles [first_tile, last_tile); epilogue(panel, row, rows, values) takes
// values float [rows][32] of a tile whose first row is `row`.
template <class Kernel, class Epilogue>
void multiply_block(const Panels& w, int64_t first_panel, int64_t last_panel, const Tiles& x, int64_t first_tile,
                    int64_t last_tile, Epilogue epilogue) {
    alignas(64) float values[Kernel::MAX_ROWS * PANEL];
    const int64_t row_bytes = Kernel::row_bytes(w.k);
    const int64_t chunk = larger(1, TILE_CACHE_BYTES / (row_bytes * Kernel::MAX_ROWS));  // tiles
    for (int64_t start = first_tile; start < last_tile; start += chunk) {
        const int64_t end = smaller(start + chunk, last_tile);
        for (int64_t panel = first_panel; panel < last_panel; ++panel) {
            const uint8_t* weights = w.data + panel * w.bytes;
            for (int64_t tile = start; tile < end; ++tile) {
                const int64_t row = x.tiling.start(tile);
                const int rows = x.tiling.height(tile);
                multiply<Kernel>(rows, weights, x.data + row * row_bytes, w.k, values);
                epilogue(panel, row, rows, values);
            }
        }
    }
}

// Packs all rows for a matrix with inner width k; the tiles lie in the team's scratch.
template <class Kernel>
Tiles pack_tiles(Team& team, const Activations& x, int64_t rows, int64_t k) {
    const Tiling tiling(rows, Kernel::MAX_ROWS);
    uint8_t* tiles = team.scratch<uint8_t>(rows * Kernel::row_bytes(k));
    team.each(tiling.count, [&](int64_t tile) {
        pack_tile<Kernel>(tiles, x, tiling.start(tile), tiling.height(tile), k);
    });
    return {tiles, tiling};
}

// Claims of about ITEM_BYTES of panels, times rows that fit the cache.
template <class Kernel, class Epilogue>
void multiply_all(Team& team, const Panels& w, const Tiles& x, Epilogue epilogue) {
    const int64_t wanted = smaller(ITEM_BYTES, w.count * w.bytes / (team.size * ITEMS_PER_THREAD));
    const int64_t panels = larger(1, wanted / w.bytes);
    const int64_t tiles = larger(1, TILE_CACHE_BYTES / (Kernel::row_bytes(w.k) * Kernel::MAX_ROWS));
    const int64_t panel_items = divide_up(w.count, panels), tile_items = divide_up(x.tiling.count, tiles);
    team.each(panel_items * tile_items, [&](int64_t item) {
        const int64_t panel = item % panel_items * panels, tile = item / panel_items * tiles;
        multiply_block<Kernel>(w, panel, smaller(panel + panels, w.count), x, tile,
                               smaller(tile + tiles, x.tiling.count), epilogue);
    });
}

// Where results go, in either dtype.
struct Output {
    void* data;
    int64_t stride;
    int32_t dtype;

    INLINE void put(int64_t row, int64_t column, F32 values, int64_t columns) const {
        const int n = int(smaller(LANES, columns - column));
        if (n <= 0) return;
        const int64_t at = row * stride + column;
        dtype == DTYPE_BF16 ? store(static_cast<bf16*>(data) + at, values, n)
                            : store(static_cast<float*>(data) + at, values, n);
    }
};

// out = x w^T.
void product(Team& team, const Activations& x, int64_t rows, const Matrix& weight, const Output& out) {
    with_kernel(weight, [&](auto kernel) {
        using Kernel = decltype(kernel);
        const Panels w(weight);
        const Tiles tiles = pack_tiles<Kernel>(team, x, rows, weight.k);
        multiply_all<Kernel>(team, w, tiles, [&](int64_t panel, int64_t row, int height, const float* values) {
            for (int r = 0; r < height; ++r)
                for (int half = 0; half < 2; ++half)
                    out.put(row + r, panel * PANEL + half * LANES, load(values + r * PANEL + half * LANES), weight.n);
        });
    });
}

// hidden = silu(x gate^T) * (x up^T), rounded to hidden's dtype; `weight` is paired.
void gated_product(Team& team, const Activations& x, int64_t rows, const Matrix& weight, const Output& hidden) {
    with_kernel(weight, [&](auto kernel) {
        using Kernel = decltype(kernel);
        const Panels w(weight);
        const Tiles tiles = pack_tiles<Kernel>(team, x, rows, weight.k);
        multiply_all<Kernel>(team, w, tiles, [&](int64_t panel, int64_t row, int height, const float* values) {
            for (int r = 0; r < height; ++r) {
                const float* both = values + r * PANEL;
                hidden.put(row + r, panel * LANES, silu(load(both)) * load(both + LANES), weight.n / 2);
            }
        });
    });
}

void linear(Team& team, const LinearArgs& args) {
    const size_t mark = team.mark();
    product(team, {args.x, args.x_stride, args.dtype, nullptr, 1}, args.rows, *args.weight,
            {args.out, args.out_stride, args.out_dtype});
    team.reset(mark);
}

void gated_mlp(Team& team, const GatedMlpArgs& args) {
    const size_t mark = team.mark();
    const int64_t width = args.down->k;
    float* hidden = team.scratch<float>(args.rows * width);
    gated_product(team, {args.x, args.x_stride, args.dtype, nullptr, 1}, args.rows, *args.gate_up,
                  {hidden, width, args.dtype});
    product(team, {hidden, width, args.dtype, nullptr, 1}, args.rows, *args.down,
            {args.out, args.out_stride, args.dtype});
    team.reset(mark);
}

}  // namespace
