// Memory of the threads, and the threads.
#pragma once
#include <unistd.h>
#if defined(_OPENMP)
#include <omp.h>
#endif

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

namespace {

// Bytes of a core's nearest cache that what an op reads again and again may fill
inline int near_bytes() {
    static const int bytes = [] {
        long cache = 0;
#if defined(_SC_LEVEL1_DCACHE_SIZE)
        cache = sysconf(_SC_LEVEL1_DCACHE_SIZE);  // 0 where nobody says
#endif
        return int(std::clamp(cache, 32L * 1024, 64L * 1024) / 8 * 7);
    }();
    return bytes;
}

struct Memory {
    void* data = nullptr;
    explicit Memory(size_t bytes) {
        bytes = (bytes + 127) / 64 * 64;
        data = std::aligned_alloc(64, bytes);
        if (!data) throw std::bad_alloc();
        std::memset(data, 0, bytes);
    }
    ~Memory() { std::free(data); }
    Memory(const Memory&) = delete;
};

class Barrier {
    std::atomic<int> waiting{0}, round{0};

  public:
    void wait(int parts) {
        if (parts == 1) return;
        const int seen = round.load();
        if (waiting.fetch_add(1) + 1 == parts) {
            waiting.store(0);
            round.store(seen + 1);
            return;
        }
        for (int spins = 0; round.load(std::memory_order_acquire) == seen; ++spins)
            if (spins > 2000) std::this_thread::yield();
    }
};

// One of `parts` threads that do the same thing at once
struct Part {
    int worker;  // whose memory they use
    int part, parts;
    Barrier& barrier;
};

// Workers that wait awake for a moment, then asleep. One pool a process: a fork makes its own.
class Pool {
    std::vector<std::thread> workers;
    std::mutex mutex;
    std::condition_variable wake;
    std::atomic<uint64_t> round{0};
    std::atomic<int> busy{0};
    void (*job)(void*, int) = nullptr;
    void* argument = nullptr;
    int wanted = 0;

    void work(int id, uint64_t seen) {
        for (;;) {
            for (int spins = 0; spins < 20000 && round.load(std::memory_order_acquire) == seen;
                 ++spins) {
#if defined(__x86_64__)
                __builtin_ia32_pause();
#endif
            }
            if (round.load() == seen) {
                std::unique_lock<std::mutex> lock(mutex);
                wake.wait(lock, [&] { return round.load() != seen; });
            }
            seen = round.load();
            if (id < wanted) job(argument, id);
            busy.fetch_sub(1);
        }
    }

  public:
    std::mutex callers;  // one network at a time

    void run(int threads, void (*task)(void*, int), void* with) {
        if (threads == 1) return task(with, 0);
        {
            std::unique_lock<std::mutex> lock(mutex);
            while ((int)workers.size() < threads - 1) {
                const int id = (int)workers.size() + 1;
                workers.emplace_back([this, id, seen = round.load()] { work(id, seen); });
                workers.back().detach();
            }
            job = task, argument = with, wanted = threads;
            busy.store((int)workers.size());
            round.fetch_add(1);
        }
        wake.notify_all();
        task(with, 0);
        for (int spins = 0; busy.load(std::memory_order_acquire) > 0; ++spins)
            if (spins > 2000) std::this_thread::yield();
    }

    static Pool& get() {
        static std::mutex guard;
        static Pool* pool = nullptr;
        static pid_t owner = 0;
        std::lock_guard<std::mutex> lock(guard);
        if (!pool || owner != getpid())
            pool = new Pool, owner = getpid();  // never ends: nor do they
        return *pool;
    }
};

// The process that this was loaded in.
const pid_t owner = getpid();

// Runs the task on `threads` threads at once. Those of OpenMP, which torch computes with, where they
// are to be had: they wait awake after torch's ops, and others beside them would share their cores.
// Not after a fork, which has none of them.
inline void run_on_threads(int threads, void (*task)(void*, int), void* with) {
#if defined(_OPENMP)
    if (threads > 1 && getpid() == owner) {
        bool ran = false;
#pragma omp parallel num_threads(threads)
        if (omp_get_num_threads() == threads) {
            task(with, omp_get_thread_num());
            if (omp_get_thread_num() == 0) ran = true;
        }
        if (ran) return;
    }
#endif
    Pool::get().run(threads, task, with);
}

}  // namespace
