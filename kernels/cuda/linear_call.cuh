// What the products of few rows share: the adapter as kernels take it, and the checks.
#pragma once

#include "decode.cuh"

namespace qlk {

struct AdapterView {
    const float *lora_B, *low;
    int64_t rank;  // 0: there is no adapter
    float scaling;
};

inline int check_linear(const void *x, int dtype, int64_t rows, int64_t most_rows, const qlk_weight *weight,
                        const qlk_adapter *adapter, const float *low, const void *out) {
    if (!is_dtype(dtype)) return QLK_BAD_DTYPE;
    int64_t numel = 0;
    if (const int status = check_weight(weight, numel); status != QLK_OK) return status;
    if (rows < 0 || rows > most_rows) return QLK_BAD_SIZE;
    if (rows == 0 || weight->out_features == 0) return QLK_OK;
    if (out == nullptr || (x == nullptr && weight->in_features > 0)) return QLK_NULL_POINTER;
    if (adapter == nullptr) return QLK_OK;
    if (adapter->rank < 0 || adapter->rank > LARGEST_NUMEL / weight->out_features) return QLK_BAD_SIZE;
    return adapter->rank > 0 && (low == nullptr || adapter->lora_B == nullptr) ? QLK_NULL_POINTER : QLK_OK;
}

inline AdapterView adapter_view(const qlk_adapter *adapter, const float *low) {
    if (adapter == nullptr) return {nullptr, nullptr, 0, 0.0f};
    return {adapter->lora_B, low, adapter->rank, adapter->scaling};
}

}  // namespace qlk
