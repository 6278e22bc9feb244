// Argument checks, shared by the kernels of every device and by the fake ones, whose sizes may be symbols. They run
// before anything is written, so that an exception leaves all state as it was.
//
// Arguments that the kernels do not support raise a NotImplementedError that ends in kRefusal. The layers then call
// PyTorch's function, which either supports them or raises the error that users know. If PyTorch has such an error, our
// message starts with its text.
#pragma once

#include <ATen/MemoryOverlap.h>
#include <ATen/core/Tensor.h>
#include <c10/core/SymBool.h>

#include <sstream>
#include <string>
#include <string_view>
#include <utility>

#include "activation_table.h"
#include "dtype.h"
#include "ops.h"

namespace batchnorm_ext {

// Tells a refusal from other NotImplementedErrors, such as one that a user's hook raises after the kernels have
// written.
inline constexpr const char* kRefusal = "refused by batchnorm_ext";

// Runs checks whose NotImplementedErrors are refusals.
template <typename Check>
void refusing(const Check& check) {
  try {
    check();
  } catch (c10::NotImplementedError& error) {
    error.add_context(kRefusal);
    throw;
  }
}

// A condition on sizes, which may be symbols.
inline bool holds(const c10::SymBool& condition) { return condition.expect_true(__FILE__, __LINE__); }

inline void check_input(const at::Tensor& x) {
  TORCH_CHECK_NOT_IMPLEMENTED(x.dim() >= 2,
                              "batch_norm: expected input to have at least 2 dimensions, (N, C, ...), got ", x.dim());
  TORCH_CHECK_NOT_IMPLEMENTED(with_dtype(x.scalar_type(), [](auto) {}), "\"batch_norm\" not implemented for '",
                              toString(x.scalar_type()),
                              "': expected input to be of dtype float32, float64, bfloat16 or float16");
}

// A tensor with one value for each index of a dimension, usually the channel.
inline void check_per_channel(const at::Tensor& x, const OptionalTensor& tensor, const char* name, int64_t dim = 1) {
  if (!tensor) return;
  TORCH_CHECK_NOT_IMPLEMENTED(tensor->device() == x.device(), "Tensor on device ", tensor->device(),
                              " is not on the expected device ", x.device(), "! This is ", name);
  TORCH_CHECK_NOT_IMPLEMENTED(holds(tensor->sym_numel().sym_eq(x.sym_size(dim))), name, " should contain ",
                              x.sym_size(dim), " elements not ", tensor->sym_numel());
  TORCH_CHECK_NOT_IMPLEMENTED(tensor->dim() == 1, "batch_norm: expected ", name, " to be 1-dimensional, got size ",
                              tensor->sym_sizes());
  TORCH_CHECK_NOT_IMPLEMENTED(tensor->scalar_type() == at::kFloat || tensor->scalar_type() == x.scalar_type(),
                              "batch_norm: expected ", name, " to be of dtype float32 or of the dtype of input, ",
                              x.scalar_type(), ", got ", tensor->scalar_type());
}

inline void check_counter(const at::Tensor& x, const at::Tensor& counter) {
  TORCH_CHECK_NOT_IMPLEMENTED(counter.scalar_type() == at::kLong && counter.device() == x.device(),
                              "batch_norm: expected num_batches_tracked to be one int64 on ", x.device(), ", got ",
                              counter.scalar_type(), " on ", counter.device());
  TORCH_CHECK_NOT_IMPLEMENTED(holds(counter.sym_numel().sym_eq(1)),
                              "batch_norm: expected num_batches_tracked to be one int64, got ", counter.sym_numel());
}

inline void check_domain(const at::Tensor& x, const Spec& s) {
  const auto& [groups, centred, parameter_dim] = s.domain;
  TORCH_CHECK_NOT_IMPLEMENTED(groups >= 0 && (groups == 0 || s.training),
                              "batch_norm: expected groups to be 0, or positive in training, got ", groups);
  TORCH_CHECK_NOT_IMPLEMENTED(centred || (s.training && !s.update),
                              "batch_norm: expected training without running statistics where centred is False");
  TORCH_CHECK_NOT_IMPLEMENTED(
      parameter_dim == 1 || (parameter_dim == 2 && x.dim() == 3 && !s.update && holds(x.sym_size(1).sym_eq(groups))),
      "batch_norm: expected parameter_dim to be 1, or 2 for three dimensions and as many groups "
      "as channels, got ",
      parameter_dim);
  if (groups == 0) return;
  TORCH_CHECK_NOT_IMPLEMENTED(holds((x.sym_size(1) % groups).sym_eq(0)),
                              "Expected number of channels in input to be divisible by num_groups, but got input of "
                              "shape ",
                              x.sym_sizes(), " and num_groups=", groups);
  // which sizes of an empty input are refused depends on the version of PyTorch
  TORCH_CHECK_NOT_IMPLEMENTED(holds(x.sym_numel().sym_ne(s.domain.stats(x)).sym_and(x.sym_numel().sym_ne(0))),
                              "batch_norm: expected more than 1 element per statistic, got input of shape ",
                              x.sym_sizes(), " and ", groups, " groups");
}

// Whether each element of a statistic has a weight of its own, as in group normalization of (N, C).
inline bool has_one_per_cell(const at::Tensor& x, const Domain& domain) {
  return domain.groups > 0 && holds(x.sym_numel().sym_eq(x.sym_size(0) * x.sym_size(1)));
}

// What may follow a norm. Raises ValueError for an unknown activation.
inline void check_activation(const at::Tensor& x, const Domain& domain, std::string_view name, bool has_residual) {
  if (name.empty() && !has_residual) return;
  const Activation activation = activation_named(name).make();
  TORCH_CHECK_NOT_IMPLEMENTED(
      domain.parameter_dim == 1 && domain.centred && !has_one_per_cell(x, domain),
      "batch_norm: expected neither residual nor activation with centred=False, or where each element of a "
      "statistic has a weight of its own");
  // there are half as many CUDA kernels again for them: none for the rare float64
  TORCH_CHECK_NOT_IMPLEMENTED(!x.is_cuda() || x.scalar_type() != at::kDouble,
                              "batch_norm: expected neither residual nor activation for float64 on CUDA");
  // backward reads the output, which a negative slope makes positive on both sides of zero
  TORCH_CHECK_NOT_IMPLEMENTED(!(has_residual && activation.curve == Curve::kPiecewise && activation.slope < 0),
                              "batch_norm: expected no residual before an activation of negative slope");
}

// What is added to the normalized x before the activation.
inline void check_residual(const at::Tensor& x, const OptionalTensor& residual) {
  TORCH_CHECK(!residual || (residual->scalar_type() == x.scalar_type() && residual->device() == x.device() &&
                            holds(c10::sym_equals(residual->sym_sizes(), x.sym_sizes()))),
              "batch_norm: expected residual like input, ", x.scalar_type(), x.sym_sizes(), " on ", x.device(),
              ", got ", residual->scalar_type(), residual->sym_sizes(), " on ", residual->device());
}

// What every forward takes but for the number of elements.
inline void check_operands(const Operands& o, const Spec& s) {
  const std::pair<const char*, const OptionalTensor&> statistics[] = {{"running_mean", o.running_mean},
                                                                      {"running_var", o.running_var}};
  refusing([&] {
    check_input(o.x);
    for (const auto& [name, statistic] : statistics) check_per_channel(o.x, statistic, name);
    const int64_t dim = s.domain.parameter_dim == 2 && o.x.dim() > 2 ? 2 : 1;
    check_per_channel(o.x, o.weight, "weight", dim);
    check_per_channel(o.x, o.bias, "bias", dim);
    for (const auto& [name, statistic] : statistics) {
      TORCH_CHECK_NOT_IMPLEMENTED(s.training || statistic, name, " must be defined in evaluation mode");
      TORCH_CHECK_NOT_IMPLEMENTED(!statistic || !statistic->requires_grad(),
                                  "The function 'batch_norm' is not differentiable with respect to argument '", name,
                                  "'. This input cannot have requires_grad True.");
    }
    TORCH_CHECK_NOT_IMPLEMENTED(s.eps > 0 || (!s.training && s.eps == 0) || s.domain.groups > 0 || !s.domain.centred,
                                "batch_norm eps must be ", s.training ? "positive during training" : "non-negative",
                                ", but got ", s.eps);
    TORCH_CHECK_NOT_IMPLEMENTED(
        !s.update || s.momentum || o.num_batches_tracked,
        "batch_norm: expected num_batches_tracked with momentum=None, the cumulative average, got None");
    if (s.update && o.num_batches_tracked) check_counter(o.x, *o.num_batches_tracked);
    check_domain(o.x, s);
    check_activation(o.x, s.domain, s.activation, o.residual.has_value());
  });
  check_residual(o.x, o.residual);
}

// Rows of the last dimensions, with parameters of their size.
inline void check_rows(const at::Tensor& x, at::IntArrayRef shape, const OptionalTensor& weight,
                       const OptionalTensor& bias) {
  const auto ends_in = [&](const at::Tensor& tensor) {
    const int64_t before = tensor.dim() - static_cast<int64_t>(shape.size());
    if (shape.empty() || before < 0) return false;
    for (size_t d = 0; d < shape.size(); ++d)
      if (!holds(tensor.sym_size(before + static_cast<int64_t>(d)).sym_eq(shape[d]))) return false;
    return true;
  };
  refusing([&] {
    TORCH_CHECK_NOT_IMPLEMENTED(ends_in(x), "layer_norm: expected input to end in the sizes ", shape, ", got ",
                                x.sym_sizes());
    for (const auto& [name, parameter] : {std::pair{"weight", &weight}, std::pair{"bias", &bias}})
      TORCH_CHECK_NOT_IMPLEMENTED(
          !*parameter || ((*parameter)->dim() == static_cast<int64_t>(shape.size()) && ends_in(**parameter)),
          "layer_norm: expected ", name, " to be of size ", shape, ", got ", (*parameter)->sym_sizes());
  });
}

// As Python writes it, without the brackets.
inline std::string comma_separated_size(const at::Tensor& x) {
  std::ostringstream size;
  for (int64_t d = 0; d < x.dim(); ++d) size << (d > 0 ? ", " : "") << x.sym_size(d);
  return size.str();
}

// In training a channel has either no element or more than one.
inline void check_batch_size(const at::Tensor& x) {
  const c10::SymBool enough = x.sym_numel().sym_ne(x.sym_size(1)).sym_or(x.sym_numel().sym_eq(0));
  TORCH_CHECK_VALUE(holds(enough), "Expected more than 1 value per channel when training, got input size torch.Size([",
                    comma_separated_size(x), "])");
}

inline void check_forward(const Operands& o, const Spec& s) {
  check_operands(o, s);
  if (s.training && s.domain.groups == 0 && s.domain.centred) check_batch_size(o.x);
}

// Running statistics must not overlap: one value would overwrite the other.
inline void check_written_once(const Operands& o) {
  at::assert_no_internal_overlap(*o.running_mean);
  at::assert_no_internal_overlap(*o.running_var);
  at::assert_no_overlap(*o.running_mean, *o.running_var);
}

// For kernels whose threads write the running statistics while others still read the rest.
inline void check_reads_not_written(const Operands& o) {
  const auto check = [&](const at::Tensor& read, const char* name) {
    for (const auto* written : {&*o.running_mean, &*o.running_var})
      // of tensors that are not dense, at::get_overlap_status alone does not say that they lie apart
      TORCH_CHECK_NOT_IMPLEMENTED(
          !written->is_alias_of(read) || at::get_overlap_status(*written, read) == at::MemOverlapStatus::No,
          "batch_norm: expected ", name, " to share no memory with the running statistics");
  };
  refusing([&] {
    check(o.x, "input");
    if (o.weight) check(*o.weight, "weight");
    if (o.bias) check(*o.bias, "bias");
  });
}

// Whether kernels run for it: fake tensors lie nowhere.
inline bool is_real(const at::Tensor& x) {
  return (x.is_cpu() || x.is_cuda()) && !x.unsafeGetTensorImpl()->is_python_dispatch();
}

// Where the tensors lie, as far as anything is written.
inline void check_memory(const Operands& o, const Spec& s) {
  if (!s.update || !is_real(o.x)) return;
  check_written_once(o);
  if (o.x.is_cuda()) check_reads_not_written(o);
}

// Sums over ranks must be `numel` contiguous float64 values.
inline void check_sums(const at::Tensor& x, const at::Tensor& sums, const c10::SymInt& numel, const char* name) {
  TORCH_CHECK(sums.dim() == 1 && sums.is_contiguous() && sums.scalar_type() == at::kDouble &&
                  sums.device() == x.device() && holds(sums.sym_numel().sym_eq(numel)),
              "batch_norm: expected ", name, " to be ", numel, " contiguous float64 values on ", x.device(), ", got ",
              sums.scalar_type(), sums.sym_sizes(), " on ", sums.device());
}

// What a forward says of its statistics.
inline void check_stats(const at::Tensor& x, const at::Tensor& stats, const Domain& domain, const char* caller) {
  const c10::SymInt count = domain.stats(x);
  TORCH_CHECK(holds(c10::sym_equals(stats.sym_sizes(), {2, count})) && stats.is_contiguous() &&
                  stats.scalar_type() == at::kDouble && stats.device() == x.device(),
              caller, ": expected stats to be a contiguous float64 tensor of size [2, ", count, "] on ", x.device(),
              ", got ", stats.scalar_type(), stats.sym_sizes(), " on ", stats.device());
}

inline void check_map(const Operands& o, const at::Tensor& stats, const Spec& s) {
  refusing([&] {
    check_input(o.x);
    check_per_channel(o.x, o.weight, "weight");
    check_per_channel(o.x, o.bias, "bias");
    check_domain(o.x, s);
    TORCH_CHECK_NOT_IMPLEMENTED(
        !has_one_per_cell(o.x, s.domain),
        "batch_norm_map: expected groups of more than one element per sample and channel, got input of shape ",
        o.x.sym_sizes());
    check_activation(o.x, s.domain, s.activation, o.residual.has_value());
  });
  check_residual(o.x, o.residual);
  check_stats(o.x, stats, s.domain, "batch_norm_map");
}

inline void check_backward(const GradOperands& o, const GradSpec& s) {
  const auto& [dy, x, weight, bias, residual, stats] = o;
  refusing([&] {
    check_input(x);
    check_per_channel(x, weight, "weight", s.domain.parameter_dim);
    check_per_channel(x, bias, "bias", s.domain.parameter_dim);
    check_activation(x, s.domain, s.activation, residual.has_value());
  });
  TORCH_CHECK(holds(c10::sym_equals(dy.sym_sizes(), x.sym_sizes())) && dy.scalar_type() == x.scalar_type() &&
                  dy.device() == x.device(),
              "batch_norm_backward: expected dy like x, ", x.scalar_type(), x.sym_sizes(), " on ", x.device(), ", got ",
              dy.scalar_type(), dy.sym_sizes(), " on ", dy.device());
  check_residual(x, residual);
  TORCH_CHECK(!residual || !s.activation.empty(),
              "batch_norm_backward: expected no residual without an activation, where its gradient is dy");
  check_stats(x, stats, s.domain, "batch_norm_backward");
}

}  // namespace batchnorm_ext
