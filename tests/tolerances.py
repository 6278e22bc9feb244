"""Every error bound of the tests, with its reason.

The kernels accumulate in float32 (float64 for float64 inputs), merge partial sums in float64 and round once to the
dtype of the output. The oracle computes in float64 from the same rounded inputs. So an error has two parts: a
multiple of the unit roundoff of the accumulation, relative to the terms that are added up, and half an ulp of the
output dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _accumulation_units(dtype: torch.dtype) -> float:
    """The factor from the float32 bounds below to those of this input dtype.

    For float64 the bounds shrink with the unit roundoff, times 2: there the oracle is no more exact than the kernel.
    """
    if dtype is torch.float64:
        return 2 * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    return 1.0


def half_ulp(expected: Tensor, dtype: torch.dtype) -> Tensor:
    """The rounding of ``expected`` to ``dtype``: half an ulp, or half the spacing of the subnormal numbers."""
    info = torch.finfo(dtype)
    return (info.eps / 2 * expected.abs()).clamp(min=info.smallest_normal * info.eps / 2)


def normalized(dtype: torch.dtype, mean_over_std: float) -> float:
    """The error of ``(x - mean) / std``, and of the mean and the std relative to the std, before the last rounding.

    4e-7 is 7 roundings in float32: about 4 of the affine map, the rest of the moments. 1e-5 is asked for where the
    mean is 1e4 standard deviations; the coefficient of the ratio is what connects the two.
    """
    return _accumulation_units(dtype) * (4e-7 + 1e-9 * mean_over_std)


def output(expected: Tensor, dtype: torch.dtype, mean_over_std: float) -> Tensor:
    """The error of ``y``: that of the normalized values, on the scale of the output, and half an ulp."""
    scale = max(1.0, expected.abs().max().item())
    return normalized(dtype, mean_over_std) * scale + half_ulp(expected, dtype)


def gradient(expected: Tensor, terms: Tensor, dtype: torch.dtype, mean_over_std: float) -> Tensor:
    """The error of ``dx``, a difference of terms that may cancel: relative to the largest sum of their magnitudes.

    Twice the bound of the output, since two averages and the normalized value, each with its own error, enter.
    """
    scale = terms.max().item() if terms.numel() else 0.0
    return 2 * normalized(dtype, mean_over_std) * scale + half_ulp(expected, dtype)


def gradient_sum(
    expected: Tensor, magnitudes: Tensor, dtype: torch.dtype, out_dtype: torch.dtype, mean_over_std: float
) -> Tensor:
    """The error of ``dweight`` and ``dbias``, per channel: relative to the sum of the magnitudes of the summands.

    Twice the bound of the output: a float32 lane sums a tile of a few dozen elements before it is merged in
    float64, and the normalized value in each summand has an error of its own.
    """
    return 2 * normalized(dtype, mean_over_std) * magnitudes + half_ulp(expected, out_dtype)


# Native NCHW kernels and ours round equally often, so that of the largest errors over an array either may come out
# ahead by luck; 1.5 covers that and is far from the factors of 10 to 1e6 that a bad summation costs.
NATIVE_SLACK = 1.5
