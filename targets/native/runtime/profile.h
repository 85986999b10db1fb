// SPDX-License-Identifier: Apache-2.0
//
// Where the time of a pass goes, by the part of the model.

#ifndef MOSS_NATIVE_PROFILE_H_
#define MOSS_NATIVE_PROFILE_H_

#include <chrono>
#include <cstdint>

namespace moss {

enum class Part {
  embedding, norm, quantize, in_proj, conv, router, x_proj, dt_proj, scan, out_proj, w1_w3, swiglu, w2, head
};

inline constexpr const char* kPartNames[] = {"embedding", "norm", "quantize", "in_proj",  "conv",   "router", "x_proj",
                                             "dt_proj",   "scan", "out_proj", "w1, w3", "swiglu", "w2",     "head"};
inline constexpr int kParts = sizeof(kPartNames) / sizeof(kPartNames[0]);
static_assert(kParts == static_cast<int>(Part::head) + 1);

struct Profile {
  bool on = false;
  double seconds[kParts] = {};
};

// Adds the time of its life to a part. Off, it costs a branch.
class Timed {
 public:
  Timed(Profile* profile, Part part) : profile_(profile->on ? profile : nullptr), part_(part) {
    if (profile_) begin_ = std::chrono::steady_clock::now();
  }
  ~Timed() {
    if (!profile_) return;
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - begin_;
    profile_->seconds[static_cast<int>(part_)] += taken.count();
  }
  Timed(const Timed&) = delete;
  Timed& operator=(const Timed&) = delete;

 private:
  Profile* profile_;
  Part part_;
  std::chrono::steady_clock::time_point begin_;
};

}  // namespace moss

#endif  // MOSS_NATIVE_PROFILE_H_
