// What the entries of the matrix products share: workspace, and how one product is split over threads.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "checks.h"
#include "linear.h"
#include "parallel.h"

namespace qlk {

// Rectangles for each thread, where there are panels enough: the work then levels out between threads.
constexpr int64_t RECTANGLES_PER_THREAD = 1;
// Rows that pass through the workspace together.
constexpr int64_t ROWS_AT_ONCE = 1024;
constexpr int64_t CACHE_LINE_FLOATS = 16;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }

inline int64_t bytes_of(int dtype) { return dtype == QLK_FLOAT32 ? sizeof(float) : sizeof(uint16_t); }

inline const void *row_of(const void *matrix, int dtype, int64_t row, int64_t columns) {
    return static_cast<const char *>(matrix) + row * columns * bytes_of(dtype);
}
inline void *row_of(void *matrix, int dtype, int64_t row, int64_t columns) {
    return static_cast<char *>(matrix) + row * columns * bytes_of(dtype);
}

// Floats that begin on a cache line; null where there is no memory.
class Buffer {
  public:
    Buffer() = default;
    Buffer(const Buffer &) = delete;
    Buffer &operator=(const Buffer &) = delete;
    ~Buffer() { std::free(memory_); }

    bool allocate(int64_t count) {
        if (count < 0 || count > LARGEST_NUMEL) return false;
        // Not aligned_alloc, which takes five times as long for small ones: it does not reuse what was just freed.
        memory_ = std::malloc(static_cast<size_t>(round_up(count, CACHE_LINE_FLOATS)) * sizeof(float) + LINE - 1);
        const auto end_of_line = reinterpret_cast<uintptr_t>(memory_) + LINE - 1;
        floats_ = memory_ == nullptr ? nullptr : reinterpret_cast<float *>(end_of_line / LINE * LINE);
        return floats_ != nullptr;
    }
    float *get() const { return floats_; }

  private:
    static constexpr uintptr_t LINE = CACHE_LINE_FLOATS * sizeof(float);

    void *memory_ = nullptr;
    float *floats_ = nullptr;
};

// Rows this many floats apart, or a multiple of it, fall on one or two of the places where a line may be in a cache.
constexpr int64_t CROWDED_STRIDE = 1024;

// How far apart rows lie in the workspace: not so that the rows of a tile meet in the same few sets of a cache.
inline int64_t stride_of(int64_t columns) {
    const int64_t lines = larger(ceil_div(columns, CACHE_LINE_FLOATS), 1);
    return (lines % 2 == 0 ? lines + 1 : lines) * CACHE_LINE_FLOATS;
}

inline bool is_dtype(int dtype) { return dtype == QLK_FLOAT32 || dtype == QLK_BFLOAT16; }

// Whether a matrix of a rows and b columns can be.
inline bool product_fits(int64_t a, int64_t b) {
    int64_t product;
    return a >= 0 && b >= 0 && !__builtin_mul_overflow(a, b, &product) && is_size(product);
}

constexpr Dropout NO_DROPOUT = {0.0f, 0};

struct Split {
    int64_t rows, panels, row_count, column_count;

    // Rectangles are as equal as whole panels allow, so that threads have equally much to do.
    Rectangle rectangle(int64_t number, int64_t panel_columns, int64_t columns) const {
        const int64_t row = number / column_count, column = number % column_count;
        return {rows * row / row_count, rows * (row + 1) / row_count, panels * column / column_count * panel_columns,
                smaller(panels * (column + 1) / column_count * panel_columns, columns)};
    }
};

// How a product is cut into rectangles. Results do not depend on it: every element of the output is summed in the same
// order in whatever rectangle it lies.
inline Split split_of(int64_t rows, int64_t columns, const LinearKernels &kernels, int threads) {
    const int64_t panels = ceil_div(columns, kernels.panel_columns);
    const int64_t wanted = threads > 1 ? threads * RECTANGLES_PER_THREAD : 1;
    const int64_t column_count = round_up(larger(ceil_div(panels, kernels.rectangle_panels), wanted), threads);
    Split split = {rows, panels, 0, smaller(column_count, panels)};
    // Where columns are too few for the threads, rows are split too, though each part then decodes the same weights.
    const int64_t for_threads = ceil_div(smaller(threads, rows), larger(split.column_count, 1));
    split.row_count = larger(ceil_div(rows, kernels.rectangle_rows), for_threads);
    return split;
}

// Multiply-adds of a product below which another thread costs more than it saves: a microsecond's.
constexpr double LEAST_SHARED = 65536;

// One call of an entry: the kernels and threads it uses.
struct Call {
    const LinearKernels &kernels;
    int threads;

    // Of a rectangle of an output of so many rows and columns.
    int64_t sums_of_part(int64_t rows, int64_t columns) const {
        const int64_t panels = smaller(kernels.rectangle_panels, ceil_div(columns, kernels.panel_columns));
        return smaller(kernels.rectangle_rows, rows) * panels * kernels.panel_columns;
    }
    int64_t sums_floats(int64_t rows, int64_t columns) const { return threads * sums_of_part(rows, columns); }

    // `sums`: sums_floats() of at least as many rows, for products that are not float or whose inner dimension is long.
    void multiply(const Product &product, float *sums) const {
        double multiply_adds = 0;
        for (int term = 0; term < product.term_count; ++term) {
            multiply_adds += static_cast<double>(product.rows * product.columns) * product.terms[term].inner;
        }
        const int shared_by = multiply_adds < LEAST_SHARED ? 1 : threads;
        const Split split = split_of(product.rows, product.columns, kernels, shared_by);
        const int64_t of_part = sums == nullptr ? 0 : sums_of_part(product.rows, product.columns);
        parallel_tasks(split.row_count * split.column_count, shared_by, [&](int64_t task, int worker) {
            const Rectangle part = split.rectangle(task, kernels.panel_columns, product.columns);
            kernels.multiply(product, part, sums == nullptr ? nullptr : sums + worker * of_part);
        });
    }

    void rows_to_float(const void *in, int dtype, int64_t first_row, int64_t rows, int64_t columns, Dropout dropout,
                       float *out, int64_t stride) const {
        parallel_for(rows, 16, threads, [&](int64_t begin, int64_t end) {
            kernels.rows_to_float(row_of(in, dtype, begin, columns), dtype, first_row + begin, end - begin, columns,
                                  dropout, out + begin * stride, stride);
        });
    }
};

// Rows of a matrix as floats: the caller's own where they will do, otherwise copied into the workspace.
class LeftRows {
  public:
    LeftRows(const void *values, int dtype, int64_t columns, Dropout dropout)
        : values_(values), dtype_(dtype), columns_(columns), dropout_(dropout), stride_(stride_of(columns)) {}

    bool allocate(int64_t rows) {
        direct_ = dtype_ == QLK_FLOAT32 && !(dropout_.share > 0) && columns_ % CROWDED_STRIDE != 0;
        return direct_ || buffer_.allocate(rows * stride_);
    }
    void load(const Call &call, int64_t first_row, int64_t rows) {
        const void *from = row_of(values_, dtype_, first_row, columns_);
        if (direct_) {
            loaded_ = static_cast<const float *>(from);
        } else {
            call.rows_to_float(from, dtype_, first_row, rows, columns_, dropout_, buffer_.get(), stride_);
            loaded_ = buffer_.get();
        }
    }
    const float *get() const { return loaded_; }
    int64_t stride() const { return direct_ ? columns_ : stride_; }

  private:
    const void *values_;
    int dtype_;
    int64_t columns_;
    Dropout dropout_;
    int64_t stride_;
    bool direct_ = false;
    Buffer buffer_;
    const float *loaded_ = nullptr;
};

// Rows of bfloat16 that are multiplied in pairs: the caller's own where they will do, otherwise copied into the
// workspace, not crowded and ending in zeros.
class LeftBfloat16 {
  public:
    LeftBfloat16(const void *values, int64_t columns)
        : values_(static_cast<const uint16_t *>(values)),
          columns_(columns),
          direct_(columns % 2 == 0 && columns / 2 % CROWDED_STRIDE != 0),
          stride_(direct_ ? columns : 2 * stride_of(ceil_div(columns, 2))) {}

    bool allocate(int64_t rows) { return direct_ || buffer_.allocate(rows * stride_ / 2); }
    void load(const Call &call, int64_t first_row, int64_t rows) {
        loaded_ = direct_ ? values_ + first_row * columns_ : reinterpret_cast<const uint16_t *>(buffer_.get());
        if (direct_) return;
        uint16_t *copies = reinterpret_cast<uint16_t *>(buffer_.get());
        parallel_for(rows, 16, call.threads, [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row) {
                uint16_t *to = copies + row * stride_;
                if (columns_ > 0) std::memcpy(to, values_ + (first_row + row) * columns_, columns_ * sizeof(uint16_t));
                std::memset(to + columns_, 0, (stride_ - columns_) * sizeof(uint16_t));
            }
        });
    }
    const uint16_t *get() const { return loaded_; }
    int64_t stride() const { return stride_; }

  private:
    const uint16_t *values_;
    int64_t columns_;
    bool direct_;
    int64_t stride_;
    Buffer buffer_;
    const uint16_t *loaded_ = nullptr;
};

// A dense matrix of either type as a right operand.
inline Right right_of(Layout layout, const void *values, int dtype, int64_t stride) {
    if (dtype == QLK_FLOAT32) return {layout, static_cast<const float *>(values), stride, nullptr};
    return {layout, nullptr, stride, nullptr, static_cast<const uint16_t *>(values)};
}

// out (rows, columns) = one term, or added to what is there.
inline Product product_of(const Term &term, int64_t rows, int64_t columns, void *out, int dtype, bool accumulate) {
    Product product = {};
    product.terms[0] = term;
    product.term_count = 1;
    product.rows = rows;
    product.columns = columns;
    product.out = out;
    product.dtype = dtype;
    product.accumulate = accumulate;
    return product;
}

// Rows of a matrix, dropped where they are, times so few columns that what the rows become in between matters: floats
// in the second-level cache, some rows at a time.
class ThinProduct {
  public:
    ThinProduct(const void *left, int dtype, int64_t inner, Dropout dropout)
        : left_(left), dtype_(dtype), inner_(inner), dropout_(dropout), stride_(stride_of(inner)),
          direct_(dtype == QLK_FLOAT32 && !(dropout.share > 0) && inner % CROWDED_STRIDE != 0),
          rows_at_once_(direct_ ? DIRECT_ROWS : smaller(larger(CACHED_FLOATS / stride_, LEAST_ROWS), MOST_ROWS)) {}

    bool allocate(const Call &call) { return direct_ || buffer_.allocate(call.threads * rows_at_once_ * stride_); }

    // out (rows, columns) = rows of the left operand from first_row on times `right` (inner, columns).
    void multiply(const Call &call, int64_t first_row, int64_t rows, Right right, int64_t columns, float *out) const {
        const int64_t at_once = smaller(rows_at_once_, larger(ceil_div(rows, call.threads), 1));
        parallel_tasks(ceil_div(rows, at_once), call.threads, [&](int64_t task, int worker) {
            const int64_t begin = task * at_once, count = smaller(at_once, rows - begin);
            const void *from = row_of(left_, dtype_, first_row + begin, inner_);
            Term term = {static_cast<const float *>(from), nullptr, inner_, right, inner_, nullptr};
            if (!direct_) {
                float *floats = buffer_.get() + worker * rows_at_once_ * stride_;
                call.kernels.rows_to_float(from, dtype_, first_row + begin, count, inner_, dropout_, floats, stride_);
                term.left = floats;
                term.left_stride = stride_;
            }
            const Product product = product_of(term, count, columns, out + begin * columns, QLK_FLOAT32, false);
            call.kernels.multiply(product, {0, count, 0, columns}, nullptr);
        });
    }

  private:
    static constexpr int64_t CACHED_FLOATS = 128 * 1024;
    // Fewer rows would bring the right operand into panels too often for what they multiply.
    static constexpr int64_t LEAST_ROWS = 32, MOST_ROWS = 128, DIRECT_ROWS = 256;

    const void *left_;
    int dtype_;
    int64_t inner_;
    Dropout dropout_;
    int64_t stride_;
    bool direct_;
    int64_t rows_at_once_;
    Buffer buffer_;
};

inline bool multiplies_bfloat16(const Call &call, int dtype) {
    return dtype == QLK_BFLOAT16 && call.kernels.has_bfloat16_units;
}

inline Term weight_term(bool in_bfloat16, const LeftRows &floats, const LeftBfloat16 &bfloat16, Right right,
                        int64_t inner) {
    if (in_bfloat16) return {nullptr, bfloat16.get(), bfloat16.stride(), right, inner, nullptr};
    return {floats.get(), nullptr, floats.stride(), right, inner, nullptr};
}

// A bias as floats, in whole panels; null where there is none.
class Bias {
  public:
    Bias(const Call &call, const void *values, int dtype, int64_t columns) : is_there_(values != nullptr) {
        const int64_t stride = round_up(columns, call.kernels.panel_columns);
        if (!is_there_ || !floats_.allocate(stride)) return;
        call.kernels.rows_to_float(values, dtype, 0, 1, columns, NO_DROPOUT, floats_.get(), stride);
    }
    bool is_ready() const { return !is_there_ || floats_.get() != nullptr; }
    float *get() const { return floats_.get(); }

  private:
    const bool is_there_;
    Buffer floats_;
};

}  // namespace qlk
