#include "launch.cuh"

namespace batchnorm_ext::cuda {

template void launch(const Forward<double>&, const Request&);
template void launch(const Backward<double>&, const Request&);

}  // namespace batchnorm_ext::cuda
