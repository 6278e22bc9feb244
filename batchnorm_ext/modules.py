"""Drop-ins for the batch normalization classes of ``torch.nn``.

Each class derives from its counterpart and replaces ``forward`` alone, so that constructor,
``state_dict``, ``repr``, checks and ``isinstance`` are those of ``torch.nn``.
"""

from torch import nn

from batchnorm_ext._docstrings import documented
from batchnorm_ext._layer import FusedForward

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
]


@documented("(N, C) or (N, C, L)")
class BatchNorm1d(FusedForward, nn.BatchNorm1d):
    """:class:`torch.nn.BatchNorm1d` on the fused kernels.

    Example::

        >>> norm = batchnorm_ext.BatchNorm1d(64)
        >>> norm(torch.randn(32, 64)).shape
        torch.Size([32, 64])
    """


@documented("(N, C, H, W)")
class BatchNorm2d(FusedForward, nn.BatchNorm2d):
    """:class:`torch.nn.BatchNorm2d` on the fused kernels.

    Example::

        >>> norm = batchnorm_ext.BatchNorm2d(64)
        >>> x = torch.randn(8, 64, 56, 56).to(memory_format=torch.channels_last)
        >>> norm(x).is_contiguous(memory_format=torch.channels_last)
        True
    """


@documented("(N, C, D, H, W)")
class BatchNorm3d(FusedForward, nn.BatchNorm3d):
    """:class:`torch.nn.BatchNorm3d` on the fused kernels.

    Example::

        >>> norm = batchnorm_ext.BatchNorm3d(16)
        >>> norm(torch.randn(2, 16, 8, 32, 32)).shape
        torch.Size([2, 16, 8, 32, 32])
    """


@documented("(N, C) or (N, C, L)")
class LazyBatchNorm1d(FusedForward, nn.LazyBatchNorm1d):
    """A :class:`BatchNorm1d` that takes ``num_features`` from its first input.

    Example::

        >>> norm = batchnorm_ext.LazyBatchNorm1d()
        >>> norm(torch.randn(32, 64)).shape, norm.num_features
        (torch.Size([32, 64]), 64)
    """

    cls_to_become = BatchNorm1d


@documented("(N, C, H, W)")
class LazyBatchNorm2d(FusedForward, nn.LazyBatchNorm2d):
    """A :class:`BatchNorm2d` that takes ``num_features`` from its first input.

    Example::

        >>> norm = batchnorm_ext.LazyBatchNorm2d()
        >>> norm(torch.randn(8, 64, 56, 56)).shape, norm.num_features
        (torch.Size([8, 64, 56, 56]), 64)
    """

    cls_to_become = BatchNorm2d


@documented("(N, C, D, H, W)")
class LazyBatchNorm3d(FusedForward, nn.LazyBatchNorm3d):
    """A :class:`BatchNorm3d` that takes ``num_features`` from its first input.

    Example::

        >>> norm = batchnorm_ext.LazyBatchNorm3d()
        >>> norm(torch.randn(2, 16, 8, 32, 32)).shape, norm.num_features
        (torch.Size([2, 16, 8, 32, 32]), 16)
    """

    cls_to_become = BatchNorm3d
