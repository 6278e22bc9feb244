// Large outputs: from which size on they are streamed, and where their memory comes from.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <cstdint>

namespace batchnorm_ext::cpu {

// Outputs from this size on are written past the caches, where they would only push their own input out. Smaller ones
// stay for whoever reads them next. A quarter of the last-level cache: input, gradient and output share it with other
// threads. Half of it made the backward of 32x128x28x28 and 32x256x28x28 (float32, channels_last) 10 % slower (AMD
// EPYC, 2 cores, 32 MB, tcmalloc).
int64_t stream_bytes();

constexpr size_t kAdvisedBytes = size_t{32} << 20;  // glibc takes such blocks from the system each time

// Uninitialized, with the sizes, strides and dtype of the dense tensor x.
at::Tensor empty_output_like(const at::Tensor& x);

}  // namespace batchnorm_ext::cpu
