// CUDA kernels on the CPU, a block at a time: the same .cu compiled by g++, its threads as fibers.
//
// A thread runs until it must wait: for its block (__syncthreads), for lanes of its warp (shuffles, votes,
// __syncwarp), or until it returns. A seed other than 0 shuffles the order in which waiting threads go on and in which
// blocks run, and lets a thread give way at an atomic operation: what depends on the order is then seen to change.
//
// What CUDA leaves undefined ends the launch with a message: a barrier that only some threads reach, or reach at
// another line; a warp operation whose mask names a lane that is elsewhere, has returned or does not exist, or leaves
// out the caller; a shuffle from a lane outside the mask; more shared memory written than was asked for. Shared
// memory starts each block as 0xff bytes: NaN as a float, -1 as an integer.
//
// Not shown: threads of one warp at different speeds between two waits (one of them always runs on alone), blocks that
// meet in global memory, the order of memory operations, and anything about speed.
#pragma once

#define CUDA_ON_CPU 1

#include <csetjmp>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <sys/mman.h>
#include <ucontext.h>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
// Lies in a section of its own, to be overwritten between blocks. Not for use in templates.
#define __shared__ static __attribute__((section("cuda_shared")))
#define DYNAMIC_SHARED(name) unsigned char* const name = cuda_on_cpu::dynamic_shared

extern "C" {
extern char __start_cuda_shared[] __attribute__((weak, visibility("hidden")));
extern char __stop_cuda_shared[] __attribute__((weak, visibility("hidden")));
}

struct uint3 {
    unsigned x, y, z;
};
using dim3 = uint3;
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

static uint3 threadIdx, blockIdx, blockDim, gridDim;
constexpr int warpSize = 32;

namespace cuda_on_cpu {

enum State { READY, AT_BARRIER, AT_WARP, RETURNED };
enum Operation { SHUFFLE, SHUFFLE_UP, SHUFFLE_DOWN, SHUFFLE_XOR, BALLOT, MATCH, SYNC };
constexpr const char* NAMES[] = {"__shfl_sync", "__shfl_up_sync", "__shfl_down_sync", "__shfl_xor_sync",
                                 "__ballot_sync", "__match_any_sync", "__syncwarp"};
constexpr size_t STACK_BYTES = 128 << 10, GUARD_BYTES = 256;
constexpr unsigned char POISON = 0xff, GUARD = 0xa5;

struct Thread {
    State state;
    bool started;
    uint3 index;
    int line;  // where it waits
    Operation operation;
    unsigned mask;
    uint64_t value, result;
    int argument, width;
    ucontext_t context;
    jmp_buf resume;
};

static unsigned char* dynamic_shared;
static std::vector<Thread> threads;
static Thread* current;
static jmp_buf scheduler;
static bool failed;
static std::string message;
static std::mt19937 random_numbers;
static bool shuffled;
static void (*body)(void*);
static void* body_argument;

inline int number_of(const Thread& thread) { return int(&thread - threads.data()); }

[[noreturn]] inline void fail(const char* format, ...) {
    char text[512];
    va_list values;
    va_start(values, format);
    vsnprintf(text, sizeof text, format, values);
    va_end(values);
    char where[128];
    snprintf(where, sizeof where, "block (%u,%u,%u) thread (%u,%u,%u): ", blockIdx.x, blockIdx.y, blockIdx.z,
             threadIdx.x, threadIdx.y, threadIdx.z);
    message = std::string(where) + text;
    failed = true;
    _longjmp(scheduler, 1);
}

// From a thread back to the scheduler, until it is resumed.
__attribute__((noinline)) inline void give_way() {
    if (_setjmp(current->resume) == 0) _longjmp(scheduler, 1);
}

inline void entry() {
    body(body_argument);
    current->state = RETURNED;
    _longjmp(scheduler, 1);
}

__attribute__((noinline)) inline void run(Thread& thread) {
    current = &thread;
    threadIdx = thread.index;
    if (_setjmp(scheduler) != 0) return;
    if (thread.started) _longjmp(thread.resume, 1);
    thread.started = true;
    setcontext(&thread.context);
}

// --- waiting ---

inline void barrier(int line) {
    current->state = AT_BARRIER;
    current->line = line;
    give_way();
}

inline uint64_t result_of(const Thread* warp, const Thread& thread) {
    const int lane = number_of(thread) % 32, first = lane / thread.width * thread.width;
    if (thread.operation == SYNC) return 0;
    if (thread.operation == BALLOT || thread.operation == MATCH) {
        uint64_t found = 0;
        for (int i = 0; i < 32; ++i)
            if (thread.mask >> i & 1)
                found |= uint64_t(thread.operation == MATCH ? warp[i].value == thread.value : warp[i].value != 0) << i;
        return found;
    }
    int source = lane;
    if (thread.operation == SHUFFLE) source = first + (thread.argument & (thread.width - 1));
    if (thread.operation == SHUFFLE_UP) source = lane - thread.argument;
    if (thread.operation == SHUFFLE_DOWN) source = lane + thread.argument;
    if (thread.operation == SHUFFLE_XOR) source = lane ^ thread.argument;
    if (source < first || source >= first + thread.width) return thread.value;
    if (!(thread.mask >> source & 1))
        fail("%s at line %d reads lane %d, which is not in mask %08x", NAMES[thread.operation], thread.line, source,
             thread.mask);
    return warp[source].value;
}

// The caller waits for the lanes of the mask; the last one computes what all of them get.
inline uint64_t meet(Operation operation, int line, unsigned mask, uint64_t value, int argument, int width) {
    Thread& self = *current;
    const int lane = number_of(self) % 32, begin = number_of(self) - lane;
    const int lanes = int(threads.size()) - begin < 32 ? int(threads.size()) - begin : 32;
    const char* name = NAMES[operation];
    if (lanes < 32 && mask >> lanes) fail("%s at line %d: mask %08x names lanes that do not exist", name, line, mask);
    if (!(mask >> lane & 1)) fail("%s at line %d: mask %08x leaves out lane %d, the caller", name, line, mask, lane);
    if (width < 1 || width > 32 || width & (width - 1)) fail("%s at line %d: width %d", name, line, width);
    self.state = AT_WARP;
    self.line = line, self.operation = operation, self.mask = mask;
    self.value = value, self.argument = argument, self.width = width;
    Thread* warp = &threads[begin];
    bool complete = true;
    for (int i = 0; i < 32; ++i) {
        if (!(mask >> i & 1)) continue;
        if (warp[i].state == RETURNED) fail("%s at line %d: lane %d of mask %08x has returned", name, line, i, mask);
        if (warp[i].state != AT_WARP) {
            complete = false;
        } else if (warp[i].line != line || warp[i].operation != operation || warp[i].mask != mask) {
            fail("%s at line %d, mask %08x, while lane %d is in %s at line %d, mask %08x", name, line, mask, i,
                 NAMES[warp[i].operation], warp[i].line, warp[i].mask);
        }
    }
    if (complete) {
        for (int i = 0; i < 32; ++i)
            if (mask >> i & 1) warp[i].result = result_of(warp, warp[i]);
        for (int i = 0; i < 32; ++i)
            if (mask >> i & 1) warp[i].state = READY;
    }
    if (!complete || shuffled) give_way();
    return self.result;
}

template <class T>
inline T exchanged(Operation operation, int line, unsigned mask, T value, int argument, int width = 32) {
    static_assert(sizeof(T) <= 8 && std::is_trivially_copyable<T>::value, "shuffles move up to 8 bytes");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(T));
    bits = meet(operation, line, mask, bits, argument, width);
    memcpy(&value, &bits, sizeof(T));
    return value;
}

inline void sync_warp(int line, unsigned mask = 0xffffffffu) { meet(SYNC, line, mask, 0, 0, 32); }

// Where the order of threads could reach a result.
inline void at_atomic() {
    if (shuffled && random_numbers() % 4 == 0) give_way();
}

// --- blocks ---

inline bool waits_alike(const Thread& a, const Thread& b) { return a.state == b.state && a.line == b.line; }

// No thread can go on: is this a barrier that all have reached?
inline void release_barrier() {
    const Thread* first = &threads[0];
    while (first->state == RETURNED) ++first;  // one waits, or the block would have ended
    const Thread* other = nullptr;
    for (const Thread& thread : threads)
        if (other == nullptr && !waits_alike(thread, *first)) other = &thread;
    if (first->state == AT_BARRIER && other == nullptr) {
        for (Thread& thread : threads) thread.state = READY;
        return;
    }
    message = "the block cannot go on: ";
    for (const Thread* waiting : {first, other}) {
        if (waiting == nullptr) continue;
        const char* what = waiting->state == AT_WARP      ? NAMES[waiting->operation]
                           : waiting->state == AT_BARRIER ? "__syncthreads"
                                                          : nullptr;
        char text[160];
        if (what)
            snprintf(text, sizeof text, "thread %d is in %s (line %d)", number_of(*waiting), what, waiting->line);
        else
            snprintf(text, sizeof text, "thread %d has returned", number_of(*waiting));
        message += (waiting == first ? "" : ", ") + std::string(text);
    }
    failed = true;
}

// Some of the threads that can go on, in any order. Mostly those of one warp: it runs ahead of the others, to the next
// barrier at most.
inline void shuffle(std::vector<int>& order) {
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random_numbers() % i]);
    if (random_numbers() % 8 == 0) {
        order.resize(1 + random_numbers() % order.size());
        return;
    }
    const int warp = order[0] / 32;
    size_t kept = 0;
    for (size_t i = 0; i < order.size(); ++i)
        if (order[i] / 32 == warp) order[kept++] = order[i];
    order.resize(kept);
}

inline void run_block(char* stacks) {
    if (__start_cuda_shared) memset(__start_cuda_shared, POISON, __stop_cuda_shared - __start_cuda_shared);
    for (size_t i = 0; i < threads.size(); ++i) {
        Thread& thread = threads[i];
        thread.state = READY;
        thread.started = false;
        thread.line = 0;
        thread.index = {unsigned(i % blockDim.x), unsigned(i / blockDim.x % blockDim.y),
                        unsigned(i / blockDim.x / blockDim.y)};
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = stacks + i * STACK_BYTES;
        thread.context.uc_stack.ss_size = STACK_BYTES;
        thread.context.uc_link = nullptr;
        makecontext(&thread.context, entry, 0);
    }
    std::vector<int> order;
    while (!failed) {
        order.clear();
        size_t returned = 0;
        for (const Thread& thread : threads) {
            if (thread.state == READY) order.push_back(number_of(thread));
            returned += thread.state == RETURNED;
        }
        if (returned == threads.size()) return;
        if (order.empty()) release_barrier();
        if (shuffled && !order.empty()) shuffle(order);
        for (size_t i = 0; i < order.size() && !failed; ++i) run(threads[order[i]]);
    }
}

inline void run_blocks(char* stacks, unsigned char* shared, size_t shared_bytes) {
    std::vector<unsigned> blocks(size_t(gridDim.x) * gridDim.y * gridDim.z);
    for (size_t i = 0; i < blocks.size(); ++i) blocks[i] = unsigned(i);
    if (shuffled)
        for (size_t i = blocks.size(); i > 1; --i) std::swap(blocks[i - 1], blocks[random_numbers() % i]);
    for (size_t i = 0; i < blocks.size() && !failed; ++i) {
        memset(shared, POISON, shared_bytes);
        memset(shared + shared_bytes, GUARD, GUARD_BYTES);
        blockIdx = {blocks[i] % gridDim.x, blocks[i] / gridDim.x % gridDim.y, blocks[i] / gridDim.x / gridDim.y};
        run_block(stacks);
        for (size_t j = 0; j < GUARD_BYTES && !failed; ++j) {
            if (shared[shared_bytes + j] == GUARD) continue;
            char text[120];
            snprintf(text, sizeof text, "block (%u,%u,%u) wrote byte %zu of %zu bytes of shared memory", blockIdx.x,
                     blockIdx.y, blockIdx.z, shared_bytes + j, shared_bytes);
            message = text;
            failed = true;
        }
    }
}

template <class... A, size_t... I>
inline void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
    kernel(*static_cast<A*>(arguments[I])...);
}

// sizes: grid x, y, z, block x, y, z, bytes of dynamic shared memory. Null, or why the launch failed.
template <class... A>
const char* launch(void (*kernel)(A...), const int64_t* sizes, unsigned seed, void** arguments, const int* widths,
                   int count) {
    const int expected[] = {int(sizeof(A))..., 0};
    if (count != int(sizeof...(A))) return "the kernel takes another number of arguments";
    for (int i = 0; i < count; ++i)
        if (widths[i] != expected[i]) return "an argument has another width";
    gridDim = {unsigned(sizes[0]), unsigned(sizes[1]), unsigned(sizes[2])};
    blockDim = {unsigned(sizes[3]), unsigned(sizes[4]), unsigned(sizes[5])};
    threads.resize(sizes[3] * sizes[4] * sizes[5]);
    failed = false;
    message.clear();
    shuffled = seed != 0;
    random_numbers.seed(seed);
    struct Bound {
        void (*kernel)(A...);
        void** arguments;
    } bound{kernel, arguments};
    body = [](void* state) {
        const Bound& bound = *static_cast<Bound*>(state);
        call(bound.kernel, bound.arguments, std::index_sequence_for<A...>());
    };
    body_argument = &bound;
    const size_t stack_bytes = threads.size() * STACK_BYTES;
    void* const stacks = mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
    if (stacks == MAP_FAILED) return "no memory for the threads' stacks";
    std::vector<uint4> shared((size_t(sizes[6]) + GUARD_BYTES) / sizeof(uint4) + 1);
    dynamic_shared = reinterpret_cast<unsigned char*>(shared.data());
    run_blocks(static_cast<char*>(stacks), dynamic_shared, size_t(sizes[6]));
    munmap(stacks, stack_bytes);
    return failed ? message.c_str() : nullptr;
}

}  // namespace cuda_on_cpu

#define CUDA_ON_CPU_KERNEL(name)                                                                                      \
    extern "C" __attribute__((visibility("default"))) const char* run_##name(                                         \
        const int64_t* sizes, unsigned seed, void** arguments, const int* widths, int count) {                        \
        return cuda_on_cpu::launch(name, sizes, seed, arguments, widths, count);                                      \
    }

#define __syncthreads() cuda_on_cpu::barrier(__LINE__)
#define __syncwarp(...) cuda_on_cpu::sync_warp(__LINE__, ##__VA_ARGS__)
#define __shfl_sync(mask, ...) cuda_on_cpu::exchanged(cuda_on_cpu::SHUFFLE, __LINE__, mask, __VA_ARGS__)
#define __shfl_up_sync(mask, ...) cuda_on_cpu::exchanged(cuda_on_cpu::SHUFFLE_UP, __LINE__, mask, __VA_ARGS__)
#define __shfl_down_sync(mask, ...) cuda_on_cpu::exchanged(cuda_on_cpu::SHUFFLE_DOWN, __LINE__, mask, __VA_ARGS__)
#define __shfl_xor_sync(mask, ...) cuda_on_cpu::exchanged(cuda_on_cpu::SHUFFLE_XOR, __LINE__, mask, __VA_ARGS__)
#define __ballot_sync(mask, predicate) \
    unsigned(cuda_on_cpu::meet(cuda_on_cpu::BALLOT, __LINE__, mask, uint64_t((predicate) != 0), 0, 32))
#define __any_sync(mask, predicate) int(__ballot_sync(mask, predicate) != 0)
#define __match_any_sync(mask, value) \
    unsigned(cuda_on_cpu::meet(cuda_on_cpu::MATCH, __LINE__, mask, uint64_t(value), 0, 32))

template <class T, class U>
inline T atomicAdd(T* address, U value) {
    cuda_on_cpu::at_atomic();
    const T old = *address;
    *address = old + T(value);
    return old;
}

inline void __threadfence() {}  // blocks run one after the other

inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __float_as_int(float value) {
    int bits;
    memcpy(&bits, &value, 4);
    return bits;
}
inline float __int_as_float(int bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
inline long long __double_as_longlong(double value) {
    long long bits;
    memcpy(&bits, &value, 8);
    return bits;
}
inline double __longlong_as_double(long long bits) {
    double value;
    memcpy(&value, &bits, 8);
    return value;
}
