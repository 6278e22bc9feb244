// Activations by the names of torch.nn.functional, with arguments in brackets: "relu", "leaky_relu(0.1)".
#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/elu_backward.h>
#include <ATen/ops/gelu_backward.h>
#include <ATen/ops/hardswish_backward.h>
#include <ATen/ops/hardtanh_backward.h>
#include <ATen/ops/leaky_relu_backward.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/sigmoid_backward.h>
#include <ATen/ops/softplus.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/tanh_backward.h>
#include <ATen/ops/threshold_backward.h>
#include <c10/util/Exception.h>
#include <torch/csrc/jit/frontend/strtod.h>

#include <algorithm>
#include <array>
#include <limits>
#include <optional>
#include <string>
#include <string_view>

#include "activation.h"

namespace batchnorm_ext {

struct ActivationRow {
  using Tensor = at::Tensor;

  const char* name;
  int arguments;  // that a name may have: all of them or none
  std::array<double, 2> by_default;
  Activation (*make)(double, double);
  // dy * y'(z) by operators of PyTorch that have derivatives of any order: silu_backward and mish_backward have none
  Tensor (*grad)(const Tensor& dy, const Tensor& z, double, double);
};

namespace activation_table {

using at::Tensor;
using D = double;

constexpr D kNoBound = std::numeric_limits<D>::quiet_NaN();

template <Curve curve>
Activation smooth(D, D) {
  return {curve};
}

inline const ActivationRow kRows[] = {
    {"relu",
     0,
     {},
     [](D, D) { return Activation{Curve::kPiecewise, 1, 0, kNoBound}; },
     [](const Tensor& dy, const Tensor& z, D, D) { return at::threshold_backward(dy, z, 0); }},
    {"relu6",
     0,
     {},
     [](D, D) { return Activation{Curve::kPiecewise, 1, 0, 6}; },
     [](const Tensor& dy, const Tensor& z, D, D) { return at::hardtanh_backward(dy, z, 0, 6); }},
    {"hardtanh",
     2,
     {-1, 1},
     [](D low, D high) { return Activation{Curve::kPiecewise, 1, low, high}; },
     [](const Tensor& dy, const Tensor& z, D low, D high) { return at::hardtanh_backward(dy, z, low, high); }},
    {"leaky_relu",
     1,
     {0.01},
     [](D slope, D) { return Activation{Curve::kPiecewise, slope, kNoBound, kNoBound}; },
     [](const Tensor& dy, const Tensor& z, D slope, D) { return at::leaky_relu_backward(dy, z, slope, false); }},
    {"elu",
     1,
     {1},
     [](D alpha, D) { return Activation{Curve::kElu, alpha}; },
     [](const Tensor& dy, const Tensor& z, D alpha, D) { return at::elu_backward(dy, alpha, 1, 1, false, z); }},
    {"silu",
     0,
     {},
     smooth<Curve::kSilu>,
     [](const Tensor& dy, const Tensor& z, D, D) {
       const Tensor s = at::sigmoid(z);
       return dy * (s * (1 + z * (1 - s)));
     }},
    {"gelu",
     0,
     {},
     smooth<Curve::kGelu>,
     [](const Tensor& dy, const Tensor& z, D, D) { return at::gelu_backward(dy, z, "none"); }},
    {"gelu_tanh",
     0,
     {},
     smooth<Curve::kGeluTanh>,
     [](const Tensor& dy, const Tensor& z, D, D) { return at::gelu_backward(dy, z, "tanh"); }},
    {"hardswish",
     0,
     {},
     smooth<Curve::kHardswish>,
     [](const Tensor& dy, const Tensor& z, D, D) { return at::hardswish_backward(dy, z); }},
    {"hardsigmoid",  // hardsigmoid_backward multiplies float64 values by 1/6 in float32
     0,
     {},
     smooth<Curve::kHardsigmoid>,
     [](const Tensor& dy, const Tensor& z, D, D) { return at::hardtanh_backward(dy, z, -3, 3) / 6; }},
    {"mish",
     0,
     {},
     smooth<Curve::kMish>,
     [](const Tensor& dy, const Tensor& z, D, D) {
       const Tensor gate = at::tanh(at::softplus(z));
       return dy * (gate + z * at::sigmoid(z) * (1 - gate * gate));
     }},
    {"sigmoid",
     0,
     {},
     smooth<Curve::kSigmoid>,
     [](const Tensor& dy, const Tensor& z, D, D) { return at::sigmoid_backward(dy, at::sigmoid(z)); }},
    {"tanh",
     0,
     {},
     smooth<Curve::kTanh>,
     [](const Tensor& dy, const Tensor& z, D, D) { return at::tanh_backward(dy, at::tanh(z)); }},
};

}  // namespace activation_table

// A row and the arguments for it.
struct ChosenActivation {
  const ActivationRow* row = nullptr;
  std::array<double, 2> arguments = {};

  Activation make() const { return row == nullptr ? Activation() : row->make(arguments[0], arguments[1]); }
  at::Tensor grad(const at::Tensor& dy, const at::Tensor& z) const {
    return row == nullptr ? dy : row->grad(dy, z, arguments[0], arguments[1]);
  }
};

// The arguments in "a)" or "a, b)", or nothing if there are more or fewer than `count`.
inline std::optional<std::array<double, 2>> parse_arguments(std::string_view text, int count) {
  const std::string list(text);
  const char* at = list.c_str();
  std::array<double, 2> values = {};
  for (int i = 0; i < count; ++i) {
    char* end = nullptr;
    values[i] = torch::jit::strtod_c(at, &end);  // the same in every locale
    if (end == at || *end != (i + 1 < count ? ',' : ')')) return std::nullopt;
    at = end + 1;
  }
  return count > 0 && *at == '\0' ? std::optional(values) : std::nullopt;
}

// "" is no activation. Raises ValueError for an unknown one.
inline ChosenActivation activation_named(std::string_view text) {
  if (text.empty()) return {};
  const size_t bracket = std::min(text.find('('), text.size());
  for (const ActivationRow& row : activation_table::kRows) {
    if (text.substr(0, bracket) != row.name) continue;
    if (bracket == text.size()) return {&row, row.by_default};
    const auto values = parse_arguments(text.substr(bracket + 1), row.arguments);
    if (values && (row.arguments < 2 || (*values)[0] <= (*values)[1])) return {&row, *values};
  }
  std::string names;
  for (const ActivationRow& row : activation_table::kRows) (names += names.empty() ? "" : ", ") += row.name;
  TORCH_CHECK_VALUE(false, "expected activation to be one of ", names,
                    ", some with arguments, as in leaky_relu(0.1) or hardtanh(-2, 2), got '", text, "'");
}

}  // namespace batchnorm_ext
