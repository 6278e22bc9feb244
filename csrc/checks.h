// Argument checks, shared by the kernels of every device. They run before anything is written, so that an exception
// leaves all state as it was.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace batchnorm_ext {

inline void check_input(const at::Tensor& x) {
  TORCH_CHECK(x.dim() >= 2, "batch_norm: expected input to have at least 2 dimensions, (N, C, ...), got ", x.dim());
  TORCH_CHECK_NOT_IMPLEMENTED(x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble ||
                                  x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kHalf,
                              "batch_norm: expected input to be of dtype float32, float64, bfloat16 or float16, got ",
                              x.scalar_type());
}

// A tensor with one value per channel.
inline void check_per_channel(const at::Tensor& x, const std::optional<at::Tensor>& tensor, const char* name) {
  if (!tensor) return;
  TORCH_CHECK(tensor->device() == x.device(), "batch_norm: expected ", name, " to be on the device of input, ",
              x.device(), ", got ", tensor->device());
  TORCH_CHECK(tensor->numel() == x.size(1), "batch_norm: expected ", name, " to contain ", x.size(1),
              " elements, one per channel of input, got ", tensor->numel());
  TORCH_CHECK(tensor->dim() == 1 || tensor->is_contiguous(), "batch_norm: expected ", name,
              " to be 1-dimensional, got size ", tensor->sizes());
  TORCH_CHECK(tensor->scalar_type() == at::kFloat || tensor->scalar_type() == x.scalar_type(), "batch_norm: expected ",
              name, " to be of dtype float32 or of the dtype of input, ", x.scalar_type(), ", got ",
              tensor->scalar_type());
}

// What every forward takes but for its own input. `training`: the statistics are those of a batch.
inline void check_parameters(const at::Tensor& x, const std::optional<at::Tensor>& weight,
                             const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& running_mean,
                             const std::optional<at::Tensor>& running_var,
                             const std::optional<at::Tensor>& num_batches_tracked, bool training,
                             std::optional<double> momentum, double eps) {
  check_input(x);
  check_per_channel(x, weight, "weight");
  check_per_channel(x, bias, "bias");
  check_per_channel(x, running_mean, "running_mean");
  check_per_channel(x, running_var, "running_var");
  TORCH_CHECK(training || (running_mean && running_var),
              "batch_norm: expected running_mean and running_var in evaluation, got None");
  TORCH_CHECK_VALUE(running_mean.has_value() == running_var.has_value(),
                    "batch_norm: expected running_mean and running_var to be both given or both None, got only ",
                    running_mean ? "running_mean" : "running_var");
  TORCH_CHECK_VALUE(eps > 0 || (!training && eps == 0), "batch_norm: expected eps to be positive",
                    training ? " in training" : " or zero", ", got ", eps);
  if (!training) return;
  TORCH_CHECK_VALUE(momentum || !running_mean || num_batches_tracked,
                    "batch_norm: expected num_batches_tracked with momentum=None, the cumulative average, got None");
  if (num_batches_tracked)
    TORCH_CHECK(num_batches_tracked->scalar_type() == at::kLong && num_batches_tracked->numel() == 1 &&
                    num_batches_tracked->device() == x.device(),
                "batch_norm: expected num_batches_tracked to be one int64 on ", x.device(), ", got ",
                num_batches_tracked->numel(), " of dtype ", num_batches_tracked->scalar_type(), " on ",
                num_batches_tracked->device());
}

inline void check_forward(const at::Tensor& x, const std::optional<at::Tensor>& weight,
                          const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& running_mean,
                          const std::optional<at::Tensor>& running_var,
                          const std::optional<at::Tensor>& num_batches_tracked, bool training,
                          std::optional<double> momentum, double eps) {
  check_parameters(x, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps);
  TORCH_CHECK_VALUE(!training || x.numel() != x.size(1) || x.numel() == 0,
                    "batch_norm: expected more than 1 value per channel when training, got input size ", x.sizes());
}

// `numel` float64 values in a row, which sums over ranks arrive in.
inline void check_sums(const at::Tensor& x, const at::Tensor& sums, int64_t numel, const char* name) {
  TORCH_CHECK(sums.dim() == 1 && sums.numel() == numel && sums.is_contiguous() && sums.scalar_type() == at::kDouble &&
                  sums.device() == x.device(),
              "batch_norm: expected ", name, " to be ", numel, " contiguous float64 values on ", x.device(), ", got ",
              sums.scalar_type(), sums.sizes(), " on ", sums.device());
}

inline void check_backward(const at::Tensor& dy, const at::Tensor& x, const std::optional<at::Tensor>& weight,
                           const at::Tensor& stats) {
  check_input(x);
  check_per_channel(x, weight, "weight");
  TORCH_CHECK(dy.sizes() == x.sizes() && dy.scalar_type() == x.scalar_type() && dy.device() == x.device(),
              "batch_norm_backward: expected dy like x, ", x.scalar_type(), x.sizes(), " on ", x.device(), ", got ",
              dy.scalar_type(), dy.sizes(), " on ", dy.device());
  TORCH_CHECK(stats.dim() == 2 && stats.size(0) == 2 && stats.size(1) == x.size(1) && stats.is_contiguous() &&
                  stats.scalar_type() == at::kDouble && stats.device() == x.device(),
              "batch_norm_backward: expected stats to be a contiguous float64 tensor of size [2, ", x.size(1), "] on ",
              x.device(), ", got ", stats.scalar_type(), stats.sizes(), " on ", stats.device());
}

}  // namespace batchnorm_ext
