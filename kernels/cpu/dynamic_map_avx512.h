// The dynamic maps with AVX-512: levels and ranks by permutes of registers. Gathers would do (dynamic_map.h), but take
// 30 cycles each on the many CPUs whose microcode closes the "Downfall" leak, and an update needs four of them.
#pragma once

#include "qlk/tables.h"
#include "quick_rank_avx512.h"

namespace qlk::QLK_ISA {

// Of 64 floats the one at the low six bits of each index; `odd_half` is bit 5.
inline Floats lookup_64(const float *table, Ints index, Mask odd_half) {
    const Floats low = _mm512_permutex2var_ps(load(table), index, load(table + 16));
    const Floats high = _mm512_permutex2var_ps(load(table + 32), index, load(table + 48));
    return select(odd_half, high, low);
}

inline Mask has_bits(Ints x, int32_t bits) { return _mm512_test_epi32_mask(x, broadcast_int(bits)); }

// Levels of either sign mirror each other around code 127, but for the level 1, which has no negative.
inline Floats exp_avg_levels(Ints codes) {
    const float *magnitudes = DYNAMIC_LEVELS + EXP_AVG_ZERO;
    const Ints signed_rank = sub(codes, broadcast_int(EXP_AVG_ZERO));
    const Ints rank = _mm512_abs_epi32(signed_rank);
    const Mask odd_half = has_bits(rank, 32);
    Floats level = lookup_64(magnitudes, rank, odd_half);
    level = select(has_bits(rank, 64), lookup_64(magnitudes + 64, rank, odd_half), level);
    level = select(has_bits(rank, 128), broadcast(1.0f), level);
    constexpr int BLEND = 0xD8;  // where the third operand has a bit, that of the second, else that of the first
    return as_floats(_mm512_ternarylogic_epi32(as_ints(level), signed_rank, broadcast_int(INT32_MIN), BLEND));
}

inline Floats exp_avg_sq_levels(Ints codes) {
    const float *levels = UNSIGNED_DYNAMIC_LEVELS;
    const Mask bit_5 = has_bits(codes, 32), bit_6 = has_bits(codes, 64), bit_7 = has_bits(codes, 128);
    const Floats low = select(bit_6, lookup_64(levels + 64, codes, bit_5), lookup_64(levels, codes, bit_5));
    const Floats high = select(bit_6, lookup_64(levels + 192, codes, bit_5), lookup_64(levels + 128, codes, bit_5));
    return select(bit_7, high, low);
}

inline Ints rank_of(Ints units) { return bit_and(shift_right<QuickRank::SHIFT>(units), broadcast_int(0xFF)); }

inline Ints encode_exp_avg(Floats x) {
    Mask negative, certain = first(WIDTH);
    const Ints rank = rank_of(quick_exp_avg_units(x, negative, certain));
    if (!all(certain)) return find_exp_avg(x);
    const Ints zero = broadcast_int(EXP_AVG_ZERO);
    const Ints code = _mm512_mask_sub_epi32(add(zero, rank), negative, zero, rank);
    return max(code, broadcast_int(0));  // -1 has no level
}

inline Ints encode_exp_avg_sq(Floats x) {
    Mask certain = first(WIDTH);
    const Ints units = quick_exp_avg_sq_units(x, certain);
    return all(certain) ? rank_of(units) : find_exp_avg_sq(x);
}

}  // namespace qlk::QLK_ISA
