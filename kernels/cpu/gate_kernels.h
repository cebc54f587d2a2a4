// silu(gate) * up (Shazeer 2020, "GLU Variants Improve Transformer") and its gradients, in one pass each.
#pragma once

#include "exp_kernels.h"
#include "gate.h"
#include "value_kernels.h"

namespace qlk::QLK_ISA {

// sigmoid(x), and sigmoid(-x), which 1 - sigmoid(x) would give without its small values.
struct Sigmoids {
    Floats of_x, of_minus_x;
};

// For NaN numbers, which the products with x make NaN.
inline Sigmoids sigmoids(Floats x) {
    const Floats e = exp_to_denormals(sub(broadcast(0.0f), abs(x)));  // at most 1: nothing overflows
    const Floats large = div(broadcast(1.0f), add(broadcast(1.0f), e)), small = mul(e, large);
    const Mask positive = greater(x, broadcast(0.0f));
    return {select(positive, large, small), select(positive, small, large)};
}

// One loop for each dtype: within one for both, gcc makes the constants of a conversion anew for every vector.
template <int DTYPE>
inline void silu_gate_of(const void *gate, const void *up, int64_t count, void *out) {
    visit_vectors(count, [&](int64_t at, int lanes) {
        const Floats x = load_values(gate, DTYPE, at, lanes);
        const Floats activated = mul(x, sigmoids(x).of_x);
        store_values(out, DTYPE, at, mul(activated, load_values(up, DTYPE, at, lanes)), lanes);
    });
}

inline void silu_gate(const void *gate, const void *up, int dtype, int64_t count, void *out) {
    const auto of_dtype = dtype == QLK_FLOAT32 ? silu_gate_of<QLK_FLOAT32> : silu_gate_of<QLK_BFLOAT16>;
    of_dtype(gate, up, count, out);
}

// silu'(x) = sigmoid(x) (1 + x sigmoid(-x))
template <int DTYPE>
inline void silu_gate_backward_of(const void *grad_out, const void *gate, const void *up, int64_t count,
                                  void *grad_gate, void *grad_up) {
    visit_vectors(count, [&](int64_t at, int lanes) {
        const Floats x = load_values(gate, DTYPE, at, lanes), gradient = load_values(grad_out, DTYPE, at, lanes);
        const Sigmoids s = sigmoids(x);
        const Floats slope = mul(s.of_x, fma(x, s.of_minus_x, broadcast(1.0f)));
        const Floats of_gate = mul(mul(gradient, load_values(up, DTYPE, at, lanes)), slope);
        const Floats of_up = mul(gradient, mul(x, s.of_x));
        // only now: one of these may be where the gradient was
        store_values(grad_gate, DTYPE, at, of_gate, lanes);
        store_values(grad_up, DTYPE, at, of_up, lanes);
    });
}

inline void silu_gate_backward(const void *grad_out, const void *gate, const void *up, int dtype, int64_t count,
                               void *grad_gate, void *grad_up) {
    const auto of_dtype =
        dtype == QLK_FLOAT32 ? silu_gate_backward_of<QLK_FLOAT32> : silu_gate_backward_of<QLK_BFLOAT16>;
    of_dtype(grad_out, gate, up, count, grad_gate, grad_up);
}

constexpr GateKernels gate_kernels = {silu_gate, silu_gate_backward};

}  // namespace qlk::QLK_ISA
