// SPDX-License-Identifier: Apache-2.0
//
// The C interface: arguments are checked, and no exception leaves.

#include "moss.h"

#include <stdexcept>
#include <string>
#include <thread>

#include "cpu.h"
#include "forward.h"
#include "guarded.h"
#include "model.h"
#include "state.h"

struct moss_model {
  moss::Model model;
};

struct moss_state {
  moss::State state;
};

namespace moss {
namespace {

constexpr std::int64_t kMostThreads = 1 << 10;

}  // namespace

CpuFlags allowed_flags(const char* isa) {
  const CpuFlags all = detect_cpu_flags();
  if (isa == nullptr) return all;
  const struct {
    const char* name;
    CpuFlags flags;
  } known[] = {
      {"baseline", kBaseline},
      {"avx2", kAvx2},
      {"avx512", kAvx2 | kAvx512},
      {"avx512vnni", kAvx2 | kAvx512 | kAvx512Vnni},
      {"dotprod", kDotprod},
      {"i8mm", kDotprod | kI8mm},
  };
  std::string names;
  for (const auto& one : known) {
    if (one.name == std::string(isa)) return all & one.flags;
    names += (names.empty() ? "" : ", ") + std::string(one.name);
  }
  refuse("isa '" + std::string(isa) + "' is not one of " + names);
  return all;
}

int thread_count(std::int32_t asked) {
  check(asked >= 0 && asked <= kMostThreads, "threads must be 0 .. 1024");
  const unsigned cores = std::thread::hardware_concurrency();
  return asked > 0 ? asked : static_cast<int>(cores > 0 ? cores : 1);
}

}  // namespace moss

namespace {

using moss::check;
using moss::guarded;
using moss::refuse;

constexpr std::int64_t kMostBatch = 1 << 16;

void check_forward(const moss_model* model, const moss_state* state, const int64_t* tokens, int64_t time) {
  check(model && state && tokens, "a null pointer was given");
  check(&state->state.model() == &model->model, "the state is of another model");
  check(time >= 1, "there must be one token or more");
  const std::int64_t count = state->state.batch() * time, vocabulary = model->model.config().vocabulary;
  for (std::int64_t i = 0; i < count; ++i) {
    if (tokens[i] >= 0 && tokens[i] < vocabulary) continue;
    refuse("token " + std::to_string(tokens[i]) + " is outside the vocabulary of " + std::to_string(vocabulary));
  }
}

}  // namespace

extern "C" {

int32_t moss_abi_version(void) { return MOSS_ABI_VERSION; }

const char* moss_last_error(void) { return moss::last_error.c_str(); }

moss_model* moss_open(const char* path, const moss_options* options) {
  return guarded<moss_model*>(nullptr, [&] {
    check(path != nullptr, "a null pointer was given");
    const moss::CpuFlags flags = moss::allowed_flags(options ? options->isa : nullptr);
    const int threads = moss::thread_count(options ? options->threads : 0);
    try {
      return new moss_model{moss::Model(path, flags, threads)};
    } catch (const std::runtime_error& error) {
      throw std::runtime_error(std::string(path) + " cannot be opened: " + error.what());
    }
  });
}

void moss_close(moss_model* model) { delete model; }

int32_t moss_set_threads(moss_model* model, int32_t threads) {
  return guarded<int32_t>(MOSS_ERROR, [&] {
    check(model != nullptr, "a null pointer was given");
    model->model.set_threads(moss::thread_count(threads));
    return MOSS_OK;
  });
}

int64_t moss_vocab_size(const moss_model* model) { return model->model.config().vocabulary; }
const char* moss_layout(const moss_model* model) { return model->model.layout().c_str(); }
const char* moss_linear_kernel(const moss_model* model) { return model->model.linear_kernel(); }
int32_t moss_repacked(const moss_model* model) { return model->model.repacked(); }
int64_t moss_mapped_bytes(const moss_model* model) { return model->model.mapped_bytes(); }
int64_t moss_private_bytes(const moss_model* model) { return model->model.private_bytes(); }

moss_state* moss_state_create(const moss_model* model, int64_t batch) {
  return guarded<moss_state*>(nullptr, [&] {
    check(model != nullptr, "a null pointer was given");
    check(batch >= 1 && batch <= kMostBatch, "batch must be 1 .. 65536");
    return new moss_state{moss::State(model->model, batch)};
  });
}

moss_state* moss_state_copy(const moss_state* state) {
  return guarded<moss_state*>(nullptr, [&] {
    check(state != nullptr, "a null pointer was given");
    return new moss_state{*state};
  });
}

void moss_state_free(moss_state* state) { delete state; }

int64_t moss_state_batch(const moss_state* state) { return state->state.batch(); }

int64_t moss_state_arrays(const moss_model* model) { return 2 * model->model.config().layers; }

int64_t moss_state_size(const moss_model* model, int64_t array) {
  if (array < 0 || array >= moss_state_arrays(model)) return 0;
  const moss::Config& config = model->model.config();
  return config.inner * (array % 2 == 0 ? config.width - 1 : config.states);
}

int32_t moss_state_read(const moss_state* state, int64_t array, float* values) {
  return guarded<int32_t>(MOSS_ERROR, [&] {
    check(state && values, "a null pointer was given");
    check(array >= 0 && array < state->state.arrays(), "the state has no such array");
    state->state.read(array, values);
    return MOSS_OK;
  });
}

int32_t moss_state_write(moss_state* state, int64_t array, const float* values) {
  return guarded<int32_t>(MOSS_ERROR, [&] {
    check(state && values, "a null pointer was given");
    check(array >= 0 && array < state->state.arrays(), "the state has no such array");
    state->state.write(array, values);
    return MOSS_OK;
  });
}

int64_t moss_state_position(const moss_state* state) { return state->state.position(); }

int32_t moss_state_set_position(moss_state* state, int64_t position) {
  return guarded<int32_t>(MOSS_ERROR, [&] {
    check(state != nullptr, "a null pointer was given");
    check(position >= 0, "a position must be 0 or more");
    state->state.set_position(position);
    return MOSS_OK;
  });
}

int32_t moss_forward(moss_model* model, moss_state* state, const int64_t* tokens, int64_t time, int32_t which,
                     float* logits) {
  return guarded<int32_t>(MOSS_ERROR, [&] {
    check_forward(model, state, tokens, time);
    check(which == MOSS_LAST || which == MOSS_ALL, "which must be MOSS_LAST or MOSS_ALL");
    check(logits != nullptr, "a null pointer was given");
    moss::Wanted wanted;
    (which == MOSS_ALL ? wanted.all : wanted.last) = logits;
    moss::forward(model->model, state->state, tokens, time, wanted);
    return MOSS_OK;
  });
}

int32_t moss_forward_top(moss_model* model, moss_state* state, const int64_t* tokens, int64_t time, int64_t count,
                         int64_t* top_tokens, float* top_logits) {
  return guarded<int32_t>(MOSS_ERROR, [&] {
    check_forward(model, state, tokens, time);
    check(top_tokens && top_logits, "a null pointer was given");
    check(count >= 1 && count <= model->model.config().vocabulary, "count must be 1 .. the vocabulary's size");
    moss::Wanted wanted;
    wanted.count = count;
    wanted.top_tokens = top_tokens;
    wanted.top_logits = top_logits;
    moss::forward(model->model, state->state, tokens, time, wanted);
    return MOSS_OK;
  });
}

int32_t moss_profile(moss_model* model, int32_t on) {
  return guarded<int32_t>(MOSS_ERROR, [&] {
    check(model != nullptr, "a null pointer was given");
    if (on) model->model.profile() = {};
    model->model.profile().on = on != 0;
    return MOSS_OK;
  });
}

int64_t moss_profile_parts(void) { return moss::kParts; }

const char* moss_profile_name(int64_t part) { return part >= 0 && part < moss::kParts ? moss::kPartNames[part] : ""; }

double moss_profile_seconds(const moss_model* model, int64_t part) {
  return part >= 0 && part < moss::kParts ? model->model.profile().seconds[part] : 0;
}

}  // extern "C"
