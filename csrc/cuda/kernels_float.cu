#include "launch.cuh"

namespace batchnorm_ext::cuda {

template void launch(const Forward<float>&, const Request&);
template void launch(const Backward<float>&, const Request&);

}  // namespace batchnorm_ext::cuda
