// The fused backward, tensors in and pointers out, as forward.cpp.
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <utility>

#include "../activation_table.h"
#include "../checks.h"
#include "../dtype.h"
#include "../layout.h"
#include "combine.h"
#include "elementwise.h"
#include "maps.h"
#include "passes.h"
#include "per_channel.h"

namespace batchnorm_ext::cpu {
namespace {

using at::Tensor;

// A backward: pointers, geometry, and what its steps hand on. One value per cell: mean, invstd, weight, bias, the sums
// that are the gradients of the parameters, the coefficients.
template <typename T>
struct Backward {
  using A = Acc<T>;

  const Geometry geometry;
  const T *const dy, *const x, *const residual;  // null: there is none
  T *const dx, *const dresidual;                 // null: not wanted
  const bool training, centred;
  const Activation activation;
  const double *const mean, *const invstd;
  const Channels weight, bias;
  const Channels dbias{new double[geometry.cells()]}, dweight{new double[geometry.cells()]};
  CoefficientTable<A, 8> table{geometry.cells()};

  // dx in evaluation, where nothing is to be summed.
  void map_all_cells() {
    if (!is_activated()) {
      for (int64_t c = 0; c < geometry.cells(); ++c) table.row(3)[c] = static_cast<A>(weight[c] * invstd[c]);
      return map_tensor(geometry, Scale<A>(), table.view() + 3, std::array{dx}, dy);
    }
    set_activation();
    for (int i = 0; i < 3; ++i) std::fill_n(table.row(i), geometry.cells(), A(0));
    for (int64_t c = 0; c < geometry.cells(); ++c) table.row(3)[c] = static_cast<A>(invstd[c]);
    for (int64_t c = 0; c < geometry.cells(); ++c) table.row(4)[c] = static_cast<A>(weight[c]);
    with_pattern<T>(geometry, [&](const auto& pattern) {
      stream_if(streams(), [&](auto streaming) {
        map_all(Schedule(pattern), [&](int64_t block, int64_t chunk, Scratch& scratch) {
          map<streaming.value>(pattern, block, chunk, scratch);
        });
      });
    });
  }

  void reduce_and_map() {
    set_activation();
    A* const centre = table.row(0);
    for (int64_t c = 0; c < geometry.cells(); ++c) centre[c] = static_cast<A>(mean[c]);
    const auto finish = [&](int64_t first, int64_t width, const double* sums, const double* dots) {
      std::copy_n(sums, width, &dbias[first]);
      std::copy_n(dots, width, &dweight[first]);
      set_coefficients(first, width, sums, dots);
    };
    with_pattern<T>(geometry, [&](const auto& pattern) {
      stream_if(streams(), [&](auto streaming) {
        const auto map_chunk = [&](int64_t block, int64_t chunk, Scratch& scratch) {
          if (dx != nullptr) map<streaming.value>(pattern, block, chunk, scratch);
        };
        with_grad([&](const auto& grad, const auto*... in) {
          reduce_grads(pattern, grad, Centres<A>{centre, mean, invstd}, finish, map_chunk, in...);
        });
      });
    });
  }

 private:
  // Large outputs are streamed, two only if they have the same offset from a vector's boundary (see transform).
  bool streams() const {
    const auto place = [](const T* p) { return reinterpret_cast<uintptr_t>(p) % (Vec<T>::size() * sizeof(T)); };
    return bytes_of<T>(geometry) >= stream_bytes() && (dresidual == nullptr || place(dresidual) == place(dx));
  }

  bool is_activated() const { return activation.curve != Curve::kNone; }

  // f(grad, inputs...), where grad makes what enters the sums of the inputs.
  template <typename F>
  void with_grad(const F& f) const {
    const A* const* const rows = table.view() + 5;
    if (!is_activated()) return f(PlainGrad(), dy, x);
    with_activation<T>(activation, [&]<typename Act>(const Act& act) {
      if (residual == nullptr)
        f(ActivatedGrad<OfInput<A>, Act, A>{act, rows}, dy, x);
      else
        f(ActivatedGrad<typename Act::OfSaved, Act, A>{act, rows}, dy, x, residual);
    });
  }

  // dx, and the gradient of a residual, of a chunk.
  template <bool kStream, typename Pattern>
  void map(const Pattern& pattern, int64_t block, int64_t chunk, Scratch& scratch) const {
    const auto run = [&](const auto& op, const A* const* coefficients, const auto& out, const auto*... in) {
      pattern.template map<kStream>(block, chunk, op, coefficients, scratch, out, in...);
    };
    const A* const* const c = table.view();
    const std::array<T*, 1> one{dx};
    const std::array<T*, 2> both{dx, dresidual};
    if (!is_activated()) {
      if (!training) return run(Scale<A>(), c + 3, one, dy);
      if (geometry.per_stat > 1) return run(GroupGrad<A>(), c, one, dy, x);
      return run(NormalizeGrad<A>(), c, one, dy, x);
    }
    const Vec<A> zero(0), mask = training ? zero == zero : zero;
    with_activation<T>(activation, [&]<typename Act>(const Act& act) {
      if (residual == nullptr)
        run(ActivatedNormalizeGrad<OfInput<A>, Act, A, 1>{act, mask}, c, one, dy, x);
      else
        run(ActivatedNormalizeGrad<typename Act::OfSaved, Act, A, 2>{act, mask}, c, both, dy, x, residual);
    });
  }

  // The coefficients of z. They are those of the forward, so that z has the same bits.
  void set_activation() {
    if (!is_activated()) return;
    const double count = training ? static_cast<double>(geometry.count()) : std::numeric_limits<double>::infinity();
    set_normalize<5>(table, 0, geometry.cells(), mean, invstd, weight.get(), bias.get(), count);
  }

  void set_coefficients(int64_t first, int64_t width, const double* sums, const double* dots) {
    const double count = static_cast<double>(geometry.count());
    const Channels none(centred ? nullptr : new double[width]());  // where the mean is no function of x
    if (!centred) sums = none.get();
    if (geometry.per_stat > 1 || is_activated())
      set_group_grad(table, geometry.per_stat, first, width, sums, dots, count, mean, invstd, weight.get());
    else
      set_normalize_grad(table, first, width, sums, dots, count, mean, invstd, weight.get());
  }
};

ActivatedGradients activated_backward(const GradOperands& o, const GradSpec& s) {
  check_backward(o, s);
  const Tensor x = dense(o.x, s.domain);
  const Geometry geometry = arranged(x, s.domain);
  const Tensor dy = like_layout(o.dy, x);
  const OptionalTensor residual = o.residual ? OptionalTensor(like_layout(*o.residual, x)) : std::nullopt;
  const auto [want_dx, want_dweight, want_dbias] = s.mask;
  const bool maps = want_dx || residual;
  Tensor dx = maps ? empty_output_like(x) : Tensor(), dresidual = residual ? empty_output_like(x) : Tensor();
  const int64_t parameters = x.size(s.domain.parameter_dim);
  auto [dweight, dbias] = make_parameter_gradients(x, o.weight, s.bias_dtype, s.mask, [&](at::ScalarType dtype) {
    return at::detail::empty_cpu({parameters}, dtype);
  });
  if (x.numel() == 0) {
    if (want_dweight) dweight.zero_();
    if (want_dbias) dbias.zero_();
    return {std::move(dx), std::move(dweight), std::move(dbias), std::move(dresidual)};
  }
  const auto leave = [&](const double* dweights, const double* dbiases) {
    if (want_dweight) write_channels(dweight, parameters, dweights);
    if (want_dbias) write_channels(dbias, parameters, dbiases);
  };
  const double *const mean = o.stats.const_data_ptr<double>(), *const invstd = mean + geometry.stats();
  with_dtype(x.scalar_type(), [&](auto like) {
    using scalar_t = decltype(like);
    const auto read = [](const OptionalTensor& t) { return t ? t->const_data_ptr<scalar_t>() : nullptr; };
    const auto write = [](const Tensor& t) { return t.defined() ? t.mutable_data_ptr<scalar_t>() : nullptr; };
    const scalar_t *const dy_in = dy.const_data_ptr<scalar_t>(), *const x_in = x.const_data_ptr<scalar_t>();
    if (has_parameters_within(geometry, s.domain)) {
      const Channels dweights(new double[parameters]), dbiases(new double[parameters]);
      elementwise_backward(geometry, read_channels(o.weight, parameters, 1).get(), dy_in, x_in, write(dx),
                           s.domain.centred, mean, invstd, dweights.get(), dbiases.get());
      return leave(dweights.get(), dbiases.get());
    }
    const PerCell cell_mean(geometry, mean), cell_invstd(geometry, invstd);
    cell_mean.set(0, geometry.cells());
    cell_invstd.set(0, geometry.cells());
    Backward<scalar_t> run{geometry,
                           dy_in,
                           x_in,
                           read(residual),
                           write(dx),
                           write(dresidual),
                           s.training,
                           s.domain.centred,
                           activation_named(s.activation).make(),
                           cell_mean.get(),
                           cell_invstd.get(),
                           read_channels(o.weight, parameters, 1, geometry.batch),
                           s.activation.empty() ? Channels() : read_channels(o.bias, parameters, 0, geometry.batch)};
    if (!want_dweight && !want_dbias && !(want_dx && s.training)) {
      if (maps) run.map_all_cells();
      return;
    }
    run.reduce_and_map();
    for (const Channels* sums : {&run.dweight, &run.dbias}) sum_over_batch(geometry, sums->get());
    leave(run.dweight.get(), run.dbias.get());
  });
  return {std::move(dx), std::move(dweight), std::move(dbias), std::move(dresidual)};
}

Gradients backward(const GradOperands& o, const GradSpec& s) {
  auto [dx, dweight, dbias, none] = activated_backward(o, s);
  return {std::move(dx), std::move(dweight), std::move(dbias)};
}

TORCH_LIBRARY_IMPL(batchnorm_ext, CPU, m) {
  register_backward<backward>(m);
  register_activated_backward<activated_backward>(m);
}

}  // namespace
}  // namespace batchnorm_ext::cpu
