// The dtypes that an input may have.
#pragma once

#include <c10/core/ScalarType.h>

namespace batchnorm_ext {

// f(T()) with the type of the elements; false, and no call, for a dtype that the kernels do not take.
template <typename F>
bool with_dtype(c10::ScalarType dtype, const F& f) {
  switch (dtype) {
    case c10::ScalarType::Float:
      return f(float()), true;
    case c10::ScalarType::Double:
      return f(double()), true;
    case c10::ScalarType::Half:
      return f(c10::Half()), true;
    case c10::ScalarType::BFloat16:
      return f(c10::BFloat16()), true;
    default:
      return false;
  }
}

}  // namespace batchnorm_ext
