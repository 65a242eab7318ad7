// Threads: OpenMP, or the C++ library's where a compiler has none. Depends on nothing else of the library.
//
// `parallel_for` shares units of work among threads. The start and the end of a parallel region cost some microseconds
// each. A function that calls `parallel_for` many times therefore opens one region, `with_team`; the calls inside hand
// their units to threads that are awake.
#pragma once
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

#if defined(_OPENMP) && !defined(KEYSPAN_STD_THREADS)
#include <omp.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
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

// Calls run(thread) on so many threads, of which the caller is thread 0, and waits for all.
template <class Run>
void on_threads(int64_t threads, const Run &run) {
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

// How a thread waits for others: at first awake, since most waits are shorter than a microsecond; then it lets other
// threads run; then it sleeps, so that a machine with more threads than cores loses little to those that wait.
class Wait {
  public:
    void once() {
        if (turns < SPINS) {
#if defined(__x86_64__)
            _mm_pause();
#elif defined(__aarch64__)
            asm volatile("yield");
#endif
        } else if (turns < SPINS + YIELDS) {
            std::this_thread::yield();
        } else {
            std::this_thread::sleep_for(std::chrono::microseconds(50));
            return;
        }
        turns++;
    }

  private:
    static constexpr int SPINS = 2000, YIELDS = 100;  // some 50 microseconds each
    int turns = 0;
};

// Threads that stay awake while one of them, the leader, runs a program and shares the units of each `parallel_for`. A
// thread that the system does not run takes no unit, and nobody waits for it.
class Team {
  public:
    explicit Team(int64_t threads) : threads(threads) {}

    const int64_t threads;

    // The leader's part: run(of, unit, thread) for every unit. Returns when all have been computed.
    void share(int64_t count, void (*run)(const void *of, int64_t unit, int64_t thread), const void *of) {
        units = count;
        work = run;
        argument = of;
        done.store(0, std::memory_order_relaxed);
        left.store(count, std::memory_order_release);
        while (take(0)) {
        }
        for (Wait wait; done.load(std::memory_order_acquire) < count;) wait.once();
    }

    // The others' part: takes units until the leader calls `end`.
    void follow(int64_t thread) {
        for (Wait wait; !ended.load(std::memory_order_acquire); wait.once())
            while (left.load(std::memory_order_relaxed) > 0 && take(thread)) wait = Wait();
    }

    void end() { ended.store(true, std::memory_order_release); }

  private:
    // Computes a unit, if one is left. The fields that describe the work change only after all of its units are done,
    // so whoever has taken a unit may read them.
    bool take(int64_t thread) {
        const int64_t rest = left.fetch_sub(1, std::memory_order_acquire);
        if (rest <= 0) return false;
        work(argument, units - rest, thread);
        done.fetch_add(1, std::memory_order_release);
        return true;
    }

    int64_t units = 0;
    void (*work)(const void *, int64_t, int64_t) = nullptr;
    const void *argument = nullptr;
    // On cache lines of their own: the one is written when a unit is taken, the other when it is done.
    alignas(64) std::atomic<int64_t> left{0};
    alignas(64) std::atomic<int64_t> done{0};
    alignas(64) std::atomic<bool> ended{false};
};

// That of which this thread is the leader, or null. One variable for all files of the library.
inline thread_local Team *team_of_thread = nullptr;

namespace {

// Calls run() while further threads wait for the units of each `parallel_for` inside.
template <class Run>
void with_team(int64_t threads, const Run &run) {
    if (forked || threads <= 1) return run();
    Team team(threads);
    on_threads(threads, [&](int64_t thread) {
        if (thread) return team.follow(thread);
        team_of_thread = &team;
        run();
        team_of_thread = nullptr;
        team.end();
    });
}

// Whether `parallel_for` has threads that are awake here, so that small work is worth sharing too.
bool in_team() { return team_of_thread != nullptr; }

// Calls work(unit, thread) for every unit; a thread takes the next unit when it is free, so the largest come first.
// Inside of a team all of its threads take part, unless `threads` is 1.
template <class Work>
void parallel_for(int64_t threads, int64_t units, const Work &work) {
    threads = forked ? 1 : std::min(threads, units);
    if (threads <= 1) {
        for (int64_t unit = 0; unit < units; unit++) work(unit, 0);
        return;
    }
    if (Team *const team = team_of_thread)
        return team->share(
            units, [](const void *of, int64_t unit, int64_t thread) { (*(const Work *)of)(unit, thread); }, &work);
    std::atomic<int64_t> next{0};
    on_threads(threads, [&](int64_t thread) {
        for (int64_t unit; (unit = next.fetch_add(1, std::memory_order_relaxed)) < units;) work(unit, thread);
    });
}

}  // namespace
}  // namespace keyspan
