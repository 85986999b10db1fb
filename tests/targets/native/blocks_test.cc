// SPDX-License-Identifier: Apache-2.0
//
// The blocks of moss_blocks.h as a host calls them: every form of this machine, every format, sizes around strips and
// groups, one expert and several, our threads and the host's. Then what a host may give by mistake: sizes out of range,
// pointers that are null, matrices of another format, layout or size, tokens that the table does not have, which are
// refused and change nothing; and any values whatever, which must not bring anything down. Meant for the sanitizers;
// the mathematics is checked in test_kernels.py.
//
//     moss-blocks-test      says how many calls went through and were refused; fails where one did the other

#include "moss_blocks.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <iterator>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "linear/layout.h"

namespace {

using Floats = std::vector<float>;
using Bytes = std::vector<std::uint8_t>;

constexpr std::int64_t kVocabulary = 37;
constexpr float kEps = 1e-5f;
int failures = 0, calls = 0, refused = 0;

void expect(bool holds, const std::string& what) {
  if (holds) return;
  std::printf("FAILED %s\n", what.c_str());
  ++failures;
}

std::size_t size_of(std::int64_t size) { return static_cast<std::size_t>(size); }

// What a host holds; every array ends where its allocation does, so that the address sanitizer sees any step over it,
// and begins at an address that is aligned to nothing beyond its type.
class Host {
 public:
  Host(const moss_worker* worker, std::int32_t format, bool experts, std::int64_t width, unsigned seed)
      : engine_(seed), format_(format), layout_(moss_worker_layout(worker)) {
    shape = {48, 70, 5, width, 12, 50, kEps};
    const std::int64_t D = shape.hidden, E = shape.inner, N = shape.states, R = shape.rank, F = shape.mlp_hidden;
    const std::int64_t X = experts ? 3 : 1, strips = (E + 15) / 16;
    table = matrix(kVocabulary, D, 1);
    norm = values(D, 1, 0.1f);
    ssm = {X,
           experts ? 2 : 1,
           norm,
           experts ? values(X * D) : nullptr,
           matrix(E, D, 2),
           values(width * E),
           values(E),
           matrices(X, R + 2 * N, E),
           matrices(X, E, R),
           values(X * E),
           values(strips * N * 16, -1, 0.1f),
           values(E),
           matrix(D, E, 1)};
    mlp = {X,
           experts ? 2 : 1,
           norm,
           experts ? values(X * D) : nullptr,
           matrices(X, F, D),
           matrices(X, F, D),
           matrices(X, D, F)};
  }

  // Any bytes in place of codes and scales, any numbers in place of values.
  void spoil() {
    std::uniform_int_distribution<int> byte(0, 255);
    for (Bytes& bytes : packed_) {
      for (std::uint8_t& one : bytes) one = static_cast<std::uint8_t>(byte(engine_));
    }
    for (Floats& array : arrays_) spoil(array);
  }
  void spoil(Floats& array) {
    constexpr float most = std::numeric_limits<float>::max(), least = std::numeric_limits<float>::denorm_min();
    constexpr float hostile[] = {NAN, INFINITY, -INFINITY, most, -most, least, 0, -1e30f};
    std::uniform_int_distribution<std::size_t> any(0, 2 * std::size(hostile) - 1);
    for (float& value : array) {
      const std::size_t i = any(engine_);
      if (i < std::size(hostile)) value = hostile[i];
    }
  }

  Floats random(std::int64_t size, float mean = 0, float deviation = 0.3f) {
    std::normal_distribution<float> distribution(mean, deviation);
    Floats array(size_of(size));
    for (float& value : array) value = distribution(engine_);
    return array;
  }

  moss_shape shape;
  moss_matrix table;
  const float* norm;
  moss_ssm ssm;
  moss_mlp mlp;

 private:
  const float* values(std::int64_t size, float mean = 0, float deviation = 0.3f) {
    arrays_.push_back(random(1 + size, mean, deviation));
    return arrays_.back().data() + 1;
  }

  // `parts` matrices, one behind the other.
  moss_matrix matrix(std::int64_t outputs, std::int64_t columns, int parts) {
    if (format_ == MOSS_FLOAT32) {
      const std::int64_t size = parts * outputs * columns;
      return {values(size), 4 * size, format_, -1};
    }
    const moss::WeightFormat& format = moss::kWeightFormats[format_ - 1];
    const moss::LinearLayout& layout = *moss::kLinearLayouts[layout_];
    const std::int64_t bytes = moss::packed_bytes(layout, format, outputs, columns);
    const std::int64_t scales = outputs * moss::scale_count(format, columns);
    std::uniform_int_distribution<int> code(format.code_min, format.code_max);
    packed_.emplace_back(size_of(1 + parts * bytes));
    std::uint8_t* const packed = packed_.back().data() + 1;
    for (int part = 0; part < parts; ++part) {
      std::vector<std::int8_t> codes(size_of(outputs * columns));
      for (std::int8_t& one : codes) one = static_cast<std::int8_t>(code(engine_));
      const Floats wanted(size_of(scales), 0.3f / static_cast<float>(format.code_max));
      std::vector<std::uint16_t> halves;
      for (const float scale : wanted) {
        std::uint32_t bits;
        std::memcpy(&bits, &scale, 4);
        halves.push_back(static_cast<std::uint16_t>(bits >> 16));
      }
      const void* const stored = format.row_scale ? static_cast<const void*>(wanted.data()) : halves.data();
      moss::pack_weight(layout, format, outputs, columns, codes.data(), stored, packed + part * bytes);
    }
    return {packed, parts * bytes, format_, layout_};
  }

  const moss_matrix* matrices(std::int64_t count, std::int64_t outputs, std::int64_t columns) {
    auto& own = lists_.emplace_back(new moss_matrix[size_of(count)]);
    for (std::int64_t i = 0; i < count; ++i) own[i] = matrix(outputs, columns, 1);
    return own.get();
  }

  std::mt19937 engine_;
  const std::int32_t format_, layout_;
  // Vectors keep their data where it is when they are moved.
  std::vector<Bytes> packed_;
  std::vector<Floats> arrays_;
  std::vector<std::unique_ptr<moss_matrix[]>> lists_;
};

// Residual, states and logits of some tokens of each of two sequences.
struct Run {
  std::int64_t batch, time;
  Floats x, window, h, logits;

  Run(Host& host, std::int64_t time) : batch(2), time(time) {
    const moss_shape& shape = host.shape;
    x = host.random(batch * time * shape.hidden);
    window = host.random(batch * (shape.width - 1) * shape.inner);
    h = host.random(batch * ((shape.inner + 15) / 16) * shape.states * 16);
    logits.assign(size_of(batch * time * kVocabulary), 0);
  }
  bool operator==(const Run& other) const {
    return same(x, other.x) && same(window, other.window) && same(h, other.h) && same(logits, other.logits);
  }
  static bool same(const Floats& a, const Floats& b) {
    return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), 4 * a.size()) == 0);
  }
};

// The calls of a model of one layer; each says whether it went well.
bool embed(moss_worker* worker, const Host& host, const std::vector<std::int64_t>& tokens, float* x) {
  return moss_embedding(worker, &host.table, kVocabulary, host.shape.hidden, tokens.data(),
                        static_cast<std::int64_t>(tokens.size()), x) == MOSS_OK;
}
bool blocks(moss_worker* worker, const Host& host, Run& run) {
  float* const window = run.window.empty() ? nullptr : run.window.data();
  return moss_ssm_block(worker, &host.shape, &host.ssm, run.batch, run.time, run.x.data(), window, run.h.data()) ==
             MOSS_OK &&
         moss_mlp_block(worker, &host.shape, &host.mlp, run.batch * run.time, run.x.data()) == MOSS_OK &&
         moss_head(worker, &host.table, kVocabulary, host.shape.hidden, host.norm, kEps, run.batch * run.time,
                   run.x.data(), run.logits.data()) == MOSS_OK;
}

bool finite(const Floats& array) {
  for (const float value : array) {
    if (!std::isfinite(value)) return false;
  }
  return true;
}

// Tokens read at once and one after the other give the same bits; nothing of it is infinite.
void test_right(moss_worker* worker, Host& host, std::int64_t time, const std::string& what) {
  std::vector<std::int64_t> tokens;
  for (std::int64_t i = 0; i < 2 * time; ++i) tokens.push_back(i * 11 % kVocabulary);
  Run whole(host, time);
  expect(embed(worker, host, tokens, whole.x.data()), what + ", embedding: " + moss_last_error());
  const std::int64_t D = host.shape.hidden;
  Run step(host, 1);
  step.window = whole.window;
  step.h = whole.h;
  const Floats entering = whole.x;
  expect(blocks(worker, host, whole), what + ": " + moss_last_error());
  calls += 4;
  bool same = true;
  for (std::int64_t t = 0; t < time; ++t) {
    for (std::int64_t b = 0; b < 2; ++b) {
      std::copy_n(entering.begin() + (b * time + t) * D, D, step.x.begin() + b * D);
    }
    expect(blocks(worker, host, step), what + ", a step: " + moss_last_error());
    calls += 3;
    for (std::int64_t b = 0; b < 2; ++b) {
      same = same && std::memcmp(&step.logits[size_of(b * kVocabulary)],
                                 &whole.logits[size_of((b * time + t) * kVocabulary)], 4 * kVocabulary) == 0;
    }
  }
  same = same && Run::same(step.window, whole.window) && Run::same(step.h, whole.h);
  expect(same, what + ": single steps give other bits");
  expect(finite(whole.logits) && finite(whole.h), what + ": not finite");
}

// A call that must be refused with a line, and leave everything as it was.
void test_refused(const std::string& what, Run& run, const std::function<std::int32_t()>& call) {
  const Run before = run;
  ++refused;
  const bool is = call() == MOSS_ERROR;
  const std::string line = is ? moss_last_error() : "";
  expect(is && !line.empty() && line.find('\n') == std::string::npos, what + " was taken");
  expect(run == before, what + " changed something");
}

void test_mistakes(moss_worker* worker, Host& host) {
  Run run(host, 3);
  moss_shape shape = host.shape;
  moss_ssm ssm = host.ssm;
  moss_mlp mlp = host.mlp;
  moss_matrix table = host.table;
  std::int64_t batch = run.batch, time = run.time, rows = batch * time, vocabulary = kVocabulary;
  std::vector<std::int64_t> tokens = {0, 1, kVocabulary - 1};
  std::int64_t count = 3;
  float *x = run.x.data(), *window = run.window.data(), *h = run.h.data(), *logits = run.logits.data();
  const float* norm = host.norm;
  const std::int64_t* given = tokens.data();
  const auto mixer = [&] { return moss_ssm_block(worker, &shape, &ssm, batch, time, x, window, h); };
  const auto experts = [&] { return moss_mlp_block(worker, &shape, &mlp, rows, x); };
  const auto head = [&] {
    return moss_head(worker, &table, vocabulary, shape.hidden, norm, kEps, rows, x, logits);
  };
  const auto embedding = [&] { return moss_embedding(worker, &table, vocabulary, shape.hidden, given, count, x); };

  // Each thing is put wrong by itself, and right again.
  const auto with = [&](const char* what, auto& place, auto wrong, const auto& call) {
    const auto right = place;
    place = wrong;
    test_refused(what, run, call);
    place = right;
  };
  constexpr std::int64_t least = std::numeric_limits<std::int64_t>::min();
  constexpr std::int64_t most = std::numeric_limits<std::int64_t>::max();
  for (const std::int64_t wrong : {std::int64_t{0}, std::int64_t{-1}, std::int64_t{1} << 23, least, most}) {
    for (auto* size : {&shape.hidden, &shape.inner, &shape.states, &shape.width, &shape.rank, &batch, &time}) {
      with("a size of the mixer", *size, wrong, mixer);
    }
    for (auto* size : {&shape.hidden, &shape.mlp_hidden, &rows}) with("a size of the MLPs", *size, wrong, experts);
    for (auto* size : {&shape.hidden, &vocabulary, &rows}) with("a size of the head", *size, wrong, head);
    for (auto* size : {&shape.hidden, &vocabulary, &count}) with("a size of the table", *size, wrong, embedding);
    for (auto* number : {&ssm.experts, &ssm.chosen}) with("experts of the mixer", *number, wrong, mixer);
    for (auto* number : {&mlp.experts, &mlp.chosen}) with("experts of the MLPs", *number, wrong, experts);
    if (wrong != 0) with("a token", tokens[1], wrong, embedding);
  }
  with("a token", tokens[2], kVocabulary, embedding);
  with("more experts than there are", ssm.chosen, ssm.experts + 1, mixer);
  with("more rows than go", batch, std::int64_t{1} << 21, mixer);

  const float* const none = nullptr;
  const moss_matrix* const no_matrices = nullptr;
  for (auto* pointer : {&ssm.norm, &ssm.router, &ssm.conv, &ssm.conv_bias, &ssm.dt_bias, &ssm.rate, &ssm.D}) {
    if (*pointer != nullptr) with("no array of the mixer", *pointer, none, mixer);
  }
  for (auto* pointer : {&mlp.norm, &mlp.router}) {
    if (*pointer != nullptr) with("no array of the MLPs", *pointer, none, experts);
  }
  for (auto* list : {&ssm.x_proj, &ssm.dt_proj}) with("no matrices of the mixer", *list, no_matrices, mixer);
  for (auto* list : {&mlp.w1, &mlp.w3, &mlp.w2}) with("no matrices of the MLPs", *list, no_matrices, experts);
  float* const nowhere = nullptr;
  for (auto* pointer : {&x, &window, &h}) with("no state", *pointer, nowhere, mixer);
  with("no residual", x, nowhere, experts);
  for (auto* pointer : {&x, &logits}) with("no input or logits", *pointer, nowhere, head);
  with("no norm", norm, none, head);
  with("no tokens", given, static_cast<const std::int64_t*>(nullptr), embedding);
  moss_worker* const own = worker;
  worker = nullptr;
  for (const auto& call : std::vector<std::function<std::int32_t()>>{mixer, experts, head, embedding}) {
    test_refused("no worker", run, call);
  }
  worker = own;

  // Matrices of another kind than they are, in each place that one stands in.
  const auto list = [](const moss_matrix* first, std::int64_t size) {
    return std::vector<moss_matrix>(first, first + size);
  };
  std::vector<moss_matrix> x_proj = list(ssm.x_proj, ssm.experts), dt_proj = list(ssm.dt_proj, ssm.experts);
  std::vector<moss_matrix> w1 = list(mlp.w1, mlp.experts), w3 = list(mlp.w3, mlp.experts);
  std::vector<moss_matrix> w2 = list(mlp.w2, mlp.experts);
  ssm.x_proj = x_proj.data();
  ssm.dt_proj = dt_proj.data();
  mlp.w1 = w1.data();
  mlp.w3 = w3.data();
  mlp.w2 = w2.data();
  const auto damaged = [&](moss_matrix& matrix, const auto& call) {
    with("a matrix that is nowhere", matrix.data, static_cast<const void*>(nullptr), call);
    for (const std::int64_t bytes : {matrix.bytes - 1, std::int64_t{0}, std::int64_t{-1}, least}) {
      with("a matrix of too few bytes", matrix.bytes, bytes, call);
    }
    for (const std::int32_t format : {-1, 5, std::numeric_limits<std::int32_t>::min()}) {
      with("a matrix of no known format", matrix.format, format, call);
    }
    if (matrix.format == MOSS_FLOAT32) return;
    for (const std::int32_t layout : {-1, (matrix.layout + 1) % 3, 3, std::numeric_limits<std::int32_t>::max()}) {
      with("a matrix of another layout", matrix.layout, layout, call);
    }
  };
  for (moss_matrix* matrix : {&ssm.in_proj, &x_proj.back(), &dt_proj.front(), &ssm.out_proj}) damaged(*matrix, mixer);
  for (moss_matrix* matrix : {&w1.front(), &w3.back(), &w2.back()}) damaged(*matrix, experts);
  damaged(table, head);
  damaged(table, embedding);
  // What was put right again is taken.
  expect(mixer() == MOSS_OK && experts() == MOSS_OK && head() == MOSS_OK && embedding() == MOSS_OK, moss_last_error());
}

// A host's threads: the calling one, from the last unit to the first.
void backwards(void*, std::int64_t units, void (*run)(const void*, std::int64_t), const void* work) {
  while (units-- > 0) run(work, units);
}

void test(const moss_options& options, const moss_pool* pool, const std::string& name) {
  moss_worker* const worker = moss_worker_create(&options, pool);
  expect(worker != nullptr, name + ": no worker");
  if (worker == nullptr) return;
  for (std::int32_t format = MOSS_FLOAT32; format <= MOSS_INT4_G128; ++format) {
    for (const bool experts : {true, false}) {
      const std::string what = name + ", format " + std::to_string(format) + (experts ? ", experts" : "");
      Host host(worker, format, experts, experts ? 4 : 1, static_cast<unsigned>(format));
      for (const std::int64_t time : {1, 2, 7, 40}) test_right(worker, host, time, what);
      if (experts) test_mistakes(worker, host);
      for (int round = 0; round < 3; ++round) {
        Run run(host, 9);
        host.spoil();
        for (Floats* array : {&run.x, &run.window, &run.h}) host.spoil(*array);
        const bool taken = embed(worker, host, {3, 1, 4}, run.x.data()) && blocks(worker, host, run);
        expect(taken, what + ", any values: " + moss_last_error());
        calls += 4;
      }
    }
  }
  moss_worker_free(worker);
}

}  // namespace

int main() {
  for (const char* isa : {"baseline", "avx2", "avx512", "dotprod", static_cast<const char*>(nullptr)}) {
    test({1, isa}, nullptr, isa ? isa : "all instructions");
  }
  test({2, nullptr}, nullptr, "two threads");
  const moss_pool pool = {3, nullptr, backwards};
  test({0, nullptr}, &pool, "threads of the host");
  const moss_pool useless = {1, nullptr, nullptr}, nobody = {0, nullptr, backwards};
  for (const moss_pool* wrong : {&useless, &nobody}) expect(!moss_worker_create(nullptr, wrong), "a pool was taken");
  expect(moss_worker_layout(nullptr) == -1, "no worker has a layout");
  const moss_options unknown = {1, "none"};
  expect(!moss_worker_create(&unknown, nullptr), "an unknown isa was taken");
  moss_worker_free(nullptr);
  std::printf("%d calls, %d refused\n", calls, refused);
  return failures == 0 && calls > 0 && refused > 0 ? 0 : 1;
}
