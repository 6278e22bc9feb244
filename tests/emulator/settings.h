// What the command line of the test of the kernels says: key=value.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>

namespace batchnorm_ext::cuda {

class Settings {
 public:
  Settings(int count, char** arguments) {
    for (int i = 1; i < count; ++i) {
      const std::string argument = arguments[i];
      const auto equals = std::min(argument.find('='), argument.size());
      const std::string key = argument.substr(0, equals);
      if (values_.count(key) == 0) misuse(argument);
      values_[key] = argument.substr(equals + 1);
    }
  }

  const std::string& text(const std::string& key) const { return values_.at(key); }
  int64_t number(const std::string& key) const { return std::stoll(text(key)); }
  bool is(const std::string& key, const std::string& value) const { return text(key) == value; }

  [[noreturn]] static void misuse(const std::string& argument) {
    std::fprintf(stderr, "unknown: %s\n", argument.c_str());
    std::exit(2);
  }

 private:
  std::map<std::string, std::string> values_{
      {"op", "forward"},       // eval moments apply scale, backward eval_backward sums_backward grad_moments grad_apply
      {"dtype", "f32"},        // f64 f16 bf16
      {"outer", "2"},          // the geometry
      {"stats", "3"},          // its channels
      {"inner", "4"},          // its runs
      {"batch", "1"},          // samples that have statistics of their own
      {"per_stat", "1"},       // channels of a statistic, where cells are combined
      {"data", "normal"},      // shifted outlier constant huge tiny loud limit spike nan inf
      {"gradient", "normal"},  // loud
      {"activation", ""},      // silu, leaky_relu; empty: the kernels that know of none
      {"residual", "0"},       // 1: added before it
      {"data_seed", "1"},      // of all numbers
      {"aligned", "1"},        // 0: tensors start off the alignment of packs
      {"parameters", "f32"},   // same: of the type of the input
      {"momentum", "0.25"},    // none: the cumulative average
      {"total", "-1"},         // elements behind the sums that apply and grad_apply get; -1: twice those at hand
      {"plan", ""},            // as BATCHNORM_EXT_CUDA_PLAN
      {"sms", "4"},            // the device
      {"shared", "131072"},    // its shared memory, in bytes
      {"cooperative", "1"},    // 0: it has no cooperative launches
      {"seed", "1"},           // of the schedule
  };
};

}  // namespace batchnorm_ext::cuda
