// Batch normalization over the ranks of a process group: the halves of training with a sum over ranks between them.
// Composed of operators, collectives included, that the dispatcher knows, so that tracing sees them one by one.
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/cat.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include "checks.h"
#include "double_backward.h"
#include "functions.h"

namespace batchnorm_ext {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

auto find(const char* name) { return c10::Dispatcher::singleton().findSchemaOrThrow(name, ""); }

// Starts the sum over ranks; wait() gives it. Boxed, since PyTorch's versions differ in the type of the group's name.
Tensor all_reduce(const Tensor& local, const std::string& group) {
  static const auto op = find("_c10d_functional::all_reduce");
  torch::jit::Stack stack = {local, std::string("sum"), group};
  op.callBoxed(stack);
  return std::move(stack[0]).toTensor();
}

Tensor wait(const Tensor& pending) {
  static const auto op = find("_c10d_functional::wait_tensor").typed<Tensor(const Tensor&)>();
  return op.call(pending);
}

// The sum over ranks, whose gradient is that sum again: what one rank puts in comes out on every other.
struct SumOverRanks : torch::autograd::Function<SumOverRanks> {
  static Tensor forward(AutogradContext* ctx, const Tensor& local, const std::string& group) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->saved_data["group"] = group;
    return wait(all_reduce(local, group));
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    return {SumOverRanks::apply(grads[0], ctx->saved_data["group"].toStringRef()), Tensor()};
  }
};

struct Normalized {
  Tensor y, stats, count;
};

Normalized normalize(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                     const OptionalTensor& running_mean, const OptionalTensor& running_var,
                     const OptionalTensor& num_batches_tracked, std::optional<double> momentum, double eps,
                     const std::string& group) {
  static const auto moments = find("batchnorm_ext::moments").typed<Tensor(const Tensor&)>();
  static const auto apply =
      find("batchnorm_ext::apply")
          .typed<std::tuple<Tensor, Tensor>(const Tensor&, const OptionalTensor&, const OptionalTensor&,
                                            const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                                            const Tensor&, std::optional<double>, double)>();
  // Before the other ranks are told anything. Sizes that are symbols are checked when they are known.
  if (!x.unsafeGetTensorImpl()->has_symbolic_sizes_strides())
    check_parameters(x, weight, bias, running_mean, running_var, num_batches_tracked, /*training=*/true, momentum, eps);
  const Tensor sums = wait(all_reduce(moments.call(x), group));
  auto [y, stats] = apply.call(x, weight, bias, running_mean, running_var, num_batches_tracked, sums, momentum, eps);
  return {std::move(y), std::move(stats), sums.slice(0, -1)};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor>;

Gradients gradients(const Tensor& dy, const Tensor& x, const OptionalTensor& weight, const Tensor& stats,
                    const Tensor& count, const std::string& group, std::array<bool, 3> output_mask) {
  static const auto grad_moments =
      find("batchnorm_ext::grad_moments").typed<Tensor(const Tensor&, const Tensor&, const Tensor&)>();
  static const auto grad_apply = find("batchnorm_ext::grad_apply")
                                     .typed<Tensor(const Tensor&, const Tensor&, const OptionalTensor&, const Tensor&,
                                                   const Tensor&, const Tensor&)>();
  const auto [want_dx, want_dweight, want_dbias] = output_mask;
  const Tensor sums = grad_moments.call(dy, x, stats);
  Tensor pending, dx, dweight, dbias;
  if (want_dx) pending = all_reduce(sums, group);
  // The gradients of the parameters stay those of this rank, and are made while the message is on its way.
  const Tensor local = sums.view({2, -1});
  if (want_dbias) dbias = local[0].to(weight ? weight->scalar_type() : stats.scalar_type());
  if (want_dweight) dweight = local[1].to(weight->scalar_type()).view_as(*weight);
  if (want_dx) dx = grad_apply.call(dy, x, weight, stats, wait(pending), count);
  return {std::move(dx), std::move(dweight), std::move(dbias)};
}

struct SyncBatchNormBackward : torch::autograd::Function<SyncBatchNormBackward> {
  static variable_list forward(AutogradContext* ctx, const Tensor& dy, const Tensor& x, const OptionalTensor& weight,
                               const Tensor& stats, const Tensor& count, const std::string& group,
                               std::array<bool, 3> output_mask) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({dy, x, weight.value_or(Tensor()), stats, count});
    ctx->saved_data["group"] = group;
    ctx->saved_data["output_mask"] = output_mask;
    return defined(gradients(dy, x, weight, stats, count, group, output_mask));
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& wanted) {
    const variable_list saved = ctx->get_saved_variables();
    const std::string& group = ctx->saved_data["group"].toStringRef();
    const auto average = [&](const variable_list& values) {
      variable_list sums;
      for (const Tensor& v : values) sums.push_back(v.sum(reduced_dims(v), /*keepdim=*/false, at::kDouble));
      variable_list averages =
          (SumOverRanks::apply(at::cat(sums), group) / saved[4]).chunk(static_cast<int64_t>(values.size()));
      for (size_t i = 0; i < values.size(); ++i)
        averages[i] = along_channels(averages[i].to(values[i].scalar_type()), values[i]);
      return averages;
    };
    variable_list result = double_backward(spread(wanted, ctx->saved_data["output_mask"].toBoolList()), saved[0],
                                           saved[1], saved[2], saved[3], /*training=*/true, average);
    result.resize(7);
    return result;
  }
};

struct SyncBatchNorm : torch::autograd::Function<SyncBatchNorm> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                        const OptionalTensor& running_mean, const OptionalTensor& running_var,
                        const OptionalTensor& num_batches_tracked, std::optional<double> momentum, double eps,
                        const std::string& group) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [y, stats, count] =
        normalize(x, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps, group);
    ctx->save_for_backward({x, weight.value_or(Tensor()), stats, count});
    ctx->saved_data["has_bias"] = bias.has_value();
    ctx->saved_data["group"] = group;
    return y;
  }

  // An undefined dy arrives as zeros: the other ranks count on this one's message.
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &dy = grads[0], &x = saved[0], &stats = saved[2], &count = saved[3];
    const OptionalTensor weight = optional(saved[1]);
    const std::string& group = ctx->saved_data["group"].toStringRef();
    const auto output_mask = wanted_gradients(ctx, weight.has_value(), ctx->saved_data["has_bias"].toBool());
    variable_list result;
    if (at::GradMode::is_enabled() && (requires_grad(dy) || requires_grad(x) || requires_grad(weight))) {
      result = spread(SyncBatchNormBackward::apply(dy, x, weight, stats, count, group, output_mask), output_mask);
    } else {
      at::AutoDispatchBelowADInplaceOrView guard;
      auto [dx, dweight, dbias] = gradients(dy, x, weight, stats, count, group, output_mask);
      result = {std::move(dx), std::move(dweight), std::move(dbias)};
    }
    result.resize(9);
    return result;
  }
};

Tensor sync_batch_norm(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                       const OptionalTensor& running_mean, const OptionalTensor& running_var,
                       const OptionalTensor& num_batches_tracked, std::optional<double> momentum, double eps,
                       std::string group) {
  if (at::GradMode::is_enabled() && (requires_grad(x) || requires_grad(weight) || requires_grad(bias)))
    return SyncBatchNorm::apply(x, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps, group);
  at::AutoDispatchBelowADInplaceOrView guard;
  return normalize(x, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps, group).y;
}

}  // namespace

TORCH_LIBRARY_IMPL(batchnorm_ext, CompositeImplicitAutograd, m) { m.impl("sync_batch_norm", sync_batch_norm); }

}  // namespace batchnorm_ext
