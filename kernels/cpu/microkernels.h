// The kernels of all formats, found by number.
#pragma once

#include "gemm.h"
#include "quant.h"

namespace {

// A format's kernel behind pointers: what uses it is compiled once for all formats.
struct Microkernel {
    int max_rows;
    int64_t (*row_bytes)(int64_t k);
    void (*pack)(uint8_t* tile, const Activations& x, int64_t first_row, int rows, int64_t k);
    void (*multiply)(int rows, const uint8_t* panel, const uint8_t* tile, int64_t k, float* out);
};

template <class Kernel>
void pack_tile(uint8_t* tile, const Activations& x, int64_t first_row, int rows, int64_t k) {
    x.dtype == DTYPE_BF16 ? Kernel::template pack<bf16>(tile, x, first_row, rows, k)
                          : Kernel::template pack<float>(tile, x, first_row, rows, k);
}

template <class Kernel, int ROWS = Kernel::MAX_ROWS>
INLINE void multiply_up_to(int rows, const uint8_t* panel, const uint8_t* tile, int64_t k, float* out) {
    if (rows == ROWS) return Kernel::template multiply<ROWS>(panel, tile, k, out);
    if constexpr (ROWS > 1) multiply_up_to<Kernel, ROWS - 1>(rows, panel, tile, k, out);
}
template <class Kernel>
void multiply_tile(int rows, const uint8_t* panel, const uint8_t* tile, int64_t k, float* out) {
    multiply_up_to<Kernel>(rows, panel, tile, k, out);
}

template <class Kernel>
constexpr Microkernel behind_pointers() {
    return {Kernel::MAX_ROWS, Kernel::row_bytes, pack_tile<Kernel>, multiply_tile<Kernel>};
}
constexpr Microkernel MICROKERNELS[] = {behind_pointers<F32Kernel>(), behind_pointers<Bf16Kernel>(),
                                        behind_pointers<Int8Kernel>(), behind_pointers<Int4Kernel>(),
                                        behind_pointers<Nvfp4Kernel>()};  // by Format
constexpr int TALLEST_TILE = 16;  // at least every MAX_ROWS

}  // namespace
