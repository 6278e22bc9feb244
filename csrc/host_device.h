// Functions for host and device.
#pragma once

#if defined(__CUDACC__)
#define BATCHNORM_EXT_HD __host__ __device__ __forceinline__
#else
#define BATCHNORM_EXT_HD inline
#endif
