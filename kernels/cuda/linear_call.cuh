// What the products of few rows share: the adapter as kernels take it, and the checks.
#pragma once

#include "decode.cuh"

namespace qlk {

struct AdapterView {
    const void *lora_B;
    const float *low;
    int64_t rank;  // 0: there is no adapter
    float scaling;
    int dtype;  // of lora_B

    __device__ __forceinline__ float lora_B_at(int64_t i) const {
        return dtype == QLK_BFLOAT16 ? Bfloat16::read(static_cast<const uint16_t *>(lora_B)[i])
                                     : static_cast<const float *>(lora_B)[i];
    }
};

inline bool is_adapter_dtype(int dtype) { return dtype == QLK_FLOAT32 || dtype == QLK_BFLOAT16; }

inline int check_linear(const void *x, int dtype, int64_t rows, int64_t most_rows, const qlk_weight *weight,
                        const qlk_cuda_adapter *adapter, const float *low, const void *out) {
    if (!is_dtype(dtype)) return QLK_BAD_DTYPE;
    int64_t numel = 0;
    if (const int status = check_weight(weight, numel); status != QLK_OK) return status;
    if (rows < 0 || rows > most_rows) return QLK_BAD_SIZE;
    if (rows == 0 || weight->out_features == 0) return QLK_OK;
    if (out == nullptr || (x == nullptr && weight->in_features > 0)) return QLK_NULL_POINTER;
    if (adapter == nullptr) return QLK_OK;
    if (!is_adapter_dtype(adapter->dtype)) return QLK_BAD_DTYPE;
    if (adapter->rank < 0 || adapter->rank > LARGEST_NUMEL / weight->out_features) return QLK_BAD_SIZE;
    return adapter->rank > 0 && (low == nullptr || adapter->lora_B == nullptr) ? QLK_NULL_POINTER : QLK_OK;
}

inline AdapterView adapter_view(const qlk_cuda_adapter *adapter, const float *low) {
    if (adapter == nullptr) return {nullptr, nullptr, 0, 0.0f, QLK_FLOAT32};
    return {adapter->lora_B, low, adapter->rank, adapter->scaling, adapter->dtype};
}

}  // namespace qlk
