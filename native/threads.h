// Threads: OpenMP, or the C++ library's where a compiler has none. Depends on nothing else of the library.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#if defined(KEYSPAN_STD_THREADS)
#include <thread>
#elif defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#include <unistd.h>
#endif

namespace keyspan {
namespace {

#if defined(_OPENMP) && !defined(KEYSPAN_STD_THREADS) && (defined(__unix__) || defined(__APPLE__))
// GNU's OpenMP hangs in a forked child whose parent used it: such a child uses one thread.
bool forked = false;
const int fork_watch = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#else
constexpr bool forked = false;
#endif

// Calls work(unit, thread) for every unit; a thread takes the next unit when it is free, so the largest come first.
template <class Work>
void parallel_for(int64_t threads, int64_t units, const Work &work) {
    threads = forked ? 1 : std::min(threads, units);
    if (threads <= 1) {
        for (int64_t unit = 0; unit < units; unit++) work(unit, 0);
        return;
    }
    std::atomic<int64_t> next{0};
    const auto run = [&](int64_t thread) {
        for (int64_t unit; (unit = next.fetch_add(1, std::memory_order_relaxed)) < units;) work(unit, thread);
    };
#if defined(KEYSPAN_STD_THREADS) || !defined(_OPENMP)
    std::vector<std::thread> others;
    for (int64_t thread = 1; thread < threads; thread++) others.emplace_back(run, thread);
    run(0);
    for (auto &other : others) other.join();
#else
#pragma omp parallel num_threads((int)threads)
    run(omp_get_thread_num());
#endif
}

}  // namespace
}  // namespace keyspan
