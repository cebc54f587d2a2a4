// The C entries of products with a dense matrix that is not trained, such as an output head.
#include "isa.h"
#include "linear_call.h"

namespace qlk {
namespace {

// Columns of the gradient that pass through the workspace together: as many as a part of a cache holds, not all.
constexpr int64_t SLAB = 3072;

struct Dense {
    const void *values;  // (out_features, in_features)
    int dtype;
    int64_t out_features, in_features;

    // From row `first` on, as the right operand of a product.
    Right right(Layout layout, int64_t first) const {
        return right_of(layout, row_of(values, dtype, first, in_features), dtype, in_features);
    }
};

int check_dense(const Dense &weight, int64_t rows) {
    if (!is_dtype(weight.dtype)) return QLK_BAD_DTYPE;
    if (!product_fits(weight.out_features, weight.in_features)) return QLK_BAD_SIZE;
    return product_fits(rows, weight.in_features) && product_fits(rows, weight.out_features) ? QLK_OK : QLK_BAD_SIZE;
}

int multiply_forward(const Call &call, const void *x, int64_t rows, const Dense &weight, const void *bias, float *out) {
    const bool in_bfloat16 = multiplies_bfloat16(call, weight.dtype);
    LeftRows floats(x, weight.dtype, weight.in_features, NO_DROPOUT);
    LeftBfloat16 halves(x, weight.in_features);
    Bias shift(call, bias, weight.dtype, weight.out_features);
    Buffer sums;
    const int64_t at_once = smaller(ROWS_AT_ONCE, rows);
    const bool has_left = in_bfloat16 ? halves.allocate(at_once) : floats.allocate(at_once);
    if (!has_left || !shift.is_ready() || !sums.allocate(call.sums_floats(at_once, weight.out_features))) return QLK_NO_MEMORY;
    for (int64_t row = 0; row < rows; row += ROWS_AT_ONCE) {
        const int64_t count = smaller(ROWS_AT_ONCE, rows - row);
        if (in_bfloat16) {
            halves.load(call, row, count);
        } else {
            floats.load(call, row, count);
        }
        const Right right = weight.right(Layout::dense_transposed, 0);
        const Term term = weight_term(in_bfloat16, floats, halves, right, weight.in_features);
        float *to = out + row * weight.out_features;
        Product product = product_of(term, count, weight.out_features, to, QLK_FLOAT32, false);
        product.bias = shift.get();
        call.multiply(product, sums.get());
    }
    return QLK_OK;
}

// A run of columns of some rows of floats, in the type that is multiplied.
class Slab {
  public:
    Slab(bool in_bfloat16, int64_t columns)
        : in_bfloat16_(in_bfloat16), stride_(in_bfloat16 ? 2 * stride_of(ceil_div(columns, 2)) : stride_of(columns)) {}

    bool allocate(int64_t rows) { return buffer_.allocate(in_bfloat16_ ? rows * stride_ / 2 : rows * stride_); }

    void load(const Call &call, const float *in, int64_t in_stride, int64_t rows, int64_t columns) {
        parallel_for(rows, 4, call.threads, [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row) {
                const float *from = in + row * in_stride;
                if (in_bfloat16_) {
                    uint16_t *to = halves() + row * stride_;
                    call.kernels.row_to_bfloat16(from, columns, to);
                    std::memset(to + columns, 0, (stride_ - columns) * sizeof(uint16_t));
                } else {
                    std::memcpy(buffer_.get() + row * stride_, from, columns * sizeof(float));
                }
            }
        });
    }

    Term term(Right right, int64_t inner) const {
        if (in_bfloat16_) return {nullptr, halves(), stride_, right, inner, nullptr};
        return {buffer_.get(), nullptr, stride_, right, inner, nullptr};
    }

  private:
    uint16_t *halves() const { return reinterpret_cast<uint16_t *>(buffer_.get()); }

    bool in_bfloat16_;
    int64_t stride_;
    Buffer buffer_;
};

int multiply_backward(const Call &call, const float *grad_output, int64_t rows, const Dense &weight, float *out) {
    const int64_t width = smaller(SLAB, larger(weight.out_features, 1));
    Slab slab(multiplies_bfloat16(call, weight.dtype), width);
    if (!slab.allocate(smaller(ROWS_AT_ONCE, rows))) return QLK_NO_MEMORY;
    for (int64_t row = 0; row < rows; row += ROWS_AT_ONCE) {
        const int64_t count = smaller(ROWS_AT_ONCE, rows - row);
        const float *gradient = grad_output + row * weight.out_features;
        int64_t begin = 0;
        do {  // at least once: the sum of nothing is zero
            const int64_t inner = smaller(width, weight.out_features - begin);
            if (inner > 0) slab.load(call, gradient + begin, weight.out_features, count, inner);
            const Term term = slab.term(weight.right(Layout::dense, begin), inner);
            float *to = out + row * weight.in_features;
            call.multiply(product_of(term, count, weight.in_features, to, QLK_FLOAT32, begin > 0), nullptr);
            begin += inner;
        } while (begin < weight.out_features);
    }
    return QLK_OK;
}

}  // namespace
}  // namespace qlk

using namespace qlk;

extern "C" {

int qlk_cpu_dense_linear(const void *x, int64_t rows, const void *weight, int dtype, int64_t out_features,
                         int64_t in_features, const void *bias, float *out, int threads) {
    const Dense dense = {weight, dtype, out_features, in_features};
    const int status = check_dense(dense, rows);
    if (status != QLK_OK) return status;
    if (rows * out_features == 0) return QLK_OK;
    if (out == nullptr || (in_features > 0 && (x == nullptr || weight == nullptr))) return QLK_NULL_POINTER;
    const Call call = {isa().linear, threads_of(threads)};
    return multiply_forward(call, x, rows, dense, bias, out);
}

int qlk_cpu_dense_grad_input(const float *grad_output, int64_t rows, const void *weight, int dtype,
                             int64_t out_features, int64_t in_features, float *out, int threads) {
    const Dense dense = {weight, dtype, out_features, in_features};
    const int status = check_dense(dense, rows);
    if (status != QLK_OK) return status;
    if (rows * in_features == 0) return QLK_OK;
    if (out == nullptr || (out_features > 0 && (grad_output == nullptr || weight == nullptr))) return QLK_NULL_POINTER;
    const Call call = {isa().linear, threads_of(threads)};
    return multiply_backward(call, grad_output, rows, dense, out);
}
}
