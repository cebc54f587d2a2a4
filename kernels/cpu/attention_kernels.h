// The parts of attention between its matrix products: softmax and its gradient, by rows of scores that stay in cache.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>

#include "attention.h"
#include "exp_kernels.h"
#include "few_rows_kernels.h"

namespace qlk::QLK_ISA {

// Visits the scores of one query, a vector at a time: visit(offset, scaled scores with minus infinity where hidden).
template <typename Visit>
inline void visit_scores(const Scores &scores, int64_t query, const Visit &visit) {
    const float *row = scores.values + query * scores.stride;
    const uint8_t *mask = scores.mask != nullptr ? scores.mask + query * scores.mask_stride : nullptr;
    const int64_t last_seen = scores.first_query + query + 1;
    const int64_t seen = scores.causal && last_seen < scores.keys ? last_seen : scores.keys;
    const Floats hidden = broadcast(-std::numeric_limits<float>::infinity()), scale = broadcast(scores.scale);
    for (int64_t key = 0; key < scores.keys; key += WIDTH) {
        const int64_t rest = seen - key;
        const int lanes = rest < 0 ? 0 : rest < WIDTH ? static_cast<int>(rest) : WIDTH;
        Floats x = select(greater(broadcast_int(lanes), lane_numbers()), mul(load(row + key), scale), hidden);
        if (mask != nullptr) {
            uint8_t bytes[WIDTH] = {};
            std::memcpy(bytes, mask + key, lanes);
            x = select(greater(load_bytes(bytes), broadcast_int(0)), x, hidden);
        }
        visit(key, x);
    }
}

inline bool has_nan(const float *row, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        if (row[i] != row[i]) return true;
    }
    return false;
}

inline void softmax(const Scores &scores, float *logsumexp) {
    constexpr float INFINITE = std::numeric_limits<float>::infinity();
    for (int64_t query = 0; query < scores.queries; ++query) {
        float *row = scores.values + query * scores.stride;
        Floats highest = broadcast(-INFINITE);
        visit_scores(scores, query, [&](int64_t key, Floats x) {
            highest = max(highest, x);
            store(row + key, x);
        });
        const float top = largest(highest);
        if (top == -INFINITE && !has_nan(row, scores.keys)) {  // nothing is larger than a NaN
            std::memset(row, 0, scores.keys * sizeof(float));
            logsumexp[query] = INFINITE;
            continue;
        }
        Floats total = broadcast(0.0f);
        for (int64_t key = 0; key < scores.keys; key += WIDTH) {
            const Floats e = exp_of_negative(sub(load(row + key), broadcast(top)));
            total = add(total, e);
            store(row + key, e);
        }
        const float whole = sum(total);
        for (int64_t key = 0; key < scores.keys; key += WIDTH) {
            store(row + key, mul(load(row + key), broadcast(1.0f / whole)));
        }
        logsumexp[query] = top + std::log(whole);
    }
}

inline void softmax_backward(const Scores &scores, const float *logsumexp, const float *shifts, float *gradients) {
    for (int64_t query = 0; query < scores.queries; ++query) {
        float *row = scores.values + query * scores.stride, *gradient = gradients + query * scores.stride;
        const Floats log_total = broadcast(logsumexp[query]), shift = broadcast(shifts[query]);
        visit_scores(scores, query, [&](int64_t key, Floats x) {
            const Floats p = exp_of_negative(sub(x, log_total));
            store(row + key, p);
            store(gradient + key, mul(mul(p, sub(load(gradient + key), shift)), broadcast(scores.scale)));
        });
    }
}

inline void transpose(const float *in, int64_t stride, int64_t rows, int64_t columns, float *out, int64_t out_stride) {
    for (int64_t row = 0; row < rows; row += WIDTH) {
        const uint8_t *lanes[WIDTH];
        for (int i = 0; i < WIDTH; ++i) lanes[i] = reinterpret_cast<const uint8_t *>(in + (row + i) * stride);
        for (int64_t column = 0; column < columns; column += 4) {
            Ints four[4];
            transpose_words(lanes, column * static_cast<int64_t>(sizeof(float)), four);
            for (int j = 0; j < 4; ++j) store(out + (column + j) * out_stride + row, as_floats(four[j]));
        }
    }
}

inline void add_to(const float *in, int64_t count, float *out) {
    for (int64_t i = 0; i < count; i += WIDTH) {
        const int lanes = count - i < WIDTH ? static_cast<int>(count - i) : WIDTH;
        store_first(out + i, add(load_first(out + i, lanes), load_first(in + i, lanes)), lanes);
    }
}

constexpr AttentionKernels attention_kernels = {softmax, softmax_backward, dot, transpose, add_to};

}  // namespace qlk::QLK_ISA
