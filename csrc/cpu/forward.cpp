// The fused forward, tensors in and pointers out: the CPU side of training on one device, and of evaluation. Built once
// per instruction set.
#include "forward.h"

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <cmath>
#include <limits>
#include <optional>
#include <utility>

#include "../activation_table.h"
#include "../checks.h"
#include "../dtype.h"
#include "../layout.h"
#include "elementwise.h"
#include "per_channel.h"

namespace batchnorm_ext::cpu {
namespace {

using at::Tensor;

Normalized forward(const Operands& o, const Spec& s) {
  check_forward(o, s);
  check_memory(o, s);
  const Tensor x = dense(o.x, s.domain);
  const OptionalTensor residual = o.residual ? OptionalTensor(like_layout(*o.residual, x)) : std::nullopt;
  const Geometry geometry = arranged(x, s.domain);
  const Activation activation = activation_named(s.activation).make();
  Tensor y = empty_output_like(x);
  Tensor stats = at::detail::empty_cpu({2, geometry.stats()}, at::kDouble);
  double* const mean = stats.mutable_data_ptr<double>();
  double* const invstd = mean + geometry.stats();
  if (s.training && x.numel() == 0) {
    stats.fill_(std::nan(""));  // no element, no statistics, nothing to track
    return {std::move(y), std::move(stats)};
  }
  const int64_t parameters = x.size(s.domain.parameter_dim);
  const auto read = [&](int64_t batch) {
    return std::pair(read_channels(o.weight, parameters, 1, batch), read_channels(o.bias, parameters, 0, batch));
  };
  with_dtype(x.scalar_type(), [&](auto like) {
    using scalar_t = decltype(like);
    const scalar_t* const in = x.const_data_ptr<scalar_t>();
    scalar_t* const out = y.mutable_data_ptr<scalar_t>();
    if (has_parameters_within(geometry, s.domain)) {
      const auto [weight, bias] = read(1);
      ElementwiseForward<scalar_t>(geometry, parameters, weight.get(), bias.get())
          .run(in, out, s.domain.centred, s.eps, mean, invstd);
      return;
    }
    auto [weight, bias] = read(geometry.batch);
    const scalar_t* const added = residual ? residual->const_data_ptr<scalar_t>() : nullptr;
    Forward<scalar_t> run{geometry,         in,         added, out,    s.eps,
                          s.domain.centred, activation, mean,  invstd, std::move(weight),
                          std::move(bias)};
    if (!s.training) return run.evaluate(o);
    const Channels var = run.train();
    track(o, s, geometry, static_cast<double>(geometry.count()), mean, var.get());
  });
  return {std::move(y), std::move(stats)};
}

Tensor map(const Operands& o, const Tensor& given, const Spec& s) {
  check_map(o, given, s);
  const Tensor x = dense(o.x, s.domain);
  const OptionalTensor residual = o.residual ? OptionalTensor(like_layout(*o.residual, x)) : std::nullopt;
  const Geometry geometry = arranged(x, s.domain);
  Tensor y = empty_output_like(x), stats = given.clone();
  double* const mean = stats.mutable_data_ptr<double>();
  with_dtype(x.scalar_type(), [&](auto like) {
    using scalar_t = decltype(like);
    Forward<scalar_t> run{geometry,
                          x.const_data_ptr<scalar_t>(),
                          residual ? residual->const_data_ptr<scalar_t>() : nullptr,
                          y.mutable_data_ptr<scalar_t>(),
                          0,
                          true,
                          activation_named(s.activation).make(),
                          mean,
                          mean + geometry.stats(),
                          read_channels(o.weight, geometry.channels, 1, geometry.batch),
                          read_channels(o.bias, geometry.channels, 0, geometry.batch)};
    run.map_all_cells(s.training ? static_cast<double>(geometry.count()) : std::numeric_limits<double>::infinity());
  });
  return y;
}

TORCH_LIBRARY_IMPL(batchnorm_ext, CPU, m) {
  register_forward<forward>(m);
  register_map<map>(m);
}

}  // namespace
}  // namespace batchnorm_ext::cpu
