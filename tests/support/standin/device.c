// What has no state, or next to none: tensor maps, the device and its context, words for errors.

#include "libcuda.h"

#define MAP_MAGIC 0x70616d2d72736e74ull

// Ours; opaque to all but whoever reads it when a launch runs. Triton clears bit 21 of the second word.
typedef struct { uint64_t magic, word, address, dims[5], strides[4]; uint32_t box[5], rank, type, swizzle; } Map;

static CUcontext current;

// --- tensor maps: the requirements that CUDA's manual lists for cuTensorMapEncodeTiled -----------------------------

CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *dims, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
    static const unsigned sizes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4}, spans[] = {256, 32, 64, 128};
    ENTER();
    REFUSE((uintptr_t)map % 64 || type >= sizeof sizes / sizeof *sizes, CUDA_ERROR_INVALID_VALUE);
    REFUSE(!rank || rank > 5 || (uintptr_t)address % 16 || !address, CUDA_ERROR_INVALID_VALUE);
    REFUSE(interleave != CU_TENSOR_MAP_INTERLEAVE_NONE, CUDA_ERROR_NOT_SUPPORTED); // nothing of ours
    REFUSE((unsigned)swizzle > 3 || (unsigned)promotion > 3 || (unsigned)fill > 1, CUDA_ERROR_INVALID_VALUE);
    REFUSE(fill && type < CU_TENSOR_MAP_DATA_TYPE_FLOAT16, CUDA_ERROR_INVALID_VALUE);
    for (unsigned at = 0; at < rank; at++) {
        REFUSE(!dims[at] || dims[at] > 1ull << 32, CUDA_ERROR_INVALID_VALUE);
        REFUSE(!box[at] || box[at] > 256 || !steps[at] || steps[at] > 8, CUDA_ERROR_INVALID_VALUE);
        REFUSE(at + 1 < rank && (strides[at] % 16 || strides[at] >= 1ull << 40), CUDA_ERROR_INVALID_VALUE);
    }
    unsigned inner = box[0] * sizes[type];
    REFUSE(inner % 16 || (swizzle && inner > spans[swizzle]), CUDA_ERROR_INVALID_VALUE);
    Map made = {MAP_MAGIC, 0, (uintptr_t)address, .rank = rank, .type = type, .swizzle = swizzle};
    memcpy(made.dims, dims, rank * sizeof *dims);
    memcpy(made.strides, strides, (rank - 1) * sizeof *strides);
    memcpy(made.box, box, rank * sizeof *box);
    _Static_assert(sizeof made <= sizeof *map, "a tensor map has 128 bytes");
    memcpy(map, &made, sizeof made);
    return CUDA_SUCCESS;
}
CUresult cuTensorMapEncodeIm2col(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                 const cuuint64_t *dims, const cuuint64_t *strides, const int *lower,
                                 const int *upper, cuuint32_t channels, cuuint32_t pixels, const cuuint32_t *steps,
                                 CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                 CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
    return CUDA_ERROR_NOT_SUPPORTED; // nothing of ours
}

// --- device --------------------------------------------------------------------------------------------------

CUresult cuInit(unsigned flags) { ENTER(); return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { return *version = 13000, CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int *count) { return *count = 1, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) {
    REFUSE(ordinal, CUDA_ERROR_INVALID_DEVICE);
    return *device = 0, CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    static const int known[][2] = { // an H200's
        {CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, 9},
        {CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, 0},
        {CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, OPT_IN_SHARED},
        {CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR, SHARED_OF_SM},
        {CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK, PLAIN_SHARED},
        {CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK, REGISTERS},
        {CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, 132},
        {CU_DEVICE_ATTRIBUTE_WARP_SIZE, WARP},
        {CU_DEVICE_ATTRIBUTE_CLOCK_RATE, 1980000},
        {CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE, 3201000},
        {CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH, 6144},
    };
    for (size_t at = 0; at < sizeof known / sizeof *known; at++)
        if (known[at][0] == (int)attribute) return *value = known[at][1], CUDA_SUCCESS;
    return CUDA_ERROR_INVALID_VALUE;
}
CUresult cuOccupancyMaxActiveClusters(int *most, CUfunction function, const CUlaunchConfig *config) {
    ENTER();
    return *most = 132, CUDA_SUCCESS; // of one block
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    ENTER();
    return *context = (CUcontext)&current, CUDA_SUCCESS;
}
CUresult cuCtxSetCurrent(CUcontext context) { ENTER(); return current = context, CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *context) { return *context = current, CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) { return *device = 0, CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return *value = 0, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }

CUresult cuGetErrorString(CUresult error, const char **text) {
    static const struct { int error; const char *text; } known[] = {
        {0, "no error"}, {1, "invalid argument"}, {2, "out of memory"}, {101, "invalid device ordinal"},
        {200, "device kernel image is invalid"}, {400, "invalid resource handle"}, {401, "illegal state"},
        {500, "named symbol not found"}, {600, "device not ready"}, {700, "an illegal memory access was encountered"},
        {701, "too many resources requested for launch"}, {702, "the launch timed out and was terminated"},
        {710, "device-side assert triggered"}, {715, "an illegal instruction was encountered"},
        {716, "misaligned address"}, {719, "unspecified launch failure"}, {801, "operation not supported"},
        {900, "operation not permitted when stream is capturing"},
        {901, "operation failed due to a previous error during capture"},
        {907, "operation not permitted on an event last recorded in a capturing stream"},
    };
    for (size_t at = 0; at < sizeof known / sizeof *known; at++)
        if (known[at].error == (int)error) return *text = known[at].text, CUDA_SUCCESS;
    return *text = "unknown error", CUDA_ERROR_INVALID_VALUE;
}
