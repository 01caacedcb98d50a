// RMS normalisation, with or without the addition to the residual stream before it.
#pragma once

#include "abi.h"
#include "team.h"

namespace {

// The squares are summed in four vectors, then over these and their lanes as a tree: one order whatever the rows
// beside. The row is rounded to T before it meets the weight, as in transformers. `out` may be `residual` or x.
template <class T>
void norm_row(const T* x, T* residual, const T* weight, T* out, int64_t width, float eps) {
    constexpr int CHAINS = 4;
    F32 squares[CHAINS] = {zero(), zero(), zero(), zero()};
    const auto add = [&](int64_t i, int n, int chain) {
        F32 value = load(x + i, n);
        if (residual != nullptr) {
            value = rounded_to(T{}, value + load(residual + i, n));
            store(residual + i, value, n);
        }
        squares[chain] = fma(value, value, squares[chain]);
    };
    int64_t i = 0;
    for (; i + CHAINS * LANES <= width; i += CHAINS * LANES)
        for (int chain = 0; chain < CHAINS; ++chain) add(i + chain * LANES, LANES, chain);
    for (; i < width; i += LANES) add(i, int(smaller(LANES, width - i)), 0);

    const float total = sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
    const F32 factor = set(1.0f / __builtin_sqrtf(total / float(width) + eps));
    const T* row = residual != nullptr ? residual : x;
    for (i = 0; i < width; i += LANES) {
        const int n = int(smaller(LANES, width - i));
        store(out + i, rounded_to(T{}, load(row + i, n) * factor) * load(weight + i, n), n);
    }
}

template <class T>
void norm_rows(Team& team, const NormArgs& args) {
    constexpr int64_t ROWS = 4;  // per claim
    team.each(divide_up(args.rows, ROWS), [&](int64_t piece) {
        for (int64_t row = piece * ROWS; row < smaller(args.rows, (piece + 1) * ROWS); ++row) {
            T* residual = static_cast<T*>(args.residual);
            norm_row(static_cast<const T*>(args.x) + row * args.x_stride,
                     residual == nullptr ? nullptr : residual + row * args.residual_stride,
                     static_cast<const T*>(args.weight), static_cast<T*>(args.out) + row * args.out_stride,
                     args.width, args.eps);
        }
    });
}

void norm(Team& team, const NormArgs& args) {
    args.dtype == DTYPE_BF16 ? norm_rows<bf16>(team, args) : norm_rows<float>(team, args);
}

}  // namespace
