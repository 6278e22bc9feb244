// Tensors as the kernels take them, and what is asked of a launch.
#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <cstdint>

#include "../layout.h"
#include "../ops.h"
#include "backward.cuh"
#include "forward.cuh"
#include "plan.h"

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
  return {geometry, sizeof(typename Op::T), Op::kInputs, Op::kCoefficients, aligned, reduces, maps};
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

// What all backwards share: the tensors as the kernels take them.
struct Gradient {
  Gradient(const Tensor& grad, const Tensor& input, const Domain& domain = {})
      : x(dense(input, domain)), dy(like_layout(grad, x)), geometry(checked_geometry(x, domain)) {}

  const Tensor x, dy;
  const Geometry geometry;

  // dx may be undefined.
  bool aligned_with(const Tensor& dx) const { return aligned(x, dy) && (!dx.defined() || aligned(dx)); }

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
};

}  // namespace batchnorm_ext::cuda
