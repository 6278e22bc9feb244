// Views that carry the negative bit, as the imaginary part of a conjugated tensor does: the kernels read memory as it
// is. PyTorch resolves the arguments of the other operators by itself, but not of those that write several tensors.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "checks.h"
#include "ops.h"

namespace batchnorm_ext {
namespace {

OptionalTensor resolved(const OptionalTensor& tensor) { return tensor ? tensor->resolve_neg() : tensor; }

Normalized forward(const Operands& o, const Spec& s) {
  check_operands(o, s);  // of the views: what is resolved requires no gradient and lies elsewhere
  check_memory(o, s);
  const OptionalTensor weight = resolved(o.weight), bias = resolved(o.bias), sums = resolved(o.sums);
  const OptionalTensor residual = resolved(o.residual);
  const OptionalTensor mean = resolved(o.running_mean), var = resolved(o.running_var);
  const OptionalTensor batches = resolved(o.num_batches_tracked);
  Normalized result = call_forward({o.x.resolve_neg(), weight, bias, mean, var, batches, sums, residual}, s);
  if (!s.update) return result;
  for (const auto& [view, moved] : {std::pair{&o.running_mean, &mean}, std::pair{&o.running_var, &var},
                                    std::pair{&o.num_batches_tracked, &batches}})
    if (*view && (*view)->is_neg()) (*view)->copy_(**moved);
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(batchnorm_ext, Negative, m) {
  register_forward<forward>(m);
  register_apply<forward>(m);
}

}  // namespace batchnorm_ext
