// SPDX-License-Identifier: Apache-2.0
//
// Every quantize and linear kernel in the lists that this machine can run, and the packed weights: codes by hand for
// hostile inputs, pack and unpack, every number format and kind of input against the formula in float64, at sizes
// around the block, the strip and the tile, and addresses that are aligned to nothing beyond the type. Meant for the
// sanitizers; the mathematics is checked in test_linear.py.

#include "linear/linear.h"

#include <cstring>
#include <map>

#include "compare.h"
#include "quantize/quantize.h"
#include "tile.h"

namespace moss_tests {
namespace {

using moss::LinearInput;
using moss::WeightFormat;
using moss::WeightName;

std::int64_t round_up(std::int64_t size, std::int64_t unit) { return (size + unit - 1) / unit * unit; }

std::vector<std::int8_t> random_codes(std::int64_t size, const WeightFormat& format, unsigned seed) {
  std::mt19937 engine(seed);
  std::uniform_int_distribution<int> distribution(format.code_min, format.code_max);
  std::vector<std::int8_t> codes(static_cast<std::size_t>(size));
  for (std::int8_t& code : codes) code = static_cast<std::int8_t>(distribution(engine));
  return codes;
}

// Scales as they are stored, and what they mean.
struct Scales {
  std::vector<std::uint8_t> bytes;
  Doubles values;
};

Scales random_scales(std::int64_t size, const WeightFormat& format, Random& random) {
  Scales scales;
  for (float value : random.normal(size)) {
    std::uint32_t bits;
    value = std::fabs(value) + 0.25f;
    std::memcpy(&bits, &value, 4);
    if (!format.row_scale) bits &= 0xffff0000;
    std::memcpy(&value, &bits, 4);
    scales.values.push_back(static_cast<double>(value));
    const auto* const stored = reinterpret_cast<const std::uint8_t*>(&bits);
    const std::uint16_t upper = static_cast<std::uint16_t>(bits >> 16);
    const auto* const half = reinterpret_cast<const std::uint8_t*>(&upper);
    if (format.row_scale) {
      scales.bytes.insert(scales.bytes.end(), stored, stored + 4);
    } else {
      scales.bytes.insert(scales.bytes.end(), half, half + 2);
    }
  }
  return scales;
}

// The input in blocks, by every kernel alike.
struct Quantized {
  std::vector<std::int8_t> codes;
  Floats scales;
  std::vector<std::int32_t> sums;
};

Quantized quantize(const moss::QuantizeKernel& kernel, const Floats& x, std::int64_t rows, std::int64_t columns,
                   std::int64_t block) {
  const std::int64_t padded = round_up(columns, block);
  Quantized out;
  out.codes.assign(static_cast<std::size_t>(rows * padded), 99);
  out.scales = unset<float>(rows * padded / block);
  out.sums.assign(out.scales.size(), 99);
  Shifted<float> own_x(x), scales(out.scales);
  Shifted<std::int8_t> codes(out.codes);
  Shifted<std::int32_t> sums(out.sums);
  kernel.run({rows, columns, block, own_x.data(), codes.data(), scales.data(), sums.data()});
  return {codes.own(), scales.own(), sums.own()};
}

bool test_quantize() {
  const float nan = std::numeric_limits<float>::quiet_NaN(), infinity = std::numeric_limits<float>::infinity();
  const float smallest = std::numeric_limits<float>::denorm_min(), largest = std::numeric_limits<float>::max();
  const struct {
    Floats x;
    std::vector<std::int8_t> codes;  // with the padding to blocks of 3
    double scale;                    // of the first block
  } cases[] = {
      {{0, 0, 0}, {0, 0, 0}, 0},
      {{-127, 1, 0.5f}, {-127, 1, 0}, 1},
      {{254, -3, 5}, {127, -2, 2}, 2},  // -1.5 and 2.5: ties go to the even code
      {{-largest, largest}, {-127, 127, 0}, static_cast<double>(largest / 127)},
      {{smallest, -smallest}, {0, 0, 0}, static_cast<double>(smallest / 127)},
      {{infinity, 1}, {0, 0, 0}, HUGE_VAL},
      {{1, nan, 2}, {0, 0, 0}, NAN},
      {{nan, 2, 3, 127}, {0, 0, 0, 127, 0, 0}, NAN},
  };
  bool passed = true;
  for (const moss::QuantizeKernel* kernel : moss::quantize_kernels()) {
    if (!runs_here(*kernel)) continue;
    for (const auto& known : cases) {
      const Quantized found = quantize(*kernel, known.x, 1, static_cast<std::int64_t>(known.x.size()), 3);
      const double scale = static_cast<double>(found.scales[0]);
      if (found.codes == known.codes && (scale == known.scale || (std::isnan(scale) && std::isnan(known.scale)))) {
        continue;
      }
      std::printf("FAILED %s: case %d, scale %.9g\n", kernel->name, static_cast<int>(&known - cases), scale);
      passed = false;
    }
  }
  return passed;
}

// Every form against the scalar one: the same bits.
bool test_quantize_forms() {
  bool passed = true;
  for (std::int64_t columns : {1, 3, 4, 7, 16, 31, 33, 100, 129}) {
    for (std::int64_t block : {1, 3, 16, 32, 40, 128}) {
      const Floats x = Random(static_cast<unsigned>(columns + 131 * block)).normal(3 * columns);
      const Quantized expected = quantize(moss::moss_quantize_int8_block_f32_scalar, x, 3, columns, block);
      for (const moss::QuantizeKernel* kernel : moss::quantize_kernels()) {
        if (!runs_here(*kernel)) continue;
        const Quantized found = quantize(*kernel, x, 3, columns, block);
        if (found.codes == expected.codes && found.scales == expected.scales && found.sums == expected.sums) continue;
        std::printf("FAILED %s: K %d B %d\n", kernel->name, static_cast<int>(columns), static_cast<int>(block));
        passed = false;
      }
    }
  }
  return passed;
}

bool test_packing(const moss::LinearLayout& layout, const WeightFormat& format, const moss::LinearShape& shape,
                  const std::vector<std::int8_t>& codes, const Scales& scales, const std::vector<std::uint8_t>& packed) {
  std::vector<std::int8_t> back(codes.size(), 99);
  std::vector<std::uint8_t> bytes(scales.bytes.size(), 99);
  moss::unpack_weight(layout, format, shape.outputs, shape.columns, packed.data(), back.data(), bytes.data());
  if (back == codes && bytes == scales.bytes) return true;
  std::printf("FAILED unpack %s %s N %d K %d\n", layout.name, format.name, static_cast<int>(shape.outputs),
              static_cast<int>(shape.columns));
  return false;
}

bool test_shape(WeightName name, const moss::LinearShape& shape, bool with_bias) {
  const WeightFormat& format = moss::weight_format(name);
  const std::int64_t M = shape.rows, K = shape.columns, N = shape.outputs, G = format.row_scale ? K : format.block;
  const auto seed = static_cast<unsigned>(1 + M + 131 * K + 7 * N);
  Random random(seed);
  const Floats x = random.normal(M * K), bias = random.normal(N);
  const auto codes = random_codes(N * K, format, seed);
  const Scales scales = random_scales(N * moss::scale_count(format, K), format, random);
  bool passed = true;
  std::map<const moss::LinearLayout*, Shifted<std::uint8_t>> packed;
  for (const moss::LinearLayout* layout : moss::kLinearLayouts) {
    std::vector<std::uint8_t> bytes(static_cast<std::size_t>(moss::packed_bytes(*layout, format, N, K)));
    passed = moss::pack_weight(*layout, format, N, K, codes.data(), scales.bytes.data(), bytes.data()) && passed;
    passed = test_packing(*layout, format, shape, codes, scales, bytes) && passed;
    packed.emplace(layout, bytes);
  }
  const Quantized q = quantize(moss::moss_quantize_int8_block_f32_scalar, x, M, K, format.block);
  Shifted<float> own_x(x), own_bias(bias), x_scales(q.scales);
  Shifted<std::int8_t> x_codes(q.codes);
  Shifted<std::int32_t> x_sums(q.sums);

  const auto weight = [&](std::int64_t n, std::int64_t k) {
    return codes[static_cast<std::size_t>(n * K + k)] *
           scales.values[static_cast<std::size_t>(n * moss::scale_count(format, K) + k / G)];
  };
  const auto seen = [&](LinearInput input, std::int64_t m, std::int64_t k) {
    if (input == LinearInput::f32) return static_cast<double>(x[static_cast<std::size_t>(m * K + k)]);
    const std::int64_t at = m * round_up(K, format.block) + k;
    return q.codes[static_cast<std::size_t>(at)] *
           static_cast<double>(q.scales[static_cast<std::size_t>(at / format.block)]);
  };
  for (const LinearInput input : {LinearInput::f32, LinearInput::int8_block}) {
    Doubles expected;
    for (std::int64_t m = 0; m < M; ++m) {
      for (std::int64_t n = 0; n < N; ++n) {
        double y = with_bias ? static_cast<double>(bias[static_cast<std::size_t>(n)]) : 0;
        for (std::int64_t k = 0; k < K; ++k) y += seen(input, m, k) * weight(n, k);
        expected.push_back(y);
      }
    }
    for (const moss::LinearKernel* kernel : moss::linear_kernels(input, name)) {
      if (!runs_here(*kernel)) continue;
      Shifted<float> y(unset<float>(M * N));
      // What a kernel is not to read is null.
      const bool f32 = input == LinearInput::f32;
      const moss::LinearArgs args = {shape,
                                     f32 ? own_x.data() : nullptr,
                                     f32 ? nullptr : x_codes.data(),
                                     f32 ? nullptr : x_scales.data(),
                                     f32 ? nullptr : x_sums.data(),
                                     packed.at(kernel->layout).data(),
                                     with_bias ? own_bias.data() : nullptr,
                                     y.data()};
      for (std::int64_t tile = 0; tile < moss::tile_count(N); ++tile) {
        kernel->run(args, moss::tile_begin(tile), moss::tile_end(tile, N));
      }
      char at[160];
      std::snprintf(at, sizeof(at), "%s M %d K %d N %d", kernel->name, static_cast<int>(M), static_cast<int>(K),
                    static_cast<int>(N));
      passed = close(at, y.own(), expected) && passed;
    }
  }
  return passed;
}

// Codes that a format does not have.
bool test_refusal() {
  bool passed = true;
  for (const WeightFormat& format : moss::kWeightFormats) {
    for (const std::int32_t code : {format.code_min - 1, format.code_max + 1}) {
      if (code < -128 || code > 127) continue;
      const auto held = static_cast<std::int8_t>(code);
      const std::uint8_t scale[4] = {};
      std::vector<std::uint8_t> packed(static_cast<std::size_t>(moss::packed_bytes(moss::kRowsLayout, format, 1, 1)));
      if (!moss::pack_weight(moss::kRowsLayout, format, 1, 1, &held, scale, packed.data())) continue;
      std::printf("FAILED %s took code %d\n", format.name, static_cast<int>(code));
      passed = false;
    }
  }
  return passed;
}

}  // namespace

bool test_linear() {
  bool passed = test_quantize();
  passed = test_quantize_forms() && passed;
  passed = test_refusal() && passed;
  for (const WeightName name : {WeightName::int8, WeightName::int8_g32, WeightName::int4_g32, WeightName::int4_g128}) {
    for (std::int64_t M : {0, 1, 3}) {
      for (std::int64_t K : {1, 16, 31, 32, 33, 48, 100, 128, 129, 300}) {
        for (std::int64_t N : {0, 1, 7, 64, 70}) passed = test_shape(name, {M, K, N}, M > 1) && passed;
      }
    }
    // As many rows as go together in a fast form, and fewer.
    for (std::int64_t M : {2, 4, 5, 6, 7, 8, 12, 13, 70}) passed = test_shape(name, {M, 48, 33}, M % 2 == 0) && passed;
  }
  return passed;
}

}  // namespace moss_tests
