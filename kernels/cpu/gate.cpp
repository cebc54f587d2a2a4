// The C entries of the gate of an MLP.
#include "gate.h"

#include "isa.h"
#include "linear_call.h"

namespace qlk {
namespace {

constexpr int64_t VALUES_OF_A_THREAD = 8192;  // at least

int check_gate(int dtype, int64_t count) {
    if (!is_dtype(dtype)) return QLK_BAD_DTYPE;
    return is_size(count) ? QLK_OK : QLK_BAD_SIZE;
}

}  // namespace
}  // namespace qlk

using namespace qlk;

extern "C" {

int qlk_cpu_silu_gate(const void *gate, const void *up, int dtype, int64_t count, void *out, int threads) {
    const int status = check_gate(dtype, count);
    if (status != QLK_OK || count == 0) return status;
    if (gate == nullptr || up == nullptr || out == nullptr) return QLK_NULL_POINTER;
    const GateKernels &kernels = isa().gate;
    parallel_for(count, VALUES_OF_A_THREAD, threads_of(threads), [&](int64_t begin, int64_t end) {
        kernels.silu_gate(row_of(gate, dtype, begin, 1), row_of(up, dtype, begin, 1), dtype, end - begin,
                          row_of(out, dtype, begin, 1));
    });
    return QLK_OK;
}

int qlk_cpu_silu_gate_backward(const void *grad_out, const void *gate, const void *up, int dtype, int64_t count,
                               void *grad_gate, void *grad_up, int threads) {
    const int status = check_gate(dtype, count);
    if (status != QLK_OK || count == 0) return status;
    if (grad_out == nullptr || gate == nullptr || up == nullptr) return QLK_NULL_POINTER;
    if (grad_gate == nullptr || grad_up == nullptr) return QLK_NULL_POINTER;
    const GateKernels &kernels = isa().gate;
    parallel_for(count, VALUES_OF_A_THREAD, threads_of(threads), [&](int64_t begin, int64_t end) {
        kernels.silu_gate_backward(row_of(grad_out, dtype, begin, 1), row_of(gate, dtype, begin, 1),
                                   row_of(up, dtype, begin, 1), dtype, end - begin,
                                   row_of(grad_gate, dtype, begin, 1), row_of(grad_up, dtype, begin, 1));
    });
    return QLK_OK;
}
}
