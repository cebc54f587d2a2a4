// The table of the matrix products' kernels.
#pragma once

#include "few_rows_kernels.h"
#include "gemm_kernels.h"

namespace qlk::QLK_ISA {

// Pairs of bfloat16 take half the cache, and decoding is a larger part of their products: twice as many rows are 1 to 4 %
// faster on Zen 4 (in floats up to 2 %), where 512 rows of 8 panels were slower on Ice Lake.
constexpr int RECTANGLE_ROWS = HAS_BFLOAT16_UNITS ? 512 : 256;
constexpr int RECTANGLE_PANELS = HAS_BFLOAT16_UNITS ? 4 : 8;

constexpr LinearKernels linear_kernels = {
    PANEL,           RECTANGLE_ROWS,   RECTANGLE_PANELS, HAS_BFLOAT16_UNITS, rows_to_float,     row_to_bfloat16,
    multiply,        few_rows_at_once, few_rows_floats,  lay_out_few_rows,   lay_out_few_pairs, multiply_few_rows,
};

}  // namespace qlk::QLK_ISA
