// Products of rows of activations with packed weights, out[r][n] = sum over k of x[r][k] w[n][k].
//
// Weights lie in panels of 32 outputs (kernels/formats/packed.py), activations are packed into tiles of a few rows; a
// format's kernel multiplies one tile with one panel, for which it holds tile rows x 32 sums in registers.
//
//             k ->                           A weight is loaded once for all rows of a tile, an activation once for
//          +--------+                        32 outputs. Every sum is one chain over all of k in ascending order:
//    rows  | tile   |   panel: [k] x 32      its bits do not depend on the height of the tile, hence not on the
//          +--------+                        rows beside it. Nothing here splits k.
//
// A format is a struct with what Bf16Kernel has:
//   MAX_ROWS             tallest tile
//   row_bytes(k)         of a row within a tile, a multiple of 64: a tile of n rows takes n times that
//   pack<T>(...)         rows of activations -> a tile
//   multiply<ROWS>(...)  a tile times a panel -> out float [ROWS][32]
// One panel is multiplied at a time, also with one row: two chains of additions keep up with the memory.
#pragma once

#include "abi.h"
#include "team.h"

namespace {

constexpr int PANEL = 32;  // outputs

// Rows of activations in memory. With `order`, row i is row order[i] / slots of x.
struct Activations {
    const void* x;
    int64_t stride;
    int32_t dtype;
    const int64_t* order;
    int64_t slots;

    template <class T>
    INLINE const T* row(int64_t i) const {
        return static_cast<const T*>(x) + (order == nullptr ? i : order[i] / slots) * stride;
    }
};

INLINE bf16 as_bf16(bf16 value) { return value; }
INLINE bf16 as_bf16(float value) { return narrow(value); }

// Fetches what lies some way behind p, the next 128 bytes of a panel, that take CYCLES to multiply. The CPU foresees
// by itself what is read fast; where arithmetic fills its window it would ask too late (Zen 4: 8 rows gain 25 %, 12
// rows 15 %, while 4 rows lose as much; so do bytes, quant.h's). Past the panel lies the next one; past the last, nothing is harmed.
template <int CYCLES>
INLINE void look_ahead(const uint8_t* p) {
    constexpr int64_t DISTANCE = 8192;
    if constexpr (CYCLES >= 12) {
        _mm_prefetch(reinterpret_cast<const char*>(p + DISTANCE), _MM_HINT_T1);
        _mm_prefetch(reinterpret_cast<const char*>(p + DISTANCE + 64), _MM_HINT_T1);
    }
}

// The sums of a tile in registers: two vectors for each row.
template <int ROWS>
struct Sums {
    F32 of[ROWS][2];

    INLINE Sums() {
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r) of[r][0] = of[r][1] = zero();
    }
    INLINE void store_to(float* out) const {
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r) {
            store(out + r * PANEL, of[r][0]);
            store(out + r * PANEL + LANES, of[r][1]);
        }
    }
};

#if CIERZO_AVX512
constexpr int FLOAT_ROWS = 12;  // with their sums, weights and an activation all registers are in use
#else
constexpr int FLOAT_ROWS = 3;
#endif
constexpr int FLOAT_CYCLES = 2;  // of a row and 32 weights, on a CPU that multiplies 16 in a cycle
#if CIERZO_DOT
constexpr int PAIR_CYCLES = 2;
#else
constexpr int PAIR_CYCLES = 4;
#endif

// Rows of 32-bit words become columns: target[i * rows + r] = sources[r][i], i < count.
INLINE void transpose_words(void* target, const void* const* sources, int rows, int64_t count) {
    if (rows == 1) return void(std::memcpy(target, sources[0], size_t(count) * 4));
    uint32_t* out = static_cast<uint32_t*>(target);
    const int64_t whole = rows < 4 ? 0 : count & ~int64_t(3);
    for (int r = 0; r < rows && whole > 0; r += 4) {
        const int first = int(smaller(r, rows - 4));  // the last four may be some of the ones before
        const __m128i* const* row = reinterpret_cast<const __m128i* const*>(sources + first);
        for (int64_t i = 0; i < whole / 4; ++i) {
            const __m128i a = _mm_loadu_si128(row[0] + i), b = _mm_loadu_si128(row[1] + i);
            const __m128i c = _mm_loadu_si128(row[2] + i), d = _mm_loadu_si128(row[3] + i);
            const __m128i ab01 = _mm_unpacklo_epi32(a, b), ab23 = _mm_unpackhi_epi32(a, b);
            const __m128i cd01 = _mm_unpacklo_epi32(c, d), cd23 = _mm_unpackhi_epi32(c, d);
            uint32_t* to = out + 4 * i * rows + first;
            _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_unpacklo_epi64(ab01, cd01));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(to + rows), _mm_unpackhi_epi64(ab01, cd01));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 2 * rows), _mm_unpacklo_epi64(ab23, cd23));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 3 * rows), _mm_unpackhi_epi64(ab23, cd23));
        }
    }
    for (int r = 0; r < rows; ++r) {
        const char* source = static_cast<const char*>(sources[r]);
        for (int64_t i = whole; i < count; ++i) std::memcpy(out + i * rows + r, source + 4 * i, 4);
    }
}

// bf16 weights, panel [k / 2][32][2]; tile [k / 2][rows] pairs. Activations are rounded to bf16. (The dot product
// instruction takes denormal numbers for zero.)
struct Bf16Kernel {
    static constexpr int MAX_ROWS = FLOAT_ROWS;

    static int64_t row_bytes(int64_t k) { return (divide_up(k, 2) * int64_t(sizeof(Pair)) + 63) & ~int64_t(63); }

    template <class T>
    static void pack(uint8_t* tile, const Activations& x, int64_t first_row, int rows, int64_t k) {
        Pair* target = reinterpret_cast<Pair*>(tile);
        const void* sources[MAX_ROWS];
        for (int r = 0; r < rows; ++r) sources[r] = x.row<T>(first_row + r);
        constexpr bool words = sizeof(T) == 2 && sizeof(Pair) == 4;  // two activations are a pair as they lie
        if (words) transpose_words(target, sources, rows, k / 2);
        for (int r = 0; r < rows; ++r) {
            const T* row = static_cast<const T*>(sources[r]);
            for (int64_t i = words ? k / 2 : 0; i < k / 2; ++i)
                target[i * rows + r] = make_pair(as_bf16(row[2 * i]), as_bf16(row[2 * i + 1]));
            if (k & 1) target[k / 2 * rows + r] = make_pair(as_bf16(row[k - 1]), bf16{0});
        }
    }

    template <int ROWS>
    static void multiply(const uint8_t* panel, const uint8_t* tile, int64_t k, float* out) {
        Sums<ROWS> sums;
        const Pair* x = reinterpret_cast<const Pair*>(tile);
        for (int64_t pairs = divide_up(k, 2); pairs > 0; --pairs, panel += 128, x += ROWS) {
            look_ahead<ROWS * PAIR_CYCLES>(panel);
            const Bits w0 = load_bits(panel), w1 = load_bits(panel + 64);
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; ++r) {
                const PairVector both = repeat_pair(x + r);
                sums.of[r][0] = dot_pair(sums.of[r][0], w0, both);
                sums.of[r][1] = dot_pair(sums.of[r][1], w1, both);
            }
        }
        sums.store_to(out);
    }
};

// float32 weights, panel [k][32]; tile [k][rows] floats.
struct F32Kernel {
    static constexpr int MAX_ROWS = FLOAT_ROWS;

    static int64_t row_bytes(int64_t k) { return (k * int64_t(sizeof(float)) + 63) & ~int64_t(63); }

    template <class T>
    static void pack(uint8_t* tile, const Activations& x, int64_t first_row, int rows, int64_t k) {
        float* target = reinterpret_cast<float*>(tile);
        const void* sources[MAX_ROWS];
        for (int r = 0; r < rows; ++r) sources[r] = x.row<T>(first_row + r);
        if (sizeof(T) == 4) return transpose_words(target, sources, rows, k);
        for (int r = 0; r < rows; ++r)
            for (int64_t i = 0; i < k; ++i) target[i * rows + r] = widen(static_cast<const T*>(sources[r])[i]);
    }

    template <int ROWS>
    static void multiply(const uint8_t* panel, const uint8_t* tile, int64_t k, float* out) {
        Sums<ROWS> sums;
        const float* x = reinterpret_cast<const float*>(tile);
        const float* w = reinterpret_cast<const float*>(panel);
        for (; k > 0; --k, w += PANEL, x += ROWS) {
            look_ahead<ROWS * FLOAT_CYCLES>(reinterpret_cast<const uint8_t*>(w));
            const F32 w0 = load(w), w1 = load(w + LANES);
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; ++r) {
                const F32 value = set(x[r]);
                sums.of[r][0] = fma(value, w0, sums.of[r][0]);
                sums.of[r][1] = fma(value, w1, sums.of[r][1]);
            }
        }
        sums.store_to(out);
    }
};

// Rows cut into tiles, as even as possible: 64 rows in tiles of at most 12 are 11, 11, 11, 11, 10, 10.
struct Tiling {
    int64_t rows, count;

    Tiling(int64_t rows, int max_rows) : rows(rows), count(divide_up(rows, max_rows)) {}
    INLINE int64_t start(int64_t tile) const { return tile * (rows / count) + smaller(tile, rows % count); }
    INLINE int height(int64_t tile) const { return int(start(tile + 1) - start(tile)); }
};

}  // namespace
