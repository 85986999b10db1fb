// SPDX-License-Identifier: Apache-2.0
//
// The gate on vectors, a template on the vector type. Formula: swiglu.h.

#ifndef MOSS_KERNELS_SWIGLU_VECTOR_H_
#define MOSS_KERNELS_SWIGLU_VECTOR_H_

#include "../vec/channels.h"
#include "../vec/math.h"
#include "swiglu.h"

namespace moss {

template <typename Vec>
void swiglu(const SwigluArgs& args) {
  for (std::int64_t i = 0; i < args.size; i += Vec::kLanes) {
    const auto vector = Channels<Vec>::of(i, args.size);
    const Vec a = vector.load(args.a);
    vector.store(a * logistic(a) * vector.load(args.b), args.y);
  }
}

}  // namespace moss

#endif  // MOSS_KERNELS_SWIGLU_VECTOR_H_
