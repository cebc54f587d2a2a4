// Dropout that remembers nothing (qlk/dropout.h) over whole activations.
#include "device.cuh"
#include "qlk/dropout.h"

namespace qlk {
namespace {

constexpr unsigned THREADS = 256;

// out = added + dropout(x); `added` may be null.
template <typename Type>
__global__ void __launch_bounds__(THREADS) drop(const typename Type::Bits *x, int64_t numel, float share, uint64_t seed,
                                                const typename Type::Bits *added, typename Type::Bits *out) {
    const int64_t i = int64_t{blockIdx.x} * THREADS + threadIdx.x;
    if (i >= numel) return;
    const bool dropped = qlk_dropped(seed, static_cast<uint64_t>(i), share);
    const float kept = dropped ? 0.0f : Type::read(x[i]) * dropout_scale(share);
    out[i] = Type::write(added == nullptr ? kept : Type::read(added[i]) + kept);
}

}  // namespace
}  // namespace qlk

using namespace qlk;

extern "C" int qlk_cuda_drop(const void *x, int dtype, int64_t numel, float share, uint64_t seed, const void *added,
                             void *out, void *stream) {
    if (!is_dtype(dtype)) return QLK_BAD_DTYPE;
    if (!is_size(numel) || !(share >= 0.0f && share < 1.0f)) return QLK_BAD_SIZE;
    if (numel == 0) return QLK_OK;
    if (x == nullptr || out == nullptr) return QLK_NULL_POINTER;
    return with_dtype(dtype, [&](auto type) {
        using Bits = typename decltype(type)::Bits;
        return launch(drop<decltype(type)>, divide_up(numel, THREADS), THREADS, stream, static_cast<const Bits *>(x),
                      numel, share, seed, static_cast<const Bits *>(added), static_cast<Bits *>(out));
    });
}
