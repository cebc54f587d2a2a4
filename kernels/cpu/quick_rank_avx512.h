// Ranks in the dynamic maps with AVX-512: by arithmetic, from constants in permutes of registers (quick_rank.h).
#pragma once

#include "dynamic_rank.h"
#include "quick_rank.h"

namespace qlk::QLK_ISA {

inline Floats lookup_32(const float *table, Ints index) {
    return _mm512_permutex2var_ps(load(table), index, load(table + 16));
}

// The ranks above zero's of values from SMALLEST to 1, in units; those not in `certain` have to ask the exact table.
inline Ints quick_units(const QuickRank &quick, Floats x, Mask &certain) {
    const Ints binade = shift_right<23>(as_ints(x));
    const Ints line = add_where(greater(x, lookup_32(quick.threshold, binade)), binade, broadcast_int(1));
    const Floats straight = fma(x, lookup_32(quick.slope, line), lookup_32(quick.intercept, line));
    const Ints units = _mm512_min_epi32(as_ints(straight), as_ints(lookup_32(quick.limit, line)));
    certain = _mm512_mask_test_epi32_mask(certain, units, broadcast_int(QuickRank::UNLESS_UNCERTAIN));
    return units;
}

// The same of values from -1 to 1, for their magnitudes.
inline Ints quick_exp_avg_units(Floats x, Mask &negative, Mask &certain) {
    constexpr int LARGER_MAGNITUDE = 0xB;  // the larger of two magnitudes, positive
    const Ints magnitude = as_ints(_mm512_range_ps(x, broadcast(ExpAvgRanks::SMALLEST), LARGER_MAGNITUDE));
    negative = _mm512_movepi32_mask(as_ints(x));
    // A negative value at a midpoint belongs to the level farther from zero: as if it were larger by one bit.
    return quick_units(QUICK_EXP_AVG, as_floats(add_where(negative, magnitude, broadcast_int(1))), certain);
}

inline Ints quick_exp_avg_sq_units(Floats x, Mask &certain) {
    return quick_units(QUICK_EXP_AVG_SQ, max(x, broadcast(ExpAvgSqRanks::SMALLEST)), certain);
}

}  // namespace qlk::QLK_ISA
