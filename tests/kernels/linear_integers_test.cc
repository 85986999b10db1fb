// SPDX-License-Identifier: Apache-2.0
//
// Every linear kernel of int8 inputs that this machine can run: its integers are those of the formula, and no cut of
// rows or outputs changes a bit, nor writes outside; at addresses that are aligned to nothing but their type. And which
// kernel is chosen on Arm, by invented flags.

#include <algorithm>
#include <cstring>
#include <string>

#include "compare.h"
#include "linear/linear.h"

namespace moss_tests {
namespace {

using moss::LinearInput;
using moss::WeightFormat;
using moss::WeightName;

constexpr WeightName kWeightNames[] = {WeightName::int8, WeightName::int8_g32, WeightName::int4_g32,
                                       WeightName::int4_g128};

template <typename Number>
std::vector<Number> zeros(std::int64_t size) {
  return std::vector<Number>(static_cast<std::size_t>(size));
}

std::vector<std::uint8_t> stored_scales(const WeightFormat& format, const Floats& values) {
  std::vector<std::uint8_t> bytes;
  for (const float value : values) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const std::uint16_t upper = static_cast<std::uint16_t>(bits >> 16);
    const auto* const stored = reinterpret_cast<const std::uint8_t*>(&bits);
    const auto* const half = reinterpret_cast<const std::uint8_t*>(&upper);
    if (format.row_scale) {
      bytes.insert(bytes.end(), stored, stored + 4);
    } else {
      bytes.insert(bytes.end(), half, half + 2);
    }
  }
  return bytes;
}

// A layer of random codes, the largest ones in the first two rows and outputs. Its scales are 1 and its biases 0 until
// they are set.
struct Layer {
  const WeightFormat& format;
  moss::LinearShape shape;
  std::int64_t blocks;
  std::vector<std::int8_t> codes;
  Shifted<std::int8_t> x_codes;
  Floats scales;  // [N, scale_count]
  Shifted<float> x_scales, bias;
  Shifted<std::int32_t> x_sums;

  Layer(WeightName name, const moss::LinearShape& shape, std::size_t offset)
      : format(moss::weight_format(name)),
        shape(shape),
        blocks(moss::block_count(format, shape.columns)),
        codes(zeros<std::int8_t>(shape.outputs * shape.columns)),
        x_codes(zeros<std::int8_t>(shape.rows * blocks * format.block), offset),
        scales(static_cast<std::size_t>(shape.outputs * moss::scale_count(format, shape.columns)), 1.0f),
        x_scales(zeros<float>(shape.rows * blocks)),
        bias(zeros<float>(shape.outputs)),
        x_sums(zeros<std::int32_t>(shape.rows * blocks)) {
    const std::int64_t M = shape.rows, K = shape.columns, B = format.block, C = blocks * B;
    std::mt19937 engine(static_cast<unsigned>(1 + M + 131 * K + 7 * shape.outputs));
    std::uniform_int_distribution<int> code(format.code_min, format.code_max), x_code(-127, 127);
    for (std::size_t i = 0; i < codes.size(); ++i) {
      const std::int64_t n = static_cast<std::int64_t>(i) / K;
      const int any = code(engine);
      codes[i] = static_cast<std::int8_t>(n == 0 ? format.code_min : n == 1 ? format.code_max : any);
    }
    for (std::int64_t i = 0; i < M * C; ++i) {
      const int any = x_code(engine);
      x_codes[i] = static_cast<std::int8_t>(i % C >= K ? 0 : i / C == 0 ? -127 : i / C == 1 ? 127 : any);
      x_sums[i / B] += x_codes[i];
    }
    for (std::int64_t i = 0; i < M * blocks; ++i) x_scales[i] = 1;
  }

  Shifted<std::uint8_t> packed(const moss::LinearLayout& layout, std::size_t offset) const {
    auto bytes = zeros<std::uint8_t>(moss::packed_bytes(layout, format, shape.outputs, shape.columns));
    moss::pack_weight(layout, format, shape.outputs, shape.columns, codes.data(),
                      stored_scales(format, scales).data(), bytes.data());
    return Shifted<std::uint8_t>(bytes, offset);
  }

  // Rows from m on, `rows` of them.
  moss::LinearArgs args(Shifted<std::uint8_t>& packed, std::int64_t m, std::int64_t rows, bool with_bias, float* y) {
    return {{rows, shape.columns, shape.outputs},
            nullptr,
            x_codes.data() + m * blocks * format.block,
            x_scales.data() + m * blocks,
            x_sums.data() + m * blocks,
            packed.data(),
            with_bias ? bias.data() : nullptr,
            y};
  }
};

bool failed(const char* name, const char* what, const moss::LinearShape& shape) {
  std::printf("FAILED %s M %d K %d N %d: %s\n", name, static_cast<int>(shape.rows), static_cast<int>(shape.columns),
              static_cast<int>(shape.outputs), what);
  return false;
}

// With scales that are small integers, another for each neighbouring block, fp32 is exact and y is one integer, below
// 2^24 in any order of the sum; so are its parts.
bool test_integers(WeightName name, const moss::LinearShape& shape, std::size_t offset) {
  Layer layer(name, shape, offset);
  const std::int64_t M = shape.rows, K = shape.columns, N = shape.outputs, B = layer.format.block;
  const std::int64_t count = moss::scale_count(layer.format, K), C = layer.blocks * B;
  for (std::int64_t m = 0; m < M; ++m) {
    for (std::int64_t b = 0; b < layer.blocks; ++b) {
      layer.x_scales[m * layer.blocks + b] = static_cast<float>(1 + (m + b) % 3);
    }
  }
  for (std::int64_t i = 2 * count; i < N * count; ++i) {
    layer.scales[static_cast<std::size_t>(i)] = static_cast<float>(1 + (i / count + i % count) % 2);
  }
  for (std::int64_t n = 0; n < N; ++n) layer.bias[n] = static_cast<float>(5 * n - 7);

  std::vector<std::int64_t> expected;
  for (std::int64_t m = 0; m < M; ++m) {
    for (std::int64_t n = 0; n < N; ++n) {
      std::int64_t y = 5 * n - 7;
      for (std::int64_t k = 0; k < K; ++k) {
        const std::int64_t b = k / B;
        y += layer.x_codes[m * C + k] * layer.codes[static_cast<std::size_t>(n * K + k)] *
             static_cast<std::int64_t>(layer.x_scales[m * layer.blocks + b]) *
             static_cast<std::int64_t>(layer.scales[static_cast<std::size_t>(n * count + (count == 1 ? 0 : b))]);
      }
      if (y <= -(1 << 24) || y >= 1 << 24) return failed(layer.format.name, "fp32 does not hold the integers", shape);
      expected.push_back(y);
    }
  }
  bool passed = true;
  for (const moss::LinearKernel* kernel : moss::linear_kernels(LinearInput::int8_block, name)) {
    if (!runs_here(*kernel)) continue;
    auto packed = layer.packed(*kernel->layout, offset);
    Shifted<float> y(unset<float>(M * N));
    kernel->run(layer.args(packed, 0, M, true, y.data()), 0, N);
    for (std::int64_t i = 0; i < M * N; ++i) {
      if (static_cast<double>(y[i]) == static_cast<double>(expected[static_cast<std::size_t>(i)])) continue;
      passed = failed(kernel->name, "other integers than the formula", shape);
      break;
    }
  }
  return passed;
}

// Rows first .. last - 1 and outputs begin .. end - 1 by themselves are what they are in `whole`, and nothing else is
// written.
bool same_part(const moss::LinearKernel& kernel, Layer& layer, Shifted<std::uint8_t>& packed, bool with_bias,
               const Floats& whole, std::int64_t first, std::int64_t last, std::int64_t begin, std::int64_t end) {
  const std::int64_t N = layer.shape.outputs;
  Floats y = unset<float>((last - first) * N);
  kernel.run(layer.args(packed, first, last - first, with_bias, y.data()), begin, end);
  for (std::int64_t i = 0; i < (last - first) * N; ++i) {
    const float found = y[static_cast<std::size_t>(i)];
    const bool inside = begin <= i % N && i % N < end;
    if (inside ? found == whole[static_cast<std::size_t>(first * N + i)] : std::isnan(found)) continue;
    return failed(kernel.name, inside ? "a cut changes a bit" : "written outside the outputs", layer.shape);
  }
  return true;
}

bool test_cuts(WeightName name, const moss::LinearShape& shape, bool with_bias) {
  Layer layer(name, shape, 1);
  const std::int64_t M = shape.rows, N = shape.outputs;
  Random random(1);
  const auto positive = [&](std::int64_t size) {
    Floats values = random.normal(size);
    for (float& value : values) value = std::fabs(value) + 0.1f;
    return values;
  };
  const Floats x_scales = positive(M * layer.blocks), bias = random.normal(N);
  std::copy(x_scales.begin(), x_scales.end(), layer.x_scales.data());
  std::copy(bias.begin(), bias.end(), layer.bias.data());
  layer.scales = positive(static_cast<std::int64_t>(layer.scales.size()));
  bool passed = true;
  for (const moss::LinearKernel* kernel : moss::linear_kernels(LinearInput::int8_block, name)) {
    if (!runs_here(*kernel)) continue;
    auto packed = layer.packed(*kernel->layout, 1);
    Floats whole = unset<float>(M * N);
    kernel->run(layer.args(packed, 0, M, with_bias, whole.data()), 0, N);
    for (std::int64_t rows = 1; passed && rows < M; ++rows) {
      passed = same_part(*kernel, layer, packed, with_bias, whole, 0, rows, 0, N) &&
               same_part(*kernel, layer, packed, with_bias, whole, rows, M, 0, N);
    }
    const std::int64_t S = kernel->layout->strip;
    for (std::int64_t begin = 0; passed && begin < N; begin += S) {
      for (const std::int64_t end : {begin + (S + 1) / 2, begin + S, N}) {
        passed = same_part(*kernel, layer, packed, with_bias, whole, 0, M, begin, std::min(end, N)) && passed;
      }
    }
  }
  return passed;
}

#if defined(MOSS_ARM_KERNELS)
bool test_choice() {
  const struct {
    moss::CpuFlags flags;
    const char* isa;
  } cases[] = {{moss::kBaseline, "_scalar"},
               {moss::kI8mm | moss::kDotprod, "_i8mm"},
               {moss::kDotprod, "_dotprod"},
               {moss::kAvx2 | moss::kAvx512 | moss::kAvx512Vnni, "_scalar"}};
  bool passed = true;
  for (const WeightName name : kWeightNames) {
    for (const auto& known : cases) {
      const std::string chosen = select(moss::linear_kernels(LinearInput::int8_block, name), known.flags).name;
      if (chosen.substr(chosen.rfind('_')) == known.isa) continue;
      std::printf("FAILED %s chosen, not %s\n", chosen.c_str(), known.isa);
      passed = false;
    }
  }
  return passed;
}
#else
bool test_choice() { return true; }
#endif

}  // namespace

bool test_linear_integers() {
  bool passed = test_choice();
  for (const WeightName name : kWeightNames) {
    for (const std::int64_t K : {1, 8, 31, 32, 33, 100, 129, 300}) {
      for (const std::int64_t M : {0, 1, 2, 3, 4, 5, 70}) {
        for (const std::int64_t N : {1, 7, 8, 21}) {
          passed = test_integers(name, {M, K, N}, static_cast<std::size_t>(1 + 2 * (M % 2))) && passed;
        }
      }
    }
    passed = test_cuts(name, {70, 48, 21}, true) && passed;
    passed = test_cuts(name, {7, 300, 70}, false) && passed;
    passed = test_cuts(name, {1, 33, 35}, true) && passed;
  }
  // More bytes of input than a form lets strips pass at once.
  passed = test_cuts(WeightName::int4_g32, {14, 40000, 8}, true) && passed;
  return passed;
}

}  // namespace moss_tests
