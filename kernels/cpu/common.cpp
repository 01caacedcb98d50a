// What all instruction sets share: which of them this CPU has, and the team's one arena. Compiled for any x86-64.

#include <omp.h>
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#define VISIBLE __attribute__((visibility("default")))
#ifndef CIERZO_ABI
#define CIERZO_ABI ""
#endif

struct Crew {  // as in team.h
    int64_t next;
    int32_t arrived;
    int32_t generation;
    char* arena;
    size_t arena_bytes;
};

namespace {

constexpr int MAX_CPUS = 8192;

pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
Crew crew{};

// Address space alone: a page costs memory once it is touched. A system that refuses to overcommit gets less.
void reserve_arena() {
    for (size_t bytes = size_t(64) << 30; bytes >= size_t(256) << 20; bytes /= 4) {
        void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) continue;
        madvise(memory, bytes, MADV_HUGEPAGE);
        crew.arena = static_cast<char*>(memory);
        crew.arena_bytes = bytes;
        return;
    }
    std::fputs("cierzo: no address space for scratch memory\n", stderr);
    std::abort();
}

}  // namespace

extern "C" {

Crew* cierzo_enter() {
    pthread_mutex_lock(&mutex);
    if (crew.arena == nullptr) reserve_arena();
    crew.next = 0;
    return &crew;
}

void cierzo_leave(Crew*) { pthread_mutex_unlock(&mutex); }

[[noreturn]] void cierzo_arena_full(size_t wanted_bytes, size_t arena_bytes) {
    std::fprintf(stderr, "cierzo: an operation needs %zu bytes of scratch memory, %zu could be reserved\n",
                 wanted_bytes, arena_bytes);
    std::abort();
}

// Which instruction sets this CPU has. Bit 0: AVX2 with FMA and F16C; bit 1: AVX-512 F, BW, DQ, VL; bit 2: that with
// BF16 and VNNI.
VISIBLE int cierzo_instruction_sets() {
    __builtin_cpu_init();
    int found = 0;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) found |= 1;
    if ((found & 1) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        found |= 2;
    if ((found & 2) && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni")) found |= 4;
    return found;
}

// The digest of the abi.py that this library was built beside; empty if it was built by hand.
VISIBLE const char* cierzo_abi() { return CIERZO_ABI; }

// Bind thread i of a team of `threads` to CPU cpus[i % num_cpus]. They are the threads that run operations called from
// this thread with as many threads. Gives how many could not be bound.
VISIBLE int cierzo_pin_threads(int threads, const int* cpus, int num_cpus) {
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(+ : failed)
    {
        cpu_set_t* set = CPU_ALLOC(MAX_CPUS);
        const size_t bytes = CPU_ALLOC_SIZE(MAX_CPUS);
        CPU_ZERO_S(bytes, set);
        CPU_SET_S(cpus[omp_get_thread_num() % num_cpus], bytes, set);
        failed += sched_setaffinity(0, bytes, set) != 0;
        CPU_FREE(set);
    }
    return failed;
}
}
