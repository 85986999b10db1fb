// SPDX-License-Identifier: Apache-2.0
//
// Times every kernel that this machine can run, on one thread, the best of several runs in ms. Those over time: forward
// and backward, and in ns per channel and step (and state, for the scan). Those on one token of each sequence, with E
// inputs: in ns per input. The linears of a Mamba of width 768 (the one of 130M parameters), on one row and on 512: in
// ns per product, in GB of packed weights a second, to be compared with what the machine reads, and in 10^9 products a
// second. Weights of one row come from beyond the last cache: each run takes the next ones of a buffer that is larger.
//
//     kernels_bench [B T E N]

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <iterator>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#if defined(MOSS_X86_KERNELS)
#include <immintrin.h>
#endif

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

// The exclusive or of all words, with the widest loads that there are, as many vectors as loads may be under way.
#if defined(MOSS_X86_KERNELS)
__attribute__((target("avx512f"))) std::uint8_t read_avx512(const std::uint8_t* bytes, std::int64_t count) {
  __m512i all[8] = {};
  for (std::int64_t i = 0; i + 512 <= count; i += 512) {
    for (int j = 0; j < 8; ++j) all[j] = _mm512_xor_si512(all[j], _mm512_loadu_si512(bytes + i + 64 * j));
  }
  for (int j = 1; j < 8; ++j) all[0] = _mm512_xor_si512(all[0], all[j]);
  std::uint8_t first[64];
  _mm512_storeu_si512(first, all[0]);
  return first[0];
}

__attribute__((target("avx2"))) std::uint8_t read_avx2(const std::uint8_t* bytes, std::int64_t count) {
  __m256i all[8] = {};
  for (std::int64_t i = 0; i + 256 <= count; i += 256) {
    for (int j = 0; j < 8; ++j) {
      all[j] = _mm256_xor_si256(all[j], _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes + i + 32 * j)));
    }
  }
  for (int j = 1; j < 8; ++j) all[0] = _mm256_xor_si256(all[0], all[j]);
  return static_cast<std::uint8_t>(_mm256_extract_epi8(all[0], 0));
}
#endif

std::uint8_t read_baseline(const std::uint8_t* bytes, std::int64_t count) {
  typedef std::uint8_t Bytes __attribute__((vector_size(16)));
  Bytes all[8] = {};
  for (std::int64_t i = 0; i + 128 <= count; i += 128) {
    for (int j = 0; j < 8; ++j) {
      Bytes own;
      std::memcpy(&own, bytes + i + 16 * j, sizeof(own));
      all[j] ^= own;
    }
  }
  for (int j = 1; j < 8; ++j) all[0] ^= all[j];
  return all[0][0];
}

std::uint8_t read_all(const std::uint8_t* bytes, std::int64_t count) {
#if defined(MOSS_X86_KERNELS)
  if (detect_cpu_flags() & kAvx512) return read_avx512(bytes, count);
  if (detect_cpu_flags() & kAvx2) return read_avx2(bytes, count);
#endif
  return read_baseline(bytes, count);
}

// Memory larger than the last cache, of which runs take one piece after the other.
class Memory {
 public:
  Memory() : bytes_(kBytes, 0x3c) {}  // no kernel's time depends on codes, nor on scales that are ordinary numbers

  const std::uint8_t* next(std::int64_t count) {
    if (at_ + count > kBytes) at_ = 0;
    at_ += count;
    return bytes_.data() + at_ - count;
  }

  // The best run(piece) on pieces of `count` bytes, of all there are or as many as kSeconds allow. In processor time:
  // some runs are longer than a process has the processor to itself.
  template <typename Run>
  double best_seconds(std::int64_t count, const Run& run) {
    double best = 1e30, spent = 0;
    for (std::int64_t i = 0; i < kBytes / count && (i == 0 || spent < kSeconds); ++i) {
      const std::uint8_t* const piece = next(count);
      const std::clock_t begin = std::clock();
      run(piece);
      const double seconds = static_cast<double>(std::clock() - begin) / CLOCKS_PER_SEC;
      best = std::min(best, seconds);
      spent += seconds;
    }
    return best;
  }

 private:
  static constexpr std::int64_t kBytes = std::int64_t{512} << 20;
  static constexpr double kSeconds = 0.5;
  std::vector<std::uint8_t> bytes_;
  std::int64_t at_ = 0;
};

constexpr std::int64_t kPieceBytes = std::int64_t{16} << 20;  // far beyond the second cache, some ms

void bench_read(Memory& memory) {
  volatile std::uint8_t read = 0;
  const double seconds = memory.best_seconds(kPieceBytes, [&](const std::uint8_t* piece) {
    read = read ^ read_all(piece, kPieceBytes);
  });
  std::printf("%-48s %37.1f GB/s\n", "memory read", 1e-9 * static_cast<double>(kPieceBytes) / seconds);
}

void bench_linear(Memory& memory, std::int64_t M, std::int64_t K, std::int64_t N) {
  std::printf("linear, M %d, K %d, N %d\n", static_cast<int>(M), static_cast<int>(K), static_cast<int>(N));
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
        // The scalar form does on many rows what it does on one.
        if (M > 1 && kernel->layout == &kRowsLayout) continue;
        const std::int64_t bytes = packed_bytes(*kernel->layout, format, N, K);
        const std::int64_t copies = M == 1 ? std::max(kPieceBytes / bytes, std::int64_t{1}) : 1;
        const double seconds = memory.best_seconds(copies * bytes, [&](const std::uint8_t* piece) {
          for (std::int64_t copy = 0; copy < copies; ++copy) {
            kernel->run({{M, K, N}, x.data(), x_codes.data(), x_scales.data(), x_sums.data(), piece + copy * bytes,
                         nullptr, y.data()}, 0, N);
          }
        }) / static_cast<double>(copies);
        const auto products = static_cast<double>(M * K * N);
        std::printf("%-48s %9.3f ms %8.4f ns per product %6.1f GB/s %7.1f GMAC/s\n", kernel->name, 1e3 * seconds,
                    1e9 * seconds / products, 1e-9 * static_cast<double>(bytes) / seconds, 1e-9 * products / seconds);
      }
    }
  }
}

void bench_linears() {
  Memory memory;
  for (const std::int64_t M : {1, 512}) {
    bench_read(memory);
    for (const auto& [K, N] : {std::pair<std::int64_t, std::int64_t>{768, 3072}, {1536, 80}, {48, 1536}, {1536, 768},
                               {768, 50280}}) {
      bench_linear(memory, M, K, N);
    }
  }
  bench_read(memory);
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
  moss::bench_linears();
}
