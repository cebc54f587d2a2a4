// The right operand of a matrix product on its way into cache: panels of a few columns, decoded there if it is a
// quantized weight.
#pragma once

#include <cstring>

#include "decode.h"
#include "left_kernels.h"
#include "linear.h"
#include "simd_bfloat16.h"

namespace qlk::QLK_ISA {

constexpr int PANEL_VECTORS = 3;
constexpr int PANEL = PANEL_VECTORS * WIDTH;  // columns
// Rows of a panel: it stays in the first two levels of cache (48 KB with AVX-512) while it is used.
constexpr int64_t PANEL_INNER = 384;
constexpr int64_t PANEL_PAIRS = 2 * PANEL_INNER;  // rows of a panel of bfloat16, which is as large
template <typename Element>
constexpr int WEIGHTS_IN = sizeof(Element) / sizeof(uint16_t);  // a float, or a pair of bfloat16
template <>
inline constexpr int WEIGHTS_IN<float> = 1;
constexpr int64_t CACHE_LINE = 64;      // bytes
constexpr int64_t PREFETCHED_ROWS = 16;  // of an operand of which a few bytes of each row are read
constexpr int64_t RUN = 64;  // elements of a row that are brought into cache at once to be transposed

// Blocks that do not reach across rows, and rows that begin with a byte.
inline bool has_whole_blocks(const qlk_weight &weight) {
    return FORMATS[weight.format].bits == 4 && weight.in_features % weight.block_size == 0;
}

// Code number I of the eight in a word; what lies above it is cut off when it is looked up.
template <int I>
inline Ints code_of(Ints word) {
    constexpr int begin = I / 2 * 8 + (I % 2 == 0 ? 4 : 0);
    return shift_right<begin>(word);
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
        } else if (right_.layout == Layout::dense_transposed && right_.values != nullptr && count % 4 == 0) {
            write_transposed_words(right_.values + column * right_.stride + inner, right_.stride, count, columns, panel);
        } else if (right_.layout == Layout::weight_transposed || right_.layout == Layout::dense_transposed) {
            write_transposed(inner, count, column, columns, panel);
        } else if (right_.layout == Layout::weight && has_whole_blocks_ && columns == PANEL) {
            write_blocks(inner, count, column, panel);
        } else if (right_.layout == Layout::dense && columns == PANEL) {
            if (right_.values != nullptr) {
                copy_rows(right_.values, inner, count, column, panel);
            } else {
                copy_rows(right_.values_bfloat16, inner, count, column, panel);
            }
        } else {
            write_rows(inner, count, column, columns, panel);
        }
    }

    // The same rounded to bfloat16, rows 2 i and 2 i + 1 as pairs: panel[i * PANEL + column]; after an odd row, zeros.
    void write_pairs(int64_t inner, int64_t count, int64_t column, int columns, uint32_t *panel) const {
        for (; count > 0; inner += PANEL_INNER, count -= PANEL_INNER, panel += PANEL_INNER / 2 * PANEL) {
            const int64_t length = count < PANEL_INNER ? count : PANEL_INNER;
            if (right_.layout == Layout::weight_transposed && has_whole_blocks_) {
                write_transposed_blocks(inner, length, column, columns, panel);
            } else if (right_.layout == Layout::weight && has_whole_blocks_ && columns == PANEL) {
                write_block_pairs(inner, length, column, panel);
            } else if (right_.layout == Layout::dense_transposed && has_whole_pairs(length)) {
                const uint16_t *from = right_.values_bfloat16 + column * right_.stride + inner;
                write_transposed_words(from, right_.stride, length / 2, columns, panel);
            } else if (right_.layout == Layout::dense && right_.values_bfloat16 != nullptr && columns == PANEL) {
                pair_dense_rows(inner, length, column, panel);
            } else {
                alignas(64) float floats[(PANEL_INNER + 1) * PANEL];
                write(inner, length, column, columns, floats);
                pair_rows(floats, length, panel);
            }
        }
    }

  private:
    // `count` elements of the right operand as it lies in memory.
    void copy_run(int64_t row, int64_t begin, int64_t count, float *out) const {
        if (right_.weight != nullptr) {
            decoder_.decode(row * right_.weight->in_features + begin, count, out);
        } else if (right_.values_bfloat16 != nullptr) {
            row_to_float(right_.values_bfloat16, QLK_BFLOAT16, row * right_.stride + begin, count, out);
        } else {
            std::memcpy(out, right_.values + row * right_.stride + begin, count * sizeof(float));
        }
    }

    static Floats load_floats(const float *from) { return load(from); }
    static Floats load_floats(const uint16_t *from) { return load_bfloat16(from); }

    template <typename Element>
    void copy_rows(const Element *values, int64_t inner, int64_t count, int64_t column, float *panel) const {
        const Element *row = values + inner * right_.stride + column;
        for (int64_t i = 0; i < count; ++i, row += right_.stride, panel += PANEL) {
#pragma GCC unroll 3
            for (int v = 0; v < PANEL; v += WIDTH) {
                __builtin_prefetch(row + PREFETCHED_ROWS * right_.stride + v);
                store(panel + v, load_floats(row + v));
            }
        }
    }

    // Rows 2 i and 2 i + 1 of bfloat16 as pairs; after an odd one, zeros.
    void pair_dense_rows(int64_t inner, int64_t count, int64_t column, uint32_t *panel) const {
        const uint16_t *row = right_.values_bfloat16 + inner * right_.stride + column;
        for (int64_t i = 0; i < count; i += 2, row += 2 * right_.stride, panel += PANEL) {
            __builtin_prefetch(row + PREFETCHED_ROWS * right_.stride);
            __builtin_prefetch(row + (PREFETCHED_ROWS + 1) * right_.stride);
#pragma GCC unroll 3
            for (int v = 0; v < PANEL; v += WIDTH) {
                const Ints second = i + 1 < count ? as_ints(load_bfloat16(row + right_.stride + v)) : broadcast_int(0);
                const Ints first = shift_right<16>(as_ints(load_bfloat16(row + v)));
                store_ints(reinterpret_cast<int32_t *>(panel + v), bit_xor(first, second));
            }
        }
    }

    // Whether so many elements of a row lie in memory as pairs, in fours.
    bool has_whole_pairs(int64_t count) const { return right_.values_bfloat16 != nullptr && count % 8 == 0; }

    // Of each of the columns, which lie `stride` elements apart, `words` words of 32 bits, a multiple of four: floats,
    // or pairs of bfloat16.
    template <typename Element, typename Word>
    static void write_transposed_words(const Element *from, int64_t stride, int64_t words, int columns, Word *panel) {
        static_assert(sizeof(Word) == sizeof(uint32_t), "a lane is a word");
        const int64_t ahead = PANEL * stride * static_cast<int64_t>(sizeof(Element));
        for (int lanes = 0; lanes < columns; lanes += WIDTH) {
            const uint8_t *rows[WIDTH];  // beyond the last column: that column again
            for (int i = 0; i < WIDTH; ++i) {
                const int64_t row = lanes + i < columns ? lanes + i : columns - 1;
                rows[i] = reinterpret_cast<const uint8_t *>(from + row * stride);
            }
            for (int64_t k = 0; k < words; k += 4) {
                const int64_t offset = k * static_cast<int64_t>(sizeof(Word));
                if (offset % CACHE_LINE == 0) prefetch_next_panel(rows, offset + ahead);
                Ints four[4];
                transpose_words(rows, offset, four);
                for (int j = 0; j < 4; ++j) {
                    store_ints(reinterpret_cast<int32_t *>(panel + (k + j) * PANEL + lanes), four[j]);
                }
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
        for (int lanes = 0; lanes < columns; lanes += WIDTH) {
            for (int64_t begin = 0; begin < count; begin += RUN) {
                const int64_t length = count - begin < RUN ? count - begin : RUN;
                for (int i = 0; i < WIDTH && lanes + i < columns; ++i) {
                    copy_run(column + lanes + i, inner + begin, length, runs[i]);
                }
                for (int64_t k = 0; k < length; k += 4) {
                    Ints words[4];
                    transpose_words(rows, k * static_cast<int64_t>(sizeof(float)), words);
                    for (int64_t j = 0; j < 4 && k + j < length; ++j) {
                        store(panel + (begin + k + j) * PANEL + lanes, as_floats(words[j]));
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

    // Bytes are transposed while they hold two weights each; a word then has eight of its lane's row. Floats or pairs.
    template <typename Element>
    void write_transposed_blocks(int64_t inner, int64_t count, int64_t column, int columns, Element *panel) const {
        if (count == 0) return;
        alignas(64) float scales[PANEL_INNER / 32 + 1][PANEL];
        column_scales(inner, count, column, columns, scales);
        const int64_t row_bytes = right_.weight->in_features / 2;
        for (int lanes = 0; lanes < columns; lanes += WIDTH) {
            const uint8_t *rows[WIDTH];  // beyond the last column: that column again, computed and not stored
            for (int i = 0; i < WIDTH; ++i) {
                const int64_t row = column + (lanes + i < columns ? lanes + i : columns - 1);
                rows[i] = right_.weight->packed + row * row_bytes;
            }
            for (int64_t k = 0; k < count; k += 32) {
                const int64_t block = ((inner + k) >> block_shift_) - (inner >> block_shift_);
                const Floats scale = load(scales[block] + lanes);
                // Each panel reads short runs of far rows, which only the program can foresee.
                if (k % (2 * CACHE_LINE) == 0) prefetch_next_panel(rows, (inner + k) / 2 + PANEL * row_bytes);
                Ints words[4];
                transpose_words(rows, (inner + k) / 2, words);
                for (int j = 0; j < 4; ++j) {
                    write_word(words[j], scale, panel + (k + 8 * j) / WEIGHTS_IN<Element> * PANEL + lanes);
                }
            }
        }
    }

    static void prefetch_next_panel(const uint8_t *const rows[WIDTH], int64_t offset) {
        for (int i = 0; i < WIDTH; ++i) __builtin_prefetch(rows[i] + offset);
    }

    void write_word(Ints word, Floats scale, float *out) const {
        const auto put = [&](int i, Ints codes) { store(out + i * PANEL, mul(lookup(levels_, codes), scale)); };
        put(0, code_of<0>(word));
        put(1, code_of<1>(word));
        put(2, code_of<2>(word));
        put(3, code_of<3>(word));
        put(4, code_of<4>(word));
        put(5, code_of<5>(word));
        put(6, code_of<6>(word));
        put(7, code_of<7>(word));
    }

    void write_word(Ints word, Floats scale, uint32_t *out) const {
        const auto weight = [&](Ints codes) { return mul(lookup(levels_, codes), scale); };
        const auto put = [&](int i, Ints first, Ints second) {
            store_pairs(out + i * PANEL, pair_up(weight(first), weight(second)));
        };
        put(0, code_of<0>(word), code_of<1>(word));
        put(1, code_of<2>(word), code_of<3>(word));
        put(2, code_of<4>(word), code_of<5>(word));
        put(3, code_of<6>(word), code_of<7>(word));
    }

    // The scales of a panel's vectors in `count` rows of the weight: element i * stride of scales[v] is that of row i.
    // A vector never meets two blocks.
    struct VectorScales {
        const float *scales[PANEL_VECTORS];
        int64_t stride;
        alignas(64) float decoded[PANEL / 32 + 2][PANEL_INNER];  // of absmax that is itself quantized
    };

    void find_scales(int64_t inner, int64_t count, int64_t column, VectorScales &found) const {
        const int64_t blocks_per_row = right_.weight->in_features >> block_shift_;
        const bool nested = right_.weight->nested_absmax != nullptr;
        found.stride = nested ? 1 : blocks_per_row;
        int64_t before = -1;
        for (int v = 0, blocks = 0; v < PANEL_VECTORS; ++v) {
            const int64_t block = (column + v * WIDTH) >> block_shift_;
            if (block == before) {
                found.scales[v] = found.scales[v - 1];
            } else if (nested) {
                float *decoded = found.decoded[blocks++];
                for (int64_t i = 0; i < count; ++i) decoded[i] = decoder_.absmax((inner + i) * blocks_per_row + block);
                found.scales[v] = decoded;
            } else {
                found.scales[v] = static_cast<const float *>(right_.weight->absmax) + inner * blocks_per_row + block;
            }
            before = block;
        }
    }

    void write_blocks(int64_t inner, int64_t count, int64_t column, float *panel) const {
        VectorScales scales;
        find_scales(inner, count, column, scales);
        const int64_t row_bytes = right_.weight->in_features / 2, stride = scales.stride;
        const Table16 levels = levels_;  // a copy that stores to the panel cannot change
        const uint8_t *packed = right_.weight->packed + inner * row_bytes + column / 2;
        for (int64_t i = 0; i < count; ++i, packed += row_bytes, panel += PANEL) {
            __builtin_prefetch(packed + PREFETCHED_ROWS * row_bytes);
#pragma GCC unroll 3
            for (int v = 0; v < PANEL_VECTORS; ++v) {
                const Table16 scaled = scale_table(levels, scales.scales[v][i * stride]);
                store(panel + v * WIDTH, lookup(scaled, load_codes(packed + v * WIDTH / 2)));
            }
        }
    }

    void write_block_pairs(int64_t inner, int64_t count, int64_t column, uint32_t *panel) const {
        VectorScales scales;
        find_scales(inner, count, column, scales);
        const int64_t row_bytes = right_.weight->in_features / 2, stride = scales.stride;
        const Table16 levels = levels_;
        const uint8_t *packed = right_.weight->packed + inner * row_bytes + column / 2;
        const auto row = [&](int64_t i, int v) {
            const Table16 scaled = scale_table(levels, scales.scales[v][i * stride]);
            return lookup(scaled, load_codes(packed + i * row_bytes + v * WIDTH / 2));
        };
        for (int64_t i = 0; i < count; i += 2, panel += PANEL) {
            __builtin_prefetch(packed + (i + PREFETCHED_ROWS) * row_bytes);
            __builtin_prefetch(packed + (i + 1 + PREFETCHED_ROWS) * row_bytes);
#pragma GCC unroll 3
            for (int v = 0; v < PANEL_VECTORS; ++v) {
                store_pairs(panel + v * WIDTH, pair_up(row(i, v), i + 1 < count ? row(i + 1, v) : broadcast(0.0f)));
            }
        }
    }

    // floats[count][PANEL] as pairs of rows; there is room for one row more.
    static void pair_rows(float *floats, int64_t count, uint32_t *panel) {
        for (int v = 0; v < PANEL; v += WIDTH) store(floats + count * PANEL + v, broadcast(0.0f));
        for (int64_t i = 0; i < count; i += 2, floats += 2 * PANEL, panel += PANEL) {
            for (int v = 0; v < PANEL; v += WIDTH) {
                store_pairs(panel + v, pair_up(load(floats + v), load(floats + PANEL + v)));
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
