"""The functions of ``torch.nn.functional`` that this library takes over."""

import torch
import torch.nn.functional as F
from torch import Tensor

from batchnorm_ext import _ops
from batchnorm_ext._normalize import normalize

__all__ = ["batch_norm"]


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    r"""Batch normalization, as :func:`torch.nn.functional.batch_norm`.

    .. math:: y = \frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \epsilon}} * \gamma + \beta

    with mean and (biased) variance per channel, over all other dimensions of ``input`` in training,
    from ``running_mean`` and ``running_var`` otherwise. Source: Ioffe & Szegedy, *Batch
    Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift*, 2015,
    algorithms 1 and 2.

    Args:
        input: ``(N, C, *)`` in float32, float64, bfloat16 or float16, in any memory format; the
            output keeps it. Any other input is handed to :func:`torch.nn.functional.batch_norm`.
        running_mean, running_var: ``(C,)``, or both None (then ``training`` must be true). In
            training they move to the statistics of the batch by ``momentum``, the variance to the
            unbiased one.
        weight, bias: gamma and beta, ``(C,)``. These and the running statistics are float32 or of
            input's dtype.
        training: use the statistics of the batch.
        momentum: share of the batch in the new running statistics.
        eps: added to the variance; positive in training.

    Returns:
        Tensor of the shape, dtype and memory format of ``input``.

    Raises:
        ValueError: one value per channel in training; eps out of range; only one running statistic
            given.
        RuntimeError: sizes, dtypes or devices that do not fit together; no running statistics in
            evaluation; running statistics that share memory with each other or with themselves.
        NotImplementedError: integer or boolean input.

        Except for the one about shared memory, these are PyTorch's errors. No tensor is changed.

    Example::

        >>> x = torch.randn(8, 16, 32, 32)
        >>> y = batchnorm_ext.functional.batch_norm(x, None, None, training=True)
        >>> y.mean().abs() < 1e-6, (y.var() - 1).abs() < 1e-3
        (tensor(True), tensor(True))
    """
    if not torch.jit.is_scripting():
        if (
            momentum is not None
            and not _ops.leaves_process()
            and _ops.takes(input, running_mean, running_var, weight, bias)
        ):
            return normalize(
                input, running_mean, running_var, weight, bias, None, None, training, momentum, eps
            )
        return _ops.by_torch(
            input, running_mean, running_var, weight, bias, training, momentum, eps
        )
    return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


_ops.our_function = batch_norm
