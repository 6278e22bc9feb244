"""Every error bound of the tests against the oracle, with its reason.

The kernels accumulate in float32 (float64 for float64 inputs), merge partial sums in float64
and round once to the dtype of the output; the oracle computes in float64 from the same rounded
inputs. So an error has two parts: a few roundings of the accumulation, relative to the terms
that are added up, and half an ulp of the output dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

# A float32 lane whose first element is an outlier holds a sum of squares of the outlier's
# magnitude, and rounds to that while it adds the others; no other lane averages this out.
# On a GPU a lane sees more elements: 2.05e-6 was the largest error found.
OUTLIER = {"cpu": 2e-6, "cuda": 2.5e-6}

# A native NCHW kernel and ours round equally often, so that the largest of their errors over an
# array differ by luck, up to the rounding of the output itself. Bad summation costs factors of
# 10 to 1e6. In float64 on a GPU the map's coefficients are rounded where native computes with
# more: 1.9 eps was the largest difference found.
LUCK = 0.5
LUCK_OF_FLOAT64_ON_A_GPU = 2.0


def half_ulp(expected: Tensor, dtype: torch.dtype) -> Tensor:
    """The rounding of ``expected`` to ``dtype``; subnormal numbers have a fixed spacing."""
    info = torch.finfo(dtype)
    return info.eps / 2 * expected.abs().clamp(min=info.smallest_normal)


def normalized(dtype: torch.dtype, mean_over_std: float) -> float:
    """The error of ``(x - mean) / std``, and of mean and std in units of std.

    float32: 4e-7, about 7 roundings: 4 of the affine map, the rest of the moments. The mean is
    known to twice the precision and the moments are taken about a centre within the data, so
    that the bound does not grow with the distance of the channel from zero. float64: four times as
    many roundings, for the merge of the partial sums and the oracle are no finer than the sums;
    and the mean itself is rounded.
    """
    if dtype is torch.float64:
        return torch.finfo(dtype).eps * (14 + 4 * mean_over_std)
    return 4e-7


def output(expected: Tensor, dtype: torch.dtype, mean_over_std: float) -> Tensor:
    """The error of ``y``: of the normalized values, on the scale of the output, and half an ulp."""
    scale = max(1.0, expected.abs().max().item())
    return normalized(dtype, mean_over_std) * scale + half_ulp(expected, dtype)


def gradient(
    expected: Tensor,
    magnitudes: Tensor,
    dtype: torch.dtype,
    mean_over_std: float,
    out_dtype: torch.dtype,
) -> Tensor:
    """The error of a gradient, a sum that may cancel: relative to its terms' magnitudes.

    The error of each term is that of the normalized values in it; the sum over a tile of a few
    dozen elements in a float32 lane adds less than that, since its roundings have either sign.
    """
    return normalized(dtype, mean_over_std) * magnitudes + half_ulp(expected, out_dtype)


def between(expected: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """The difference of two implementations, each with the error of ``normalized``.

    Native PyTorch's error on contiguous NCHW batches of a few dozen elements is as small, and both
    round the result. ``scale`` is the largest magnitude of the terms that are added up. In half
    precision native rounds also the mean and the affine map, to a few units of the largest values.
    """
    expected = expected.double()
    finite = expected[expected.isfinite()]
    scale = max(scale, finite.abs().max().item() if finite.numel() else 0.0)
    bound = 2 * (normalized(dtype, 1.0) * scale + half_ulp(expected, dtype))
    return bound + 2 * torch.finfo(dtype).eps * scale if dtype.itemsize == 2 else bound


def large_values(
    dtype: torch.dtype, x: Tensor, mean: Tensor, reach: Tensor, factor: Tensor
) -> Tensor:
    """What ``(x - mean) * factor`` may lose besides, in the dtype that the kernels compute in.

    A factor below the smallest normal number is rounded to a multiple of the smallest one. Where
    ``x - mean`` may overflow, the map is ``x * factor - mean * factor`` and its last term is
    rounded. All are values per channel: the largest ``x``, and how far it may be from the mean.
    """
    info = torch.finfo(torch.promote_types(dtype, torch.float32))
    overflows = (mean.abs() >= info.max * info.eps / 4) & (reach >= info.max / 2)
    rounding = info.eps / 2 * (mean * factor).abs()
    return info.tiny * info.eps * (x / 2 + mean.abs() / 2) + torch.where(overflows, rounding, 0.0)
