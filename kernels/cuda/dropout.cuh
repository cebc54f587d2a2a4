// Dropout inside other kernels: the mask of qlk/dropout.h, worked out while the elements are in registers.
#pragma once

#include "device.cuh"
#include "qlk/dropout.h"

namespace qlk {

// As kernels take it; an adapter without dropout has share 0.
struct Dropout {
    uint64_t seed;
    float share;
};

// Of one thread. Elements whose numbers share their high half share a key, and a thread's hardly ever change theirs.
class DropoutMask {
  public:
    __device__ __forceinline__ explicit DropoutMask(const Dropout &dropout)
        : seed_(dropout.seed), threshold_(dropout_threshold(dropout.share)), key_(dropout_key(dropout.seed, 0)) {}

    // Call each(i) for those of the COUNT elements from number `first` on that are dropped. TOGETHER: `first` is a
    // multiple of COUNT, so that all of them have one key.
    template <int COUNT, bool TOGETHER, typename Each>
    __device__ __forceinline__ void for_dropped(int64_t first, const Each &each) {
        static_assert((COUNT & (COUNT - 1)) == 0, "no such piece lies on both sides of a multiple of 2^32");
        if (threshold_ == 0) return;
        if (TOGETHER) turn_to(first);
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            if (!TOGETHER) turn_to(first + i);
            const uint32_t low = static_cast<uint32_t>(first) + static_cast<uint32_t>(i);
            if (dropout_draw(key_, low) < threshold_) each(i);
        }
    }

  private:
    __device__ __forceinline__ void turn_to(int64_t element) {
        const uint32_t high = static_cast<uint32_t>(static_cast<uint64_t>(element) >> 32);
        if (high == high_) return;
        high_ = high;
        key_ = dropout_key(seed_, high);
    }

    uint64_t seed_;
    uint32_t threshold_, high_ = 0;
    DropoutKey key_;
};

}  // namespace qlk
