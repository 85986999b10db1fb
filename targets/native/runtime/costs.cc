// SPDX-License-Identifier: Apache-2.0
//
// What one decoded token costs on this machine: the time of every linear of a model in every number format, and of all
// else together. `mossquant quantize --budget 8ms --costs FILE` chooses formats by it. Runs wherever libmoss does.
//
//     moss-costs MODEL.moss [THREADS] > costs.json
//
// A linear is timed over copies that lie one after the other, together as large as the model that is given, and all of
// that is read before: so much of them is in the caches as is of the model's own weights when a step begins. What is
// not a linear is timed in real steps of the model, less its linears. Everything takes turns, and of each the least
// time counts, so that other work on the machine falls away. With one thread the time of a linear is its processor's;
// that of steps is what passed.

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <exception>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "bandwidth.h"
#include "forward.h"
#include "model.h"
#include "state.h"
#include "tiles.h"

namespace moss {
namespace {

constexpr int kRounds = 15;
constexpr int kSteps = 3;  // of the model in a round, after one that brings it back into the caches

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Seconds of run(); of one thread those of its processor, in which nothing else ran.
template <typename Run>
double seconds_of(int threads, const Run& run) {
  const auto clock = [&] {
    if (threads > 1) return now();
    timespec time;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
    return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
  };
  const double begin = clock();
  run();
  return clock() - begin;
}

// Memory with something in it, in small pages like a mapped file.
class Ring {
 public:
  Ring(std::int64_t bytes, std::int64_t allocated) : bytes_(bytes), memory_(allocate_aligned(allocated)) {
#if defined(__linux__)
    const std::uintptr_t page = 4096, begin = (reinterpret_cast<std::uintptr_t>(data()) + page - 1) / page * page;
    madvise(reinterpret_cast<void*>(begin), static_cast<std::size_t>(allocated) - page, MADV_NOHUGEPAGE);
#endif
    std::memset(memory_.get(), 0x11, static_cast<std::size_t>(allocated));  // codes and scales of every format
  }

  std::uint8_t* data() const { return memory_.get(); }
  // Leaves in the caches what a step leaves there that reads as much.
  void read() const { read_memory(memory_.get(), static_cast<std::size_t>(bytes_)); }
  // How often so many bytes are in it.
  std::int64_t copies(std::int64_t bytes) const { return std::max<std::int64_t>(1, bytes_ / bytes); }

 private:
  std::int64_t bytes_;
  Memory memory_;
};

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

double time_quantized(Model& model, const Ring& ring, const Shape& shape, WeightName name) {
  const WeightFormat& format = weight_format(name);
  const LinearKernel& kernel = select(linear_kernels(LinearInput::int8_block, name), model.kernels().flags);
  const std::int64_t K = shape.columns, own = shape.outputs / shape.parts, blocks = block_count(format, K);
  const std::int64_t bytes = packed_bytes(*kernel.layout, format, own, K);
  const std::int64_t copies = ring.copies(bytes * shape.parts);
  const std::vector<std::int8_t> codes(static_cast<std::size_t>(blocks * format.block), 1);
  const std::vector<float> scales(static_cast<std::size_t>(blocks), 1.0f);
  const std::vector<std::int32_t> sums(scales.size(), static_cast<std::int32_t>(format.block));
  std::vector<float> y(static_cast<std::size_t>(shape.outputs));
  ring.read();
  return seconds_of(model.pool().threads(), [&] {
           for (std::int64_t i = 0; i < copies; ++i) {
             share_out(model.pool(), shape, kernel.layout->strip,
                       [&](std::int64_t part, std::int64_t begin, std::int64_t end) {
                         kernel.run({{1, K, own},
                                     nullptr,
                                     codes.data(),
                                     scales.data(),
                                     sums.data(),
                                     ring.data() + (i * shape.parts + part) * bytes,
                                     nullptr,
                                     y.data() + part * own},
                                    begin, end);
                       });
           }
         }) /
         static_cast<double>(copies);
}

double time_kept(Model& model, const Ring& ring, const Shape& shape) {
  const std::int64_t K = shape.columns, own = shape.outputs / shape.parts, count = shape.outputs * K;
  const std::int64_t copies = ring.copies(count * 4);
  const auto* const values = reinterpret_cast<const float*>(ring.data());
  const std::vector<float> x(static_cast<std::size_t>(K), 1.0f);
  std::vector<float> y(static_cast<std::size_t>(shape.outputs));
  ring.read();
  return seconds_of(model.pool().threads(), [&] {
           for (std::int64_t i = 0; i < copies; ++i) {
             share_out(model.pool(), shape, 1, [&](std::int64_t part, std::int64_t begin, std::int64_t end) {
               model.kernels().dense->run({1, K, own, x.data(), values + i * count + part * own * K, nullptr,
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
struct Step {
  double whole = 1e30, rest = 1e30;
};

// Keeps the least times.
void time_steps(Model& model, State& state, Step* least) {
  std::vector<float> logits(static_cast<std::size_t>(model.config().vocabulary));
  Wanted wanted;
  wanted.last = logits.data();
  const std::int64_t token = 0;
  for (int i = 0; i <= kSteps; ++i) {
    model.profile() = {};
    model.profile().on = true;
    const double begin = now();  // time that passes, with one thread too: so the parts are timed
    forward(model, state, &token, 1, wanted);
    const double whole = now() - begin;
    if (i == 0) continue;
    double rest = whole;
    for (const Part part : kLinears) rest -= model.profile().seconds[static_cast<int>(part)];
    least->whole = std::min(least->whole, whole);
    least->rest = std::min(least->rest, rest);
  }
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
  std::int64_t largest = model.mapped_bytes();
  for (const Shape& shape : shapes) largest = std::max(largest, shape.outputs * shape.columns * 4 + 4096);
  const Ring ring(model.mapped_bytes(), largest);
  State state(model, 1);
  const std::size_t formats = std::size(kWeightFormats) + 1;  // the last: kept
  Step step;
  std::vector<double> times(shapes.size() * formats, 1e30);
  for (int round = 0; round < kRounds; ++round) {
    time_steps(model, state, &step);
    for (std::size_t i = 0; i < times.size(); ++i) {
      const Shape& shape = shapes[i / formats];
      const bool kept = i % formats + 1 == formats;
      const double taken = kept ? time_kept(model, ring, shape)
                                : time_quantized(model, ring, shape, static_cast<WeightName>(i % formats));
      times[i] = std::min(times[i], taken);
    }
  }
  std::string name;
  for (const char character : processor()) {
    if (character != '"' && character != '\\') name += character;
  }
  std::printf("{\"version\": 1, \"machine\": \"%s\", \"threads\": %d, \"ring_bytes\": %lld,\n", name.c_str(), threads,
              static_cast<long long>(model.mapped_bytes()));
  std::printf(" \"step_ns\": %.0f, \"fixed_ns\": %.0f,\n \"linears\": [", step.whole * 1e9, step.rest * 1e9);
  for (std::size_t i = 0; i < times.size(); ++i) {
    const Shape& shape = shapes[i / formats];
    const char* const format = i % formats + 1 == formats ? "float32" : kWeightFormats[i % formats].name;
    std::printf("%s\n  {\"format\": \"%s\", \"outputs\": %lld, \"columns\": %lld, \"ns\": %.0f}", i ? "," : "", format,
                static_cast<long long>(shape.outputs), static_cast<long long>(shape.columns), times[i] * 1e9);
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
