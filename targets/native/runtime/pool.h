// SPDX-License-Identifier: Apache-2.0
//
// A few threads that share units of work. Those that wait spin for a moment and then sleep.

#ifndef MOSS_NATIVE_POOL_H_
#define MOSS_NATIVE_POOL_H_

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace moss {

// Threads of a host in place of ours: runs run(work, unit) for every unit in [0, units), and returns when all are done.
struct HostPool {
  int threads;
  void* host;
  void (*for_units)(void* host, std::int64_t units, void (*run)(const void* work, std::int64_t unit), const void* work);
};

class Pool {
 public:
  // `threads`: the calling one included; at least 1.
  explicit Pool(int threads);
  explicit Pool(const HostPool& host) : host_(host) {}
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return host_.for_units ? host_.threads : static_cast<int>(workers_.size()) + 1; }

  // run(unit) for every unit in [0, units), and returns when all are done. Not to be called from two threads at once,
  // nor from run, which must not throw.
  template <typename Run>
  void for_units(std::int64_t units, const Run& run) {
    if (units <= 1 || threads() == 1) {
      for (std::int64_t unit = 0; unit < units; ++unit) run(unit);
      return;
    }
    const auto call = [](const void* given, std::int64_t unit) { (*static_cast<const Run*>(given))(unit); };
    if (host_.for_units) {
      host_.for_units(host_.host, units, call, &run);
      return;
    }
    start(units, &run, call);
    work();
    finish();
  }

 private:
  void start(std::int64_t units, const void* run, void (*call)(const void*, std::int64_t));
  void work();
  void finish();
  void wait_for_work(std::uint64_t seen);
  void worker();

  const HostPool host_ = {};

  // A job: its number, whether it may be joined, and how many workers are in it, in one word. The fields below change
  // only while nobody is in a job and none is open.
  static constexpr std::uint64_t kActive = (1u << 15) - 1, kOpen = 1u << 15, kNumber = 1u << 16;
  std::atomic<std::uint64_t> job_{0};
  std::atomic<std::int64_t> next_{0};
  std::int64_t units_ = 0;
  const void* run_ = nullptr;
  void (*call_)(const void*, std::int64_t) = nullptr;

  std::atomic<int> sleeping_{0};
  std::atomic<bool> stopping_{false};
  std::mutex mutex_;
  std::condition_variable awake_;
  std::vector<std::thread> workers_;
};

}  // namespace moss

#endif  // MOSS_NATIVE_POOL_H_
