// SPDX-License-Identifier: Apache-2.0
//
// What every function of the Python module needs: NumPy arrays checked and turned into pointers, a kernel found by
// name, units of work spread over threads.

#ifndef MOSS_KERNELS_BIND_ARRAYS_H_
#define MOSS_KERNELS_BIND_ARRAYS_H_

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <system_error>
#include <thread>
#include <type_traits>
#include <vector>

#include "../cpu.h"
#include "../tile.h"

namespace moss {

using Input = nanobind::ndarray<nanobind::ro>;
using Output = nanobind::ndarray<>;
using MaybeInput = std::optional<Input>;
using MaybeOutput = std::optional<Output>;
using MaybeName = std::optional<std::string>;
using Shape = std::vector<std::int64_t>;

[[noreturn]] inline void raise_value_error(const std::string& message) {
  throw nanobind::value_error(message.c_str());
}

inline std::string describe(const Shape& shape) {
  std::string text = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

template <typename Array>
Shape shape_of(const Array& array) {
  Shape shape;
  for (std::size_t i = 0; i < array.ndim(); ++i) shape.push_back(static_cast<std::int64_t>(array.shape(i)));
  return shape;
}

// The shape of an array whose number of dimensions must be that of `letters`, such as "[B, T, E]".
template <typename Array>
Shape shape_of(const Array& array, const char* name, std::size_t dimensions, const char* letters) {
  const Shape shape = shape_of(array);
  if (shape.size() == dimensions) return shape;
  raise_value_error(std::string(name) + ": shape is " + describe(shape) + ", must be " + letters);
}

template <typename Array>
bool is_contiguous(const Array& array) {
  if (array.size() == 0) return true;
  std::int64_t stride = 1;
  for (std::size_t i = array.ndim(); i-- > 0;) {
    if (array.shape(i) > 1 && array.stride(i) != stride) return false;
    stride *= static_cast<std::int64_t>(array.shape(i));
  }
  return true;
}

// NumPy's name of a type of numbers.
template <typename Number>
std::string dtype_name() {
  const std::string kind = std::is_floating_point_v<Number> ? "float" : std::is_signed_v<Number> ? "int" : "uint";
  return kind + std::to_string(8 * sizeof(Number));
}

// The address of an array that must be contiguous, of type Number and of a given shape.
template <typename Number, typename Array>
auto checked(const Array& array, const char* name, const Shape& shape) {
  if (array.dtype() != nanobind::dtype<Number>()) {
    raise_value_error(std::string(name) + ": dtype must be " + dtype_name<Number>());
  }
  if (shape_of(array) != shape) {
    raise_value_error(std::string(name) + ": shape is " + describe(shape_of(array)) + ", must be " + describe(shape));
  }
  if (!is_contiguous(array)) raise_value_error(std::string(name) + ": must be contiguous, row-major");
  using Element = std::conditional_t<std::is_same_v<Array, Input>, const Number, Number>;
  return static_cast<Element*>(array.data());
}

template <typename Number, typename Array>
auto checked(const std::optional<Array>& array, const char* name, const Shape& shape) {
  return array ? checked<Number>(*array, name, shape) : nullptr;
}

// run(Real()) with Real the element type of `x`, which decides that of all other arrays.
template <typename Run>
void with_type(const Input& x, const Run& run) {
  if (x.dtype() == nanobind::dtype<float>()) return run(float());
  if (x.dtype() == nanobind::dtype<double>()) return run(double());
  raise_value_error("x: dtype must be float32 or float64");
}

// The kernel of that name, if this machine can run it; the best it can run where no name is given.
template <typename Kernel>
const Kernel& find_kernel(const KernelList<Kernel>& list, const std::optional<std::string>& name) {
  const CpuFlags flags = detect_cpu_flags();
  if (!name) return select(list, flags);
  std::string names;
  for (const Kernel* kernel : list) {
    if (!can_run(*kernel, flags)) continue;
    if (*name == kernel->name) return *kernel;
    names += (names.empty() ? "" : ", ") + std::string(kernel->name);
  }
  raise_value_error("kernel: '" + *name + "' is not one of those this machine can run on these numbers: " + names);
}

// Memory for one thread's scratch, aligned for every kernel.
template <typename Real>
class Scratch {
 public:
  explicit Scratch(std::size_t size)
      : data_(static_cast<Real*>(::operator new(size * sizeof(Real), std::align_val_t(kScratchAlignmentBytes)))) {}
  ~Scratch() { ::operator delete(data_, std::align_val_t(kScratchAlignmentBytes)); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  Real* data() const { return data_; }

 private:
  Real* data_;
};

// run(b, tile, scratch) for every sequence and tile, on up to `threads` threads, the calling one among them.
template <typename Real, typename Run>
void run_units(std::int64_t batch, std::int64_t channels, std::int64_t threads, std::size_t scratch_size,
               const Run& run) {
  const std::int64_t tiles = tile_count(channels), units = batch * tiles;
  threads = std::max<std::int64_t>(1, std::min(threads, units));
  std::vector<std::unique_ptr<Scratch<Real>>> scratch;
  for (std::int64_t i = 0; i < threads; ++i) scratch.push_back(std::make_unique<Scratch<Real>>(scratch_size));
  std::atomic<std::int64_t> next{0};
  const auto work = [&](std::int64_t thread) {
    for (std::int64_t unit; (unit = next.fetch_add(1)) < units;) {
      run(unit / tiles, unit % tiles, scratch[static_cast<std::size_t>(thread)]->data());
    }
  };
  std::vector<std::thread> others;
  others.reserve(static_cast<std::size_t>(threads));  // a vector that cannot grow must not leave threads running
  for (std::int64_t i = 1; i < threads; ++i) {
    try {
      others.emplace_back(work, i);
    } catch (const std::system_error&) {
      break;  // the system gives no more threads; those there are do all of the work
    }
  }
  work(0);
  for (std::thread& thread : others) thread.join();
}

}  // namespace moss

#endif  // MOSS_KERNELS_BIND_ARRAYS_H_
