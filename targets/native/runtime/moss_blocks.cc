// SPDX-License-Identifier: Apache-2.0
//
// The C interface to single blocks: what the host gives becomes the structures that forward.cc computes with, once its
// sizes are right.

#include "moss_blocks.h"

#include <cstdint>
#include <iterator>
#include <string>
#include <vector>

#include "forward.h"
#include "guarded.h"
#include "model.h"

using moss::check;
using moss::guarded;
using moss::refuse;

struct moss_worker {
  moss::Kernels kernels;
  moss::Arena arena;
  moss::Profile profile;
  moss::Pool pool;
};

namespace {

// Of every size and of all rows together: nothing multiplies out of range.
constexpr std::int64_t kMost = std::int64_t{1} << 22, kMostExperts = 1 << 10;

constexpr const char* kNull = "a null pointer was given";

void check_size(std::int64_t size, const char* name, std::int64_t least = 1) {
  if (size < least || size > kMost) refuse(std::string(name) + " must be " + std::to_string(least) + " .. 4194304");
}

template <typename... Pointers>
void check_given(const Pointers*... pointers) {
  check(((pointers != nullptr) && ...), kNull);
}

int layout_index(const moss::LinearLayout* layout) {
  int index = 0;
  while (moss::kLinearLayouts[index] != layout) ++index;
  return index;
}

const moss::LinearKernel& kernel_of(const moss_worker* worker, moss::WeightName format) {
  return moss::select(moss::linear_kernels(moss::LinearInput::int8_block, format), worker->kernels.flags);
}

// `parts` matrices [outputs, columns], one behind the other.
std::vector<moss::Matrix> matrices(const moss_worker* worker, const moss_matrix& given, const char* name,
                                   std::int64_t outputs, std::int64_t columns, int parts = 1) {
  check(given.data != nullptr, kNull);
  const auto most = static_cast<std::int32_t>(std::size(moss::kWeightFormats));
  if (given.format < MOSS_FLOAT32 || given.format > most) refuse(std::string(name) + " is in no known format");
  moss::Matrix matrix;
  matrix.outputs = outputs;
  matrix.columns = columns;
  std::int64_t bytes = outputs * columns * 4;
  if (given.format != MOSS_FLOAT32) {
    matrix.format = static_cast<moss::WeightName>(given.format - 1);
    matrix.kernel = &kernel_of(worker, matrix.format);
    const moss::LinearLayout& layout = *matrix.kernel->layout;
    if (given.layout != layout_index(&layout)) {
      const bool known = given.layout >= 0 && given.layout < static_cast<int>(std::size(moss::kLinearLayouts));
      refuse(std::string(name) + " is packed for " + (known ? moss::kLinearLayouts[given.layout]->name : "another") +
             ", and the kernels of this machine want " + layout.name);
    }
    bytes = moss::packed_bytes(layout, moss::weight_format(matrix.format), outputs, columns);
  }
  if (given.bytes < bytes * parts) {
    refuse(std::string(name) + " has " + std::to_string(given.bytes) + " bytes and needs " +
           std::to_string(bytes * parts));
  }
  std::vector<moss::Matrix> found;
  for (int i = 0; i < parts; ++i) {
    const auto* const data = static_cast<const std::uint8_t*>(given.data) + i * bytes;
    matrix.packed = data;
    if (!matrix.quantized()) matrix.values = reinterpret_cast<const float*>(data);
    found.push_back(matrix);
  }
  return found;
}

moss::Matrix matrix(const moss_worker* worker, const moss_matrix& given, const char* name, std::int64_t outputs,
                    std::int64_t columns) {
  return matrices(worker, given, name, outputs, columns)[0];
}

std::vector<moss::Matrix> of_experts(const moss_worker* worker, const moss_matrix* given, const char* name,
                                     std::int64_t experts, std::int64_t outputs, std::int64_t columns) {
  std::vector<moss::Matrix> found;
  for (std::int64_t e = 0; e < experts; ++e) found.push_back(matrix(worker, given[e], name, outputs, columns));
  return found;
}

moss::Matrix router(const float* values, std::int64_t experts, std::int64_t chosen, std::int64_t columns) {
  check(experts >= 1 && experts <= kMostExperts, "experts must be 1 .. 1024");
  check(chosen >= 1 && chosen <= experts, "other experts are chosen than there are");
  check(experts == 1 || values != nullptr, kNull);
  moss::Matrix matrix;
  matrix.outputs = experts;
  matrix.columns = columns;
  matrix.values = values;
  return matrix;
}

moss::Work work_of(moss_worker* worker, const moss::BlockShape& shape) {
  worker->arena.clear();
  return {worker->kernels, shape, worker->arena, worker->profile, worker->pool};
}

}  // namespace

extern "C" {

moss_worker* moss_worker_create(const moss_options* options, const moss_pool* pool) {
  return guarded<moss_worker*>(nullptr, [&] {
    const moss::Kernels kernels(moss::allowed_flags(options ? options->isa : nullptr));
    if (pool == nullptr) {
      return new moss_worker{kernels, {}, {}, moss::Pool(moss::thread_count(options ? options->threads : 0))};
    }
    check(pool->for_units != nullptr, kNull);
    check(pool->threads >= 1, "a pool must have one thread or more");
    return new moss_worker{kernels, {}, {}, moss::Pool({pool->threads, pool->host, pool->for_units})};
  });
}

void moss_worker_free(moss_worker* worker) { delete worker; }

int32_t moss_worker_layout(const moss_worker* worker) {
  return guarded<int32_t>(-1, [&] {
    check_given(worker);
    return layout_index(kernel_of(worker, moss::WeightName::int4_g32).layout);
  });
}

int32_t moss_embedding(moss_worker* worker, const moss_matrix* table, int64_t rows, int64_t columns,
                       const int64_t* tokens, int64_t count, float* x) {
  return guarded<int32_t>(MOSS_ERROR, [&] {
    check_given(worker, table, tokens, x);
    check_size(rows, "rows");
    check_size(columns, "columns");
    check_size(count, "count");
    const moss::Matrix own = matrix(worker, *table, "the table", rows, columns);
    for (std::int64_t i = 0; i < count; ++i) {
      if (tokens[i] >= 0 && tokens[i] < rows) continue;
      refuse("token " + std::to_string(tokens[i]) + " is outside the vocabulary of " + std::to_string(rows));
    }
    for (std::int64_t i = 0; i < count; ++i) own.row(tokens[i], x + i * columns);
    return MOSS_OK;
  });
}

int32_t moss_ssm_block(moss_worker* worker, const moss_shape* shape, const moss_ssm* ssm, int64_t batch, int64_t time,
                       float* x, float* window, float* h) {
  return guarded<int32_t>(MOSS_ERROR, [&] {
    check_given(worker, shape, ssm, x, h);
    check_given(ssm->norm, ssm->conv, ssm->conv_bias, ssm->x_proj, ssm->dt_proj, ssm->dt_bias, ssm->rate, ssm->D);
    const moss::BlockShape own = {shape->hidden, shape->inner, shape->states, shape->width, shape->rank, 0, shape->eps};
    const std::int64_t D = own.hidden, E = own.inner;
    check_size(D, "hidden");
    check_size(E, "inner");
    check_size(own.states, "states");
    check_size(own.width, "width");
    check_size(own.rank, "rank");
    check_size(batch, "batch");
    check_size(time, "time");
    check(batch * time <= kMost, "batch and time are too large");
    check(own.width == 1 || window != nullptr, kNull);
    moss::Ssm block;
    block.router = router(ssm->router, ssm->experts, ssm->chosen, D);
    block.chosen = ssm->chosen;
    block.norm = ssm->norm;
    const std::vector<moss::Matrix> in_proj = matrices(worker, ssm->in_proj, "in_proj", E, D, 2);
    block.in_x = in_proj[0];
    block.in_z = in_proj[1];
    block.conv = ssm->conv;
    block.conv_bias = ssm->conv_bias;
    block.x_proj = of_experts(worker, ssm->x_proj, "x_proj", ssm->experts, own.projected(), E);
    block.dt_proj = of_experts(worker, ssm->dt_proj, "dt_proj", ssm->experts, E, own.rank);
    for (std::int64_t e = 0; e < ssm->experts; ++e) block.dt_bias.push_back(ssm->dt_bias + e * E);
    block.rate = ssm->rate;
    block.D = ssm->D;
    block.out_proj = matrix(worker, ssm->out_proj, "out_proj", D, E);
    moss::ssm_block(work_of(worker, own), block, batch, time, x, window, h);
    return MOSS_OK;
  });
}

int32_t moss_mlp_block(moss_worker* worker, const moss_shape* shape, const moss_mlp* mlp, int64_t rows, float* x) {
  return guarded<int32_t>(MOSS_ERROR, [&] {
    check_given(worker, shape, mlp, x);
    check_given(mlp->norm, mlp->w1, mlp->w3, mlp->w2);
    const moss::BlockShape own = {shape->hidden, 0, 0, 0, 0, shape->mlp_hidden, shape->eps};
    const std::int64_t D = own.hidden, F = own.mlp_hidden;
    check_size(D, "hidden");
    check_size(F, "mlp_hidden");
    check_size(rows, "rows");
    moss::Mlp block;
    block.router = router(mlp->router, mlp->experts, mlp->chosen, D);
    block.chosen = mlp->chosen;
    block.norm = mlp->norm;
    block.w1 = of_experts(worker, mlp->w1, "w1", mlp->experts, F, D);
    block.w3 = of_experts(worker, mlp->w3, "w3", mlp->experts, F, D);
    block.w2 = of_experts(worker, mlp->w2, "w2", mlp->experts, D, F);
    moss::mlp_block(work_of(worker, own), block, rows, x);
    return MOSS_OK;
  });
}

int32_t moss_head(moss_worker* worker, const moss_matrix* head, int64_t vocabulary, int64_t hidden, const float* norm,
                  float eps, int64_t rows, const float* x, float* logits) {
  return guarded<int32_t>(MOSS_ERROR, [&] {
    check_given(worker, head, norm, x, logits);
    check_size(vocabulary, "vocabulary");
    check_size(hidden, "hidden");
    check_size(rows, "rows");
    const moss::Matrix own = matrix(worker, *head, "the head", vocabulary, hidden);
    const moss::BlockShape shape = {hidden, 0, 0, 0, 0, 0, eps};
    moss::logits_of(work_of(worker, shape), norm, own, rows, x, logits);
    return MOSS_OK;
  });
}

}  // extern "C"
