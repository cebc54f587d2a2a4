// Vectors of 16 floats with AVX-512 (F, BW, DQ, VL). The three simd_*.h offer the same names; the kernels are written
// once against them and compiled once with each.
#pragma once

// gcc 12 warns of the undefined registers inside its own intrinsics (gcc bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include <cstdint>

namespace qlk::QLK_ISA {

constexpr int WIDTH = 16;

using Floats = __m512;
using Ints = __m512i;
using Mask = __mmask16;

// 16 floats to choose from by the low four bits of an index.
struct Table16 {
    __m512 values;
};

inline Floats broadcast(float x) { return _mm512_set1_ps(x); }
inline Ints broadcast_int(int32_t x) { return _mm512_set1_epi32(x); }

inline Mask first(int count) { return static_cast<Mask>(count >= WIDTH ? 0xFFFF : (1u << count) - 1); }

inline Floats load(const float *p) { return _mm512_loadu_ps(p); }
inline Floats load_first(const float *p, int count) { return _mm512_maskz_loadu_ps(first(count), p); }
inline void store(float *p, Floats x) { _mm512_storeu_ps(p, x); }
// Past the caches, for results too large to stay there: `p` lies on a multiple of 64 bytes; ends with stream_end.
inline void stream(float *p, Floats x) { _mm512_stream_ps(p, x); }
inline void stream_end() { _mm_sfence(); }
inline void store_first(float *p, Floats x, int count) { _mm512_mask_storeu_ps(p, first(count), x); }

inline Floats from_bfloat16(__m256i bits) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)); }
inline Floats load_bfloat16(const uint16_t *p) { return from_bfloat16(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p))); }
inline Floats load_bfloat16_first(const uint16_t *p, int count) { return from_bfloat16(_mm256_maskz_loadu_epi16(first(count), p)); }
inline Floats load_float16(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p))); }
inline Floats load_float16_first(const uint16_t *p, int count) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(count), p)); }

// To the nearest bfloat16, ties to even; a NaN stays one.
inline __m256i to_bfloat16(Floats x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    const Mask nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    const __m512i chosen = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7FC00000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(chosen, 16));
}
inline void store_bfloat16(uint16_t *p, Floats x) { _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), to_bfloat16(x)); }
inline void store_bfloat16_first(uint16_t *p, Floats x, int count) { _mm256_mask_storeu_epi16(p, first(count), to_bfloat16(x)); }

inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
inline Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
inline Floats sqrt(Floats a) { return _mm512_sqrt_ps(a); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }  // a b + c, rounded once
inline Floats abs(Floats a) { return _mm512_abs_ps(a); }
// As the instruction: b where either is a NaN.
inline Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
inline Mask greater(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
inline Mask unordered(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q); }
inline bool any(Mask m) { return m != 0; }
inline bool all(Mask m) { return m == 0xFFFF; }
inline Floats select(Mask m, Floats yes, Floats no) { return _mm512_mask_mov_ps(no, m, yes); }
inline Ints select(Mask m, Ints yes, Ints no) { return _mm512_mask_mov_epi32(no, m, yes); }

inline Ints as_ints(Floats x) { return _mm512_castps_si512(x); }  // the bits
inline Floats as_floats(Ints x) { return _mm512_castsi512_ps(x); }

inline Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
inline Ints add_where(Mask m, Ints a, Ints b) { return _mm512_mask_add_epi32(a, m, a, b); }  // a + b, or a
inline Ints sub(Ints a, Ints b) { return _mm512_sub_epi32(a, b); }
inline void store_ints(int32_t *p, Ints x) { _mm512_storeu_si512(p, x); }
inline Ints max(Ints a, Ints b) { return _mm512_max_epi32(a, b); }
inline Ints shift_right(Ints a, int bits) { return _mm512_srl_epi32(a, _mm_cvtsi32_si128(bits)); }
template <int BITS>
inline Ints shift_right(Ints a) { return _mm512_srli_epi32(a, BITS); }
inline Ints bit_and(Ints a, Ints b) { return _mm512_and_si512(a, b); }
inline Ints bit_xor(Ints a, Ints b) { return _mm512_xor_si512(a, b); }
inline Ints mul_low(Ints a, Ints b) { return _mm512_mullo_epi32(a, b); }  // modulo 2^32
inline Mask greater(Ints a, Ints b) { return _mm512_cmpgt_epi32_mask(a, b); }
inline Ints lane_numbers() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
inline Ints truncate(Floats x) { return _mm512_cvttps_epi32(x); }
inline Floats to_floats(Ints x) { return _mm512_cvtepi32_ps(x); }

inline Table16 load_table(const float *values) { return {_mm512_loadu_ps(values)}; }
inline Table16 scale_table(const Table16 &table, float scale) { return {mul(table.values, broadcast(scale))}; }
inline Floats lookup(const Table16 &table, Ints index) { return _mm512_permutexvar_ps(index, table.values); }
// 8 floats to choose from by the low three bits of an index.
struct Table8 {
    __m512 values;
};

inline Table8 load_table8(const float *values) { return {_mm512_broadcast_f32x8(_mm256_loadu_ps(values))}; }
inline Floats lookup(const Table8 &table, Ints index) { return _mm512_permutexvar_ps(index, table.values); }
inline Floats gather(const float *table, Ints index) { return _mm512_i32gather_ps(index, table, 4); }
inline Ints gather(const int32_t *table, Ints index) { return _mm512_i32gather_epi32(index, table, 4); }

inline Ints load_bytes(const uint8_t *p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))); }
inline Ints load_signed_bytes(const uint8_t *p) { return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))); }
inline void store_bytes(uint8_t *p, Ints x) { _mm_storeu_si128(reinterpret_cast<__m128i *>(p), _mm512_cvtepi32_epi8(x)); }

// The 2 * WIDTH codes of WIDTH bytes, in order: the high half of each byte first.
inline void load_nibbles(const uint8_t *p, Ints &low_lanes, Ints &high_lanes) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
    const __m128i mask = _mm_set1_epi8(0x0F);
    const __m128i high = _mm_and_si128(_mm_srli_epi16(bytes, 4), mask);
    const __m128i low = _mm_and_si128(bytes, mask);
    low_lanes = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(high, low));
    high_lanes = _mm512_cvtepu8_epi32(_mm_unpackhi_epi8(high, low));
}

// The WIDTH codes of WIDTH / 2 bytes, in order, in the low four bits of each lane; above them lies anything.
inline Ints load_codes(const uint8_t *p) {
    const __m512i first = _mm512_broadcastd_epi32(_mm_loadu_si32(p));
    const __m512i words = _mm512_mask_broadcastd_epi32(first, 0xFF00, _mm_loadu_si32(p + 4));
    return _mm512_srlv_epi32(words, _mm512_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24, 4, 0, 12, 8, 20, 16, 28, 24));
}

// The mirror of load_nibbles: 2 * WIDTH codes below 16 into WIDTH bytes.
inline void store_nibbles(uint8_t *p, Ints low_lanes, Ints high_lanes) {
    // In each quarter: four of one, four of the other.
    const __m512i halves = _mm512_packus_epi32(low_lanes, high_lanes);
    const __m512i pairs = _mm512_madd_epi16(halves, _mm512_set1_epi32(1 << 16 | 16));
    const __m128i bytes = _mm512_cvtepi32_epi8(pairs);
    const __m128i order = _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
    _mm_storeu_si128(reinterpret_cast<__m128i *>(p), _mm_shuffle_epi8(bytes, order));
}

// 16 values of 16 bits to choose from, and 32 values chosen.
struct HalfTable {
    __m512i values;
};
using Halves = __m512i;

inline HalfTable bfloat16_table(const Table16 &table) { return {_mm512_broadcast_i64x4(to_bfloat16(table.values))}; }

// The values of the 32 codes in 16 bytes, in order: the high half of each byte first.
inline Halves lookup_nibbles(const HalfTable &table, const uint8_t *p) {
    const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
    const __m512i codes = _mm512_or_si512(_mm512_srli_epi32(bytes, 4), _mm512_slli_epi32(bytes, 16));
    return _mm512_permutexvar_epi16(codes, table.values);  // bit 4 chooses between equal halves of the table
}
inline void store_halves(uint16_t *p, Halves x) { _mm512_storeu_si512(p, x); }
inline void stream_halves(uint16_t *p, Halves x) { _mm512_stream_si512(reinterpret_cast<__m512i *>(p), x); }

// Vectors of doubles, each half as long: sums that must not depend on the instruction set.
constexpr int DOUBLE_WIDTH = 8;
using Doubles = __m512d;
inline Doubles low_doubles(Floats x) { return _mm512_cvtps_pd(_mm512_castps512_ps256(x)); }
inline Doubles high_doubles(Floats x) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)); }
inline void store(double *p, Doubles x) { _mm512_storeu_pd(p, x); }

// The bits of the largest magnitude among `count` 16-bit floats, a multiple of 32: magnitudes order like their bits.
inline uint32_t largest_half(const uint16_t *p, int64_t count) {
    __m512i found = _mm512_setzero_si512();
    for (int64_t i = 0; i < count; i += 32) {
        const __m512i bits = _mm512_loadu_si512(p + i);
        found = _mm512_max_epi16(found, _mm512_and_si512(bits, _mm512_set1_epi16(0x7FFF)));
    }
    const __m256i half = _mm256_max_epi16(_mm512_castsi512_si256(found), _mm512_extracti64x4_epi64(found, 1));
    const __m128i quarter = _mm_max_epi16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    // The one instruction that searches a vector finds the smallest: the largest of the complements.
    const __m128i smallest = _mm_minpos_epu16(_mm_xor_si128(quarter, _mm_set1_epi16(0x7FFF)));
    return static_cast<uint32_t>(_mm_extract_epi16(smallest, 0)) ^ 0x7FFF;
}

// 32 floats to choose from by the low five bits of an index.
struct Table32 {
    __m512 low, high;
};

inline Table32 load_table32(const float *values) { return {load(values), load(values + 16)}; }
inline Floats lookup(const Table32 &table, Ints index) { return _mm512_permutex2var_ps(table.low, index, table.high); }

// Lane r of words[j] is word j of the 16 bytes at rows[r] + offset.
inline void transpose_words(const uint8_t *const rows[WIDTH], int64_t offset, Ints words[4]) {
    __m512i four[4];  // four[i]: of rows i, 4 + i, 8 + i and 12 + i
    for (int i = 0; i < 4; ++i) {
        const auto piece = [&](int row) { return _mm_loadu_si128(reinterpret_cast<const __m128i *>(rows[row] + offset)); };
        four[i] = _mm512_castsi128_si512(piece(i));
        four[i] = _mm512_inserti32x4(four[i], piece(4 + i), 1);
        four[i] = _mm512_inserti32x4(four[i], piece(8 + i), 2);
        four[i] = _mm512_inserti32x4(four[i], piece(12 + i), 3);
    }
    const __m512i low_first = _mm512_unpacklo_epi32(four[0], four[1]), high_first = _mm512_unpackhi_epi32(four[0], four[1]);
    const __m512i low_last = _mm512_unpacklo_epi32(four[2], four[3]), high_last = _mm512_unpackhi_epi32(four[2], four[3]);
    words[0] = _mm512_unpacklo_epi64(low_first, low_last);
    words[1] = _mm512_unpackhi_epi64(low_first, low_last);
    words[2] = _mm512_unpacklo_epi64(high_first, high_last);
    words[3] = _mm512_unpackhi_epi64(high_first, high_last);
}

inline float sum(Floats x) { return _mm512_reduce_add_ps(x); }
inline float largest(Floats x) { return _mm512_reduce_max_ps(x); }
inline int32_t largest(Ints x) { return _mm512_reduce_max_epi32(x); }

}  // namespace qlk::QLK_ISA
