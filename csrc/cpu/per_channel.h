// A tensor with one value per channel, of any of the floating dtypes, seen as fp64.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

namespace batchnorm_ext::cpu {

class PerChannel {
 public:
  // An absent tensor reads as `absent` everywhere.
  static PerChannel read(const std::optional<at::Tensor>& tensor, double absent) {
    return tensor ? PerChannel(*tensor, const_cast<void*>(tensor->const_data_ptr())) : PerChannel(absent);
  }
  static PerChannel write(const std::optional<at::Tensor>& tensor) {
    return tensor && tensor->defined() ? PerChannel(*tensor, tensor->mutable_data_ptr()) : PerChannel(0);
  }

  double operator[](int64_t c) const {
    const int64_t at = c * stride_;
    switch (dtype_) {
      case at::kFloat:
        return static_cast<const float*>(data_)[at];
      case at::kDouble:
        return static_cast<const double*>(data_)[at];
      case at::kBFloat16:
        return static_cast<float>(static_cast<const at::BFloat16*>(data_)[at]);
      case at::kHalf:
        return static_cast<float>(static_cast<const at::Half*>(data_)[at]);
      default:
        return absent_;
    }
  }

  // Does nothing for an absent tensor.
  void set(int64_t c, double value) const {
    const int64_t at = c * stride_;
    switch (dtype_) {
      case at::kFloat:
        static_cast<float*>(data_)[at] = static_cast<float>(value);
        break;
      case at::kDouble:
        static_cast<double*>(data_)[at] = value;
        break;
      case at::kBFloat16:
        static_cast<at::BFloat16*>(data_)[at] = static_cast<float>(value);
        break;
      case at::kHalf:
        static_cast<at::Half*>(data_)[at] = static_cast<float>(value);
        break;
      default:
        break;
    }
  }

 private:
  explicit PerChannel(double absent) : absent_(absent) {}
  PerChannel(const at::Tensor& tensor, void* data)
      : data_(data), dtype_(tensor.scalar_type()), stride_(tensor.dim() == 1 ? tensor.stride(0) : 1) {}

  void* data_ = nullptr;
  at::ScalarType dtype_ = at::ScalarType::Undefined;
  int64_t stride_ = 0;
  double absent_ = 0;
};

}  // namespace batchnorm_ext::cpu
