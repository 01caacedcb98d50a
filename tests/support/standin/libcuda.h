// What the two files of the stand-in share.

#define _GNU_SOURCE
#include <cuda.h>
#include <elf.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { POISON = 0xFF, ALIGNMENT = 512, MOST_PARAMETERS = 128, MOST_THREADS = 1024, WARP = 32 };
enum { PLAIN_SHARED = 48 << 10, OPT_IN_SHARED = 227 << 10, SHARED_OF_SM = 228 << 10, REGISTERS = 65536 };

// The error that this call must return: one that stays, or one that a test has put here.
CUresult entered(const char *call);
#define ENTER() do { CUresult entry_ = entered(__func__); if (entry_) return entry_; } while (0)
#define REFUSE(condition, result) do { if (condition) return result; } while (0)
