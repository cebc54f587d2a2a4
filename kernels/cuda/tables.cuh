// The tables of qlk/tables.h in device memory, and copies of them for the threads of one block.
#pragma once

#include "device.cuh"
#include "qlk/tables.h"

namespace qlk {

struct DeviceTables {
    float midpoints[FORMAT_COUNT][256], value[FORMAT_COUNT][256];
    float dynamic_levels[256], dynamic_midpoints[256];
    float unsigned_dynamic_levels[256], unsigned_dynamic_midpoints[256];
    uint8_t code[FORMAT_COUNT][256];
    int levels[FORMAT_COUNT];
};

constexpr DeviceTables device_tables() {
    DeviceTables tables{};
    for (int i = 0; i < 256; ++i) {
        for (int format = 0; format < FORMAT_COUNT; ++format) {
            tables.midpoints[format][i] = FORMATS[format].midpoints[i];
            tables.value[format][i] = FORMATS[format].value[i];
            tables.code[format][i] = FORMATS[format].code[i];
            tables.levels[format] = FORMATS[format].levels;
        }
        tables.dynamic_levels[i] = DYNAMIC_LEVELS[i];
        tables.dynamic_midpoints[i] = DYNAMIC_MIDPOINTS[i];
        tables.unsigned_dynamic_levels[i] = UNSIGNED_DYNAMIC_LEVELS[i];
        tables.unsigned_dynamic_midpoints[i] = UNSIGNED_DYNAMIC_MIDPOINTS[i];
    }
    return tables;
}

static __device__ const DeviceTables TABLES = device_tables();

// `count` values by all threads of the block; call __syncthreads before reading them.
template <typename T>
__device__ __forceinline__ void copy_table(T *shared, const T *table, int count) {
    for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) shared[i] = table[i];
}

}  // namespace qlk
