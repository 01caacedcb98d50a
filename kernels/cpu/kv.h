// Cached rows: how keys and values lie in the pages, how they are read and written.
//
//     float, bf16   latents: [latent R | rope key P] a token        keys, values: [d] a token and head
//     int8          latents: [latent R | rope key P | scale of the latent | scale of the rope key]
//                   keys, values: [d | scale].  value = code * scale, scales are floats at any alignment
//
// A run is what shares a scale: a latent, a rope key, a key, a value. A run with a value that is not finite is
// stored with the scale NaN, so that it reads as NaN throughout. formats/kv_int8.py does the same in torch.
#pragma once

#include <type_traits>

#include "abi.h"
#include "team.h"

namespace {

template <class T>
struct Run {
    const T* values;
};
template <>
struct Run<int8_t> {
    const int8_t* values;
    float scale;
};

template <class T>
constexpr bool HAS_SCALE = std::is_same<T, int8_t>::value;
template <class T>
constexpr int64_t SCALE_BYTES = HAS_SCALE<T> ? sizeof(float) : 0;

template <class T>
INLINE int64_t latent_row_bytes(int64_t rank, int64_t rope) {
    return (rank + rope) * int64_t(sizeof(T)) + 2 * SCALE_BYTES<T>;
}
template <class T>
INLINE int64_t head_row_bytes(int64_t width) {
    return width * int64_t(sizeof(T)) + SCALE_BYTES<T>;
}

// The run that starts at value `first` of a row of `width` values; its scale is the row's `scale`-th.
template <class T>
INLINE Run<T> run_of(const uint8_t* row, int64_t first, int64_t width, int scale) {
    const T* values = reinterpret_cast<const T*>(row) + first;
    if constexpr (HAS_SCALE<T>) {
        Run<T> run{values, 0};
        std::memcpy(&run.scale, row + width + scale * int64_t(sizeof(float)), sizeof(float));
        return run;
    } else {
        return {values};
    }
}
template <class T>
INLINE Run<T> latent_of(const uint8_t* row, int64_t rank, int64_t rope) {
    return run_of<T>(row, 0, rank + rope, 0);
}
template <class T>
INLINE Run<T> rope_key_of(const uint8_t* row, int64_t rank, int64_t rope) {
    return run_of<T>(row, rank, rank + rope, 1);
}
template <class T>
INLINE Run<T> head_of(const uint8_t* row, int64_t width) {
    return run_of<T>(row, 0, width, 0);
}

template <class T>
INLINE Run<T> run_at(const T* values) {  // float or bf16 anywhere in memory
    return {values};
}

INLINE F32 load_codes(const int8_t* p) {
#if CIERZO_AVX512
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
#else
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
#endif
}

// 16 values of a run from value i on; with n, only the first n are read and the rest are zero.
template <class T>
INLINE F32 load(Run<T> run, int64_t i) {
    return load(run.values + i);
}
INLINE F32 load(Run<int8_t> run, int64_t i) { return load_codes(run.values + i) * set(run.scale); }
template <class T>
INLINE F32 load(Run<T> run, int64_t i, int n) {
    return load(run.values + i, n);
}
INLINE F32 load(Run<int8_t> run, int64_t i, int n) {
    if (n >= LANES) return load(run, i);
    int8_t codes[LANES] = {};
    std::memcpy(codes, run.values + i, size_t(n));
    return keep(load_codes(codes) * set(run.scale), n, zero());  // 0 * NaN is no padding
}

// The first n values of a run, as floats or bf16. Finite values of the target's own type keep their bits.
template <class T, class Target>
INLINE void copy_run(Run<T> run, int64_t n, Target* target) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) store(target + i, load(run, i));
    if (i < n) store(target + i, load(run, i, int(n - i)), int(n - i));
}

// One sequence's rows, found through its block table. Only positions of its context may be asked for.
struct CachedRows {
    const uint8_t* pages;
    const int32_t* table;
    int64_t block_tokens, row_bytes;

    INLINE const uint8_t* at(int64_t position) const {
        const uint32_t block = uint32_t(position) / uint32_t(block_tokens);
        const int64_t slot = table[block] * block_tokens + (position - block * block_tokens);
        return pages + slot * row_bytes;
    }
    // How many rows from this one on lie one behind the other, the context's end aside.
    INLINE int64_t together(int64_t position) const {
        return block_tokens - int64_t(uint32_t(position) % uint32_t(block_tokens));
    }
};
INLINE CachedRows cached_rows(const PagedArgs& paged, int64_t segment, const uint8_t* pages, int64_t row_bytes) {
    return {pages, paged.block_tables + paged.table_rows[segment] * paged.table_stride, paged.block_tokens, row_bytes};
}

// body(T{}) with T the cached type.
template <class Body>
INLINE void with_kv_type(int32_t kv_format, Body body) {
    switch (kv_format) {
        case KV_F32: return body(float{});
        case KV_BF16: return body(bf16{});
        case KV_INT8: return body(int8_t{});
    }
}

}  // namespace
