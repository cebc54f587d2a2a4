// AdamW over all tensors of a step in one launch, and the norm of their gradients. A block of threads takes one piece
// of a tensor; which one, the array of first pieces tells.
#include "qlk/adamw.h"
#include "qlk/blockwise.h"
#include "tables.cuh"

namespace qlk {
namespace {

constexpr unsigned THREADS = 256;
constexpr int AT_ONCE = 4;  // elements: 16 bytes
constexpr int STEPS = QLK_CUDA_PIECE / (THREADS * AT_ONCE);
constexpr int SMALLEST_BLOCK = 32;
constexpr int SQUARE_LANES = 16;  // sums that run side by side, as on CPUs

// The tensor that holds a piece: the last whose first piece is not beyond it.
__device__ __forceinline__ int64_t tensor_of(const int64_t *first_piece, int64_t count, int64_t piece) {
    int64_t low = 0, high = count;
    while (high - low > 1) {
        const int64_t middle = low + (high - low) / 2;
        if (first_piece[middle] <= piece) low = middle;
        else high = middle;
    }
    return low;
}

// Call body(the type of a tensor's parameter and gradient).
template <typename Body>
__device__ __forceinline__ auto with_elements(const qlk_adamw_tensor &tensor, const Body &body) {
    return tensor.dtype == QLK_BFLOAT16 ? body(Bfloat16()) : body(Float32());
}

template <typename Type>
__device__ __forceinline__ double sum_of_squares(const void *gradient, int64_t begin, int64_t end) {
    const auto *values = static_cast<const typename Type::Bits *>(gradient);
    double sum = 0.0;
#pragma unroll 8
    for (int64_t i = begin; i < end; i += SQUARE_LANES) {
        const auto x = static_cast<double>(Type::read(values[i]));
        sum = sum + x * x;
    }
    return sum;
}

// A half of a warp for each piece; lane i adds up the squares of elements i, i + 16, ...
__global__ void __launch_bounds__(THREADS) squares(const qlk_adamw_tensor *tensors, const int64_t *first_piece,
                                                   int64_t count, int64_t pieces, double *sums) {
    const int64_t thread = int64_t{blockIdx.x} * THREADS + threadIdx.x;
    const int64_t piece = thread / SQUARE_LANES;
    double sum = 0.0;
    if (piece < pieces) {
        const int64_t index = tensor_of(first_piece, count, piece);
        const int64_t begin = (piece - first_piece[index]) * QLK_CUDA_PIECE;
        const int64_t end = smaller(begin + QLK_CUDA_PIECE, tensors[index].numel);
        sum = with_elements(tensors[index], [&](auto type) {
            return sum_of_squares<decltype(type)>(tensors[index].gradient, begin + thread % SQUARE_LANES, end);
        });
    }
    for (int apart = SQUARE_LANES / 2; apart > 0; apart /= 2) sum = sum + __shfl_xor_sync(ALL_LANES, sum, apart);
    if (piece < pieces && thread % SQUARE_LANES == 0) sums[piece] = sum;
}

// One block: the sums in their order, by its first thread.
__global__ void __launch_bounds__(THREADS) total(const int64_t *first_piece, int64_t count, int64_t pieces,
                                                 double gradient_scale, const double *sums, qlk_cuda_norm *result) {
    QLK_SHARED(Shared<double[THREADS]>, part);
    double sum = 0.0;
    int64_t first_bad = -1;
    for (int64_t begin = 0; begin < pieces; begin += THREADS) {
        if (begin + threadIdx.x < pieces) part[threadIdx.x] = sums[begin + threadIdx.x];
        __syncthreads();
        if (threadIdx.x == 0) {
            for (int64_t i = begin; i < smaller(begin + THREADS, pieces); ++i) {
                const double square = part[i - begin];
                sum = sum + square;
                if (first_bad < 0 && !(square - square == 0.0)) first_bad = i;
            }
        }
        __syncthreads();
    }
    if (threadIdx.x != 0) return;
    result->norm = (gradient_scale < 0 ? -gradient_scale : gradient_scale) * sqrt(sum);
    result->first_not_finite = first_bad < 0 ? -1 : tensor_of(first_piece, count, first_bad);
}

// What a thread updates at once; elements past the end of the tensor are zeros.
struct Four {
    float x[AT_ONCE];
};

__device__ __forceinline__ Four load_four(const float *p, int64_t left, bool aligned) {
    Four result = {};
    if (aligned && left >= AT_ONCE) {
        Float32::unpack(load16(p), result.x);
    } else {
        for (int i = 0; i < AT_ONCE; ++i) result.x[i] = i < left ? p[i] : 0.0f;
    }
    return result;
}

__device__ __forceinline__ void store_four(float *p, const Four &four, int64_t left, bool aligned) {
    if (aligned && left >= AT_ONCE) {
        store16(p, {bits_of(four.x[0]), bits_of(four.x[1]), bits_of(four.x[2]), bits_of(four.x[3])});
    } else {
        for (int i = 0; i < AT_ONCE && i < left; ++i) p[i] = four.x[i];
    }
}

// The same of parameters and gradients, which may have 16 bits.
__device__ __forceinline__ Four load_elements(Float32, const void *p, int64_t at, int64_t left, bool aligned) {
    return load_four(static_cast<const float *>(p) + at, left, aligned);
}

__device__ __forceinline__ Four load_elements(Bfloat16, const void *p, int64_t at, int64_t left, bool aligned) {
    const auto *bits = static_cast<const uint16_t *>(p) + at;
    Four result = {};
    if (aligned && left >= AT_ONCE) {
        const uint64_t word = *reinterpret_cast<const uint64_t *>(bits);
        for (int i = 0; i < AT_ONCE; ++i) result.x[i] = Bfloat16::read(static_cast<uint16_t>(word >> 16 * i));
    } else {
        for (int i = 0; i < AT_ONCE; ++i) result.x[i] = i < left ? Bfloat16::read(bits[i]) : 0.0f;
    }
    return result;
}

__device__ __forceinline__ void store_elements(Float32, void *p, int64_t at, const Four &four, int64_t left,
                                               bool aligned) {
    store_four(static_cast<float *>(p) + at, four, left, aligned);
}

__device__ __forceinline__ void store_elements(Bfloat16, void *p, int64_t at, const Four &four, int64_t left,
                                               bool aligned) {
    auto *bits = static_cast<uint16_t *>(p) + at;
    if (aligned && left >= AT_ONCE) {
        uint64_t word = 0;
        for (int i = 0; i < AT_ONCE; ++i) word |= uint64_t{Bfloat16::write(four.x[i])} << 16 * i;
        *reinterpret_cast<uint64_t *>(bits) = word;
    } else {
        for (int i = 0; i < AT_ONCE && i < left; ++i) bits[i] = Bfloat16::write(four.x[i]);
    }
}

__device__ __forceinline__ uint32_t load_four_codes(const uint8_t *p, int64_t left, bool aligned) {
    if (aligned && left >= AT_ONCE) return *reinterpret_cast<const uint32_t *>(p);
    uint32_t word = 0;
    for (int i = 0; i < AT_ONCE && i < left; ++i) word |= static_cast<uint32_t>(p[i]) << 8 * i;
    return word;
}

__device__ __forceinline__ void store_four_codes(uint8_t *p, uint32_t word, int64_t left, bool aligned) {
    if (aligned && left >= AT_ONCE) {
        *reinterpret_cast<uint32_t *>(p) = word;
    } else {
        for (int i = 0; i < AT_ONCE && i < left; ++i) p[i] = static_cast<uint8_t>(word >> 8 * i);
    }
}

__device__ __forceinline__ void update_four(const AdamwStep &step, const Four &gradient, Four &parameter, Four &exp_avg,
                                            Four &exp_avg_sq) {
    for (int i = 0; i < AT_ONCE; ++i) {
        adamw_update(step, gradient.x[i], parameter.x[i], exp_avg.x[i], exp_avg_sq.x[i],
                     [](float x) { return sqrtf(x); });
    }
}

// Is every vector of this tensor on an address that vectors need? 8-bit codes need multiples of 4, bfloat16 of 8.
__device__ __forceinline__ bool vectors_fit(const qlk_adamw_tensor &tensor) {
    const auto elements = reinterpret_cast<uintptr_t>(tensor.parameter) | reinterpret_cast<uintptr_t>(tensor.gradient);
    const auto states = reinterpret_cast<uintptr_t>(tensor.exp_avg) | reinterpret_cast<uintptr_t>(tensor.exp_avg_sq);
    return elements % (tensor.dtype == QLK_BFLOAT16 ? 8 : 16) == 0 &&
           states % (tensor.exp_avg_absmax == nullptr ? 16 : 4) == 0;
}

template <typename Type>
__device__ __forceinline__ void update_floats(Type type, const AdamwStep &step, const qlk_adamw_tensor &tensor,
                                              int64_t piece) {
    auto *exp_avgs = static_cast<float *>(tensor.exp_avg), *exp_avg_sqs = static_cast<float *>(tensor.exp_avg_sq);
    const bool aligned = vectors_fit(tensor);
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {
        const int64_t at = piece * QLK_CUDA_PIECE + (i * int64_t{THREADS} + threadIdx.x) * AT_ONCE;
        const int64_t left = tensor.numel - at;
        if (left <= 0) return;
        const Four gradient = load_elements(type, tensor.gradient, at, left, aligned);
        Four parameter = load_elements(type, tensor.parameter, at, left, aligned);
        Four exp_avg = load_four(exp_avgs + at, left, aligned);
        Four exp_avg_sq = load_four(exp_avg_sqs + at, left, aligned);
        update_four(step, gradient, parameter, exp_avg, exp_avg_sq);
        store_elements(type, tensor.parameter, at, parameter, left, aligned);
        store_four(exp_avgs + at, exp_avg, left, aligned);
        store_four(exp_avg_sqs + at, exp_avg_sq, left, aligned);
    }
}

// The states of 8 bits: the maps, and the largest magnitudes of the blocks in one piece.
struct StateTables {
    float exp_avg_levels[256], exp_avg_midpoints[256];
    float exp_avg_sq_levels[256], exp_avg_sq_midpoints[256];
    uint32_t exp_avg_most[QLK_CUDA_PIECE / SMALLEST_BLOCK], exp_avg_sq_most[QLK_CUDA_PIECE / SMALLEST_BLOCK];
};

// The largest magnitude of a block, over the lanes of a warp that share it and then over warps.
__device__ __forceinline__ void note_largest(uint32_t *most, const Four &values, int64_t left, int block_in_piece,
                                             int lanes) {
    uint32_t largest = 0;
    for (int i = 0; i < AT_ONCE; ++i) {
        const uint32_t bits = i < left ? magnitude_bits(values.x[i]) : 0;
        largest = bits > largest ? bits : largest;
    }
    for (int apart = 1; apart < static_cast<int>(WARP); apart *= 2) {
        const uint32_t other = __shfl_xor_sync(ALL_LANES, largest, apart);
        if (apart < lanes && other > largest) largest = other;
    }
    if ((static_cast<int>(threadIdx.x) & (lanes - 1)) == 0) atomicMax(&most[block_in_piece], largest);
}

__device__ __forceinline__ uint32_t encode_four(const float *midpoints, const Four &values, uint32_t most, uint8_t zero) {
    const float inverse = inverse_absmax(absmax_of(most));
    uint32_t word = 0;
    for (int i = 0; i < AT_ONCE; ++i) {
        const uint32_t code = not_finite(most) ? zero : dynamic_rank(midpoints, values.x[i] * inverse);
        word |= code << 8 * i;
    }
    return word;
}

template <typename Type>
__device__ __forceinline__ void update_codes(Type type, const AdamwStep &step, const qlk_adamw_tensor &tensor,
                                             int64_t piece, int block_shift, StateTables &tables) {
    auto *exp_avgs = static_cast<uint8_t *>(tensor.exp_avg), *exp_avg_sqs = static_cast<uint8_t *>(tensor.exp_avg_sq);
    const bool aligned = vectors_fit(tensor);
    const int lanes = static_cast<int>(smaller(WARP, (1 << block_shift) / AT_ONCE));
    Four exp_avg[STEPS], exp_avg_sq[STEPS];
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {
        const int in_piece = (i * static_cast<int>(THREADS) + static_cast<int>(threadIdx.x)) * AT_ONCE;
        const int64_t at = piece * QLK_CUDA_PIECE + in_piece, left = tensor.numel - at;
        exp_avg[i] = exp_avg_sq[i] = {};
        if (left > 0) {
            const Four gradient = load_elements(type, tensor.gradient, at, left, aligned);
            Four parameter = load_elements(type, tensor.parameter, at, left, aligned);
            const uint32_t code = load_four_codes(exp_avgs + at, left, aligned);
            const uint32_t square_code = load_four_codes(exp_avg_sqs + at, left, aligned);
            const float absmax = tensor.exp_avg_absmax[at >> block_shift];
            const float square_absmax = tensor.exp_avg_sq_absmax[at >> block_shift];
            for (int j = 0; j < AT_ONCE; ++j) {
                exp_avg[i].x[j] = decode_state(tables.exp_avg_levels, static_cast<uint8_t>(code >> 8 * j), absmax);
                exp_avg_sq[i].x[j] =
                    decode_state(tables.exp_avg_sq_levels, static_cast<uint8_t>(square_code >> 8 * j), square_absmax);
            }
            update_four(step, gradient, parameter, exp_avg[i], exp_avg_sq[i]);
            store_elements(type, tensor.parameter, at, parameter, left, aligned);
        }
        note_largest(tables.exp_avg_most, exp_avg[i], left, in_piece >> block_shift, lanes);
        note_largest(tables.exp_avg_sq_most, exp_avg_sq[i], left, in_piece >> block_shift, lanes);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {
        const int in_piece = (i * static_cast<int>(THREADS) + static_cast<int>(threadIdx.x)) * AT_ONCE;
        const int64_t at = piece * QLK_CUDA_PIECE + in_piece, left = tensor.numel - at;
        if (left <= 0) return;
        const uint32_t most = tables.exp_avg_most[in_piece >> block_shift];
        const uint32_t square_most = tables.exp_avg_sq_most[in_piece >> block_shift];
        if ((in_piece & ((1 << block_shift) - 1)) == 0) {
            tensor.exp_avg_absmax[at >> block_shift] = absmax_of(most);
            tensor.exp_avg_sq_absmax[at >> block_shift] = absmax_of(square_most);
        }
        store_four_codes(exp_avgs + at, encode_four(tables.exp_avg_midpoints, exp_avg[i], most, EXP_AVG_ZERO), left,
                         aligned);
        store_four_codes(exp_avg_sqs + at,
                         encode_four(tables.exp_avg_sq_midpoints, exp_avg_sq[i], square_most, EXP_AVG_SQ_ZERO), left,
                         aligned);
    }
}

__global__ void __launch_bounds__(THREADS) update(const qlk_adamw_tensor *tensors, const int64_t *first_piece,
                                                  int64_t count, AdamwStep step, double learning_rate,
                                                  int block_shift) {
    QLK_SHARED(StateTables, tables);
    const int64_t index = tensor_of(first_piece, count, blockIdx.x);
    const qlk_adamw_tensor tensor = tensors[index];
    const int64_t piece = int64_t{blockIdx.x} - first_piece[index];
    step.decay = adamw_decay(learning_rate, tensor.weight_decay);
    if (tensor.exp_avg_absmax == nullptr) {
        with_elements(tensor, [&](auto type) { update_floats(type, step, tensor, piece); });
        return;
    }
    copy_table(tables.exp_avg_levels, TABLES.dynamic_levels, 256);
    copy_table(tables.exp_avg_midpoints, TABLES.dynamic_midpoints, 256);
    copy_table(tables.exp_avg_sq_levels, TABLES.unsigned_dynamic_levels, 256);
    copy_table(tables.exp_avg_sq_midpoints, TABLES.unsigned_dynamic_midpoints, 256);
    for (unsigned i = threadIdx.x; i < QLK_CUDA_PIECE / SMALLEST_BLOCK; i += THREADS) {
        tables.exp_avg_most[i] = tables.exp_avg_sq_most[i] = 0;
    }
    __syncthreads();
    with_elements(tensor, [&](auto type) { update_codes(type, step, tensor, piece, block_shift, tables); });
}

int check_pieces(const qlk_adamw_tensor *tensors, const int64_t *first_piece, int64_t count, int64_t pieces) {
    if (count < 0 || pieces < 0 || pieces > LARGEST_GRID) return QLK_BAD_SIZE;
    return pieces > 0 && (tensors == nullptr || first_piece == nullptr) ? QLK_NULL_POINTER : QLK_OK;
}

}  // namespace
}  // namespace qlk

using namespace qlk;

extern "C" int qlk_cuda_gradient_norm(const qlk_adamw_tensor *tensors, const int64_t *first_piece, int64_t count,
                                      int64_t pieces, double gradient_scale, double *sums, qlk_cuda_norm *result,
                                      void *stream) {
    if (const int status = check_pieces(tensors, first_piece, count, pieces); status != QLK_OK) return status;
    if (result == nullptr || (pieces > 0 && sums == nullptr)) return QLK_NULL_POINTER;
    if (pieces > 0) {
        const int status = launch(squares, divide_up(pieces, THREADS / SQUARE_LANES), THREADS, stream, tensors,
                                  first_piece, count, pieces, sums);
        if (status != QLK_OK) return status;
    }
    return launch(total, 1, THREADS, stream, first_piece, count, pieces, gradient_scale, sums, result);
}

extern "C" int qlk_cuda_adamw(const qlk_adamw_tensor *tensors, const int64_t *first_piece, int64_t count,
                              int64_t pieces, double learning_rate, double beta1, double beta2, double eps,
                              double gradient_scale, int64_t step, int64_t block_size, void *stream) {
    if (const int status = check_pieces(tensors, first_piece, count, pieces); status != QLK_OK) return status;
    if (step < 1) return QLK_BAD_SIZE;
    if (!is_block_size(block_size)) return QLK_BAD_BLOCK_SIZE;
    if (pieces == 0) return QLK_OK;
    const AdamwStep common = adamw_step(learning_rate, beta1, beta2, eps, gradient_scale, step);
    return launch(update, pieces, THREADS, stream, tensors, first_piece, count, common, learning_rate,
                  log2_of(block_size));
}
