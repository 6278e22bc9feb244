#include "launch.cuh"

namespace batchnorm_ext::cuda {

template void launch(const Forward<double>&, const Request&);
template void launch(const Backward<double>&, const Request&);
template void launch_combine(const CombineMoments<double>&);
template void launch_combine(const CombineGrads<double>&);

}  // namespace batchnorm_ext::cuda
