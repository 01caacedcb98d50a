// 16 vectors of 16 lanes, transposed (element j of vector i becomes element i of vector j), or summed each into a lane.
#pragma once

#include "simd.h"

namespace {

#if CIERZO_AVX512
INLINE void transpose(F32 (&rows)[LANES]) {
    __m512 pairs[LANES], quads[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i += 2) {
        pairs[i] = _mm512_unpacklo_ps(rows[i].v, rows[i + 1].v);
        pairs[i + 1] = _mm512_unpackhi_ps(rows[i].v, rows[i + 1].v);
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i += 4)
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
            const __m512d a = _mm512_castps_pd(pairs[i + j]), b = _mm512_castps_pd(pairs[i + 2 + j]);
            quads[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
            quads[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
        }
    // quads[4 i + j] holds column j of rows 4 i .. 4 i + 3, and columns j + 4, j + 8, j + 12 behind it.
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
        const __m512 a = _mm512_shuffle_f32x4(quads[j], quads[4 + j], 0x88);       // columns j, j + 8
        const __m512 b = _mm512_shuffle_f32x4(quads[j], quads[4 + j], 0xdd);       // columns j + 4, j + 12
        const __m512 c = _mm512_shuffle_f32x4(quads[8 + j], quads[12 + j], 0x88);
        const __m512 d = _mm512_shuffle_f32x4(quads[8 + j], quads[12 + j], 0xdd);
        rows[j].v = _mm512_shuffle_f32x4(a, c, 0x88);
        rows[j + 8].v = _mm512_shuffle_f32x4(a, c, 0xdd);
        rows[j + 4].v = _mm512_shuffle_f32x4(b, d, 0x88);
        rows[j + 12].v = _mm512_shuffle_f32x4(b, d, 0xdd);
    }
}

// Lane i: the sum over vector i, in the same order for every i.
INLINE F32 sums(const F32 (&rows)[LANES]) {
    __m512 half[8], quarter[4], eighth[2];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i)
        half[i] = _mm512_add_ps(_mm512_unpacklo_ps(rows[2 * i].v, rows[2 * i + 1].v),
                                _mm512_unpackhi_ps(rows[2 * i].v, rows[2 * i + 1].v));
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const __m512d a = _mm512_castps_pd(half[2 * i]), b = _mm512_castps_pd(half[2 * i + 1]);
        quarter[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                                   _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i)
        eighth[i] = _mm512_add_ps(_mm512_shuffle_f32x4(quarter[2 * i], quarter[2 * i + 1], 0x88),
                                  _mm512_shuffle_f32x4(quarter[2 * i], quarter[2 * i + 1], 0xdd));
    return {_mm512_add_ps(_mm512_shuffle_f32x4(eighth[0], eighth[1], 0x88),
                          _mm512_shuffle_f32x4(eighth[0], eighth[1], 0xdd))};
}

INLINE F32 peak_everywhere(F32 a) {  // the largest lane, in all lanes
    __m512 v = _mm512_max_ps(a.v, _mm512_shuffle_f32x4(a.v, a.v, 0x4e));
    v = _mm512_max_ps(v, _mm512_shuffle_f32x4(v, v, 0xb1));
    v = _mm512_max_ps(v, _mm512_permute_ps(v, 0x4e));
    return {_mm512_max_ps(v, _mm512_permute_ps(v, 0xb1))};
}
#else
INLINE void transpose(F32 (&rows)[LANES]) {
    float square[LANES][LANES], turned[LANES][LANES];
    for (int i = 0; i < LANES; ++i) store(square[i], rows[i]);
    for (int i = 0; i < LANES; ++i)
        for (int j = 0; j < LANES; ++j) turned[j][i] = square[i][j];
    for (int i = 0; i < LANES; ++i) rows[i] = load(turned[i]);
}
INLINE F32 sums(const F32 (&rows)[LANES]) {
    float lanes[LANES];
    for (int i = 0; i < LANES; ++i) lanes[i] = sum(rows[i]);
    return load(lanes);
}
INLINE F32 peak_everywhere(F32 a) { return set(peak(a)); }
#endif

}  // namespace
