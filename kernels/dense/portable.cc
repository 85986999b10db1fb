// SPDX-License-Identifier: Apache-2.0

#include "../vec/portable.h"
#include "vector.h"

namespace moss {

const DenseKernel moss_dense_f32_portable = {kBaseline, "moss_dense_f32_portable", dense<Vec4>};

}  // namespace moss
