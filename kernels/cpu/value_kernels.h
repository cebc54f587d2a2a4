// Values of a dtype as vectors of floats.
#pragma once

#include <cstdint>

#include "qlk.h"

namespace qlk::QLK_ISA {

inline Floats load_values(const void *values, int dtype, int64_t at, int lanes) {
    if (dtype == QLK_FLOAT32) {
        const float *p = static_cast<const float *>(values) + at;
        return lanes == WIDTH ? load(p) : load_first(p, lanes);
    }
    const uint16_t *p = static_cast<const uint16_t *>(values) + at;
    return lanes == WIDTH ? load_bfloat16(p) : load_bfloat16_first(p, lanes);
}

inline void store_values(void *values, int dtype, int64_t at, Floats x, int lanes) {
    if (dtype == QLK_FLOAT32) {
        float *p = static_cast<float *>(values) + at;
        lanes == WIDTH ? store(p, x) : store_first(p, x, lanes);
    } else {
        uint16_t *p = static_cast<uint16_t *>(values) + at;
        lanes == WIDTH ? store_bfloat16(p, x) : store_bfloat16_first(p, x, lanes);
    }
}

// Call visit(first element, how many) for the vectors of `count` values.
template <typename Visit>
inline void visit_vectors(int64_t count, const Visit &visit) {
    int64_t at = 0;
    for (; at + WIDTH <= count; at += WIDTH) visit(at, WIDTH);
    if (at < count) visit(at, static_cast<int>(count - at));
}

}  // namespace qlk::QLK_ISA
