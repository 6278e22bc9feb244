// The operators as C++ sees them: one bundle of tensors and one Spec. Their argument lists stand here alone, once to
// receive them and once to call them.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <string_view>
#include <tuple>
#include <utility>

namespace batchnorm_ext {

using OptionalTensor = std::optional<at::Tensor>;

inline OptionalTensor optional(const at::Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

// What a statistic is taken over, and which parameters an element has.
struct Domain {
  int64_t groups = 0;         // each sample has statistics for so many groups of channels; 0: one per channel for all
  bool centred = true;        // otherwise the mean counts as 0
  int64_t parameter_dim = 1;  // an index of this dimension has a weight and a bias

  c10::SymInt stats(const at::Tensor& x) const { return groups > 0 ? x.sym_size(0) * groups : x.sym_size(1); }
};

// How to normalize.
struct Spec {
  bool training;  // with the statistics of the batch, otherwise with the running ones
  double eps;
  bool update = false;                            // the running statistics move towards those of the batch
  std::optional<double> momentum = std::nullopt;  // by this share; none: to the average over all batches
  Domain domain = {};
  std::string_view activation = {};  // a name of activation_table.h; empty: none
};

// What to normalize, and with what. References: a bundle lives as long as the call.
struct Operands {
  const at::Tensor& x;
  const OptionalTensor &weight, &bias, &running_mean, &running_var, &num_batches_tracked;
  const OptionalTensor& sums;      // moments of several batches, to be used instead of those of x
  const OptionalTensor& residual;  // added before the activation
};

inline const OptionalTensor kNone = std::nullopt;

using Normalized = std::tuple<at::Tensor, at::Tensor>;                                  // y, stats
using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;                       // dx, dweight, dbias
using ActivatedGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;  // and dresidual
using InputGradients = std::tuple<at::Tensor, at::Tensor>;                              // dx, dresidual
using Mask = std::array<bool, 3>;                                                       // the gradients that are wanted

// Implements the operators that reduce and map at once by run(operands, spec).
template <Normalized (*run)(const Operands&, const Spec&)>
void register_forward(torch::Library& m) {
  m.impl("batch_norm", [](const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                          const OptionalTensor& running_mean, const OptionalTensor& running_var, bool training,
                          double eps, int64_t groups, bool centred, int64_t parameter_dim,
                          const OptionalTensor& residual, std::string_view activation) {
    return run({x, weight, bias, running_mean, running_var, kNone, kNone, residual},
               {training, eps, false, std::nullopt, {groups, centred, parameter_dim}, activation});
  });
  m.impl("batch_norm_update", [](const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                                 const at::Tensor& running_mean, const at::Tensor& running_var,
                                 const OptionalTensor& num_batches_tracked, std::optional<double> momentum, double eps,
                                 int64_t groups, const OptionalTensor& residual, std::string_view activation) {
    const OptionalTensor mean = running_mean, var = running_var;
    return run({x, weight, bias, mean, var, num_batches_tracked, kNone, residual},
               {true, eps, true, momentum, {groups}, activation});
  });
}

// Implements the operator that maps again by run(operands, stats, spec).
template <at::Tensor (*run)(const Operands&, const at::Tensor&, const Spec&)>
void register_map(torch::Library& m) {
  m.impl("batch_norm_map",
         [](const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, const at::Tensor& stats,
            bool training, int64_t groups, const OptionalTensor& residual, std::string_view activation) {
           return run({x, weight, bias, kNone, kNone, kNone, kNone, residual}, stats,
                      {training, 0, false, std::nullopt, {groups}, activation});
         });
}

// What to differentiate. `residual`: that of the forward, or the output of the forward (see
// batch_norm_activated_backward in ops.cpp).
struct GradOperands {
  const at::Tensor &dy, &x;
  const OptionalTensor &weight, &bias, &residual;
  const at::Tensor& stats;
};

struct GradSpec {
  bool training;
  Mask mask;
  std::optional<at::ScalarType> bias_dtype;
  Domain domain = {};
  std::string_view activation = {};  // a name of activation_table.h; empty: none
};

// Implements the backward without an activation, and the one with it.
template <ActivatedGradients (*run)(const GradOperands&, const GradSpec&)>
void register_backward(torch::Library& m) {
  m.impl("batch_norm_backward", [](const at::Tensor& dy, const at::Tensor& x, const OptionalTensor& weight,
                                   const at::Tensor& stats, bool training, Mask mask,
                                   std::optional<at::ScalarType> bias_dtype, int64_t groups, bool centred,
                                   int64_t parameter_dim) {
    auto [dx, dweight, dbias, none] =
        run({dy, x, weight, kNone, kNone, stats}, {training, mask, bias_dtype, {groups, centred, parameter_dim}});
    return Gradients(std::move(dx), std::move(dweight), std::move(dbias));
  });
  m.impl("batch_norm_activated_backward",
         [](const at::Tensor& dy, const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
            const OptionalTensor& residual, const at::Tensor& stats, bool training, Mask mask,
            std::optional<at::ScalarType> bias_dtype, int64_t groups, std::string_view activation) {
           return run({dy, x, weight, bias, residual, stats}, {training, mask, bias_dtype, {groups}, activation});
         });
}

// Implements the operators that map by given sums.
template <Normalized (*run)(const Operands&, const Spec&)>
void register_apply(torch::Library& m) {
  m.impl("apply", [](const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                     const at::Tensor& sums, double eps, const OptionalTensor& residual, std::string_view activation) {
    const OptionalTensor given = sums;
    return run({x, weight, bias, kNone, kNone, kNone, given, residual},
               {true, eps, false, std::nullopt, {}, activation});
  });
  m.impl(
      "apply_update",
      [](const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, const at::Tensor& running_mean,
         const at::Tensor& running_var, const OptionalTensor& num_batches_tracked, const at::Tensor& sums,
         std::optional<double> momentum, double eps, const OptionalTensor& residual, std::string_view activation) {
        const OptionalTensor mean = running_mean, var = running_var, given = sums;
        return run({x, weight, bias, mean, var, num_batches_tracked, given, residual},
                   {true, eps, true, momentum, {}, activation});
      });
}

// Implements the halves of the backward: the sums, and the map by given sums of `count` elements per channel.
template <at::Tensor (*reduce)(const GradOperands&, const GradSpec&, const OptionalTensor& count),
          InputGradients (*map)(const GradOperands&, const GradSpec&, const at::Tensor& grad_sums,
                                const at::Tensor& count)>
void register_grad_halves(torch::Library& m) {
  m.impl("grad_moments", [](const at::Tensor& dy, const at::Tensor& x, const at::Tensor& stats,
                            const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& residual,
                            const OptionalTensor& count, std::string_view activation) {
    return reduce({dy, x, weight, bias, residual, stats}, {true, {}, {}, {}, activation}, count);
  });
  m.impl("grad_apply", [](const at::Tensor& dy, const at::Tensor& x, const OptionalTensor& weight,
                          const at::Tensor& stats, const at::Tensor& grad_sums, const at::Tensor& count) {
    return std::get<0>(map({dy, x, weight, kNone, kNone, stats}, {true, {}, {}}, grad_sums, count));
  });
  m.impl("activated_grad_apply", [](const at::Tensor& dy, const at::Tensor& x, const OptionalTensor& weight,
                                    const OptionalTensor& bias, const OptionalTensor& residual, const at::Tensor& stats,
                                    const at::Tensor& grad_sums, const at::Tensor& count, std::string_view activation) {
    return map({dy, x, weight, bias, residual, stats}, {true, {}, {}, {}, activation}, grad_sums, count);
  });
}

// dweight has the dtype of weight, dbias has bias_dtype (the backward does not get the bias itself). Without the
// parameter: float64 if x is float64, otherwise float32. empty(dtype) makes one.
template <typename Empty>
std::tuple<at::Tensor, at::Tensor> make_parameter_gradients(const at::Tensor& x, const OptionalTensor& weight,
                                                            std::optional<at::ScalarType> bias_dtype, const Mask& mask,
                                                            const Empty& empty) {
  const auto absent = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  return {mask[1] ? empty(weight ? weight->scalar_type() : absent) : at::Tensor(),
          mask[2] ? empty(bias_dtype.value_or(absent)) : at::Tensor()};
}

inline std::tuple<at::Tensor, at::Tensor> empty_parameter_gradients(const at::Tensor& x, const OptionalTensor& weight,
                                                                    std::optional<at::ScalarType> bias_dtype,
                                                                    const Mask& mask, int64_t parameter_dim = 1) {
  return make_parameter_gradients(x, weight, bias_dtype, mask, [&](at::ScalarType dtype) {
    return x.new_empty_symint({x.sym_size(parameter_dim)}, x.options().dtype(dtype));
  });
}

template <typename Signature>
c10::TypedOperatorHandle<Signature> find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// Calls batch_norm, batch_norm_update, apply or apply_update, as the operands and the spec ask for.
inline Normalized call_forward(const Operands& o, const Spec& s) {
  using at::Tensor;
  static const auto batch_norm = find_operator<Normalized(
      const Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, bool,
      double, int64_t, bool, int64_t, const OptionalTensor&, std::string_view)>("batchnorm_ext::batch_norm");
  static const auto batch_norm_update =
      find_operator<Normalized(const Tensor&, const OptionalTensor&, const OptionalTensor&, const Tensor&,
                               const Tensor&, const OptionalTensor&, std::optional<double>, double, int64_t,
                               const OptionalTensor&, std::string_view)>("batchnorm_ext::batch_norm_update");
  static const auto apply =
      find_operator<Normalized(const Tensor&, const OptionalTensor&, const OptionalTensor&, const Tensor&, double,
                               const OptionalTensor&, std::string_view)>("batchnorm_ext::apply");
  static const auto apply_update =
      find_operator<Normalized(const Tensor&, const OptionalTensor&, const OptionalTensor&, const Tensor&,
                               const Tensor&, const OptionalTensor&, const Tensor&, std::optional<double>, double,
                               const OptionalTensor&, std::string_view)>("batchnorm_ext::apply_update");
  if (o.sums && s.update)
    return apply_update.call(o.x, o.weight, o.bias, *o.running_mean, *o.running_var, o.num_batches_tracked, *o.sums,
                             s.momentum, s.eps, o.residual, s.activation);
  if (o.sums) return apply.call(o.x, o.weight, o.bias, *o.sums, s.eps, o.residual, s.activation);
  if (s.update)
    return batch_norm_update.call(o.x, o.weight, o.bias, *o.running_mean, *o.running_var, o.num_batches_tracked,
                                  s.momentum, s.eps, s.domain.groups, o.residual, s.activation);
  return batch_norm.call(o.x, o.weight, o.bias, o.running_mean, o.running_var, s.training, s.eps, s.domain.groups,
                         s.domain.centred, s.domain.parameter_dim, o.residual, s.activation);
}

// Likewise batch_norm_backward or batch_norm_activated_backward.
inline ActivatedGradients call_backward(const GradOperands& o, const GradSpec& s) {
  using at::Tensor;
  static const auto plain = find_operator<Gradients(const Tensor&, const Tensor&, const OptionalTensor&, const Tensor&,
                                                    bool, Mask, std::optional<at::ScalarType>, int64_t, bool, int64_t)>(
      "batchnorm_ext::batch_norm_backward");
  static const auto activated =
      find_operator<ActivatedGradients(const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
                                       const OptionalTensor&, const Tensor&, bool, Mask, std::optional<at::ScalarType>,
                                       int64_t, std::string_view)>("batchnorm_ext::batch_norm_activated_backward");
  if (!s.activation.empty())
    return activated.call(o.dy, o.x, o.weight, o.bias, o.residual, o.stats, s.training, s.mask, s.bias_dtype,
                          s.domain.groups, s.activation);
  auto [dx, dweight, dbias] = plain.call(o.dy, o.x, o.weight, o.stats, s.training, s.mask, s.bias_dtype,
                                         s.domain.groups, s.domain.centred, s.domain.parameter_dim);
  return {std::move(dx), std::move(dweight), std::move(dbias), Tensor()};
}

inline at::Tensor call_map(const Operands& o, const at::Tensor& stats, const Spec& s) {
  using at::Tensor;
  static const auto op =
      find_operator<Tensor(const Tensor&, const OptionalTensor&, const OptionalTensor&, const Tensor&, bool, int64_t,
                           const OptionalTensor&, std::string_view)>("batchnorm_ext::batch_norm_map");
  return op.call(o.x, o.weight, o.bias, stats, s.training, s.domain.groups, o.residual, s.activation);
}

inline at::Tensor call_moments(const at::Tensor& x) {
  static const auto op = find_operator<at::Tensor(const at::Tensor&)>("batchnorm_ext::moments");
  return op.call(x);
}

inline at::Tensor call_grad_moments(const GradOperands& o, const GradSpec& s, const OptionalTensor& count) {
  static const auto op =
      find_operator<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const OptionalTensor&,
                               const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, std::string_view)>(
          "batchnorm_ext::grad_moments");
  if (s.activation.empty()) return op.call(o.dy, o.x, o.stats, kNone, kNone, kNone, kNone, {});
  return op.call(o.dy, o.x, o.stats, o.weight, o.bias, o.residual, count, s.activation);
}

// Calls grad_apply or activated_grad_apply.
inline InputGradients call_grad_apply(const GradOperands& o, const GradSpec& s, const at::Tensor& grad_sums,
                                      const at::Tensor& count) {
  using at::Tensor;
  static const auto plain = find_operator<Tensor(const Tensor&, const Tensor&, const OptionalTensor&, const Tensor&,
                                                 const Tensor&, const Tensor&)>("batchnorm_ext::grad_apply");
  static const auto activated = find_operator<InputGradients(
      const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const Tensor&,
      const Tensor&, const Tensor&, std::string_view)>("batchnorm_ext::activated_grad_apply");
  if (s.activation.empty()) return {plain.call(o.dy, o.x, o.weight, o.stats, grad_sums, count), Tensor()};
  return activated.call(o.dy, o.x, o.weight, o.bias, o.residual, o.stats, grad_sums, count, s.activation);
}

}  // namespace batchnorm_ext
