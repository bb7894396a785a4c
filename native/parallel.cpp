#include "parallel.h"

#include <sched.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

namespace arrondi {
namespace {

// How long an idle helper looks for the next job before it sleeps. Waking a sleeper costs 20 to 60 µs on a virtual machine,
// as much as a small product; the pause between two products of one token is about as long.
constexpr std::chrono::microseconds kLook{100};

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// OpenMP can bind the thread that calls us to one core (OMP_PROC_BIND and its kin), and a thread inherits that from the one that
// made it: helpers would share the caller's core. They may run wherever the process may.
void leave_the_callers_core() {
#if defined(__linux__)
    bool bound = false;
    for (const char* name : {"OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY"})
        bound = bound || std::getenv(name) != nullptr;
    if (!bound) return;
    cpu_set_t every;
    CPU_ZERO(&every);
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) CPU_SET(cpu, &every);
    sched_setaffinity(0, sizeof every, &every);  // the system leaves out what a container may not use
#endif
}

struct Pool {
    std::mutex lock;
    std::condition_variable wake;
    std::mutex busy;  // held by the caller whose job runs
    std::atomic<uint64_t> epoch{0};
    std::atomic<int> sleepers{0};
    // Even: closed. Odd: open. Every helper inside adds 2, so that closing and entering cannot miss each other.
    std::atomic<int> door{0};
    std::atomic<int> next{0};
    std::atomic<int> wanted{0};  // helpers that may enter
    int pieces = 0;
    Piece run = nullptr;
    void* context = nullptr;
    int helpers = 0;
    pid_t owner = getpid();

    void work() {
        for (;;) {
            int piece = next.fetch_add(1, std::memory_order_relaxed);
            if (piece >= pieces) return;
            run(context, piece);
        }
    }

    bool enter() {
        int state = door.load(std::memory_order_acquire);
        while (state & 1)
            if (door.compare_exchange_weak(state, state + 2, std::memory_order_acq_rel)) return true;
        return false;
    }

    void help(int index) {
        leave_the_callers_core();
        uint64_t seen = 0;
        for (;;) {
            auto until = std::chrono::steady_clock::now() + kLook;
            uint64_t now;
            for (int i = 0; (now = epoch.load(std::memory_order_acquire)) == seen; i++) {
                relax();
                if (i % 64 == 63 && std::chrono::steady_clock::now() > until) {
                    std::unique_lock<std::mutex> held(lock);
                    sleepers.fetch_add(1);
                    wake.wait(held, [&] { return epoch.load() != seen; });
                    sleepers.fetch_sub(1);
                }
            }
            seen = now;
            if (index < wanted.load(std::memory_order_acquire) && enter()) {
                work();
                door.fetch_sub(2, std::memory_order_acq_rel);
            }
        }
    }

    void grow(int count) {
        for (; helpers < count; helpers++) std::thread([this, index = helpers] { help(index); }).detach();
    }
};

// Never destroyed: helpers outlive main(). A forked child has no helpers and starts a pool of its own.
Pool* pool() {
    static std::atomic<Pool*> current{nullptr};
    Pool* found = current.load(std::memory_order_acquire);
    if (found != nullptr && found->owner == getpid()) return found;
    Pool* made = new Pool;
    if (current.compare_exchange_strong(found, made)) return made;
    delete made;
    return found;
}

thread_local bool inside = false;

void alone(int pieces, Piece run, void* context) {
    for (int i = 0; i < pieces; i++) run(context, i);
}

}  // namespace

void parallel(int pieces, int threads, Piece run, void* context) {
    if (pieces <= 1 || threads <= 1 || inside) return alone(pieces, run, context);
    Pool& p = *pool();
    std::unique_lock<std::mutex> mine(p.busy, std::try_to_lock);
    if (!mine) return alone(pieces, run, context);
    inside = true;
    try {
        p.grow(threads - 1);
    } catch (...) {
        // No more threads to be had: those that there are will do.
    }
    p.pieces = pieces;
    p.run = run;
    p.context = context;
    p.next.store(0, std::memory_order_relaxed);
    p.wanted.store(threads - 1, std::memory_order_relaxed);
    p.door.store(1, std::memory_order_release);
    p.epoch.fetch_add(1);
    if (p.sleepers.load() > 0) {
        { std::lock_guard<std::mutex> held(p.lock); }
        p.wake.notify_all();
    }
    p.work();
    p.door.fetch_sub(1, std::memory_order_acq_rel);
    for (int i = 0; p.door.load(std::memory_order_acquire) != 0; i++) {
        relax();
        if (i > 2000) sched_yield();
    }
    inside = false;
}

}  // namespace arrondi
