// A product with up to 64 rows of x on tensor cores, decoded on the way: out^T = weight x^T in tiles of 16 features by
// 8 rows. Which weights of a row share one instruction is free as long as x agrees, so each lane takes 32 weights that
// lie together, 16 bytes, and the x beside them: nothing is rearranged. The warps of a block share its features and
// split the inner dimension.
#include "block_sum.cuh"
#include "linear_call.cuh"
#include "tensor_cores.cuh"

namespace qlk {
namespace {

constexpr int WARPS = 8;
constexpr unsigned THREADS = WARPS * WARP;
constexpr int FEATURE_TILES = 2;
constexpr int BLOCK_FEATURES = FEATURE_TILES * 16;
constexpr int LANE_WEIGHTS = 32, CHUNK = 4 * LANE_WEIGHTS;  // of the inner dimension: a lane's, and its four's together

template <int ROW_TILES>
struct Sums {
    float tile[FEATURE_TILES][ROW_TILES][4];
};

// A lane's weights of one chunk, from k on: of two features in each tile.
struct Codes {
    uint4 codes[FEATURE_TILES][2];
    float absmax[FEATURE_TILES][2];

    __device__ __forceinline__ void load(const WeightView &weight, const DecodeTables &tables, int64_t feature,
                                         int64_t k) {
#pragma unroll
        for (int tile = 0; tile < FEATURE_TILES; ++tile) {
            for (int half = 0; half < 2; ++half) {
                const int64_t row = feature + tile * 16 + half * 8 + threadIdx.x % WARP / 4;
                const bool exists = k < weight.in_features && row < weight.out_features;
                const int64_t element = exists ? row * weight.in_features + k : 0;
                codes[tile][half] = load16(weight.packed + element / 2);
                absmax[tile][half] = exists ? absmax_at(weight, tables, element) : 0.0f;
            }
        }
    }
};

// What a warp adds up from one chunk of the inner dimension.
template <typename Type, int ROW_TILES>
__device__ __forceinline__ void add_chunk(const typename Type::Bits *x, int rows, const WeightView &weight,
                                          const DecodeTables &tables, const Codes &chunk, int64_t k,
                                          Sums<ROW_TILES> &sums) {
    const int group = static_cast<int>(threadIdx.x % WARP / 4);
    const bool inside = k < weight.in_features;
#pragma unroll
    for (int word = 0; word < 4; ++word) {  // eight weights, of two instructions
        uint4 values[ROW_TILES];
#pragma unroll
        for (int tile = 0; tile < ROW_TILES; ++tile) {
            const int row = tile * 8 + group;
            values[tile] = inside && row < rows ? load16(x + row * weight.in_features + k + word * 8) : uint4{0, 0, 0, 0};
        }
#pragma unroll
        for (int tile = 0; tile < FEATURE_TILES; ++tile) {
            uint32_t left[2][4];  // of each instruction
            for (int half = 0; half < 2; ++half) {
                const uint4 &lane_codes = chunk.codes[tile][half];
                const uint32_t words[4] = {lane_codes.x, lane_codes.y, lane_codes.z, lane_codes.w};
                float w[8];
                for (int i = 0; i < 8; ++i) w[i] = tables.value[code_in_word<4>(words[word], i)] * chunk.absmax[tile][half];
                for (int pair = 0; pair < 4; ++pair) {
                    left[pair / 2][half + pair % 2 * 2] = Type::pair(w[2 * pair], w[2 * pair + 1]);
                }
            }
#pragma unroll
            for (int rows_tile = 0; rows_tile < ROW_TILES; ++rows_tile) {
                const uint4 &right = values[rows_tile];
                multiply_tiles<Type>(sums.tile[tile][rows_tile], left[0], right.x, right.y);
                multiply_tiles<Type>(sums.tile[tile][rows_tile], left[1], right.z, right.w);
            }
        }
    }
}

// The adapter is 16 more columns at a time: scaling * lora_B beside low, both rounded to Type.
template <typename Type, int ROW_TILES>
__device__ __forceinline__ void add_adapter(const AdapterView &adapter, int rows, int64_t out_features, int64_t feature,
                                            int64_t first, Sums<ROW_TILES> &sums) {
    const int group = static_cast<int>(threadIdx.x % WARP / 4), pair = static_cast<int>(threadIdx.x % 4);
    const auto two_of = [&](const auto &value_at, int64_t row, int64_t rows_of_it, int eight) {
        float two[2];
        for (int i = 0; i < 2; ++i) {
            const int64_t k = first + eight * 8 + pair * 2 + i;
            two[i] = row < rows_of_it && k < adapter.rank ? value_at(row * adapter.rank + k) : 0.0f;
        }
        return Type::pair(two[0], two[1]);
    };
    const auto lora_B = [&](int64_t i) { return adapter.lora_B_at(i) * adapter.scaling; };
    const auto low = [&](int64_t i) { return adapter.low[i]; };
#pragma unroll
    for (int tile = 0; tile < FEATURE_TILES; ++tile) {
        const int64_t row = feature + tile * 16 + group;
        uint32_t left[4];
        for (int i = 0; i < 4; ++i) {
            left[i] = two_of(lora_B, row + i % 2 * 8, out_features, i / 2);
        }
#pragma unroll
        for (int rows_tile = 0; rows_tile < ROW_TILES; ++rows_tile) {
            const int x_row = rows_tile * 8 + group;
            multiply_tiles<Type>(sums.tile[tile][rows_tile], left, two_of(low, x_row, rows, 0),
                                 two_of(low, x_row, rows, 1));
        }
    }
}

// Of a multiprocessor at least; unsaid, nvcc takes three of the smallest for sm_80, and spills.
constexpr int blocks_of(int row_tiles) { return row_tiles <= 4 ? 2 : 1; }

template <typename Type, int ROW_TILES>
__global__ void __launch_bounds__(THREADS, blocks_of(ROW_TILES))
    tiles(const typename Type::Bits *x, int rows, WeightView weight, AdapterView adapter,
          const typename Type::Bits *bias, typename Type::Bits *out) {
    QLK_SHARED(DecodeTables, tables);
    load_tables<4>(tables, weight);
    __syncthreads();
    const int warp = static_cast<int>(threadIdx.x / WARP), lane = static_cast<int>(threadIdx.x % WARP);
    const int64_t feature = int64_t{blockIdx.x} * BLOCK_FEATURES;
    Sums<ROW_TILES> sums = {};
    constexpr bool AHEAD = ROW_TILES <= 2;  // with more rows the sums need the registers
    Codes next;
    if (AHEAD) next.load(weight, tables, feature, warp * CHUNK + lane % 4 * LANE_WEIGHTS);
    for (int64_t chunk = warp * CHUNK; chunk < weight.in_features; chunk += WARPS * CHUNK) {
        const int64_t k = chunk + lane % 4 * LANE_WEIGHTS;
        if (!AHEAD) next.load(weight, tables, feature, k);
        const Codes now = next;
        if (AHEAD) next.load(weight, tables, feature, k + WARPS * CHUNK);  // on its way during the products
        add_chunk<Type>(x, rows, weight, tables, now, k, sums);
    }
    for (int64_t first = warp * 16; first < adapter.rank; first += WARPS * 16) {
        add_adapter<Type>(adapter, rows, weight.out_features, feature, first, sums);
    }
    add_warps<WARPS, FEATURE_TILES * ROW_TILES * 4>([&](int i) -> float & {
        return sums.tile[i / (ROW_TILES * 4)][i / 4 % ROW_TILES][i % 4];
    });
    if (warp != 0) return;
#pragma unroll
    for (int i = 0; i < FEATURE_TILES * ROW_TILES * 4; ++i) {
        const int tile = i / (ROW_TILES * 4), rows_tile = i / 4 % ROW_TILES;
        const int64_t column = feature + tile * 16 + lane / 4 + i % 4 / 2 * 8;
        const int row = rows_tile * 8 + lane % 4 * 2 + i % 2;
        if (row >= rows || column >= weight.out_features) continue;
        float sum = sums.tile[tile][rows_tile][i % 4];
        if (bias != nullptr) sum += Type::read(bias[column]);
        out[row * weight.out_features + column] = Type::write(sum);
    }
}

template <typename Type>
int run(const void *x, int rows, const WeightView &weight, const AdapterView &adapter, const void *bias, void *out,
        void *stream) {
    using Bits = typename Type::Bits;
    const auto kernel = rows <= 8 ? tiles<Type, 1> : rows <= 16 ? tiles<Type, 2> : rows <= 32 ? tiles<Type, 4> : tiles<Type, 8>;
    return launch(kernel, divide_up(weight.out_features, BLOCK_FEATURES), THREADS, stream, static_cast<const Bits *>(x),
                  rows, weight, adapter, static_cast<const Bits *>(bias), static_cast<Bits *>(out));
}

}  // namespace
}  // namespace qlk

using namespace qlk;

extern "C" int qlk_cuda_linear_tiles(const void *x, int dtype, int64_t rows, const qlk_weight *weight, const void *bias,
                                     const qlk_cuda_adapter *adapter, const float *low, void *out, void *stream) {
    const int status = check_linear(x, dtype, rows, QLK_CUDA_TILE_ROWS, weight, adapter, low, out);
    if (status != QLK_OK) return status;
    if (dtype == QLK_FLOAT32) return QLK_BAD_DTYPE;
    if (FORMATS[weight->format].bits != 4) return QLK_BAD_FORMAT;
    if (weight->in_features == 0 || weight->in_features % LANE_WEIGHTS != 0) return QLK_BAD_SIZE;
    if (rows == 0 || weight->out_features == 0) return QLK_OK;
    if (!is_aligned(x, 16) || !is_aligned(weight->packed, 16)) return QLK_NULL_POINTER;
    const auto run_type = dtype == QLK_BFLOAT16 ? run<Bfloat16> : run<Float16>;
    return run_type(x, static_cast<int>(rows), view_of(*weight), adapter_view(adapter, low), bias, out, stream);
}
