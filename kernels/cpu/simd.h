// Vectors of 16 lanes, in the instruction set that this translation unit is compiled for.
//
// Every header here is compiled once per instruction set (avx512_bf16.cpp, avx512.cpp, avx2.cpp), hence the
// anonymous namespaces: a template shared between them would be merged by the linker, and the AVX-512 copy could be
// the one that an AVX2 machine runs. With AVX2 a vector is two registers of 8 lanes, so that kernels, packed
// layouts and the order of every sum have one shape everywhere.
#pragma once

// gcc 12 takes the deliberately undefined operand inside its own AVX-512 intrinsics for a mistake of ours.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#define CIERZO_AVX512 1
#endif
#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
#define CIERZO_DOT 1  // bf16 pairs and bytes are multiplied and summed by one instruction
#endif

#define INLINE inline __attribute__((always_inline))

namespace {

constexpr int LANES = 16;

struct bf16 {
    uint16_t bits;
};

INLINE float widen(bf16 value) {
    const uint32_t bits = uint32_t(value.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, 4);
    return wide;
}
INLINE float widen(float value) { return value; }

INLINE bf16 narrow(float value) {  // to nearest, ties to even; a NaN stays one
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {uint16_t((bits >> 16) | 0x40)};
    return {uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16)};
}
INLINE void narrow_to(bf16* target, float value) { *target = narrow(value); }
INLINE void narrow_to(float* target, float value) { *target = value; }

#if CIERZO_AVX512

struct F32 {
    __m512 v;
};
struct Bits {  // 64 bytes: 16 int32, 32 bf16 or 64 int8
    __m512i v;
};
struct Int32 {  // 16 sums of products of bytes. gcc shuffles registers where they have __m512i's element type.
    int v __attribute__((vector_size(64)));
};

INLINE F32 zero() { return {_mm512_setzero_ps()}; }
INLINE F32 set(float value) { return {_mm512_set1_ps(value)}; }
INLINE F32 load(const float* p) { return {_mm512_loadu_ps(p)}; }
INLINE F32 load(const bf16* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
INLINE __mmask16 first(int n) { return n >= LANES ? 0xffff : __mmask16((1u << n) - 1); }
INLINE F32 load(const float* p, int n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
INLINE F32 load(const bf16* p, int n) {
    const __m256i half = _mm256_maskz_loadu_epi16(first(n), p);
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
INLINE F32 load_half(const uint16_t* p) {  // IEEE half precision
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
INLINE F32 load_e4m3(const uint8_t* p) {  // of positive numbers; times 2^-8
    const __m256i words = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return {_mm512_cvtph_ps(_mm256_slli_epi16(words, 7))};
}
INLINE void store_half(uint16_t* p, F32 a) {  // to nearest even
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
INLINE F32 round_to_half(F32 a) { return {_mm512_cvtph_ps(_mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT))}; }
INLINE void store(float* p, F32 a) { _mm512_storeu_ps(p, a.v); }
INLINE void store(float* p, F32 a, int n) { _mm512_mask_storeu_ps(p, first(n), a.v); }
INLINE __m256i round_to_bf16(F32 a) {
#if CIERZO_DOT
    return (__m256i)_mm512_cvtneps_pbh(a.v);
#else
    const __m512i bits = _mm512_castps_si512(a.v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
#endif
}
INLINE void store(bf16* p, F32 a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), round_to_bf16(a)); }
INLINE void store(bf16* p, F32 a, int n) { _mm256_mask_storeu_epi16(p, first(n), round_to_bf16(a)); }

INLINE F32 operator+(F32 a, F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
INLINE F32 operator-(F32 a, F32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
INLINE F32 operator*(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
INLINE F32 operator/(F32 a, F32 b) { return {_mm512_div_ps(a.v, b.v)}; }
INLINE F32 fma(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }   // a b + c
INLINE F32 fnma(F32 a, F32 b, F32 c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }  // c - a b
INLINE F32 max(F32 a, F32 b) { return {_mm512_max_ps(a.v, b.v)}; }  // b where either is NaN
INLINE F32 min(F32 a, F32 b) { return {_mm512_min_ps(a.v, b.v)}; }
INLINE F32 sqrt(F32 a) { return {_mm512_sqrt_ps(a.v)}; }
INLINE F32 where_less(F32 a, F32 b, F32 yes, F32 no) {  // a < b ? yes : no
    return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), no.v, yes.v)};
}
INLINE bool any_less(F32 a, F32 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ) != 0; }  // in some lane
INLINE F32 keep(F32 a, int n, F32 rest) { return {_mm512_mask_blend_ps(first(n), rest.v, a.v)}; }  // first n of a
INLINE F32 round(F32 a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
INLINE F32 power_of_two(F32 n) {  // 2^n of whole numbers n within a float's exponents
    return {_mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127)), 23))};
}

INLINE F32 rounded_to(bf16, F32 a) {  // a as a bf16 holds it
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(round_to_bf16(a)), 16))};
}
template <int DISTANCE>
INLINE F32 swap_at(F32 a) {  // lane i of the result is lane i ^ DISTANCE
    if constexpr (DISTANCE == 1) return {_mm512_permute_ps(a.v, 0xb1)};
    if constexpr (DISTANCE == 2) return {_mm512_permute_ps(a.v, 0x4e)};
    if constexpr (DISTANCE == 4) return {_mm512_shuffle_f32x4(a.v, a.v, 0xb1)};
    if constexpr (DISTANCE == 8) return {_mm512_shuffle_f32x4(a.v, a.v, 0x4e)};
}
INLINE uint32_t at_least(F32 a, F32 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ); }  // bit i: lane i, a >= b
INLINE uint32_t unordered(F32 a, F32 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_UNORD_Q); }  // either is NaN
INLINE __m256 lower_half(F32 a) { return _mm512_castps512_ps256(a.v); }
INLINE __m256 upper_half(F32 a) { return _mm512_extractf32x8_ps(a.v, 1); }

INLINE void store_where_clear(float* p, F32 a, uint32_t bits) {  // lane i where bit i is 0
    _mm512_mask_storeu_ps(p, __mmask16(~bits), a.v);
}
INLINE Bits load_bits(const void* p) { return {_mm512_loadu_si512(p)}; }
INLINE void store_bits(void* p, Bits a) { _mm512_storeu_si512(p, a.v); }
INLINE Bits zero_bits() { return {_mm512_setzero_si512()}; }
INLINE Bits repeat(int32_t value) { return {_mm512_set1_epi32(value)}; }
INLINE Bits operator&(Bits a, Bits b) { return {_mm512_and_si512(a.v, b.v)}; }
INLINE Bits operator|(Bits a, Bits b) { return {_mm512_or_si512(a.v, b.v)}; }
INLINE Bits shift_left(Bits a, int n) { return {_mm512_slli_epi32(a.v, unsigned(n))}; }  // of 16 int32
INLINE Bits shift_right(Bits a, int n) { return {_mm512_srli_epi32(a.v, unsigned(n))}; }
INLINE F32 to_f32(Bits a) { return {_mm512_cvtepi32_ps(a.v)}; }  // of 16 int32
INLINE Bits to_int(F32 a) { return {_mm512_cvtps_epi32(a.v)}; }  // to nearest, ties to even
INLINE __m128i to_bytes(Bits a) { return _mm512_cvtepi32_epi8(a.v); }  // of 16 int32 that are int8
INLINE F32 as_f32(Bits a) { return {_mm512_castsi512_ps(a.v)}; }
INLINE F32 low_bf16(Bits a) { return {_mm512_castsi512_ps(_mm512_slli_epi32(a.v, 16))}; }  // element 0 of each pair
INLINE F32 high_bf16(Bits a) {
    return {_mm512_castsi512_ps(_mm512_and_si512(a.v, _mm512_set1_epi32(int(0xffff0000u))))};
}
INLINE Bits load_table(const uint8_t* p) {  // 16 bytes, for look_up
    return {_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
INLINE Bits look_up(Bits table, Bits indices) { return {_mm512_shuffle_epi8(table.v, indices.v)}; }  // indices < 16

// acc[i] += sum over j < 4 of u[4i + j] * s[4i + j]: unsigned bytes times signed bytes, exact in int32.
INLINE Int32 dot_bytes(Int32 acc, Bits u, Bits s) {
    const __m512i sum = (__m512i)acc.v;
#if CIERZO_DOT
    return {(decltype(acc.v))_mm512_dpbusd_epi32(sum, u.v, s.v)};
#else
    // vpmaddubsw alone would saturate at int16: even and odd bytes are widened instead.
    const __m512i low = _mm512_set1_epi16(0xff);
    const __m512i even = _mm512_madd_epi16(_mm512_and_si512(u.v, low), _mm512_srai_epi16(_mm512_slli_epi16(s.v, 8), 8));
    const __m512i odd = _mm512_madd_epi16(_mm512_srli_epi16(u.v, 8), _mm512_srai_epi16(s.v, 8));
    return {(decltype(acc.v))_mm512_add_epi32(sum, _mm512_add_epi32(even, odd))};
#endif
}
INLINE Int32 repeat_int(int32_t value) { return {(decltype(Int32::v))_mm512_set1_epi32(value)}; }
INLINE F32 to_f32(Int32 a) { return {_mm512_cvtepi32_ps((__m512i)a.v)}; }

#else  // AVX2 + FMA

struct F32 {
    __m256 lo, hi;
};
struct Bits {
    __m256i lo, hi;
};

INLINE F32 zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
INLINE F32 set(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
INLINE F32 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INLINE __m256 widen8(__m128i half) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
INLINE F32 load(const bf16* p) {
    const __m128i* half = reinterpret_cast<const __m128i*>(p);
    return {widen8(_mm_loadu_si128(half)), widen8(_mm_loadu_si128(half + 1))};
}
INLINE F32 load(const float* p, int n) {
    if (n >= LANES) return load(p);
    alignas(32) float lanes[LANES] = {};
    std::memcpy(lanes, p, size_t(n) * sizeof(float));
    return load(lanes);
}
INLINE F32 load(const bf16* p, int n) {
    if (n >= LANES) return load(p);
    alignas(32) bf16 lanes[LANES] = {};
    std::memcpy(lanes, p, size_t(n) * sizeof(bf16));
    return load(lanes);
}
INLINE F32 load_half(const uint16_t* p) {
    const __m128i* half = reinterpret_cast<const __m128i*>(p);
    return {_mm256_cvtph_ps(_mm_loadu_si128(half)), _mm256_cvtph_ps(_mm_loadu_si128(half + 1))};
}
INLINE F32 load_e4m3(const uint8_t* p) {
    const __m256i words = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const __m256i halves = _mm256_slli_epi16(words, 7);
    return {_mm256_cvtph_ps(_mm256_castsi256_si128(halves)), _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1))};
}
INLINE __m128i half8(__m256 a) { return _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT); }
INLINE void store_half(uint16_t* p, F32 a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), half8(a.lo));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p) + 1, half8(a.hi));
}
INLINE F32 round_to_half(F32 a) { return {_mm256_cvtph_ps(half8(a.lo)), _mm256_cvtph_ps(half8(a.hi))}; }
INLINE void store(float* p, F32 a) {
    _mm256_storeu_ps(p, a.lo);
    _mm256_storeu_ps(p + 8, a.hi);
}
INLINE void store(float* p, F32 a, int n) {
    if (n >= LANES) return store(p, a);
    alignas(32) float lanes[LANES];
    store(lanes, a);
    std::memcpy(p, lanes, size_t(n) * sizeof(float));
}
INLINE __m128i round8(__m256 a) {
    const __m256i bits = _mm256_castps_si256(a);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256 nan = _mm256_cmp_ps(a, a, _CMP_UNORD_Q);
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i kept = _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(nan));
    const __m256i shifted = _mm256_srli_epi32(kept, 16);
    const __m256i packed = _mm256_packus_epi32(shifted, shifted);
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
}
INLINE void store(bf16* p, F32 a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), round8(a.lo));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p) + 1, round8(a.hi));
}
INLINE void store(bf16* p, F32 a, int n) {
    if (n >= LANES) return store(p, a);
    alignas(32) bf16 lanes[LANES];
    store(lanes, a);
    std::memcpy(p, lanes, size_t(n) * sizeof(bf16));
}

INLINE F32 operator+(F32 a, F32 b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
INLINE F32 operator-(F32 a, F32 b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
INLINE F32 operator*(F32 a, F32 b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
INLINE F32 operator/(F32 a, F32 b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
INLINE F32 fma(F32 a, F32 b, F32 c) {
    return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
INLINE F32 fnma(F32 a, F32 b, F32 c) {
    return {_mm256_fnmadd_ps(a.lo, b.lo, c.lo), _mm256_fnmadd_ps(a.hi, b.hi, c.hi)};
}
INLINE F32 max(F32 a, F32 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
INLINE F32 min(F32 a, F32 b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
INLINE F32 sqrt(F32 a) { return {_mm256_sqrt_ps(a.lo), _mm256_sqrt_ps(a.hi)}; }
INLINE F32 where_less(F32 a, F32 b, F32 yes, F32 no) {
    return {_mm256_blendv_ps(no.lo, yes.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ)),
            _mm256_blendv_ps(no.hi, yes.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ))};
}
INLINE bool any_less(F32 a, F32 b) {
    return _mm256_movemask_ps(_mm256_or_ps(_mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ),
                                           _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ))) != 0;
}
INLINE F32 keep(F32 a, int n, F32 rest) {
    const __m256i index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256 low = _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n), index));
    const __m256 high = _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n - 8), index));
    return {_mm256_blendv_ps(rest.lo, a.lo, low), _mm256_blendv_ps(rest.hi, a.hi, high)};
}
INLINE F32 round(F32 a) {
    return {_mm256_round_ps(a.lo, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
            _mm256_round_ps(a.hi, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
INLINE __m256 power8(__m256 n) {
    return _mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
INLINE F32 power_of_two(F32 n) { return {power8(n.lo), power8(n.hi)}; }

INLINE F32 rounded_to(bf16, F32 a) {
    alignas(32) bf16 lanes[LANES];
    store(lanes, a);
    return load(lanes);
}
template <int DISTANCE>
INLINE F32 swap_at(F32 a) {
    if constexpr (DISTANCE == 1) return {_mm256_permute_ps(a.lo, 0xb1), _mm256_permute_ps(a.hi, 0xb1)};
    if constexpr (DISTANCE == 2) return {_mm256_permute_ps(a.lo, 0x4e), _mm256_permute_ps(a.hi, 0x4e)};
    if constexpr (DISTANCE == 4) return {_mm256_permute2f128_ps(a.lo, a.lo, 1), _mm256_permute2f128_ps(a.hi, a.hi, 1)};
    if constexpr (DISTANCE == 8) return {a.hi, a.lo};
}
INLINE __m256 lower_half(F32 a) { return a.lo; }
INLINE __m256 upper_half(F32 a) { return a.hi; }
INLINE uint32_t mask16(__m256 low, __m256 high) {
    return uint32_t(_mm256_movemask_ps(low)) | uint32_t(_mm256_movemask_ps(high)) << 8;
}
INLINE uint32_t at_least(F32 a, F32 b) {
    return mask16(_mm256_cmp_ps(a.lo, b.lo, _CMP_GE_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_GE_OQ));
}
INLINE uint32_t unordered(F32 a, F32 b) {
    return mask16(_mm256_cmp_ps(a.lo, b.lo, _CMP_UNORD_Q), _mm256_cmp_ps(a.hi, b.hi, _CMP_UNORD_Q));
}

INLINE void store_where_clear(float* p, F32 a, uint32_t bits) {  // lane i where bit i is 0
    const __m256i lanes = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i lo = _mm256_and_si256(_mm256_set1_epi32(int(bits)), lanes);
    const __m256i hi = _mm256_and_si256(_mm256_set1_epi32(int(bits >> 8)), lanes);
    _mm256_maskstore_ps(p, _mm256_cmpeq_epi32(lo, _mm256_setzero_si256()), a.lo);
    _mm256_maskstore_ps(p + 8, _mm256_cmpeq_epi32(hi, _mm256_setzero_si256()), a.hi);
}
INLINE Bits load_bits(const void* p) {
    const __m256i* half = static_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(half), _mm256_loadu_si256(half + 1)};
}
INLINE void store_bits(void* p, Bits a) {
    _mm256_storeu_si256(static_cast<__m256i*>(p), a.lo);
    _mm256_storeu_si256(static_cast<__m256i*>(p) + 1, a.hi);
}
INLINE Bits zero_bits() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
INLINE Bits repeat(int32_t value) { return {_mm256_set1_epi32(value), _mm256_set1_epi32(value)}; }
INLINE Bits operator&(Bits a, Bits b) { return {_mm256_and_si256(a.lo, b.lo), _mm256_and_si256(a.hi, b.hi)}; }
INLINE Bits operator|(Bits a, Bits b) { return {_mm256_or_si256(a.lo, b.lo), _mm256_or_si256(a.hi, b.hi)}; }
INLINE Bits shift_left(Bits a, int n) { return {_mm256_slli_epi32(a.lo, n), _mm256_slli_epi32(a.hi, n)}; }
INLINE Bits shift_right(Bits a, int n) { return {_mm256_srli_epi32(a.lo, n), _mm256_srli_epi32(a.hi, n)}; }
INLINE Bits to_int(F32 a) { return {_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)}; }
INLINE F32 to_f32(Bits a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
INLINE __m128i to_bytes(Bits a) {
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a.lo, a.hi), 0xd8);
    return _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}
INLINE F32 as_f32(Bits a) { return {_mm256_castsi256_ps(a.lo), _mm256_castsi256_ps(a.hi)}; }
INLINE F32 low_bf16(Bits a) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(a.lo, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(a.hi, 16))};
}
INLINE F32 high_bf16(Bits a) {
    const __m256i high = _mm256_set1_epi32(int(0xffff0000u));
    return {_mm256_castsi256_ps(_mm256_and_si256(a.lo, high)), _mm256_castsi256_ps(_mm256_and_si256(a.hi, high))};
}
INLINE Bits load_table(const uint8_t* p) {
    const __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return {table, table};
}
INLINE Bits look_up(Bits table, Bits indices) {
    return {_mm256_shuffle_epi8(table.lo, indices.lo), _mm256_shuffle_epi8(table.hi, indices.hi)};
}
INLINE __m256i dot8(__m256i acc, __m256i u, __m256i s) {
    const __m256i low = _mm256_set1_epi16(0xff);
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256(u, low), _mm256_srai_epi16(_mm256_slli_epi16(s, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(u, 8), _mm256_srai_epi16(s, 8));
    return _mm256_add_epi32(acc, _mm256_add_epi32(even, odd));
}
using Int32 = Bits;  // 16 sums of products of bytes
INLINE Int32 dot_bytes(Int32 acc, Bits u, Bits s) { return {dot8(acc.lo, u.lo, s.lo), dot8(acc.hi, u.hi, s.hi)}; }
INLINE Int32 repeat_int(int32_t value) { return repeat(value); }

#endif

INLINE F32 rounded_to(float, F32 a) { return a; }
INLINE F32 swap_pairs(F32 a) { return swap_at<1>(a); }  // lanes 1 0 3 2 5 4 ...

// Sums and maxima over the 16 lanes, in one fixed order: a tree over halves. Where there is a NaN, a maximum is open.
INLINE float sum(F32 a) {
    const __m256 eight = _mm256_add_ps(lower_half(a), upper_half(a));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
INLINE float peak(F32 a) {
    const __m256 eight = _mm256_max_ps(lower_half(a), upper_half(a));
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

// e^x, relative error below 2e-7; 0 below -87.3, NaN stays. x = n ln 2 + r, |r| <= ln 2 / 2, e^r by Taylor's series.
INLINE F32 exp(F32 x) {
    const F32 clamped = min(set(88.3762f), max(set(-87.3365f), x));  // operand order keeps a NaN
    const F32 n = round(clamped * set(1.44269504f));
    F32 r = fnma(n, set(0.693359375f), clamped);  // ln 2 in two parts, the first exact
    r = fnma(n, set(-2.12194440e-4f), r);
    F32 p = set(1.0f / 720);
    p = fma(p, r, set(1.0f / 120));
    p = fma(p, r, set(1.0f / 24));
    p = fma(p, r, set(1.0f / 6));
    p = fma(p, r, set(0.5f));
    p = fma(p, r, set(1.0f));
    p = fma(p, r, set(1.0f));
    return where_less(x, set(-87.3365f), zero(), p * power_of_two(n));
}

// 2^x for x <= 0, relative error below 2e-7, exactly 1 at 0; 0 below -126; a NaN stays. 2^x = 2^n 2^r, |r| <= 1/2,
// 2^r by the polynomial of degree 5 with the least relative error among those that are 1 at 0.
INLINE F32 exp2(F32 x) {
    const F32 n = round(x), r = x - n;  // NaN for an infinity, in whose place the zero goes
    F32 p = set(0.0013264727f);
    p = fma(p, r, set(0.009671513f));
    p = fma(p, r, set(0.055507337f));
    p = fma(p, r, set(0.24022242f));
    p = fma(p, r, set(0.69314698f));
    p = fma(p, r, set(1));
#if CIERZO_AVX512
    return {_mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x.v, set(-126).v, _CMP_NLT_UQ), p.v, n.v)};
#else
    return where_less(x, set(-126), zero(), p * power_of_two(n));
#endif
}

INLINE F32 silu(F32 x) { return x / (set(1.0f) + exp(zero() - x)); }

// A pair of activations against 16 pairs of weights, the step that all bf16 products are made of:
// acc[i] += x0 * w[2i] + x1 * w[2i + 1]. Where the CPU has no instruction for it, activations are kept as floats.
#if CIERZO_DOT
using Pair = uint32_t;  // two bf16
struct PairVector {
    Bits both;
};
INLINE PairVector repeat_pair(const Pair* p) { return {repeat(int32_t(*p))}; }
INLINE F32 dot_pair(F32 acc, Bits w, PairVector x) {
    return {_mm512_dpbf16_ps(acc.v, (__m512bh)x.both.v, (__m512bh)w.v)};
}
INLINE Pair make_pair(bf16 x0, bf16 x1) { return uint32_t(x0.bits) | uint32_t(x1.bits) << 16; }
#else
struct Pair {
    float x0, x1;
};
struct PairVector {
    F32 x0, x1;
};
INLINE PairVector repeat_pair(const Pair* p) { return {set(p->x0), set(p->x1)}; }
INLINE F32 dot_pair(F32 acc, Bits w, PairVector x) {
    return fma(high_bf16(w), x.x1, fma(low_bf16(w), x.x0, acc));
}
INLINE Pair make_pair(bf16 x0, bf16 x1) { return {widen(x0), widen(x1)}; }
#endif

}  // namespace
