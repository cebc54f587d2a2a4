// The bfloat16 units of AVX-512, beside simd_avx512.h: two neighbours along the inner dimension are multiplied and
// added to a float sum at once. Every product is exact and every sum rounded to nearest; denormals count as zero.
// Instruction sets without such units have the same names, declared and never called.
#pragma once

#include <cstdint>

namespace qlk::QLK_ISA {

#if defined(QLK_ISA_BFLOAT16)

constexpr bool HAS_BFLOAT16_UNITS = true;

using Pairs = __m512i;  // a pair a lane, its first value in the low half

inline Pairs load_pairs(const uint32_t *p) { return _mm512_loadu_si512(p); }
inline void store_pairs(uint32_t *p, Pairs x) { _mm512_storeu_si512(p, x); }
inline Pairs broadcast_pair(const uint16_t *p) { return _mm512_broadcastd_epi32(_mm_loadu_si32(p)); }

// sum + a.first b.first + a.second b.second
inline Floats add_products(Floats sum, Pairs a, Pairs b) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}

// To the nearest bfloat16, ties to even.
inline Pairs pair_up(Floats first, Floats second) {
    const Pairs halves = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));  // all of first, all of second
    const Pairs of_second = _mm512_slli_epi32(add(lane_numbers(), broadcast_int(WIDTH)), 16);
    return _mm512_permutexvar_epi16(_mm512_or_si512(of_second, lane_numbers()), halves);
}

// The same of lanes that are pairs already: those of `first`, then those of `second`.
inline Pairs round_pairs(Floats first, Floats second) {
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
}

// Each lane of the low (high) half twice.
inline Floats repeat_low(Floats x) {
    return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7), x);
}
inline Floats repeat_high(Floats x) {
    return _mm512_permutexvar_ps(_mm512_setr_epi32(8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 15), x);
}

// Lanes 2 r and 2 r + 1 of words[2 j] are the double word j of the 16 bytes at rows[r] + offset; of words[2 j + 1], at
// rows[8 + r].
inline void transpose_double_words(const uint8_t *const rows[WIDTH], int64_t offset, Ints words[4]) {
    for (int half = 0; half < 2; ++half) {
        const auto piece = [&](int row) {
            return _mm_loadu_si128(reinterpret_cast<const __m128i *>(rows[half * 8 + row] + offset));
        };
        const auto four = [&](int row) {  // of every other row
            __m512i pieces = _mm512_castsi128_si512(piece(row));
            pieces = _mm512_inserti32x4(pieces, piece(row + 2), 1);
            pieces = _mm512_inserti32x4(pieces, piece(row + 4), 2);
            return _mm512_inserti32x4(pieces, piece(row + 6), 3);
        };
        const __m512i even = four(0), odd = four(1);
        words[half] = _mm512_unpacklo_epi64(even, odd);
        words[half + 2] = _mm512_unpackhi_epi64(even, odd);
    }
}

// The levels of two blocks, rounded to bfloat16.
struct PairTables {
    __m512i values;
};

inline PairTables pair_tables(const Table16 &first, const Table16 &second) {
    return {reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second.values, first.values))};
}

// The values of the 32 codes in 16 bytes of block NUMBER (0, 1), in quarters: quarter i is of the bytes from
// 8 (i % 2) + 2 (i / 2) on, of each its high half first.
template <int NUMBER>
inline Pairs lookup_pairs(const PairTables &tables, const uint8_t *p) {
    const __m512i bytes = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
    // The bits of a 64-bit lane at which each of its four codes begins; what follows a code is cut off after it.
    constexpr int64_t begins = 0x0008'000C'0000'0004, next = 0x0010'0010'0010'0010;
    const __m512i codes = _mm512_multishift_epi64_epi8(
        _mm512_set_epi64(begins + 3 * next, begins + 3 * next, begins + 2 * next, begins + 2 * next, begins + next,
                         begins + next, begins, begins),
        bytes);
    const __m512i code = broadcast_int(0x000F'000F), offset = broadcast_int(NUMBER * 0x0010'0010);
    constexpr int and_then_or = 0xEA;
    return _mm512_permutexvar_epi16(_mm512_ternarylogic_epi32(codes, code, offset, and_then_or), tables.values);
}

#else

constexpr bool HAS_BFLOAT16_UNITS = false;

struct Pairs {};
struct PairTables {};
Pairs load_pairs(const uint32_t *p);
void store_pairs(uint32_t *p, Pairs x);
Pairs broadcast_pair(const uint16_t *p);
Floats add_products(Floats sum, Pairs a, Pairs b);
Pairs pair_up(Floats first, Floats second);
Pairs round_pairs(Floats first, Floats second);
Floats repeat_low(Floats x);
Floats repeat_high(Floats x);
void transpose_double_words(const uint8_t *const rows[WIDTH], int64_t offset, Ints words[4]);
PairTables pair_tables(const Table16 &first, const Table16 &second);
template <int NUMBER>
Pairs lookup_pairs(const PairTables &tables, const uint8_t *p);

#endif

}  // namespace qlk::QLK_ISA
