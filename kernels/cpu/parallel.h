// Threads: OpenMP, whose pool is torch's where torch was loaded first. The caller says how many.
#pragma once

#include <omp.h>

#include <cstdint>

namespace qlk {

// More threads than some for each core only cost, and where the system has none left OpenMP ends the process.
constexpr int MOST_THREADS_PER_CORE = 4;

inline int threads_of(int threads) {
    static const int most = MOST_THREADS_PER_CORE * omp_get_num_procs();
    return threads < 1 ? 1 : threads > most ? most : threads;
}

// Call body(begin, end) for ranges that together are [0, count), on up to `threads` threads; each range but the last
// is a multiple of `grain` long. `body` must not throw.
template <typename Body>
void parallel_for(int64_t count, int64_t grain, int threads, const Body &body) {
    if (count <= 0) return;
    const int64_t pieces = (count + grain - 1) / grain, most = threads_of(threads);
    const int64_t workers = pieces < most ? pieces : most;
    if (workers <= 1) {
        body(int64_t{0}, count);
        return;
    }
#pragma omp parallel for schedule(static, 1) num_threads(static_cast<int>(workers))
    for (int64_t worker = 0; worker < workers; ++worker) {
        const int64_t begin = pieces * worker / workers * grain;
        const int64_t end = pieces * (worker + 1) / workers * grain;
        body(begin, end < count ? end : count);
    }
}

// Call body(task, worker) for every task below `count`; whoever is free takes the next one. No two calls at the same
// time have the same worker, a number below `threads`. `body` must not throw.
template <typename Body>
void parallel_tasks(int64_t count, int threads, const Body &body) {
    const int64_t workers = count < threads ? count : threads;
    if (workers <= 1) {
        for (int64_t task = 0; task < count; ++task) body(task, 0);
        return;
    }
#pragma omp parallel for schedule(dynamic, 1) num_threads(static_cast<int>(workers))
    for (int64_t task = 0; task < count; ++task) body(task, omp_get_thread_num());
}

}  // namespace qlk
