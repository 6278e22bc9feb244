"""Batch normalization over all ranks of a process group."""

import copy
import itertools
import os
import warnings

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm_ext import _ops, sync_debug
from batchnorm_ext._activations import can_fuse, then
from batchnorm_ext._layer import FusedBatchNorm, counting, own, statistics
from batchnorm_ext._native import Native
from batchnorm_ext._recompute import log_kept_once, recomputes
from batchnorm_ext._tracking import track

__all__ = ["SyncBatchNorm"]

_Native = nn.SyncBatchNorm  # whatever that name may stand for later
_native_forward = _Native.forward
_DEBUG = os.environ.get("BATCHNORM_EXT_SYNC_DEBUG") == "1"


class _Synchronized(Native):
    """Where torch.nn synchronizes, it does not call the function that a program may replace."""

    def is_replaced(self) -> bool:
        return False


_SYNC_BATCH_NORM = _Synchronized("batch_norm", "cpu", "cuda")


class SyncBatchNorm(FusedBatchNorm, _BatchNorm):
    r"""Batch normalization with the statistics of the batches of all ranks, as in
    :class:`torch.nn.SyncBatchNorm`, on CPU and GPU.

    In training, the ranks of ``process_group`` add up the sums of their inputs and of the squares
    by one all-reduce, ``4 C + 1`` values in float64: each sum in two parts, so that the variance is
    as precise as that of the local layer. They normalize with the mean and variance of the sum; the
    backward all-reduces ``2 C`` values. Batches of different sizes, empty ones among them, count by
    their elements, and the dtypes of the inputs may differ. The gradients of weight and bias are
    those of this rank, for ``DistributedDataParallel`` to average. In evaluation, without an
    initialized process group and in a group of one there is no communication: the layer is a plain
    batch normalization.

    It derives from the base of the batch normalization classes and not from
    ``torch.nn.SyncBatchNorm``, whose instances ``DistributedDataParallel`` refuses on the CPU.

    Activation checkpointing repeats the forward's message along with the forward, and leaves the
    running statistics alone. ``BATCHNORM_EXT_SYNC_DEBUG=1``, set before the import, compares over
    the store of the group before every message that all ranks are at the same layer, with the same
    number of channels and inputs that all want a gradient or all want none, and names layer and
    ranks where they are not or one does not come; compiled code is not checked.

    A deep copy shares the process group. A pickle, as of ``torch.save(model)``, leaves it out: what
    is loaded synchronizes with all ranks until its ``process_group`` is set again.

    Source: Ioffe & Szegedy, *Batch Normalization*, 2015, algorithm 1 over the union of the batches.

    Args:
        num_features: C, of inputs ``(N, C, ...)`` in float32, float64, bfloat16 or float16 and any
            memory format.
        eps, momentum, affine, track_running_stats: as in :class:`torch.nn.BatchNorm2d`.
        process_group: the ranks to synchronize with; None for all.
        device, dtype, kwargs: as in :class:`torch.nn.BatchNorm2d`.

    Raises:
        ValueError: an input of less than 2 dimensions; a process group that this rank is not in.
        RuntimeError: names the layer, the rank and the input if the message fails, as when a rank
            dies or does not come within the timeout of the group; the running statistics are then
            as before. Gloo may end a process whose message has another size than that of its
            neighbour: which layers and channels these were, the debug mode tells.
        NotImplementedError: an input that the operators do not take while there are ranks to
            synchronize with.

    Example::

        >>> dist.init_process_group("gloo")  # under torchrun
        >>> norm = batchnorm_ext.SyncBatchNorm(64)
        >>> norm(torch.randn(2, 64, 56, 56)).shape
        torch.Size([2, 64, 56, 56])
    """

    _serial = itertools.count()

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: "dist.ProcessGroup | None" = None,
        device=None,
        dtype=None,
        **kwargs,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, **kwargs
        )
        self.process_group = process_group
        # what errors call the layer: its number, or its path in the model that was converted
        self._batchnorm_ext_name = f"{next(self._serial)}"
        # the class and the process group before the conversion
        self._batchnorm_ext_origin = None

    @classmethod
    def convert_sync_batchnorm(
        cls, module: nn.Module, process_group: "dist.ProcessGroup | None" = None
    ) -> nn.Module:
        """:func:`batchnorm_ext.convert_sync_batchnorm`, at the place where ``torch.nn`` has it."""
        from batchnorm_ext.convert import convert_sync_batchnorm

        return convert_sync_batchnorm(module, process_group)

    def forward(self, input: Tensor) -> Tensor:
        return self._forward_or_leave(input)

    def _forward_or_leave(self, input: Tensor, *more: Tensor) -> Tensor:
        if _Native.forward is not _native_forward:  # replaced, see Fused
            return self._torch_forward(input, *more)
        group = self._group_now()
        if group is None or isinstance(input, fx.Proxy):
            return super()._forward_or_leave(input, *more)
        return self._synchronized(group, input, *more)

    def _torch_forward(self, input: Tensor) -> Tensor:
        if _Native.forward is not _native_forward:
            return _Native.forward(self, input)
        return super()._torch_forward(input)

    def _synchronized(
        self,
        group: "dist.ProcessGroup",
        input: Tensor,
        residual: Tensor | None = None,
        activation: str = "",
    ) -> Tensor:
        if (activation or residual is not None) and not can_fuse(input, residual, activation):
            return then(SyncBatchNorm._synchronized(self, group, input), residual, activation)
        weight, bias = own(self, "_parameters", "weight"), own(self, "_parameters", "bias")
        mean, var, batches = statistics(self)
        layer = (
            f"SyncBatchNorm {self._batchnorm_ext_name}, on rank {group.rank()} of {group.size()}"
        )
        if reason := _ops.refusal(_SYNC_BATCH_NORM, (input, mean, var, weight, bias, residual)):
            raise NotImplementedError(f"{layer}: cannot synchronize: {reason}")
        self._check_input_dim(input)
        if not torch.compiler.is_compiling() and recomputes():
            log_kept_once("on outputs of SyncBatchNorm over several ranks")
        debug = _DEBUG and not torch.compiler.is_compiling()
        if debug:
            self._compare_ranks("forward", group, input)
        counted, batches, momentum = counting(self.momentum, batches, mean, var)
        options = (momentum, self.eps, group.group_name, layer, residual, activation)
        if mean is None:
            output = _ops.sync_batch_norm(input, weight, bias, mean, var, batches, *options)[0]
        else:
            tensors = (input, weight, bias, mean, var, batches, counted)
            output = track(_ops.sync_batch_norm, *tensors, *options)
        if debug and _wants_gradient(input):
            output.register_hook(lambda _: self._compare_ranks("backward", group, input))
        return output

    def _group_now(self) -> "dist.ProcessGroup | None":
        """The group to synchronize with in the mode that the layer is in."""
        if not self.training:
            return None
        if self.track_running_stats and self.num_batches_tracked is None:
            raise AssertionError("num_batches_tracked must not be None")
        return self._group()

    def _group(self) -> "dist.ProcessGroup | None":
        """The group to synchronize with, if it has other ranks."""
        group = self.process_group
        if group is None:
            if not (dist.is_available() and dist.is_initialized()):
                return None
            group = dist.group.WORLD
        elif group == dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(
                f"SyncBatchNorm {self._batchnorm_ext_name}: rank {dist.get_rank()} is not in the "
                "process group"
            )
        return group if group.size() > 1 else None

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")
        if input.size(1) == 0:
            raise ValueError("SyncBatchNorm number of input channels should be non-zero")

    def _compare_ranks(self, direction: str, group: "dist.ProcessGroup", input: Tensor) -> None:
        name = self._batchnorm_ext_name
        message = f"{direction} of {name} with {input.size(1)} channels"
        if direction == "forward" and not _wants_gradient(input):
            message += " and no message in the backward"
        timeout = group._get_backend(input.device).options._timeout
        sync_debug.compare(group, name, message, timeout)

    # A process group can be neither copied nor pickled. Copies share it; by default copy() would
    # take what a pickle holds.
    def __copy__(self) -> "SyncBatchNorm":
        twin = self.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    def __deepcopy__(self, memo: dict) -> "SyncBatchNorm":
        memo[id(self)] = twin = self.__new__(type(self))
        memo.update({id(group): group for group in self._groups()})
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def __getstate__(self) -> dict:
        state = self.__dict__.copy()
        if self._groups():
            warnings.warn(
                "SyncBatchNorm is pickled without its process group: set `process_group` of what "
                "is loaded, or it synchronizes with all ranks",
                stacklevel=2,
            )
            state["process_group"] = None
            if self._batchnorm_ext_origin is not None:
                state["_batchnorm_ext_origin"] = self._batchnorm_ext_origin[0], None
        return state

    def _groups(self) -> list:
        """The process groups that the layer refers to."""
        groups = [self.process_group, *(self._batchnorm_ext_origin or ())[1:]]
        return [group for group in groups if group is not None]


def _wants_gradient(input: Tensor) -> bool:
    """Whether the layer will send a message in the backward: not for its parameters alone."""
    return torch.is_grad_enabled() and input.requires_grad
