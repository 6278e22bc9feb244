#include "launch.cuh"

namespace batchnorm_ext::cuda {

template void launch(const Forward<__half>&, const Request&);
template void launch(const Backward<__half>&, const Request&);

}  // namespace batchnorm_ext::cuda
