// What all kernels share: launches, shared memory, vectors of 16 bytes, and argument checks. The same lines compile for
// a GPU and, with QLK_EMULATED, for a CPU (kernels/emu).
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include "cpu/checks.h"
#include "qlk/float16.h"
#include "qlk/host_device.h"
#include "qlk_cuda.h"

namespace qlk {

// An array in the memory that the threads of a block share: QLK_SHARED(Shared<float[16]>, table).
template <typename T>
using Shared = T;
#ifdef QLK_EMULATED
#define QLK_SHARED(Type, name) \
    static char name##_key;    \
    Type &name = *static_cast<Type *>(::emu::shared(&name##_key, sizeof(Type), alignof(Type)))
#else
#define QLK_SHARED(Type, name) __shared__ Type name
#endif

constexpr unsigned WARP = 32;
constexpr unsigned ALL_LANES = 0xFFFFFFFFu;
constexpr int64_t LARGEST_GRID = 0x7FFFFFFF;

// Said once: an error that stays noted would be taken for that of the next launch.
inline int status_of(cudaError_t error) {
    if (error == cudaSuccess) return QLK_OK;
    cudaGetLastError();
    return QLK_CUDA_ERROR + static_cast<int>(error);
}

// kernel(arguments...) on `blocks` blocks of `threads` threads.
template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), int64_t blocks, unsigned threads, void *stream, Arguments... arguments) {
    if (blocks > LARGEST_GRID) return QLK_BAD_SIZE;
    const dim3 grid(static_cast<unsigned>(blocks));
#ifdef QLK_EMULATED
    (void)stream;
    auto call = [&] { kernel(arguments...); };
    const auto body = [](void *it) { (*static_cast<decltype(call) *>(it))(); };
    emu::run_grid(grid, dim3(threads), body, &call);
#else
    kernel<<<grid, threads, 0, static_cast<cudaStream_t>(stream)>>>(arguments...);
#endif
    return status_of(cudaGetLastError());
}

QLK_HD int64_t divide_up(int64_t count, int64_t size) { return count / size + (count % size != 0); }
QLK_HD int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int log2_of(int64_t power) { return __builtin_ctzll(static_cast<unsigned long long>(power)); }
inline bool is_aligned(const void *pointer, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }
inline bool is_dtype(int dtype) { return dtype >= QLK_FLOAT32 && dtype <= QLK_FLOAT16; }

__device__ __forceinline__ uint4 load16(const void *p) { return *static_cast<const uint4 *>(p); }
__device__ __forceinline__ void store16(void *p, uint4 value) { *static_cast<uint4 *>(p) = value; }

// The dtypes of weights and activations: as they lie in memory, one at a time and as vectors of 16 bytes.
struct Float32 {
    using Bits = float;
    static constexpr int COUNT = 4;
    QLK_HD static float read(float x) { return x; }
    QLK_HD static float write(float x) { return x; }
    QLK_HD static void unpack(uint4 v, float (&x)[4]) {
        x[0] = float_of(v.x), x[1] = float_of(v.y), x[2] = float_of(v.z), x[3] = float_of(v.w);
    }
    __device__ __forceinline__ static void store8(float *out, const float (&x)[8]) {
        store16(out, {bits_of(x[0]), bits_of(x[1]), bits_of(x[2]), bits_of(x[3])});
        store16(out + 4, {bits_of(x[4]), bits_of(x[5]), bits_of(x[6]), bits_of(x[7])});
    }
};
template <typename Half>
struct TwoBytes {
    using Bits = uint16_t;
    static constexpr int COUNT = 8;
    QLK_HD static void unpack(uint4 v, float (&x)[8]) {
        const uint32_t words[4] = {v.x, v.y, v.z, v.w};
        for (int i = 0; i < 4; ++i) {
            x[2 * i] = Half::read(static_cast<uint16_t>(words[i]));
            x[2 * i + 1] = Half::read(static_cast<uint16_t>(words[i] >> 16));
        }
    }
    __device__ __forceinline__ static void store8(uint16_t *out, const float (&x)[8]) {
        store16(out, {Half::pair(x[0], x[1]), Half::pair(x[2], x[3]), Half::pair(x[4], x[5]), Half::pair(x[6], x[7])});
    }
};
struct Bfloat16 : TwoBytes<Bfloat16> {
    QLK_HD static float read(uint16_t bits) { return bfloat16_to_float(bits); }
    QLK_HD static uint16_t write(float x) { return float_to_bfloat16(x); }
    QLK_HD static uint32_t pair(float first, float second) { return two_bfloat16(first, second); }
};
struct Float16 : TwoBytes<Float16> {
    QLK_HD static float read(uint16_t bits) { return float16_to_float(bits); }
    QLK_HD static uint16_t write(float x) { return float_to_float16(x); }
    QLK_HD static uint32_t pair(float first, float second) { return two_float16(first, second); }
};

// Call body(dtype's type): with_dtype(dtype, [&](auto type) { kernel<decltype(type)> ... }).
template <typename Body>
int with_dtype(int dtype, const Body &body) {
    if (dtype == QLK_FLOAT32) return body(Float32());
    return dtype == QLK_BFLOAT16 ? body(Bfloat16()) : body(Float16());
}

}  // namespace qlk
