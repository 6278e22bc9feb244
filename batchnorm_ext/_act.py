"""Normalization, the addition of a residual and an activation in one pass."""

import torch
from torch import Tensor

from batchnorm_ext import _ops
from batchnorm_ext._activations import activation_name, can_fuse, then
from batchnorm_ext._native import BATCH_NORM, GROUP_NORM, INSTANCE_NORM, Native
from batchnorm_ext._normalize import by_operator, normalize
from batchnorm_ext._rows import as_autocast

__all__ = [
    "batch_norm_act",
    "check_residual",
    "group_norm_act",
    "instance_norm_act",
]


def check_residual(input: Tensor, residual: Tensor | None) -> None:
    if residual is None:
        return
    if not isinstance(residual, Tensor):
        raise TypeError(f"expected residual to be a tensor or None, got {residual!r}")
    if _ops.leaves_process():
        return  # a trace would keep the comparison
    for what in ("shape", "dtype", "device"):
        expected, found = getattr(input, what), getattr(residual, what)
        if expected != found:
            if what == "shape":
                expected, found = tuple(expected), tuple(found)
            raise ValueError(
                f"expected residual of the {what} of input, {expected}, got {what} {found}"
            )


def batch_norm_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | torch.nn.Module = "relu",
    residual: Tensor | None = None,
) -> Tensor:
    r"""Batch normalization, the addition of a residual, and an activation, in one pass.

    .. math:: y = \phi\left(\frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \epsilon}}
        * \gamma + \beta + r\right)

    ``relu(batch_norm(x) + r)`` in three operators reads or writes tensors of this size at least
    seven times forward and six backward; this function does so three and five times at best.
    Backward computes the argument of the activation again from ``input`` and ``residual``; after a
    residual, piecewise linear activations such as ``relu`` read the output instead. No more is kept
    for the backward than by PyTorch's functions. For float64 on CUDA these do the addition and the
    activation, after the norm of this library. Source of the normalization: Ioffe & Szegedy 2015,
    algorithm 1; of the activations: see :class:`batchnorm_ext.BatchNormAct2d`.

    Args:
        input, running_mean, running_var, weight, bias, training, momentum, eps: as
            :func:`batchnorm_ext.functional.batch_norm`.
        activation: one of those that :class:`batchnorm_ext.BatchNormAct2d` lists, with arguments as
            in ``"leaky_relu(0.1)"``; or such a module of ``torch.nn``.
        residual: added before the activation; of input's shape, dtype and device.

    Returns:
        Tensor of the shape, dtype and memory format of ``input``.

    Raises:
        ValueError: an unknown activation; a residual unlike ``input``.

        Others as :func:`batchnorm_ext.functional.batch_norm`. No tensor is changed.

    Example::

        >>> x, shortcut = torch.randn(2, 8, 16, 4, 4)
        >>> y = batchnorm_ext.functional.batch_norm_act(x, None, None, training=True,
        ...                                             activation="relu", residual=shortcut)
        >>> y.min() >= 0
        tensor(True)
    """
    name = activation_name(activation)
    check_residual(input, residual)
    tensors = (input, running_mean, running_var, weight, bias)
    if (
        momentum is not None
        and not _ops.leaves_process()
        and _ops.takes(BATCH_NORM, (*tensors, residual))
    ):
        options = (None, None, training, momentum, eps, 0, residual, name)
        return normalize(BATCH_NORM, *tensors, *options)
    return then(BATCH_NORM(*tensors, training, momentum, eps), residual, name)


def instance_norm_act(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: str | torch.nn.Module = "relu",
    residual: Tensor | None = None,
) -> Tensor:
    r"""Instance normalization by the statistics of the input, a residual, and an activation.

    As :func:`batch_norm_act`, with mean and variance per sample and channel: Ulyanov, Vedaldi &
    Lempitsky 2016, equation 2.

    Args:
        input: ``(N, C, *)``, as :func:`batchnorm_ext.functional.instance_norm`.
        weight, bias: ``(C,)``.
        eps: added to the variance.
        activation, residual: as :func:`batch_norm_act`.

    Returns:
        Tensor of the shape, dtype and memory format of ``input``.

    Raises:
        ValueError: as :func:`batch_norm_act`; one element per sample and channel.
        RuntimeError: as :func:`batchnorm_ext.functional.instance_norm`.

    Example::

        >>> x = torch.randn(2, 3, 8, 8)
        >>> batchnorm_ext.functional.instance_norm_act(x, activation="leaky_relu(0.2)").shape
        torch.Size([2, 3, 8, 8])
    """
    groups = input.size(1) if isinstance(input, Tensor) and input.dim() > 2 else 0
    return _of_samples(INSTANCE_NORM, input, groups, weight, bias, eps, activation, residual)


def group_norm_act(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: str | torch.nn.Module = "relu",
    residual: Tensor | None = None,
) -> Tensor:
    r"""Group normalization, a residual, and an activation, in one pass.

    As :func:`batch_norm_act`, with mean and variance per sample and group of channels: Wu & He
    2018, equation 7.

    Args:
        input: ``(N, C, *)``, as :func:`batchnorm_ext.functional.group_norm`.
        num_groups: number of groups, which divides C.
        weight, bias: ``(C,)``.
        eps: added to the variance.
        activation, residual: as :func:`batch_norm_act`.

    Returns:
        Tensor of the shape, dtype and memory format of ``input``.

    Raises:
        ValueError: as :func:`batch_norm_act`; a single sample with one element per group.
        RuntimeError: as :func:`torch.nn.functional.group_norm`.

    Example::

        >>> x = torch.randn(2, 8, 16, 16)
        >>> batchnorm_ext.functional.group_norm_act(x, 4, activation="silu").shape
        torch.Size([2, 8, 16, 16])
    """
    return _of_samples(GROUP_NORM, input, num_groups, weight, bias, eps, activation, residual)


def _of_samples(
    native: Native,
    input: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str | torch.nn.Module,
    residual: Tensor | None,
) -> Tensor:
    name = activation_name(activation)
    check_residual(input, residual)
    if not _ops.leaves_process() and type(groups) is int and groups > 0:
        x = as_autocast(input) if native is GROUP_NORM else input
        added = residual if residual is None else residual.to(x.dtype)
        # with one element per sample and channel, parameters differ within a statistic
        cells = input.shape[:2].numel()
        fused = input.numel() > cells and can_fuse(input, residual, name)
        rest = (added, name) if fused else (None, "")
        rest = (weight, bias, None, None, True, eps, groups, True, 1, *rest)
        tensors = (input, weight, bias, residual)
        y = by_operator(native, eps, tensors, _ops.batch_norm, x, *rest)
        if y is not None:
            return y if fused else then(y, residual, name)
    if native is GROUP_NORM:
        return then(native(input, groups, weight, bias, eps), residual, name)
    return then(native(input, None, None, weight, bias, True, 0.0, eps), residual, name)
