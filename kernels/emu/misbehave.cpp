// Kernels that break CUDA's rules, for the tests of the emulator itself.
#include "cuda/device.cuh"

namespace qlk {
namespace {

__global__ void some_return_before_the_barrier(float *) {
    if (threadIdx.x >= 32) return;
    __syncthreads();
}

__global__ void two_barriers(float *) {
    if (threadIdx.x < 32) {
        __syncthreads();
    } else {
        __syncthreads();
    }
}

__global__ void lanes_apart(float *out) {
    if (threadIdx.x % 2 == 0) {
        *out = __shfl_xor_sync(ALL_LANES, 1.0f, 1);
    } else {
        *out = __shfl_xor_sync(ALL_LANES, 2.0f, 1);
    }
}

__global__ void half_a_warp(float *out) {
    if (threadIdx.x < 16) *out = __shfl_sync(0xFFFFu, 1.0f, 0);
}

__global__ void too_much_shared_memory(float *out) {
    QLK_SHARED(Shared<float[12288]>, all);
    QLK_SHARED(Shared<float[1]>, more);
    *out = all[0] + more[0];
}

// Legal, and NaN for whoever reads before the others have written.
__global__ void no_barrier(float *out) {
    QLK_SHARED(Shared<float[64]>, values);
    values[threadIdx.x] = 1.0f;
    const float neighbour = values[(threadIdx.x + 1) % 64];
    if (neighbour != neighbour) *out = neighbour;
}

__global__ void beyond_shared_memory(float *out) {
    QLK_SHARED(Shared<float[64]>, values);
    values[threadIdx.x] = 1.0f;
    const volatile float *past_the_type = values;  // UBSan would stop at the index
    *out = past_the_type[threadIdx.x + 1];
}

}  // namespace
}  // namespace qlk

extern "C" QLK_API int qlk_emu_misbehave(int which, float *out) {
    using namespace qlk;
    void (*const kernels[])(float *) = {some_return_before_the_barrier, two_barriers, lanes_apart,         half_a_warp,
                                        too_much_shared_memory,         no_barrier,   beyond_shared_memory};
    return launch(kernels[which], 2, 64, nullptr, out);
}
