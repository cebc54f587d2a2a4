// The codes of scaled weights with AVX-512, for formats whose midpoints lie so far apart that no two share one of 31
// cells. The cell never decreases with x, so midpoints in earlier cells lie below x and those in later ones do not; one
// comparison with the midpoint in its own cell decides between the code at which the cell begins and that of the next.
#pragma once

#include <cstdint>

#include "qlk/blockwise.h"

namespace qlk::QLK_ISA {

constexpr int CELLS = 32;

// What is added to a value's cell: from 2^23 on floats are integers, so that adding rounds, and needs no conversion.
inline Floats cell_offset(int number = 0) { return broadcast(8388608.0f + 16.0f + static_cast<float>(number)); }

// The cells of values from -1 to 1 (and what rounding makes of those), 1 to 31, in the lowest byte of each lane, with the
// number of the offset added.
inline Ints cell_of(Floats x, Floats offset = cell_offset()) { return as_ints(fma(x, broadcast(15.4f), offset)); }

// What a format has in each cell.
struct Cells {
    float midpoints[CELLS];    // infinity where a cell has none
    uint8_t codes[CELLS + 1];  // at which a cell begins
    bool fits;

    explicit Cells(const Format &format) : midpoints(), codes(), fits() {
        int32_t cells[WIDTH];
        store_ints(cells, bit_and(cell_of(load(format.midpoints)), broadcast_int(CELLS - 1)));
        int rank = 0;
        for (int cell = 0; cell < CELLS; ++cell) {
            codes[cell] = format.code[rank];
            const bool holds_one = rank < format.levels - 1 && cells[rank] == cell;
            midpoints[cell] = holds_one ? format.midpoints[rank++] : __builtin_inff();
        }
        fits = rank == format.levels - 1 && cells[rank - 1] < CELLS - 1;
    }
};

class CellSearch {
  public:
    explicit CellSearch(const Cells &cells) : midpoints_(load_table32(cells.midpoints)) {
        float codes[CELLS];
        for (int cell = 0; cell < CELLS; ++cell) codes[cell] = float_of(cells.codes[cell]);
        codes_ = load_table32(codes);
    }

    Ints codes(Floats x) const {
        const Ints cell = cell_of(x);
        return as_ints(lookup(codes_, add_where(greater(x, lookup(midpoints_, cell)), cell, broadcast_int(1))));
    }

  private:
    Table32 midpoints_, codes_;
};

}  // namespace qlk::QLK_ISA
