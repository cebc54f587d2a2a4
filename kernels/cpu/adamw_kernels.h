// AdamW over ranges of one tensor. Included by each isa_*.cpp after its simd_*.h.
#pragma once

#include "adamw.h"
#include "dynamic_map.h"

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

// The states of one block while it is updated, as floats; what lies beyond its end, up to a whole vector, is zero.
struct BlockStates {
    alignas(64) float exp_avg[LARGEST_BLOCK];
    alignas(64) float exp_avg_sq[LARGEST_BLOCK];
};

// The largest magnitudes so far as bits, which order like the magnitudes, infinity and then NaN above all others.
struct Largest {
    Ints exp_avg, exp_avg_sq;
};

// Copies of the last codes of a tensor that fill no vector, so that vectors can be read and written.
struct LastCodes {
    uint8_t exp_avg[WIDTH], exp_avg_sq[WIDTH];
};

inline void decode_and_update(const AdamwStep &step, const uint8_t *exp_avg_codes, const uint8_t *exp_avg_sq_codes,
                              float exp_avg_absmax, float exp_avg_sq_absmax, Floats gradient, Floats &parameter,
                              BlockStates &states, int at, Largest &largest) {
    Floats exp_avg = mul(exp_avg_levels(load_bytes(exp_avg_codes)), broadcast(exp_avg_absmax));
    Floats exp_avg_sq = mul(exp_avg_sq_levels(load_bytes(exp_avg_sq_codes)), broadcast(exp_avg_sq_absmax));
    update_vector(step, gradient, parameter, exp_avg, exp_avg_sq);
    store(states.exp_avg + at, exp_avg);
    store(states.exp_avg_sq + at, exp_avg_sq);
    largest.exp_avg = max(largest.exp_avg, as_ints(abs(exp_avg)));
    largest.exp_avg_sq = max(largest.exp_avg_sq, as_ints(abs(exp_avg_sq)));
}

// The absmax that magnitude bits stand for: any NaN becomes the same one.
inline float absmax_of(Ints largest_bits) {
    const float absmax = float_of(static_cast<uint32_t>(largest(largest_bits)));
    return absmax == absmax ? absmax : __builtin_nanf("");
}

template <typename Encode>
inline void encode_block(const float *values, int count, float absmax, uint8_t zero, uint8_t *codes, Encode encode) {
    const bool finite = absmax <= 3.402823466e38f;
    const Floats inverse = broadcast(inverse_absmax(absmax));
    const auto encoded = [&](int i) {
        return finite ? encode(mul(load(values + i), inverse)) : broadcast_int(zero);
    };
    int i = 0;
    for (; i + WIDTH <= count; i += WIDTH) store_bytes(codes + i, encoded(i));
    if (i < count) {
        uint8_t last[WIDTH];
        store_bytes(last, encoded(i));
        for (int lane = 0; i < count; ++i, ++lane) codes[i] = last[lane];
    }
}

template <typename Elements>
inline void update_block(const AdamwStep &step, const qlk_adamw_tensor &tensor, int64_t block, int64_t begin, int count,
                         BlockStates &states) {
    auto *parameters = static_cast<typename Elements::Element *>(tensor.parameter) + begin;
    const auto *gradients = static_cast<const typename Elements::Element *>(tensor.gradient) + begin;
    uint8_t *exp_avg_codes = static_cast<uint8_t *>(tensor.exp_avg) + begin;
    uint8_t *exp_avg_sq_codes = static_cast<uint8_t *>(tensor.exp_avg_sq) + begin;
    const float exp_avg_absmax = tensor.exp_avg_absmax[block], exp_avg_sq_absmax = tensor.exp_avg_sq_absmax[block];
    Largest largest = {broadcast_int(0), broadcast_int(0)};
    int i = 0;
    for (; i + WIDTH <= count; i += WIDTH) {
        Floats parameter = Elements::read(parameters + i);
        decode_and_update(step, exp_avg_codes + i, exp_avg_sq_codes + i, exp_avg_absmax, exp_avg_sq_absmax,
                          Elements::read(gradients + i), parameter, states, i, largest);
        Elements::write(parameters + i, parameter);
    }
    if (const int left = count - i; left > 0) {
        LastCodes last;
        for (int lane = 0; lane < WIDTH; ++lane) {
            last.exp_avg[lane] = lane < left ? exp_avg_codes[i + lane] : EXP_AVG_ZERO;
            last.exp_avg_sq[lane] = lane < left ? exp_avg_sq_codes[i + lane] : EXP_AVG_SQ_ZERO;
        }
        Floats parameter = Elements::read_first(parameters + i, left);
        decode_and_update(step, last.exp_avg, last.exp_avg_sq, exp_avg_absmax, exp_avg_sq_absmax,
                          Elements::read_first(gradients + i, left), parameter, states, i, largest);
        Elements::write_first(parameters + i, parameter, left);
    }
    const float next_exp_avg_absmax = absmax_of(largest.exp_avg);
    const float next_exp_avg_sq_absmax = absmax_of(largest.exp_avg_sq);
    tensor.exp_avg_absmax[block] = next_exp_avg_absmax;
    tensor.exp_avg_sq_absmax[block] = next_exp_avg_sq_absmax;
    encode_block(states.exp_avg, count, next_exp_avg_absmax, EXP_AVG_ZERO, exp_avg_codes,
                 [](Floats x) { return encode_exp_avg(x); });
    encode_block(states.exp_avg_sq, count, next_exp_avg_sq_absmax, EXP_AVG_SQ_ZERO, exp_avg_sq_codes,
                 [](Floats x) { return encode_exp_avg_sq(x); });
}

inline void update_blockwise(const AdamwStep &given_step, const qlk_adamw_tensor &tensor, int64_t begin, int64_t end,
                             int64_t block_size) {
    const AdamwStep step = given_step;
    BlockStates states;
    with_elements(tensor, [&](auto elements) {
        for (; begin < end; begin += block_size) {
            const int64_t count = end - begin < block_size ? end - begin : block_size;
            update_block<decltype(elements)>(step, tensor, begin / block_size, begin, static_cast<int>(count), states);
        }
    });
}

constexpr AdamwKernels adamw_kernels = {sum_of_squares, update, update_blockwise};

}  // namespace qlk::QLK_ISA
