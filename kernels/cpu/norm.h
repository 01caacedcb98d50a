// RMS normalisation, with or without the addition to the residual stream before it.
#pragma once

#include "abi.h"
#include "team.h"

namespace {

// sum of squares over 16 lanes, then their tree: one order whatever the rows beside. The row is rounded to T before
// it meets the weight, as in transformers.
template <class T>
void norm_row(const T* x, T* residual, const T* weight, T* out, int64_t width, float eps) {
    F32 squares = zero();
    for (int64_t i = 0; i < width; i += LANES) {
        const int n = int(smaller(LANES, width - i));
        F32 value = load(x + i, n);
        if (residual != nullptr) {
            store(residual + i, value + load(residual + i, n), n);
            value = load(residual + i, n);
        }
        squares = fma(value, value, squares);
    }
    const T* row = residual != nullptr ? residual : x;
    const F32 factor = set(1.0f / __builtin_sqrtf(sum(squares) / float(width) + eps));
    for (int64_t i = 0; i < width; i += LANES) {
        const int n = int(smaller(LANES, width - i));
        store(out + i, load(row + i, n) * factor, n);
        store(out + i, load(out + i, n) * load(weight + i, n), n);
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
