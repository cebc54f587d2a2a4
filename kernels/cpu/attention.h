// Attention: what the C entries (attention.cpp) ask of an instruction set's kernels beside matrix products.
#pragma once

#include <cstdint>

namespace qlk {

// The scores of some queries, one row each. Beyond the last key that a causal query sees, and where a mask says 0, the
// score counts as minus infinity.
struct Scores {
    float *values;
    int64_t stride;  // a multiple of any vector
    int64_t queries, keys;
    int64_t first_query;   // of the sequence
    const uint8_t *mask;   // null, or of the first query, a byte a key
    int64_t mask_stride;
    bool causal;
    float scale;
};

struct AttentionKernels {
    // values = softmax(scale * values); logsumexp (queries) of what is summed, infinity where a query sees nothing: its
    // row is zeros.
    void (*softmax)(const Scores &scores, float *logsumexp);
    // values = softmax(scale * values) again, gradients (of the same stride) = values * (gradients - shifts) * scale.
    void (*softmax_backward)(const Scores &scores, const float *logsumexp, const float *shifts, float *gradients);
    // The sum of a[i] * b[i].
    float (*dot)(const float *a, const float *b, int64_t count);
    // out[column * out_stride + row] = in[row * stride + column]; reads and writes up to the next whole vector of rows
    // and of columns.
    void (*transpose)(const float *in, int64_t stride, int64_t rows, int64_t columns, float *out, int64_t out_stride);
    // out[i] += in[i]
    void (*add)(const float *in, int64_t count, float *out);
};

}  // namespace qlk
