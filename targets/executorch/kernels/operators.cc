// SPDX-License-Identifier: Apache-2.0
//
// libmoss' blocks as operators of ExecuTorch; their schemas are in operators.py. Static initialisers register them.
//
// A program is data: types and shapes are checked here, formats, sizes and tokens in libmoss, before it computes
// anything, and what is wrong fails the call. Blocks change x and states in place, so that these are copied into the
// outputs first: where libmoss refuses a call, they hold its inputs. Work is shared out over ExecuTorch's own threads.

#include <moss_blocks.h>

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <memory>
#include <vector>

#include <executorch/extension/threadpool/threadpool.h>
#include <executorch/runtime/kernel/kernel_includes.h>
#include <executorch/runtime/kernel/operator_registry.h>

namespace mossquant {
namespace {

using executorch::aten::ScalarType;
using executorch::aten::SizesType;
using executorch::aten::Tensor;
using executorch::runtime::Error;
using executorch::runtime::EValue;
using executorch::runtime::KernelRuntimeContext;
using executorch::runtime::Span;
using Sizes = std::initializer_list<std::int64_t>;

constexpr std::int64_t kLanes = 16;  // channels of a strip (moss_blocks.h)
constexpr std::int64_t kAny = -1;    // a size that is not known beforehand

void for_units(void*, std::int64_t units, void (*run)(const void*, std::int64_t), const void* work) {
  executorch::extension::threadpool::get_threadpool()->run(
      [&](std::size_t unit) { run(work, static_cast<std::int64_t>(unit)); }, static_cast<std::size_t>(units));
}

// The worker of this thread, made anew where ExecuTorch has another number of threads. Null: libmoss said why.
moss_worker* worker() {
  struct Free {
    void operator()(moss_worker* own) const { moss_worker_free(own); }
  };
  static thread_local std::unique_ptr<moss_worker, Free> own;
  static thread_local std::int32_t made_for = 0;
  const auto* const threads = executorch::extension::threadpool::get_threadpool();
  const std::int32_t count = threads ? static_cast<std::int32_t>(threads->get_thread_count()) : 1;
  if (!own || made_for != count) {
    const moss_pool pool = {count, nullptr, for_units};
    own.reset(moss_worker_create(nullptr, &pool));
    made_for = count;
  }
  return own.get();
}

// The arguments of a call, one after the other. From the first that is wrong on, `good` is false and all is empty.
class Arguments {
 public:
  explicit Arguments(Span<EValue*> stack) : stack_(stack) {}

  bool good = true;

  // A tensor of these sizes; null where it is another.
  const Tensor* tensor(ScalarType type, Sizes sizes) {
    EValue* const value = next(value_is<&EValue::isTensor>);
    if (!value) return nullptr;
    const Tensor& own = value->toTensor();
    good = own.scalar_type() == type && own.dim() == static_cast<decltype(own.dim())>(sizes.size()) &&
           executorch::runtime::tensor_is_default_dim_order(own);
    const std::int64_t* const asked = sizes.begin();
    for (std::size_t i = 0; good && i < sizes.size(); ++i) good = asked[i] == kAny || own.sizes()[i] == asked[i];
    return good ? &own : nullptr;
  }
  const float* floats(Sizes sizes) {
    const Tensor* const own = tensor(ScalarType::Float, sizes);
    return own ? own->const_data_ptr<float>() : nullptr;
  }
  // Null where it is None, too.
  const float* floats_or_none(Sizes sizes) {
    if (good && at_ < stack_.size() && stack_[at_]->isNone()) {
      ++at_;
      return nullptr;
    }
    return floats(sizes);
  }
  // Bytes, or values; of what size and format they are, libmoss checks.
  moss_matrix matrix() {
    EValue* const value = next(value_is<&EValue::isTensor>);
    return value ? matrix_of(value->toTensor()) : moss_matrix{};
  }
  std::vector<moss_matrix> matrices() {
    std::vector<moss_matrix> found;
    EValue* const value = next(value_is<&EValue::isTensorList>);
    if (value) {
      for (const Tensor& own : value->toTensorList()) found.push_back(matrix_of(own));
    }
    return found;
  }
  std::int64_t integer() {
    EValue* const value = next(value_is<&EValue::isInt>);
    return value ? value->toInt() : 0;
  }
  float real() {
    EValue* const value = next(value_is<&EValue::isDouble>);
    return value ? static_cast<float>(value->toDouble()) : 0.0f;
  }
  bool truth() {
    EValue* const value = next(value_is<&EValue::isBool>);
    return value && value->toBool();
  }
  // What the matrices are packed for, and the format of each.
  void formats(const std::vector<moss_matrix*>& matrices) {
    const std::int64_t layout = integer();
    EValue* const value = next(value_is<&EValue::isIntList>);
    if (!value) return;
    const auto given = value->toIntList();
    good = given.size() == matrices.size() && fits(layout);
    for (std::size_t i = 0; good && i < matrices.size(); ++i) {
      good = fits(given[i]);
      matrices[i]->format = static_cast<std::int32_t>(given[i]);
      matrices[i]->layout = static_cast<std::int32_t>(layout);
    }
  }
  // An output, made of these sizes.
  float* out(Sizes sizes) {
    EValue* const value = next(value_is<&EValue::isTensor>);
    if (!value) return nullptr;
    Tensor& own = value->toTensor();
    const std::vector<SizesType> asked(sizes.begin(), sizes.end());
    for (const std::int64_t size : sizes) good = good && size >= 0 && size <= std::numeric_limits<SizesType>::max();
    good = good && own.scalar_type() == ScalarType::Float &&
           executorch::runtime::tensor_is_default_dim_order(own) &&
           executorch::runtime::resize_tensor(own, {asked.data(), asked.size()}) == Error::Ok;
    return good ? own.mutable_data_ptr<float>() : nullptr;
  }

 private:
  template <bool (EValue::*Is)() const>
  static bool value_is(const EValue& value) {
    return (value.*Is)();
  }
  EValue* next(bool (*is)(const EValue&)) {
    good = good && at_ < stack_.size() && is(*stack_[at_]);
    return good ? stack_[at_++] : nullptr;
  }
  // Whether it is the same number in 32 bits; which of them mean something, libmoss checks.
  static bool fits(std::int64_t value) { return value == static_cast<std::int32_t>(value); }
  static moss_matrix matrix_of(const Tensor& own) {
    return {own.const_data_ptr(), static_cast<std::int64_t>(own.nbytes()), 0, 0};
  }

  const Span<EValue*> stack_;
  std::size_t at_ = 0;
};

// The matrices of several lists, one after the other.
std::vector<moss_matrix*> all_of(std::initializer_list<moss_matrix*> single,
                                 std::initializer_list<std::vector<moss_matrix>*> lists) {
  std::vector<moss_matrix*> found(single);
  for (std::vector<moss_matrix>* list : lists) {
    for (moss_matrix& own : *list) found.push_back(&own);
  }
  return found;
}

// Whether the arguments are right; fails the call where not.
bool taken(KernelRuntimeContext& context, const Arguments& given, const char* name) {
  if (given.good) return true;
  ET_LOG(Error, "%s: an argument has another type or other sizes than it must", name);
  context.fail(Error::InvalidArgument);
  return false;
}

// Fails the call where libmoss refused it.
void finish(KernelRuntimeContext& context, std::int32_t result, const char* name) {
  if (result == MOSS_OK) return;
  ET_LOG(Error, "%s: %s", name, moss_last_error());
  context.fail(Error::InvalidArgument);
}

void copy(const Tensor& from, float* to) {
  if (from.const_data_ptr() != to && from.nbytes() > 0) std::memcpy(to, from.const_data_ptr(), from.nbytes());
}

void embedding(KernelRuntimeContext& context, Span<EValue*> stack) {
  constexpr const char* kName = "mossquant::embedding";
  Arguments given(stack);
  const Tensor* const tokens = given.tensor(ScalarType::Long, {1, kAny});
  moss_matrix table = given.matrix();
  const std::int64_t V = given.integer(), D = given.integer();
  given.formats({&table});
  if (!taken(context, given, kName)) return;
  const std::int64_t T = tokens->size(1);
  float* const x = given.out({T, D});
  if (!taken(context, given, kName)) return;
  finish(context, moss_embedding(worker(), &table, V, D, tokens->const_data_ptr<std::int64_t>(), T, x), kName);
}

void ssm_moe(KernelRuntimeContext& context, Span<EValue*> stack) {
  constexpr const char* kName = "mossquant::ssm_moe";
  Arguments given(stack);
  const Tensor* const x = given.tensor(ScalarType::Float, {kAny, kAny});
  const Tensor* const window = given.tensor(ScalarType::Float, {1, kAny, kAny});
  const Tensor* const h = given.tensor(ScalarType::Float, {1, kAny, kAny, kLanes});
  if (!taken(context, given, kName)) return;
  const std::int64_t T = x->size(0), D = x->size(1), W = window->size(1) + 1, E = window->size(2);
  const std::int64_t strips = (E + kLanes - 1) / kLanes, N = h->size(2);
  given.good = h->size(1) == strips;
  moss_ssm ssm;
  ssm.in_proj = given.matrix();
  std::vector<moss_matrix> x_proj = given.matrices(), dt_proj = given.matrices();
  ssm.out_proj = given.matrix();
  ssm.experts = static_cast<std::int64_t>(x_proj.size());
  given.good = given.good && dt_proj.size() == x_proj.size();
  ssm.norm = given.floats({D});
  ssm.router = given.floats_or_none({ssm.experts, D});
  ssm.conv = given.floats({W, E});
  ssm.conv_bias = given.floats({E});
  ssm.dt_bias = given.floats({ssm.experts, E});
  ssm.rate = given.floats({strips, N, kLanes});
  ssm.D = given.floats({E});
  const float eps = given.real();
  const std::int64_t R = given.integer();
  ssm.chosen = given.integer();
  given.formats(all_of({&ssm.in_proj, &ssm.out_proj}, {&x_proj, &dt_proj}));
  float* const y = given.out({T, D});
  float* const window_after = given.out({1, W - 1, E});
  float* const h_after = given.out({1, strips, N, kLanes});
  if (!taken(context, given, kName)) return;
  ssm.x_proj = x_proj.data();
  ssm.dt_proj = dt_proj.data();
  copy(*x, y);
  copy(*window, window_after);
  copy(*h, h_after);
  const moss_shape shape = {D, E, N, W, R, 0, eps};
  finish(context, moss_ssm_block(worker(), &shape, &ssm, 1, T, y, window_after, h_after), kName);
}

void mlp_moe(KernelRuntimeContext& context, Span<EValue*> stack) {
  constexpr const char* kName = "mossquant::mlp_moe";
  Arguments given(stack);
  const Tensor* const x = given.tensor(ScalarType::Float, {kAny, kAny});
  if (!taken(context, given, kName)) return;
  const std::int64_t T = x->size(0), D = x->size(1);
  std::vector<moss_matrix> w1 = given.matrices(), w3 = given.matrices(), w2 = given.matrices();
  moss_mlp mlp;
  mlp.experts = static_cast<std::int64_t>(w1.size());
  given.good = given.good && w3.size() == w1.size() && w2.size() == w1.size();
  mlp.norm = given.floats({D});
  mlp.router = given.floats_or_none({mlp.experts, D});
  const float eps = given.real();
  const std::int64_t F = given.integer();
  mlp.chosen = given.integer();
  given.formats(all_of({}, {&w1, &w3, &w2}));
  float* const y = given.out({T, D});
  if (!taken(context, given, kName)) return;
  mlp.w1 = w1.data();
  mlp.w3 = w3.data();
  mlp.w2 = w2.data();
  copy(*x, y);
  const moss_shape shape = {D, 0, 0, 0, 0, F, eps};
  finish(context, moss_mlp_block(worker(), &shape, &mlp, T, y), kName);
}

void head(KernelRuntimeContext& context, Span<EValue*> stack) {
  constexpr const char* kName = "mossquant::head";
  Arguments given(stack);
  const Tensor* const x = given.tensor(ScalarType::Float, {kAny, kAny});
  if (!taken(context, given, kName)) return;
  const std::int64_t T = x->size(0), D = x->size(1);
  moss_matrix matrix = given.matrix();
  const float* const norm = given.floats({D});
  const float eps = given.real();
  const std::int64_t V = given.integer();
  const bool last = given.truth();
  given.formats({&matrix});
  const std::int64_t rows = last ? 1 : T;
  given.good = given.good && T >= rows;
  float* const logits = given.out({1, rows, V});
  if (!taken(context, given, kName)) return;
  const float* const from = x->const_data_ptr<float>() + (T - rows) * D;
  finish(context, moss_head(worker(), &matrix, V, D, norm, eps, rows, from, logits), kName);
}

const executorch::runtime::Kernel kKernels[] = {
    executorch::runtime::Kernel("mossquant::embedding.out", embedding),
    executorch::runtime::Kernel("mossquant::ssm_moe.out", ssm_moe),
    executorch::runtime::Kernel("mossquant::mlp_moe.out", mlp_moe),
    executorch::runtime::Kernel("mossquant::head.out", head),
};
[[maybe_unused]] const Error kRegistered =
    executorch::runtime::register_kernels({kKernels, sizeof(kKernels) / sizeof(kKernels[0])});

}  // namespace
}  // namespace mossquant
