#include "launch.cuh"

namespace batchnorm_ext::cuda {

template void launch(const Forward<__nv_bfloat16>&, const Request&);
template void launch(const Backward<__nv_bfloat16>&, const Request&);
template void launch(const ActivatedForward<__nv_bfloat16>&, const Request&);
template void launch(const ActivatedBackward<__nv_bfloat16>&, const Request&);
template void launch_combine(const CombineMoments<__nv_bfloat16>&);
template void launch_combine(const CombineGrads<__nv_bfloat16>&);
template int64_t launch_across(const AcrossForward<__nv_bfloat16>&, bool, int64_t);
template int64_t launch_across(const AcrossBackward<__nv_bfloat16>&, bool, int64_t);

}  // namespace batchnorm_ext::cuda
