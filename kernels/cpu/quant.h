// Products with quantised weights. A row's activations are quantised too, group of k by group, to signed bytes and a
// float scale; unsigned weights times signed activations are summed exactly, in int32, and each group's sum is scaled
// and added to the output's, in the order of k.
//
//     out = sum over groups g of  scale_w[g] scale_x[g] (sum over k in g of (code_w[k] - offset) code_x[k])
//
// The offset (128 in int8, 12 in nvfp4) costs nothing: sums start at -offset * (sum of the group's code_x). int4 has a
// minimum instead, which adds minimum[g] * (scale_x[g] * sum of code_x). int8's groups are rotated (formats/int8.py).
// A NaN or an infinity among a group's activations makes its scale NaN, hence the outputs of that row, and no other's.
#pragma once

#include "gemm.h"

namespace {

// x + swapped where a lane's number lacks the bit `distance`, swapped - x where it has it.
template <int DISTANCE>
INLINE F32 butterfly(F32 x) {
    alignas(64) float signs[LANES];
    for (int i = 0; i < LANES; ++i) signs[i] = i & DISTANCE ? -1.0f : 1.0f;
    return fma(x, load(signs), swap_at<DISTANCE>(x));
}

// H x over 64 values.
INLINE void rotate(F32 (&x)[4]) {
    for (F32& v : x) v = butterfly<8>(butterfly<4>(butterfly<2>(butterfly<1>(v))));
    const F32 a = x[0] + x[1], b = x[0] - x[1], c = x[2] + x[3], d = x[2] - x[3];
    x[0] = a + c;
    x[1] = b + d;
    x[2] = a - c;
    x[3] = b - d;
}
INLINE void rotate(F32 (&)[2]) {}

#if CIERZO_AVX512
constexpr int BYTE_ROWS = 8, NIBBLE_ROWS = 8, E2M1_ROWS = 6;  // tallest tiles: as measured
#else
constexpr int BYTE_ROWS = 4, NIBBLE_ROWS = 4, E2M1_ROWS = 4;
#endif
constexpr int MOST_ROWS = 8;

// How a format takes activations: in groups of GROUP, of which each GROUP / SUMS have a sum, and what sums start from.
struct Int8Rows {
    static constexpr int GROUP = 64, SUMS = 1;
    static constexpr bool ROTATED = true;
    using Start = int32_t;
    static INLINE Start start(float, float total) { return -128 * int32_t(total); }
};
struct Int4Rows {
    static constexpr int GROUP = 32, SUMS = 1;
    static constexpr bool ROTATED = false;
    using Start = float;  // what the minimum is multiplied with
    static INLINE Start start(float scale, float total) { return scale * total; }
};
struct Nvfp4Rows {
    static constexpr int GROUP = 32, SUMS = 2;
    static constexpr bool ROTATED = false;
    using Start = int32_t;
    static INLINE Start start(float, float total) { return -12 * int32_t(total); }
};

// Activations of one row in one group.
template <class Rows>
struct QuantisedGroup {
    static constexpr int VECTORS = Rows::GROUP / LANES, SHARE = VECTORS / Rows::SUMS;
    alignas(16) int8_t codes[Rows::GROUP];
    float totals[Rows::SUMS];  // of codes
    float scale;

    template <class T>
    INLINE void quantise(const T* x, int64_t count) {
        F32 values[VECTORS];
        for (int v = 0; v < VECTORS; ++v) {
            const int64_t left = count - v * LANES;
            values[v] = left >= LANES ? load(x + v * LANES) : left > 0 ? load(x + v * LANES, int(left)) : zero();
            if (Rows::ROTATED) values[v] = values[v] * set(1.0f / 64);  // now no sum of 64 overflows
        }
        if (Rows::ROTATED) rotate(values);
        F32 highest = values[0], lowest = values[0];
        for (int v = 1; v < VECTORS; ++v) {
            highest = max(highest, values[v]);
            lowest = min(lowest, values[v]);
        }
        const float most = peak(max(highest, zero() - lowest));
        const float factor = most < 0x1p-115f ? 0.0f : 127.0f / most;
        scale = most < 0x1p-115f ? 0.0f : most * ((Rows::ROTATED ? 8.0f : 1.0f) / 127.0f);
        bool finite = true;
        for (int s = 0; s < Rows::SUMS; ++s) {
            F32 total = zero();
            for (int v = s * SHARE; v < (s + 1) * SHARE; ++v) {
                const F32 rounded = round(values[v] * set(factor));
                total = total + rounded;
                _mm_store_si128(reinterpret_cast<__m128i*>(codes) + v, to_bytes(to_int(rounded)));
            }
            totals[s] = sum(total);
            finite &= totals[s] == totals[s];
        }
        if (finite) return;
        scale = __builtin_nanf("");
        for (float& total : totals) total = 0.0f;
    }
};

// Tiles of quantised activations. A group: [GROUP / 4][rows] words of 4 codes, [rows] scales, [SUMS][rows] starts.
template <class Rows>
struct QuantisedTile {
    static constexpr int GROUP = Rows::GROUP, ROW_BYTES = GROUP + 4 + 4 * Rows::SUMS;  // of a group

    static int64_t row_bytes(int64_t k) { return (divide_up(k, GROUP) * ROW_BYTES + 63) & ~int64_t(63); }

    template <class T>
    static void pack(uint8_t* tile, const Activations& x, int64_t first_row, int rows, int64_t k) {
        QuantisedGroup<Rows> groups[MOST_ROWS];
        const void* codes[MOST_ROWS];
        const T* sources[MOST_ROWS];
        for (int r = 0; r < rows; ++r) {
            codes[r] = groups[r].codes;
            sources[r] = x.row<T>(first_row + r);
        }
        for (int64_t first = 0; first < k; first += GROUP, tile += rows * ROW_BYTES) {
            const Group target(tile, rows);
            for (int r = 0; r < rows; ++r) {
                groups[r].quantise(sources[r] + first, k - first);
                target.scales[r] = groups[r].scale;
                for (int s = 0; s < Rows::SUMS; ++s)
                    target.starts[s * rows + r] = Rows::start(groups[r].scale, groups[r].totals[s]);
            }
            transpose_words(target.words, codes, rows, GROUP / 4);
        }
    }

    struct Group {
        int32_t* words;
        float* scales;
        typename Rows::Start* starts;

        INLINE Group(const uint8_t* tile, int rows)
            : words(reinterpret_cast<int32_t*>(const_cast<uint8_t*>(tile))),
              scales(reinterpret_cast<float*>(words + GROUP / 4 * rows)),
              starts(reinterpret_cast<typename Rows::Start*>(scales + rows)) {}
    };
};

// Sums of a tile within a group of k.
template <int ROWS>
struct GroupSums {
    Int32 of[ROWS][2];

    INLINE explicit GroupSums(const int32_t* starts) {
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r) of[r][0] = of[r][1] = repeat_int(starts[r]);
    }
    INLINE GroupSums() {
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r) of[r][0] = of[r][1] = repeat_int(0);
    }

    // Adds the products of 4 k: weights of 32 outputs times a word of each row.
    INLINE void add(Bits w0, Bits w1, const int32_t* words) {
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r) {
            const Bits x = repeat(words[r]);
            of[r][0] = dot_bytes(of[r][0], w0, x);
            of[r][1] = dot_bytes(of[r][1], w1, x);
        }
    }
    INLINE void scale_into(Sums<ROWS>& sums, F32 scale0, F32 scale1, const float* scales) const {
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r) {
            const F32 x = set(scales[r]);
            sums.of[r][0] = fma(to_f32(of[r][0]), scale0 * x, sums.of[r][0]);
            sums.of[r][1] = fma(to_f32(of[r][1]), scale1 * x, sums.of[r][1]);
        }
    }
};

struct Int8Kernel : QuantisedTile<Int8Rows> {
    static constexpr int MAX_ROWS = BYTE_ROWS;

    template <int ROWS>
    static void multiply(const uint8_t* panel, const uint8_t* tile, int64_t k, float* out) {
        Sums<ROWS> sums;
        for (int64_t groups = divide_up(k, 64); groups > 0; --groups, panel += 2112, tile += ROWS * ROW_BYTES) {
            const Group x(tile, ROWS);
            GroupSums<ROWS> group(x.starts);
#pragma GCC unroll 1
            for (int i = 0; i < 16; ++i)
                group.add(load_bits(panel + i * 128), load_bits(panel + i * 128 + 64), x.words + i * ROWS);
            const uint16_t* scales = reinterpret_cast<const uint16_t*>(panel + 2048);
            group.scale_into(sums, load_half(scales), load_half(scales + LANES), x.scales);
        }
        sums.store_to(out);
    }
};

// Weights of 32 outputs and 8 k, a nibble each: the first 4 k in `low`, the others in `high`.
struct Octet {
    Bits low0, high0, low1, high1;

    INLINE explicit Octet(const uint8_t* bytes) {
        const Bits w0 = load_bits(bytes), w1 = load_bits(bytes + 64), mask = repeat(0x0f0f0f0f);
        low0 = w0 & mask;
        high0 = shift_right(w0, 4) & mask;
        low1 = w1 & mask;
        high1 = shift_right(w1, 4) & mask;
    }
};

struct Int4Kernel : QuantisedTile<Int4Rows> {
    static constexpr int MAX_ROWS = NIBBLE_ROWS;

    template <int ROWS>
    static void multiply(const uint8_t* panel, const uint8_t* tile, int64_t k, float* out) {
        Sums<ROWS> sums;
        for (int64_t groups = divide_up(k, 32); groups > 0; --groups, panel += 640, tile += ROWS * ROW_BYTES) {
            const Group x(tile, ROWS);
            GroupSums<ROWS> group;
#pragma GCC unroll 1
            for (int i = 0; i < 4; ++i) {
                const Octet w(panel + i * 128);
                group.add(w.low0, w.low1, x.words + 2 * i * ROWS);
                group.add(w.high0, w.high1, x.words + (2 * i + 1) * ROWS);
            }
            const uint16_t* ends = reinterpret_cast<const uint16_t*>(panel + 512);
            group.scale_into(sums, load_half(ends), load_half(ends + LANES), x.scales);
            const F32 minimum0 = load_half(ends + 2 * LANES), minimum1 = load_half(ends + 3 * LANES);
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; ++r) {
                const F32 total = set(x.starts[r]);
                sums.of[r][0] = fma(minimum0, total, sums.of[r][0]);
                sums.of[r][1] = fma(minimum1, total, sums.of[r][1]);
            }
        }
        sums.store_to(out);
    }
};

// Codes become twice their value plus 12, as bytes; load_e4m3 leaves out a factor of 2^8. Both are made good in the
// global scale, by which a row's sums are multiplied at the end.
struct Nvfp4Kernel : QuantisedTile<Nvfp4Rows> {
    static constexpr int MAX_ROWS = E2M1_ROWS;

    template <int ROWS>
    static void multiply(const uint8_t* panel, const uint8_t* tile, int64_t k, float* out) {
        static constexpr uint8_t VALUES[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
        const Bits table = load_table(VALUES);
        const float* whole = reinterpret_cast<const float*>(panel);
        panel += 128;
        Sums<ROWS> sums;
        for (int64_t groups = divide_up(k, 32); groups > 0; --groups, panel += 576, tile += ROWS * ROW_BYTES) {
            const Group x(tile, ROWS);
            for (int half = 0; half < 2; ++half) {
                GroupSums<ROWS> group(x.starts + half * ROWS);
#pragma GCC unroll 1
                for (int i = 2 * half; i < 2 * half + 2; ++i) {
                    const Octet w(panel + i * 128);
                    group.add(look_up(table, w.low0), look_up(table, w.low1), x.words + 2 * i * ROWS);
                    group.add(look_up(table, w.high0), look_up(table, w.high1), x.words + (2 * i + 1) * ROWS);
                }
                const uint8_t* scales = panel + 512 + half * PANEL;
                group.scale_into(sums, load_e4m3(scales), load_e4m3(scales + LANES), x.scales);
            }
        }
        const F32 unit = set(0.5f * 256), whole0 = load(whole) * unit, whole1 = load(whole + LANES) * unit;
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r) {
            sums.of[r][0] = sums.of[r][0] * whole0;
            sums.of[r][1] = sums.of[r][1] * whole1;
        }
        sums.store_to(out);
    }
};

}  // namespace
