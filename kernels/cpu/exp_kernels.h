// The exponential of vectors of floats that are not above 0.
#pragma once

#include <cstdint>

namespace qlk::QLK_ISA {

// e^x as series * 2^exponent.
struct Exponential {
    Floats series;
    Ints exponent;
};

// Of x from -104 to a little above 0, to a unit in the last place.
inline Exponential exponential(Floats x) {
    // x = n log 2 + r, with r within half of log 2, which is subtracted in two parts
    const Ints n = truncate(fma(x, broadcast(1.44269504f), broadcast(-0.5f)));
    const Floats whole = to_floats(n);
    const Floats r = fma(whole, broadcast(2.12194440e-4f), fma(whole, broadcast(-0.693359375f), x));
    constexpr float COEFFICIENTS[] = {1 / 5040.0f, 1 / 720.0f, 1 / 120.0f, 1 / 24.0f, 1 / 6.0f, 0.5f, 1.0f, 1.0f};
    Floats series = broadcast(COEFFICIENTS[0]);
    for (int i = 1; i < 8; ++i) series = fma(series, r, broadcast(COEFFICIENTS[i]));
    return {series, n};
}

// 2^exponent, from the least that is not denormal on.
inline Floats power_of_two(Ints exponent) {
    constexpr int32_t BIAS = 127, ONE = 1 << 23;  // of a float's exponent
    return as_floats(mul_low(add(exponent, broadcast_int(BIAS)), broadcast_int(ONE)));
}

// e^x for x up to a little above 0; 0 below -87, where floats begin to be denormal, and NaN for NaN.
inline Floats exp_of_negative(Floats x) {
    const Floats lowest = broadcast(-87.0f);
    const Floats bounded = min(max(x, lowest), broadcast(88.0f));  // lowest for NaN
    const Exponential e = exponential(bounded);
    const Floats beyond = select(unordered(x, x), x, broadcast(0.0f));
    return select(greater(x, lowest), mul(e.series, power_of_two(e.exponent)), beyond);
}

// The same for x up to 0, with denormals; 0 for NaN.
inline Floats exp_to_denormals(Floats x) {
    const Floats lowest = broadcast(-104.0f);  // whose exponential is rounded to 0
    const Exponential e = exponential(max(x, lowest));
    constexpr int32_t SHIFT = 24;  // of the exponent: no power is denormal, and only the last product is rounded
    const Floats shifted = mul(e.series, power_of_two(add(e.exponent, broadcast_int(SHIFT))));
    return mul(shifted, broadcast(1.0f / (1 << SHIFT)));
}

}  // namespace qlk::QLK_ISA
