// Products of a few rows of x (generation): each weight is used so rarely that reading it is what costs, so it goes
// from its packed bytes through a register straight into the sums.
#pragma once

#include <array>
#include <cstring>
#include <utility>

#include "direct_kernels.h"

namespace qlk::QLK_ISA {

constexpr int64_t MOST_FEW_ROWS = 6;
constexpr int64_t MOST_FEW_PAIRED_ROWS = 12;  // of bfloat16, where units multiply it
// Rows of the weight that share what is loaded of floats, as many as registers hold the sums of.
#if defined(QLK_ISA_AVX512)
constexpr int COLUMNS = 4;
#else
constexpr int COLUMNS = 2;
#endif
constexpr int GROUP = 2 * WIDTH;  // weights of one load of packed bytes
constexpr int QUARTER = 4, QUARTERS = GROUP / QUARTER;  // codes of a 64-bit lane as lookup_pairs finds them
constexpr int USUAL_GROUPS = 64 / GROUP;  // of a block of the usual size
constexpr int64_t BLOCKS_AT_ONCE = 64;  // of a row, whose absmax is decoded before them
constexpr int64_t DECODED_AT_ONCE = 512;  // weights of a row whose blocks have to be decoded one by one

inline bool multiplies_pairs(int dtype) { return HAS_BFLOAT16_UNITS && dtype == QLK_BFLOAT16; }

inline bool are_few(int64_t rows, bool paired) { return rows <= (paired ? MOST_FEW_PAIRED_ROWS : MOST_FEW_ROWS); }

// Rows that are more than a few go as in direct_kernels.h, in equal passes.
inline int64_t few_rows_at_once(int64_t rows, int dtype, const qlk_weight &weight) {
    const bool whole_blocks = has_whole_blocks(weight), paired = whole_blocks && multiplies_pairs(dtype);
    if (are_few(rows, paired)) return rows;
    if (!whole_blocks || rows > (paired ? DIRECT_ROWS : MOST_DIRECT_FLOAT_ROWS)) return 0;
    return ceil_div(rows, ceil_div(rows, DIRECT_ROWS));
}

inline int64_t few_rows_stride(const qlk_weight &weight) { return (weight.in_features + GROUP - 1) / GROUP * GROUP; }

inline int64_t few_rows_floats(int64_t rows, const qlk_weight &weight) {
    return direct_width(rows) * few_rows_stride(weight);
}

// Where rows are made of whole blocks: group by group, row by row, the even elements and then the odd ones, as the high
// and low halves of WIDTH bytes of the weight meet them. Otherwise the rows as they are, filled up with zeros. More
// than a few as FloatGroup meets them.
inline void lay_out_few_rows(const float *x, int64_t x_stride, int64_t rows, const qlk_weight &weight, float *out) {
    if (!are_few(rows, false)) return FloatGroup::lay_out(x, x_stride, rows, weight.in_features, out);
    const int64_t stride = few_rows_stride(weight);
    const bool split = has_whole_blocks(weight);
    for (int64_t row = 0; row < rows; ++row, x += x_stride) {
        for (int64_t i = 0; i < stride; ++i) {
            const float value = i < weight.in_features ? x[i] : 0.0f;
            const int64_t group = i / GROUP, lane = i % GROUP;
            if (split) {
                out[(group * rows + row) * GROUP + (lane % 2) * WIDTH + lane / 2] = value;
            } else {
                out[row * stride + i] = value;
            }
        }
    }
}

// Of bfloat16, where rows are made of whole blocks: group by group, row by row, quarters in the order of lookup_pairs.
// Otherwise as above; more than a few: as PairGroup meets them.
inline void lay_out_few_pairs(const uint16_t *x, int64_t rows, const qlk_weight &weight, uint16_t *out) {
    if (!has_whole_blocks(weight)) {
        const int64_t stride = few_rows_stride(weight);
        for (int64_t row = 0; row < rows; ++row, x += weight.in_features, out += stride) {
            for (int64_t i = 0; i < stride; ++i) out[i] = i < weight.in_features ? x[i] : uint16_t{0};
        }
        return;
    }
    if (!are_few(rows, true)) return PairGroup::lay_out(x, weight.in_features, rows, weight.in_features, out);
    for (int64_t begin = 0; begin < weight.in_features; begin += GROUP) {
        for (int64_t row = 0; row < rows; ++row) {
            const uint16_t *from = x + row * weight.in_features + begin;
            for (int i = 0; i < QUARTERS; ++i, out += QUARTER) {
                std::memcpy(out, from + (i % 2) * (GROUP / 2) + (i / 2) * QUARTER, QUARTER * sizeof(uint16_t));
            }
        }
    }
}

// What COUNT rows of the weight, a block of each, add to sums with rows of x: of floats.
template <int COUNT>
class FloatBlocks {
  public:
    using Element = float;

    static const Element *rows_of(const FewRows &product) { return product.x; }

    void scale(const Table16 &levels, const float *const (&absmax)[COUNT], int64_t block) {
        for (int c = 0; c < COUNT; ++c) scaled_[c] = scale_table(levels, absmax[c][block]);
    }

    template <int ROWS, int CHAINS>
    void add_group(const Element *x, const uint8_t *packed, int64_t row_bytes,
                   Floats (&sums)[ROWS][COUNT][CHAINS]) const {
        for (int c = 0; c < COUNT; ++c) {
            const Ints bytes = load_bytes(packed + c * row_bytes);
            const Floats even = lookup(scaled_[c], shift_right<4>(bytes)), odd = lookup(scaled_[c], bytes);
            for (int r = 0; r < ROWS; ++r) {
                Floats *to = sums[r][c];
                to[0] = fma(even, load(x + r * GROUP), to[0]);
                to[CHAINS - 1] = fma(odd, load(x + r * GROUP + WIDTH), to[CHAINS - 1]);
            }
        }
    }

  private:
    Table16 scaled_[COUNT];
};

// The same of bfloat16. Rows of the weight share tables two by two.
template <int COUNT>
class PairBlocks {
  public:
    using Element = uint16_t;

    static const Element *rows_of(const FewRows &product) { return product.x_bfloat16; }

    void scale(const Table16 &levels, const float *const (&absmax)[COUNT], int64_t block) {
        for (int c = 0; c < COUNT; c += 2) {
            const float *second = absmax[c + 1 < COUNT ? c + 1 : c];
            tables_[c / 2] = pair_tables(scale_table(levels, absmax[c][block]), scale_table(levels, second[block]));
        }
    }

    template <int ROWS, int CHAINS>
    void add_group(const Element *x, const uint8_t *packed, int64_t row_bytes,
                   Floats (&sums)[ROWS][COUNT][CHAINS]) const {
        Pairs weights[COUNT];
        for (int c = 0; c < COUNT; ++c, packed += row_bytes) {
            weights[c] = c % 2 == 0 ? lookup_pairs<0>(tables_[c / 2], packed) : lookup_pairs<1>(tables_[c / 2], packed);
        }
        for (int r = 0; r < ROWS; ++r) {
            const Pairs values = load_pairs(reinterpret_cast<const uint32_t *>(x + r * GROUP));
            for (int c = 0; c < COUNT; ++c) sums[r][c][0] = add_products(sums[r][c][0], values, weights[c]);
        }
    }

  private:
    PairTables tables_[(COUNT + 1) / 2];
};

// dots[row][column]: of ROWS rows of x and COUNT rows of the weight from number `first` on.
template <typename Blocks, int ROWS, int COUNT>
void dot_blocks(const typename Blocks::Element *x, const qlk_weight &weight, const Decoder &decoder,
                const Table16 &levels, int64_t first, float (&dots)[ROWS][COUNT]) {
    // Sums of one dot product: enough in all to hide an addition's latency.
    constexpr int CHAINS = ROWS == 1 && sizeof(*x) == sizeof(float) ? 2 : 1;
    const int64_t blocks = weight.in_features / weight.block_size, bytes_per_block = weight.block_size / 2;
    const int64_t row_bytes = weight.in_features / 2;
    const uint8_t *packed = weight.packed + first * row_bytes;
    Floats sums[ROWS][COUNT][CHAINS];
    for (auto &row : sums) {
        for (auto &column : row) {
            for (Floats &chain : column) chain = broadcast(0.0f);
        }
    }
    for (int64_t begin = 0; begin < blocks; begin += BLOCKS_AT_ONCE) {
        const int64_t count = blocks - begin < BLOCKS_AT_ONCE ? blocks - begin : BLOCKS_AT_ONCE;
        float room[COUNT][BLOCKS_AT_ONCE];
        const float *absmax[COUNT];
        for (int c = 0; c < COUNT; ++c) absmax[c] = decoder.absmaxes((first + c) * blocks + begin, count, room[c]);
        for (int64_t block = 0; block < count; ++block) {
            Blocks of_weight;
            of_weight.scale(levels, absmax, block);
            if (block * bytes_per_block % CACHE_LINE == 0) {  // the rows that come after these
                for (int c = 0; c < COUNT; ++c) __builtin_prefetch(packed + (COUNT + c) * row_bytes);
            }
            const auto add_group = [&] {
                of_weight.add_group(x, packed, row_bytes, sums);
                packed += WIDTH;
                x += ROWS * GROUP;
            };
            if (bytes_per_block == USUAL_GROUPS * WIDTH) {  // without a loop
#pragma GCC unroll 8
                for (int i = 0; i < USUAL_GROUPS; ++i) add_group();
            } else {
                for (int64_t byte = 0; byte < bytes_per_block; byte += WIDTH) add_group();
            }
        }
    }
    for (int r = 0; r < ROWS; ++r) {
        for (int c = 0; c < COUNT; ++c) {
            dots[r][c] = sum(CHAINS == 1 ? sums[r][c][0] : add(sums[r][c][0], sums[r][c][CHAINS - 1]));
        }
    }
}

// dots[row] with one row of the weight whose blocks may lie anywhere.
template <int ROWS>
void dot_decoded(const float *x, const qlk_weight &weight, const Decoder &decoder, int64_t column,
                 float (&dots)[ROWS][1]) {
    const int64_t stride = few_rows_stride(weight);
    alignas(64) float decoded[DECODED_AT_ONCE];
    Floats sums[ROWS];
    for (Floats &sum : sums) sum = broadcast(0.0f);
    for (int64_t begin = 0; begin < weight.in_features; begin += DECODED_AT_ONCE) {
        const int64_t rest = weight.in_features - begin;
        const int64_t count = rest < DECODED_AT_ONCE ? rest : DECODED_AT_ONCE;
        decoder.decode(column * weight.in_features + begin, count, decoded);
        for (int64_t i = 0; i < count; i += WIDTH) {
            const Floats values = load_first(decoded + i, count - i < WIDTH ? static_cast<int>(count - i) : WIDTH);
            for (int r = 0; r < ROWS; ++r) sums[r] = fma(values, load(x + r * stride + begin + i), sums[r]);
        }
    }
    for (int r = 0; r < ROWS; ++r) dots[r][0] = sum(sums[r]);
}

// The same of bfloat16.
template <int ROWS>
void dot_decoded(const uint16_t *x, const qlk_weight &weight, const Decoder &decoder, int64_t column,
                 float (&dots)[ROWS][1]) {
    const int64_t stride = few_rows_stride(weight);
    alignas(64) uint16_t decoded[DECODED_AT_ONCE];
    Floats sums[ROWS];
    for (Floats &sum : sums) sum = broadcast(0.0f);
    for (int64_t begin = 0; begin < weight.in_features; begin += DECODED_AT_ONCE) {
        const int64_t rest = weight.in_features - begin;
        const int64_t count = rest < DECODED_AT_ONCE ? rest : DECODED_AT_ONCE;
        decoder.decode(column * weight.in_features + begin, count, decoded);
        for (int64_t i = count; i % GROUP != 0; ++i) decoded[i] = 0;
        for (int64_t i = 0; i < count; i += GROUP) {
            const Pairs values = load_pairs(reinterpret_cast<const uint32_t *>(decoded + i));
            for (int r = 0; r < ROWS; ++r) {
                const uint16_t *row = x + r * stride + begin + i;
                sums[r] = add_products(sums[r], values, load_pairs(reinterpret_cast<const uint32_t *>(row)));
            }
        }
    }
    for (int r = 0; r < ROWS; ++r) dots[r][0] = sum(sums[r]);
}

inline float dot(const float *a, const float *b, int64_t count) {
    Floats sums = broadcast(0.0f);
    for (int64_t i = 0; i < count; i += WIDTH) {
        const int lanes = count - i < WIDTH ? static_cast<int>(count - i) : WIDTH;
        sums = fma(load_first(a + i, lanes), load_first(b + i, lanes), sums);
    }
    return sum(sums);
}

inline void store_dot(const FewRows &product, int64_t row, int64_t column, float value) {
    if (product.bias != nullptr) value += product.bias[column];
    if (product.scaled_low != nullptr) {
        const int64_t rank = product.adapter->rank;
        value += dot(product.scaled_low + row * rank, product.adapter->lora_B + column * rank, rank);
    }
    const int64_t at = row * product.weight->out_features + column;
    if (product.dtype == QLK_FLOAT32) {
        static_cast<float *>(product.out)[at] = value;
    } else {
        static_cast<uint16_t *>(product.out)[at] = float_to_bfloat16(value);
    }
}

template <template <int> class Blocks, int ROWS, int COUNT>
void multiply_rows(const FewRows &product, int64_t begin, int64_t end) {
    const qlk_weight &weight = *product.weight;
    const auto *x = Blocks<1>::rows_of(product);
    const Decoder decoder(weight);
    const Table16 levels = load_table(FORMATS[weight.format].value);
    const bool whole_blocks = has_whole_blocks(weight);
    for (; whole_blocks && begin + COUNT <= end; begin += COUNT) {
        float dots[ROWS][COUNT];
        dot_blocks<Blocks<COUNT>>(x, weight, decoder, levels, begin, dots);
        for (int r = 0; r < ROWS; ++r) {
            for (int c = 0; c < COUNT; ++c) store_dot(product, r, begin + c, dots[r][c]);
        }
    }
    for (; begin < end; ++begin) {
        float dots[ROWS][1];
        if (whole_blocks) {
            dot_blocks<Blocks<1>>(x, weight, decoder, levels, begin, dots);
        } else {
            dot_decoded(x, weight, decoder, begin, dots);
        }
        for (int r = 0; r < ROWS; ++r) store_dot(product, r, begin, dots[r][0]);
    }
}

// Rows of the weight beside so many rows of bfloat16: as many as registers hold the sums of.
template <int ROWS>
constexpr int PAIRED_COLUMNS = ROWS <= 6 ? 4 : ROWS <= 8 ? 3 : 2;

using FewRowsFunction = void (*)(const FewRows &, int64_t, int64_t);

template <int... ROWS>
constexpr std::array<FewRowsFunction, sizeof...(ROWS)> float_functions(std::integer_sequence<int, ROWS...>) {
    return {multiply_rows<FloatBlocks, ROWS + 1, COLUMNS>...};
}

template <int... ROWS>
constexpr std::array<FewRowsFunction, sizeof...(ROWS)> pair_functions(std::integer_sequence<int, ROWS...>) {
    return {multiply_rows<PairBlocks, ROWS + 1, PAIRED_COLUMNS<ROWS + 1>>...};
}

inline void multiply_few_rows(const FewRows &product, int64_t begin, int64_t end) {
    if constexpr (HAS_BFLOAT16_UNITS) {
        if (product.x_bfloat16 != nullptr) {
            constexpr auto PAIRS = pair_functions(std::make_integer_sequence<int, MOST_FEW_PAIRED_ROWS>());
            if (are_few(product.rows, true)) return PAIRS[product.rows - 1](product, begin, end);
            return multiply_more_than_few<PairGroup, MOST_FEW_PAIRED_ROWS>(product, begin, end);
        }
    }
    constexpr auto FLOATS = float_functions(std::make_integer_sequence<int, MOST_FEW_ROWS>());
    if constexpr (DIRECT_ROWS > 0) {
        if (!are_few(product.rows, false)) {
            return multiply_more_than_few<FloatGroup, MOST_FEW_ROWS>(product, begin, end);
        }
    }
    FLOATS[product.rows - 1](product, begin, end);
}

}  // namespace qlk::QLK_ISA
