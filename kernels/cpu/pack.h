// Weights into packed matrices. kernels/formats/packed.py draws the layouts, the file of each format beside it defines
// the numbers; the bytes are the same in all instruction sets, for packed files travel between machines.
//
// One item of work is a panel: its 32 rows are found in the source, a group of k at a time becomes floats with the
// outputs in lanes, and these are encoded.
#pragma once

#include "abi.h"
#include "gemm.h"
#include "team.h"

namespace {

constexpr int OCTETS_BYTES = 512;  // int4 and nvfp4: codes of 32 k of a panel

INLINE F32 magnitude(F32 a) { return max(a, zero() - a); }
INLINE F32 inverse(F32 scale) { return where_less(zero(), scale, set(1.0f) / scale, zero()); }  // 0 of 0

// A panel's rows in the source, one for each output; negative: past the last.
template <class T>
struct PanelRows {
    const T* source;
    int64_t place[PANEL];
    int64_t k, row_stride, column_stride;
    bool padded = false;

    PanelRows(const PackArgs& args, int64_t expert, int64_t panel)
        : source(static_cast<const T*>(args.source) + expert * args.expert_stride), k(args.k),
          row_stride(args.row_stride), column_stride(args.column_stride) {
        const int64_t height = args.paired ? PANEL / 2 : PANEL, section = args.paired ? args.n / 2 : args.n;
        for (int64_t o = 0; o < PANEL; ++o) {
            const int64_t at = panel * height + o % height;
            place[o] = at < section ? o / height * section + at : -1;
            padded |= at >= section;
        }
    }

    INLINE T weight(int o, int64_t i) const { return source[place[o] * row_stride + i * column_stride]; }

    // put(k - first, output, value) for each weight with first <= k < last, in the order of memory.
    template <class Put>
    INLINE void each(int64_t first, int64_t last, Put put) const {
        if (row_stride == 1 && column_stride != 1) {
            for (int64_t i = first; i < last; ++i)
                for (int o = 0; o < PANEL; ++o)
                    if (place[o] >= 0) put(i - first, o, weight(o, i));
            return;
        }
        for (int o = 0; o < PANEL; ++o) {
            if (place[o] < 0) continue;
            const T* row = source + place[o] * row_stride;
            if (column_stride == 1)
                for (int64_t i = first; i < last; ++i) put(i - first, o, row[i]);
            else
                for (int64_t i = first; i < last; ++i) put(i - first, o, row[i * column_stride]);
        }
    }
};

// A group of a panel's weights as floats, outputs in lanes.
template <int GROUP>
struct Tile {
    alignas(64) float at[GROUP][PANEL];

    // False: there is one that is not within +-limit.
    template <class T>
    bool read(const PanelRows<T>& rows, int64_t first, float limit, bool repeat_last) {
        const int64_t count = smaller(GROUP, rows.k - first);
        if (rows.padded || count < GROUP) std::memset(at, 0, sizeof at);
        bool within = true;
        rows.each(first, first + count, [&](int64_t i, int o, T value) {
            at[i][o] = widen(value);
            within &= __builtin_fabsf(at[i][o]) <= limit;
        });
        for (int64_t i = count; repeat_last && i < GROUP; ++i) std::memcpy(at[i], at[count - 1], sizeof at[i]);
        return within;
    }
    INLINE F32 lanes(int k, int half) const { return load(at[k] + half * LANES); }
    INLINE F32 largest(int half, int first = 0, int last = GROUP) const {  // of magnitudes
        F32 best = zero();
        for (int i = first; i < last; ++i) best = max(magnitude(lanes(i, half)), best);
        return best;
    }
};

// float32 and bf16: [k][32] or [k / 2][32][2] elements.
template <class T>
void pack_plain(const PanelRows<T>& rows, uint8_t* target, int64_t bytes, int32_t format) {
    constexpr int64_t CHUNK = 128;  // of k, so that the lines being written stay in the first-level cache
    if (rows.padded || rows.k % 2 != 0) std::memset(target, 0, size_t(bytes));
    for (int64_t first = 0; first < rows.k; first += CHUNK) {
        const int64_t last = smaller(first + CHUNK, rows.k);
        float* wide = reinterpret_cast<float*>(target) + first * PANEL;
        bf16* pairs = reinterpret_cast<bf16*>(target) + first * PANEL;
        if (format == FORMAT_F32)
            rows.each(first, last, [=](int64_t i, int o, T value) { wide[i * PANEL + o] = widen(value); });
        else
            rows.each(first, last, [=](int64_t i, int o, T value) {
                pairs[i / 2 * 2 * PANEL + 2 * o + i % 2] = as_bf16(value);
            });
    }
}

// What a quantised format's packer has: begin() writes what stands before a panel's first group, encode() a group.
struct Int8Packer {
    static constexpr int GROUP = 64, BYTES = GROUP * PANEL + 2 * PANEL, HEADER_BYTES = 0;
    static constexpr float LARGEST = 127 * 65504.0f / 8;
    static constexpr bool REPEAT_LAST = false;

    template <class T>
    static void begin(const PanelRows<T>&, uint8_t*) {}

    // The smallest half not below largest / 127.03: no code is beyond 127.
    static void scales(const Tile<GROUP>& tile, int half, uint16_t* target) {
        alignas(64) float exact[LANES], rounded[LANES];
        const F32 scale = tile.largest(half) / set(127.03125f);
        store(exact, scale);
        store(rounded, round_to_half(scale));
        store_half(target, scale);
        for (int i = 0; i < LANES; ++i) target[i] = uint16_t(target[i] + (rounded[i] < exact[i]));
    }

    // Of each output's 64 weights, in the order of sums of rotate() in int8.py.
    static void rotate(Tile<GROUP>& tile) {
        for (int distance = 1; distance < GROUP; distance *= 2)
            for (int i = 0; i < GROUP; ++i)
                for (int o = 0; (i & distance) == 0 && o < PANEL; o += LANES) {
                    float* first = tile.at[i] + o;
                    float* second = tile.at[i + distance] + o;
                    const F32 a = load(first), b = load(second);
                    store(first, a + b);
                    store(second, a - b);
                }
        for (auto& row : tile.at)
            for (int o = 0; o < PANEL; o += LANES) store(row + o, load(row + o) * set(0.125f));
    }

    static void encode(Tile<GROUP>& tile, const uint8_t*, uint8_t* target) {
        rotate(tile);
        for (int half = 0; half < 2; ++half) {
            uint16_t* scale = reinterpret_cast<uint16_t*>(target + GROUP * PANEL) + half * LANES;
            scales(tile, half, scale);
            const F32 factor = inverse(load_half(scale));
            for (int i = 0; i < GROUP; i += 4) {
                Bits word = zero_bits();
                for (int b = 0; b < 4; ++b) {
                    const F32 code = round(tile.lanes(i + b, half) * factor) + set(128.0f);
                    word = word | shift_left(to_int(code), 8 * b);
                }
                store_bits(target + i * PANEL + half * 64, word);
            }
        }
    }
};

// codes(k) -> 16 int32 below 16, of outputs half * 16 ..; see packed.py for the order of nibbles.
template <class Codes>
INLINE void store_octets(uint8_t* target, int half, Codes codes) {
    for (int octet = 0; octet < 4; ++octet) {
        Bits word = zero_bits();
        for (int b = 0; b < 4; ++b)
            word = word | shift_left(codes(8 * octet + b) | shift_left(codes(8 * octet + 4 + b), 4), 8 * b);
        store_bits(target + octet * 128 + half * 64, word);
    }
}

// Chooses the grids of 16 outputs as int4.py describes, with its order of candidates and of sums.
class GridSearch {
   public:
    static constexpr int GROUP = 32, STEPS = 15;

    GridSearch(const Tile<GROUP>& tile, int half) : tile_(tile), half_(half) {
        F32 highest = lowest_ = weight(0);
        for (int i = 1; i < GROUP; ++i) {
            lowest_ = min(lowest_, weight(i));
            highest = max(highest, weight(i));
        }
        spread_ = highest - lowest_;
        for (int steps = STEPS; steps > 0; --steps) consider_exact(steps);
        for (float low = 0; low <= 1; low += 0.5f)
            for (float high = 0; high <= 1; high += 0.5f) {
                const F32 step = spread_ / set(STEPS + low + high);
                consider(step, lowest_ + set(low) * step, error_);
            }
        for (int i = 0; i < 2; ++i) refine();
    }

    F32 scale() const { return scale_; }
    F32 minimum() const { return minimum_; }
    INLINE F32 code(int k) const { return nearest(weight(k), inverse(scale_), minimum_); }

   private:
    INLINE F32 weight(int k) const { return tile_.lanes(k, half_); }
    static INLINE F32 nearest(F32 weight, F32 factor, F32 start) {
        return min(set(float(STEPS)), max(zero(), round((weight - start) * factor)));
    }

    // Grids of `steps` from the smallest to the largest weight, where they hold all weights exactly.
    void consider_exact(int steps) {
        const F32 step = round_to_half(spread_ / set(float(steps))), factor = inverse(step);
        F32 limit = set(0x1p-126f);
        for (int i = 0; i < GROUP; ++i) {
            const F32 place = (weight(i) - lowest_) * factor;
            limit = where_less(set(1.0f / 64), magnitude(place - round(place)), zero(), limit);
            if (i % 4 == 1 && !any_less(zero(), limit)) return;
        }
        for (int below = 0; below <= STEPS - steps; ++below)
            consider(step, lowest_ - set(float(below)) * step, min(error_, limit));
    }

    // Takes this grid where its error is less than the limit.
    void consider(F32 step, F32 start, F32 limit) {
        step = where_less(zero(), spread_, max(round_to_half(step), set(0x1p-24f)), zero());
        start = round_to_half(start) + zero();  // no -0
        const F32 factor = inverse(step);
        F32 total = zero();
        for (int i = 0; i < GROUP; ++i) {
            const F32 off = nearest(weight(i), factor, start) * step + start - weight(i);
            total = total + off * off;
        }
        scale_ = where_less(total, limit, step, scale_);
        minimum_ = where_less(total, limit, start, minimum_);
        error_ = where_less(total, limit, total, error_);
    }

    // Least squares for the codes of the best grid so far.
    void refine() {
        F32 codes = zero(), squares = zero(), weights = zero(), products = zero();
        const F32 factor = inverse(scale_), count = set(float(GROUP));
        for (int i = 0; i < GROUP; ++i) {
            const F32 c = nearest(weight(i), factor, minimum_);
            codes = codes + c;
            squares = squares + c * c;
            weights = weights + weight(i);
            products = products + weight(i) * c;
        }
        const F32 determinant = max(count * squares - codes * codes, set(1.0f));
        const F32 step = (count * products - codes * weights) / determinant;
        consider(step, (weights - step * codes) * set(1.0f / GROUP), error_);
    }

    const Tile<GROUP>& tile_;
    const int half_;
    F32 lowest_, spread_;
    F32 error_ = set(__builtin_inff()), scale_ = zero(), minimum_ = zero();
};

struct Int4Packer {
    static constexpr int GROUP = 32, BYTES = OCTETS_BYTES + 4 * PANEL, HEADER_BYTES = 0;
    static constexpr float LARGEST = 65504.0f;
    static constexpr bool REPEAT_LAST = true;

    template <class T>
    static void begin(const PanelRows<T>&, uint8_t*) {}

    static void encode(const Tile<GROUP>& tile, const uint8_t*, uint8_t* target) {
        uint16_t* ends = reinterpret_cast<uint16_t*>(target + OCTETS_BYTES);
        for (int half = 0; half < 2; ++half) {
            const GridSearch grid(tile, half);
            store_half(ends + half * LANES, grid.scale());
            store_half(ends + PANEL + half * LANES, grid.minimum());
            store_octets(target, half, [&](int k) { return to_int(grid.code(k)); });
        }
    }
};

INLINE uint8_t to_e4m3(float value) {  // 0 .. 448, to nearest even
    if (value < 0x1p-6f) return uint8_t((value + 0x1.8p14f) * 512.0f - 0x1.8p23f);  // multiples of 2^-9
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return uint8_t(((bits + 0x7ffff + (bits >> 20 & 1)) >> 20) - (120 << 3));
}

INLINE float from_e4m3(uint8_t code) {  // of a positive number
    if (code < 8) return float(code) * 0x1p-9f;
    const uint32_t bits = (uint32_t(code) << 20) + (120u << 23);
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

struct Nvfp4Packer {
    static constexpr int GROUP = 32, BYTES = OCTETS_BYTES + 2 * PANEL, HEADER_BYTES = 4 * PANEL;
    static constexpr float LARGEST = 0x1p127f;
    static constexpr bool REPEAT_LAST = false;

    // A row's global scale makes its largest weight 6 x 448: the largest code times the largest scale.
    template <class T>
    static void begin(const PanelRows<T>& rows, uint8_t* panel) {
        float* target = reinterpret_cast<float*>(panel);
        for (int o = 0; o < PANEL; ++o) target[o] = 0.0f;
        rows.each(0, rows.k, [=](int64_t, int o, T value) {
            const float size = __builtin_fabsf(widen(value));
            target[o] = size > target[o] ? size : target[o];
        });
        for (int o = 0; o < PANEL; ++o) target[o] = target[o] >= 0x1p-100f ? target[o] / (6.0f * 448.0f) : 1.0f;
    }

    static void encode(const Tile<GROUP>& tile, const uint8_t* panel, uint8_t* target) {
        for (int half = 0; half < 2; ++half) {
            const F32 whole = load(reinterpret_cast<const float*>(panel) + half * LANES);
            F32 factor[2];
            for (int group = 0; group < 2; ++group) {
                uint8_t* scale = target + OCTETS_BYTES + group * PANEL + half * LANES;
                alignas(64) float exact[LANES];
                const F32 peak = tile.largest(half, group * 16, group * 16 + 16);
                store(exact, min(peak / (set(6.0f) * whole), set(448.0f)));
                for (int i = 0; i < LANES; ++i) exact[i] = from_e4m3(scale[i] = to_e4m3(exact[i]));
                factor[group] = inverse(load(exact) * whole);
            }
            store_octets(target, half, [&](int k) { return to_int(e2m1(tile.lanes(k, half) * factor[k / 16])); });
        }
    }

   private:
    static INLINE F32 e2m1(F32 value) {  // the code; ties to the even one
        constexpr float below[] = {0.25f, 1.25f, 2.5f, 5.0f}, from[] = {0.75f, 1.75f, 3.5f};
        const F32 size = magnitude(value), one = set(1.0f);
        F32 code = zero();
        for (float middle : below) code = code + where_less(set(middle), size, one, zero());
        for (float middle : from) code = code + where_less(size, set(middle), zero(), one);
        return where_less(value, zero(), code + set(8.0f), code);
    }
};

// Notes the first weight, in the order of [experts, n, k], that is not within +-limit.
template <class T>
void refuse(const PackArgs& args, int64_t expert, const PanelRows<T>& rows, float limit) {
    int64_t first = INT64_MAX;
    for (int o = 0; o < PANEL; ++o)
        for (int64_t i = 0; rows.place[o] >= 0 && i < args.k; ++i)
            if (!(__builtin_fabsf(widen(rows.weight(o, i))) <= limit))
                first = smaller(first, (expert * args.n + rows.place[o]) * args.k + i);
    int64_t seen = __atomic_load_n(args.refused, __ATOMIC_RELAXED);
    while (first < seen)
        if (__atomic_compare_exchange_n(args.refused, &seen, first, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) break;
}

template <class Packer, class T>
void pack_quantised(const PackArgs& args, int64_t expert, const PanelRows<T>& rows, uint8_t* panel) {
    Tile<Packer::GROUP> tile;
    Packer::begin(rows, panel);
    uint8_t* target = panel + Packer::HEADER_BYTES;
    for (int64_t first = 0; first < args.k; first += Packer::GROUP, target += Packer::BYTES) {
        if (!tile.read(rows, first, Packer::LARGEST, Packer::REPEAT_LAST))
            return refuse(args, expert, rows, Packer::LARGEST);
        Packer::encode(tile, panel, target);
    }
}

template <class T>
void pack_panels(Team& team, const PackArgs& args) {
    const int64_t panels = args.paired ? divide_up(args.n / 2, PANEL / 2) : divide_up(args.n, PANEL);
    const int64_t bytes = args.expert_bytes / panels;
    team.each(args.experts * panels, [&](int64_t item) {
        const int64_t expert = item / panels, panel = item % panels;
        uint8_t* target = args.target + expert * args.expert_bytes + panel * bytes;
        const PanelRows<T> rows(args, expert, panel);
        switch (args.format) {
            case FORMAT_INT8: return pack_quantised<Int8Packer>(args, expert, rows, target);
            case FORMAT_INT4: return pack_quantised<Int4Packer>(args, expert, rows, target);
            case FORMAT_NVFP4: return pack_quantised<Nvfp4Packer>(args, expert, rows, target);
            default: return pack_plain(rows, target, bytes, args.format);
        }
    });
}

void pack(Team& team, const PackArgs& args) {
    args.dtype == DTYPE_BF16 ? pack_panels<bf16>(team, args) : pack_panels<float>(team, args);
}

// 8 codes, neighbours sharing a byte -> byte b has codes b and 4 + b.
INLINE uint32_t octet_of(uint32_t word) {
    const uint32_t even = word & 0x0f0f0f0f, odd = word >> 4 & 0x0f0f0f0f;  // codes 0 2 4 6, and 1 3 5 7
    const uint32_t first = (even & 0xff) | (odd & 0xff) << 8 | (even & 0xff00) << 8 | (odd & 0xff00) << 16;
    const uint32_t second = (even >> 16 & 0xff) | (odd >> 8 & 0xff00) | (even >> 8 & 0xff0000) | (odd & 0xff000000);
    return first | second << 4;
}

void pack_nvfp4(Team& team, const PackNvfp4Args& args) {
    constexpr int64_t BYTES = Nvfp4Packer::BYTES;
    const int64_t section = args.paired ? args.n / 2 : args.n, height = args.paired ? PANEL / 2 : PANEL;
    const int64_t panel_bytes = Nvfp4Packer::HEADER_BYTES + divide_up(args.k, 32) * BYTES;
    team.each(divide_up(section, height), [&](int64_t panel) {
        uint8_t* header = args.target + panel * panel_bytes;
        uint8_t* groups = header + Nvfp4Packer::HEADER_BYTES;
        std::memset(header, 0, size_t(panel_bytes));
        for (int64_t o = 0; o < PANEL; ++o) {
            const int64_t at = panel * height + o % height, row = o / height * section + at;
            if (at >= section) continue;
            std::memcpy(header + 4 * o, args.whole + row, 4);
            for (int64_t i = 0; i < args.k / 8; ++i) {
                uint32_t word;
                std::memcpy(&word, args.codes + row * (args.k / 2) + 4 * i, 4);
                word = octet_of(word);
                std::memcpy(groups + i / 4 * BYTES + i % 4 * 128 + 4 * o, &word, 4);
            }
            for (int64_t i = 0; i < args.k / 16; ++i)
                groups[i / 2 * BYTES + OCTETS_BYTES + i % 2 * PANEL + o] = args.scales[row * (args.k / 16) + i];
        }
    });
}

}  // namespace
