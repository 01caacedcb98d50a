// Copies of cache blocks (ops/blocks.py).
#include "common.cuh"

namespace {

// Copies block source_ids[j * id_stride] to block destination_ids[j * id_stride]; a side without ids takes block j. A
// number that is not a block's is left out. grid.x: j; grid.y: pieces of a block.
template <class Value>
__device__ __forceinline__ void copy(const unsigned char* source, unsigned char* destination, const i64* source_ids,
                                     const i64* destination_ids, i64 id_stride, i64 sources, i64 destinations,
                                     i64 block_bytes) {
    const i64 j = blockIdx.x;
    const i64 from = source_ids ? source_ids[j * id_stride] : j;
    const i64 to = destination_ids ? destination_ids[j * id_stride] : j;
    if (u64(from) >= u64(sources) || u64(to) >= u64(destinations)) return;
    const Value* read = reinterpret_cast<const Value*>(source + from * block_bytes);
    Value* write = reinterpret_cast<Value*>(destination + to * block_bytes);
    const i64 values = block_bytes / i64(sizeof(Value)), step = i64(gridDim.y) * blockDim.x;
#pragma unroll 4
    for (i64 i = i64(blockIdx.y) * blockDim.x + threadIdx.x; i < values; i += step) write[i] = read[i];
}

}  // namespace

// For addresses and sizes that are multiples of 16 bytes.
extern "C" __global__ void __launch_bounds__(256)
    copy_blocks_16(const unsigned char* source, unsigned char* destination, const i64* source_ids,
                   const i64* destination_ids, i64 id_stride, i64 sources, i64 destinations, i64 block_bytes) {
    copy<uint4>(source, destination, source_ids, destination_ids, id_stride, sources, destinations, block_bytes);
}

extern "C" __global__ void __launch_bounds__(256)
    copy_blocks_1(const unsigned char* source, unsigned char* destination, const i64* source_ids,
                  const i64* destination_ids, i64 id_stride, i64 sources, i64 destinations, i64 block_bytes) {
    copy<unsigned char>(source, destination, source_ids, destination_ids, id_stride, sources, destinations,
                        block_bytes);
}
