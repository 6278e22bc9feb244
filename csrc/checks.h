// Argument checks, shared by the kernels of every device and by the fake ones, whose sizes may be symbols. They run
// before anything is written, so that an exception leaves all state as it was.
//
// What the kernels don't take is a NotImplementedError, on which the layers ask PyTorch's own function: it may take it,
// and otherwise its error is the one that users know. Where it has one, its text begins ours.
#pragma once

#include <ATen/MemoryOverlap.h>
#include <ATen/core/Tensor.h>
#include <c10/core/SymBool.h>

#include <sstream>
#include <string>

#include "ops.h"

namespace batchnorm_ext {

inline void check_input(const at::Tensor& x) {
  TORCH_CHECK_NOT_IMPLEMENTED(x.dim() >= 2,
                              "batch_norm: expected input to have at least 2 dimensions, (N, C, ...), got ", x.dim());
  TORCH_CHECK_NOT_IMPLEMENTED(x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble ||
                                  x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kHalf,
                              "\"batch_norm\" not implemented for '", toString(x.scalar_type()),
                              "': expected input to be of dtype float32, float64, bfloat16 or float16");
}

// A condition on sizes.
template <typename... Message>
void check_size(const c10::SymBool& holds, const Message&... message) {
  TORCH_CHECK_NOT_IMPLEMENTED(holds.expect_true(__FILE__, __LINE__), message...);
}

// A tensor with one value per channel.
inline void check_per_channel(const at::Tensor& x, const OptionalTensor& tensor, const char* name) {
  if (!tensor) return;
  TORCH_CHECK_NOT_IMPLEMENTED(tensor->device() == x.device(), "Tensor on device ", tensor->device(),
                              " is not on the expected device ", x.device(), "! This is ", name);
  check_size(tensor->sym_numel().sym_eq(x.sym_size(1)), name, " should contain ", x.sym_size(1), " elements not ",
             tensor->sym_numel());
  TORCH_CHECK_NOT_IMPLEMENTED(tensor->dim() == 1, "batch_norm: expected ", name, " to be 1-dimensional, got size ",
                              tensor->sym_sizes());
  TORCH_CHECK_NOT_IMPLEMENTED(tensor->scalar_type() == at::kFloat || tensor->scalar_type() == x.scalar_type(),
                              "batch_norm: expected ", name, " to be of dtype float32 or of the dtype of input, ",
                              x.scalar_type(), ", got ", tensor->scalar_type());
}

// What every forward takes but for the number of elements.
inline void check_operands(const Operands& o, const Spec& s) {
  check_input(o.x);
  check_per_channel(o.x, o.running_mean, "running_mean");
  check_per_channel(o.x, o.running_var, "running_var");
  check_per_channel(o.x, o.weight, "weight");
  check_per_channel(o.x, o.bias, "bias");
  for (const auto* statistic : {&o.running_mean, &o.running_var})
    TORCH_CHECK_NOT_IMPLEMENTED(s.training || *statistic, statistic == &o.running_mean ? "running_mean" : "running_var",
                                " must be defined in evaluation mode");
  for (const auto* statistic : {&o.running_mean, &o.running_var})
    TORCH_CHECK_NOT_IMPLEMENTED(!*statistic || !(*statistic)->requires_grad(),
                                "The function 'batch_norm' is not differentiable with respect to argument '",
                                statistic == &o.running_mean ? "running_mean" : "running_var",
                                "'. This input cannot have requires_grad True.");
  TORCH_CHECK_NOT_IMPLEMENTED(s.eps > 0 || (!s.training && s.eps == 0), "batch_norm eps must be ",
                              s.training ? "positive during training" : "non-negative", ", but got ", s.eps);
  if (!s.update) return;
  TORCH_CHECK_NOT_IMPLEMENTED(
      s.momentum || o.num_batches_tracked,
      "batch_norm: expected num_batches_tracked with momentum=None, the cumulative average, got None");
  if (!o.num_batches_tracked) return;
  const at::Tensor& counter = *o.num_batches_tracked;
  TORCH_CHECK_NOT_IMPLEMENTED(counter.scalar_type() == at::kLong && counter.device() == o.x.device(),
                              "batch_norm: expected num_batches_tracked to be one int64 on ", o.x.device(), ", got ",
                              counter.scalar_type(), " on ", counter.device());
  check_size(counter.sym_numel().sym_eq(1), "batch_norm: expected num_batches_tracked to be one int64, got ",
             counter.sym_numel());
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
  TORCH_CHECK_VALUE(enough.expect_true(__FILE__, __LINE__),
                    "Expected more than 1 value per channel when training, got input size torch.Size([",
                    comma_separated_size(x), "])");
}

inline void check_forward(const Operands& o, const Spec& s) {
  check_operands(o, s);
  if (s.training) check_batch_size(o.x);
}

// Memory that is written for two channels, or two statistics, holds neither in the end.
inline void check_written_once(const Operands& o, const Spec& s) {
  if (!s.update) return;
  at::assert_no_internal_overlap(*o.running_mean);
  at::assert_no_internal_overlap(*o.running_var);
  at::assert_no_overlap(*o.running_mean, *o.running_var);
}

// For kernels whose threads write the running statistics while others still read the rest.
inline void check_reads_not_written(const Operands& o, const Spec& s) {
  if (!s.update) return;
  const auto check = [&](const at::Tensor& read, const char* name) {
    for (const auto* written : {&*o.running_mean, &*o.running_var})
      // of tensors that are not dense, at::get_overlap_status alone does not say that they lie apart
      TORCH_CHECK_NOT_IMPLEMENTED(!written->is_alias_of(read) ||
                                      at::get_overlap_status(*written, read) == at::MemOverlapStatus::No,
                                  "batch_norm: expected ", name, " to share no memory with the running statistics");
  };
  check(o.x, "input");
  if (o.weight) check(*o.weight, "weight");
  if (o.bias) check(*o.bias, "bias");
}

// `numel` float64 values in a row, which sums over ranks arrive in.
inline void check_sums(const at::Tensor& x, const at::Tensor& sums, const c10::SymInt& numel, const char* name) {
  TORCH_CHECK(sums.dim() == 1 && sums.is_contiguous() && sums.scalar_type() == at::kDouble &&
                  sums.device() == x.device() && sums.sym_numel().sym_eq(numel).expect_true(__FILE__, __LINE__),
              "batch_norm: expected ", name, " to be ", numel, " contiguous float64 values on ", x.device(), ", got ",
              sums.scalar_type(), sums.sym_sizes(), " on ", sums.device());
}

inline void check_backward(const at::Tensor& dy, const at::Tensor& x, const OptionalTensor& weight,
                           const at::Tensor& stats) {
  check_input(x);
  check_per_channel(x, weight, "weight");
  TORCH_CHECK(dy.sym_sizes() == x.sym_sizes() && dy.scalar_type() == x.scalar_type() && dy.device() == x.device(),
              "batch_norm_backward: expected dy like x, ", x.scalar_type(), x.sym_sizes(), " on ", x.device(), ", got ",
              dy.scalar_type(), dy.sym_sizes(), " on ", dy.device());
  TORCH_CHECK(stats.dim() == 2 && stats.sym_size(0) == 2 && stats.sym_size(1) == x.sym_size(1) &&
                  stats.is_contiguous() && stats.scalar_type() == at::kDouble && stats.device() == x.device(),
              "batch_norm_backward: expected stats to be a contiguous float64 tensor of size [2, ", x.sym_size(1),
              "] on ", x.device(), ", got ", stats.scalar_type(), stats.sym_sizes(), " on ", stats.device());
}

}  // namespace batchnorm_ext
