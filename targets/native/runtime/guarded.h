// SPDX-License-Identifier: Apache-2.0
//
// What the functions of the C interface have in common: arguments are checked, and no exception leaves.

#ifndef MOSS_NATIVE_GUARDED_H_
#define MOSS_NATIVE_GUARDED_H_

#include <exception>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>

#include "cpu.h"

namespace moss {

inline thread_local std::string last_error;

inline void refuse(const std::string& what) { throw std::runtime_error(what); }

inline void check(bool holds, const char* what) {
  if (!holds) refuse(what);
}

// What run() returns, or `failed` with the error noted.
template <typename Result, typename Run>
Result guarded(Result failed, const Run& run) {
  try {
    return run();
  } catch (const std::bad_alloc&) {
    last_error = "there is not enough memory";
  } catch (const std::exception& error) {
    last_error = error.what();
  }
  return failed;
}

// The flags of this machine that `isa` leaves; null leaves all.
CpuFlags allowed_flags(const char* isa);

// Threads, 0 for as many as there are cores.
int thread_count(std::int32_t asked);

}  // namespace moss

#endif  // MOSS_NATIVE_GUARDED_H_
