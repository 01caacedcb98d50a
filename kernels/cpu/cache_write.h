// Writes into the cache: latents with rope keys, keys with values. Equal types keep their bits; INT8 is quantised.
#pragma once

#include "kv.h"

namespace {

INLINE void store_codes(int8_t* p, F32 a, int n) {  // whole numbers within int8
    alignas(64) float lanes[LANES];
    store(lanes, a);
    for (int i = 0; i < n; ++i) p[i] = int8_t(lanes[i]);
}

// One run into a row of the cache; `scale` is where an INT8 row keeps this run's.
template <class T, class Source>
INLINE void write_run(const Source* values, int64_t n, T* target, uint8_t*) {
    if constexpr (std::is_same<T, Source>::value) {
        std::memcpy(target, values, size_t(n) * sizeof(T));
    } else {
        copy_run(Run<Source>{values}, n, target);
    }
}
template <class Source>
INLINE void write_run(const Source* values, int64_t n, int8_t* target, uint8_t* scale_at) {
    F32 peaks = zero(), poison = zero();  // 0, or NaN once a value is not finite
    for (int64_t i = 0; i < n; i += LANES) {
        const F32 x = load(values + i, int(smaller(LANES, n - i)));
        peaks = max(peaks, max(x, zero() - x));
        poison = fma(x, zero(), poison);
    }
    const float scale = sum(poison) == 0 ? peak(peaks) / 127.0f : __builtin_nanf("");
    std::memcpy(scale_at, &scale, sizeof(float));
    if (!(scale > 0)) {  // all values are zero, or NaN whatever the codes
        std::memset(target, 0, size_t(n));
        return;
    }
    for (int64_t i = 0; i < n; i += LANES) {
        const int count = int(smaller(LANES, n - i));
        const F32 code = round(load(values + i, count) / set(scale));
        store_codes(target + i, min(set(127), max(set(-127), code)), count);
    }
}

template <class T, class Source>
void write_latent_row(const WriteLatentsArgs& args, int64_t row) {
    const int64_t width = args.rank + args.rope;
    uint8_t* target = args.pages + args.slots[row] * latent_row_bytes<T>(args.rank, args.rope);
    uint8_t* scales = target + width * int64_t(sizeof(T));
    write_run(static_cast<const Source*>(args.latents) + row * args.latent_stride, args.rank,
              reinterpret_cast<T*>(target), scales);
    write_run(static_cast<const Source*>(args.rope_keys) + row * args.rope_stride, args.rope,
              reinterpret_cast<T*>(target) + args.rank, scales + SCALE_BYTES<T>);
}

template <class T, class Source>
void write_heads(const void* source, int64_t heads, int64_t width, uint8_t* target) {
    for (int64_t head = 0; head < heads; ++head, target += head_row_bytes<T>(width))
        write_run(static_cast<const Source*>(source) + head * width, width, reinterpret_cast<T*>(target),
                  target + width * int64_t(sizeof(T)));
}

template <class T, class Source>
void write_key_value_row(const WriteKeysValuesArgs& args, int64_t row) {
    const int64_t offset = args.slots[row] * args.heads * head_row_bytes<T>(args.width);
    write_heads<T, Source>(static_cast<const Source*>(args.keys) + row * args.key_stride, args.heads, args.width,
                           args.key_pages + offset);
    write_heads<T, Source>(static_cast<const Source*>(args.values) + row * args.value_stride, args.heads, args.width,
                           args.value_pages + offset);
}

constexpr int64_t ROWS_PER_WRITE = 8;  // of one claim

void write_latents(Team& team, const WriteLatentsArgs& args) {
    with_kv_type(args.kv_format, [&](auto cached) {
        using T = decltype(cached);
        team.each(divide_up(args.rows, ROWS_PER_WRITE), [&](int64_t piece) {
            const int64_t end = smaller(args.rows, (piece + 1) * ROWS_PER_WRITE);
            for (int64_t row = piece * ROWS_PER_WRITE; row < end; ++row)
                args.dtype == DTYPE_BF16 ? write_latent_row<T, bf16>(args, row)
                                         : write_latent_row<T, float>(args, row);
        });
    });
}

void write_keys_values(Team& team, const WriteKeysValuesArgs& args) {
    with_kv_type(args.kv_format, [&](auto cached) {
        using T = decltype(cached);
        team.each(divide_up(args.rows, ROWS_PER_WRITE), [&](int64_t piece) {
            const int64_t end = smaller(args.rows, (piece + 1) * ROWS_PER_WRITE);
            for (int64_t row = piece * ROWS_PER_WRITE; row < end; ++row)
                args.dtype == DTYPE_BF16 ? write_key_value_row<T, bf16>(args, row)
                                         : write_key_value_row<T, float>(args, row);
        });
    });
}

}  // namespace
