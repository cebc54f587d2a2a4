// The C entries of attention: softmax(scale query key^T) value for each row and head, and its gradients. Scores are
// made for some queries at a time, as floats that stay in the second-level cache, by the products of linear.cpp.
#include "attention.h"

#include "isa.h"
#include "linear_call.h"

namespace qlk {
namespace {

constexpr int64_t MOST_QUERIES = 64;            // at a time
constexpr int64_t LEAST_QUERIES = 16;           // the same in long sequences: still a few tiles of a product
constexpr int64_t MOST_SCORES = 128 * 1024;     // floats at a time
constexpr int64_t WHOLE_VECTORS = CACHE_LINE_FLOATS;  // of every instruction set

// One head of one row: tokens of head_size values, `stride` elements apart.
struct Head {
    const void *values;
    int dtype;
    int64_t stride;

    const void *token(int64_t number) const {
        return static_cast<const char *>(values) + number * stride * bytes_of(dtype);
    }
    Right right(Layout layout) const { return right_of(layout, values, dtype, stride); }
};

Head head_of(const void *values, const qlk_attention &of, const int64_t strides[3], int64_t row, int64_t head) {
    const Head first = {values, of.dtype, 1};
    return {first.token(row * strides[0] + head * strides[1]), of.dtype, strides[2]};
}

struct Sizes {
    explicit Sizes(const qlk_attention &of)
        : of(of), group(of.heads / of.key_heads), row_length(of.heads * of.head_size),
          scores_stride(stride_of(of.tokens)), head_stride(stride_of(of.head_size)) {
        const int64_t fit = MOST_SCORES / scores_stride / WHOLE_VECTORS * WHOLE_VECTORS;
        queries = smaller(larger(fit, LEAST_QUERIES), MOST_QUERIES);
    }

    int64_t blocks() const { return ceil_div(of.tokens, queries); }
    // The keys that some of the queries up to `end` see.
    int64_t keys(int64_t end) const { return of.causal ? end : of.tokens; }
    // What some queries take up as rows of a head's values or of scores. The lines after them keep parts of the
    // workspace from beginning at the same place of a page, where stores to one hold up loads from the other.
    int64_t head_floats() const { return queries * head_stride + 5 * CACHE_LINE_FLOATS; }
    int64_t scores_floats() const { return queries * scores_stride + 5 * CACHE_LINE_FLOATS; }

    const qlk_attention &of;
    const int64_t group;       // heads that share a key and a value
    const int64_t row_length;  // of a token of all heads
    const int64_t scores_stride, head_stride;
    int64_t queries;  // at a time
};

// What both directions do for some queries of one head, in the workspace of one thread.
class Block {
  public:
    Block(const Isa &isa, const Sizes &sizes, int64_t row, int64_t head, float *sums)
        : isa_(isa), sizes_(sizes), of_(sizes.of), row_(row), head_(head), sums_(sums),
          query_(head_of(of_.query, of_, of_.query_strides, row, head)),
          key_(head_of(of_.key, of_, of_.key_strides, row, head / sizes.group)),
          value_(head_of(of_.value, of_, of_.value_strides, row, head / sizes.group)),
          in_bfloat16_(of_.dtype == QLK_BFLOAT16 && isa.linear.has_bfloat16_units) {}

    const Head &query() const { return query_; }
    const Head &key() const { return key_; }
    const Head &value() const { return value_; }

    // Where a token of this head lies in a matrix (rows, tokens, heads, head_size).
    int64_t place(int64_t token) const {
        return ((row_ * of_.tokens + token) * of_.heads + head_) * of_.head_size;
    }
    // The same in a matrix (rows, heads, tokens).
    int64_t number(int64_t token) const { return (row_ * of_.heads + head_) * of_.tokens + token; }
    bool multiplies_floats() const { return !in_bfloat16_; }

    Scores scores(float *values, int64_t begin, int64_t end) const {
        const uint8_t *mask = of_.mask;
        if (mask != nullptr) mask += row_ * of_.mask_strides[0] + begin * of_.mask_strides[1];
        return {values, sizes_.scores_stride, end - begin, sizes_.keys(end), begin, mask, of_.mask_strides[1],
                of_.causal != 0, of_.scale};
    }

    // Some tokens as floats, in rows that end in zeros.
    void load(const Head &from, int64_t begin, int64_t end, float *out) const {
        for (int64_t token = begin; token < end; ++token, out += sizes_.head_stride) {
            isa_.linear.rows_to_float(from.token(token), from.dtype, 0, 1, of_.head_size, NO_DROPOUT, out,
                                      sizes_.head_stride);
        }
    }

    // out (tokens, keys) = left right^T for tokens of two heads: where both are bfloat16, exact products, summed as
    // floats. `floats`: the tokens of the left head.
    void multiply_heads(const Head &left, const float *floats, const Head &right, int64_t begin, int64_t end,
                        uint16_t *pairs, float *out) const {
        const Right keys = right.right(Layout::dense_transposed);
        Term term = {floats, nullptr, sizes_.head_stride, keys, of_.head_size, nullptr};
        if (in_bfloat16_) {
            const int64_t bytes = of_.head_size * sizeof(uint16_t);
            for (int64_t token = begin; token < end; ++token) {
                uint16_t *to = pairs + (token - begin) * sizes_.head_stride;
                std::memcpy(to, left.token(token), bytes);
                std::memset(to + of_.head_size, 0, sizes_.head_stride * sizeof(uint16_t) - bytes);
            }
            term.left = nullptr;
            term.left_bfloat16 = pairs;
        }
        multiply(term, end - begin, sizes_.keys(end), out, sizes_.scores_stride, QLK_FLOAT32, false);
    }

    // out = weights (queries, keys) values (keys, head_size), in the matrix of all heads.
    void multiply_weights(const float *weights, const Head &values, int64_t begin, int64_t end, void *out) const {
        const Right right = values.right(Layout::dense);
        const Term term = {weights, nullptr, sizes_.scores_stride, right, sizes_.keys(end), nullptr};
        char *to = static_cast<char *>(out) + place(begin) * bytes_of(of_.dtype);
        multiply(term, end - begin, of_.head_size, to, sizes_.row_length, of_.dtype, false);
    }

    // out (head_size, keys) (+)= left^T (head_size, queries) weights (queries, keys).
    void multiply_transposed(const float *left, const float *weights, int64_t begin, int64_t end, float *out) const {
        const Right right = {Layout::dense, weights, sizes_.scores_stride, nullptr};
        const Term term = {left, nullptr, sizes_.queries, right, end - begin, nullptr};
        multiply(term, of_.head_size, sizes_.keys(end), out, sizes_.scores_stride, QLK_FLOAT32, end < of_.tokens);
    }

  private:
    void multiply(const Term &term, int64_t rows, int64_t columns, void *out, int64_t out_stride, int dtype,
                  bool accumulate) const {
        const Product product = product_of(term, rows, out_stride, out, dtype, accumulate);
        isa_.linear.multiply(product, {0, rows, 0, columns}, dtype == QLK_FLOAT32 ? nullptr : sums_);
    }

    const Isa &isa_;
    const Sizes &sizes_;
    const qlk_attention &of_;
    const int64_t row_, head_;
    float *sums_;
    const Head query_, key_, value_;
    const bool in_bfloat16_;
};

// A part of a buffer for each thread.
class Workspace {
  public:
    bool allocate(int64_t floats, int threads) {
        floats_ = round_up(floats, CACHE_LINE_FLOATS);
        return buffer_.allocate(floats_ * threads);
    }
    float *of(int worker) const { return buffer_.get() + worker * floats_; }

  private:
    Buffer buffer_;
    int64_t floats_ = 0;
};

int attend(const Isa &isa, const qlk_attention &of, void *out, float *logsumexp, int threads) {
    const Sizes sizes(of);
    Workspace workspace;
    if (!workspace.allocate(sizes.scores_floats() + 3 * sizes.head_floats(), threads)) return QLK_NO_MEMORY;
    const int64_t blocks = sizes.blocks();
    parallel_tasks(of.rows * of.heads * blocks, threads, [&](int64_t task, int worker) {
        float *values = workspace.of(worker), *queries = values + sizes.scores_floats();
        uint16_t *pairs = reinterpret_cast<uint16_t *>(queries + sizes.head_floats());
        const int64_t number = task / blocks, begin = task % blocks * sizes.queries;
        const int64_t end = smaller(begin + sizes.queries, of.tokens);
        const Block block(isa, sizes, number / of.heads, number % of.heads, queries + 2 * sizes.head_floats());
        if (block.multiplies_floats()) block.load(block.query(), begin, end, queries);
        block.multiply_heads(block.query(), queries, block.key(), begin, end, pairs, values);
        isa.attention.softmax(block.scores(values, begin, end), logsumexp + block.number(begin));
        block.multiply_weights(values, block.value(), begin, end, out);
    });
    return QLK_OK;
}

// The gradients of one head's queries, and what it adds to those of its key and value, transposed.
class HeadGradients {
  public:
    HeadGradients(const Isa &isa, const Sizes &sizes, float *workspace) : isa_(isa), sizes_(sizes) {
        float **const parts[] = {&query_, &grad_, &output_, &query_transposed_, &grad_transposed_, &sums_};
        for (float **part : parts) {
            *part = workspace;
            workspace += sizes.head_floats();
        }
        pairs_ = reinterpret_cast<uint16_t *>(workspace);
        scores_ = workspace + sizes.head_floats();
        gradients_ = scores_ + sizes.scores_floats();
    }

    static int64_t floats(const Sizes &sizes) { return 7 * sizes.head_floats() + 2 * sizes.scores_floats(); }

    void run(int64_t row, int64_t head, const void *output, const void *grad_output, const float *logsumexp,
             void *grad_query, float *grad_key, float *grad_value) const {
        const qlk_attention &of = sizes_.of;
        const Block block(isa_, sizes_, row, head, sums_);
        const int64_t strides[3] = {of.tokens * sizes_.row_length, of.head_size, sizes_.row_length};
        const Head output_head = head_of(output, of, strides, row, head);
        const Head grad_head = head_of(grad_output, of, strides, row, head);
        // The last queries see every key, so that theirs is what the others are added to.
        for (int64_t number = sizes_.blocks() - 1; number >= 0; --number) {
            const int64_t begin = number * sizes_.queries, end = smaller(begin + sizes_.queries, of.tokens);
            block.load(block.query(), begin, end, query_);
            block.load(grad_head, begin, end, grad_);
            block.load(output_head, begin, end, output_);
            float shifts[MOST_QUERIES];
            for (int64_t i = 0; i < end - begin; ++i) {
                const int64_t at = i * sizes_.head_stride;
                shifts[i] = isa_.attention.dot(grad_ + at, output_ + at, of.head_size);
            }
            block.multiply_heads(block.query(), query_, block.key(), begin, end, pairs_, scores_);
            block.multiply_heads(grad_head, grad_, block.value(), begin, end, pairs_, gradients_);
            const Scores scores = block.scores(scores_, begin, end);
            isa_.attention.softmax_backward(scores, logsumexp + block.number(begin), shifts, gradients_);
            block.multiply_weights(gradients_, block.key(), begin, end, grad_query);
            transpose(query_, end - begin, query_transposed_);
            transpose(grad_, end - begin, grad_transposed_);
            block.multiply_transposed(query_transposed_, gradients_, begin, end, grad_key);
            block.multiply_transposed(grad_transposed_, scores_, begin, end, grad_value);
        }
    }

  private:
    void transpose(const float *in, int64_t count, float *out) const {
        isa_.attention.transpose(in, sizes_.head_stride, count, sizes_.of.head_size, out, sizes_.queries);
    }

    const Isa &isa_;
    const Sizes &sizes_;
    float *query_, *grad_, *output_, *query_transposed_, *grad_transposed_, *sums_, *scores_, *gradients_;
    uint16_t *pairs_;
};

// A matrix (head_size, tokens) for each head, as HeadGradients leaves it.
class Transposed {
  public:
    explicit Transposed(const Sizes &sizes) : sizes_(sizes) {}
    // Rows up to a whole vector, for what transposes them.
    int64_t floats() const { return round_up(sizes_.of.head_size, WHOLE_VECTORS) * sizes_.scores_stride; }
    bool allocate() {
        const int64_t heads = sizes_.of.rows * sizes_.of.heads;
        return product_fits(heads, floats()) && buffer_.allocate(heads * floats());
    }
    float *of(int64_t row, int64_t head) const { return buffer_.get() + (row * sizes_.of.heads + head) * floats(); }

    // out (rows, tokens, key_heads, head_size), in its type = the sum over the heads that share a key.
    void write(const Isa &isa, int64_t row, int64_t key_head, int64_t begin, int64_t end, float *workspace,
               void *out) const {
        const qlk_attention &of_all = sizes_.of;
        const int64_t count = end - begin, size = of_all.head_size, first = key_head * sizes_.group;
        for (int64_t column = 0; column < size; ++column) {
            float *sum = of(row, first) + column * sizes_.scores_stride + begin;
            for (int64_t head = first + 1; head < first + sizes_.group; ++head) {
                isa.attention.add(of(row, head) + column * sizes_.scores_stride + begin, count, sum);
            }
        }
        const float *summed = of(row, first) + begin;
        isa.attention.transpose(summed, sizes_.scores_stride, size, count, workspace, sizes_.head_stride);
        for (int64_t token = begin; token < end; ++token) {
            const float *from = workspace + (token - begin) * sizes_.head_stride;
            const int64_t at = ((row * of_all.tokens + token) * of_all.key_heads + key_head) * size;
            if (of_all.dtype == QLK_FLOAT32) {
                std::memcpy(static_cast<float *>(out) + at, from, size * sizeof(float));
            } else {
                isa.linear.row_to_bfloat16(from, size, static_cast<uint16_t *>(out) + at);
            }
        }
    }

  private:
    const Sizes &sizes_;
    Buffer buffer_;
};

int attend_backward(const Isa &isa, const qlk_attention &of, const void *output, const float *logsumexp,
                    const void *grad_output, void *grad_query, void *grad_key, void *grad_value, int threads) {
    const Sizes sizes(of);
    Workspace workspace;
    Transposed keys(sizes), values(sizes);
    if (!keys.allocate() || !values.allocate()) return QLK_NO_MEMORY;
    if (!workspace.allocate(HeadGradients::floats(sizes), threads)) return QLK_NO_MEMORY;
    parallel_tasks(of.rows * of.heads, threads, [&](int64_t task, int worker) {
        const int64_t row = task / of.heads, head = task % of.heads;
        const HeadGradients gradients(isa, sizes, workspace.of(worker));
        gradients.run(row, head, output, grad_output, logsumexp, grad_query, keys.of(row, head), values.of(row, head));
    });
    const int64_t blocks = sizes.blocks();
    parallel_tasks(of.rows * of.key_heads * blocks, threads, [&](int64_t task, int worker) {
        const int64_t number = task / blocks, begin = task % blocks * sizes.queries;
        const int64_t row = number / of.key_heads, key_head = number % of.key_heads;
        const int64_t end = smaller(begin + sizes.queries, of.tokens);
        keys.write(isa, row, key_head, begin, end, workspace.of(worker), grad_key);
        values.write(isa, row, key_head, begin, end, workspace.of(worker), grad_value);
    });
    return QLK_OK;
}

int check_attention(const qlk_attention *of) {
    if (of == nullptr) return QLK_NULL_POINTER;
    if (!is_dtype(of->dtype)) return QLK_BAD_DTYPE;
    const bool sized = of->rows >= 0 && of->heads > 0 && of->key_heads > 0 && of->heads % of->key_heads == 0 &&
                       of->tokens >= 0 && of->head_size > 0;
    if (!sized) return QLK_BAD_SIZE;
    int64_t width;
    if (!product_fits(of->heads, of->head_size) || !product_fits(of->tokens, of->tokens)) return QLK_BAD_SIZE;
    if (__builtin_mul_overflow(of->rows, of->tokens, &width)) return QLK_BAD_SIZE;
    return product_fits(width, of->heads * of->head_size) ? QLK_OK : QLK_BAD_SIZE;
}

bool is_empty(const qlk_attention &of) { return of.rows == 0 || of.tokens == 0; }

bool has_inputs(const qlk_attention &of) { return of.query != nullptr && of.key != nullptr && of.value != nullptr; }

}  // namespace
}  // namespace qlk

using namespace qlk;

extern "C" {

int qlk_cpu_attention(const qlk_attention *attention, void *out, float *logsumexp, int threads) {
    const int status = check_attention(attention);
    if (status != QLK_OK || is_empty(*attention)) return status;
    if (!has_inputs(*attention) || out == nullptr || logsumexp == nullptr) return QLK_NULL_POINTER;
    return attend(isa(), *attention, out, logsumexp, threads_of(threads));
}

int qlk_cpu_attention_backward(const qlk_attention *attention, const void *out, const float *logsumexp,
                               const void *grad_out, void *grad_query, void *grad_key, void *grad_value, int threads) {
    const int status = check_attention(attention);
    if (status != QLK_OK || is_empty(*attention)) return status;
    if (!has_inputs(*attention) || out == nullptr || logsumexp == nullptr) return QLK_NULL_POINTER;
    if (grad_out == nullptr || grad_query == nullptr) return QLK_NULL_POINTER;
    if (grad_key == nullptr || grad_value == nullptr) return QLK_NULL_POINTER;
    return attend_backward(isa(), *attention, out, logsumexp, grad_out, grad_query, grad_key, grad_value,
                           threads_of(threads));
}
}
