// Matrix products with a quantized weight: what the C entries (linear.cpp) ask of an instruction set's kernels.
#pragma once

#include <cstdint>

#include "qlk.h"

namespace qlk {

// The dropout of the adapter's input; a share of 0 leaves it as it is.
struct Dropout {
    float share;
    uint64_t seed;
};

// The right operand of a product, element (inner, column). It is never stored whole: panels of a few columns are copied
// or decoded into cache when they are needed.
enum class Layout {
    dense,              // values[inner * stride + column]
    dense_transposed,   // values[column * stride + inner]
    weight,             // of a quantized weight: row = inner, as in grad_output @ weight
    weight_transposed,  // row = column, as in x @ weight^T
};

struct Right {
    Layout layout;
    const float *values;
    int64_t stride;
    const qlk_weight *weight;
    const uint16_t *values_bfloat16 = nullptr;  // or instead of `values`
};

// left (rows, inner) times right (inner, columns). The left operand is float, row by row; or bfloat16, for kernels with
// units that multiply it: then the right one is rounded to bfloat16, and a zero follows each row of odd length.
struct Term {
    const float *left;
    const uint16_t *left_bfloat16;  // null, or instead of `left`
    int64_t left_stride;
    Right right;
    int64_t inner;
    const Dropout *result_dropout;  // null, or the product is dropped and scaled where the element of `out` would be
};

// out (rows, columns) = the sum of the terms (+ bias) (+ what is in out, if it accumulates and is float).
struct Product {
    Term terms[2];
    int term_count;
    int64_t rows, columns;
    int64_t first_row;  // of `out` in the whole matrix: dropout counts elements from its beginning
    const float *bias;  // null, or columns rounded up to whole panels
    void *out;
    int dtype;
    bool accumulate;
};

// A rectangle of a product: what one thread computes at a time.
struct Rectangle {
    int64_t row_begin, row_end, column_begin, column_end;  // column_begin is a multiple of panel_columns
};

// Kernels fill up a few rows to a multiple of this, read rows of `scaled_low` for what is not there, and store nothing.
constexpr int64_t FILLED_UP_ROWS = 4;

// The first rows of x against whole rows of the weight, for a few rows of x (see few_rows_kernels.h).
struct FewRows {
    const float *x;  // as lay_out_few_rows writes it
    const uint16_t *x_bfloat16;  // null, or as lay_out_few_pairs does, and instead
    int64_t rows;
    const qlk_weight *weight;
    const float *bias;        // null, or out_features
    const float *scaled_low;  // null, or scaling * low of the adapter, (rows, rank)
    const qlk_adapter *adapter;
    void *out;
    int dtype;
};

struct LinearKernels {
    int panel_columns;
    // Of the largest rectangle: its part of the left operand, a few hundred kilobytes of each piece of the inner
    // dimension, stays in the second-level cache while the panels pass; each weight is decoded once for all its rows.
    int rectangle_rows, rectangle_panels;
    bool has_bfloat16_units;
    // out[r * stride + c] = dropout(in[r * columns + c]), zeros up to the stride. Rows are counted from first_row.
    void (*rows_to_float)(const void *in, int dtype, int64_t first_row, int64_t rows, int64_t columns, Dropout dropout,
                          float *out, int64_t stride);
    // out[i] = in[i] rounded to bfloat16.
    void (*row_to_bfloat16)(const float *in, int64_t count, uint16_t *out);
    // One rectangle; `sums` has room for its floats; it may be null if out is float.
    void (*multiply)(const Product &product, const Rectangle &part, float *sums);
    // How many of so many rows multiply_few_rows takes at once; 0 where they are too many for it.
    int64_t (*few_rows_at_once)(int64_t rows, int dtype, const qlk_weight &weight);
    int64_t (*few_rows_floats)(int64_t rows, const qlk_weight &weight);
    void (*lay_out_few_rows)(const float *x, int64_t x_stride, int64_t rows, const qlk_weight &weight, float *out);
    void (*lay_out_few_pairs)(const uint16_t *x, int64_t rows, const qlk_weight &weight, uint16_t *out);
    // Output columns [begin, end).
    void (*multiply_few_rows)(const FewRows &product, int64_t begin, int64_t end);
};

}  // namespace qlk
