// The Python module `batchnorm_ext._C`: importing it loads the schemas and the autograd rules; it tells how it was
// built, and by which words a refusal is known.
#include <pybind11/pybind11.h>

#include "checks.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Operators of batchnorm_ext";
  m.attr("refusal") = batchnorm_ext::kRefusal;
#if defined(__VERSION__)
  m.attr("compiler") = __VERSION__;
#else
  m.attr("compiler") = "unknown";
#endif
}
