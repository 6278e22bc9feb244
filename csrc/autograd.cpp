// Derivatives, one autograd function for statistics of the batch at hand and of all ranks. Kernels are called
// through the dispatcher, so that tracing records each of them.
#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "activation_table.h"
#include "checks.h"
#include "gradient.h"
#include "node.h"
#include "ops.h"
#include "ranks.h"
#include "rows.h"
#include "saved.h"

namespace batchnorm_ext {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

ActivatedGradients gradients_by_operators(const Tensor& dy, const Saved& saved, const Ranks& ranks, const Mask& mask) {
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
  return differentiable_gradients(saved.operands(dy), saved.spec(mask), average);
}

// By the kernels. Over ranks, the gradients of the parameters stay those of this rank, and are made while the message
// is on its way.
ActivatedGradients gradients_by_kernels(const Tensor& dy, const Saved& saved, const Ranks& ranks, const Mask& mask) {
  if (ranks.alone()) return call_backward(saved.operands(dy), saved.spec(mask));
  const GradOperands operands = saved.operands(dy);
  const GradSpec spec = saved.spec(mask);
  const Tensor sums = call_grad_moments(operands, spec, saved.count);
  Tensor pending, dx, dresidual;
  if (mask[0]) pending = all_reduce(sums, ranks.group);
  auto [dweight, dbias] = empty_parameter_gradients(saved.x, saved.weight, saved.bias_dtype, mask);
  const Tensor local = sums.view({2, -1});
  if (mask[1]) dweight.copy_(local[1]);
  if (mask[2]) dbias.copy_(local[0]);
  if (mask[0])
    std::tie(dx, dresidual) = call_grad_apply(operands, spec, wait(pending), saved.count);
  else if (saved.residual)  // it takes no part in the statistics
    dresidual = std::get<1>(call_grad_apply(operands, spec, sums, saved.count));
  return {std::move(dx), std::move(dweight), std::move(dbias), std::move(dresidual)};
}

ActivatedGradients gradients(const Tensor& dy, const Saved& saved, const Ranks& ranks, const Mask& mask) {
  if (!saved.normalized_shape.empty()) {
    const at::IntArrayRef shape = saved.normalized_shape;
    const Saved rows{as_rows(saved.x, shape), as_row(saved.weight), kNone,       kNone, saved.stats, saved.count,
                     saved.training,          saved.bias_dtype,     saved.domain};
    auto [dx, dweight, dbias, none] = gradients(as_rows(dy, shape), rows, ranks, mask);
    const auto of_parameter = c10::fromIntArrayRefSlow(shape);
    return {from_rows(dx, saved.x.sym_sizes()), from_rows(dweight, of_parameter), from_rows(dbias, of_parameter),
            Tensor()};
  }
  if (is_differentiated(dy, saved.x, saved.weight, saved.bias, saved.residual))
    return gradients_by_operators(dy, saved, ranks, mask);
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
    outputs = forward({{rows, weight, bias, kNone, kNone, kNone, kNone, kNone}, s});
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
      call_forward({o.x, o.weight, o.bias, o.running_mean, o.running_var, o.num_batches_tracked, sums, o.residual}, s);
  outputs.count = sums->slice(0, -1);
  return outputs;
}

// The node of a norm: what it saves, and the gradients of x, weight, bias and a residual.
struct Norm {
  static constexpr bool is_traceable = true;
  static constexpr const char* name = "batchnorm_ext::Norm";

  static void save(AutogradContext& ctx, const Call& call, const Outputs& outputs) {
    const auto& [o, spec, ranks, shape] = call;
    variable_list tensors = {o.x, o.weight.value_or(Tensor()), outputs.stats};
    if (outputs.count.defined() || !spec.activation.empty()) tensors.push_back(outputs.count);
    if (!spec.activation.empty()) {
      tensors.push_back(o.bias.value_or(Tensor()));
      // the output of a piecewise linear activation tells its slope as well, and the network keeps it anyway
      if (o.residual)
        tensors.push_back(activation_named(spec.activation).make().curve == Curve::kPiecewise ? outputs.y
                                                                                              : *o.residual);
      ctx.saved_data["activation"] = std::string(spec.activation);
    }
    if (o.residual) ctx.saved_data["residual"] = true;
    ctx.save_for_backward(std::move(tensors));
    ctx.saved_data["kept"] = Kept(o, spec, shape).list();
    ctx.set_materialize_grads(!ranks.alone());  // the other ranks count on this one's message
    if (ranks.alone()) return;
    ctx.saved_data["group"] = ranks.group;
    ctx.saved_data["layer"] = ranks.layer;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const size_t inputs = keeps(ctx, "residual") ? 4 : 3;
    variable_list result(inputs);
    const Tensor& dy = grads[0];
    if (!dy.defined()) return result;
    const Ranks ranks = ranks_of(ctx);
    const auto run = [&] {
      return gradients(dy, unpack(ctx, dy), ranks,
                       {ctx->needs_input_grad(0), ctx->needs_input_grad(1), ctx->needs_input_grad(2)});
    };
    Tensor dresidual;
    std::tie(result[0], result[1], result[2], dresidual) = ranks.alone() ? run() : ranks.named("backward", dy, run);
    if (inputs > 3 && ctx->needs_input_grad(3)) result[3] = dresidual.defined() ? dresidual : dy;
    return result;
  }

 private:
  // A plain norm keeps nothing by these names, and is not to spend time on looking for them.
  static bool keeps(AutogradContext* ctx, const char* name) {
    return ctx->saved_data.size() > 1 && ctx->saved_data.count(name) > 0;
  }

  static Ranks ranks_of(AutogradContext* ctx) {
    if (!keeps(ctx, "group")) return {};
    return {ctx->saved_data["group"].toStringRef(), ctx->saved_data["layer"].toStringRef()};
  }

  // Hooks on saved tensors may have left them in another precision, as compression does.
  static Saved unpack(AutogradContext* ctx, const Tensor& dy) {
    const auto in = [](const Tensor& tensor, at::ScalarType to) {
      return !tensor.defined() || tensor.scalar_type() == to ? tensor : tensor.to(to);
    };
    const variable_list saved = ctx->get_saved_variables();
    const auto more = [&](size_t i, at::ScalarType to) { return i < saved.size() ? in(saved[i], to) : Tensor(); };
    Kept kept(ctx->saved_data["kept"].toIntVector());
    return {in(saved[0], dy.scalar_type()),
            optional(in(saved[1], kept.weight_dtype.value_or(at::kFloat))),
            optional(more(4, kept.bias_dtype.value_or(at::kFloat))),
            optional(more(5, dy.scalar_type())),
            in(saved[2], at::kDouble),
            more(3, at::kDouble),
            kept.training,
            kept.bias_dtype,
            kept.domain,
            keeps(ctx, "activation") ? ctx->saved_data["activation"].toStringRef() : std::string(),
            std::move(kept.normalized_shape)};
  }
};

bool may_have_recipe(const Call& call) { return call.ranks.alone() && call.normalized_shape.empty(); }

// What autograd refuses to save, before anything is written. A recipe has the bias too.
void check_saved(const Call& call) {
  const Operands& o = call.operands;
  const bool saves_bias = !call.spec.activation.empty() || (may_have_recipe(call) && is_recomputing());
  const OptionalTensor& bias = saves_bias ? o.bias : kNone;
  refusing([&] {
    for (const OptionalTensor& saved : {OptionalTensor(o.x), o.weight, bias, o.residual})
      TORCH_CHECK_NOT_IMPLEMENTED(!saved || !saved->is_inference(), "Inference tensors cannot be saved for backward");
  });
}

Normalized differentiable(const Call& call) {
  const Operands& o = call.operands;
  if (!is_differentiated(o.x, o.weight, o.bias, o.residual)) {
    auto [y, stats, count] = forward(call);
    return {std::move(y), std::move(stats)};
  }
  check_saved(call);
  Tensor stats;  // beside the graph: they have no derivative
  const auto run = [&](auto& node) {
    Outputs outputs = forward(call);
    if (may_have_recipe(call)) node.recipe = recipe_for(o, outputs.stats, call.spec);
    Norm::save(node.ctx_, call, outputs);
    stats = std::move(outputs.stats);
    return std::move(outputs.y);
  };
  Tensor y =
      o.residual ? recorded<Norm>(run, o.x, o.weight, o.bias, *o.residual) : recorded<Norm>(run, o.x, o.weight, o.bias);
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

ActivatedGradients backward_alone(const GradOperands& o, const GradSpec& s) {
  check_backward(o, s);
  const Saved saved{o.x,      o.weight,   o.bias,       o.residual, o.stats,
                    Tensor(), s.training, s.bias_dtype, s.domain,   std::string(s.activation)};
  return gradients(o.dy, saved, {}, s.mask);
}

Normalized sync_batch_norm(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                           const OptionalTensor& running_mean, const OptionalTensor& running_var,
                           const OptionalTensor& num_batches_tracked, std::optional<double> momentum, double eps,
                           std::string group, std::string layer, const OptionalTensor& residual,
                           std::string_view activation) {
  const Ranks ranks{std::move(group), std::move(layer)};
  return ranks.named("forward", x, [&] {
    const bool update = running_mean && running_var;
    return normalize({x, weight, bias, running_mean, running_var, num_batches_tracked, kNone, residual},
                     {true, eps, update, momentum, {}, activation}, ranks);
  });
}

Normalized layer_norm(const Tensor& x, at::IntArrayRef normalized_shape, const OptionalTensor& weight,
                      const OptionalTensor& bias, bool centred, double eps) {
  check_rows(x, normalized_shape, weight, bias);
  return differentiable({{x, weight, bias, kNone, kNone, kNone, kNone, kNone},
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
