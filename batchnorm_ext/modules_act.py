"""Normalization, the addition of a residual and an activation as one layer."""

import torch.distributed as dist
from torch import Tensor, nn

from batchnorm_ext import functional
from batchnorm_ext._act import check_residual
from batchnorm_ext._activations import activation_name, then
from batchnorm_ext._docstrings import BATCH_ACT, GROUP_ACT, documented
from batchnorm_ext._layer import own
from batchnorm_ext._recompute import recomputed
from batchnorm_ext.modules import BatchNorm1d, BatchNorm2d, BatchNorm3d, GroupNorm
from batchnorm_ext.sync import SyncBatchNorm

__all__ = [
    "BatchNormAct1d",
    "BatchNormAct2d",
    "BatchNormAct3d",
    "GroupNormAct",
    "SyncBatchNormAct",
]


class _Activated:
    """Stands before a normalization in the list of bases. ``activation`` is a name."""

    activation: str
    recompute: bool = False  # of layers that were pickled without it

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        # without a residual, hooks and traced graphs see one argument, as they do of a norm
        more = () if residual is None else (residual,)
        if self.recompute:
            return recomputed(self._forward_or_leave, input, *more)
        return self._forward_or_leave(input, *more)

    def _torch_forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return then(super()._torch_forward(input), residual, self.activation)

    def extra_repr(self) -> str:
        recompute = ", recompute=True" if self.recompute else ""
        return f"{super().extra_repr()}, activation={self.activation or 'identity'}{recompute}"


class _BatchNormAct(_Activated):
    def __init__(
        self,
        num_features: int,
        activation: str | nn.Module | type[nn.Module] = "relu",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device=None,
        dtype=None,
        recompute: bool = False,
        **kwargs,
    ) -> None:
        options = (eps, momentum, affine, track_running_stats)
        super().__init__(num_features, *options, device=device, dtype=dtype, **kwargs)
        self.activation, self.recompute = activation_name(activation), recompute

    def _fused_forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        check_residual(input, residual)
        return super()._fused_forward(input, residual, self.activation)


@documented("(N, C) or (N, C, L)", BATCH_ACT)
class BatchNormAct1d(_BatchNormAct, BatchNorm1d):
    """A :class:`BatchNorm1d`, the addition of a residual and an activation in one pass.

    Example::

        >>> norm = batchnorm_ext.BatchNormAct1d(64, "gelu")
        >>> norm(torch.randn(32, 64)).shape
        torch.Size([32, 64])
    """


@documented("(N, C, H, W)", BATCH_ACT)
class BatchNormAct2d(_BatchNormAct, BatchNorm2d):
    """A :class:`BatchNorm2d`, the addition of a residual and an activation in one pass.

    Example::

        >>> norm = batchnorm_ext.BatchNormAct2d(64, "relu")
        >>> x, shortcut = torch.randn(2, 8, 64, 56, 56)
        >>> norm(x, shortcut).min()
        tensor(0., grad_fn=<MinBackward1>)
    """


@documented("(N, C, D, H, W)", BATCH_ACT)
class BatchNormAct3d(_BatchNormAct, BatchNorm3d):
    """A :class:`BatchNorm3d`, the addition of a residual and an activation in one pass.

    Example::

        >>> norm = batchnorm_ext.BatchNormAct3d(16, "leaky_relu(0.1)")
        >>> norm(torch.randn(2, 16, 8, 32, 32)).shape
        torch.Size([2, 16, 8, 32, 32])
    """


class SyncBatchNormAct(_BatchNormAct, SyncBatchNorm):
    r"""A :class:`SyncBatchNorm`, the addition of a residual and an activation in one pass.

    .. math:: y = \phi\left(\frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \epsilon}} * \gamma
        + \beta + r\right)

    with mean and variance of the batches of all ranks, an activation phi and, where ``forward`` is
    given one, a residual r of the shape, dtype and device of the input, which each rank adds to its
    own batch. The messages are those of :class:`SyncBatchNorm`, as are parameters, buffers and
    ``state_dict``; in evaluation and in one process it is a plain :class:`BatchNormAct2d`.
    ``convert_sync_batchnorm`` makes it of ``BatchNormAct1d/2d/3d``, and ``revert`` undoes that.

    Source: Ioffe & Szegedy, *Batch Normalization*, 2015, algorithm 1 over the union of the batches,
    with what stands around it in a network.

    Args:
        num_features: C, of inputs ``(N, C, ...)`` in float32, float64, bfloat16 or float16 and any
            memory format.
        activation: as in :class:`BatchNormAct2d`.
        eps, momentum, affine, track_running_stats: as in :class:`torch.nn.BatchNorm2d`.
        process_group: the ranks to synchronize with; None for all.
        recompute: as in :class:`BatchNormAct2d`; outputs over several ranks are kept.
        device, dtype, kwargs: as in :class:`torch.nn.BatchNorm2d`.

    Raises:
        ValueError: an unknown activation; a residual unlike the input, before any message.

        Others as :class:`SyncBatchNorm`.

    Example::

        >>> dist.init_process_group("gloo")  # under torchrun
        >>> norm = batchnorm_ext.SyncBatchNormAct(64, "relu")
        >>> x, shortcut = torch.randn(2, 2, 64, 56, 56)
        >>> norm(x, shortcut).min() >= 0
        tensor(True)
    """

    def __init__(
        self,
        num_features: int,
        activation: str | nn.Module | type[nn.Module] = "relu",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: "dist.ProcessGroup | None" = None,
        device=None,
        dtype=None,
        **kwargs,
    ) -> None:
        options = (eps, momentum, affine, track_running_stats, device, dtype)
        kwargs["process_group"] = process_group
        super().__init__(num_features, activation, *options, **kwargs)

    def _synchronized(
        self, group: "dist.ProcessGroup", input: Tensor, residual: Tensor | None = None
    ) -> Tensor:
        check_residual(input, residual)
        return super()._synchronized(group, input, residual, self.activation)


@documented("(N, C, *)", GROUP_ACT)
class GroupNormAct(_Activated, GroupNorm):
    """A :class:`GroupNorm`, the addition of a residual and an activation in one pass.

    Example::

        >>> norm = batchnorm_ext.GroupNormAct(4, 16, "silu")
        >>> norm(torch.randn(2, 16, 32, 32)).shape
        torch.Size([2, 16, 32, 32])
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        activation: str | nn.Module | type[nn.Module] = "relu",
        eps: float = 1e-5,
        affine: bool = True,
        device=None,
        dtype=None,
        recompute: bool = False,
        **kwargs,
    ) -> None:
        super().__init__(num_groups, num_channels, eps, affine, device, dtype, **kwargs)
        self.activation, self.recompute = activation_name(activation), recompute

    def _fused_forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        weight, bias = own(self, "_parameters", "weight"), own(self, "_parameters", "bias")
        options = (self.eps, self.activation, residual)
        return functional.group_norm_act(input, self.num_groups, weight, bias, *options)
