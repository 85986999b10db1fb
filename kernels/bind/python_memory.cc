// SPDX-License-Identifier: Apache-2.0
//
// How fast memory can be read: the limit of what reads its weights once a token.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <vector>

#include "../bandwidth.h"
#include "arrays.h"
#include "python.h"

namespace nb = nanobind;

namespace moss {
namespace {

// 10^9 bytes a second that `threads` read of an array, each its own part, `passes` times.
double read_bandwidth(const nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>& array,
                      int threads, int passes) {
  if (threads < 1 || passes < 1 || array.size() == 0) raise_value_error("array, threads or passes is nothing");
  const nb::gil_scoped_release released;
  const std::size_t bytes = array.size();
  std::atomic<int> waiting{0};
  std::atomic<bool> go{false};
  const auto part = [&](int i) {
    const std::size_t first = bytes * static_cast<std::size_t>(i) / static_cast<std::size_t>(threads);
    const std::size_t end = bytes * static_cast<std::size_t>(i + 1) / static_cast<std::size_t>(threads);
    for (int pass = 0; pass < passes; ++pass) read_memory(array.data() + first, end - first);
  };
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) {
    others.emplace_back([&, i] {
      ++waiting;
      while (!go) std::this_thread::yield();
      part(i);
    });
  }
  while (waiting < threads - 1) std::this_thread::yield();
  const auto start = std::chrono::steady_clock::now();
  go = true;
  part(0);
  for (std::thread& other : others) other.join();
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  return 1e-9 * static_cast<double>(bytes) * passes / seconds.count();
}

}  // namespace

void bind_memory(nb::module_& module) {
  module.def("read_bandwidth", &read_bandwidth, nb::arg("array"), nb::kw_only(), nb::arg("threads"), nb::arg("passes"));
}

}  // namespace moss
