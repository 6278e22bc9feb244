// Sums over the ranks of a process group, differentiable, and errors that say whose they are.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/custom_function.h>

#include <stdexcept>
#include <string>
#include <utility>

#include "checks.h"

namespace batchnorm_ext {

// Starts the sum over ranks; wait() gives it. Boxed, since PyTorch's versions differ in the type of the group's name.
inline at::Tensor all_reduce(const at::Tensor& local, const std::string& group) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("_c10d_functional::all_reduce", "");
  torch::jit::Stack stack = {local, std::string("sum"), group};
  op.callBoxed(stack);
  return std::move(stack[0]).toTensor();
}

inline at::Tensor wait(const at::Tensor& pending) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("_c10d_functional::wait_tensor", "")
                             .typed<at::Tensor(const at::Tensor&)>();
  return op.call(pending);
}

// The sum over ranks, whose gradient is that sum again: what one rank puts in comes out on every other.
struct SumOverRanks : torch::autograd::Function<SumOverRanks> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& local, const std::string& group) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->saved_data["group"] = group;
    return wait(all_reduce(local, group));
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    return {SumOverRanks::apply(grads[0], ctx->saved_data["group"].toStringRef()), at::Tensor()};
  }
};

// The ranks that share their statistics, and the layer on whose behalf. No group: the batch at hand is all there is.
struct Ranks {
  std::string group, layer;

  bool alone() const { return group.empty(); }

  // Runs f; an error there, in the forward or the backward, says in which layer, on which rank and with which input.
  template <typename F>
  auto named(const char* direction, const at::Tensor& x, const F& f) const {
    const auto where = [&] {
      return c10::str("in the ", direction, " of ", layer, ", with an input of size (", comma_separated_size(x),
                      ") in ", x.scalar_type());
    };
    try {
      return f();
    } catch (c10::Error& error) {
      error.add_context(where());
      throw;
    } catch (const std::runtime_error& error) {  // gloo's
      C10_THROW_ERROR(Error, c10::str(error.what(), " (", where(), ")"));
    }
  }
};

}  // namespace batchnorm_ext
