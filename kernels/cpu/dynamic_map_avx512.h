// The dynamic maps with AVX-512: levels and ranks by permutes of registers. Gathers would do (dynamic_map.h), but take
// 30 cycles each on the many CPUs whose microcode closes the "Downfall" leak, and an update needs four of them.
#pragma once

#include "dynamic_rank.h"
#include "qlk/tables.h"
#include "quick_rank.h"

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

inline Floats lookup_32(const float *table, Ints index) {
    return _mm512_permutex2var_ps(load(table), index, load(table + 16));
}

// The ranks above zero's of values from SMALLEST to 1; `uncertain` where the exact table has to be asked.
inline Ints quick_rank(const QuickRank &quick, Floats x, Mask &uncertain) {
    const Ints binade = shift_right(as_ints(x), 23);
    const Ints line = add_where(greater(x, lookup_32(quick.threshold, binade)), binade, broadcast_int(1));
    const Floats straight = fma(x, lookup_32(quick.slope, line), lookup_32(quick.intercept, line));
    const Ints units = truncate(min(straight, lookup_32(quick.limit, line)));
    uncertain = _mm512_testn_epi32_mask(units, broadcast_int(QuickRank::UNLESS_UNCERTAIN));
    return shift_right(units, QuickRank::SHIFT);
}

inline Ints encode_exp_avg(Floats x) {
    constexpr int LARGER_MAGNITUDE = 0xB;  // the larger of two magnitudes, positive
    const Ints magnitude = as_ints(_mm512_range_ps(x, broadcast(ExpAvgRanks::SMALLEST), LARGER_MAGNITUDE));
    const Mask negative = _mm512_movepi32_mask(as_ints(x));
    // A negative value at a midpoint belongs to the level farther from zero: as if it were larger by one bit.
    const Ints adjusted = add_where(negative, magnitude, broadcast_int(1));
    Mask uncertain;
    const Ints rank = quick_rank(QUICK_EXP_AVG, as_floats(adjusted), uncertain);
    if (any(uncertain)) return find_exp_avg(x);
    const Ints zero = broadcast_int(EXP_AVG_ZERO);
    const Ints code = _mm512_mask_sub_epi32(add(zero, rank), negative, zero, rank);
    return max(code, broadcast_int(0));  // -1 has no level
}

inline Ints encode_exp_avg_sq(Floats x) {
    Mask uncertain;
    const Ints rank = quick_rank(QUICK_EXP_AVG_SQ, max(x, broadcast(ExpAvgSqRanks::SMALLEST)), uncertain);
    return any(uncertain) ? find_exp_avg_sq(x) : rank;
}

}  // namespace qlk::QLK_ISA
