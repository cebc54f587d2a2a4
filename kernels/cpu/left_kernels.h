// The left operand of a matrix product in the type that is multiplied, with dropout where the adapter's input has it.
#pragma once

#include <cstring>

#include "linear.h"
#include "qlk/dropout.h"
#include "qlk/float16.h"

namespace qlk::QLK_ISA {

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
    if (count == 0) return;  // of a null pointer
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

inline void row_to_bfloat16(const float *in, int64_t count, uint16_t *out) {
    for (int64_t i = 0; i < count; i += WIDTH) {
        const int lanes = count - i < WIDTH ? static_cast<int>(count - i) : WIDTH;
        store_bfloat16_first(out + i, load_first(in + i, lanes), lanes);
    }
}

}  // namespace qlk::QLK_ISA
