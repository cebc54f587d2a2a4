// The table of the matrix products' kernels.
#pragma once

#include "few_rows_kernels.h"
#include "gemm_kernels.h"

namespace qlk::QLK_ISA {

constexpr LinearKernels linear_kernels = {
    PANEL,            HAS_BFLOAT16_UNITS, rows_to_float,    row_to_bfloat16,   multiply,
    few_rows_at_once, few_rows_floats,    lay_out_few_rows, lay_out_few_pairs, multiply_few_rows,
};

}  // namespace qlk::QLK_ISA
