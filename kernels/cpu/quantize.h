// Quantize and dequantize: the kernels that each instruction set compiles. Arguments were checked; ranges are one
// thread's share.
#pragma once

#include <cstdint>

#include "qlk.h"

namespace qlk {

// The codes that encode_absmax (qlk/double_quant.h) gives to each step of its grid.
struct AbsmaxCodes {
    uint8_t of_step[65536];
};
extern const AbsmaxCodes absmax_codes;

struct QuantizeKernels {
    // Blocks [begin, end) of a weight of `numel` elements into their codes and absmax.
    void (*quantize)(const void *weight, int dtype, int64_t numel, int format, int64_t block_size, int64_t begin,
                     int64_t end, uint8_t *packed, float *absmax);
    // Weights [begin, end) into out[begin..end); `begin` is a multiple of 32. With `past_caches` `out` lies on a
    // multiple of 64 bytes.
    void (*dequantize)(const qlk_weight &weight, int dtype, int64_t begin, int64_t end, bool past_caches, void *out);
    // Nested blocks [begin, end) of `blocks` absmax values.
    void (*quantize_absmax)(const float *absmax, int64_t blocks, int64_t nested_block_size, float offset, int64_t begin,
                            int64_t end, uint8_t *codes, float *nested_absmax);
    // Absmax values of the nested blocks [begin, end).
    void (*dequantize_absmax)(const uint8_t *codes, const float *nested_absmax, float offset, int64_t blocks,
                              int64_t nested_block_size, int64_t begin, int64_t end, float *absmax);
};

}  // namespace qlk
