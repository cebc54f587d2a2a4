// AdamW over ranges of one tensor. Included by each isa_*.cpp after its simd_*.h.
#pragma once

#include <algorithm>

#include "adamw.h"
#include "dynamic_map.h"
#include "isa.h"

namespace qlk::QLK_ISA {

constexpr int64_t LARGEST_BLOCK = 4096;
constexpr int SQUARE_LANES = 16;  // sums that run side by side, whatever the width of a vector

// Parameters and gradients as they lie in memory.
struct Float32Elements {
    using Element = float;
    static Floats read(const float *p) { return load(p); }
    static Floats read_first(const float *p, int count) { return load_first(p, count); }
    static void write(float *p, Floats x) { store(p, x); }
    static void write_first(float *p, Floats x, int count) { store_first(p, x, count); }
};
struct Bfloat16Elements {
    using Element = uint16_t;
    static Floats read(const uint16_t *p) { return load_bfloat16(p); }
    static Floats read_first(const uint16_t *p, int count) { return load_bfloat16_first(p, count); }
    static void write(uint16_t *p, Floats x) { store_bfloat16(p, x); }
    static void write_first(uint16_t *p, Floats x, int count) { store_bfloat16_first(p, x, count); }
};

template <typename Body>
inline auto with_elements(const qlk_adamw_tensor &tensor, const Body &body) {
    return tensor.dtype == QLK_BFLOAT16 ? body(Bfloat16Elements()) : body(Float32Elements());
}

template <typename Elements>
inline double sum_of_squares_of(const typename Elements::Element *values, int64_t count) {
    Doubles sums[SQUARE_LANES / DOUBLE_WIDTH] = {};
    const auto add_squares = [&](const Floats (&x)[SQUARE_LANES / WIDTH]) {
        for (int i = 0; i < SQUARE_LANES / WIDTH; ++i) {
            const Doubles low = low_doubles(x[i]), high = high_doubles(x[i]);
            sums[2 * i] = sums[2 * i] + low * low;
            sums[2 * i + 1] = sums[2 * i + 1] + high * high;
        }
    };
    Floats x[SQUARE_LANES / WIDTH];
    int64_t done = 0;
    for (; done + SQUARE_LANES <= count; done += SQUARE_LANES) {
        for (int i = 0; i < SQUARE_LANES / WIDTH; ++i) x[i] = Elements::read(values + done + i * WIDTH);
        add_squares(x);
    }
    if (done < count) {
        for (int i = 0; i < SQUARE_LANES / WIDTH; ++i, done += WIDTH) {
            const int64_t left = count - done < WIDTH ? count - done : WIDTH;
            x[i] = left > 0 ? Elements::read_first(values + done, static_cast<int>(left)) : broadcast(0.0f);
        }
        add_squares(x);
    }
    double lanes[SQUARE_LANES];
    for (int i = 0; i < SQUARE_LANES / DOUBLE_WIDTH; ++i) store(lanes + i * DOUBLE_WIDTH, sums[i]);
    for (int half = SQUARE_LANES / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    }
    return lanes[0];
}

inline double sum_of_squares(const qlk_adamw_tensor &tensor, int64_t begin, int64_t end) {
    return with_elements(tensor, [&](auto elements) {
        using Elements = decltype(elements);
        return sum_of_squares_of<Elements>(static_cast<const typename Elements::Element *>(tensor.gradient) + begin,
                                           end - begin);
    });
}

inline void update_vector(const AdamwStep &step, Floats gradient, Floats &parameter, Floats &exp_avg,
                          Floats &exp_avg_sq) {
    adamw_update(step, gradient, parameter, exp_avg, exp_avg_sq, [](const Floats &x) { return sqrt(x); });
}

template <typename Elements>
inline void update_of(const AdamwStep &given_step, const qlk_adamw_tensor &tensor, int64_t begin, int64_t end) {
    const AdamwStep step = given_step;  // a copy that no store below can change: it stays in registers
    auto *parameters = static_cast<typename Elements::Element *>(tensor.parameter);
    const auto *gradients = static_cast<const typename Elements::Element *>(tensor.gradient);
    float *exp_avgs = static_cast<float *>(tensor.exp_avg), *exp_avg_sqs = static_cast<float *>(tensor.exp_avg_sq);
    int64_t i = begin;
    for (; i + WIDTH <= end; i += WIDTH) {
        Floats parameter = Elements::read(parameters + i);
        Floats exp_avg = load(exp_avgs + i), exp_avg_sq = load(exp_avg_sqs + i);
        update_vector(step, Elements::read(gradients + i), parameter, exp_avg, exp_avg_sq);
        Elements::write(parameters + i, parameter);
        store(exp_avgs + i, exp_avg);
        store(exp_avg_sqs + i, exp_avg_sq);
    }
    if (const int left = static_cast<int>(end - i); left > 0) {
        Floats parameter = Elements::read_first(parameters + i, left);
        Floats exp_avg = load_first(exp_avgs + i, left), exp_avg_sq = load_first(exp_avg_sqs + i, left);
        update_vector(step, Elements::read_first(gradients + i, left), parameter, exp_avg, exp_avg_sq);
        Elements::write_first(parameters + i, parameter, left);
        store_first(exp_avgs + i, exp_avg, left);
        store_first(exp_avg_sqs + i, exp_avg_sq, left);
    }
}

inline void update(const AdamwStep &step, const qlk_adamw_tensor &tensor, int64_t begin, int64_t end) {
    with_elements(tensor, [&](auto elements) { update_of<decltype(elements)>(step, tensor, begin, end); });
}

// The values of one block, and its states as codes; `count` is a multiple of a group's.
template <typename Element>
struct Block {
    Element *parameters;
    const Element *gradients;
    uint8_t *exp_avg_codes, *exp_avg_sq_codes;
    int count;
    float &exp_avg_absmax, &exp_avg_sq_absmax;
};

// Its states as floats while it is updated.
struct BlockStates {
    alignas(64) float exp_avg[LARGEST_BLOCK];
    alignas(64) float exp_avg_sq[LARGEST_BLOCK];
};

// The largest magnitudes so far as bits, which order like the magnitudes, infinity and then NaN above all others.
inline Ints larger(Ints largest, Floats x) { return max(largest, as_ints(abs(x))); }

// The absmax that magnitude bits stand for: any NaN becomes the same one.
inline float absmax_of(Ints largest_bits) {
    const float absmax = float_of(static_cast<uint32_t>(largest(largest_bits)));
    return absmax == absmax ? absmax : __builtin_nanf("");
}

template <typename Elements>
inline void decode_and_update(const AdamwStep &given_step, const Block<typename Elements::Element> &block,
                              BlockStates &states) {
    const AdamwStep step = given_step;
    const Floats exp_avg_absmax = broadcast(block.exp_avg_absmax);
    const Floats exp_avg_sq_absmax = broadcast(block.exp_avg_sq_absmax);
    auto *parameters = block.parameters;
    const auto *gradients = block.gradients;
    const uint8_t *exp_avg_codes = block.exp_avg_codes, *exp_avg_sq_codes = block.exp_avg_sq_codes;
    const int count = block.count;
    Ints largest_exp_avg = broadcast_int(0), largest_exp_avg_sq = broadcast_int(0);
    for (int first = 0; first < count; first += Group::COUNT) {
        const Group exp_avg_levels = decode_exp_avg(exp_avg_codes + first);
        const Group exp_avg_sq_levels = decode_exp_avg_sq(exp_avg_sq_codes + first);
        for (int i = 0; i < Group::VECTORS; ++i) {
            const int at = first + i * WIDTH;
            Floats exp_avg = mul(exp_avg_levels.vectors[i], exp_avg_absmax);
            Floats exp_avg_sq = mul(exp_avg_sq_levels.vectors[i], exp_avg_sq_absmax);
            Floats parameter = Elements::read(parameters + at);
            update_vector(step, Elements::read(gradients + at), parameter, exp_avg, exp_avg_sq);
            Elements::write(parameters + at, parameter);
            store(states.exp_avg + at, exp_avg);
            store(states.exp_avg_sq + at, exp_avg_sq);
            largest_exp_avg = larger(largest_exp_avg, exp_avg);
            largest_exp_avg_sq = larger(largest_exp_avg_sq, exp_avg_sq);
        }
    }
    block.exp_avg_absmax = absmax_of(largest_exp_avg);
    block.exp_avg_sq_absmax = absmax_of(largest_exp_avg_sq);
}

// What the values of a block are multiplied with to be encoded. Where not all are finite, zero: that, and the NaN that
// an infinity becomes, get the code of zero.
inline float encoding_factor(float absmax) { return absmax <= 3.402823466e38f ? inverse_absmax(absmax) : 0.0f; }

template <typename Encode>
inline void encode_block(const float *values, int count, float absmax, uint8_t *codes, const Encode &encode) {
    const Floats factor = broadcast(encoding_factor(absmax));
    for (int i = 0; i < count; i += Group::COUNT) encode(values + i, factor, codes + i);
}

template <typename Elements>
inline void update_block(const AdamwStep &step, const Block<typename Elements::Element> &block, BlockStates &states) {
    decode_and_update<Elements>(step, block, states);
    encode_block(states.exp_avg, block.count, block.exp_avg_absmax, block.exp_avg_codes,
                 [](const float *values, Floats factor, uint8_t *codes) { encode_exp_avg(values, factor, codes); });
    encode_block(states.exp_avg_sq, block.count, block.exp_avg_sq_absmax, block.exp_avg_sq_codes,
                 [](const float *values, Floats factor, uint8_t *codes) { encode_exp_avg_sq(values, factor, codes); });
}

// A block that is no multiple of a group, with zeros behind it.
template <typename Elements>
inline void update_padded_block(const AdamwStep &step, const Block<typename Elements::Element> &block,
                                BlockStates &states) {
    typename Elements::Element parameters[LARGEST_BLOCK], gradients[LARGEST_BLOCK];
    uint8_t exp_avg_codes[LARGEST_BLOCK], exp_avg_sq_codes[LARGEST_BLOCK];
    const int padded = (block.count + Group::COUNT - 1) / Group::COUNT * Group::COUNT;
    const auto pad = [&](auto *to, const auto *from, int with) {
        std::fill(std::copy_n(from, block.count, to), to + padded, with);
    };
    pad(parameters, block.parameters, 0);
    pad(gradients, block.gradients, 0);
    pad(exp_avg_codes, block.exp_avg_codes, EXP_AVG_ZERO);
    pad(exp_avg_sq_codes, block.exp_avg_sq_codes, EXP_AVG_SQ_ZERO);
    update_block<Elements>(step,
                           {parameters, gradients, exp_avg_codes, exp_avg_sq_codes, padded, block.exp_avg_absmax,
                            block.exp_avg_sq_absmax},
                           states);
    std::copy_n(parameters, block.count, block.parameters);
    std::copy_n(exp_avg_codes, block.count, block.exp_avg_codes);
    std::copy_n(exp_avg_sq_codes, block.count, block.exp_avg_sq_codes);
}

template <typename Elements>
inline void update_blocks(const AdamwStep &step, const qlk_adamw_tensor &tensor, int64_t begin, int64_t end,
                          int64_t block_size) {
    BlockStates states;
    for (; begin < end; begin += block_size) {
        const int64_t number = begin / block_size;
        const Block<typename Elements::Element> block = {
            static_cast<typename Elements::Element *>(tensor.parameter) + begin,
            static_cast<const typename Elements::Element *>(tensor.gradient) + begin,
            static_cast<uint8_t *>(tensor.exp_avg) + begin,
            static_cast<uint8_t *>(tensor.exp_avg_sq) + begin,
            static_cast<int>(end - begin < block_size ? end - begin : block_size),
            tensor.exp_avg_absmax[number],
            tensor.exp_avg_sq_absmax[number],
        };
        if (block.count % Group::COUNT == 0) {
            update_block<Elements>(step, block, states);
        } else {
            update_padded_block<Elements>(step, block, states);
        }
    }
}

inline void update_blockwise(const AdamwStep &step, const qlk_adamw_tensor &tensor, int64_t begin, int64_t end,
                             int64_t block_size) {
#if defined(QLK_ISA_VBMI)
    // Blocks of 32 would fill half a group; the next best instruction set gives the same bytes in half the time.
    if (block_size < Group::COUNT) return isa_avx512.adamw.update_blockwise(step, tensor, begin, end, block_size);
#endif
    with_elements(tensor,
                  [&](auto elements) { update_blocks<decltype(elements)>(step, tensor, begin, end, block_size); });
}

constexpr AdamwKernels adamw_kernels = {sum_of_squares, update, update_blockwise};

}  // namespace qlk::QLK_ISA
