// Threads that run one operation together, and the scratch memory they share.
//
// A kernel is a function that every thread of the team calls with the same arguments (SPMD). Work is claimed item by
// item from one counter, so that a thread that the host slows down takes fewer items; which thread computes an item
// never changes its bits. `each` ends with a barrier: what it wrote is then visible to the whole team.
#pragma once

#include <omp.h>
#include <sched.h>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

#include "simd.h"

// One per process, in common.cpp: claims, barrier, and the arena.
struct Crew {
    int64_t next;
    int32_t arrived;
    int32_t generation;
    char* arena;
    size_t arena_bytes;
};
extern "C" Crew* cierzo_enter();            // waits until no other operation runs
extern "C" void cierzo_leave(Crew* crew);
extern "C" [[noreturn]] void cierzo_arena_full(size_t wanted_bytes, size_t arena_bytes);

namespace {

// In a build under AddressSanitizer, scratch memory ends where it was asked to end: touching what lies behind it is an
// error, as is touching what was never asked for.
#ifdef __SANITIZE_ADDRESS__
constexpr size_t FENCE_BYTES = 64, FENCED_BYTES = size_t(32) << 20;
INLINE char* fence(char* memory, size_t wanted, size_t bytes) {
    wanted = (wanted + 7) & ~size_t(7);  // whole granules: the team does this together, and always alike
    ASAN_UNPOISON_MEMORY_REGION(memory, wanted);
    ASAN_POISON_MEMORY_REGION(memory + wanted, bytes - wanted);
    return memory;
}
#else
constexpr size_t FENCE_BYTES = 0, FENCED_BYTES = 0;
INLINE char* fence(char* memory, size_t, size_t) { return memory; }
#endif

constexpr int SPINS = 4000;  // pauses before a waiting thread offers its core to others: tens of microseconds

class Team {
   public:
    const int rank, size;

    Team(Crew* crew, int rank, int size) : rank(rank), size(size), crew_(crew) {}

    // All threads wait for each other; the counter of claims starts anew.
    void barrier() {
        if (size == 1) {
            crew_->next = 0;
            return;
        }
        const int32_t generation = __atomic_load_n(&crew_->generation, __ATOMIC_ACQUIRE);
        if (__atomic_add_fetch(&crew_->arrived, 1, __ATOMIC_ACQ_REL) == size) {
            crew_->arrived = 0;
            crew_->next = 0;
            __atomic_store_n(&crew_->generation, generation + 1, __ATOMIC_RELEASE);
            return;
        }
        for (int spins = 0; __atomic_load_n(&crew_->generation, __ATOMIC_ACQUIRE) == generation; ++spins)
            spins < SPINS ? _mm_pause() : void(sched_yield());
    }

    // body(i) for every i in [0, count), each by one thread; then a barrier.
    template <class Body>
    void each(int64_t count, Body body) {
        for (int64_t i = claim(); i < count; i = claim()) body(i);
        barrier();
    }

    // Scratch shared by the team: uninitialised, 64-byte aligned. All threads must ask for the same, in the same
    // order. It lasts until the operation ends, or `reset` goes back to an earlier `mark` (all threads, past a barrier).
    template <class T>
    T* scratch(int64_t count) {
        const size_t bytes = padded(size_t(count) * sizeof(T));
        return reinterpret_cast<T*>(fence(take(bytes), size_t(count) * sizeof(T), bytes));
    }

    // Scratch of this thread alone: a slice of what the team allocates for all.
    template <class T>
    T* own_scratch(int64_t count) {
        const size_t bytes = padded(size_t(count) * sizeof(T));
        char* all = take(bytes * size);
        return reinterpret_cast<T*>(fence(all + bytes * rank, size_t(count) * sizeof(T), bytes));
    }

    size_t mark() const { return used_; }
    void reset(size_t mark) { used_ = mark; }

   private:
    static size_t padded(size_t bytes) { return ((bytes + 63) & ~size_t(63)) + FENCE_BYTES; }

    char* take(size_t bytes) {
        if (used_ + bytes > crew_->arena_bytes) cierzo_arena_full(used_ + bytes, crew_->arena_bytes);
        used_ += bytes;
        return crew_->arena + used_ - bytes;
    }

    int64_t claim() { return __atomic_fetch_add(&crew_->next, 1, __ATOMIC_RELAXED); }

    Crew* crew_;
    size_t used_ = 0;
};

// Runs body(team) on `threads` threads, or on as many as OpenMP grants.
template <class Body>
int run(int threads, Body body) {
    Crew* crew = cierzo_enter();
    fence(crew->arena, 0, FENCED_BYTES);
    if (threads == 1) {
        Team team(crew, 0, 1);
        body(team);
        cierzo_leave(crew);
        return 0;
    }
#pragma omp parallel num_threads(threads)
    {
        Team team(crew, omp_get_thread_num(), omp_get_num_threads());
        body(team);
    }
    cierzo_leave(crew);
    return 0;
}

// The threads that a light operation (a norm, a rotation) on `values` numbers is worth. One thread takes some 20
// microseconds for VALUES_ALONE; waking the others takes a few, and milliseconds where another process has their core.
constexpr int64_t VALUES_ALONE = 1 << 17;
INLINE int threads_worth(int64_t values, int threads) { return values < VALUES_ALONE ? 1 : threads; }

INLINE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace
