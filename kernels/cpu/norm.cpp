// The C entries of root mean square norms whose weight is not trained.
#include "norm.h"

#include "isa.h"
#include "linear_call.h"

namespace qlk {
namespace {

constexpr int64_t ROWS_OF_A_THREAD = 16;  // at least

int check_norm(int dtype, int64_t rows, int64_t columns) {
    if (!is_dtype(dtype)) return QLK_BAD_DTYPE;
    return columns > 0 && product_fits(rows, columns) ? QLK_OK : QLK_BAD_SIZE;
}

}  // namespace
}  // namespace qlk

using namespace qlk;

extern "C" {

int qlk_cpu_rms_norm(const void *x, int dtype, int64_t rows, int64_t columns, const void *weight, float eps, void *out,
                     float *scales, int threads) {
    const int status = check_norm(dtype, rows, columns);
    if (status != QLK_OK || rows == 0) return status;
    if (x == nullptr || weight == nullptr || out == nullptr || scales == nullptr) return QLK_NULL_POINTER;
    const NormKernels &kernels = isa().norm;
    parallel_for(rows, ROWS_OF_A_THREAD, threads_of(threads), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            scales[row] = kernels.rms_norm(row_of(x, dtype, row, columns), dtype, columns, weight, eps,
                                           row_of(out, dtype, row, columns));
        }
    });
    return QLK_OK;
}

int qlk_cpu_rms_norm_backward(const void *grad_out, const void *x, int dtype, int64_t rows, int64_t columns,
                              const void *weight, const float *scales, void *grad_x, int threads) {
    const int status = check_norm(dtype, rows, columns);
    if (status != QLK_OK || rows == 0) return status;
    if (grad_out == nullptr || x == nullptr || weight == nullptr) return QLK_NULL_POINTER;
    if (scales == nullptr || grad_x == nullptr) return QLK_NULL_POINTER;
    const NormKernels &kernels = isa().norm;
    parallel_for(rows, ROWS_OF_A_THREAD, threads_of(threads), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            kernels.rms_norm_backward(row_of(grad_out, dtype, row, columns), row_of(x, dtype, row, columns), dtype,
                                      columns, weight, scales[row], row_of(grad_x, dtype, row, columns));
        }
    });
    return QLK_OK;
}
}
