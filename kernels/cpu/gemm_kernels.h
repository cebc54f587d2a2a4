// Matrix products of more than a few rows (after Goto & van de Geijn 2008, "Anatomy of high-performance matrix
// multiplication"): a panel of the right operand is brought into the first-level cache, and tiles of the output are
// summed in registers while the left operand streams past it, one broadcast element at a time.
#pragma once

#include <array>
#include <utility>

#include "left_kernels.h"
#include "panel_kernels.h"

namespace qlk::QLK_ISA {

// Rows of a tile: their sums, a row of the panel and a broadcast element fill the registers.
#if defined(QLK_ISA_AVX512)
constexpr int TILE_ROWS = 8;
#elif defined(QLK_ISA_AVX2)
constexpr int TILE_ROWS = 4;
#else
constexpr int TILE_ROWS = 2;
#endif

constexpr int64_t MOST_PIECES_IN_PLACE = 3;
// The longest first term that joins the next one: ranks of common adapters.
constexpr int64_t JOINED_INNER = 64;

// Where a tile goes: out = sums + add + bias.
struct TileOut {
    const float *add;  // may be null
    int64_t add_stride;
    const float *bias;  // may be null
    void *out;
    int64_t out_stride;
    bool bfloat16;
    int columns;
};

// out = sums + add + bias, for the first `rows`. Only the last vector of a row can be cut short: WHOLE says that it is
// not.
template <int ROWS, int VECTORS, bool WHOLE>
inline __attribute__((always_inline)) void finish_tile(Floats (&sums)[ROWS][VECTORS], const TileOut to,
                                                       const int rows = ROWS) {
    const int lanes = to.columns - (VECTORS - 1) * WIDTH;
    const auto short_vector = [](int v) { return !WHOLE && v == VECTORS - 1; };
    if (to.add != nullptr) {
        const float *from = to.add;
#pragma GCC unroll 24
        for (int i = 0; i < ROWS && i < rows; ++i, from += to.add_stride) {
#pragma GCC unroll 3
            for (int v = 0; v < VECTORS; ++v) {
                const float *at = from + v * WIDTH;
                sums[i][v] = add(sums[i][v], short_vector(v) ? load_first(at, lanes) : load(at));
            }
        }
    }
    if (to.bias != nullptr) {
#pragma GCC unroll 3
        for (int v = 0; v < VECTORS; ++v) {
            const Floats bias = load(to.bias + v * WIDTH);
#pragma GCC unroll 24
            for (int i = 0; i < ROWS; ++i) sums[i][v] = add(sums[i][v], bias);
        }
    }
    if (to.bfloat16) {
        uint16_t *out = static_cast<uint16_t *>(to.out);
#pragma GCC unroll 24
        for (int i = 0; i < ROWS && i < rows; ++i, out += to.out_stride) {
#pragma GCC unroll 3
            for (int v = 0; v < VECTORS; ++v) {
                store_bfloat16_first(out + v * WIDTH, sums[i][v], short_vector(v) ? lanes : WIDTH);
            }
        }
    } else {
        float *out = static_cast<float *>(to.out);
#pragma GCC unroll 24
        for (int i = 0; i < ROWS && i < rows; ++i, out += to.out_stride) {
#pragma GCC unroll 3
            for (int v = 0; v < VECTORS; ++v) {
                if (short_vector(v)) {
                    store_first(out + v * WIDTH, sums[i][v], lanes);
                } else {
                    store(out + v * WIDTH, sums[i][v]);
                }
            }
        }
    }
}

// A run of the inner dimension: rows of the left operand, and the panel of the right one.
struct Segment {
    int64_t inner;
    const float *left;
    int64_t left_stride;
    const float *panel;
};

// The same in bfloat16: pairs of neighbours along the inner dimension.
struct PairSegment {
    int64_t pairs;
    const uint16_t *left;
    int64_t left_stride;
    const uint32_t *panel;
};

struct TileIn {
    Segment segments[2];
    int count;
    PairSegment pairs;  // none where pairs.pairs is 0
};

template <int ROWS, int VECTORS>
inline __attribute__((always_inline)) void add_floats(Floats (&sums)[ROWS][VECTORS], const Segment &segment) {
    const float *left = segment.left, *panel = segment.panel;
    const int64_t left_stride = segment.left_stride;
    for (int64_t k = segment.inner; k > 0; --k, ++left, panel += PANEL) {
        Floats right[VECTORS];
#pragma GCC unroll 3
        for (int v = 0; v < VECTORS; ++v) right[v] = load(panel + v * WIDTH);
#pragma GCC unroll 24
        for (int i = 0; i < ROWS; ++i) {
            const Floats element = broadcast(left[i * left_stride]);
#pragma GCC unroll 3
            for (int v = 0; v < VECTORS; ++v) sums[i][v] = fma(element, right[v], sums[i][v]);
        }
    }
}

template <int ROWS, int VECTORS>
inline __attribute__((always_inline)) void add_pairs(Floats (&sums)[ROWS][VECTORS], const PairSegment &segment) {
    const uint16_t *left = segment.left;
    const uint32_t *panel = segment.panel;
    const int64_t left_stride = segment.left_stride;
    for (int64_t k = segment.pairs; k > 0; --k, left += 2, panel += PANEL) {
        Pairs right[VECTORS];
#pragma GCC unroll 3
        for (int v = 0; v < VECTORS; ++v) right[v] = load_pairs(panel + v * WIDTH);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; ++i) {
            const Pairs element = broadcast_pair(left + i * left_stride);
#pragma GCC unroll 3
            for (int v = 0; v < VECTORS; ++v) sums[i][v] = add_products(sums[i][v], element, right[v]);
        }
    }
}

template <int ROWS, int VECTORS>
void multiply_tile(const TileIn &in, const TileOut &to) {
    // What the sums are added to, or where they go, arrives while they are formed.
    for (int i = 0; i < ROWS; ++i) {
        const float *meets = to.add != nullptr ? to.add + i * to.add_stride : static_cast<float *>(to.out) + i * to.out_stride;
        for (int v = 0; v < VECTORS && (to.add != nullptr || !to.bfloat16); ++v) __builtin_prefetch(meets + v * WIDTH, 1);
    }
    Floats sums[ROWS][VECTORS];
    for (auto &row : sums) {
        for (Floats &sum : row) sum = broadcast(0.0f);
    }
    for (int i = 0; i < in.count; ++i) add_floats(sums, in.segments[i]);
    if constexpr (HAS_BFLOAT16_UNITS) add_pairs(sums, in.pairs);
    if (to.columns == VECTORS * WIDTH) {
        finish_tile<ROWS, VECTORS, true>(sums, to);
    } else {
        finish_tile<ROWS, VECTORS, false>(sums, to);
    }
}

using TileFunction = void (*)(const TileIn &, const TileOut &);

template <int VECTORS, int... ROWS>
constexpr std::array<TileFunction, sizeof...(ROWS)> tile_functions(std::integer_sequence<int, ROWS...>) {
    return {multiply_tile<ROWS + 1, VECTORS>...};
}

// TILES[vectors - 1][rows - 1]
constexpr std::array<TileFunction, TILE_ROWS> TILES[PANEL_VECTORS] = {
    tile_functions<1>(std::make_integer_sequence<int, TILE_ROWS>()),
    tile_functions<2>(std::make_integer_sequence<int, TILE_ROWS>()),
    tile_functions<3>(std::make_integer_sequence<int, TILE_ROWS>()),
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The longest piece of a term's inner dimension: what fills a panel.
inline int64_t longest_piece(const Term &term) { return term.left_bfloat16 != nullptr ? PANEL_PAIRS : PANEL_INNER; }

// The inner dimension in equal pieces of at most `longest`, multiples of the smallest block; at least one piece.
inline int64_t piece_length(int64_t inner, int64_t longest) {
    const int64_t pieces = inner > 0 ? ceil_div(inner, longest) : 1;
    return inner > 0 ? ceil_div(ceil_div(inner, pieces), 32) * 32 : 1;
}

// One rectangle of a product: where its sums lie between the pieces of the inner dimension.
class RectangleProduct {
  public:
    RectangleProduct(const Product &product, const Rectangle &part, float *sums)
        : product_(product), part_(part), narrow_(product.dtype != QLK_FLOAT32) {
        // Sums that are added to more than a few times lie together in the workspace: rows of `out` lie far apart and
        // may all fall on the same few sets of a cache.
        int64_t pieces = 0;
        for (int t = 0; t < product.term_count; ++t) {
            pieces += ceil_div(product.terms[t].inner, longest_piece(product.terms[t]));
        }
        if (sums != nullptr && (narrow_ || pieces > MOST_PIECES_IN_PLACE)) {
            sums_ = sums;
            sums_stride_ = ceil_div(part.column_end - part.column_begin, WIDTH) * WIDTH;
        } else {
            sums_ = static_cast<float *>(product.out) + part.row_begin * product.columns + part.column_begin;
            sums_stride_ = product.columns;
        }
    }

    void run() {
        bool first = !product_.accumulate;
        const Term *joined = joins_next() ? &product_.terms[0] : nullptr;
        for (int t = joined != nullptr ? 1 : 0; t < product_.term_count; ++t) {
            const Term &term = product_.terms[t];
            const PanelWriter writer(term.right);
            const int64_t length = piece_length(term.inner, longest_piece(term));
            int64_t begin = 0;
            do {
                const int64_t count = term.inner - begin < length ? term.inner - begin : length;
                const bool last = t == product_.term_count - 1 && begin + count == term.inner;
                add_piece(joined, term, writer, begin, count, first, last);
                joined = nullptr;
                first = false;
                begin += count;
            } while (begin < term.inner);
        }
    }

  private:
    // A short first term (an adapter's) is summed in the same registers as the first piece of the next one.
    bool joins_next() const {
        const Term &term = product_.terms[0];
        return product_.term_count > 1 && term.inner <= JOINED_INNER && term.result_dropout == nullptr;
    }

    void add_piece(const Term *joined, const Term &term, const PanelWriter &writer, int64_t begin, int64_t count,
                   bool first, bool last) {
        alignas(64) float panel[(JOINED_INNER + PANEL_INNER) * PANEL];
        float *own_panel = panel + (joined != nullptr ? joined->inner : 0) * PANEL;
        for (int64_t column = part_.column_begin; column < part_.column_end; column += PANEL) {
            const int64_t rest = part_.column_end - column;
            const int columns = rest < PANEL ? static_cast<int>(rest) : PANEL;
            if (joined != nullptr) PanelWriter(joined->right).write(0, joined->inner, column, columns, panel);
            if (count > 0) write_panel(term, writer, begin, count, column, columns, own_panel);
            const int64_t rows = part_.row_end - part_.row_begin, tiles = ceil_div(rows, TILE_ROWS);
            for (int64_t tile = 0; tile < tiles; ++tile) {
                const int64_t row = rows * tile / tiles, row_end = rows * (tile + 1) / tiles;
                TileIn in = {};
                if (joined != nullptr) in.segments[in.count++] = segment_of(*joined, row, 0, joined->inner, panel);
                add_own_segment(in, term, row, begin, count, own_panel);
                const TileFunction multiply_tile = TILES[(columns - 1) / WIDTH][row_end - row - 1];
                multiply_tile(in, tile_out(row, column, columns, first, last));
                if (term.result_dropout != nullptr && begin + count == term.inner) {
                    drop_tile(*term.result_dropout, row, row_end, column, columns);
                }
            }
        }
    }

    static void write_panel(const Term &term, const PanelWriter &writer, int64_t begin, int64_t count, int64_t column,
                            int columns, float *panel) {
        if constexpr (HAS_BFLOAT16_UNITS) {
            if (term.left_bfloat16 != nullptr) {
                writer.write_pairs(begin, count, column, columns, reinterpret_cast<uint32_t *>(panel));
                return;
            }
        }
        writer.write(begin, count, column, columns, panel);
    }

    void add_own_segment(TileIn &in, const Term &term, int64_t row, int64_t begin, int64_t count,
                         const float *panel) const {
        if (term.left_bfloat16 == nullptr) {
            in.segments[in.count++] = segment_of(term, row, begin, count, panel);
            return;
        }
        const uint16_t *left = term.left_bfloat16 + (part_.row_begin + row) * term.left_stride + begin;
        in.pairs = {(count + 1) / 2, left, term.left_stride, reinterpret_cast<const uint32_t *>(panel)};
    }

    Segment segment_of(const Term &term, int64_t row, int64_t begin, int64_t count, const float *panel) const {
        const float *left = term.left + (part_.row_begin + row) * term.left_stride + begin;
        return {count, left, term.left_stride, panel};
    }

    TileOut tile_out(int64_t row, int64_t column, int columns, bool first, bool last) const {
        float *sums = sums_ + row * sums_stride_ + (column - part_.column_begin);
        TileOut to = {first ? nullptr : sums, sums_stride_, nullptr, sums, sums_stride_, false, columns};
        if (last) {
            const int64_t at = (part_.row_begin + row) * product_.columns + column;
            if (product_.bias != nullptr) to.bias = product_.bias + column;
            if (narrow_) {
                to.out = static_cast<uint16_t *>(product_.out) + at;
            } else {
                to.out = static_cast<float *>(product_.out) + at;
            }
            to.out_stride = product_.columns;
            to.bfloat16 = narrow_;
        }
        return to;
    }

    void drop_tile(const Dropout &dropout, int64_t row, int64_t row_end, int64_t column, int columns) {
        for (; row < row_end; ++row) {
            const int64_t index = (product_.first_row + part_.row_begin + row) * product_.columns + column;
            float *sums = sums_ + row * sums_stride_ + (column - part_.column_begin);
            drop(sums, columns, static_cast<uint64_t>(index), dropout);
        }
    }

    const Product &product_;
    const Rectangle &part_;
    const bool narrow_;
    float *sums_;
    int64_t sums_stride_;
};

inline void multiply(const Product &product, const Rectangle &part, float *sums) {
    RectangleProduct(product, part, sums).run();
}

}  // namespace qlk::QLK_ISA
