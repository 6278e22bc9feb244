#include "launch.cuh"

namespace batchnorm_ext::cuda {

template void launch(const Forward<double>&, const Request&);
template void launch(const Backward<double>&, const Request&);
template void launch_combine(const CombineMoments<double>&);
template void launch_combine(const CombineGrads<double>&);
template int64_t launch_across(const AcrossForward<double>&, bool, int64_t);
template int64_t launch_across(const AcrossBackward<double>&, bool, int64_t);

}  // namespace batchnorm_ext::cuda
