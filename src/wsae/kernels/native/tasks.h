// Tasks that a few threads take one by one.
//
// The calling thread works too, and waits at the end only for helpers in the middle of a task: one that another program
// keeps from its core is not waited for before it has begun. (OpenMP's teams meet whole at the end of every region.)
// Who waits spins for a moment and then sleeps, so that its core is free for whoever it waits for.
#pragma once
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>
#include <unistd.h>
#ifdef __linux__
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_max_threads() { return 1; }
#endif

extern thread_local int own_threads;  // those of the calling thread's kernels; 0: as many as OpenMP would take
static inline int team() { return own_threads > 0 ? own_threads : std::max(1, omp_get_max_threads()); }

// Where as many threads are asked for as there are cores, each gets one to itself for as long as the kernels work: beside
// another program the system would else put two of them on one core for a third of the time.
struct Cores {
#ifdef __linux__
  cpu_set_t all;
  std::vector<int> others;  // one for each helper; none: wherever the system likes
  bool taken = false;

  void take(int threads) {
    give_back();
    others.clear();
    if (threads < 2 || sched_getaffinity(0, sizeof all, &all) || CPU_COUNT(&all) != threads) return;
    const int here = sched_getcpu();
    for (int c = 0; c < CPU_SETSIZE; c++)
      if (CPU_ISSET(c, &all) && c != here) others.push_back(c);
    taken = stay(here);
  }
  void give_back() {
    if (taken) sched_setaffinity(0, sizeof all, &all);
    taken = false;
  }
  static bool stay(int core) {
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(core, &one);
    return !sched_setaffinity(0, sizeof one, &one);
  }
  // Called by helper `number`, which stands at core `at` (-1: anywhere); returns where it stands now.
  int place(size_t number, int at) const {
    const int core = number < others.size() ? others[number] : -1;
    if (core == at) return at;
    if (core < 0 ? sched_setaffinity(0, sizeof all, &all) : !stay(core)) return at;
    return core;
  }
#else
  void take(int) {}
  void give_back() {}
  int place(size_t, int at) const { return at; }
#endif
};

extern thread_local Cores own_cores;

constexpr int SPINS = 2000;  // looks before sleeping: some 50 microseconds, what two passes of a step are apart

static inline void breathe() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Numbers 0 .. count - 1 to call a function with.
struct Tasks {
  void (*call)(const void*, int64_t);
  const void* with;
  int64_t count;
  std::atomic<int64_t> next{0};
  std::atomic<bool> out_of_memory{false};  // an exception must not leave a helper: noted there, thrown by the caller

  void work() noexcept {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) try {
        if (!out_of_memory) call(with, i);
      } catch (const std::bad_alloc&) {
        out_of_memory = true;
      }
  }
};

// The helpers of one calling thread: made when first needed, asleep between jobs.
class Helpers {
  std::mutex lock;
  std::condition_variable wake, left;
  std::atomic<uint64_t> posted{0};
  std::atomic<int> inside{0};
  Tasks* job = nullptr;
  const Cores* cores = nullptr;
  int wanted = 0;
  bool over = false;
  std::vector<std::thread> threads;

  void help(size_t number) {
    uint64_t seen = 0;
    int core = -1;
    for (;;) {
      for (int i = 0; i < SPINS && posted.load(std::memory_order_acquire) == seen; i++) breathe();
      std::unique_lock<std::mutex> held(lock);
      wake.wait(held, [&] { return over || posted != seen; });
      if (over) return;
      seen = posted;
      if (!job || inside >= wanted) continue;
      Tasks* mine = job;
      core = cores->place(number, core);
      inside++;
      held.unlock();
      mine->work();
      held.lock();
      if (--inside == 0) left.notify_one();
    }
  }

 public:
  const pid_t process = getpid();  // a forked child has the object but not the threads

  void run(Tasks& tasks, int helpers) {
    {
      std::lock_guard<std::mutex> held(lock);
      try {
        while ((int)threads.size() < helpers) threads.emplace_back([this, number = threads.size()] { help(number); });
      } catch (const std::system_error&) {  // no more threads are allowed here
        helpers = (int)threads.size();
      }
      job = &tasks, cores = &own_cores, wanted = helpers;
      posted++;
    }
    for (int i = 0; i < helpers; i++) wake.notify_one();
    tasks.work();
    {
      std::lock_guard<std::mutex> held(lock);
      job = nullptr;
    }
    for (int i = 0; i < SPINS && inside.load(std::memory_order_acquire); i++) breathe();
    std::unique_lock<std::mutex> held(lock);
    left.wait(held, [&] { return inside == 0; });
  }

  ~Helpers() {
    {
      std::lock_guard<std::mutex> held(lock);
      over = true;
    }
    wake.notify_all();
    for (std::thread& thread : threads) thread.join();
  }
};

inline Helpers& own_helpers() {
  static thread_local std::unique_ptr<Helpers> own;
  if (own && own->process != getpid()) own.release();
  if (!own) own = std::make_unique<Helpers>();
  return *own;
}

// Call work(first, last) for runs of `grain` out of 0 .. count, in any order and on any thread.
template <class F> static inline void share_out(int64_t count, int64_t grain, F work) {
  const auto run = [&](int64_t i) { work(i * grain, std::min(count, (i + 1) * grain)); };
  Tasks tasks{[](const void* with, int64_t i) { (*static_cast<const decltype(run)*>(with))(i); }, &run, (count + grain - 1) / grain};
  const int helpers = (int)std::min<int64_t>(team(), tasks.count) - 1;
  if (helpers < 1) {
    tasks.work();
  } else {
    own_helpers().run(tasks, helpers);
  }
  if (tasks.out_of_memory) throw std::bad_alloc();
}

// The seats of a meeting lie in memory that several processes see. Each takes its own (stores `turn`, one more each time)
// and waits until nobody's is behind it; false when that has not come to pass in so many microseconds.
static inline bool meet(int32_t* const* seats, int64_t ranks, int64_t own, int32_t turn, int64_t patience) {
#ifdef __linux__
  const auto behind = [&](int64_t r) { return turn - __atomic_load_n(seats[r], __ATOMIC_ACQUIRE) > 0; };
  constexpr int SLEEP = 0, WAKE = 1;  // of linux/futex.h, which not every system with a compiler has
  const auto futex = [](int32_t* seat, int call, int32_t value, const timespec* limit) {
    syscall(SYS_futex, seat, call, value, limit, nullptr, 0);
  };
  __atomic_store_n(seats[own], turn, __ATOMIC_RELEASE);
  futex(seats[own], WAKE, INT32_MAX, nullptr);
  const auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(patience);
  for (int64_t r = 0; r < ranks; r++) {
    for (int i = 0; i < SPINS && behind(r); i++) breathe();
    while (behind(r)) {
      const auto left = std::chrono::duration_cast<std::chrono::nanoseconds>(end - std::chrono::steady_clock::now()).count();
      if (left <= 0) return false;
      const timespec limit{(time_t)(left / 1000000000), (long)(left % 1000000000)};
      futex(seats[r], SLEEP, turn - 1, &limit);
    }
  }
  return true;
#else
  return false;
#endif
}
