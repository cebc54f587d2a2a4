// Vectors of 8 floats with AVX2, FMA and F16C; the names of simd_avx512.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace qlk::QLK_ISA {

constexpr int WIDTH = 8;

using Floats = __m256;
using Ints = __m256i;
struct Mask {
    __m256 lanes;  // the sign bit of each lane counts
};

struct Table16 {
    __m256 low, high;
};

inline Floats broadcast(float x) { return _mm256_set1_ps(x); }
inline Ints broadcast_int(int32_t x) { return _mm256_set1_epi32(x); }

inline __m256i first(int count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

inline Floats load(const float *p) { return _mm256_loadu_ps(p); }
inline Floats load_first(const float *p, int count) { return _mm256_maskload_ps(p, first(count)); }
inline void store(float *p, Floats x) { _mm256_storeu_ps(p, x); }
// Past the caches, for results too large to stay there: `p` lies on a multiple of 64 bytes; ends with stream_end.
inline void stream(float *p, Floats x) { _mm256_stream_ps(p, x); }
inline void stream_end() { _mm_sfence(); }
inline void store_first(float *p, Floats x, int count) { _mm256_maskstore_ps(p, first(count), x); }

inline Floats from_bfloat16(__m128i bits) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16)); }
inline __m128i load_halves_first(const uint16_t *p, int count) {
    alignas(16) uint16_t buffer[8] = {};
    for (int i = 0; i < count && i < 8; ++i) buffer[i] = p[i];
    return _mm_load_si128(reinterpret_cast<const __m128i *>(buffer));
}
inline Floats load_bfloat16(const uint16_t *p) { return from_bfloat16(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))); }
inline Floats load_bfloat16_first(const uint16_t *p, int count) { return from_bfloat16(load_halves_first(p, count)); }
inline Floats load_float16(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))); }
inline Floats load_float16_first(const uint16_t *p, int count) { return _mm256_cvtph_ps(load_halves_first(p, count)); }

inline __m128i to_bfloat16(Floats x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    const __m256 nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
    const __m256i chosen = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7FC00000), _mm256_castps_si256(nan));
    const __m256i halves = _mm256_srli_epi32(chosen, 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
}
inline void store_bfloat16(uint16_t *p, Floats x) { _mm_storeu_si128(reinterpret_cast<__m128i *>(p), to_bfloat16(x)); }
inline void store_bfloat16_first(uint16_t *p, Floats x, int count) {
    alignas(16) uint16_t buffer[8];
    _mm_store_si128(reinterpret_cast<__m128i *>(buffer), to_bfloat16(x));
    for (int i = 0; i < count && i < 8; ++i) p[i] = buffer[i];
}

inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
inline Floats sub(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
inline Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
inline Floats div(Floats a, Floats b) { return _mm256_div_ps(a, b); }
inline Floats sqrt(Floats a) { return _mm256_sqrt_ps(a); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats abs(Floats a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
inline Floats max(Floats a, Floats b) { return _mm256_max_ps(a, b); }
inline Floats min(Floats a, Floats b) { return _mm256_min_ps(a, b); }
inline Mask greater(Floats a, Floats b) { return {_mm256_cmp_ps(a, b, _CMP_GT_OQ)}; }
inline Mask unordered(Floats a, Floats b) { return {_mm256_cmp_ps(a, b, _CMP_UNORD_Q)}; }
inline bool any(Mask m) { return _mm256_movemask_ps(m.lanes) != 0; }
inline Floats select(Mask m, Floats yes, Floats no) { return _mm256_blendv_ps(no, yes, m.lanes); }
inline Ints select(Mask m, Ints yes, Ints no) {
    return _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(no), _mm256_castsi256_ps(yes), m.lanes));
}

inline Ints as_ints(Floats x) { return _mm256_castps_si256(x); }  // the bits
inline Floats as_floats(Ints x) { return _mm256_castsi256_ps(x); }

inline Ints add(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
// a + b, or a; the mask is one that a comparison gave.
inline Ints add_where(Mask m, Ints a, Ints b) {
    return _mm256_add_epi32(a, _mm256_and_si256(_mm256_castps_si256(m.lanes), b));
}
inline Ints sub(Ints a, Ints b) { return _mm256_sub_epi32(a, b); }
inline void store_ints(int32_t *p, Ints x) { _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), x); }
inline Ints max(Ints a, Ints b) { return _mm256_max_epi32(a, b); }
inline Ints shift_right(Ints a, int bits) { return _mm256_srl_epi32(a, _mm_cvtsi32_si128(bits)); }
template <int BITS>
inline Ints shift_right(Ints a) { return _mm256_srli_epi32(a, BITS); }
inline Ints bit_and(Ints a, Ints b) { return _mm256_and_si256(a, b); }
inline Ints bit_xor(Ints a, Ints b) { return _mm256_xor_si256(a, b); }
inline Ints mul_low(Ints a, Ints b) { return _mm256_mullo_epi32(a, b); }  // modulo 2^32
inline Mask greater(Ints a, Ints b) { return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(a, b))}; }
inline Ints lane_numbers() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
inline Ints truncate(Floats x) { return _mm256_cvttps_epi32(x); }
inline Floats to_floats(Ints x) { return _mm256_cvtepi32_ps(x); }

inline Table16 load_table(const float *values) { return {_mm256_loadu_ps(values), _mm256_loadu_ps(values + 8)}; }
inline Table16 scale_table(const Table16 &table, float scale) {
    return {mul(table.low, broadcast(scale)), mul(table.high, broadcast(scale))};
}
inline Floats lookup(const Table16 &table, Ints index) {
    const __m256 low = _mm256_permutevar8x32_ps(table.low, index);
    const __m256 high = _mm256_permutevar8x32_ps(table.high, index);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));  // bit 3 to the sign
}
// 8 floats to choose from by the low three bits of an index.
struct Table8 {
    __m256 values;
};

inline Table8 load_table8(const float *values) { return {_mm256_loadu_ps(values)}; }
inline Floats lookup(const Table8 &table, Ints index) { return _mm256_permutevar8x32_ps(table.values, index); }
// One by one: the gather instruction takes 30 cycles on the many CPUs whose microcode closes the "Downfall" leak.
inline Ints gather(const int32_t *table, Ints index) {
    alignas(32) int32_t at[8];
    _mm256_store_si256(reinterpret_cast<__m256i *>(at), index);
    return _mm256_setr_epi32(table[at[0]], table[at[1]], table[at[2]], table[at[3]], table[at[4]], table[at[5]],
                             table[at[6]], table[at[7]]);
}
inline Floats gather(const float *table, Ints index) {
    alignas(32) int32_t at[8];
    _mm256_store_si256(reinterpret_cast<__m256i *>(at), index);
    return _mm256_setr_ps(table[at[0]], table[at[1]], table[at[2]], table[at[3]], table[at[4]], table[at[5]],
                          table[at[6]], table[at[7]]);
}

inline Ints load_bytes(const uint8_t *p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p))); }
inline Ints load_signed_bytes(const uint8_t *p) { return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p))); }
inline void store_bytes(uint8_t *p, Ints x) {
    const __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i *>(p), _mm_packus_epi16(halves, halves));
}

inline void load_nibbles(const uint8_t *p, Ints &low_lanes, Ints &high_lanes) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(p));
    const __m128i mask = _mm_set1_epi8(0x0F);
    const __m128i high = _mm_and_si128(_mm_srli_epi16(bytes, 4), mask);
    const __m128i codes = _mm_unpacklo_epi8(high, _mm_and_si128(bytes, mask));
    low_lanes = _mm256_cvtepu8_epi32(codes);
    high_lanes = _mm256_cvtepu8_epi32(_mm_srli_si128(codes, 8));
}

// The WIDTH codes of WIDTH / 2 bytes, in order, in the low four bits of each lane; above them lies anything.
inline Ints load_codes(const uint8_t *p) {
    const __m256i word = _mm256_broadcastd_epi32(_mm_loadu_si32(p));
    return _mm256_srlv_epi32(word, _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24));
}

// The mirror of load_nibbles: 2 * WIDTH codes below 16 into WIDTH bytes.
inline void store_nibbles(uint8_t *p, Ints low_lanes, Ints high_lanes) {
    const __m256i halves = _mm256_packus_epi32(low_lanes, high_lanes);  // in each half: four of one, four of the other
    const __m256i pairs = _mm256_madd_epi16(halves, _mm256_set1_epi32(1 << 16 | 16));
    const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
    const __m128i order = _mm_setr_epi8(0, 2, 8, 10, 4, 6, 12, 14, -1, -1, -1, -1, -1, -1, -1, -1);
    _mm_storel_epi64(reinterpret_cast<__m128i *>(p), _mm_shuffle_epi8(words, order));
}

// 16 values of 16 bits to choose from (their low and their high bytes), and 32 values chosen.
struct HalfTable {
    __m128i low_bytes, high_bytes;
};
struct Halves {
    __m128i lanes[4];
};

inline HalfTable bfloat16_table(const Table16 &table) {
    const __m128i first = to_bfloat16(table.low), last = to_bfloat16(table.high);
    const __m128i byte = _mm_set1_epi16(0x00FF);
    return {_mm_packus_epi16(_mm_and_si128(first, byte), _mm_and_si128(last, byte)),
            _mm_packus_epi16(_mm_srli_epi16(first, 8), _mm_srli_epi16(last, 8))};
}

// The values of the 32 codes in 16 bytes, in order: the high half of each byte first.
inline Halves lookup_nibbles(const HalfTable &table, const uint8_t *p) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
    const __m128i mask = _mm_set1_epi8(0x0F);
    const __m128i high = _mm_and_si128(_mm_srli_epi16(bytes, 4), mask);
    const __m128i low = _mm_and_si128(bytes, mask);
    const __m128i codes[2] = {_mm_unpacklo_epi8(high, low), _mm_unpackhi_epi8(high, low)};
    Halves values;
    for (int i = 0; i < 2; ++i) {
        const __m128i low_bytes = _mm_shuffle_epi8(table.low_bytes, codes[i]);
        const __m128i high_bytes = _mm_shuffle_epi8(table.high_bytes, codes[i]);
        values.lanes[2 * i] = _mm_unpacklo_epi8(low_bytes, high_bytes);
        values.lanes[2 * i + 1] = _mm_unpackhi_epi8(low_bytes, high_bytes);
    }
    return values;
}
inline void store_halves(uint16_t *p, Halves x) {
    for (int i = 0; i < 4; ++i) _mm_storeu_si128(reinterpret_cast<__m128i *>(p) + i, x.lanes[i]);
}
inline void stream_halves(uint16_t *p, Halves x) {
    for (int i = 0; i < 4; ++i) _mm_stream_si128(reinterpret_cast<__m128i *>(p) + i, x.lanes[i]);
}

constexpr int DOUBLE_WIDTH = 4;
using Doubles = __m256d;
inline Doubles low_doubles(Floats x) { return _mm256_cvtps_pd(_mm256_castps256_ps128(x)); }
inline Doubles high_doubles(Floats x) { return _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)); }
inline void store(double *p, Doubles x) { _mm256_storeu_pd(p, x); }

// The bits of the largest magnitude among `count` 16-bit floats, a multiple of 32: magnitudes order like their bits.
inline uint32_t largest_half(const uint16_t *p, int64_t count) {
    __m256i found = _mm256_setzero_si256();
    for (int64_t i = 0; i < count; i += 16) {
        const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p + i));
        found = _mm256_max_epi16(found, _mm256_and_si256(bits, _mm256_set1_epi16(0x7FFF)));
    }
    const __m128i half = _mm_max_epi16(_mm256_castsi256_si128(found), _mm256_extracti128_si256(found, 1));
    // The one instruction that searches a vector finds the smallest: the largest of the complements.
    const __m128i smallest = _mm_minpos_epu16(_mm_xor_si128(half, _mm_set1_epi16(0x7FFF)));
    return static_cast<uint32_t>(_mm_extract_epi16(smallest, 0)) ^ 0x7FFF;
}

// Lane r of words[j] is word j of the 16 bytes at rows[r] + offset.
inline void transpose_words(const uint8_t *const rows[WIDTH], int64_t offset, Ints words[4]) {
    __m256i four[4];  // four[i]: of rows i and 4 + i
    for (int i = 0; i < 4; ++i) {
        const auto piece = [&](int row) { return _mm_loadu_si128(reinterpret_cast<const __m128i *>(rows[row] + offset)); };
        four[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(piece(i)), piece(4 + i), 1);
    }
    const __m256i low_first = _mm256_unpacklo_epi32(four[0], four[1]), high_first = _mm256_unpackhi_epi32(four[0], four[1]);
    const __m256i low_last = _mm256_unpacklo_epi32(four[2], four[3]), high_last = _mm256_unpackhi_epi32(four[2], four[3]);
    words[0] = _mm256_unpacklo_epi64(low_first, low_last);
    words[1] = _mm256_unpackhi_epi64(low_first, low_last);
    words[2] = _mm256_unpacklo_epi64(high_first, high_last);
    words[3] = _mm256_unpackhi_epi64(high_first, high_last);
}

inline float sum(Floats x) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
inline float largest(Floats x) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}
inline int32_t largest(Ints x) {
    __m128i half = _mm_max_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    half = _mm_max_epi32(half, _mm_unpackhi_epi64(half, half));
    return _mm_cvtsi128_si32(_mm_max_epi32(half, _mm_shuffle_epi32(half, 1)));
}

}  // namespace qlk::QLK_ISA
