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

// 16 bfloat16 to choose from by the low four bits of an index.
struct PairTable {
    __m512i values;
};

inline PairTable pair_table(const Table16 &table) {
    return {_mm512_broadcast_i64x4(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(table.values)))};
}

// The values of the 32 codes in 16 bytes, in order: the high half of each byte first.
inline Pairs lookup_pairs(const PairTable &table, const uint8_t *p) {
    const __m512i bytes = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
    const __m512i number = mul_low(lane_numbers(), broadcast_int(0x10001)), empty = broadcast_int(INT32_MIN | 0x8000);
    const __m512i words = _mm512_shuffle_epi8(bytes, _mm512_or_si512(number, empty));  // two of each byte
    const __m512i codes = _mm512_srlv_epi16(words, broadcast_int(4));
    return _mm512_permutexvar_epi16(codes, table.values);  // bit 4 chooses between equal halves of the table
}

#else

constexpr bool HAS_BFLOAT16_UNITS = false;

struct Pairs {};
struct PairTable {};
Pairs load_pairs(const uint32_t *p);
void store_pairs(uint32_t *p, Pairs x);
Pairs broadcast_pair(const uint16_t *p);
Floats add_products(Floats sum, Pairs a, Pairs b);
Pairs pair_up(Floats first, Floats second);
PairTable pair_table(const Table16 &table);
Pairs lookup_pairs(const PairTable &table, const uint8_t *p);

#endif

}  // namespace qlk::QLK_ISA
