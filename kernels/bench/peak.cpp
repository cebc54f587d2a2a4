// The highest rate of float32 multiply-adds of this machine: chains that wait for nothing but themselves.
// Built and called by ceilings.py.
#include <omp.h>

#include <chrono>

#ifdef __AVX512F__
constexpr int BYTES = 64, CHAINS = 24;
#else
constexpr int BYTES = 32, CHAINS = 12;
#endif
typedef float Vector __attribute__((vector_size(BYTES)));
constexpr long STEPS = 4'000'000;

static float chains(float start) {
    Vector sums[CHAINS], factor, addend;
    for (int lane = 0; lane < BYTES / 4; ++lane) factor[lane] = 0.999f, addend[lane] = start;
    for (auto &sum : sums) sum = addend;
    for (long step = 0; step < STEPS; ++step) {
#pragma GCC unroll 24
        for (int i = 0; i < CHAINS; ++i) sums[i] = sums[i] * factor + addend;
    }
    float total = 0;
    for (const auto &sum : sums) total += sum[0];
    return total;
}

// Returns floating-point operations a second, of all threads together.
extern "C" double peak_flops(int threads) {
    float total = 0;
    const auto started = std::chrono::steady_clock::now();
#pragma omp parallel num_threads(threads) reduction(+ : total)
    total += chains(1e-9f * static_cast<float>(omp_get_thread_num() + 1));
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - started;
    const double operations = 2.0 * STEPS * CHAINS * (BYTES / 4) * threads;
    return total == 12345.0f ? 0.0 : operations / seconds.count();  // so that nothing is left out
}
