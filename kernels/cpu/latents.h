// Writes into the cache that do on the way what their rows need first: a latent's norm, a key's rotation.
#pragma once

#include "cache_write.h"
#include "norm.h"
#include "rope.h"

namespace {

// body(row) for every row, a few per claim.
template <class Body>
INLINE void each_row(Team& team, int64_t rows, Body body) {
    team.each(divide_up(rows, ROWS_PER_WRITE), [&](int64_t piece) {
        const int64_t end = smaller(rows, (piece + 1) * ROWS_PER_WRITE);
        for (int64_t row = piece * ROWS_PER_WRITE; row < end; ++row) body(row);
    });
}

template <class T, class Source>
void write_normed_rows(Team& team, const WriteNormedLatentsArgs& args) {
    const size_t mark = team.mark();
    const int64_t width = args.rank + args.rope;
    const Rotation turn = new_rotation(team, args.rope, args.interleaved != 0);
    Source* normed = team.own_scratch<Source>(width);
    each_row(team, args.rows, [&](int64_t row) {
        const Source* kv = static_cast<const Source*>(args.kv) + row * args.kv_stride;
        set_angles(turn, args.cos + row * (args.rope / 2), args.sin + row * (args.rope / 2));
        norm_row<Source>(kv, nullptr, static_cast<const Source*>(args.norm_weight), normed, args.rank, args.eps);
        rotate(turn, kv + args.rank, normed + args.rank);
        uint8_t* target = args.pages + args.slots[row] * latent_row_bytes<T>(args.rank, args.rope);
        uint8_t* scales = target + width * int64_t(sizeof(T));
        write_run(normed, args.rank, reinterpret_cast<T*>(target), scales);
        write_run(normed + args.rank, args.rope, reinterpret_cast<T*>(target) + args.rank, scales + SCALE_BYTES<T>);
    });
    team.reset(mark);
}

void write_normed_latents(Team& team, const WriteNormedLatentsArgs& args) {
    with_kv_type(args.kv_format, [&](auto cached) {
        using T = decltype(cached);
        args.dtype == DTYPE_BF16 ? write_normed_rows<T, bf16>(team, args) : write_normed_rows<T, float>(team, args);
    });
}

// Queries are rotated where they lie, keys on their way into the pages.
template <class T, class Source>
void rotate_and_write_rows(Team& team, const RotateAndWriteArgs& args) {
    const size_t mark = team.mark();
    const int64_t width = args.width, bytes = head_row_bytes<T>(width);
    const Rotation turn = new_rotation(team, width, args.interleaved != 0);
    Source* key = team.own_scratch<Source>(width);
    each_row(team, args.rows, [&](int64_t row) {
        Source* head = static_cast<Source*>(args.qkv) + row * args.qkv_stride;
        set_angles(turn, args.cos + row * (width / 2), args.sin + row * (width / 2));
        for (int64_t h = 0; h < args.query_heads; ++h, head += width) rotate(turn, head, head);
        const int64_t first = args.slots[row] * args.kv_heads * bytes;
        for (int64_t h = 0; h < args.kv_heads; ++h, head += width) {
            uint8_t* target = args.key_pages + first + h * bytes;
            rotate(turn, head, key);
            write_run(key, width, reinterpret_cast<T*>(target), target + width * int64_t(sizeof(T)));
        }
        write_heads<T, Source>(head, args.kv_heads, width, args.value_pages + first);
    });
    team.reset(mark);
}

void rotate_and_write_keys_values(Team& team, const RotateAndWriteArgs& args) {
    with_kv_type(args.kv_format, [&](auto cached) {
        using T = decltype(cached);
        args.dtype == DTYPE_BF16 ? rotate_and_write_rows<T, bf16>(team, args)
                                 : rotate_and_write_rows<T, float>(team, args);
    });
}

}  // namespace
