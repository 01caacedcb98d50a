// Rotary position embedding.
#pragma once

#include "abi.h"
#include "team.h"

namespace {

// The C library's cosine and sine take any angle: a context's last positions turn the first pairs 262,144 radians.
void rope_tables(Team& team, const RopeTablesArgs& args) {
    team.each(args.rows, [&](int64_t row) {
        for (int64_t i = row * args.width; i < (row + 1) * args.width; ++i) {
            const float angle = float(args.positions[row]) * args.inv_freq[i - row * args.width];
            args.cos[i] = __builtin_cosf(angle) * args.magnitude;
            args.sin[i] = __builtin_sinf(angle) * args.magnitude;
        }
    });
}

// The angles of one row, spread over the values that they turn: value j of a head becomes
// x[j] cos[j] + x[its partner] sin[j], every product and the sum rounded, as in the reference.
struct Rotation {
    float* cos;
    float* sin;
    int64_t width;
    bool interleaved;  // the partner is the neighbour, or else the value half a head away
};

INLINE Rotation new_rotation(Team& team, int64_t width, bool interleaved) {
    float* tables = team.own_scratch<float>(2 * width);
    return {tables, tables + width, width, interleaved};
}

INLINE void set_angles(const Rotation& turn, const float* cos, const float* sin) {
    const int64_t half = turn.width / 2;
    const int64_t step = turn.interleaved ? 2 : 1, partner = turn.interleaved ? 1 : half;
    for (int64_t i = 0; i < half; ++i) {
        turn.cos[step * i] = turn.cos[step * i + partner] = cos[i];
        turn.sin[step * i] = -sin[i];
        turn.sin[step * i + partner] = sin[i];
    }
}

// One head, into `out`, which may be x.
template <class T>
void rotate(const Rotation& turn, const T* x, T* out) {
    const int64_t half = turn.width / 2;
    if (turn.interleaved) {
        for (int64_t i = 0; i < turn.width; i += LANES) {
            const int n = int(smaller(LANES, turn.width - i));
            const F32 value = load(x + i, n);
            store(out + i, value * load(turn.cos + i, n) + swap_pairs(value) * load(turn.sin + i, n), n);
        }
        return;
    }
    for (int64_t i = 0; i < half; i += LANES) {
        const int n = int(smaller(LANES, half - i));
        const F32 first = load(x + i, n), second = load(x + half + i, n), cos = load(turn.cos + i, n);
        store(out + i, first * cos + second * load(turn.sin + i, n), n);
        store(out + half + i, second * cos + first * load(turn.sin + half + i, n), n);
    }
}

// A row's values times its scale: Llama-4's factor on the query.
template <class T>
INLINE void scale_values(T* x, int64_t count, float scale) {
    for (int64_t i = 0; i < count; i += LANES) {
        const int n = int(smaller(LANES, count - i));
        store(x + i, load(x + i, n) * set(scale), n);
    }
}

template <class T>
void rope_rows(Team& team, const RopeArgs& args) {
    constexpr int64_t ROWS = 4;  // per claim
    const size_t mark = team.mark();
    const Rotation turn = new_rotation(team, args.turned, args.interleaved != 0);
    team.each(divide_up(args.rows, ROWS), [&](int64_t piece) {
        for (int64_t row = piece * ROWS; row < smaller(args.rows, (piece + 1) * ROWS); ++row) {
            set_angles(turn, args.cos + row * (turn.width / 2), args.sin + row * (turn.width / 2));
            for (int64_t head = 0; head < args.heads; ++head) {
                T* x = static_cast<T*>(args.x) + row * args.row_stride + head * args.head_stride;
                T* end = x + args.width - turn.width;
                rotate(turn, end, end);
                if (args.scale != nullptr) scale_values(x, args.width, args.scale[row]);
            }
        }
    });
    team.reset(mark);
}

void rope(Team& team, const RopeArgs& args) {
    args.dtype == DTYPE_BF16 ? rope_rows<bf16>(team, args) : rope_rows<float>(team, args);
}

}  // namespace
