// The tensor-core instruction that kernels use, and what it does in words that a CPU understands.
#pragma once

#include <type_traits>

#include "device.cuh"

namespace qlk {

// c (16 x 8) += a (16 x 16) b (16 x 8) by a warp; two 16-bit values of Type in a word of a and b, float sums.
// Lane 4 g + t holds, with k = 2 t and k = 2 t + 8:
//   a: rows g, g + 8 at k, k + 1 (words 0, 1) and at k + 8, k + 9 (words 2, 3);
//   b: column g at k, k + 1 (word 0) and k + 8, k + 9 (word 1);
//   c: row g (values 0, 1) and row g + 8 (2, 3) at columns 2 t, 2 t + 1.
// Source: NVIDIA, "Parallel Thread Execution ISA", fragments of mma.m16n8k16.
template <typename Type>
__device__ __forceinline__ void multiply_tiles(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef QLK_EMULATED
    struct Words {
        uint32_t a[4], b[2];
    };
    const auto lanes = emu::exchange(Words{{a[0], a[1], a[2], a[3]}, {b0, b1}}, ALL_LANES, EMU_SITE);
    const auto half = [](uint32_t word, int k) { return Type::read(static_cast<uint16_t>(word >> 16 * (k % 2))); };
    const int g = emu::lane() / 4, t = emu::lane() % 4;
    for (int i = 0; i < 4; ++i) {
        const int row = g + i / 2 * 8, column = 2 * t + i % 2;
        for (int k = 0; k < 16; ++k) {
            const float left = half(lanes[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2], k);
            const float right = half(lanes[column * 4 + k % 8 / 2].b[k / 8], k);
            c[i] += left * right;
        }
    }
#else
    // volatile: all lanes take part, so it must stay where no lane has gone elsewhere
    if constexpr (std::is_same_v<Type, Bfloat16>) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
#endif
}

}  // namespace qlk
