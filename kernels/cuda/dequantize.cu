// Dequantize: a rectangle of a weight, both levels of absmax in one launch. A thread expands 8 weights at a time, so
// that a warp reads whole lines of codes and writes whole lines of weights.
#include "decode.cuh"

namespace qlk {
namespace {

constexpr unsigned THREADS = 256;
constexpr int AT_ONCE = 8;  // weights: 16 bytes of a 16-bit dtype
constexpr int STEPS = 4;    // of a thread, all loads before the first store

struct Rectangle {
    int64_t first_row, rows, first_column, columns;
};

template <int BITS>
__device__ __forceinline__ uint2 load_codes(const uint8_t *packed, int64_t element) {
    if constexpr (BITS == 4) return {*reinterpret_cast<const uint32_t *>(packed + element / 2), 0};
    return *reinterpret_cast<const uint2 *>(packed + element);
}

// Rectangles in which every 8 weights of a row lie in one block, and on addresses that vectors need.
template <typename Type, int BITS>
__global__ void __launch_bounds__(THREADS) dequantize(WeightView weight, Rectangle part, typename Type::Bits *out) {
    QLK_SHARED(DecodeTables, tables);
    const int64_t octets = part.rows * part.columns / AT_ONCE;
    const auto row_octets = static_cast<uint32_t>(part.columns / AT_ONCE);
    const bool whole_rows = part.columns == weight.in_features;
    const int64_t first = int64_t{blockIdx.x} * THREADS * STEPS + threadIdx.x;
    int64_t element[STEPS];
    uint2 codes[STEPS];
    float absmax[STEPS];
    for (int step = 0; step < STEPS; ++step) {
        const int64_t octet = first + step * int64_t{THREADS};
        if (octet >= octets) break;
        const int64_t row = whole_rows ? 0 : static_cast<uint32_t>(octet) / row_octets;  // 64 bits take 5 times as long
        const int64_t column = octet - row * row_octets;
        element[step] = (part.first_row + row) * weight.in_features + part.first_column + column * AT_ONCE;
        codes[step] = load_codes<BITS>(weight.packed, element[step]);
    }
    load_tables<BITS>(tables, weight);  // while the codes are on their way
    __syncthreads();
    for (int step = 0; step < STEPS; ++step) {
        if (first + step * int64_t{THREADS} < octets) absmax[step] = absmax_at(weight, tables, element[step]);
    }
    for (int step = 0; step < STEPS; ++step) {
        const int64_t octet = first + step * int64_t{THREADS};
        if (octet >= octets) break;
        float x[AT_ONCE];
        for (int i = 0; i < AT_ONCE; ++i) {
            const uint32_t word = BITS == 8 && i >= 4 ? codes[step].y : codes[step].x;
            x[i] = tables.value[code_in_word<BITS>(word, BITS == 8 ? i % 4 : i)] * absmax[step];
        }
        Type::store8(out + octet * AT_ONCE, x);
    }
}

// Any rectangle, a weight at a time.
template <typename Type, int BITS>
__global__ void __launch_bounds__(THREADS) dequantize_any(WeightView weight, Rectangle part, int64_t begin,
                                                          typename Type::Bits *out) {
    QLK_SHARED(DecodeTables, tables);
    load_tables<BITS>(tables, weight);
    __syncthreads();
    const int64_t index = begin + int64_t{blockIdx.x} * THREADS + threadIdx.x;
    if (index >= part.rows * part.columns) return;
    const int64_t row = index / part.columns, column = index % part.columns;
    const int64_t element = (part.first_row + row) * weight.in_features + part.first_column + column;
    out[index] = Type::write(weight_at<BITS>(weight, tables, element));
}

template <typename Type, int BITS>
int run(const WeightView &weight, const Rectangle &part, void *memory, void *stream) {
    auto *out = static_cast<typename Type::Bits *>(memory);
    const int64_t numel = part.rows * part.columns;
    const bool whole_rows = part.columns == weight.in_features;
    const int64_t first = part.first_row * weight.in_features + part.first_column;
    const bool rows_fit = whole_rows || (weight.in_features % AT_ONCE == 0 && part.columns % AT_ONCE == 0 &&
                                         numel / AT_ONCE <= UINT32_MAX);
    const bool fast = rows_fit && first % AT_ONCE == 0 && is_aligned(out, 16) && is_aligned(weight.packed, BITS);
    const int64_t octets = fast ? numel / AT_ONCE : 0;
    if (octets > 0) {
        const int status = launch(dequantize<Type, BITS>, divide_up(octets, THREADS * STEPS), THREADS, stream, weight,
                                  part, out);
        if (status != QLK_OK) return status;
    }
    const int64_t left = numel - octets * AT_ONCE;
    if (left == 0) return QLK_OK;
    return launch(dequantize_any<Type, BITS>, divide_up(left, THREADS), THREADS, stream, weight, part,
                  octets * AT_ONCE, out);
}

}  // namespace
}  // namespace qlk

using namespace qlk;

extern "C" int qlk_cuda_dequantize(const qlk_weight *weight, int dtype, int64_t first_row, int64_t rows,
                                   int64_t first_column, int64_t columns, void *out, void *stream) {
    if (!is_dtype(dtype)) return QLK_BAD_DTYPE;
    int64_t numel = 0;
    const int status = check_weight(weight, numel);
    if (status != QLK_OK) return status;
    if (first_row < 0 || rows < 0 || first_row > weight->out_features - rows) return QLK_BAD_SIZE;
    if (first_column < 0 || columns < 0 || first_column > weight->in_features - columns) return QLK_BAD_SIZE;
    if (rows == 0 || columns == 0) return QLK_OK;
    if (out == nullptr) return QLK_NULL_POINTER;
    const Rectangle part = {first_row, rows, first_column, columns};
    return with_dtype(dtype, [&](auto type) {
        using Type = decltype(type);
        return FORMATS[weight->format].bits == 4 ? run<Type, 4>(view_of(*weight), part, out, stream)
                                                 : run<Type, 8>(view_of(*weight), part, out, stream);
    });
}
