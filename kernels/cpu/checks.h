// Refusals shared by the entries of the C interface: what would read or write outside of the caller's memory.
#pragma once

#include <cstdint>

#include "qlk.h"
#include "qlk/tables.h"

namespace qlk {

// No tensor has more elements; 16 bytes of each still fit an int64_t.
constexpr int64_t LARGEST_NUMEL = INT64_MAX / 16;

inline bool is_block_size(int64_t size) { return size >= 32 && size <= 4096 && (size & (size - 1)) == 0; }

inline bool is_format(int format) { return format >= 0 && format < FORMAT_COUNT; }

inline bool is_size(int64_t size) { return size >= 0 && size <= LARGEST_NUMEL; }

// QLK_OK, and the number of weights in `numel`; pointers of an empty weight may be null.
inline int check_weight(const qlk_weight *weight, int64_t &numel) {
    if (weight == nullptr) return QLK_NULL_POINTER;
    if (!is_format(weight->format)) return QLK_BAD_FORMAT;
    if (!is_block_size(weight->block_size)) return QLK_BAD_BLOCK_SIZE;
    const bool nested = weight->nested_absmax != nullptr;
    if (nested && !is_block_size(weight->nested_block_size)) return QLK_BAD_BLOCK_SIZE;
    if (weight->out_features < 0 || weight->in_features < 0) return QLK_BAD_SIZE;
    if (__builtin_mul_overflow(weight->out_features, weight->in_features, &numel)) return QLK_BAD_SIZE;
    if (!is_size(numel)) return QLK_BAD_SIZE;
    if (numel == 0) return QLK_OK;
    if (weight->packed == nullptr || weight->absmax == nullptr) return QLK_NULL_POINTER;
    return nested && weight->offset == nullptr ? QLK_NULL_POINTER : QLK_OK;
}

}  // namespace qlk
