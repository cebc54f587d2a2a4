// 16-bit floats as bits: their value, and the nearest one to a float (ties to even). GPUs convert with one instruction;
// only the bits of a NaN differ.
#pragma once

#include <stdint.h>
#include <string.h>

#include "qlk/host_device.h"

namespace qlk {

QLK_HD uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

QLK_HD float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

QLK_HD float bfloat16_to_float(uint16_t bits) { return float_of(static_cast<uint32_t>(bits) << 16); }

QLK_HD uint16_t float_to_bfloat16(float x) {
#ifdef __CUDA_ARCH__
    uint16_t converted;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(converted) : "f"(x));
    return converted;
#else
    if (x != x) return 0x7FC0;
    const uint32_t bits = bits_of(x);
    return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
#endif
}

QLK_HD float float16_to_float(uint16_t bits) {
#ifdef __CUDA_ARCH__
    float converted;
    asm("cvt.f32.f16 %0, %1;" : "=f"(converted) : "h"(bits));
    return converted;
#else
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
    const uint32_t exponent = (bits >> 10) & 0x1F;
    const uint32_t mantissa = bits & 0x3FF;
    if (exponent == 0x1F) return float_of(sign | 0x7F800000 | (mantissa << 13));
    if (exponent != 0) return float_of(sign | ((exponent + 112) << 23) | (mantissa << 13));
    // zero or a subnormal: mantissa * 2^-24, exact in a float
    const float magnitude = static_cast<float>(mantissa) * 5.9604644775390625e-08f;
    return float_of(sign | bits_of(magnitude));
#endif
}

QLK_HD uint16_t float_to_float16(float x) {
#ifdef __CUDA_ARCH__
    uint16_t converted;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(converted) : "f"(x));
    return converted;
#else
    const uint32_t bits = bits_of(x), magnitude = bits & 0x7FFFFFFF;
    const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
    if (magnitude > 0x7F800000) return sign | 0x7E00;
    if (magnitude >= 0x477FF000) return sign | 0x7C00;  // from 65520 on the nearest is infinity
    if (magnitude >= 0x38800000) {                      // 2^-14: a normal number
        return static_cast<uint16_t>(sign | ((magnitude - (112u << 23) + 0xFFF + ((magnitude >> 13) & 1)) >> 13));
    }
    // a multiple of 2^-24: adding 0.5, whose neighbours are 2^-24 apart, rounds to it
    return static_cast<uint16_t>(sign | (bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f)));
#endif
}

// Two in one word, the first in the low half, as they lie in memory.
QLK_HD uint32_t two_halves(uint16_t first, uint16_t second) { return first | static_cast<uint32_t>(second) << 16; }

QLK_HD uint32_t two_bfloat16(float first, float second) {
#ifdef __CUDA_ARCH__
    uint32_t both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
    return both;
#else
    return two_halves(float_to_bfloat16(first), float_to_bfloat16(second));
#endif
}

QLK_HD uint32_t two_float16(float first, float second) {
#ifdef __CUDA_ARCH__
    uint32_t both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
    return both;
#else
    return two_halves(float_to_float16(first), float_to_float16(second));
#endif
}

}  // namespace qlk
