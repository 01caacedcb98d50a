// Masks of whole rows of logits, as bit sets.
#pragma once

#include "abi.h"
#include "simd.h"
#include "team.h"

namespace {

// logits[id] = -inf where bit id of the set is 0.
INLINE void mask_row(float* logits, int64_t vocab, const uint32_t* words) {
    const F32 nothing = set(-__builtin_inff());
    for (int64_t i = 0; i + 32 <= vocab; i += 32) {
        const uint32_t word = words[i / 32];
        if (word == 0xffffffffu) continue;
        store_where_clear(logits + i, nothing, word & 0xffff);
        store_where_clear(logits + i + LANES, nothing, word >> 16);
    }
    for (int64_t i = vocab & ~int64_t(31); i < vocab; ++i)
        if ((words[i / 32] >> (i % 32) & 1) == 0) logits[i] = -__builtin_inff();
}

// Sets of rows that are outside the logits are left out, and counted.
void mask_bits(Team& team, const MaskBitsArgs& args) {
    const int64_t words = divide_up(args.vocab, 32);
    team.each(args.entries, [&](int64_t entry) {
        const int64_t row = args.at_rows[entry];
        if (uint64_t(row) >= uint64_t(args.rows))
            __atomic_fetch_add(args.wrong, 1, __ATOMIC_RELAXED);
        else
            mask_row(args.logits + row * args.stride, args.vocab, args.bits + entry * words);
    });
}

}  // namespace
