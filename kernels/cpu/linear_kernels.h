// The table of the matrix products' kernels.
#pragma once

#include "few_rows_kernels.h"
#include "gemm_kernels.h"

namespace qlk::QLK_ISA {

constexpr LinearKernels linear_kernels = {
    PANEL,           MOST_FEW_ROWS,    HAS_BFLOAT16_UNITS, rows_to_float, multiply,
    few_rows_floats, lay_out_few_rows, multiply_few_rows,
};

}  // namespace qlk::QLK_ISA
