// SPDX-License-Identifier: Apache-2.0
//
// What the C++ kernel tests share: which kernels there are to test, seeded inputs, scratch that betrays a read before a
// write, comparison with a reference.

#ifndef MOSS_TESTS_KERNELS_COMPARE_H_
#define MOSS_TESTS_KERNELS_COMPARE_H_

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <map>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <vector>

#include "cpu.h"
#include "tile.h"

namespace moss_tests {

// Largest difference from the reference, as a part of the reference's largest value. The kernels differ from it by
// their fp32 arithmetic only: a chain or sum of at most ~300 terms here, with some 10 roundings of 2^-24 each, which
// partly cancel. A wrong index or a missing term is an error of the order of 1.
constexpr double kTolerance = 1e-4;

// The kernels that tests came to, by name: whether this machine can run them, and so was tested.
inline std::map<std::string, bool>& kernels_met() {
  static std::map<std::string, bool> met;
  return met;
}

// Whether this machine can run a kernel, which is noted.
template <typename Kernel>
bool runs_here(const Kernel& kernel) {
  return kernels_met()[kernel.name] = moss::can_run(kernel, moss::detect_cpu_flags());
}

// Every array is its own allocation of the exact size, so that the address sanitizer sees any step over an end.
using Floats = std::vector<float>;
using Doubles = std::vector<double>;

class Random {
 public:
  explicit Random(unsigned seed) : engine_(seed) {}

  Floats normal(std::int64_t size, double scale = 1, double shift = 0) {
    std::normal_distribution<double> distribution(shift, scale);
    Floats values(static_cast<std::size_t>(size));
    for (float& value : values) value = static_cast<float>(distribution(engine_));
    return values;
  }

 private:
  std::mt19937 engine_;
};

inline Doubles doubles(const Floats& values) { return Doubles(values.begin(), values.end()); }

template <typename Real>
std::vector<Real> unset(std::int64_t size) {
  return std::vector<Real>(static_cast<std::size_t>(size), std::numeric_limits<Real>::quiet_NaN());
}

// A copy that is `offset` numbers off the alignment of an allocation, at whose end it ends.
template <typename Number>
struct Shifted {
  std::vector<Number> values;
  std::size_t offset;

  explicit Shifted(const std::vector<Number>& own, std::size_t offset = 1) : values(own), offset(offset) {
    values.insert(values.begin(), offset, Number(99));
  }
  Number* data() { return values.data() + offset; }
  Number& operator[](std::int64_t i) { return data()[i]; }
  std::vector<Number> own() const {
    return {values.begin() + static_cast<std::ptrdiff_t>(offset), values.end()};
  }
};

// Scratch of exactly the size a kernel asks for, full of NaN.
template <typename Real>
struct Scratch {
  struct Free {
    void operator()(Real* data) const {
      ::operator delete(data, std::align_val_t(moss::kScratchAlignmentBytes));
    }
  };
  std::unique_ptr<Real, Free> data;

  explicit Scratch(std::size_t size)
      : data(static_cast<Real*>(::operator new(size * sizeof(Real), std::align_val_t(moss::kScratchAlignmentBytes)))) {
    for (std::size_t i = 0; i < size; ++i) data.get()[i] = std::numeric_limits<Real>::quiet_NaN();
  }
};

// Prints the first element that is too far from the reference; true where there is none.
inline bool close(const std::string& what, const Floats& found, const Doubles& expected) {
  double largest = 0;
  for (double value : expected) largest = std::fmax(largest, std::fabs(value));
  for (std::size_t i = 0; i < expected.size(); ++i) {
    if (std::fabs(static_cast<double>(found[i]) - expected[i]) <= kTolerance * largest) continue;
    std::printf("FAILED %s: element %zu of %zu is %.9g, reference %.9g, largest %.9g\n", what.c_str(), i,
                expected.size(), static_cast<double>(found[i]), expected[i], largest);
    return false;
  }
  return true;
}

}  // namespace moss_tests

#endif  // MOSS_TESTS_KERNELS_COMPARE_H_
