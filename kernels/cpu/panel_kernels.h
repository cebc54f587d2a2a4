// Operands of a matrix product on their way into cache: the left one as floats, the right one as panels of a few
// columns, decoded there if it is a quantized weight.
#pragma once

#include <cstring>

#include "decode.h"
#include "linear.h"
#include "qlk/dropout.h"
#include "qlk/float16.h"

namespace qlk::QLK_ISA {

constexpr int PANEL_VECTORS = 3;
constexpr int PANEL = PANEL_VECTORS * WIDTH;  // columns
// Rows of a panel: it stays in the first two levels of cache (48 KB with AVX-512) while it is used.
constexpr int64_t PANEL_INNER = 256;
constexpr int64_t CACHE_LINE = 64;      // bytes
constexpr int64_t PREFETCHED_ROWS = 16;  // of an operand of which a few bytes of each row are read
constexpr int64_t RUN = 64;  // elements of a row that are brought into cache at once to be transposed

inline Ints dropout_draws(DropoutKey key, uint32_t index_low) {
    const auto constant = [](uint32_t x) { return broadcast_int(static_cast<int32_t>(x)); };
    Ints x = bit_xor(add(constant(index_low), lane_numbers()), constant(key.before));
    x = bit_xor(x, shift_right<16>(x));
    x = mul_low(x, constant(DROPOUT_FIRST_FACTOR));
    x = bit_xor(x, shift_right<15>(x));
    x = mul_low(add(x, constant(key.between)), constant(DROPOUT_SECOND_FACTOR));
    return shift_right<8>(bit_xor(x, shift_right<16>(x)));
}

// Drop from, and scale, `count` values of which the first is element number `index`.
inline void drop(float *values, int64_t count, uint64_t index, const Dropout &dropout) {
    const Ints below_threshold = broadcast_int(static_cast<int32_t>(dropout_threshold(dropout.share)) - 1);
    const Floats scale = broadcast(dropout_scale(dropout.share)), zero = broadcast(0.0f);
    while (count > 0) {
        const int64_t until_carry = (int64_t{1} << 32) - static_cast<uint32_t>(index);
        const int64_t segment = count < until_carry ? count : until_carry;
        const DropoutKey key = dropout_key(dropout.seed, static_cast<uint32_t>(index >> 32));
        for (int64_t i = 0; i < segment; i += WIDTH) {
            const int lanes = segment - i < WIDTH ? static_cast<int>(segment - i) : WIDTH;
            const Mask keep = greater(dropout_draws(key, static_cast<uint32_t>(index + i)), below_threshold);
            store_first(values + i, select(keep, mul(load_first(values + i, lanes), scale), zero), lanes);
        }
        values += segment;
        index += segment;
        count -= segment;
    }
}

inline void row_to_float(const void *in, int dtype, int64_t begin, int64_t count, float *out) {
    if (dtype == QLK_FLOAT32) {
        std::memcpy(out, static_cast<const float *>(in) + begin, count * sizeof(float));
        return;
    }
    const uint16_t *halves = static_cast<const uint16_t *>(in) + begin;
    int64_t i = 0;
    for (; i + WIDTH <= count; i += WIDTH) store(out + i, load_bfloat16(halves + i));
    for (; i < count; ++i) out[i] = bfloat16_to_float(halves[i]);
}

inline void rows_to_float(const void *in, int dtype, int64_t first_row, int64_t rows, int64_t columns, Dropout dropout,
                          float *out, int64_t stride) {
    for (int64_t row = 0; row < rows; ++row, out += stride) {
        row_to_float(in, dtype, row * columns, columns, out);
        if (dropout.share > 0) drop(out, columns, static_cast<uint64_t>((first_row + row) * columns), dropout);
        for (int64_t column = columns; column < stride; ++column) out[column] = 0.0f;
    }
}

// Blocks that do not reach across rows, and rows that begin with a byte.
inline bool has_whole_blocks(const qlk_weight &weight) {
    return FORMATS[weight.format].bits == 4 && weight.in_features % weight.block_size == 0;
}

// Writes panels of one right operand: panel[inner * PANEL + column].
class PanelWriter {
  public:
    explicit PanelWriter(const Right &right)
        : right_(right), decoder_(right.weight != nullptr ? *right.weight : NO_WEIGHT) {
        if (right.weight == nullptr) return;
        has_whole_blocks_ = has_whole_blocks(*right.weight);
        levels_ = load_table(FORMATS[right.weight->format].value);
        block_shift_ = __builtin_ctzll(static_cast<unsigned long long>(right.weight->block_size));
    }

    // Rows [inner, inner + count) and columns [column, column + columns), at most PANEL.
    void write(int64_t inner, int64_t count, int64_t column, int columns, float *panel) const {
        if (right_.layout == Layout::weight_transposed && has_whole_blocks_) {
            write_transposed_blocks(inner, count, column, columns, panel);
        } else if (right_.layout == Layout::weight_transposed || right_.layout == Layout::dense_transposed) {
            write_transposed(inner, count, column, columns, panel);
        } else if (right_.layout == Layout::weight && has_whole_blocks_ && columns == PANEL) {
            write_blocks(inner, count, column, panel);
        } else if (right_.layout == Layout::dense && columns == PANEL) {
            copy_rows(inner, count, column, panel);
        } else {
            write_rows(inner, count, column, columns, panel);
        }
    }

  private:
    // `count` elements of the right operand as it lies in memory.
    void copy_run(int64_t row, int64_t begin, int64_t count, float *out) const {
        if (right_.weight != nullptr) {
            decoder_.decode(row * right_.weight->in_features + begin, count, out);
        } else {
            std::memcpy(out, right_.values + row * right_.stride + begin, count * sizeof(float));
        }
    }

    void copy_rows(int64_t inner, int64_t count, int64_t column, float *panel) const {
        const float *row = right_.values + inner * right_.stride + column;
        for (int64_t i = 0; i < count; ++i, row += right_.stride, panel += PANEL) {
#pragma GCC unroll 3
            for (int v = 0; v < PANEL; v += WIDTH) {
                __builtin_prefetch(row + PREFETCHED_ROWS * right_.stride + v);
                store(panel + v, load(row + v));
            }
        }
    }

    void write_rows(int64_t inner, int64_t count, int64_t column, int columns, float *panel) const {
        for (int64_t i = 0; i < count; ++i, panel += PANEL) {
            copy_run(inner + i, column, columns, panel);
            for (int j = columns; j < PANEL; ++j) panel[j] = 0.0f;
        }
    }

    void write_transposed(int64_t inner, int64_t count, int64_t column, int columns, float *panel) const {
        alignas(64) float runs[WIDTH][RUN] = {};
        const uint8_t *rows[WIDTH];
        for (int i = 0; i < WIDTH; ++i) rows[i] = reinterpret_cast<const uint8_t *>(runs[i]);
        for (int half = 0; half < columns; half += WIDTH) {
            for (int64_t begin = 0; begin < count; begin += RUN) {
                const int64_t length = count - begin < RUN ? count - begin : RUN;
                for (int i = 0; i < WIDTH && half + i < columns; ++i) {
                    copy_run(column + half + i, inner + begin, length, runs[i]);
                }
                for (int64_t k = 0; k < length; k += 4) {
                    Ints words[4];
                    transpose_words(rows, k * static_cast<int64_t>(sizeof(float)), words);
                    for (int64_t j = 0; j < 4 && k + j < length; ++j) {
                        store(panel + (begin + k + j) * PANEL + half, as_floats(words[j]));
                    }
                }
            }
        }
    }

    // Of each column (a row of the weight) and each block that the panel meets: scales[block][column].
    void column_scales(int64_t inner, int64_t count, int64_t column, int columns, float (*scales)[PANEL]) const {
        const int64_t blocks_per_row = right_.weight->in_features >> block_shift_;
        const int64_t first = inner >> block_shift_, last = (inner + count - 1) >> block_shift_;
        for (int j = 0; j < PANEL; ++j) {
            const int64_t row = column + (j < columns ? j : columns - 1);
            for (int64_t block = first; block <= last; ++block) {
                scales[block - first][j] = decoder_.absmax(row * blocks_per_row + block);
            }
        }
    }

    // Bytes are transposed while they hold two weights each; a word then has eight of its lane's row.
    void write_transposed_blocks(int64_t inner, int64_t count, int64_t column, int columns, float *panel) const {
        if (count == 0) return;
        alignas(64) float scales[PANEL_INNER / 32 + 1][PANEL];
        column_scales(inner, count, column, columns, scales);
        const int64_t row_bytes = right_.weight->in_features / 2;
        for (int half = 0; half < columns; half += WIDTH) {
            const uint8_t *rows[WIDTH];  // beyond the last column: that column again, computed and not stored
            for (int i = 0; i < WIDTH; ++i) {
                const int64_t row = column + (half + i < columns ? half + i : columns - 1);
                rows[i] = right_.weight->packed + row * row_bytes;
            }
            for (int64_t k = 0; k < count; k += 32) {
                const int64_t block = ((inner + k) >> block_shift_) - (inner >> block_shift_);
                const Floats scale = load(scales[block] + half);
                // Each panel reads short runs of far rows, which only the program can foresee.
                if (k % (2 * CACHE_LINE) == 0) prefetch_next_panel(rows, (inner + k) / 2 + PANEL * row_bytes);
                Ints words[4];
                transpose_words(rows, (inner + k) / 2, words);
                for (int j = 0; j < 4; ++j) write_word(words[j], scale, panel + (k + 8 * j) * PANEL + half);
            }
        }
    }

    static void prefetch_next_panel(const uint8_t *const rows[WIDTH], int64_t offset) {
        for (int i = 0; i < WIDTH; ++i) __builtin_prefetch(rows[i] + offset);
    }

    void write_word(Ints word, Floats scale, float *out) const {
        const auto put = [&](int i, Ints codes) { store(out + i * PANEL, mul(lookup(levels_, codes), scale)); };
        put(0, shift_right<4>(word));
        put(1, word);
        put(2, shift_right<12>(word));
        put(3, shift_right<8>(word));
        put(4, shift_right<20>(word));
        put(5, shift_right<16>(word));
        put(6, shift_right<28>(word));
        put(7, shift_right<24>(word));
    }

    // Vector by vector, as one never meets two blocks.
    void write_blocks(int64_t inner, int64_t count, int64_t column, float *panel) const {
        alignas(64) float decoded[PANEL / 32 + 2][PANEL_INNER];
        const qlk_weight &weight = *right_.weight;
        const int64_t blocks_per_row = weight.in_features >> block_shift_, row_bytes = weight.in_features / 2;
        const bool nested = weight.nested_absmax != nullptr;
        const int64_t scale_stride = nested ? 1 : blocks_per_row;
        const float *scales[PANEL_VECTORS];
        int64_t before = -1;
        for (int v = 0, blocks = 0; v < PANEL_VECTORS; ++v) {
            const int64_t block = (column + v * WIDTH) >> block_shift_;
            if (block == before) {
                scales[v] = scales[v - 1];
            } else if (nested) {
                float *row = decoded[blocks++];
                for (int64_t i = 0; i < count; ++i) row[i] = decoder_.absmax((inner + i) * blocks_per_row + block);
                scales[v] = row;
            } else {
                scales[v] = static_cast<const float *>(weight.absmax) + inner * blocks_per_row + block;
            }
            before = block;
        }
        const Table16 levels = levels_;
        const uint8_t *packed = weight.packed + inner * row_bytes + column / 2;
        for (int64_t i = 0; i < count; ++i, packed += row_bytes, panel += PANEL) {
            __builtin_prefetch(packed + PREFETCHED_ROWS * row_bytes);
#pragma GCC unroll 3
            for (int v = 0; v < PANEL_VECTORS; ++v) {
                const Table16 scaled = scale_table(levels, scales[v][i * scale_stride]);
                store(panel + v * WIDTH, lookup(scaled, load_codes(packed + v * WIDTH / 2)));
            }
        }
    }

    static constexpr qlk_weight NO_WEIGHT = {nullptr, nullptr, nullptr, nullptr, 0, 0, 32, 32, 0};

    const Right &right_;
    Decoder decoder_;
    bool has_whole_blocks_ = false;
    Table16 levels_ = {};
    int block_shift_ = 0;
};

}  // namespace qlk::QLK_ISA
