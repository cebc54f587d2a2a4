// The part of CUDA that kernels/cuda uses, on a CPU: the same sources, compiled by g++ with this header in the place of
// CUDA's. Tests only.
//
// The threads of a block are fibres that run one after another, each until it must wait for others: at a barrier, or
// at an exchange within its warp. Blocks run one after another. Reported as a failed launch: barriers that not all
// threads reach, lanes that meet in different places, partial warps, more shared memory than a block has. Shared
// memory starts as NaN in every block; under AddressSanitizer each shared array ends at poisoned bytes. Streams and
// events are immediate.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace emu {

constexpr int WARP = 32;
constexpr size_t LANE_BYTES = 64;        // the most that a lane hands to the others at once
constexpr size_t STATIC_SHARED = 48 << 10;  // of a block, without asking the driver for more

// The place in the source where threads meet.
struct Site {
    const char *file;
    int line;
    bool operator==(const Site &other) const { return line == other.line && std::strcmp(file, other.file) == 0; }
};

struct Position {
    dim3 thread, block, block_size, grid_size;
};
extern Position position;  // of the running thread

void barrier(Site site);
// Give `bytes` to the lanes of this warp and return what each of the 32 gave, LANE_BYTES apart.
const unsigned char *exchange(const void *mine, size_t bytes, unsigned mask, Site site);
int lane();
// The shared array of this block that `key` names.
void *shared(const void *key, size_t bytes, size_t alignment);

using Body = void (*)(void *kernel_and_arguments);
void run_grid(dim3 grid, dim3 block, Body body, void *kernel_and_arguments);

template <typename T>
struct Lanes {
    const unsigned char *bytes;
    T operator[](int lane) const {
        T value;
        std::memcpy(&value, bytes + lane * LANE_BYTES, sizeof value);
        return value;
    }
};
template <typename T>
Lanes<T> exchange(T mine, unsigned mask, Site site) {
    static_assert(sizeof(T) <= LANE_BYTES && std::is_trivially_copyable_v<T>, "too much for one exchange");
    return {exchange(&mine, sizeof mine, mask, site)};
}

template <typename T>
T shuffle(unsigned mask, T mine, int from, Site site) {
    return exchange(mine, mask, site)[from & (WARP - 1)];
}

}  // namespace emu

#define threadIdx (::emu::position.thread)
#define blockIdx (::emu::position.block)
#define blockDim (::emu::position.block_size)
#define gridDim (::emu::position.grid_size)

#define EMU_SITE \
    ::emu::Site { __FILE__, __LINE__ }
#define __syncthreads() ::emu::barrier(EMU_SITE)
#define __shfl_sync(mask, value, from) ::emu::shuffle(mask, value, from, EMU_SITE)
#define __shfl_xor_sync(mask, value, lanes) ::emu::shuffle(mask, value, ::emu::lane() ^ (lanes), EMU_SITE)

template <typename T>
T atomicMax(T *address, T value) {
    const T before = *address;
    if (value > before) *address = value;
    return before;
}

// The runtime's functions. There is one device with one kind of memory.
using cudaStream_t = void *;
enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorLaunchFailure = 719,
};
const char *cudaGetErrorString(cudaError_t error);  // of a failed launch: what was wrong
cudaError_t cudaGetLastError();
namespace emu {
cudaError_t noted(cudaError_t error);  // for cudaGetLastError; returns it
}

enum cudaDeviceAttr {
    cudaDevAttrMultiProcessorCount = 16,
    cudaDevAttrL2CacheSize = 38,
    cudaDevAttrComputeCapabilityMajor = 75,
    cudaDevAttrComputeCapabilityMinor = 76,
    cudaDevAttrConcurrentManagedAccess = 89,
};
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int device);
cudaError_t cudaDriverGetVersion(int *version);
cudaError_t cudaGetDeviceCount(int *count);
cudaError_t cudaGetDevice(int *device);
cudaError_t cudaSetDevice(int device);

enum cudaMemLocationType { cudaMemLocationTypeDevice = 1, cudaMemLocationTypeHost = 2 };
struct cudaMemLocation {
    cudaMemLocationType type;
    int id;
};
constexpr int cudaCpuDeviceId = -1, cudaInvalidDeviceId = -2;
enum cudaMemRangeAttribute {
    cudaMemRangeAttributePreferredLocation = 2,
    cudaMemRangeAttributeLastPrefetchLocation = 4,
};
enum cudaMemoryAdvise { cudaMemAdviseSetPreferredLocation = 3, cudaMemAdviseSetAccessedBy = 5 };
constexpr unsigned cudaMemAttachGlobal = 1;
cudaError_t cudaMallocManaged(void **memory, size_t bytes, unsigned flags);
cudaError_t cudaFree(void *memory);
cudaError_t cudaMemAdvise(const void *memory, size_t bytes, cudaMemoryAdvise advice, cudaMemLocation location);
cudaError_t cudaMemPrefetchAsync(const void *memory, size_t bytes, cudaMemLocation to, unsigned flags,
                                 cudaStream_t stream);
cudaError_t cudaMemRangeGetAttribute(void *data, size_t data_size, cudaMemRangeAttribute attribute, const void *memory,
                                     size_t bytes);
