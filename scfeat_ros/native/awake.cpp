// Keeps the cores of a computation from falling asleep between two of its parallel regions.
//
// A core that has nothing to do is put to sleep by the kernel, and takes 0.1 ms and more to wake: on
// a virtual machine because the host has to be asked, on a small computer because of deep idle
// states. A frame has some hundred parallel regions. Threads that spin while they wait (OpenMP's own
// remedy) take the cores from other work. The threads here spin in the scheduler's idle class: they
// run only where a core would have slept, and give way at once to whatever wants it.

#ifdef __linux__

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <climits>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

namespace {

using Clock = std::chrono::steady_clock;
constexpr std::chrono::milliseconds LINGER{10};  // the next frame often follows at once

std::atomic<int> users{0};  // computations under way
std::mutex starting;
bool started = false;

// In a forked process, into which threads do not follow: one of them may have held the lock.
void forget() {
  new (&starting) std::mutex;
  started = false;
  users = 0;
}

[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, forget);

void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

void spin(int core) {
  cpu_set_t one;
  CPU_ZERO(&one);
  CPU_SET(core, &one);
  sched_param none{};
  if (sched_setscheduler(0, SCHED_IDLE, &none) != 0) return;
  if (sched_setaffinity(0, sizeof one, &one) != 0) return;
  for (;;) {
    while (users.load(std::memory_order_relaxed) == 0)
      syscall(SYS_futex, &users, FUTEX_WAIT_PRIVATE, 0, nullptr, nullptr, 0);
    auto until = Clock::now();
    do {
      relax();
      if (users.load(std::memory_order_relaxed) != 0) until = Clock::now() + LINGER;
    } while (Clock::now() < until);
  }
}

void start() {
  std::lock_guard<std::mutex> lock(starting);
  if (started) return;
  started = true;
  cpu_set_t all;
  if (sched_getaffinity(0, sizeof all, &all) != 0) return;
  sigset_t every, before;  // signals are for the threads of the program
  sigfillset(&every);
  pthread_sigmask(SIG_BLOCK, &every, &before);
  try {
    for (int core = 0; core < CPU_SETSIZE; core++)
      if (CPU_ISSET(core, &all)) std::thread(spin, core).detach();
  } catch (const std::system_error &) {  // no more threads are allowed: slower, not wrong
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

}  // namespace

extern "C" {

// Between the two, and for a moment after, the cores that this process may use stay awake.
void awake_begin() {
  start();
  if (users.fetch_add(1) == 0)
    syscall(SYS_futex, &users, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

void awake_end() {
  int count = users.load();  // 0 in a process that was forked in between
  while (count > 0 && !users.compare_exchange_weak(count, count - 1)) continue;
}
}

#else

extern "C" {
void awake_begin() {}
void awake_end() {}
}

#endif
