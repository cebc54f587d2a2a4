// Quantize and dequantize, written once over the vocabulary of simd_*.h. Included by each isa_*.cpp.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(QLK_ISA_AVX512)
#include "cell_search.h"
#endif
#include "decode.h"
#include "qlk/blockwise.h"
#include "qlk/double_quant.h"
#include "qlk/float16.h"
#include "quantize.h"
#if defined(QLK_ISA_VBMI)
#include "quantize_vbmi.h"
#endif

namespace qlk::QLK_ISA {

// Weights of each dtype, read as floats; `largest` gives the bits of the largest magnitude (see magnitude_bits) of a
// number of weights that is a multiple of 32.
struct Float32Reader {
    using Element = float;
    static Floats read(const float *p) { return load(p); }
    static float read_one(const float *p) { return *p; }
    static uint32_t largest(const float *p, int64_t count) {
        Ints found = broadcast_int(0);
        for (int64_t i = 0; i < count; i += WIDTH) found = max(found, as_ints(abs(load(p + i))));
        return static_cast<uint32_t>(QLK_ISA::largest(found));
    }
};
struct Bfloat16Reader {
    using Element = uint16_t;
    static Floats read(const uint16_t *p) { return load_bfloat16(p); }
    static float read_one(const uint16_t *p) { return bfloat16_to_float(*p); }
    static uint32_t largest(const uint16_t *p, int64_t count) { return largest_half(p, count) << 16; }
};
struct Float16Reader {
    using Element = uint16_t;
    static Floats read(const uint16_t *p) { return load_float16(p); }
    static float read_one(const uint16_t *p) { return float16_to_float(*p); }
    static uint32_t largest(const uint16_t *p, int64_t count) {
        return bits_of(float16_to_float(static_cast<uint16_t>(largest_half(p, count))));
    }
};

#if defined(QLK_ISA_SCALAR)
// The codes of scaled weights in any 4-bit format: one lane after another.
class RankSearch {
  public:
    explicit RankSearch(const Format &format) : format_(format) {}

    Ints codes(Floats x) const {
        return each<Ints>([&](int i) { return format_.code[rank_of<4>(format_.midpoints, x.lane[i])]; });
    }

  private:
    const Format &format_;
};
#else
// The codes of scaled weights in any 4-bit format: rank_of<4>, four comparisons deep. Each gives one more bit of the
// rank, from the highest on; the bits so far choose the midpoint to compare with next.
class RankSearch {
  public:
    explicit RankSearch(const Format &format) : middle_(broadcast(format.midpoints[7])) {
        float second[8], third[8], fourth[8], codes[16];
        for (int bits = 0; bits < 8; ++bits) {
            second[bits] = format.midpoints[(bits & 1) * 8 + 3];
            third[bits] = format.midpoints[(bits & 3) * 4 + 1];
            fourth[bits] = format.midpoints[bits * 2];
        }
        for (int rank = 0; rank < 16; ++rank) codes[rank] = float_of(format.code[rank]);
        later_[0] = load_table8(second);
        later_[1] = load_table8(third);
        later_[2] = load_table8(fourth);
        codes_ = load_table(codes);
    }

    Ints codes(Floats x) const {
        const Ints one = broadcast_int(1);
        Ints bits = add_where(greater(x, middle_), broadcast_int(0), one);
        for (const Table8 &table : later_) bits = add_where(greater(x, lookup(table, bits)), add(bits, bits), one);
        return as_ints(lookup(codes_, bits));
    }

  private:
    Floats middle_;
    Table8 later_[3];
    Table16 codes_;
};
#endif

// Codes of a 4-bit format, two in a byte.
template <typename Search>
class NibbleEncoder {
  public:
    static constexpr int64_t STEP = 2 * WIDTH;

    NibbleEncoder(const Format &format, const Search &search) : format_(format), search_(search) {}

    // STEP weights into WIDTH bytes.
    template <typename Reader>
    void encode_step(const typename Reader::Element *weight, Floats reciprocal, uint8_t *packed) const {
        const Ints first_half = search_.codes(mul(Reader::read(weight), reciprocal));
        const Ints second_half = search_.codes(mul(Reader::read(weight + WIDTH), reciprocal));
        store_nibbles(packed, first_half, second_half);
    }

    // The last weights of a block, fewer than 32; an odd one shares its byte with the code of zero.
    template <typename Reader>
    void encode_rest(const typename Reader::Element *weight, int64_t count, float reciprocal, uint8_t *packed) const {
        for (int64_t i = 0; i < count; i += 2) {
            const float first = Reader::read_one(weight + i) * reciprocal;
            const float second = i + 1 < count ? Reader::read_one(weight + i + 1) * reciprocal : 0.0f;
            packed[i >> 1] = pack_nibbles(encode(format_, first), encode(format_, second));
        }
    }

    uint8_t byte_of_zeros() const { return qlk::byte_of_zeros(format_); }
    static int64_t bytes(int64_t count) { return (count + 1) >> 1; }

  private:
    const Format &format_;
    Search search_;
};

// Codes of an 8-bit format: see rank_of_integer.
class ByteEncoder {
  public:
    static constexpr int64_t STEP = WIDTH;

    explicit ByteEncoder(const Format &format)
        : format_(format), half_(static_cast<float>(format.levels / 2)), first_code_(format.code[0]) {}

    template <typename Reader>
    void encode_step(const typename Reader::Element *weight, Floats reciprocal, uint8_t *packed) const {
        const Ints rank = ranks(mul(Reader::read(weight), reciprocal));
        store_bytes(packed, bit_and(add(rank, broadcast_int(first_code_)), broadcast_int(0xFF)));
    }

    template <typename Reader>
    void encode_rest(const typename Reader::Element *weight, int64_t count, float reciprocal, uint8_t *packed) const {
        for (int64_t i = 0; i < count; ++i) packed[i] = encode(format_, Reader::read_one(weight + i) * reciprocal);
    }

    uint8_t byte_of_zeros() const { return qlk::byte_of_zeros(format_); }
    static int64_t bytes(int64_t count) { return count; }

  private:
    // Arithmetic gives the rank, unless a value lies so near to a tie that rounding might decide: 2^-12 of a step is
    // far more than the error. Then every midpoint is looked up, which is slow.
    Ints ranks(Floats x) const {
        const Floats steps = add(mul(x, broadcast(half_)), broadcast(half_ + 0.5f));
        const Ints rank = truncate(steps);
        const Floats from_middle = abs(sub(sub(steps, to_floats(rank)), broadcast(0.5f)));
        if (any(greater(from_middle, broadcast(0.5f - 1.0f / 4096)))) return ranks_near_ties(x);
        return rank;
    }

    Ints ranks_near_ties(Floats x) const {
        const Ints guess = truncate(add(mul(x, broadcast(half_)), broadcast(half_ + GUESS_BELOW)));
        return add_where(greater(x, gather(format_.midpoints, guess)), guess, broadcast_int(1));
    }

    const Format &format_;
    float half_;
    int first_code_;  // codes count up from it, modulo 256
};

template <typename Reader, typename Encoder>
inline __attribute__((always_inline)) float quantize_block(const Encoder &encoder,
                                                           const typename Reader::Element *weight, int64_t count,
                                                           uint8_t *packed) {
    const int64_t whole = count & ~int64_t{31};
    uint32_t most = Reader::largest(weight, whole);
    for (int64_t i = whole; i < count; ++i) {
        const uint32_t bits = magnitude_bits(Reader::read_one(weight + i));
        most = bits > most ? bits : most;
    }
    const float absmax = absmax_of(most);
    if (__builtin_expect(not_finite(most), 0)) {
        std::memset(packed, encoder.byte_of_zeros(), static_cast<size_t>(Encoder::bytes(count)));
        return absmax;
    }
    const float reciprocal = reciprocal_of(absmax);
    for (int64_t i = 0; i < whole; i += Encoder::STEP) {
        encoder.template encode_step<Reader>(weight + i, broadcast(reciprocal), packed + Encoder::bytes(i));
    }
    encoder.template encode_rest<Reader>(weight + whole, count - whole, reciprocal, packed + Encoder::bytes(whole));
    return absmax;
}

// Ask for the weights 2 KB ahead, which saves a fifth of the time: the processor's own prefetching ends at each page.
// The address may lie past the end; nothing is read.
template <typename Element>
inline void prefetch(const Element *weight, int64_t count) {
    const auto address = reinterpret_cast<uintptr_t>(weight) + 2048;
    const auto bytes = static_cast<uintptr_t>(count) * sizeof(Element);
    for (uintptr_t line = 0; line < bytes; line += 64) {
        __builtin_prefetch(reinterpret_cast<const void *>(address + line));
    }
}

template <typename Reader, typename Encoder>
void quantize_blocks(const void *weight, int64_t numel, Encoder encoder, int64_t block_size, int64_t begin, int64_t end,
                     uint8_t *packed, float *absmax) {
    const auto *elements = static_cast<const typename Reader::Element *>(weight);
    int64_t block = begin;
    if (block_size == 64) {  // the usual size gets loops of known length
        for (const int64_t whole = numel / 64; block < end && block < whole; ++block) {
            const int64_t first = block * 64;
            prefetch(elements + first, 64);
            absmax[block] = quantize_block<Reader>(encoder, elements + first, 64, packed + Encoder::bytes(first));
        }
    }
    for (; block < end; ++block) {
        const int64_t first = block * block_size;
        const int64_t count = numel - first < block_size ? numel - first : block_size;
        prefetch(elements + first, count);
        absmax[block] = quantize_block<Reader>(encoder, elements + first, count, packed + Encoder::bytes(first));
    }
}

template <typename Encoder>
void quantize_with(const Encoder &encoder, const void *weight, int dtype, int64_t numel, int64_t block_size,
                   int64_t begin, int64_t end, uint8_t *packed, float *absmax) {
    if (dtype == QLK_FLOAT32) {
        quantize_blocks<Float32Reader>(weight, numel, encoder, block_size, begin, end, packed, absmax);
    } else if (dtype == QLK_BFLOAT16) {
        quantize_blocks<Bfloat16Reader>(weight, numel, encoder, block_size, begin, end, packed, absmax);
    } else {
        quantize_blocks<Float16Reader>(weight, numel, encoder, block_size, begin, end, packed, absmax);
    }
}

inline void quantize(const void *weight, int dtype, int64_t numel, int format, int64_t block_size, int64_t begin,
                     int64_t end, uint8_t *packed, float *absmax) {
    const Format &known = FORMATS[format];
    if (known.bits == 8) {
        return quantize_with(ByteEncoder(known), weight, dtype, numel, block_size, begin, end, packed, absmax);
    }
#if defined(QLK_ISA_AVX512)
    const Cells cells(known);
    if (cells.fits) {
#if defined(QLK_ISA_VBMI)
        if (block_size % STEP == 0) {
            const int64_t whole = numel / block_size < end ? numel / block_size : end;
            quantize_groups(known, cells, weight, dtype, block_size, begin, whole, packed, absmax);
            begin = whole;
        }
#endif
        const NibbleEncoder<CellSearch> encoder(known, CellSearch(cells));
        return quantize_with(encoder, weight, dtype, numel, block_size, begin, end, packed, absmax);
    }
#endif
    const NibbleEncoder<RankSearch> encoder(known, RankSearch(known));
    quantize_with(encoder, weight, dtype, numel, block_size, begin, end, packed, absmax);
}

template <typename Write>
void dequantize_to(const qlk_weight &weight, int dtype, int64_t begin, int64_t end, void *out) {
    const Decoder decoder(weight);
    if (dtype == QLK_FLOAT32) {
        decoder.decode<Write>(begin, end - begin, static_cast<float *>(out) + begin);
    } else {
        decoder.decode<Write>(begin, end - begin, static_cast<uint16_t *>(out) + begin);
    }
}

inline void dequantize(const qlk_weight &weight, int dtype, int64_t begin, int64_t end, bool past_caches, void *out) {
    if (past_caches) {
        dequantize_to<Streamed>(weight, dtype, begin, end, out);
        stream_end();
    } else {
        dequantize_to<Stored>(weight, dtype, begin, end, out);
    }
}

// Codes of scaled absmax values, which are finite: encode_absmax, looked up by the step of the grid.
inline void encode_absmax(Floats scaled, uint8_t *codes) {
    const Floats one = broadcast(1.0f);
    const Floats clamped = min(max(scaled, broadcast(-1.0f)), one);
    const Floats on_grid = mul(mul(add(clamped, one), broadcast(0.5f)), broadcast(DYNAMIC_GRID));
    int32_t steps[WIDTH];
    store_ints(steps, truncate(add(on_grid, broadcast(0.5f))));
    for (int i = 0; i < WIDTH; ++i) codes[i] = absmax_codes.of_step[steps[i]];
}

inline float quantize_absmax_block(const float *absmax, int64_t count, float offset, uint8_t *codes) {
    Ints found = broadcast_int(0);
    int64_t i = 0;
    for (; count - i >= WIDTH; i += WIDTH) found = max(found, as_ints(abs(sub(load(absmax + i), broadcast(offset)))));
    uint32_t most = static_cast<uint32_t>(largest(found));
    for (; i < count; ++i) {
        const uint32_t bits = magnitude_bits(absmax[i] - offset);
        most = bits > most ? bits : most;
    }
    if (not_finite(most) || most == 0) {  // where all are equal to the offset, bitsandbytes writes the lowest code
        std::memset(codes, most == 0 ? 0 : qlk::encode_absmax(0.0f), static_cast<size_t>(count));
        return absmax_of(most);
    }
    const float reciprocal = reciprocal_of(absmax_of(most));
    for (i = 0; count - i >= WIDTH; i += WIDTH) {
        const Floats scaled = mul(sub(load(absmax + i), broadcast(offset)), broadcast(reciprocal));
        encode_absmax(scaled, codes + i);
    }
    for (; i < count; ++i) codes[i] = qlk::encode_absmax((absmax[i] - offset) * reciprocal);
    return absmax_of(most);
}

inline void quantize_absmax(const float *absmax, int64_t blocks, int64_t nested_block_size, float offset, int64_t begin,
                            int64_t end, uint8_t *codes, float *nested_absmax) {
    for (int64_t nested = begin; nested < end; ++nested) {
        const int64_t first = nested * nested_block_size;
        const int64_t count = blocks - first < nested_block_size ? blocks - first : nested_block_size;
        nested_absmax[nested] = quantize_absmax_block(absmax + first, count, offset, codes + first);
    }
}

inline void dequantize_absmax(const uint8_t *codes, const float *nested_absmax, float offset, int64_t blocks,
                              int64_t nested_block_size, int64_t begin, int64_t end, float *absmax) {
    for (int64_t nested = begin; nested < end; ++nested) {
        const float scale = nested_absmax[nested];
        int64_t i = nested * nested_block_size;
        const int64_t stop = blocks - i < nested_block_size ? blocks : i + nested_block_size;
        for (; stop - i >= WIDTH; i += WIDTH) {
            const Floats levels = gather(DYNAMIC_LEVELS, load_bytes(codes + i));
            store(absmax + i, add(mul(levels, broadcast(scale)), broadcast(offset)));
        }
        for (; i < stop; ++i) absmax[i] = decode_absmax(codes[i], scale, offset);
    }
}

constexpr QuantizeKernels quantize_kernels = {quantize, dequantize, quantize_absmax, dequantize_absmax};

}  // namespace qlk::QLK_ISA
