// Which instruction set runs, and the parts of the C interface that belong to no op.
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "isa.h"
#include "qlk.h"
#include "qlk/format_index.h"

namespace qlk {
namespace {

// Best last.
const Isa *const ALL[] = {
    &isa_scalar,
#if defined(__x86_64__)
    &isa_avx2,
    &isa_avx512,
    &isa_avx512_bf16,
#endif
};

bool available(const Isa &candidate) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (&candidate == &isa_avx2) {
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    }
    if (&candidate == &isa_avx512) {
        return available(isa_avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    }
    if (&candidate == &isa_avx512_bf16) {
        return available(isa_avx512) && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi") &&
               __builtin_cpu_supports("avx512vbmi2");
    }
#endif
    return &candidate == &isa_scalar;
}

const Isa *named(const char *name) {
    for (const Isa *candidate : ALL) {
        if (std::strcmp(candidate->name, name) == 0 && available(*candidate)) return candidate;
    }
    return nullptr;
}

const Isa *choose() {
    const char *wanted = std::getenv("QLK_ISA");
    if (wanted != nullptr && named(wanted) != nullptr) return named(wanted);  // the loader refuses other names
    const Isa *best = &isa_scalar;
    for (const Isa *candidate : ALL) {
        if (available(*candidate)) best = candidate;
    }
    return best;
}

std::atomic<const Isa *> chosen{nullptr};

}  // namespace

const Isa &isa() {
    const Isa *current = chosen.load(std::memory_order_relaxed);
    if (current == nullptr) {
        current = choose();
        chosen.store(current, std::memory_order_relaxed);
    }
    return *current;
}

}  // namespace qlk

extern "C" {

int qlk_version(void) { return QLK_VERSION; }

const char *qlk_status_text(int status) {
    switch (status) {
        case QLK_OK: return "ok";
        case QLK_BAD_FORMAT: return "no such number format";
        case QLK_BAD_BLOCK_SIZE: return "a block size must be a power of two from 32 to 4096";
        case QLK_BAD_DTYPE: return "not a dtype that this function takes";
        case QLK_BAD_SIZE: return "a size is negative or too large";
        case QLK_NULL_POINTER: return "a pointer is null";
        case QLK_NO_MEMORY: return "no memory for the workspace";
        case QLK_BAD_ISA: return "this machine does not have that instruction set";
        default: return "unknown status";
    }
}

int qlk_format_index(const char *name) { return qlk::format_index(name); }

const char *qlk_cpu_isa(void) { return qlk::isa().name; }

const char *qlk_cpu_isas(void) {
    static char names[64];
    static std::atomic<bool> done{false};
    if (!done.load(std::memory_order_acquire)) {
        char built[64] = "";
        for (const qlk::Isa *candidate : qlk::ALL) {
            if (!qlk::available(*candidate)) continue;
            if (built[0] != '\0') std::strcat(built, " ");
            std::strcat(built, candidate->name);
        }
        std::memcpy(names, built, sizeof names);
        done.store(true, std::memory_order_release);
    }
    return names;
}

int qlk_cpu_use_isa(const char *name) {
    if (name == nullptr) return QLK_NULL_POINTER;
    const qlk::Isa *wanted = qlk::named(name);
    if (wanted == nullptr) return QLK_BAD_ISA;
    qlk::chosen.store(wanted, std::memory_order_relaxed);
    return QLK_OK;
}
}
