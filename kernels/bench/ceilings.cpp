// What bounds every kernel of a machine: multiply-adds that wait for nothing, and bytes that are read and written with
// nothing done to them. Built and called by ceilings.py.
#include <omp.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#include <cstdint>

#ifdef __AVX512F__
constexpr int BYTES = 64, CHAINS = 24;
#else
constexpr int BYTES = 32, CHAINS = 12;
#endif
typedef float Vector __attribute__((vector_size(BYTES)));
typedef int64_t Words __attribute__((vector_size(BYTES)));

#if defined(__AVX512F__)
static void stream(char *to, Words value) { _mm512_stream_si512(reinterpret_cast<__m512i *>(to), (__m512i)value); }
static void stream_end() { _mm_sfence(); }
#elif defined(__AVX2__)
static void stream(char *to, Words value) { _mm256_stream_si256(reinterpret_cast<__m256i *>(to), (__m256i)value); }
static void stream_end() { _mm_sfence(); }
#else
static void stream(char *to, Words value) { *reinterpret_cast<Words *>(to) = value; }
static void stream_end() {}
#endif

constexpr int64_t LINE = 64, PIECE = 1024, AHEAD = 2048;  // bytes

static float chains(int64_t steps, float start) {
    Vector sums[CHAINS], factor, addend;
    for (int lane = 0; lane < BYTES / 4; ++lane) factor[lane] = 0.999f, addend[lane] = start;
    for (auto &sum : sums) sum = addend;
    for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 24
        for (int i = 0; i < CHAINS; ++i) sums[i] = sums[i] * factor + addend;
    }
    float total = 0;
    for (const auto &sum : sums) total += sum[0];
    return total;
}

// The same of pairs of bfloat16, where there are units for them; operations count as those of float32 do.
#if defined(__AVX512BF16__)
constexpr int BFLOAT16_ADVANTAGE = 2;
static float bfloat16_chains(int64_t steps, float start) {
    __m512 sums[CHAINS];
    const __m512 small = _mm512_set1_ps(start);
    const __m512bh factor = _mm512_cvtne2ps_pbh(small, small);
    for (auto &sum : sums) sum = small;
    for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 24
        for (int i = 0; i < CHAINS; ++i) sums[i] = _mm512_dpbf16_ps(sums[i], factor, factor);
    }
    float total = 0;
    for (const auto &sum : sums) total += sum[0];
    return total;
}
#else
constexpr int BFLOAT16_ADVANTAGE = 1;
static float bfloat16_chains(int64_t steps, float start) { return chains(steps, start); }
#endif

// Every line is asked for or none: asking for some of them keeps the processor's own prefetching from the others.
template <bool PREFETCH>
static Words read(const char *from, int64_t bytes) {
    Words sums[4] = {};
    int64_t at = 0;
    for (; at + 4 * BYTES <= bytes; at += 4 * BYTES) {
        for (int64_t line = 0; PREFETCH && line < 4 * BYTES; line += LINE) __builtin_prefetch(from + at + AHEAD + line);
        for (int i = 0; i < 4; ++i) sums[i] += *reinterpret_cast<const Words *>(from + at + i * BYTES);
    }
    for (; at < bytes; at += BYTES) sums[0] += *reinterpret_cast<const Words *>(from + at);
    return sums[0] + sums[1] + sums[2] + sums[3];
}

static void write(char *to, int64_t bytes, bool past_caches) {
    const Words value = {1};
    for (int64_t at = 0; at < bytes; at += BYTES) {
        if (past_caches) {
            stream(to + at, value);
        } else {
            *reinterpret_cast<Words *>(to + at) = value;
        }
    }
}

static int64_t whole_lines(int64_t bytes, int64_t piece, int64_t pieces) { return bytes / LINE * piece / pieces * LINE; }

extern "C" {

// Multiply-adds: every thread does the number returned here, an addition and a multiplication each.
int64_t multiply_adds(int64_t steps, int threads, int in_bfloat16) {
    float total = 0;
#pragma omp parallel num_threads(threads) reduction(+ : total)
    {
        const float start = 1e-9f * static_cast<float>(omp_get_thread_num() + 1);
        total += in_bfloat16 ? bfloat16_chains(steps, start) : chains(steps, start);
    }
    const int64_t done = steps * CHAINS * (BYTES / 4) * (in_bfloat16 ? BFLOAT16_ADVANTAGE : 1);
    return total == 12345.0f ? 0 : done;  // so that nothing is left out
}

// Reads `read_bytes` and writes `written_bytes`, piece by piece in turn; both begin on a cache line. In place (`to` is
// null): writes the first bytes of each piece that it has read. Memory is cut into so many streams, whose pieces take
// turns: a kernel may read several arrays side by side.
int64_t move(char *from, int64_t read_bytes, char *to, int64_t written_bytes, int streams, int prefetch,
             int past_caches, int threads) {
    const int64_t from_stream = whole_lines(read_bytes, 1, streams), to_stream = whole_lines(written_bytes, 1, streams);
    const int64_t pieces = (from_stream + to_stream) / PIECE + 1;
    const auto read_piece = prefetch != 0 ? read<true> : read<false>;
    int64_t total = 0;
#pragma omp parallel num_threads(threads) reduction(+ : total)
    {
#pragma omp for schedule(static)
        for (int64_t piece = 0; piece < pieces; ++piece) {
            const int64_t begin = whole_lines(from_stream, piece, pieces);
            const int64_t end = whole_lines(from_stream, piece + 1, pieces);
            const int64_t first = whole_lines(to_stream, piece, pieces);
            const int64_t bytes = whole_lines(to_stream, piece + 1, pieces) - first;
            for (int stream = 0; stream < streams; ++stream) {
                char *read_from = from + stream * from_stream + begin;
                total += read_piece(read_from, end - begin)[0];
                write(to == nullptr ? read_from : to + stream * to_stream + first, bytes, past_caches != 0);
            }
        }
        stream_end();  // of what this thread wrote
    }
    return total;
}
}
