// Unified memory: ordinary memory that remembers of each page where it should lie and where it was last sent.
#include "cuda_runtime.h"

#include <map>
#include <vector>

namespace {

constexpr uintptr_t PAGE = 4096;

struct Page {
    int preferred = cudaInvalidDeviceId, last_sent_to = cudaInvalidDeviceId;
};

std::map<uintptr_t, std::vector<Page>> allocations;  // by their address

// Call body(page) for every page that the range touches; false: not all of it is unified memory.
template <typename Body>
bool for_pages(const void *memory, size_t bytes, const Body &body) {
    const auto begin = reinterpret_cast<uintptr_t>(memory);
    auto after = allocations.upper_bound(begin);
    if (bytes == 0 || after == allocations.begin()) return false;
    auto &[address, pages] = *--after;
    if (begin + bytes > address + pages.size() * PAGE) return false;
    for (uintptr_t page = (begin - address) / PAGE; page * PAGE < begin - address + bytes; ++page) body(pages[page]);
    return true;
}

int number_of(cudaMemLocation location) {
    return location.type == cudaMemLocationTypeDevice ? location.id : cudaCpuDeviceId;
}

}  // namespace

cudaError_t cudaMallocManaged(void **memory, size_t bytes, unsigned) {
    const size_t pages = (bytes + PAGE - 1) / PAGE;
    *memory = std::aligned_alloc(PAGE, pages * PAGE);
    if (*memory == nullptr) return emu::noted(cudaErrorMemoryAllocation);
    allocations[reinterpret_cast<uintptr_t>(*memory)].resize(pages);
    return cudaSuccess;
}

cudaError_t cudaFree(void *memory) {
    allocations.erase(reinterpret_cast<uintptr_t>(memory));
    return std::free(memory), cudaSuccess;
}

cudaError_t cudaMemAdvise(const void *memory, size_t bytes, cudaMemoryAdvise advice, cudaMemLocation location) {
    const bool managed = for_pages(memory, bytes, [&](Page &page) {
        if (advice == cudaMemAdviseSetPreferredLocation) page.preferred = number_of(location);
    });
    return managed ? cudaSuccess : emu::noted(cudaErrorInvalidValue);
}

cudaError_t cudaMemPrefetchAsync(const void *memory, size_t bytes, cudaMemLocation to, unsigned, cudaStream_t) {
    const bool managed = for_pages(memory, bytes, [&](Page &page) { page.last_sent_to = number_of(to); });
    return managed ? cudaSuccess : emu::noted(cudaErrorInvalidValue);
}

cudaError_t cudaMemRangeGetAttribute(void *data, size_t data_size, cudaMemRangeAttribute attribute, const void *memory,
                                     size_t bytes) {
    if (data_size != sizeof(int)) return emu::noted(cudaErrorInvalidValue);
    int common = cudaInvalidDeviceId;
    bool first = true;
    const bool managed = for_pages(memory, bytes, [&](const Page &page) {
        const int here = attribute == cudaMemRangeAttributePreferredLocation ? page.preferred : page.last_sent_to;
        common = first || here == common ? here : cudaInvalidDeviceId;
        first = false;
    });
    if (!managed) return emu::noted(cudaErrorInvalidValue);
    std::memcpy(data, &common, sizeof common);
    return cudaSuccess;
}
