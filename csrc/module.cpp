// The Python module `batchnorm_ext._C`: importing it loads the schemas and the autograd rules; it tells how it was
// built.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_C, m) {
  m.doc() = "Operators of batchnorm_ext";
#if defined(__VERSION__)
  m.attr("compiler") = __VERSION__;
#else
  m.attr("compiler") = "unknown";
#endif
}
