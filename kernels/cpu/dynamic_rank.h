// The rank of a value in a dynamic map (`dynamic_rank` of qlk/adamw.h) with one table lookup.
//
// Magnitudes from SMALLEST to 1 are cut into cells at the top bits of the float, so finely that at most one midpoint
// falls in each. A cell holds the rank of its lowest value above SHIFT low bits, and in those what must be added to
// the low bits of a value for a carry into the rank exactly if the value lies above the midpoint. Negative values have
// cells of their own, from which the low bits are subtracted.
#pragma once

#include <stdint.h>

#include "qlk/adamw.h"

namespace qlk {

template <int MANTISSA_BITS, bool SIGNED>
struct RankTable {
    static constexpr int SHIFT = 23 - MANTISSA_BITS;
    static constexpr int32_t LOW_BITS = (1 << SHIFT) - 1;
    static constexpr float SMALLEST = 1.0f / (1 << 23);  // below every midpoint's magnitude: such values are zero
    static constexpr int32_t FIRST = (127 - 23) << MANTISSA_BITS;  // SMALLEST's bits >> SHIFT
    static constexpr int32_t SIDE = (23 << MANTISSA_BITS) + 1;     // the last cell starts at 1

    int32_t cells[SIGNED ? 2 * SIDE : SIDE];

    constexpr explicit RankTable(const float *midpoints) : cells() {
        for (int32_t cell = 0; cell < SIDE; ++cell) {
            const int32_t bits = (FIRST + cell) << SHIFT;
            cells[cell] = rising(midpoints, bits);
            if (SIGNED) cells[SIDE + cell] = falling(midpoints, bits);
        }
    }

    // Whether no cell holds two midpoints, and no midpoint lies nearer to zero than the cells.
    static constexpr bool fits(const float *midpoints) {
        for (int32_t cell = 0; cell < SIDE; ++cell) {
            const int32_t bits = (FIRST + cell) << SHIFT;
            const float nearer = value(bits), farther = value(bits | LOW_BITS);
            if (dynamic_rank(midpoints, farther) - dynamic_rank(midpoints, nearer) > 1) return false;
            if (SIGNED && dynamic_rank(midpoints, -nearer) - dynamic_rank(midpoints, -farther) > 1) return false;
        }
        const int zero = dynamic_rank(midpoints, 0.0f);
        return dynamic_rank(midpoints, SMALLEST) == zero && (!SIGNED || dynamic_rank(midpoints, -SMALLEST) == zero);
    }

  private:
    static constexpr float value(int32_t bits) { return __builtin_bit_cast(float, bits); }
    static constexpr int32_t low_bits(float x) { return __builtin_bit_cast(int32_t, x) & LOW_BITS; }

    static constexpr int32_t rising(const float *midpoints, int32_t bits) {
        const int rank = dynamic_rank(midpoints, value(bits));
        if (dynamic_rank(midpoints, value(bits | LOW_BITS)) == rank) return rank << SHIFT;
        return (rank << SHIFT) + LOW_BITS - low_bits(midpoints[rank]);
    }

    static constexpr int32_t falling(const float *midpoints, int32_t bits) {
        const int rank = dynamic_rank(midpoints, -value(bits | LOW_BITS));
        if (dynamic_rank(midpoints, -value(bits)) == rank) return (rank << SHIFT) + LOW_BITS;
        return ((rank + 1) << SHIFT) + low_bits(midpoints[rank]) - 1;
    }
};

// As few mantissa bits as keep the midpoints apart: together the tables take half of a first-level cache.
using ExpAvgRanks = RankTable<6, true>;
using ExpAvgSqRanks = RankTable<7, false>;

extern const ExpAvgRanks exp_avg_ranks;
extern const ExpAvgSqRanks exp_avg_sq_ranks;

}  // namespace qlk
