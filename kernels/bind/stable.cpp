// The ops of qlora_lab/ops for CPU tensors, on torch's stable ABI: one binary for torch 2.10 and newer, any Python.
//
// Schemas, fake kernels and autograd are registered in Python; here is only what runs. Arguments were checked there
// with messages for people; what is checked again would otherwise read or write outside a tensor.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "qlk.h"
#include "qlk/tables.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check(int status, const char *op) {
    STD_TORCH_CHECK(status == QLK_OK, "qlora_lab::", op, ": ", qlk_status_text(status));
}

int format_index(const std::string &name) {
    const int index = qlk_format_index(name.c_str());
    STD_TORCH_CHECK(index >= 0, "there is no number format '", name, "' in the native kernels");
    return index;
}

// As Python writes it.
const char *name_of(ScalarType dtype) {
    switch (dtype) {
        case ScalarType::Float: return "float32";
        case ScalarType::Double: return "float64";
        case ScalarType::Half: return "float16";
        case ScalarType::BFloat16: return "bfloat16";
        case ScalarType::Byte: return "uint8";
        case ScalarType::Char: return "int8";
        case ScalarType::Long: return "int64";
        default: return torch::headeronly::toString(dtype);
    }
}

int dtype_code(ScalarType dtype) {
    switch (dtype) {
        case ScalarType::Float: return QLK_FLOAT32;
        case ScalarType::BFloat16: return QLK_BFLOAT16;
        case ScalarType::Half: return QLK_FLOAT16;
        default: STD_TORCH_CHECK(false, "expected float32, bfloat16 or float16, got ", name_of(dtype));
    }
}

int32_t aoti_dtype(ScalarType dtype) {
    switch (dtype) {
        case ScalarType::Byte: return aoti_torch_dtype_uint8();
        case ScalarType::BFloat16: return aoti_torch_dtype_bfloat16();
        case ScalarType::Half: return aoti_torch_dtype_float16();
        default: return aoti_torch_dtype_float32();
    }
}

int64_t blocks_of(int64_t count, int64_t block_size) {
    STD_TORCH_CHECK(block_size >= 32 && block_size <= 4096, "block size ", block_size, " is not from 32 to 4096");
    return (count + block_size - 1) / block_size;
}

int threads() { return static_cast<int>(torch::stable::get_num_threads()); }

Tensor as_contiguous(const Tensor &tensor) { return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); }

// An uninitialised CPU tensor. The shim's own call: asking the dispatcher for new_empty by name takes microseconds.
Tensor allocate(const int64_t *shape, size_t dim, int64_t *strides, ScalarType dtype) {
    for (size_t i = dim; i-- > 0;) strides[i] = i + 1 == dim ? 1 : strides[i + 1] * (shape[i + 1] > 0 ? shape[i + 1] : 1);
    AtenTensorHandle handle = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(dim), shape, strides, aoti_dtype(dtype),
                                                           aoti_torch_device_type_cpu(), 0, &handle));
    return Tensor(handle);
}

template <size_t DIM>
Tensor allocate(const int64_t (&shape)[DIM], ScalarType dtype) {
    int64_t strides[DIM];
    return allocate(shape, DIM, strides, dtype);
}

template <typename T>
const T *data(const Tensor &tensor) {
    return static_cast<const T *>(tensor.const_data_ptr());
}

template <typename T>
T *out(Tensor &tensor) {
    return static_cast<T *>(tensor.mutable_data_ptr());
}

// The kernels compute from float32 and bfloat16; float16, which no CPU trains in, goes through float32.
Tensor as_input(const Tensor &tensor) {
    return as_contiguous(tensor.scalar_type() == ScalarType::Half ? torch::stable::to(tensor, ScalarType::Float) : tensor);
}

Tensor in_dtype_of(const Tensor &like, const Tensor &result) {
    return like.scalar_type() == result.scalar_type() ? result : torch::stable::to(result, like.scalar_type());
}

void check_scalar(const Tensor &offset) {
    STD_TORCH_CHECK(offset.numel() == 1 && offset.scalar_type() == ScalarType::Float, "offset must be one float32; got ",
                    offset.numel(), " of ", name_of(offset.scalar_type()));
}

void check_type(const Tensor &tensor, ScalarType expected, const char *name) {
    STD_TORCH_CHECK(tensor.scalar_type() == expected, name, " must be ", name_of(expected), "; got ",
                    name_of(tensor.scalar_type()));
}

// The tensors of a weight, kept alive and contiguous while the kernel reads them.
class Weight {
  public:
    Weight(const Tensor &packed, const Tensor &absmax, const std::optional<Tensor> &nested_absmax,
           const std::optional<Tensor> &offset, const std::string &fmt, int64_t block_size, int64_t nested_block_size,
           int64_t out_features, int64_t in_features)
        : packed_(as_contiguous(packed)), absmax_(as_contiguous(absmax)) {
        int64_t numel = 0;
        STD_TORCH_CHECK(out_features >= 0 && in_features >= 0, "a weight cannot have a shape of (", out_features, ", ", in_features, ")");
        STD_TORCH_CHECK(!__builtin_mul_overflow(out_features, in_features, &numel) && numel < (int64_t{1} << 60),
                        out_features, " times ", in_features, " weights are too many");
        const int format = format_index(fmt);
        const int64_t blocks = blocks_of(numel, block_size);
        check_type(packed_, ScalarType::Byte, "packed");
        STD_TORCH_CHECK(packed_.numel() >= (numel * qlk::FORMATS[format].bits + 7) / 8,
                        "packed holds ", packed_.numel(), " elements, too few for ", numel, " weights in ", fmt);
        STD_TORCH_CHECK(absmax_.numel() >= blocks, "absmax has ", absmax_.numel(), " elements for ", blocks, " blocks");
        const bool nested = nested_absmax.has_value();
        check_type(absmax_, nested ? ScalarType::Byte : ScalarType::Float, "absmax");
        const float *nested_pointer = nullptr;
        const float *offset_pointer = nullptr;
        if (nested) {
            STD_TORCH_CHECK(offset.has_value(), "a doubly quantized absmax needs an offset");
            check_scalar(*offset);
            nested_absmax_ = as_contiguous(*nested_absmax);
            offset_ = *offset;
            check_type(*nested_absmax_, ScalarType::Float, "nested_absmax");
            STD_TORCH_CHECK(nested_absmax_->numel() >= blocks_of(blocks, nested_block_size),
                            "nested_absmax has ", nested_absmax_->numel(), " elements, too few for ", blocks, " blocks");
            nested_pointer = data<float>(*nested_absmax_);
            offset_pointer = data<float>(*offset_);
        }
        view_ = {data<uint8_t>(packed_),
                 absmax_.const_data_ptr(),
                 nested_pointer,
                 offset_pointer,
                 out_features,
                 in_features,
                 block_size,
                 nested_block_size,
                 format};
    }

    const qlk_weight *view() const { return &view_; }

  private:
    Tensor packed_, absmax_;
    std::optional<Tensor> nested_absmax_, offset_;
    qlk_weight view_;
};

int64_t rows_of(const Tensor &matrix, int64_t columns, const char *name) {
    const auto sizes = matrix.sizes();
    STD_TORCH_CHECK(sizes.size() >= 1 && sizes[sizes.size() - 1] == columns, name, " must have ", columns,
                    " columns in its last dimension");
    int64_t rows = 1;  // not numel / columns: a matrix without columns has rows, too
    for (size_t i = 0; i + 1 < sizes.size(); ++i) {
        STD_TORCH_CHECK(!__builtin_mul_overflow(rows, sizes[i], &rows), name, " has too many rows");
    }
    return rows;
}

// The bias in the dtype of x.
Tensor bias_for(const Tensor &bias, const Tensor &x, int64_t out_features) {
    STD_TORCH_CHECK(bias.numel() == out_features, "bias must have ", out_features, " elements");
    return as_contiguous(bias.scalar_type() == x.scalar_type() ? bias : torch::stable::to(bias, x.scalar_type()));
}

// An uninitialised tensor like `matrix` with another last dimension.
Tensor empty_with_columns(const Tensor &matrix, int64_t columns) {
    const auto sizes = matrix.sizes();
    std::vector<int64_t> shape(sizes.begin(), sizes.end()), strides(sizes.size());
    shape.back() = columns;
    return allocate(shape.data(), shape.size(), strides.data(), matrix.scalar_type());
}

std::tuple<Tensor, Tensor> quantize_blockwise(Tensor weight, std::string fmt, int64_t block_size) {
    const Tensor source = as_contiguous(weight);
    const int64_t numel = source.numel();
    const int format = format_index(fmt);
    const int64_t bytes = (numel * qlk::FORMATS[format].bits + 7) / 8;
    Tensor packed = allocate({bytes}, ScalarType::Byte);
    Tensor absmax = allocate({blocks_of(numel, block_size)}, ScalarType::Float);
    check(qlk_cpu_quantize(source.const_data_ptr(), dtype_code(source.scalar_type()), numel, format, block_size,
                           out<uint8_t>(packed), out<float>(absmax), threads()),
          "quantize_blockwise");
    return {packed, absmax};
}

void expand(const Weight &weight, Tensor &result) {
    const qlk_weight &view = *weight.view();
    STD_TORCH_CHECK(result.is_contiguous() && result.numel() == view.out_features * view.in_features,
                    "out must be contiguous with ", view.out_features * view.in_features, " elements");
    const bool half = result.scalar_type() == ScalarType::Half;
    Tensor target = half ? allocate({result.numel()}, ScalarType::Float) : result;
    check(qlk_cpu_dequantize(&view, dtype_code(target.scalar_type()), target.mutable_data_ptr(), threads()),
          "dequantize_weight");
    if (half) torch::stable::copy_(result, torch::stable::view(target, result.sizes()));
}

void dequantize_weight_into(Tensor packed, Tensor absmax, std::optional<Tensor> nested_absmax,
                            std::optional<Tensor> offset, std::string fmt, int64_t block_size,
                            int64_t nested_block_size, int64_t out_features, int64_t in_features, Tensor result) {
    const Weight weight(packed, absmax, nested_absmax, offset, fmt, block_size, nested_block_size, out_features, in_features);
    expand(weight, result);
}

Tensor dequantize_weight(Tensor packed, Tensor absmax, std::optional<Tensor> nested_absmax, std::optional<Tensor> offset,
                         std::string fmt, int64_t block_size, int64_t nested_block_size, int64_t out_features,
                         int64_t in_features, ScalarType dtype) {
    const Weight weight(packed, absmax, nested_absmax, offset, fmt, block_size, nested_block_size, out_features, in_features);
    Tensor result = allocate({out_features, in_features}, dtype);
    const int64_t value_bytes = dtype == ScalarType::Float ? sizeof(float) : sizeof(uint16_t);
    qlk_cpu_expect_writes(result.mutable_data_ptr(), result.numel() * value_bytes);
    expand(weight, result);
    return result;
}

std::tuple<Tensor, Tensor> quantize_absmax(Tensor absmax, Tensor offset, int64_t block_size) {
    const Tensor source = as_contiguous(absmax);
    check_scalar(offset);
    check_type(source, ScalarType::Float, "absmax");
    const int64_t blocks = source.numel();
    Tensor codes = allocate({blocks}, ScalarType::Byte);
    Tensor nested_absmax = allocate({blocks_of(blocks, block_size)}, ScalarType::Float);
    check(qlk_cpu_quantize_absmax(data<float>(source), blocks, block_size, *data<float>(offset), out<uint8_t>(codes),
                                  out<float>(nested_absmax), threads()),
          "quantize_absmax");
    return {codes, nested_absmax};
}

Tensor dequantize_absmax(Tensor codes, Tensor nested_absmax, Tensor offset, int64_t block_size) {
    const Tensor source = as_contiguous(codes);
    const Tensor scales = as_contiguous(nested_absmax);
    check_scalar(offset);
    const int64_t blocks = source.numel();
    check_type(source, ScalarType::Byte, "codes");
    check_type(scales, ScalarType::Float, "nested_absmax");
    STD_TORCH_CHECK(scales.numel() >= blocks_of(blocks, block_size),
                    "nested_absmax has ", scales.numel(), " elements, too few for ", blocks, " codes");
    Tensor absmax = allocate({blocks}, ScalarType::Float);
    check(qlk_cpu_dequantize_absmax(data<uint8_t>(source), data<float>(scales), data<float>(offset), blocks, block_size,
                                    out<float>(absmax), threads()),
          "dequantize_absmax");
    return absmax;
}

Tensor quantized_linear(Tensor x, Tensor packed, Tensor absmax, std::optional<Tensor> nested_absmax,
                        std::optional<Tensor> offset, std::string fmt, int64_t block_size, int64_t nested_block_size,
                        int64_t out_features, int64_t in_features, std::optional<Tensor> bias) {
    const Weight weight(packed, absmax, nested_absmax, offset, fmt, block_size, nested_block_size, out_features, in_features);
    const Tensor input = as_input(x);
    const int64_t rows = rows_of(input, in_features, "x");
    const Tensor shift = bias.has_value() ? bias_for(*bias, input, out_features) : input;
    Tensor result = empty_with_columns(input, out_features);
    check(qlk_cpu_linear(input.const_data_ptr(), dtype_code(input.scalar_type()), rows, weight.view(),
                         bias.has_value() ? shift.const_data_ptr() : nullptr, result.mutable_data_ptr(), threads()),
          "quantized_linear");
    return in_dtype_of(x, result);
}

Tensor quantized_linear_grad_input(Tensor grad_output, Tensor packed, Tensor absmax, std::optional<Tensor> nested_absmax,
                                   std::optional<Tensor> offset, std::string fmt, int64_t block_size,
                                   int64_t nested_block_size, int64_t out_features, int64_t in_features) {
    const Weight weight(packed, absmax, nested_absmax, offset, fmt, block_size, nested_block_size, out_features, in_features);
    const Tensor gradient = as_input(grad_output);
    const int64_t rows = rows_of(gradient, out_features, "grad_output");
    Tensor result = empty_with_columns(gradient, in_features);
    check(qlk_cpu_linear_grad_input(gradient.const_data_ptr(), dtype_code(gradient.scalar_type()), rows, weight.view(),
                                    result.mutable_data_ptr(), threads()),
          "quantized_linear_grad_input");
    return in_dtype_of(grad_output, result);
}

// The adapter's matrices, kept alive and contiguous.
struct Adapter {
    Tensor lora_A, lora_B;
    qlk_adapter view;

    Adapter(const Tensor &A, const Tensor &B, int64_t out_features, int64_t in_features, double scaling, double dropout,
            int64_t seed)
        : lora_A(as_contiguous(A)), lora_B(as_contiguous(B)) {
        check_type(lora_A, ScalarType::Float, "lora_A");
        check_type(lora_B, ScalarType::Float, "lora_B");
        STD_TORCH_CHECK(lora_A.dim() == 2 && lora_B.dim() == 2 && lora_A.size(1) == in_features &&
                            lora_B.size(0) == out_features && lora_A.size(0) == lora_B.size(1),
                        "lora_A must be (rank, ", in_features, ") and lora_B (", out_features, ", rank)");
        view = {data<float>(lora_A), data<float>(lora_B), lora_A.size(0), static_cast<float>(scaling),
                static_cast<float>(dropout), static_cast<uint64_t>(seed)};
    }
};

std::tuple<Tensor, Tensor> lora_linear(Tensor x, Tensor packed, Tensor absmax, std::optional<Tensor> nested_absmax,
                                       std::optional<Tensor> offset, std::string fmt, int64_t block_size,
                                       int64_t nested_block_size, int64_t out_features, int64_t in_features,
                                       std::optional<Tensor> bias, Tensor lora_A, Tensor lora_B, double scaling,
                                       double dropout, int64_t seed) {
    const Weight weight(packed, absmax, nested_absmax, offset, fmt, block_size, nested_block_size, out_features, in_features);
    const Adapter adapter(lora_A, lora_B, out_features, in_features, scaling, dropout, seed);
    const Tensor input = as_input(x);
    const int64_t rows = rows_of(input, in_features, "x");
    const Tensor shift = bias.has_value() ? bias_for(*bias, input, out_features) : input;
    Tensor low = allocate({rows, adapter.view.rank}, ScalarType::Float);
    Tensor result = empty_with_columns(input, out_features);
    check(qlk_cpu_lora_linear(input.const_data_ptr(), dtype_code(input.scalar_type()), rows, weight.view(),
                              bias.has_value() ? shift.const_data_ptr() : nullptr, &adapter.view, out<float>(low),
                              result.mutable_data_ptr(), threads()),
          "lora_linear");
    return {in_dtype_of(x, result), low};
}

std::tuple<Tensor, Tensor, Tensor> lora_linear_backward(Tensor grad_output, Tensor x, Tensor low, Tensor packed,
                                                        Tensor absmax, std::optional<Tensor> nested_absmax,
                                                        std::optional<Tensor> offset, std::string fmt,
                                                        int64_t block_size, int64_t nested_block_size,
                                                        int64_t out_features, int64_t in_features, Tensor lora_A,
                                                        Tensor lora_B, double scaling, double dropout, int64_t seed,
                                                        bool needs_grad_x) {
    const Weight weight(packed, absmax, nested_absmax, offset, fmt, block_size, nested_block_size, out_features, in_features);
    const Adapter adapter(lora_A, lora_B, out_features, in_features, scaling, dropout, seed);
    const Tensor gradient = as_input(grad_output);
    const Tensor input = as_input(x);
    const Tensor projected = as_contiguous(low);
    const int64_t rows = rows_of(gradient, out_features, "grad_output");
    STD_TORCH_CHECK(rows_of(input, in_features, "x") == rows && projected.numel() == rows * adapter.view.rank &&
                        projected.scalar_type() == ScalarType::Float && input.scalar_type() == gradient.scalar_type(),
                    "grad_output, x and low do not belong together");
    Tensor grad_x = needs_grad_x ? empty_with_columns(gradient, in_features) : allocate({0}, gradient.scalar_type());
    Tensor grad_A = allocate({adapter.view.rank, in_features}, ScalarType::Float);
    Tensor grad_B = allocate({out_features, adapter.view.rank}, ScalarType::Float);
    check(qlk_cpu_lora_linear_backward(gradient.const_data_ptr(), input.const_data_ptr(), data<float>(projected),
                                       dtype_code(gradient.scalar_type()), rows, weight.view(), &adapter.view,
                                       needs_grad_x ? grad_x.mutable_data_ptr() : nullptr, out<float>(grad_A),
                                       out<float>(grad_B), threads()),
          "lora_linear_backward");
    return {in_dtype_of(x, grad_x), grad_A, grad_B};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qlora_lab, CPU, m) {
    m.impl("quantize_blockwise", TORCH_BOX(&quantize_blockwise));
    m.impl("dequantize_weight", TORCH_BOX(&dequantize_weight));
    m.impl("dequantize_weight_into", TORCH_BOX(&dequantize_weight_into));
    m.impl("quantize_absmax", TORCH_BOX(&quantize_absmax));
    m.impl("dequantize_absmax", TORCH_BOX(&dequantize_absmax));
    m.impl("quantized_linear_kernel", TORCH_BOX(&quantized_linear));
    m.impl("quantized_linear_grad_input_kernel", TORCH_BOX(&quantized_linear_grad_input));
    m.impl("lora_linear_kernel", TORCH_BOX(&lora_linear));
    m.impl("lora_linear_backward", TORCH_BOX(&lora_linear_backward));
}
