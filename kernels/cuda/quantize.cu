// Quantize: blocks of weights, and their absmax again (double quantization). A group of lanes of one warp reads a block
// 16 bytes each, finds its largest magnitude by exchanging, and writes its codes.
#include "qlk/blockwise.h"
#include "qlk/double_quant.h"
#include "tables.cuh"

namespace qlk {
namespace {

constexpr unsigned THREADS = 256;

struct QuantizeCall {
    int64_t numel, blocks;
    int format;
    int lane_shift;  // lanes of a group, at most a warp: 2^lane_shift
    int vectors;     // that each lane reads of a block
    bool aligned;    // weights to 16 bytes, codes to 8
};

template <typename Type>
__device__ __forceinline__ void read_vector(const typename Type::Bits *weight, int64_t begin, const QuantizeCall &call,
                                            float (&x)[Type::COUNT]) {
    if (call.aligned && begin + Type::COUNT <= call.numel) return Type::unpack(load16(weight + begin), x);
    for (int i = 0; i < Type::COUNT; ++i) x[i] = begin + i < call.numel ? Type::read(weight[begin + i]) : 0.0f;
}

// The largest of `bits` in each group of `lanes` lanes.
__device__ __forceinline__ uint32_t largest_of_group(uint32_t bits, int lanes) {
    for (int apart = 1; apart < static_cast<int>(WARP); apart *= 2) {
        const uint32_t other = __shfl_xor_sync(ALL_LANES, bits, apart);
        if (apart < lanes && other > bits) bits = other;
    }
    return bits;
}

template <int COUNT>
__device__ __forceinline__ uint32_t largest_magnitude(const float (&x)[COUNT]) {
    uint32_t most = 0;
    for (int i = 0; i < COUNT; ++i) most = magnitude_bits(x[i]) > most ? magnitude_bits(x[i]) : most;
    return most;
}

// The codes of COUNT weights from `begin` on, which is a multiple of COUNT; those past the end are zeros.
template <int BITS, int COUNT>
__device__ __forceinline__ void write_codes(const float (&x)[COUNT], float reciprocal, const Format &format,
                                            int64_t begin, const QuantizeCall &call, uint8_t *packed) {
    constexpr int BYTES = COUNT * BITS / 8;
    uint8_t bytes[BYTES];
    for (int i = 0; i < BYTES; ++i) {
        if constexpr (BITS == 4) {
            const int first = rank_of<4>(format.midpoints, x[2 * i] * reciprocal);
            const int second = rank_of<4>(format.midpoints, x[2 * i + 1] * reciprocal);
            bytes[i] = pack_nibbles(format.code[first], format.code[second]);
        } else {
            bytes[i] = format.code[rank_of_integer(format, x[i] * reciprocal)];
        }
    }
    uint8_t *out = packed + begin * BITS / 8;
    if (call.aligned && begin + COUNT <= call.numel) {
        uint32_t words[(BYTES + 3) / 4] = {};
        for (int i = 0; i < BYTES; ++i) words[i / 4] |= static_cast<uint32_t>(bytes[i]) << 8 * (i % 4);
        if constexpr (BYTES == 2) *reinterpret_cast<uint16_t *>(out) = static_cast<uint16_t>(words[0]);
        if constexpr (BYTES == 4) *reinterpret_cast<uint32_t *>(out) = words[0];
        if constexpr (BYTES == 8) *reinterpret_cast<uint2 *>(out) = {words[0], words[1]};
        return;
    }
    const int64_t left = call.numel - begin;
    for (int i = 0; i < BYTES; ++i) {
        if (i * 8 < left * BITS) out[i] = bytes[i];
    }
}

template <typename Type, int BITS>
__global__ void __launch_bounds__(THREADS) quantize(const typename Type::Bits *weight, QuantizeCall call,
                                                    uint8_t *packed, float *absmax) {
    constexpr int COUNT = Type::COUNT;
    QLK_SHARED(Format, format);
    copy_table(format.midpoints, TABLES.midpoints[call.format], 1 << BITS);
    copy_table(format.code, TABLES.code[call.format], 1 << BITS);
    if (threadIdx.x == 0) format.levels = TABLES.levels[call.format];
    __syncthreads();

    // Groups past the last block go along without reading or writing: a warp exchanges as a whole.
    const int64_t thread = int64_t{blockIdx.x} * THREADS + threadIdx.x;
    const int64_t block = thread >> call.lane_shift;
    const int lanes = 1 << call.lane_shift, lane = static_cast<int>(threadIdx.x) & (lanes - 1);
    const bool exists = block < call.blocks;
    const int64_t stride = int64_t{lanes} * COUNT;
    int64_t begin = block * call.vectors * stride + lane * COUNT;

    float first[COUNT] = {};  // most block sizes need no more, so they read memory once
    if (exists) read_vector<Type>(weight, begin, call, first);
    uint32_t most = largest_magnitude(first);
    for (int i = 1; exists && i < call.vectors; ++i) {
        float x[COUNT];
        read_vector<Type>(weight, begin + i * stride, call, x);
        const uint32_t largest = largest_magnitude(x);
        most = largest > most ? largest : most;
    }
    most = largest_of_group(most, lanes);
    if (!exists) return;
    if (lane == 0) absmax[block] = absmax_of(most);

    const bool finite = !not_finite(most);
    const float reciprocal = reciprocal_of(absmax_of(most));
    for (int i = 0; i < call.vectors; ++i, begin += stride) {
        if (begin >= call.numel) return;
        if (i > 0) read_vector<Type>(weight, begin, call, first);
        for (int j = 0; j < COUNT; ++j) first[j] = finite ? first[j] : 0.0f;
        write_codes<BITS>(first, finite ? reciprocal : 0.0f, format, begin, call, packed);
    }
}

// One warp for each nested block: absmax less the offset.
__global__ void __launch_bounds__(THREADS) quantize_absmax(const float *absmax, int64_t blocks,
                                                           int64_t nested_block_size, const float *offset,
                                                           uint8_t *codes, float *nested_absmax) {
    QLK_SHARED(Shared<float[256]>, midpoints);
    copy_table(midpoints, TABLES.dynamic_midpoints, 256);
    __syncthreads();
    const int64_t thread = int64_t{blockIdx.x} * THREADS + threadIdx.x;
    const int64_t nested = thread / WARP, begin = nested * nested_block_size;
    const int64_t end = smaller(begin + nested_block_size, blocks);
    const float mean = *offset;
    uint32_t most = 0;
    for (int64_t i = begin + thread % WARP; i < end; i += WARP) {
        const uint32_t bits = magnitude_bits(absmax[i] - mean);
        most = bits > most ? bits : most;
    }
    most = largest_of_group(most, WARP);
    if (begin >= blocks) return;
    if (thread % WARP == 0) nested_absmax[nested] = absmax_of(most);
    const bool finite = !not_finite(most);
    const float reciprocal = reciprocal_of(absmax_of(most));
    for (int64_t i = begin + thread % WARP; i < end; i += WARP) {
        const float scaled = finite ? (absmax[i] - mean) * reciprocal : 0.0f;
        codes[i] = most == 0 ? 0 : encode_absmax(midpoints, scaled);  // 0: as bitsandbytes where all are equal
    }
}

__global__ void __launch_bounds__(THREADS) dequantize_absmax(const uint8_t *codes, const float *nested_absmax,
                                                             const float *offset, int64_t blocks, int nested_shift,
                                                             float *absmax) {
    QLK_SHARED(Shared<float[256]>, levels);
    copy_table(levels, TABLES.dynamic_levels, 256);
    __syncthreads();
    const int64_t i = int64_t{blockIdx.x} * THREADS + threadIdx.x;
    if (i < blocks) absmax[i] = decode_absmax(levels, codes[i], nested_absmax[i >> nested_shift], *offset);
}

}  // namespace
}  // namespace qlk

using namespace qlk;

extern "C" int qlk_cuda_quantize(const void *weight, int dtype, int64_t numel, int format, int64_t block_size,
                                 uint8_t *packed, float *absmax, void *stream) {
    if (!is_dtype(dtype)) return QLK_BAD_DTYPE;
    if (!is_format(format)) return QLK_BAD_FORMAT;
    if (!is_block_size(block_size)) return QLK_BAD_BLOCK_SIZE;
    if (!is_size(numel)) return QLK_BAD_SIZE;
    if (numel == 0) return QLK_OK;
    if (weight == nullptr || packed == nullptr || absmax == nullptr) return QLK_NULL_POINTER;
    return with_dtype(dtype, [&](auto type) {
        using Type = decltype(type);
        QuantizeCall call;
        call.numel = numel;
        call.blocks = divide_up(numel, block_size);
        call.format = format;
        const int64_t lanes = smaller(WARP, block_size / Type::COUNT);
        call.lane_shift = log2_of(lanes);
        call.vectors = static_cast<int>(block_size / (lanes * Type::COUNT));
        call.aligned = is_aligned(weight, 16) && is_aligned(packed, 8);
        const auto kernel = FORMATS[format].bits == 4 ? quantize<Type, 4> : quantize<Type, 8>;
        return launch(kernel, divide_up(call.blocks, THREADS / lanes), THREADS, stream,
                      static_cast<const typename Type::Bits *>(weight), call, packed, absmax);
    });
}

extern "C" int qlk_cuda_quantize_absmax(const float *absmax, int64_t blocks, int64_t nested_block_size,
                                        const float *offset, uint8_t *codes, float *nested_absmax, void *stream) {
    if (!is_block_size(nested_block_size)) return QLK_BAD_BLOCK_SIZE;
    if (!is_size(blocks)) return QLK_BAD_SIZE;
    if (blocks == 0) return QLK_OK;
    if (!absmax || !offset || !codes || !nested_absmax) return QLK_NULL_POINTER;
    const int64_t nested_blocks = divide_up(blocks, nested_block_size);
    return launch(quantize_absmax, divide_up(nested_blocks, THREADS / WARP), THREADS, stream, absmax, blocks,
                  nested_block_size, offset, codes, nested_absmax);
}

extern "C" int qlk_cuda_dequantize_absmax(const uint8_t *codes, const float *nested_absmax, const float *offset,
                                          int64_t blocks, int64_t nested_block_size, float *absmax, void *stream) {
    if (!is_block_size(nested_block_size)) return QLK_BAD_BLOCK_SIZE;
    if (!is_size(blocks)) return QLK_BAD_SIZE;
    if (blocks == 0) return QLK_OK;
    if (!codes || !nested_absmax || !offset || !absmax) return QLK_NULL_POINTER;
    return launch(dequantize_absmax, divide_up(blocks, THREADS), THREADS, stream, codes, nested_absmax, offset, blocks,
                  log2_of(nested_block_size), absmax);
}
