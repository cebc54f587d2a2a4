#include "memory.h"

#ifdef __linux__
#include <glob.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#endif

namespace qlk {
namespace {

// Smaller memory is recycled by the allocator rather than given back to the system and faulted in again.
constexpr int64_t SMALLEST = int64_t{8} << 20;

#ifdef __linux__

constexpr uintptr_t LARGE_PAGE = uintptr_t{2} << 20;
constexpr int WITHOUT_A_FAULT_EACH = 23;  // MADV_POPULATE_WRITE, which headers have since Linux 5.14

struct Pages {
    uintptr_t begin, bytes;
};

// The whole pages in some memory.
Pages pages_in(const void *memory, int64_t bytes, uintptr_t page) {
    const auto address = reinterpret_cast<uintptr_t>(memory);
    const uintptr_t begin = (address + page - 1) / page * page;
    const uintptr_t end = (address + static_cast<uintptr_t>(bytes)) / page * page;
    return {begin, begin < end ? end - begin : 0};
}

// Only advice: a kernel that does not know it refuses it, and the memory stays as it is.
void advise(Pages pages, int advice) {
    if (pages.bytes > 0) madvise(reinterpret_cast<void *>(pages.begin), pages.bytes, advice);
}

// Whether the machine is a virtual one that gives its free pages back to the host (free page reporting, a feature of
// virtio's memory balloon). It gives back large ones some seconds after they were freed, and their next write, for which
// the host finds memory again, takes ten times as long: 64 MiB take 5 to 140 ms in large pages, and 18 to 50 in small
// ones (2 cores of Zen 4), which are at hand.
bool gives_free_pages_back() {
    constexpr int REPORTING = 5;  // the feature's bit
    glob_t found;
    bool gives = false;
    if (glob("/sys/bus/virtio/drivers/virtio_balloon/virtio*/features", 0, nullptr, &found) == 0) {
        for (size_t i = 0; i < found.gl_pathc; ++i) {
            char bits[REPORTING + 1] = {};
            if (std::FILE *file = std::fopen(found.gl_pathv[i], "r")) {
                gives |= std::fread(bits, 1, sizeof bits, file) == sizeof bits && bits[REPORTING] == '1';
                std::fclose(file);
            }
        }
        globfree(&found);
    }
    return gives;
}

#endif

}  // namespace

bool is_new_memory(const void *memory, int64_t bytes) {
    if (bytes < SMALLEST) return false;
#ifdef __linux__
    const auto middle = reinterpret_cast<uintptr_t>(memory) + static_cast<uintptr_t>(bytes) / 2;
    unsigned char in_memory = 1;
    const int status = mincore(reinterpret_cast<void *>(middle / LARGE_PAGE * LARGE_PAGE), 1, &in_memory);
    return status == 0 && !(in_memory & 1);
#else
    return false;
#endif
}

void want_large_pages([[maybe_unused]] void *memory, int64_t bytes) {
    if (memory == nullptr || bytes < SMALLEST) return;
#ifdef __linux__
    static const bool are_cheap = !gives_free_pages_back();
    if (are_cheap) advise(pages_in(memory, bytes, LARGE_PAGE), MADV_HUGEPAGE);
#endif
}

void find_pages([[maybe_unused]] void *memory, [[maybe_unused]] int64_t bytes) {
#ifdef __linux__
    static const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    advise(pages_in(memory, bytes, page), WITHOUT_A_FAULT_EACH);
#endif
}

}  // namespace qlk
