// A stand-in for libcuda.so.1: what Triton's launcher and we call of CUDA's driver API, on the CPU and without a card.
//
// Work is queued per stream and runs when somebody waits for a stream or an event, no earlier. A launch is checked as
// a driver checks it, then kept with the bytes of its parameters, which the cubin describes; when it runs, a function
// that `standin_runs_kernels` was given computes. Device memory lies in one arena that another process can map at the
// same addresses. It is never given out twice, full of POISON at first and again from where its release has its turn.
// An error of the kind that ends a context stays: every later call returns it.
//
// One thread at a time may call. What this cannot show is listed in __init__.py.

#include "libcuda.h"

#define ARENA ((char *)0x100000000000) // where neither Linux nor a sanitizer puts anything by itself
#define ARENA_BYTES (64ull << 30)      // of addresses; memory is taken when it is touched

typedef CUresult (*RunKernel)(CUfunction, const unsigned *grid, const char *parameters, int recorded);
enum Kind { KERNEL, HOST, WAIT, RELEASE, GRAPH };
typedef struct Item {
    enum Kind kind;
    struct Item *next;
    union {
        struct { CUfunction function; unsigned grid[3]; char *parameters; };
        struct { CUhostFn host; void *data; };
        struct { CUstream stream; uint64_t position; };
        CUdeviceptr address;
        CUgraph graph;
    };
} Item;
typedef struct { Item *first, *last; } List;
enum State { LIVE, POOLED, FREED }; // POOLED: a recording's, which only a recording's replay may touch
typedef struct { CUdeviceptr address; size_t bytes; enum State state; CUgraph owner; } Block;

struct CUstream_st { List queue; uint64_t begun, done; CUgraph recording; bool broken; CUstream next; };
struct CUevent_st { CUstream stream; uint64_t position; bool recorded; };
struct CUgraph_st { List nodes; };
struct CUmod_st { const char *image; };
struct CUfunc_st {
    unsigned threads, registers, fixed_shared, dynamic_shared, count, bytes;
    struct { unsigned offset, size; } parameters[MOST_PARAMETERS];
};

static struct CUstream_st first_stream;
static CUresult sticky;
static RunKernel run_kernel;
static Block *blocks; // in the order of their addresses
static size_t num_blocks, live_bytes, most_bytes = 141ull << 30;
static char *next_free;
static int arena_file = -1, replaying;
static struct { char call[48]; int after; CUresult result; } injected;
static uint64_t counts[2]; // launches, modules loaded

static bool ends_context(CUresult result) {
    return result == CUDA_ERROR_ILLEGAL_ADDRESS || result == CUDA_ERROR_LAUNCH_TIMEOUT ||
           (result >= CUDA_ERROR_ASSERT && result <= CUDA_ERROR_LAUNCH_FAILED && result != 711 && result != 712);
}

static CUresult fault(CUresult result) { return ends_context(result) && !sticky ? sticky = result : result; }

CUresult entered(const char *call) {
    if (!sticky && injected.result && !strcmp(call, injected.call) && injected.after-- == 0) {
        CUresult result = injected.result;
        injected.result = CUDA_SUCCESS;
        return fault(result);
    }
    return sticky;
}

// --- for tests -----------------------------------------------------------------------------------------------

// The arena, made (-1) or mapped from another process's file. Returns its file, -1 without one.
int standin_arena(int file) {
    if (file < 0 && (file = memfd_create("device memory", 0)) >= 0 && ftruncate(file, ARENA_BYTES)) return -1;
    int how = MAP_SHARED | MAP_NORESERVE | MAP_FIXED_NOREPLACE;
    if (mmap(ARENA, ARENA_BYTES, PROT_READ | PROT_WRITE, how, file, 0) != ARENA) return -1;
    next_free = ARENA;
    return arena_file = file;
}
void standin_runs_kernels(RunKernel function) { run_kernel = function; }
void standin_fault(CUresult result) { fault(result); } // what runs has failed
void standin_limit(size_t bytes) { most_bytes = bytes; }
uint64_t standin_count(int which) { return counts[which]; }
// The call number `after` from now returns a result; "kernel": the launch that runs as that one fails.
void standin_inject(const char *call, int after, CUresult result) {
    strncpy(injected.call, call, sizeof injected.call - 1);
    injected.after = after;
    injected.result = result;
}

// As a new process would find it, but for memory and modules: nothing queued, no error.
void standin_reset(void) {
    sticky = injected.result = CUDA_SUCCESS;
    for (CUstream stream = &first_stream; stream; stream = stream->next) {
        stream->queue = (List){0};
        stream->done = stream->begun;
        stream->recording = NULL;
    }
}

static Block *block_of(CUdeviceptr address) {
    size_t low = 0, high = num_blocks;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (blocks[middle].address <= address) low = middle + 1; else high = middle;
    }
    return low && address < blocks[low - 1].address + blocks[low - 1].bytes ? &blocks[low - 1] : NULL;
}

// Bytes from an address to its block's end; 0 where whatever runs now has no business.
size_t standin_extent(CUdeviceptr address) {
    Block *block = block_of(address);
    bool mine = block && (block->state == LIVE || (block->state == POOLED && replaying));
    return mine ? block->address + block->bytes - address : 0;
}

// --- queues --------------------------------------------------------------------------------------------------

static void append(List *list, Item *item) {
    if (list->first) list->last->next = item; else list->first = item;
    list->last = item;
}

static CUresult enqueue(CUstream stream, Item item) {
    stream = stream ? stream : &first_stream;
    Item *kept = malloc(sizeof *kept);
    *kept = item;
    kept->next = NULL;
    if (stream->recording) append(&stream->recording->nodes, kept);
    else append(&stream->queue, kept), stream->begun++;
    return CUDA_SUCCESS;
}

static void drain(CUstream stream, uint64_t position);

static void release(CUdeviceptr address) {
    Block *block = block_of(address);
    memset((void *)block->address, POISON, block->bytes);
    if (block->state == LIVE) live_bytes -= block->owner ? 0 : block->bytes;
    block->state = block->owner ? POOLED : FREED;
}

static void execute(Item *item) {
    if (item->kind == WAIT) drain(item->stream, item->position);
    if (item->kind == RELEASE) release(item->address);
    if (sticky) return;
    if (item->kind == KERNEL) {
        CUresult result = entered("kernel");
        if (!result) result = run_kernel(item->function, item->grid, item->parameters, replaying);
        if (result) fault(ends_context(result) ? result : CUDA_ERROR_LAUNCH_FAILED);
    }
    if (item->kind == HOST) item->host(item->data);
    if (item->kind == GRAPH) {
        replaying++;
        for (Item *node = item->graph->nodes.first; node; node = node->next) execute(node);
        replaying--;
    }
}

static void drain(CUstream stream, uint64_t position) {
    while (stream->done < position) {
        Item *item = stream->queue.first;
        stream->queue.first = item->next;
        stream->done++;
        execute(item);
        if (item->kind == KERNEL) free(item->parameters);
        free(item);
    }
}

static CUresult settle(CUstream stream) {
    stream = stream ? stream : &first_stream;
    if (stream->recording) { stream->broken = true; return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED; }
    drain(stream, stream->begun);
    return sticky;
}

CUresult cuStreamSynchronize(CUstream stream) { ENTER(); return settle(stream); }
CUresult cuCtxSynchronize(void) {
    ENTER();
    CUresult result = CUDA_SUCCESS;
    for (CUstream stream = &first_stream; stream && !result; stream = stream->next) result = settle(stream);
    return result;
}
CUresult cuStreamCreate(CUstream *stream, unsigned flags) {
    ENTER();
    *stream = calloc(1, sizeof **stream);
    (*stream)->next = first_stream.next;
    first_stream.next = *stream;
    return CUDA_SUCCESS;
}
CUresult cuStreamWaitEvent(CUstream stream, CUevent event, unsigned flags) {
    ENTER();
    return enqueue(stream, (Item){.kind = WAIT, .stream = event->stream, .position = event->position});
}
CUresult cuLaunchHostFunc(CUstream stream, CUhostFn function, void *data) {
    ENTER();
    return enqueue(stream, (Item){.kind = HOST, .host = function, .data = data});
}
CUresult cuEventCreate(CUevent *event, unsigned flags) {
    ENTER();
    *event = calloc(1, sizeof **event);
    (*event)->stream = &first_stream;
    return CUDA_SUCCESS;
}
CUresult cuEventDestroy(CUevent event) { return free(event), sticky; }
CUresult cuEventRecord(CUevent event, CUstream stream) {
    ENTER();
    event->stream = stream ? stream : &first_stream;
    event->position = event->stream->begun;
    event->recorded = event->stream->recording;
    return CUDA_SUCCESS;
}
CUresult cuEventQuery(CUevent event) {
    ENTER();
    return event->stream->done < event->position ? CUDA_ERROR_NOT_READY : CUDA_SUCCESS;
}
CUresult cuEventSynchronize(CUevent event) {
    ENTER();
    if (event->recorded) { event->stream->broken = true; return CUDA_ERROR_CAPTURED_EVENT; }
    drain(event->stream, event->position);
    return sticky;
}

// --- recordings ----------------------------------------------------------------------------------------------

CUresult cuStreamBeginCapture(CUstream stream, CUstreamCaptureMode mode) {
    ENTER();
    REFUSE(!stream, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED); // as the legacy stream
    REFUSE(stream->recording, CUDA_ERROR_ILLEGAL_STATE);
    stream->recording = calloc(1, sizeof *stream->recording);
    stream->broken = false;
    return CUDA_SUCCESS;
}
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
    *status = stream && stream->recording ? CU_STREAM_CAPTURE_STATUS_ACTIVE : CU_STREAM_CAPTURE_STATUS_NONE;
    return sticky;
}
CUresult cuStreamEndCapture(CUstream stream, CUgraph *graph) {
    ENTER();
    REFUSE(!stream->recording, CUDA_ERROR_ILLEGAL_STATE);
    *graph = stream->recording;
    stream->recording = NULL;
    return stream->broken ? CUDA_ERROR_STREAM_CAPTURE_INVALIDATED : CUDA_SUCCESS;
}
CUresult cuGraphInstantiate(CUgraphExec *ready, CUgraph graph, unsigned long long flags) {
    ENTER();
    return *ready = (CUgraphExec)graph, CUDA_SUCCESS;
}
CUresult cuGraphLaunch(CUgraphExec ready, CUstream stream) {
    ENTER();
    return enqueue(stream, (Item){.kind = GRAPH, .graph = (CUgraph)ready});
}

// --- memory --------------------------------------------------------------------------------------------------

// For torch's caching allocator, which has most of it at hand: an error that stays does not keep it from that.
CUresult cuMemAllocAsync(CUdeviceptr *address, size_t bytes, CUstream stream) {
    REFUSE(!bytes, CUDA_ERROR_INVALID_VALUE);
    REFUSE(live_bytes + bytes > most_bytes || next_free + bytes > ARENA + ARENA_BYTES, CUDA_ERROR_OUT_OF_MEMORY);
    if (!(num_blocks & (num_blocks + 1))) blocks = realloc(blocks, 2 * (num_blocks + 1) * sizeof *blocks);
    *address = (CUdeviceptr)next_free;
    CUgraph owner = stream ? stream->recording : NULL;
    blocks[num_blocks++] = (Block){.address = *address, .bytes = bytes, .owner = owner};
    memset(next_free, POISON, bytes);
    next_free += (bytes + 2 * ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; // and a gap
    live_bytes += bytes;
    return CUDA_SUCCESS;
}
CUresult cuMemFreeAsync(CUdeviceptr address, CUstream stream) {
    Block *block = block_of(address);
    REFUSE(!block || block->address != address || block->state == FREED, CUDA_ERROR_INVALID_VALUE);
    CUgraph recording = stream ? stream->recording : NULL;
    if (recording && block->owner != recording) { // not the recording's: the host's memory, which others get now
        release(address);
        return sticky;
    }
    return enqueue(stream, (Item){.kind = RELEASE, .address = address}), sticky;
}
CUresult cuMemGetInfo(size_t *unused, size_t *total) {
    *total = most_bytes;
    return *unused = most_bytes - live_bytes, sticky;
}
CUresult cuPointerGetAttribute(void *found, CUpointer_attribute attribute, CUdeviceptr address) {
    REFUSE(sticky, sticky);
    REFUSE(!block_of(address), CUDA_ERROR_INVALID_VALUE); // the host's
    REFUSE(attribute != CU_POINTER_ATTRIBUTE_DEVICE_POINTER, CUDA_ERROR_NOT_SUPPORTED);
    *(CUdeviceptr *)found = address;
    return sticky;
}

// --- kernels -------------------------------------------------------------------------------------------------

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
    ENTER();
    const Elf64_Ehdr *head = image;
    REFUSE(memcmp(head->e_ident, ELFMAG, SELFMAG) || head->e_machine != EM_CUDA, CUDA_ERROR_INVALID_IMAGE);
    const Elf64_Shdr *last = (const Elf64_Shdr *)((const char *)image + head->e_shoff) + head->e_shnum;
    size_t bytes = (const char *)last - (const char *)image;
    for (const Elf64_Shdr *at = last - head->e_shnum; at < last; at++)
        if (at->sh_type != SHT_NOBITS && at->sh_offset + at->sh_size > bytes) bytes = at->sh_offset + at->sh_size;
    *module = malloc(sizeof **module);
    (*module)->image = memcpy(malloc(bytes), image, bytes); // the caller's may go
    counts[1]++;
    return CUDA_SUCCESS;
}
CUresult cuModuleUnload(CUmodule module) { return sticky; } // what is queued may need it

static const Elf64_Shdr *section(const char *image, const char *kind, const char *name) {
    const Elf64_Ehdr *head = (const Elf64_Ehdr *)image;
    const Elf64_Shdr *all = (const Elf64_Shdr *)(image + head->e_shoff);
    const char *names = image + all[head->e_shstrndx].sh_offset;
    size_t length = strlen(kind);
    for (int at = 0; at < head->e_shnum; at++) {
        const char *found = names + all[at].sh_name;
        if (!strncmp(found, kind, length) && !strcmp(found + length, name)) return all + at;
    }
    return NULL;
}

// What cuobjdump shows as EIATTR_KPARAM_INFO, EIATTR_MAX_THREADS, EIATTR_REQNTID: records of a format byte, a kind,
// and 16 bits, which are a size of what follows for format 4.
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    ENTER();
    const char *image = module->image;
    const Elf64_Shdr *code = section(image, ".text.", name), *info = section(image, ".nv.info.", name);
    const Elf64_Shdr *shared = section(image, ".nv.shared.", name);
    REFUSE(!code || !info, CUDA_ERROR_NOT_FOUND);
    CUfunction found = *function = calloc(1, sizeof **function);
    *found = (struct CUfunc_st){.threads = MOST_THREADS, .registers = code->sh_info >> 24,
                                .fixed_shared = shared ? shared->sh_size : 0, .dynamic_shared = PLAIN_SHARED};
    for (const char *at = image + info->sh_offset, *end = at + info->sh_size; at < end;) {
        uint8_t format = at[0], kind = at[1];
        uint16_t size = *(const uint16_t *)(at + 2);
        const uint32_t *words = (const uint32_t *)(at + 4);
        if (format == 4 && (kind == 0x05 || kind == 0x10)) found->threads = words[0] * words[1] * words[2];
        if (format == 4 && kind == 0x17) { // index, ordinal and offset, flags with the size
            unsigned ordinal = words[1] & 0xFFFF, offset = words[1] >> 16, bytes = words[2] >> 18;
            REFUSE(ordinal >= MOST_PARAMETERS, CUDA_ERROR_INVALID_IMAGE);
            found->parameters[ordinal].offset = offset;
            found->parameters[ordinal].size = bytes;
            if (ordinal >= found->count) found->count = ordinal + 1;
            if (offset + bytes > found->bytes) found->bytes = offset + bytes;
        }
        at += 4 + (format == 4 ? size : 0);
    }
    return CUDA_SUCCESS;
}
// Of parameter `ordinal`: its offset << 32 | its size; 0 beyond the last.
uint64_t standin_parameter(CUfunction function, unsigned ordinal) {
    if (ordinal >= function->count) return 0;
    return (uint64_t)function->parameters[ordinal].offset << 32 | function->parameters[ordinal].size;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
    ENTER();
    switch (attribute) {
    case CU_FUNC_ATTRIBUTE_NUM_REGS: return *value = function->registers, CUDA_SUCCESS;
    case CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES: return *value = 0, CUDA_SUCCESS; // the gpu report looks for spills
    case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: return *value = function->threads, CUDA_SUCCESS;
    case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES: return *value = function->fixed_shared, CUDA_SUCCESS;
    default: return CUDA_ERROR_NOT_SUPPORTED;
    }
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
    ENTER();
    if (attribute == CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED) return CUDA_SUCCESS;
    REFUSE(attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, CUDA_ERROR_INVALID_VALUE);
    REFUSE(value < 0 || value > OPT_IN_SHARED - (int)function->fixed_shared, CUDA_ERROR_INVALID_VALUE);
    function->dynamic_shared = value;
    return CUDA_SUCCESS;
}
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { ENTER(); return CUDA_SUCCESS; }
CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **values, void **extra) {
    ENTER();
    unsigned grid[] = {config->gridDimX, config->gridDimY, config->gridDimZ};
    uint64_t threads = (uint64_t)config->blockDimX * config->blockDimY * config->blockDimZ;
    REFUSE(!function || extra || !values, CUDA_ERROR_INVALID_VALUE);
    REFUSE(!grid[0] || !grid[1] || !grid[2] || !threads, CUDA_ERROR_INVALID_VALUE);
    REFUSE(grid[0] > INT32_MAX || grid[1] > 65535 || grid[2] > 65535, CUDA_ERROR_INVALID_VALUE);
    REFUSE(config->blockDimZ > 64 || threads > MOST_THREADS, CUDA_ERROR_INVALID_VALUE);
    REFUSE(config->sharedMemBytes > function->dynamic_shared, CUDA_ERROR_INVALID_VALUE);
    REFUSE(threads > function->threads, CUDA_ERROR_INVALID_VALUE);
    uint64_t registers = (threads + WARP - 1) / WARP * WARP * ((function->registers + 7) / 8 * 8);
    REFUSE(registers > REGISTERS, CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES);
    Item item = {.kind = KERNEL, .function = function, .grid = {grid[0], grid[1], grid[2]}};
    item.parameters = calloc(1, function->bytes + 1);
    for (unsigned at = 0; at < function->count; at++)
        memcpy(item.parameters + function->parameters[at].offset, values[at], function->parameters[at].size);
    counts[0]++;
    return enqueue(config->hStream, item);
}
CUresult cuLaunchKernel(CUfunction function, unsigned x, unsigned y, unsigned z, unsigned threads_x,
                        unsigned threads_y, unsigned threads_z, unsigned shared, CUstream stream, void **values,
                        void **extra) {
    CUlaunchConfig config = {x, y, z, threads_x, threads_y, threads_z, shared, stream, NULL, 0};
    return cuLaunchKernelEx(&config, function, values, extra);
}
