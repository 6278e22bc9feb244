"""Drop-ins for the normalization classes of ``torch.nn``.

Each class derives from its counterpart and replaces ``forward`` alone, so that constructor,
``state_dict``, ``repr``, checks and ``isinstance`` are those of ``torch.nn``.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from batchnorm_ext import functional
from batchnorm_ext._docstrings import GROUP, INSTANCE, LAYER, RMS, documented
from batchnorm_ext._layer import (
    FusedBatchNorm,
    FusedGroupNorm,
    FusedInstanceNorm,
    FusedLayerNorm,
    FusedRMSNorm,
)

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "LazyInstanceNorm1d",
    "LazyInstanceNorm2d",
    "LazyInstanceNorm3d",
    "RMSNorm",
]


@documented("(N, C) or (N, C, L)")
class BatchNorm1d(FusedBatchNorm, nn.BatchNorm1d):
    """:class:`torch.nn.BatchNorm1d` on the fused kernels.

    Example::

        >>> norm = batchnorm_ext.BatchNorm1d(64)
        >>> norm(torch.randn(32, 64)).shape
        torch.Size([32, 64])
    """


@documented("(N, C, H, W)")
class BatchNorm2d(FusedBatchNorm, nn.BatchNorm2d):
    """:class:`torch.nn.BatchNorm2d` on the fused kernels.

    Example::

        >>> norm = batchnorm_ext.BatchNorm2d(64)
        >>> x = torch.randn(8, 64, 56, 56).to(memory_format=torch.channels_last)
        >>> norm(x).is_contiguous(memory_format=torch.channels_last)
        True
    """


@documented("(N, C, D, H, W)")
class BatchNorm3d(FusedBatchNorm, nn.BatchNorm3d):
    """:class:`torch.nn.BatchNorm3d` on the fused kernels.

    Example::

        >>> norm = batchnorm_ext.BatchNorm3d(16)
        >>> norm(torch.randn(2, 16, 8, 32, 32)).shape
        torch.Size([2, 16, 8, 32, 32])
    """


@documented("(N, C) or (N, C, L)")
class LazyBatchNorm1d(FusedBatchNorm, nn.LazyBatchNorm1d):
    """A :class:`BatchNorm1d` that takes ``num_features`` from its first input.

    Example::

        >>> norm = batchnorm_ext.LazyBatchNorm1d()
        >>> norm(torch.randn(32, 64)).shape, norm.num_features
        (torch.Size([32, 64]), 64)
    """

    cls_to_become = BatchNorm1d


@documented("(N, C, H, W)")
class LazyBatchNorm2d(FusedBatchNorm, nn.LazyBatchNorm2d):
    """A :class:`BatchNorm2d` that takes ``num_features`` from its first input.

    Example::

        >>> norm = batchnorm_ext.LazyBatchNorm2d()
        >>> norm(torch.randn(8, 64, 56, 56)).shape, norm.num_features
        (torch.Size([8, 64, 56, 56]), 64)
    """

    cls_to_become = BatchNorm2d


@documented("(N, C, D, H, W)")
class LazyBatchNorm3d(FusedBatchNorm, nn.LazyBatchNorm3d):
    """A :class:`BatchNorm3d` that takes ``num_features`` from its first input.

    Example::

        >>> norm = batchnorm_ext.LazyBatchNorm3d()
        >>> norm(torch.randn(2, 16, 8, 32, 32)).shape, norm.num_features
        (torch.Size([2, 16, 8, 32, 32]), 16)
    """

    cls_to_become = BatchNorm3d


@documented("(N, C, L) or (C, L)", INSTANCE)
class InstanceNorm1d(FusedInstanceNorm, nn.InstanceNorm1d):
    """:class:`torch.nn.InstanceNorm1d` on the fused kernels.

    Example::

        >>> norm = batchnorm_ext.InstanceNorm1d(16, affine=True)
        >>> norm(torch.randn(2, 16, 100)).shape
        torch.Size([2, 16, 100])
    """


@documented("(N, C, H, W) or (C, H, W)", INSTANCE)
class InstanceNorm2d(FusedInstanceNorm, nn.InstanceNorm2d):
    """:class:`torch.nn.InstanceNorm2d` on the fused kernels.

    Example::

        >>> norm = batchnorm_ext.InstanceNorm2d(16, affine=True)
        >>> norm(torch.randn(2, 16, 32, 32)).shape
        torch.Size([2, 16, 32, 32])
    """


@documented("(N, C, D, H, W) or (C, D, H, W)", INSTANCE)
class InstanceNorm3d(FusedInstanceNorm, nn.InstanceNorm3d):
    """:class:`torch.nn.InstanceNorm3d` on the fused kernels.

    Example::

        >>> norm = batchnorm_ext.InstanceNorm3d(16, affine=True)
        >>> norm(torch.randn(2, 16, 8, 32, 32)).shape
        torch.Size([2, 16, 8, 32, 32])
    """


@documented("(N, C, L) or (C, L)", INSTANCE)
class LazyInstanceNorm1d(FusedInstanceNorm, nn.LazyInstanceNorm1d):
    """An :class:`InstanceNorm1d` that takes ``num_features`` from its first input.

    Example::

        >>> norm = batchnorm_ext.LazyInstanceNorm1d()
        >>> norm(torch.randn(2, 16, 100)).shape, norm.num_features
        (torch.Size([2, 16, 100]), 16)
    """

    cls_to_become = InstanceNorm1d


@documented("(N, C, H, W) or (C, H, W)", INSTANCE)
class LazyInstanceNorm2d(FusedInstanceNorm, nn.LazyInstanceNorm2d):
    """An :class:`InstanceNorm2d` that takes ``num_features`` from its first input.

    Example::

        >>> norm = batchnorm_ext.LazyInstanceNorm2d()
        >>> norm(torch.randn(2, 16, 32, 32)).shape, norm.num_features
        (torch.Size([2, 16, 32, 32]), 16)
    """

    cls_to_become = InstanceNorm2d


@documented("(N, C, D, H, W) or (C, D, H, W)", INSTANCE)
class LazyInstanceNorm3d(FusedInstanceNorm, nn.LazyInstanceNorm3d):
    """An :class:`InstanceNorm3d` that takes ``num_features`` from its first input.

    Example::

        >>> norm = batchnorm_ext.LazyInstanceNorm3d()
        >>> norm(torch.randn(2, 16, 8, 32, 32)).shape, norm.num_features
        (torch.Size([2, 16, 8, 32, 32]), 16)
    """

    cls_to_become = InstanceNorm3d


@documented("(N, C, *)", GROUP)
class GroupNorm(FusedGroupNorm, nn.GroupNorm):
    """:class:`torch.nn.GroupNorm` on the fused kernels.

    Example::

        >>> norm = batchnorm_ext.GroupNorm(4, 16)
        >>> norm(torch.randn(2, 16, 32, 32)).shape
        torch.Size([2, 16, 32, 32])
    """


@documented("(*, *normalized_shape)", LAYER)
class LayerNorm(FusedLayerNorm, nn.LayerNorm):
    """:class:`torch.nn.LayerNorm` on the fused kernels, also over the channels of images.

    Example::

        >>> norm = batchnorm_ext.LayerNorm(512)
        >>> norm(torch.randn(8, 100, 512)).shape
        torch.Size([8, 100, 512])
        >>> norm = batchnorm_ext.LayerNorm(64, channel_dim=1)
        >>> norm(torch.randn(8, 64, 56, 56)).shape
        torch.Size([8, 64, 56, 56])
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        channel_dim: int | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        if channel_dim is not None:
            if channel_dim != 1 or len(self.normalized_shape) != 1:
                raise ValueError(
                    "expected channel_dim to be None, or 1 with one size in normalized_shape, got "
                    f"{channel_dim} and {self.normalized_shape}"
                )
            self.__class__ = ChannelLayerNorm


class ChannelLayerNorm(LayerNorm):
    """A :class:`LayerNorm` with ``channel_dim=1``; no layer of ``torch.nn`` computes the same."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.layer_norm(
            input, self.normalized_shape, self.weight, self.bias, self.eps, 1
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, channel_dim=1"


@documented("(*, *normalized_shape)", RMS)
class RMSNorm(FusedRMSNorm, nn.RMSNorm):
    """:class:`torch.nn.RMSNorm` on the fused kernels.

    Example::

        >>> norm = batchnorm_ext.RMSNorm(512)
        >>> norm(torch.randn(8, 100, 512)).shape
        torch.Size([8, 100, 512])
    """
