// Plain C++ with the names of simd_avx512.h: for any CPU, and the one to read first.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "qlk/float16.h"

namespace qlk::QLK_ISA {

constexpr int WIDTH = 8;

struct Floats {
    float lane[WIDTH];
};
struct Ints {
    int32_t lane[WIDTH];
};
struct Mask {
    bool lane[WIDTH];
};
struct Table16 {
    float values[16];
};

template <typename Result, typename Function>
inline Result each(Function function) {
    Result result;
    for (int i = 0; i < WIDTH; ++i) result.lane[i] = function(i);
    return result;
}

inline Floats broadcast(float x) { return each<Floats>([&](int) { return x; }); }
inline Ints broadcast_int(int32_t x) { return each<Ints>([&](int) { return x; }); }

inline Floats load(const float *p) { return each<Floats>([&](int i) { return p[i]; }); }
inline Floats load_first(const float *p, int count) { return each<Floats>([&](int i) { return i < count ? p[i] : 0.0f; }); }
inline void store_first(float *p, Floats x, int count) {
    for (int i = 0; i < WIDTH && i < count; ++i) p[i] = x.lane[i];
}
inline void store(float *p, Floats x) { store_first(p, x, WIDTH); }
inline void stream(float *p, Floats x) { store(p, x); }
inline void stream_end() {}

inline Floats load_bfloat16_first(const uint16_t *p, int count) {
    return each<Floats>([&](int i) { return i < count ? bfloat16_to_float(p[i]) : 0.0f; });
}
inline Floats load_bfloat16(const uint16_t *p) { return load_bfloat16_first(p, WIDTH); }
inline Floats load_float16_first(const uint16_t *p, int count) {
    return each<Floats>([&](int i) { return i < count ? float16_to_float(p[i]) : 0.0f; });
}
inline Floats load_float16(const uint16_t *p) { return load_float16_first(p, WIDTH); }
inline void store_bfloat16_first(uint16_t *p, Floats x, int count) {
    for (int i = 0; i < WIDTH && i < count; ++i) p[i] = float_to_bfloat16(x.lane[i]);
}
inline void store_bfloat16(uint16_t *p, Floats x) { store_bfloat16_first(p, x, WIDTH); }

inline Floats add(Floats a, Floats b) { return each<Floats>([&](int i) { return a.lane[i] + b.lane[i]; }); }
inline Floats sub(Floats a, Floats b) { return each<Floats>([&](int i) { return a.lane[i] - b.lane[i]; }); }
inline Floats mul(Floats a, Floats b) { return each<Floats>([&](int i) { return a.lane[i] * b.lane[i]; }); }
inline Floats div(Floats a, Floats b) { return each<Floats>([&](int i) { return a.lane[i] / b.lane[i]; }); }
inline Floats sqrt(Floats a) { return each<Floats>([&](int i) { return std::sqrt(a.lane[i]); }); }
// Rounded twice: without the instruction a true fma is a slow library call. Only sums of products use it.
inline Floats fma(Floats a, Floats b, Floats c) { return each<Floats>([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; }); }
inline Floats abs(Floats a) { return each<Floats>([&](int i) { return std::fabs(a.lane[i]); }); }
inline Floats max(Floats a, Floats b) { return each<Floats>([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; }); }
inline Floats min(Floats a, Floats b) { return each<Floats>([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; }); }
inline Mask greater(Floats a, Floats b) { return each<Mask>([&](int i) { return a.lane[i] > b.lane[i]; }); }
inline Mask unordered(Floats a, Floats b) { return each<Mask>([&](int i) { return std::isunordered(a.lane[i], b.lane[i]); }); }
inline bool any(Mask m) {
    bool found = false;
    for (bool lane : m.lane) found |= lane;
    return found;
}
inline Floats select(Mask m, Floats yes, Floats no) { return each<Floats>([&](int i) { return m.lane[i] ? yes.lane[i] : no.lane[i]; }); }
inline Ints select(Mask m, Ints yes, Ints no) { return each<Ints>([&](int i) { return m.lane[i] ? yes.lane[i] : no.lane[i]; }); }

inline Ints as_ints(Floats x) { return each<Ints>([&](int i) { return static_cast<int32_t>(bits_of(x.lane[i])); }); }
inline Floats as_floats(Ints x) {
    return each<Floats>([&](int i) { return float_of(static_cast<uint32_t>(x.lane[i])); });
}

inline Ints add(Ints a, Ints b) {  // modulo 2^32
    return each<Ints>([&](int i) {
        return static_cast<int32_t>(static_cast<uint32_t>(a.lane[i]) + static_cast<uint32_t>(b.lane[i]));
    });
}
inline Ints add_where(Mask m, Ints a, Ints b) {
    return each<Ints>([&](int i) { return m.lane[i] ? a.lane[i] + b.lane[i] : a.lane[i]; });
}
inline Ints sub(Ints a, Ints b) { return each<Ints>([&](int i) { return a.lane[i] - b.lane[i]; }); }
inline void store_ints(int32_t *p, Ints x) { std::memcpy(p, x.lane, sizeof x.lane); }
inline Ints max(Ints a, Ints b) {
    return each<Ints>([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline Ints shift_right(Ints a, int bits) {
    return each<Ints>([&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(a.lane[i]) >> bits); });
}
template <int BITS>
inline Ints shift_right(Ints a) { return shift_right(a, BITS); }
inline Ints bit_and(Ints a, Ints b) { return each<Ints>([&](int i) { return a.lane[i] & b.lane[i]; }); }
inline Ints bit_xor(Ints a, Ints b) { return each<Ints>([&](int i) { return a.lane[i] ^ b.lane[i]; }); }
inline Ints mul_low(Ints a, Ints b) {
    return each<Ints>([&](int i) {
        return static_cast<int32_t>(static_cast<uint32_t>(a.lane[i]) * static_cast<uint32_t>(b.lane[i]));
    });
}
inline Mask greater(Ints a, Ints b) { return each<Mask>([&](int i) { return a.lane[i] > b.lane[i]; }); }
inline Ints lane_numbers() { return each<Ints>([](int i) { return i; }); }
inline Ints truncate(Floats x) { return each<Ints>([&](int i) { return static_cast<int32_t>(x.lane[i]); }); }
inline Floats to_floats(Ints x) { return each<Floats>([&](int i) { return static_cast<float>(x.lane[i]); }); }

inline Table16 load_table(const float *values) {
    Table16 table;
    std::memcpy(table.values, values, sizeof table.values);
    return table;
}
inline Table16 scale_table(const Table16 &table, float scale) {
    Table16 scaled;
    for (int i = 0; i < 16; ++i) scaled.values[i] = table.values[i] * scale;
    return scaled;
}
inline Floats lookup(const Table16 &table, Ints index) { return each<Floats>([&](int i) { return table.values[index.lane[i] & 15]; }); }
struct Table8 {
    float values[8];
};

inline Table8 load_table8(const float *values) {
    Table8 table;
    std::memcpy(table.values, values, sizeof table.values);
    return table;
}
inline Floats lookup(const Table8 &table, Ints index) {
    return each<Floats>([&](int i) { return table.values[index.lane[i] & 7]; });
}
inline Floats gather(const float *table, Ints index) { return each<Floats>([&](int i) { return table[index.lane[i]]; }); }
inline Ints gather(const int32_t *table, Ints index) { return each<Ints>([&](int i) { return table[index.lane[i]]; }); }

inline Ints load_bytes(const uint8_t *p) { return each<Ints>([&](int i) { return p[i]; }); }
inline Ints load_signed_bytes(const uint8_t *p) { return each<Ints>([&](int i) { return static_cast<int8_t>(p[i]); }); }
inline void store_bytes(uint8_t *p, Ints x) {
    for (int i = 0; i < WIDTH; ++i) p[i] = static_cast<uint8_t>(x.lane[i]);
}
inline void load_nibbles(const uint8_t *p, Ints &low_lanes, Ints &high_lanes) {
    const auto code = [&](int i) { return i % 2 ? p[i / 2] & 15 : p[i / 2] >> 4; };
    low_lanes = each<Ints>([&](int i) { return code(i); });
    high_lanes = each<Ints>([&](int i) { return code(i + WIDTH); });
}

// The WIDTH codes of WIDTH / 2 bytes, in order, in the low four bits of each lane; above them lies anything.
inline Ints load_codes(const uint8_t *p) {
    return each<Ints>([&](int i) { return i % 2 ? p[i / 2] : p[i / 2] >> 4; });
}

inline void store_nibbles(uint8_t *p, Ints low_lanes, Ints high_lanes) {
    const auto code = [&](int i) { return i < WIDTH ? low_lanes.lane[i] : high_lanes.lane[i - WIDTH]; };
    for (int i = 0; i < WIDTH; ++i) p[i] = static_cast<uint8_t>(code(2 * i) << 4 | code(2 * i + 1));
}

struct HalfTable {
    uint16_t values[16];
};
struct Halves {
    uint16_t lane[32];
};

inline HalfTable bfloat16_table(const Table16 &table) {
    HalfTable halves;
    for (int i = 0; i < 16; ++i) halves.values[i] = float_to_bfloat16(table.values[i]);
    return halves;
}
inline Halves lookup_nibbles(const HalfTable &table, const uint8_t *p) {
    Halves values;
    for (int i = 0; i < 32; ++i) values.lane[i] = table.values[i % 2 ? p[i / 2] & 15 : p[i / 2] >> 4];
    return values;
}
inline void store_halves(uint16_t *p, const Halves &x) { std::memcpy(p, x.lane, sizeof x.lane); }
inline void stream_halves(uint16_t *p, const Halves &x) { store_halves(p, x); }

constexpr int DOUBLE_WIDTH = 4;
struct Doubles {
    double lane[DOUBLE_WIDTH];
};
template <typename Function>
inline Doubles each_double(Function function) {
    return {{function(0), function(1), function(2), function(3)}};
}
inline Doubles low_doubles(Floats x) { return each_double([&](int i) { return static_cast<double>(x.lane[i]); }); }
inline Doubles high_doubles(Floats x) { return each_double([&](int i) { return static_cast<double>(x.lane[4 + i]); }); }
inline void store(double *p, Doubles x) { std::memcpy(p, x.lane, sizeof x.lane); }

// The compiler has these for the vectors of the other instruction sets.
inline Floats operator+(Floats a, Floats b) { return add(a, b); }
inline Floats operator-(Floats a, Floats b) { return sub(a, b); }
inline Floats operator*(Floats a, Floats b) { return mul(a, b); }
inline Floats operator/(Floats a, Floats b) { return div(a, b); }
inline Floats operator+(Floats a, float b) { return add(a, broadcast(b)); }
inline Floats operator*(Floats a, float b) { return mul(a, broadcast(b)); }
inline Doubles operator+(Doubles a, Doubles b) { return each_double([&](int i) { return a.lane[i] + b.lane[i]; }); }
inline Doubles operator*(Doubles a, Doubles b) { return each_double([&](int i) { return a.lane[i] * b.lane[i]; }); }

inline uint32_t largest_half(const uint16_t *p, int64_t count) {
    uint32_t found = 0;
    for (int64_t i = 0; i < count; ++i) {
        const uint32_t magnitude = p[i] & 0x7FFFu;
        found = magnitude > found ? magnitude : found;
    }
    return found;
}

// Lane r of words[j] is word j of the 16 bytes at rows[r] + offset.
inline void transpose_words(const uint8_t *const rows[WIDTH], int64_t offset, Ints words[4]) {
    for (int j = 0; j < 4; ++j) {
        for (int row = 0; row < WIDTH; ++row) std::memcpy(&words[j].lane[row], rows[row] + offset + 4 * j, 4);
    }
}

inline float sum(Floats x) {
    float total = 0.0f;
    for (float lane : x.lane) total += lane;
    return total;
}
inline float largest(Floats x) {
    float result = x.lane[0];
    for (float lane : x.lane) result = lane > result ? lane : result;
    return result;
}
inline int32_t largest(Ints x) {
    int32_t result = x.lane[0];
    for (int32_t lane : x.lane) result = lane > result ? lane : result;
    return result;
}

}  // namespace qlk::QLK_ISA
