// What each instruction set provides for AdamW (adamw_kernels.h).
#pragma once

#include <cstdint>

#include "qlk.h"
#include "qlk/adamw.h"

namespace qlk {

struct AdamwKernels {
    // Of the gradient's elements from `begin` to `end`, added up in an order that is the same everywhere. Not finite
    // exactly if a value is not.
    double (*sum_of_squares)(const qlk_adamw_tensor &tensor, int64_t begin, int64_t end);
    // The update of the elements from `begin` to `end` of a tensor with float states,
    void (*update)(const AdamwStep &step, const qlk_adamw_tensor &tensor, int64_t begin, int64_t end);
    // and with 8-bit states, where `begin` starts a block.
    void (*update_blockwise)(const AdamwStep &step, const qlk_adamw_tensor &tensor, int64_t begin, int64_t end,
                             int64_t block_size);
};

}  // namespace qlk
