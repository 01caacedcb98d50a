// Helpers of all kernels. NVRTC compiles the sources for a GPU; tests compile the same files with g++, after a header
// that runs the threads of a block on the CPU. Arithmetic is IEEE-754 step by step (no contraction: a fused
// multiply-add is written fmaf), so that both give the same bits.
#pragma once

#ifndef CUDA_ON_CPU
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

typedef long long i64;
typedef unsigned long long u64;
typedef unsigned int u32;
typedef unsigned short bf16;  // the bits of a bfloat16

namespace {

constexpr int WARP = 32;
constexpr u32 ALL_LANES = 0xffffffffu;

template <class T>
__device__ __forceinline__ T smaller(T a, T b) {
    return b < a ? b : a;
}
template <class T>
__device__ __forceinline__ T larger(T a, T b) {
    return a < b ? b : a;
}

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }
__device__ __forceinline__ float not_a_number() { return __int_as_float(0x7fc00000); }

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(bf16 bits) { return __int_as_float(int(u32(bits) << 16)); }

// Values k .. k + 3 of a row, as floats; zero from `width` on. `aligned`: the row starts at a multiple of four values.
__device__ __forceinline__ float4 load4(const float* row, int k, int width, bool aligned) {
    if (aligned && k + 4 <= width) return *reinterpret_cast<const float4*>(row + k);
    float4 found;
    found.x = k < width ? row[k] : 0.0f;
    found.y = k + 1 < width ? row[k + 1] : 0.0f;
    found.z = k + 2 < width ? row[k + 2] : 0.0f;
    found.w = k + 3 < width ? row[k + 3] : 0.0f;
    return found;
}
__device__ __forceinline__ float4 load4(const bf16* row, int k, int width, bool aligned) {
    float4 found;
    if (aligned && k + 4 <= width) {
        const uint2 bits = *reinterpret_cast<const uint2*>(row + k);
        found.x = __int_as_float(int(bits.x << 16));
        found.y = __int_as_float(int(bits.x & 0xffff0000u));
        found.z = __int_as_float(int(bits.y << 16));
        found.w = __int_as_float(int(bits.y & 0xffff0000u));
        return found;
    }
    found.x = k < width ? to_float(row[k]) : 0.0f;
    found.y = k + 1 < width ? to_float(row[k + 1]) : 0.0f;
    found.z = k + 2 < width ? to_float(row[k + 2]) : 0.0f;
    found.w = k + 3 < width ? to_float(row[k + 3]) : 0.0f;
    return found;
}

// e^x for x <= 0, with the same rounding at each step on any machine; relative error below 2e-7. NaN stays NaN.
// x = n ln 2 + r, |r| <= ln 2 / 2; 2^n in two factors, since it may be subnormal.
__device__ __forceinline__ float exp_of(float x) {
    if (x < -104.0f) return 0.0f;
    const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
    const float shifted = fmaf(x, 1.44269502f, shift);
    const float n = shifted - shift;
    float r = fmaf(n, -0.693145752f, x);
    r = fmaf(n, -1.42860677e-6f, r);
    float p = 1.98412698e-4f;
    p = fmaf(p, r, 1.38888889e-3f);
    p = fmaf(p, r, 8.33333333e-3f);
    p = fmaf(p, r, 4.16666667e-2f);
    p = fmaf(p, r, 1.66666667e-1f);
    p = fmaf(p, r, 0.5f);
    p = fmaf(p, r, 1.0f);
    p = fmaf(p, r, 1.0f);
    const int whole = x == x ? int(n) : 0, half = whole / 2;
    return p * __int_as_float((half + 127) << 23) * __int_as_float((whole - half + 127) << 23);
}

}  // namespace
