#include "launch.cuh"

namespace batchnorm_ext::cuda {

template void launch(const Forward<float>&, const Request&);
template void launch(const Backward<float>&, const Request&);
template void launch_combine(const CombineMoments<float>&);
template void launch_combine(const CombineGrads<float>&);

}  // namespace batchnorm_ext::cuda
