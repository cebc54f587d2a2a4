// 16-bit floats as bits: their value, and the nearest one to a float (ties to even).
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
    if (x != x) return 0x7FC0;
    const uint32_t bits = bits_of(x);
    return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

QLK_HD float float16_to_float(uint16_t bits) {
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
    const uint32_t exponent = (bits >> 10) & 0x1F;
    const uint32_t mantissa = bits & 0x3FF;
    if (exponent == 0x1F) return float_of(sign | 0x7F800000 | (mantissa << 13));
    if (exponent != 0) return float_of(sign | ((exponent + 112) << 23) | (mantissa << 13));
    // zero or a subnormal: mantissa * 2^-24, exact in a float
    const float magnitude = static_cast<float>(mantissa) * 5.9604644775390625e-08f;
    return float_of(sign | bits_of(magnitude));
}

}  // namespace qlk
