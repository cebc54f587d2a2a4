// Sums of the warps of a block, always in the same order.
#pragma once

#include "device.cuh"

namespace qlk {

// By all threads of a block: value(i), the i-th of a lane's VALUES, summed over the warps, in those of the first one.
// Half of the warps hand theirs to the others at a time.
template <int WARPS, int VALUES, typename Value>
__device__ __forceinline__ void add_warps(const Value &value) {
    QLK_SHARED(Shared<float[WARPS / 2 * VALUES * WARP]>, handed);
    const int warp = static_cast<int>(threadIdx.x / WARP), lane = static_cast<int>(threadIdx.x % WARP);
    for (int half = WARPS / 2; half > 0; half /= 2) {
        __syncthreads();  // those of the last round have been read
        float *place = handed + warp % half * VALUES * static_cast<int>(WARP) + lane;
#pragma unroll
        for (int i = 0; i < VALUES; ++i) {
            if (warp >= half && warp < 2 * half) place[i * WARP] = value(i);
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < VALUES; ++i) {
            if (warp < half) value(i) += place[i * WARP];
        }
    }
}

}  // namespace qlk
