// Reading a quantized weight on the device: codes, absmax, and absmax that is itself quantized, in one pass.
#pragma once

#include "qlk/blockwise.h"
#include "qlk/double_quant.h"
#include "tables.cuh"

namespace qlk {

// A qlk_weight as kernels take it.
struct WeightView {
    const uint8_t *packed;
    const void *absmax;
    const float *nested_absmax, *offset;
    int64_t out_features, in_features;
    int format, block_shift, nested_shift;
};

inline WeightView view_of(const qlk_weight &weight) {
    return {weight.packed,
            weight.absmax,
            weight.nested_absmax,
            weight.offset,
            weight.out_features,
            weight.in_features,
            weight.format,
            log2_of(weight.block_size),
            weight.nested_absmax == nullptr ? 0 : log2_of(weight.nested_block_size)};
}

// The tables that decoding reads, in shared memory. The 16 values of a 4-bit format lie in 16 banks: however the codes
// of a warp fall, no two lanes wait for each other.
struct DecodeTables {
    float value[256];
    float dynamic_levels[256];
};

// By all threads of a block; call __syncthreads before decoding.
template <int BITS>
__device__ __forceinline__ void load_tables(DecodeTables &tables, const WeightView &weight) {
    copy_table(tables.value, TABLES.value[weight.format], 1 << BITS);
    if (weight.nested_absmax != nullptr) copy_table(tables.dynamic_levels, TABLES.dynamic_levels, 256);
}

__device__ __forceinline__ float absmax_at(const WeightView &weight, const DecodeTables &tables, int64_t element) {
    const int64_t block = element >> weight.block_shift;
    if (weight.nested_absmax == nullptr) return static_cast<const float *>(weight.absmax)[block];
    const uint8_t code = static_cast<const uint8_t *>(weight.absmax)[block];
    return decode_absmax(tables.dynamic_levels, code, weight.nested_absmax[block >> weight.nested_shift], *weight.offset);
}

// The code of weight `i` of four or eight that were loaded as one word: the first lies in the lowest byte.
template <int BITS>
QLK_HD uint32_t code_in_word(uint32_t word, int i) {
    return BITS == 4 ? word >> (8 * (i / 2) + (i % 2 == 0 ? 4 : 0)) & 15 : word >> 8 * i & 255;
}

template <int BITS>
__device__ __forceinline__ float weight_at(const WeightView &weight, const DecodeTables &tables, int64_t element) {
    const uint8_t code = BITS == 4 ? nibble_of(weight.packed, element) : weight.packed[element];
    return tables.value[code] * absmax_at(weight, tables, element);
}

}  // namespace qlk
