// SPDX-License-Identifier: Apache-2.0
//
// Times every kernel that this machine can run, on one thread, the best of several runs in ms. Those over time: forward
// and backward, and in ns per channel and step (and state, for the scan). Those on one token of each sequence, E inputs
// to E outputs: in ns per input, or per weight of the linear.
//
//     kernels_bench [B T E N]

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <memory>
#include <random>
#include <vector>

#include "conv/conv.h"
#include "cpu.h"
#include "linear/linear.h"
#include "quantize/quantize.h"
#include "rms_norm/rms_norm.h"
#include "scan/scan.h"
#include "tile.h"

namespace moss {
namespace {

constexpr int kRuns = 7;
constexpr std::int64_t kConvWidth = 4;

template <typename Real>
std::vector<Real> normal(std::int64_t size, double scale = 1, double shift = 0) {
  static std::mt19937 random(0);
  std::normal_distribution<double> distribution(shift, scale);
  std::vector<Real> values(static_cast<std::size_t>(size));
  for (Real& value : values) value = static_cast<Real>(distribution(random));
  return values;
}

template <typename Real>
std::vector<Real> empty(std::int64_t size) {
  return std::vector<Real>(static_cast<std::size_t>(size));
}

// Seconds of the best run of run().
template <typename Run>
double best_seconds(const Run& run) {
  double best = 1e30;
  for (int i = 0; i < kRuns; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    run();
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
  }
  return best;
}

// Seconds of the best run of run(b, tile) over all units.
template <typename Run>
double best_seconds(std::int64_t batch, std::int64_t channels, const Run& run) {
  return best_seconds([&] {
    for (std::int64_t b = 0; b < batch; ++b) {
      for (std::int64_t tile = 0; tile < tile_count(channels); ++tile) run(b, tile);
    }
  });
}

void print(const char* name, double forward, double backward, double elements) {
  std::printf("%-24s forward %8.2f ms  backward %8.2f ms  %7.3f ns per element\n", name, 1e3 * forward, 1e3 * backward,
              1e9 * (forward + backward) / elements);
}

void print(const char* name, double seconds, double elements) {
  std::printf("%-46s %8.3f ms  %7.3f ns per element\n", name, 1e3 * seconds, 1e9 * seconds / elements);
}

template <typename Real>
void bench_scan(std::int64_t B, std::int64_t T, std::int64_t E, std::int64_t N) {
  auto A = normal<Real>(E * N);
  for (Real& a : A) a = -std::abs(a) - 1;
  const auto x = normal<Real>(B * T * E), dt = normal<Real>(B * T * E, 1, -4), dy = normal<Real>(B * T * E);
  const auto Bm = normal<Real>(B * T * N), Cm = normal<Real>(B * T * N), D = normal<Real>(E);
  auto y = empty<Real>(B * T * E), dx = y, ddt = y, hT = empty<Real>(B * E * N), dh0 = hT, dA = hT;
  auto checkpoints = empty<Real>(B * chunk_count(T) * N * E), dD = empty<Real>(B * E);
  auto dBm = empty<Real>(tile_count(E) * B * T * N), dCm = dBm;
  std::vector<Real> scratch(scan_scratch_size(N) + kScratchAlignmentBytes);
  void* aligned = scratch.data();
  std::size_t space = scratch.size() * sizeof(Real);
  auto* const work = static_cast<Real*>(
      std::align(kScratchAlignmentBytes, scan_scratch_size(N) * sizeof(Real), aligned, space));

  const ScanShape shape = {B, T, E, N};
  const ScanForward<Real> forward = {shape,     x.data(), dt.data(), A.data(),  Bm.data(),         Cm.data(),
                                     D.data(), nullptr,  y.data(),  hT.data(), checkpoints.data()};
  const ScanBackward<Real> backward = {shape,    x.data(),           dt.data(), A.data(), Bm.data(),  Cm.data(),
                                       D.data(), checkpoints.data(), dy.data(), nullptr,  dx.data(),  ddt.data(),
                                       dh0.data(), dBm.data(),       dCm.data(), dA.data(), dD.data()};
  for (const auto* kernel : scan_kernels<Real>()) {
    if (!can_run(*kernel, detect_cpu_flags())) continue;
    const auto run_forward = [&](std::int64_t b, std::int64_t tile) { kernel->forward(forward, b, tile, work); };
    const auto run_backward = [&](std::int64_t b, std::int64_t tile) { kernel->backward(backward, b, tile, work); };
    print(kernel->name, best_seconds(B, E, run_forward), best_seconds(B, E, run_backward),
          static_cast<double>(B * T * E * N));
  }
}

template <typename Real>
void bench_conv(std::int64_t B, std::int64_t T, std::int64_t E) {
  const std::int64_t W = kConvWidth;
  const auto x = normal<Real>(B * T * E), dy = normal<Real>(B * T * E);
  const auto weight = normal<Real>(E * W), bias = normal<Real>(E);
  auto y = empty<Real>(B * T * E), dx = y, window = empty<Real>(B * E * (W - 1)), dwindow = window;
  auto dweight = empty<Real>(B * E * W), dbias = empty<Real>(B * E);
  std::vector<Real> scratch(conv_scratch_size(W) + kScratchAlignmentBytes);
  void* aligned = scratch.data();
  std::size_t space = scratch.size() * sizeof(Real);
  auto* const work = static_cast<Real*>(
      std::align(kScratchAlignmentBytes, conv_scratch_size(W) * sizeof(Real), aligned, space));

  const ConvShape shape = {B, T, E, W};
  const ConvForward<Real> forward = {shape, x.data(), weight.data(), bias.data(), nullptr, y.data(), window.data()};
  const ConvBackward<Real> backward = {shape,   x.data(),  weight.data(),  bias.data(),    nullptr,    dy.data(),
                                       nullptr, dx.data(), dwindow.data(), dweight.data(), dbias.data()};
  for (const auto* kernel : conv_kernels<Real>()) {
    if (!can_run(*kernel, detect_cpu_flags())) continue;
    const auto run_forward = [&](std::int64_t b, std::int64_t tile) { kernel->forward(forward, b, tile, work); };
    const auto run_backward = [&](std::int64_t b, std::int64_t tile) { kernel->backward(backward, b, tile, work); };
    print(kernel->name, best_seconds(B, E, run_forward), best_seconds(B, E, run_backward),
          static_cast<double>(B * T * E));
  }
}

template <typename Real>
void bench_rms_norm(std::int64_t M, std::int64_t D) {
  const auto x = normal<Real>(M * D), weight = normal<Real>(D);
  auto y = empty<Real>(M * D);
  const RmsNormArgs<Real> args = {M, D, x.data(), weight.data(), Real(1e-5), y.data()};
  for (const auto* kernel : rms_norm_kernels<Real>()) {
    if (!can_run(*kernel, detect_cpu_flags())) continue;
    print(kernel->name, best_seconds([&] { kernel->run(args); }), static_cast<double>(M * D));
  }
}

void bench_quantize(std::int64_t M, std::int64_t K) {
  constexpr std::int64_t kBlock = 32;
  const auto x = normal<float>(M * K);
  const std::int64_t blocks = (K + kBlock - 1) / kBlock;
  auto codes = empty<std::int8_t>(M * blocks * kBlock);
  auto scales = empty<float>(M * blocks);
  auto sums = empty<std::int32_t>(M * blocks);
  const QuantizeArgs args = {M, K, kBlock, x.data(), codes.data(), scales.data(), sums.data()};
  for (const auto* kernel : quantize_kernels()) {
    if (!can_run(*kernel, detect_cpu_flags())) continue;
    print(kernel->name, best_seconds([&] { kernel->run(args); }), static_cast<double>(M * K));
  }
}

// Codes and scales are zeros: no kernel's time depends on them.
void bench_linear(std::int64_t M, std::int64_t K, std::int64_t N) {
  for (int i = 0; i < static_cast<int>(std::size(kWeightFormats)); ++i) {
    const WeightFormat& format = kWeightFormats[i];
    const std::int64_t blocks = block_count(format, K);
    const auto x = normal<float>(M * K), x_scales = normal<float>(M * blocks);
    const auto x_codes = empty<std::int8_t>(M * blocks * format.block);
    const auto x_sums = empty<std::int32_t>(M * blocks);
    auto y = empty<float>(M * N);
    for (const LinearInput input : {LinearInput::int8_block, LinearInput::f32}) {
      for (const auto* kernel : linear_kernels(input, static_cast<WeightName>(i))) {
        if (!can_run(*kernel, detect_cpu_flags())) continue;
        const auto packed = empty<std::uint8_t>(packed_bytes(*kernel->layout, format, N, K));
        const LinearArgs args = {{M, K, N},     x.data(),      x_codes.data(), x_scales.data(),
                                 x_sums.data(), packed.data(), nullptr,        y.data()};
        const auto run = [&](std::int64_t, std::int64_t tile) {
          kernel->run(args, tile_begin(tile), tile_end(tile, N));
        };
        print(kernel->name, best_seconds(1, N, run), static_cast<double>(M * K * N));
      }
    }
  }
}

}  // namespace
}  // namespace moss

int main(int argc, char** argv) {
  std::int64_t shape[] = {8, 256, 512, 16};
  if (argc != 1 && argc != 5) {
    std::fprintf(stderr, "usage: kernels_bench [B T E N]\n");
    return 2;
  }
  for (int i = 1; i < argc; ++i) shape[i - 1] = std::strtoll(argv[i], nullptr, 10);
  const auto [B, T, E, N] = shape;
  std::printf("B %lld, T %lld, E %lld, N %lld, one thread\n", static_cast<long long>(B), static_cast<long long>(T),
              static_cast<long long>(E), static_cast<long long>(N));
  moss::bench_scan<float>(B, T, E, N);
  moss::bench_scan<double>(B, T, E, N);
  moss::bench_conv<float>(B, T, E);
  moss::bench_conv<double>(B, T, E);
  moss::bench_rms_norm<float>(B, E);
  moss::bench_rms_norm<double>(B, E);
  moss::bench_quantize(B, E);
  moss::bench_linear(B, E, E);
}
