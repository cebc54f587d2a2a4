// The C interface of quantize and dequantize: checks, and a share of the blocks for each thread.
#include "quantize.h"

#include <cstdint>

#include "checks.h"
#include "isa.h"
#include "memory.h"
#include "parallel.h"
#include "qlk.h"
#include "qlk/double_quant.h"

namespace qlk {
namespace {

constexpr AbsmaxCodes every_step() {
    AbsmaxCodes codes{};
    for (int step = 0; step < 65536; ++step) codes.of_step[step] = code_of_step(step);
    return codes;
}

}  // namespace

const AbsmaxCodes absmax_codes = every_step();

}  // namespace qlk

namespace {

// Elements below which another thread costs more than it saves; a multiple of every block size.
constexpr int64_t GRAIN = 16384;

// Results from this size on go past the caches: about a second-level cache on Intel's CPUs, 1.6 times as fast there, and
// twice for large layers (2 cores of Ice Lake); half of the 32 MiB that cores of AMD's Zen 3 and newer share, which take
// smaller ones three times as fast as memory does.
int64_t streamed_bytes() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_is("amd")) return int64_t{16} << 20;
#endif
    return int64_t{1} << 20;
}

// Of new memory, so much is written at once: its pages are found, and while they are in a cache, written.
constexpr int64_t PIECE = 262144;  // elements

int64_t divide_up(int64_t count, int64_t size) { return count / size + (count % size != 0); }

}  // namespace

extern "C" {

int qlk_cpu_quantize(const void *weight, int dtype, int64_t numel, int format, int64_t block_size, uint8_t *packed,
                     float *absmax, int threads) {
    if (dtype < QLK_FLOAT32 || dtype > QLK_FLOAT16) return QLK_BAD_DTYPE;
    if (!qlk::is_format(format)) return QLK_BAD_FORMAT;
    if (!qlk::is_block_size(block_size)) return QLK_BAD_BLOCK_SIZE;
    if (!qlk::is_size(numel)) return QLK_BAD_SIZE;
    if (numel == 0) return QLK_OK;
    if (weight == nullptr || packed == nullptr || absmax == nullptr) return QLK_NULL_POINTER;
    const auto run = qlk::isa().quantize.quantize;
    qlk::parallel_for(divide_up(numel, block_size), GRAIN / block_size, threads, [&](int64_t begin, int64_t end) {
        run(weight, dtype, numel, format, block_size, begin, end, packed, absmax);
    });
    return QLK_OK;
}

int qlk_cpu_dequantize(const qlk_weight *weight, int dtype, void *out, int threads) {
    if (dtype != QLK_FLOAT32 && dtype != QLK_BFLOAT16) return QLK_BAD_DTYPE;
    int64_t numel = 0;
    const int status = qlk::check_weight(weight, numel);
    if (status != QLK_OK || numel == 0) return status;
    if (out == nullptr) return QLK_NULL_POINTER;
    const int64_t width = dtype == QLK_FLOAT32 ? 4 : 2;
    const auto run = qlk::isa().quantize.dequantize;
    if (qlk::is_new_memory(out, numel * width)) {
        // The system clears pages into the caches, and stores past those would wait for what was cleared to leave.
        qlk::parallel_for(numel, GRAIN, threads, [&](int64_t begin, int64_t end) {
            for (int64_t next; begin < end; begin = next) {
                next = end - begin < PIECE ? end : begin + PIECE;
                qlk::find_pages(static_cast<uint8_t *>(out) + begin * width, (next - begin) * width);
                run(*weight, dtype, begin, next, false, out);
            }
        });
        return QLK_OK;
    }
    const bool past_caches = numel * width >= streamed_bytes() && reinterpret_cast<uintptr_t>(out) % 64 == 0;
    qlk::parallel_for(numel, GRAIN, threads, [&](int64_t begin, int64_t end) {
        run(*weight, dtype, begin, end, past_caches, out);
    });
    return QLK_OK;
}

int qlk_cpu_expect_writes(void *memory, int64_t bytes) {
    qlk::want_large_pages(memory, bytes);
    return QLK_OK;
}

int qlk_cpu_quantize_absmax(const float *absmax, int64_t blocks, int64_t nested_block_size, float offset,
                            uint8_t *codes, float *nested_absmax, int threads) {
    if (!qlk::is_block_size(nested_block_size)) return QLK_BAD_BLOCK_SIZE;
    if (!qlk::is_size(blocks)) return QLK_BAD_SIZE;
    if (blocks == 0) return QLK_OK;
    if (absmax == nullptr || codes == nullptr || nested_absmax == nullptr) return QLK_NULL_POINTER;
    const auto run = qlk::isa().quantize.quantize_absmax;
    const int64_t nested_blocks = divide_up(blocks, nested_block_size);
    qlk::parallel_for(nested_blocks, GRAIN / nested_block_size, threads, [&](int64_t begin, int64_t end) {
        run(absmax, blocks, nested_block_size, offset, begin, end, codes, nested_absmax);
    });
    return QLK_OK;
}

int qlk_cpu_dequantize_absmax(const uint8_t *codes, const float *nested_absmax, const float *offset, int64_t blocks,
                              int64_t nested_block_size, float *absmax, int threads) {
    if (!qlk::is_block_size(nested_block_size)) return QLK_BAD_BLOCK_SIZE;
    if (!qlk::is_size(blocks)) return QLK_BAD_SIZE;
    if (blocks == 0) return QLK_OK;
    if (codes == nullptr || nested_absmax == nullptr || offset == nullptr || absmax == nullptr) return QLK_NULL_POINTER;
    const auto run = qlk::isa().quantize.dequantize_absmax;
    const int64_t nested_blocks = divide_up(blocks, nested_block_size);
    qlk::parallel_for(nested_blocks, GRAIN / nested_block_size, threads, [&](int64_t begin, int64_t end) {
        run(codes, nested_absmax, *offset, blocks, nested_block_size, begin, end, absmax);
    });
    return QLK_OK;
}
}
