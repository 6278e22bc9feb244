#include "launch.cuh"

namespace batchnorm_ext::cuda {

template void launch(const Forward<__nv_bfloat16>&, const Request&);
template void launch(const Backward<__nv_bfloat16>&, const Request&);

}  // namespace batchnorm_ext::cuda
