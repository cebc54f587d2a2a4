// The dynamic maps with AVX-512 and its byte permutes (VBMI): 64 values at once, whose codes fill a register.
#pragma once

#include "qlk/tables.h"
#include "quick_rank_avx512.h"

namespace qlk::QLK_ISA {

// The first bytes of all levels, their second ones and so on: permutes choose among 256 bytes, but not among floats.
struct LevelBytes {
    alignas(64) uint8_t bytes[4][256];

    constexpr explicit LevelBytes(const float *levels) : bytes() {
        for (int code = 0; code < 256; ++code) {
            const uint32_t bits = __builtin_bit_cast(uint32_t, levels[code]);
            for (int i = 0; i < 4; ++i) bytes[i][code] = static_cast<uint8_t>(bits >> 8 * i);
        }
    }
};

constexpr LevelBytes EXP_AVG_BYTES(DYNAMIC_LEVELS), EXP_AVG_SQ_BYTES(UNSIGNED_DYNAMIC_LEVELS);

// Of 256 bytes the one at each index; `high_half` is the top bit of the indices.
inline __m512i lookup_bytes(const uint8_t *table, __m512i index, __mmask64 high_half) {
    const auto quarter = [&](int i) { return _mm512_load_si512(table + i * 64); };
    const __m512i low = _mm512_permutex2var_epi8(quarter(0), index, quarter(1));
    const __m512i high = _mm512_permutex2var_epi8(quarter(2), index, quarter(3));
    return _mm512_mask_mov_epi8(low, high_half, high);
}

inline Group decode(const LevelBytes &levels, const uint8_t *codes) {
    // Within quarters, bytes of four registers become four registers of floats: so the 16 codes of each vector are
    // first dealt out to the quarters.
    const __m512i quarters = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i index = _mm512_permutexvar_epi32(quarters, _mm512_loadu_si512(codes));
    const __mmask64 high_half = _mm512_movepi8_mask(index);
    const auto bytes = [&](int i) { return lookup_bytes(levels.bytes[i], index, high_half); };
    const __m512i byte_0 = bytes(0), byte_1 = bytes(1), byte_2 = bytes(2), byte_3 = bytes(3);
    const __m512i low_01 = _mm512_unpacklo_epi8(byte_0, byte_1), high_01 = _mm512_unpackhi_epi8(byte_0, byte_1);
    const __m512i low_23 = _mm512_unpacklo_epi8(byte_2, byte_3), high_23 = _mm512_unpackhi_epi8(byte_2, byte_3);
    return {{as_floats(_mm512_unpacklo_epi16(low_01, low_23)), as_floats(_mm512_unpackhi_epi16(low_01, low_23)),
             as_floats(_mm512_unpacklo_epi16(high_01, high_23)), as_floats(_mm512_unpackhi_epi16(high_01, high_23))}};
}

inline Group decode_exp_avg(const uint8_t *codes) { return decode(EXP_AVG_BYTES, codes); }
inline Group decode_exp_avg_sq(const uint8_t *codes) { return decode(EXP_AVG_SQ_BYTES, codes); }

// The ranks, in units and below 256, of four vectors: as bytes in order.
inline __m512i ranks_of(const Ints (&units)[Group::VECTORS]) {
    // Vector i fills bytes 2 i and 2 i + 1 of every eight with the two ranks that it has there.
    constexpr int64_t low = QuickRank::SHIFT, high = 32 + QuickRank::SHIFT;
    const __m512i begins = _mm512_set1_epi64((low | high << 8) * 0x0001'0001'0001'0001);
    __m512i dealt = _mm512_multishift_epi64_epi8(begins, units[0]);
    dealt = _mm512_mask_multishift_epi64_epi8(dealt, 0x0C0C'0C0C'0C0C'0C0C, begins, units[1]);
    dealt = _mm512_mask_multishift_epi64_epi8(dealt, 0x3030'3030'3030'3030, begins, units[2]);
    dealt = _mm512_mask_multishift_epi64_epi8(dealt, 0xC0C0'C0C0'C0C0'C0C0, begins, units[3]);
    alignas(64) static constexpr uint16_t in_order[32] = {0, 4, 8,  12, 16, 20, 24, 28, 1, 5, 9,  13, 17, 21, 25, 29,
                                                          2, 6, 10, 14, 18, 22, 26, 30, 3, 7, 11, 15, 19, 23, 27, 31};
    return _mm512_permutexvar_epi16(_mm512_load_si512(in_order), dealt);
}

inline void encode_exp_avg(const float *values, Floats factor, uint8_t *codes) {
    const auto scaled = [&](int i) { return mul(load(values + i * WIDTH), factor); };
    Ints units[Group::VECTORS];
    Mask negative[Group::VECTORS], certain = first(WIDTH);
    for (int i = 0; i < Group::VECTORS; ++i) units[i] = quick_exp_avg_units(scaled(i), negative[i], certain);
    if (!all(certain)) {
        for (int i = 0; i < Group::VECTORS; ++i) store_bytes(codes + i * WIDTH, find_exp_avg(scaled(i)));
        return;
    }
    const __mmask64 below_zero =
        _mm512_kunpackd(_mm512_kunpackw(negative[3], negative[2]), _mm512_kunpackw(negative[1], negative[0]));
    const __m512i zero = _mm512_set1_epi8(EXP_AVG_ZERO), ranks = ranks_of(units);
    // Saturated: -1 has no level.
    _mm512_storeu_si512(codes, _mm512_mask_subs_epu8(_mm512_add_epi8(zero, ranks), below_zero, zero, ranks));
}

inline void encode_exp_avg_sq(const float *values, Floats factor, uint8_t *codes) {
    const auto scaled = [&](int i) { return mul(load(values + i * WIDTH), factor); };
    Ints units[Group::VECTORS];
    Mask certain = first(WIDTH);
    for (int i = 0; i < Group::VECTORS; ++i) units[i] = quick_exp_avg_sq_units(scaled(i), certain);
    if (!all(certain)) {
        for (int i = 0; i < Group::VECTORS; ++i) store_bytes(codes + i * WIDTH, find_exp_avg_sq(scaled(i)));
        return;
    }
    _mm512_storeu_si512(codes, ranks_of(units));
}

}  // namespace qlk::QLK_ISA
