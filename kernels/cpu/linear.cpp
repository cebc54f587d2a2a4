// The C entries of the matrix products: what is checked, and the products that each is made of.
#include "linear.h"

#include "checks.h"
#include "isa.h"
#include "linear_call.h"

namespace qlk {
namespace {

int check_call(int dtype, int64_t rows, const qlk_weight *weight) {
    if (!is_dtype(dtype)) return QLK_BAD_DTYPE;
    int64_t numel;
    const int status = check_weight(weight, numel);
    if (status != QLK_OK) return status;
    const bool fits = product_fits(rows, weight->in_features) && product_fits(rows, weight->out_features);
    return fits ? QLK_OK : QLK_BAD_SIZE;
}

int check_adapter(const qlk_adapter *adapter, int64_t rows, const qlk_weight &weight) {
    if (adapter == nullptr) return QLK_NULL_POINTER;
    const int64_t rank = adapter->rank;
    if (!product_fits(rank, weight.in_features) || !product_fits(rank, weight.out_features)) return QLK_BAD_SIZE;
    if (!product_fits(rank, rows)) return QLK_BAD_SIZE;
    if (!(adapter->dropout >= 0.0f && adapter->dropout < 1.0f)) return QLK_BAD_SIZE;
    const bool missing = (adapter->lora_A == nullptr && rank * weight.in_features > 0) ||
                         (adapter->lora_B == nullptr && rank * weight.out_features > 0);
    return missing ? QLK_NULL_POINTER : QLK_OK;
}

Dropout dropout_of(const qlk_adapter *adapter) {
    return adapter != nullptr ? Dropout{adapter->dropout, adapter->seed} : NO_DROPOUT;
}

Right dense(const float *values, int64_t stride) { return {Layout::dense, values, stride, nullptr}; }
Right transposed(const float *values, int64_t stride) { return {Layout::dense_transposed, values, stride, nullptr}; }

// out[i] = in[i] * factor
void scale(const float *in, int64_t count, float factor, float *out) {
    for (int64_t i = 0; i < count; ++i) out[i] = in[i] * factor;
}

// out (columns, rows) = in (rows, columns) transposed, times factor; rows of `out` lie `stride` apart.
void transpose(const float *in, int64_t rows, int64_t columns, float factor, float *out, int64_t stride) {
    const auto move = [&](int64_t row, int64_t column) {
        out[column * stride + row] = in[row * columns + column] * factor;
    };
    if (rows < columns) {  // the short dimension inside: its lines stay in cache
        for (int64_t column = 0; column < columns; ++column) {
            for (int64_t row = 0; row < rows; ++row) move(row, column);
        }
    } else {
        for (int64_t row = 0; row < rows; ++row) {
            for (int64_t column = 0; column < columns; ++column) move(row, column);
        }
    }
}

// x weight^T + bias, with an adapter's product where there is one.
class Forward {
  public:
    Forward(const Call &call, const void *x, int dtype, int64_t rows, const qlk_weight &weight, const void *bias,
            const qlk_adapter *adapter, float *low, void *out)
        : call_(call), dtype_(dtype), rows_(rows), weight_(weight), adapter_(adapter), low_(low), out_(out),
          bias_(call, bias, dtype, weight.out_features), rank_(adapter != nullptr ? adapter->rank : 0),
          x_given_(static_cast<const uint16_t *>(x)),
          x_(x, dtype, weight.in_features, NO_DROPOUT),
          x_bfloat16_(x, weight.in_features),
          thin_(x, dtype, weight.in_features, dropout_of(adapter)),
          few_rows_(call.kernels.few_rows_at_once(rows, dtype, weight)),
          in_bfloat16_(multiplies_bfloat16(call, dtype)) {}

    int run() {
        if (!allocate()) return QLK_NO_MEMORY;
        for (int64_t row = 0; row < rows_; row += ROWS_AT_ONCE) {
            const int64_t count = smaller(ROWS_AT_ONCE, rows_ - row);
            if (!in_bfloat16_) x_.load(call_, row, count);
            if (in_bfloat16_ && few_rows_ == 0) x_bfloat16_.load(call_, row, count);
            if (adapter_ != nullptr) multiply_low(row, count);
            if (few_rows_ == 0) multiply(row, count);
        }
        for (int64_t row = 0; row < rows_ && few_rows_ > 0; row += few_rows_) {
            multiply_few_rows(row, smaller(few_rows_, rows_ - row));
        }
        return QLK_OK;
    }

  private:
    bool allocate() {
        const int64_t rows = smaller(ROWS_AT_ONCE, rows_);
        if (!in_bfloat16_ && !x_.allocate(rows)) return false;
        if (in_bfloat16_ && few_rows_ == 0 && !x_bfloat16_.allocate(rows)) return false;
        if (adapter_ != nullptr && !thin_.allocate(call_)) return false;
        if (few_rows_ > 0 && !laid_out_.allocate(call_.kernels.few_rows_floats(few_rows_, weight_))) return false;
        if (!bias_.is_ready()) return false;
        if (few_rows_ == 0 && !sums_.allocate(call_.sums_floats(rows, weight_.out_features))) return false;
        return scaled_low_.allocate((rows + FILLED_UP_ROWS) * rank_);
    }

    // The adapter's own product is one of floats whatever the dtype.
    void multiply_low(int64_t row, int64_t count) {
        const Right lora_A = transposed(adapter_->lora_A, weight_.in_features);
        thin_.multiply(call_, row, count, lora_A, rank_, low_ + row * rank_);
        scale(low_ + row * rank_, count * rank_, adapter_->scaling, scaled_low_.get());
    }

    void multiply(int64_t row, int64_t count) {
        Product product = {};
        if (adapter_ != nullptr) {
            const Right lora_B = transposed(adapter_->lora_B, rank_);
            product.terms[product.term_count++] = {scaled_low_.get(), nullptr, rank_, lora_B, rank_, nullptr};
        }
        const Right right = {Layout::weight_transposed, nullptr, 0, &weight_};
        product.terms[product.term_count++] = weight_term(in_bfloat16_, x_, x_bfloat16_, right, weight_.in_features);
        product.rows = count;
        product.columns = weight_.out_features;
        product.bias = bias_.get();
        product.out = row_of(out_, dtype_, row, weight_.out_features);
        product.dtype = dtype_;
        call_.multiply(product, sums_.get());
    }

    void multiply_few_rows(int64_t row, int64_t count) {
        FewRows product = {};
        if (in_bfloat16_) {
            uint16_t *pairs = reinterpret_cast<uint16_t *>(laid_out_.get());
            call_.kernels.lay_out_few_pairs(x_given_ + row * weight_.in_features, count, weight_, pairs);
            product.x_bfloat16 = pairs;
        } else {
            call_.kernels.lay_out_few_rows(x_.get() + row * x_.stride(), x_.stride(), count, weight_, laid_out_.get());
            product.x = laid_out_.get();
        }
        product.rows = count;
        product.weight = &weight_;
        product.bias = bias_.get();
        product.scaled_low = adapter_ != nullptr ? scaled_low_.get() + row * rank_ : nullptr;
        product.adapter = adapter_;
        product.out = row_of(out_, dtype_, row, weight_.out_features);
        product.dtype = dtype_;
        parallel_for(weight_.out_features, 16, call_.threads,
                     [&](int64_t begin, int64_t end) { call_.kernels.multiply_few_rows(product, begin, end); });
    }

    const Call &call_;
    const int dtype_;
    const int64_t rows_;
    const qlk_weight &weight_;
    const qlk_adapter *adapter_;
    float *low_;
    void *out_;
    const Bias bias_;
    const int64_t rank_;
    const uint16_t *x_given_;
    LeftRows x_;
    LeftBfloat16 x_bfloat16_;
    ThinProduct thin_;
    const int64_t few_rows_;  // that are multiplied at once; 0 if there are many
    const bool in_bfloat16_;
    Buffer laid_out_, sums_, scaled_low_;
};

// The gradients of x, lora_A and lora_B; only that of x where there is no adapter.
class Backward {
  public:
    Backward(const Call &call, const void *grad_output, const void *x, const float *low, int dtype, int64_t rows,
             const qlk_weight &weight, const qlk_adapter *adapter, void *grad_input, float *grad_lora_A,
             float *grad_lora_B)
        : call_(call), grad_given_(grad_output), x_given_(x), low_(low), dtype_(dtype), rows_(rows), weight_(weight),
          adapter_(adapter), grad_input_(grad_input), grad_lora_A_(grad_lora_A), grad_lora_B_(grad_lora_B),
          rank_(adapter != nullptr ? adapter->rank : 0), dropout_(dropout_of(adapter)),
          in_bfloat16_(multiplies_bfloat16(call, dtype)),
          grad_output_(grad_output, dtype, weight.out_features, NO_DROPOUT),
          dropped_(x, dtype, weight.in_features, dropout_),
          grad_bfloat16_(grad_output, weight.out_features),
          thin_(grad_output, dtype, weight.out_features, NO_DROPOUT) {}

    int run() {
        if (!allocate()) return QLK_NO_MEMORY;
        if (rows_ == 0 && adapter_ != nullptr) multiply_grad_lora(0, 0);
        for (int64_t row = 0; row < rows_; row += ROWS_AT_ONCE) {
            const int64_t count = smaller(ROWS_AT_ONCE, rows_ - row);
            if (adapter_ != nullptr) {
                multiply_grad_low(row, count);
                if (drops()) dropped_.load(call_, row, count);
                multiply_grad_lora(row, count);
            }
            if (grad_input_ != nullptr) multiply_grad_input(row, count);
        }
        if (adapter_ != nullptr) {
            transpose(grad_lora_B_transposed_.get(), rank_, weight_.out_features, 1.0f, grad_lora_B_, rank_);
        }
        return QLK_OK;
    }

  private:
    bool allocate() {
        const int64_t rows = smaller(ROWS_AT_ONCE, rows_);
        if (grad_input_ != nullptr) {
            const bool has_left = in_bfloat16_ ? grad_bfloat16_.allocate(rows) : grad_output_.allocate(rows);
            if (!has_left || !sums_.allocate(call_.sums_floats(rows, weight_.in_features))) return false;
        }
        if (adapter_ == nullptr) return true;
        lows_stride_ = stride_of(rows);
        if (drops() && !dropped_.allocate(rows)) return false;
        return thin_.allocate(call_) && grad_low_.allocate(rows * rank_) &&
               lows_.allocate(rank_ * lows_stride_) && grad_lows_.allocate(rank_ * lows_stride_) &&
               grad_lora_B_transposed_.allocate(rank_ * weight_.out_features);
    }

    bool drops() const { return dropout_.share > 0; }

    // scaling * grad_output lora_B
    void multiply_grad_low(int64_t row, int64_t count) {
        thin_.multiply(call_, row, count, dense(adapter_->lora_B, rank_), rank_, grad_low_.get());
        scale(grad_low_.get(), count * rank_, adapter_->scaling, grad_low_.get());
    }

    // grad_lora_A = grad_low^T dropout(x); grad_lora_B^T = scaling * low^T grad_output: the thin operand on the left.
    void multiply_grad_lora(int64_t row, int64_t count) {
        transpose(low_ + row * rank_, count, rank_, adapter_->scaling, lows_.get(), lows_stride_);
        transpose(grad_low_.get(), count, rank_, 1.0f, grad_lows_.get(), lows_stride_);
        const Right input = drops() ? dense(dropped_.get(), dropped_.stride())
                                    : given(x_given_, row, weight_.in_features);
        const Right gradient = given(grad_given_, row, weight_.out_features);
        const Term to_A = {grad_lows_.get(), nullptr, lows_stride_, input, count, nullptr};
        const Term to_B = {lows_.get(), nullptr, lows_stride_, gradient, count, nullptr};
        const bool adds = row > 0;
        call_.multiply(product_of(to_A, rank_, weight_.in_features, grad_lora_A_, QLK_FLOAT32, adds), nullptr);
        float *to_B_transposed = grad_lora_B_transposed_.get();
        call_.multiply(product_of(to_B, rank_, weight_.out_features, to_B_transposed, QLK_FLOAT32, adds), nullptr);
    }

    Right given(const void *values, int64_t row, int64_t columns) const {
        return right_of(Layout::dense, row_of(values, dtype_, row, columns), dtype_, columns);
    }

    void multiply_grad_input(int64_t row, int64_t count) {
        if (in_bfloat16_) {
            grad_bfloat16_.load(call_, row, count);
        } else {
            grad_output_.load(call_, row, count);
        }
        Product product = {};
        if (adapter_ != nullptr) {
            const Right lora_A = dense(adapter_->lora_A, weight_.in_features);
            const Dropout *dropout = drops() ? &dropout_ : nullptr;
            product.terms[product.term_count++] = {grad_low_.get(), nullptr, rank_, lora_A, rank_, dropout};
        }
        const Right right = {Layout::weight, nullptr, 0, &weight_};
        product.terms[product.term_count++] =
            weight_term(in_bfloat16_, grad_output_, grad_bfloat16_, right, weight_.out_features);
        product.rows = count;
        product.columns = weight_.in_features;
        product.first_row = row;
        product.out = row_of(grad_input_, dtype_, row, weight_.in_features);
        product.dtype = dtype_;
        call_.multiply(product, sums_.get());
    }

    const Call &call_;
    const void *grad_given_, *x_given_;
    const float *low_;
    const int dtype_;
    const int64_t rows_;
    const qlk_weight &weight_;
    const qlk_adapter *adapter_;
    void *grad_input_;
    float *grad_lora_A_, *grad_lora_B_;
    const int64_t rank_;
    const Dropout dropout_;
    const bool in_bfloat16_;
    LeftRows grad_output_, dropped_;
    LeftBfloat16 grad_bfloat16_;
    ThinProduct thin_;
    int64_t lows_stride_ = 0;
    Buffer sums_, grad_low_, lows_, grad_lows_, grad_lora_B_transposed_;
};

}  // namespace
}  // namespace qlk

using namespace qlk;

extern "C" {

int qlk_cpu_linear(const void *x, int dtype, int64_t rows, const qlk_weight *weight, const void *bias, void *out,
                   int threads) {
    const int status = check_call(dtype, rows, weight);
    if (status != QLK_OK) return status;
    if (rows * weight->out_features == 0) return QLK_OK;
    if (out == nullptr || (x == nullptr && weight->in_features > 0)) return QLK_NULL_POINTER;
    const Call call = {isa().linear, threads_of(threads)};
    return Forward(call, x, dtype, rows, *weight, bias, nullptr, nullptr, out).run();
}

int qlk_cpu_lora_linear(const void *x, int dtype, int64_t rows, const qlk_weight *weight, const void *bias,
                        const qlk_adapter *adapter, float *low, void *out, int threads) {
    int status = check_call(dtype, rows, weight);
    if (status == QLK_OK) status = check_adapter(adapter, rows, *weight);
    if (status != QLK_OK) return status;
    if (rows == 0) return QLK_OK;
    if (x == nullptr && weight->in_features > 0) return QLK_NULL_POINTER;
    if ((out == nullptr && weight->out_features > 0) || (low == nullptr && adapter->rank > 0)) return QLK_NULL_POINTER;
    const Call call = {isa().linear, threads_of(threads)};
    return Forward(call, x, dtype, rows, *weight, bias, adapter, low, out).run();
}

int qlk_cpu_linear_grad_input(const void *grad_output, int dtype, int64_t rows, const qlk_weight *weight, void *out,
                              int threads) {
    const int status = check_call(dtype, rows, weight);
    if (status != QLK_OK) return status;
    if (rows * weight->in_features == 0) return QLK_OK;
    if (out == nullptr || (grad_output == nullptr && weight->out_features > 0)) return QLK_NULL_POINTER;
    const Call call = {isa().linear, threads_of(threads)};
    return Backward(call, grad_output, nullptr, nullptr, dtype, rows, *weight, nullptr, out, nullptr, nullptr).run();
}

int qlk_cpu_lora_linear_backward(const void *grad_output, const void *x, const float *low, int dtype, int64_t rows,
                                 const qlk_weight *weight, const qlk_adapter *adapter, void *grad_input,
                                 float *grad_lora_A, float *grad_lora_B, int threads) {
    int status = check_call(dtype, rows, weight);
    if (status == QLK_OK) status = check_adapter(adapter, rows, *weight);
    if (status != QLK_OK) return status;
    const int64_t rank = adapter->rank;
    if (grad_lora_A == nullptr && rank * weight->in_features > 0) return QLK_NULL_POINTER;
    if (grad_lora_B == nullptr && rank * weight->out_features > 0) return QLK_NULL_POINTER;
    if (grad_output == nullptr && rows * weight->out_features > 0) return QLK_NULL_POINTER;
    if (x == nullptr && rows * weight->in_features > 0) return QLK_NULL_POINTER;
    if (low == nullptr && rows * rank > 0) return QLK_NULL_POINTER;
    const Call call = {isa().linear, threads_of(threads)};
    return Backward(call, grad_output, x, low, dtype, rows, *weight, adapter, grad_input, grad_lora_A, grad_lora_B)
        .run();
}
}
