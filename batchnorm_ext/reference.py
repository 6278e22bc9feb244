"""Batch normalization in plain PyTorch and float64: the oracle of the tests.

Written from the paper, without the kernels: S. Ioffe and C. Szegedy, "Batch Normalization:
Accelerating Deep Network Training by Reducing Internal Covariate Shift", ICML 2015,
https://arxiv.org/abs/1502.03167. The paper's equations are cited as "Alg. 1, line k" (the
transform, lines counted from 1), "Alg. 2, step 10/11" (inference) and "Sec. 3" (the gradient).

Every function returns new float64 tensors and changes none of its arguments.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Forward", "Backward", "batch_norm", "batch_norm_backward"]


class Forward(NamedTuple):
    """What :func:`batch_norm` computes, all float64 but the count.

    Attributes:
        y: the normalized input, of the size of the input.
        stats: ``[2, C]``: the mean and the inverse standard deviation that were used.
        running_mean, running_var: ``[C]``, after the update, or None.
        num_batches_tracked: the count after the update, or None.
    """

    y: Tensor
    stats: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None


class Backward(NamedTuple):
    """What :func:`batch_norm_backward` computes, all float64.

    Attributes:
        dx: the gradient of the input, of its size.
        dweight, dbias: ``[C]``.
    """

    dx: Tensor
    dweight: Tensor
    dbias: Tensor


def reduced_dims(x: Tensor) -> list[int]:
    """The dimensions that a statistic of ``x`` runs over: all but the channel."""
    return [d for d in range(x.dim()) if d != 1]


def along_channels(per_channel: Tensor, x: Tensor) -> Tensor:
    """``per_channel``, viewed so that it broadcasts along the channels of ``x``."""
    return per_channel.reshape([-1 if d == 1 else 1 for d in range(x.dim())])


def _double(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().double()


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Alg. 1, lines 1 and 2, in two passes; a second look at the mean takes out its rounding."""
    mean = x.mean(reduced_dims(x))
    mean = mean + (x - along_channels(mean, x)).mean(reduced_dims(x))
    return mean, (x - along_channels(mean, x)).square().mean(reduced_dims(x))


def batch_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
) -> Forward:
    """Batch normalization of ``x`` and what becomes of the running statistics.

    In training the statistics are those of the batch (Alg. 1), the running ones move towards
    them by ``momentum``, or by ``1 / num_batches_tracked`` where ``momentum`` is None, which
    makes them the plain average over the batches (Alg. 2, step 10). In evaluation the running
    statistics are used (Alg. 2, step 11) and stay as they are. An empty batch has no
    statistics: they are NaN, and nothing is tracked.

    Args:
        x: ``(N, C, ...)``, of any floating dtype; computed in float64 from there.
        weight, bias: ``[C]`` or None.
        running_mean, running_var: ``[C]`` or None; needed in evaluation.
        num_batches_tracked: an int64 scalar or None; needed for ``momentum=None``.
        training, momentum, eps: as in :func:`torch.nn.functional.batch_norm`.

    Example:
        >>> x = torch.tensor([[1.0], [3.0]])
        >>> batch_norm(x, training=True, eps=0.0).y.tolist()
        [[-1.0], [1.0]]
    """
    x, weight, bias = x.detach().double(), _double(weight), _double(bias)
    running_mean, running_var = _double(running_mean), _double(running_var)
    mean, var = _moments(x) if training else (running_mean, running_var)
    invstd = (var + eps).rsqrt()
    y = (x - along_channels(mean, x)) * along_channels(invstd, x)  # Alg. 1, line 3
    if weight is not None:
        y = y * along_channels(weight, x)  # Alg. 1, line 4
    if bias is not None:
        y = y + along_channels(bias, x)
    if training and x.numel() > 0:
        if num_batches_tracked is not None:
            num_batches_tracked = num_batches_tracked + 1
        if running_mean is not None:
            factor = 1 / num_batches_tracked.item() if momentum is None else momentum
            count = x.numel() // x.size(1)
            unbiased = var * (count / (count - 1))  # Alg. 2, step 10
            running_mean = (1 - factor) * running_mean + factor * mean
            running_var = (1 - factor) * running_var + factor * unbiased
    return Forward(y, torch.stack([mean, invstd]), running_mean, running_var, num_batches_tracked)


def batch_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, stats: Tensor, training: bool
) -> Backward:
    """The gradient of :func:`batch_norm`, in closed form.

    Sec. 3 gives six equations. With ``xhat = (x - mean) * invstd``, those for the weight and
    the bias are::

        dweight = sum(dy * xhat)        dbias = sum(dy)

    and those for the variance and the mean, put into the one for the input, collapse to::

        dx = weight * invstd * (dy - dbias / m - xhat * dweight / m),    m = elements per channel

    In evaluation the statistics do not depend on ``x`` and only the first term is left.

    Args:
        dy: the gradient of ``y``, of the size of ``x``.
        x: the input of the forward.
        weight: ``[C]`` or None.
        stats: ``[2, C]``, from the forward.
        training: whether the statistics were those of the batch.

    Example:
        >>> x = torch.tensor([[1.0], [3.0]])
        >>> stats = batch_norm(x, training=True).stats
        >>> batch_norm_backward(torch.ones_like(x), x, None, stats, training=True).dbias.tolist()
        [2.0]
    """
    dy, x, weight = dy.detach().double(), x.detach().double(), _double(weight)
    mean, invstd = stats.double()
    xhat = (x - along_channels(mean, x)) * along_channels(invstd, x)
    dweight = (dy * xhat).sum(reduced_dims(x))
    dbias = dy.sum(reduced_dims(x))
    dx = dy
    if training:
        count = x.numel() // max(x.size(1), 1)
        dx = dx - along_channels(dbias / count, x) - xhat * along_channels(dweight / count, x)
    scale = invstd if weight is None else weight * invstd
    return Backward(dx * along_channels(scale, x), dweight, dbias)
