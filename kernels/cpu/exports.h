// The C entry points of one instruction set: NAME(rms_norm) is cierzo_<set>_rms_norm.
#include "abi.h"
#include "dense.h"
#include "gemm.h"
#include "norm.h"
#include "simd.h"
#include "team.h"

#define VISIBLE __attribute__((visibility("default")))
#define JOIN(a, b, c) a##b##_##c
#define EXPAND(a, b, c) JOIN(a, b, c)
#define NAME(operation) EXPAND(cierzo_, CIERZO_SET, operation)
#define EXPORT(operation, Args, kernel)                                    \
    extern "C" VISIBLE int NAME(operation)(const Args* args, int threads);        \
    extern "C" VISIBLE int NAME(operation)(const Args* args, int threads) {       \
        return run(threads, [args](Team& team) { kernel(team, *args); });         \
    }

EXPORT(norm, NormArgs, norm)
EXPORT(linear, LinearArgs, linear)
EXPORT(gated_mlp, GatedMlpArgs, gated_mlp)
