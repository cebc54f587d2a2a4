// Quantize to 4 bits with AVX-512 and its byte permutes (VBMI): the codes of CellSearch, 64 at a time. Blocks pass in
// groups: one reduction finds the absmax of them all, and one division the reciprocals.
#pragma once

#include <cstdint>
#include <cstring>

#include "cell_search.h"
#include "qlk/blockwise.h"

namespace qlk::QLK_ISA {

constexpr int64_t STEP = 64;  // weights at a time
// Of a group at most: a vector holds the absmax of each block, and what is read again comes from a cache.
constexpr int64_t GROUP_BLOCKS = WIDTH, GROUP_WEIGHTS = 2048;

// Weights of each dtype. `read` gives STEP of them as four vectors of floats; `larger` takes their magnitudes into the
// largest so far, and `bits` turns those into the bits of floats (see magnitude_bits).
struct Float32Step {
    using Element = float;
    static constexpr bool PAIRS_IN_LANES = true;  // two weights of a byte: neighbours in a vector
    static void read(const float *p, Floats (&x)[4]) {
        for (int i = 0; i < 4; ++i) x[i] = load(p + i * WIDTH);
    }
    static Ints larger(Ints largest, const float *p) {
        for (int i = 0; i < 4; ++i) largest = max(largest, as_ints(abs(load(p + i * WIDTH))));
        return largest;
    }
    static Ints bits(Ints largest) { return largest; }
};

// Magnitudes of 16 bits order like their bits. Here the larger of two that share a lane goes to the lane's upper half.
inline Ints larger_halves(Ints largest, const uint16_t *p) {
    for (int i = 0; i < 2; ++i) {
        const __m512i magnitudes = bit_and(_mm512_loadu_si512(p + i * 2 * WIDTH), _mm512_set1_epi16(0x7FFF));
        largest = _mm512_max_epi16(largest, magnitudes);
    }
    return _mm512_max_epi16(largest, _mm512_slli_epi32(largest, 16));
}

struct Float16Step {
    using Element = uint16_t;
    static constexpr bool PAIRS_IN_LANES = true;
    static void read(const uint16_t *p, Floats (&x)[4]) {
        for (int i = 0; i < 4; ++i) x[i] = load_float16(p + i * WIDTH);
    }
    static Ints larger(Ints largest, const uint16_t *p) { return larger_halves(largest, p); }
    static Ints bits(Ints largest) {
        return as_ints(_mm512_cvtph_ps(_mm512_cvtepi32_epi16(shift_right<16>(largest))));
    }
};

struct Bfloat16Step {
    using Element = uint16_t;
    static constexpr bool PAIRS_IN_LANES = false;  // neighbours in lanes of 32 bits: two vectors of floats
    static void read(const uint16_t *p, Floats (&x)[4]) {
        for (int i = 0; i < 2; ++i) {
            const __m512i pairs = _mm512_loadu_si512(p + i * 2 * WIDTH);
            x[2 * i] = as_floats(_mm512_slli_epi32(pairs, 16));
            x[2 * i + 1] = as_floats(bit_and(pairs, upper_half()));
        }
    }
    static Ints larger(Ints largest, const uint16_t *p) { return larger_halves(largest, p); }
    static Ints bits(Ints largest) { return bit_and(largest, upper_half()); }

  private:
    static Ints upper_half() { return broadcast_int(static_cast<int32_t>(0xFFFF0000)); }
};

// Of two vectors, each the largest of as many vectors as lanes, side by side: so for twice as many.
template <int LANES>
inline Ints larger_of_each(Ints a, Ints b) {
    if constexpr (LANES == 1) return max(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    if constexpr (LANES == 2) return max(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
    if constexpr (LANES == 4) return max(_mm512_shuffle_i32x4(a, b, 0x44), _mm512_shuffle_i32x4(a, b, 0xEE));
    return max(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xDD));
}

// The largest of vector(first), vector(first + 1) and so on, each in a lane.
template <int COUNT, typename Vector>
inline Ints largest_of_each(int first, const Vector &vector) {
    if constexpr (COUNT == 1) {
        return vector(first);
    } else {
        const Ints left = largest_of_each<COUNT / 2>(first, vector);
        return larger_of_each<COUNT / 2>(left, largest_of_each<COUNT / 2>(first + COUNT / 2, vector));
    }
}

template <typename Step>
class StepEncoder {
  public:
    explicit StepEncoder(const Cells &cells) : midpoints_(load_table32(cells.midpoints)) {
        // The first weight of a byte looks its code up in the first table, the second, by its offset, in the second.
        alignas(64) uint8_t codes[2 * STEP] = {}, order[STEP];
        for (int i = 0; i < STEP; ++i) {
            const uint8_t code = cells.codes[i / 2 + i % 2];
            codes[i] = static_cast<uint8_t>(code << 4);
            codes[STEP + i] = code;
        }
        first_codes_ = _mm512_load_si512(codes);
        second_codes_ = _mm512_load_si512(codes + STEP);
        // Of two vectors, the cells of the first weights, twice, and those of the second, twice.
        for (int i = 0; i < STEP; ++i) {
            const int pair = i % WIDTH, second = i / (STEP / 2);
            const int lane = Step::PAIRS_IN_LANES ? 2 * pair + second : pair + WIDTH * second;
            order[i] = static_cast<uint8_t>(4 * lane);
        }
        order_ = _mm512_load_si512(order);
        const Mask odd_lanes = 0xAAAA;
        offsets_[0] = select(Step::PAIRS_IN_LANES ? odd_lanes : Mask{0}, cell_offset(SECOND), cell_offset());
        offsets_[1] = Step::PAIRS_IN_LANES ? offsets_[0] : cell_offset(SECOND);
    }

    // STEP weights into half as many bytes.
    void encode(const typename Step::Element *weight, Floats reciprocal, uint8_t *packed) const {
        Floats x[4];
        Ints cells[4];
        Step::read(weight, x);
        for (int i = 0; i < 4; ++i) {
            x[i] = mul(x[i], reciprocal);
            cells[i] = cell_of(x[i], offsets_[i % 2]);
            const Floats from_midpoint = sub(lookup(midpoints_, cells[i]), x[i]);  // negative above it, exactly
            cells[i] = _mm512_shldi_epi32(cells[i], as_ints(from_midpoint), 1);    // twice the cell, and its sign
        }
        const __m512i of_first_half = _mm512_permutex2var_epi8(cells[0], order_, cells[1]);
        const __m512i of_last_half = _mm512_permutex2var_epi8(cells[2], order_, cells[3]);
        const __m512i in_order = _mm512_mask_mov_epi64(of_first_half, 0b11001100, of_last_half);
        const __m512i codes = _mm512_permutex2var_epi8(first_codes_, in_order, second_codes_);
        const __m256i bytes = _mm256_or_si256(_mm512_castsi512_si256(codes), _mm512_extracti64x4_epi64(codes, 1));
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(packed), bytes);
    }

  private:
    static constexpr int SECOND = CELLS;  // a cell's number in the second table

    Table32 midpoints_;
    __m512i first_codes_, second_codes_, order_;
    Floats offsets_[2];
};

template <typename Step>
class GroupQuantizer {
  public:
    GroupQuantizer(const Format &format, const Cells &cells, const void *weight, int64_t block_size, uint8_t *packed,
                   float *absmax)
        : encoder_(cells), weight_(static_cast<const typename Step::Element *>(weight)), packed_(packed),
          absmax_(absmax), block_size_(block_size), byte_of_zeros_(byte_of_zeros(format)) {}

    void quantize(int64_t begin, int64_t end) const {
        const int64_t fitting = GROUP_WEIGHTS > block_size_ ? GROUP_WEIGHTS / block_size_ : 1;
        const int64_t most = fitting < GROUP_BLOCKS ? fitting : GROUP_BLOCKS;
        const auto count_from = [&](int64_t first) {
            return static_cast<int>(end - first < most ? end - first : most);
        };
        Group groups[2];
        bool which = false;
        if (begin < end) read(begin, count_from(begin), groups[which]);
        for (int64_t next; begin < end; begin = next, which = !which) {
            next = begin + groups[which].count;
            // The next group is read first: what this one waits for has then long been there.
            if (next < end) read(next, count_from(next), groups[!which]);
            encode(begin, groups[which]);
        }
    }

  private:
    struct Group {
        int count;
        Mask not_finite;
        alignas(64) float reciprocals[GROUP_BLOCKS];
    };

    // Ask for the STEP weights that lie `distance` ahead, for the second-level cache: the processor's own prefetching
    // ends at each page. The address may lie past the end; nothing is read.
    static void prefetch(const typename Step::Element *weight, int64_t distance) {
        const auto address = reinterpret_cast<uintptr_t>(weight) + static_cast<uintptr_t>(distance) * sizeof(*weight);
        for (uintptr_t line = 0; line < STEP * sizeof(*weight); line += 64) {
            __builtin_prefetch(reinterpret_cast<const void *>(address + line), 0, 2);
        }
    }

    inline __attribute__((always_inline)) void read(int64_t begin, int count, Group &group) const {
        group.count = count;
        const Ints bits = Step::bits(largest_of_each<GROUP_BLOCKS>(0, [&](int block) {
            Ints found = broadcast_int(0);
            if (block >= count) return found;
            const auto *weight = weight_ + (begin + block) * block_size_;
            for (int64_t i = 0; i < block_size_; i += STEP) found = Step::larger(found, weight + i);
            return found;
        }));
        const Ints kept = select(greater(bits, broadcast_int(INFINITY_BITS)), broadcast_int(NAN_BITS), bits);
        store_first(absmax_ + begin, as_floats(kept), count);
        group.not_finite = greater(bits, broadcast_int(INFINITY_BITS - 1));
        store(group.reciprocals, div(broadcast(1.0f), max(as_floats(bits), broadcast(SMALLEST_ABSMAX))));
    }

    inline __attribute__((always_inline)) void encode(int64_t begin, const Group &group) const {
        const StepEncoder<Step> encoder = encoder_;  // a copy that no store below can change: it stays in registers
        for (int block = 0; block < group.count; ++block) {
            const int64_t first = (begin + block) * block_size_;
            const Floats reciprocal = broadcast(group.reciprocals[block]);
            for (int64_t i = 0; i < block_size_; i += STEP) {
                prefetch(weight_ + first + i, 3 * group.count * block_size_);
                encoder.encode(weight_ + first + i, reciprocal, packed_ + (first + i) / 2);
            }
        }
        for (int block = 0; any(group.not_finite) && block < group.count; ++block) {
            const auto bytes = static_cast<size_t>(block_size_ / 2);
            if (group.not_finite >> block & 1) std::memset(packed_ + (begin + block) * bytes, byte_of_zeros_, bytes);
        }
    }

    StepEncoder<Step> encoder_;
    const typename Step::Element *weight_;
    uint8_t *packed_;
    float *absmax_;
    int64_t block_size_;
    uint8_t byte_of_zeros_;
};

// Whole blocks [begin, end), each a multiple of STEP.
template <typename Step>
void quantize_groups(const Format &format, const Cells &cells, const void *weight, int64_t block_size, int64_t begin,
                     int64_t end, uint8_t *packed, float *absmax) {
    GroupQuantizer<Step>(format, cells, weight, block_size, packed, absmax).quantize(begin, end);
}

inline void quantize_groups(const Format &format, const Cells &cells, const void *weight, int dtype, int64_t block_size,
                            int64_t begin, int64_t end, uint8_t *packed, float *absmax) {
    const auto run = dtype == QLK_FLOAT32    ? quantize_groups<Float32Step>
                     : dtype == QLK_BFLOAT16 ? quantize_groups<Bfloat16Step>
                                             : quantize_groups<Float16Step>;
    run(format, cells, weight, block_size, begin, end, packed, absmax);
}

}  // namespace qlk::QLK_ISA
