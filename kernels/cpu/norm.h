// Root mean square norms: what the C entries (norm.cpp) ask of an instruction set's kernels.
#pragma once

#include <cstdint>

namespace qlk {

struct NormKernels {
    // Of one row: out = weight * (x * scale), where the product in brackets is rounded to `dtype` first; returns the
    // scale, 1 / sqrt(mean(x^2) + eps).
    float (*rms_norm)(const void *x, int dtype, int64_t columns, const void *weight, float eps, void *out);
    // The gradient of x for that of out, as if nothing had been rounded between.
    void (*rms_norm_backward)(const void *grad_out, const void *x, int dtype, int64_t columns, const void *weight,
                              float scale, void *grad_x);
};

}  // namespace qlk
