// Root mean square norms of one row (Zhang & Sennrich 2019): two passes over a row that stays in the first-level cache.
#pragma once

#include <cmath>

#include "norm.h"
#include "qlk.h"

namespace qlk::QLK_ISA {

inline Floats load_values(const void *values, int dtype, int64_t at, int lanes) {
    if (dtype == QLK_FLOAT32) return load_first(static_cast<const float *>(values) + at, lanes);
    return load_bfloat16_first(static_cast<const uint16_t *>(values) + at, lanes);
}

inline void store_values(void *values, int dtype, int64_t at, Floats x, int lanes) {
    if (dtype == QLK_FLOAT32) {
        store_first(static_cast<float *>(values) + at, x, lanes);
    } else {
        store_bfloat16_first(static_cast<uint16_t *>(values) + at, x, lanes);
    }
}

// Call visit(first element, how many) for the vectors of a row.
template <typename Visit>
inline void visit_vectors(int64_t columns, const Visit &visit) {
    int64_t at = 0;
    for (; at + WIDTH <= columns; at += WIDTH) visit(at, WIDTH);
    if (at < columns) visit(at, static_cast<int>(columns - at));
}

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
