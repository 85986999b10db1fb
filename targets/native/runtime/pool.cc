// SPDX-License-Identifier: Apache-2.0

#include "pool.h"

#include <system_error>

namespace moss {
namespace {

constexpr int kSpins = 4000;  // some 50 us: longer than what one thread does between two jobs of a token

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

Pool::Pool(int threads) {
  workers_.reserve(static_cast<std::size_t>(threads - 1));
  for (int i = 1; i < threads; ++i) {
    try {
      workers_.emplace_back([this] { worker(); });
    } catch (const std::system_error&) {
      break;  // the system gives no more threads; those there are do all of the work
    }
  }
}

Pool::~Pool() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  awake_.notify_all();
  for (std::thread& thread : workers_) thread.join();
}

void Pool::start(std::int64_t units, const void* run, void (*call)(const void*, std::int64_t)) {
  units_ = units;
  run_ = run;
  call_ = call;
  next_.store(0, std::memory_order_relaxed);
  const std::uint64_t number = (job_.load() / kNumber + 1) * kNumber;
  job_.store(number | kOpen);
  if (sleeping_.load() > 0) {
    const std::lock_guard<std::mutex> lock(mutex_);
    awake_.notify_all();
  }
}

void Pool::work() {
  for (std::int64_t unit; (unit = next_.fetch_add(1, std::memory_order_relaxed)) < units_;) call_(run_, unit);
}

void Pool::finish() {
  job_.fetch_and(~kOpen);
  for (int spins = 0; (job_.load() & kActive) != 0; ++spins) {
    if (spins < kSpins) {
      relax();
    } else {
      std::this_thread::yield();
    }
  }
}

// Until a job is open that has not the number of `seen`.
void Pool::wait_for_work(std::uint64_t seen) {
  const auto there = [&] {
    const std::uint64_t job = job_.load();
    return stopping_.load() || ((job & kOpen) != 0 && job / kNumber != seen);
  };
  for (int spins = 0; spins < kSpins; ++spins) {
    if (there()) return;
    relax();
  }
  std::unique_lock<std::mutex> lock(mutex_);
  ++sleeping_;
  awake_.wait(lock, there);
  --sleeping_;
}

void Pool::worker() {
  for (std::uint64_t seen = 0;;) {
    wait_for_work(seen);
    if (stopping_.load()) return;
    std::uint64_t job = job_.load();
    if ((job & kOpen) == 0 || job / kNumber == seen) continue;
    if (!job_.compare_exchange_strong(job, job + 1)) continue;  // it was closed, or another joined: look again
    seen = job / kNumber;
    work();
    job_.fetch_sub(1);
  }
}

}  // namespace moss
