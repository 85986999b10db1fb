// SPDX-License-Identifier: Apache-2.0

#include "../vec/avx2.h"
#include "vector.h"

namespace moss {

const DenseKernel moss_dense_f32_avx2 = {kAvx2, "moss_dense_f32_avx2", dense<Vec8>};

}  // namespace moss
