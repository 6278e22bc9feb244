"""What the tests of the operators' CUDA side on the host share.

It is registered for CUDA and called with tensors of the CPU, past the dispatcher's choice.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from cases import DTYPES

CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
EPS = 1e-5

every_dtype = pytest.mark.parametrize("dtype", DTYPES)
needs_glue = pytest.mark.usefixtures("glue", "nan_in_fresh_memory")


class Ops:
    """The operators of this library, as on CUDA."""

    def __getattr__(self, name: str) -> partial:
        return partial(getattr(torch.ops.batchnorm_ext, name).default.redispatch, CUDA)


ops = Ops()


AFFINE = {
    "parameters of the input's dtype": lambda c, dtype: torch.randn(2, c).to(dtype),
    "float32 parameters": lambda c, dtype: (torch.randn(c), torch.randn(2 * c)[::2]),
    "zero weights": lambda c, dtype: (torch.randn(c) * (torch.arange(c) % 3 > 0), None),
    "only zero weights": lambda c, dtype: (torch.zeros(c), torch.randn(c)),
    "no parameters": lambda c, dtype: (None, None),
}
