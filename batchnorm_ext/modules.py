"""Drop-ins for the batch normalization classes of ``torch.nn``.

Each class derives from its counterpart and replaces ``forward`` alone, so that constructor,
``state_dict``, ``repr``, checks and ``isinstance`` are those of ``torch.nn``.
"""

import torch
import torch.nn.functional as F  # noqa: F401  (what torch.jit.script compiles, see __wrapped__)
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm_ext import _ops
from batchnorm_ext._docstrings import documented
from batchnorm_ext.functional import normalize, undone_on_error

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
        # a script for test-time adaptation replaces it, and what leaves the process is torch's own
        if native is not _native_forward or (_ops.leaves_process() and _can_leave(self)):
            return native(self, input)
        if isinstance(input, fx.Proxy):
            return self.__traced(input)
        weight, bias = _parameter(self, "weight"), _parameter(self, "bias")
        mean, var, batches = _statistics(self)
        if not _ops.takes(input, mean, var, weight, bias):
            with undone_on_error(batches):
                return native(self, input)
        self._check_input_dim(input)
        counted, batches, momentum = counting(self.momentum, batches, mean, var)
        # in evaluation without buffers the statistics are those of the batch
        training = True if self.training else mean is None and var is None
        arguments = (input, weight, bias, mean, var, batches, training, momentum, self.eps)
        if counted is None:
            return normalize(*arguments)
        with undone_on_error(counted):
            counted.add_(1)
            return normalize(*arguments)

    def __traced(self, input: fx.Proxy) -> Tensor:
        """One node of the graph, where the tracer takes the ``torch.nn`` layer for a leaf."""
        twin = self.__native.__new__(self.__native)
        twin.__dict__ = self.__dict__
        path = input.tracer.path_of_module(self)
        if path and input.tracer.is_leaf_module(twin, path):
            return input.tracer.create_proxy("call_module", path, (input,), {})
        return self.__native.forward(self, input)

    # torch.jit.script compiles the source of this one instead, and errors name it
    forward.__wrapped__ = _native_forward
    forward.__qualname__ = _native_forward.__qualname__


def _can_leave(layer: nn.Module) -> bool:
    """Whether torch.export can take the layer as torch's own: not where it reads its counter."""
    return not (layer.training and layer.track_running_stats and layer.momentum is None)


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


def counting(
    momentum: float | None, batches: Tensor | None, mean: Tensor | None, var: Tensor | None
) -> tuple[Tensor | None, Tensor | None, float | None]:
    """The counter if it is to be raised here, or else for the operator to raise; the momentum.

    The operator counts in int64. A counter of another dtype, as averaging or a checkpoint leaves
    it, counts as natively. Without a counter ``momentum=None`` moves nothing.
    """
    if batches is None:
        return None, None, 0.0 if momentum is None else momentum
    if (
        (type(batches) is Tensor or isinstance(batches, _STAND_INS))
        and batches.dtype is torch.int64
        and mean is not None
        and var is not None
        and batches.is_meta is mean.is_meta
    ):
        return None, batches, momentum
    if momentum is None and isinstance(batches, Tensor):
        momentum = 1 / float(batches.detach() + 1)
    return batches, None, momentum


_STAND_INS = (FakeTensor, FunctionalTensor)  # of tracers, for a plain tensor


@documented("(N, C) or (N, C, L)")
class BatchNorm1d(_FusedForward, nn.BatchNorm1d):
    """:class:`torch.nn.BatchNorm1d` on the fused kernels.

    Example::

        >>> norm = batchnorm_ext.BatchNorm1d(64)
        >>> norm(torch.randn(32, 64)).shape
        torch.Size([32, 64])
    """


@documented("(N, C, H, W)")
class BatchNorm2d(_FusedForward, nn.BatchNorm2d):
    """:class:`torch.nn.BatchNorm2d` on the fused kernels.

    Example::

        >>> norm = batchnorm_ext.BatchNorm2d(64)
        >>> x = torch.randn(8, 64, 56, 56).to(memory_format=torch.channels_last)
        >>> norm(x).is_contiguous(memory_format=torch.channels_last)
        True
    """


@documented("(N, C, D, H, W)")
class BatchNorm3d(_FusedForward, nn.BatchNorm3d):
    """:class:`torch.nn.BatchNorm3d` on the fused kernels.

    Example::

        >>> norm = batchnorm_ext.BatchNorm3d(16)
        >>> norm(torch.randn(2, 16, 8, 32, 32)).shape
        torch.Size([2, 16, 8, 32, 32])
    """


@documented("(N, C) or (N, C, L)")
class LazyBatchNorm1d(_FusedForward, nn.LazyBatchNorm1d):
    """A :class:`BatchNorm1d` that takes ``num_features`` from its first input.

    Example::

        >>> norm = batchnorm_ext.LazyBatchNorm1d()
        >>> norm(torch.randn(32, 64)).shape, norm.num_features
        (torch.Size([32, 64]), 64)
    """

    cls_to_become = BatchNorm1d


@documented("(N, C, H, W)")
class LazyBatchNorm2d(_FusedForward, nn.LazyBatchNorm2d):
    """A :class:`BatchNorm2d` that takes ``num_features`` from its first input.

    Example::

        >>> norm = batchnorm_ext.LazyBatchNorm2d()
        >>> norm(torch.randn(8, 64, 56, 56)).shape, norm.num_features
        (torch.Size([8, 64, 56, 56]), 64)
    """

    cls_to_become = BatchNorm2d


@documented("(N, C, D, H, W)")
class LazyBatchNorm3d(_FusedForward, nn.LazyBatchNorm3d):
    """A :class:`BatchNorm3d` that takes ``num_features`` from its first input.

    Example::

        >>> norm = batchnorm_ext.LazyBatchNorm3d()
        >>> norm(torch.randn(2, 16, 8, 32, 32)).shape, norm.num_features
        (torch.Size([2, 16, 8, 32, 32]), 16)
    """

    cls_to_become = BatchNorm3d
