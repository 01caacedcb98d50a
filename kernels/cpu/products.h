// Several products at once, shared among the team: the row blocks of one matrix, or the experts of a layer.
#pragma once

#include "microkernels.h"

namespace {

// Rows that a panel meets in turn: as many as the second-level cache holds beside it; or, where rows are long, this
// many from the third, lest panels are fetched from memory too often.
constexpr int64_t BLOCK_BYTES = 512 << 10;
constexpr int64_t BLOCK_ROWS = 96;

// How pieces of shared work shrink: each is half of a thread's fair part of what is left, but at least LEAST_COST. A
// long run through memory is faster than several short ones (a start costs the time of 20 KB), and the last pieces
// even out what the threads have left to do.
constexpr int64_t PIECES = 2;
constexpr int64_t LEAST_COST = 512 << 10;  // bytes, or the arithmetic of that time

INLINE int64_t piece_cost(const Team& team, int64_t total, int64_t left) {
    return larger(smaller(divide_up(total, team.size), LEAST_COST), left / (team.size * PIECES));
}

// body(i, begin, end) over all units [0, units(i)) of every i in [0, count), cost(i) each, in pieces of about equal
// cost and in order; then a barrier.
template <class Units, class Cost, class Body>
void share(Team& team, int64_t count, Units units, Cost cost, Body body) {
    const size_t mark = team.mark();
    int64_t* before = team.own_scratch<int64_t>(count + 1);  // the cost of all that stands before i
    before[0] = 0;
    for (int64_t i = 0; i < count; ++i) before[i + 1] = before[i] + units(i) * cost(i);
    const int64_t total = before[count];
    int64_t pieces = 0;
    for (int64_t done = 0; done < total; ++pieces) done += piece_cost(team, total, total - done);

    int64_t i = 0, piece = 0, from = 0;  // pieces come in ascending order
    team.each(pieces, [&](int64_t claimed) {
        for (; piece < claimed; ++piece) from += piece_cost(team, total, total - from);
        const int64_t to = from + piece_cost(team, total, total - from);
        while (before[i + 1] <= from) ++i;
        for (int64_t j = i; j < count && before[j] < to; ++j) {  // a unit is of the piece in which it begins
            const int64_t begin = divide_up(larger(0, from - before[j]), cost(j));
            const int64_t end = smaller(units(j), divide_up(to - before[j], cost(j)));
            if (begin < end) body(j, begin, end);
        }
    });
    team.reset(mark);
}

// Rows times one matrix, or one expert of several.
struct Product {
    const Microkernel* kernel;
    const uint8_t* panels;
    int64_t num_panels, panel_bytes, k;
    uint8_t* tiles;     // of the packed rows
    Tiling tiling;
    int64_t first_row;  // in the activations and in the results
    bool shared;        // for whom it matters: the shared expert's

    Product(const Matrix& w, int64_t expert, uint8_t* tiles, int64_t rows, int64_t first_row, bool shared = false)
        : kernel(&MICROKERNELS[w.format]),
          panels(w.data + expert * w.expert_bytes),
          num_panels(w.paired ? divide_up(w.n / 2, PANEL / 2) : divide_up(w.n, PANEL)),
          panel_bytes(w.expert_bytes / num_panels),
          k(w.k),
          tiles(tiles + first_row * kernel->row_bytes(w.k)),
          tiling(rows, kernel->max_rows),
          first_row(first_row),
          shared(shared) {}

    void pack(const Activations& x, int64_t tile) const {
        const int64_t start = tiling.start(tile);
        kernel->pack(tiles + start * kernel->row_bytes(k), x, first_row + start, tiling.height(tile), k);
    }

    // epilogue(row, panel, values) takes float [32].
    template <class Epilogue>
    void multiply(int64_t first_panel, int64_t end_panel, Epilogue epilogue) const {
        alignas(64) float values[TALLEST_TILE * PANEL];
        for (int64_t panel = first_panel; panel < end_panel; ++panel)
            for (int64_t tile = 0; tile < tiling.count; ++tile) {
                const int64_t start = tiling.start(tile);
                const int rows = tiling.height(tile);
                kernel->multiply(rows, panels + panel * panel_bytes, tiles + start * kernel->row_bytes(k), k, values);
                for (int r = 0; r < rows; ++r) epilogue(first_row + start + r, panel, values + r * PANEL);
            }
    }
};

// Products in the scratch of one thread: every thread makes the same list.
struct Products {
    Product* list;
    int64_t count = 0;

    static int64_t rows_in_block(const Matrix& w) {
        return larger(BLOCK_ROWS, BLOCK_BYTES / MICROKERNELS[w.format].row_bytes(w.k));
    }
    static int64_t blocks(const Matrix& w, int64_t rows) { return divide_up(rows, rows_in_block(w)); }

    // The rows of one matrix or expert, cut into blocks.
    void add(const Matrix& w, int64_t expert, uint8_t* tiles, int64_t rows, int64_t first_row, bool shared = false) {
        const Tiling even(rows, int(rows_in_block(w)));
        for (int64_t block = 0; block < even.count; ++block)
            list[count++] = Product(w, expert, tiles, even.height(block), first_row + even.start(block), shared);
    }

    // row_source(product) gives the activations of its rows.
    template <class RowSource>
    void pack(Team& team, RowSource row_source) const {
        share(
            team, count, [&](int64_t i) { return list[i].tiling.count; },
            [&](int64_t i) { return list[i].kernel->row_bytes(list[i].k) * list[i].kernel->max_rows; },
            [&](int64_t i, int64_t begin, int64_t end) {
                for (int64_t tile = begin; tile < end; ++tile) list[i].pack(row_source(list[i]), tile);
            });
    }

    // epilogue(product, row, panel, values) for every row of every product.
    template <class Epilogue>
    void multiply(Team& team, Epilogue epilogue) const {
        constexpr int64_t ROWS = 8;  // whose arithmetic takes as long as to bring a panel
        share(
            team, count, [&](int64_t i) { return list[i].num_panels; },
            [&](int64_t i) { return list[i].panel_bytes * (ROWS + list[i].tiling.rows) / ROWS; },
            [&](int64_t i, int64_t begin, int64_t end) {
                const Product& product = list[i];
                product.multiply(begin, end, [&](int64_t row, int64_t panel, const float* values) {
                    epilogue(product, row, panel, values);
                });
            });
    }
};

// Space for `rows` packed rows.
uint8_t* tile_scratch(Team& team, const Matrix& w, int64_t rows) {
    return team.scratch<uint8_t>(rows * MICROKERNELS[w.format].row_bytes(w.k));
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

}  // namespace
