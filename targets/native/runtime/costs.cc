// SPDX-License-Identifier: Apache-2.0
//
// What one decoded token costs on this machine: the time of every linear of a model in every number format, and of all
// else together. `mossquant quantize --budget 8ms --costs FILE` chooses formats by it. Runs wherever libmoss does.
//
//     moss-costs MODEL.moss [THREADS] > costs.json
//
// A linear is timed over copies that lie apart, together larger than kRingBytes, so that each is read from where the
// weights of a model are. What is not a linear is timed in a real step of the model, less its linears.

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <fstream>
#include <iterator>
#include <string>
#include <utility>
#include <vector>

#include "forward.h"
#include "model.h"
#include "state.h"
#include "tiles.h"

namespace moss {
namespace {

constexpr std::int64_t kRingBytes = 192 << 20;  // above the last cache of what a phone has, and of most others
constexpr int kRepeats = 5;
constexpr int kSteps = 24;

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// The least of several times of run(), in seconds.
template <typename Run>
double least_seconds(const Run& run) {
  double least = 1e30;
  for (int i = 0; i < kRepeats; ++i) {
    const double begin = now();
    run();
    least = std::min(least, now() - begin);
  }
  return least;
}

struct Shape {
  std::int64_t outputs, columns;
  int parts;  // matrices of outputs / parts outputs each, in one region
};

// run(begin, end) over the outputs of `parts` matrices, as the pass shares them out.
template <typename Run>
void share_out(Pool& pool, const Shape& shape, std::int64_t strip, const Run& run) {
  const Tiles tiles(shape.outputs / shape.parts, strip, pool.threads());
  pool.for_units(tiles.count() * shape.parts, [&](std::int64_t unit) {
    const std::int64_t i = unit % tiles.count();
    run(unit / tiles.count(), tiles.begin(i), tiles.end(i));
  });
}

double time_quantized(Model& model, const Shape& shape, WeightName name) {
  const WeightFormat& format = weight_format(name);
  const LinearKernel& kernel = select(linear_kernels(LinearInput::int8_block, name), model.kernels().flags);
  const std::int64_t K = shape.columns, own = shape.outputs / shape.parts, blocks = block_count(format, K);
  const std::int64_t bytes = packed_bytes(*kernel.layout, format, own, K);
  const std::int64_t copies = std::max<std::int64_t>(2, kRingBytes / (bytes * shape.parts) + 1);
  const Memory ring = allocate_aligned(copies * shape.parts * bytes);
  std::memset(ring.get(), 0x11, static_cast<std::size_t>(copies * shape.parts * bytes));
  const std::vector<std::int8_t> codes(static_cast<std::size_t>(blocks * format.block), 1);
  const std::vector<float> scales(static_cast<std::size_t>(blocks), 1.0f);
  const std::vector<std::int32_t> sums(scales.size(), static_cast<std::int32_t>(format.block));
  std::vector<float> y(static_cast<std::size_t>(shape.outputs));
  return least_seconds([&] {
           for (std::int64_t i = 0; i < copies; ++i) {
             share_out(model.pool(), shape, kernel.layout->strip,
                       [&](std::int64_t part, std::int64_t begin, std::int64_t end) {
                         kernel.run({{1, K, own},
                                     nullptr,
                                     codes.data(),
                                     scales.data(),
                                     sums.data(),
                                     ring.get() + (i * shape.parts + part) * bytes,
                                     nullptr,
                                     y.data() + part * own},
                                    begin, end);
                       });
           }
         }) /
         static_cast<double>(copies);
}

double time_kept(Model& model, const Shape& shape) {
  const std::int64_t K = shape.columns, own = shape.outputs / shape.parts, count = shape.outputs * K;
  const std::int64_t copies = std::max<std::int64_t>(2, kRingBytes / (count * 4) + 1);
  const std::vector<float> ring(static_cast<std::size_t>(copies * count), 1.0f), x(static_cast<std::size_t>(K), 1.0f);
  std::vector<float> y(static_cast<std::size_t>(shape.outputs));
  return least_seconds([&] {
           for (std::int64_t i = 0; i < copies; ++i) {
             share_out(model.pool(), shape, 1, [&](std::int64_t part, std::int64_t begin, std::int64_t end) {
               model.kernels().dense->run({1, K, own, x.data(), ring.data() + i * count + part * own * K, nullptr,
                                           y.data() + part * own},
                                          begin, end);
             });
           }
         }) /
         static_cast<double>(copies);
}

constexpr Part kLinears[] = {Part::in_proj, Part::x_proj, Part::dt_proj, Part::out_proj,
                             Part::w1_w3,   Part::w2,     Part::head};

// Of a step of the model: in all, and without its linears.
std::pair<double, double> time_step(Model& model) {
  State state(model, 1);
  std::vector<float> logits(static_cast<std::size_t>(model.config().vocabulary));
  Wanted wanted;
  wanted.last = logits.data();
  const std::int64_t token = 0;
  double least = 1e30, rest = 0;
  for (int i = 0; i < kSteps; ++i) {
    model.profile() = {};
    model.profile().on = true;
    const double begin = now();
    forward(model, state, &token, 1, wanted);
    const double taken = now() - begin;
    if (taken >= least) continue;
    least = rest = taken;
    for (const Part part : kLinears) {
      rest -= model.profile().seconds[static_cast<int>(part)];
    }
  }
  return {least, rest};
}

std::string processor() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    const auto colon = line.find(": ");
    if (line.rfind("model name", 0) == 0 && colon != std::string::npos) return line.substr(colon + 2);
  }
  return "unknown";
}

void run(const char* path, int threads) {
  Model model(path, detect_cpu_flags(), threads);
  const Config& config = model.config();
  std::vector<Shape> shapes = {{2 * config.inner, config.hidden, 2},
                               {config.projected(), config.inner, 1},
                               {config.inner, config.rank, 1},
                               {config.hidden, config.inner, 1},
                               {config.vocabulary, config.hidden, 1}};
  if (config.mlp_hidden > 0) {
    shapes.push_back({config.mlp_hidden, config.hidden, 1});
    shapes.push_back({config.hidden, config.mlp_hidden, 1});
  }
  const auto [step, rest] = time_step(model);
  std::string name;
  for (const char character : processor()) {
    if (character != '"' && character != '\\') name += character;
  }
  std::printf("{\"version\": 1, \"machine\": \"%s\", \"threads\": %d,\n", name.c_str(), threads);
  std::printf(" \"step_ns\": %.0f, \"fixed_ns\": %.0f,\n \"linears\": [", step * 1e9, rest * 1e9);
  const char* comma = "\n";
  for (const Shape& shape : shapes) {
    const auto print = [&](const char* format, double seconds) {
      std::printf("%s  {\"format\": \"%s\", \"outputs\": %lld, \"columns\": %lld, \"ns\": %.0f}", comma, format,
                  static_cast<long long>(shape.outputs), static_cast<long long>(shape.columns), seconds * 1e9);
      std::fflush(stdout);
      comma = ",\n";
    };
    for (std::size_t i = 0; i < std::size(kWeightFormats); ++i) {
      print(kWeightFormats[i].name, time_quantized(model, shape, static_cast<WeightName>(i)));
    }
    print("float32", time_kept(model, shape));
  }
  std::printf("\n ]}\n");
}

}  // namespace
}  // namespace moss

int main(int argc, char** argv) {
  const int threads = argc == 3 ? std::atoi(argv[2]) : 1;
  if (argc < 2 || argc > 3 || threads < 1 || threads > 1024) {
    std::fprintf(stderr, "usage: moss-costs MODEL.moss [THREADS]\n");
    return 2;
  }
  try {
    moss::run(argv[1], threads);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s cannot be timed: %s\n", argv[1], error.what());
    return 2;
  }
  return 0;
}
