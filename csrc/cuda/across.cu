#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <tuple>
#include <utility>

#include "across.cuh"
#include "across.h"
#include "launch.h"

namespace batchnorm_ext::cuda {
namespace {

constexpr int64_t kMostParts = 1024;  // blocks that each have a part of the gradients of the parameters

Image image_of(const Tensor& rows) { return {rows.size(0), rows.size(1), rows.size(2)}; }

// (N, channels, positions) as NCHW has them in memory; a copy where it is stored otherwise.
Tensor as_rows(const Tensor& x) { return x.transpose(1, 2).contiguous(); }

// f(rows) writes (N, channels, positions) to rows, which becomes an output in the memory order that belongs to x.
template <typename F>
Tensor output_like(const Tensor& x, const F& f) {
  Tensor output = at::empty_like(x);
  const Tensor view = output.transpose(1, 2);
  if (view.is_contiguous()) {
    f(view);
    return output;
  }
  const Tensor rows = at::empty(view.sizes(), view.options());
  f(rows);
  view.copy_(rows);
  return output;
}

}  // namespace

Normalized normalize_across(const Operands& o, const Spec& s) {
  const Tensor x = as_rows(o.x);
  const Image shape = image_of(x);
  Tensor stats = at::empty({2, shape.stats()}, x.options().dtype(at::kDouble));
  Tensor y = output_like(o.x, [&](const Tensor& rows) {
    with_dtype(x.scalar_type(), [&](auto type) {
      using T = decltype(type);
      launch_across(AcrossForward<T>{read<T>(x), write<T>(rows), shape, s.eps, read_channels<T>(o.weight),
                                     read_channels<T>(o.bias), write<double>(stats)},
                    aligned(x, rows), 0);
    });
  });
  return {std::move(y), std::move(stats)};
}

Gradients backward_across(const Tensor& grad, const Tensor& input, const OptionalTensor& weight, const Tensor& stats,
                          const Mask& mask, std::optional<at::ScalarType> bias_dtype) {
  const auto [want_dx, want_dweight, want_dbias] = mask;
  const Tensor x = as_rows(input), dy = as_rows(grad);
  const Image shape = image_of(x);
  const int64_t most = std::min(kMostParts, shape.strips(kWarp));
  const Tensor parts = at::empty({most, shape.channels, 2}, x.options().dtype(at::kDouble));
  int64_t blocks = 0;
  const auto run = [&](const Tensor& rows) {
    with_dtype(x.scalar_type(), [&](auto type) {
      using T = decltype(type);
      T* const dx = rows.defined() ? write<T>(rows) : nullptr;
      auto* const to = static_cast<double2*>(parts.mutable_data_ptr());
      blocks = launch_across(
          AcrossBackward<T>{read<T>(dy), read<T>(x), dx, shape, read_channels<T>(weight), read<double>(stats), to},
          aligned(x, dy) && (!rows.defined() || aligned(rows)), most);
    });
  };
  Tensor dx, dweight, dbias;
  std::tie(dweight, dbias) = empty_parameter_gradients(input, weight, bias_dtype, mask, 2);
  if (want_dx)
    dx = output_like(input, run);
  else if (want_dweight || want_dbias)
    run(Tensor());
  if (want_dweight || want_dbias) {
    const Tensor totals = parts.narrow(0, 0, blocks).sum(0);  // in an order that the shape decides
    if (want_dweight) dweight.copy_(totals.select(1, 0));
    if (want_dbias) dbias.copy_(totals.select(1, 1));
  }
  return {std::move(dx), std::move(dweight), std::move(dbias)};
}

}  // namespace batchnorm_ext::cuda
