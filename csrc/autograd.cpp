// Derivatives, one autograd function for statistics of the batch at hand and of all ranks. Kernels are called
// through the dispatcher, so that tracing records each of them.
#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "checks.h"
#include "gradient.h"
#include "node.h"
#include "ops.h"
#include "ranks.h"
#include "rows.h"

namespace batchnorm_ext {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The inputs of the backward other than dy. `count`: elements per channel over all ranks; undefined without
// synchronization.
struct Saved {
  Tensor x;
  OptionalTensor weight;
  Tensor stats, count;
  bool training;
  std::optional<at::ScalarType> bias_dtype;
  Domain domain = {};
  std::vector<int64_t> normalized_shape = {};  // not empty: x is taken as rows of so many elements
};

Gradients gradients_by_operators(const Tensor& dy, const Saved& saved, const Ranks& ranks, const Mask& mask) {
  const auto average = [&](const variable_list& values) {
    variable_list averages;
    if (ranks.alone()) {
      for (const Tensor& v : values) averages.push_back(average_of(v, saved.domain.groups));
      return averages;
    }
    for (const Tensor& v : values) averages.push_back(v.sum(reduced_dims(v), /*keepdim=*/false, at::kDouble));
    averages = (SumOverRanks::apply(at::cat(averages), ranks.group) / saved.count).chunk(values.size());
    for (size_t i = 0; i < values.size(); ++i)
      averages[i] = along_channels(averages[i].to(values[i].scalar_type()), values[i]);
    return averages;
  };
  return differentiable_gradients(dy, saved.x, saved.weight, saved.stats, saved.training, saved.bias_dtype, mask,
                                  saved.domain, average);
}

// By the kernels. Over ranks, the gradients of the parameters stay those of this rank, and are made while the message
// is on its way.
Gradients gradients_by_kernels(const Tensor& dy, const Saved& saved, const Ranks& ranks, const Mask& mask) {
  const auto& [x, weight, stats, count, training, bias_dtype, domain, shape] = saved;
  if (ranks.alone()) return call_backward(dy, x, weight, stats, training, mask, bias_dtype, domain);
  const Tensor sums = call_grad_moments(dy, x, stats);
  Tensor pending, dx;
  if (mask[0]) pending = all_reduce(sums, ranks.group);
  auto [dweight, dbias] = empty_parameter_gradients(x, weight, bias_dtype, mask);
  const Tensor local = sums.view({2, -1});
  if (mask[1]) dweight.copy_(local[1]);
  if (mask[2]) dbias.copy_(local[0]);
  if (mask[0]) dx = call_grad_apply(dy, x, weight, stats, wait(pending), count);
  return {std::move(dx), std::move(dweight), std::move(dbias)};
}

Gradients gradients(const Tensor& dy, const Saved& saved, const Ranks& ranks, const Mask& mask) {
  if (!saved.normalized_shape.empty()) {
    const at::IntArrayRef shape = saved.normalized_shape;
    const Saved rows{as_rows(saved.x, shape), as_row(saved.weight), saved.stats, saved.count,
                     saved.training,          saved.bias_dtype,     saved.domain};
    auto [dx, dweight, dbias] = gradients(as_rows(dy, shape), rows, ranks, mask);
    const auto of_parameter = c10::fromIntArrayRefSlow(shape);
    return {from_rows(dx, saved.x.sym_sizes()), from_rows(dweight, of_parameter), from_rows(dbias, of_parameter)};
  }
  if (is_differentiated(dy, saved.x, saved.weight)) return gradients_by_operators(dy, saved, ranks, mask);
  at::AutoDispatchBelowADInplaceOrView guard;
  return gradients_by_kernels(dy, saved, ranks, mask);
}

struct Outputs {
  Tensor y, stats, count;
};

const Ranks kAlone;

// The arguments of a forward.
struct Call {
  const Operands& operands;
  const Spec& spec;
  const Ranks& ranks = kAlone;
  at::IntArrayRef normalized_shape = {};  // see Saved
};

Outputs forward(const Call& call) {
  const auto& [o, s, ranks, shape] = call;
  at::AutoDispatchBelowADInplaceOrView guard;
  Outputs outputs;
  if (!shape.empty()) {
    const Tensor rows = as_rows(o.x, shape);
    const OptionalTensor weight = as_row(o.weight), bias = as_row(o.bias);
    outputs = forward({{rows, weight, bias, kNone, kNone, kNone, kNone}, s});
    outputs.y = from_rows(outputs.y, o.x.sym_sizes());
    // PyTorch's rms_norm keeps channels_last, its layer_norm does not
    if (!s.domain.centred) outputs.y = outputs.y.contiguous(o.x.suggest_memory_format());
    return outputs;
  }
  if (ranks.alone()) {
    std::tie(outputs.y, outputs.stats) = call_forward(o, s);
    return outputs;
  }
  // All checks run before the all-reduce: an error here must not leave other ranks updated.
  check_operands(o, s);
  check_memory(o, s);
  const OptionalTensor sums = wait(all_reduce(call_moments(o.x), ranks.group));
  std::tie(outputs.y, outputs.stats) =
      call_forward({o.x, o.weight, o.bias, o.running_mean, o.running_var, o.num_batches_tracked, sums}, s);
  outputs.count = sums->slice(0, -1);
  return outputs;
}

// What a backward needs beside tensors, as one list of numbers: autograd would look up a name for each of several
// values.
struct Kept {
  bool training;
  std::optional<at::ScalarType> weight_dtype, bias_dtype;
  Domain domain;
  std::vector<int64_t> normalized_shape;

  explicit Kept(const Call& call)
      : training(call.spec.training),
        weight_dtype(dtype_of(call.operands.weight)),
        bias_dtype(dtype_of(call.operands.bias)),
        domain(call.spec.domain),
        normalized_shape(call.normalized_shape.vec()) {}

  explicit Kept(const std::vector<int64_t>& list)
      : training(list[0] != 0),
        weight_dtype(from_number(list[1])),
        bias_dtype(from_number(list[2])),
        domain{list[3], list[4] != 0, list[5]},
        normalized_shape(list.begin() + 6, list.end()) {}

  std::vector<int64_t> list() const {
    std::vector<int64_t> list = {training,      to_number(weight_dtype), to_number(bias_dtype),
                                 domain.groups, domain.centred,          domain.parameter_dim};
    list.insert(list.end(), normalized_shape.begin(), normalized_shape.end());
    return list;
  }

 private:
  using Dtype = std::optional<at::ScalarType>;

  static Dtype dtype_of(const OptionalTensor& tensor) { return tensor ? Dtype(tensor->scalar_type()) : std::nullopt; }
  static int64_t to_number(const Dtype& dtype) { return dtype ? static_cast<int64_t>(*dtype) : -1; }
  static Dtype from_number(int64_t n) { return n < 0 ? std::nullopt : Dtype(static_cast<at::ScalarType>(n)); }
};

// Whose gradients the node below computes: of x, weight and bias.
struct Norm {
  static constexpr bool is_traceable = true;
  static constexpr const char* name = "batchnorm_ext::Norm";

  static void save(AutogradContext& ctx, const Call& call, const Outputs& outputs) {
    const auto& [o, spec, ranks, shape] = call;
    variable_list tensors = {o.x, o.weight.value_or(Tensor()), outputs.stats};
    if (outputs.count.defined()) tensors.push_back(outputs.count);
    ctx.save_for_backward(std::move(tensors));
    ctx.saved_data["kept"] = Kept(call).list();
    ctx.set_materialize_grads(!ranks.alone());  // the other ranks count on this one's message
    if (ranks.alone()) return;
    ctx.saved_data["group"] = ranks.group;
    ctx.saved_data["layer"] = ranks.layer;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(3);
    const Tensor& dy = grads[0];
    if (!dy.defined()) return result;
    const Ranks ranks = ranks_of(ctx);
    const auto run = [&] {
      return gradients(dy, unpack(ctx, dy), ranks,
                       {ctx->needs_input_grad(0), ctx->needs_input_grad(1), ctx->needs_input_grad(2)});
    };
    std::tie(result[0], result[1], result[2]) = ranks.alone() ? run() : ranks.named("backward", dy, run);
    return result;
  }

 private:
  static Ranks ranks_of(AutogradContext* ctx) {
    if (ctx->saved_data.size() == 1) return {};
    return {ctx->saved_data["group"].toStringRef(), ctx->saved_data["layer"].toStringRef()};
  }

  // Hooks on saved tensors may have left them in another precision, as compression does.
  static Saved unpack(AutogradContext* ctx, const Tensor& dy) {
    const auto in = [](const Tensor& tensor, at::ScalarType to) {
      return !tensor.defined() || tensor.scalar_type() == to ? tensor : tensor.to(to);
    };
    const variable_list saved = ctx->get_saved_variables();
    Kept kept(ctx->saved_data["kept"].toIntVector());
    return {in(saved[0], dy.scalar_type()),
            optional(in(saved[1], kept.weight_dtype.value_or(at::kFloat))),
            in(saved[2], at::kDouble),
            saved.size() > 3 ? in(saved[3], at::kDouble) : Tensor(),
            kept.training,
            kept.bias_dtype,
            kept.domain,
            std::move(kept.normalized_shape)};
  }
};

// What autograd refuses to save, before anything is written.
void check_saved(const Operands& o) {
  refusing([&] {
    TORCH_CHECK_NOT_IMPLEMENTED(!o.x.is_inference() && !(o.weight && o.weight->is_inference()),
                                "Inference tensors cannot be saved for backward");
  });
}

Normalized differentiable(const Call& call) {
  const Operands& o = call.operands;
  if (!is_differentiated(o.x, o.weight, o.bias)) {
    auto [y, stats, count] = forward(call);
    return {std::move(y), std::move(stats)};
  }
  check_saved(o);
  Tensor stats;  // beside the graph: they have no derivative
  const auto run = [&](AutogradContext& ctx) {
    Outputs outputs = forward(call);
    Norm::save(ctx, call, outputs);
    stats = std::move(outputs.stats);
    return std::move(outputs.y);
  };
  Tensor y = recorded<Norm>(run, o.x, o.weight, o.bias);
  return {std::move(y), std::move(stats)};
}

// The version of the counter is raised, as by the in-place addition of torch.nn. A tensor of inference mode has none:
// outside of that mode this raises, before anything is written.
Normalized normalize(const Operands& o, const Spec& s, const Ranks& ranks) {
  if (!s.update || !o.num_batches_tracked) return differentiable({o, s, ranks});
  at::TensorImpl* const counter = o.num_batches_tracked->unsafeGetTensorImpl();
  if (counter->is_inference()) counter->bump_version();
  Normalized result = differentiable({o, s, ranks});
  if (!counter->is_inference()) counter->bump_version();
  return result;
}

Normalized normalize_alone(const Operands& o, const Spec& s) { return normalize(o, s, {}); }

Gradients backward_alone(const Tensor& dy, const Tensor& x, const OptionalTensor& weight, const Tensor& stats,
                         bool training, const Mask& mask, std::optional<at::ScalarType> bias_dtype,
                         const Domain& domain) {
  return gradients(dy, {x, weight, stats, Tensor(), training, bias_dtype, domain}, {}, mask);
}

Normalized sync_batch_norm(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                           const OptionalTensor& running_mean, const OptionalTensor& running_var,
                           const OptionalTensor& num_batches_tracked, std::optional<double> momentum, double eps,
                           std::string group, std::string layer) {
  const Ranks ranks{std::move(group), std::move(layer)};
  return ranks.named("forward", x, [&] {
    const bool update = running_mean && running_var;
    return normalize({x, weight, bias, running_mean, running_var, num_batches_tracked, kNone},
                     {true, eps, update, momentum}, ranks);
  });
}

Normalized layer_norm(const Tensor& x, at::IntArrayRef normalized_shape, const OptionalTensor& weight,
                      const OptionalTensor& bias, bool centred, double eps) {
  check_rows(x, normalized_shape, weight, bias);
  return differentiable({{x, weight, bias, kNone, kNone, kNone, kNone},
                         {true, eps, false, std::nullopt, {1, centred}},
                         kAlone,
                         normalized_shape});
}

}  // namespace

TORCH_LIBRARY_IMPL(batchnorm_ext, Autograd, m) {
  register_forward<normalize_alone>(m);
  register_backward<backward_alone>(m);
}

TORCH_LIBRARY_IMPL(batchnorm_ext, CompositeImplicitAutograd, m) {
  m.impl("sync_batch_norm", sync_batch_norm);
  m.impl("layer_norm", layer_norm);
}

}  // namespace batchnorm_ext
