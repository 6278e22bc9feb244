// Tensors as the kernels take them, and what is asked of a launch.
#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <cstdint>
#include <optional>
#include <string_view>
#include <type_traits>

#include "../activation_table.h"
#include "../layout.h"
#include "../ops.h"
#include "activated.cuh"
#include "launch.h"

namespace batchnorm_ext::cuda {

using at::Tensor;

// f(T()) with the kernels' type of that name.
template <typename F>
void with_dtype(at::ScalarType dtype, const F& f) {
  switch (dtype) {
    case at::kDouble:
      return f(double());
    case at::kHalf:
      return f(__half());
    case at::kBFloat16:
      return f(__nv_bfloat16());
    default:
      return f(float());
  }
}

template <typename T>
const T* read(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* write(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

template <typename T>
Channels<T> channels_of(const Tensor& tensor, void* data) {
  return {data, tensor.stride(0), tensor.scalar_type() == at::kFloat};
}

template <typename T>
Channels<T> read_channels(const OptionalTensor& tensor) {
  return tensor ? channels_of<T>(*tensor, const_cast<void*>(tensor->const_data_ptr())) : Channels<T>();
}

template <typename T>
Channels<T> write_channels(const OptionalTensor& tensor) {
  return tensor ? channels_of<T>(*tensor, tensor->mutable_data_ptr()) : Channels<T>();
}

template <typename... Tensors>
bool aligned(const Tensors&... tensors) {
  return ((reinterpret_cast<uintptr_t>(tensors.const_data_ptr()) % 16 == 0) && ...);
}

// For an empty tensor: one element per channel, so that the work per channel still runs.
inline Geometry checked_geometry(const Tensor& x, const Domain& domain = {}) {
  const Geometry g = x.numel() > 0 ? geometry_of(x, domain) : Geometry{1, x.size(1), 1};
  constexpr int64_t most = int64_t{1} << 30;
  TORCH_CHECK(g.cells() <= most && g.inner <= most,
              "batch_norm: on CUDA, input may have at most 2^30 channels and at most 2^30 contiguous elements ",
              "per channel, got size ", x.sizes());
  return g;
}

template <typename Op>
Request request(const Geometry& geometry, bool aligned, bool reduces, bool maps) {
  return {geometry, sizeof(typename Op::T), Op::kKept, Op::kCoefficients + Op::kKnown, aligned, reduces, maps};
}

template <typename T>
Forward<T> forward_of(const Tensor& x, const Geometry& geometry) {
  Forward<T> op{};
  op.x = read<T>(x);
  op.geometry = geometry;
  op.count = static_cast<double>(geometry.count());
  op.centred = true;
  return op;
}

inline Tensor empty_sums(const Tensor& x, int64_t size) { return at::empty({size}, x.options().dtype(at::kDouble)); }

// A residual and an activation behind the norm. Without either, the kernels are those that know of neither.
struct After {
  OptionalTensor residual;
  Activation activation;

  After(const OptionalTensor& added, std::string_view name, const Tensor& x)
      : residual(like_layout(added, x)), activation(activation_named(name).make()) {}

  bool is_nothing() const { return !residual && activation.curve == Curve::kNone; }
  bool is_aligned() const { return !residual || aligned(*residual); }
  template <typename T>
  const T* residual_data() const {
    return residual ? read<T>(*residual) : nullptr;
  }
};

// float64 has no kernels with an activation: check_activation refuses it.
template <typename T>
void launch(const Forward<T>& op, const After& after, bool aligned, bool reduces) {
  if (after.is_nothing()) return launch(op, request<Forward<T>>(op.geometry, aligned, reduces, true));
  if constexpr (!std::is_same_v<T, double>)
    launch(ActivatedForward<T>{op, after.residual_data<T>(), PackActivation<T>(after.activation)},
           request<ActivatedForward<T>>(op.geometry, aligned && after.is_aligned(), reduces, true));
  else
    TORCH_INTERNAL_ASSERT(false, "float64 has no kernels with an activation");
}

// What all backwards share: the tensors as the kernels take them.
struct Gradient {
  Gradient(const GradOperands& o, const GradSpec& s, bool maps)
      : x(dense(o.x, s.domain)),
        dy(like_layout(o.dy, x)),
        bias(o.bias),
        after(o.residual, s.activation, x),
        dresidual(maps && after.residual ? at::empty_like(x) : Tensor()),
        geometry(checked_geometry(x, s.domain)) {}

  const Tensor x, dy;
  const OptionalTensor bias;
  const After after;
  const Tensor dresidual;  // undefined where nothing is mapped, and without a residual
  const Geometry geometry;

  template <typename T>
  Backward<T> op(const OptionalTensor& weight, const Tensor& stats) const {
    Backward<T> op{};
    op.dy = read<T>(dy);
    op.x = read<T>(x);
    op.geometry = geometry;
    op.training = true;
    op.count = static_cast<double>(geometry.count());
    op.means = read<double>(stats);
    op.invstds = op.means + geometry.stats();
    op.weight = read_channels<T>(weight);
    return op;
  }

  // Where op maps, dx is defined, and dresidual is written too.
  template <typename T>
  void launch(const Backward<T>& op, const Tensor& dx, bool reduces, bool maps) const {
    const bool is_aligned = aligned(x, dy) && (!maps || aligned(dx));
    if (after.is_nothing()) return cuda::launch(op, request<Backward<T>>(geometry, is_aligned, reduces, maps));
    if constexpr (!std::is_same_v<T, double>) {
      ActivatedBackward<T> with{op, after.residual_data<T>(), nullptr, read_channels<T>(bias),
                                PackActivation<T>(after.activation)};
      if (maps && dresidual.defined()) with.dresidual = write<T>(dresidual);
      cuda::launch(with, request<ActivatedBackward<T>>(geometry, is_aligned && after.is_aligned(), reduces, maps));
    } else {
      TORCH_INTERNAL_ASSERT(false, "float64 has no kernels with an activation");
    }
  }
};

}  // namespace batchnorm_ext::cuda
