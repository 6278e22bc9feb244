"""The functions of ``torch.nn.functional`` that this library takes over."""

import torch
import torch.nn.functional as F
from torch import Tensor

from batchnorm_ext import _ops
from batchnorm_ext._act import batch_norm_act, group_norm_act, instance_norm_act
from batchnorm_ext._native import (
    BATCH_NORM,
    GROUP_NORM,
    INSTANCE_NORM,
    LAYER_NORM,
    LAYER_NORM_OF_CHANNELS,
    RMS_NORM,
)
from batchnorm_ext._normalize import by_operator, normalize
from batchnorm_ext._rows import as_autocast, layer_norm_of_channels, root_mean_square

__all__ = [
    "batch_norm",
    "batch_norm_act",
    "group_norm",
    "group_norm_act",
    "instance_norm",
    "instance_norm_act",
    "layer_norm",
    "rms_norm",
]


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
            training they move to those of the batch by ``momentum``, the variance to the unbiased.
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
            and not (_ops.leaves_process() or _ops.is_for_compiler())
            and _ops.takes(BATCH_NORM, (input, running_mean, running_var, weight, bias))
        ):
            mean, var = running_mean, running_var
            # not as a tuple, which would be built and spread in every call
            return normalize(
                BATCH_NORM, input, mean, var, weight, bias, None, None, training, momentum, eps
            )
        tensors = (input, running_mean, running_var, weight, bias)
        return BATCH_NORM(*tensors, training, momentum, eps)
    return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    r"""Instance normalization, as :func:`torch.nn.functional.instance_norm`.

    .. math:: y = \frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \epsilon}} * \gamma + \beta

    with mean and (biased) variance per sample and channel, over the spatial dimensions. Source:
    Ulyanov, Vedaldi & Lempitsky, *Instance Normalization: The Missing Ingredient for Fast
    Stylization*, 2016, equation 2.

    Args:
        input: ``(N, C, *)`` in float32, float64, bfloat16 or float16, in any memory format; the
            output keeps it. Any other input is handed to PyTorch's function.
        running_mean, running_var: ``(C,)``, or both None. With ``use_input_stats`` they move to the
            average over the samples by ``momentum``, the variance to the unbiased one.
        weight, bias: gamma and beta, ``(C,)``. These and the running statistics are float32 or of
            input's dtype.
        use_input_stats: use the statistics of the input; otherwise the running ones.
        momentum: share of the input in the new running statistics.
        eps: added to the variance.

    Returns:
        Tensor of the shape, dtype and memory format of ``input``.

    Raises:
        ValueError: one element per sample and channel with ``use_input_stats``.
        RuntimeError: sizes, dtypes or devices that do not fit together; no running statistics
            without ``use_input_stats``.

        These are PyTorch's errors. No tensor is changed.

    Example::

        >>> x = torch.randn(8, 16, 32, 32)
        >>> y = batchnorm_ext.functional.instance_norm(x)
        >>> y.mean((2, 3)).abs().max() < 1e-6
        tensor(True)
    """
    if not torch.jit.is_scripting():
        if (
            momentum is not None
            and not _ops.leaves_process()
            and _ops.takes(INSTANCE_NORM, (input, running_mean, running_var, weight, bias))
            and input.dim() > 2
        ):
            groups = input.size(1) if use_input_stats else 0
            if isinstance(weight, Tensor) and torch.is_grad_enabled():
                weight = weight.clone()  # as natively, it may be written to before the backward
            tensors = (input, running_mean, running_var, weight, bias, None, None)
            return normalize(INSTANCE_NORM, *tensors, bool(use_input_stats), momentum, eps, groups)
        tensors = (input, running_mean, running_var, weight, bias)
        return INSTANCE_NORM(*tensors, use_input_stats, momentum, eps)
    return F.instance_norm(
        input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
    )


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    r"""Group normalization, as :func:`torch.nn.functional.group_norm`.

    .. math:: y = \frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \epsilon}} * \gamma + \beta

    with mean and (biased) variance per sample and group of adjacent channels. Source: Wu & He,
    *Group Normalization*, 2018, equations 1, 2 and 7.

    Args:
        input: ``(N, C, *)`` in float32, float64, bfloat16 or float16, in any memory format; the
            output keeps it. Any other input is handed to PyTorch's function.
        num_groups: number of groups, which divides C.
        weight, bias: gamma and beta, ``(C,)``, float32 or of input's dtype.
        eps: added to the variance.

    Returns:
        Tensor of the shape, dtype and memory format of ``input``.

    Raises:
        ValueError: a single sample with one element per group.
        RuntimeError: sizes, dtypes or devices that do not fit together.

        These are PyTorch's errors.

    Example::

        >>> x = torch.randn(8, 16, 32, 32)
        >>> y = batchnorm_ext.functional.group_norm(x, 4)
        >>> y.reshape(8, 4, -1).mean(-1).abs().max() < 1e-6
        tensor(True)
    """
    if not torch.jit.is_scripting():
        y, tensors = None, (input, weight, bias)
        if isinstance(num_groups, int) and not isinstance(num_groups, bool) and num_groups > 0:
            rest = (weight, bias, None, None, True, eps, num_groups, True, 1, None, "")
            y = by_operator(GROUP_NORM, eps, tensors, _ops.batch_norm, as_autocast(input), *rest)
        return GROUP_NORM(input, num_groups, weight, bias, eps) if y is None else y
    return F.group_norm(input, num_groups, weight, bias, eps)


def layer_norm(
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    channel_dim: int | None = None,
) -> Tensor:
    r"""Layer normalization, as :func:`torch.nn.functional.layer_norm`, or over the channels.

    .. math:: y = \frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \epsilon}} * \gamma + \beta

    with mean and (biased) variance over the last dimensions, or, with ``channel_dim``, over the
    channels of each position, as in ConvNeXt. Source: Ba, Kiros & Hinton, *Layer Normalization*,
    2016, equation 3; Liu et al., *A ConvNet for the 2020s*, 2022.

    Args:
        input: ``(*, *normalized_shape)`` or, with ``channel_dim``, ``(N, C, *)``, in float32,
            float64, bfloat16 or float16. Any other input is handed to PyTorch's function, on CUDA
            also one without ``channel_dim``.
        normalized_shape: sizes of the last dimensions, or ``(C,)``.
        weight, bias: gamma and beta of that shape, float32 or of input's dtype.
        eps: added to the variance.
        channel_dim: None or 1.

    Returns:
        Tensor of the shape and dtype of ``input``: contiguous, or with ``channel_dim`` in the
        memory format of ``input``.

    Raises:
        ValueError: another ``channel_dim``.
        RuntimeError: sizes, dtypes or devices that do not fit together, with PyTorch's text.

    Example::

        >>> x = torch.randn(8, 100, 512)
        >>> y = batchnorm_ext.functional.layer_norm(x, (512,))
        >>> y.mean(-1).abs().max() < 1e-6
        tensor(True)
    """
    if channel_dim is not None:
        return layer_norm_of_channels(input, normalized_shape, weight, bias, eps, channel_dim)
    if not torch.jit.is_scripting():
        arguments = (input, normalized_shape, weight, bias, True, eps)
        output = by_operator(LAYER_NORM, eps, (input, weight, bias), _ops.layer_norm, *arguments)
        return LAYER_NORM(input, normalized_shape, weight, bias, eps) if output is None else output
    return F.layer_norm(input, normalized_shape, weight, bias, eps)


def rms_norm(
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    r"""Root mean square normalization, as :func:`torch.nn.functional.rms_norm`.

    .. math:: y = \frac{x}{\sqrt{\mathrm{E}[x^2] + \epsilon}} * \gamma

    with the mean over the last dimensions. Source: Zhang & Sennrich, *Root Mean Square Layer
    Normalization*, 2019, equation 4.

    Args:
        input: ``(*, *normalized_shape)`` in float32, float64, bfloat16 or float16, on a CPU. Any
            other input is handed to PyTorch's function.
        normalized_shape: sizes of the last dimensions.
        weight: gamma of that shape, float32 or of input's dtype.
        eps: added to the mean square. Default: the machine epsilon of the dtype that the statistics
            are computed in.

    Returns:
        Tensor of the shape and dtype of ``input``, contiguous or, as ``input``, channels_last.

    Raises:
        RuntimeError: sizes, dtypes or devices that do not fit together, with PyTorch's text.

    Example::

        >>> x = torch.randn(8, 100, 512)
        >>> y = batchnorm_ext.functional.rms_norm(x, (512,))
        >>> (y.square().mean(-1) - 1).abs().max() < 1e-5
        tensor(True)
    """
    if not torch.jit.is_scripting():
        arguments = (input, normalized_shape, weight, eps)
        output = by_operator(RMS_NORM, eps or 0.0, (input, weight), root_mean_square, *arguments)
        return RMS_NORM(input, normalized_shape, weight, eps) if output is None else output
    return F.rms_norm(input, normalized_shape, weight, eps)


BATCH_NORM.ours, INSTANCE_NORM.ours, GROUP_NORM.ours = batch_norm, instance_norm, group_norm
LAYER_NORM.ours = LAYER_NORM_OF_CHANNELS.ours = layer_norm
RMS_NORM.ours = rms_norm
