"""What no operator does by itself: rows along the channels, the default of root mean squares."""

import torch
import torch.nn.functional as F
from torch import Tensor

from batchnorm_ext import _ops
from batchnorm_ext._native import LAYER_NORM, LAYER_NORM_OF_CHANNELS
from batchnorm_ext._normalize import by_operator

__all__ = ["as_autocast", "default_rms_eps", "layer_norm_of_channels", "root_mean_square"]


def as_autocast(input: Tensor) -> Tensor:
    """``input`` as autocast gives it to PyTorch's function, which runs in float32 on CUDA."""
    if input.is_cuda and input.dtype.itemsize == 2 and torch.is_autocast_enabled("cuda"):
        return input.float()
    return input


def layer_norm_of_channels(
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    channel_dim: int,
) -> Tensor:
    """Layer normalization over the channels of each position of ``(N, C, *)``."""
    if channel_dim != 1:
        raise ValueError(f"expected channel_dim to be None or 1, got {channel_dim}")
    if not torch.jit.is_scripting():
        tensors = (input, weight, bias)
        arguments = (*tensors, normalized_shape, eps)
        output = by_operator(LAYER_NORM_OF_CHANNELS, eps, tensors, _over_channels, *arguments)
        if output is not None:
            return output
        rows = input.movedim(1, -1)
        return LAYER_NORM(rows, normalized_shape, weight, bias, eps).movedim(-1, 1)
    rows = input.movedim(1, -1)
    return F.layer_norm(rows, normalized_shape, weight, bias, eps).movedim(-1, 1)


def _over_channels(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    normalized_shape: list[int],
    eps: float,
) -> Tensor | None:
    if input.dim() < 3 or input.shape[1:2] != tuple(normalized_shape):
        return None
    if input.is_cuda and _are_rows(input, weight, bias):
        return None
    x = as_autocast(input).flatten(2).transpose(1, 2)  # (N, positions, C), of the same memory
    y = _ops.batch_norm(x, weight, bias, None, None, True, eps, x.size(1), True, 2, None, "")
    return y.transpose(1, 2).reshape(input.shape)


def _are_rows(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether the channels of each position are a row that PyTorch's kernel takes as it is."""
    fits = all(p is None or p.dtype == input.dtype for p in (weight, bias))
    return fits and input.movedim(1, -1).is_contiguous()


# PyTorch's versions differ: of a half precision the default is its own or that of float32.
_HALF_HAS_ITS_OWN = F.rms_norm(torch.full((1,), 1e-3, dtype=torch.bfloat16), (1,)).item() < 0.5


def default_rms_eps(dtype: torch.dtype) -> float:
    """What ``torch.nn.functional.rms_norm`` adds to the mean square if ``eps`` is None."""
    if dtype.itemsize < 4 and not _HALF_HAS_ITS_OWN:
        dtype = torch.float32
    return torch.finfo(dtype).eps


def root_mean_square(
    input: Tensor, normalized_shape: list[int], weight: Tensor | None, eps: float | None
) -> Tensor:
    """The operator of layer normalization, not centred."""
    if eps is None:
        eps = default_rms_eps(input.dtype)
    return _ops.layer_norm(input, normalized_shape, weight, None, False, eps)
