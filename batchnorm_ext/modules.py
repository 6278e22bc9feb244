"""Drop-ins for the batch normalization classes of ``torch.nn``.

Each class derives from its counterpart and replaces ``forward`` alone, so that constructor,
``state_dict``, ``repr``, checks and ``isinstance`` are those of ``torch.nn``.
"""

from torch import nn

from batchnorm_ext._layer import FusedForward

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
]


class BatchNorm1d(FusedForward, nn.BatchNorm1d):
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


class BatchNorm2d(FusedForward, nn.BatchNorm2d):
    """:class:`torch.nn.BatchNorm2d` on the fused kernels, for ``(N, C, H, W)``.

    See :class:`BatchNorm1d`.

    Example::

        >>> x = torch.randn(8, 64, 56, 56).to(memory_format=torch.channels_last)
        >>> batchnorm_ext.BatchNorm2d(64)(x).is_contiguous(memory_format=torch.channels_last)
        True
    """


class BatchNorm3d(FusedForward, nn.BatchNorm3d):
    """:class:`torch.nn.BatchNorm3d` on the fused kernels, for ``(N, C, D, H, W)``.

    See :class:`BatchNorm1d`.

    Example::

        >>> batchnorm_ext.BatchNorm3d(16)(torch.randn(2, 16, 8, 32, 32)).shape
        torch.Size([2, 16, 8, 32, 32])
    """


class LazyBatchNorm1d(FusedForward, nn.LazyBatchNorm1d):
    """A :class:`BatchNorm1d` that takes ``num_features`` from its first input.

    Example::

        >>> bn = batchnorm_ext.LazyBatchNorm1d()
        >>> bn(torch.randn(32, 64)); bn.num_features
        64
    """

    cls_to_become = BatchNorm1d


class LazyBatchNorm2d(FusedForward, nn.LazyBatchNorm2d):
    """A :class:`BatchNorm2d` that takes ``num_features`` from its first input."""

    cls_to_become = BatchNorm2d


class LazyBatchNorm3d(FusedForward, nn.LazyBatchNorm3d):
    """A :class:`BatchNorm3d` that takes ``num_features`` from its first input."""

    cls_to_become = BatchNorm3d
