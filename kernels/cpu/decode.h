// Reading weights out of a quantized matrix: codes, absmax, and absmax that is itself quantized, in one pass.
// Included by each isa_*.cpp after its simd_*.h.
#pragma once

#include "qlk.h"
#include "qlk/blockwise.h"
#include "qlk/double_quant.h"
#include "qlk/float16.h"

namespace qlk::QLK_ISA {

// How decoded weights go to memory: through the caches, or past them.
struct Stored {
    static void put(float *p, Floats x) { store(p, x); }
    static void put(uint16_t *p, const Halves &x) { store_halves(p, x); }
};
struct Streamed {
    static void put(float *p, Floats x) { stream(p, x); }
    static void put(uint16_t *p, const Halves &x) { stream_halves(p, x); }
};

class Decoder {
  public:
    explicit Decoder(const qlk_weight &weight)
        : weight_(weight),
          format_(FORMATS[weight.format]),
          levels_(load_table(format_.value)),
          block_shift_(log2(weight.block_size)),
          nested_shift_(weight.nested_absmax != nullptr ? log2(weight.nested_block_size) : 0) {}

    float absmax(int64_t block) const {
        if (weight_.nested_absmax == nullptr) return static_cast<const float *>(weight_.absmax)[block];
        const uint8_t code = static_cast<const uint8_t *>(weight_.absmax)[block];
        return decode_absmax(code, weight_.nested_absmax[block >> nested_shift_], *weight_.offset);
    }

    // The absmax of the `count` blocks from number `block` on: where they lie, or decoded into `room`.
    const float *absmaxes(int64_t block, int64_t count, float *room) const {
        if (weight_.nested_absmax == nullptr) return static_cast<const float *>(weight_.absmax) + block;
        for (int64_t i = 0; i < count; ++i) room[i] = absmax(block + i);
        return room;
    }

    // Write the `count` weights from number `begin` on, in the order in which they lie, as float or as bfloat16
    // (uint16_t). Streamed: `out` lies on a multiple of 64 bytes and `begin` is a multiple of 32.
    template <typename Write = Stored, typename Out>
    void decode(int64_t begin, int64_t count, Out *out) const {
        const int64_t end = begin + count;
        if (format_.bits == 4 && weight_.block_size == USUAL_BLOCK && begin % USUAL_BLOCK == 0) {
            decode_usual_blocks<Write>(begin, end, out);
        }
        while (begin < end) {
            const int64_t block = begin >> block_shift_;
            const int64_t block_end = (block + 1) << block_shift_;
            const int64_t stop = block_end < end ? block_end : end;
            if (format_.bits == 8) {
                decode_bytes<Write>(begin, stop, absmax(block), out);
            } else {
                decode_nibbles<Write>(begin, stop, absmax(block), out);
            }
            out += stop - begin;
            begin = stop;
        }
    }

  private:
    static constexpr int64_t USUAL_BLOCK = 64;

    // The whole blocks of the usual size, in loops of known length; `begin` and `out` pass on to what is left.
    template <typename Write, typename Out>
    void decode_usual_blocks(int64_t &begin, int64_t end, Out *&out) const {
        const Table16 levels = levels_;  // a copy that stores to `out` cannot change
        const uint8_t *packed = weight_.packed + begin / 2;
        for (; end - begin >= USUAL_BLOCK; begin += USUAL_BLOCK, packed += USUAL_BLOCK / 2, out += USUAL_BLOCK) {
            write_block<Write>(scale_table(levels, absmax(begin / USUAL_BLOCK)), packed, out);
        }
    }

    template <typename Write>
    static void write_block(const Table16 &scaled, const uint8_t *packed, float *out) {
#pragma GCC unroll 8
        for (int64_t i = 0; i < USUAL_BLOCK; i += 2 * WIDTH) {
            Ints first_half, second_half;
            load_nibbles(packed + i / 2, first_half, second_half);
            Write::put(out + i, lookup(scaled, first_half));
            Write::put(out + i + WIDTH, lookup(scaled, second_half));
        }
    }

    template <typename Write>
    static void write_block(const Table16 &scaled, const uint8_t *packed, uint16_t *out) {
        const HalfTable rounded = bfloat16_table(scaled);
#pragma GCC unroll 2
        for (int64_t i = 0; i < USUAL_BLOCK; i += 32) Write::put(out + i, lookup_nibbles(rounded, packed + i / 2));
    }

    static int log2(int64_t power) { return __builtin_ctzll(static_cast<unsigned long long>(power)); }

    static void put_one(float *p, float x) { *p = x; }
    static void put_one(uint16_t *p, float x) { *p = float_to_bfloat16(x); }

    template <typename Out>
    void decode_nibble(int64_t index, float scale, Out *out) const {
        put_one(out, qlk::decode(format_, nibble_of(weight_.packed, index), scale));
    }

    // Scaling the 16 levels gives the same products as scaling every weight.
    template <typename Write>
    void decode_nibbles(int64_t begin, int64_t end, float scale, float *out) const {
        if (begin & 1 && begin < end) decode_nibble(begin++, scale, out++);
        const Table16 scaled = scale_table(levels_, scale);
        for (; end - begin >= 2 * WIDTH; begin += 2 * WIDTH, out += 2 * WIDTH) {
            Ints first_half, second_half;
            load_nibbles(weight_.packed + (begin >> 1), first_half, second_half);
            Write::put(out, lookup(scaled, first_half));
            Write::put(out + WIDTH, lookup(scaled, second_half));
        }
        for (; begin < end; ++begin) decode_nibble(begin, scale, out++);
    }

    // The scaled levels are rounded to bfloat16 before they are chosen from: 16 roundings a block.
    template <typename Write>
    void decode_nibbles(int64_t begin, int64_t end, float scale, uint16_t *out) const {
        if (begin & 1 && begin < end) decode_nibble(begin++, scale, out++);
        const HalfTable scaled = bfloat16_table(scale_table(levels_, scale));
        for (; end - begin >= 32; begin += 32, out += 32) {
            Write::put(out, lookup_nibbles(scaled, weight_.packed + (begin >> 1)));
        }
        for (; begin < end; ++begin) decode_nibble(begin, scale, out++);
    }

    // Formats of 8 bits hold an integer over the largest; a division is exact where a table would cost a gather, which
    // current microcode makes slow, and which waits for streamed stores. -128 stands for no level and reads as zero.
    Floats byte_levels(int64_t index) const {
        const Floats integer = to_floats(load_signed_bytes(weight_.packed + index));
        const Floats known = select(greater(broadcast(-127.5f), integer), broadcast(0.0f), integer);
        return div(known, broadcast(static_cast<float>(format_.levels / 2)));
    }

    static void put(float *p, Floats x, Stored) { store(p, x); }
    static void put(float *p, Floats x, Streamed) { stream(p, x); }
    template <typename Write>
    static void put(uint16_t *p, Floats x, Write) { store_bfloat16(p, x); }

    template <typename Write, typename Out>
    void decode_bytes(int64_t begin, int64_t end, float scale, Out *out) const {
        const Floats factor = broadcast(scale);
        for (; end - begin >= WIDTH; begin += WIDTH, out += WIDTH) put(out, mul(byte_levels(begin), factor), Write());
        for (; begin < end; ++begin) put_one(out++, qlk::decode(format_, weight_.packed[begin], scale));
    }

    const qlk_weight &weight_;
    const Format &format_;
    Table16 levels_;
    int block_shift_;
    int nested_shift_;
};

}  // namespace qlk::QLK_ISA
