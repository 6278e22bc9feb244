"""Drop-ins for the batch normalization classes of ``torch.nn``.

Each class derives from its counterpart and replaces ``forward`` alone, so that constructor,
``state_dict``, ``repr``, checks and ``isinstance`` are those of ``torch.nn``.
"""

import torch
import torch.nn.functional as F  # noqa: F401  (what torch.jit.script compiles, see __wrapped__)
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm_ext import _ops
from batchnorm_ext.functional import normalize

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
]

_native_forward = _BatchNorm.forward


def _parameter(module: nn.Module, name: str) -> Tensor | None:
    """``getattr(module, name)`` without the half microsecond that a module spends on finding it."""
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)  # parametrized: not


def _buffer(module: nn.Module, name: str) -> Tensor | None:
    buffers = module._buffers
    return buffers[name] if name in buffers else getattr(module, name)


class _FusedForward:
    """Replaces ``forward`` of the ``torch.nn`` class that follows it in the list of bases."""

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        cls.__native = cls.__mro__[cls.__mro__.index(_FusedForward) + 1]

    def forward(self, input: Tensor) -> Tensor:
        native = self.__native.forward
        if native is not _native_forward:  # replaced, as scripts for test-time adaptation do
            return native(self, input)
        weight, bias = _parameter(self, "weight"), _parameter(self, "bias")
        mean, var, batches = _statistics(self)
        training, momentum = self.training, self.momentum
        cumulative = training and momentum is None and batches is not None
        if not _ops.takes(input, mean, var, weight, bias, exports_native=not cumulative):
            if isinstance(input, fx.Proxy):  # as for torch.nn, a layer is one node of the graph
                path = input.tracer.path_of_module(self)
                return input.tracer.create_proxy("call_module", path, (input,), {})
            return native(self, input)
        self._check_input_dim(input)
        batches, momentum = counted(batches, momentum, tracks=mean is not None)
        # in evaluation without buffers the statistics are those of the batch
        training = training or (mean is None and var is None)
        return normalize(input, weight, bias, mean, var, batches, training, momentum, self.eps)

    # torch.jit.script compiles the source of this one instead: a script leaves the process.
    forward.__wrapped__ = _native_forward


def _statistics(module: nn.Module) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Running mean and variance and the counter of batches, as far as this forward uses them.

    In training without tracking the buffers, if any, are neither read nor written, and in
    evaluation no batch is counted.
    """
    if not module.training:
        return _buffer(module, "running_mean"), _buffer(module, "running_var"), None
    if not module.track_running_stats:
        return None, None, None
    return tuple(_buffer(module, n) for n in ("running_mean", "running_var", "num_batches_tracked"))


def counted(
    batches: Tensor | None, momentum: float | None, tracks: bool
) -> tuple[Tensor | None, float | None]:
    """The counter as the operators take it, and the momentum.

    A counter of another dtype, as averaging or a checkpoint leaves it, counts here; without any,
    ``momentum=None`` moves nothing.
    """
    if batches is None:
        return None, 0.0 if momentum is None else momentum
    if tracks and batches.dtype is torch.int64:
        return batches, momentum
    batches.add_(1)
    return None, 1 / float(batches) if momentum is None else momentum


class BatchNorm1d(_FusedForward, nn.BatchNorm1d):
    """:class:`torch.nn.BatchNorm1d` on the fused kernels, for ``(N, C)`` and ``(N, C, L)``.

    Arguments, ``state_dict`` and errors are those of the ``torch.nn`` class; see
    :func:`batchnorm_ext.functional.batch_norm` for what is computed and which dtypes are taken.
    Every dense memory format is kept, also that of ``(N, L, C).transpose(1, 2)``, and
    ``momentum=None``, the cumulative average, works under ``torch.compile(fullgraph=True)``. An
    empty batch leaves the statistics and ``num_batches_tracked`` alone.

    Example::

        >>> batchnorm_ext.BatchNorm1d(64)(torch.randn(32, 64)).shape
        torch.Size([32, 64])
    """


class BatchNorm2d(_FusedForward, nn.BatchNorm2d):
    """:class:`torch.nn.BatchNorm2d` on the fused kernels, for ``(N, C, H, W)``.

    See :class:`BatchNorm1d`.

    Example::

        >>> x = torch.randn(8, 64, 56, 56).to(memory_format=torch.channels_last)
        >>> batchnorm_ext.BatchNorm2d(64)(x).is_contiguous(memory_format=torch.channels_last)
        True
    """


class BatchNorm3d(_FusedForward, nn.BatchNorm3d):
    """:class:`torch.nn.BatchNorm3d` on the fused kernels, for ``(N, C, D, H, W)``.

    See :class:`BatchNorm1d`.

    Example::

        >>> batchnorm_ext.BatchNorm3d(16)(torch.randn(2, 16, 8, 32, 32)).shape
        torch.Size([2, 16, 8, 32, 32])
    """


class LazyBatchNorm1d(_FusedForward, nn.LazyBatchNorm1d):
    """A :class:`BatchNorm1d` that takes ``num_features`` from its first input.

    Example::

        >>> bn = batchnorm_ext.LazyBatchNorm1d()
        >>> bn(torch.randn(32, 64)); bn.num_features
        64
    """

    cls_to_become = BatchNorm1d


class LazyBatchNorm2d(_FusedForward, nn.LazyBatchNorm2d):
    """A :class:`BatchNorm2d` that takes ``num_features`` from its first input."""

    cls_to_become = BatchNorm2d


class LazyBatchNorm3d(_FusedForward, nn.LazyBatchNorm3d):
    """A :class:`BatchNorm3d` that takes ``num_features`` from its first input."""

    cls_to_become = BatchNorm3d
