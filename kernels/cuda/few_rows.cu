// A product with few rows of x, as generation needs it: bound by reading the codes once. A warp takes a few output
// features, each lane 16 bytes of codes at a time, and the lanes' sums meet at the end. All sums are float32.
#include "linear_call.cuh"
#include "qlk/dropout.h"

namespace qlk {
namespace {

constexpr unsigned THREADS = 256;
constexpr int FEATURES = 2;  // of a warp: x is read once for both
constexpr int MOST_ROWS = 4; // of one launch: more would take too many registers
constexpr int BLOCKS = 3;    // of a multiprocessor at least; unsaid, nvcc takes four for sm_80, and spills

// COUNT values of x from an address that vectors need.
template <typename Type, int COUNT>
__device__ __forceinline__ void read_x(const typename Type::Bits *x, float (&values)[COUNT]) {
    if constexpr (COUNT == Type::COUNT) {
        Type::unpack(load16(x), values);
    } else if constexpr (COUNT > Type::COUNT) {
        float first[4], second[4];
        Float32::unpack(load16(x), first);
        Float32::unpack(load16(x + 4), second);
        for (int i = 0; i < 4; ++i) values[i] = first[i], values[4 + i] = second[i];
    } else {
        const uint2 words = *reinterpret_cast<const uint2 *>(x);
        const uint32_t both[2] = {words.x, words.y};
        for (int i = 0; i < 4; ++i) values[i] = Type::read(static_cast<uint16_t>(both[i / 2] >> 16 * (i % 2)));
    }
}

__device__ __forceinline__ float sum_of_warp(float x) {
    for (int apart = WARP / 2; apart > 0; apart /= 2) x += __shfl_xor_sync(ALL_LANES, x, apart);
    return x;
}

// The lane's share of the adapter's product, the sum over all lanes, and the result of each row.
template <typename Type, int ROWS>
__device__ __forceinline__ void finish(float (&sums)[ROWS], int rows, int64_t feature, int64_t out_features,
                                       const AdapterView &adapter, const typename Type::Bits *bias,
                                       typename Type::Bits *out) {
    const int lane = static_cast<int>(threadIdx.x % WARP);
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
        if (row >= rows) break;
        float extra = 0.0f;
#pragma unroll 2
        for (int64_t i = lane; i < adapter.rank; i += WARP) {
            extra = fmaf(adapter.low[row * adapter.rank + i], adapter.lora_B_at(feature * adapter.rank + i), extra);
        }
        float sum = sum_of_warp(fmaf(adapter.scaling, extra, sums[row]));
        if (bias != nullptr) sum += Type::read(bias[feature]);
        if (lane == row) out[row * out_features + feature] = Type::write(sum);
    }
}

// What a lane multiplies at once of each feature of its warp.
template <int BITS>
struct Codes {
    uint4 codes[FEATURES];
    float absmax[FEATURES];

    __device__ __forceinline__ void load(const WeightView &weight, const DecodeTables &tables, int64_t feature,
                                         int64_t k) {
#pragma unroll
        for (int f = 0; f < FEATURES; ++f) {
            const int64_t element = smaller(feature + f, weight.out_features - 1) * weight.in_features + k;
            codes[f] = load16(weight.packed + element * BITS / 8);
            absmax[f] = absmax_at(weight, tables, element);
        }
    }
};

// x and codes on addresses that vectors need, and every 16 bytes of codes in one row and one block.
template <typename Type, int BITS, int ROWS>
__global__ void __launch_bounds__(THREADS, BLOCKS)
    few_rows(const typename Type::Bits *x, int rows, WeightView weight, AdapterView adapter,
             const typename Type::Bits *bias, typename Type::Bits *out) {
    constexpr int IN_WORD = 32 / BITS, IN_VECTOR = 4 * IN_WORD;
    QLK_SHARED(DecodeTables, tables);
    load_tables<BITS>(tables, weight);
    __syncthreads();
    const int64_t warp = (int64_t{blockIdx.x} * THREADS + threadIdx.x) / WARP;
    const int64_t feature = warp * FEATURES;
    if (feature >= weight.out_features) return;
    const int64_t columns = weight.in_features, stride = int64_t{WARP} * IN_VECTOR;
    float sums[FEATURES][ROWS] = {};
    int64_t k = threadIdx.x % WARP * IN_VECTOR;
    Codes<BITS> next = {};
    if (k < columns) next.load(weight, tables, feature, k);
    for (; k < columns; k += stride) {
        const Codes<BITS> now = next;
        if (k + stride < columns) next.load(weight, tables, feature, k + stride);  // on its way during the sums
        float block_sums[FEATURES][ROWS] = {};
#pragma unroll
        for (int word = 0; word < 4; ++word) {
            float level[FEATURES][IN_WORD];
#pragma unroll
            for (int f = 0; f < FEATURES; ++f) {
                const uint32_t words[4] = {now.codes[f].x, now.codes[f].y, now.codes[f].z, now.codes[f].w};
                for (int i = 0; i < IN_WORD; ++i) level[f][i] = tables.value[code_in_word<BITS>(words[word], i)];
            }
#pragma unroll
            for (int row = 0; row < ROWS; ++row) {
                if (row >= rows) break;
                float values[IN_WORD];
                read_x<Type, IN_WORD>(x + row * columns + k + word * IN_WORD, values);
#pragma unroll
                for (int f = 0; f < FEATURES; ++f) {
                    for (int i = 0; i < IN_WORD; ++i) {
                        block_sums[f][row] = fmaf(values[i], level[f][i], block_sums[f][row]);
                    }
                }
            }
        }
#pragma unroll
        for (int f = 0; f < FEATURES; ++f) {
            for (int row = 0; row < ROWS; ++row) sums[f][row] = fmaf(block_sums[f][row], now.absmax[f], sums[f][row]);
        }
    }
#pragma unroll
    for (int f = 0; f < FEATURES; ++f) {
        if (feature + f < weight.out_features) {
            finish<Type>(sums[f], rows, feature + f, weight.out_features, adapter, bias, out);
        }
    }
}

// Any weight, one at a time.
template <typename Type, int BITS>
__global__ void __launch_bounds__(THREADS) few_rows_any(const typename Type::Bits *x, int rows, WeightView weight,
                                                        AdapterView adapter, const typename Type::Bits *bias,
                                                        typename Type::Bits *out) {
    QLK_SHARED(DecodeTables, tables);
    load_tables<BITS>(tables, weight);
    __syncthreads();
    const int64_t feature = (int64_t{blockIdx.x} * THREADS + threadIdx.x) / WARP;
    if (feature >= weight.out_features) return;
    float sums[MOST_ROWS] = {};
    for (int64_t k = threadIdx.x % WARP; k < weight.in_features; k += WARP) {
        const float one = weight_at<BITS>(weight, tables, feature * weight.in_features + k);
#pragma unroll
        for (int row = 0; row < MOST_ROWS; ++row) {
            if (row >= rows) break;
            sums[row] = fmaf(Type::read(x[row * weight.in_features + k]), one, sums[row]);
        }
    }
    finish<Type>(sums, rows, feature, weight.out_features, adapter, bias, out);
}

// A warp for each row of x and row of lora_A.
template <typename Type, typename Matrix>
__global__ void __launch_bounds__(THREADS) lora_down(const typename Type::Bits *x, int64_t rows, int64_t in_features,
                                                     const typename Matrix::Bits *lora_A, int64_t rank, float dropout,
                                                     uint64_t seed, float *low) {
    const int64_t index = (int64_t{blockIdx.x} * THREADS + threadIdx.x) / WARP;
    if (index >= rows * rank) return;
    const int64_t row = index / rank, i = index % rank;
    const float scale = dropout == 0.0f ? 1.0f : dropout_scale(dropout);
    float sum = 0.0f;
    for (int64_t k = threadIdx.x % WARP; k < in_features; k += WARP) {
        const int64_t element = row * in_features + k;
        const bool dropped = dropout != 0.0f && qlk_dropped(seed, static_cast<uint64_t>(element), dropout);
        const float value = dropped ? 0.0f : Type::read(x[element]) * scale;
        sum = fmaf(value, Matrix::read(lora_A[i * in_features + k]), sum);
    }
    sum = sum_of_warp(sum);
    if (threadIdx.x % WARP == 0) low[index] = sum;
}

template <typename Type, typename Matrix>
int down(const void *x, int64_t rows, int64_t in_features, const qlk_cuda_adapter &adapter, float *low, void *stream) {
    return launch(lora_down<Type, Matrix>, divide_up(rows * adapter.rank, THREADS / WARP), THREADS, stream,
                  static_cast<const typename Type::Bits *>(x), rows, in_features,
                  static_cast<const typename Matrix::Bits *>(adapter.lora_A), adapter.rank, adapter.dropout,
                  adapter.seed, low);
}

template <typename Type, int BITS>
int run(const void *x, int rows, const WeightView &weight, const AdapterView &adapter, const void *bias, void *out,
        void *stream) {
    using Bits = typename Type::Bits;
    const bool fast = weight.in_features % 32 == 0 && is_aligned(x, 16) && is_aligned(weight.packed, 16);
    auto kernel = few_rows_any<Type, BITS>;
    if (fast) kernel = rows == 1 ? few_rows<Type, BITS, 1> : few_rows<Type, BITS, MOST_ROWS>;
    const int64_t warps = fast ? divide_up(weight.out_features, FEATURES) : weight.out_features;
    for (int first = 0; first < rows; first += MOST_ROWS) {
        AdapterView of_rows = adapter;
        if (adapter.rank > 0) of_rows.low += first * adapter.rank;
        const int status =
            launch(kernel, divide_up(warps, THREADS / WARP), THREADS, stream,
                   static_cast<const Bits *>(x) + first * weight.in_features, rows - first, weight, of_rows,
                   static_cast<const Bits *>(bias), static_cast<Bits *>(out) + first * weight.out_features);
        if (status != QLK_OK) return status;
    }
    return QLK_OK;
}

}  // namespace
}  // namespace qlk

using namespace qlk;

extern "C" int qlk_cuda_linear_few_rows(const void *x, int dtype, int64_t rows, const qlk_weight *weight,
                                        const void *bias, const qlk_cuda_adapter *adapter, const float *low,
                                        void *out, void *stream) {
    const int status = check_linear(x, dtype, rows, QLK_CUDA_FEW_ROWS, weight, adapter, low, out);
    if (status != QLK_OK || rows == 0 || weight->out_features == 0) return status;
    return with_dtype(dtype, [&](auto type) {
        using Type = decltype(type);
        const auto run_bits = FORMATS[weight->format].bits == 4 ? run<Type, 4> : run<Type, 8>;
        return run_bits(x, static_cast<int>(rows), view_of(*weight), adapter_view(adapter, low), bias, out, stream);
    });
}

extern "C" int qlk_cuda_lora_down(const void *x, int dtype, int64_t rows, int64_t in_features,
                                  const qlk_cuda_adapter *adapter, float *low, void *stream) {
    if (!is_dtype(dtype)) return QLK_BAD_DTYPE;
    if (adapter == nullptr) return QLK_NULL_POINTER;
    if (!is_adapter_dtype(adapter->dtype)) return QLK_BAD_DTYPE;
    if (rows < 0 || in_features < 0 || adapter->rank < 0) return QLK_BAD_SIZE;
    int64_t results = 0, numel = 0;
    if (__builtin_mul_overflow(rows, adapter->rank, &results) || !is_size(results)) return QLK_BAD_SIZE;
    if (__builtin_mul_overflow(rows, in_features, &numel) || !is_size(numel)) return QLK_BAD_SIZE;
    if (results == 0) return QLK_OK;
    if (low == nullptr || (numel > 0 && (x == nullptr || adapter->lora_A == nullptr))) return QLK_NULL_POINTER;
    return with_dtype(dtype, [&](auto type) {
        using Type = decltype(type);
        const auto run_down = adapter->dtype == QLK_BFLOAT16 ? down<Type, Bfloat16> : down<Type, Float32>;
        return run_down(x, rows, in_features, *adapter, low, stream);
    });
}
