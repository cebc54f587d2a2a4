// Products of some rows of x: too many for dot products (few_rows_kernels.h), too few to make up for writing weights to
// panels (gemm_kernels.h). A lane is a column of the output; a vector of weights is decoded in registers, and while it
// meets all rows of x there, one broadcast element at a time, the next one is decoded.
#pragma once

#include <array>
#include <utility>

#include "gemm_kernels.h"

namespace qlk::QLK_ISA {

// Rows whose sums fit in registers beside what decodes a weight; so many floats are worth two passes (at 32 rows of
// bfloat16, which multiply twice as fast, panels are as fast). Other instruction sets have too few registers.
#if defined(QLK_ISA_AVX512)
constexpr int64_t DIRECT_ROWS = 24, MOST_DIRECT_FLOAT_ROWS = 40;
#else
constexpr int64_t DIRECT_ROWS = 0, MOST_DIRECT_FLOAT_ROWS = 0;
#endif
// Rows are filled up with zeros to a multiple of this: a function for each number of them would double the time that a
// compiler takes for the library.
constexpr int64_t DIRECT_STEP = FILLED_UP_ROWS;
constexpr int64_t direct_width(int64_t rows) { return (rows + DIRECT_STEP - 1) / DIRECT_STEP * DIRECT_STEP; }
constexpr int64_t DIRECT_GROUP = 32;   // weights of a column that are transposed at once
constexpr int64_t DIRECT_BLOCKS = 64;  // of a column, whose absmax are decoded before them

// DIRECT_GROUP weights of each of WIDTH columns: vector I is of the I-th of them.
class FloatGroup {
  public:
    using Element = float;
    using Vector = Floats;
    static constexpr int VECTORS = DIRECT_GROUP;

    static const Element *rows_of(const FewRows &product) { return product.x; }

    FloatGroup(const Table16 &levels, const uint8_t *const rows[WIDTH], int64_t offset, const float *scales)
        : levels_(levels), scale_(load(scales)) {
        transpose_words(rows, offset, words_);
    }

    template <int I>
    Vector weights() const {
        return mul(lookup(levels_, code_of<I % 8>(words_[I / 8])), scale_);
    }

    static Floats add(Floats sum, const float *x, Vector weights) { return fma(broadcast(*x), weights, sum); }

    // As vectors meet them: all rows of an element of x, then of the next one.
    static void lay_out(const float *x, int64_t stride, int64_t rows, int64_t columns, float *out) {
        const int64_t width = direct_width(rows);
        for (int64_t begin = 0; begin < columns; begin += DIRECT_GROUP, out += width * DIRECT_GROUP) {
            for (int64_t row = 0; row < width; ++row) {
                const float *from = x + row * stride + begin;
                for (int64_t i = 0; i < DIRECT_GROUP; ++i) out[i * width + row] = row < rows ? from[i] : 0.0f;
            }
        }
    }

  private:
    const Table16 levels_;
    const Floats scale_;
    Ints words_[4];
};

// The same of bfloat16: a lane of vector I has the weights number I and I + 8 of the first 16, then of the others. Two
// lanes hold the codes of a column, so that what is rounded is in pairs already.
class PairGroup {
  public:
    using Element = uint16_t;
    using Vector = Pairs;
    static constexpr int VECTORS = DIRECT_GROUP / 2, APART = 8;

    static const Element *rows_of(const FewRows &product) { return product.x_bfloat16; }

    PairGroup(const Table16 &levels, const uint8_t *const rows[WIDTH], int64_t offset, const float *scales)
        : levels_(levels), scales_{repeat_low(load(scales)), repeat_high(load(scales))} {
        transpose_double_words(rows, offset, words_);
    }

    template <int I>
    Vector weights() const {
        const Ints *words = words_ + I / APART * 2;
        return round_pairs(mul(lookup(levels_, code_of<I % APART>(words[0])), scales_[0]),
                           mul(lookup(levels_, code_of<I % APART>(words[1])), scales_[1]));
    }

    static Floats add(Floats sum, const uint16_t *x, Vector weights) {
        return add_products(sum, broadcast_pair(x), weights);
    }

    static void lay_out(const uint16_t *x, int64_t stride, int64_t rows, int64_t columns, uint16_t *out) {
        const int64_t width = direct_width(rows);
        for (int64_t begin = 0; begin < columns; begin += 2 * APART, out += width * 2 * APART) {
            for (int64_t row = 0; row < width; ++row) {
                const uint16_t *from = x + row * stride + begin;
                for (int64_t i = 0; i < APART; ++i) {
                    uint16_t *pair = out + (i * width + row) * 2;
                    pair[0] = row < rows ? from[i] : 0;
                    pair[1] = row < rows ? from[i + APART] : 0;
                }
            }
        }
    }

  private:
    const Table16 levels_;
    const Floats scales_[2];
    Ints words_[4];
};

// Adds what vectors number I and on give; `weights` is number I.
template <typename Group, int I, int ROWS>
inline __attribute__((always_inline)) void add_vectors(const Group &group, typename Group::Vector weights,
                                                       const typename Group::Element *x, Floats (&sums)[ROWS][1]) {
    constexpr int elements = DIRECT_GROUP / Group::VECTORS;
    typename Group::Vector next = weights;
    if constexpr (I + 1 < Group::VECTORS) next = group.template weights<I + 1>();
#pragma GCC unroll 24
    for (int i = 0; i < ROWS; ++i) sums[i][0] = Group::add(sums[i][0], x + i * elements, weights);
    if constexpr (I + 1 < Group::VECTORS) add_vectors<Group, I + 1>(group, next, x + ROWS * elements, sums);
}

// WIDTH columns of the output, rows of the weight; beyond the last column: that column again. What does not depend on
// the number of rows of x stays out of the functions that there are one of for each.
struct DirectColumns {
    const uint8_t *packed[WIDTH];
    int64_t row[WIDTH];

    __attribute__((noinline)) DirectColumns(const qlk_weight &weight, int64_t column, int columns) {
        for (int i = 0; i < WIDTH; ++i) {
            row[i] = column + (i < columns ? i : columns - 1);
            packed[i] = weight.packed + row[i] * (weight.in_features / 2);
        }
    }

    void prefetch(int64_t offset) const {
        for (const uint8_t *row : packed) __builtin_prefetch(row + offset);
    }

    // scales[block][lane] of `count` blocks of the `blocks` of a row.
    __attribute__((noinline)) void find_scales(const Decoder &decoder, int64_t blocks, int64_t begin, int64_t count,
                                               float (*scales)[WIDTH]) const {
        for (int i = 0; i < WIDTH; ++i) {
            float room[DIRECT_BLOCKS];
            const float *absmax = decoder.absmaxes(row[i] * blocks + begin, count, room);
            for (int64_t block = 0; block < count; ++block) scales[block][i] = absmax[block];
        }
    }
};

// What the weight adds to the sums.
template <typename Group, int ROWS>
inline __attribute__((always_inline)) void add_weight(const FewRows &product, const Decoder &decoder,
                                                      const Table16 &levels, const DirectColumns &columns,
                                                      Floats (&sums)[ROWS][1]) {
    const qlk_weight &weight = *product.weight;
    const int64_t blocks = weight.in_features / weight.block_size;
    const auto *x = Group::rows_of(product);
    for (int64_t begin = 0; begin < blocks; begin += DIRECT_BLOCKS) {
        const int64_t count = blocks - begin < DIRECT_BLOCKS ? blocks - begin : DIRECT_BLOCKS;
        alignas(64) float scales[DIRECT_BLOCKS][WIDTH];
        columns.find_scales(decoder, blocks, begin, count, scales);
        for (int64_t block = 0; block < count; ++block) {
            const int64_t first = (begin + block) * weight.block_size;
            for (int64_t k = first; k < first + weight.block_size; k += DIRECT_GROUP, x += ROWS * DIRECT_GROUP) {
                if (k % (2 * CACHE_LINE) == 0) columns.prefetch(k / 2 + CACHE_LINE);
                const Group group(levels, columns.packed, k / 2, scales[block]);
                add_vectors<Group, 0>(group, group.template weights<0>(), x, sums);
            }
        }
    }
}

__attribute__((noinline)) inline void write_adapter_panel(const qlk_adapter &adapter, int64_t begin, int64_t count,
                                                          int64_t column, int columns, float *panel) {
    const Right lora_B = {Layout::dense_transposed, adapter.lora_B, adapter.rank, nullptr};
    PanelWriter(lora_B).write(begin, count, column, columns, panel);
}

// What the adapter adds to them; of rows that are not there, anything.
template <int ROWS>
inline __attribute__((always_inline)) void add_adapter(const FewRows &product, int64_t column, int columns,
                                                       Floats (&sums)[ROWS][1]) {
    const int64_t rank = product.adapter->rank;
    alignas(64) float panel[JOINED_INNER * PANEL];
    for (int64_t begin = 0; begin < rank; begin += JOINED_INNER) {
        const int64_t count = rank - begin < JOINED_INNER ? rank - begin : JOINED_INNER;
        write_adapter_panel(*product.adapter, begin, count, column, columns, panel);
        add_floats<ROWS, 1>(sums, {count, product.scaled_low + begin, rank, panel});
    }
}

template <typename Group, int ROWS>
void multiply_directly(const FewRows &product, int64_t begin, int64_t end) {
    const int64_t stride = product.weight->out_features;
    const Decoder decoder(*product.weight);
    const Table16 levels = load_table(FORMATS[product.weight->format].value);
    const bool narrow = product.dtype != QLK_FLOAT32;
    for (int64_t column = begin; column < end; column += WIDTH) {
        const int columns = end - column < WIDTH ? static_cast<int>(end - column) : WIDTH;
        Floats sums[ROWS][1];
        for (auto &sum : sums) sum[0] = broadcast(0.0f);
        if (product.scaled_low != nullptr) add_adapter(product, column, columns, sums);
        add_weight<Group>(product, decoder, levels, DirectColumns(*product.weight, column, columns), sums);
        const float *bias = product.bias != nullptr ? product.bias + column : nullptr;
        void *out = narrow ? static_cast<void *>(static_cast<uint16_t *>(product.out) + column)
                           : static_cast<float *>(product.out) + column;
        const TileOut to = {nullptr, 0, bias, out, stride, narrow, columns};
        finish_tile<ROWS, 1, false>(sums, to, static_cast<int>(product.rows));
    }
}

using DirectFunction = void (*)(const FewRows &, int64_t, int64_t);

// For FIRST rows, and each step more.
template <typename Group, int FIRST, int... STEPS>
constexpr std::array<DirectFunction, sizeof...(STEPS)> direct_functions(std::integer_sequence<int, STEPS...>) {
    return {multiply_directly<Group, FIRST + STEPS * DIRECT_STEP>...};
}

template <typename Group, int64_t FEW>
void multiply_more_than_few(const FewRows &product, int64_t begin, int64_t end) {
    constexpr int FIRST = direct_width(FEW + 1), COUNT = (DIRECT_ROWS - FIRST) / DIRECT_STEP + 1;
    constexpr auto FUNCTIONS = direct_functions<Group, FIRST>(std::make_integer_sequence<int, COUNT>());
    FUNCTIONS[(direct_width(product.rows) - FIRST) / DIRECT_STEP](product, begin, end);
}

}  // namespace qlk::QLK_ISA
