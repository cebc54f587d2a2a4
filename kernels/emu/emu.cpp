// The scheduler of the emulated threads; see cuda_runtime.h. One grid at a time.
#include "cuda_runtime.h"

#include <cstdio>
#include <string>
#include <vector>

#include <sys/mman.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Store the registers that a call preserves on this stack and its top in *from; go on with those of the stack `to`.
extern "C" void qlk_emu_switch(void **from, void *to);
#if defined(__x86_64__)
asm(R"(
.text
.globl qlk_emu_switch
.hidden qlk_emu_switch
.type qlk_emu_switch, @function
qlk_emu_switch:
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    ret
.size qlk_emu_switch, . - qlk_emu_switch
)");
#else
#error "the emulator switches stacks by hand, on x86-64 only"
#endif

namespace emu {

Position position;

namespace {

constexpr size_t STACK_BYTES = 256 << 10;  // address space: pages that no thread touches take no memory
constexpr int MOST_THREADS = 1024;
constexpr size_t SHARED_BYTES = STATIC_SHARED + (64 << 10);  // room for the gaps between arrays
constexpr size_t GAP = 64;

enum class State { READY, AT_BARRIER, IN_EXCHANGE, DONE };

struct Thread {
    void *stack_top = nullptr;
    State state = State::DONE;
    Site site = {"", 0};
};

struct Warp {
    int arrived = 0;
    alignas(16) unsigned char given[WARP * LANE_BYTES], taken[WARP * LANE_BYTES];
};

struct SharedArray {
    const void *key;
    unsigned char *memory;
};

struct Block {
    Thread threads[MOST_THREADS];
    Warp warps[MOST_THREADS / WARP];
    std::vector<SharedArray> arrays;
    alignas(128) unsigned char shared[SHARED_BYTES];
    size_t shared_used = 0, shared_counted = 0;
    unsigned char *stacks = nullptr;
    void *scheduler = nullptr;  // its stack
    int running = -1, size = 0, at_barrier = 0;
    Body body = nullptr;
    void *argument = nullptr;
    std::string failure;
#if defined(__SANITIZE_ADDRESS__)
    const void *scheduler_bottom = nullptr;
    size_t scheduler_bytes = 0;
#endif
};

Block block;
std::string last_failure;
cudaError_t last_error = cudaSuccess;

unsigned char *stack_of(int thread) { return block.stacks + static_cast<size_t>(thread) * STACK_BYTES; }

std::string text(Site site) {
    const char *name = std::strrchr(site.file, '/');
    return std::string(name == nullptr ? site.file : name + 1) + ":" + std::to_string(site.line);
}

void to_scheduler(bool for_good = false) {
    Thread &thread = block.threads[block.running];
#if defined(__SANITIZE_ADDRESS__)
    void *fake = nullptr;
    __sanitizer_start_switch_fiber(for_good ? nullptr : &fake, block.scheduler_bottom, block.scheduler_bytes);
    qlk_emu_switch(&thread.stack_top, block.scheduler);
    __sanitizer_finish_switch_fiber(fake, &block.scheduler_bottom, &block.scheduler_bytes);
#else
    (void)for_good;
    qlk_emu_switch(&thread.stack_top, block.scheduler);
#endif
}

void fail(const std::string &why) {
    if (block.failure.empty()) block.failure = why;
    to_scheduler();  // which never comes back here
}

void thread_main() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &block.scheduler_bottom, &block.scheduler_bytes);
#endif
    block.body(block.argument);
    block.threads[block.running].state = State::DONE;
    to_scheduler(true);
}

void prepare(int number) {
    Thread &thread = block.threads[number];
    unsigned char *end = stack_of(number) + STACK_BYTES;
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack_of(number), STACK_BYTES);
#endif
    void **top = reinterpret_cast<void **>(end) - 3;  // 8 below a multiple of 16, as after a call
    *--top = reinterpret_cast<void *>(&thread_main);
    for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
    thread = {top, State::READY, {"", 0}};
}

void resume(int number) {
    const dim3 size = position.block_size;
    const auto index = static_cast<unsigned>(number);
    position.thread = dim3(index % size.x, index / size.x % size.y, index / (size.x * size.y));
    block.running = number;
#if defined(__SANITIZE_ADDRESS__)
    void *fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, stack_of(number), STACK_BYTES);
    qlk_emu_switch(&block.scheduler, block.threads[number].stack_top);
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
    qlk_emu_switch(&block.scheduler, block.threads[number].stack_top);
#endif
}

// Nobody can go on: say who waits where.
void report_deadlock() {
    int done = 0;
    std::string where;
    for (int number = 0; number < block.size; ++number) {
        const Thread &thread = block.threads[number];
        if (thread.state == State::DONE) {
            ++done;
        } else if (where.empty()) {
            where = std::string(thread.state == State::AT_BARRIER ? "the barrier" : "the exchange within a warp") +
                    " at " + text(thread.site);
        }
    }
    block.failure = "threads wait for ever at " + where + ": " + std::to_string(done) + " of " +
                    std::to_string(block.size) + " threads have returned, the others wait elsewhere";
}

void run_block(bool backwards) {
    block.arrays.clear();
    block.shared_used = block.shared_counted = 0;
    block.at_barrier = 0;
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(block.shared, SHARED_BYTES);
#endif
    std::memset(block.shared, 0xFF, SHARED_BYTES);
#if defined(__SANITIZE_ADDRESS__)
    __asan_poison_memory_region(block.shared, SHARED_BYTES);
#endif
    for (int warp = 0; warp < block.size / WARP; ++warp) block.warps[warp].arrived = 0;
    for (int number = 0; number < block.size; ++number) prepare(number);
    bool progress = true;
    while (progress && block.failure.empty()) {
        progress = false;
        // the order of threads is no promise: every second block runs from the last thread on
        for (int i = 0; i < block.size && block.failure.empty(); ++i) {
            const int number = backwards ? block.size - 1 - i : i;
            if (block.threads[number].state != State::READY) continue;
            resume(number);
            progress = true;
        }
    }
    if (!block.failure.empty()) return;
    for (int number = 0; number < block.size; ++number) {
        if (block.threads[number].state != State::DONE) return report_deadlock();
    }
}

}  // namespace

int lane() { return block.running % WARP; }

void barrier(Site site) {
    Thread &mine = block.threads[block.running];
    mine.state = State::AT_BARRIER;
    mine.site = site;
    if (++block.at_barrier == block.size) {
        for (int number = 0; number < block.size; ++number) {
            Thread &thread = block.threads[number];
            if (!(thread.site == site)) {
                fail("threads of one block wait at different barriers: " + text(thread.site) + " and " + text(site));
            }
            thread.state = State::READY;
        }
        block.at_barrier = 0;
    }
    to_scheduler();
}

const unsigned char *exchange(const void *mine, size_t bytes, unsigned mask, Site site) {
    if (mask != 0xFFFFFFFFu) fail("an exchange of some lanes only, at " + text(site) + ": a warp meets as a whole");
    const int number = block.running, first = number - number % WARP;
    Warp &warp = block.warps[number / WARP];
    std::memcpy(warp.given + lane() * LANE_BYTES, mine, bytes);
    block.threads[number].state = State::IN_EXCHANGE;
    block.threads[number].site = site;
    if (++warp.arrived == WARP) {
        for (int other = first; other < first + WARP; ++other) {
            Thread &thread = block.threads[other];
            if (!(thread.site == site)) {
                fail("lanes of one warp meet in different places: " + text(thread.site) + " and " + text(site));
            }
            thread.state = State::READY;
        }
        std::memcpy(warp.taken, warp.given, sizeof warp.taken);  // the next exchange may begin before all have read
        warp.arrived = 0;
    }
    to_scheduler();
    return warp.taken;
}

void *shared(const void *key, size_t bytes, size_t alignment) {
    for (const SharedArray &array : block.arrays) {
        if (array.key == key) return array.memory;
    }
    const size_t start = (block.shared_used + alignment - 1) / alignment * alignment;
    block.shared_counted = (block.shared_counted + alignment - 1) / alignment * alignment + bytes;
    block.shared_used = start + bytes + GAP;
    if (block.shared_counted > STATIC_SHARED) {
        fail("a block takes " + std::to_string(block.shared_counted) + " bytes of shared memory; it has 49152");
    }
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(block.shared + start, bytes);
#endif
    block.arrays.push_back({key, block.shared + start});
    return block.shared + start;
}

void run_grid(dim3 grid, dim3 threads, Body body, void *argument) {
    const size_t size = static_cast<size_t>(threads.x) * threads.y * threads.z;
    block.failure.clear();
    if (size == 0 || size > MOST_THREADS || size % WARP != 0) {
        block.failure = "a block of " + std::to_string(size) + " threads: whole warps, and at most 1024 threads";
    }
    if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7FFFFFFFu || grid.y > 65535 || grid.z > 65535) {
        block.failure = "a grid of no blocks, or of too many";
    }
    if (block.stacks == nullptr) {
        void *memory = mmap(nullptr, STACK_BYTES * MOST_THREADS, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) block.failure = "no memory for the stacks of the threads";
        else block.stacks = static_cast<unsigned char *>(memory);
    }
    block.size = static_cast<int>(size);
    block.body = body;
    block.argument = argument;
    position.block_size = threads;
    position.grid_size = grid;
    // nor is the order of blocks one: from the last to the first
    for (int64_t count = int64_t{grid.x} * grid.y * grid.z; count-- > 0 && block.failure.empty();) {
        const auto index = static_cast<uint64_t>(count);
        position.block = dim3(static_cast<unsigned>(index % grid.x), static_cast<unsigned>(index / grid.x % grid.y),
                              static_cast<unsigned>(index / (uint64_t{grid.x} * grid.y)));
        run_block(count % 2 == 1);
    }
    if (block.failure.empty()) return;
    last_failure = block.failure;
    last_error = cudaErrorLaunchFailure;
}

}  // namespace emu

const char *cudaGetErrorString(cudaError_t error) {
    switch (error) {
        case cudaSuccess: return "no error";
        case cudaErrorInvalidValue: return "invalid argument";
        case cudaErrorMemoryAllocation: return "out of memory";
        default: return emu::last_failure.c_str();
    }
}

cudaError_t emu::noted(cudaError_t error) { return emu::last_error = error; }

cudaError_t cudaGetLastError() {
    const cudaError_t error = emu::last_error;
    emu::last_error = cudaSuccess;
    return error;
}

// An H200's numbers, so that choices which depend on them are those of a GPU.
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int) {
    switch (attribute) {
        case cudaDevAttrMultiProcessorCount: *value = 132; return cudaSuccess;
        case cudaDevAttrL2CacheSize: *value = 50 << 20; return cudaSuccess;
        case cudaDevAttrComputeCapabilityMajor: *value = 9; return cudaSuccess;
        case cudaDevAttrComputeCapabilityMinor: *value = 0; return cudaSuccess;
        case cudaDevAttrConcurrentManagedAccess: *value = 1; return cudaSuccess;
    }
    return cudaErrorInvalidValue;
}

cudaError_t cudaDriverGetVersion(int *version) { return *version = 13000, cudaSuccess; }
cudaError_t cudaGetDeviceCount(int *count) { return *count = 1, cudaSuccess; }
cudaError_t cudaGetDevice(int *device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
