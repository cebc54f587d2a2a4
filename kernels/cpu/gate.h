// The gate of an MLP: what the C entries (gate.cpp) ask of an instruction set's kernels.
#pragma once

#include <cstdint>

namespace qlk {

struct GateKernels {
    // out = silu(gate) * up, where silu(gate) = gate * sigmoid(gate).
    void (*silu_gate)(const void *gate, const void *up, int dtype, int64_t count, void *out);
    // The gradients of gate and up for that of out, either of which may take its place.
    void (*silu_gate_backward)(const void *grad_out, const void *gate, const void *up, int dtype, int64_t count,
                               void *grad_gate, void *grad_up);
};

}  // namespace qlk
