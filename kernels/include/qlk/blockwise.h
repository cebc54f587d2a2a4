// Blockwise quantization of single values: a weight is divided by the largest magnitude (absmax) of its block and gets
// the code of the nearest level of its format. Source: Dettmers et al. 2023, "QLoRA", section 3.
#pragma once

#include <stdint.h>

#include "qlk/float16.h"
#include "qlk/host_device.h"
#include "qlk/tables.h"

namespace qlk {

constexpr float SMALLEST_ABSMAX = 1e-38f;  // keeps the reciprocal of an all-zero block finite
constexpr uint32_t INFINITY_BITS = 0x7F800000;
constexpr uint32_t NAN_BITS = 0x7FC00000;

// |x| as bits, which order like the magnitudes and put infinity and then every NaN above all numbers: the largest of a
// block is its absmax, and keeps a NaN where a maximum of floats may lose it.
QLK_HD uint32_t magnitude_bits(float x) { return bits_of(x) & 0x7FFFFFFF; }

// Such a block keeps a NaN or an infinity in its absmax, and every weight in it gets the code of zero.
QLK_HD bool not_finite(uint32_t largest_magnitude) { return largest_magnitude >= INFINITY_BITS; }

// All NaNs become one, so that the order in which a block was searched does not show.
QLK_HD float absmax_of(uint32_t largest_magnitude) {
    return float_of(largest_magnitude > INFINITY_BITS ? NAN_BITS : largest_magnitude);
}

// The reciprocal is rounded before it multiplies a weight, as every implementation of these formats does; a division
// would give other codes at ties.
QLK_HD float reciprocal_of(float absmax) { return 1.0f / (absmax < SMALLEST_ABSMAX ? SMALLEST_ABSMAX : absmax); }

// The number of midpoints strictly below x, of 2^BITS - 1 ascending ones: a tie goes to the lower level.
template <int BITS>
QLK_HD constexpr int rank_of(const float *midpoints, float x) {
    int rank = 0;
    for (int step = 1 << (BITS - 1); step > 0; step >>= 1) {
        rank += static_cast<int>(x > midpoints[rank + step - 1]) * step;  // no branch: it would be a coin toss
    }
    return rank;
}

// Formats of 8 bits hold the integers from -n to n over n, in two's complement. A quarter of a step down from where the
// rank would change, rounding cannot push the guess above the rank: it is that or one less, and a midpoint tells.
constexpr float GUESS_BELOW = 0.25f;

QLK_HD int rank_of_integer(const Format &format, float x) {
    const int half = format.levels / 2;
    const int guess = static_cast<int>(x * static_cast<float>(half) + (static_cast<float>(half) + GUESS_BELOW));
    return guess + (x > format.midpoints[guess] ? 1 : 0);
}

// The code of a scaled weight: finite, and in [-1, 1] but for rounding.
QLK_HD uint8_t encode(const Format &format, float scaled) {
    return format.code[format.bits == 4 ? rank_of<4>(format.midpoints, scaled) : rank_of_integer(format, scaled)];
}

// Two 4-bit codes share a byte, the first in the high half.
QLK_HD uint8_t pack_nibbles(uint8_t first, uint8_t second) { return static_cast<uint8_t>(first << 4 | second); }

// What a block with a NaN or an infinity is filled with.
QLK_HD uint8_t byte_of_zeros(const Format &format) {
    const uint8_t zero = encode(format, 0.0f);
    return format.bits == 4 ? pack_nibbles(zero, zero) : zero;
}

QLK_HD uint8_t nibble_of(const uint8_t *packed, int64_t index) {
    const uint8_t byte = packed[index >> 1];
    return index & 1 ? byte & 15 : byte >> 4;
}

QLK_HD float decode(const Format &format, uint8_t code, float absmax) { return format.value[code] * absmax; }

}  // namespace qlk
