// Products with quantised weights. The activations of a row are quantised too, group of k by group, to signed bytes and
// a float scale; unsigned weights times signed activations are summed exactly, in int32, and each group's sum is scaled
// and added to the output's, in the order of k.
//
//     out = sum over groups g of  scale_w[g] scale_x[g] (sum over k in g of (code_w[k] - offset) code_x[k])
//
// The offset (128 in int8, 12 in nvfp4) costs nothing: sums start at -offset * (sum of the group's code_x). int4 has a
// minimum instead, which adds minimum[g] * (scale_x[g] * sum of code_x).
// A NaN or an infinity among a group's activations makes its scale NaN, hence the outputs of that row, and no other's.
#pragma once

#include "gemm.h"

namespace {

// Activations of one row in one group.
template <int GROUP, int SUMS>
struct QuantisedGroup {
    alignas(16) int8_t codes[GROUP];
    float totals[SUMS];  // of the codes of each GROUP / SUMS
    float scale;

    template <class T>
    INLINE QuantisedGroup(const T* x, int64_t count) {
        constexpr int VECTORS = GROUP / LANES;
        F32 values[VECTORS], largest = zero();
        for (int v = 0; v < VECTORS; ++v) {
            const int64_t left = count - v * LANES;
            values[v] = left >= LANES ? load(x + v * LANES) : left > 0 ? load(x + v * LANES, int(left)) : zero();
            largest = max(max(values[v], zero() - values[v]), largest);
        }
        const float most = peak(largest);
        const F32 factor = set(most < 0x1p-100f ? 0.0f : 127.0f / most);
        scale = most < 0x1p-100f ? 0.0f : most / 127.0f;
        bool finite = true;
        for (int s = 0; s < SUMS; ++s) {
            F32 total = zero();
            for (int v = s * VECTORS / SUMS; v < (s + 1) * VECTORS / SUMS; ++v) {
                const F32 rounded = round(values[v] * factor);
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

// Tiles of quantised activations. A group: [GROUP / 4][rows] words of 4 codes, [rows] float scales, and what
// Start::of(scale, total) makes of each total, [SUMS][rows].
template <int GROUP, int SUMS, class Start>
struct QuantisedTile {
    using Word = typename Start::Type;
    static constexpr int ROW_BYTES = GROUP + 4 + 4 * SUMS;  // of a group

    static int64_t row_bytes(int64_t k) { return (divide_up(k, GROUP) * ROW_BYTES + 63) & ~int64_t(63); }

    template <class T>
    static void pack(uint8_t* tile, const Activations& x, int64_t first_row, int rows, int64_t k) {
        for (int r = 0; r < rows; ++r) {
            const T* row = x.row<T>(first_row + r);
            for (int64_t g = 0; g < divide_up(k, GROUP); ++g) {
                const QuantisedGroup<GROUP, SUMS> group(row + g * GROUP, k - g * GROUP);
                const Group target(tile + g * rows * ROW_BYTES, rows);
                for (int i = 0; i < GROUP / 4; ++i) std::memcpy(&target.words[i * rows + r], group.codes + 4 * i, 4);
                target.scales[r] = group.scale;
                for (int s = 0; s < SUMS; ++s) target.starts[s * rows + r] = Start::of(group.scale, group.totals[s]);
            }
        }
    }

    struct Group {
        int32_t* words;
        float* scales;
        Word* starts;

        INLINE Group(const uint8_t* tile, int rows)
            : words(reinterpret_cast<int32_t*>(const_cast<uint8_t*>(tile))),
              scales(reinterpret_cast<float*>(words + GROUP / 4 * rows)),
              starts(reinterpret_cast<Word*>(scales + rows)) {}
    };
};

template <int OFFSET>
struct OffsetStart {
    using Type = int32_t;
    static INLINE int32_t of(float, float total) { return -OFFSET * int32_t(total); }
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

#if CIERZO_AVX512
constexpr int BYTE_ROWS = 8, NIBBLE_ROWS = 8, E2M1_ROWS = 6;  // tallest tiles: as measured
#else
constexpr int BYTE_ROWS = 4, NIBBLE_ROWS = 4, E2M1_ROWS = 4;
#endif

struct Int8Kernel : QuantisedTile<32, 1, OffsetStart<128>> {
    static constexpr int MAX_ROWS = BYTE_ROWS;

    template <int ROWS>
    static void multiply(const uint8_t* panel, const uint8_t* tile, int64_t k, float* out) {
        Sums<ROWS> sums;
        for (int64_t groups = divide_up(k, 32); groups > 0; --groups, panel += 1088, tile += ROWS * ROW_BYTES) {
            const Group x(tile, ROWS);
            GroupSums<ROWS> group(x.starts);
#pragma GCC unroll 1
            for (int i = 0; i < 8; ++i)
                group.add(load_bits(panel + i * 128), load_bits(panel + i * 128 + 64), x.words + i * ROWS);
            const uint16_t* scales = reinterpret_cast<const uint16_t*>(panel + 1024);
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

struct MinimumStart {
    using Type = float;
    static INLINE float of(float scale, float total) { return scale * total; }
};

struct Int4Kernel : QuantisedTile<32, 1, MinimumStart> {
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
struct Nvfp4Kernel : QuantisedTile<32, 2, OffsetStart<12>> {
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
