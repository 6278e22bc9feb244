#include "launch.cuh"

namespace batchnorm_ext::cuda {

template void launch(const Forward<__half>&, const Request&);
template void launch(const Backward<__half>&, const Request&);
template void launch(const ActivatedForward<__half>&, const Request&);
template void launch(const ActivatedBackward<__half>&, const Request&);
template void launch_combine(const CombineMoments<__half>&);
template void launch_combine(const CombineGrads<__half>&);
template int64_t launch_across(const AcrossForward<__half>&, bool, int64_t);
template int64_t launch_across(const AcrossBackward<__half>&, bool, int64_t);

}  // namespace batchnorm_ext::cuda
