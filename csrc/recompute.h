// Outputs of norms that autograd does not keep for what reads them, but maps again when backward needs them.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Stream.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "ops.h"

namespace batchnorm_ext {

class Recipe;

// What the hooks of recompute_activations hold for a tensor that autograd saves: the tensor, or how to compute it.
class Packed {
 public:
  explicit Packed(const at::Tensor& tensor);

  // Raises what autograd raises if the tensor has been written to since.
  at::Tensor unpack() const;
  const std::shared_ptr<Recipe>& recipe() const { return recipe_; }

 private:
  struct View {
    std::vector<int64_t> sizes, strides;
    int64_t offset;
  };

  std::shared_ptr<Recipe> recipe_;
  std::optional<View> view_;  // of the output that the recipe computes
  // Without its history, which may lead back to what saves it.
  std::optional<torch::autograd::SavedVariable> kept_;
};

// How to map the output of a norm again, from what the norm saves for its own backward.
class Recipe {
 public:
  Recipe(const Operands& o, const at::Tensor& stats, const Spec& s, std::optional<Packed> residual);

  // Computed once until forget(), and again for each reader on another stream.
  at::Tensor output();
  void forget();

  // How many outputs are computed one after the other for this one.
  int depth() const { return depth_; }

 private:
  Packed x_;
  std::optional<Packed> weight_, bias_, residual_;
  at::Tensor stats_;
  bool training_;
  Domain domain_;
  std::string activation_;
  int depth_;

  std::mutex mutex_;
  at::Tensor output_;
  std::optional<c10::Stream> stream_;  // that output_ was computed on
};

// A node whose output may have a recipe.
struct Recomputed {
  std::shared_ptr<Recipe> recipe;
  virtual ~Recomputed() = default;
};

// Whether the hooks of recompute_activations are the ones in effect.
bool is_recomputing();

// None where is_recomputing() is false, where no kernel maps again, and where more would be kept than without.
std::shared_ptr<Recipe> recipe_for(const Operands& o, const at::Tensor& stats, const Spec& s);

// Which of the outputs that could be computed again are, in one thread: this share of their bytes.
struct Share {
  double share = 1;
  double due = 0;  // bytes that are to be computed again
};

Share set_share(const Share& share);  // returns the one before

// Tells by what the hooks of recompute_activations are known: the function that packs, a PyObject.
void set_pack_hook(const void* function);

}  // namespace batchnorm_ext
