#include "launch.cuh"

namespace batchnorm_ext::cuda {

template void launch(const Forward<float>&, const Request&);
template void launch(const Backward<float>&, const Request&);
template void launch(const ActivatedForward<float>&, const Request&);
template void launch(const ActivatedBackward<float>&, const Request&);
template void launch_combine(const CombineMoments<float>&);
template void launch_combine(const CombineGrads<float>&);
template int64_t launch_across(const AcrossForward<float>&, bool, int64_t);
template int64_t launch_across(const AcrossBackward<float>&, bool, int64_t);

}  // namespace batchnorm_ext::cuda
