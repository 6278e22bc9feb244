#include "recompute.h"

#include <ATen/SavedTensorHooks.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/as_strided.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/PyInterpreter.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <utility>

#include "checks.h"

namespace batchnorm_ext {
namespace {

using at::Tensor;

const void* pack_hook = nullptr;
thread_local Share share_now;

// Spreads the share over outputs of any sizes: what is not taken now makes the next one due, all the more if smaller.
bool is_due(const Tensor& output) {
  const double bytes = static_cast<double>(output.nbytes());
  share_now.due += share_now.share * bytes;
  if (share_now.due < bytes) return false;
  share_now.due -= bytes;
  return true;
}

// What is saved meanwhile is saved as where no hooks are in effect: with a look at its version.
class WithoutHooks {
 public:
  WithoutHooks() : before_(at::SavedTensorDefaultHooks::set_tracing(true)) {}
  ~WithoutHooks() { at::SavedTensorDefaultHooks::set_tracing(before_); }
  WithoutHooks(const WithoutHooks&) = delete;
  WithoutHooks& operator=(const WithoutHooks&) = delete;

 private:
  const bool before_;
};

// The recipe of a tensor that nobody has written to.
std::shared_ptr<Recipe> recipe_of(const at::TensorBase& tensor) {
  if (!tensor.requires_grad() || tensor._version() != 0) return nullptr;
  const auto& node = tensor.grad_fn();
  const auto* const recomputed = dynamic_cast<const Recomputed*>(node.get());
  return recomputed == nullptr ? nullptr : recomputed->recipe;
}

std::optional<Packed> packed(const OptionalTensor& tensor) {
  return tensor ? std::optional<Packed>(*tensor) : std::nullopt;
}

OptionalTensor unpacked(const std::optional<Packed>& tensor) {
  return tensor ? OptionalTensor(tensor->unpack()) : std::nullopt;
}

// Whether sizes and strides alone make the view of its base.
bool is_strided_view(const Tensor& view) {
  return view.scalar_type() == view._base().scalar_type() && !view.is_conj() && !view.is_neg();
}

c10::Stream current_stream(const Tensor& tensor) {
  return c10::impl::VirtualGuardImpl(tensor.device().type()).getStream(tensor.device());
}

int depth_of(const Packed& tensor) { return tensor.recipe() ? tensor.recipe()->depth() : 0; }

}  // namespace

Packed::Packed(const Tensor& tensor) {
  const bool is_view = tensor.is_view();
  if (!is_view)
    recipe_ = recipe_of(tensor);
  else if (is_strided_view(tensor))
    recipe_ = recipe_of(tensor._base());
  if (!recipe_) {
    const WithoutHooks guard;
    kept_.emplace(tensor.tensor_data(), /*is_output=*/false);
  } else if (is_view) {
    view_ = View{tensor.sizes().vec(), tensor.strides().vec(), tensor.storage_offset()};
  }
}

Tensor Packed::unpack() const {
  if (!recipe_) return kept_->unpack();
  const Tensor output = recipe_->output();
  return view_ ? at::as_strided(output, view_->sizes, view_->strides, view_->offset) : output;
}

Recipe::Recipe(const Operands& o, const Tensor& stats, const Spec& s, std::optional<Packed> residual)
    : x_(o.x),
      weight_(packed(o.weight)),
      bias_(packed(o.bias)),
      residual_(std::move(residual)),
      stats_(stats),
      training_(s.training),
      domain_(s.domain),
      activation_(s.activation),
      depth_(1 + std::max(depth_of(x_), residual_ ? depth_of(*residual_) : 0)) {}

Tensor Recipe::output() {
  const c10::Stream stream = current_stream(stats_);
  const std::lock_guard<std::mutex> lock(mutex_);
  if (output_.defined() && stream_ == stream) return output_;
  const at::NoGradGuard no_grad;
  const at::AutoDispatchBelowADInplaceOrView guard;
  const OptionalTensor weight = unpacked(weight_), bias = unpacked(bias_), residual = unpacked(residual_);
  Tensor output = call_map({x_.unpack(), weight, bias, kNone, kNone, kNone, kNone, residual}, stats_,
                           {training_, 0, false, std::nullopt, domain_, activation_});
  if (!output_.defined()) {
    output_ = output;
    stream_ = stream;
  }
  return output;
}

void Recipe::forget() {
  const std::lock_guard<std::mutex> lock(mutex_);
  output_.reset();
}

bool is_recomputing() {
  const auto& hooks = at::SavedTensorDefaultHooks::get_tls_state();
  return !hooks.stack.empty() && !hooks.is_tracing && hooks.stack.top().first.ptr(getPyInterpreter()) == pack_hook;
}

std::shared_ptr<Recipe> recipe_for(const Operands& o, const Tensor& stats, const Spec& s) {
  constexpr int kDeepest = 2;  // more would save little, and hold as many outputs at once in backward
  if (!is_recomputing()) return nullptr;
  const Domain& domain = s.domain;
  if (!is_real(o.x) || !domain.centred || domain.parameter_dim != 1 || has_one_per_cell(o.x, domain)) return nullptr;
  std::optional<Packed> residual = packed(o.residual);
  // Without an activation neither the output nor the residual is saved by the norm itself.
  if (residual && s.activation.empty() && !residual->recipe()) return nullptr;
  auto recipe = std::make_shared<Recipe>(o, stats, s, std::move(residual));
  return recipe->depth() <= kDeepest && is_due(o.x) ? recipe : nullptr;
}

Share set_share(const Share& share) { return std::exchange(share_now, share); }

void set_pack_hook(const void* function) { pack_hook = function; }

}  // namespace batchnorm_ext
