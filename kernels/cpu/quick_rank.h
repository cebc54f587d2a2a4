// Constants for finding ranks in a dynamic map by arithmetic instead of a table in memory. The levels of a decade lie
// at equal distances, so a straight line takes a value to its rank, here in units of 1 / 32768. The midpoints lie some
// roundings off the line: within four units of a change of rank the exact table (dynamic_rank.h) has to be asked.
//
// All is by binade (the values of one exponent), so that a permute finds it among 32 by the low bits of the exponent:
// 2^-23 starts binade 8 and 1 starts binade 31. A binade has at most one `threshold`; above it the line is that of the
// next binade.
#pragma once

#include <stdint.h>

#include "qlk/adamw.h"

namespace qlk {

struct alignas(64) QuickRank {
    static constexpr int SHIFT = 15;  // rank = units >> SHIFT
    static constexpr int UNITS = 1 << SHIFT;
    static constexpr int WINDOW = 8;  // units after a multiple of UNITS: ranks change in their middle
    static constexpr int UNLESS_UNCERTAIN = UNITS - WINDOW;  // bits of which one is set outside of the windows
    static constexpr int DECADES = 7;
    // Added to all units: the lowest bit of such a float is one unit, and its lowest 23 bits are the units.
    static constexpr float ONE_A_BIT = 1 << 23;
    static_assert(256 * UNITS <= 1 << 23, "ranks below 256 have to fit");

    float threshold[32];  // infinity in most binades
    float slope[32], intercept[32];
    float limit[32];  // the line goes no higher: the last slice of a decade is longer than the others

    // Of the ranks above zero's: `midpoints` starts with the lowest above zero, `slices` are those of the first decade.
    constexpr QuickRank(const float *midpoints, int slices) : threshold(), slope(), intercept(), limit() {
        for (int binade = 0; binade < 32; ++binade) {
            threshold[binade] = __builtin_inff();
            intercept[binade] = limit[binade] = ONE_A_BIT + UNITS / 2;  // rank 0
        }
        int first = 1;
        double scale = 1e-6;  // decades reach from scale / 10 to scale, and begin with rank `first`
        for (int decade = 0; decade < DECADES; ++decade, scale *= 10.0, slices *= 2) {
            const int last = first + slices - 1;
            start_line(midpoints[first - 1], slices / (0.9 * scale), first - slices / 9.0, last);
            first = last + 1;
        }
        start_line(midpoints[first - 1], 0.0, first + 0.5, first);  // the level 1
    }

    // Whether the quick way and the table together give the rank of every float; it is enough to look at midpoints.
    constexpr bool fits(const float *midpoints, int count) const {
        for (int rank = 0; rank < count; ++rank) {
            const float x = midpoints[rank];
            const float above = __builtin_bit_cast(float, __builtin_bit_cast(int32_t, x) + 1);
            if (threshold[binade_of(x)] == x) {
                if (!is_inside(line(x), rank) || !is_inside(line(above), rank + 1)) return false;
            } else if (!is_between(line(x), rank) || !is_between(line(above), rank)) {
                return false;
            }
        }
        return true;
    }

  private:
    constexpr void start_line(float start, double line_slope, double line_intercept, int last) {
        threshold[binade_of(start)] = start;
        for (int binade = binade_of(start) + 1; binade < 32; ++binade) {
            slope[binade] = static_cast<float>(UNITS * line_slope);
            intercept[binade] = static_cast<float>(ONE_A_BIT + UNITS * line_intercept + WINDOW / 2);
            limit[binade] = static_cast<float>(ONE_A_BIT + UNITS * (last + 0.5));
        }
    }

    static constexpr int binade_of(float x) { return (__builtin_bit_cast(int32_t, x) >> 23) & 31; }

    constexpr float line(float x) const {
        const int binade = binade_of(x) + (x > threshold[binade_of(x)] ? 1 : 0);
        const float value = static_cast<float>(static_cast<double>(slope[binade]) * x + intercept[binade]);
        return (value < limit[binade] ? value : limit[binade]) - ONE_A_BIT;
    }

    // A unit is kept as a margin for how the product and the sum are rounded.
    static constexpr bool is_inside(float line, int rank) {
        return line > UNITS * rank + WINDOW + 1 && line < UNITS * (rank + 1) - 1;
    }
    static constexpr bool is_between(float line, int rank) {
        return line > UNITS * (rank + 1) + 1 && line < UNITS * (rank + 1) + WINDOW - 1;
    }
};

constexpr QuickRank QUICK_EXP_AVG(DYNAMIC_MIDPOINTS + EXP_AVG_ZERO, 1);
constexpr QuickRank QUICK_EXP_AVG_SQ(UNSIGNED_DYNAMIC_MIDPOINTS, 2);
static_assert(QUICK_EXP_AVG.fits(DYNAMIC_MIDPOINTS + EXP_AVG_ZERO, 128), "a line misses the midpoints");
static_assert(QUICK_EXP_AVG_SQ.fits(UNSIGNED_DYNAMIC_MIDPOINTS, 255), "a line misses the midpoints");

}  // namespace qlk
