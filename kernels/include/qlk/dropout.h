// Dropout without a stored mask: whether element i is dropped follows from the seed and i alone, so the backward pass
// finds the same elements again. qlora_lab/ops/lora/dropout.py says the same in torch.
#pragma once

#include <stdint.h>

#include "qlk/host_device.h"

namespace qlk {

// What elements whose numbers share their high 32 bits have in common.
struct DropoutKey {
    uint32_t before, between;
};

// Source: Steele et al. 2014, "Fast splittable pseudorandom number generators" (the finalizer of SplitMix64).
QLK_HD uint64_t mix64(uint64_t x) {
    x ^= x >> 30;
    x *= 0xBF58476D1CE4E5B9u;
    x ^= x >> 27;
    x *= 0x94D049BB133111EBu;
    return x ^ x >> 31;
}

QLK_HD DropoutKey dropout_key(uint64_t seed, uint32_t index_high) {
    const uint64_t key = mix64(mix64(seed + 0x9E3779B97F4A7C15u) + index_high);
    return {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)};
}

// The constants of Wellons' lowbias32 (github.com/skeeto/hash-prospector); a second key between its two products, or
// one seed's mask would be another's in a different order.
constexpr uint32_t DROPOUT_FIRST_FACTOR = 0x7FEB352Du;
constexpr uint32_t DROPOUT_SECOND_FACTOR = 0x846CA68Bu;

// A number below DROPOUT_RANGE.
constexpr uint32_t DROPOUT_RANGE = 1u << 24;
QLK_HD uint32_t dropout_draw(DropoutKey key, uint32_t index_low) {
    uint32_t x = index_low ^ key.before;
    x ^= x >> 16;
    x *= DROPOUT_FIRST_FACTOR;
    x ^= x >> 15;
    x += key.between;
    x *= DROPOUT_SECOND_FACTOR;
    x ^= x >> 16;
    return x >> 8;
}

// Elements that draw less are dropped; `share` is in [0, 1).
QLK_HD uint32_t dropout_threshold(float share) {
    return static_cast<uint32_t>(share * static_cast<float>(DROPOUT_RANGE));
}

QLK_HD float dropout_scale(float share) { return 1.0f / (1.0f - share); }

QLK_HD bool qlk_dropped(uint64_t seed, uint64_t index, float share) {
    const DropoutKey key = dropout_key(seed, static_cast<uint32_t>(index >> 32));
    return dropout_draw(key, static_cast<uint32_t>(index)) < dropout_threshold(share);
}

}  // namespace qlk
