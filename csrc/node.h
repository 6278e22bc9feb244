// A node of the autograd graph, made by hand. torch::autograd::Function::apply also handles what no call here has, such
// as inputs that are written to, and copies what it could be asked for: that takes as long as a small kernel.
#pragma once

#include <ATen/FuncTorchTLS.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>

#include <memory>
#include <string>
#include <type_traits>
#include <utility>

#include "ops.h"
#include "recompute.h"

namespace batchnorm_ext {

inline bool requires_grad(const at::Tensor& tensor) { return tensor.defined() && tensor.requires_grad(); }
inline bool requires_grad(const OptionalTensor& tensor) { return tensor && requires_grad(*tensor); }

template <typename... Tensors>
bool is_differentiated(const Tensors&... tensors) {
  return at::GradMode::is_enabled() && (requires_grad(tensors) || ...);
}

// Rule: a static backward(context, gradients) that gives one gradient for each input, and a name.
template <typename Rule>
struct NodeOf final : torch::autograd::CppNode<Rule>, Recomputed {
  std::string name() const override { return Rule::name; }  // otherwise read from a symbol in each backward

  torch::autograd::variable_list apply(torch::autograd::variable_list&& gradients) override {
    auto result = torch::autograd::CppNode<Rule>::apply(std::move(gradients));
    if (recipe) recipe->forget();  // what reads the output has run before
    return result;
  }

  void release_variables() override {
    torch::autograd::CppNode<Rule>::release_variables();
    recipe.reset();
  }
};

// They are counted by shared_ptr in torch 2.11.
template <typename Node, typename Pointer = decltype(torch::autograd::Edge::function)>
auto make_node() {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<torch::autograd::Node>>)
    return std::shared_ptr<Node>(new Node(), [](auto* node) { deleteNode(node); });
  else
    return c10::make_intrusive<Node>();
}

// Calls forward(node), and gives its output the derivative of the rule with respect to these inputs, tensors or
// optional ones. What the rule saves it saves in `forward`.
template <typename Rule, typename Forward, typename... Inputs>
at::Tensor recorded(const Forward& forward, const Inputs&... inputs) {
  const auto& functorch = at::functorch::functorchTLSAccessor();
  if (functorch) functorch->checkSupportsCppAutogradFunction();
  const auto node = make_node<NodeOf<Rule>>();
  node->set_ctx_grad_fn(node);
  node->set_next_edges(torch::autograd::collect_next_edges(inputs...));
  node->is_variable_input_.assign(sizeof...(inputs), true);
  at::Tensor output = [&] {
    const at::AutoGradMode no_grad(false);
    return forward(*node);
  }();
  torch::autograd::set_history(output, node);
  node->output_info_.emplace_back(output);
  node->save_variables_to_ctx();
  return output;
}

}  // namespace batchnorm_ext
