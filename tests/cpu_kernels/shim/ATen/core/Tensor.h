// The kernels know tensors by name alone.
#pragma once

namespace at {
class Tensor;
}
