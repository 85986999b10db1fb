// SPDX-License-Identifier: Apache-2.0

#include "../vec/avx512.h"
#include "vector.h"

namespace moss {

const DenseKernel moss_dense_f32_avx512 = {kAvx512, "moss_dense_f32_avx512", dense<Vec16>};

}  // namespace moss
