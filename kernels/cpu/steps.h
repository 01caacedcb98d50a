// The steps that attention is made of: sums += a vector times one repeated cell, and the weights between them.
//
// A cell is 4 bytes: a float, or two bf16 where the CPU multiplies and adds pairs. Vectors are 16 cells.
#pragma once

#include "kv.h"

namespace {
namespace decode {

constexpr float LOWEST = -3.402823466e38f;  // a score that no weight comes of
constexpr float LOG2_E = 1.44269504f;       // weights are powers of two

// Memory to bring into the second-level cache bit by bit, while other memory is computed with.
struct Coming {
    const uint8_t* at;
    int64_t bytes;  // of one call

    INLINE void line() {  // where bytes <= 64
        _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T1);
        at += bytes;
    }
    INLINE void lines() {
        for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(reinterpret_cast<const char*>(at + i), _MM_HINT_T1);
        at += bytes;
    }
};

struct FloatSteps {
    using Value = float;
    static constexpr int PACK = 1;     // values of a cell, tokens of a weight's cell
    static constexpr int VECTORS = 1;  // of interleaved values that come of one vector of each token

    static INLINE F32 step(F32 sum, F32 vector, const Value* cell) { return fma(set(*cell), vector, sum); }
    static INLINE F32 dot(F32 sum, F32 a, F32 b) { return fma(a, b, sum); }

    // 16 cells of a row; only the first `left` values are there, the rest is zero. INT8: codes, without their scale.
    template <class T>
    static INLINE F32 cells(const T* p, int64_t left) {
        return left >= LANES ? load(p) : load(p, int(left));
    }
    static INLINE F32 cells(const int8_t* p, int64_t left) {
        if (left >= LANES) return load_codes(p);
        return load(Run<int8_t>{p, 1}, 0, int(left));
    }
    static INLINE void interleave(const F32* tokens, F32* vectors) { vectors[0] = tokens[0]; }

    static INLINE void store_weights(Value* cells, F32 even, F32) { store(cells, even); }
};

#if CIERZO_DOT
struct PairSteps {
    using Value = bf16;
    static constexpr int PACK = 2;
    static constexpr int VECTORS = 2;

    static INLINE F32 step(F32 sum, F32 vector, const Value* cell) {
        int32_t pair;
        std::memcpy(&pair, cell, sizeof(pair));
        return {_mm512_dpbf16_ps(sum.v, (__m512bh)vector.v, (__m512bh)_mm512_set1_epi32(pair))};
    }
    static INLINE F32 dot(F32 sum, F32 a, F32 b) { return {_mm512_dpbf16_ps(sum.v, (__m512bh)a.v, (__m512bh)b.v)}; }

    static INLINE F32 cells(const bf16* p, int64_t left) {
        if (left >= 32) return {_mm512_castsi512_ps(_mm512_loadu_si512(p))};
        return {_mm512_castsi512_ps(_mm512_maskz_loadu_epi16((__mmask32(1) << left) - 1, p))};
    }
    static INLINE F32 cells(const int8_t* p, int64_t left) {
        const F32 low = FloatSteps::cells(p, left);
        const F32 high = left > LANES ? FloatSteps::cells(p + LANES, left - LANES) : zero();
        return {(__m512)_mm512_cvtne2ps_pbh(high.v, low.v)};
    }
    // Two tokens' values -> pairs of each value: the first 16, the last 16.
    static INLINE void interleave(const F32* tokens, F32* vectors) {
        const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38,
                                             6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
        const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
        const __m512i even = _mm512_castps_si512(tokens[0].v), odd = _mm512_castps_si512(tokens[1].v);
        vectors[0] = {_mm512_castsi512_ps(_mm512_permutex2var_epi16(even, low, odd))};
        vectors[1] = {_mm512_castsi512_ps(_mm512_permutex2var_epi16(even, high, odd))};
    }

    static INLINE void store_weights(Value* cells, F32 even, F32 odd) {
        const __m512i low = _mm512_cvtepu16_epi32(round_to_bf16(even));
        const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(round_to_bf16(odd)), 16);
        _mm512_storeu_si512(cells, _mm512_or_si512(low, high));
    }
};
#endif

#if CIERZO_DOT
using Bf16Steps = PairSteps;
#else
using Bf16Steps = FloatSteps;
#endif

// body(steps, cached type, type of queries and results): pages are of the queries' type, or INT8.
template <class Body>
INLINE void with_steps(int32_t dtype, int32_t kv_format, Body body) {
    if (dtype == DTYPE_F32)
        kv_format == KV_INT8 ? body(FloatSteps{}, int8_t{}, float{}) : body(FloatSteps{}, float{}, float{});
    else
        kv_format == KV_INT8 ? body(Bf16Steps{}, int8_t{}, bf16{}) : body(Bf16Steps{}, bf16{}, bf16{});
}

}  // namespace decode
}  // namespace
