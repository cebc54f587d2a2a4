// The C entries of AdamW: argument checks, and the split of many tensors over threads.
#include "adamw.h"

#include <cmath>
#include <cstdlib>

#include "checks.h"
#include "dynamic_rank.h"
#include "isa.h"
#include "parallel.h"

namespace qlk {

static_assert(ExpAvgRanks::fits(DYNAMIC_MIDPOINTS), "two midpoints share a cell: more mantissa bits are needed");
static_assert(ExpAvgSqRanks::fits(UNSIGNED_DYNAMIC_MIDPOINTS), "two midpoints share a cell");

constexpr ExpAvgRanks exp_avg_ranks(DYNAMIC_MIDPOINTS);
constexpr ExpAvgSqRanks exp_avg_sq_ranks(UNSIGNED_DYNAMIC_MIDPOINTS);

namespace {

// Tensors are cut into pieces of this many elements, the last piece of each shorter, and threads share the pieces of
// all tensors: small tensors keep every thread busy. The largest block size, so that no block is cut; and sums are
// formed by piece, so that they do not depend on the threads.
constexpr int64_t PIECE = 4096;
constexpr int64_t NORM_GRAIN = 4;  // reading 64 KB is worth a thread

int64_t pieces_of(const qlk_adamw_tensor &tensor) { return (tensor.numel + PIECE - 1) / PIECE; }

// Count the pieces of all tensors, or find a size or a dtype that cannot be.
int count_pieces(const qlk_adamw_tensor *tensors, int64_t count, int64_t *pieces) {
    *pieces = 0;
    if (count < 0) return QLK_BAD_SIZE;
    if (tensors == nullptr && count > 0) return QLK_NULL_POINTER;
    for (int64_t i = 0; i < count; ++i) {
        if (!is_size(tensors[i].numel)) return QLK_BAD_SIZE;
        if (tensors[i].dtype != QLK_FLOAT32 && tensors[i].dtype != QLK_BFLOAT16) return QLK_BAD_DTYPE;
        if (__builtin_add_overflow(*pieces, pieces_of(tensors[i]), pieces)) return QLK_BAD_SIZE;
    }
    return QLK_OK;
}

// Call body(tensor, begin, end, first piece) for what of each tensor lies in the pieces from `first` to `last`.
template <typename Body>
void for_each_range(const qlk_adamw_tensor *tensors, int64_t count, int64_t first, int64_t last, const Body &body) {
    int64_t passed = 0;  // pieces of the tensors before this one
    for (int64_t i = 0; i < count && passed < last; ++i) {
        const int64_t pieces = pieces_of(tensors[i]);
        const int64_t begin = first > passed ? first - passed : 0;
        const int64_t end = last - passed < pieces ? last - passed : pieces;
        const int64_t stop = end == pieces ? tensors[i].numel : end * PIECE;
        if (begin < end) body(tensors[i], begin * PIECE, stop, passed + begin);
        passed += pieces;
    }
}

int check_states(const qlk_adamw_tensor &tensor, int64_t block_size) {
    if (tensor.numel == 0) return QLK_OK;
    if (!tensor.parameter || !tensor.gradient || !tensor.exp_avg || !tensor.exp_avg_sq) return QLK_NULL_POINTER;
    if (!tensor.exp_avg_absmax != !tensor.exp_avg_sq_absmax) return QLK_NULL_POINTER;
    if (!tensor.exp_avg_absmax) return QLK_OK;
    return is_block_size(block_size) ? QLK_OK : QLK_BAD_BLOCK_SIZE;
}

}  // namespace
}  // namespace qlk

using namespace qlk;

extern "C" int qlk_cpu_gradient_norm(const qlk_adamw_tensor *tensors, int64_t count, double gradient_scale,
                                     double *norm, int64_t *first_not_finite, int threads) {
    if (norm == nullptr || first_not_finite == nullptr) return QLK_NULL_POINTER;
    int64_t pieces;
    if (const int status = count_pieces(tensors, count, &pieces); status != QLK_OK) return status;
    for (int64_t i = 0; i < count; ++i) {
        if (tensors[i].numel > 0 && tensors[i].gradient == nullptr) return QLK_NULL_POINTER;
    }
    double *sums = static_cast<double *>(std::malloc(sizeof(double) * static_cast<size_t>(pieces + 1)));
    if (sums == nullptr) return QLK_NO_MEMORY;
    const auto sum_of_squares = isa().adamw.sum_of_squares;
    parallel_for(pieces, NORM_GRAIN, threads, [&](int64_t first, int64_t last) {
        for_each_range(tensors, count, first, last,
                       [&](const qlk_adamw_tensor &tensor, int64_t begin, int64_t end, int64_t piece) {
                           for (; begin < end; begin += PIECE) {
                               const int64_t stop = end - begin < PIECE ? end : begin + PIECE;
                               sums[piece++] = sum_of_squares(tensor, begin, stop);
                           }
                       });
    });
    double total = 0.0;
    *first_not_finite = -1;
    for (int64_t i = 0, piece = 0; i < count; ++i) {
        for (const int64_t end = piece + pieces_of(tensors[i]); piece < end; ++piece) {
            total += sums[piece];
            if (*first_not_finite < 0 && !std::isfinite(sums[piece])) *first_not_finite = i;
        }
    }
    std::free(sums);
    *norm = std::fabs(gradient_scale) * std::sqrt(total);
    return QLK_OK;
}

extern "C" int qlk_cpu_adamw(const qlk_adamw_tensor *tensors, int64_t count, double learning_rate, double beta1,
                             double beta2, double eps, double gradient_scale, int64_t step, int64_t block_size,
                             int threads) {
    int64_t pieces;
    if (const int status = count_pieces(tensors, count, &pieces); status != QLK_OK) return status;
    if (step < 1) return QLK_BAD_SIZE;
    for (int64_t i = 0; i < count; ++i) {
        if (const int status = check_states(tensors[i], block_size); status != QLK_OK) return status;
    }
    const AdamwStep common = adamw_step(learning_rate, beta1, beta2, eps, gradient_scale, step);
    const AdamwKernels &kernels = isa().adamw;
    parallel_for(pieces, 1, threads, [&](int64_t first, int64_t last) {
        for_each_range(tensors, count, first, last,
                       [&](const qlk_adamw_tensor &tensor, int64_t begin, int64_t end, int64_t) {
                           AdamwStep of_tensor = common;
                           of_tensor.decay = adamw_decay(learning_rate, tensor.weight_decay);
                           if (tensor.exp_avg_absmax == nullptr) {
                               kernels.update(of_tensor, tensor, begin, end);
                           } else {
                               kernels.update_blockwise(of_tensor, tensor, begin, end, block_size);
                           }
                       });
    });
    return QLK_OK;
}
