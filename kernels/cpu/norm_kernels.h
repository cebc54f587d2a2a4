// Root mean square norms of one row (Zhang & Sennrich 2019): two passes over a row that stays in the first-level cache.
#pragma once

#include <cmath>

#include "norm.h"
#include "value_kernels.h"

namespace qlk::QLK_ISA {

inline Floats rounded_to(int dtype, Floats x) {
    if (dtype == QLK_FLOAT32) return x;
    uint16_t halves[WIDTH];
    store_bfloat16(halves, x);
    return load_bfloat16(halves);
}

inline float rms_norm(const void *x, int dtype, int64_t columns, const void *weight, float eps, void *out) {
    Floats squares = broadcast(0.0f);
    visit_vectors(columns, [&](int64_t at, int lanes) {
        const Floats values = load_values(x, dtype, at, lanes);
        squares = fma(values, values, squares);
    });
    const float scale = 1.0f / std::sqrt(sum(squares) / static_cast<float>(columns) + eps);
    visit_vectors(columns, [&](int64_t at, int lanes) {
        const Floats normed = rounded_to(dtype, mul(load_values(x, dtype, at, lanes), broadcast(scale)));
        store_values(out, dtype, at, mul(load_values(weight, dtype, at, lanes), normed), lanes);
    });
    return scale;
}

// With g = weight * grad_out: scale * (g - x * scale^2 * mean(g x)).
inline void rms_norm_backward(const void *grad_out, const void *x, int dtype, int64_t columns, const void *weight,
                              float scale, void *grad_x) {
    const auto gradient = [&](int64_t at, int lanes) {
        return mul(load_values(weight, dtype, at, lanes), load_values(grad_out, dtype, at, lanes));
    };
    Floats products = broadcast(0.0f);
    visit_vectors(columns, [&](int64_t at, int lanes) {
        products = fma(gradient(at, lanes), load_values(x, dtype, at, lanes), products);
    });
    const float mean = sum(products) / static_cast<float>(columns);
    const Floats of_x = broadcast(-scale * scale * mean), factor = broadcast(scale);
    visit_vectors(columns, [&](int64_t at, int lanes) {
        const Floats change = fma(load_values(x, dtype, at, lanes), of_x, gradient(at, lanes));
        store_values(grad_x, dtype, at, mul(change, factor), lanes);
    });
}

constexpr NormKernels norm_kernels = {rms_norm, rms_norm_backward};

}  // namespace qlk::QLK_ISA
