// AdamW (Loshchilov & Hutter 2019) on single values: the update, and states in 8 bits of a dynamic map. An update of
// whole vectors is the same template, so there is one formula for every instruction set and for GPUs.
#pragma once

#include <math.h>
#include <stdint.h>

#include "qlk/float16.h"
#include "qlk/host_device.h"
#include "qlk/tables.h"

namespace qlk {

// What one step multiplies with: worked out in double, then rounded once.
struct AdamwStep {
    float gradient_scale;
    float decay;  // 1 - learning_rate * weight_decay
    float beta1, one_minus_beta1;
    float beta2, one_minus_beta2;
    float step_size;     // learning_rate / (1 - beta1^step)
    float inverse_root;  // 1 / sqrt(1 - beta2^step)
    float eps;
};

QLK_HD float adamw_decay(double learning_rate, float weight_decay) {
    return static_cast<float>(1.0 - learning_rate * weight_decay);
}

// All but the decay, which differs between tensors. `step` counts from 1.
QLK_HD AdamwStep adamw_step(double learning_rate, double beta1, double beta2, double eps, double gradient_scale,
                            int64_t step) {
    const double correction1 = 1.0 - pow(beta1, static_cast<double>(step));
    const double correction2 = 1.0 - pow(beta2, static_cast<double>(step));
    AdamwStep result;
    result.gradient_scale = static_cast<float>(gradient_scale);
    result.decay = 1.0f;
    result.beta1 = static_cast<float>(beta1);
    result.one_minus_beta1 = static_cast<float>(1.0 - beta1);
    result.beta2 = static_cast<float>(beta2);
    result.one_minus_beta2 = static_cast<float>(1.0 - beta2);
    result.step_size = static_cast<float>(learning_rate / correction1);
    result.inverse_root = static_cast<float>(1.0 / sqrt(correction2));
    result.eps = static_cast<float>(eps);
    return result;
}

// `Value` is float or a vector of them, `root` its square root. Every operation is rounded as written: compile
// without contraction, or the instruction sets and devices part ways.
template <typename Value, typename Root>
QLK_HD void adamw_update(const AdamwStep &step, Value gradient, Value &parameter, Value &exp_avg, Value &exp_avg_sq,
                         Root root) {
    gradient = gradient * step.gradient_scale;
    exp_avg = exp_avg * step.beta1 + gradient * step.one_minus_beta1;
    exp_avg_sq = exp_avg_sq * step.beta2 + gradient * step.one_minus_beta2 * gradient;
    const Value denominator = root(exp_avg_sq) * step.inverse_root + step.eps;
    parameter = parameter * step.decay - exp_avg * step.step_size / denominator;
}

// 8-bit states: a block of values over its largest magnitude (absmax), each as the rank of the nearest level of the
// signed (exp_avg) or unsigned (exp_avg_sq) dynamic map.
constexpr uint8_t EXP_AVG_ZERO = 127;   // the codes of zero
constexpr uint8_t EXP_AVG_SQ_ZERO = 0;

// `levels` is the map of the state: GPUs hold copies of the tables.
QLK_HD float decode_state(const float *levels, uint8_t code, float absmax) { return levels[code] * absmax; }

// What a block is multiplied with before its values are encoded: finite for an all-zero block too. A block whose
// absmax is not finite gets the codes of zero, and decodes to NaN.
QLK_HD float inverse_absmax(float absmax) { return 1.0f / (absmax > 1e-38f ? absmax : 1e-38f); }

// The number of `midpoints` (ascending, 255 and an infinity) strictly below x: the code of its nearest level, the
// lower one at a tie. NaN gets 0.
QLK_HD constexpr int dynamic_rank(const float *midpoints, float x) {
    int rank = 0;
    for (int step = 128; step > 0; step /= 2) {
        if (x > midpoints[rank + step - 1]) rank += step;
    }
    return rank;
}

}  // namespace qlk
