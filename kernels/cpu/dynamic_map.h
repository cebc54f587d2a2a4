// The dynamic maps of the 8-bit states on vectors: codes to levels, and values to codes. Included by each isa_*.cpp
// after its simd_*.h, through adamw_kernels.h.
#pragma once

#include "dynamic_rank.h"
#include "qlk/tables.h"

namespace qlk::QLK_ISA {

// The code of each value in [-1, 1],
inline Ints find_exp_avg(Floats x) {
    using Table = ExpAvgRanks;
    const Ints bits = as_ints(max(abs(x), broadcast(Table::SMALLEST)));
    const Mask negative = greater(broadcast(0.0f), x);
    const Ints side = select(negative, broadcast_int(Table::SIDE - Table::FIRST), broadcast_int(-Table::FIRST));
    const Ints cell = gather(exp_avg_ranks.cells, add(shift_right(bits, Table::SHIFT), side));
    const Ints low = bit_and(bits, broadcast_int(Table::LOW_BITS));
    return shift_right(select(negative, sub(cell, low), add(cell, low)), Table::SHIFT);
}

// and in [0, 1].
inline Ints find_exp_avg_sq(Floats x) {
    using Table = ExpAvgSqRanks;
    const Ints bits = as_ints(max(x, broadcast(Table::SMALLEST)));
    const Ints index = add(shift_right(bits, Table::SHIFT), broadcast_int(-Table::FIRST));
    const Ints low = bit_and(bits, broadcast_int(Table::LOW_BITS));
    return shift_right(add(gather(exp_avg_sq_ranks.cells, index), low), Table::SHIFT);
}

// Values whose codes are found, or read, at once: with byte permutes as many as there are codes in a register.
struct Group {
#if defined(QLK_ISA_VBMI)
    static constexpr int VECTORS = 4;
#else
    static constexpr int VECTORS = 1;
#endif
    static constexpr int COUNT = VECTORS * WIDTH;
    Floats vectors[VECTORS];
};

}  // namespace qlk::QLK_ISA

#if defined(QLK_ISA_VBMI)
#include "dynamic_map_vbmi.h"
#else

#if defined(QLK_ISA_AVX512)
#include "dynamic_map_avx512.h"
#else
namespace qlk::QLK_ISA {

inline Floats exp_avg_levels(Ints codes) { return gather(DYNAMIC_LEVELS, codes); }
inline Floats exp_avg_sq_levels(Ints codes) { return gather(UNSIGNED_DYNAMIC_LEVELS, codes); }
inline Ints encode_exp_avg(Floats x) { return find_exp_avg(x); }
inline Ints encode_exp_avg_sq(Floats x) { return find_exp_avg_sq(x); }

}  // namespace qlk::QLK_ISA
#endif

namespace qlk::QLK_ISA {

inline Group decode_exp_avg(const uint8_t *codes) { return {{exp_avg_levels(load_bytes(codes))}}; }
inline Group decode_exp_avg_sq(const uint8_t *codes) { return {{exp_avg_sq_levels(load_bytes(codes))}}; }
inline void encode_exp_avg(const float *values, Floats factor, uint8_t *codes) {
    store_bytes(codes, encode_exp_avg(mul(load(values), factor)));
}
inline void encode_exp_avg_sq(const float *values, Floats factor, uint8_t *codes) {
    store_bytes(codes, encode_exp_avg_sq(mul(load(values), factor)));
}

}  // namespace qlk::QLK_ISA
#endif
