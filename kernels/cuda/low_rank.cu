// An adapter's low-rank products with the dropout of x inside them, on tensor cores: no dropped copy of x is written,
// and what the adapter adds to the gradient of x goes into a panel of it that the cache still holds. Which rows,
// columns or ranks share one instruction is free as long as both of its sides agree, so each lane takes values that
// lie together, and nothing is rearranged in shared memory. Sums that blocks share are added in a launch of their own,
// in one order: results are the same in every run.
#include "block_sum.cuh"
#include "dropout.cuh"
#include "tensor_cores.cuh"

namespace qlk {
namespace {

constexpr int WARPS = 8;
constexpr unsigned THREADS = WARPS * WARP;
constexpr int BLOCKS = 2;  // of a multiprocessor at least
// Ranks of one launch at most, where a warp keeps sums of all of them; and without vectors.
constexpr int CHUNK = 64, LONE_CHUNK = 16;
// What an instruction takes: rows of its left side, columns of its right one, and of the dimension they share.
constexpr int TALL = 16, WIDE = 8, DEEP = 16;

// What the products share, as kernels take it.
struct Shape {
    int64_t rows, in_features, rank;  // rank: from one row of grad_low, or of the result, to the next
    Dropout dropout;
};

// How many of a vector's values exist: of `end`, from number `at` on.
__device__ __forceinline__ int rest(int64_t end, int64_t at) { return static_cast<int>(smaller(end - at, 8)); }

// Lane 4 group + member.
struct Lane {
    int group = static_cast<int>(threadIdx.x % WARP / 4), member = static_cast<int>(threadIdx.x % 4);
    int warp = static_cast<int>(threadIdx.x / WARP);
};

// COUNT values from an address on, of which `exist`, and zeros for the others. VECTORS: all exist or none, and the
// address is one that vectors of them need.
template <int COUNT>
__device__ __forceinline__ void load(const uint16_t *from, int exist, bool vectors, uint32_t (&words)[COUNT / 2]) {
    if (!vectors) {
#pragma unroll
        for (int i = 0; i < COUNT / 2; ++i) {
            words[i] = two_halves(2 * i < exist ? from[2 * i] : 0, 2 * i + 1 < exist ? from[2 * i + 1] : 0);
        }
    } else if constexpr (COUNT == 8) {
        const uint4 v = exist > 0 ? load16(from) : uint4{0, 0, 0, 0};
        words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
    } else if constexpr (COUNT == 4) {
        const uint2 v = exist > 0 ? *reinterpret_cast<const uint2 *>(from) : uint2{0, 0};
        words[0] = v.x, words[1] = v.y;
    } else {
        words[0] = exist > 0 ? *reinterpret_cast<const uint32_t *>(from) : 0;
    }
}

// As store16, which nvcc takes apart into four where the words come from several branches.
__device__ __forceinline__ void store_at_once(void *to, uint4 v) {
#ifdef __CUDA_ARCH__
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
                 :
                 : "l"(__cvta_generic_to_global(to)), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
#else
    store16(to, v);
#endif
}

// Values of x as `load` gives them, those that are dropped as zeros; the scale of the others waits for the sums.
template <int COUNT, bool VECTORS>
__device__ __forceinline__ void load_dropped(const uint16_t *x, int64_t element, int exist, DropoutMask &mask,
                                             uint32_t (&words)[COUNT / 2]) {
    load<COUNT>(x + element, exist, VECTORS, words);
    mask.for_dropped<COUNT, VECTORS>(element, [&](int i) { words[i / 2] &= i % 2 == 0 ? 0xFFFF0000u : 0x0000FFFFu; });
}

// The first value of two words, or the second one, of each.
__device__ __forceinline__ uint32_t firsts(uint32_t a, uint32_t b) { return (a & 0xFFFFu) | b << 16; }
__device__ __forceinline__ uint32_t seconds(uint32_t a, uint32_t b) { return a >> 16 | (b & 0xFFFF0000u); }

constexpr int ROW_TILES = QLK_CUDA_LOW_RANK_ROWS / TALL;
constexpr int INNER = 4 * 8;  // of the inner dimension: a lane's vector, and its four's together

// sums (splits, rows, rank) = x lora_A^T, of the columns of this block's split; a lane's four take 32 of a row
// together. The warps share the rows and take turns at the columns.
template <typename Type, int RANKS, bool VECTORS>
__global__ void __launch_bounds__(THREADS, BLOCKS)
    low_rank_down(const uint16_t *x, const uint16_t *lora_A, Shape shape, int64_t ranks, int64_t row_blocks,
                  int64_t span, float *sums) {
    constexpr int RANK_TILES = RANKS / WIDE;
    const Lane lane;
    const int64_t split = blockIdx.x / row_blocks, first_row = blockIdx.x % row_blocks * QLK_CUDA_LOW_RANK_ROWS;
    const int64_t end = smaller((split + 1) * span, shape.in_features);
    DropoutMask mask(shape.dropout);
    float sum[ROW_TILES][RANK_TILES][4] = {};
    for (int64_t step = split * span + lane.warp * INNER; step < end; step += WARPS * INNER) {
        const int64_t k = step + lane.member * 8;
        uint32_t left[ROW_TILES][2][4];
#pragma unroll
        for (int i = 0; i < 2 * ROW_TILES; ++i) {
            const int64_t row = first_row + i * 8 + lane.group;
            load_dropped<8, VECTORS>(x, row * shape.in_features + k, row < shape.rows ? rest(end, k) : 0, mask,
                                     left[i / 2][i % 2]);
        }
#pragma unroll
        for (int tile = 0; tile < RANK_TILES; ++tile) {
            const int64_t r = tile * WIDE + lane.group;
            uint32_t right[4];
            load<8>(lora_A + r * shape.in_features + k, r < ranks ? rest(end, k) : 0, VECTORS, right);
#pragma unroll
            for (int row_tile = 0; row_tile < ROW_TILES; ++row_tile) {
                for (int i = 0; i < 4; i += 2) {
                    const auto &[upper, lower] = left[row_tile];
                    const uint32_t a[4] = {upper[i], lower[i], upper[i + 1], lower[i + 1]};
                    multiply_tiles<Type>(sum[row_tile][tile], a, right[i], right[i + 1]);
                }
            }
        }
    }
    constexpr int VALUES = ROW_TILES * RANK_TILES * 4;
    add_warps<WARPS, VALUES>([&](int i) -> float & { return sum[i / (RANK_TILES * 4)][i / 4 % RANK_TILES][i % 4]; });
    if (lane.warp != 0) return;
#pragma unroll
    for (int i = 0; i < VALUES; ++i) {
        const int64_t row = first_row + i / (RANK_TILES * 4) * TALL + i % 4 / 2 * 8 + lane.group;
        const int64_t r = i / 4 % RANK_TILES * WIDE + lane.member * 2 + i % 2;
        if (row >= shape.rows || r >= ranks) continue;
        sums[(split * shape.rows + row) * shape.rank + r] = sum[i / (RANK_TILES * 4)][i / 4 % RANK_TILES][i % 4];
    }
}

// Columns of grad_A that a block sums up: of 64 ranks half as many, for the same number of sums.
template <int RANKS>
constexpr int COLUMNS_OF = RANKS > 32 ? QLK_CUDA_LOW_RANK_COLUMNS / 2 : QLK_CUDA_LOW_RANK_COLUMNS;
constexpr int STEP_ROWS = WARPS * DEEP;

// sums (splits, rank, in_features) = grad_low^T x, of the rows of this block's split. Of the instructions' tiles the
// n-th has column WIDE_TILES * i + n as number i; the m-th has rank RANKS / 8 * i + 2 m as number i, and the one after
// it as number i + 8: so a lane's values are neighbours. The warps share the columns and take turns at the rows.
template <typename Type, int RANKS, bool VECTORS>
__global__ void __launch_bounds__(THREADS, BLOCKS)
    low_rank_grad_A(const uint16_t *grad_low, const uint16_t *x, Shape shape, int64_t ranks, bool rank_vectors,
                    int64_t column_blocks, int64_t span, float *sums) {
    constexpr int RANK_TILES = RANKS / TALL, WIDE_TILES = COLUMNS_OF<RANKS> / WIDE, EACH = RANKS / 8;
    const Lane lane;
    const int64_t split = blockIdx.x / column_blocks, first_column = blockIdx.x % column_blocks * COLUMNS_OF<RANKS>;
    const int64_t end = smaller((split + 1) * span, shape.rows);
    const int64_t column = first_column + WIDE_TILES * lane.group;
    DropoutMask mask(shape.dropout);
    float sum[RANK_TILES][WIDE_TILES][4] = {};
    for (int64_t step = split * span + lane.warp * DEEP; step < end; step += STEP_ROWS) {
        uint32_t left[4][EACH / 2], right[4][WIDE_TILES / 2];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int64_t row = step + lane.member * 2 + i % 2 + i / 2 * 8;
            const bool exists = row < end;
            load<EACH>(grad_low + row * shape.rank + EACH * lane.group, exists ? rest(ranks, EACH * lane.group) : 0,
                       rank_vectors, left[i]);
            load_dropped<WIDE_TILES, VECTORS>(x, row * shape.in_features + column,
                                              exists ? rest(shape.in_features, column) : 0, mask, right[i]);
        }
#pragma unroll
        for (int m = 0; m < RANK_TILES; ++m) {
            const uint32_t a[4] = {firsts(left[0][m], left[1][m]), seconds(left[0][m], left[1][m]),
                                   firsts(left[2][m], left[3][m]), seconds(left[2][m], left[3][m])};
#pragma unroll
            for (int n = 0; n < WIDE_TILES; ++n) {
                const auto two_rows = [&](int i) {
                    const uint32_t upper = right[i][n / 2], lower = right[i + 1][n / 2];
                    return n % 2 == 0 ? firsts(upper, lower) : seconds(upper, lower);
                };
                multiply_tiles<Type>(sum[m][n], a, two_rows(0), two_rows(2));
            }
        }
    }
    constexpr int VALUES = RANK_TILES * WIDE_TILES * 4;
    add_warps<WARPS, VALUES>([&](int i) -> float & { return sum[i / (WIDE_TILES * 4)][i / 4 % WIDE_TILES][i % 4]; });
    if (lane.warp != 0) return;
#pragma unroll
    for (int i = 0; i < RANK_TILES * 4; ++i) {  // of one rank, what this lane has of neighbouring columns
        const int64_t r = EACH * lane.group + i / 4 * 2 + i % 4 / 2;
        const int64_t from = first_column + WIDE_TILES * (lane.member * 2 + i % 2);
        if (r >= ranks) continue;
        float *out = sums + (split * shape.rank + r) * shape.in_features + from;
#pragma unroll
        for (int n = 0; n < WIDE_TILES; n += 4) {
            float four[4];
            for (int j = 0; j < 4; ++j) four[j] = sum[i / 4][n + j][i % 4];
            if (VECTORS && from < shape.in_features) {
                store_at_once(out + n, {bits_of(four[0]), bits_of(four[1]), bits_of(four[2]), bits_of(four[3])});
            }
            for (int j = 0; j < 4 && !VECTORS; ++j) {
                if (from + n + j < shape.in_features) out[n + j] = four[j];
            }
        }
    }
}

// wide and rounded, of which one may be null, = factor * the sum of `splits` partial results.
template <typename Rounded>
__global__ void __launch_bounds__(THREADS) add_splits(const float *sums, int64_t splits, int64_t count, float factor,
                                                      float *wide, typename Rounded::Bits *rounded) {
    const int64_t i = int64_t{blockIdx.x} * THREADS + threadIdx.x;
    if (i >= count) return;
    float sum = 0.0f;
    for (int64_t split = 0; split < splits; ++split) sum += sums[split * count + i];
    sum *= factor;
    if (wide != nullptr) wide[i] = sum;
    if (rounded != nullptr) rounded[i] = Rounded::write(sum);
}

// What eight values were and what is added to them, of which `exist`, written back.
template <typename Type, bool VECTORS>
__device__ __forceinline__ void store_sums(const uint32_t (&before)[4], float (&added)[8], int exist, uint16_t *to) {
    float values[8];
    Type::unpack({before[0], before[1], before[2], before[3]}, values);
    for (int i = 0; i < 8; ++i) values[i] += added[i];
    if (VECTORS && exist > 0) {
        store_at_once(to, {Type::pair(values[0], values[1]), Type::pair(values[2], values[3]),
                           Type::pair(values[4], values[5]), Type::pair(values[6], values[7])});
    }
    for (int i = 0; i < 8 && !VECTORS; ++i) {
        if (i < exist) to[i] = Type::write(values[i]);
    }
}

constexpr int ADD_COLUMNS = 4 * 8;  // of a warp: a lane's vector, and its four's together
constexpr int ADD_TILES = 4;        // of rows, one after another
constexpr int COLUMN_TILES = ADD_COLUMNS / WIDE;

// A lane's part of some columns of lora_A. Column 8 i + 2 n + j stands in tile n of an instruction as number 2 i + j,
// so that a lane's sums are of neighbours, and a rank where `rank_of` says.
template <int RANKS>
struct Columns {
    uint32_t words[RANKS / DEEP][COLUMN_TILES][2];

    // Of the four values that a lane has of its row of grad_low in one step, the first.
    __device__ __forceinline__ static int rank_of(const Lane &lane, int step) {
        return RANKS / 4 * lane.member + 4 * step;
    }

    template <bool VECTORS>
    __device__ __forceinline__ void load_from(const uint16_t *lora_A, int64_t in_features, int ranks, const Lane &lane,
                                              int exist) {
#pragma unroll
        for (int step = 0; step < RANKS / DEEP; ++step) {
            uint32_t rows[4][4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int r = rank_of(lane, step) + i;
                load<8>(lora_A + r * in_features, r < ranks ? exist : 0, VECTORS, rows[i]);
            }
#pragma unroll
            for (int i = 0; i < COLUMN_TILES * 2; ++i) {
                const uint32_t a = rows[i % 2 * 2][i / 2], b = rows[i % 2 * 2 + 1][i / 2];
                words[step][i / 2][i % 2] = lane.group % 2 == 0 ? firsts(a, b) : seconds(a, b);
            }
        }
    }

    // sum += 16 rows of grad_low from its row `row` on, this lane's and the eighth after it, times these columns.
    template <typename Type>
    __device__ __forceinline__ void multiply_into(float (&sum)[COLUMN_TILES][4], const uint16_t *grad_low,
                                                  const Shape &shape, int64_t row, int64_t first_rank,
                                                  bool rank_vectors, const Lane &lane) const {
#pragma unroll
        for (int step = 0; step < RANKS / DEEP; ++step) {
            uint32_t left[2][2];
            const int64_t r = first_rank + rank_of(lane, step);
            for (int half = 0; half < 2; ++half) {
                const int64_t of_half = row + half * 8;
                load<4>(grad_low + of_half * shape.rank + r, of_half < shape.rows ? rest(shape.rank, r) : 0,
                        rank_vectors, left[half]);
            }
            const uint32_t a[4] = {left[0][0], left[1][0], left[0][1], left[1][1]};
#pragma unroll
            for (int i = 0; i < COLUMN_TILES; ++i) {
                multiply_tiles<Type>(sum[i], a, words[step][i][0], words[step][i][1]);
            }
        }
    }
};

// grad_x += mask * factor * grad_low lora_A, of a rectangle of columns, RANKS at a time. KEPT: those are all, and a
// warp reads its part of lora_A once for all of its rows.
template <typename Type, int RANKS, bool KEPT, bool VECTORS>
__global__ void __launch_bounds__(THREADS, BLOCKS)
    low_rank_add(const uint16_t *grad_low, const uint16_t *lora_A, Shape shape, bool rank_vectors, int64_t first_column,
                 int64_t columns, int64_t column_groups, float factor, uint16_t *grad_x) {
    const Lane lane;
    const int64_t warp = int64_t{blockIdx.x} * WARPS + lane.warp, first_row = warp / column_groups * (ADD_TILES * TALL);
    if (first_row >= shape.rows) return;
    const int64_t group_column = warp % column_groups * ADD_COLUMNS;
    const int64_t right_column = group_column + lane.group / 2 * 8, column = group_column + lane.member * 8;
    Columns<RANKS> right;
    const auto load_right = [&](int64_t first_rank) {
        const uint16_t *from = lora_A + first_rank * shape.in_features + first_column + right_column;
        const int ranks = static_cast<int>(smaller(shape.rank - first_rank, RANKS));
        right.template load_from<VECTORS>(from, shape.in_features, ranks, lane, rest(columns, right_column));
    };
    if (KEPT) load_right(0);
    DropoutMask mask(shape.dropout);
#pragma unroll 1  // else the values of all tiles take registers at once
    for (int tile = 0; tile < ADD_TILES; ++tile) {
        const int64_t row = first_row + tile * TALL + lane.group;
        const auto element = [&](int half) { return (row + half * 8) * shape.in_features + column; };
        const auto exist = [&](int half) { return row + half * 8 < shape.rows ? rest(columns, column) : 0; };
        uint32_t before[2][4];  // on its way during the products
        for (int half = 0; half < 2; ++half) load<8>(grad_x + element(half), exist(half), VECTORS, before[half]);
        float sum[COLUMN_TILES][4] = {};
#pragma unroll 1
        for (int64_t first_rank = 0; first_rank < (KEPT ? 1 : shape.rank); first_rank += RANKS) {
            if (!KEPT) load_right(first_rank);
            right.template multiply_into<Type>(sum, grad_low, shape, row, first_rank, rank_vectors, lane);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float added[8];
            for (int i = 0; i < 8; ++i) added[i] = sum[i / 2][half * 2 + i % 2] * factor;
            mask.for_dropped<8, VECTORS>(first_column + element(half), [&](int i) { added[i] = 0.0f; });
            store_sums<Type, VECTORS>(before[half], added, exist(half), grad_x + element(half));
        }
    }
}

// A split's part of `count` rows or columns: a multiple of what the warps of a block take at once.
int64_t span_of(int64_t count, int64_t splits, int64_t step) {
    return divide_up(divide_up(count, splits), step) * step;
}

Shape shape_of(const qlk_cuda_low_rank &given) {
    return {given.rows, given.in_features, given.rank, {given.seed, given.dropout}};
}

// Whether vectors can be read from and written to rows of `length` values, of which the first begins at `start`.
bool fits_vectors(const void *start, int64_t length) { return length % 8 == 0 && is_aligned(start, 16); }

// Call body(ranks), a constant: the smallest of RANKS... that holds `ranks`.
template <int FIRST, int... OTHERS, typename Body>
int with_ranks(int64_t ranks, const Body &body) {
    if constexpr (sizeof...(OTHERS) > 0) {
        if (ranks > FIRST) return with_ranks<OTHERS...>(ranks, body);
    }
    return body(std::integral_constant<int, FIRST>());
}

template <typename Type>
int down(const qlk_cuda_low_rank &given, const uint16_t *x, const uint16_t *lora_A, int64_t splits, float *sums,
         float *low, uint16_t *rounded, void *stream) {
    const Shape shape = shape_of(given);
    const bool vectors = fits_vectors(x, shape.in_features) && is_aligned(lora_A, 16);
    const int64_t row_blocks = divide_up(shape.rows, QLK_CUDA_LOW_RANK_ROWS);
    const int64_t span = span_of(shape.in_features, splits, WARPS * INNER);
    const int64_t chunk = vectors ? CHUNK : LONE_CHUNK;
    for (int64_t first = 0; first < shape.rank; first += chunk) {
        const int64_t ranks = smaller(shape.rank - first, chunk);
        const int status = with_ranks<16, 32, CHUNK>(vectors ? ranks : LONE_CHUNK, [&](auto most) {
            constexpr int RANKS = decltype(most)::value;
            const auto kernel = vectors ? low_rank_down<Type, RANKS, true> : low_rank_down<Type, LONE_CHUNK, false>;
            return launch(kernel, row_blocks * splits, THREADS, stream, x, lora_A + first * shape.in_features, shape,
                          ranks, row_blocks, span, sums + first);
        });
        if (status != QLK_OK) return status;
    }
    const int64_t count = shape.rows * shape.rank;
    return launch(add_splits<Type>, divide_up(count, THREADS), THREADS, stream, static_cast<const float *>(sums),
                  splits, count, dropout_scale(shape.dropout.share), low, rounded);
}

template <typename Type>
int grad_A(const qlk_cuda_low_rank &given, const uint16_t *grad_low, const uint16_t *x, int64_t splits, float *sums,
           void *out, int dtype, void *stream) {
    const Shape shape = shape_of(given);
    const bool vectors = fits_vectors(x, shape.in_features) && is_aligned(sums, 16);
    const int64_t span = span_of(shape.rows, splits, STEP_ROWS);
    const int64_t chunk = vectors ? CHUNK : LONE_CHUNK;
    for (int64_t first = 0; first < shape.rank; first += chunk) {
        const int64_t ranks = smaller(shape.rank - first, chunk);
        const int status = with_ranks<16, 32, CHUNK>(vectors ? ranks : LONE_CHUNK, [&](auto most) {
            constexpr int RANKS = decltype(most)::value;
            const auto kernel = vectors ? low_rank_grad_A<Type, RANKS, true> : low_rank_grad_A<Type, LONE_CHUNK, false>;
            const bool rank_vectors = shape.rank % (RANKS / 8) == 0 && is_aligned(grad_low, 16);
            const int64_t blocks = divide_up(shape.in_features, vectors ? COLUMNS_OF<RANKS> : COLUMNS_OF<LONE_CHUNK>);
            return launch(kernel, blocks * splits, THREADS, stream, grad_low + first, x, shape, ranks, rank_vectors,
                          blocks, span, sums + first * shape.in_features);
        });
        if (status != QLK_OK) return status;
    }
    const int64_t count = shape.rank * shape.in_features;
    const bool wide = dtype == QLK_FLOAT32;
    return launch(add_splits<Bfloat16>, divide_up(count, THREADS), THREADS, stream, static_cast<const float *>(sums),
                  splits, count, dropout_scale(shape.dropout.share), wide ? static_cast<float *>(out) : nullptr,
                  wide ? nullptr : static_cast<uint16_t *>(out));
}

template <typename Type>
int add(const qlk_cuda_low_rank &given, const uint16_t *grad_low, const uint16_t *lora_A, int64_t first_column,
        int64_t columns, uint16_t *grad_x, void *stream) {
    const Shape shape = shape_of(given);
    const bool fits = fits_vectors(lora_A, first_column) && columns % 8 == 0;
    const bool vectors = fits && fits_vectors(grad_x, shape.in_features);
    const bool rank_vectors = shape.rank % 4 == 0 && is_aligned(grad_low, 8);
    const int64_t groups = divide_up(columns, ADD_COLUMNS);
    const int64_t warps = divide_up(shape.rows, ADD_TILES * TALL) * groups;
    auto kernel = vectors ? low_rank_add<Type, 32, false, true> : low_rank_add<Type, LONE_CHUNK, false, false>;
    if (vectors && shape.rank <= CHUNK) {
        kernel = shape.rank <= 16   ? low_rank_add<Type, 16, true, true>
                 : shape.rank <= 32 ? low_rank_add<Type, 32, true, true>
                                    : low_rank_add<Type, CHUNK, true, true>;
    }
    return launch(kernel, divide_up(warps, WARPS), THREADS, stream, grad_low, lora_A, shape, rank_vectors, first_column,
                  columns, groups, dropout_scale(shape.dropout.share), grad_x);
}

// QLK_OK for what all three take; sizes then fit an int64_t, also with `splits` results side by side.
int check(const qlk_cuda_low_rank *given, int64_t splits) {
    if (given == nullptr) return QLK_NULL_POINTER;
    if (given->dtype != QLK_BFLOAT16 && given->dtype != QLK_FLOAT16) return QLK_BAD_DTYPE;
    const bool is_share = given->dropout >= 0.0f && given->dropout < 1.0f;
    if (!is_share || splits < 1 || given->rows < 0 || given->in_features < 0 || given->rank < 0) return QLK_BAD_SIZE;
    const int64_t longer = given->rows > given->in_features ? given->rows : given->in_features;
    int64_t numel = 0;
    if (__builtin_mul_overflow(given->rows, given->in_features, &numel) || !is_size(numel)) return QLK_BAD_SIZE;
    if (__builtin_mul_overflow(longer, given->rank, &numel) || !is_size(numel)) return QLK_BAD_SIZE;
    return __builtin_mul_overflow(numel, splits, &numel) || !is_size(numel) ? QLK_BAD_SIZE : QLK_OK;
}

}  // namespace
}  // namespace qlk

using namespace qlk;

extern "C" int qlk_cuda_low_rank_down(const qlk_cuda_low_rank *shape, const void *x, const void *lora_A, int64_t splits,
                                      float *sums, float *low, void *rounded, void *stream) {
    if (const int status = check(shape, splits); status != QLK_OK) return status;
    if (shape->rows == 0 || shape->rank == 0) return QLK_OK;
    if (sums == nullptr || low == nullptr) return QLK_NULL_POINTER;
    if (shape->in_features > 0 && (x == nullptr || lora_A == nullptr)) return QLK_NULL_POINTER;
    const auto run = shape->dtype == QLK_BFLOAT16 ? down<Bfloat16> : down<Float16>;
    return run(*shape, static_cast<const uint16_t *>(x), static_cast<const uint16_t *>(lora_A), splits, sums, low,
               static_cast<uint16_t *>(rounded), stream);
}

extern "C" int qlk_cuda_low_rank_grad_A(const qlk_cuda_low_rank *shape, const void *grad_low, const void *x,
                                        int64_t splits, float *sums, void *out, int dtype, void *stream) {
    if (const int status = check(shape, splits); status != QLK_OK) return status;
    if (dtype != QLK_FLOAT32 && dtype != QLK_BFLOAT16) return QLK_BAD_DTYPE;
    if (shape->rank == 0 || shape->in_features == 0) return QLK_OK;
    if (sums == nullptr || out == nullptr) return QLK_NULL_POINTER;
    if (shape->rows > 0 && (grad_low == nullptr || x == nullptr)) return QLK_NULL_POINTER;
    const auto run = shape->dtype == QLK_BFLOAT16 ? grad_A<Bfloat16> : grad_A<Float16>;
    return run(*shape, static_cast<const uint16_t *>(grad_low), static_cast<const uint16_t *>(x), splits, sums, out,
               dtype, stream);
}

extern "C" int qlk_cuda_low_rank_add(const qlk_cuda_low_rank *shape, const void *grad_low, const void *lora_A,
                                     int64_t first_column, int64_t columns, void *grad_x, void *stream) {
    if (const int status = check(shape, 1); status != QLK_OK) return status;
    if (first_column < 0 || columns < 0 || columns > shape->in_features - first_column) return QLK_BAD_SIZE;
    if (shape->rows == 0 || columns == 0 || shape->rank == 0) return QLK_OK;
    if (grad_low == nullptr || lora_A == nullptr || grad_x == nullptr) return QLK_NULL_POINTER;
    const auto run = shape->dtype == QLK_BFLOAT16 ? add<Bfloat16> : add<Float16>;
    return run(*shape, static_cast<const uint16_t *>(grad_low), static_cast<const uint16_t *>(lora_A), first_column,
               columns, static_cast<uint16_t *>(grad_x), stream);
}
