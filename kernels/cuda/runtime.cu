// What belongs to no op: versions, the device, errors, and unified memory.
#include <cstring>

#include "device.cuh"
#include "qlk/format_index.h"

using namespace qlk;

// CUDA 13 gave the plain names to the functions that take a location; from 12.2 on they had a suffix.
#if !defined(QLK_EMULATED) && CUDART_VERSION < 13000
#define cudaMemAdvise cudaMemAdvise_v2
#define cudaMemPrefetchAsync cudaMemPrefetchAsync_v2
#endif

extern "C" {

int qlk_cuda_version(void) { return QLK_CUDA_VERSION; }

int qlk_cuda_runtime_version(void) {
#ifdef QLK_EMULATED
    return 13000;
#else
    return CUDART_VERSION;
#endif
}

int qlk_cuda_driver_version(void) {
    int version = 0;
    return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

int qlk_cuda_format_index(const char *name) { return format_index(name); }

const char *qlk_cuda_status_text(int status) {
    switch (status) {
        case QLK_OK: return "ok";
        case QLK_BAD_FORMAT: return "no such number format";
        case QLK_BAD_BLOCK_SIZE: return "a block size must be a power of two from 32 to 4096";
        case QLK_BAD_DTYPE: return "not a dtype that this function takes";
        case QLK_BAD_SIZE: return "a size is negative, too large, or not one that this function takes";
        case QLK_NULL_POINTER: return "a pointer is null or not aligned";
        default: return cudaGetErrorString(static_cast<cudaError_t>(status - QLK_CUDA_ERROR));
    }
}

int qlk_cuda_device_properties(int device, qlk_cuda_properties *properties) {
    if (properties == nullptr) return QLK_NULL_POINTER;
    int major = 0, minor = 0;
    const struct {
        cudaDeviceAttr attribute;
        int *value;
    } wanted[] = {{cudaDevAttrMultiProcessorCount, &properties->multiprocessors},
                  {cudaDevAttrL2CacheSize, &properties->l2_bytes},
                  {cudaDevAttrConcurrentManagedAccess, &properties->concurrent_managed_access},
                  {cudaDevAttrComputeCapabilityMajor, &major},
                  {cudaDevAttrComputeCapabilityMinor, &minor}};
    for (const auto &one : wanted) {
        const cudaError_t error = cudaDeviceGetAttribute(one.value, one.attribute, device);
        if (error != cudaSuccess) return status_of(error);
    }
    properties->capability = 10 * major + minor;
    return QLK_OK;
}

int qlk_cuda_use_device(int device) { return status_of(cudaSetDevice(device)); }

// The device is where it is read and written, so pages stay there until something else needs the room; the host may
// read them where they lie.
int qlk_cuda_managed_allocate(int64_t bytes, int device, void **memory) {
    if (bytes <= 0) return QLK_BAD_SIZE;
    if (memory == nullptr) return QLK_NULL_POINTER;
    const auto size = static_cast<size_t>(bytes);
    cudaError_t error = cudaSetDevice(device);  // the memory counts as that device's
    if (error == cudaSuccess) error = cudaMallocManaged(memory, size, cudaMemAttachGlobal);
    if (error != cudaSuccess) return status_of(error);
    error = cudaMemAdvise(*memory, size, cudaMemAdviseSetPreferredLocation, {cudaMemLocationTypeDevice, device});
    if (error == cudaSuccess) {
        error = cudaMemAdvise(*memory, size, cudaMemAdviseSetAccessedBy, {cudaMemLocationTypeHost, 0});
    }
    if (error != cudaSuccess) cudaFree(*memory);
    return status_of(error);
}

int qlk_cuda_managed_free(void *memory) { return status_of(cudaFree(memory)); }

int qlk_cuda_managed_prefetch(void *memory, int64_t bytes, int device, void *stream) {
    if (bytes < 0) return QLK_BAD_SIZE;
    if (bytes == 0) return QLK_OK;
    if (memory == nullptr) return QLK_NULL_POINTER;
    const cudaMemLocation to =
        device < 0 ? cudaMemLocation{cudaMemLocationTypeHost, 0} : cudaMemLocation{cudaMemLocationTypeDevice, device};
    return status_of(
        cudaMemPrefetchAsync(memory, static_cast<size_t>(bytes), to, 0, static_cast<cudaStream_t>(stream)));
}

int qlk_cuda_managed_location(const void *memory, int64_t bytes, int *preferred, int *last_sent_to) {
    if (bytes <= 0) return QLK_BAD_SIZE;
    if (memory == nullptr || preferred == nullptr || last_sent_to == nullptr) return QLK_NULL_POINTER;
    const auto size = static_cast<size_t>(bytes);
    cudaError_t error =
        cudaMemRangeGetAttribute(preferred, sizeof(int), cudaMemRangeAttributePreferredLocation, memory, size);
    if (error == cudaSuccess) {
        error = cudaMemRangeGetAttribute(last_sent_to, sizeof(int), cudaMemRangeAttributeLastPrefetchLocation, memory,
                                         size);
    }
    return status_of(error);
}
}
