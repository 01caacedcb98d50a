// Reading memory as fast as it comes: what every kernel that streams weights is measured against.
#pragma once

#include "abi.h"
#include "team.h"

namespace {

// Sum of floats, piece by piece, and of the pieces in order.
void read_memory(Team& team, const ReadMemoryArgs& args) {
    constexpr int64_t PIECE = 1 << 18;  // floats of one claim
    constexpr int CHAINS = 8;
    const size_t mark = team.mark();
    const int64_t pieces = divide_up(args.count, PIECE);
    double* sums = team.scratch<double>(pieces);
    team.each(pieces, [&](int64_t piece) {
        const float* values = args.values + piece * PIECE;
        const int64_t count = smaller(PIECE, args.count - piece * PIECE);
        F32 chains[CHAINS];
        for (F32& chain : chains) chain = zero();
        int64_t i = 0;
        for (; i + CHAINS * LANES <= count; i += CHAINS * LANES)
            for (int c = 0; c < CHAINS; ++c) chains[c] = chains[c] + load(values + i + c * LANES);
        for (; i < count; i += LANES) chains[0] = chains[0] + load(values + i, int(smaller(LANES, count - i)));
        sums[piece] = 0;
        for (const F32& chain : chains) sums[piece] += double(sum(chain));
    });
    team.each(1, [&](int64_t) {
        *args.sum = 0;
        for (int64_t piece = 0; piece < pieces; ++piece) *args.sum += sums[piece];
    });
    team.reset(mark);
}

}  // namespace
