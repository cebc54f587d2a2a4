// Double quantization: absmax, less its mean (the offset), in 8 bits of the signed dynamic data type with an absmax of
// its own. Source: Dettmers et al. 2023, "QLoRA", section 3.
#pragma once

#include <stdint.h>

#include "qlk/blockwise.h"
#include "qlk/host_device.h"
#include "qlk/tables.h"

namespace qlk {

// bitsandbytes finds codes in a table over this many steps from -1 to 1, so the grid is part of the format.
constexpr float DYNAMIC_GRID = 65535.0f;

QLK_HD int step_on_grid(float scaled) {
    const float clamped = scaled < -1.0f ? -1.0f : scaled > 1.0f ? 1.0f : scaled;
    return static_cast<int>((clamped + 1.0f) * 0.5f * DYNAMIC_GRID + 0.5f);
}

// GPUs hold copies of the tables, so each formula takes the one it reads.
QLK_HD constexpr uint8_t code_of_step(const float *dynamic_midpoints, int step) {
    const float on_grid = 2.0f * static_cast<float>(step) / DYNAMIC_GRID - 1.0f;
    return static_cast<uint8_t>(rank_of<8>(dynamic_midpoints, on_grid));
}

// `scaled` is finite: the offset taken off an absmax, then multiplied by `reciprocal_of` its block's largest magnitude.
QLK_HD uint8_t encode_absmax(const float *dynamic_midpoints, float scaled) {
    return code_of_step(dynamic_midpoints, step_on_grid(scaled));
}

QLK_HD float decode_absmax(const float *dynamic_levels, uint8_t code, float nested_absmax, float offset) {
    return dynamic_levels[code] * nested_absmax + offset;
}

inline constexpr uint8_t code_of_step(int step) { return code_of_step(DYNAMIC_MIDPOINTS, step); }
inline uint8_t encode_absmax(float scaled) { return encode_absmax(DYNAMIC_MIDPOINTS, scaled); }
inline float decode_absmax(uint8_t code, float nested_absmax, float offset) {
    return decode_absmax(DYNAMIC_LEVELS, code, nested_absmax, offset);
}

}  // namespace qlk
